"""A worker is killed: in a task, idle, while it receives, inside C code, and while a child of its own lives on."""

from __future__ import annotations

import signal
import time

from cluster import Cluster, alive
from conftest import wait_until

from . import tree
from .bench import Bench, fault
from .work import Work, leave_a_child, length, unit

COUNT = 40
SOON_SECONDS = 2.0  # what tells a requeue from a hang; the table has the exact time


@fault(1, "worker SIGKILLed in a task", runs=20, short=True, limit=("detect", 0.1))
def worker_in_a_task(bench: Bench) -> None:
    """There are idle workers: so it is begun again as soon as its death is known."""
    cluster, oracle = bench.cluster(2, 2), bench.oracle()
    work = Work(oracle.path, 0, (0,), "hang", times=1)
    call = bench.call(cluster, bench.rng.choice(["map", "imap", "imap_unordered"]), work, range(3))
    oracle.wait_for(3)
    (victim,) = wait_until(lambda: len(running := oracle.running()) == 1 and running, "one that hangs")
    at = time.monotonic()
    tree.kill(victim)
    oracle.check(call.result(), 3, repeats=1)
    assert not call.errors
    again = oracle.hit(at, {victim})
    bench.note(again, repeated=oracle.repeated())
    assert again.detect < SOON_SECONDS, f"begun again after {again.detect:.2f} s"


@fault(1, "worker SIGKILLed in a task, all are busy", runs=20)
def worker_among_busy_ones(bench: Bench) -> None:
    """Tasks of 20 ms: that task alone is run again."""
    cluster, oracle = bench.cluster(2, 2), bench.oracle()
    call = bench.call(cluster, "map", Work(oracle.path, 0.02), range(200))
    oracle.wait_for(40)
    victim = bench.rng.choice(sorted(oracle.running()))
    at = time.monotonic()
    tree.kill(victim)
    oracle.check(call.result(), 200, repeats=1)
    assert not call.errors
    bench.note(oracle.hit(at, {victim}), repeated=oracle.repeated())


@fault(1, "worker SIGKILLed in a task, its own child lives on", runs=20, limit=("detect", 0.1))
def worker_with_a_child(bench: Bench) -> None:
    """The child holds the worker's end of the socket pair and its sentinel. There are idle workers."""
    cluster, oracle = bench.cluster(2, 2), bench.oracle()
    work = Work(oracle.path, 0.02, (1,), "child", times=1)
    call = bench.call(cluster, "map", work, range(3))
    oracle.check(call.result(), 3, repeats=1)
    assert oracle.counts()[1] == 2
    times = [event for event in oracle.events() if event.index == 1]
    bench.note(detect=times[1].at - times[0].at, recover=times[-1].at - times[0].at, repeated=oracle.repeated())
    for process in tree.orphans("sleep 60"):
        tree.kill(process)


@fault(1, "worker SIGKILLed in a task, three arguments of a chunk, twice each", runs=20, short=True)
def worker_charges_one(bench: Bench) -> None:
    """Six deaths of one chunk: that argument alone is charged each time, so none of them is given up."""
    cluster, oracle = bench.cluster(1), bench.oracle()
    bad = tuple(bench.rng.sample(range(8), 3))
    call = bench.call(cluster, "map", Work(oracle.path, 0, bad, "kill", times=2), range(8), chunksize=8)
    oracle.check(call.result(), 8, repeats=6 * 8)
    assert not call.errors
    assert oracle.counts()[bad[0]] > 2
    bench.note(repeated=oracle.repeated())


@fault(1, "worker SIGKILLed while idle", runs=20)
def worker_idle(bench: Bench) -> None:
    cluster = bench.cluster(2)
    _kill_idle(bench, cluster, set(cluster.nodes[0].workers(2)))


@fault(1, "worker SIGKILLed while idle, its own children with it", runs=20)
def worker_idle_with_a_child(bench: Bench) -> None:
    cluster = bench.cluster(2)
    call = bench.call(cluster, "map", leave_a_child, range(12))
    found = call.result()
    cluster.wait_idle(5)
    _kill_idle(bench, cluster, set(cluster.nodes[0].workers(2)))
    wait_until(lambda: not any(alive(child) for _, _, child in found.values()), "the end of what tasks have started")


def _kill_idle(bench: Bench, cluster: Cluster, before: set[int]) -> None:
    oracle = bench.oracle()
    (node,) = cluster.nodes
    at = time.monotonic()
    for victim in before:
        tree.kill(victim)
    wait_until(lambda: len(set(node.workers(2)) - before) == 2, "two new workers")
    bench.note(recover=time.monotonic() - at, repeated=0)
    call = bench.call(cluster, "map", Work(oracle.path), range(COUNT))
    oracle.check(call.result(), COUNT, repeats=0)


@fault(1, "worker SIGKILLed while it receives", runs=20, short=True)
def worker_receiving(bench: Bench) -> None:
    """It is stopped until a message of some MB fills its socket, then the node is, while the worker reads that much.

    So it dies in the middle of a frame. Nothing is charged: it was idle.
    """
    cluster = bench.cluster(1)
    (node,) = cluster.nodes
    assert bench.call(cluster, "map", length, [b""]).result() == {0: 0}  # so the worker has started
    (victim,) = node.workers(1)
    tree.kill(victim, signal.SIGSTOP)
    call = bench.call(cluster, "map", length, [b"x" * (4 << 20)] * 5)
    wait_until(lambda: any(job["running"] for job in cluster.status()["jobs"]), "chunks at the node")
    _wait(0.2)  # for the socket to be full
    node.signal(signal.SIGSTOP)
    used = tree.seconds_used(victim)
    tree.kill(victim, signal.SIGCONT)
    _wait(0.2)  # for it to have read that; it sleeps then
    assert tree.seconds_used(victim) - used < 0.2
    at = time.monotonic()
    tree.kill(victim)
    node.signal(signal.SIGCONT)
    assert call.result() == dict.fromkeys(range(5), 4 << 20)
    bench.note(recover=time.monotonic() - at, repeated=0)
    assert f"worker {victim} ended with -9 in phase idle" in node.err.read_text(), node.err.read_text()


def _wait(seconds: float) -> None:
    at = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= at, "some time", seconds + 5)


@fault(1, "workers SIGKILLed again and again", runs=3)
def workers_all_the_time(bench: Bench) -> None:
    """No argument a third time; so none is lost."""
    cluster, oracle = bench.cluster(2, 2), bench.oracle()
    call = bench.call(cluster, "imap", Work(oracle.path, 0.05), iter(range(300)))
    kills = 0
    while kills < 30 and not call.ended.wait(0.1):
        counts = oracle.counts()
        victims = [pid for pid, index in oracle.running().items() if alive(pid) and counts[index] == 1]
        if victims:
            kills += tree.kill(bench.rng.choice(victims))
    oracle.check(call.result(), 300, repeats=kills)
    assert not call.errors
    bench.note(repeated=oracle.repeated(), remark=f"{kills} kills")


@fault(1, "worker SIGSTOPped for 3 s", runs=3)
def worker_stopped(bench: Bench) -> None:
    """The others work on; the node's heartbeats are its own."""
    cluster, oracle = bench.cluster(2), bench.oracle()
    call = bench.call(cluster, "map", Work(oracle.path, 0.05), range(100))
    oracle.wait_for(4)
    victim = next(iter(oracle.running()))
    at = time.monotonic()
    tree.kill(victim, signal.SIGSTOP)
    wait_until(lambda: time.monotonic() > at + 3, "the end of the pause")
    ended = sum(at < event.at < at + 3 and event.word == "end" for event in oracle.events())
    tree.kill(victim, signal.SIGCONT)
    oracle.check(call.result(), 100, repeats=0)
    assert ended > 20, f"the other worker did {ended} tasks meanwhile"
    bench.note(repeated=oracle.repeated())


@fault(1, "workers SIGKILLed before they are ready", runs=3)
def workers_before_they_are_ready(bench: Bench) -> None:
    """New ones are started after a pause that grows."""
    cluster = bench.cluster(2)
    (node,) = cluster.nodes
    for _ in range(4):
        for pid in node.workers(2):
            tree.kill(pid)
    assert bench.call(cluster, "map", unit, range(10)).result() == dict.fromkeys(range(10), 1)
