"""The interfaces of other packages: Pool, Executor, the backend of joblib, and calls on an `executor=`.

It may import anything. Nothing imports it but the top level, lazily, and `calls.py`, where an `executor=` is
given: the folder can be deleted in one piece.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # as type checkers know it: typing takes most of the time of an import
if TYPE_CHECKING:
    from typing import Any

    from .executor import Executor
    from .joblib_backend import register_joblib_backend
    from .pool import Pool

__all__ = ["Executor", "Pool", "register_joblib_backend"]

_MODULES = {"Executor": "executor", "Pool": "pool", "register_joblib_backend": "joblib_backend"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
