"""The caller's side: a connection to a server, and the jobs that are sent over it.

It imports `protocol` and `objects`. It must not know the calls that people make (`calls.py`, `dropin/`), and no
server or node but by their frames.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers know it: typing takes most of the time of an import
if TYPE_CHECKING:
    from typing import Any

    from .connection import Controller

__all__ = ["Controller"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .connection import Controller

    return Controller
