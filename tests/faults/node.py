"""A node dies, is stopped, or leaves its workers inside C code."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Iterator

from cluster import Cluster, Process
from conftest import wait_until

from achilles import WorkerLost

from . import tree
from .bench import Bench, fault
from .oracle import Oracle
from .work import Work

GONE_SECONDS = 5.0  # for the workers of a dead node


def _start(bench: Bench, *nodes: int, seconds: float = 0.1, count: int = 60) -> tuple[Cluster, Oracle, object]:
    cluster, oracle = bench.cluster(*nodes), bench.oracle()
    return cluster, oracle, bench.call(cluster, "map", Work(oracle.path, seconds), range(count))


@fault(3, "node SIGKILLed", runs=5)
def node_killed(bench: Bench) -> None:
    cluster, oracle, call = _start(bench, 2, 3)
    oracle.wait_for(8)
    workers = set(cluster.nodes[1].workers(3))
    at = time.monotonic()
    tree.kill(cluster.nodes[1].pid)
    cluster.nodes[1].kill()
    wait_until(lambda: not tree.left(workers), "the end of its workers", GONE_SECONDS)
    oracle.check(call.result(), 60, repeats=3)  # type: ignore[attr-defined]
    bench.note(oracle.hit(at, workers), repeated=oracle.repeated())


def _workers_gone(bench: Bench, method: str, how: str) -> None:
    """The node is killed while its workers are inside the function."""
    cluster, oracle = bench.cluster(2, start_method=method), bench.oracle()
    node = cluster.nodes[0]
    call = bench.call(cluster, "map", Work(oracle.path, 0, (0, 1), how, times=1), range(8))
    wait_until(lambda: {*oracle.running().values()} == {0, 1}, "both calls to hang", 30)
    workers = set(oracle.running())
    at = time.monotonic()
    node.kill()
    wait_until(lambda: not tree.left(workers), "the end of its workers", GONE_SECONDS)
    bench.note(detect=time.monotonic() - at)
    cluster.start_node(2)
    oracle.check(call.result(), 8, repeats=2)


@fault(3, "node SIGKILLed, workers in Python (fork)", runs=3)
def node_killed_fork(bench: Bench) -> None:
    _workers_gone(bench, "fork", "hang")


@fault(3, "node SIGKILLed, workers in Python (spawn)", runs=3, short=True)
def node_killed_spawn(bench: Bench) -> None:
    _workers_gone(bench, "spawn", "hang")


@fault(3, "node SIGKILLed, workers in Python (forkserver)", runs=3)
def node_killed_forkserver(bench: Bench) -> None:
    _workers_gone(bench, "forkserver", "hang")


@fault(3, "node SIGKILLed, workers in a C call (fork)", runs=3, short=True)
def node_killed_fork_in_c(bench: Bench) -> None:
    _workers_gone(bench, "fork", "c-call")


@fault(3, "node SIGKILLed, workers in a C call (spawn)", runs=3)
def node_killed_spawn_in_c(bench: Bench) -> None:
    _workers_gone(bench, "spawn", "c-call")


@fault(3, "a random node SIGKILLed each second, replaced", runs=1)
def nodes_each_second(bench: Bench) -> None:
    """For a minute (short: five seconds)."""
    seconds = 5 if bench.short else 60
    cluster, oracle = bench.cluster(2, 2, 2), bench.oracle()
    over = threading.Event()
    call = bench.call(cluster, "imap_unordered", Work(oracle.path, 0.1), _numbers_until(over))
    oracle.wait_for(6)
    nodes, kills = list(cluster.nodes), 0
    began = time.monotonic()
    while time.monotonic() < began + seconds and not call.ended.wait(1):
        victim = bench.rng.choice(nodes)
        nodes.remove(victim)
        pids = set(_workers_of(victim))
        victim.kill()
        kills += 1
        nodes.append(cluster.start_node(2, wait=False))
        wait_until(lambda: not tree.left(pids), "the end of its workers", GONE_SECONDS)  # noqa: B023
    assert not call.ended.is_set(), call.error
    over.set()
    found = call.result(120)
    oracle.check(found, len(found), repeats=kills * 2 * 3)
    bench.note(repeated=oracle.repeated(), remark=f"{kills} nodes killed, {len(found)} tasks")


def _numbers_until(over: threading.Event) -> Iterator[int]:
    """0, 1, ... as long as it takes."""
    yield from itertools.takewhile(lambda _: not over.is_set(), itertools.count())


def _workers_of(process: Process) -> list[int]:
    """Its worker processes."""
    return [pid for pid in tree.family(process.pid) if pid != process.pid]


@fault(3, "ten nodes SIGKILLed under one argument", runs=1)
def ten_nodes(bench: Bench) -> None:
    """It is taken for the cause, and given up; the others of the job are done."""
    cluster, oracle = bench.cluster(), bench.oracle()
    call = bench.call(cluster, "map", Work(oracle.path, 0, (0,), "hang"), range(6))
    for number in range(1, 11):
        node = cluster.start_node(2)
        wait_until(lambda: oracle.counts()[0] == number, f"attempt {number}")  # noqa: B023
        node.kill()
    cluster.start_node(1)
    found = call.result()
    error = call.errors[0]
    assert isinstance(error, WorkerLost)
    assert "10 nodes" in str(error)
    assert set(call.errors) == {0}
    oracle.check(found, 6, repeats=9 + 10, lost=call.errors)
    bench.note(repeated=oracle.repeated())


@fault(3, "ten nodes SIGKILLed, others wait behind that argument")
def ten_nodes_of_one(bench: Bench) -> None:
    """What the nodes held and no worker had begun is not charged."""
    cluster, oracle = bench.cluster(), bench.oracle()
    call = bench.call(cluster, "map", Work(oracle.path, 0, (0,), "hang"), range(6))
    for number in range(1, 11):
        node = cluster.start_node(1)
        wait_until(lambda: oracle.counts()[0] == number, f"attempt {number}")  # noqa: B023
        node.kill()
    cluster.start_node(1)
    found = call.result()
    assert set(call.errors) == {0}, call.errors
    oracle.check(found, 6, repeats=9, lost=call.errors)
    bench.note(repeated=oracle.repeated())


@fault(3, "all workers of a node hold the GIL in C for 25 s")
def node_in_c(bench: Bench) -> None:
    """Heartbeats are the node's own, and no process's that runs user code: nobody is taken for dead."""
    cluster, oracle = bench.cluster(2), bench.oracle()
    call = bench.call(cluster, "map", Work(oracle.path, 0, (0, 1), "long-c-call"), range(20))
    oracle.check(call.result(), 20, repeats=0)
    assert [node["id"] for node in cluster.status()["nodes"]] == [0], "the node has joined anew"
    bench.note(repeated=oracle.repeated())


@fault(3, "the forkserver of a node SIGKILLed", runs=3, short=True)
def forkserver_killed(bench: Bench) -> None:
    """Its workers are orphans of a kind, and are replaced; each of their tasks may have been charged once."""
    cluster, oracle = bench.cluster(2, start_method="forkserver"), bench.oracle()
    node = cluster.nodes[0]
    call = bench.call(cluster, "map", Work(oracle.path, 0.05), range(40))
    oracle.wait_for(4)
    workers = set(oracle.running())
    (server,) = {tree.parent(pid) for pid in workers if tree.parent(pid) not in (0, 1, node.pid)}
    at = time.monotonic()
    tree.kill(server)
    oracle.check(call.result(), 40, repeats=4)
    assert not call.errors
    bench.note(oracle.hit(at, workers), repeated=oracle.repeated())
    wait_until(lambda: not tree.left(workers), "the end of its workers", GONE_SECONDS)


@fault(3, "node SIGSTOPped for 25 s", runs=1)
def node_stopped(bench: Bench) -> None:
    """Its chunks go to the other after 20 s; what it answers late is dropped, and it joins again by itself."""
    cluster, oracle = bench.cluster(2, 2), bench.oracle()
    node = cluster.nodes[1]
    call = bench.call(cluster, "imap", Work(oracle.path, 0.05), iter(range(1000)))
    oracle.wait_for(8)
    workers = set(node.workers(2))
    at = time.monotonic()
    node.signal(signal.SIGSTOP)
    wait_until(lambda: len(cluster.status()["nodes"]) == 1, "the loss of the node", 26)
    detected = time.monotonic() - at
    wait_until(lambda: time.monotonic() > at + 25, "the end of the pause", 30)
    node.signal(signal.SIGCONT)
    wait_until(lambda: len(cluster.status()["nodes"]) == 2, "the return of the node")
    bench.note(detect=detected, recover=time.monotonic() - at - 25)
    oracle.check(call.result(), 1000, repeats=6)
    assert not tree.left(workers), "a node that has lost its server replaces its workers"
    bench.note(repeated=oracle.repeated())
