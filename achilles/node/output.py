"""The lines that users' functions print: in a worker as OUTPUT frames, and how many of them leave a node.

It knows lines, the status array and a second's share. It knows no caller.

::

    print ─▶ Tap ─▶ Output ─▶ Flow ──OUTPUT, a socket pair of its own──▶ Flow, the node's ──OUTPUT──▶ server ─▶ caller
                                │ over its share: counted
                                └─────▶ one OUTPUT with the count, before the next RESULT

A worker captures `sys.stdout` and `sys.stderr` while it runs a batch of a job with output. What C code writes to the
descriptors is not captured, what Python code writes to `sys.stdout.buffer` is not, and neither is what the function's
own processes print.

Any thread of a user's function prints, and so do signal handlers, which may raise. So lines do not travel between the
RESULTs: one `send` of a whole OUTPUT, of little more than 1,024 bytes, is never cut by another one. The node takes the
lines that have come before it passes a RESULT on.

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

SHARE_BYTES = 64 << 10  # of output in a second: many screens, and little beside the results
FRAME_BYTES = 64  # that a line costs beside its text: head, range and tag
PIECE = re.compile(rb".{1,1024}(?![\x80-\xbf])", re.DOTALL)  # whole characters, as many as a short letter holds
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

    def count(self, job: int, node: int) -> Iterator[Batch]:
        """The OUTPUT that counts the lines which were left out since the last one, if there are any."""
        if self.left_out:
            lines, self.left_out = min(self.left_out, U32), 0
            yield Batch.pack(job, 0, [b""], attempt=lines, number=node, flags=MORE)


class Output:
    """What a worker prints, and its way to the node.

    :param status: the status array.
    :param sock: for the lines alone; blocking.
    """

    def __init__(self, status: Any, node: int, sock: socket.socket) -> None:
        self.batch: Batch | None = None  # that runs, if its job wants the output
        self._status, self._node, self._socket = status, node, sock
        self._job, self._flow = -1, Flow()  # of the last batch
        self._taps: list[Tap] = []

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

    def end_lines(self) -> None:
        """Let the lines go that have not ended: the function is done."""
        for tap in self._taps:
            tap.end_line()

    def count(self) -> None:
        """Tell how many lines were left out: a RESULT follows."""
        for count in self._flow.count(self._job, self._node):
            self._write(count)

    def place(self, batch: Batch) -> tuple[Batch, int, int]:
        """The batch, the chunk that runs, and the argument in it."""
        return batch, max(self._status[CHUNK], batch.first), max(self._status[OFFSET], 0)

    def add(self, line: str, place: tuple[Batch, int, int]) -> None:
        """Write what a terminal would show of a line, in pieces where it is long."""
        batch, chunk, offset = place
        for piece in PIECE.findall(line.rstrip("\r").rpartition("\r")[2].encode(errors="replace")) or [b""]:
            frame = Batch.pack(batch.job, chunk, [piece], attempt=offset, number=self._node)
            if not self._flow.admits(frame):
                return
            self._write(frame)

    def _write(self, frame: Batch) -> None:
        self._socket.sendall(encode(Kind.OUTPUT, frame)[0])


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
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As `write`."""
        self.write("".join(lines))

    def end_line(self) -> None:
        """Let a line go that has not ended."""
        if self._rest:
            rest, self._rest = self._rest, ""
            self._output.add(rest, self._place)
