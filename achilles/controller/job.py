"""One job in the controller: slices out, answers in, results out.

Knows which arguments a slice number stands for, and keeps each slice until its result is checked, so
that it can be sent again. Knows nothing of connections: it posts frames through its `link` (the
Controller), which may be connected or not; and nothing of iterating, which is `feeder.py`'s.

::

    feeder          Feeder ─▶ enter(): numbered, kept in `slices`, posted as TASK
    reader thread   answers(): into the buffer; deaths are counted, and the slice is posted
                               again without the argument that kills
    caller's thread take(): its take ─▶ check digest ─▶ load ─▶ Window.leave

The caller's thread alone loads what came back; the reader runs no code of the user's. `link.lock` guards
`slices` and `_next`, and is held while slices are entered and posted, so that a reconnection finds all of
a slice or nothing. `_waiting` and `_troubles` are changed in single steps by whoever has the slice: the
feeder until it is posted, then the reader, and the caller's thread once it is answered.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from ..errors import LetterAltered, LetterTooLarge, ProtocolError, TaskTimeout, WorkerLost
from ..objects import letters, outcomes
from ..protocol.fields import read_object
from ..protocol.frames import (
    MAX_LONG_BYTES,
    MAX_ROWS,
    MAX_SHORT_BYTES,
    MESSAGE_US,
    MORE,
    NOTE,
    PACKED,
    Buffer,
    Kind,
    Rows,
    Status,
)
from .feeder import CANCELLED, Feeder, Slice, join, mark
from .results import SliceBuffer, Unit, UnitBuffer, Window

__all__ = ["ATTEMPTS", "SLICE_US", "Function", "Job", "Link", "Taken"]

ATTEMPTS = 3  # deaths of an argument, or alterations of a slice in a row, before it is given up
UNNAMED = -1  # in place of a position: deaths of which the worker had not said at which argument
WINDOW_SLICES = 64  # out beyond two for each worker: what is under way between here and there
SLICE_US = 50_000  # of work in a slice of a job that chooses by itself: far over what a slice costs ...
SLICE_BYTES = 1 << 20  # ... and bytes of it, or of its results: beyond, more of them save nothing
GROWTH = 16  # times as many arguments in the next slice, at most: the first ones may have been quick by chance
FRAME_BYTES = min(MAX_LONG_BYTES, MAX_SHORT_BYTES)  # of letters: a frame takes them, whether they are long or short
TAKE_BYTES = 1 << 20  # of results that are loaded together; with `buffersize`, which counts each, none are
QUICK_SLICES = 4096  # more may be out where slices are quick and short: a MESSAGE_US for each worker, up to this

Part = tuple[int, bytes, Buffer]  # of an answer: status, digest, letter
Answer = Sequence[Part]
Taken = tuple[int, list[Any], dict[int, BaseException]]  # start, values, place in them -> error


class Link(Protocol):
    """What a job needs of the Controller."""

    lock: threading.Lock
    letter_limit: int

    def post(self, kind: Kind, body: dict[str, Any] | Rows) -> None:
        """Queue, or drop where there is no connection: the job is declared anew then. Needs `lock`."""

    def push(self) -> None:
        """Send what was posted. Without `lock`. Here: it is under way already."""
        return

    def check_size(self, what: str, size: int) -> None:
        """LetterTooLarge if `what`, of `size` bytes, may not travel to every node."""
        if size > self.letter_limit:
            raise LetterTooLarge(f"{what} has {size:,} bytes, no more than {self.letter_limit:,} travel in one piece")

    def workers(self) -> tuple[int, int]:
        """Workers of the cluster that can run this caller's functions, and those of the largest node."""

    def wait_for_workers(self, timeout: float) -> None:
        """Block until the cluster changes, at most `timeout` seconds. Here: it never does."""
        return


class Function:
    """A function or an initializer, dumped: its letter, and the digest that names it."""

    def __init__(self, parts: Sequence[Buffer]) -> None:
        self.letter = join(parts)
        self.digest = letters.letter_digest([self.letter])


def dump_function(value: object, name: str) -> tuple[letters.Context, Function]:
    """A context of its own, and what a call calls, dumped in it. Raises DumpError, which has the name."""
    context = letters.Context(caller=True)
    return context, Function(context.dump(value, name))


class _Trouble:
    """What is known of a slice that did not go as it should. Most slices have none."""

    def __init__(self) -> None:
        self.attempt = 0
        self.altered = 0  # how often in a row
        self.deaths: Counter[int] = Counter()  # position -> workers that died under it
        self.lost: dict[int, BaseException] = {}  # position -> why it is not tried again
        self.parts: list[Part] = []  # of an answer that has not come whole ...
        self.parts_attempt = -1  # ... and of which attempt


class Job:
    """A call of map, imap and the like, from its first argument to its last result.

    `flat`: every slice is delivered by itself (Pool, Executor). Otherwise units are
    packets, which the server cuts, or lists, where the first argument is a list.
    `ordered`: `take` follows the order of `args`. `eager`: an error of the iterable
    is raised at once, not in its place. `largest`: let slices grow up to so many
    arguments, or to `slice_us` of work, as they turn out to be quick. `ready`: is called, without any lock held,
    when there may be something to take; from any thread, must not block.
    """

    def __init__(
        self, link: Link, number: int, context: letters.Context, context_id: bytes, function: Function,
        args: Iterable[Any] | Callable[[], Any], *, chunksize: int = 1, ordered: bool = True,
        flat: bool = False, eager: bool = False, buffersize: int | None = None,
        options: Mapping[str, Any] | None = None, initializer: Function | None = None,
        largest: int | None = None, slice_us: int = SLICE_US, ready: Callable[[], object] | None = None,
    ) -> None:
        self.link = link
        self.number = number
        self.context = context
        self.context_id = context_id
        self.function = function
        self.initializer = initializer
        self.options = {name: value for name, value in (options or {}).items() if value is not None}
        self.buffer: SliceBuffer | UnitBuffer = SliceBuffer(ordered) if flat else UnitBuffer(ordered)
        self.ready = ready
        self.slices: dict[int, Slice] = {}  # without a checked result
        self.ended = False  # END was posted, and nothing may follow it; guarded by link.lock
        self._waiting: set[int] = set()  # of them, those without an answer
        self._troubles: dict[int, _Trouble] = {}
        self._next = 0  # number of the next slice
        self._flushed = 0  # up to this slice packets need not be full
        self._packed = 0  # slices below this one belong to a packet ...
        self._flat = flat
        self._lists = False  # ... or all, where the job is flat or has lists
        self._eager = eager
        self._deaths = 0  # workers that died while they loaded the function
        self._ready: deque[Any] = deque()  # taken out of the buffer, not by the caller yet; the caller's thread alone
        self._given: list[int] = []  # slices that were; their room is given back together
        self._largest = largest if buffersize is None or largest is None else min(largest, buffersize)
        self._least, self._slice_us = min(chunksize, buffersize or chunksize), slice_us
        self.single = flat and isinstance(args, (list, tuple, range)) and 0 < len(args) <= self._least  # slice
        self._buffersize = buffersize
        self._beyond: float = WINDOW_SLICES
        self._worth = 1  # slices that make a message, by the slowest of late
        self._window = Window(buffersize or self._window_slices())
        self._feeder = Feeder(
            self, context, self._window, args, size=self._least,
            by_argument=buffersize is not None, lists=not flat,
        )

    def start(self) -> None:
        """Begin to iterate, dump and send. The job is declared by then."""
        self._feeder.start(str(self.number))

    @property
    def fed(self) -> threading.Event:
        """Set when the input has ended, or the job has."""
        return self._feeder.ended

    def stop(self) -> None:
        """Nothing more is fed, kept or taken; joins the feeder, half a second at most. Any thread."""
        self.fail(InterruptedError(CANCELLED))
        self._feeder.stop()
        with self.link.lock:
            self.slices.clear()
            self._waiting.clear()

    def abandon(self, error: BaseException) -> None:
        """In a child of the caller: the job is the parent's. Takes none of its locks; their holders may not exist."""
        self.ended, self.slices, self._waiting = True, {}, set()
        self._ready.clear()
        self._given.clear()
        self.buffer, self._window = UnitBuffer(True), Window(0)
        self._feeder = Feeder(self, self.context, self._window, (), size=1, by_argument=False, lists=False)
        self.buffer.fail(error)
        self.ready = None

    def resize(self) -> None:
        """The cluster has changed: so does the window, unless `buffersize` set it."""
        if self._buffersize is None:
            self._window.resize(self._window_slices())

    def lift_window(self) -> None:
        """Let everything out: nobody will take before all is done."""
        self._buffersize, self._beyond = None, math.inf
        self.resize()

    def functions(self) -> dict[str, Function]:
        """What must be there before it runs, by what it is to the job."""
        both = {"function": self.function, "initializer": self.initializer}
        return {role: function for role, function in both.items() if function is not None}

    def declaration(self) -> dict[str, Any]:
        """The body of its JOB, but for what the connection knows."""
        digests = {role: function.digest.hex() for role, function in self.functions().items()}
        return {"job": self.number, "context": self.context_id.hex(), "options": self.options, **digests}

    def follow(self, number: int, first: int) -> None:
        """Go on under the number of one that is over and was declared alike: its next slice is `first`. Flat jobs."""
        self.number, self._next = number, first
        if isinstance(self.buffer, SliceBuffer):
            self.buffer.begin(first)

    @property
    def spent(self) -> int:
        """The slice that could follow, where none is open and the function was loaded, else 0. Needs `link.lock`."""
        return 0 if self.slices or self._troubles or self._deaths or not self._flat else self._next

    def outstanding(self) -> list[Rows]:
        """Every slice without an answer, for a new connection. Needs `link.lock`; no slice is charged."""
        for trouble in list(self._troubles.values()):  # the caller's thread may find another one meanwhile
            trouble.parts = []  # the rest of them went to the old connection
        return [self._rows([number]) for number in sorted(self._waiting)]

    def flushed(self) -> int:
        """Up to which slice packets need not be full, 0 where there is none. Needs `link.lock`."""
        return self._flushed

    # The caller's thread.

    def take(self, timeout: float | None = None) -> Taken | None:
        """The next values: the place of the first, and an exception for each that has none. None behind the last.

        Blocks up to `timeout` seconds, then NotYet. Raises what the job as a whole failed with.
        """
        while True:
            if not self._ready:
                self._ready.extend(self.buffer.take(timeout))
                if not self._ready:
                    return None
            try:
                buffer = self.buffer
                taken = self._open_slices(buffer) if isinstance(buffer, SliceBuffer) else self._open_unit(buffer)
            except KeyError:  # stopped by another thread: its slices are forgotten, and the buffer says why
                if not self.ended:
                    raise
                self._ready.clear()
                continue
            if taken is not None:
                if not self._ready or self._buffersize is not None:
                    self._release()
                return taken

    def _open_slices(self, buffer: SliceBuffer) -> Taken | None:
        """Load consecutive slices, as far as their answers are ordinary; or one that is not, by itself."""
        first = self._ready[0][0]
        values: list[Any] = []
        opened, room = 0, TAKE_BYTES if self._buffersize is None else 0
        try:
            for number, answer in self._ready:
                if number != first + opened or number in self._troubles or len(answer) != 1:
                    break
                (status, digest, letter), = answer
                if status != Status.VALUES or (digest and letters.letter_digest([letter]) != digest):
                    break
                some = self.context.load(letter)
                if len(some) != self.slices[number].number:
                    break
                values += some
                opened, room = opened + 1, room - len(letter)
                if room <= 0:
                    break
        except Exception:  # is raised when it is the first, behind what came before it
            if not opened:
                raise
        if not opened:
            return self._open_odd_slice(buffer, *self._ready[0])
        for _ in range(opened):
            self._ready.popleft()
        self._given.extend(range(first, first + opened))
        return self.slices[first].start, values, {}

    def _open_odd_slice(self, buffer: SliceBuffer, number: int, answer: Answer) -> Taken | None:
        if _is_altered(answer):
            buffer.put_back(list(self._ready))
            self._ready.clear()
            self._alter(number)
            return None
        self._ready.popleft()
        values: list[Any] = []
        errors: dict[int, BaseException] = {}
        self._open_answer(number, answer, values, errors)
        self._given.append(number)
        start = self.slices[number].start
        return start, values, {place: mark(error, index=start + place) for place, error in errors.items()}

    def _open_unit(self, buffer: UnitBuffer) -> Taken | None:
        """Check and load what came for a unit; None if something was altered on its way, and is sent anew."""
        unit: Unit = self._ready[0]
        values: list[Any] = []
        errors: dict[int, BaseException] = {}
        for number in unit.slices:
            if _is_altered(unit.answers[number]):
                buffer.put_back(list(self._ready), number)
                self._ready.clear()
                self._alter(number)
                return None
            self._open_answer(number, unit.answers[number], values, errors)
        self._ready.popleft()
        self._given.extend(unit.slices)
        for place, error in errors.items():
            mark(error, index=unit.start + (place if unit.span == len(values) else 0))
        return unit.start, values, errors

    def _open_answer(self, number: int, answer: Answer, values: list[Any], errors: dict[int, BaseException]) -> None:
        start = len(values)
        for status, _, letter in answer:
            some, failed = outcomes.load_outcomes(self.context, letter, status != Status.VALUES)
            if status == Status.FAILED:
                raise _explained(failed[0])
            if failed:
                errors.update({len(values) + position: error for position, error in failed.items()})
            values += some
        if not answer:
            values += [None] * self.slices[number].number
        if len(values) - start != self.slices[number].number:  # all behind it would be in the wrong place
            raise ProtocolError(f"{len(values) - start} results of {self.slices[number].number} arguments")
        if number in self._troubles:
            errors.update({start + position: error for position, error in self._troubles[number].lost.items()})

    def _release(self) -> None:
        """What was given is the caller's: forget its slices and make room."""
        if self._given:
            with self.link.lock:  # some may be forgotten already, where another thread stopped the job
                slices = [slice_ for n in self._given if (slice_ := self.slices.pop(n, None))]
                for number in self._troubles.keys() & self._given:
                    del self._troubles[number]
            self._given.clear()
            self._window.leave(sum(slice_.weight for slice_ in slices), sum(slice_.size for slice_ in slices))

    # The reader thread.

    def packet(self, first: int, count: int) -> None:
        """The server announces: these slices are one packet."""
        with self.link.lock:
            if self.ended:
                return
            free = count and first == self._packed and first + count <= self._next
            if not free or self._flat or self._lists:
                raise ProtocolError(f"a packet of {count} slices from {first} on, which are not the next free ones")
            self._packed += count
            start, last = self.slices[first].start, self.slices[first + count - 1]
        if isinstance(self.buffer, UnitBuffer):
            self.buffer.add(Unit(start, last.start + last.number - start, range(first, first + count)))

    def answers(self, rows: Rows) -> None:
        """A RESULT. Rows that nobody waits for are ignored."""
        parts = [(status, digest, letter) for status, (digest, (letter,)) in zip(rows.statuses, rows.letters())]
        whole = not any(rows.statuses) and self._troubles.keys().isdisjoint(rows.slices)  # no part came before
        if whole and self._waiting.issuperset(rows.slices):
            self._put(rows.slices, list(zip(parts)))
            self._judge(rows)
            return
        for number, attempt, part in zip(rows.slices, rows.attempts, parts):
            try:
                self.answer(number, attempt, *part)
            except KeyError:  # stopped by another thread: its slices are forgotten
                if not self.ended:
                    raise

    def _put(self, numbers: Sequence[int], answers: Sequence[Answer]) -> None:
        self._waiting.difference_update(numbers)
        self.buffer.put(numbers, answers)
        self._tell()

    def _tell(self) -> None:
        """Whoever takes: there may be something."""
        if self.ready is not None:
            self.ready()

    def _judge(self, rows: Rows) -> None:
        """Where slices are quick and short, more of them may be out, so that nobody waits for the next."""
        worth = MESSAGE_US // max(rows.pace, 1) if rows.pace and not rows.longs else 1
        self._worth, before = max(1, worth if worth < self._worth else (3 * self._worth + worth) // 4), self._worth
        if self._worth != before:
            self.resize()
        if self._largest is not None and rows.pace:
            self._adapt(rows, self._largest)

    def _adapt(self, rows: Rows, largest: int) -> None:
        """Choose how many arguments the next slices have: as many as take `slice_us`, by these ones' pace and size."""
        with self.link.lock:
            slices = [slice_ for n in rows.slices if (slice_ := self.slices.get(n))]
        if slices:
            number = min(slice_.number for slice_ in slices)
            size = max(1, *(slice_.size for slice_ in slices), *rows.lengths)
            good = number * min(self._slice_us / rows.pace, SLICE_BYTES / size)
            self._feeder.size = max(self._least, min(int(good), GROWTH * self._feeder.size, largest))

    def answer(self, number: int, attempt: int, status: int, digest: bytes, letter: Buffer) -> None:
        """One row, out of the ordinary or in the company of such a one. Ignored if nobody waits for it."""
        if number not in self._waiting:
            return
        kind = Status(status & ~MORE)
        if kind is Status.ALTERED:
            self._alter(number)
        elif kind in (Status.DIED, Status.TIMEOUT):
            if digest:
                raise ProtocolError("a note of more than 1,024 bytes on a lost slice")
            self._die(number, kind, read_object("the note on a lost slice", bytes(letter), NOTE))
        else:
            trouble = self._trouble(number)
            if trouble.parts_attempt != attempt:
                trouble.parts_attempt, trouble.parts = attempt, []
            trouble.parts.append((kind, digest, letter))
            if not status & MORE:
                self._put([number], [trouble.parts])

    def _trouble(self, number: int) -> _Trouble:
        return self._troubles.setdefault(number, _Trouble())

    def _left(self, number: int) -> list[int]:
        """The positions of a slice that are still tried."""
        return [p for p in range(self.slices[number].number) if p not in self._trouble(number).lost]

    def _die(self, number: int, kind: Status, note: dict[str, Any]) -> None:
        """A worker, or the tenth node, died with this slice: charge whom it was running, and send the others again."""
        position, phase = note["position"], note["phase"]
        if phase == "function":
            self._deaths += 1
            if self._deaths >= ATTEMPTS:
                self.fail(_lost("workers died while they loaded the function", note))
        charged, trouble = self._charge(number, position, phase), self._trouble(number)
        for p in charged:
            where = self.slices[number].name(p)
            if kind is Status.TIMEOUT:
                limit = f"timeout={self.options.get('timeout')} s"
                trouble.lost[p] = mark(TaskTimeout(f"{where} ran longer than {limit}"), node=note.get("node"))
            elif phase == "node":
                trouble.lost[p] = _lost(f"{where}: {note.get('lost')} nodes were lost while they had it", note)
            elif trouble.deaths[p] >= ATTEMPTS:
                trouble.lost[p] = _lost(f"{where}: {ATTEMPTS} workers died under it (phase {phase})", note)
        self._retry(number, skip=bool(trouble.lost))

    def _charge(self, number: int, position: int, phase: str) -> list[int]:
        """Count a death; the positions that it is charged to.

        On a first attempt a worker does not say which of many tiny arguments it is at, and values are always dumped
        together in the end: who kills next is named, and both deaths count for that one.
        """
        deaths, left = self._trouble(number).deaths, self._left(number)
        if 0 <= position < self.slices[number].number:
            deaths[position] += 1 + deaths.pop(UNNAMED, 0)
            return [position]
        if phase in ("call", "dump"):
            deaths[UNNAMED] += 1
            left = left if deaths[UNNAMED] >= ATTEMPTS else []  # each can be dumped, but not all of them
            deaths.update(dict.fromkeys(left, ATTEMPTS))
            return left
        charged = left if phase in ("load", "node") else []
        deaths.update(charged)
        return charged

    def _alter(self, number: int) -> None:
        """A slice or its answer was altered on its way: send it anew, for some times."""
        trouble = self._trouble(number)
        trouble.altered += 1
        if trouble.altered >= ATTEMPTS:
            text, slice_ = f"or its result was altered on its way {ATTEMPTS} times in a row", self.slices[number]
            trouble.lost.update({p: LetterAltered(f"{slice_.name(p)} {text}") for p in self._left(number)})
        self._retry(number, skip=False)

    def _retry(self, number: int, skip: bool) -> None:
        """Send a slice again, without the positions that are lost; if none is left, that is its answer."""
        trouble = self._trouble(number)
        with self.link.lock:
            self._waiting.add(number)
            left = self._left(number)
            if left:
                if skip:
                    slice_ = self.slices[number]
                    self.slices[number] = slice_.with_letter(join(letters.with_skips([slice_.letter], trouble.lost)))
                trouble.attempt += 1
                trouble.parts = []
                self._post(Kind.TASK, self._rows([number]))
        if left:
            self.link.push()
        else:
            self._put([number], [()])

    # What the Feeder needs of its job.

    def enter(self, batch: Sequence[Slice], place: int | None = None, *, push: bool = True) -> None:
        """Number, keep and post slices, which are in the window; with `place` they are one list, perhaps empty."""
        with self.link.lock:
            numbers = range(self._next, self._next + len(batch))
            self._next += len(batch)
            self.slices.update(zip(numbers, batch))
            self._waiting.update(numbers)
            if place is not None and isinstance(self.buffer, UnitBuffer):
                self._lists = True
                self.buffer.add(Unit(place, 1, numbers))
            for start, stop in _frames(batch):
                self._post(Kind.TASK, self._rows(numbers[start:stop]))
        if push:
            self.link.push()

    def flush(self) -> None:
        """Packets need not be full up to here."""
        with self.link.lock:
            if self._packed < self._next and self._flushed < self._next and not (self._flat or self._lists):
                self._flushed = self._next
                self._post(Kind.FLUSH, {"job": self.number, "upto": self._next})
        self.link.push()

    def flush_if_stuck(self) -> None:
        """The window is full: if what is out makes no packet, and will never make a full one, that need not be full."""
        with self.link.lock:
            stuck = len(self.slices) < self.link.workers()[1] and self._packed <= min(self.slices, default=0)
        if stuck:
            self.flush()

    def finish(self, places: int, error: BaseException | None) -> None:
        """The input has ended, perhaps with an error."""
        if error is not None and self._eager:
            self.buffer.fail(error)
        self.buffer.finish(self._next if self._flat else places, error)
        self._tell()

    def spoil(self, start: int, error: BaseException) -> None:
        """The argument at `start` cannot be sent: that is its result."""
        with self.link.lock:
            number = self._next
            self._next += 1
            self.slices[number] = Slice(start, None, 1, 0, 0, b"", b"")
            self._trouble(number).lost[0] = error
        self._put([number], [()])

    def fail(self, error: BaseException) -> None:
        """The job as a whole has failed."""
        self.buffer.fail(error)
        self._tell()

    def wait_for_node(self, timeout: float) -> int:
        """Workers of the largest node; where there is none, 0 after at most `timeout` seconds."""
        if not self.link.workers()[1]:
            self.link.wait_for_workers(timeout)
        return self.link.workers()[1]

    def fits(self, size: int) -> bool:
        """Whether a letter of this size may travel."""
        return size <= self.link.letter_limit

    def check_size(self, what: str, size: int) -> None:
        """LetterTooLarge, which names `what`, if it may not."""
        self.link.check_size(what, size)

    def _post(self, kind: Kind, body: dict[str, Any] | Rows) -> None:
        """Queue, unless the job is over; `link.push` sends. Needs `link.lock`."""
        if not self.ended:
            self.link.post(kind, body)

    def _rows(self, numbers: Sequence[int]) -> Rows:
        """Slices as the rows of a TASK."""
        slices = [self.slices[number] for number in numbers]
        attempts = statuses = [0] * len(numbers)
        if self._troubles:
            attempts = [t.attempt if (t := self._troubles.get(n)) else 0 for n in numbers]
        if self._flat or self._lists:
            statuses = [PACKED] * len(numbers)
        elif numbers[0] < self._packed:
            statuses = [PACKED if n < self._packed else 0 for n in numbers]
        letters, digests = [s.letter for s in slices], [s.digest for s in slices]
        return Rows.build(self.number, numbers, attempts, statuses, letters, digests)

    def _window_slices(self) -> float:
        workers = self.link.workers()[0]
        many = self._worth > 1 and self._largest is None  # else they grow instead of becoming more
        quick = min(2 * workers * self._worth, QUICK_SLICES) if many else 0
        return 2 * workers + quick + self._beyond


def _is_altered(answer: Answer) -> bool:
    """Whether a part of it is not what its digest says."""
    return any(digest and letters.letter_digest([letter]) != digest for _, digest, letter in answer)


def _frames(batch: Sequence[Slice]) -> Iterator[tuple[int, int]]:
    """Cut slices so that each piece fits a frame: a batch is small, a list may be of any size."""
    start = size = 0
    for number, slice_ in enumerate(batch):
        size += slice_.size
        if number > start and (size > FRAME_BYTES or number - start == MAX_ROWS):
            yield start, number
            start, size = number, slice_.size
    if len(batch) > start:
        yield start, len(batch)


def _explained(error: BaseException) -> BaseException:
    """What a function or a slice could not be loaded for; a module that the node lacks gets its remedy."""
    if not isinstance(error, ModuleNotFoundError):
        return error
    node = getattr(error, "node", None)
    remedy = "install it there, or put the file into a folder on that node's PYTHONPATH, or import less of it"
    told = ModuleNotFoundError(f"{error} on node {node}: {remedy}", name=error.name, path=error.path)
    told.__cause__ = error.__cause__
    return mark(told, node=node)  # type: ignore[no-any-return]


def _lost(text: str, note: Mapping[str, Any]) -> WorkerLost:
    exitcode, pid, node = note.get("exitcode"), note.get("pid"), note.get("node")
    if pid is not None:
        how = f"signal {-exitcode}" if isinstance(exitcode, int) and exitcode < 0 else f"status {exitcode}"
        text += f"; the last one on node {node}, pid {pid}, ended with {how}"
    error: WorkerLost = mark(WorkerLost(text), node=node, pid=pid, exitcode=exitcode)
    return error
