"""The server dies, comes back, never comes back, or sleeps; and the controller sleeps."""

from __future__ import annotations

import signal
import time

from conftest import wait_until

from achilles import ServerUnreachable

from . import tree
from .bench import Bench, fault
from .work import Work


def _wait_until(at: float) -> None:
    wait_until(lambda: time.monotonic() >= at, "the time to go on", at - time.monotonic() + 5)


def _server_killed(bench: Bench, way: str, *, with_node: bool = False, away: float = 3.0) -> None:
    """Killed mid-job and started again: what was delivered is not run again."""
    cluster, oracle = bench.cluster(2, 1), bench.oracle()
    count = 150 if bench.short else 400
    call = bench.call(cluster, way, Work(oracle.path, 0.02), iter(range(count)))
    oracle.wait_for(40)
    cluster.server.signal(signal.SIGSTOP)  # what was delivered until now is known exactly
    delivered = set(call.found)
    before = oracle.counts()
    cluster.server.kill()
    if with_node:
        cluster.nodes[0].kill()
    _wait_until(time.monotonic() + away)
    cluster.start_server()
    at = time.monotonic()
    call.result()
    counts = oracle.counts()
    again = [index for index in delivered if counts[index] > before[index]]
    assert not again, f"delivered, and run again: {again}"
    oracle.check(call.found, count, repeats=2 * 3 + 64)
    begun = min(event.at for event in oracle.events() if event.at > at)
    bench.note(recover=begun - at, repeated=oracle.repeated())


@fault(4, "server SIGKILLed, back after 3 s", runs=3)
def server_killed(bench: Bench) -> None:
    _server_killed(bench, "imap", away=0.5 if bench.short else 3)


@fault(4, "server SIGKILLed, imap_unordered", runs=3)
def server_killed_unordered(bench: Bench) -> None:
    _server_killed(bench, "imap_unordered")


@fault(4, "server and a node SIGKILLed at once", runs=3, short=True)
def server_and_node_killed(bench: Bench) -> None:
    _server_killed(bench, "imap", with_node=True, away=0.5 if bench.short else 3)


@fault(4, "server SIGKILLed three times in one job", runs=2)
def server_killed_thrice(bench: Bench) -> None:
    cluster, oracle = bench.cluster(2, 1), bench.oracle()
    call = bench.call(cluster, "map", Work(oracle.path, 0.02), range(500))
    for number in range(1, 4):
        oracle.wait_for(number * 60)
        cluster.server.kill()
        cluster.start_server()
    oracle.check(call.result(), 500, repeats=3 * (2 * 3 + 64))
    bench.note(repeated=oracle.repeated())


@fault(4, "server SIGKILLed, never comes back", runs=2, short=True)
def server_never_back(bench: Bench) -> None:
    """A clear error after `reconnect_seconds`."""
    seconds = 1.0 if bench.short else 5.0
    cluster, oracle = bench.cluster(1), bench.oracle()
    call = bench.call(cluster, "map", Work(oracle.path, 0.02), iter(range(10**6)), reconnect_seconds=seconds)
    oracle.wait_for(5)
    at = time.monotonic()
    cluster.server.kill()
    assert call.ended.wait(seconds + 15)
    took = time.monotonic() - at
    bench.note(detect=took, remark=f"reconnect_seconds={seconds:g}")
    assert took > 0.9 * seconds, f"it gave up after {took:.2f} s"
    assert isinstance(call.error, ServerUnreachable), repr(call.error)
    assert "reconnect_seconds" in str(call.error)


@fault(4, "server SIGSTOPped for 10 s", runs=1)
def server_stopped(bench: Bench) -> None:
    """No death, no task run twice."""
    cluster, oracle = bench.cluster(2, 2), bench.oracle()
    call = bench.call(cluster, "imap", Work(oracle.path, 0.02), iter(range(800)))
    oracle.wait_for(20)
    workers = {pid for node in cluster.nodes for pid in node.workers(2)}
    cluster.server.signal(signal.SIGSTOP)
    _wait_until(time.monotonic() + 10)
    cluster.server.signal(signal.SIGCONT)
    oracle.check(call.result(), 800, repeats=0)
    assert tree.left(workers) == workers
    assert [node["id"] for node in cluster.status()["nodes"]] == [0, 1], "they have joined anew"
    bench.note(repeated=oracle.repeated())


@fault(4, "server SIGSTOPped for 30 s", runs=1)
def server_stopped_for_long(bench: Bench) -> None:
    """Everybody leaves it, and comes back."""
    cluster, oracle = bench.cluster(2, 2), bench.oracle()
    call = bench.call(cluster, "imap", Work(oracle.path, 0.02), iter(range(800)))
    oracle.wait_for(20)
    at = time.monotonic()
    cluster.server.signal(signal.SIGSTOP)
    _wait_until(at + 30)
    cluster.server.signal(signal.SIGCONT)
    at = time.monotonic()
    oracle.wait_for(sum(oracle.counts().values()) + 1)
    bench.note(recover=time.monotonic() - at)
    oracle.check(call.result(), 800, repeats=2 * 4 + 64 + 12)
    bench.note(repeated=oracle.repeated())


@fault(4, "controller SIGSTOPped for 30 s", runs=1)
def controller_asleep(bench: Bench) -> None:
    """Its job is cancelled after 20 s; it wakes, connects, and sends again what it has no result for."""
    cluster, oracle = bench.cluster(2, 2), bench.oracle()
    script = cluster.start_script(
        "import itertools, sys\nfrom achilles import imap\nfrom faults.work import Work\n"
        f"found = [r for p in imap(Work({oracle.path!r}, 0.05), iter(range(600))) for r in p['RESULT']]\n"
        "print('right' if found == [n * n for n in range(600)] else found)\n")
    oracle.wait_for(40)
    script.signal(signal.SIGSTOP)
    at = time.monotonic()
    wait_until(lambda: not cluster.status()["jobs"], "the end of its job", 26)
    detected = time.monotonic() - at
    _wait_until(at + 30)
    script.signal(signal.SIGCONT)
    at = time.monotonic()
    oracle.wait_for(sum(oracle.counts().values()) + 1)
    bench.note(detect=detected, recover=time.monotonic() - at)
    script.wait_for("right", 60)
    oracle.check({n: n * n for n in range(600)}, 600, repeats=2 * 4 + 64)
    bench.note(repeated=oracle.repeated())


@fault(4, "server SIGKILLed while callers and nodes connect", runs=3)
def server_killed_at_the_door(bench: Bench) -> None:
    cluster, oracle = bench.cluster(1), bench.oracle()
    calls = []
    for _ in range(3):
        cluster.start_node(1, wait=False)
        calls.append(bench.call(cluster, "map", Work(oracle.path, 0.05), range(20)))
    calls[0].ended.wait(0.3)
    cluster.server.kill()
    cluster.start_server()
    for call in calls:
        try:
            assert call.result() == {n: n * n for n in range(20)}
        except ServerUnreachable as e:  # it had never been connected, and nobody listened: it is told so at once
            assert not call.found
            assert "no achilles server answers" in str(e), e
