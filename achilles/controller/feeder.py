"""The input side of a call: iterates the arguments, cuts them into chunks, and dumps them.

Knows the arguments and the window; what becomes of a chunk is the job's. Nothing else runs the caller's iterator.

::

    iterator ─next─▶ open chunk ─cut─▶ dump ─▶ job      `step`, by the feeder thread, or by the thread that takes
                         └─ nudge: 10 ms inside `next`  by the thread that takes

A thread that takes results and finds none calls `nudge`. So a generator may wait for results of its own call. A
blocking map of a sequence has no feeder thread: the thread that takes calls `step` between its looks.

The lock `_cutting` guards the open chunk while it is cut, between feeder thread and nudger. The feeder alone appends to
the open chunk, outside that lock while the iterator runs.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from itertools import islice
from operator import length_hint
from typing import TYPE_CHECKING, Any

from ..errors import DumpError, LetterTooLarge
from ..objects.letters import dump_chunk, dump_chunks
from ..objects.outcomes import mark
from ..protocol.frames import SHORT_LETTER_BYTES, Status, letter_of
from .results import Answered, Run

if TYPE_CHECKING:
    from .call import Call

__all__ = ["PAUSE_SECONDS", "UNKNOWN_LENGTH", "Feeder"]

CHUNK_US = 1_000  # of work in a chunk of a call that finds its chunksize: far over the cost of a chunk
UNKNOWN_LENGTH = 1 << 62  # arguments, of an input that may be endless
PAUSE_SECONDS = 0.010  # so long inside the iterator's `next` is a pause, which a thread that waits looks for
STEP_SECONDS = 0.0005  # of reading and dumping before the chunks go: little against a batch
LOOK_SECONDS = 0.1  # how often a feeder without room, or without a node, looks whether the call is over
JOIN_SECONDS = 0.5  # for a feeder that is inside the caller's iterator: nobody can interrupt it there


class Feeder:
    """Feeds one call.

    :param args: an iterable, or a function that returns one.
    :param size: arguments in a chunk.  :param largest: the same at most, where the pace decides.
    :param packets: whether a first argument that is a list makes every argument a packet of its own, and an argument
        that cannot be sent ends the call. Otherwise such an argument has its error for a result.
    """

    def __init__(self, call: Call, args: Any, size: int, largest: int | None, packets: bool) -> None:
        self.size = size
        self.ended = False  # all is fed
        self.inline = False  # the thread that takes feeds
        self._call, self._args, self._largest, self._packets = call, args, largest, packets
        self._sequence = isinstance(args, (list, tuple, range))
        self._iterator: Any = None
        self._lists = None if packets else False  # None while no argument has come
        self._thread: threading.Thread | None = None
        self._full = False  # the feeder waits for room
        self._pulling = 0.0  # since when (monotonic) the feeder is inside `next`, or was nudged; 0 where it is not
        self._burst = 1  # arguments that are read at once: as many as a step takes
        self._cutting: Any = contextlib.nullcontext()  # guards all below, where a thread feeds
        self._open: list[Any] = []  # arguments that are in no chunk yet
        self._sent = 0  # of them, those at the head that a nudge has sent
        self._index = 0  # arguments, or lists, that are in chunks

    def start(self, inline: bool) -> None:
        """Begin to iterate.

        :param inline: the calling thread will take all results now, and can feed a sequence itself.
        """
        self.inline = self._call.link.in_place
        if self._sequence and not (self._packets and self._args and isinstance(self._args[0], list)):
            self.inline, self._burst = inline or self.inline, self.size
            self.step()  # short sequences are fed by then
        if not self.inline and not self.ended:
            self._cutting = threading.Lock()
            self._thread = threading.Thread(target=self._run, name="achilles-feeder", daemon=True)
            self._thread.start()

    def join(self) -> None:
        """Half a second at most. The call has failed by then. Any thread."""
        thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(JOIN_SECONDS)

    def nudge(self) -> None:
        """A thread looks for a result and finds none: send what the feeder has, if the feeder is held up."""
        call, since, now = self._call, self._pulling, time.monotonic()
        held_up = bool(since) and now - since >= PAUSE_SECONDS
        if held_up:
            self._pulling = now
            try:
                with self._cutting:
                    arguments = self._open[self._sent :]
                    if call.recall is not None:  # the next run cuts the same chunks
                        arguments = arguments[: len(arguments) // self.size * self.size]
                    self._sent += len(arguments)
                    self._send(arguments)
            except Exception as e:  # an argument that cannot be dumped, of a call that this ends
                call.fail(e)
        if held_up or self._full:
            with call.link.lock:
                call.results.cut(call.job.next, stuck=not held_up)
                call.link.queue(call.job)
            call.link.push()

    def _run(self) -> None:
        """The feeder thread."""
        while not self.ended and self._call.results.error is None:
            if not self.step():
                self._room(LOOK_SECONDS)

    def step(self) -> bool:
        """Feed some chunks, as far as there is room; whether there was any. At the end, say so to the results."""
        call, more, error = self._call, False, None
        try:
            more = self._pull()
        except BaseException as e:  # the caller's iterable may raise anything; it is raised where results are taken
            if self._thread is not threading.current_thread() and not isinstance(e, Exception):
                raise  # Ctrl-C, or the like, in the caller's own thread
            error = e
        left = self._left()
        with call.link.lock:
            call.job.left = left / self.size if more else 0
            call.link.queue(call.job)
            if error is not None and call.eager:
                call.results.fail(error)
            if not more:
                call.results.finish(call.job.next, error)
                self.ended = True
        call.link.push()
        return not self._full

    def _pull(self) -> bool:
        """Read and dump, as far as there is room, half a millisecond of a sequence; False behind the last argument."""
        if self._iterator is None:
            self._iterator = iter(self._args() if callable(self._args) else self._args)
        until = time.monotonic() + STEP_SECONDS
        while True:
            us = self._call.job.pace.us
            if self._largest is not None and us:
                self.size = max(1, min(int(CHUNK_US / us), self._largest))
            room = self._room()
            self._full = room <= 0
            if not self._full and not self._read(1 if self._lists else min(self._burst, room)):
                return False
            if self._full or not self._sequence or time.monotonic() > until:
                return True  # a whole chunk goes before the next argument is read

    def _room(self, timeout: float = 0.0) -> int:
        """How many arguments may be read now. Without room, wait for it up to `timeout` seconds."""
        call, unsent = self._call, len(self._open) - self._sent
        limit = call.buffersize
        if limit is None:
            limit = call.job.pace.window(self.size, call.link.workers)
        unit = 1 if call.results.by_argument else self.size
        with call.link.lock:
            free = call.results.free(limit, -(-(unsent + 1) // unit))
            if not free and call.results.error is None:
                call.results.changed.wait(timeout)
        return free * unit - unsent

    def _read(self, wanted: int) -> bool:
        """Let the iterator add to the open chunk; False if it has ended. A nudger sees each argument as it comes."""
        began, before, more = time.monotonic(), len(self._open), False
        self._pulling = began if self._lists is False else 0.0
        try:
            self._open.extend(islice(self._iterator, wanted))
            more = len(self._open) - before == wanted and self._left() > 0
        finally:  # what came before an error of the iterator's is sent, too
            self._pulling = 0.0
            with self._cutting:
                self._close(more)
        self._burst = max(1, int(min(2.0, STEP_SECONDS / 2 / max(time.monotonic() - began, 1e-6)) * wanted))
        return more

    def _left(self) -> int:
        """How many arguments were not read, where that is known."""
        return length_hint(self._iterator, 0) if self._sequence else UNKNOWN_LENGTH

    # All below needs `_cutting`.

    def _close(self, more: bool) -> None:
        """Send the whole chunks of those that are open, and where no more arguments follow, the rest."""
        if self._lists is None:
            self._lists = bool(self._open) and isinstance(self._open[0], list)
        if self._lists:
            for argument in self._open:
                self._send_list(argument)
        arguments = self._open[self._sent :] if not self._lists else []
        count = len(arguments) - (len(arguments) % self.size if more else 0)
        self._open, self._sent = arguments[count:], 0
        self._send(arguments[:count])

    def _send(self, arguments: list[Any], place: int | None = None, size: int = 0) -> None:
        """Let chunks go: of args, or of the list at `place`, which is a packet. What cannot be sent whole, is cut."""
        if not arguments and place is None:
            return
        if self._recall(arguments, place):
            return
        start = self._index if place is None else 0
        run = Run(self._call.job.next, start, size or self.size, [b""], len(arguments), place)
        try:
            self._enter(run, arguments, None if arguments else {})
        except (DumpError, LetterTooLarge) as e:
            half = len(arguments) // 2
            half -= half % self.size if half > self.size else 0
            if half and place is None:
                self._send(arguments[:half])
                self._send(arguments[half:])
                return
            errors = filter(None, [self._error_of(each, run.name(at)) for at, each in enumerate(arguments)])
            error = mark(next(errors, e), index=run.index(0))
            if self._packets:
                raise error from error.__cause__
            self._enter(run, arguments, {0: error})
        self._index += len(arguments) if place is None else 1

    def _recall(self, arguments: list[Any], place: int | None) -> bool:
        """Deliver the results of a chunk, or of a list, that need not run. Arguments of many chunks go one by one."""
        call = self._call
        if call.recall is None or not arguments:
            return False
        if place is None and len(arguments) > self.size:
            for at in range(0, len(arguments), self.size):
                self._send(arguments[at : at + self.size])
            return True
        letter = call.recall(self._index, arguments)
        if letter is None:
            return False
        run = Run(call.job.next, self._index if place is None else 0, len(arguments), [letter], len(arguments), place)
        with call.link.lock:
            call.results.enter(run)
            call.job.next = run.end
            call.results.put(Answered(run, bytes([Status.VALUES]), [letter]))
        self._index += len(arguments) if place is None else 1
        return True

    def _send_list(self, argument: object) -> None:
        """A list of a list of lists: a packet of its own, in even chunks for the workers of the largest node."""
        call = self._call
        if not isinstance(argument, list):
            what = f"args[{self._index}] is of type {type(argument).__name__}"
            raise mark(TypeError(f"{what}: where args[0] is a list, all must be lists"), index=self._index)
        with call.link.lock:
            while argument and call.results.error is None and not call.link.largest:
                call.link.changed.wait(LOOK_SECONDS)
        self._send(argument, self._index, -(-len(argument) // (call.link.largest or 1)))

    def _enter(self, run: Run, arguments: list[Any], lost: Mapping[int, BaseException] | None = None) -> None:
        """Dump arguments and queue them in the job; or `lost` is all that will come of them."""
        call = self._call
        if lost is None:
            found = dump_chunks(call.job.context, arguments, run.size)
            run.letters = list(found)
            if max(map(len, found)) > SHORT_LETTER_BYTES:  # asked at the speed of C
                run.letters = [letter_of(letter, "a chunk") for letter in found]
        with call.link.lock:
            if call.results.error is not None:
                return
            call.results.enter(run)
            if lost is None:
                call.job.enter(run)
            else:
                call.job.give_up(run, lost)

    def _error_of(self, argument: Any, name: str) -> BaseException | None:
        """Why an argument cannot be sent, by its name."""
        context = self._call.job.context
        try:
            letter = b"".join(context.dump(argument, f"{name} (of type {type(argument).__qualname__})"))
            letter_of(letter, name)
            dump_chunk(context, [argument])
        except (DumpError, LetterTooLarge) as error:
            return error
        return None
