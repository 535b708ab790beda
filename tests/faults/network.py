"""The network: quiet failures, slow links, small pieces, and bytes that are altered on the way."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

from cluster import SECRET, USER, Cluster, Process
from conftest import ENCRYPT, wait_until

from achilles import LetterAltered, config
from achilles.controller.connection import Controller

from .bench import Bench, Call, fault
from .netns import Link
from .work import Work, echo, length

SILENCE_SECONDS = 20.0
SLACK_SECONDS = 7.0  # a heartbeat's interval, and a loaded machine
MIB = 1 << 20


class _FarCluster(Cluster):
    """The server in one namespace, the nodes in another."""

    link: Link

    @property
    def address(self) -> dict[str, Any]:
        return super().address | {"host": self.link.addresses[0]}

    def start_server(self) -> Process:
        self.env["ACHILLES_HOST"] = self.link.addresses[0]
        with self.link.inside(0):
            self._write_settings()
            self.server = self._run("server", "-m", "achilles.server")
        self.port = int(self.server.wait_for(r"initiated at [\d.]+:(\d+)\nListening for connections\.\.\.")[1])
        self._write_settings()
        return self.server

    def start_node(self, cpu_count: int, *options: str, wait: bool = True) -> Process:
        with self.link.inside(1):
            return super().start_node(cpu_count, *options, wait=wait)


class _Watch:
    """A connection from the server's side that sees nodes come and go: a second, quicker `status`."""

    def __init__(self, cluster: _FarCluster) -> None:
        settings = config.Settings(
            cluster.link.addresses[0], cluster.port, USER, config.Secret(SECRET), encrypt=ENCRYPT)
        self._controller = Controller(lambda: settings)

    def __enter__(self) -> Callable[[], list[int]]:
        self._controller.open()
        return lambda: [node["id"] for node in self._controller.status()["nodes"]]

    def __exit__(self, *_: object) -> None:
        self._controller.close()


def _far(bench: Bench, *nodes: int) -> tuple[Link, _FarCluster]:
    link: Link = bench.enter(Link())
    folder = bench.folder / "far"
    folder.mkdir()
    cluster = _FarCluster(folder, *nodes)
    cluster.link = link
    bench.enter(cluster)
    bench.clusters.append(cluster)
    return link, cluster


def _black_hole(bench: Bench, sides: tuple[int, ...], busy: bool) -> None:
    """A node behind a cable that swallows: both ends notice within 20 s, and all ends right when it heals.

    Busy: there are chunks there, and data that nobody acknowledges.
    """
    link, cluster = _far(bench, 2)
    node = cluster.nodes[0]
    oracle = bench.oracle()
    with link.inside(0), _Watch(cluster) as nodes:
        call = None
        if busy:
            call = bench.call(cluster, "imap", Work(oracle.path, 0.02, pad=2000), iter(range(1500)))
            oracle.wait_for(30)
        else:
            quiet_until = time.monotonic() + 1
            wait_until(lambda: time.monotonic() > quiet_until, "a quiet moment")
        at = time.monotonic()
        link.swallow(*sides)
        wait_until(lambda: not nodes(), "the server to notice", SILENCE_SECONDS + SLACK_SECONDS)
        server = time.monotonic() - at
        wait_until(lambda: "lost the server" in node.err.read_text(), "the node to notice",
                   at + SILENCE_SECONDS + SLACK_SECONDS - time.monotonic())
        bench.note(detect=max(server, time.monotonic() - at))
        link.heal()
        at = time.monotonic()
        wait_until(lambda: len(nodes()) == 1, "the return of the node", 20)
        bench.note(recover=time.monotonic() - at)
        if call is not None:
            call.result(120)
            oracle.check(call.found, 1500, repeats=2 * 3 + 64, value=lambda n: (n * n, bytes(2000)))
            bench.note(repeated=oracle.repeated())


@fault(5, "black hole, both directions, idle")
def black_hole_idle(bench: Bench) -> None:
    _black_hole(bench, (0, 1), False)


@fault(5, "black hole, both directions, busy")
def black_hole_busy(bench: Bench) -> None:
    _black_hole(bench, (0, 1), True)


@fault(5, "black hole, server to node, idle")
def black_hole_down_idle(bench: Bench) -> None:
    _black_hole(bench, (0,), False)


@fault(5, "black hole, server to node, busy")
def black_hole_down_busy(bench: Bench) -> None:
    _black_hole(bench, (0,), True)


@fault(5, "black hole, node to server, idle")
def black_hole_up_idle(bench: Bench) -> None:
    _black_hole(bench, (1,), False)


@fault(5, "black hole, node to server, busy")
def black_hole_up_busy(bench: Bench) -> None:
    _black_hole(bench, (1,), True)


@fault(5, "black hole between caller and server, busy")
def black_hole_caller(bench: Bench) -> None:
    """The caller and a node are behind the cable: both are given up, both come back, and the answer is right."""
    link, cluster = _far(bench, 2)
    oracle = bench.oracle()
    with link.inside(1):
        call = bench.call(cluster, "imap", Work(oracle.path, 0.02, pad=2000), iter(range(1500)))
    oracle.wait_for(30)
    with link.inside(0):
        at = time.monotonic()
        link.swallow(0, 1)
        wait_until(lambda: not cluster.status()["jobs"], "the end of its job", SILENCE_SECONDS + SLACK_SECONDS)
        bench.note(detect=time.monotonic() - at)
    link.heal()
    at, count = time.monotonic(), sum(oracle.counts().values())
    oracle.wait_for(count + 1)
    bench.note(recover=time.monotonic() - at)
    call.result(90)
    oracle.check(call.found, 1500, repeats=2 * 3 + 64 + 4, value=lambda n: (n * n, bytes(2000)))
    bench.note(repeated=oracle.repeated())


@fault(5, "black hole for 5 s", short=True)
def black_hole_short(bench: Bench) -> None:
    """Nothing happens."""
    link, cluster = _far(bench, 2)
    oracle = bench.oracle()
    count, seconds = (200, 1) if bench.short else (1500, 5)
    with link.inside(0), _Watch(cluster) as nodes:
        call = bench.call(cluster, "imap", Work(oracle.path, 0.02), iter(range(count)))
        oracle.wait_for(30)
        before = nodes()
        link.swallow(0, 1)
        pause = time.monotonic() + seconds
        wait_until(lambda: time.monotonic() > pause, "the end of the pause")
        link.heal()
        at = time.monotonic()
        oracle.wait_for(len(oracle.counts()) + 1)
        bench.note(recover=time.monotonic() - at)
        oracle.check(call.result(), count, repeats=0)
        assert nodes() == before, "the node has joined anew"
        bench.note(repeated=oracle.repeated())


@fault(5, "black hole for 3 s out of 6, for two minutes")
def black_hole_flapping(bench: Bench) -> None:
    """No livelock: in the good half of the time work gets done.

    A chunk that ten nodes were lost with would be an error: what has not begun is not charged, whatever is lost here.
    """
    link, cluster = _far(bench, 2)
    oracle, over = bench.oracle(), threading.Event()
    with link.inside(0), _Watch(cluster) as nodes:
        before = nodes()
        numbers = itertools.takewhile(lambda _: not over.is_set(), itertools.count())
        call = bench.call(cluster, "imap", Work(oracle.path, 0.05), numbers)
        for _ in range(20):
            link.swallow(0, 1)
            call.ended.wait(3)
            link.heal()
            call.ended.wait(3)
        assert not call.ended.is_set(), call.error
        done = len(oracle.counts("end"))
        over.set()
        found = call.result(60)
        assert not call.errors
        joined = nodes()[0] - before[0]  # TCP sends again at times that may fall into the bad half for 20 s
        oracle.check(found, len(found), repeats=joined * 2 * 3)
        assert done > 200, f"{done} tasks in two minutes"
        bench.note(repeated=oracle.repeated(), remark=f"{done} tasks done, {joined} times lost")


# Slow links, by the proxy.


@fault(6, "a 64 MiB argument over 2 MB/s")
def large_argument(bench: Bench) -> None:
    """Some 33 s, over the limit of silence, on the caller's link: nobody is taken for dead."""
    _large(bench, 4 if bench.short else 64, argument=True, nodes=False)


@fault(6, "a 64 MiB argument over 2 MB/s, at the node")
def large_argument_at_node(bench: Bench) -> None:
    _large(bench, 4 if bench.short else 64, argument=True, nodes=True)


@fault(6, "a 64 MiB result over 2 MB/s")
def large_result(bench: Bench) -> None:
    _large(bench, 4 if bench.short else 64, argument=False, nodes=False)


@fault(6, "a 64 MiB result over 2 MB/s, at the node")
def large_result_at_node(bench: Bench) -> None:
    _large(bench, 4 if bench.short else 64, argument=False, nodes=True)


def _large(bench: Bench, mib: int, *, argument: bool, nodes: bool) -> None:
    cluster = bench.cluster()
    proxy = bench.proxy(cluster.port)
    proxy.up.rate = proxy.down.rate = 2e6
    cluster.start_node(1, *(["--port", str(proxy.port)] if nodes else []))
    port = {} if nodes else {"port": proxy.port}
    at = time.monotonic()
    if argument:
        call = bench.call(cluster, "map", length, [b"x" * (mib * MIB)], **port)
    else:
        call = bench.call(cluster, "map", bytes, [mib * MIB], **port)
    found = call.result(mib + 40)[0]
    assert (found if argument else len(found)) == mib * MIB
    bench.note(recover=time.monotonic() - at)
    assert proxy.accepted == 1, f"{proxy.accepted} connections: somebody was taken for dead"


@fault(6, "CANCEL behind 64 MiB of arguments over 2 MB/s")
def cancel_between(bench: Bench) -> None:
    """It gets through between frames, of which none is broken off: they have 8 MiB, or one letter."""
    cluster = bench.cluster()
    proxy = bench.proxy(cluster.port)
    proxy.up.rate = 2e6
    cluster.start_node(1)
    call = bench.call(cluster, "imap", length, iter([b"x" * MIB] * 64), port=proxy.port, take=1)
    call.result(30)
    at = time.monotonic()
    cluster.wait_idle(12)
    bench.note(detect=time.monotonic() - at)


@fault(6, "64 MiB both ways at once")
def both_ways(bench: Bench) -> None:
    """No deadlock."""
    size = (4 if bench.short else 64) * MIB
    cluster = bench.cluster()
    proxy = bench.proxy(cluster.port)
    cluster.start_node(2, "--port", str(proxy.port))
    data = [bytes([n]) * (size // 8) for n in range(16)]
    at = time.monotonic()
    call = bench.call(cluster, "imap_unordered", echo, data, port=proxy.port)
    found = call.result(120)
    assert sorted(found.values()) == data
    bench.note(recover=time.monotonic() - at, remark=f"{16 * size // 8 // MIB} MiB each way")


@fault(6, "one byte a segment", short=True)
def bytewise(bench: Bench) -> None:
    cluster, oracle = bench.cluster(), bench.oracle()
    proxy = bench.proxy(cluster.port)
    proxy.up.piece = proxy.down.piece = 1
    cluster.start_node(2, "--port", str(proxy.port))
    call = bench.call(cluster, "imap", Work(oracle.path, 0.005), range(60), port=proxy.port)
    oracle.check(call.result(), 60, repeats=0)
    bench.note(repeated=oracle.repeated())


@fault(6, "half a second of delay each way")
def delayed(bench: Bench) -> None:
    cluster, oracle = bench.cluster(), bench.oracle()
    proxy = bench.proxy(cluster.port)
    proxy.up.delay = proxy.down.delay = 0.5
    cluster.start_node(2, "--port", str(proxy.port))
    call = bench.call(cluster, "imap", Work(oracle.path, 0.005), range(40), port=proxy.port)
    oracle.check(call.result(), 40, repeats=0)
    bench.note(repeated=oracle.repeated())


@fault(6, "one direction held for 25 s", runs=1)
def held(bench: Bench) -> None:
    """By a proxy that acknowledges everything: only heartbeats can tell."""
    cluster, oracle = bench.cluster(1), bench.oracle()
    proxy = bench.proxy(cluster.port)
    cluster.start_node(1, "--port", str(proxy.port))
    call = bench.call(cluster, "imap", Work(oracle.path, 0.05), iter(range(1000)))
    oracle.wait_for(10)
    at = time.monotonic()
    proxy.hold(down=False)
    wait_until(lambda: len(cluster.status()["nodes"]) == 1, "the loss of the node", SILENCE_SECONDS + SLACK_SECONDS)
    bench.note(detect=time.monotonic() - at)
    wait_until(lambda: time.monotonic() > at + 25, "the end of the pause", 30)
    proxy.hold(False)
    oracle.check(call.result(), 1000, repeats=2 * 3 + 3)
    bench.note(repeated=oracle.repeated())


# Bytes that are altered on the way.


def _altered(bench: Bench, times: int, *, at_node: bool, up: bool) -> Call:
    """One bit of a letter is turned, so often: of an argument, or of what comes back, on either link."""
    bench.in_the_clear()
    cluster = bench.cluster()
    proxy = bench.proxy(cluster.port)
    cluster.start_node(1, *(["--port", str(proxy.port)] if at_node else []))
    args: list[Any] = [(n, b"x" * 2000) for n in range(6)]
    args[3] = (3, b"mark" * 1000)
    rule = proxy.up if up else proxy.down
    rule.spoil, rule.times = b"mark" * 8, times
    call = bench.call(cluster, "imap", echo, args, **({} if at_node else {"port": proxy.port}))
    found = call.result(30)
    assert rule.times < times and (times > 2 or not rule.times), "nothing was altered"
    assert proxy.accepted == 1 or (times > 1 and up and not at_node), "the connection was given up"
    assert {n: v for n, v in found.items() if n != 3} == {n: v for n, v in enumerate(args) if n != 3}
    assert 3 in call.errors or found[3] == args[3], "what was altered was taken for right"
    return call


@fault(6, "one bit of a letter is turned, once and twice", short=True)
def altered(bench: Bench) -> None:
    """Whoever opens it sees it; the chunk is sent again."""
    links = ((False, True), (False, False), (True, True), (True, False))
    for times in (2,) if bench.short else (1, 2):
        for at_node, up in links[::3] if bench.short else links:
            assert not _altered(bench, times, at_node=at_node, up=up).errors


@fault(6, "one bit of a letter is turned, each time that it travels", short=True)
def altered_always(bench: Bench) -> None:
    """Three that are opened end it. A batch may go back unopened, from a worker that begins late."""
    for at_node, up in ((False, True), (True, True)):
        call = _altered(bench, 1000, at_node=at_node, up=up)
        assert isinstance(call.errors[3], LetterAltered), call.errors


@fault(6, "one bit of the function is turned", short=True)
def altered_function(bench: Bench) -> None:
    """The worker that opens it says so twice. Then the caller connects anew, and sends all again."""
    bench.in_the_clear()
    big = b"mark" * 2000

    def work(number: int) -> int:
        return number + len(big)

    for at_node in (False, True):
        cluster = bench.cluster()
        proxy = bench.proxy(cluster.port)
        cluster.start_node(1, *(["--port", str(proxy.port)] if at_node else []))
        rule = proxy.down if at_node else proxy.up
        rule.spoil, rule.times = b"mark" * 8, 1
        port = {} if at_node else {"port": proxy.port}
        assert bench.call(cluster, "map", work, range(5), **port).result(30) == {n: n + 8000 for n in range(5)}
        assert not rule.times
        assert proxy.accepted == (1 if at_node else 2), proxy.accepted


# Heads of frames with a short envelope: kind, flags, zero, and a length under 65,536.
TASK_HEAD, RESULT_HEAD = b"\x07\x02\x00\x00\x00\x00", b"\x09\x00\x00\x00\x00\x00"


@fault(6, "one bit of a frame's length is turned, idle after it")
def altered_length(bench: Bench) -> None:
    """Its receiver waits for a mebibyte that never comes; heartbeats that fill it are no sign of life.

    On each link and each way at the same time, each with a cluster of its own, whose one task is all that goes there.
    """
    bench.in_the_clear()
    calls = []
    for at_node, up in ((False, True), (False, False), (True, True), (True, False)):
        cluster, oracle = bench.cluster(), bench.oracle()
        proxy = bench.proxy(cluster.port)
        cluster.start_node(1, *(["--port", str(proxy.port)] if at_node else []))
        rule = proxy.up if up else proxy.down
        rule.spoil, rule.place, rule.bit = TASK_HEAD if at_node is not up else RESULT_HEAD, 5, 0x10
        rule.times = 1
        port = {} if at_node else {"port": proxy.port}
        at = time.monotonic()
        calls.append((bench.call(cluster, "map", Work(oracle.path), range(1), **port), oracle, proxy, rule, at))
    for call, oracle, proxy, rule, at in calls:
        oracle.check(call.result(SILENCE_SECONDS + SLACK_SECONDS + 5), 1, repeats=1)
        assert not rule.times, "nothing was altered"
        assert proxy.accepted == 2, f"{proxy.accepted} connections"
        bench.note(recover=oracle.events()[-1].at - at, repeated=oracle.repeated())
