"""The caller is killed, interrupted, forks, or drops its results."""

from __future__ import annotations

import os
import signal
import sys
import time

import tasks
from cluster import Cluster, Process
from conftest import wait_until

import achilles

from . import tree
from .bench import Bench, fault
from .oracle import Oracle
from .work import Work

COUNT = 5000
WAYS = {
    "map": "map(work, range(5000))",
    "imap": "for _ in imap(work, iter(range(5000))): pass",
    "callback_error": "map(work, range(5000), callback_error=lambda e: threading.Event().wait())",
}
SCRIPT = """
import signal, sys, threading
from achilles import imap, map
from faults.work import Work
signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts these in the background may ignore it
work = Work({path!r}, {seconds}, {bad}, 'raise')
try:
    {call}
except KeyboardInterrupt:
    import time
    print('interrupted', time.monotonic(), flush=True)
    import tasks
    found = map(tasks.square, range(10))
    print('right' if sum(found, []) == [n * n for n in range(10)] else found, flush=True)
"""


def _start(bench: Bench, way: str) -> tuple[Cluster, Oracle, Process]:
    cluster, oracle = bench.cluster(2, 2), bench.oracle()
    bad = (2,) if way == "callback_error" else ()
    script = cluster.start_script(SCRIPT.format(path=oracle.path, seconds=0.1, bad=bad, call=WAYS[way]))
    oracle.wait_for(12)
    return cluster, oracle, script


@fault(7, "caller SIGKILLed, thousands of tasks queued", runs=5)
def caller_killed(bench: Bench) -> None:
    cluster, oracle, script = _start(bench, "map")
    assert cluster.status()["jobs"]
    at = time.monotonic()
    script.kill()
    wait_until(lambda: not cluster.status()["jobs"], "the end of its job", 2)
    gone = time.monotonic() - at
    assert bench.call(cluster, "map", tasks.square, range(8)).result() == {n: n * n for n in range(8)}
    bench.note(detect=gone, recover=time.monotonic() - at)
    assert time.monotonic() - at < 2
    count = len(oracle.events())
    assert not wait_quietly(lambda: len(oracle.events()) > count + 4, 0.3), "its slices go on"


def wait_quietly(happened: object, seconds: float) -> bool:
    """Whether it happens within that time."""
    try:
        wait_until(happened, "it", seconds)  # type: ignore[arg-type]
    except AssertionError:
        return False
    return True


def _interrupted(bench: Bench, way: str) -> None:
    cluster, oracle, script = _start(bench, way)
    if way == "callback_error":
        wait_until(lambda: any(e.index == 2 for e in oracle.events()), "an error")
    at = time.monotonic()
    script.signal(signal.SIGINT)
    told = float(script.wait_for(r"interrupted ([\d.]+)")[1])
    script.wait_for("right")
    assert script.wait() == 0
    bench.note(detect=told - at)
    assert told - at < 1.5, f"KeyboardInterrupt after {told - at:.2f} s"
    cluster.wait_idle(2)


@fault(7, "Ctrl-C in map", runs=3)
def interrupted_map(bench: Bench) -> None:
    _interrupted(bench, "map")


@fault(7, "Ctrl-C in imap", runs=3)
def interrupted_imap(bench: Bench) -> None:
    _interrupted(bench, "imap")


@fault(7, "Ctrl-C in callback_error", runs=3, short=True)
def interrupted_callback(bench: Bench) -> None:
    _interrupted(bench, "callback_error")


@fault(7, "an imap is closed, or dropped", runs=3, short=True)
def imap_dropped(bench: Bench) -> None:
    cluster, oracle = bench.cluster(2, 2), bench.oracle()
    for way in (achilles.imap, achilles.imap_unordered):
        for drop in (lambda packets: packets.close(), lambda packets: None):
            packets = way(Work(oracle.path, 0.1), iter(range(COUNT)), **cluster.address)
            next(packets)
            at = time.monotonic()
            drop(packets)
            del packets
            cluster.wait_idle(3)
            bench.note(detect=time.monotonic() - at)


@fault(7, "a caller that forks", runs=3)
def caller_forks(bench: Bench) -> None:
    """The child neither keeps the connection alive nor breaks it: a script, since it has to fork beside threads."""
    if sys.platform != "linux":
        return
    cluster, oracle = bench.cluster(2), bench.oracle()
    script = cluster.start_script(f"""
import os, sys, time, warnings
warnings.simplefilter('ignore', DeprecationWarning)
from achilles import imap, map
from faults.work import Work
import tasks
packets = imap(Work({oracle.path!r}, 0.02), range(100))
first = next(packets)
child = os.fork()
if child == 0:
    try:
        list(packets)
    except ConnectionError:
        found = map(tasks.square, range(5))
        print('child', sum(found, []) == [n * n for n in range(5)], flush=True)
    time.sleep(60)
    os._exit(0)
print('forked', child, flush=True)
found = [r for p in [first, *packets] for r in p['RESULT']]
print('parent', found == [n * n for n in range(100)], flush=True)
sys.stdin.read()
""", stdin=-1)
    child = int(script.wait_for(r"forked (\d+)")[1])
    script.wait_for("parent True")
    script.wait_for("child True")
    cluster.wait_idle(5)
    script.popen.stdin.close()  # type: ignore[union-attr]
    script.kill()
    tree.kill(child)


@fault(7, "a caller that forked is killed, its child lives", runs=3)
def forked_caller_killed(bench: Bench) -> None:
    cluster, oracle = bench.cluster(2), bench.oracle()
    script = cluster.start_script(f"""
import os, time, warnings
warnings.simplefilter('ignore', DeprecationWarning)
from achilles import imap
from faults.work import Work
packets = imap(Work({oracle.path!r}, 0.05), iter(range(5000)))
first = next(packets)
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print('forked', child, flush=True)
list(packets)
""")
    child = int(script.wait_for(r"forked (\d+)")[1])
    at = time.monotonic()
    os.kill(script.pid, signal.SIGKILL)
    wait_until(lambda: not cluster.status()["jobs"], "the end of its job", 3)
    bench.note(detect=time.monotonic() - at)
    tree.kill(child)
    script.wait()
