"""Hundreds of light false nodes on a real server: what a connection costs, and how many frames one server passes on.

::

    this process, one loop                                      a real server, a process of its own
    false controller: keeps a job's slices waiting ── TASK ──▶
    false nodes: answer every TASK at once          ◀─ TASK ──
                                                    ─ RESULT ▶  counts frames by what came and went here

They speak the real protocol over channel.py, as a node's loop does; nothing is loaded, called or dumped, so that the
server has as much to do as this process can make. What is compared is its processor time a frame.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import selectors
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from cluster import SECRET, USER, Cluster
from faults import tree

from achilles.controller import connection
from achilles.protocol import auth, channel, frames
from achilles.protocol.channel import Channel
from achilles.protocol.frames import ASKED, PACKED, ROW, Kind, Rows

from .sections import section
from .table import markdown, number

__all__ = ["Load", "Passed", "Swarm", "serving"]

CPU_COUNT = 16
CROWD, FEW = 500, 4
CONNECTORS = 32  # threads that connect at once: half of the places that a server has for strangers
FRAME_ROWS = 64  # of one TASK of the controller's
SECONDS = 60.0  # tells a hang from a wait
TICK_SECONDS = 2.0
FUNCTION = b"no function: nobody calls it"


class Load(NamedTuple):
    """What a job is like."""

    what: str
    slices: int
    letter_bytes: int
    pace_us: int  # what nodes say that a slice takes: it decides how many travel together

    def rows(self, job: int, first: int, count: int) -> Rows:
        """A TASK's."""
        if self.letter_bytes > frames.SHORT_LETTER_BYTES:
            digests, letter = b"\1" * frames.DIGEST_BYTES * count, bytes(self.letter_bytes)
            shorts, longs = b"", [(letter,)] * count
        else:
            digests, shorts, longs = b"", bytes(self.letter_bytes * count), []
        table = b"".join([ROW.pack(n, 0, PACKED, self.letter_bytes) for n in range(first, first + count)])
        return Rows(job, table, digests, shorts, longs)


LOADS = (
    Load("16 slices a frame", 200_000, 24, 10_000),
    Load("quick slices, hundreds a frame", 2_000_000, 24, 10),
    Load("1 MiB a slice", 1_000, 1 << 20, 10_000),
)


class Passed(NamedTuple):
    """What a server did with a load."""

    seconds: float
    processor: float  # seconds of the server's
    frames: int  # that it received and sent
    slices: int


class Swarm:
    """False nodes and a false controller, driven by one loop of the calling thread.

    :ivar joined_seconds: from the first connection to the last HELLO of the last `join`.
    """

    def __init__(self, port: int) -> None:
        self.nodes: list[Channel] = []
        self.frames = 0  # received and sent
        self.joined_seconds = 0.0
        self._port = port
        self._key = connection.derive_key(USER, SECRET)
        self._selector = selectors.DefaultSelector()
        self._greeted = 0
        self._answered: set[int] = set()
        self._job = 0
        self._pace = 1
        self._controller = self._connect(auth.CONTROLLER)
        self._enter(self._controller, 0)
        self._turn_until(lambda: self._greeted == 1)
        letter = (FUNCTION,)
        self._send(self._controller, Kind.FUNCTION, Rows.single(0, 0, 0, 0, letter, hashlib.sha256(FUNCTION).digest()))

    def join(self, count: int) -> None:
        """So many nodes more."""
        began = time.monotonic()
        with ThreadPoolExecutor(CONNECTORS) as crew:
            for link in crew.map(self._connect, [auth.NODE] * count):
                self.nodes.append(link)
                self._enter(link, CPU_COUNT)
        self._turn_until(lambda: self._greeted == 1 + len(self.nodes))
        self.joined_seconds = time.monotonic() - began

    def carry(self, load: Load, server: int) -> Passed:
        """One job of this load, all of whose slices are answered; AssertionError if one is not."""
        self._job += 1
        self._answered.clear()
        self._pace = load.pace_us
        self._send(self._controller, Kind.JOB, {
            "job": self._job, "context": "0c" * 16, "function": hashlib.sha256(FUNCTION).hexdigest(),
            "resumed": False, "options": {},
        })
        used, began, frames = tree.seconds_used(server), time.monotonic(), self.frames
        for _ in self._feed(load):
            self._turn()
        self._turn_until(lambda: len(self._answered) >= load.slices)
        seconds, used = time.monotonic() - began, tree.seconds_used(server) - used
        assert self._answered == set(range(load.slices)), "slices that nobody asked for"
        found = Passed(seconds, used, self.frames - frames, load.slices)
        self._send(self._controller, Kind.END, {"job": self._job})
        return found

    def close(self) -> None:
        """End all connections."""
        for link in [self._controller, *self.nodes]:
            link.close()
        self._selector.close()

    # The controller.

    def _feed(self, load: Load) -> Iterator[None]:
        """Keep half as many slices waiting as the workers could hold, in frames of FRAME_ROWS; 64 MiB at most."""
        most = 3 * CPU_COUNT * len(self.nodes) * (16 if load.pace_us < 100 else 1) + 2 * FRAME_ROWS
        rows = FRAME_ROWS if load.letter_bytes <= frames.SHORT_LETTER_BYTES else 1
        most = min(most, max(rows, (64 << 20) // load.letter_bytes))
        sent = 0
        while sent < load.slices:
            while sent < load.slices and sent - len(self._answered) + rows <= most:
                count = min(rows, load.slices - sent)
                self._send(self._controller, Kind.TASK, load.rows(self._job, sent, count))
                sent += count
            yield

    # The loop.

    def _connect(self, role: bytes) -> Channel:
        return channel.connect("127.0.0.1", self._port, role, USER, self._key, SECONDS)

    def _enter(self, link: Channel, cpu_count: int) -> None:
        link.socket.setblocking(False)
        self._selector.register(link.socket, selectors.EVENT_READ, link)
        self._send(link, Kind.HELLO, channel.hello(cpu_count))

    def _turn_until(self, happened: Any) -> None:
        deadline = time.monotonic() + SECONDS
        while not happened():
            assert time.monotonic() < deadline, f"a swarm that hangs: {len(self._answered)} answers"
            self._turn()

    def _turn(self) -> None:
        for key, events in self._selector.select(TICK_SECONDS):
            link: Channel = key.data
            for frame in (link.receive() or []) if events & selectors.EVENT_READ else []:
                self.frames += 1
                self._handle(link, frame.kind, frame.body)
            self._flush(link)
        now = time.monotonic()
        for link in [self._controller, *self.nodes]:
            if now - link.last_written > channel.HEARTBEAT_SECONDS:
                link.tick()
                self._flush(link)

    def _handle(self, link: Channel, kind: Kind, body: Any) -> None:
        if kind is Kind.HELLO:
            self._greeted += 1
        elif kind is Kind.TASK:
            table = b"".join([ROW.pack(slice_, attempt, 0, 0) for slice_, attempt in zip(body.slices, body.attempts)])
            self._send(link, Kind.RESULT, Rows(body.job, table, pace=self._pace))
        elif kind is Kind.RECALL:
            self._send(link, Kind.RETURNED, Rows(body["job"], b"", pace=ASKED))
        elif kind is Kind.RESULT:
            before = len(self._answered)
            self._answered.update(body.slices)
            assert len(self._answered) == before + len(body), "a slice that was answered twice"
        elif kind is Kind.ERROR:
            raise AssertionError(body["message"])

    def _send(self, link: Channel, kind: Kind, body: Any) -> None:
        self.frames += 1
        link.send(kind, body)
        self._flush(link)

    def _flush(self, link: Channel) -> None:
        """Write what the socket takes; the rest when it takes more."""
        with contextlib.suppress(BlockingIOError):
            while not link.flush():
                if link.wants_write:
                    break
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.wants_write else 0)
        if self._selector.get_key(link.socket).events != wanted:
            self._selector.modify(link.socket, wanted, link)


@contextlib.contextmanager
def serving() -> Iterator[tuple[Cluster, Swarm]]:
    """A real server without a node, and a swarm without a node."""
    with tempfile.TemporaryDirectory(prefix="achilles-bench-") as folder, Cluster(Path(folder)) as cluster:
        swarm = Swarm(cluster.port)
        try:
            yield cluster, swarm
        finally:
            swarm.close()


@section("swarm", "Scale: false nodes of 16 workers on a real server")
def report(args: argparse.Namespace) -> str:
    """A few, then many."""
    lines = [["nodes", "load", "frames/s", "slices/s", "MB/s", "server's µs a frame", "µs a slice", "server busy"]]
    crowd = 20 if args.small else CROWD
    for nodes in (FEW, crowd):
        with serving() as (cluster, swarm):
            server = cluster.server.pid
            before = _state(server)
            swarm.join(nodes)
            joined = swarm.joined_seconds
            memory, threads, files = [(now - was) / nodes for now, was in zip(_state(server), before)]
            for load in LOADS:
                load = load._replace(slices=load.slices // 100) if args.small else load
                found = swarm.carry(load, server)
                lines.append([str(nodes), load.what, *map(number, [
                    found.frames / found.seconds, found.slices / found.seconds,
                    found.slices * load.letter_bytes / found.seconds / 1e6, found.processor / found.frames * 1e6,
                    found.processor / found.slices * 1e6]), f"{found.processor / found.seconds:.0%}"])
            after = (_state(server)[0] - before[0]) / nodes
    return (f"{markdown(lines)}\n\n{crowd} nodes joined in {joined:.2f} s. A connection costs the server {threads:.1f} "
            f"threads, {files:.1f} descriptors and {memory / 1024:.0f} KiB; {after / 1024:.0f} KiB after these loads.")


def _state(pid: int) -> tuple[int, int, int]:
    """Bytes, threads, descriptors."""
    return tree.memory(pid), tree.threads(pid), tree.descriptors(pid)
