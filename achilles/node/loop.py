"""A node: it lends this machine's cores to a server, and comes back when it loses it.

Knows one server and its own workers; knows no controller, and never opens a
letter. One blocking loop over one selector, and no other thread, so that a
worker can be forked at any moment and a stopped one holds nobody up:

::

                       ┌──────────────── selector ────────────────┐
    server ◀═signed═▶ Channel ── Session ── Workers ── Channel ◀─▶ worker, one each
                       wake-up ◀── SIGCHLD, SIGTERM (main thread alone; restored after)

    run_node ─▶ connect ─▶ HELLO ─▶ turns ─┬─ lost: nothing is remembered; back-off, connect anew
                   ▲                       ├─ BYE killed: over
                   └── refused: an error ──┴─ SIGTERM: RETURNED, BYE leaving, what runs, over
                       before the first join, tried again after it

Limits: `channel.py`'s for silence; 30 s for what runs when it drains.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import random
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from .. import config, console
from ..config import Settings
from ..errors import AchillesError, AuthenticationError, ConfigurationError, ProtocolError, ServerUnreachable
from ..protocol import auth, channel
from ..protocol.channel import Channel
from ..protocol.frames import TEXT_CHARS, U16, Kind
from .cores import check_multiprocess, count_threads, default_start_method, start_methods, usable_cores
from .workers import Workers, pump

__all__ = ["Node", "run_node"]

TICK_SECONDS = 0.05  # the longest that the loop sleeps: workers are looked at as often
RETRY_SECONDS, MAX_RETRY_SECONDS = 0.1, 5.0  # pauses between connections, doubled each time, with jitter
DRAIN_SECONDS = 30.0  # for what runs; then it is the server's to give to others
WAKE_BYTES = 4096  # signals that came while the loop was busy, a byte each

log = logging.getLogger(__name__)


class SessionEnd(enum.Enum):
    """Why a connection is over, where nothing went wrong with it."""

    KILLED = "the cluster was killed"
    LEFT = "drained"
    RESTART = "the server restarts"


def run_node(
    host: str | None = None, port: int | None = None, username: str | None = None,
    secret_key: str | config.Secret | None = None, *,
    cpu_count: int | None = None, start_method: str | None = None, env_file: str | None = None,
) -> None:
    """Run a node until the cluster is killed or SIGTERM has drained it. Blocks; ends its workers in any case.

    In the main thread it handles SIGTERM and SIGCHLD meanwhile; in another one it cannot be drained.

    :param host, port, username, secret_key, env_file: as for `config.resolve`.
    :param cpu_count: how many workers, 1 to 65,535; by default the cores that this process may really use.
    :param start_method: "fork", "forkserver" or "spawn"; by default fork, or forkserver beside other threads.
    :raises ConfigurationError: a setting is missing or will not do.
    :raises AuthenticationError: the server refused this node before it had ever joined.
    :raises ProtocolError: what answers there is not an achilles server, and has never been one.
    """
    count = usable_cores() if cpu_count is None else cpu_count
    method = start_method or default_start_method(count_threads())
    if not isinstance(count, int) or not 1 <= count <= U16:
        raise ConfigurationError(f"cpu_count must be an int in 1..{U16}, not {count!r}")
    if method not in start_methods():
        known = ", ".join(start_methods())
        raise ConfigurationError(f"start_method must be one of {known}, not {method!r}")
    settings = config.resolve(host, port, username, secret_key, env_file=env_file, role="node")
    config.remove_from_environment()
    with contextlib.closing(Node(settings, count, method)) as node, node.signals():
        node.run()


class Node:
    """What outlives a connection: settings, selector, wake-up, back-off. For the thread that calls `run`."""

    def __init__(self, settings: Settings, cpu_count: int, start_method: str) -> None:
        check_multiprocess()
        self.settings = settings
        self.cpu_count = cpu_count
        self.start_method = start_method
        self.selector = selectors.DefaultSelector()
        self.wake, self._waker = socket.socketpair()  # a signal writes to the second, the loop reads the first
        self.woken = False  # since the last turn
        self.draining = False  # SIGTERM came
        self.joined = False  # ever
        self.delay = RETRY_SECONDS  # before the next connection
        self._session: Session | None = None
        self._key = auth.derive_key(settings.username, settings.secret.reveal())
        self._waits = False  # for a server that is not there, which was said
        for end in (self.wake, self._waker):
            end.setblocking(False)
        self.selector.register(self.wake, selectors.EVENT_READ, self._on_wake)

    @property
    def inherited(self) -> tuple[socket.socket, ...]:
        """What a forked worker must close."""
        return self.wake, self._waker

    def run(self) -> None:
        """Join the server, again and again, until this node is not wanted any more."""
        while True:
            try:
                end = self._connect_and_serve()
            except (AuthenticationError, ProtocolError) as e:
                if not self.joined:
                    raise
                if self.draining:
                    return
                log.warning("%s; trying again", e)
                self._read_anew()
            except (OSError, AchillesError) as e:
                self._say_once(e)
            else:
                log.info("%s", end.value)
                if end is not SessionEnd.RESTART:
                    return
            if self.draining:  # and the server is gone: there is nothing to come back for
                return
            self._pause()

    def greet(self, number: int, connections: int) -> None:
        """The server has welcomed this node, as its node `number`. Printed; a subclass may tell otherwise."""
        console.say(
            f"GREETING: Welcome! There are currently {connections} open connections.\n\n"
            f"Connected to achilles_server running at {self.settings.host}:{self.settings.port}\n"
            f"CLIENT_ID: {number}"
        )

    def look(self) -> None:
        """Called in each turn of the loop and each pause, every 50 ms at least; raising SystemExit ends this node."""

    def close(self) -> None:
        """Give the descriptors back."""
        self.selector.close()
        self.wake.close()
        self._waker.close()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM drains, SIGCHLD wakes the loop; as they were before, after. Nothing but in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers: dict[int, Any] = {signal.SIGTERM: self._on_sigterm}
        if hasattr(signal, "SIGCHLD"):
            handlers[signal.SIGCHLD] = _ignore  # a handler is what makes it write to the wake-up descriptor
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        wakeup = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _connect_and_serve(self) -> SessionEnd:
        host, port, username = self.settings.host, self.settings.port, self.settings.username
        try:
            link = channel.connect(host, port, auth.NODE, username, self._key)
        except AuthenticationError as e:
            raise AuthenticationError(
                f"{e}. Copy it to this machine (scp -p), then run: python -m {__package__} --env-file FILE"
            ) from None
        self._session = Session(self, link)
        try:
            return self._session.run()
        finally:
            self._session = None

    def _say_once(self, error: Exception) -> None:
        """The server is not there, or gone: a line now, and none until it was there again."""
        if self.joined:
            log.warning("lost the server: %s; connecting anew", error)
        elif not self._waits:
            self._waits = True
            log.warning("%s; waiting for it", error)

    def _pause(self) -> None:
        """Wait before the next connection, from half of what is due to all of it."""
        until = time.monotonic() + self.delay * (1 + random.random()) / 2
        self.delay = min(2 * self.delay, MAX_RETRY_SECONDS)
        while (left := until - time.monotonic()) > 0:
            self.look()
            for key, events in self.selector.select(min(left, TICK_SECONDS)):
                key.data(events)

    def _read_anew(self) -> None:
        """The secret may have been replaced meanwhile: take it from the file it came from."""
        if self.settings.env_file is not None:
            try:
                self.settings = config.read_again(self.settings, "node")
                self._key = auth.derive_key(self.settings.username, self.settings.secret.reveal())
            except ConfigurationError as e:  # perhaps half written: the next time, then
                log.warning("the secret stays what it was: %s", e)

    def _on_wake(self, events: int) -> None:
        self.woken = True
        with contextlib.suppress(BlockingIOError):
            self.wake.recv(WAKE_BYTES)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """The first one drains; the second, or one without a connection, ends this process as it stands."""
        if self._session is None or self.draining:
            raise SystemExit(128 + number if self.draining else 0)
        self.draining = True


class Session:
    """One connection to the server, and the workers that serve it: both end with it."""

    def __init__(self, node: Node, link: Channel) -> None:
        self._node = node
        self._channel = link
        self._workers: Workers | None = None  # from HELLO on
        self._end: SessionEnd | None = None  # what `run` will return
        self._drain_until = 0.0  # monotonic; 0 while it does not drain
        self._close_by = 0.0  # for the server to close, too; 0 while anything is owed
        self._handlers: dict[Kind, Callable[[Workers, Any], object]] = {
            Kind.JOB: Workers.declare, Kind.FUNCTION: Workers.keep, Kind.TASK: Workers.add,
            Kind.FORGET: lambda workers, body: workers.forget(body["function"]),
            Kind.RECALL: lambda workers, body: workers.recall(body["job"], body["number"]),
            Kind.CANCEL: lambda workers, body: workers.cancel(body["job"]),
            Kind.END: lambda workers, body: workers.end(body["job"]),
            Kind.CLOSE: lambda workers, body: workers.close_context(body["context"]),
        }

    def run(self) -> SessionEnd:
        """Serve until the connection is over; its workers are gone then. Raises why, if something went wrong."""
        self._channel.name = "server"
        self._channel.socket.setblocking(False)
        self._node.selector.register(self._channel.socket, selectors.EVENT_READ, self._on_server)
        self._channel.send(Kind.HELLO, channel.hello(self._node.cpu_count))
        try:
            while self._end is None:
                self._turn()
            return self._end
        except ProtocolError as e:
            self._complain(e)
            raise ServerUnreachable(f"it breaks the protocol: {e}") from e
        finally:
            if self._workers is not None:
                self._workers.stop()
            self._node.selector.unregister(self._channel.socket)
            self._channel.close()

    def _turn(self) -> None:
        """One turn of the loop: what came, then what is due, then what is to be written."""
        for key, events in self._node.selector.select(TICK_SECONDS):
            key.data(events)
        woken, self._node.woken = self._node.woken, False
        self._node.look()
        self._channel.tick()
        if self._workers is not None:
            self._workers.turn(woken)
        if self._node.draining:
            self._drain(time.monotonic())
        pump(self._node.selector, self._channel)

    def _on_server(self, events: int) -> None:
        if not events & selectors.EVENT_READ:
            return
        frames = self._channel.receive()
        if frames is None and not self._close_by:
            raise ServerUnreachable("it closed the connection")
        if frames is None:
            self._end = SessionEnd.LEFT
        for kind, body in frames or ():
            self._handle(kind, body)

    def _handle(self, kind: Kind, body: Any) -> None:
        if kind is Kind.HELLO:
            self._greet(body)
        elif kind is Kind.BYE:
            gone = SessionEnd.LEFT if self._node.draining else SessionEnd.RESTART
            self._end = SessionEnd.KILLED if body["reason"] == "killed" else gone
        elif kind is Kind.ERROR:
            raise ServerUnreachable(f"it ended the connection: {body['message']}")
        elif kind is not Kind.PING:
            if self._workers is None:
                raise ProtocolError(f"{kind.name} before HELLO")
            self._handlers[kind](self._workers, body)

    def _greet(self, body: dict[str, Any]) -> None:
        if self._workers is not None:
            raise ProtocolError("a second HELLO")
        node, number = self._node, body.get("client_id") or 0
        node.joined, node.delay = True, RETRY_SECONDS
        self._workers = Workers(
            node.cpu_count, node.start_method, node.selector, self._channel.send, node=number,
            inherited=(self._channel.socket, *node.inherited),
        )
        node.greet(number, body.get("connections") or 1)

    def _drain(self, now: float) -> None:
        """Say so and give back what no worker has; when nothing runs any more, close."""
        if self._workers is None:
            self._end = SessionEnd.LEFT
        elif not self._drain_until:
            self._drain_until = now + DRAIN_SECONDS
            self._workers.drain()
            self._channel.send(Kind.BYE, {"reason": "leaving"})
        elif not self._close_by:
            if not self._workers.busy or now > self._drain_until:
                self._channel.finish()
                self._close_by = now + channel.GOODBYE_SECONDS
        elif self._channel.wants_write:
            self._close_by = max(self._close_by, now + channel.GOODBYE_SECONDS)
        elif now > self._close_by:
            self._end = SessionEnd.LEFT

    def _complain(self, error: ProtocolError) -> None:
        """Tell the server what it did wrong, if it still listens."""
        self._channel.send(Kind.ERROR, {"code": "protocol", "message": str(error)[: TEXT_CHARS]})
        self._channel.finish()
        with contextlib.suppress(OSError):
            self._channel.flush()


def _ignore(number: int, frame: FrameType | None) -> None:
    """A signal whose only use is to wake the loop."""
