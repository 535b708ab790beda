"""What functions, arguments and results may do wrong: each at its own index, and no worker is replaced for it."""

from __future__ import annotations

import multiprocessing.pool

import tasks

from achilles import DumpError, RemoteError

from .bench import Bench, fault
from .work import Work


class _Undumpable(Exception):
    """It holds what cannot travel."""

    def __init__(self) -> None:
        super().__init__("cannot travel")
        self.generator = (each for each in ())


def _raise_undumpable(number: int) -> int:
    if number == 4:
        raise _Undumpable
    return number


def _check(bench: Bench, function: object, kinds: dict[int, tuple[type, ...]], *, chunksize: int) -> None:
    cluster = bench.cluster(2)
    before = set(cluster.nodes[0].workers(2))
    for way in ("map", "imap", "imap_unordered"):
        call = bench.call(cluster, way, function, range(12), chunksize=chunksize)
        found = call.result()
        assert sorted(found) == list(range(12))
        assert set(call.errors) == set(kinds), call.errors
        for index, error in call.errors.items():
            assert isinstance(error, kinds[index]), repr(error)
            assert error.index == index  # type: ignore[attr-defined]
            assert error.node == 0  # type: ignore[attr-defined]
    assert set(cluster.nodes[0].workers(2)) == before, "a worker was replaced"
    bench.note(repeated=0)


@fault(8, "ordinary exceptions", short=True)
def raises(bench: Bench) -> None:
    oracle = bench.oracle()
    work = Work(oracle.path, 0, (3, 7), "raise")
    _check(bench, work, {3: (ValueError,), 7: (ValueError,)}, chunksize=5)
    assert oracle.counts()[3] == 3, "an exception is not a fault, and never retried"


@fault(8, "SystemExit, KeyboardInterrupt and others of the function's")
def raises_base(bench: Bench) -> None:
    _check(bench, tasks.raise_base, {n: (type(e),) for n, e in tasks.BASES.items()}, chunksize=3)


@fault(8, "an exception whose __init__ differs from its args")
def raises_odd(bench: Bench) -> None:
    _check(bench, tasks.raise_odd, {2: (tasks.OddError, RemoteError)}, chunksize=4)


@fault(8, "an exception that cannot be dumped", short=True)
def raises_undumpable(bench: Bench) -> None:
    _check(bench, _raise_undumpable, {4: (RemoteError,)}, chunksize=4)


@fault(8, "a MemoryError at RLIMIT_AS", short=True)
def raises_memory(bench: Bench) -> None:
    """Python's own: it is an exception like any other, and its worker lives."""
    _check(bench, Work(bench.oracle().path, 0, (5,), "memory-error"), {5: (MemoryError,)}, chunksize=4)


@fault(8, "a result that cannot be dumped")
def returns_undumpable(bench: Bench) -> None:
    _check(bench, tasks.return_generator, {2: (multiprocessing.pool.MaybeEncodingError,)}, chunksize=4)


@fault(8, "a generator of arguments that raises")
def arguments_raise(bench: Bench) -> None:
    cluster = bench.cluster(2)
    before = set(cluster.nodes[0].workers(2))

    def broken() -> object:
        yield from range(10)
        raise LookupError("no more")

    for way in ("map", "imap", "imap_unordered"):
        call = bench.call(cluster, way, tasks.square, broken(), chunksize=3)
        try:
            call.result()
            raise AssertionError("nothing was raised")
        except LookupError:
            assert way == "map" or call.found == {n: n * n for n in range(10)}, call.found
    cluster.wait_idle(5)
    assert set(cluster.nodes[0].workers(2)) == before, "a worker was replaced"


@fault(8, "an argument that cannot be dumped", short=True)
def argument_undumpable(bench: Bench) -> None:
    cluster = bench.cluster(1)
    call = bench.call(cluster, "map", tasks.square, [1, 2, (each for each in ()), 4])
    try:
        call.result()
        raise AssertionError("nothing was raised")
    except DumpError as e:
        assert e.index == 2  # type: ignore[attr-defined]
    cluster.wait_idle(5)
