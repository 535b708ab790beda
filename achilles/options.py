"""The options that the calls, Pool and Executor share: their limits, and their effect in the caller.

Knows values; knows no call and no connection. Any thread may call its functions.
"""

from __future__ import annotations

import numbers
import operator
import os
from collections.abc import Callable
from typing import Any

from .controller.call import Recall, Watcher
from .controller.connection import tell
from .controller.link import Link

__all__ = ["JournalPath", "Output", "Show", "Shower", "checked", "keeping", "shower", "watching"]

# Options of the calls: types, their name, the least value, the limits in words.
_COUNT = numbers.Integral, "an int", 1, "at least 1"
_SHOW = (bool, Callable), "True, a function or None", None, ""
_SECONDS = numbers.Real, "a number of seconds", 0, "a finite number of seconds, more than 0"
RULES: dict[str, tuple[Any, str, float | None, str]] = {
    "func": (Callable, "callable", None, ""), "callback": (Callable, "callable or None", None, ""),
    "callback_error": (Callable, "callable or None", None, ""), "chunksize": _COUNT, "buffersize": _COUNT,
    "journal": ((str, os.PathLike), "a path", None, ""), "output": _SHOW, "progress": _SHOW,
    "wait_for_nodes": _SECONDS, "reconnect_seconds": _SECONDS,
    "timeout": (*_SECONDS[:2], 1e-9, _SECONDS[3]),  # the least that a JOB may say
}
REQUIRED = ("func", "chunksize")

Shower = Callable[[str, int | None, int], object]  # of a line of output: text, index of its argument, node
Output = Shower | bool | None
Show = Callable[[int, int | None], object] | bool | None  # of progress: done, total
JournalPath = str | os.PathLike[str] | None


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


def shower(output: Output, on_executor: bool) -> Shower | None:
    """The function that shows a line of output, if anybody wants it. TypeError or ValueError unless that can be."""
    checked(output=output)
    if output and on_executor:
        raise ValueError("output= is of workers of a node: on an executor, functions print where its workers print")
    return _write_line if output is True else output or None


def _write_line(text: str, index: int | None, node: int) -> None:
    tell(f"node {node}: {text}")


def keeping(journal: JournalPath, *call: Any) -> tuple[list[Watcher], Recall | None]:
    """The Journal of a call, if the user wants one: as a watcher, and as a function that recalls results.

    :param call: the arguments of a Journal behind its path.
    """
    if journal is None:
        return [], None
    from .journal import Journal

    kept = Journal(journal, *call)
    return [kept], kept.recall


def watching(progress: Show, args: Any, link: Link, lists: bool = False) -> list[Watcher]:
    """The Progress of a call, if the user wants it. No other call pays for its import.

    :param lists: whether a list of lists has its arguments in its lists.
    """
    if not progress:
        return []
    from .progress import Progress, length_of

    return [Progress(progress, length_of(args, lists), link)]
