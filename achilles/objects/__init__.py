"""Objects to bytes and back: the only folder that pickles, and so the only one that unpickles.

It imports `errors` alone, and knows no job, no frame and no peer. The server never imports it.
"""

__all__: list[str] = []
