"""One argument kills whoever runs it: it is given up after three attempts, and nobody else suffers."""

from __future__ import annotations

import signal

from achilles import WorkerLost

from .bench import Bench, fault
from .work import Work

ATTEMPTS = 3


def _poison(bench: Bench, count: int, chunksize: int, how: str, status: int, *, seconds: float = 0.01) -> None:
    cluster, oracle = bench.cluster(2, 2), bench.oracle()
    bad = bench.rng.randrange(count)
    call = bench.call(cluster, "map", Work(oracle.path, seconds, (bad,), how), range(count), chunksize=chunksize)
    call.result()
    runs = [event.pid for event in oracle.events() if event.index == bad]
    error = call.errors[bad]
    assert isinstance(error, WorkerLost), repr(error)
    assert len(runs) == ATTEMPTS, f"{len(runs)} attempts"
    assert (error.index, error.pid, error.exitcode) == (bad, runs[-1], status), vars(error)  # type: ignore[attr-defined]
    assert error.node in (0, 1)
    how_told = f"signal {-status}" if status < 0 else f"status {status}"
    for part in (f"argument {bad}", f"node {error.node}", f"pid {error.pid}", how_told):
        assert part in str(error), f"{part!r} is not in {error}"
    assert set(call.errors) == {bad}
    oracle.check(call.found, count, repeats=ATTEMPTS * max(chunksize, 512 if not seconds else 2), lost=call.errors)
    begun = [event.at for event in oracle.events() if event.index == bad]
    bench.note(detect=begun[1] - begun[0], recover=begun[2] - begun[1], repeated=oracle.repeated())


@fault(2, "poison: os._exit(1), chunksize 1", runs=3)
def poison_exit(bench: Bench) -> None:
    _poison(bench, 60, 1, "exit", 1)


@fault(2, "poison: os._exit(1), chunksize 64", runs=3)
def poison_exit_in_a_chunk(bench: Bench) -> None:
    _poison(bench, 200, 64, "exit", 1, seconds=0.001)


@fault(2, "poison: os._exit(1), among tiny tasks", runs=3, short=True)
def poison_exit_tiny(bench: Bench) -> None:
    _poison(bench, 5000, 1, "exit", 1, seconds=0)


@fault(2, "poison: SIGSEGV, chunksize 1", runs=3)
def poison_segfault(bench: Bench) -> None:
    _poison(bench, 60, 1, "segfault", -signal.SIGSEGV)


@fault(2, "poison: SIGSEGV, chunksize 64", runs=3)
def poison_segfault_in_a_chunk(bench: Bench) -> None:
    _poison(bench, 200, 64, "segfault", -signal.SIGSEGV, seconds=0.001)


@fault(2, "poison: SIGSEGV, among tiny tasks", runs=3)
def poison_segfault_tiny(bench: Bench) -> None:
    _poison(bench, 5000, 1, "segfault", -signal.SIGSEGV, seconds=0)


@fault(2, "poison: out of memory, chunksize 1", runs=3, short=True)
def poison_memory(bench: Bench) -> None:
    _poison(bench, 60, 1, "memory", -signal.SIGABRT)


@fault(2, "poison: out of memory, chunksize 64", runs=3)
def poison_memory_in_a_chunk(bench: Bench) -> None:
    _poison(bench, 200, 64, "memory", -signal.SIGABRT, seconds=0.001)


@fault(2, "poison: out of memory, among tiny tasks", runs=3)
def poison_memory_tiny(bench: Bench) -> None:
    _poison(bench, 5000, 1, "memory", -signal.SIGABRT, seconds=0)


@fault(2, "poison: SIGKILL, as the kernel's for want of memory", runs=3)
def poison_kill(bench: Bench) -> None:
    _poison(bench, 60, 1, "kill", -signal.SIGKILL)


@fault(2, "poison: a value that kills who dumps it, chunksize 1", runs=3)
def poison_dump(bench: Bench) -> None:
    _poison(bench, 60, 1, "dump", 1)


@fault(2, "poison: a value that kills who dumps it, chunksize 64", runs=3, short=True)
def poison_dump_in_a_chunk(bench: Bench) -> None:
    _poison(bench, 200, 64, "dump", 1, seconds=0.001)


@fault(2, "poison in every eighth argument", runs=1)
def poison_everywhere(bench: Bench) -> None:
    cluster, oracle = bench.cluster(2, 2), bench.oracle()
    bad = tuple(range(0, 64, 8))
    call = bench.call(cluster, "imap", Work(oracle.path, 0.01, bad, "exit"), range(64), chunksize=4)
    call.result()
    assert set(call.errors) == set(bad)
    assert all(oracle.counts()[index] == ATTEMPTS for index in bad)
    oracle.check(call.found, 64, repeats=ATTEMPTS * len(bad) * 4, lost=call.errors)
