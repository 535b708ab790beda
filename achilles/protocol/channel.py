"""An authenticated connection: an outbox of frames on one side, a FrameReader on the other.

The module knows sockets, keys, heartbeats and the order of frames, and no job. A Channel has threads, or a loop:

::

              any thread                       pusher, writer thread, or the loop's turn
    send ───▶ encode ─▶ outbox ───▶ tag ─▶ pieces ─▶ [encrypt] ──send──▶ socket
                                       reader thread, or the loop's turn
    frames ◀── FrameReader ◀─ check ◀─receive── recv_into ◀─ [decrypt] ◀────┘

- *Threads* (server, controller): `start_writer()`, and one thread calls `run(handle)`. The socket has a timeout of a
  second, so that both threads look up from it. A thread may `push` the frames that it has queued: few bytes leave at
  once, without a switch of threads. A thread that reads never waits to write.
- *A loop* (node, and its end of each worker's socket pair): the socket does not block. The loop calls `receive()` and
  `flush()` when the selector says so, and `tick()`.

Locks: `_lock` guards the outbox and the state. No system call runs under it. The thread that writes holds `_writing`,
which guards the tagger, the pieces, `_unsent` and the descriptor. Only the writer thread and `close` wait for
`_writing`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import AchillesError, ProtocolError, ServerUnreachable
from . import auth, frames
from .frames import Batch, Buffer, Frame, Kind
from .reader import FrameReader

__all__ = ["GOODBYE_SECONDS", "HEARTBEAT_SECONDS", "SILENCE_SECONDS", "TICK_SECONDS", "Channel"]

HEARTBEAT_SECONDS = 5.0  # a quarter of the silence: three may be lost
SILENCE_SECONDS = 20.0  # longer than a garbage collection or a route's flap
TRICKLE_BYTES = 1024  # fewer bytes of a frame in SILENCE_SECONDS are silence: heartbeats are 168
GOODBYE_SECONDS = 2.0  # how long a side reads on after it has shut down writing
TICK_SECONDS = 1.0  # a blocked thread looks up from its socket so often
WRITE_BYTES = 256 << 10  # small pieces joined for one send: a large piece is never copied
PIECE_BYTES = 1 << 20  # of a letter; TLS takes this memory twice
PUSH_BYTES = 64 << 10  # of a push: more takes longer than a switch of threads
OPEN, FINISHING, SHUT, CLOSED = range(4)  # FINISHING takes no frame; SHUT ends writing; CLOSED ends all

log = logging.getLogger(__name__)


class Channel:
    """One connection after its handshake.

    :param sock: a socket, or a Tls, which only a process that encrypts imports.
    :param link: the peer and this side, such as "CS" for a server that hears a controller.
    :param keys: for the tags of this side and of the peer; None on a worker's link.
    """

    def __init__(self, sock: Any, link: str, keys: tuple[bytes, bytes] | None = None) -> None:
        self.socket = sock
        self.name = ""  # for the log; the role sets it
        self.last_heard = self.last_written = time.monotonic()
        self._writing = threading.Lock()
        self._tagger = auth.Tagger(keys[0]) if keys else None  # `_writing` guards this and the next three
        self._encrypt: Callable[[Buffer], memoryview] = getattr(sock, "encrypt", memoryview)
        self._pieces: deque[Buffer] = deque()
        self._unsent = memoryview(b"")  # the socket takes these bytes next
        self._reader = FrameReader(link, auth.Tagger(keys[1]).check if keys else None)
        self._trickled = 0  # bytes since last_heard; the reading thread's
        self._lock = threading.RLock()  # guards all below; a signal handler may meet its own thread in it
        self._ready = threading.Condition(self._lock)
        self._queue: deque[tuple[Frame, bytes, list[memoryview]]] = deque()
        self._state = OPEN
        self._writer: threading.Thread | None = None

    # The outbox: any thread.

    def send(self, kind: Kind, body: dict[str, Any] | Batch, *, wake: bool = True, ahead: bool = False) -> None:
        """Queue a frame, behind the others or `ahead` of them. Never blocks. Any thread.

        After `finish` or `abort` the frame is dropped. An exception means that it cannot be encoded.

        :param wake: tell the writer thread; else the caller calls `push`.
        """
        signed, letters = frames.encode(kind, body)
        with self._lock:
            if self._state == OPEN:
                (self._queue.appendleft if ahead else self._queue.append)((Frame(kind, body), signed, letters))
                if wake:
                    self._ready.notify()

    def push(self) -> None:
        """Write queued frames in this thread, if they are few and the socket takes them at once.

        The writer thread writes the rest, and sees failures. Never blocks. Any thread.
        """
        # On Windows, `os.write` takes no socket.
        if self._queue and not self._unsent and os.name == "posix" and self._writing.acquire(blocking=False):
            try:
                self._write_safely(lambda data: os.write(self.socket.fileno(), data), PUSH_BYTES, BlockingIOError)
            finally:
                self._writing.release()
        if self.wants_write:
            self._go_on(OPEN)

    def drop_tasks(self, job: int, first: int = 0, end: float = float("inf")) -> None:
        """Remove a job's unwritten TASKs that lie wholly in a cancelled range from the outbox."""
        with self._lock:
            self._queue = deque(
                entry for entry in self._queue
                if entry[0].kind is not Kind.TASK or (body := entry[0].body).job != job
                or body.first < first or body.end > end
            )

    @property
    def wants_write(self) -> bool:
        """Whether bytes, or the end of writing, wait."""
        return bool(self._unsent or self._pieces or self._queue) or self._state == FINISHING

    @property
    def waiting(self) -> int:
        """How many frames wait to be written."""
        return len(self._queue)

    def finish(self, reason: str | None = None) -> None:
        """Say BYE if there is a reason, write the outbox, then shut down writing. Never blocks."""
        if reason:
            self.send(Kind.BYE, {"reason": reason})
        self._go_on(FINISHING)

    def wait_written(self, timeout: float) -> None:
        """After `finish`, block until the writer thread has written all and ended, `timeout` seconds at most."""
        if self._writer is not None and timeout > 0:
            self._writer.join(timeout)

    def abort(self) -> None:
        """End the connection at once; both threads return. Any thread, any number of times."""
        self._go_on(CLOSED)
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Abort, wait for the writer thread (2 s at most), and close the descriptor. Not in the writer thread."""
        self.abort()
        self.wait_written(GOODBYE_SECONDS)
        held = self._writing.acquire(timeout=GOODBYE_SECONDS)  # a new connection may get this descriptor's number
        self.socket.close()
        self._reader.close()
        if held:
            self._writing.release()

    def _go_on(self, state: int) -> None:
        """Go on to a state, if it is a later state, and wake the writer thread."""
        with self._lock:
            self._state = max(self._state, state)
            self._ready.notify()

    # The writer.

    def start_writer(self) -> None:
        """Start the writer thread, which also sends heartbeats. `close` joins it."""
        self._writer = threading.Thread(target=self._write_loop, name=f"achilles-writer {self.name}", daemon=True)
        self._writer.start()

    def flush(self) -> bool:
        """Write as much as a send takes. Return whether all is written."""
        self._write(self.socket.send)
        return not self.wants_write

    def tick(self) -> None:
        """Queue a heartbeat if it is due; ServerUnreachable if the peer was silent for SILENCE_SECONDS.

        A length that was altered on its way may swallow the peer's heartbeats.
        """
        if time.monotonic() - self.last_heard > SILENCE_SECONDS:
            raise ServerUnreachable(f"no byte came for {SILENCE_SECONDS:.0f} s")
        if time.monotonic() - self.last_written > HEARTBEAT_SECONDS and not self.wants_write:
            self.send(Kind.PING, {}, ahead=True)

    def _write_loop(self) -> None:
        while self._state < SHUT:
            with self._writing:
                self._write_safely(self.socket.send)
            with self._lock:
                if not self._ready.wait_for(lambda: self._state >= SHUT or self.wants_write, HEARTBEAT_SECONDS):
                    self.send(Kind.PING, {}, ahead=True)

    def _write_safely(self, send: Callable[[memoryview], int], *more: Any) -> None:
        """As `_write`. An error ends writing, so that no frame follows half a frame."""
        try:
            self._write(send, *more)
        except BaseException as e:
            if not (isinstance(e, OSError) and e.errno):  # no error of the socket: half a connection must not live on
                self.abort()
                if threading.current_thread() is threading.main_thread():  # Ctrl-C, or a signal handler's
                    raise
            level = logging.DEBUG if isinstance(e, OSError) else logging.ERROR
            log.log(level, "%s: writing ended: %s", self.name, e, exc_info=level == logging.ERROR)
            self._go_on(SHUT)  # reading ends, too, but first the reader gets the reason: an ERROR, a BYE

    def _write(
        self, send: Callable[[memoryview], int], limit: float = float("inf"), busy: type[OSError] = TimeoutError
    ) -> None:
        """Write as many waiting bytes as `send` takes, but none if more than `limit` wait. Needs `_writing`.

        After `finish`, shut down writing when all is written.

        :param busy: the error of `send` where the socket takes nothing. A TimeoutError in a push is a signal handler's.
        """
        is_last = self._state == FINISHING  # read first: in this state no frame is queued
        if not self._unsent:
            pieces = list(self._next_pieces())
            self._unsent = self._encrypt(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if is_last and not self._unsent:
            self.socket.shutdown(socket.SHUT_WR)
            self._go_on(SHUT)
        elif 0 < len(self._unsent) <= limit:
            with contextlib.suppress(BlockingIOError, busy):
                self._unsent = self._unsent[send(self._unsent) :] or memoryview(b"")  # frees written bytes
                self.last_written = time.monotonic()

    def _next_pieces(self) -> Iterator[Buffer]:
        """Tag queued frames, and yield the next pieces: some small pieces, or a large piece. Needs `_writing`."""
        size = 0
        while True:
            if not self._pieces:
                with self._lock:
                    if not self._queue:
                        return
                    frame, signed, letters = self._queue.popleft()
                log.debug("%s > %s", self.name, frame)
                self._pieces.append(signed + self._tagger.tag(signed) if self._tagger else signed)
                self._pieces += [letter[at : at + PIECE_BYTES]
                                 for letter in letters for at in range(0, len(letter), PIECE_BYTES)]
            if size and size + len(self._pieces[0]) > WRITE_BYTES:
                return
            size += len(self._pieces[0])
            yield self._pieces.popleft()

    # The reader.

    def receive(self) -> list[Frame] | None:
        """Return the frames that a recv completed, perhaps none; None at end of file.

        :raises ProtocolError: the peer sent bytes that are no frame for this link.
        :raises AuthenticationError: a tag is wrong.
        """
        received: list[Frame] | None = []
        try:
            count = self.socket.recv_into(self._reader.space())
            received = self._reader.received(count) if count else None
        except (BlockingIOError, TimeoutError) as e:
            count = getattr(e, "characters_written", 0)  # bytes of a TLS record that is not whole
        self._trickled += count
        if received or self._trickled >= TRICKLE_BYTES:
            self._trickled, self.last_heard = 0, time.monotonic()
        for frame in received or ():
            log.debug("%s < %s", self.name, frame)
        return received

    def run(self, handle: Callable[[Frame], object], done: Callable[[], object] = lambda: None) -> Any:
        """Read frames and hand each to `handle` until the connection ends, then abort. Blocks.

        The peer gets a ProtocolError, of the reader or of `handle`, as ERROR. A wrong tag has no answer.

        :param done: called after all frames that came together, to push the answers.
        :returns: the reason of the end: a few words, or the ProtocolError.
        """
        try:
            while self._state != CLOSED and (received := self.receive()) is not None:
                for frame in received:
                    handle(frame)
                done()
                self.tick()
            return "end of file"
        except ProtocolError as e:
            self.complain(e)
            done()
            self.wait_written(GOODBYE_SECONDS)
            return e
        except (OSError, AchillesError) as e:
            return str(e) or type(e).__name__
        finally:
            self.abort()

    def complain(self, error: ProtocolError) -> None:
        """Send the peer its mistake as ERROR, and finish. Never blocks."""
        self.send(Kind.ERROR, {"code": "protocol", "message": str(error)[: frames.TEXT_CHARS]})
        self.finish()
