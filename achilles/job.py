"""One job in the controller: arguments in, slices out, answers in, results out.

Knows which arguments a slice number stands for, and keeps each slice until its
result is checked, so that it can be sent again. Knows nothing of connections: it
posts frames through its `link` (the Controller), which may be connected or not.

::

    feeder thread   iterate args ─▶ cut ─▶ dump ─▶ Window.enter ─▶ slices[n] ─▶ link.post(TASK)
    reader thread   link ─▶ answer(): values and errors into the ResultBuffer; deaths are counted,
                                      the slice is posted again without the argument that kills
    caller's thread take(): ResultBuffer.take ─▶ check digest ─▶ load ─▶ Window.leave

The feeder alone runs the caller's iterator, and the caller's thread alone loads what
came back; the reader runs no code of the user's. Where the iterator is lazy, a fourth
thread, the pacer, sees that the feeder has been inside `next` for 10 ms, closes the
slice that is open, and says FLUSH, so that a generator may wait for earlier results.

`link.lock` guards `slices`, `_next` and `_places`, and is held while a slice is entered
and posted, so that a reconnection finds all of a job or nothing of a slice. `_cutting`
guards the open slice, between feeder and pacer.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from . import payload
from .errors import LetterAltered, ProtocolError, TaskError, TaskTimeout, WorkerLost
from .results import ResultBuffer, Unit, Window
from .wire import MORE, PACKED, SHORT_LETTER_BYTES, Buffer, Kind, Rows, Status

__all__ = ["ATTEMPTS", "Function", "Job", "Link", "Taken"]

ATTEMPTS = 3  # deaths of an argument, or alterations of a slice in a row, before it is given up
PAUSE_SECONDS = 0.010  # so long inside the iterator's `next` is a pause: longer than a switch of threads
ROOM_SECONDS = 0.1  # how often a feeder without room looks whether what is out needs a FLUSH
JOIN_SECONDS = 0.5  # for a feeder that is inside the caller's iterator: it cannot be interrupted there
WINDOW_SLICES = 64  # beyond two for each worker: what is under way between here and there

Answer = Sequence[tuple[Status, Buffer, bytes]]  # the parts of a slice's answer: status, letter, digest
Taken = tuple[int, list[Any], dict[int, BaseException]]  # start, values, place in them -> error


class Link(Protocol):
    """What a job needs of the Controller."""

    lock: threading.Lock
    letter_limit: int

    def post(self, kind: Kind, body: dict[str, Any] | Rows) -> None:
        """Send, or drop where there is no connection: the job is declared anew then. Needs `lock`."""

    def check_size(self, what: str, size: int) -> None:
        """LetterTooLarge if `what`, of `size` bytes, is over the limit."""

    def workers(self) -> tuple[int, int]:
        """Workers of the cluster that can run this caller's functions, and those of the largest node."""

    def wait_for_workers(self, timeout: float) -> None:
        """Block until the cluster changes, at most `timeout` seconds."""


class Function:
    """A function or an initializer, dumped: its letter, and the digest that names it."""

    def __init__(self, parts: Sequence[Buffer]) -> None:
        self.letter = _join(parts)
        self.digest = payload.letter_digest([self.letter])


class _Slice:
    """One slice that has no checked result yet: all that is needed to send it again."""

    __slots__ = (
        "altered", "answered", "attempt", "count", "deaths", "digest", "letter", "lost", "packed", "parts", "start",
        "weight",
    )

    def __init__(self, start: int, count: int, letter: Buffer, packed: bool, weight: int) -> None:
        self.start = start  # place of its first argument in args (in its list, where args are lists)
        self.count = count
        self.weight = weight  # in the window
        self.letter = letter
        self.digest = _digest(letter)
        self.packed = packed  # it belongs to a packet, or needs none
        self.answered = False
        self.attempt = 0
        self.altered = 0  # how often in a row
        self.deaths: dict[int, int] | None = None  # position -> workers that died under it
        self.lost: dict[int, TaskError] | None = None  # position -> why it is not tried again
        self.parts: tuple[int, list[tuple[Status, Buffer, bytes]]] | None = None  # attempt, parts so far

    def rows(self, job: int, number: int) -> Rows:
        """This slice as the row of a TASK."""
        return Rows.single(job, number, self.attempt, PACKED * self.packed, (self.letter,), self.digest)

    def left(self) -> list[int]:
        """The positions that are still tried."""
        return [p for p in range(self.count) if p not in (self.lost or ())]


class Job:
    """A call of map, imap and the like, from its first argument to its last result.

    `flat`: every slice is delivered by itself (Pool, Executor). Otherwise units are
    packets, which the server cuts, or lists, where the first argument is a list.
    `ordered`: `take` follows the order of `args`. `eager`: an error of the iterable
    is raised at once, not in its place.
    """

    def __init__(
        self, link: Link, number: int, context: payload.Context, context_id: bytes, function: Function,
        args: Iterable[Any] | Callable[[], Any], *, chunksize: int = 1, ordered: bool = True,
        flat: bool = False, eager: bool = False, buffersize: int | None = None,
        options: Mapping[str, Any] | None = None, initializer: Function | None = None,
    ) -> None:
        self.link = link
        self.number = number
        self.context = context
        self.context_id = context_id
        self.function = function
        self.initializer = initializer
        self.options = {name: value for name, value in (options or {}).items() if value is not None}
        self.buffer = ResultBuffer(ordered)
        self.slices: dict[int, _Slice] = {}
        self.fed = threading.Event()  # the input has ended, or the job has
        self._args = args
        self._flat = flat
        self._eager = eager
        self._buffersize = buffersize
        self._size = min(chunksize, buffersize or chunksize)
        self._beyond: float = WINDOW_SLICES
        self._window = Window(buffersize or self._window_slices())
        self._next = 0  # number of the next slice
        self._places = 0  # places in args that are in slices
        self._deaths = 0  # workers that died while they loaded the function
        self._cutting = threading.Lock()
        self._open: list[Any] = []  # arguments of the slice that is not closed
        self._pulling = False  # the feeder is inside the iterator's next
        self._pulls = 0  # arguments that came out of a lazy iterator
        self._threads = [threading.Thread(target=self._feed, name=f"achilles-feeder {number}", daemon=True)]
        if not isinstance(args, (list, tuple, range)):
            self._threads.append(threading.Thread(target=self._pace, name=f"achilles-pacer {number}", daemon=True))

    def start(self) -> None:
        """Begin to iterate, dump and send. The job is declared by then."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Nothing more is fed or kept; joins the feeder, half a second at most. Any thread but the feeder."""
        self.fed.set()
        self._window.close()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(JOIN_SECONDS)
        with self.link.lock:
            self.slices.clear()

    def resize(self) -> None:
        """The cluster has changed: so does the window, unless `buffersize` set it."""
        if self._buffersize is None:
            self._window.resize(self._window_slices())

    def lift_window(self) -> None:
        """Let everything out: nobody will take before all is done."""
        self._buffersize, self._beyond = None, math.inf
        self.resize()

    def outstanding(self) -> list[Rows]:
        """Every slice without a result, for a new connection. Needs `link.lock`; no slice is charged."""
        return [s.rows(self.number, n) for n, s in self.slices.items() if not s.answered]

    def flushed(self) -> int | None:
        """Up to which slice packets need not be full, if that is known. Needs `link.lock`."""
        return self._next if self.fed.is_set() else None

    # The caller's thread.

    def take(self, timeout: float | None = None) -> Taken | None:
        """The next unit: its start, its values, and an exception for each place that has none. None behind the last.

        Blocks up to `timeout` seconds, then TimeoutError. Raises what the job as a whole failed with.
        """
        while (unit := self.buffer.take(timeout)) is not None:
            values: list[Any] = []
            errors: dict[int, BaseException] = {}
            for number in unit.slices:
                opened = self._open_answer(self.slices[number], unit.answers[number])
                if opened is None:
                    self.buffer.put_back(unit, number)
                    self._alter(number, self.slices[number])
                    break
                errors.update({len(values) + place: error for place, error in opened[1].items()})
                values += opened[0]
            else:
                self._release(unit)
                for place, error in errors.items():
                    _mark(error, index=unit.start + (place if unit.span == len(values) else 0))
                return unit.start, values, errors
        return None

    def _open_answer(self, slice_: _Slice, answer: Answer) -> tuple[list[Any], dict[int, BaseException]] | None:
        """Check and load what came for a slice; None if it was altered on its way."""
        if any(digest and payload.letter_digest([letter]) != digest for _, letter, digest in answer):
            return None
        values: list[Any] = []
        errors: dict[int, BaseException] = {}
        for status, letter, _ in answer:
            some, failed = payload.load_outcomes(self.context, letter, status is not Status.VALUES)
            if status is Status.FAILED:
                raise failed[0]
            errors.update({len(values) + position: error for position, error in failed.items()})
            values += some
        errors.update(slice_.lost or {})
        return values or [None] * slice_.count, errors

    def _release(self, unit: Unit) -> None:
        """A unit is the caller's now: forget its slices and make room."""
        weight = size = 0
        with self.link.lock:
            for number in unit.slices:
                slice_ = self.slices.pop(number)
                weight += slice_.weight
                size += len(slice_.letter)
        self._window.leave(weight, size)

    # The reader thread.

    def packet(self, first: int, count: int) -> None:
        """The server announces: these slices are one packet."""
        slices = [s for n in range(first, first + count) if (s := self.slices.get(n)) is not None and not s.packed]
        if len(slices) != count or not count:
            raise ProtocolError(f"a packet of {count} slices from {first} on, which are not all free")
        for slice_ in slices:
            slice_.packed = True
        self.buffer.add(Unit(slices[0].start, sum(s.count for s in slices), range(first, first + count)))

    def answer(self, number: int, attempt: int, status: int, letter: Buffer, digest: bytes) -> None:
        """A row of a RESULT. One that nobody waits for is ignored."""
        slice_ = self.slices.get(number)
        if slice_ is None or slice_.answered:
            return
        kind = Status(status & ~MORE)
        if kind is Status.ALTERED:
            self._alter(number, slice_)
        elif kind in (Status.DIED, Status.TIMEOUT):
            self._die(number, slice_, kind, _read_note(letter))
        elif status & MORE or slice_.parts is not None:
            if slice_.parts is None or slice_.parts[0] != attempt:
                slice_.parts = (attempt, [])
            slice_.parts[1].append((kind, letter, digest))
            if not status & MORE:
                self._put(number, slice_, slice_.parts[1])
        else:
            self._put(number, slice_, ((kind, letter, digest),))

    def _put(self, number: int, slice_: _Slice, answer: Answer) -> None:
        slice_.answered = True
        self.buffer.put(number, answer)

    def _die(self, number: int, slice_: _Slice, kind: Status, note: dict[str, Any]) -> None:
        """A worker, or the tenth node, died with this slice: charge whom it was running, and send the others again."""
        position, phase = note["position"], note["phase"]
        if phase == "function":
            self._deaths += 1
            if self._deaths >= ATTEMPTS:
                self.buffer.fail(_lost("workers died while they loaded the function", note))
        charged = [position] if 0 <= position < slice_.count else slice_.left() if phase in ("load", "node") else []
        slice_.deaths, slice_.lost = slice_.deaths or {}, slice_.lost or {}
        for p in charged:
            slice_.deaths[p] = slice_.deaths.get(p, 0) + 1
            where = f"argument {slice_.start + p}"
            if kind is Status.TIMEOUT:
                limit = self.options.get("timeout")
                slice_.lost[p] = _mark(TaskTimeout(f"{where} ran longer than timeout={limit} s"), node=note.get("node"))
            elif phase == "node":
                slice_.lost[p] = _lost(f"{where}: {note.get('lost')} nodes were lost while they had it", note)
            elif slice_.deaths[p] >= ATTEMPTS:
                slice_.lost[p] = _lost(f"{where}: {ATTEMPTS} workers died under it (phase {phase})", note)
        self._retry(number, slice_, skip=bool(slice_.lost))

    def _alter(self, number: int, slice_: _Slice) -> None:
        slice_.altered += 1
        if slice_.altered >= ATTEMPTS:
            text = f"argument {slice_.start} or its result was altered on its way {ATTEMPTS} times in a row"
            slice_.lost = {p: LetterAltered(text) for p in slice_.left()} | (slice_.lost or {})
        self._retry(number, slice_, skip=False)

    def _retry(self, number: int, slice_: _Slice, skip: bool) -> None:
        """Send a slice again, without the positions that are lost; if none is left, that is its answer."""
        if not slice_.left():
            self._put(number, slice_, ())
            return
        with self.link.lock:
            if skip:
                slice_.letter = _join(payload.with_skips([slice_.letter], sorted(slice_.lost or ())))
                slice_.digest = _digest(slice_.letter)
            slice_.attempt += 1
            slice_.answered = False
            slice_.packed = True
            slice_.parts = None
            self.link.post(Kind.TASK, slice_.rows(self.number, number))

    # The feeder thread, and the pacer.

    def _feed(self) -> None:
        """Cut all of args into slices and send them."""
        error: BaseException | None = None
        try:
            arguments: Any = self._args() if callable(self._args) else self._args
            if isinstance(arguments, (list, tuple, range)):
                self._feed_sequence(arguments)
            else:
                self._feed_iterator(iter(arguments))
        except BaseException as e:  # the caller's iterable may raise anything; it is raised where results are taken
            error = e
        with self.link.lock:
            self._flush()
            self.fed.set()
        if error is not None and self._eager:
            self.buffer.fail(error)
        self.buffer.finish(self._places, error)

    def _feed_sequence(self, args: Sequence[Any]) -> None:
        if self._of_lists(args[0] if len(args) else None):
            for argument in args:
                self._send_list(argument)
        else:
            for start in range(0, len(args), self._size):
                self._send(list(args[start : start + self._size]))

    def _feed_iterator(self, args: Iterator[Any]) -> None:
        lists = False
        while not self._window.closed:
            self._pulling = True
            try:
                argument = next(args)
            except StopIteration:
                break
            finally:
                self._pulling = False
            lists = lists or (self._pulls == 0 and self._of_lists(argument))
            self._pulls += 1
            with self._cutting:
                if lists:
                    self._send_list(argument)
                else:
                    self._open.append(argument)
                    self._close_slice(self._size)
        with self._cutting:
            self._close_slice(1)

    def _pace(self) -> None:
        """The pacer: after 10 ms inside the caller's iterator, let what is there go."""
        seen = flushed = -1
        while not self.fed.wait(PAUSE_SECONDS):
            pulls = self._pulls
            if self._pulling and pulls == seen and pulls != flushed:
                self._let_go()
                flushed = pulls
            seen = pulls

    def _let_go(self) -> None:
        try:
            with self._cutting:
                self._close_slice(1)
            with self.link.lock:
                self._flush()
        except Exception as e:  # an argument that cannot be dumped; there is no other thread to say so
            self.buffer.fail(e)

    def _close_slice(self, size: int) -> None:
        """Send the open slice if it has at least `size` arguments. Needs `_cutting`."""
        if len(self._open) >= size:
            arguments, self._open = self._open, []
            self._send(arguments)

    def _of_lists(self, first: object) -> bool:
        return isinstance(first, list) and not self._flat

    def _send_list(self, argument: object) -> None:
        """A list of a list of lists: a packet of its own, in as many even slices as the largest node has workers."""
        place = self._places
        if not isinstance(argument, list):
            raise TypeError(f"args[{place}] is a {type(argument).__name__}: where args[0] is a list, all must be lists")
        while argument and not self.link.workers()[1] and not self._window.closed:
            self.link.wait_for_workers(ROOM_SECONDS)
        count = min(len(argument), max(self.link.workers()[1], 1))
        bounds = [i * len(argument) // count for i in range(count + 1)] if count else []
        with self.link.lock:
            self.buffer.add(Unit(place, 1, range(self._next, self._next + count)))
        for start, stop in zip(bounds, bounds[1:]):
            self._send(argument[start:stop], unit_start=place)
        self._places = place + 1

    def _send(self, arguments: list[Any], unit_start: int | None = None) -> None:
        """Dump a slice, wait for room, and post it. One that is too large is cut again, where it can be."""
        letter = _join(payload.dump_slice(self.context, arguments))
        if len(letter) > self.link.letter_limit:
            if len(arguments) == 1 or unit_start is not None:
                self.link.check_size(f"argument {self._places}", len(letter))
            half = len(arguments) // 2
            self._send(arguments[:half])
            self._send(arguments[half:])
            return
        weight = len(arguments) if self._buffersize else 1
        while not self._window.enter(weight, len(letter)):
            self._flush_if_stuck()
            if self._window.enter(weight, len(letter), ROOM_SECONDS):
                break
            if self._window.closed:
                raise InterruptedError("the job was cancelled")
        with self.link.lock:
            self._enter(arguments, letter, weight, unit_start)

    def _enter(self, arguments: list[Any], letter: Buffer, weight: int, unit_start: int | None) -> None:
        number, start = self._next, self._places
        packed = self._flat or unit_start is not None
        slice_ = _Slice(start if unit_start is None else unit_start, len(arguments), letter, packed, weight)
        if self._flat:
            self.buffer.add(Unit(start, len(arguments), range(number, number + 1)))
        self.slices[number] = slice_
        self._next += 1
        self._places += 0 if unit_start is not None else len(arguments)
        self.link.post(Kind.TASK, slice_.rows(self.number, number))

    def _flush_if_stuck(self) -> None:
        """The window is full: if nothing that is out belongs to a packet yet, packets need not be full."""
        with self.link.lock:
            if not any(slice_.packed for slice_ in self.slices.values()):
                self._flush()

    def _flush(self) -> None:
        if not self._flat and self._next:
            self.link.post(Kind.FLUSH, {"job": self.number, "upto": self._next})

    def _window_slices(self) -> float:
        return 2 * self.link.workers()[0] + self._beyond


def _join(parts: Sequence[Buffer]) -> Buffer:
    """One buffer of our own: what the caller does to an array later must not change what was hashed."""
    return parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else b"".join(parts)


def _digest(letter: Buffer) -> bytes:
    """Of a long letter; a short one needs none."""
    return payload.letter_digest([letter]) if len(letter) > SHORT_LETTER_BYTES else b""


def _mark(error: BaseException, **attributes: object) -> Any:
    """Say of an error where it happened, where its class lets us."""
    for name, value in attributes.items():
        try:
            setattr(error, name, value)
        except (AttributeError, TypeError):
            pass
    return error


def _lost(text: str, note: Mapping[str, Any]) -> WorkerLost:
    exitcode, pid, node = note.get("exitcode"), note.get("pid"), note.get("node")
    if pid is not None:
        how = f"signal {-exitcode}" if isinstance(exitcode, int) and exitcode < 0 else f"status {exitcode}"
        text += f"; the last one on node {node}, pid {pid}, ended with {how}"
    error: WorkerLost = _mark(WorkerLost(text), node=node, pid=pid, exitcode=exitcode)
    return error


def _read_note(letter: Buffer) -> dict[str, Any]:
    """The letter of a slice that died; ProtocolError if it is not one."""
    try:
        note = json.loads(bytes(letter))
        if isinstance(note["position"], int) and isinstance(note["phase"], str):
            return dict(note)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ProtocolError("the note on a lost slice cannot be read")
