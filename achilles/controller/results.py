"""What has come of a call and is not taken yet, and the window that bounds what is out.

Knows chunks by number, runs of them, and answers; knows no socket, no pickle and no clock.

::

    feeder ──enter──▶ out: waiting, sent, running, or answered here ──take──▶ taken, and room for more

A delivery is a list of answers: a run as it came (Pool, Executor), or a whole packet or list (the three original
calls).

The lock of the connection guards everything here: every method needs it. `changed` is a condition on that lock, one a
call, for the thread that takes and for the feeder.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

from ..errors import ProtocolError
from ..objects.outcomes import fresh
from ..protocol.frames import Letter

__all__ = ["NOBODY", "WINDOW_BYTES", "Answered", "Results", "Run", "Sink"]

WINDOW_BYTES = 256 << 20  # of arguments that are out: a caller may hold them twice, as objects and as letters
ENOUGH_ROOM = 0.75  # of the window out: then the feeder is woken, and has room for many chunks, not for one
ENDLESS = 1 << 64  # no chunk has this number


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

    def cut(self, at: int, to: int = ENDLESS) -> Run:
        """The chunks from the `at`-th up to the `to`-th; the same object, where these are all."""
        count = len(self.letters)
        if at == 0 and to >= count:
            return self
        arguments = min(to * self.size, self.arguments) - at * self.size
        return Run(self.first + at, self.start + at * self.size, self.size, self.letters[at:to], max(arguments, 0),
                   self.place, self.alone)

    def index(self, offset: int) -> int:
        """The index in args of an argument, or of its list."""
        return self.start + offset if self.place is None else self.place

    def name(self, offset: int) -> str:
        """How to call an argument in an error."""
        name = f"argument {self.start + offset}"
        return name if self.place is None else f"{name} of the list args[{self.place}]"


class Answered(NamedTuple):
    """Chunks that have an answer: a status and a letter each.

    `lost` says why arguments have no result, by their offset in the run. A letter is None where that is true of all.
    """

    run: Run
    statuses: bytes
    letters: Sequence[Letter | None]
    lost: Mapping[int, BaseException] = {}

    def cut(self, at: int, to: int = ENDLESS) -> Answered:
        """The answers from the `at`-th up to the `to`-th. A chunk with a lost argument is alone, and not cut."""
        return Answered(self.run.cut(at, to), self.statuses[at:to], self.letters[at:to], self.lost)


class Sink:
    """Where a job's answers go: here, nowhere. Every method needs the connection's lock."""

    given = ENDLESS  # chunks from this number on ask for GIVEN
    error: BaseException | None = None  # of the job as a whole

    def wants(self, number: int) -> bool:
        """Whether somebody waits for this chunk."""
        return self.error is None

    def put(self, answered: Answered) -> None:
        """Chunks of this call were answered, each once."""

    def give(self, first: int, count: int, workers: int, next_chunk: int) -> None:
        """The server says: a node of so many workers was given these chunks."""

    def fail(self, error: BaseException) -> None:
        """The job as a whole has failed."""


NOBODY = Sink()  # of a job between two calls


class Unit:
    """A packet, or a list: consecutive chunks that are delivered together."""

    def __init__(self, first: int, end: int) -> None:
        self.first, self.end = first, end
        self.pieces: list[Answered] = []
        self.got = 0  # chunks


class Results(Sink):
    """The window of a mapping call, and its results.

    :param by_argument: whether the window counts arguments (`buffersize`), not chunks.
    :param packets: deliver packets, which the GIVEN frames cut, and lists, each of which is a packet.
    :param ready: called when there may be something to take; must not block, nor take the lock.
    """

    def __init__(
        self, lock: threading.Lock, ordered: bool, by_argument: bool, packets: bool = False,
        ready: Callable[[], object] | None = None, first: int = 0,
    ) -> None:
        self.changed = threading.Condition(lock)
        self.ready = ready
        self.by_argument = by_argument
        self.last_error: BaseException | None = None  # raised behind the last result
        self.next = self._cut = first  # the chunk that is delivered next, in order; chunks below `_cut` have a unit
        self.end = ENDLESS  # the number behind that of the call's last chunk, once that is known
        self.out = self._out_bytes = 0  # of the window: chunks, or arguments
        self._limit = 0  # of the window, the largest that the feeder has asked for
        self.given = first if packets else ENDLESS
        self._ordered, self._packets = ordered, packets
        self.single = False  # each chunk that is entered is a packet
        self._done: dict[int, list[Answered]] = {}  # deliveries, by their first chunk
        self._units: list[Unit] = []  # that are not complete, in order

    @property
    def over(self) -> bool:
        """Whether everything was taken."""
        return self.next == self.end

    @property
    def complete(self) -> bool:
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
        """What the window has left, 0 where that is less than `weight`. An empty window always takes one chunk.

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
        self.last_error, self.end = error, end  # in this order: `complete` is read without the lock
        self.cut(end)
        if self.over:
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
        if unit.got == unit.end - unit.first:
            self._units.remove(unit)
            self._deliver(sorted(unit.pieces, key=lambda piece: piece.run.first))

    # Answers.

    def put(self, answered: Answered) -> None:
        """As Sink says. In a window of arguments, each chunk makes room when it is taken by itself."""
        if not self._packets:
            step = 1 if self.by_argument else len(answered.letters)
            for at in range(0, len(answered.letters), step):
                self._deliver([answered.cut(at, at + step)])
            return
        while answered.letters:  # cut where the units are; every chunk was given
            unit = self._units[bisect_right(self._units, answered.run.first, key=attrgetter("first")) - 1]
            count = unit.end - answered.run.first
            unit.pieces.append(answered.cut(0, count))
            unit.got += len(unit.pieces[-1].letters)
            self._look(unit)
            answered = answered.cut(count)

    def _deliver(self, pieces: list[Answered]) -> None:
        first = pieces[0].run.first
        self._done[first] = pieces
        if not self._ordered or first == self.next:
            self._tell()

    def take(self) -> list[Answered] | None:
        """The next delivery, if there is one. Raises what the call failed with."""
        if self.error is not None:
            raise fresh(self.error)
        key = self.next if self._ordered else next(iter(self._done), -1)
        pieces = self._done.pop(key, None)
        if pieces is None and self.over and self.last_error is not None:
            raise self.last_error
        for piece in pieces or ():
            self.next += len(piece.letters)
            self._count(piece.run, -1)
        if pieces and self.out <= self._limit * ENOUGH_ROOM:
            self.changed.notify_all()
        return pieces

    def fail(self, error: BaseException) -> None:
        """Raise `error` in the thread that takes, now and from now on. The first error stays."""
        if self.error is None:
            self.error = error
            self._tell()

    def _tell(self) -> None:
        self.changed.notify_all()
        if self.ready is not None:
            self.ready()
