"""What of a job is at a node and no worker has: a queue of slices, and how many of them make a message.

Knows rows and their order; knows no worker, no server and no clock but the paces that RESULTs bring. Called by
the node's one thread.
"""

from __future__ import annotations

import time
from collections import deque
from itertools import repeat
from typing import Any

from ..protocol.frames import MAX_ROWS, MAX_SHORT_BYTES, MESSAGE_US, PACE_SLICES, Rows, merge

__all__ = ["Backlog"]


class Backlog:
    """A job of the server's and what of it no worker has."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self.number: int = body["job"]
        self.context: str = body["context"]
        self.functions: list[str] = [body[name] for name in ("initializer", "function") if body.get(name)]
        self.timeout: float | None = body["options"].get("timeout")
        self.tasks: int | None = body["options"].get("maxtasksperchild")
        self.queue: deque[Rows] = deque()
        self.queued = 0  # slices in it
        self.paces: deque[int] = deque(maxlen=PACE_SLICES)  # µs
        self.cancelled_at: float | None = None  # monotonic; ended counts as well

    def judge(self, rows: Rows) -> None:
        """Take note of how long answered slices took."""
        self.paces.extend(repeat(rows.pace, len(rows)))

    def worth(self) -> int:
        """How many slices travel together."""
        return max(1, MESSAGE_US // max(self.paces)) if self.paces else 1

    def put(self, rows: Rows, *, back: bool = False) -> None:
        """Queue slices; `back` puts them before all others."""
        (self.queue.appendleft if back else self.queue.append)(rows)
        self.queued += len(rows)

    def take(self, number: int) -> Rows | None:
        """Up to `number` of the slices that come next, joined as far as they may travel in one frame."""
        taken: list[Rows] = []
        room, size = min(number, MAX_ROWS), 0
        while room and self.queue:
            rows = self.queue.popleft()
            piece = rows.cut(0, room)
            size += piece.size()
            if taken and size > MAX_SHORT_BYTES:
                self.queue.appendleft(rows)
                break
            if len(piece) < len(rows):
                self.queue.appendleft(rows.cut(len(piece), len(rows)))
            taken.append(piece)
            room -= len(piece)
        self.queued -= sum(map(len, taken))
        return merge(taken) if taken else None

    def take_last(self, number: int) -> list[Rows]:
        """Up to `number` slices from the tail."""
        taken: list[Rows] = []
        room = min(number, MAX_ROWS)
        while room and self.queue:
            rows = self.queue.pop()
            if len(rows) > room:
                self.queue.append(rows.cut(0, len(rows) - room))
                rows = rows.cut(len(rows) - room, len(rows))
            taken.insert(0, rows)
            room -= len(rows)
            self.queued -= len(rows)
        return taken

    def drop(self) -> None:
        """Forget what is queued: the job is cancelled, or over."""
        self.cancelled_at = self.cancelled_at or time.monotonic()
        self.queue.clear()
        self.queued = 0
