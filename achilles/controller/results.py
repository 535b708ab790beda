"""The result buffer of one job, and the window that bounds what is outside of it.

Knows slices by number, units, and places in `args`; what an answer is it does not
know, nor any socket, pickle or clock but the caller's deadlines.

::

    feeder ──Window.enter──▶  out: sent, running, or waiting here  ──take──▶ taken
                 ▲ blocks                                             │
                 └────────────────────── Window.leave ◀───────────────┘

What is delivered at once is a *unit* in the three original calls, a packet or a
list: it is announced (`add`), answered slice by slice (`put`, the reader thread),
and taken whole (`take`, the caller's thread). Elsewhere it is a slice by itself.
Both come in the order of `args`, or as they become complete. Each class has one lock of its own, which
guards everything in it, and a condition on it; no method calls out while holding it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

__all__ = ["WINDOW_BYTES", "NotYet", "SliceBuffer", "Unit", "UnitBuffer", "Window"]

TAKE_UNITS = 64  # at a time: beyond, a lock a unit costs nothing any more ...
TAKE_SLICES = 256  # ... and of slices, of which many are delivered together
ENOUGH_ROOM = 0.75  # of the window out: then the feeder is woken, and has room for many slices, not for one
WINDOW_BYTES = 256 << 20  # of arguments that are out: what a caller may hold twice, as objects and as bytes


class NotYet(TimeoutError):
    """Nothing to take came in time. A class of its own: what users' code raises may be a TimeoutError, too."""


class Unit:
    """Consecutive slices that are delivered together.

    `start` is the place of its first argument in `args` (of the list itself, where
    args are lists), `span` how many places it fills, `answers` what came: slice -> answer.
    """

    __slots__ = ("answers", "slices", "span", "start")

    def __init__(self, start: int, span: int, slices: range) -> None:
        self.start = start
        self.span = span
        self.slices = slices
        self.answers: dict[int, Any] = {}


class _Buffer:
    """What of one job has come and is not taken. Subclasses say in which pieces."""

    def __init__(self, ordered: bool) -> None:
        self._ordered = ordered
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._taken = 0  # places that were taken; in order, the next one
        self._end: int | None = None  # places there are in all, once known
        self._last_error: BaseException | None = None  # raised behind the last piece
        self._error: BaseException | None = None  # raised at once

    def finish(self, end: int, error: BaseException | None = None) -> None:
        """There are `end` places in all; behind the last of them `error` is raised, if there is one."""
        with self._lock:
            self._end, self._last_error = end, error
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Raise `error` in whoever takes, now and from now on. The first error stays."""
        with self._lock:
            self._error = self._error or error
            self._changed.notify_all()

    def take(self, timeout: float | None = None) -> list[Any]:
        """The next pieces, some of them, or [] behind the last; blocks up to `timeout` seconds, then NotYet.

        Raises the error of `fail` at once, that of `finish` in its place.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            while True:
                if self._error is not None:
                    raise self._error
                pieces = self._next()
                if pieces or self._taken == self._end:
                    break
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise NotYet
                self._changed.wait(left)
            if not pieces and self._last_error is not None:
                raise self._last_error
            return pieces

    def _next(self) -> list[Any]:
        raise NotImplementedError


class SliceBuffer(_Buffer):
    """Slices that are delivered one by one, each with its number; a slice is a place.

    Nothing is kept for a slice but its answer, and no step is taken for each of many that come at once.
    """

    def __init__(self, ordered: bool) -> None:
        super().__init__(ordered)
        self._answers: dict[int, Any] = {}

    def begin(self, first: int) -> None:
        """The first slice there will be, where it is not 0. Before all others; an error that came before stays."""
        with self._lock:
            self._taken = first

    def put(self, slices: Iterable[int], answers: Iterable[Any]) -> None:
        """The answers of slices, each of which is put once."""
        with self._lock:
            self._answers.update(zip(slices, answers))
            if self._answers and (not self._ordered or self._taken in self._answers):
                self._changed.notify_all()

    def put_back(self, pieces: Sequence[tuple[int, Any]]) -> None:
        """What was taken, and not delivered: the first of them was no good."""
        with self._lock:
            self._answers = dict(pieces[1:]) | self._answers
            self._taken -= len(pieces)

    def _next(self) -> list[tuple[int, Any]]:
        """(slice, answer), as many as may be taken."""
        answers, end = self._answers, self._taken
        if self._ordered:
            while end in answers and end - self._taken < TAKE_SLICES:
                end += 1
        numbers = range(self._taken, end) if self._ordered else list(islice(answers, TAKE_SLICES))
        self._taken += len(numbers)
        return [(number, answers.pop(number)) for number in numbers]


class UnitBuffer(_Buffer):
    """Units between their announcement and their taking; a place is an argument, or a list of a list of lists."""

    def __init__(self, ordered: bool) -> None:
        super().__init__(ordered)
        self._open: dict[int, Unit] = {}  # slice -> its unit, while that is not complete
        self._complete: dict[int, Unit] = {}  # start -> unit, complete and not taken

    def add(self, unit: Unit) -> None:
        """Announce a unit. One without slices is complete at once."""
        with self._lock:
            if unit.slices:
                self._open.update(dict.fromkeys(unit.slices, unit))
            else:
                self._complete[unit.start] = unit
                self._changed.notify_all()

    def put(self, slices: Iterable[int], answers: Iterable[Any]) -> None:
        """The answers of slices. A second one of the same slice is ignored."""
        with self._lock:
            for slice_, answer in zip(slices, answers):
                unit = self._open.get(slice_)
                if unit is None or slice_ in unit.answers:
                    continue
                unit.answers[slice_] = answer
                if len(unit.answers) == len(unit.slices):
                    for number in unit.slices:
                        del self._open[number]
                    self._complete[unit.start] = unit
            if self._complete and (not self._ordered or self._taken in self._complete):
                self._changed.notify_all()

    def put_back(self, units: Sequence[Unit], slice_: int) -> None:
        """Units that were taken, and not delivered: the answer of this slice, of the first of them, was no good."""
        first, *others = units
        with self._lock:
            del first.answers[slice_]
            self._open.update(dict.fromkeys(first.slices, first))
            self._complete = {unit.start: unit for unit in others} | self._complete
            self._taken -= sum(unit.span for unit in units)

    def _next(self) -> list[Unit]:
        units: list[Unit] = []
        while self._complete and len(units) < TAKE_UNITS:
            start = self._taken if self._ordered else next(iter(self._complete))
            if start not in self._complete:
                break
            units.append(self._complete.pop(start))
            self._taken += units[-1].span
        return units


class Window:
    """How much of a job may be out, counted in slices (or arguments) and in bytes. The only flow control."""

    def __init__(self, limit: float) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._limit = limit
        self._out = 0
        self._bytes = 0
        self.closed = False  # read without the lock, too

    def room(self, weight: int, size: int, timeout: float = 0.0) -> float:
        """How much weight may enter, of which the first piece has `weight` and `size` bytes; 0 if that has no room.

        There always is for one, if nothing else is out. Where there is none, blocks until something changes,
        `timeout` seconds at most, and looks once more. 0 if the window is `closed`.
        """
        with self._lock:
            if not (room := self._room(weight, size)) and timeout and not self.closed:
                self._changed.wait(timeout)
                room = self._room(weight, size)
            return 0 if self.closed else room

    def _room(self, weight: int, size: int) -> float:
        room = self._limit - self._out if self._bytes + size <= WINDOW_BYTES else 0
        return room if room >= weight else 0 if self._out else weight

    def enter(self, weight: int, size: int) -> None:
        """Take room that `room` said is there; only who asked does this, so that it still is."""
        with self._lock:
            self._out += weight
            self._bytes += size

    def leave(self, weight: int, size: int) -> None:
        """What was out has been taken."""
        with self._lock:
            self._out -= weight
            self._bytes -= size
            if self._out <= self._limit * ENOUGH_ROOM:
                self._changed.notify_all()

    def resize(self, limit: float) -> None:
        """A new limit, infinity to lift the window."""
        with self._lock:
            self._limit = limit
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing will enter any more; whoever waits returns."""
        with self._lock:
            self.closed = True
            self._changed.notify_all()
