"""What the server does with frames: peers in, the scheduler's events and actions, frames out.

It knows peers, jobs by the numbers that each side has for them, and who holds which function.
What goes where is the scheduler's to say; sockets, threads and keys are `listen.py`'s. It opens
no letter but functions', to hash them: it keeps them under their digests.

::

    Peer ── frame ─▶ handle ─▶ scheduler.event() ─▶ actions ─▶ frames in outboxes of other peers
    controller's job 3, slice 40 ──▶ server's job 17 ──▶ node 0 ── RESULT ──▶ job 3 of its controller

Called by the thread of each connection. One lock guards everything here and in the scheduler. It
is held while the actions of an event are queued, so that their order is the scheduler's; under it
nobody waits for a peer: a frame is queued, and pushed after it.
"""

from __future__ import annotations

import hmac
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import ProtocolError
from ..protocol import auth, channel, frames
from ..protocol.channel import Channel, SentFunctions
from ..protocol.frames import Buffer, Frame, Kind, Rows, Status
from .scheduler import Action, Announce, Cancel, Dead, End, Give, Recall, Scheduler

__all__ = ["Exchange", "Peer"]

log = logging.getLogger(__name__)


class DeclaredJob:
    """What the server knows of a job beside its slices: enough to declare it to a node."""

    def __init__(self, number: int, owner: Peer, body: dict[str, Any]) -> None:
        self.number = number  # the server's; `body` has the controller's
        self.owner = owner
        self.body = body
        names = [bytes.fromhex(body[name]) for name in ("function", "initializer") if body.get(name)]
        if not owner.functions.keys() >= set(names):
            raise ProtocolError(f"job {body['job']} names a function that was not sent")
        self.functions = {name: owner.functions[name] for name in names}  # digest -> letter; held until END


class Peer:
    """One authenticated connection. All but `channel` is guarded by the lock of the Exchange."""

    def __init__(self, link: Channel, role: bytes, user: str, address: str) -> None:
        self.channel = link
        link.name = f"client at {address}"
        self.role = role
        self.user = user if user.isprintable() else ascii(user)  # a STATUS shows it to people
        self.address = address
        self.id = -1  # until its HELLO
        self.hello: dict[str, Any] = {}
        self.since = 0.0  # wall clock, for people to read
        self.sent = SentFunctions()  # a node's: what it holds
        self.contexts: set[str] = set()  # a node's: those it was told of; a controller's: those it opened
        self.functions: dict[bytes, tuple[Buffer, ...]] = {}  # a controller's: digest -> letter
        self.jobs: dict[int, DeclaredJob] = {}  # a controller's: by its own numbers, until END
        self.cancelled: set[int] = set()  # a controller's: jobs whose CANCEL was ahead of their JOB

    @property
    def python(self) -> str:
        """Its Python's minor version, such as 3.11 or 3.14t, once it has said HELLO."""
        return str(self.hello["python"])


class Exchange:
    """All peers, jobs and functions of one server. `handle` and the like may be called from any thread."""

    def __init__(self, version: str, kill: Callable[[], None]) -> None:
        self._version = version
        self._kill = kill  # called when a controller says KILL; must not block
        self._started = time.monotonic()
        self._lock = threading.Lock()  # guards all below
        self._scheduler = Scheduler()
        self._peers: set[Peer] = set()
        self._nodes: dict[int, Peer] = {}
        self._jobs: dict[int, DeclaredJob] = {}  # by the server's numbers
        self._counts: Counter[bytes | str] = Counter()  # numbers given: to nodes, controllers, jobs
        self._goodbye = ""  # the reason of the last BYE, once the server ends
        self._unsent: set[Channel] = set()  # that frames were queued for since the last push

    def enter(self, peer: Peer, most: int) -> None:
        """A client has authenticated. If there are `most` already, it is told so, and let go."""
        with self._lock:
            full = len(self._peers) >= most
            if not full:
                self._peers.add(peer)
        if full:
            peer.channel.send(Kind.ERROR, {"code": "full", "message": "the server has no room for another connection"})
            peer.channel.finish()

    def handle(self, peer: Peer, frame: Frame) -> None:
        """One frame of a peer. ProtocolError if it may not say that now."""
        if frame.kind is Kind.ERROR:
            log.warning("%s ends the connection: %s", peer.channel.name, ascii(frame.body["message"]))
        with self._lock:
            if peer not in self._peers:
                raise ProtocolError("the server had no room for this connection")
            if peer.id < 0:
                self._greet(peer, frame)
            elif frame.kind is Kind.HELLO:
                raise ProtocolError("a second HELLO")
            elif peer.role == auth.NODE:
                self._handle_node(peer, frame)
            else:
                self._handle_controller(peer, frame)

    def leave(self, peer: Peer) -> None:
        """The connection is gone: a controller's jobs end, a node's slices go to others."""
        with self._lock:
            self._peers.discard(peer)
            if peer.role == auth.NODE and peer.id in self._nodes:
                del self._nodes[peer.id]
                actions = self._scheduler.lose(peer.id)
                self._announce_cluster()
                self._carry_out(actions)
            for job in list(peer.jobs.values()):
                self._end(job)
            if peer.role == auth.CONTROLLER:
                self._close_contexts(peer, list(peer.contexts))
        self.push()

    def push(self) -> None:
        """Write what was queued since the last time, by whomever; the writers do what does not go at once."""
        with self._lock:
            unsent, self._unsent = self._unsent, set()
        for link in unsent:
            link.push()

    def say_goodbye(self, reason: str) -> list[Peer]:
        """BYE to all who are here, and from now on to all who come; returns who is here."""
        with self._lock:
            self._goodbye = reason
            for peer in self._peers:
                peer.channel.finish(reason)
            return list(self._peers)

    # Everything below is called with the lock.

    def _greet(self, peer: Peer, frame: Frame) -> None:
        """The first frame, which must be HELLO; now the peer is one of the cluster."""
        kind, body = frame
        if kind is not Kind.HELLO or (peer.role == auth.NODE and not body.get("cpu_count")):
            raise ProtocolError("a client begins with HELLO, and a node has workers")
        peer.hello, peer.since = body, time.time()
        peer.id = self._counts[peer.role]
        self._counts[peer.role] += 1
        peer.channel.name = f"{'node' if peer.role == auth.NODE else 'controller'} {peer.id} at {peer.address}"
        hello = channel.hello()
        connections = sum(each.id >= 0 for each in self._peers)
        self._send(peer.channel, Kind.HELLO, hello | {"client_id": peer.id, "connections": connections})
        log.info("%s joined: user %r, Python %s", peer.channel.name, peer.user, peer.python)
        if self._goodbye:
            peer.channel.finish(self._goodbye)
        elif peer.role == auth.NODE:
            self._nodes[peer.id] = peer
            actions = self._scheduler.join(peer.id, peer.python, body["cpu_count"])
            self._announce_cluster()
            self._carry_out(actions)
        else:
            self._send_cluster(peer)

    def _handle_node(self, node: Peer, frame: Frame) -> None:
        kind, body = frame
        if kind is Kind.RESULT:
            accepted, actions = self._scheduler.answer(node.id, body.job, body)
            job = self._jobs.get(body.job)
            if accepted is not None and job is not None:
                self._send(job.owner.channel, Kind.RESULT, accepted.renumbered(job.body["job"]))
            self._carry_out(actions)
        elif kind is Kind.RETURNED:
            self._carry_out(self._scheduler.returned(node.id, body.job, body.slices, bool(body.pace)))
        elif kind is Kind.BYE:
            self._scheduler.leave(node.id)
            self._announce_cluster()

    def _handle_controller(self, peer: Peer, frame: Frame) -> None:
        kind, body = frame
        if kind is Kind.FUNCTION:
            self._keep_function(peer, body)
        elif kind is Kind.JOB:
            self._declare(peer, body)
        elif kind is Kind.TASK:
            job = self._job_of(peer, body.job)
            self._carry_out(self._scheduler.add(job.number, body.renumbered(job.number)))
        elif kind is Kind.FLUSH:
            self._carry_out(self._scheduler.flush(self._job_of(peer, body["job"]).number, body["upto"]))
        elif kind is Kind.CANCEL:
            self._cancel(peer, body["job"])
        elif kind is Kind.END:
            self._end(self._job_of(peer, body["job"]))
        elif kind is Kind.FORGET:
            peer.functions.pop(bytes.fromhex(body["function"]), None)
        elif kind is Kind.CLOSE:
            self._close_contexts(peer, {body["context"]} & peer.contexts)  # what it did not open is none of its
        elif kind is Kind.STATUS:
            self._send(peer.channel, Kind.STATUS, self._status())
        elif kind is Kind.KILL:
            log.info("%s ends the cluster", peer.channel.name)
            self._kill()

    def _job_of(self, peer: Peer, number: int) -> DeclaredJob:
        job = peer.jobs.get(number)
        if job is None:
            raise ProtocolError(f"job {number} was not declared on this connection, or has ended")
        return job

    def _keep_function(self, peer: Peer, rows: Rows) -> None:
        """Whoever caches a function hashes it: it is asked for by its digest later."""
        (claimed, letter), = rows.letters()
        digest = frames.digest(letter)
        if claimed and not hmac.compare_digest(claimed, digest):
            raise ProtocolError("a function does not match its digest")
        peer.functions[digest] = tuple(letter)

    def _declare(self, peer: Peer, body: dict[str, Any]) -> None:
        self._counts["jobs"] += 1
        job = DeclaredJob(self._counts["jobs"], peer, body)
        if body["job"] in peer.jobs:
            raise ProtocolError(f"job {body['job']} is there already")
        self._jobs[job.number] = peer.jobs[body["job"]] = job
        peer.contexts.add(body["context"])
        limit = body["options"].get("processes")
        self._scheduler.declare(job.number, peer, peer.python, limit, body["context"])
        log.info("job %d of %s begins", job.number, peer.channel.name)
        if body["job"] in peer.cancelled:
            self._cancel(peer, body["job"])

    def _cancel(self, peer: Peer, number: int) -> None:
        """CANCEL goes ahead of queued frames, so the JOB may be yet to come."""
        job = peer.jobs.get(number)
        if job is None:
            peer.cancelled.add(number)
        else:
            self._carry_out(self._scheduler.cancel(job.number))

    def _end(self, job: DeclaredJob) -> None:
        self._carry_out(self._scheduler.end(job.number))
        del self._jobs[job.number], job.owner.jobs[job.body["job"]]
        job.owner.cancelled.discard(job.body["job"])
        log.info("job %d ended", job.number)

    def _close_contexts(self, peer: Peer, contexts: Iterable[str]) -> None:
        """The last to have it open closes it: this may be an old connection of a caller who is back, or an intruder."""
        for context in contexts:
            peer.contexts.discard(context)
            is_open = any(context in other.contexts for other in self._peers if other.role == auth.CONTROLLER)
            for node in () if is_open else self._nodes.values():
                if context in node.contexts:
                    node.contexts.discard(context)
                    self._send(node.channel, Kind.CLOSE, {"context": context})

    def _send(self, link: Channel, kind: Kind, body: dict[str, Any] | Rows) -> None:
        """Queue a frame, which `push` writes when all that this event gives rise to is queued."""
        link.send(kind, body, wake=False)
        self._unsent.add(link)

    # From actions to frames.

    def _carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            job = self._jobs[action.job]
            if isinstance(action, Give):
                node = self._nodes[action.node]
                if action.first:
                    self._tell(node, job)
                for rows in action.rows:
                    self._send(node.channel, Kind.TASK, rows)
            elif isinstance(action, Announce):
                for start in range(0, len(action.packets), frames.MAX_ROWS):
                    packets = action.packets[start : start + frames.MAX_ROWS]
                    table = b"".join([frames.ROW.pack(first, count, 0, 0) for first, count in packets])
                    self._send(job.owner.channel, Kind.PACKET, Rows(job.body["job"], table))
            elif isinstance(action, Recall):
                self._nodes[action.node].channel.send_ahead(Kind.RECALL, {"job": job.number, "number": action.number})
            elif isinstance(action, Cancel):
                self._nodes[action.node].channel.drop_tasks(job.number)
                self._nodes[action.node].channel.send_ahead(Kind.CANCEL, {"job": job.number})
            elif isinstance(action, End):
                self._tell_end(self._nodes[action.node], job)
            elif isinstance(action, Dead):
                note = b'{"position":-1,"phase":"node","lost":%d}' % action.lost
                rows = Rows.single(job.body["job"], action.slice, action.attempt, Status.DIED, (note,))
                self._send(job.owner.channel, Kind.RESULT, rows)

    def _tell(self, node: Peer, job: DeclaredJob) -> None:
        """Declare a job to a node, after the functions that it has not."""
        for digest, letter in job.functions.items():
            if node.sent.use(digest, sum(map(len, letter))):
                self._send(node.channel, Kind.FUNCTION, Rows.single(0, 0, 0, 0, letter, digest))
        node.contexts.add(job.body["context"])
        self._send(node.channel, Kind.JOB, job.body | {"job": job.number})

    def _tell_end(self, node: Peer, job: DeclaredJob) -> None:
        self._send(node.channel, Kind.END, {"job": job.number})
        for digest in job.functions:
            for dropped in node.sent.release(digest):
                self._send(node.channel, Kind.FORGET, {"function": dropped.hex()})

    def _announce_cluster(self) -> None:
        for peer in self._peers:
            if peer.role == auth.CONTROLLER and peer.id >= 0:
                self._send_cluster(peer)

    def _send_cluster(self, controller: Peer) -> None:
        workers, largest, _ = self._scheduler.workers(controller.python)
        limits = [node.hello.get("letter_limit") or frames.LETTER_LIMIT_BYTES for node in self._nodes.values()]
        pythons = Counter(self._scheduler.pythons())
        named = dict(pythons.most_common(frames.MAX_PYTHONS))
        body = {"nodes": pythons.total(), "workers": workers, "largest": largest, "pythons": named}
        self._send(controller.channel, Kind.CLUSTER, body | {"letter_limit": min([*limits, frames.LETTER_LIMIT_BYTES])})

    def _status(self) -> dict[str, Any]:
        nodes = [
            state | {"address": node.address, "version": node.hello["version"], "since": node.since}
            for state in self._scheduler.node_states() if (node := self._nodes.get(state["id"]))
        ]
        jobs = [state | {"owner": None, "user": state["owner"].user} for state in self._scheduler.job_states()]
        for job in jobs:
            del job["owner"]
        server = {"version": self._version, "uptime": time.monotonic() - self._started, "memory": _memory()}
        return {"nodes": nodes, "jobs": jobs, "server": server}


def _memory() -> int | None:
    """Resident bytes of this process, where the system tells."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
