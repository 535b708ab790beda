"""The server: where nodes and controllers meet.

This module listens, gives places, authenticates, and reads each connection; what the frames mean
is `exchange.py`'s. The server opens no letter: it imports neither pickle nor dill, and a test says so.

::

    accept ─▶ a place (64) ─▶ handshake, 5 s ─▶ Peer ─▶ frames ─▶ Exchange ─▶ outboxes of other peers
    serving thread   handler thread of the connection ─────────────┘             │
                     writer thread of each connection:  sends ◀──────────────────┘

Threads: the one that calls `serve_forever` accepts; each connection has a handler thread, which
reads, and a writer. A reader never waits for another connection's writer: it queues. `_places_lock`
guards the places of those who are not authenticated yet; no other lock is taken under it.

Not for a network where others may read what is computed: nothing is encrypted (README, Trust).
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import logging
import os
import queue
import secrets
import signal
import socket
import socketserver
import threading
import time
from collections import Counter
from typing import Any

from .. import config, console
from ..config import Settings
from ..errors import AddressError, ProtocolError
from ..protocol import auth, channel
from ..protocol.channel import Channel
from .exchange import Exchange, Peer

__all__ = ["Server", "run_server"]

BACKLOG = 1024  # a lab that starts 150 clients at once must not lose any (5 lost 107 of 150)
PLACES = 64  # connections that are not authenticated yet
POLL_SECONDS = 0.2  # how soon serve_forever sees that it shall end
HANDSHAKE_SECONDS = 5.0  # for all of it, whatever arrives
REFUSAL_SECONDS = 1.0  # a guess costs the guesser this, and its place meanwhile
PLACE_SECONDS = 0.02  # ... and how often who waits so looks whether it still has a place
KILLED_SECONDS = 10.0  # how long those who come back after `kill_cluster` are told
READ_AGAIN = "read again"  # among the reasons to end: this one is none
JOIN_SECONDS = 2.0  # for a connection's threads, when the server ends
NO_FILES_SECONDS = 0.2  # a pause where accept has no descriptor left: it would be called again at once
CONNECTIONS, SPARE_FILES = 10_000, 8  # at most, and what the process needs besides connections

log = logging.getLogger(__name__)


class Server(socketserver.ThreadingTCPServer):
    """A server that listens at `settings.host` (or `bind`) and `settings.port`; port 0 takes any free one.

    `run()` blocks until `end(reason)`, from any thread, a signal handler's too. Deriving the
    keys takes some 80 ms. Raises AddressError where it cannot listen.
    """

    allow_reuse_address = os.name == "posix"  # elsewhere that option lets another process take the port over
    daemon_threads = True  # our own set of peers is closed and joined instead, with a deadline
    request_queue_size = BACKLOG

    def __init__(self, settings: Settings, bind: str | None = None) -> None:
        from .. import __version__

        self.settings = settings
        self._bind = bind
        self._user = settings.username.encode()
        self._keys = _derive(settings)
        self._decoys = [secrets.token_bytes(32), secrets.token_bytes(32)]  # for unknown users: the same work
        self._reasons: queue.SimpleQueue[str] = queue.SimpleQueue()  # why to end; a signal handler may put
        self._exchange = Exchange(__version__, kill=lambda: self.end("killed"))
        self._ending = threading.Event()
        self._places_lock = threading.Lock()
        self._places: dict[socket.socket, str] = {}  # connections before authentication, the oldest first
        self._readers: set[threading.Thread] = set()  # handler threads that have not ended
        host = bind or settings.host
        try:
            found = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, *_, address = found[0]
            super().__init__(address[:2], _Handler)  # type: ignore[arg-type]
        except OSError as e:
            error = AddressError(_explain(e, host, settings.port))
            error.errno = e.errno
            raise error from e

    @property
    def address(self) -> tuple[str, int]:
        """The host as it was given, and the port at which it listens, which is never 0."""
        return self.settings.host, self.server_address[1]

    def run(self) -> None:
        """Serve until `end` is called; then say BYE to all, and close everything. Blocks."""
        ender = threading.Thread(target=self._end_when_told, name="achilles-ender", daemon=True)
        ender.start()
        try:
            self.serve_forever(POLL_SECONDS)
        finally:
            self.end("restart")
            ender.join(KILLED_SECONDS + 2 * JOIN_SECONDS)
            self.server_close()

    def end(self, reason: str) -> None:
        """Let `run` return. `restart`: peers come back. `killed`: they end, and for ten seconds so does who comes."""
        self._reasons.put(reason)

    def read_again(self) -> None:
        """Take the secrets that the configuration file has now, soon; connections stay. A signal handler may call."""
        self._reasons.put(READ_AGAIN)

    def _end_when_told(self) -> None:
        """The ender thread: `shutdown` would wait for ever in the thread that serves, and in a signal handler."""
        while (reason := self._reasons.get()) == READ_AGAIN:
            self._read_again()
        peers = self._exchange.say_goodbye(reason)
        self._ending.set()
        if reason == "killed":
            self._wait_for_another_reason(KILLED_SECONDS)
            peers = self._exchange.say_goodbye(reason)
        self.shutdown()
        deadline = time.monotonic() + JOIN_SECONDS
        with self._places_lock:
            for sock in self._places:
                _shut_down(sock)
        for peer in peers:
            peer.channel.wait_written(deadline - time.monotonic())
            peer.channel.close()
        for reader in list(self._readers):
            reader.join(max(deadline - time.monotonic(), 0))

    def _read_again(self) -> None:
        """Whatever is wrong with the file, the secrets of before are good still, and the server serves."""
        try:
            settings = config.read_again(self.settings, "server", self._bind)
            self._keys = _derive(settings)  # at once for who comes next; a handshake under way has the old ones
        except Exception as e:
            log.error("the secrets stay what they were: %s", e)
            return
        what = "as it was" if settings.secret == self.settings.secret else "a new one"
        more = ", the previous one good as well" if settings.previous else ", no other one good"
        self.settings = settings
        log.info("%s was read again: the secret is %s%s", settings.env_file, what, more)

    def _wait_for_another_reason(self, seconds: float) -> None:
        """Whoever has killed the cluster may be in a hurry to end this process, too."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while self._reasons.get(timeout=max(deadline - time.monotonic(), 0)) in ("killed", READ_AGAIN):
                pass

    # Accepting, in the serving thread.

    def get_request(self) -> tuple[socket.socket, Any]:
        """accept(); where there is no descriptor left, pause, since the listener stays readable."""
        try:
            return super().get_request()
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                log.error("cannot accept a connection: %s", e.strerror)
                threading.Event().wait(NO_FILES_SECONDS)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the connection a place, at the cost of whoever holds most of them, and a thread."""
        with self._places_lock:
            self._places[request] = client_address[0]
            if len(self._places) > PLACES:
                most = Counter(self._places.values()).most_common(1)[0][0]
                oldest = next(sock for sock, address in self._places.items() if address == most)
                del self._places[oldest]
                _shut_down(oldest)
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread to be had
            with self._places_lock:
                self._places.pop(request, None)
            raise

    def handle_error(self, request: object, client_address: object) -> None:
        """An error of our own in a handler thread: to the log, with its traceback."""
        log.exception("a connection failed: %s", client_address)

    # One connection, in its handler thread.

    def serve_connection(self, sock: socket.socket, address: str) -> None:
        """Authenticate a client, then read its frames until it is gone."""
        self._readers.add(threading.current_thread())
        try:
            self._authenticate(sock, address)
        finally:
            self._readers.discard(threading.current_thread())

    def _authenticate(self, sock: socket.socket, address: str) -> None:
        try:
            claimed, keys = channel.answer_claim(sock, self._find_keys, time.monotonic() + HANDSHAKE_SECONDS)
            if keys is None:
                log.warning("refused %s as user %r", address, claimed.user.decode(errors="replace"))
                self._wait_refused(sock)
            sock.sendall(keys.server_proof if keys else auth.REFUSAL)
        except (OSError, ProtocolError) as e:
            log.info("%s did not authenticate: %s", address, e)
            return
        finally:
            with self._places_lock:
                self._places.pop(sock, None)
        if keys is not None:
            self._serve_peer(sock, claimed, keys, address)

    def _wait_refused(self, sock: socket.socket) -> None:
        """What a guess costs. Who has lost its place waits no longer: its thread and descriptor are for others."""
        until = time.monotonic() + REFUSAL_SECONDS
        while sock in self._places and (left := until - time.monotonic()) > 0:
            if self._ending.wait(min(left, PLACE_SECONDS)):
                return

    def _serve_peer(self, sock: socket.socket, claimed: auth.Claim, keys: auth.Keys, address: str) -> None:
        sock.settimeout(channel.TICK_SECONDS)
        channel.set_options(sock)
        link = Channel(sock, claimed.role.decode() + "S", (keys.server_data, keys.client_data))
        peer = Peer(link, claimed.role, claimed.user.decode(errors="replace"), address)
        link.start_writer()
        self._exchange.enter(peer, _most_connections())
        try:
            why = link.run(lambda frame: self._exchange.handle(peer, frame), self._exchange.push)
        finally:
            self._exchange.leave(peer)
            link.close()
        log.info("%s left: %s", link.name, why)

    def _find_keys(self, claimed: auth.Claim) -> list[bytes]:
        return self._keys if hmac.compare_digest(claimed.user, self._user) else self._decoys


def run_server(
    host: str | None = None, port: int | None = None, username: str | None = None,
    secret_key: config.SecretKey = None, *, bind: str | None = None, env_file: config.EnvFile = None,
) -> int:
    """Run a server in this thread until SIGTERM, Ctrl-C, or `kill_cluster`; returns its exit status.

    On SIGHUP it takes the secrets anew from the file they came from, and goes on. It ends on SIGHUP where that says
    that the terminal in which it was started was closed.

    :param host: the address under which nodes and callers reach it, and at which it listens.
    :param port: 0..65535, 9999 where none is given; 0 takes any free one.
    :param bind: listen at this address instead, such as 0.0.0.0.
    What is None is looked for in the environment and the file, then asked for on a terminal.
    Prints two lines when it listens. Signals are handled in the main thread alone.
    :raises ConfigurationError: something is missing or malformed.
    :raises AddressError: it cannot listen there.
    """
    settings = config.resolve(host, port, username, secret_key, env_file=env_file, role="server", bind=bind)
    server = Server(settings, bind)
    told: list[int] = []

    def on_signal(number: int, _: object) -> None:
        if told:
            os._exit(128 + number)  # at once: other threads may hold whatever an orderly end would need
        told.append(number)
        server.end("restart")

    # Before the lines: whoever waits for them may signal at once.
    with console.signal_handlers(on_signal, server.read_again):
        console.say("ALERT: achilles_server initiated at {}:{}".format(*server.address))
        console.say("Listening for connections...")
        server.run()
    return 130 if signal.SIGINT in told else 0


class _Handler(socketserver.BaseRequestHandler):
    """socketserver's way to a thread per connection; all it does is the server's."""

    server: Server

    def handle(self) -> None:
        threading.current_thread().name = f"achilles-reader {self.client_address[0]}"
        self.server.serve_connection(self.request, self.client_address[0])


def _shut_down(sock: socket.socket) -> None:
    """Let its reader find an end of file."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _derive(settings: Settings) -> list[bytes]:
    """K of the secret, and of the previous one, or of one that nobody has: two proofs are computed always."""
    previous = settings.previous or config.Secret(secrets.token_urlsafe())
    return [auth.derive_key(settings.username, secret.reveal()) for secret in (settings.secret, previous)]


def _most_connections() -> int:
    """How many peers fit well below this process's limit of open files."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return CONNECTIONS
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return min(CONNECTIONS, max(1, (limit - SPARE_FILES) * 3 // 4)) if limit != resource.RLIM_INFINITY else CONNECTIONS


def _explain(e: OSError, host: str, port: int) -> str:
    """Why the server cannot listen, and what to do."""
    where = f"the server cannot listen at {host}:{port}"
    if e.errno == errno.EADDRINUSE:
        return f"{where}: another program does; end it, or choose another port (port 0 takes any free one)"
    if e.errno == errno.EACCES:
        return f"{where}: ports below 1024 are the system's; choose another, such as 9999"
    return f"{where}: {e.strerror or e}; is this an address of this machine? --bind 0.0.0.0 listens at all of them"
