"""Where the scheduler keeps slices: those that wait, and those that one node holds of one job.

Knows batches of rows, cuts them only where they are taken, and moves their letters without a look at them. No
sockets, no threads, no clock. Called by the scheduler alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from itertools import repeat
from typing import Any, TypeAlias

from ..protocol.frames import Rows, merge

__all__ = ["Given", "Held", "Queue", "drop", "pick"]

Given: TypeAlias = "tuple[Rows, int]"  # a batch at a node, and how many slices of the job that was given before


class Queue:
    """Slices that wait, in the order in which they will be given."""

    __slots__ = ("count", "_runs")

    def __init__(self) -> None:
        self.count = 0
        self._runs: deque[tuple[Rows, int]] = deque()  # a batch, and how many of its rows are gone

    def put(self, rows: Rows, *, front: bool = False) -> None:
        """Behind all others, or in front of them."""
        (self._runs.appendleft if front else self._runs.append)((rows, 0))
        self.count += len(rows)

    def take(self, number: int) -> list[Rows]:
        """The next slices, up to so many."""
        taken = []
        while number > 0 and self._runs:
            rows, start = self._runs.popleft()
            stop = min(start + number, len(rows))
            if stop < len(rows):
                self._runs.appendleft((rows, stop))
            taken.append(rows.cut(start, stop))
            number -= stop - start
            self.count -= stop - start
        return taken


class Held(dict[int, Given]):
    """What a node holds of a job: slice -> the batch that it came in, in the order in which it was given.

    The first `passed` of `given` slices have left its queue: the last of these was answered.
    """

    __slots__ = ("given", "passed")

    def __init__(self) -> None:
        self.given = self.passed = 0

    def add(self, rows: Rows) -> None:
        """The node is given these."""
        self.update(dict.fromkeys(rows.slices, (rows, self.given)))
        self.given += len(rows)

    def went(self, slice_: int) -> None:
        """This one was with a worker, which is done with it: what was given before is done, or with other workers."""
        rows, before = self[slice_]
        self.passed = max(self.passed, before + rows.slices.index(slice_) + 1)

    def take_back(self, slices: Iterable[int], *, asked: bool) -> dict[int, Given]:
        """The node gives these back: the last ones of its queue, as it was `asked` to, or what a worker had."""
        known = [slice_ for slice_ in dict.fromkeys(slices) if slice_ in self]
        if known and not asked:
            self.went(known[-1])
        back = {slice_: self.pop(slice_) for slice_ in known}
        if back and self:
            rows, before = self[last := next(reversed(self))]
            self.given = before + rows.slices.index(last) + 1
            self.passed = min(self.passed, self.given)
        return back

    def waiting(self) -> int:
        """Slices of which one would be with a worker if that were idle."""
        return min(len(self), self.given - self.passed)


def pick(rows: Rows, wanted: list[bool]) -> Rows | None:
    """Those rows as one batch, `rows` itself if it is all of them, None if it is none."""
    if all(wanted):
        return rows
    pieces = [rows.cut(n, n + 1) for n, want in enumerate(wanted) if want]
    return merge(pieces) if pieces else None


def drop(noted: dict[int, Any], slices: Collection[int]) -> None:
    """Forget what is noted of these slices, at the speed of C."""
    deque(map(noted.pop, slices, repeat(None)), maxlen=0)
