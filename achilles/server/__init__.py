"""The server: it listens, authenticates, and decides which node gets which batch.

The folder knows nodes and controllers by their frames, and imports `protocol`. It must not know `objects`: letters
pass through it unopened. `listen.py` sees unverified bytes. `exchange.py` gives frames their meaning. `scheduler.py`
decides, without sockets and clocks.
"""

__all__ = ["run_server"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .listen import run_server

    return run_server
