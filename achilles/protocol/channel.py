"""An authenticated connection: an outbox of frames on one side, a FrameReader on the other.

Knows sockets, keys, heartbeats and the order of frames; knows nothing of jobs.
It is driven in one of two ways, by the same methods:

::

              any thread                    who pushes, the writer thread, or the loop's turn
    send ───▶ outbox (ahead │ queue) ─flush─▶ encode, tag ─sendmsg─▶ socket
                                       reader thread, or the loop's turn
    frames ◀── FrameReader ◀─ check ◀─receive── recv_into ◀──────────┘

- *Threads* (server, controller): `start_writer()`, and one thread calls `run(handle)`.
  The socket has a timeout of a second, so that both look up from it. Who has queued
  frames may `push` them: a few quick ones leave at once, without a switch of threads.
- *A loop* (node, and its end of each worker's socket pair): the socket does not
  block; the loop calls `receive()` and `flush()` when the selector says so, and `tick()`.

`_lock` guards the outbox and the closing flags, and is held for no system
call. `_writing` is held by whoever writes, between threads, and guards `_parts`,
the tagger and the descriptor; only the writer thread and `close` wait for it.
`_reader` is the reader's own. Rows of the same
kind and job that wait at the end of the outbox leave as one frame: this is what
makes few frames of many slices (PROTOCOL.md, sections 7 and 9).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import secrets
import socket
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import AchillesError, AuthenticationError, ProtocolError, ServerUnreachable
from . import auth, frames
from .frames import Buffer, Frame, FrameReader, Kind, Rows

__all__ = [
    "HEARTBEAT_SECONDS", "PYTHON", "SILENCE_SECONDS", "Channel", "SentFunctions", "answer_claim", "connect", "hello",
    "set_options",
]

HEARTBEAT_SECONDS = 5.0  # a quarter of the silence: three may be lost
SILENCE_SECONDS = 20.0  # longer than a garbage collection, a suspended laptop's lid or a route's flap
TRICKLE_BYTES = 1024  # in the middle of a frame fewer than this in SILENCE_SECONDS are silence: heartbeats are 168
GOODBYE_SECONDS = 2.0  # how long a closing side reads on after it has shut down writing
TICK_SECONDS = 1.0  # how often a blocked thread looks up from its socket
CONNECT_SECONDS = 10.0  # for the connection and the handshake together
RETRY_SECONDS = 0.2  # after a server had no place for us: this much, with jitter
FUNCTIONS_BYTES = 256 << 20  # functions kept by a receiver although no job uses them
WRITE_BYTES = 256 << 10  # frames gathered for one sendmsg: beyond, an urgent one would wait
FULL = (-1, -1, -1)  # an entry of the outbox that takes no further rows
PUSH_BYTES = 64 << 10  # at most are written by who pushes them: more take longer than a switch of threads
WRITE_PARTS = 512  # well under IOV_MAX (1,024 on Linux, 16 at the least by POSIX: then sendmsg is called again)

log = logging.getLogger(__name__)


class Channel:
    """One connection after its handshake. `link` is what it reads: "CS" is a server that hears a controller."""

    def __init__(
        self, sock: socket.socket, link: str, keys: tuple[bytes, bytes] | None = None,
        letter_limit: int = frames.LETTER_LIMIT_BYTES,
    ) -> None:
        self.socket = sock
        self.name = ""  # in the log; the role gives it
        self.last_heard = self.last_written = time.monotonic()
        checker = auth.Checker(keys[1]).check if keys else None
        self._writing = threading.Lock()  # held by who writes
        self._tagger = auth.Tagger(keys[0]) if keys else None  # with `_writing`
        self._reader = FrameReader(link, checker, letter_limit)  # the reader's own
        self._trickled = 0  # bytes since last_heard; the reader's own
        self._parts: list[memoryview] = []  # encoded and not written yet; with `_writing`
        self._lock = threading.Lock()  # guards all below
        self._ready = threading.Condition(self._lock)
        self._ahead: deque[tuple[Kind, dict[str, Any]]] = deque()  # PING, CANCEL, RECALL
        self._queue: deque[tuple[Kind, dict[str, Any] | list[Rows]]] = deque()
        self._room: tuple[int, ...] = FULL  # rows, short bytes, long bytes that the last entry may still take
        self._finishing = False  # write what is queued, then shut down writing
        self._shut = False  # ... which was done
        self._closed = False
        self._writer: threading.Thread | None = None

    # The outbox: any thread.

    def send(self, kind: Kind, body: dict[str, Any] | Rows, *, wake: bool = True) -> None:
        """Queue a frame behind the others. Never blocks; after `finish` or `abort` it is dropped.

        Without `wake` the writer thread is not told, because `push` will be called.
        """
        with self._lock:
            if self._finishing or self._closed:
                return
            if isinstance(body, Rows):
                self._append_rows(kind, body)
            else:
                self._queue.append((kind, body))
            if wake:
                self._ready.notify()

    def push(self) -> None:
        """Write in this thread what is queued, if it is little and the socket takes it at once.

        The rest is the writer thread's. Never blocks, nor fails for what is the other side's. Any thread.
        """
        if not self.wants_write:
            return
        held = False
        try:
            held = hasattr(os, "writev") and self._writing.acquire(blocking=False)  # not on Windows
            if held:
                self._write_little()
        except Exception:  # as in the writer: half a frame, or one that is lost, must not be followed by others
            log.exception("%s: writing failed", self.name)
            self.abort()
        except BaseException:  # Ctrl-C in the caller: the connection is made anew
            self.abort()
            raise
        finally:
            if held:
                self._writing.release()
        if self.wants_write:
            with self._lock:
                self._ready.notify()

    def send_ahead(self, kind: Kind, body: dict[str, Any]) -> None:
        """Queue a frame before all that are not in writing yet."""
        with self._lock:
            if not (self._finishing or self._closed):
                self._ahead.append((kind, body))
                self._ready.notify()

    def drop_tasks(self, job: int) -> None:
        """Take a cancelled job's unwritten TASKs out of the outbox."""
        with self._lock:
            kept = [
                entry for entry in self._queue
                if not (entry[0] is Kind.TASK and isinstance(entry[1], list) and entry[1][0].job == job)
            ]
            self._queue = deque(kept)
            self._room = FULL

    @property
    def wants_write(self) -> bool:
        """Whether anything waits to be written."""
        return bool(self._parts or self._ahead or self._queue) or (self._finishing and not self._shut)

    def finish(self, reason: str | None = None) -> None:
        """Say BYE (with a reason), let the outbox be written, then shut down writing. Never blocks."""
        with self._lock:
            if reason and not (self._finishing or self._closed):
                self._queue.append((Kind.BYE, {"reason": reason}))
            self._finishing = True
            self._ready.notify()

    def wait_written(self, timeout: float) -> None:
        """Block until the writer thread has written all and ended, `timeout` seconds at most. After `finish`."""
        if self._writer is not None and timeout > 0:
            self._writer.join(timeout)

    def abort(self) -> None:
        """End the connection at once; both threads return. Any thread, any number of times."""
        with self._lock:
            self._closed = True
            self._ready.notify()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Abort, wait for the writer thread (2 s at most), and give the descriptor back. Not from the writer."""
        self.abort()
        if self._writer is not None:
            self._writer.join(GOODBYE_SECONDS)
        held = self._writing.acquire(timeout=GOODBYE_SECONDS)  # a descriptor that is closed may be another's at once
        self.socket.close()
        if held:
            self._writing.release()

    # The writer.

    def start_writer(self) -> None:
        """Start the thread that writes the outbox and sends heartbeats. `close` joins it."""
        self._writer = threading.Thread(target=self._write_loop, name=f"achilles-writer {self.name}", daemon=True)
        self._writer.start()

    def flush(self) -> bool:
        """Write what the socket takes: one sendmsg. True if nothing is left to write now."""
        if not self._parts:
            self._gather()
        if not self._parts:
            if self._finishing and not self._shut:
                self._shut = True
                self.socket.shutdown(socket.SHUT_WR)
            return True
        try:
            written = _send_parts(self.socket, self._parts)
        except (BlockingIOError, TimeoutError):
            return False
        self.last_written = time.monotonic()
        _advance(self._parts, written)
        return not self.wants_write

    def _write_little(self) -> None:
        """One writev, if that is enough. Needs `_writing`."""
        if not self._parts:
            self._gather()
        if 0 < sum(map(len, self._parts)) <= PUSH_BYTES and not self._closed:
            with contextlib.suppress(OSError):  # full, or gone: the writer sees the same, and knows what to do
                _advance(self._parts, os.writev(self.socket.fileno(), self._parts))
                self.last_written = time.monotonic()

    def tick(self) -> None:
        """Queue a heartbeat where one is due; ServerUnreachable after too long a silence of the peer."""
        now = time.monotonic()
        if now - self.last_heard > SILENCE_SECONDS:
            raise ServerUnreachable(f"no byte came for {SILENCE_SECONDS:.0f} s")
        if now - self.last_written > HEARTBEAT_SECONDS and not self.wants_write:
            self.send_ahead(Kind.PING, {})

    def _write_loop(self) -> None:
        try:
            while self._wait_for_work():
                with self._writing:
                    self.flush()
        except OSError as e:  # the reader's socket ends, too, but first it reads why: an ERROR, a BYE
            log.debug("%s: writing ended: %s", self.name, e)
            with self._lock:
                self._finishing = self._shut = True
        except Exception:  # such as a MemoryError: half a connection must not live on
            log.exception("%s: writing failed", self.name)
            self.abort()

    def _wait_for_work(self) -> bool:
        """Block until there is something to write; False when there will be nothing more."""
        with self._lock:
            while not self.wants_write:
                if self._closed or self._finishing:
                    return False
                quiet = time.monotonic() - self.last_written
                if quiet >= HEARTBEAT_SECONDS:
                    self._ahead.append((Kind.PING, {}))
                else:
                    self._ready.wait(HEARTBEAT_SECONDS - quiet)
            return not self._closed

    def _gather(self) -> None:
        """Encode and tag queued frames for one sendmsg."""
        size = 0
        while size < WRITE_BYTES and len(self._parts) < WRITE_PARTS:
            entry = self._next_entry()
            if entry is None:
                return
            kind, body = entry
            head, envelope, letters = frames.encode(kind, body)
            if log.isEnabledFor(logging.DEBUG):
                log.debug("%s > %s", self.name, frames.describe(kind, body))
            tag = self._tagger.tag(head, envelope) if self._tagger else b""
            self._parts.append(memoryview(b"".join((head, envelope, tag))))
            self._parts += [memoryview(part).cast("B") for part in letters if len(part)]
            size += len(envelope) + sum(map(len, letters))

    def _next_entry(self) -> tuple[Kind, dict[str, Any] | Rows] | None:
        with self._lock:
            if self._ahead:
                return self._ahead.popleft()
            if not self._queue:
                return None
            kind, body = self._queue.popleft()
            if not self._queue:
                self._room = FULL
        return kind, frames.merge(body) if isinstance(body, list) else body

    def _append_rows(self, kind: Kind, rows: Rows) -> None:
        """Put rows into the last entry if they are of its kind and job and fit, else into a new one."""
        short, long = len(rows.shorts), sum(sum(map(len, letter)) for letter in rows.longs)
        room = tuple(have - need for have, need in zip(self._room, (len(rows), short, long)))
        last_kind, last = self._queue[-1] if self._queue else (None, None)
        if last_kind is kind and isinstance(last, list) and last[0].job == rows.job and min(room) >= 0:
            last.append(rows)
            self._room = room
        else:
            self._queue.append((kind, [rows]))
            room = (frames.MAX_ROWS - len(rows), frames.MAX_SHORT_BYTES - short, frames.MAX_LONG_BYTES - long)
            self._room = FULL if kind in (Kind.FUNCTION, Kind.RETURNED) else room  # a frame has one of these

    # The reader.

    def receive(self) -> list[Frame] | None:
        """One recv: the frames it completed, perhaps none; None at end of file.

        Raises ProtocolError, AuthenticationError, OSError; ServerUnreachable after too long a silence.
        """
        try:
            count = self.socket.recv_into(self._reader.space())
        except (BlockingIOError, TimeoutError):
            self._check_heard()
            return []
        if not count:
            return None
        received = self._reader.received(count)
        self._hear(count)
        if log.isEnabledFor(logging.DEBUG):
            for frame in received:
                log.debug("%s < %s", self.name, frames.describe(*frame))
        return received

    def _hear(self, count: int) -> None:
        """Bytes came: a sign of life, unless they may be heartbeats that a length altered on the way swallows."""
        self._trickled += count
        if self._reader.at_boundary or self._trickled >= TRICKLE_BYTES:
            self._trickled = 0
            self.last_heard = time.monotonic()
        else:
            self._check_heard()

    def _check_heard(self) -> None:
        """ServerUnreachable after too long a silence."""
        if time.monotonic() - self.last_heard > SILENCE_SECONDS and self._tagger:
            raise ServerUnreachable(f"no byte came for {SILENCE_SECONDS:.0f} s")

    def run(self, handle: Callable[[Frame], object], done: Callable[[], object] = lambda: None) -> str:
        """Read frames and hand each to `handle` until the connection ends; returns why, in a few words.

        `done` is called when those that came together are handled: time to push what they gave rise to.

        A ProtocolError (the reader's, or one that `handle` raises) is told to the
        peer as ERROR; after a wrong tag nothing is said. The connection is aborted then.
        """
        try:
            while not self._closed:
                received = self.receive()
                if received is None:
                    return "end of file"
                for frame in received:
                    handle(frame)
                done()
            return "closed"
        except ProtocolError as e:
            self.send(Kind.ERROR, {"code": "protocol", "message": str(e)[: frames.TEXT_CHARS]})
            self.finish()
            done()
            self.wait_written(GOODBYE_SECONDS)
            return str(e)
        except (OSError, AchillesError) as e:
            return str(e) or type(e).__name__
        finally:
            self.abort()


class SentFunctions:
    """The sender's book of the functions that the receiver of one connection holds (PROTOCOL.md, section 7).

    No lock: whoever sends JOBs and ENDs on the connection keeps it under the lock it does that with.
    """

    def __init__(self, limit_bytes: int = FUNCTIONS_BYTES) -> None:
        self._limit = limit_bytes
        self._held: dict[bytes, int] = {}  # digest -> bytes, the longest unused first
        self._users: dict[bytes, int] = {}  # digest -> jobs that name it and have not ended

    def use(self, digest: bytes, size: int) -> bool:
        """A JOB will name this function. True if it must be sent first."""
        self._users[digest] = self._users.get(digest, 0) + 1
        known = self._held.pop(digest, None) is not None
        self._held[digest] = size
        return not known

    def release(self, digest: bytes) -> list[bytes]:
        """A job that named it has ended. Returns what the receiver shall FORGET, by now unused and too much."""
        self._users[digest] -= 1
        self._held[digest] = self._held.pop(digest)  # it was in use until now
        if not self._users[digest]:
            del self._users[digest]
        excess = sum(self._held.values()) - self._limit
        dropped: list[bytes] = []
        for other in [d for d in self._held if d not in self._users]:
            if excess <= 0:
                break
            excess -= self._held.pop(other)
            dropped.append(other)
        return dropped


def python_name() -> str:
    """This Python as HELLO names it: "3.14", or "3.14t" for a free-threaded build (PROTOCOL.md, section 6)."""
    suffix = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    return f"{sys.version_info.major}.{sys.version_info.minor}{suffix}"


PYTHON = python_name()


def hello(cpu_count: int = 0) -> dict[str, Any]:
    """The body of HELLO: what this process is (PROTOCOL.md, section 6)."""
    from .. import __version__

    about = {"python": PYTHON, "version": __version__, "letter_limit": frames.LETTER_LIMIT_BYTES}
    return about | {"cpu_count": cpu_count, "pid": os.getpid()}


def connect(
    host: str, port: int, role: bytes, username: str, key: bytes, timeout: float = CONNECT_SECONDS,
    letter_limit: int = frames.LETTER_LIMIT_BYTES,
) -> Channel:
    """Connect to a server and authenticate; blocks up to `timeout` seconds.

    `key` is `auth.derive_key(username, secret)`. AuthenticationError if the server
    refuses, ServerUnreachable where there is no answer. A server that closes before
    its WELCOME had no place: that is tried again until the time is over.
    """
    deadline = time.monotonic() + timeout
    while True:
        sock = _open(host, port, deadline)
        try:
            keys = _prove(sock, role, username, key, deadline)
        except OSError as e:
            sock.close()
            if isinstance(e, AuthenticationError):
                raise AuthenticationError(
                    f"{e} ({host}:{port}, user {username!r}): compare USERNAME and SECRET_KEY with those "
                    "in the server's configuration file"
                ) from None
            if isinstance(e, ProtocolError):
                raise ProtocolError(f"{host}:{port}: {e}") from None
            if not _pause(deadline):
                raise ServerUnreachable(f"{host}:{port} accepts connections but does not answer: {e}") from e
            continue
        sock.settimeout(TICK_SECONDS)
        link = "SC" if role == auth.CONTROLLER else "SN"
        return Channel(sock, link, (keys.client_data, keys.server_data), letter_limit)


def answer_claim(
    sock: socket.socket, find_keys: Callable[[auth.Claim], Sequence[bytes]], deadline: float
) -> tuple[auth.Claim, auth.Keys | None]:
    """The server's side of the handshake up to its answer, which it leaves to the caller.

    Sends M1 and reads M2 by `deadline` (monotonic); `find_keys` gives the K of each
    secret that would do. Returns the claim, and the session's keys if it was proved.
    """
    m1 = auth.greeting(secrets.token_bytes(auth.NONCE_BYTES))
    sock.settimeout(max(deadline - time.monotonic(), 0.001))
    sock.sendall(m1)
    claimed = auth.read_claim(receive_exactly(sock, auth.AUTH_BYTES, deadline))
    return claimed, auth.accept_claim(find_keys(claimed), m1, claimed)


def receive_exactly(sock: socket.socket, count: int, deadline: float) -> bytes:
    """`count` bytes by `deadline` (monotonic); ServerUnreachable at end of file, TimeoutError when it is over."""
    received = b""
    while len(received) < count:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        piece = sock.recv(count - len(received))
        if not piece:
            raise ServerUnreachable("the connection was closed during the handshake")
        received += piece
        if time.monotonic() > deadline:
            raise TimeoutError("the handshake took too long")
    return received


def _open(host: str, port: int, deadline: float) -> socket.socket:
    while True:
        try:
            sock = socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.001))
        except OSError as e:
            if isinstance(e, ConnectionResetError) and _pause(deadline):  # it was accepted, and lost at once
                continue
            raise ServerUnreachable(f"no achilles server answers at {host}:{port} ({_reason(e)})") from e
        set_options(sock)
        return sock


def _pause(deadline: float) -> bool:
    """Wait before another try; False if there is no time for one."""
    if time.monotonic() + RETRY_SECONDS > deadline:
        return False
    threading.Event().wait(RETRY_SECONDS * (0.5 + random.random()))
    return True


def set_options(sock: socket.socket) -> None:
    """What every TCP connection of ours gets, where the system has it."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # data that nobody acknowledges ends the connection, too
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE_SECONDS * 1000))


def _prove(sock: socket.socket, role: bytes, username: str, key: bytes, deadline: float) -> auth.Keys:
    m1 = receive_exactly(sock, auth.GREETING_BYTES, deadline)
    auth.read_greeting(m1)
    signed = auth.claim(role, username, secrets.token_bytes(auth.NONCE_BYTES))
    keys = auth.session_keys(key, m1, signed)
    sock.sendall(signed + keys.client_proof)
    answer = receive_exactly(sock, auth.PROOF_BYTES, deadline)
    if not auth.is_proof(keys, answer):
        raise AuthenticationError(
            "the server refused the username or the secret" if answer == auth.REFUSAL
            else "what answers there does not know the secret: it is not our server"
        )
    return keys


def _reason(e: OSError) -> str:
    return e.strerror or str(e) or errno.errorcode.get(e.errno or 0, type(e).__name__)


def _send_parts(sock: socket.socket, parts: Sequence[Buffer]) -> int:
    if hasattr(sock, "sendmsg"):
        return sock.sendmsg(parts[:WRITE_PARTS])
    return sock.send(parts[0])  # Windows has no sendmsg


def _advance(parts: list[memoryview], written: int) -> None:
    """Drop the first `written` bytes of `parts`."""
    done = 0
    while done < len(parts) and written >= len(parts[done]):
        written -= len(parts[done])
        done += 1
    del parts[:done]
    if written:
        parts[0] = parts[0][written:]
