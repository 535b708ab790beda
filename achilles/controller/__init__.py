"""The caller's side: a connection to a server, and the jobs that are sent over it.

It imports `protocol` and `objects`. It must not know the calls that people make (`calls.py`, `dropin/`), and no
server or node but by their frames.
"""

__all__: list[str] = []
