"""The input side of a job: iterates the caller's arguments, cuts them into slices, and dumps them.

Knows the arguments and the window; what becomes of a slice is the job's. Nothing else runs the
caller's iterator.

::

    args ─next─▶ open slice ─dump─▶ batch ─Window.enter─▶ Sink.enter (numbered, kept, posted)

Threads: the *feeder* does all of this, from the call on. Where `args` is lazy, a second one, the
*pacer*, sees that the feeder has been inside the iterator's `next` for 10 ms; then it sends what is
there and says FLUSH, so that a generator may wait for earlier results. `_cutting` guards what is cut,
between these two. The open slice is the feeder's: it alone appends to it, outside the lock while the
iterator runs, and replaces it; the pacer sends what it finds there, and notes how much. Slices that are
dumped quickly enter the window and are posted together: up to a millisecond's worth, or what the window
had room for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol, TypeAlias

from ..errors import DumpError, LetterTooLarge
from ..objects import letters
from ..objects.outcomes import mark
from ..protocol.frames import SHORT_LETTER_BYTES, Buffer
from .results import Window

__all__ = ["CANCELLED", "Feeder", "Sink", "Slice", "join", "mark"]

PAUSE_SECONDS = 0.010  # so long inside the iterator's `next` is a pause: longer than a switch of threads
ROOM_SECONDS = 0.1  # how often a feeder without room looks whether what is out needs a FLUSH
JOIN_SECONDS = 0.5  # for a feeder that is inside the caller's iterator: it cannot be interrupted there
BATCH_SECONDS = 0.001  # slices wait so long to be posted together: little against a round trip
INLINE_SLICES = 64  # at most are fed where the call is made: quicker than to start a thread ...
INLINE_SECONDS = 0.005  # ... unless they take longer
BURST_SECONDS = 0.001  # so long may an iterator be at it before anybody looks whether the job was cancelled
BURST_MOST = 1024  # arguments that it is asked for at once
BATCH_SLICES, BATCH_BYTES = 256, 1 << 20  # no more of them go together: the others shall work meanwhile
CANCELLED = "the job was cancelled"


class Slice(NamedTuple):
    """A slice as it was cut: all that is needed to send it, and to send it again."""

    start: int  # place of its first argument in args, or in its list
    place: int | None  # of its list in args, where args are lists
    number: int  # of its arguments
    weight: int  # in the window ...
    size: int  # ... and bytes there; the letter may change
    letter: Buffer
    digest: bytes  # b"" of a short letter

    def name(self, position: int) -> str:
        """How to call one of its arguments in an error."""
        return _name(self.start + position, self.place)

    def with_letter(self, letter: Buffer) -> Slice:
        """The same arguments in another letter."""
        return self._replace(letter=letter, digest=_digest(letter))


Dumped: TypeAlias = "tuple[int, Buffer | BaseException]"  # how many arguments; their letter, or why the one has none


class _NoRoom(Exception):
    """The window is full, or time is over, and this thread must not wait."""


class Sink(Protocol):
    """What the feeder needs of its job. Called by feeder and pacer, never by both at once."""

    def enter(self, batch: Sequence[Slice], place: int | None = None, *, push: bool = True) -> None:
        """Number, keep and post these slices; those of one list, if `place` is given. `push` sends what is posted."""

    def flush(self) -> None:
        """What is posted will not be followed soon: packets need not be full. Sends what is posted."""

    def flush_if_stuck(self) -> None:
        """The window is full: flush if what is out will never make a full packet."""

    def finish(self, places: int, error: BaseException | None) -> None:
        """There are so many places in all, and this is what the iteration ended with."""

    def spoil(self, start: int, error: BaseException) -> None:
        """The argument at this place cannot be sent; it has this for a result. Only of jobs without lists."""

    def fail(self, error: BaseException) -> None:
        """An argument cannot be sent."""

    def wait_for_node(self, timeout: float) -> int:
        """Workers of the largest node; where there is none, 0 after at most `timeout` seconds."""

    def fits(self, size: int) -> bool:
        """Whether a letter of this size may travel."""

    def check_size(self, what: str, size: int) -> None:
        """LetterTooLarge, which names `what`, if it may not."""


class Feeder:
    """Feeds one job.

    :param args: an iterable, or a function that returns one.
    :param size: arguments in a slice.
    :param by_argument: whether the window counts arguments, not slices.
    :param lists: whether a first argument that is a list makes every argument a packet of its own, and an
        argument that cannot be sent ends the job. Otherwise such a one has its error for a result.
    :ivar size: may be set at any time; the next slice has so many.
    """

    def __init__(
        self, sink: Sink, context: letters.Context, window: Window, args: Iterable[Any] | Callable[[], Any], *,
        size: int, by_argument: bool, lists: bool,
    ) -> None:
        self.ended = threading.Event()  # all is fed, or nothing more shall be
        self._sink = sink
        self._context = context
        self._window = window
        self._args = args
        self.size = size
        self._by_argument = by_argument
        self._lists = lists
        self._pulling = False  # the feeder is inside the iterator's next
        self._open: list[Any] = []  # arguments of the slice that is not closed; the feeder's own
        self._burst = 1  # how many of them the iterator is asked for at once: few, where it is slow
        self._cutting = threading.Lock()  # guards all below
        self._gone = 0  # arguments at the head of the open slice that the pacer has sent
        self._places = 0  # places of args that are in slices
        self._room = 0.0  # of the window: what the batch may still take
        self._batch: list[Slice] = []  # closed, not posted
        self._batch_size = 0  # its bytes
        self._batch_since = 0.0
        self._inline = False  # the caller's thread feeds, and must not wait for room, nor be kept long
        self._inline_until = 0.0
        self._threads: list[threading.Thread] = []

    def start(self, name: str) -> None:
        """Begin to iterate. A short sequence is fed by this thread, as far as there is room for it.

        :param name: for the threads.
        """
        args = self._args
        if isinstance(args, (list, tuple, range)) and len(args) <= INLINE_SLICES * self.size:
            self._inline = not (args and self._is_list(args[0]))
        if self._inline:
            self._inline_until = time.monotonic() + INLINE_SECONDS
            self._feed()
        if not self.ended.is_set():
            threads = [threading.Thread(target=self._feed, name=f"achilles-feeder {name}", daemon=True)]
            if not isinstance(args, (list, tuple, range)):
                threads.append(threading.Thread(target=self._pace, name=f"achilles-pacer {name}", daemon=True))
            self._threads = threads
            for thread in threads:
                thread.start()

    def stop(self) -> None:
        """Feed nothing more; joins the threads, half a second at most each. Any thread."""
        self.ended.set()
        self._window.close()
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(JOIN_SECONDS)

    def _feed(self) -> None:
        """The feeder thread, or the caller's."""
        error: BaseException | None = None
        try:
            args: Any = self._args() if callable(self._args) else self._args
            if isinstance(args, (list, tuple, range)):
                self._feed_sequence(args)
            else:
                self._feed_iterator(iter(args))
        except _NoRoom:
            self._inline = False
            return
        except BaseException as e:  # the caller's iterable may raise anything; it is raised where results are taken
            if self._inline and not isinstance(e, Exception):
                raise  # Ctrl-C, or the like, in the caller's own thread
            error = e
        with self._cutting:
            self._post(push=False)
        self._sink.flush()
        self.ended.set()
        self._sink.finish(self._places, error)

    def _feed_sequence(self, args: Sequence[Any]) -> None:
        with self._cutting:
            if len(args) and self._is_list(args[0]):
                for argument in args:
                    self._send_list(argument)
                return
            while self._places < len(args) and not self._window.closed:
                self._send(list(args[self._places : self._places + self.size]))

    def _feed_iterator(self, args: Iterator[Any]) -> None:
        head = list(islice(args, 1))
        if head and self._is_list(head[0]):
            for argument in chain(head, args):
                self._raise_if_closed()
                with self._cutting:
                    self._send_list(argument)
            return
        self._open += head
        try:
            while not self._window.closed and self._pull(args):
                with self._cutting:
                    self._close_slice(self.size)
                    if self._burst == 1:  # it is slow: what is cut need not wait for company
                        self._post()
        finally:  # what came before an error of the iterator's is sent, too
            with self._cutting:
                self._close_slice(1)

    def _pull(self, args: Iterator[Any]) -> bool:
        """Let the iterator add to the open slice; False if it has ended. The pacer sees each argument as it comes."""
        wanted = max(0, min(self._burst, self.size - len(self._open) + self._gone))
        before, began = len(self._open), time.monotonic()
        self._pulling = True
        try:
            self._open.extend(islice(args, wanted))
        finally:
            self._pulling = False
        self._burst = min(2 * self._burst, BURST_MOST) if time.monotonic() - began < BURST_SECONDS else 1
        return len(self._open) - before == wanted

    def _pace(self) -> None:
        """The pacer thread: after 10 ms inside the caller's iterator, let what is there go."""
        seen: tuple[int, int] | None = None
        while not self.ended.wait(PAUSE_SECONDS):
            now = (self._places, len(self._open)) if self._pulling else None
            if now is not None and now == seen:
                self._let_go()
            seen = now

    def _let_go(self) -> None:
        try:
            with self._cutting:
                arguments = self._open[self._gone :]
                self._gone += len(arguments)
                if arguments:
                    self._send(arguments)
                self._post()
            self._sink.flush()
        except Exception as e:  # an argument that cannot be dumped; there is no other thread to say so
            self._sink.fail(e)

    # All below needs `_cutting`.

    def _close_slice(self, size: int) -> None:
        """The feeder: send the open slice if it has at least `size` arguments."""
        self._open, self._gone = self._open[self._gone :] if self._gone else self._open, 0
        if len(self._open) >= size:
            arguments, self._open = self._open, []
            self._send(arguments)

    def _is_list(self, first: object) -> bool:
        return self._lists and isinstance(first, list)

    def _send(self, arguments: list[Any]) -> None:
        """Let a slice into the batch; as several, where it is too large for one."""
        try:
            letter = join(letters.dump_slice(self._context, arguments))
        except DumpError:
            letter = None
        if letter is not None and self._sink.fits(len(letter)):
            self._append(len(arguments), letter)
            return
        letter = None  # its pieces are as large
        for number, piece in self._dump(arguments, self._places):
            if isinstance(piece, BaseException):
                self._post()
                self._sink.spoil(self._places, piece)
                self._places += number
            else:
                self._append(number, piece)

    def _append(self, number: int, letter: Buffer) -> None:
        """Put a slice of `number` arguments into the batch, once there is room for it."""
        weight, size = number if self._by_argument else 1, len(letter)
        if weight > self._room or size > BATCH_BYTES:
            self._make_room(weight, size)
        self._room -= weight
        self._batch.append(Slice(self._places, None, number, weight, size, letter, _digest(letter)))
        self._places += number
        self._batch_size += size
        now = time.monotonic()
        if len(self._batch) == 1:
            self._batch_since = now
        full = len(self._batch) >= BATCH_SLICES or self._batch_size >= BATCH_BYTES
        if full or now - self._batch_since > BATCH_SECONDS:
            self._post()
        if self._inline and now > self._inline_until:
            raise _NoRoom

    def _post(self, push: bool = True) -> None:
        if self._batch:
            batch, self._batch = self._batch, []
            self._window.enter(sum(slice_.weight for slice_ in batch), self._batch_size)
            self._room, self._batch_size = 0, 0
            self._sink.enter(batch, push=push)

    def _make_room(self, weight: int, size: int) -> None:
        """Wait until there is room for one more slice, or for a list. What is in the batch goes before."""
        self._post()
        self._room = self._window.room(weight, size)
        while not self._room:
            if self._inline:
                raise _NoRoom
            self._sink.flush_if_stuck()
            self._room = self._window.room(weight, size, ROOM_SECONDS)
            if not self._room:
                self._raise_if_closed()

    def _raise_if_closed(self) -> None:
        if self._window.closed:
            raise InterruptedError(CANCELLED)

    def _send_list(self, argument: object) -> None:
        """A list of a list of lists: a packet of its own, in as many even slices as the largest node has workers.

        Its slices leave the window together, so they enter it together.
        """
        place, largest = self._places, 1
        if not isinstance(argument, list):
            text = f"args[{place}] is of type {type(argument).__name__}: where args[0] is a list, all must be lists"
            raise mark(TypeError(text), index=place)
        while argument and not (largest := self._sink.wait_for_node(ROOM_SECONDS)):
            self._raise_if_closed()
        pieces = [(n, x) for n, x in self._dump_list(argument, largest, place) if not isinstance(x, BaseException)]
        if pieces:
            weight = 1 if self._by_argument else len(pieces)
            size = sum(len(letter) for _, letter in pieces)
            self._make_room(weight, size)
            self._window.enter(weight, size)
            self._room = 0
        slices: list[Slice] = []
        start = 0
        for number, letter in pieces:
            weight = int(not slices) if self._by_argument else 1
            slices.append(Slice(start, place, number, weight, len(letter), letter, _digest(letter)))
            start += number
        self._sink.enter(slices, place)
        self._places = place + 1

    def _dump_list(self, argument: list[Any], largest: int, place: int) -> Iterator[Dumped]:
        count = min(len(argument), largest)
        bounds = [i * len(argument) // count for i in range(count + 1)] if count else []
        for start, stop in zip(bounds, bounds[1:]):
            yield from self._dump(argument[start:stop], start, place)

    def _dump(self, arguments: list[Any], start: int, place: int | None = None) -> Iterator[Dumped]:
        """A slice as a letter, with its length; one that cannot be sent whole is cut again, where it can be.

        An error names the argument: its place in args, or in the list at `place`.
        """
        half = len(arguments) // 2
        try:
            letter = join(letters.dump_slice(self._context, arguments))
            if not half:
                self._check_size(start, place, len(letter))
            if not half or self._sink.fits(len(letter)):
                yield len(arguments), letter
                return
        except (DumpError, LetterTooLarge) as error:
            if self._lists:
                self._name_error(error, arguments, start, place)
                raise
            if not half:
                yield 1, mark(error, index=start)
                return
        yield from self._dump(arguments[:half], start, place)
        yield from self._dump(arguments[half:], start + half, place)

    def _name_error(self, error: BaseException, arguments: list[Any], start: int, place: int | None) -> None:
        for number, argument in enumerate(arguments, start) if isinstance(error, DumpError) else ():
            self._dump_one(argument, number, place)

    def _dump_one(self, argument: Any, number: int, place: int | None) -> None:
        """DumpError, with the argument's name and index, if it is this one that cannot be dumped."""
        try:
            self._context.dump(argument, f"{_name(number, place)} (of type {type(argument).__qualname__})")
        except DumpError as e:
            mark(e, index=number if place is None else place)
            raise

    def _check_size(self, number: int, place: int | None, size: int) -> None:
        try:
            self._sink.check_size(_name(number, place), size)
        except LetterTooLarge as e:
            mark(e, index=number if place is None else place)
            raise


def join(parts: Sequence[Buffer]) -> Buffer:
    """One buffer of our own: what the caller does to an array later must not change what was hashed."""
    return parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else b"".join(parts)


def _name(number: int, place: int | None) -> str:
    """How to call an argument: by its place in args, or in a list there."""
    return f"argument {number}" if place is None else f"argument {number} of the list args[{place}]"


def _digest(letter: Buffer) -> bytes:
    """Of a long letter; a short one needs none."""
    return letters.letter_digest([letter]) if len(letter) > SHORT_LETTER_BYTES else b""
