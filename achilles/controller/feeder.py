"""The input side of a call: iterates the arguments, cuts them into chunks, and dumps them.

Knows the arguments and the room that the call gives; what becomes of a chunk is the job's. Nothing else runs the
caller's iterator.

::

    sequence ─slice────────────────────────▶ dump ─▶ Call.enter        by the feeder thread, or by the thread that takes
    iterator ─next─▶ open chunk ─cut───────▶ dump ─▶ Call.enter        by the feeder thread
                         └─ nudge: 10 ms inside `next` ─┘              by the thread that takes

A thread that takes results and finds none calls `nudge`. So a generator may wait for results of its own call. A
blocking map of a sequence has no feeder thread: the thread that takes calls `step` between its looks.

`_cutting` guards the open chunk while it is cut, between feeder and nudger. The feeder alone appends to the open
chunk, outside that lock while the iterator runs. A sequence has no open chunk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from ..errors import DumpError, LetterTooLarge
from ..objects.letters import dump_chunk, dump_chunks
from ..objects.outcomes import mark
from ..protocol.frames import MAX_SHORT_BYTES

if TYPE_CHECKING:
    from .call import Call

__all__ = ["CANCELLED", "Feeder"]

PAUSE_SECONDS = 0.010  # so long inside the iterator's `next` is a pause: longer than a switch of threads
STEP_SECONDS = 0.0005  # of dumping before the chunks go: little against a batch
LOOK_SECONDS = 0.1  # how often a feeder without room, or without a node, looks whether the call is over
JOIN_SECONDS = 0.5  # for a feeder that is inside the caller's iterator: nobody can interrupt it there
BURST_SECONDS = 0.001  # so long may an iterator be at it before anybody looks whether the call was cancelled
BURST_MOST = 1024  # arguments that an iterator is asked for at once
CANCELLED = "the job was cancelled"


class Feeder:
    """Feeds one call.

    :param args: an iterable, or a function that returns one.
    :param size: arguments in a chunk; may be set anew at any time.
    :param lists: whether a first argument that is a list makes every argument a packet of its own, and an argument
        that cannot be sent ends the call. Otherwise such an argument has its error for a result.
    """

    def __init__(self, call: Call, args: Iterable[Any] | Callable[[], Any], size: int, lists: bool) -> None:
        self.size = size
        self.ended = threading.Event()  # all is fed, or nothing more shall be
        self.inline = False  # the thread that takes feeds
        self._call = call
        self._args = args
        self._lists = lists
        self._thread: threading.Thread | None = None
        self._full = False  # the feeder waits for room
        self._pulling = 0.0  # since when (monotonic) the feeder is inside `next`, or was nudged; 0 where it is not
        self._burst = 1  # arguments that the iterator is asked for at once: few, where it is slow
        self._piece = 1  # chunks that are dumped at once: few, where that is slow
        self._cutting = threading.Lock()  # guards all below
        self._open: list[Any] = []  # arguments that are in no chunk yet
        self._sent = 0  # of them, those at the head that a nudge has sent
        self._index = 0  # arguments, or lists, that are in chunks

    @property
    def length(self) -> int | None:
        """How many arguments there are, where that is known."""
        return len(self._args) if isinstance(self._args, (list, tuple, range)) else None

    def start(self, inline: bool) -> None:
        """Begin to iterate.

        :param inline: the calling thread will take all results now, and can feed a sequence itself.
        """
        args = self._args
        self.inline = inline and isinstance(args, (list, tuple, range)) and not (args and self._is_list(args[0]))
        if isinstance(args, (list, tuple, range)) and not (args and self._is_list(args[0])):
            self._run(self._feed_step)  # short sequences are fed by then
        if not self.inline and not self.ended.is_set():
            thread = threading.Thread(target=self._run, args=(self._feed,), name="achilles-feeder", daemon=True)
            thread.start()
            self._thread = thread  # one that could not be started cannot be joined

    def step(self) -> bool:
        """The thread that takes: feed some chunks, as far as there is room. Whether it fed any."""
        before = self._index
        self._run(self._feed_step)
        self._full = not self.ended.is_set() and self._index == before
        return not self._full

    def stop(self) -> None:
        """Feed nothing more; joins the thread, half a second at most. The call has failed by then. Any thread."""
        self.ended.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)

    def nudge(self) -> None:
        """A thread looks for a result and finds none: send what the feeder has, if the feeder is held up."""
        if self._full:
            self._call.cut_packet(stuck=True)
        since, now = self._pulling, time.monotonic()
        if not since or now - since < PAUSE_SECONDS:
            return
        self._pulling = now
        try:
            with self._cutting:
                arguments = self._open[self._sent :]
                self._sent += len(arguments)
                self._send(arguments)
        except Exception as e:  # an argument that cannot be dumped, of a call that this ends
            self._call.fail(e)
        self._call.cut_packet()

    def _run(self, feed: Callable[[], bool]) -> None:
        """Feed, in the feeder thread or in the caller's; then say that the input has ended, and how."""
        error: BaseException | None = None
        try:
            if not feed():
                return
        except BaseException as e:  # the caller's iterable may raise anything; it is raised where results are taken
            if feed != self._feed and not isinstance(e, Exception):
                raise  # Ctrl-C, or the like, in the caller's own thread
            error = e
        self.ended.set()
        self._call.finish(error)

    def _feed(self) -> bool:
        """The feeder thread: all of it."""
        args: Any = self._args() if callable(self._args) else self._args
        if isinstance(args, (list, tuple, range)) and not (args and self._is_list(args[0])):
            self._args = args
            while not self._feed_step():
                self._wait_for_room(self._call.weight(self.size))
        else:
            self._feed_iterator(iter(args))
        return True

    def _feed_step(self) -> bool:
        """Dump some chunks of a sequence and let them go; True when all are gone."""
        args: Sequence[Any] = self._args  # type: ignore[assignment]
        self.size = self._call.good_size(self.size)
        until, weight = time.monotonic() + STEP_SECONDS, self._call.weight(self.size)
        room = self._call.room(weight)
        while room >= weight and self._index < len(args) and time.monotonic() < until:
            count = min(self._piece, int(room // weight)) * self.size
            piece = list(args[self._index : self._index + count])
            began = time.monotonic()
            size = self._send(piece, fill=False)
            quick = time.monotonic() - began < STEP_SECONDS / 4
            self._piece = 2 * self._piece if quick else max(1, self._piece // 2)
            room -= self._call.weight(len(piece), self.size)
            if size > MAX_SHORT_BYTES:
                break
        self._call.fill(len(args) - self._index)
        return self._index >= len(args)

    def _feed_iterator(self, args: Iterator[Any]) -> None:
        head = list(islice(args, 1))
        if head and self._is_list(head[0]):
            for argument in chain(head, args):
                self._send_list(argument)
            return
        self._open += head
        more = bool(head)
        try:
            while more:  # a whole chunk goes before the next argument is read: so `buffersize` is never passed
                with self._cutting:
                    self.size = self._call.good_size(self.size)
                    if self._close_chunks(self.size) > MAX_SHORT_BYTES:
                        self._burst = 1
                more = self._pull(args)
        finally:  # what came before an error of the iterator's is sent, too
            with self._cutting:
                self._close_chunks(1)

    def _pull(self, args: Iterator[Any]) -> bool:
        """Let the iterator add to the open chunk; False if it has ended. A nudger sees each argument as it comes."""
        unsent = len(self._open) - self._sent
        held = self._call.weight(unsent, self.size) if self._call.results.by_argument else 0
        room = self._wait_for_room(held + 1) - held
        most = room if self._call.results.by_argument else room * self.size - unsent
        wanted, before = max(1, min(self._burst, int(min(most, BURST_MOST)))), len(self._open)
        self._pulling = began = time.monotonic()
        try:
            self._open.extend(islice(args, wanted))
        finally:
            self._pulling = 0.0
        self._burst = min(2 * self._burst, BURST_MOST) if time.monotonic() - began < BURST_SECONDS else 1
        return len(self._open) - before == wanted

    def _wait_for_room(self, weight: int) -> float:
        """Block until the window has this much room; how much it has. Raises when the call is over."""
        room = self._call.room(weight)
        try:
            while not room:
                self._full = True
                room = self._call.room(weight, LOOK_SECONDS)
                self._raise_if_over()
        finally:
            self._full = False
        self._raise_if_over()
        return room

    def _raise_if_over(self) -> None:
        if self.ended.is_set() or self._call.results.error is not None:
            raise InterruptedError(CANCELLED)

    def _is_list(self, first: object) -> bool:
        return self._lists and isinstance(first, list)

    # All below needs `_cutting`, but for sequences and lists, which nobody nudges.

    def _close_chunks(self, least: int) -> int:
        """The feeder: send the whole chunks of those that are open, or all where `least` is 1; their bytes."""
        arguments = self._open[self._sent :] if self._sent else self._open
        count = len(arguments) - (len(arguments) % self.size if least > 1 else 0)
        self._open, self._sent = arguments[count:], 0
        return self._send(arguments[:count])

    def _send(self, arguments: list[Any], fill: bool = True) -> int:
        """Let chunks go; their bytes. A chunk that cannot be sent whole goes as several."""
        if not arguments:
            return 0
        context, size = self._call.job.context, self.size
        try:
            found = dump_chunks(context, arguments, size)
            self._call.check_letters(found)
        except (DumpError, LetterTooLarge):
            return self._send_pieces(arguments, fill)
        self._call.enter(found, self._index, size, len(arguments), fill=fill)
        self._index += len(arguments)
        return sum(map(len, found))

    def _send_pieces(self, arguments: list[Any], fill: bool) -> int:
        """Cut arguments, of which some chunk cannot be sent, until each piece can, or is one argument's error."""
        half = min(len(arguments) // 2, self.size)
        if half:
            return self._send(arguments[:half], fill) + self._send(arguments[half:], fill)
        try:
            self._dump_one(arguments[0], self._index, None)
        except (DumpError, LetterTooLarge) as error:
            mark(error, index=self._index)
            if self._lists:
                raise
            self._call.spoil(self._index, error)
            self._index += 1
        return 0

    def _dump_one(self, argument: Any, number: int, place: int | None) -> None:
        """Raise the error of an argument that cannot be sent, with its name."""
        name = f"argument {number}" if place is None else f"argument {number} of the list args[{place}]"
        letter = b"".join(self._call.job.context.dump(argument, f"{name} (of type {type(argument).__qualname__})"))
        self._call.link.check_size(name, len(letter))
        dump_chunk(self._call.job.context, [argument])

    def _send_list(self, argument: object) -> None:
        """A list of a list of lists: a packet of its own, in as many even chunks as the largest node has workers."""
        place, call = self._index, self._call
        if not isinstance(argument, list):
            text = f"args[{place}] is of type {type(argument).__name__}: where args[0] is a list, all must be lists"
            raise mark(TypeError(text), index=place)
        while argument and not call.wait_for_node(LOOK_SECONDS):
            self._raise_if_over()
        size, larger = divmod(len(argument), min(len(argument), call.link.workers()[1]) or 1)
        self._wait_for_room(1)
        try:
            at = larger * (size + 1)  # so many chunks have an argument more
            parts = [(0, size + 1, dump_chunks(call.job.context, argument[:at], size + 1) if at else []),
                     (at, size, dump_chunks(call.job.context, argument[at:], size or 1) if argument[at:] else [])]
            for _, _, found in parts:
                call.check_letters(found)
        except (DumpError, LetterTooLarge) as error:
            for number, each in enumerate(argument):
                try:
                    self._dump_one(each, number, place)
                except (DumpError, LetterTooLarge) as e:
                    raise mark(e, index=place) from e.__cause__
            raise mark(error, index=place) from None
        call.enter_list(parts, place)
        self._index += 1
