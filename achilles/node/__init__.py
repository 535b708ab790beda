"""A node: it lends the cores of its machine to a server, and runs users' code in workers.

It imports `protocol` and `objects`, and knows one server and its own workers. It must not know a controller.
`loop.py`, `workers.py` and `process.py` are one thread that opens no letter. `worker.py` is the process that does, and
`runner.py` in it loads and calls users' code.
"""

__all__ = ["run_node"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .loop import run_node

    return run_node
