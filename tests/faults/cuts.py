"""A connection that ends after its n-th byte, up or down, by end of file or reset: for each n of a whole session."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from itertools import pairwise

from cluster import SECRET, USER, Cluster
from conftest import ENCRYPT, wait_until

from achilles import config
from achilles.node.loop import Node

from .bench import Bench, Call, fault
from .oracle import Oracle
from .proxy import Proxy
from .work import Work

Place = tuple[int, int]  # 0 for up or 1 for down, and after how many bytes
COUNT = 12
SECONDS = 30.0  # for what comes after a cut; tells a hang from a wait


def _places(totals: Iterable[int], bench: Bench, short: int) -> list[Place]:
    """Every place of a session of so many bytes each way; in the short form so many of them."""
    every = [(way, n) for way, total in enumerate(totals) for n in range(total + 1)]
    return bench.rng.sample(every, min(short, len(every))) if bench.short else every


def _at_each(places: list[Place], crew: Iterable[Callable[[int, int], object]]) -> None:
    """Share the places among the crew, a thread each. AssertionError that names the places that went wrong."""
    waiting: queue.SimpleQueue[Place] = queue.SimpleQueue()
    errors: list[str] = []
    for place in places:
        waiting.put(place)

    def work(try_at: Callable[[int, int], object]) -> None:
        while not waiting.empty() and not errors:
            try:
                way, n = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                try_at(way, n)
            except BaseException as e:
                errors.append(f"cut {('up', 'down')[way]} after {n} bytes: {type(e).__name__}: {e}")

    threads = [threading.Thread(target=work, args=(each,), name="cutter") for each in crew]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def _session(cluster: Cluster, oracle: Oracle, **port: int) -> Call:
    return Call("imap", Work(oracle.path), range(COUNT), chunksize=2, **cluster.address | port)


def _check(bench: Bench, call: Call, oracle: Oracle) -> None:
    oracle.check(call.result(SECONDS), COUNT, repeats=COUNT)
    assert not call.errors, call.errors
    bench.note(repeated=oracle.repeated())


@fault(6, "caller cut after the n-th byte of a session, each n", short=True)
def cut_caller(bench: Bench) -> None:
    """Its first connection, from the greeting to the goodbye; it makes a second one, and the answer is right."""
    cluster = bench.cluster(1)
    with Proxy(cluster.port) as proxy:
        _session(cluster, bench.oracle(), port=proxy.port).result()
        wait_until(lambda: not proxy.open, "the end of the session")
        places = _places(proxy.passed, bench, 40)

    def cut(way: int, n: int) -> None:
        with Proxy(cluster.port) as proxy:
            proxy.cut_next(way, n, reset=n % 2 == 0)
            oracle = bench.oracle()
            _check(bench, _session(cluster, oracle, port=proxy.port), oracle)

    _at_each(places, [cut] * 8)
    bench.note(remark=f"{len(places)} places")


@fault(6, "node cut after the n-th byte of a session, each n", short=True)
def cut_node(bench: Bench) -> None:
    """Under a job that only it can do. It comes back by itself, for that job and for the next place."""
    lanes = [_Lane(bench) for _ in range(1 if bench.short else 8)]
    places = _places(lanes[0].least(), bench, 12)
    _at_each(places, [lane.run for lane in lanes])
    reached = sum(lane.reached for lane in lanes)
    bench.note(remark=f"{reached} places")
    assert reached > 0.9 * len(places), f"{reached} of {len(places)} places"


class _Lane:
    """A cluster with one node, behind a proxy."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.reached = 0  # places that a session came to
        self.cluster = bench.cluster()
        self.proxy = bench.proxy(self.cluster.port)
        self.cluster.start_node(1, "--port", str(self.proxy.port))

    def least(self) -> tuple[int, int]:
        """The fewest bytes up and down of a few sessions: one may be an envelope or a heartbeat longer than another."""
        passed = []
        for _ in range(5):
            self.session(0, 1 << 20)  # ends the one before, which counts from now
            passed.append(list(self.proxy.passed))
        up, down = (min(now[way] - was[way] for was, now in pairwise(passed)) for way in (0, 1))
        return up, down

    def run(self, way: int, n: int) -> None:
        """A session that is cut there; another one if it was over before, as some are."""
        for _ in range(5):
            self.session(way, n)
            if self.proxy.cut_at is not None:
                self.reached += 1
                return

    def session(self, way: int, n: int) -> None:
        """One job, on a connection of the node that is cut there, and on the next one."""
        oracle = self.bench.oracle()
        wait_until(lambda: self.proxy.open == 1, "the node")
        self.proxy.cut_next(way, n, reset=n % 2 == 0)
        _check(self.bench, _session(self.cluster, oracle), oracle)


@fault(6, "new node cut after the n-th byte until it has joined, each n", short=True)
def cut_new_node(bench: Bench) -> None:
    """What it never heard is no refusal: it tries again. Played by threads of this process, without workers."""
    cluster = bench.cluster()
    with Proxy(cluster.port) as proxy:
        _Newcomer(proxy.port).join()
        wait_until(lambda: not proxy.open, "its end")
        places = _places(proxy.passed, bench, 40)

    def cut(way: int, n: int) -> None:
        with Proxy(cluster.port) as proxy:
            proxy.cut_next(way, n, reset=n % 2 == 0)
            _Newcomer(proxy.port).join()

    _at_each(places, [cut] * 8)
    bench.note(remark=f"{len(places)} places")


class _Newcomer(Node):
    """A node that leaves as soon as it has joined, before it has started a worker."""

    def __init__(self, port: int) -> None:
        super().__init__(config.Settings("127.0.0.1", port, USER, config.Secret(SECRET), encrypt=ENCRYPT), 1, "fork")
        self._until = time.monotonic() + SECONDS

    def join(self) -> None:
        """Run until then."""
        try:
            self.run()
        except SystemExit:
            assert self.joined, "it has not joined"

    def greet(self, number: int, connections: int) -> None:
        """Say nothing."""

    def _say_once(self, error: Exception) -> None:
        """Nor that."""

    def look(self) -> None:
        if self.joined or time.monotonic() > self._until:
            raise SystemExit
