"""The exchange: it turns peers' frames into events of the scheduler, and sends frames to other peers.

The exchange knows peers, contexts, and jobs by the numbers of each side. The scheduler chooses the node of each batch.
Sockets, threads and keys are `listen.py`'s. The exchange opens no letter.

::

    reader threads                        the lock                                   the thread that delivers
    frame ─▶ handle ─▶ event ─▶ Scheduler ─▶ tell ─▶ outbox ───────────▶ push ─▶ Channel.send, Channel.push
    controller's job 3, chunk 40 ──▶ server's job 17 ──▶ node 0 ── RESULT ──▶ job 3 of its controller

Any thread may call `handle`, `leave`, `tick` and `push`. None of them waits for a peer.

- `_lock` guards everything here and in the scheduler, and the order of the outbox. A thread that holds it encodes,
  hashes and logs nothing.
- The thread that moves frames from the outbox to the channels holds `_delivering`, so that the order stays. Another
  thread goes on at once: the holder looks at the outbox once more.

A thread logs events of its own connection, after both locks. So a log that blocks (a terminal in Ctrl-S) stops that
connection alone.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NamedTuple

from .. import console
from ..errors import ProtocolError
from ..protocol import auth, connect, frames
from ..protocol.channel import Channel
from ..protocol.frames import U32, Batch, Frame, Kind, Letter
from .scheduler import Scheduler

__all__ = ["Exchange", "Peer"]

OUTPUT_FRAMES = 1024  # frames that wait for a controller: 1,024 bytes a line at most, together 1 MiB
ANNOUNCE_SECONDS = 0.1  # between CLUSTERs at least: all nodes of a lab join together

log = logging.getLogger(__name__)


class Peer:
    """One authenticated connection. The lock of the Exchange guards all but `channel`."""

    def __init__(self, link: Channel, role: bytes, user: str, address: str) -> None:
        self.channel = link
        link.name = f"client at {address}"
        self.role = role
        self.user = user if user.isprintable() else ascii(user)  # a STATUS shows it to people
        self.address = address
        self.id = -1  # until its HELLO
        self.hello: dict[str, Any] = {}
        self.since = 0.0  # wall clock, for people to read
        self.long: list[tuple[float, int, int, int]] = []  # a node's chunks: begin (monotonic), node, worker's pid, job
        self.jobs: dict[int, DeclaredJob] = {}  # a controller's, by its numbers, until END
        self.contexts: dict[str, Letter] = {}  # a controller's: initializer or sources, by open name


class DeclaredJob(NamedTuple):
    """A JOB until its END: enough to declare it to a node.

    :ivar number: the server's.  :ivar owners_number: the controller's.
    :ivar letters: declaration and function.  :ivar sources: the name of its set.
    :ivar shared: initializer and sources, each with all nodes that have it, perhaps lost nodes.
    :ivar left_out: counts of output lines that the controller does not get, by node.
    """

    number: int
    owner: Peer
    owners_number: int
    letters: list[Letter]
    shared: list[tuple[Letter, set[int]]]
    sources: str | None
    left_out: Counter[int]

    def declare_to(self, node: int) -> Batch:
        """Return the JOB for a node, with the initializer and the sources that the node lacks."""
        news = [b"" if node in nodes else letter for letter, nodes in self.shared]
        for _, nodes in self.shared:
            nodes.add(node)
        return Batch.pack(self.number, 0, self.letters + news)


class Exchange:
    """All peers, contexts and jobs of one server."""

    def __init__(self, kill: Callable[[], None]) -> None:
        self._kill = kill  # called when a controller says KILL; must not block
        self._started = time.monotonic()
        self._delivering = threading.Lock()  # held by the thread that empties the outbox
        self._lock = threading.Lock()  # guards all below
        self._outbox: deque[tuple[Channel, Kind, Any]] = deque()
        self._scheduler = Scheduler(self._tell)
        self._peers: set[Peer] = set()  # also peers before HELLO
        self._nodes: dict[int, Peer] = {}
        self._contexts: dict[str, set[int]] = {}  # open contexts and sets -> nodes that know them, perhaps lost nodes
        self._open: Counter[str] = Counter()  # context or set -> connections that have it open
        self._jobs: dict[int, DeclaredJob] = {}  # by the server's numbers
        self._ids: defaultdict[bytes | str, Iterator[int]] = defaultdict(count)  # of nodes, controllers and jobs
        self._goodbye = ""  # the reason of the last BYE, once the server ends
        self._changed = False  # nodes came or went since the last CLUSTER
        self._announce_after = 0.0  # monotonic

    def enter(self, peer: Peer, most: int) -> None:
        """Take an authenticated client. If there are `most` peers already, send ERROR, and let it go."""
        with self._lock:
            if len(self._peers) < most:
                self._peers.add(peer)
                return
        peer.channel.send(Kind.ERROR, {"code": "full", "message": "the server has no room for another connection"})
        peer.channel.finish()

    def handle(self, peer: Peer, frame: Frame) -> None:
        """Handle a peer's frame. The caller pushes afterwards. ProtocolError if the peer may not say that now."""
        kind, body = frame
        if kind is Kind.ERROR:
            log.warning("%s ends the connection: %s", peer.channel.name, ascii(body["message"]))
        with self._lock:
            if peer not in self._peers:
                raise ProtocolError("the server had no room for this connection")
            if peer.id < 0 or kind is Kind.HELLO:
                self._greet(peer, kind, body)
            elif peer.role == auth.NODE:
                self._handle_node(peer, kind, body)
            else:
                self._handle_controller(peer, kind, body)
        if kind in (Kind.HELLO, Kind.JOB, Kind.END, Kind.KILL):
            self.push()
            log.info("%s (user %r, Python %s): %s",
                     peer.channel.name, peer.user, peer.hello["python"], frame)

    def leave(self, peer: Peer) -> None:
        """Remove a peer after its connection's end. A node loses its batches. A controller's jobs end."""
        with self._lock:
            self._peers.discard(peer)
            if self._nodes.get(peer.id) is peer:
                del self._nodes[peer.id]
                self._scheduler.lose(peer.id)
                self._changed = True
            for job in list(peer.jobs.values()):
                self._end(job)
            for name in list(peer.contexts):
                self._close(peer, name)
        self.push()

    def tick(self, now: float) -> None:
        """Do the work that is due; `now` is monotonic. The server calls this five times a second."""
        with self._lock:
            self._scheduler.tick(now)
            self._announce(now)
        self.push()

    def push(self) -> None:
        """Write the outbox's frames, of all threads. The writer threads write the rest."""
        while self._outbox and self._delivering.acquire(blocking=False):
            links = set()
            try:
                for _ in range(len(self._outbox)):
                    link, kind, body = self._outbox.popleft()
                    links.add(link)
                    link.send(kind, body, wake=False)
                    if kind is Kind.BYE:
                        link.finish()
            finally:
                self._delivering.release()
            for link in links:
                link.push()

    def say_goodbye(self, reason: str) -> list[Peer]:
        """Say BYE to all present and new peers. Return the present peers."""
        with self._lock:
            self._goodbye = reason
            peers = list(self._peers)
            for peer in peers:
                self._send(peer, Kind.BYE, {"reason": reason})
        self.push()
        return peers

    # The caller of each method below holds the lock.

    def _greet(self, peer: Peer, kind: Kind, body: Any) -> None:
        """Take the first frame, which must be HELLO."""
        if kind is not Kind.HELLO or peer.hello or (peer.role == auth.NODE and not body.get("cpu_count")):
            raise ProtocolError("a client begins with HELLO and says no second HELLO, and a node has workers")
        peer.hello, peer.since = body, time.time()
        peer.id = next(self._ids[peer.role])
        peer.channel.name = f"{'node' if peer.role == auth.NODE else 'controller'} {peer.id} at {peer.address}"
        self._send(peer, Kind.HELLO, connect.hello() | {"client_id": peer.id, "connections": len(self._peers)})
        if self._goodbye:
            self._send(peer, Kind.BYE, {"reason": self._goodbye})  # its channel drops all later frames
        if peer.role == auth.NODE:
            self._nodes[peer.id] = peer
            self._scheduler.join(peer.id, body["python"], body["cpu_count"])
            self._changed = True
            self._announce(time.monotonic())
        else:
            self._send(peer, Kind.CLUSTER, self._scheduler.cluster(body["python"]))

    def _handle_node(self, node: Peer, kind: Kind, body: Any) -> None:
        """Handle a node's frame. The scheduler ignores chunks that the node does not hold."""
        if kind in (Kind.RESULT, Kind.RETURNED):
            self._scheduler.hear(node.id, kind, body, time.monotonic())
        elif kind is Kind.OUTPUT and (job := self._jobs.get(body.job)) is not None:
            if job.owner.channel.waiting < OUTPUT_FRAMES:
                self._send(job.owner, kind, body.renumbered(job.owners_number))
            else:
                job.left_out[node.id] += body.attempt if body.flags == frames.MORE else 1
        elif kind is Kind.PING:
            node.long = [(time.monotonic() - chunk["seconds"], node.id, chunk["pid"], chunk["job"])
                         for chunk in body.get("chunks") or ()]
        elif kind is Kind.BYE:
            self._scheduler.drain(node.id)
            self._changed = True

    def _handle_controller(self, peer: Peer, kind: Kind, body: Any) -> None:
        if kind is Kind.JOB:
            self._declare(peer, body)
        elif kind is Kind.STATUS:
            self._send(peer, Kind.STATUS, self._status())
        elif kind is Kind.KILL:
            self._kill()
        elif kind in (Kind.TASK, Kind.CANCEL, Kind.END):
            job = peer.jobs.get(body.job)
            if job is None:
                raise ProtocolError(f"job {body.job} was not declared on this connection, or has ended")
            if kind is Kind.TASK:
                self._scheduler.add(body.renumbered(job.number))
            elif kind is Kind.CANCEL:
                self._scheduler.cancel(job.number, body.first, body.end)
            else:
                self._end(job)

    def _declare(self, peer: Peer, batch: Batch) -> None:
        """Open a JOB's context and sources on this connection. Later JOBs need not bring these letters."""
        letters: list[Letter] = [*batch.letters(), b"", b""]
        if batch.job in peer.jobs:
            raise ProtocolError(f"job {batch.job} is there already")
        names = batch.declaration["context"], batch.declaration.get("sources")
        shared: list[tuple[Letter, set[int]]] = []
        for name, is_wanted, letter in zip(names, (batch.declaration["initializer"], bool(names[1])), letters[2:]):
            letter = letter or peer.contexts.get(name, b"")
            if is_wanted is not bool(letter):
                raise ProtocolError(f"job {batch.job} and its context do not have the same initializer, or no sources")
            if name is not None:
                self._open[name] += name not in peer.contexts
                peer.contexts[name] = letter
                shared.append((letter, self._contexts.setdefault(name, set())))
        job = DeclaredJob(next(self._ids["job"]), peer, batch.job, letters[:2], shared, names[1], Counter())
        self._jobs[job.number] = peer.jobs[batch.job] = job
        self._scheduler.declare(job.number, peer.hello["python"])

    def _end(self, job: DeclaredJob) -> None:
        self._scheduler.end(job.number)
        del self._jobs[job.number], job.owner.jobs[job.owners_number]
        if job.sources and all(other.sources != job.sources for other in job.owner.jobs.values()):
            self._close(job.owner, job.sources)

    def _close(self, peer: Peer, name: str) -> None:
        """Close a context or a set for a connection; after the last connection, for all nodes."""
        del peer.contexts[name]
        self._open[name] -= 1
        if not self._open[name]:
            del self._open[name]
            for node in self._contexts.pop(name) & self._nodes.keys():
                self._send(self._nodes[node], Kind.CLOSE, {"context": name})

    def _tell(self, kind: Kind, node_id: int | None, batch: Batch) -> None:
        """Send a frame of the scheduler to a node or the job's controller, until the job's end."""
        job = self._jobs.get(batch.job)
        if job is None:
            return
        if node_id is None:
            while job.left_out:
                number, lines = job.left_out.popitem()
                self._send(job.owner, Kind.OUTPUT, Batch.pack(
                    job.owners_number, 0, [b""], attempt=min(lines, U32), number=number, flags=frames.MORE))
            self._send(job.owner, kind, batch.renumbered(job.owners_number))
        else:
            node = self._nodes[node_id]
            if batch.flags & frames.TELL:
                self._send(job.owner, Kind.GIVEN, Batch(
                    job.owners_number, batch.first, batch.count, batch.attempt, node.hello["cpu_count"]))
            self._send(node, kind, job.declare_to(node_id) if kind is Kind.JOB else batch)

    def _send(self, peer: Peer, kind: Kind, body: Any) -> None:
        self._outbox.append((peer.channel, kind, body))

    def _announce(self, now: float) -> None:
        """Send CLUSTER to all controllers, if nodes came or went, and ANNOUNCE_SECONDS are over."""
        if self._changed and now >= self._announce_after:
            self._changed, self._announce_after = False, now + ANNOUNCE_SECONDS
            cluster = functools.cache(self._scheduler.cluster)  # once for each Python
            for peer in self._peers:
                if peer.role == auth.CONTROLLER and peer.hello:
                    self._send(peer, Kind.CLUSTER, cluster(peer.hello["python"]))

    def _status(self) -> dict[str, Any]:
        chunks = sorted((chunk for peer in self._nodes.values() for chunk in peer.long), reverse=True)
        longest = {job: {"longest": round(time.monotonic() - began), "node": node, "pid": pid}
                   for began, node, pid, job in chunks}  # the earliest chunk is last, and stays
        nodes = [
            {"id": peer.id, "address": peer.address, "python": peer.hello["python"], "version": peer.hello["version"],
             "cpu_count": node.cpu_count, "busy": min(len(node.held), node.cpu_count), "done": node.done,
             "since": peer.since}
            for peer in self._nodes.values() if (node := self._scheduler.nodes[peer.id])
        ]
        jobs = [
            {"id": number, "user": self._jobs[number].owner.user, "longest": 0, "node": None, "pid": None}
            | job.counts() | longest.get(number, {})
            for number, job in self._scheduler.jobs.items()
        ]
        return {"nodes": nodes, "jobs": jobs, "server": {
            "version": connect.hello()["version"], "uptime": time.monotonic() - self._started,
            "memory": console.resident_bytes()}}
