"""The rows: what is done with a peer, how much of it there is, and whether the results are right.

A row is a function of a Meter and a started Peer, registered by `@row(...)`. It times stretches of a second or so,
and checks each result; nothing that it does between the stretches counts.
"""

from __future__ import annotations

import heapq
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .peers import Peer
from .timing import Meter, Sample
from .work import ends_of, incremented, nap, successor

__all__ = ["ROWS", "Row", "import_ms"]

MIB = 1 << 20
Run = Callable[[Meter, Peer], None]


class Row(NamedTuple):
    """A row of the table."""

    name: str
    what: str
    unit: str
    per: str  # what the processor time is counted by
    run: Run
    rate: bool  # more is better: amount by second; else seconds by amount
    factor: float  # from seconds to the unit, where it is no rate
    goals: dict[str, float]  # peer to how many times better than it, at the least
    limit: float | None  # of the figure itself, where less is better
    by_value: bool
    modules: tuple[str, ...]
    started: bool  # runs in a driver, with the peer started

    def value(self, sample: Sample) -> float:
        """A sample in the row's unit."""
        return sample.amount / sample.seconds if self.rate else sample.seconds / sample.amount * self.factor

    def better(self, mine: float, other: float) -> float:
        """How many times better one figure is than another."""
        return mine / other if self.rate else other / mine

    def refuses(self, peer: type[Peer]) -> str:
        """Why this peer has no figure in this row, or nothing."""
        if self.by_value and not peer.by_value:
            return "cannot send it"
        return ""


ROWS: dict[str, Row] = {}
POOL, DISTRIBUTED = "multiprocessing", ("dask", "ray", "mpi4py", "scoop")
STDLIB_AND_50 = {POOL: 2.0, "dask": 50.0, "ray": 50.0}
STDLIB_AND_5 = {POOL: 1.0, "dask": 5.0, "ray": 5.0}


def row(name: str, what: str, unit: str, *, per: str = "", rate: bool = False, factor: float = 1.0,
        goals: dict[str, float] | None = None, limit: float | None = None, by_value: bool = False,
        modules: tuple[str, ...] = (), started: bool = True) -> Callable[[Run], Run]:
    """Register a row."""
    def register(run: Run) -> Run:
        ROWS[name] = Row(name, what, unit, per or unit, run, rate, factor, goals or {}, limit, by_value, modules,
                         started)
        return run

    return register


def check(good: bool, what: str, found: object) -> None:
    """A figure of wrong results is worth nothing."""
    if not good:
        raise AssertionError(f"wrong results: {what}: {str(found)[:200]}")


# Tiny tasks.


def tiny(meter: Meter, peer: Peer, chunksize: int) -> None:
    """As many successors as it takes."""
    def run(count: int) -> list[int]:
        return peer.map(successor, range(count), chunksize)

    count = meter.enough(run, least=2 * chunksize)
    for _ in meter.stretches():
        with meter.timed(count):
            found = run(count)
        check(len(found) == count and sum(found) == count * (count + 1) // 2, f"{count} successors", found)


@row("tiny-1", "tiny tasks, chunksize 1", "tasks/s", per="task", rate=True, goals=STDLIB_AND_50)
def tiny_1(meter: Meter, peer: Peer) -> None:
    """The price of a task."""
    tiny(meter, peer, 1)


@row("tiny-64", "tiny tasks, chunksize 64", "tasks/s", per="task", rate=True, goals=STDLIB_AND_5)
def tiny_64(meter: Meter, peer: Peer) -> None:
    """What most programs would set."""
    tiny(meter, peer, 64)


@row("tiny-1024", "tiny tasks, chunksize 1024", "tasks/s", per="task", rate=True, goals=STDLIB_AND_5)
def tiny_1024(meter: Meter, peer: Peer) -> None:
    """Little but the bytes."""
    tiny(meter, peer, 1024)


@row("one", "a map of one item, warm", "ms", per="map", factor=1e3,
     goals={POOL: 0.5} | dict.fromkeys(DISTRIBUTED, 1.0))
def one(meter: Meter, peer: Peer) -> None:
    """How long there and back takes."""
    def run(count: int) -> None:
        for _ in range(count):
            found = peer.map(successor, [1], 1)
            check(found == [2], "the successor of 1", found)

    count = meter.enough(run)
    for _ in meter.stretches():
        with meter.timed(count):
            run(count)


@row("main", "lambdas and classes of __main__, chunksize 64", "tasks/s", per="task", rate=True, by_value=True,
     goals={"multiprocess": 1.0})
def main(meter: Meter, peer: Peer) -> None:
    """Objects of a class and a function that the caller's script has defined (drive.py is the script)."""
    script: Any = sys.modules["__main__"]

    def run(count: int) -> list[Any]:
        return peer.map(script.shifted, [script.Point(n, -n) for n in range(count)], 64)

    count = meter.enough(run, least=128)
    for _ in meter.stretches():
        with meter.timed(count):
            found = run(count)
        check(sorted((p.x, p.y) for p in found) == [(n + 1, -n) for n in range(count)], "shifted points", found[:3])


# Bytes.


@row("in", "64 arguments of 4 MiB", "MB/s", per="MB", rate=True, goals={POOL: 0.8})
def large_arguments(meter: Meter, peer: Peer) -> None:
    """One way: the result is tiny."""
    args = [bytes([n]) * (4 * MIB) for n in range(4 if meter.small else 64)]
    peer.map(ends_of, args[:2], 1)
    for _ in meter.stretches():
        with meter.timed(len(args) * 4 * MIB / 1e6):
            found = peer.map(ends_of, args, 1)
        check(sorted(found) == [(4 * MIB, n, n) for n in range(len(args))], "what came", found)


@row("arrays", "32 arrays of 8 MiB there and back", "MB/s", per="MB", rate=True, goals={POOL: 0.8},
     modules=("numpy",))
def arrays(meter: Meter, peer: Peer) -> None:
    """Both ways; counted are both."""
    import numpy

    args = [numpy.full(MIB, n, dtype=numpy.int64) for n in range(2 if meter.small else 32)]
    peer.map(incremented, args[:2], 1)
    for _ in meter.stretches():
        with meter.timed(2 * len(args) * 8 * MIB / 1e6):
            found = peer.map(incremented, args, 1)
        ends = sorted((len(array), int(array[0]), int(array[-1])) for array in found)
        check(ends == [(MIB, n + 1, n + 1) for n in range(len(args))], "arrays", ends)
        del found


@row("closure", "a closure of 20 MB, maps of 8 items", "ms a map", per="map", factor=1e3, by_value=True)
def closure(meter: Meter, peer: Peer) -> None:
    """100 maps, or as many as go into ten stretches; how often it crosses a link is links.py's."""
    data = bytes(20_000_000)

    def look(place: int) -> int:
        return len(data) + place

    most, done = 3 if meter.small else 100, 0
    with meter.timed(1):  # its amount is known only when it is over
        began = time.monotonic()
        while done < most and time.monotonic() - began < 10 * meter.seconds:
            found = peer.map(look, range(8), 1)
            check(sorted(found) == [len(data) + n for n in range(8)], "places", found)
            done += 1
    meter.samples[-1] = meter.samples[-1]._replace(amount=done)
    meter.notes["maps"] = done


# Time.


@row("uneven", "uneven sleeps, over the ideal", "× ideal", per="s", limit=1.05)
def uneven(meter: Meter, peer: Peer) -> None:
    """Sleeps of 1 to 80 ms in random order; ideal is who is free takes the next, at no cost."""
    rng = random.Random(5)
    naps = [rng.uniform(0.001, 0.08) for _ in range(4 if meter.small else 100)]
    for _ in meter.stretches():
        with meter.timed(ideal_seconds(naps, peer.workers)):
            found = peer.map(nap, naps, 1)
        check(sorted(found) == sorted(naps), "naps", found)


def ideal_seconds(naps: Sequence[float], workers: int) -> float:
    """When the last of them ends, where whoever is free takes the next."""
    free = [0.0] * workers
    for seconds in naps:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


@row("start", "start of a cluster to the first result", "s", limit=0.6)
def start(meter: Meter, peer: Peer) -> None:
    """Measured by the driver: with what the peer imports, without the start of Python, but where a launcher is."""
    meter.samples.append(Sample(1, meter.first_result, {}))
    meter.notes.update(peer.parts())


@row("import", "import, over bare Python", "ms", factor=1e3, limit=15.0, started=False)
def imports(meter: Meter, peer: Peer) -> None:
    """In fresh interpreters, in turns."""
    for _ in range(meter.times):
        meter.samples.append(Sample(1, import_ms(peer.statement) / 1e3, {}))


def import_ms(statement: str) -> float:
    """How much longer than doing nothing."""
    return (_python_seconds(statement) - _python_seconds("pass")) * 1e3


def _python_seconds(statement: str) -> float:
    """The least of three: what is disturbed is longer, never shorter."""
    found = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)  # with a timeout it would look each 50 ms alone
        found.append(time.perf_counter() - began)
    return min(found)
