"""A node: it lends the cores of its machine to a server, and runs users' code in workers.

The folder imports `protocol` and `objects`. It knows one server and the node's workers, and must not know a controller.
`loop.py`, `workers.py` and `process.py` run in one thread, which opens no letter. `worker.py` is a worker's process.
In it `runner.py` opens letters, and calls users' code.
"""

__all__ = ["run_node"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .loop import run_node

    return run_node
