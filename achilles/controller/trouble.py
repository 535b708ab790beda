"""What went wrong with a chunk: deaths, losses and alterations, and when an argument is given up.

Knows counts and errors; knows no job, no frame and no connection. The connection's lock guards each Trouble.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import LetterAltered, TaskTimeout, WorkerLost
from ..objects.outcomes import mark
from .results import Run

__all__ = ["ATTEMPTS", "Trouble", "explained", "lost"]

ATTEMPTS = 3  # deaths of an argument, or alterations of a chunk, before it is given up
LOSSES = 10  # nodes that were lost with a chunk before it is given up
LOSSES_ALONE = 3  # of them, after which the chunk travels alone
UNKNOWN = -1  # an offset: deaths of which the worker had not said at which argument


class Trouble:
    """A chunk that did not go as it should. Most chunks have none.

    :ivar deaths: offset -> workers that died under it.  :ivar lost: offset -> why it is not tried again.
    """

    def __init__(self) -> None:
        self.altered = self.losses = 0
        self.deaths: Counter[int] = Counter()
        self.lost: dict[int, BaseException] = {}

    @property
    def is_doubtful(self) -> bool:
        """Whether the chunk travels alone."""
        return bool(self.deaths or self.losses >= LOSSES_ALONE)

    def die(self, chunk: Run, note: dict[str, Any], limit: str = "") -> None:
        """A worker died under the chunk, or was killed where it ran longer than `limit`."""
        phase = note["phase"]
        for offset in self._charge(chunk, note["offset"], phase):
            where = chunk.name(offset)
            if limit:
                self.lost[offset] = mark(TaskTimeout(f"{where} ran longer than {limit}"), node=note.get("node"))
            elif self.deaths[offset] >= ATTEMPTS:
                self.lost[offset] = lost(f"{where}: {ATTEMPTS} workers died under it (phase {phase})", note)

    def lose(self, chunk: Run) -> bool:
        """A node was lost with the chunk; whether it is given up."""
        self.losses += 1
        if self.losses >= LOSSES:
            text = f"{self.losses} nodes were lost while they had it"
            self.lost.update({at: lost(f"{chunk.name(at)}: {text}") for at in self._left(chunk)})
        return self.losses >= LOSSES

    def alter(self, chunk: Run) -> None:
        """The chunk or its answer was altered on its way."""
        self.altered += 1
        if self.altered >= ATTEMPTS:
            text = f"or its result was altered on its way {ATTEMPTS} times"
            self.lost.update({at: LetterAltered(f"{chunk.name(at)} {text}") for at in self._left(chunk)})

    def _left(self, chunk: Run) -> list[int]:
        """The offsets in the chunk that are still tried."""
        return [offset for offset in range(chunk.arguments) if offset not in self.lost]

    def _charge(self, chunk: Run, offset: int, phase: str) -> Iterable[int]:
        """Count a death; the offsets that it is charged to.

        A worker names the argument that it is at only where the batch is careful. Then the deaths before count for
        the argument that is named.
        """
        if 0 <= offset < chunk.arguments:
            self.deaths[offset] += 1 + self.deaths.pop(UNKNOWN, 0)
            return [offset]
        left = self._left(chunk)
        if phase == "load":
            self.deaths.update(left)
            return left
        if phase == "function":
            return []
        self.deaths[UNKNOWN] += 1
        if self.deaths[UNKNOWN] < ATTEMPTS:
            return []
        self.deaths.update(dict.fromkeys(left, ATTEMPTS))  # each can be dumped, but not all of them
        return left


def explained(error: BaseException) -> BaseException:
    """Why a function or a chunk could not be loaded; a module that the node lacks gets its remedy."""
    if not isinstance(error, ModuleNotFoundError):
        return error
    node = getattr(error, "node", None)
    remedy = "install it there, or put the file into a folder on that node's PYTHONPATH, or import less of it"
    told = ModuleNotFoundError(f"{error} on node {node}: {remedy}", name=error.name, path=error.path)
    told.__cause__ = error.__cause__
    return mark(told, node=node)  # type: ignore[no-any-return]


def lost(text: str, note: Mapping[str, Any] = {}) -> WorkerLost:  # noqa: B006
    """The error of an argument, or of a function, that took its worker or its node with it."""
    exitcode, pid, node = note.get("exitcode"), note.get("pid"), note.get("node")
    if pid is not None:
        how = f"signal {-exitcode}" if isinstance(exitcode, int) and exitcode < 0 else f"status {exitcode}"
        text += f"; the last one on node {node}, pid {pid}, ended with {how}"
    error: WorkerLost = mark(WorkerLost(text), node=node, pid=pid, exitcode=exitcode)
    return error
