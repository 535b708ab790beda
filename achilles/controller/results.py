"""What has come of a call and is not taken yet, and the window that bounds what is out.

Knows chunks by number, runs of them, and answers; knows no socket, no pickle and no clock.

::

    feeder ──enter──▶ out: waiting, sent, running, or answered here ──take──▶ taken, and room for more

A FlatResults gives each run of chunks as it comes, or in order (Pool, Executor). A PacketResults gives packets and
lists whole (the three original calls).

The lock of the connection guards everything here: every method needs it. `changed` is a condition on that lock, one a
call, for the thread that takes; `room` is another, for the feeder.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from ..errors import ProtocolError
from ..protocol.frames import Letter

__all__ = ["WINDOW_BYTES", "Answered", "FlatResults", "PacketResults", "Results", "Run", "Unit"]

WINDOW_BYTES = 256 << 20  # of arguments that are out: a caller may hold them twice, as objects and as letters
ENOUGH_ROOM = 0.75  # of the window out: then the feeder is woken, and has room for many chunks, not for one


class Run:
    """Consecutive chunks of one job, each of `size` arguments; the last one may have fewer.

    :ivar first: the number of the first chunk.  :ivar start: the index in args of its first argument, or the offset
        in its list.  :ivar arguments: of all chunks.  :ivar place: the index of their list in args, where args are
        lists.  :ivar alone: whether these chunks join no others in a batch.
    """

    __slots__ = ("alone", "arguments", "first", "letters", "place", "size", "start")

    def __init__(
        self, first: int, start: int, size: int, letters: list[Letter], arguments: int, place: int | None = None,
        alone: bool = False,
    ) -> None:
        self.first, self.start, self.size, self.letters = first, start, size, letters
        self.arguments, self.place, self.alone = arguments, place, alone

    @property
    def end(self) -> int:
        """The number behind that of the last chunk."""
        return self.first + len(self.letters)

    def cut(self, at: int, to: int | None = None) -> Run:
        """The chunks from the `at`-th up to the `to`-th."""
        count = len(self.letters)
        to = count if to is None else min(to, count)
        arguments = (self.arguments if to == count else to * self.size) - at * self.size
        return Run(self.first + at, self.start + at * self.size, self.size, self.letters[at:to], max(arguments, 0),
                   self.place, self.alone)

    def bytes(self) -> int:
        """Of all letters."""
        return sum(map(len, self.letters))

    def name(self, offset: int) -> str:
        """How to call an argument in an error."""
        index = self.start + offset
        return f"argument {index}" if self.place is None else f"argument {index} of the list args[{self.place}]"


class Answered(NamedTuple):
    """Chunks that have an answer: a status and a letter each, None where every argument was given up."""

    run: Run
    statuses: bytes
    letters: Sequence[Letter | None]

    def cut(self, at: int, to: int | None = None) -> Answered:
        """The answers from the `at`-th up to the `to`-th."""
        return Answered(self.run.cut(at, to), self.statuses[at:to], self.letters[at:to])


class Unit:
    """A packet, or a list: consecutive chunks that are delivered together. `place` is that of a list."""

    __slots__ = ("end", "first", "got", "pieces", "place")

    def __init__(self, first: int, end: int, place: int | None = None) -> None:
        self.first, self.end, self.place = first, end, place
        self.pieces: list[Answered] = []
        self.got = 0  # chunks


class Sink(Protocol):
    """Where a job's answers go. Every method needs the connection's lock."""

    tells: bool  # whether batches shall ask for GIVEN

    def put(self, answered: Answered) -> None:
        """Chunks of this call were answered, each once."""

    def fail(self, error: BaseException) -> None:
        """The job as a whole has failed."""

    def abandon(self, error: BaseException, lock: threading.Lock) -> None:
        """In a child of the caller: nothing will come. Takes no lock: `lock` is the connection's new one."""


class Results:
    """The window of a mapping call, and the end of its results. Subclasses say what is taken at once.

    :param by_argument: whether the window counts arguments (`buffersize`), not chunks.
    :param ready: called when there may be something to take; must not block, nor take the lock.
    """

    tells = False

    def __init__(
        self, lock: threading.Lock, ordered: bool, by_argument: bool, ready: Callable[[], object] | None = None
    ) -> None:
        self.changed = threading.Condition(lock)
        self.room = threading.Condition(lock)
        self.ready = ready
        self.by_argument = by_argument
        self.out = 0  # of the window: chunks, or arguments
        self.out_bytes = 0
        self.limit = float("inf")  # when the feeder last asked
        self.error: BaseException | None = None  # raised at once
        self.last_error: BaseException | None = None  # raised behind the last result
        self.end: int | None = None  # the number behind that of the call's last chunk, once that is known
        self._ordered = ordered

    def weight(self, run: Run) -> int:
        """What these chunks take of the window. A list counts as one argument, with its first chunk."""
        if not self.by_argument:
            return len(run.letters)
        return run.arguments if run.place is None else int(run.start == 0)

    def enter(self, run: Run) -> None:
        """These chunks are out."""
        self.out += self.weight(run)
        self.out_bytes += run.bytes()

    def free(self, limit: float, weight: int = 1) -> float:
        """What the window has left, 0 where that is less than `weight`. An empty window always takes one chunk."""
        self.limit = limit
        left = limit - self.out if self.out_bytes <= WINDOW_BYTES else 0
        return left if left >= weight else 0 if self.out else weight

    def taken(self, run: Run) -> None:
        """These chunks are the caller's: there is room for others."""
        self.out -= self.weight(run)
        self.out_bytes -= run.bytes()
        if self.out <= self.limit * ENOUGH_ROOM:
            self.room.notify_all()

    def finish(self, end: int, error: BaseException | None) -> None:
        """The input has ended: chunk `end` will not come. Behind the last result `error` is raised."""
        self.end, self.last_error = end, error
        self._tell()

    def fail(self, error: BaseException) -> None:
        """Raise `error` in the thread that takes, now and from now on. The first error stays."""
        self.error = self.error or error
        self.room.notify_all()
        self._tell()

    def abandon(self, error: BaseException, lock: threading.Lock) -> None:
        """As Sink says."""
        self.changed = self.room = threading.Condition(lock)
        self.ready, self.error = None, error

    def _tell(self) -> None:
        self.changed.notify_all()
        if self.ready is not None:
            self.ready()


class FlatResults(Results):
    """Chunks that are delivered run by run."""

    def __init__(
        self, lock: threading.Lock, ordered: bool, by_argument: bool, ready: Callable[[], object] | None = None
    ) -> None:
        super().__init__(lock, ordered, by_argument, ready)
        self.next = 0  # the chunk that is delivered next, in order
        self._answers: dict[int, Answered] = {}  # by their first chunk

    def begin(self, first: int) -> None:
        """The call's first chunk has this number."""
        self.next = first

    def put(self, answered: Answered) -> None:
        """As Sink says."""
        self._answers[answered.run.first] = answered
        if not self._ordered or self.next in self._answers:
            self._tell()

    def take(self) -> Answered | None:
        """The next answers, if there are any."""
        key = self.next if self._ordered else next(iter(self._answers), -1)
        answered = self._answers.pop(key, None)
        if answered is None:
            return None
        if self.by_argument and len(answered.letters) > 1:  # each chunk makes room when it is taken, not before
            rest = answered.cut(1)
            self._answers = {rest.run.first: rest} | self._answers
            answered = answered.cut(0, 1)
        self.next += len(answered.letters)
        self.taken(answered.run)
        return answered

    @property
    def over(self) -> bool:
        """Whether everything was taken."""
        return self.next == self.end


class PacketResults(Results):
    """Packets, which the GIVEN frames cut, and lists, each of which is a packet."""

    tells = True

    def __init__(self, lock: threading.Lock, ordered: bool, by_argument: bool) -> None:
        super().__init__(lock, ordered, by_argument)
        self._units: list[Unit] = []  # not taken, in order
        self._given: deque[tuple[int, int]] = deque()  # end of a given range, workers of its node; in order
        self.given = 0  # chunks below this one were given
        self._cut = 0  # chunks below this one belong to a unit

    def add_list(self, place: int, first: int, end: int) -> None:
        """A list, perhaps empty, is a unit of its own."""
        self.tells = False
        self._units.append(Unit(first, end, place))
        if first == end:
            self._tell()

    def give(self, first: int, count: int, workers: int, next_chunk: int) -> None:
        """The server says: a node of so many workers was given these chunks. Cut the packets that begin there."""
        if first != self.given or not count or not workers or first + count > next_chunk or not self.tells:
            raise ProtocolError(f"{count} chunks from {first} on were given, which are not the next ones")
        self.given = first + count
        while self._cut < self.given:
            end = self._cut + workers
            self._units.append(Unit(self._cut, end if self.end is None else min(end, self.end)))
            self._cut = self._units[-1].end

    def cut(self, next_chunk: int, stuck: bool = False) -> None:
        """The last packet ends before `next_chunk`, where it has begun: no chunk follows soon.

        :param stuck: the window is full: cut the packet only if there is no other one, which would make room.
        """
        if stuck and len(self._units) > 1:
            return
        if self._units and self._units[-1].place is None and self._units[-1].first < next_chunk < self._units[-1].end:
            self._units[-1].end = self._cut = next_chunk
            self._look(self._units[-1])

    def finish(self, end: int, error: BaseException | None) -> None:
        """As Results says; the last packet ends there."""
        self.cut(end)
        super().finish(end, error)

    def put(self, answered: Answered) -> None:
        """As Sink says. The runs are cut where the units are. Every chunk was given."""
        while answered.letters:
            first = answered.run.first
            unit = self._units[bisect_right([each.first for each in self._units], first) - 1]
            count = min(unit.end - first, len(answered.letters))
            unit.pieces.append(answered.cut(0, count))
            unit.got += count
            self._look(unit)
            answered = answered.cut(count)

    def _look(self, unit: Unit) -> None:
        if unit.got == unit.end - unit.first and (not self._ordered or unit is self._units[0]):
            self._tell()

    def take(self) -> Unit | None:
        """The next complete unit, if there is one."""
        for at, unit in enumerate(self._units):
            if unit.got == unit.end - unit.first:
                del self._units[at]
                unit.pieces.sort(key=lambda piece: piece.run.first)
                for piece in unit.pieces:
                    self.taken(piece.run)
                return unit
            if self._ordered:
                break
        return None

    @property
    def over(self) -> bool:
        """Whether everything was taken."""
        return self.end is not None and not self._units and (not self.tells or self._cut >= self.end)
