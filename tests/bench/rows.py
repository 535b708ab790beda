"""The rows: what is done with a peer, how much of it there is, and whether the results are right.

A row is a function of a Meter and a started Peer, registered by `@row(...)`. It times stretches of a second or so,
and checks each result; nothing that it does between the stretches counts. Rows in which calls sleep or wait are in
waits.py.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from .peers import Peer
from .timing import Meter, Sample
from .work import ends_of, incremented, lengthened, spin_200_us, successor

__all__ = ["ROWS", "Row", "check", "import_ms", "row"]

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
    needs: str  # the method of a peer that the row calls
    workers: int | None  # None: as many as the command says
    ours: str  # the peer that the row is about

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
        return "" if peer.can(self.needs) else f"has no {self.needs}"


ROWS: dict[str, Row] = {}
OURS = "achilles"
POOL, FUTURES, DISTRIBUTED = "multiprocessing", "concurrent.futures", ("dask", "ray", "mpi4py", "scoop")


def stdlib_and(stdlib: float, others: float) -> dict[str, float]:
    """So many times the standard library's Pool, and so many times Dask and Ray."""
    return {POOL: stdlib, "dask": others, "ray": others}


def row(name: str, what: str, unit: str, *, per: str = "", rate: bool = False, factor: float = 1.0,
        goals: dict[str, float] | None = None, limit: float | None = None, by_value: bool = False,
        modules: tuple[str, ...] = (), started: bool = True, needs: str = "map", workers: int | None = None,
        ours: str = OURS) -> Callable[[Run], Run]:
    """Register a row."""
    def register(run: Run) -> Run:
        ROWS[name] = Row(name, what, unit, per or unit, run, rate, factor, goals or {}, limit, by_value, modules,
                         started, needs, workers, ours)
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


@row("tiny-1", "map of 30,000 tiny tasks, chunksize 1", "tasks/s", per="task", rate=True, goals=stdlib_and(8, 50))
def tiny_1(meter: Meter, peer: Peer) -> None:
    """The price of a task."""
    def run(count: int) -> None:
        found = peer.map(successor, range(count), 1)
        check(len(found) == count and sum(found) == count * (count + 1) // 2, f"{count} successors", found)

    timed_runs(meter, run, meter.fixed(run, 30_000))


@row("imap", "imap of 20,000 tiny tasks", "tasks/s", per="task", rate=True, goals={POOL: 5}, needs="imap")
def imap(meter: Meter, peer: Peer) -> None:
    """In order, one after the other."""
    def run(count: int) -> None:
        found = list(peer.imap(successor, range(count)))
        check(found == list(range(1, count + 1)), f"{count} successors in order", found)

    timed_runs(meter, run, meter.fixed(run, 20_000))


@row("tiny-64", "tiny tasks, chunksize 64", "tasks/s", per="task", rate=True, goals=stdlib_and(1.5, 5))
def tiny_64(meter: Meter, peer: Peer) -> None:
    """What most programs would set."""
    tiny(meter, peer, 64)


@row("tiny-1024", "tiny tasks, chunksize 1024", "tasks/s", per="task", rate=True, goals=stdlib_and(1, 5))
def tiny_1024(meter: Meter, peer: Peer) -> None:
    """Little but the bytes."""
    tiny(meter, peer, 1024)


# Maps of few, one after the other.


def one(meter: Meter, peer: Peer) -> None:
    """How long there and back takes."""
    repeat(meter, lambda: peer.map(successor, [1], 1), [2])


row("one", "a map of one item, warm", "ms", per="map", factor=1e3,
    goals={POOL: 0.6} | dict.fromkeys(DISTRIBUTED, 1.0))(one)
row("anew", "the same by imap_unordered, which connects each time", "ms", per="map", factor=1e3,
    goals={"achilles": 0.4}, ours="achilles.imap_unordered")(one)


@row("again", "map of 100 tiny tasks, again and again", "ms", per="map", factor=1e3, goals={POOL: 0.6})
def again(meter: Meter, peer: Peer) -> None:
    """What samplers do, with the chunksize that each peer finds itself."""
    repeat(meter, lambda: sorted(peer.map(successor, range(100), None)), list(range(1, 101)))


@row("again-200us", "map of 32 tasks of 0.2 ms, again and again", "ms", per="map", factor=1e3, goals={POOL: 0.85})
def again_200_us(meter: Meter, peer: Peer) -> None:
    """The same with something to do."""
    repeat(meter, lambda: sorted(peer.map(spin_200_us, range(32), None)), list(range(1, 33)))


# Calls, each by itself.


@row("apply", "2,000 × apply_async, then get", "calls/s", per="call", rate=True, goals={POOL: 4},
     needs="apply_async")
def apply(meter: Meter, peer: Peer) -> None:
    """All are begun before the first result is asked for."""
    def run(count: int) -> None:
        begun = [peer.apply_async(successor, n) for n in range(count)]
        check([each.get() for each in begun] == list(range(1, count + 1)), f"{count} results", begun)

    timed_runs(meter, run, meter.fixed(run, 2_000))


@row("submit", "2,000 × submit, then result", "calls/s", per="call", rate=True, goals={FUTURES: 5}, needs="submit")
def submit(meter: Meter, peer: Peer) -> None:
    """The same by an Executor."""
    def run(count: int) -> None:
        begun = [peer.submit(successor, n) for n in range(count)]
        check([each.result() for each in begun] == list(range(1, count + 1)), f"{count} results", begun)

    timed_runs(meter, run, meter.fixed(run, 2_000))


def timed_runs(meter: Meter, run: Callable[[int], object], count: int) -> None:
    """Time `run(count)`, which checks its results."""
    for _ in meter.stretches():
        with meter.timed(count):
            run(count)


def repeat(meter: Meter, call: Callable[[], object], expected: object) -> None:
    """Time the same call, as often as it takes."""
    def run(count: int) -> None:
        for _ in range(count):
            found = call()
            check(found == expected, "a map among many", found)

    timed_runs(meter, run, meter.enough(run))


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


def large(meter: Meter, peer: Peer, function: Callable[[Any], Any], expected: Callable[[int], Any], ways: int) -> None:
    """16 arguments of 4 MiB."""
    args = [bytes([n]) * (4 * MIB) for n in range(4 if meter.small else 16)]
    peer.map(function, args[:2], 1)
    for _ in meter.stretches():
        with meter.timed(ways * len(args) * 4 * MIB / 1e6):
            found = peer.map(function, args, 1)
        check(sorted(found) == [expected(n) for n in range(len(args))], "what came", [str(each)[:20] for each in found])
        del found


@row("in", "16 × 4 MiB in", "MB/s", per="MB", rate=True, goals={POOL: 0.9})
def large_arguments(meter: Meter, peer: Peer) -> None:
    """One way: the result is tiny."""
    large(meter, peer, ends_of, lambda n: (4 * MIB, n, n), 1)


@row("in-out", "16 × 4 MiB in and out", "MB/s", per="MB", rate=True, goals={POOL: 1.0})
def large_results(meter: Meter, peer: Peer) -> None:
    """Both ways; counted are both."""
    large(meter, peer, lengthened, lambda n: bytes([n]) * (4 * MIB) + b".", 2)


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


# Starts.


@row("start", "start of a cluster to the first result", "s", limit=0.6, goals={"joblib": 1.0, "mpi4py": 1.0})
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
