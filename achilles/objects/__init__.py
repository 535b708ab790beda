"""Objects to bytes and back: the only folder that pickles or unpickles.

Imports only `errors`, and knows no job, frame or peer. The server never imports it.
"""

__all__: list[str] = []
