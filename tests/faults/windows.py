"""Windows: what is pulled, and what is held, stays bounded however long the input is; and nothing waits for ever."""

from __future__ import annotations

import heapq
import os
import queue
import threading
import time
from collections.abc import Iterator

from conftest import wait_until

import achilles

from . import tree
from .bench import Bench, fault
from .work import Work, WorkHere, WorkSlower, echo, sleep, unit

MIB = 1 << 20
WORKERS = 12  # of nodes of 1, 3 and 8


def _wait(seconds: float) -> None:
    at = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= at, "some time", seconds + 5)


@fault(9, "endless generator, the caller stops consuming", short=True)
def endless(bench: Bench) -> None:
    """The count pulled stands still, and so does memory (short: three seconds, else a minute)."""
    cluster = bench.cluster(2)
    last = 0

    def arguments() -> Iterator[bytes]:
        nonlocal last
        while True:
            last += 1
            yield b"x" * 20_000

    pids = [os.getpid(), cluster.server.pid, cluster.nodes[0].pid, *cluster.nodes[0].workers(2)]
    with achilles.imap(echo, arguments, **cluster.address) as packets:
        for _ in range(20):
            next(packets)
        before, held = -1, 0
        for _ in range(60):  # until 256 MiB are dumped, and have come back
            if before == last and tree.memory(pids[0]) - held < MIB:
                break
            before, held = last, tree.memory(pids[0])
            _wait(2)
        memory = [tree.memory(pid) for pid in pids]
        _wait(3 if bench.short else 60)
        assert last == before, f"{last - before} arguments were pulled meanwhile"
        grown = [tree.memory(pid) - was for pid, was in zip(pids, memory)]
        assert max(grown) < 4 * MIB, f"memory has grown by {grown}"
        bench.note(remark=f"{before} pulled; memory grew by {max(grown) / MIB:.1f} MiB at most")
        for _ in range(before):  # the window may be smaller by now: it follows the pace
            next(packets)
            if last > before:
                break
        wait_until(lambda: last > before, "that more is pulled")


@fault(9, "a million arguments (short: 30,000)")
def million(bench: Bench) -> None:
    """Memory of caller, server, node and workers is flat from a tenth of the way on."""
    count = 30_000 if bench.short else 1_000_000
    cluster = bench.cluster(2)
    pids = [os.getpid(), cluster.server.pid, cluster.nodes[0].pid, *cluster.nodes[0].workers(2)]
    done, memory = 0, [0]
    at = time.monotonic()
    with achilles.imap_unordered(unit, iter(range(count)), **cluster.address) as packets:
        for packet in packets:
            done += sum(packet["RESULT"])
            if not memory[0] and done >= count // 10:
                memory = [tree.memory(pid) for pid in pids]
    assert done == count
    grown = [tree.memory(pid) - was for pid, was in zip(pids, memory)]
    assert max(grown) < 16 * MIB, f"memory has grown by {grown}"
    bench.note(recover=time.monotonic() - at, remark=f"memory grew by {max(grown) / MIB:.1f} MiB at most")


@fault(9, "one slow first argument under imap", short=True)
def slow_first(bench: Bench) -> None:
    """The others are done meanwhile, up to the window, though they become slower, and some wait behind it."""
    cluster, oracle = bench.cluster(2), bench.oracle()
    pulled: list[int] = []
    count = 1600  # the window may have room for 1,268 chunks of half a millisecond

    def arguments() -> Iterator[int]:
        for number in range(count):
            pulled.append(number)
            yield number

    work = WorkSlower(oracle.path, 0.01, (0,), "hang", times=1)
    with achilles.imap(work, arguments, **cluster.address) as packets:
        oracle.wait_for(50, "end")
        wait_until(lambda: _still(pulled), "the window to be full")
        assert len(pulled) < count, "everything was pulled"
        bench.note(remark=f"{len(pulled)} pulled, {len(oracle.counts('end'))} done")
        (victim,) = [pid for pid, index in oracle.running().items() if index == 0]
        tree.kill(victim)
        found = [value for packet in packets for value in packet["RESULT"]]
    oracle.check(dict(enumerate(found)), count, repeats=1 + 2 * 512)


def _still(numbers: list[int]) -> bool:
    before = len(numbers)
    threading.Event().wait(0.3)
    return len(numbers) == before


@fault(9, "a generator that waits for earlier results", short=True)
def waits_for_results(bench: Bench) -> None:
    for chunksize, buffersize in ((1, None), (4, None), (1, 1), (8, 3)):
        cluster = bench.cluster(3) if not bench.clusters else bench.clusters[0]
        results: queue.SimpleQueue[int] = queue.SimpleQueue()

        def arguments() -> Iterator[int]:
            yield 0
            for _ in range(30):
                yield results.get(timeout=20) + 1  # noqa: B023

        found = []
        for packet in achilles.imap(
                echo, arguments, chunksize=chunksize, buffersize=buffersize, **cluster.address):
            for value in packet["RESULT"]:
                found.append(value)
                results.put(value)
        assert found == list(range(31)), found


@fault(9, "buffersize=1", short=True)
def buffersize_one(bench: Bench) -> None:
    cluster, oracle = bench.cluster(3), bench.oracle()
    most, out = 0, 0

    def arguments() -> Iterator[int]:
        nonlocal most, out
        for number in range(60):
            out += 1
            most = max(most, out)
            yield number

    found = []
    for packet in achilles.imap(Work(oracle.path), arguments, buffersize=1, chunksize=5, **cluster.address):
        out -= len(packet["RESULT"])
        found += packet["RESULT"]
    oracle.check(dict(enumerate(found)), 60, repeats=0)
    assert most <= 3, f"{most} were out: one, one that waits for room, one that is being delivered"


@fault(14, "stragglers: nodes of 1, 3 and 8 workers", runs=3, limit=("ratio", 1.1))
def stragglers(bench: Bench) -> None:
    """Uneven tasks: the makespan is near the ideal, through recall."""
    _stragglers(bench, [bench.rng.choice([0.02, 0.05, 0.1, 0.4]) for _ in range(600)])


@fault(14, "stragglers: the last tasks are the longest", runs=3, limit=("ratio", 1.1))
def stragglers_at_the_end(bench: Bench) -> None:
    """What a node holds beyond its workers is worth much then, and must go to who has nothing."""
    _stragglers(bench, [0.02] * 300 + [0.5] * 144)


@fault(14, "stragglers: a node of 8 workers is slow", runs=3, short=True)
def straggling_node(bench: Bench) -> None:
    """Two seconds a task, where the others take 50 ms. What waits there is recalled, and done before the first."""
    cluster, oracle = bench.cluster(1, 3), bench.oracle()
    cluster.env["SLOW"] = "2"
    cluster.start_node(8)
    at = time.monotonic()
    call = bench.call(cluster, "map", WorkHere(oracle.path), range(60))
    oracle.check(call.result(), 60, repeats=0)
    took = time.monotonic() - at
    late = sum(event.at > at + 2 for event in oracle.events() if event.word == "begin")
    bench.note(recover=took, repeated=0, remark=f"{took / 2:.3f} of the ideal")
    assert not late, f"{late} tasks have waited behind the slow ones"


def _stragglers(bench: Bench, durations: list[float]) -> None:
    cluster = bench.cluster(1, 3, 8)
    bench.call(cluster, "map", unit, range(100)).result()
    tasks = list(enumerate(durations))
    ideal = sum(durations) / WORKERS
    at = time.monotonic()
    call = bench.call(cluster, "imap_unordered", sleep, tasks)
    assert sorted(call.result().values()) == list(range(len(tasks)))
    took = time.monotonic() - at
    best = _greedy(durations) / ideal
    bench.ratio.append(took / ideal)
    bench.note(recover=took, remark=f"{took / ideal:.3f} of the ideal ({best:.3f} at best in this order)")
    assert took < 1.5 * ideal, f"{took:.2f} s, ideal {ideal:.2f} s"


def _greedy(durations: list[float]) -> float:
    """The makespan where whoever is free takes the next task at once."""
    free = [0.0] * WORKERS
    for seconds in durations:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


@fault(14, "a job of a thousand chunks is cancelled", runs=3, short=True, limit=("recover", 1.0))
def cancelled(bench: Bench) -> None:
    """Its workers are free within a second, even those that hang."""
    cluster, oracle = bench.cluster(1, 3), bench.oracle()
    work = Work(oracle.path, 0.05, tuple(range(0, 1000, 100)), "hang")
    packets = achilles.imap(work, range(1000), buffersize=1000, **cluster.address)
    oracle.wait_for(8)
    wait_until(lambda: packets._call.ended, "all of it dumped")
    at = time.monotonic()
    packets.close()
    other = bench.oracle()  # longer than a worker may hang: four at once, or it is too late
    other.check(bench.call(cluster, "map", Work(other.path, 1.5), range(4)).result(), 4, repeats=0)
    times = [event.at for event in other.events() if event.word == "begin"]
    assert len({event.pid for event in other.events()}) == 4
    bench.note(recover=max(times) - at)
    assert max(times) - at < 3, f"{max(times) - at:.2f} s"  # tells a hang from a wait; the table has the exact time
    cluster.wait_idle(5)
