"""A node: it lends this machine's cores to a server, and comes back after it has lost the server.

The module knows one server and the node's workers, and no controller, and opens no letter. The node is one
blocking loop over one selector, without threads: so it can fork at any moment, and a stopped worker delays no other.

::

                       ┌──────────────── selector ────────────────┐
    server ◀═signed═▶ Channel ── Session ── Workers ── Channel ◀─▶ worker, one each

    run_node ─▶ connect ─▶ HELLO ─▶ turns ─┬─ lost: nothing is remembered; back-off, connect anew
                   ▲                       ├─ BYE killed: over
                   └── refused: an error ──┴─ SIGTERM: BYE leaving, RETURNED, the last answers, over
                       before the first join, tried again after it

Limits: `channel.py`'s for silence; 30 s for the chunks that run when the node drains.
"""

from __future__ import annotations

import logging
import random
import selectors
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from .. import config, console
from ..errors import AchillesError, AuthenticationError, ConfigurationError, ProtocolError, ServerUnreachable
from ..protocol import auth, connect
from ..protocol.channel import GOODBYE_SECONDS, Channel
from ..protocol.frames import U16, Kind
from .cores import check_start_method, count_threads, default_start_method, usable_cores
from .workers import LONG_SECONDS, LOOK_SECONDS, Workers, pump

__all__ = ["Node", "run_node"]

RETRY_SECONDS, MAX_RETRY_SECONDS = 0.1, 5.0  # pauses between connections, doubled each time, with jitter
DRAIN_SECONDS = 30.0  # for chunks that run; then the server gives them to other nodes

log = logging.getLogger(__name__)


def run_node(
    host: str | None = None, port: int | None = None, username: str | None = None,
    secret_key: str | config.Secret | None = None, *,
    cpu_count: int | None = None, start_method: str | None = None, env_file: str | None = None,
    encrypt: bool | None = None,
) -> None:
    """Run a node until the cluster is killed or SIGTERM has drained the node. Blocks; always ends its workers.

    In the main thread the node handles SIGTERM, SIGINT and SIGHUP. In another thread it cannot be drained.

    :param host, port, username, secret_key, env_file, encrypt: as for `config.resolve`.
    :param cpu_count: how many workers, 1 to 65,535; by default the cores that this process may use.
    :param start_method: "fork", "forkserver" or "spawn"; by default fork, or forkserver beside other threads.
    :raises ConfigurationError: a setting is missing or wrong.
    :raises AuthenticationError: the server refused this node, which had never joined.
    :raises ProtocolError: the peer is no achilles server, and this node had never joined.
    """
    count = usable_cores() if cpu_count is None else cpu_count
    if not isinstance(count, int) or not 1 <= count <= U16:
        raise ConfigurationError(f"cpu_count must be an int in 1..{U16}, not {count!r}")
    settings = config.resolve(host, port, username, secret_key, env_file=env_file, role="node", encrypt=encrypt)
    config.remove_from_environment()
    Node(settings, count, start_method or default_start_method(count_threads())).run()


class Node:
    """The state that outlives a connection: settings, selector, back-off. Only the thread in `run` uses it."""

    def __init__(self, settings: config.Settings, cpu_count: int, start_method: str) -> None:
        check_start_method(start_method)
        self.settings = settings
        self.cpu_count = cpu_count
        self.start_method = start_method
        self.selector = selectors.DefaultSelector()  # empty while there is no connection
        self.draining = False  # after SIGTERM
        self.joined = False
        self.delay = RETRY_SECONDS  # before the next connection

    def run(self) -> None:
        """Join the server, again and again, until the node is killed or drained.

        In the main thread, SIGTERM drains, and SIGINT and SIGHUP interrupt; afterwards the old handlers are back.
        """
        console.keep_freed_memory()
        with self.selector, console.signal_handlers(self._on_signal):
            self._join_until_the_end()

    def _join_until_the_end(self) -> None:
        while not self.draining:
            try:
                log.info("%s", self._connect_and_serve())
                return
            except (AuthenticationError, ProtocolError) as e:
                if not self.joined:
                    raise
                log.warning("%s; trying again", e)
                self._read_anew()
            except (OSError, AchillesError) as e:
                if self.delay == RETRY_SECONDS and not self.draining:  # one line until the server is back
                    log.warning("lost the server: %s; connecting anew" if self.joined else "%s; waiting for it", e)
            self._pause()

    def greet(self, number: int, connections: int) -> None:
        """Print the server's welcome to this node, its node `number`. A subclass may do otherwise."""
        console.say(
            f"GREETING: Welcome! There are currently {connections} open connections.\n\n"
            f"Connected to achilles_server running at {self.settings.host}:{self.settings.port}\n"
            f"CLIENT_ID: {number}"
        )

    def look(self) -> None:
        """Do nothing; a subclass may raise SystemExit to end the node. Every turn calls it, and each 50 ms at least."""

    def _on_signal(self, number: int, _: object) -> None:
        """The first SIGTERM drains. The second SIGTERM, or any without a connection, ends this process at once."""
        if number != signal.SIGTERM:
            raise KeyboardInterrupt
        if self.draining or not self.selector.get_map():
            raise SystemExit(128 + number if self.draining else 0)
        self.draining = True

    def _connect_and_serve(self) -> str:
        """Return why the node ends. Raise if its connection has ended, or none was made."""
        where = self.settings
        try:
            link = connect.connect(
                where.host, where.port, auth.NODE, where.username,
                auth.derive_key(where.username, where.secret.reveal()), encrypt=where.encrypt)
        except AuthenticationError as e:
            raise AuthenticationError(
                f"{e}. Copy it to this machine (scp -p), then run: python -m {__package__} --env-file FILE"
            ) from None
        return Session(self, link).run()

    def _pause(self) -> None:
        """Wait for half of the delay to all of it."""
        until = time.monotonic() + self.delay * (1 + random.random()) / 2
        self.delay = min(2 * self.delay, MAX_RETRY_SECONDS)
        while not self.draining and (left := until - time.monotonic()) > 0:
            self.look()
            threading.Event().wait(min(left, LOOK_SECONDS))

    def _read_anew(self) -> None:
        """Read the secret again from its file."""
        try:
            self.settings = config.read_again(self.settings, "node")
        except ConfigurationError as e:  # no file, or half a file, yet
            log.warning("the secret stays what it was: %s", e)


class Session:
    """One connection to the server, and its workers. Both end together."""

    def __init__(self, node: Node, link: Channel) -> None:
        self._node = node
        self._channel = link
        self._workers = workers = Workers(0, node.start_method, node.selector, link.send)  # none until HELLO
        self._end = ""  # the result of `run`
        self._drain_until = 0.0  # monotonic; 0 while the node does not drain
        self._tell_at = 0.0  # monotonic; the next PING with long chunks
        self._long: list[dict[str, Any]] = []  # the chunks of the last PING
        self._handlers: dict[Kind, Callable[[Any], object]] = {
            Kind.HELLO: self._greet, Kind.BYE: self._leave, Kind.ERROR: self._leave, Kind.PING: lambda body: None,
            Kind.JOB: workers.declare, Kind.TASK: workers.add,
            Kind.CANCEL: lambda batch: workers.cancel(batch.job, batch.first, batch.end),
            Kind.END: lambda batch: workers.end(batch.job),
            Kind.CLOSE: lambda body: workers.close_context(body["context"]),
        }

    def run(self) -> str:
        """Serve until the node shall end. Return the reason. Raise if the connection ended. End the workers."""
        self._channel.name = "server"
        self._channel.socket.setblocking(False)
        self._node.selector.register(self._channel.socket, selectors.EVENT_READ, self._on_server)
        self._channel.send(Kind.HELLO, connect.hello(self._node.cpu_count))
        try:
            self._on_server(selectors.EVENT_READ)  # TLS may have decrypted frames that came with WELCOME
            while not self._end:
                for key, events in self._node.selector.select(self._workers.look_at - time.monotonic()):
                    key.data(events)
                self._node.look()
                self._channel.tick()
                if self._node.draining:
                    self._drain(time.monotonic())
                self._workers.turn()
                self._tell_of_long_chunks(time.monotonic())
                pump(self._node.selector, self._channel)
            return self._end
        except ProtocolError as e:
            self._channel.complain(e)
            pump(self._node.selector, self._channel)
            raise ServerUnreachable(f"it breaks the protocol: {e}") from e
        finally:
            self._workers.stop()
            self._node.selector.unregister(self._channel.socket)
            self._channel.close()

    def _tell_of_long_chunks(self, now: float) -> None:
        """Once a second, send a PING with the chunks that have run for a second; once more if none is left."""
        if now >= self._tell_at:
            before, self._long = self._long, self._workers.long_chunks(now)
            self._tell_at = now + LONG_SECONDS
            if before or self._long:
                self._channel.send(Kind.PING, {"chunks": self._long}, ahead=True)

    def _on_server(self, events: int) -> None:
        received = self._channel.receive()
        if received is None:  # after BYE, too
            raise ServerUnreachable("it closed the connection")
        for kind, body in received:
            self._handlers[kind](body)

    def _leave(self, body: dict[str, Any]) -> None:
        if body.get("reason") != "killed":
            raise ServerUnreachable(f"it ended the connection: {body.get('message', 'it restarts')}")
        self._end = "the cluster was killed"

    def _greet(self, body: dict[str, Any]) -> None:
        if self._workers.count:
            raise ProtocolError("a second HELLO")
        self._node.joined, self._node.delay = True, RETRY_SECONDS
        self._workers.count, self._workers.node = self._node.cpu_count, body.get("client_id") or 0
        self._node.greet(self._workers.node, body.get("connections") or 1)

    def _drain(self, now: float) -> None:
        """Say BYE, give back the chunks that have not begun, and close when no chunk runs."""
        if not self._drain_until:
            self._drain_until = now + DRAIN_SECONDS
            self._channel.send(Kind.BYE, {"reason": "leaving"})  # first: else new batches follow each RETURNED
        self._workers.drain()
        if now > self._drain_until:
            self._end = "drained"
        elif not self._workers.busy and not self._channel.wants_write:
            self._channel.finish()
            self._drain_until = min(self._drain_until, now + GOODBYE_SECONDS)  # the server has closed by then
