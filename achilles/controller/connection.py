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
import logging
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from .. import config
from ..errors import (
    AchillesError,
    AuthenticationError,
    ClusterKilled,
    ConfigurationError,
    LetterAltered,
    NoNodesError,
    ProtocolError,
    ServerUnreachable,
    VersionError,
)
from ..protocol import auth, connect
from ..protocol.channel import GOODBYE_SECONDS, Channel
from ..protocol.frames import Batch, Frame, Kind, Status
from .link import Link

__all__ = ["RECONNECT_SECONDS", "Controller", "tell"]

CLOSED = "the connection to the server was closed by its owner in this process"
RECONNECT_SECONDS = 300.0  # a server's machine may have to boot
BACKOFF_SECONDS = (0.1, 5.0)  # the first wait before connecting again, and the longest; doubled, with jitter
REPLY_SECONDS = 10.0  # for HELLO, the first CLUSTER, a STATUS, a KILL: the server answers at once or not at all
NOTICE_SECONDS = 5.0  # without a node, before the caller is told how to start one
LEAST_SECONDS = 0.05  # between two looks whether there are nodes, with a short wait_for_nodes
PAUSE_SECONDS = 3.0  # where nobody has looked for so long, nobody knows whether there was a node meanwhile
BREACHES = 3  # of the protocol, after which to connect again is of no use
LINE_COLUMNS = 79  # of a line on a terminal: it covers a line of progress, which is shorter

log = logging.getLogger(__name__)


class Controller(Link):
    """A connection to the server that `resolve` names, kept until `close`.

    `resolve` returns Settings. Each reconnection asks it again, so that a changed secret is found.

    :param wait_for_nodes: seconds without a node, after which `look` is an error.
    :param processes: see Link.
    """

    _channel: Channel | None = None  # of the class: a fork may find a Controller that is half made

    def __init__(
        self, resolve: Callable[[], config.Settings], *, reconnect_seconds: float = RECONNECT_SECONDS,
        wait_for_nodes: float | None = None, processes: int | None = None,
    ) -> None:
        super().__init__(processes)
        self._patience = float("inf") if wait_for_nodes is None else wait_for_nodes
        self.look_seconds = min(self.look_seconds, max(self._patience / 4, LEAST_SECONDS))
        self._lonely_since = self._looked = time.monotonic()  # no node since then; somebody looked then
        self._told = ""  # the last notice to the caller
        self.settings: config.Settings = resolve()
        self._resolve = resolve
        self._reconnect_seconds = reconnect_seconds
        self.connected = False
        self._cluster: dict[str, Any] = {}  # the last CLUSTER of this connection; empty before
        self._breaches = 0  # of the protocol, by the server or by us, which ended connections, and no batch between
        self._altered = 0  # answers on this connection that said so of a letter
        self._said: dict[Kind, dict[str, Any]] = {}  # the last CLUSTER and STATUS, of whichever connection
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._read, name="achilles-reader", daemon=True)

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
            ) from None  # the message has all
        try:
            self._reader.start()
            self._wait_for(Kind.CLUSTER, "its first word")
        except BaseException:
            self.close()
            raise

    def status(self) -> dict[str, Any]:
        """Nodes, jobs and server as plain dicts, from the server; blocks 10 s at most."""
        return self._wait_for(Kind.STATUS, "an answer", ask=True)

    def kill(self) -> None:
        """End every node and the server; returns when the server has said so, after 10 s at most."""
        with contextlib.suppress(ClusterKilled):
            self._wait_for(Kind.KILL, "its goodbye", ask=True)

    def close(self) -> None:
        """Say BYE, end the connection and join its threads; some 4 s at most. Jobs that are open have failed then."""
        self._closing.set()
        self.fail_jobs(ServerUnreachable(CLOSED))  # a connection that is being made sees `_closing` under `lock`
        if self._channel is not None:
            self._channel.finish("leaving")
            if self._reader.ident not in (None, threading.get_ident()):
                self._reader.join(2 * GOODBYE_SECONDS)
            self._channel.close()

    # As Link says.

    def post(self, kind: Kind, body: Batch) -> None:
        """Queue for the connection there is, if there is one. TASKs of a job that ends are taken back."""
        if self._channel is not None:
            if kind is Kind.END:
                self._channel.drop_tasks(body.job)
            self._channel.send(kind, body, wake=False)

    def push(self) -> None:
        """Send the frames that were posted. Without `lock`."""
        if self._channel is not None:
            self._channel.push()

    def check_usable(self) -> None:
        """Raise why there is no connection; VersionError where no node can run functions of this Python."""
        super().check_usable()
        cluster = self._cluster
        if cluster.get("nodes") and not cluster["workers"]:
            raise VersionError(
                f"this is Python {connect.PYTHON}, the nodes run {', '.join(sorted(cluster['pythons']))}: functions do "
                "not travel between minor versions, nor between a free-threaded build (3.14t) and another; "
                "start a node with this one, or the caller with one of theirs"
            )

    def look(self) -> None:
        """As Link says. The caller is told once on stderr that there is no node, or no server."""
        now = time.monotonic()
        paused, self._looked = now - self._looked > PAUSE_SECONDS, now
        if self.workers or paused:
            self._lonely_since = now
        waited = now - self._lonely_since
        start_one = f"Start one: python -m {config.PACKAGE}.node"
        if self.connected and not self.workers and waited >= self._patience:
            raise NoNodesError(
                f"no node joined the server at {self._where()} within {self._patience:g} s. {start_one}")
        notice = f"has no nodes; the job waits for one. {start_one}" if self.connected else (
            f"cannot be reached any more; it is tried again for {self._reconnect_seconds:g} s")
        if waited >= NOTICE_SECONDS and self._told != notice:
            self._told = notice
            tell(f"The server at {self._where()} {notice}")

    # The connection.

    def _connect(self, timeout: float = connect.CONNECT_SECONDS) -> None:
        settings = self.settings
        key = auth.derive_key(settings.username, settings.secret.reveal())
        channel = connect.connect(settings.host, settings.port, auth.CONTROLLER, settings.username, key, timeout,
                                  settings.encrypt)
        channel.name = f"server {settings.host}:{settings.port}"
        channel.send(Kind.HELLO, connect.hello())
        with self.lock:
            if self._closing.is_set():
                channel.close()
                raise ServerUnreachable(CLOSED)
            self._channel, self._altered = channel, 0
            self.forget_connection()
        channel.start_writer()

    def _read(self) -> None:
        """The reader thread: read until the connection ends, and connect again, until closed or given up.

        However the thread ends, every thread that waits is told.
        """
        try:
            while (channel := self._channel) is not None and not self._closing.is_set() and self._lost is None:
                why = channel.run(self._handle, self.push)
                self._learn({})
                channel.close()
                self._breaches += isinstance(why, ProtocolError)
                if self._lost is None:
                    self._reconnect(str(why))
        except AchillesError as e:
            self._lost = e
        except Exception as e:  # such as a MemoryError: nobody else would ever end the calls that wait
            log.exception("reading from the server failed")
            self._lost = ServerUnreachable(f"reading from the server at {self._where()} failed: {e!r}")
            self._lost.__cause__ = e
        with self.lock:
            self._lost = self._lost or ServerUnreachable(CLOSED)
            self.changed.notify_all()
            self.fail_jobs(self._lost)

    def _reconnect(self, why: str) -> None:
        """Set `_channel` anew, unless the owner closes. Raises why that is of no use, or took too long."""
        if self._breaches >= BREACHES:
            raise ServerUnreachable(f"lost the server {BREACHES} times in a row: {why}")
        patience = self._reconnect_seconds if self._said else min(REPLY_SECONDS, self._reconnect_seconds)
        deadline = time.monotonic() + patience
        wait, longest = BACKOFF_SECONDS
        while not self._closing.wait(wait * (0.5 + random.random())):
            log.info("lost the connection to the server: %s", why)
            wait = min(2 * wait, longest)
            try:
                with contextlib.suppress(ConfigurationError):  # half written, or gone: the old settings may still do
                    self.settings = self._resolve()
                self._connect(min(max(deadline - time.monotonic(), 0.1), connect.CONNECT_SECONDS))
                return
            except (AchillesError, OSError) as e:
                why = str(e)
                if isinstance(e, AuthenticationError) and not self._said:
                    raise
            if time.monotonic() > deadline:
                raise ServerUnreachable(
                    f"lost the server at {self._where()}, and could not connect to it again for {patience:g} s "
                    f"(reconnect_seconds): {why}")

    def _wait_for(self, kind: Kind, word: str, ask: bool = False) -> dict[str, Any]:
        """Block until the server has said this, 10 s at most; `ask` it to say it anew."""
        deadline = time.monotonic() + REPLY_SECONDS
        with self.lock:
            if ask and self._channel is not None:
                self._said.pop(kind, None)
                self._channel.send(kind, {})
            while kind not in self._said:
                super().check_usable()
                if not self.changed.wait(max(0.0, deadline - time.monotonic())):
                    raise ServerUnreachable(
                        f"the server at {self._where()} did not send {word} within {REPLY_SECONDS:g} s")
            return self._said[kind]

    def _learn(self, cluster: dict[str, Any]) -> None:
        """The server has said CLUSTER, or is lost."""
        if self.connected != bool(cluster):  # nobody knows whether there was a node meanwhile
            self._lonely_since = time.monotonic()
        self._cluster, self.connected = cluster, bool(cluster)
        self.workers, self.largest = cluster.get("workers", 0), cluster.get("largest", 0)

    def _where(self) -> str:
        return f"{self.settings.host}:{self.settings.port}"

    def _handle(self, frame: Frame) -> None:
        """The reader thread: one frame."""
        kind, body = frame
        if isinstance(body, Batch):
            self._breaches = 0
            self._altered += Status.ALTERED in body.statuses
            self.handle_batch(kind, body)
            if self._altered > 1:  # perhaps a function, which the server and the nodes keep
                raise LetterAltered("letters were altered on their way to workers")
        elif kind in (Kind.CLUSTER, Kind.STATUS):
            with self.lock:
                self._said[kind] = body
                if kind is Kind.CLUSTER:
                    self._learn(body)
                self.changed.notify_all()
                self.fill()
        elif kind is Kind.BYE and body["reason"] == "killed":
            self._lost = ClusterKilled("the cluster was ended by kill_cluster")
            raise self._lost
        elif kind is Kind.ERROR:
            text = f"the server at {self._where()} says: {body['message']}"
            if not self._said:
                self._lost = ServerUnreachable(text)
            raise (ProtocolError if body["code"] == "protocol" else ServerUnreachable)(text)

    def leave_to_parent(self) -> None:
        """As Link says."""
        super().leave_to_parent()
        channel, self._channel = self._channel, None
        self._closing = threading.Event()
        if channel is not None:
            channel.socket.close()


def tell(text: str) -> None:
    """Write a line to stderr, so that stdout stays the caller's."""
    with contextlib.suppress(Exception):  # stderr may be anybody's object
        columns = LINE_COLUMNS if getattr(sys.stderr, "isatty", bool)() else 0
        sys.stderr.write(text.ljust(columns) + "\n")
        sys.stderr.flush()
