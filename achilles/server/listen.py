"""The server: it listens, gives places and threads, authenticates clients, and reads each connection.

`exchange.py` gives the frames their meaning. The server opens no letter: it imports no pickle or dill.

::

    accept ─▶ a place (64) ─▶ handshake, 5 s ─▶ Peer ─▶ frames ─▶ Exchange ─▶ outboxes of other peers
    accepter thread  reader thread of the connection ─────────────┘             │
                     writer thread of each connection:  sends ◀──────────────────┘

Threads: the thread in `run` waits for the reason to end, and closes all. The accepter is the loop of a
`socketserver.ThreadingTCPServer`. It gives each connection a place, then a reader thread. Each connection has a writer,
too. A reader queues frames, so it never waits for another connection's writer.
`_places_lock` guards the places of connections that are not authenticated yet. A thread that holds it takes no other
lock, writes no log and does not wait.

Without ENCRYPT=yes, others in the network may read the data (docs/security.md).
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
from ..errors import AddressError, AuthenticationError, ProtocolError
from ..protocol import auth, connect
from .exchange import Exchange, Peer

__all__ = ["Server", "run_server"]

BACKLOG = 1024  # a lab that starts 150 clients at once must lose none (a backlog of 5 lost 107)
PLACES = 64  # connections that are not authenticated yet
POLL_SECONDS = 0.2  # how soon accepting ends; how soon Windows sees Ctrl-C
HANDSHAKE_SECONDS = 5.0  # for the whole handshake
REFUSAL_SECONDS = 1.0  # each guess takes so long, and holds its place
KILLED_SECONDS = 10.0  # after `kill_cluster`, for peers that come back
READ_AGAIN = "read again"  # in the queue of the reasons to end, but no reason to end
JOIN_SECONDS = 2.0  # for a connection's threads, when the server ends
NO_ROOM_SECONDS = 0.2  # a pause if no descriptor or thread is left: accept would fail again at once
CONNECTIONS = 2_000  # at most: no test had more
SPARE_FILES = 8  # descriptors besides connections
REASONS = {  # why the server cannot listen, with remedies
    errno.EADDRINUSE: "another program does; end it, or choose another port (port 0 takes any free one)",
    errno.EACCES: "ports below 1024 are the system's; choose another, such as 9999",
}

log = logging.getLogger(__name__)


class Server:
    """A server that listens at `settings.host` (or `bind`) and `settings.port`; port 0 takes any free port.

    `run()` blocks until `end(reason)`. Any thread and any signal handler may call `end`. To derive the keys takes 40 to
    80 ms. Raises AddressError if the server cannot listen.
    """

    def __init__(self, settings: config.Settings, bind: str | None = None) -> None:
        self._bind = bind
        self._use(settings)
        self._decoys = [secrets.token_bytes(32), secrets.token_bytes(32)]  # the same work for unknown users
        self._reasons: queue.SimpleQueue[str] = queue.SimpleQueue()  # reasons to end; a signal handler may put
        self._exchange = Exchange(kill=lambda: self.end("killed"))
        self._readers: set[threading.Thread] = set()  # reader threads that have not ended
        self._places_lock = threading.Lock()
        # Connections before authentication, the oldest first: the address, and an event for the loss of the place.
        self._places: dict[socket.socket, tuple[str, threading.Event]] = {}
        self._listener = _Listener(bind or settings.host, settings.port, self)
        self.address = settings.host, self._listener.server_address[1]  # the port is never 0

    def run(self) -> None:
        """Serve until `end`. Then say BYE to all peers, and close everything. Blocks."""
        console.keep_freed_memory()
        accepter = threading.Thread(
            target=self._listener.serve_forever, args=(POLL_SECONDS,), name="achilles-accepter", daemon=True)
        accepter.start()
        reason = self._wait_for_reason()
        if reason == "killed":
            self._exchange.say_goodbye(reason)
            self._wait_for_reason(reason, KILLED_SECONDS)  # a person may end this process sooner
        self._listener.shutdown()
        accepter.join(JOIN_SECONDS)
        self._listener.server_close()
        self._close_all(reason)

    def end(self, reason: str) -> None:
        """Let `run` return. `restart`: peers come back. `killed`: peers end, and so do peers of the next 10 s.

        With READ_AGAIN, `run` reads the secrets from the file, and goes on; connections stay.
        """
        self._reasons.put(reason)

    # In the thread of `run`.

    def _use(self, settings: config.Settings) -> None:
        """Use these settings from the next client on."""
        given = [each for each in (settings.secret, settings.previous) if each is not None]
        keys = [auth.derive_key(settings.username, each.reveal()) for each in given]
        self._keys = [*keys, secrets.token_bytes(32)][:2]  # always two: the same work
        self._tls_keys = dict(auth.tls_key(settings.username, key) for key in self._keys) if settings.encrypt else None
        self.settings = settings

    def _wait_for_reason(self, known: str = "", seconds: float = threading.TIMEOUT_MAX) -> str:
        """Return the next reason to end but `known`; `known` when the time is over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._exchange.tick(time.monotonic())
            with contextlib.suppress(queue.Empty):
                reason = self._reasons.get(timeout=POLL_SECONDS)
                if reason == READ_AGAIN:
                    self._read_again()
                elif reason != known:
                    return reason
        return known

    def _read_again(self) -> None:
        """Read the secrets from the file. If the file is bad, the old secrets stay good."""
        before = self.settings
        try:
            self._use(config.read_again(before, "server", self._bind))
        except Exception as e:
            log.error("the secrets stay as they were: %s", e)
        else:
            new = "as it was" if self.settings.secret == before.secret else "a new one"
            more = "the previous one good as well" if self.settings.previous else "no other one good"
            log.info("%s was read again: the secret is %s, %s", before.env_file, new, more)

    def _close_all(self, reason: str) -> None:
        peers = self._exchange.say_goodbye(reason)
        deadline = time.monotonic() + JOIN_SECONDS
        with self._places_lock:
            for sock, (_, lost) in self._places.items():
                _take_away(sock, lost)
        for peer in peers:
            peer.channel.wait_written(deadline - time.monotonic())
            peer.channel.close()
        for reader in list(self._readers):
            reader.join(max(deadline - time.monotonic(), 0))

    # In the accepter's thread.

    def admit(self, sock: socket.socket, address: str) -> tuple[str, threading.Event]:
        """Give a client a place. If all places are taken, the address with most places loses its oldest.

        Return the client: its address, and the event for the loss of its place.
        """
        with self._places_lock:
            client = self._places[sock] = address, threading.Event()
            if len(self._places) > PLACES:
                most = Counter(held for held, _ in self._places.values()).most_common(1)[0][0]
                oldest = next(each for each, (held, _) in self._places.items() if held == most)
                _take_away(oldest, self._places.pop(oldest)[1])
        return client

    def dismiss(self, sock: socket.socket) -> None:
        """Free the client's place, if the client still has it. Any thread."""
        with self._places_lock:
            self._places.pop(sock, None)

    # In a connection's reader thread.

    def serve(self, sock: socket.socket, client: tuple[str, threading.Event], _: object) -> None:
        """Authenticate a client, then read its frames until it is gone. The listener closes the socket.

        :param client: see `admit`. A client that loses its place loses its thread, too.
        """
        address, lost = client
        threading.current_thread().name = f"achilles-reader {address}"
        self._readers.add(threading.current_thread())
        try:
            connect.set_options(sock)
            link, role, user = connect.accept(
                sock, self._find_keys, time.monotonic() + HANDSHAKE_SECONDS, self._tls_keys,
                hold=lambda: lost.wait(REFUSAL_SECONDS))
            self.dismiss(sock)
            self._serve_peer(Peer(link, role, user.decode(errors="replace"), address))
        except AuthenticationError as e:
            log.warning("refused %s: %s", address, e)
        except (OSError, ProtocolError) as e:
            log.info("%s did not authenticate: %s", address, e)
        finally:
            self.dismiss(sock)
            self._readers.discard(threading.current_thread())

    def _find_keys(self, user: bytes) -> list[bytes]:
        return self._keys if hmac.compare_digest(user, self.settings.username.encode()) else self._decoys

    def _serve_peer(self, peer: Peer) -> None:
        peer.channel.start_writer()
        self._exchange.enter(peer, _most_connections())
        try:
            why = peer.channel.run(lambda frame: self._exchange.handle(peer, frame), self._exchange.push)
        finally:
            self._exchange.leave(peer)
            peer.channel.close()
        log.info("%s left: %s", peer.channel.name, why)


def run_server(
    host: str | None = None, port: int | None = None, username: str | None = None,
    secret_key: config.SecretKey = None, *, bind: str | None = None, env_file: config.EnvFile = None,
    encrypt: bool | None = None,
) -> int:
    """Run a server in this thread until SIGTERM, Ctrl-C, or `kill_cluster`. Return its exit status.

    On SIGHUP the server reads the secrets again from their file, and goes on. If SIGHUP says that the terminal of its
    start was closed, the server ends.

    :param host: nodes and callers reach the server at this address; the server listens there.
    :param port: 0..65535, 9999 by default; 0 takes any free port.
    :param bind: listen at this address instead, such as 0.0.0.0.
    :param encrypt: by TLS; nodes and callers must do the same.
    A setting that is None comes from the environment or the file; else a person on a terminal is asked.
    Prints two lines when it listens. Only the main thread handles signals.
    :raises ConfigurationError: a setting is missing or malformed.
    :raises AddressError: the server cannot listen there.
    """
    settings = config.resolve(
        host, port, username, secret_key, env_file=env_file, role="server", bind=bind, encrypt=encrypt)
    server = Server(settings, bind)
    told: list[int] = []

    def on_signal(number: int, _: object) -> None:
        if told:
            os._exit(128 + number)  # other threads may hold the locks that an orderly end needs
        told.append(number)
        server.end("restart")

    # A program that waits for the lines may signal at once.
    with console.signal_handlers(on_signal, lambda: server.end(READ_AGAIN)):
        console.say("ALERT: achilles_server initiated at {}:{}\nListening for connections...".format(*server.address))
        server.run()
    return 130 if signal.SIGINT in told else 0


class _Listener(socketserver.ThreadingTCPServer):
    """Accepts clients. It pauses if no descriptor or thread is left."""

    allow_reuse_address = os.name == "posix"  # elsewhere another process could take the port over
    daemon_threads = True  # the server joins its readers itself, with a deadline
    request_queue_size = BACKLOG

    def __init__(self, host: str, port: int, server: Server) -> None:
        """Listen. AddressError, with a remedy, if that fails."""
        self._server = server
        try:
            (self.address_family, *_, address), *_ = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            super().__init__(address[:2], server.serve)  # type: ignore[arg-type]
        except OSError as e:
            reason = REASONS.get(e.errno or 0, f"{e.strerror or e}; is this an address of this machine? --bind "
                                               "0.0.0.0 listens at all of them")
            error = AddressError(f"the server cannot listen at {host}:{port}: {reason}")
            error.errno = e.errno
            raise error from e

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a client, and give it a place."""
        try:
            sock, address = super().get_request()
        except OSError as e:
            log.error("cannot accept a connection: %s", e)
            threading.Event().wait(NO_ROOM_SECONDS)
            raise
        return sock, self._server.admit(sock, address[0])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error of a reader thread, or the lack of a thread. Then pause as well."""
        self._server.dismiss(request)
        log.exception("a connection failed: %s", client_address[0])
        threading.Event().wait(NO_ROOM_SECONDS)


def _take_away(sock: socket.socket, lost: threading.Event) -> None:
    """End a client's handshake: its reader finds an end of file."""
    lost.set()
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _most_connections() -> int:
    """Return how many peers fit well below this process's limit of open files."""
    limit = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1  # -1: no limit, as on Windows
    return CONNECTIONS if limit < 0 else min(CONNECTIONS, max(1, (limit - SPARE_FILES) * 3 // 4))
