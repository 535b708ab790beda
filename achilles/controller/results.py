"""The results of a call that are not taken yet, and the window that bounds the chunks that are out.

Knows runs of chunks, by number; knows no socket, no pickle and no clock.

::

    feeder ──enter──▶ out: waiting, sent, running, or answered here ──take──▶ taken, and room for more

A delivery is a list of runs: one as it was answered (Pool, Executor), or a whole packet or list (the three original
calls).

The lock of the connection guards everything here: every method needs it. `changed` is a condition on that lock, one a
call, for the thread that takes and for the feeder.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable
from operator import attrgetter

from ..errors import ProtocolError
from ..objects.outcomes import fresh
from .run import ENDLESS, Run

__all__ = ["NOBODY", "WINDOW_BYTES", "Results", "Sink"]

WINDOW_BYTES = 256 << 20  # of arguments that are out: a caller may hold them twice, as objects and as letters
ENOUGH_ROOM = 0.75  # of the window out: then the feeder is woken, and has room for many chunks, not for one
LINES_KEPT = 1024  # lines of output that nobody has taken: of at most 1,024 bytes each

Line = tuple[str, int | None, int]  # text, index of its argument, node


class Sink:
    """Where a job's answers go: here, nowhere. Every method needs the connection's lock."""

    given = ENDLESS  # chunks from this number on ask for GIVEN
    error: BaseException | None = None  # of the job as a whole

    def wants(self, number: int) -> bool:
        """Whether somebody waits for this chunk."""
        return self.error is None

    def put(self, run: Run) -> None:
        """Chunks of this call were answered, or given up; each once."""

    def give(self, first: int, count: int, workers: int, next_chunk: int) -> None:
        """The server says: a node of so many workers was given these chunks."""

    def hear(self, text: str, index: int | None, node: int) -> None:
        """A worker of this node printed a line, in the call of the argument with this index."""

    def leave_out(self, node: int, lines: int) -> None:
        """So many lines of this node will not come."""

    def fail(self, error: BaseException) -> None:
        """The job as a whole has failed."""


NOBODY = Sink()  # of a job between two calls


class Unit:
    """A packet, or a list: consecutive chunks that are delivered together."""

    def __init__(self, first: int, end: int) -> None:
        self.first, self.end = first, end
        self.pieces: list[Run] = []  # that are answered


class Results(Sink):
    """The window of a mapping call, and its results.

    :param by_argument: whether the window counts arguments (`buffersize`), not chunks.
    :param packets: deliver packets, which the GIVEN frames cut, and lists, each of which is a packet.
    :ivar ready: called when there may be something to take; must not block.
    """

    def __init__(
        self, lock: threading.RLock, ordered: bool, by_argument: bool, packets: bool = False, first: int = 0,
    ) -> None:
        self.changed = threading.Condition(lock)
        self.ready: Callable[[], object] | None = None
        self.by_argument = by_argument
        self.last_error: BaseException | None = None  # raised behind the last result
        self.next = self._cut = first  # the chunk that is delivered next, in order; chunks below `_cut` have a unit
        self.end = ENDLESS  # the number behind that of the call's last chunk, once that is known
        self.out = self._out_bytes = 0  # of the window: chunks, or arguments
        self._limit = 0  # of the window, the largest that the feeder has asked for
        self.given = first if packets else ENDLESS
        self._ordered, self._packets = ordered, packets
        self.single = False  # each chunk that is entered is a packet
        self._done: dict[int, list[Run]] = {}  # deliveries, by their first chunk
        self._units: list[Unit] = []  # that are not complete, in order
        self.lines: deque[Line] = deque()  # printed by workers, and not shown yet
        self._left_out: Counter[int] = Counter()  # node -> lines that were not kept

    @property
    def over(self) -> bool:
        """Whether everything was taken, and no error follows."""
        return self.next == self.end and self.last_error is None

    # The feeder.

    def enter(self, run: Run) -> None:
        """These chunks are out. Those of a list are a unit of their own, and so is a single chunk."""
        self._count(run, 1)
        if run.place is not None or self.single:
            self.given = ENDLESS
            self._units.append(Unit(run.first, run.end))

    def free(self, limit: int, weight: int = 1) -> int:
        """Return the room in the window, or 0 if it is less than `weight`. An empty window always takes one chunk.

        A window that was large stays so: else a slow moment would keep the feeder from a window that is half empty.
        """
        self._limit = max(limit, self._limit)
        left = self._limit - self.out if self._out_bytes <= WINDOW_BYTES else 0
        return left if left >= weight else 0 if self.out else weight

    def _count(self, run: Run, sign: int) -> None:
        """A list counts as one argument, with its first chunk."""
        weight = len(run.letters)
        if self.by_argument:
            weight = run.arguments if run.place is None else int(run.start == 0)
        self.out += sign * weight
        self._out_bytes += sign * sum(map(len, run.letters))

    def finish(self, end: int, error: BaseException | None) -> None:
        """The input has ended: chunk `end` will not come. Behind the last result `error` is raised."""
        self.last_error, self.end = error, end  # in this order: `over` is read without the lock
        self.cut(end)
        if self.next == end:
            self._tell()

    # Packets.

    def give(self, first: int, count: int, workers: int, next_chunk: int) -> None:
        """As Sink says. Cut the packets that begin there; chunks that are sent again were given before."""
        if not first <= self.given < first + count <= next_chunk or not workers:
            raise ProtocolError(f"{count} chunks from {first} on were given, which are not the next ones")
        self.given = first + count
        while self._cut < self.given:
            self._units.append(Unit(self._cut, min(self._cut + workers, self.end)))
            self._cut = self._units[-1].end

    def cut(self, next_chunk: int, stuck: bool = False) -> None:
        """The last packet ends before `next_chunk`, where it has begun: no chunk follows soon.

        :param stuck: the window is full: cut the packet only if there is no other one, which would make room.
        """
        if self._units and not (stuck and len(self._units) + len(self._done) > 1):
            unit = self._units[-1]
            if unit.first < next_chunk < unit.end:
                unit.end = self._cut = next_chunk
                self._look(unit)

    def _look(self, unit: Unit) -> None:
        if sum([len(piece.letters) for piece in unit.pieces]) == unit.end - unit.first:
            self._units.remove(unit)
            self._deliver(sorted(unit.pieces, key=attrgetter("first")))

    # Answers.

    def put(self, run: Run) -> None:
        """As Sink says."""
        if not self._packets:
            self._deliver([run])
            return
        while run.letters:  # cut where the units are; every chunk was given
            unit = self._units[bisect_right(self._units, run.first, key=attrgetter("first")) - 1]
            count = unit.end - run.first
            unit.pieces.append(run.cut(0, count))
            self._look(unit)
            run = run.cut(count)

    def _deliver(self, pieces: list[Run]) -> None:
        first = pieces[0].first
        self._done[first] = pieces
        if not self._ordered or first == self.next:
            self._tell()

    def take(self) -> list[Run] | None:
        """The next delivery, if there is one. Raises the error of the call."""
        if self.error is not None:
            raise fresh(self.error)
        key = self.next if self._ordered else next(iter(self._done), -1)
        pieces = self._done.pop(key, None)
        if pieces is None and self.next == self.end and self.last_error is not None:
            raise self.last_error
        for piece in pieces or ():
            self.next += len(piece.letters)
            self._count(piece, -1)
        if pieces and self.out <= self._limit * ENOUGH_ROOM:
            self.changed.notify_all()
        if self.next == self.end:
            for node in list(self._left_out):
                self._count_out(node)
        return pieces

    # Output.

    def hear(self, text: str, index: int | None, node: int) -> None:
        """As Sink says."""
        if len(self.lines) >= LINES_KEPT:
            self._left_out[node] += 1
            return
        self._count_out(node)
        self.lines.append((text, index, node))
        self._tell()

    def leave_out(self, node: int, lines: int) -> None:
        """As Sink says. They are counted before the next line of that node, or at the end of the call."""
        self._left_out[node] += lines

    def _count_out(self, node: int) -> None:
        if lines := self._left_out.pop(node, 0):
            self.lines.append((f"{lines:,} lines more", None, node))

    def fail(self, error: BaseException) -> None:
        """Raise `error` in the thread that takes, now and from now on. The first error stays."""
        if self.error is None:
            self.error = error
            self._tell()

    def _tell(self) -> None:
        self.changed.notify_all()
        if self.ready is not None:
            self.ready()
