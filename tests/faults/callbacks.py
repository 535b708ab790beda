"""`callback_error` raises, blocks, or calls `map` itself: no deadlock, and heartbeats go on."""

from __future__ import annotations

import threading
import time

import tasks
from conftest import wait_until

import achilles

from .bench import Bench, fault
from .work import Work


@fault(13, "callback_error raises", short=True)
def callback_raises(bench: Bench) -> None:
    cluster, oracle = bench.cluster(2), bench.oracle()

    def fail(error: BaseException) -> None:
        raise KeyError("from the callback")

    for way in ("map", "imap", "imap_unordered"):
        call = bench.call(cluster, way, Work(oracle.path, 0.01, (3,), "raise"), range(100), callback_error=fail)
        assert call.ended.wait(10)
        assert isinstance(call.error, KeyError)
        cluster.wait_idle(3)


@fault(13, "callback_error blocks for 30 s")
def callback_blocks(bench: Bench) -> None:
    """Longer than the silence limit: nobody is taken for dead, and what is not the callback's goes on."""
    seconds = 2 if bench.short else 30
    cluster, oracle = bench.cluster(2), bench.oracle()
    inside, never = threading.Event(), threading.Event()

    def block(error: BaseException) -> str:
        inside.set()
        never.wait(seconds)
        return "late"

    proxy = bench.proxy(cluster.port)
    work = Work(oracle.path, 0.01, (3,), "raise")
    call = bench.call(cluster, "imap", work, range(40), callback_error=block, port=proxy.port)
    assert inside.wait(10)
    at = time.monotonic()
    other = bench.call(cluster, "map", tasks.square, range(10))
    assert other.result(10) == {n: n * n for n in range(10)}
    found = call.result(seconds + 10)
    assert time.monotonic() - at >= seconds - 1
    assert found == {n: "late" if n == 3 else n * n for n in range(40)}
    oracle.check(found, 40, repeats=0, lost={3: None})
    assert proxy.accepted == 1, "it has connected anew: heartbeats did not go on"
    bench.note(repeated=oracle.repeated())


@fault(13, "callback_error calls map itself")
def callback_maps(bench: Bench) -> None:
    cluster, oracle = bench.cluster(1), bench.oracle()

    def again(error: BaseException) -> int:
        index: int = error.index  # type: ignore[attr-defined]
        return int(achilles.map(tasks.square, [index], **cluster.address)[0][0])

    for way in ("map", "imap", "imap_unordered"):
        work = Work(oracle.path, 0.001, (2, 5), "raise")
        call = bench.call(cluster, way, work, range(30), callback_error=again)
        assert call.result(20) == {n: n * n for n in range(30)}
    wait_until(lambda: not cluster.status()["jobs"], "the end of all jobs")
