"""What went wrong with a chunk: deaths, losses and alterations, and when an argument is given up.

Knows counts and errors; knows no job, no frame and no connection. The connection's lock guards each Trouble.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import LetterAltered, TaskTimeout, WorkerLost
from ..objects.outcomes import mark
from .results import Run

__all__ = ["ATTEMPTS", "NO_TROUBLE", "Trouble", "lost"]

ATTEMPTS = 3  # deaths of an argument, or alterations of a chunk, before it is given up
LOSSES = 10  # nodes that were lost with a chunk before it is given up
LOSSES_ALONE = 3  # of them, after which the chunk travels alone
UNKNOWN, LOST, ALTERED = -1, -2, -3  # in an offset's place: deaths at no named argument, and of the whole chunk


class Trouble:
    """A chunk that did not go as it should. Most chunks have none.

    :ivar counts: offset -> workers that died under it.  :ivar lost: offset -> why it is not tried again.
    """

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.lost: dict[int, BaseException] = {}

    @property
    def has_died(self) -> bool:
        """Whether a worker died under the chunk."""
        return max(self.counts, default=LOST) >= UNKNOWN

    @property
    def is_doubtful(self) -> bool:
        """Whether the chunk travels alone."""
        return bool(self.lost) or self.has_died or self.counts[LOST] >= LOSSES_ALONE

    def die(self, chunk: Run, note: dict[str, Any], limit: str) -> None:
        """A worker died under the chunk, or was killed where it ran longer than `limit`, a text.

        A worker names the argument that it is at only where the batch is careful. Then the deaths before count for
        the argument that is named. Three deaths at no argument lose the chunk.
        """
        offset, charged = UNKNOWN, [*range(chunk.arguments)]
        if note["offset"] in charged:
            offset, charged = note["offset"], [note["offset"]]
            self.counts[offset] += self.counts.pop(UNKNOWN, 0)
        if limit:
            text, node = f"ran longer than {limit}", note.get("node")
            self._count(chunk, offset, 1, lambda name: mark(TaskTimeout(f"{name} {text}"), node=node), charged)
        else:
            text = f"{ATTEMPTS} workers died under it (phase {note['phase']})"
            self._count(chunk, offset, ATTEMPTS, lambda name: lost(f"{name}: {text}", note), charged)

    def lose(self, chunk: Run) -> None:
        """A node was lost with the chunk."""
        text = f"{LOSSES} nodes were lost while they had it"
        self._count(chunk, LOST, LOSSES, lambda name: WorkerLost(f"{name}: {text}"), range(chunk.arguments))

    def alter(self, chunk: Run) -> None:
        """The chunk or its answer was altered on its way."""
        text = f"or its result was altered on its way {ATTEMPTS} times"
        self._count(chunk, ALTERED, ATTEMPTS, lambda name: LetterAltered(f"{name} {text}"), range(chunk.arguments))

    def _count(
        self, chunk: Run, what: int, most: int, error: Callable[[str], BaseException], offsets: Iterable[int]
    ) -> None:
        """It happened once more. The `most`-th time, the arguments at these offsets are not tried again."""
        self.counts[what] += 1
        if self.counts[what] >= most:
            for offset in offsets:
                self.lost.setdefault(offset, mark(error(chunk.name(offset)), index=chunk.index(offset)))


NO_TROUBLE = Trouble()  # of every other chunk; nothing is charged to it


def lost(text: str, note: dict[str, Any]) -> BaseException:
    """The error of an argument, or of a function, that took its worker with it."""
    exitcode, pid, node = note.get("exitcode"), note.get("pid"), note.get("node")
    if pid is not None:
        how = f"signal {-exitcode}" if isinstance(exitcode, int) and exitcode < 0 else f"status {exitcode}"
        text += f"; the last one on node {node}, pid {pid}, ended with {how}"
    return mark(WorkerLost(text), node=node, pid=pid, exitcode=exitcode)  # type: ignore[no-any-return]
