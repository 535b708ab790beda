"""The options that the calls, Pool and Executor share: their limits.

Knows values; knows no call and no connection. Any thread may call its functions.
"""

from __future__ import annotations

import numbers
import operator
import os
from collections.abc import Callable
from typing import Any

__all__ = ["JournalPath", "Show", "checked"]

# Options of the calls: types, their name, the least value, the limits in words.
_COUNT = numbers.Integral, "an int", 1, "at least 1"
_SECONDS = numbers.Real, "a number of seconds", 0, "a finite number of seconds, more than 0"
RULES: dict[str, tuple[Any, str, float | None, str]] = {
    "func": (Callable, "callable", None, ""), "callback": (Callable, "callable or None", None, ""),
    "callback_error": (Callable, "callable or None", None, ""), "chunksize": _COUNT, "buffersize": _COUNT,
    "journal": ((str, os.PathLike), "a path", None, ""),
    "progress": ((bool, Callable), "True, a function or None", None, ""),
    "wait_for_nodes": _SECONDS, "reconnect_seconds": _SECONDS,
    "timeout": (*_SECONDS[:2], 1e-9, _SECONDS[3]),  # the least that a JOB may say
}
REQUIRED = ("func", "chunksize")

JournalPath = str | os.PathLike[str] | None  # of a journal
Show = Callable[[int, int | None], object] | bool | None  # of progress: done, total


def checked(**options: Any) -> list[Any]:
    """The values of options, numbers as Python's own: numpy's are good, too. None is good where none is required.

    TypeError or ValueError unless each is as RULES says.
    """
    found = []
    for name, value in options.items():
        types, kind, least, limits = RULES[name]
        if value is not None or name in REQUIRED:
            if not isinstance(value, types) or (isinstance(value, bool) and least is not None):
                raise TypeError(f"{name} must be {kind}, not {type(value).__name__}")
            if least is not None and not least <= value < float("inf"):
                raise ValueError(f"{name} must be {limits}, not {value}")
            value = operator.index(value) if isinstance(value, numbers.Integral) else value
            value = float(value) if isinstance(value, numbers.Real) and not isinstance(value, int) else value
        found.append(value)
    return found
