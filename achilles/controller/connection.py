"""The controller: the caller's connection to a server, and the jobs that go through it.

Knows the connection, its loss and its return; a job's arguments and results it leaves to
`job.py`. It never loads an object.

::

    open() ── HELLO, CLUSTER ──▶ start(job) ── FUNCTION, JOB ──▶ job feeds TASKs … END
      │ lost                                                        ▲
      └─▶ connect again, with back-off, for `reconnect_seconds` ────┘ every job declared anew,
                                                                     every slice without a result sent again

END waits a little where no slice is left open: a call of one slice that is declared alike follows under the
same number, and the slice is all that travels. Longer ones begin anew, and are judged by their own pace.

Threads: the reader (`_read`) owns the connection: it reads, routes rows to jobs, and
connects again. The channel's writer sends. Any thread may start and end jobs.
`lock` guards the channel, the jobs, the book of functions and the cluster's figures;
`_changed` is a condition on it. After a fork of the caller the child forgets all of it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from .. import config
from ..config import Settings
from ..errors import (
    AchillesError,
    AuthenticationError,
    ClusterKilled,
    ConfigurationError,
    ProtocolError,
    ServerUnreachable,
    VersionError,
)
from ..protocol import auth, channel
from ..protocol.channel import PYTHON, Channel, SentFunctions
from ..protocol.frames import LETTER_LIMIT_BYTES, Frame, Kind, Rows
from .job import Job, Link

__all__ = ["RECONNECT_SECONDS", "Controller"]

CLOSED = "the connection to the server was closed by its owner in this process"
RECONNECT_SECONDS = 300.0  # a server's machine may have to boot
BACKOFF_SECONDS = (0.1, 5.0)  # the first wait before connecting again, and the longest; doubled, with jitter
KEPT_SECONDS, KEPT_JOBS = 0.5, 16  # at least so long, and at most so many, wait for one like them
REPLY_SECONDS = 10.0  # for HELLO, the first CLUSTER, a STATUS, a KILL: the server answers at once or not at all

log = logging.getLogger(__name__)
derive_key = functools.lru_cache(maxsize=8)(auth.derive_key)  # 40 ms, and each of the three calls connects anew


class _Kept(NamedTuple):
    """A job that is over, and that one like it may follow under its number."""

    number: int
    first: int  # the slice that would be next
    functions: list[bytes]  # their digests
    since: float  # monotonic


_Identity = tuple[bytes, str]  # of jobs that are declared alike


class Controller(Link):
    """A connection to the server that `resolve` names, kept until `close`.

    `resolve` returns Settings; it is asked again for every reconnection, so that a changed
    secret is found. Every method may be called from any thread.
    """

    def __init__(self, resolve: Callable[[], Settings], *, reconnect_seconds: float = RECONNECT_SECONDS) -> None:
        self.lock = threading.Lock()
        self.letter_limit = LETTER_LIMIT_BYTES
        self.settings = resolve()
        self._resolve = resolve
        self._reconnect_seconds = reconnect_seconds
        self._changed = threading.Condition(self.lock)
        self._channel: Channel | None = None
        self._sent = SentFunctions()  # what the server holds of this connection's functions
        self._jobs: dict[int, Job] = {}
        self._kept: dict[_Identity, _Kept] = {}  # jobs that are over, and whose END waits; the oldest first
        self._numbers = 0
        self._cluster: dict[str, Any] | None = None  # the last CLUSTER of this connection
        self._met = False  # a server has sent one, ever ...
        self._meet_by = 0.0  # ... or until then (monotonic) a lost connection is made anew
        self._status: dict[str, Any] | None = None  # the answer to a STATUS
        self._lost: AchillesError | None = None  # why there will be no connection again
        self._closing = threading.Event()
        self._reader: threading.Thread | None = None

    def open(self) -> None:
        """Connect, authenticate, and wait for the server's first word; blocks for 20 s at most.

        Where nobody listens, and where the proof is refused, that is said at once; a connection
        that is lost before the first word is made anew, for 10 s or `reconnect_seconds`, whichever is less.
        Raises ServerUnreachable, AuthenticationError, ProtocolError.
        """
        try:
            self._connect()
        except ServerUnreachable as e:
            raise ServerUnreachable(
                f"{e}. Is a server running, and is this its address? Start one: python -m {config.PACKAGE}.server"
            ) from e
        _forget_after_fork(self)
        self._meet_by = time.monotonic() + min(REPLY_SECONDS, self._reconnect_seconds)
        self._reader = threading.Thread(target=self._read, name="achilles-reader", daemon=True)
        self._reader.start()
        try:
            self._wait_until(lambda: self._cluster is not None, "its first word")
        except BaseException:
            self.close()
            raise

    def start(self, make: Callable[[Controller, int], Job]) -> Job:
        """Declare the job that `make(controller, number)` returns, and let it feed.

        VersionError where there are nodes, and none that can run what this Python compiled.
        """
        with self.lock:
            self._raise_if_lost()
            cluster = self._cluster or {}
            if cluster.get("nodes") and not cluster["workers"]:
                raise VersionError(
                    f"this is Python {PYTHON}, the nodes run {', '.join(sorted(cluster['pythons']))}: functions do not "
                    "travel between minor versions, nor between a free-threaded build (3.14t) and another; "
                    "start a node with this one, or the caller with one of theirs"
                )
            self._numbers += 1
            number = self._numbers
        job = make(self, number)
        with self.lock:
            self._raise_if_lost()
            if job.ended:  # somebody was quicker: there is nothing to declare
                return job
            if job.single and (over := self._kept.pop(_identity(job), None)):
                job.follow(over.number, over.first)
            else:
                self._declare(job, resumed=False)
            self._jobs[job.number] = job
        try:
            job.start()
        except BaseException:  # Ctrl-C, in what this thread fed
            self.end(job, cancel=True)
            raise
        self.push()
        return job

    def end(self, job: Job, cancel: bool = False) -> None:
        """The job is over, or with `cancel` shall be: what is queued and what runs is stopped. 0.5 s at most."""
        with self.lock:
            known = self._jobs.get(job.number) is job  # another one may have followed it
            job.ended = True
            if known:
                del self._jobs[job.number]
                over = _Kept(job.number, job.spent, [f.digest for f in job.functions().values()], time.monotonic())
                if over.first and not cancel:
                    self._keep(_identity(job), over)
                    return  # nobody waits for anything of it
                if cancel and self._channel is not None:
                    self._channel.drop_tasks(job.number)
                    self._channel.send_ahead(Kind.CANCEL, {"job": job.number})
                self._end(over)
        self.push()
        job.stop()

    def status(self) -> dict[str, Any]:
        """Nodes, jobs and server as plain dicts, from the server; blocks 10 s at most."""
        with self.lock:
            self._status = None
            self._end_kept()
            self.post(Kind.STATUS, {})
        self.push()
        self._wait_until(lambda: self._status is not None, "an answer")
        return self._status or {}

    def kill(self) -> None:
        """End every node and the server; returns when the server has said so, after 10 s at most."""
        with self.lock:
            self.post(Kind.KILL, {})
        self.push()
        try:
            self._wait_until(lambda: False, "its goodbye")
        except ClusterKilled:
            pass

    def close(self) -> None:
        """Say BYE, end the connection and join its threads; some 4 s at most. Jobs that are open are cancelled."""
        self._closing.set()
        with self.lock:  # a connection that is being made sees `_closing` under it
            jobs, link = list(self._jobs.values()), self._channel
        for job in jobs:
            job.fail(ServerUnreachable(CLOSED))
            self.end(job, cancel=True)
        if link is not None:
            link.finish("leaving")
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join(2 * channel.GOODBYE_SECONDS)
        if link is not None:
            link.close()

    # What a Job needs of its link.

    def post(self, kind: Kind, body: dict[str, Any] | Rows) -> None:
        """Queue for the connection there is, if there is one; `push` sends. Needs `lock`."""
        if self._channel is not None:
            self._channel.send(kind, body, wake=False)

    def push(self) -> None:
        """Send what was posted. Without `lock`."""
        link = self._channel
        if link is not None:
            link.push()

    @property
    def connected(self) -> bool:
        """Whether the server has spoken on the connection there is."""
        return self._cluster is not None

    def workers(self) -> tuple[int, int]:
        """Workers of nodes with this Python, and those of the largest node."""
        cluster = self._cluster
        return (cluster["workers"], cluster["largest"]) if cluster else (0, 0)

    def wait_for_workers(self, timeout: float) -> None:
        """Block until the cluster changes or the connection does, `timeout` seconds at most."""
        with self._changed:
            self._changed.wait(timeout)

    # The connection.

    def _connect(self, timeout: float = channel.CONNECT_SECONDS) -> None:
        settings = self.settings
        key = derive_key(settings.username, settings.secret.reveal())
        link = channel.connect(settings.host, settings.port, auth.CONTROLLER, settings.username, key, timeout)
        link.name = f"server {settings.host}:{settings.port}"
        link.send(Kind.HELLO, channel.hello())
        with self._changed:
            if self._closing.is_set():
                link.close()
                raise ServerUnreachable(CLOSED)
            self._channel, self._sent, self._cluster, self._kept = link, SentFunctions(), None, {}
            for job in self._jobs.values():
                self._declare(job, resumed=True)
                for rows in job.outstanding():
                    link.send(Kind.TASK, rows)
                if job.flushed():
                    link.send(Kind.FLUSH, {"job": job.number, "upto": job.flushed()})
        link.start_writer()

    def _declare(self, job: Job, resumed: bool) -> None:
        """FUNCTION where the server has it not, then JOB. Needs `lock`."""
        for function in job.functions().values():
            if self._sent.use(function.digest, len(function.letter)):
                self.post(Kind.FUNCTION, Rows.single(0, 0, 0, 0, (function.letter,), function.digest))
        self.post(Kind.JOB, job.declaration() | {"resumed": resumed})

    def _keep(self, identity: _Identity, over: _Kept) -> None:
        """Wait with its END: the next call may be of the same function, and save both frames. Needs `lock`.

        The END of one whose place it takes leaves with what is sent next, or with the reader's next look.
        """
        alike = self._kept.pop(identity, None)
        if alike is None and len(self._kept) == KEPT_JOBS:
            alike = self._kept.pop(next(iter(self._kept)))
        if alike is not None:
            self._end(alike)
        self._kept[identity] = over

    def _end_kept(self, before: float = math.inf) -> None:
        """END the jobs that were kept, those that have been over since `before`. Needs `lock`."""
        for identity, kept in list(self._kept.items()):
            if kept.since < before:
                self._end(self._kept.pop(identity))

    def _end(self, kept: _Kept) -> None:
        self.post(Kind.END, {"job": kept.number})
        for function in kept.functions:
            for digest in self._sent.release(function):
                self.post(Kind.FORGET, {"function": digest.hex()})

    def _tidy(self) -> None:
        """The reader, after what came together, and every second."""
        if self._kept:
            with self.lock:
                self._end_kept(time.monotonic() - KEPT_SECONDS)
        self.push()

    def _read(self) -> None:
        """The reader thread; however it ends, everybody who waits is told."""
        try:
            self._read_and_reconnect()
        except Exception as e:  # such as a MemoryError: nobody else would ever end the calls that wait
            log.exception("reading from the server failed")
            self._lost = ServerUnreachable(f"reading from the server at {self._where()} failed: {e!r}")
            self._lost.__cause__ = e
        with self._changed:
            self._lost = self._lost or ServerUnreachable(CLOSED)
            self._changed.notify_all()
            jobs = list(self._jobs.values())
        for job in jobs:
            job.fail(self._lost)

    def _read_and_reconnect(self) -> None:
        """Read until the connection ends, connect again, until closed or given up."""
        while True:
            link = self._channel
            why = link.run(self._handle, self._tidy) if link is not None else "closed"
            if self._closing.is_set() or self._lost is not None:
                break
            log.info("lost the connection to the server: %s", why)
            with self.lock:
                self._cluster = None
            if not self._reconnect(why):
                break
            if link is not None:
                link.close()

    def _reconnect(self, why: str) -> bool:
        deadline = time.monotonic() + self._reconnect_seconds if self._met else self._meet_by
        wait, longest = BACKOFF_SECONDS
        while not self._closing.wait(wait * (0.5 + random.random())):
            wait = min(2 * wait, longest)
            try:
                with contextlib.suppress(ConfigurationError):  # half written, or gone: what there was may still do
                    self.settings = self._resolve()
                self._connect(min(max(deadline - time.monotonic(), 0.1), channel.CONNECT_SECONDS))
                log.info("connected to the server again")
                return True
            except (AchillesError, OSError) as e:
                why = str(e)
                if isinstance(e, AuthenticationError) and not self._met:
                    self._lost = e
                    return False
            if time.monotonic() > deadline:
                break
        self._lost = ServerUnreachable(
            f"lost the server at {self._where()}, and could not connect to it again for {self._reconnect_seconds:g} s "
            f"(reconnect_seconds): {why}" if self._met else
            f"the server at {self._where()} ends each connection before its first word: {why}"
        )
        return False

    def _wait_until(self, happened: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + REPLY_SECONDS
        with self._changed:
            while not happened():
                self._raise_if_lost()
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise ServerUnreachable(
                        f"the server at {self._where()} did not send {what} within {REPLY_SECONDS:g} s")

    def _where(self) -> str:
        return f"{self.settings.host}:{self.settings.port}"

    def _raise_if_lost(self) -> None:
        if self._lost is not None:
            raise self._lost

    # The reader's routing.

    def _handle(self, frame: Frame) -> None:
        kind, body = frame
        if kind is Kind.RESULT:
            job = self._jobs.get(body.job)
            if job is not None:
                job.answers(body)
        elif kind is Kind.PACKET:
            job = self._jobs.get(body.job)
            if job is not None:
                for first, count in zip(body.slices, body.attempts, strict=True):
                    job.packet(first, count)
        elif kind is Kind.CLUSTER:
            self._handle_cluster(body)
        elif kind is Kind.STATUS:
            with self._changed:
                self._status = body
                self._changed.notify_all()
        elif kind is Kind.BYE and body["reason"] == "killed":
            self._lost = ClusterKilled("the cluster was ended by kill_cluster")
            raise self._lost
        elif kind is Kind.ERROR:
            if not self._met:
                self._lost = ServerUnreachable(f"the server at {self._where()} says: {body['message']}")
            raise ProtocolError(f"the server says: {body['message']}")

    def _handle_cluster(self, body: dict[str, Any]) -> None:
        with self._changed:
            self._cluster, self._met = body, True
            self.letter_limit = body["letter_limit"]
            self._changed.notify_all()
            jobs = list(self._jobs.values())
        for job in jobs:
            job.resize()

    def _abandon(self) -> None:
        """In a child of the caller: the parent's connection is not ours. Takes no lock; its holder may not exist."""
        self._lost = ServerUnreachable("this connection belongs to the parent process; open one after the fork")
        self.lock = threading.Lock()
        self._changed = threading.Condition(self.lock)
        self._closing = threading.Event()
        for job in self._jobs.values():
            job.abandon(self._lost)
        self._jobs, self._kept = {}, {}
        link, self._channel = self._channel, None
        if link is not None:
            link.socket.close()


def _identity(job: Job) -> _Identity:
    return job.context_id, repr((job.options, [function.digest for function in job.functions().values()]))


_open_controllers: weakref.WeakSet[Controller] = weakref.WeakSet()


@functools.cache
def _register_fork_hook() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_abandon_all)


def _abandon_all() -> None:
    for controller in list(_open_controllers):
        controller._abandon()


def _forget_after_fork(controller: Controller) -> None:
    _register_fork_hook()
    _open_controllers.add(controller)
