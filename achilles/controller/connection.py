"""The controller: the caller's connection to a server, made anew when it is lost.

Knows the connection, its loss and its return; jobs and batches are `link.py`'s. It never loads an object.

::

    open() ── HELLO, CLUSTER ──▶ jobs: JOB, TASK … END
      │ lost                           ▲
      └─▶ connect again, with back-off, for `reconnect_seconds`: every job declared anew,
                                       every chunk without an answer sent again

Threads: the reader (`_read`) owns the connection: it reads, hands answers to jobs, and connects again. The channel's
writer sends. Any thread may call any method. `lock` guards all fields, and `changed` is a condition on it. After a fork
of the caller the child forgets all of it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from .. import config
from ..config import Settings
from ..errors import (
    AchillesError,
    AuthenticationError,
    ClusterKilled,
    ConfigurationError,
    LetterAltered,
    ProtocolError,
    ServerUnreachable,
    VersionError,
)
from ..protocol import auth, connect
from ..protocol.channel import GOODBYE_SECONDS, Channel
from ..protocol.connect import PYTHON
from ..protocol.frames import Batch, Frame, Kind, Status
from .job import Job
from .link import Link

__all__ = ["RECONNECT_SECONDS", "Controller"]

CLOSED = "the connection to the server was closed by its owner in this process"
RECONNECT_SECONDS = 300.0  # a server's machine may have to boot
BACKOFF_SECONDS = (0.1, 5.0)  # the first wait before connecting again, and the longest; doubled, with jitter
REPLY_SECONDS = 10.0  # for HELLO, the first CLUSTER, a STATUS, a KILL: the server answers at once or not at all
COMPLAINTS = 3  # of the server, after which to connect again is of no use

log = logging.getLogger(__name__)


class Controller(Link):
    """A connection to the server that `resolve` names, kept until `close`.

    `resolve` returns Settings. Each reconnection asks it again, so that a changed secret is found.

    :param processes: see Link.
    """

    def __init__(
        self, resolve: Callable[[], Settings], *, reconnect_seconds: float = RECONNECT_SECONDS,
        processes: int | None = None,
    ) -> None:
        super().__init__(processes)
        self.settings = resolve()
        self._resolve = resolve
        self._reconnect_seconds = reconnect_seconds
        self._channel: Channel | None = None
        self._cluster: dict[str, Any] | None = None  # the last CLUSTER of this connection
        self._complaints = 0  # of the server, that we break the protocol, and no batch between
        self._altered = 0  # answers on this connection that said so of a letter
        self._met = False  # a server has sent a CLUSTER, ever
        self._meet_by = 0.0  # until then (monotonic) a connection that is lost before its first CLUSTER is made anew
        self._status: dict[str, Any] | None = None  # the answer to a STATUS
        self._closing = threading.Event()
        self._reader: threading.Thread | None = None

    def open(self) -> None:
        """Connect, authenticate, and wait for the server's first CLUSTER; blocks for 20 s at most.

        An address where nobody listens, and a refused proof, are errors at once. A connection that is lost before the
        first CLUSTER is made anew, for 10 s or `reconnect_seconds`, whichever is less.
        Raises ServerUnreachable, AuthenticationError, ProtocolError.
        """
        try:
            self._connect()
        except ServerUnreachable as e:
            raise ServerUnreachable(
                f"{e}. Is a server running, and is this its address? Start one: python -m {config.PACKAGE}.server"
            ) from e
        _register_fork_hook()
        _open_controllers.add(self)
        self._meet_by = time.monotonic() + min(REPLY_SECONDS, self._reconnect_seconds)
        self._reader = threading.Thread(target=self._read, name="achilles-reader", daemon=True)
        self._reader.start()
        try:
            self._wait_until(lambda: self._cluster is not None, "its first word")
        except BaseException:
            self.close()
            raise

    def status(self) -> dict[str, Any]:
        """Nodes, jobs and server as plain dicts, from the server; blocks 10 s at most."""
        with self.lock:
            self._status = None
            self._send(Kind.STATUS, {})
        self.push()
        self._wait_until(lambda: self._status is not None, "an answer")
        return self._status or {}

    def kill(self) -> None:
        """End every node and the server; returns when the server has said so, after 10 s at most."""
        with self.lock:
            self._send(Kind.KILL, {})
        self.push()
        with contextlib.suppress(ClusterKilled):
            self._wait_until(lambda: False, "its goodbye")

    def close(self) -> None:
        """Say BYE, end the connection and join its threads; some 4 s at most. Jobs that are open have failed then."""
        self._closing.set()
        with self.lock:  # a connection that is being made sees `_closing` under it
            self.fail_jobs(ServerUnreachable(CLOSED))
            for job in list(self.jobs.values()):
                self.end(job)
            link = self._channel
        if link is not None:
            link.finish("leaving")
        if self._reader is not None and self._reader.ident != threading.get_ident():
            self._reader.join(2 * GOODBYE_SECONDS)
        if link is not None:
            link.close()

    # As Link says.

    def post(self, kind: Kind, body: Batch) -> None:
        """Queue for the connection there is, if there is one. Needs `lock`."""
        self._send(kind, body)

    def push(self) -> None:
        """Send what was posted. Without `lock`."""
        link = self._channel
        if link is not None:
            link.push()

    def drop(self, job: Job, first: int = 0, end: float = float("inf")) -> None:
        """Take unsent TASKs back. Needs `lock`."""
        if self._channel is not None:
            self._channel.drop_tasks(job.number, first, end)

    @property
    def connected(self) -> bool:  # type: ignore[override]
        """Whether the server has spoken on the connection there is."""
        return self._cluster is not None

    def workers(self) -> tuple[int, int]:
        """As Link says."""
        cluster = self._cluster
        return (cluster["workers"], cluster["largest"]) if cluster else (0, 0)

    def check_usable(self) -> None:
        """Raise why there is no connection; VersionError where no node can run functions of this Python."""
        super().check_usable()
        cluster = self._cluster or {}
        if cluster.get("nodes") and not cluster["workers"]:
            raise VersionError(
                f"this is Python {PYTHON}, the nodes run {', '.join(sorted(cluster['pythons']))}: functions do not "
                "travel between minor versions, nor between a free-threaded build (3.14t) and another; "
                "start a node with this one, or the caller with one of theirs"
            )

    # The connection.

    def _send(self, kind: Kind, body: dict[str, Any] | Batch) -> None:
        if self._channel is not None:
            self._channel.send(kind, body, wake=False)

    def _connect(self, timeout: float = connect.CONNECT_SECONDS) -> None:
        settings = self.settings
        key = auth.derive_key(settings.username, settings.secret.reveal())
        link = connect.connect(settings.host, settings.port, auth.CONTROLLER, settings.username, key, timeout)
        link.name = f"server {settings.host}:{settings.port}"
        link.send(Kind.HELLO, connect.hello())
        with self.lock:
            if self._closing.is_set():
                link.close()
                raise ServerUnreachable(CLOSED)
            self._channel, self._cluster, self._altered = link, None, 0
            self.forget_connection()
        link.start_writer()

    def _read(self) -> None:
        """The reader thread; however it ends, every thread that waits is told."""
        try:
            self._read_and_reconnect()
        except Exception as e:  # such as a MemoryError: nobody else would ever end the calls that wait
            log.exception("reading from the server failed")
            self._lost = ServerUnreachable(f"reading from the server at {self._where()} failed: {e!r}")
            self._lost.__cause__ = e
        with self.lock:
            self._lost = self._lost or ServerUnreachable(CLOSED)
            self.changed.notify_all()
            self.fail_jobs(self._lost)

    def _read_and_reconnect(self) -> None:
        """Read until the connection ends, connect again, until closed or given up."""
        while True:
            link = self._channel
            why = link.run(self._handle, self.push) if link is not None else "closed"
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
                with contextlib.suppress(ConfigurationError):  # half written, or gone: the old settings may still do
                    self.settings = self._resolve()
                self._connect(min(max(deadline - time.monotonic(), 0.1), connect.CONNECT_SECONDS))
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
        with self.changed:
            while not happened():
                if self._lost is not None:
                    raise self._lost
                left = deadline - time.monotonic()
                if left <= 0 or not self.changed.wait(left):
                    raise ServerUnreachable(
                        f"the server at {self._where()} did not send {what} within {REPLY_SECONDS:g} s")

    def _where(self) -> str:
        return f"{self.settings.host}:{self.settings.port}"

    def _handle(self, frame: Frame) -> None:
        """The reader thread: one frame."""
        kind, body = frame
        if isinstance(body, Batch):
            self._complaints = 0
            altered = kind is Kind.RESULT and Status.ALTERED in body.statuses
            self.handle_batch(kind, body)
            self._altered += altered
            if altered and self._altered > 1:  # perhaps a function, which the server and the nodes keep
                raise LetterAltered("letters were altered on their way to workers")
        elif kind is Kind.CLUSTER:
            with self.lock:
                self._cluster, self._met = body, True
                self.changed.notify_all()
                self.cluster_changed()
        elif kind is Kind.STATUS:
            with self.lock:
                self._status = body
                self.changed.notify_all()
        elif kind is Kind.BYE and body["reason"] == "killed":
            self._lost = ClusterKilled("the cluster was ended by kill_cluster")
            raise self._lost
        elif kind is Kind.ERROR:
            self._complaints += body["code"] == "protocol"
            if not self._met or self._complaints >= COMPLAINTS:
                self._lost = ServerUnreachable(f"the server at {self._where()} says: {body['message']}")
            raise ProtocolError(f"the server says: {body['message']}")

    def _abandon(self) -> None:
        """In a child of the caller: the parent's connection is not ours. Takes no lock; its holder may not exist."""
        self._lost = ServerUnreachable("this connection belongs to the parent process; open one after the fork")
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self._closing = threading.Event()
        for job in self.jobs.values():
            job.abandon(self._lost, self.lock)
        self.jobs = {}
        self._kept = {}
        link, self._channel = self._channel, None
        if link is not None:
            link.socket.close()


_open_controllers: weakref.WeakSet[Controller] = weakref.WeakSet()


@functools.cache
def _register_fork_hook() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_abandon_all)


def _abandon_all() -> None:
    for controller in list(_open_controllers):
        controller._abandon()
