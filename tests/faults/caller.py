"""The caller is killed, interrupted, forks, or drops its results."""

from __future__ import annotations

import os
import signal
import sys
import time

from cluster import Cluster, Process
from conftest import wait_until

import achilles

from . import tree
from .bench import Bench, fault
from .oracle import Oracle
from .work import Work

COUNT = 5000
SOON_SECONDS = 3.0  # what tells an interrupt from a wait for the end; the table has the exact time
WAYS = {
    "map": "map(work, range(5000))",
    "all at once": "map(work, range(5000), buffersize=5000)",
    "imap": "for _ in imap(work, iter(range(5000))): pass",
    "callback_error": "map(work, range(5000), callback_error=wait)",
}
SCRIPT = """
import signal, sys, threading
from achilles import imap, map
from faults.work import Work
signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts these in the background may ignore it
work = Work({path!r}, {seconds}, {bad}, {how!r})
def wait(error):
    print('inside', flush=True)
    threading.Event().wait()
try:
    {call}
except KeyboardInterrupt:
    import time
    print('interrupted', time.monotonic(), flush=True)
    import tasks
    found = map(tasks.square, range(10))
    print('right' if sum(found, []) == [n * n for n in range(10)] else found, flush=True)
    sys.stdin.read()  # it lives on: its job is gone all the same
"""


def _start(bench: Bench, way: str) -> tuple[Cluster, Oracle, Process]:
    cluster, oracle = bench.cluster(2, 2), bench.oracle()
    bad, how = {"callback_error": ((2,), "raise"), "all at once": ((0, 1), "hang")}.get(way, ((), ""))
    text = SCRIPT.format(path=oracle.path, seconds=0.1, bad=bad, how=how, call=WAYS[way])
    script = cluster.start_script(text, stdin=-1)
    oracle.wait_for(12)
    return cluster, oracle, script


@fault(7, "caller SIGKILLed, with thousands of arguments to come", runs=5, limit=("recover", 1.0))
def caller_killed(bench: Bench) -> None:
    """Its job is gone at once; what runs is cancelled, also what hangs; the next job has the workers."""
    cluster, oracle, script = _start(bench, "all at once")
    wait_until(lambda: any(job["running"] for job in cluster.status()["jobs"]), "its chunks at the nodes")
    at = time.monotonic()
    script.kill()
    wait_until(lambda: not cluster.status()["jobs"], "the end of its job", 2)
    gone = time.monotonic() - at
    other = bench.oracle()
    other.check(bench.call(cluster, "map", Work(other.path), range(8)).result(), 8, repeats=0)
    bench.note(detect=gone, recover=min(event.at for event in other.events()) - at)
    _wait_for_silence(oracle)
    hanging = {event.pid for event in oracle.events() if event.index in (0, 1)}
    wait_until(
        lambda: not hanging & {pid for node in cluster.nodes for pid in node.workers(2)}, "the end of what hangs", 3)
    script.popen.stdin.close()  # type: ignore[union-attr]


def _wait_for_silence(oracle: Oracle) -> None:
    """A cancelled job's workers have half a second for what they have; then nothing of it runs any more."""
    wait_until(lambda: oracle.events()[-1].at < time.monotonic() - 0.4, "the end of its chunks", 3)


def _interrupted(bench: Bench, way: str) -> None:
    cluster, oracle, script = _start(bench, way)
    if way == "callback_error":
        script.wait_for("inside")
    at = time.monotonic()
    script.signal(signal.SIGINT)
    told = float(script.wait_for(r"interrupted ([\d.]+)")[1])
    script.wait_for("right")
    bench.note(detect=told - at)
    assert told - at < SOON_SECONDS, f"KeyboardInterrupt after {told - at:.2f} s"
    cluster.wait_idle(3)
    _wait_for_silence(oracle)
    script.popen.stdin.close()  # type: ignore[union-attr]
    assert script.wait() == 0


@fault(7, "Ctrl-C in map", limit=("detect", 1.0), runs=3)
def interrupted_map(bench: Bench) -> None:
    _interrupted(bench, "map")


@fault(7, "Ctrl-C in imap", limit=("detect", 1.0), runs=3)
def interrupted_imap(bench: Bench) -> None:
    _interrupted(bench, "imap")


@fault(7, "Ctrl-C in callback_error", limit=("detect", 1.0), runs=3, short=True)
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
