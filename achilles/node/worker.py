"""A worker process: it reads batches from its node, lets a Runner run them, and writes answers.

The module knows the socket pairs and the board that the worker shares with its node. It knows no server. The worker
carries out each frame before it reads the next, so it keeps the node's order.

::

    node ──JOB TASK END CLOSE──▶ socket pair ──▶ serve ──▶ Runner, chunk by chunk
                                                              │ answers
    node ◀─────RESULT IDLE───── socket pair ◀── send ◀── board ◀┘
    node ◀──answers that a late or dead worker has not sent───┘                (board.py)
    node ◀────────OUTPUT─────── another pair ◀── the functions' lines          (output.py)

The worker ends when its node shuts down writing. It leads a session and a process group, with the processes that its
tasks start. The node kills the whole group. The group also ends when the node is gone: the kernel or a second thread
sees the end of the pipe `life`. Only users' functions start other threads.

Limits: a RESULT leaves after 5 ms, when the board is full, or at once with a letter of more than 256 KiB.
"""

from __future__ import annotations

import contextlib
import multiprocessing.process
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import multiprocess

from .. import config, console
from ..protocol.channel import Channel
from ..protocol.frames import CAREFUL, U32, Batch, Kind, LongLetter, digest
from .board import FIRST, LETTER_BYTES, MOST_ANSWERS, MOST_BYTES, Board
from .output import Output
from .runner import Runner

__all__ = ["Worker", "main"]

FLUSH_NS = 5_000_000  # an answer waits so long for other answers: the time that a batch is worth
THREADS = dict.fromkeys((  # each worker has one core
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
    "BLIS_NUM_THREADS"), "1")


class Worker:
    """A worker's state and its loop.

    :param sock, lines: blocking; the node has the other ends. Output goes to `lines`.
    :param shared: the memory of the board, which the node sees.
    :param node: the node's id, which exceptions name.
    """

    def __init__(self, sock: socket.socket, lines: socket.socket, shared: Any, node: int | None = None) -> None:
        self._channel = Channel(sock, "NW")
        self._channel.name = f"worker {os.getpid()}"
        self._board = Board(shared)
        self.runner = runner = Runner(self._board.status, node, own=True)
        self.output = Output(self._board.status, node or 0, lines)
        self._handlers: dict[Kind, Callable[[Any], object]] = {
            Kind.TASK: self._run,
            Kind.JOB: lambda body: runner.declare(body.job, body.declaration, *body.letters()[1:]),
            Kind.END: lambda body: runner.jobs.pop(body.job, None),
            Kind.CLOSE: lambda body: runner.contexts.pop(body["context"], None),
        }

    def leave(self) -> None:
        """In a forked child of this process, let go of the batch and the sockets."""
        self.output.batch = None
        self._channel.socket.close()
        self.output.socket.close()
        self.runner.abandon()

    def serve(self) -> None:
        """Handle the node's frames until it shuts down writing. Blocks."""
        self._write(Kind.IDLE, Batch(0))
        while (received := self._channel.receive()) is not None:
            while received:  # no frame is alive while the next read waits
                self._handlers[received[0].kind](received.pop(0).body)

    def _run(self, batch: Batch) -> None:
        """Answer the chunks of a batch, up to the limit, which the node may lower meanwhile."""
        board, clock = self._board, time.monotonic_ns
        lengths, statuses, letters = board.lengths, board.statuses, board.letters
        board.status[FIRST] = batch.first
        wants_output = self.runner.jobs[batch.job].declaration.get("output")
        if wants_output:
            self.output.begin(batch)
        answers = self.runner.run(batch.job, batch.first, batch.letters(), bool(batch.flags & CAREFUL))
        count = size = 0  # of the answers on the board; of their letters
        sent = now = clock()
        for state, parts in answers:
            if wants_output:
                self.output.end_lines()
            letter: Any = parts[0]
            length = len(letter)
            if len(parts) > 1 or length > LETTER_BYTES:
                length = sum(map(len, parts))
                letter = LongLetter(parts, digest(parts), length) if length > LETTER_BYTES else b"".join(parts)
            lengths[count], statuses[count] = length, state
            count += 1
            if length <= LETTER_BYTES:
                letters[size : size + length] = letter
                size += length
            now = clock()
            if now - sent > FLUSH_NS or length > LETTER_BYTES or count == MOST_ANSWERS or size > MOST_BYTES:
                self._send(batch, count, now - sent, [letter] if length > LETTER_BYTES else [])
                sent, count, size = now, 0, 0
        if count:
            self._send(batch, count, now - sent)
        self.output.batch = None
        if board.status[FIRST] < batch.end:  # the node took the rest back
            self._write(Kind.IDLE, Batch(0))

    def _send(self, batch: Batch, count: int, ns: int, large: Sequence[Any] = ()) -> None:
        """Write the answers on the board as a RESULT."""
        if self.output.batch is not None:
            self.output.count()
        self._write(Kind.RESULT, self._board.answers(batch, count, min(max(1, ns // 1000), U32), large))
        self._board.status[FIRST] += count

    def _write(self, kind: Kind, body: Batch) -> None:
        self._channel.send(kind, body)
        while not self._channel.flush():
            pass


def main(
    sock: socket.socket, lines: socket.socket, shared: Any, life: Any, number: int, inherited: Iterable[Any] = (),
    node: int | None = None,
) -> None:
    """Run a worker's process until the node shuts down writing.

    :param sock, lines, shared, node: as for Worker.
    :param life: the reading end of a pipe, which ends when the node is gone.
    :param number: of the worker in its node.
    :param inherited: the node's descriptors, which a forked worker must not keep open.
    """
    for thing in inherited:
        thing.close()
    try:  # Linux kills the group, also while C code holds the interpreter
        os.setsid()
        import fcntl

        fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(life, fcntl.F_SETFL, os.O_ASYNC)
    except (ImportError, AttributeError, OSError):
        threading.Thread(target=_watch, args=(life,), name="achilles-watch", daemon=True).start()
    console.keep_freed_memory()
    config.in_worker = True
    _take_name()
    # A terminal's Ctrl-C reaches workers: the node ends them. A forked worker has the node's handlers of the others.
    # Windows has no SIGHUP.
    for name, action in (("SIGINT", signal.SIG_IGN), ("SIGTERM", signal.SIG_DFL), ("SIGHUP", signal.SIG_DFL)):
        signal.signal(getattr(signal, name, signal.SIGTERM), action)
    os.environ.update(THREADS | os.environ | {f"{config.PREFIX}WORKER": str(number)})
    if hasattr(sys.stdout, "reconfigure") and not sys.stdout.closed:  # a killed worker loses no line
        sys.stdout.reconfigure(line_buffering=True)
    worker, pid = Worker(sock, lines, shared, node), os.getpid()
    worker.output.install()
    if hasattr(os, "register_at_fork"):  # a forked child of this process is no worker
        os.register_at_fork(after_in_child=worker.leave)
    try:
        with contextlib.suppress(ConnectionError):  # the node is gone
            worker.serve()
    finally:
        if os.getpid() != pid:  # a child that the user's function forked
            os._exit(0)


def _take_name() -> None:
    """Let `multiprocessing`, as `multiprocess` does, tell the worker's name, number and parent.

    Libraries choose a line of the screen, a log file or a device by them. A daemon may start no process, so the worker
    is not a daemon here.
    """
    worker, parent = multiprocess.current_process(), multiprocess.parent_process()
    worker.daemon = False
    worker.name = f"achilles-worker-{worker._identity[-1]}"
    seen: Any = multiprocessing.process.BaseProcess(name=worker.name)
    seen._identity, seen.authkey = worker._identity, bytes(worker.authkey)
    process: Any = multiprocessing.process
    process._current_process = seen
    process._parent_process = process._ParentProcess(parent.name, parent.pid, parent.sentinel)


def _watch(life: Any) -> None:
    """In a thread, wait until the node is gone, and kill the process group."""
    with contextlib.suppress(AttributeError, OSError):  # Windows has no groups, and its pipe breaks
        life.poll(None)
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
