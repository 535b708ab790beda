"""Hundreds of light false nodes on a real server: what a connection costs, and how many frames one server passes on.

::

    this process, one loop                                      a real server, a process of its own
    false controller: keeps batches waiting ──────── TASK ──▶
    false nodes: answer every TASK at once, whole   ◀─ TASK ──
                                                    ─ RESULT ▶  counts frames by what came and went here

They speak the real protocol over channel.py, as a node's loop does. Nothing is loaded, called or dumped, so that the
server has as much to do as this process can make. What is compared is its processor time a frame.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import selectors
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from cluster import SECRET, USER, Cluster
from faults import tree

from achilles.protocol import auth, channel, connect
from achilles.protocol.channel import Channel
from achilles.protocol.frames import SHORT_LETTER_BYTES, Batch, Kind, LongLetter

from .sections import section
from .table import markdown, number

__all__ = ["LOADS", "Load", "Passed", "Swarm", "serving"]

CPU_COUNT = 16
CROWD, FEW = 500, 4
CONNECTORS = 32  # threads that connect at once: half of the places that a server has for strangers
BATCH_US = 5_000  # so long a batch is said to take: nodes use their second places, too
MOST_WAITING_BYTES = 64 << 20
SECONDS = 60.0  # tells a hang from a wait
TICK_SECONDS = 2.0
FUNCTION = b"no function: nobody calls it"


class Load(NamedTuple):
    """What a job is like."""

    what: str
    batches: int
    count: int  # of chunks in a batch
    letter_bytes: int

    def task(self, job: int, place: int) -> Batch:
        """The TASK of one batch."""
        first, attempt = place * self.count, place + 1
        if self.letter_bytes > SHORT_LETTER_BYTES:
            letter = LongLetter([bytes(self.letter_bytes)], b"\1" * 32, self.letter_bytes)
            return Batch.pack(job, first, [letter] * self.count, attempt=attempt, number=BATCH_US)
        table = struct.pack(">Q", self.letter_bytes) * self.count
        return Batch(job, first, self.count, attempt, BATCH_US, packed=table + bytes(self.letter_bytes * self.count))


LOADS = (
    Load("1 chunk a batch", 20_000, 1, 24),
    Load("64 chunks a batch", 20_000, 64, 24),
    Load("1,024 chunks a batch", 10_000, 1_024, 24),
    Load("1 chunk of 1 MiB a batch", 1_000, 1, 1 << 20),
)


class Passed(NamedTuple):
    """What a server did with a load."""

    seconds: float
    processor: float  # seconds of the server's
    frames: int  # that it received and sent
    chunks: int


class Swarm:
    """False nodes and a false controller, driven by one loop of the calling thread.

    :ivar joined_seconds: from the first connection to the last HELLO of the last `join`.
    """

    def __init__(self, port: int) -> None:
        self.nodes: list[Channel] = []
        self.frames = 0  # received and sent
        self.joined_seconds = 0.0
        self._port = port
        self._key = auth.derive_key(USER, SECRET)
        self._selector = selectors.DefaultSelector()
        self._greeted = 0
        self._out: dict[tuple[int, int], int] = {}  # first chunk and attempt -> count, of batches without an answer
        self._job = 0
        self._controller = self._connect(auth.CONTROLLER)
        self._enter(self._controller, 0)
        self._turn_until(lambda: self._greeted == 1)

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
        """One job of this load, all of whose batches are answered; AssertionError if one is not, or is twice."""
        self._job += 1
        declaration = json.dumps({"context": hashlib.md5(FUNCTION).hexdigest(), "initializer": False}).encode()
        self._send(self._controller, Kind.JOB, Batch.pack(self._job, 0, [declaration, FUNCTION]))
        used, began, frames = tree.seconds_used(server), time.monotonic(), self.frames
        for _ in self._feed(load):
            self._turn()
        self._turn_until(lambda: not self._out)
        seconds, used = time.monotonic() - began, tree.seconds_used(server) - used
        found = Passed(seconds, used, self.frames - frames, load.batches * load.count)
        self._send(self._controller, Kind.END, Batch(self._job))
        return found

    def close(self) -> None:
        """End all connections."""
        for link in [self._controller, *self.nodes]:
            link.close()
        self._selector.close()

    # The controller.

    def _feed(self, load: Load) -> Iterator[None]:
        """Keep as many batches out as the nodes have places, and some that wait; 64 MiB at most."""
        most = 2 * CPU_COUNT * len(self.nodes) + 64
        most = min(most, max(2, MOST_WAITING_BYTES // (load.count * load.letter_bytes)))
        for place in range(load.batches):
            while len(self._out) >= most:
                yield
            task = load.task(self._job, place)
            self._out[task.first, task.attempt] = task.count
            self._send(self._controller, Kind.TASK, task)

    # The loop.

    def _connect(self, role: bytes) -> Channel:
        return connect.connect("127.0.0.1", self._port, role, USER, self._key, SECONDS)

    def _enter(self, link: Channel, cpu_count: int) -> None:
        link.socket.setblocking(False)
        self._selector.register(link.socket, selectors.EVENT_READ, link)
        self._send(link, Kind.HELLO, connect.hello(cpu_count))

    def _turn_until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not happened():
            assert time.monotonic() < deadline, f"a swarm that hangs: {len(self._out)} batches without an answer"
            self._turn()

    def _turn(self) -> None:
        for key, events in self._selector.select(TICK_SECONDS):
            link: Channel = key.data
            received = link.receive() if events & selectors.EVENT_READ else []
            assert received is not None, "the server has closed a connection"
            for frame in received:
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
            self._send(link, Kind.RESULT, Batch(
                body.job, body.first, body.count, body.attempt, 1, statuses=bytes(body.count),
                packed=bytes(8 * body.count)))
        elif kind is Kind.RESULT:
            count = self._out.pop((body.first, body.attempt), None)
            assert count == body.count, f"an answer of {body.count} chunks from {body.first} on, and not of {count}"
        elif kind in (Kind.GONE, Kind.ERROR):
            raise AssertionError(f"{kind.name}: {body}")

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
    lines = [["nodes", "load", "frames/s", "chunks/s", "MB/s", "server's µs a frame", "µs a chunk", "server busy"]]
    crowd = 20 if args.small else CROWD
    for nodes in (FEW, crowd):
        with serving() as (cluster, swarm):
            server = cluster.server.pid
            before = _state(server)
            swarm.join(nodes)
            joined = swarm.joined_seconds
            memory, threads, files = [(now - was) / nodes for now, was in zip(_state(server), before)]
            for load in LOADS:
                load = load._replace(batches=load.batches // 100) if args.small else load
                found = swarm.carry(load, server)
                lines.append([str(nodes), load.what, *map(number, [
                    found.frames / found.seconds, found.chunks / found.seconds,
                    found.chunks * load.letter_bytes / found.seconds / 1e6, found.processor / found.frames * 1e6,
                    found.processor / found.chunks * 1e6]), f"{found.processor / found.seconds:.0%}"])
            after = (_state(server)[0] - before[0]) / nodes
    return (f"{markdown(lines)}\n\n{crowd} nodes joined in {joined:.2f} s. A connection costs the server {threads:.1f} "
            f"threads, {files:.1f} descriptors and {memory / 1024:.0f} KiB; {after / 1024:.0f} KiB after these loads.")


def _state(pid: int) -> tuple[int, int, int]:
    """Bytes, threads, descriptors."""
    return tree.memory(pid), tree.threads(pid), tree.descriptors(pid)
