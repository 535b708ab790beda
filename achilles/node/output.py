"""The lines that users' functions print: OUTPUT frames of a worker, and their share of a node's connection.

The module knows lines, the status array and a second's share, and no caller.

::

    print ─▶ Tap ─▶ Output ─▶ Flow ──OUTPUT, a socket pair of its own──▶ Flow, the node's ──OUTPUT──▶ server ─▶ caller
                                │ over its share: counted
                                └─────▶ one OUTPUT with the count, before the next RESULT

A worker captures `sys.stdout` and `sys.stderr` while it runs a batch of a job with output. It does not capture the
bytes that C code writes to the descriptors, or Python code to `sys.stdout.buffer`, nor the function's own processes.

Any thread may print, and so may a signal handler, which may raise. So lines have a socket pair of their own: no `send`
of an OUTPUT, some 1,024 bytes, cuts another. The node reads the lines that are there before it passes a RESULT on.

Limits: a line of more than 1,024 bytes goes in pieces; 64 KiB a second from a worker, and for a job from a node.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from ..protocol.frames import MORE, U32, Batch, Kind, encode
from .board import CHUNK, OFFSET

__all__ = ["Flow", "Output"]

SHARE_BYTES = 64 << 10  # a second: many screens, and little beside the results
FRAME_BYTES = 64  # a line's head, range and tag
PIECE = re.compile(rb".{1,1024}(?![\x80-\xbf])", re.DOTALL)  # whole characters, as many as a short letter holds
REST_CHARACTERS = 1 << 14  # of a line that has not ended, before it is cut


class Flow:
    """A second's share of output, and the count of the lines that were left out."""

    def __init__(self) -> None:
        self.left_out = 0
        self._since = self._bytes = 0.0  # this second's beginning (monotonic); the rest of its share

    def admits(self, line: Batch) -> bool:
        """Whether an OUTPUT may go on; else count its lines."""
        now = time.monotonic()
        if now - self._since > 1.0:
            self._since, self._bytes = now, SHARE_BYTES
        self._bytes -= FRAME_BYTES + line.lengths[0]
        if line.flags == MORE or self._bytes < 0:
            self.left_out += line.attempt if line.flags == MORE else 1
            return False
        return True

    def count(self, job: int, node: int) -> Iterator[Batch]:
        """Yield an OUTPUT with the count of left-out lines since the last count, if there are any."""
        if self.left_out:
            lines, self.left_out = min(self.left_out, U32), 0
            yield Batch.pack(job, 0, [b""], attempt=lines, number=node, flags=MORE)


class Output:
    """The lines of a worker, and their way to the node.

    :param status: the status array.
    :param sock: for the lines alone; blocking.
    """

    def __init__(self, status: Any, node: int, sock: socket.socket) -> None:
        self.batch: Batch | None = None  # the batch that runs, if its job wants output
        self._status, self._node, self.socket = status, node, sock
        self.lock = threading.RLock()  # guards the flow and the taps' rests; a signal handler may print
        self._job, self._flow = -1, Flow()  # of the last batch
        self._taps: list[Tap] = []

    def install(self) -> None:
        """Put Taps in the place of the streams of this process, for its life."""
        streams = [open(os.devnull, "w") if stream is None else stream for stream in (sys.stdout, sys.stderr)]
        sys.stdout, sys.stderr = self._taps = [Tap(self, stream) for stream in streams]
        sys.__stdout__, sys.__stderr__ = self._taps  # type: ignore[misc, assignment]

    def begin(self, batch: Batch) -> None:
        """Give the next lines to this batch."""
        if batch.job != self._job:
            self._job, self._flow = batch.job, Flow()
        self.batch = batch

    def end_lines(self) -> None:
        """Send the rests of lines: the function is done."""
        for tap in self._taps:
            tap.end_line()

    def count(self) -> None:
        """Send the count of left-out lines: a RESULT follows."""
        with self.lock:
            for count in self._flow.count(self._job, self._node):
                self.socket.sendall(encode(Kind.OUTPUT, count)[0])

    def place(self, batch: Batch) -> tuple[Batch, int, int]:
        """Return the batch, the chunk that runs, and its argument's offset."""
        return batch, max(self._status[CHUNK], batch.first), max(self._status[OFFSET], 0)

    def add(self, line: str, place: tuple[Batch, int, int]) -> None:
        """Send the part of a line that a terminal would show; a long line in pieces. Needs the lock."""
        batch, chunk, offset = place
        for piece in PIECE.findall(line.rstrip("\r").rpartition("\r")[2].encode(errors="replace")) or [b""]:
            frame = Batch.pack(batch.job, chunk, [piece], attempt=offset, number=self._node)
            if not self._flow.admits(frame):
                return
            self.socket.sendall(encode(Kind.OUTPUT, frame)[0])


class Tap:
    """Stands for `sys.stdout` or `sys.stderr`. Text goes to that stream while no batch with output runs."""

    def __init__(self, output: Output, stream: Any) -> None:
        self._output, self._stream = output, stream
        self._rest = ""  # of a line that has not ended
        self._place: Any = None  # of that line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Take text. A line leaves when it ends, or when another argument begins to print."""
        batch = self._output.batch
        if batch is None:
            return self._stream.write(text)  # type: ignore[no-any-return]
        with self._output.lock:
            place = self._output.place(batch)
            if place != self._place or len(self._rest) > REST_CHARACTERS:
                self.end_line()
            self._place = place
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._output.add(line, place)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As `write`."""
        self.write("".join(lines))

    def end_line(self) -> None:
        """Send the rest of a line."""
        with self._output.lock:
            if self._rest:
                rest, self._rest = self._rest, ""
                self._output.add(rest, self._place)
