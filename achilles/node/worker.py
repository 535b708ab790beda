"""A worker process: it reads batches from its node, has a Runner run them, and writes answers.

It knows one socket pair and the status array that its node sees. It knows no server and no other worker. It reads a
frame, works, writes, and reads again, so it does everything in the order in which the node said it.

::

    node ──JOB TASK END CLOSE──▶ socket pair ──▶ serve ──▶ Runner, chunk by chunk
                                                              │ answers
    node ◀────────RESULT─────── socket pair ◀── flush ◀── deque ◀┘
    node ◀──chunk, offset, phase── status array ──limit──▶ worker       (runner.py)

The worker ends when its node shuts down writing. It has two threads. The main thread does all of this. The guard
thread sends answers that have waited for 20 ms, because a chunk lasts, and looks whether the node is still there. The
lock `_sending` guards the socket's writing side and the popping of answers; the main thread appends them without it.

Limits: a RESULT leaves after 5 ms. It has at most 1 MiB of letters, or one longer letter.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import multiprocess

from .. import config, console
from ..protocol.channel import Channel
from ..protocol.frames import (
    CAREFUL,
    MAX_SHORT_BYTES,
    SHORT_LETTER_BYTES,
    U32,
    Batch,
    Buffer,
    Frame,
    Kind,
    Letter,
    LongLetter,
    digest,
)
from .runner import CHUNK, FUNCTION, IDLE, LIMIT, PHASE, Answer, Runner

__all__ = ["Worker", "main"]

FLUSH_NS = 5_000_000  # an answer waits so long for others: the time that a batch is worth
GUARD_SECONDS, GUARD_NS = 0.02, 20_000_000  # an answer that has waited so long is the guard's to send
QUIET_SECONDS = 1.0  # how often the guard looks whether the node is there, while there is no batch
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS",
           "VECLIB_MAXIMUM_THREADS", "BLIS_NUM_THREADS")  # each worker has one core, not all of them


class Worker:
    """A worker's state and its loop.

    :param sock: blocking; the other end is the node's.
    :param status: four signed 64-bit integers that the node sees.
    :param node: the node's id, which exceptions name.
    """

    def __init__(self, sock: socket.socket, status: Any, node: int | None = None) -> None:
        self._channel = Channel(sock, "NW")
        self._channel.name = f"worker {os.getpid()}"
        self._status = memoryview(status).cast("B").cast("q")  # written at half the cost of a ctypes array
        self.runner = runner = Runner(self._status, node, own=True)
        self._handlers: dict[Kind, Callable[[Any], None]] = {
            Kind.TASK: self._run,
            Kind.JOB: lambda body: runner.declare(body.job, body.declaration, *body.letters()[1:]),
            Kind.END: lambda body: runner.end(body.job),
            Kind.CLOSE: lambda body: runner.close_context(body["context"]),
        }
        self._done: deque[tuple[int, Letter, int]] = deque()  # status, letter and end in ns of chunks, not sent
        self._sending = threading.Lock()  # guards all writing to the socket, and the three below
        self._batch = Batch(0)  # the batch that `_done` belongs to; set while `_done` is empty
        self._next = self._since = 0  # the chunk of the first entry in `_done`; ns, when that chunk began
        self._wake = threading.Event()  # a batch has come: the guard is to look every 20 ms

    def serve(self) -> None:
        """Obey the node until it shuts down writing. Blocks."""
        self._status[PHASE] = IDLE
        while (received := self._channel.receive()) is not None:
            self._obey(received)

    def guard(self, parent: int | None) -> None:
        """The guard thread: send answers that wait, and end this process when the node is gone. Never returns."""
        with contextlib.suppress(OSError):  # the node is gone, though its process may not be
            while not _orphaned(parent):
                if self._wake.wait(QUIET_SECONDS):
                    self._wake.clear()
                    threading.Event().wait(GUARD_SECONDS)
                    self._flush(GUARD_NS)
                    if self._status[PHASE] != IDLE:
                        self._wake.set()
        os._exit(1)

    def _obey(self, received: list[Frame]) -> None:
        """Do the work that one read brought. Nothing of it is alive while the next read waits."""
        for kind, body in received:
            self._handlers[kind](body)
        received.clear()

    def _run(self, batch: Batch) -> None:
        """Answer the chunks of a batch, up to the limit that the node may lower meanwhile."""
        # First: a guard that clears `_wake` just now looks at the phase after. And the node may give another batch to a
        # worker that is idle and has seen this one.
        self._status[PHASE] = FUNCTION
        if not self._wake.is_set():  # which costs a tenth of `set`
            self._wake.set()
        self._status[CHUNK] = batch.first
        if batch.first < self._status[LIMIT]:
            self._run_chunks(batch, self.runner.prepare(batch.job))
        else:
            self._status[CHUNK] = batch.first - 1
        self._status[PHASE] = IDLE  # before the last answer: with it, the node may give the next batch
        self._flush()

    def _run_chunks(self, batch: Batch, failure: Answer | None) -> None:
        run, done, clock = self.runner.run, self._done.append, time.monotonic_ns
        self._batch, self._next, self._since = batch, batch.first, clock()
        job, careful = batch.job, bool(batch.flags & CAREFUL)
        flushed, size = self._since, 0  # ns; bytes since then
        for number, argument in enumerate(batch.letters(), batch.first):
            answer = failure or run(job, number, argument, careful)
            if answer is None:
                return
            state, parts = answer
            letter: Letter = parts[0]
            if len(parts) > 1 or len(letter) > SHORT_LETTER_BYTES:
                letter = _letter(parts)
            size += len(letter)
            if size > MAX_SHORT_BYTES:
                self._flush()
                size = len(letter)
            now = clock()
            done((state, letter, now))
            if number + 1 == batch.end:  # `_run` sends it, when the node can see that the worker is idle
                return
            # Parts may be views of a value that the function still holds, and may change at its next call.
            if now - flushed > FLUSH_NS or len(parts) > 1:
                self._flush()
                flushed, size = now, 0

    def _flush(self, waited_ns: int = 0) -> None:
        """Write all answers as one RESULT, if the oldest has waited so long. Any thread.

        When it returns, no other thread is writing an answer.
        """
        with self._sending:
            if not self._done or time.monotonic_ns() - self._done[0][2] < waited_ns:
                return
            states, letters, ends = zip(*[self._done.popleft() for _ in range(len(self._done))])
            us = min(max(1, (ends[-1] - self._since) // 1000), U32)
            self._channel.send(Kind.RESULT, Batch.pack(
                self._batch.job, self._next, letters, attempt=self._batch.attempt, number=us, statuses=bytes(states)))
            self._next, self._since = self._next + len(letters), ends[-1]
            while not self._channel.flush():
                pass


def main(
    sock: socket.socket, status: Any, parent: int | None, inherited: Iterable[Any] = (), node: int | None = None,
) -> None:
    """The target of a worker's process; returns when the node shuts down writing.

    :param sock, status, node: as for Worker.
    :param parent: the node's process id where the node starts its workers itself (fork, spawn), else None.
    :param inherited: the node's descriptors, which a forked worker must not keep open.
    """
    # Linux ends the worker with its node or its forkserver, which ends with the node. Elsewhere the guard sees it.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, linux/prctl.h
    console.keep_freed_memory()
    config.in_worker = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches workers too: the node ends them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for thing in inherited:
        thing.close()
    for name in THREADS:
        os.environ.setdefault(name, "1")
    if hasattr(sys.stdout, "reconfigure") and not sys.stdout.closed:  # the last print of a killed worker is not lost
        sys.stdout.reconfigure(line_buffering=True)
    worker, pid = Worker(sock, status, node), os.getpid()
    threading.Thread(target=worker.guard, args=(parent,), name="achilles-guard", daemon=True).start()
    if hasattr(os, "register_at_fork"):  # a forked child of this process is no worker
        os.register_at_fork(after_in_child=sock.close)
        os.register_at_fork(after_in_child=worker.runner.abandon)
    try:
        with contextlib.suppress(ConnectionError):  # the node is gone
            worker.serve()
    finally:
        if os.getpid() != pid:  # a child that the user's function forked, and that returned from the function
            os._exit(0)


def _letter(parts: Sequence[Buffer]) -> Letter:
    """A letter of several parts, or a long one."""
    length = sum(map(len, parts))
    return LongLetter(parts, digest(parts), length) if length > SHORT_LETTER_BYTES else b"".join(parts)


def _orphaned(parent: int | None) -> bool:
    """Whether the node is gone. Under forkserver the parent is another process, but the pipe to the node tells it."""
    return parent not in (None, os.getppid()) or not multiprocess.parent_process().is_alive()
