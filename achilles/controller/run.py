"""A run: consecutive chunks of one job, with their deaths, losses and answers.

Knows letters, counts and errors; knows no job, no frame and no connection. The connection's lock guards each run.

::

    Job.waiting ─cut─▶ Job.out ─cut─▶ answers ─▶ Results, until they are taken
         ▲─── counts, lost ──┘

A run is cut wherever its chunks part. The pieces share `counts` and `lost`, which are replaced and never changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import LetterAltered, TaskTimeout, WorkerLost
from ..objects.outcomes import mark
from ..protocol.frames import Letter

__all__ = ["ALTERED", "ATTEMPTS", "ENDLESS", "LOST", "Run", "worker_lost"]

ENDLESS = 1 << 64  # no chunk has this number
ATTEMPTS = 3  # deaths of an argument, or alterations of a chunk, before it is given up
LOSSES = 10  # nodes that were lost with a chunk before it is given up
LOSSES_ALONE = 3  # of them, after which the chunk travels alone
UNKNOWN, LOST, ALTERED = -1, -2, -3  # in an offset's place: deaths at no named argument, and of the whole chunk
GIVEN_UP: dict[int, tuple[int, type[Exception], str]] = {  # after how many times, and the error
    LOST: (LOSSES, WorkerLost, f": {LOSSES} nodes were lost while they had it"),
    ALTERED: (ATTEMPTS, LetterAltered, f" or its result was altered on its way {ATTEMPTS} times"),
}
NO_COUNTS: Counter[int] = Counter()


class Run:
    """Consecutive chunks of one job, each of `size` arguments; the last one may have fewer.

    :ivar first: the number of the first chunk.  :ivar start: the index in args of its first argument, or the offset
        in its list.  :ivar letters: of each chunk.  :ivar arguments: of all chunks.  :ivar place: the index of their
        list in args, where args are lists.
    :ivar counts: offset -> workers that died under it; or LOST, ALTERED -> how often.
    :ivar lost: offset -> why it is not tried again.
    :ivar status: of every answer.  :ivar answers: a letter for each chunk. None where all arguments are lost.
    """

    __slots__ = ("answers", "arguments", "counts", "first", "letters", "lost", "place", "size", "start", "status")

    def __init__(
        self, first: int, start: int, size: int, letters: list[Letter], arguments: int, place: int | None = None,
        counts: Counter[int] = NO_COUNTS, lost: dict[int, BaseException] = {}, status: int = 0,  # noqa: B006
        answers: Sequence[Letter] = (),
    ) -> None:
        self.first, self.start, self.size, self.letters = first, start, size, letters
        self.arguments, self.place, self.counts, self.lost = arguments, place, counts, lost
        self.status, self.answers = status, answers

    @property
    def end(self) -> int:
        """The number behind that of the last chunk."""
        return self.first + len(self.letters)

    def cut(self, at: int, to: int = ENDLESS) -> Run:
        """The chunks from the `at`-th up to the `to`-th; the same object, where these are all."""
        if at == 0 and to >= len(self.letters):
            return self
        arguments = min(to * self.size, self.arguments) - at * self.size
        return Run(self.first + at, self.start + at * self.size, self.size, self.letters[at:to], max(arguments, 0),
                   self.place, self.counts, self.lost, self.status, self.answers[at:to])

    def index(self, offset: int) -> int:
        """The index in args of an argument, or of its list."""
        return self.start + offset if self.place is None else self.place

    def name(self, offset: int) -> str:
        """How to call an argument in an error."""
        name = f"argument {self.start + offset}"
        return name if self.place is None else f"{name} of the list args[{self.place}]"

    # Deaths and losses. A death is of one chunk.

    @property
    def has_died(self) -> bool:
        """Whether a worker died under the chunk."""
        return max(self.counts, default=LOST) >= UNKNOWN

    @property
    def is_doubtful(self) -> bool:
        """Whether each chunk travels alone."""
        return bool(self.counts) and (bool(self.lost) or self.has_died or self.counts[LOST] >= LOSSES_ALONE)

    def die(self, note: Mapping[str, Any], limit: str) -> None:
        """A worker died under the chunk, or was killed where it ran longer than `limit`, a text.

        A worker names the argument that it is at only where the batch is careful. Then the deaths before count for
        the argument that is named. Three deaths at no argument lose the chunk.
        """
        offset, charged = UNKNOWN, [*range(self.arguments)]
        if note["offset"] in charged:
            offset, charged = note["offset"], [note["offset"]]
            unnamed = self.counts[UNKNOWN]
            self.counts = self.counts + Counter({offset: unnamed, UNKNOWN: -unnamed})
        if limit:
            text, node = f"ran longer than {limit}", note.get("node")
            self._count(offset, 1, lambda name: mark(TaskTimeout(f"{name} {text}"), node=node), charged)
        else:
            text = f"{ATTEMPTS} workers died under it (phase {note['phase']})"
            self._count(offset, ATTEMPTS, lambda name: worker_lost(f"{name}: {text}", note), charged)

    def charge(self, cause: int) -> None:
        """A node was lost with the chunks (LOST), or a chunk or its answer was altered on its way (ALTERED)."""
        most, error, text = GIVEN_UP[cause]
        self._count(cause, most, lambda name: error(name + text), range(self.arguments))

    def _count(self, cause: int, most: int, error: Callable[[str], BaseException], offsets: Iterable[int]) -> None:
        """It happened once more. The `most`-th time, the arguments at these offsets are not tried again."""
        self.counts = self.counts + Counter([cause])
        if self.counts[cause] >= most:
            lost = {offset: mark(error(self.name(offset)), index=self.index(offset)) for offset in offsets}
            self.lost = lost | self.lost


def worker_lost(text: str, note: Mapping[str, Any]) -> BaseException:
    """The error of an argument, or of a function, that took its worker with it."""
    exitcode, pid, node = note.get("exitcode"), note.get("pid"), note.get("node")
    if pid is not None:
        how = f"signal {-exitcode}" if isinstance(exitcode, int) and exitcode < 0 else f"status {exitcode}"
        text += f"; the last one on node {node}, pid {pid}, ended with {how}: did it crash, or lack memory there?"
    return mark(WorkerLost(text), node=node, pid=pid, exitcode=exitcode)  # type: ignore[no-any-return]
