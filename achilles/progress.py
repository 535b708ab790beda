"""Progress: how far a call is, as a line on stderr or for a function of the user's.

Knows counts, a clock and stderr. Knows no call: `controller/call.py` tells of each delivery. Only calls that ask for
progress import this module. There is no thread: the thread that takes results draws the line.

::

    1,204 of 5,000 · 16 workers · 310/s · 12 s left        while the call runs
    5,000 of 5,000 · 16 workers · 298/s · in 17 s          once, at its end, however it ended

`done` counts the arguments that have a result or an error which was taken. A result from a journal counts, too. `total`
is None, and "of 5,000" is left out, where the length of the input is not known: `args` is a generator, or a function.

A terminal shows one line, which is drawn anew four times a second at most. The cursor stands at its beginning, so that
other lines of the package, such as output, are written over it. Elsewhere each line would stay, in a log for one. So
there the first one comes after ten seconds, the others when a tenth of the time has been added.

The rate is that of the last lines, so that it follows the work: of 16 s or more on a terminal.
"""

from __future__ import annotations

import contextlib
import operator
import sys
import time
from collections import deque
from collections.abc import Collection
from typing import Any

from .options import Show

__all__ = ["Progress", "length_of"]

TERMINAL_SECONDS = 0.25  # between two lines: people see a change, and the terminal costs nothing
LOG_SECONDS, LOG_SHARE = 10.0, 0.1  # the same where lines stay: at the least, and as a share of the time so far
LINES_KEPT = 64  # from the oldest of which on the rate is taken
UNITS = (("h", 3600), ("min", 60))  # of a time that is at least two of them
FEW = 10  # a rate below has two digits


class Progress:
    """Of one call.

    :param show: True, or a function of `done` and `total`, which is called for each delivery.
    :param total: arguments in all; None where nobody knows.
    :param link: has the counts of workers, and of batches that may be out.
    """

    def __init__(self, show: Show, total: int | None, link: Any) -> None:
        self._show, self._link = show, link
        self._done, self._total = 0, total
        self._began = time.monotonic()
        self._terminal = False
        with contextlib.suppress(OSError, ValueError):  # stderr is closed
            self._terminal = bool(getattr(sys.stderr, "isatty", bool)())
        self._due = self._began + (0 if self._terminal else LOG_SECONDS)
        self._lines: deque[tuple[float, int]] = deque([(self._began, 0)], LINES_KEPT)  # moments, and arguments done
        self._width = 0  # of the line on the terminal
        self._closed = False

    def taken(self, start: int, values: list[Any], errors: dict[int, BaseException]) -> None:
        """As Watcher says. An exception of the user's function ends the call."""
        self._done += len(values)
        if self._total is not None and self._done > self._total:  # its length was another one
            self._total = None
        if callable(self._show):
            self._show(self._done, self._total)
        elif (now := time.monotonic()) >= self._due:
            pause = TERMINAL_SECONDS if self._terminal else max(LOG_SECONDS, LOG_SHARE * (now - self._began))
            self._due = now + pause
            self._lines.append((now, self._done))
            self._write(self._line(now, *self._lines[0]), "\r" if self._terminal else "\n")

    def close(self) -> None:
        """As Watcher says: draw the last line."""
        if not self._closed and not callable(self._show):
            self._write(self._line(time.monotonic(), self._began, 0, is_last=True), "\n")
        self._closed = True

    def _line(self, now: float, since: float, before: int, is_last: bool = False) -> str:
        """The line of this moment; the rate is that since a moment when less was done."""
        rate = (self._done - before) / max(now - since, 1e-3)
        workers = min(self._link.workers, self._link.processes)
        parts = [f"{self._done:,}" if self._total is None else f"{self._done:,} of {self._total:,}"]
        parts += [f"{workers:,} worker{'s' * (workers != 1)}", f"{rate:,.0f}/s" if rate >= FEW else f"{rate:.2g}/s"]
        if is_last:
            parts.append(f"in {time_of(now - self._began)}")
        elif self._total is not None and rate:
            parts.append(f"{time_of((self._total - self._done) / rate)} left")
        return " · ".join(parts)

    def _write(self, line: str, end: str) -> None:
        """A stderr that is closed, or broken, is no error."""
        text = line.ljust(self._width) + end
        self._width = len(line) * self._terminal
        with contextlib.suppress(Exception):
            sys.stderr.write(text)
            sys.stderr.flush()


def length_of(args: Any, lists: bool) -> int | None:
    """How many arguments there are, with `lists` in the lists of a list of lists. None where nobody knows."""
    if callable(args):
        return None
    if lists and isinstance(args, Collection) and isinstance(next(iter(args), None), list):
        return sum(map(operator.length_hint, args)) if isinstance(args, (list, tuple)) else None
    length = operator.length_hint(args, -1)
    return None if length < 0 else length


def time_of(seconds: float) -> str:
    """A time for people."""
    for unit, size in UNITS:
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
