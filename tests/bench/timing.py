"""How one figure is measured: seconds by the clock, processor time by role, and how many tasks make a second."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from faults.tree import seconds_used

__all__ = ["Meter", "Sample", "Spread", "enough", "spread"]

FIRST_SECONDS = 0.02  # less than this tells nothing of a rate
PATIENCE = 10  # times the seconds that a stretch should take
LARGEST_GROWTH = 16  # from one trial to the next


class Sample(NamedTuple):
    """One timed stretch."""

    amount: float  # of what the row counts: tasks, maps, MB
    seconds: float
    used: dict[str, float]  # role to seconds of a processor


class Spread(NamedTuple):
    """Several figures of the same thing."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """The median, and the least and the greatest."""
    return Spread(statistics.median(values), min(values), max(values))


class Meter:
    """Times what a row does with one peer.

    :param seconds: what one stretch should take.
    :param times: how many stretches.
    :param roles: who is who among the peer's processes, asked before each stretch.
    :param small: of fixed amounts, the least that shows that the row works.
    :param first_result: seconds from the peer's start to it.
    """

    def __init__(self, seconds: float, times: int, roles: Callable[[], Mapping[str, Sequence[int]]], *,
                 small: bool = False, first_result: float = 0.0) -> None:
        self.seconds, self.times, self.small, self.first_result = seconds, times, small, first_result
        self.samples: list[Sample] = []
        self.notes: dict[str, float] = {}  # what else was found, for people
        self._roles = roles

    def stretches(self) -> Iterator[int]:
        """Once for each stretch; fewer where they are much longer than they should be."""
        began = time.monotonic()
        for number in range(self.times):
            if time.monotonic() - began > PATIENCE * self.seconds:
                return
            yield number

    @contextlib.contextmanager
    def timed(self, amount: float) -> Iterator[None]:
        """The block does `amount` of what the row counts."""
        roles = self._roles()
        before = _used(roles)
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        after = _used(roles)
        self.samples.append(Sample(amount, seconds, {role: after[role] - before[role] for role in roles}))

    def fixed(self, run: Callable[[int], object], count: int) -> int:
        """`count`, or a tenth of it with a peer for which `count` takes much longer than a stretch; a warming up."""
        tenth = max(1, count // 10)
        began = time.monotonic()
        run(tenth)
        slow = time.monotonic() - began > PATIENCE / 5 * self.seconds
        return max(1, tenth // 10) if self.small else tenth if slow else count

    def enough(self, run: Callable[[int], object], least: int = 1, most: int = 1 << 26) -> int:
        """How many of the same thing `run` takes for one stretch; a warming up as well."""
        return enough(run, self.seconds, least, most)


def enough(run: Callable[[int], object], seconds: float, least: int = 1, most: int = 1 << 26) -> int:
    """The number for which `run(number)` takes some `seconds`, found by trying, after one that warms up."""
    number = least
    run(number)
    while True:
        began = time.perf_counter()
        run(number)
        took = max(time.perf_counter() - began, 1e-9)
        wanted = int(number * min(seconds / took, LARGEST_GROWTH))
        if took >= min(seconds / 2, FIRST_SECONDS * LARGEST_GROWTH) or number >= most:
            return max(least, min(wanted, most))
        number = max(least, min(max(wanted, number * 2), most))


def _used(roles: Mapping[str, Sequence[int]]) -> dict[str, float]:
    found = {}
    for role, pids in roles.items():
        found[role] = 0.0
        for pid in pids:
            with contextlib.suppress(OSError, IndexError):  # it has ended
                found[role] += seconds_used(pid)
    return found
