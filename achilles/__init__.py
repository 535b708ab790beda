"""Distributed computing with the calls of ``multiprocessing.Pool``.

A server, nodes that lend it their cores, and a controller in the caller: `map`, `imap` and
`imap_unordered` over all of them. README.md begins at the beginning. To read the code, begin with
PROTOCOL.md, then errors, protocol/, config, configuring, console, objects/, server/, node/, controller/, calls, local
and dropin/. docs/tour.md has the order of the modules.

Nothing happens at import: the public names are loaded when they are first used, so that
`python -m achilles.node` imports one copy of everything, and nothing beyond its needs.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # as type checkers know it, without typing, which takes most of the time of an import
if TYPE_CHECKING:
    from .calls import cluster_status, imap, imap_unordered, kill_cluster, map
    from .configuring import write_config
    from .dropin.executor import Executor
    from .dropin.joblib_backend import register_joblib_backend
    from .dropin.pool import Pool
    from .errors import (
        AchillesError,
        AddressError,
        AuthenticationError,
        ClusterKilled,
        ConfigurationError,
        DumpError,
        LetterAltered,
        LetterTooLarge,
        NoNodesError,
        ProtocolError,
        RemoteError,
        ServerUnreachable,
        TaskError,
        TaskTimeout,
        VersionError,
        WorkerLost,
    )
    from .local import LocalCluster
    from .node.loop import run_node
    from .server.listen import run_server

__version__ = "1.0.0"
__all__ = [
    "AchillesError", "AddressError", "AuthenticationError", "ClusterKilled", "ConfigurationError", "DumpError",
    "Executor", "LetterAltered", "LetterTooLarge", "LocalCluster", "NoNodesError", "Pool", "ProtocolError",
    "RemoteError", "ServerUnreachable", "TaskError", "TaskTimeout", "VersionError", "WorkerLost", "__version__",
    "cluster_status", "imap", "imap_unordered", "kill_cluster", "map", "register_joblib_backend", "run_node",
    "run_server", "write_config",
]

_MODULES = {
    "cluster_status": "calls", "imap": "calls", "imap_unordered": "calls", "kill_cluster": "calls", "map": "calls",
    "Executor": "dropin.executor", "LocalCluster": "local", "Pool": "dropin.pool", "run_node": "node.loop",
    "run_server": "server.listen", "register_joblib_backend": "dropin.joblib_backend", "write_config": "configuring",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES.get(name, 'errors')}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
