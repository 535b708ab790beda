"""The lines that users' functions print: in a worker as OUTPUT frames, and how many of them leave a node.

It knows lines, the status array and a second's share. It knows no socket and no caller.

::

    print ─▶ Tap ─▶ Output ─▶ Flow ──OUTPUT──▶ Flow, the node's ──OUTPUT──▶ server ─▶ caller
                                │ over its share: counted
                                └─────▶ one OUTPUT with the count, before the next RESULT

A worker captures `sys.stdout` and `sys.stderr` while it runs a batch of a job with output. What C code writes to the
descriptors is not captured, what Python code writes to `sys.stdout.buffer` is not, and neither is what the function's
own processes print.

Threads: any thread of a user's function prints. `_writing` guards the worker's channel. A thread that finds it taken
leaves its lines: its holder, or the next RESULT, takes them along.

Limits: a line of more than 1,024 bytes goes in pieces; 64 KiB a second from a worker, and for a job from a node.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..protocol.frames import MORE, SHORT_LETTER_BYTES, U32, Batch, Kind
from .board import CHUNK, OFFSET

__all__ = ["Flow", "Output"]

SHARE_BYTES = 64 << 10  # of output in a second: many screens, and little beside the results
FRAME_BYTES = 64  # that a line costs beside its text: head, range and tag
# The signals that users' functions have handlers for. To block all of them would take 0.1 ms.
HANDLED = {getattr(signal, name) for name in ("SIGALRM", "SIGPROF", "SIGUSR1", "SIGUSR2", "SIGVTALRM", "SIGINT",
                                              "SIGTERM", "SIGHUP", "SIGCHLD") if hasattr(signal, name)}
REST_CHARACTERS = 1 << 14  # of a line that has not ended, before it is cut


class Flow:
    """A second's share of output, and the count of the lines that did not get one."""

    def __init__(self) -> None:
        self.left_out = 0  # lines
        self._since = self._bytes = 0.0  # the beginning of this second (monotonic); left of its share

    def admits(self, line: Batch) -> bool:
        """Whether an OUTPUT may go on; else it is counted."""
        now = time.monotonic()
        if now - self._since > 1.0:
            self._since, self._bytes = now, SHARE_BYTES
        self._bytes -= FRAME_BYTES + line.lengths[0]
        if line.flags == MORE or self._bytes < 0:
            self.left_out += line.attempt if line.flags == MORE else 1
            return False
        return True

    def count(self, job: int, node: int) -> list[Batch]:
        """The OUTPUT that counts the lines which were left out since the last one, if there are any."""
        lines, self.left_out = min(self.left_out, U32), 0
        return [Batch.pack(job, 0, [b""], attempt=lines, number=node, flags=MORE)] if lines else []


class Output:
    """What a worker prints, and its way to the node: lines first, then the answers of their chunks.

    :param status: the status array.
    :param write: writes a frame to the node; blocks.
    """

    def __init__(self, status: Any, node: int, write: Callable[[Kind, Batch], None]) -> None:
        self.batch: Batch | None = None  # that runs, if its job wants the output
        self._status, self._node, self._write = status, node, write
        self._job, self._flow = -1, Flow()  # of the last batch
        self._taps: list[Tap] = []
        self._lines: deque[Batch] = deque()  # admitted, not written yet
        self._is_writing = False
        self._writing = threading.RLock()  # a handler that raises may leave it held, by the thread that needs it next

    def install(self) -> None:
        """Put Taps in the place of the streams of this process, for its life."""
        streams = [open(os.devnull, "w") if stream is None else stream for stream in (sys.stdout, sys.stderr)]
        sys.stdout, sys.stderr = self._taps = [Tap(self, stream) for stream in streams]
        sys.__stdout__, sys.__stderr__ = self._taps  # type: ignore[misc, assignment]

    def begin(self, batch: Batch) -> None:
        """From now on lines are this batch's."""
        if batch.job != self._job:
            self._job, self._flow = batch.job, Flow()
        self.batch = batch

    def end(self) -> None:
        """The batch is answered; or this is a forked child, and the batch is its parent's."""
        self.batch = None

    def end_lines(self) -> None:
        """Let the lines go that have not ended. The next RESULT takes them along."""
        for tap in self._taps:
            tap.end_line()

    def place(self, batch: Batch) -> tuple[Batch, int, int]:
        """The batch, the chunk that runs, and the argument in it."""
        return batch, max(self._status[CHUNK], batch.first), max(self._status[OFFSET], 0)

    def add(self, line: str, place: tuple[Batch, int, int]) -> None:
        """Queue what a terminal would show of a line, in pieces where it is long."""
        batch, chunk, offset = place
        text, start = line.rstrip("\r").rpartition("\r")[2].encode(errors="replace"), 0
        while start < len(text) or not start:
            piece = text[start : start + SHORT_LETTER_BYTES].decode(errors="ignore").encode()  # whole characters
            frame = Batch.pack(batch.job, chunk, [piece], attempt=offset, number=self._node)
            if not self._flow.admits(frame):
                return
            self._lines.append(frame)
            start += len(piece) or 1

    def push(self) -> None:
        """Write the lines that wait, unless another thread does so."""
        if not self._lines:
            return
        with undisturbed():
            while self._lines and not self._is_writing and self._writing.acquire(blocking=False):
                try:
                    self._write_lines()
                finally:
                    self._writing.release()

    def answer(self, answer: Batch) -> None:
        """Write the lines that wait, the count of those left out, and a RESULT."""
        if self.batch is None:
            with self._writing:
                self._write(Kind.RESULT, answer)
            return
        with undisturbed(), self._writing:
            self._lines += self._flow.count(answer.job, self._node)
            self._write_lines()
            self._write(Kind.RESULT, answer)

    def _write_lines(self) -> None:
        """A signal handler may print meanwhile, if the signal came to another thread: its lines go last."""
        self._is_writing = True
        try:
            while self._lines:
                self._write(Kind.OUTPUT, self._lines.popleft())
        finally:
            self._is_writing = False


class Tap:
    """A stream in the place of `sys.stdout` or `sys.stderr`. Beside a batch with output it is that stream itself."""

    def __init__(self, output: Output, stream: Any) -> None:
        self._output, self._stream = output, stream
        self._rest = ""  # of a line that has not ended
        self._place: Any = None  # of that line
        self._cutting = threading.RLock()  # guards both

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Take text: each line goes when it ends, or when another argument begins to print."""
        batch = self._output.batch
        if batch is None:
            return self._stream.write(text)  # type: ignore[no-any-return]
        with self._cutting:
            place = self._output.place(batch)
            if place != self._place or len(self._rest) > REST_CHARACTERS:
                self.end_line()
            self._place = place
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._output.add(line, place)
        self._output.push()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As `write`."""
        self.write("".join(lines))

    def end_line(self) -> None:
        """Let a line go that has not ended."""
        if self._rest:
            rest, self._rest = self._rest, ""
            self._output.add(rest, self._place)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let no signal handler run in this thread meanwhile: one that raises would leave half a frame behind."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        yield
    finally:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        finally:  # once more, where a handler raised before that: another thread had got its signal
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
