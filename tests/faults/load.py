"""Many callers, many jobs, few descriptors, a full disk, a closed stderr."""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
import time

import tasks
from cluster import SECRET, USER, Cluster, Process
from conftest import ENCRYPT, descriptors, wait_until

import achilles
from achilles import config
from achilles.controller.connection import Controller

from . import tree
from .bench import Bench, fault
from .work import Work

MIB = 1 << 20
CLOSED = """
import os, sys
os.close(2)
os.execv(sys.executable, [sys.executable, '-W', 'error', '-m', 'achilles.server'])
"""


def _controller(cluster: Cluster) -> Controller:
    settings = config.Settings("127.0.0.1", cluster.port, USER, config.Secret(SECRET), encrypt=ENCRYPT)
    return Controller(lambda: settings)


@fault(12, "150 clients at once", runs=3, short=True, limit=("recover", 2.0))
def many_clients(bench: Bench) -> None:
    """Threads that share one K: all are in within two seconds."""
    cluster = bench.cluster(1)
    _controller(cluster)
    achilles.map(tasks.square, [1], **cluster.address)
    gate, took, errors = threading.Barrier(151), [], []
    controllers = [_controller(cluster) for _ in range(150)]

    def enter(controller: Controller) -> None:
        gate.wait()
        try:
            controller.open()
            took.append(time.monotonic())
        except Exception as e:
            errors.append(e)

    crew = [threading.Thread(target=enter, args=(c,), name="client") for c in controllers]
    for thread in crew:
        thread.start()
    gate.wait()
    at = time.monotonic()
    for thread in crew:
        thread.join()
    assert not errors, errors
    bench.note(recover=max(took) - at)
    assert max(took) - at < 8, f"{max(took) - at:.2f} s"  # in one process, with 300 threads; the table has the time
    crew = [threading.Thread(target=controller.close) for controller in controllers]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    wait_until(lambda: tree.threads(cluster.server.pid) < 12, "the end of their threads")


@fault(12, "300 jobs in a row (short: 40)", short=True)
def many_jobs(bench: Bench) -> None:
    """Descriptors, threads and memory of server, node and caller are where they were."""
    cluster = bench.cluster(2)
    roles = (cluster.server.pid, cluster.nodes[0].pid)

    def some(count: int) -> None:
        for _ in range(count):
            assert achilles.map(tasks.square, range(4), **cluster.address)

    some(30)
    cluster.wait_idle()

    def state() -> list[int]:
        return [count(pid) for pid in roles for count in (tree.descriptors, tree.threads)]

    wait_until(lambda: tree.threads(cluster.server.pid) <= 4, "a quiet server")  # its own two, and a node's two
    before, memory = state(), [tree.memory(pid) for pid in (*roles, os.getpid())]
    own = len(descriptors()), threading.active_count()
    some(40 if bench.short else 300)
    cluster.wait_idle()
    wait_until(lambda: state() == before, lambda: f"{before}, not {state()}")
    assert (len(descriptors()), threading.active_count()) == own
    grown = [tree.memory(pid) - was for pid, was in zip((*roles, os.getpid()), memory)]
    assert max(grown) < 4 * MIB, f"memory has grown by {grown}"
    bench.note(remark=f"memory grew by {max(grown) / MIB:.1f} MiB at most")


@fault(12, "RLIMIT_NOFILE of 40 on the server", runs=2, short=True)
def few_files(bench: Bench) -> None:
    """More connections than it can have: it does not spin, and recovers when they go."""
    cluster, oracle = bench.cluster(2), bench.oracle()
    resource.prlimit(cluster.server.pid, resource.RLIMIT_NOFILE, (40, 40))
    strangers = [socket.create_connection(("127.0.0.1", cluster.port), timeout=5) for _ in range(100)]
    used, at = tree.seconds_used(cluster.server.pid), time.monotonic()
    wait_until(lambda: time.monotonic() > at + 2, "some time")
    used = tree.seconds_used(cluster.server.pid) - used
    for stranger in strangers:
        stranger.close()
    assert used < 1.0, f"{used:.2f} s of processor in 2 s"
    at = time.monotonic()
    call = bench.call(cluster, "map", Work(oracle.path), range(20))
    oracle.check(call.result(), 20, repeats=0)
    bench.note(recover=time.monotonic() - at, remark=f"{used:.2f} s of processor in 2 s")


@fault(12, "more callers than RLIMIT_NOFILE of 40 lets in")
def few_files_callers(bench: Bench) -> None:
    """Who finds no room is told so, or waits; who is in goes on."""
    cluster, oracle = bench.cluster(2), bench.oracle()
    resource.prlimit(cluster.server.pid, resource.RLIMIT_NOFILE, (40, 40))
    call = bench.call(cluster, "imap", Work(oracle.path, 0.02), iter(range(300)))
    oracle.wait_for(10)
    controllers, errors = [_controller(cluster) for _ in range(50)], []

    def enter(controller: Controller) -> None:
        try:
            controller.open()
        except Exception as e:
            errors.append(e)

    crew = [threading.Thread(target=enter, args=(c,), name="client") for c in controllers]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join(30)
    assert not any(thread.is_alive() for thread in crew), "a client hangs"
    for controller in controllers:
        controller.close()
    assert all(isinstance(error, ConnectionError) for error in errors), errors
    oracle.check(call.result(), 300, repeats=0)
    bench.note(remark=f"{50 - len(errors)} of 50 were in, {len(errors)} were told")


def _mute(bench: Bench, stderr: int | None = None) -> None:
    """The server's stderr takes nothing, or (None) is not there at all: it goes on all the same."""
    folder = bench.folder / "mute"
    folder.mkdir()

    class Mute(Cluster):
        def start_server(self) -> Process:
            self._write_settings()
            if stderr is None:
                self.server = self._run("server", "-c", CLOSED)
            else:
                self.server = self._run("server", "-m", "achilles.server", stderr=stderr)
            pattern = r"initiated at 127\.0\.0\.1:(\d+)\nListening for connections\.\.\."
            self.port = int(self.server.wait_for(pattern)[1])
            self._write_settings()
            return self.server

    cluster = bench.enter(Mute(folder, 2))
    oracle = bench.oracle()
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", cluster.port)) as stranger:
            stranger.sendall(b"nonsense" * 20)
    call = bench.call(cluster, "map", Work(oracle.path, 0.01), range(60))
    oracle.wait_for(10)
    cluster.nodes[0].kill()
    cluster.start_node(2)
    oracle.check(call.result(), 60, repeats=6)
    cluster.server.signal(signal.SIGTERM)
    assert cluster.server.wait(10) == 0


@fault(12, "the server's stderr is on a full disk", short=True)
def full_disk(bench: Bench) -> None:
    with open("/dev/full", "w") as file:
        _mute(bench, file.fileno())


@fault(12, "the server's stderr is closed", short=True)
def closed_stderr(bench: Bench) -> None:
    """The next file or socket that it opens has the descriptor 2."""
    _mute(bench)


@fault(12, "nobody reads the server's stderr any more", short=True)
def broken_stderr(bench: Bench) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        _mute(bench, writing)
    finally:
        os.close(writing)


