"""One mapping call, from its first argument to its last result: the feeder, and the thread that takes.

Knows the arguments and the window. The job knows the state of each chunk, and `results.py` keeps the answers. No other
module runs the caller's iterator. One thread at a time takes.

::

    iterator ─next─▶ open chunk ─cut─▶ dump ─▶ job ─▶ link … ─▶ results ─▶ take ─▶ values
                         └─ nudge: 10 ms inside `next`

Threads: a feeder thread iterates, cuts and dumps. A blocking map of a sequence has none: the thread that takes feeds
between its looks. A thread that takes and finds nothing nudges. So a generator may wait for results of its own call.

Locks: the connection's guards job and results. `_cutting` guards the open chunk while it is cut, between feeder thread
and nudger. The feeder alone appends to the open chunk, outside that lock while the iterator runs.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice
from operator import length_hint
from typing import Any, Protocol

from ..errors import DumpError, LetterTooLarge
from ..objects.letters import dump_chunks
from ..objects.outcomes import mark
from ..protocol.frames import SHORT_LETTER_BYTES, Letter, letter_of
from .job import Job, Taken
from .link import Link
from .results import NOBODY, Results
from .run import Run

__all__ = ["Call", "NotYet", "Recall", "Watcher"]

CHUNK_US = 1_000  # of work in a chunk of a call that finds its chunksize: far over the cost of a chunk
UNKNOWN_LENGTH = 1 << 62  # arguments, of an input that may be endless
PAUSE_SECONDS = 0.010  # so long inside the iterator's `next` is a pause, which a thread that waits looks for
STEP_SECONDS = 0.0005  # of reading and dumping before the chunks go: little against a batch
LOOK_SECONDS = 0.1  # how often a feeder without room, or without a node, looks whether the call is over
JOIN_SECONDS = 0.5  # for a feeder that is inside the caller's iterator: nobody can interrupt it there

Recall = Callable[[int, list[Any]], bytes | None]  # the letter of the results of arguments, from their index on


class NotYet(TimeoutError):
    """Nothing to take came in time. A class of its own: a user's function may raise TimeoutError, too."""


class Watcher(Protocol):
    """Hears of each delivery that was taken, in the thread that takes. Its exceptions end the call."""

    def taken(self, start: int, values: list[Any], errors: dict[int, BaseException]) -> None:
        """These were taken: see Taken."""

    def close(self) -> None:
        """The call is over. Any thread; perhaps more than once."""


class Call:
    """A map, imap or the like. Made under the connection's lock.

    :param args: an iterable, or a function that returns one.
    :param flat: every chunk is delivered by itself (Pool, Executor), and an argument that cannot be sent has its error
        for a result. Otherwise packets are delivered, such an argument ends the call, and a first argument that is a
        list makes every argument a packet of its own.
    :param ordered: `take` follows the order of args.
    :param eager: an error of the iterable is raised at once, not in its place.
    :param buffersize: chunks that may be out and not taken where the call is flat, else arguments; None follows the
        pace.
    :param largest: arguments of a chunk at most, where the call finds `chunksize` itself.
    :param show: is called with each line of output, by the thread that takes: text, index of its argument (None where
        the text counts lines that were left out), node.
    :param watchers: hear of each delivery, in their order.
    :param recall: gives the results of arguments that need not run. Then each chunk is a packet, and goes when it is
        whole. The thread that feeds calls it.
    """

    def __init__(
        self, link: Link, job: Job, args: Any, *, chunksize: int = 1, ordered: bool = True, flat: bool = False,
        eager: bool = False, buffersize: int | None = None, largest: int | None = None,
        show: Callable[[str, int | None, int], object] | None = None, watchers: Sequence[Watcher] = (),
        recall: Recall | None = None,
    ) -> None:
        self.link, self.job, self._buffersize = link, job, buffersize
        self.results = job.sink = Results(
            link.lock, ordered, buffersize is not None and not flat, not flat, job.next)
        self.ended = False  # all is fed
        self.results.single = recall is not None
        self._show, self._watchers, self._recall = show or NOBODY.hear, watchers, recall
        self._args, self._flat, self._eager, self._largest = args, flat, eager, largest
        self._size = chunksize if flat else min(chunksize, buffersize or chunksize)  # arguments in a chunk
        self._sequence = type(args) in (list, tuple, range)  # a subclass may iterate as it likes
        self._iterator: Any = None
        self._lists = False if flat else None  # None while no argument has come
        self._inline = link.in_place  # the thread that takes feeds
        self._thread: threading.Thread | None = None
        self._full = False  # the feeder waits for room
        self._pulling = 0.0  # since when (monotonic) the feeder is inside `next`, or was nudged; 0 where it is not
        self._burst = 1  # arguments that are read at once: as many as a step takes
        self._cutting: Any = contextlib.nullcontext()  # guards all below, where a thread feeds
        self._open: list[Any] = []  # arguments that are in no chunk yet
        self._index = 0  # arguments, or lists, that are in chunks

    def start(self, inline: bool = False) -> None:
        """Begin to iterate, dump and send. `inline`: the calling thread takes all results now, and may feed."""
        if self._sequence and (self._flat or not self._args or not isinstance(self._args[0], list)):
            self._inline, self._burst = inline or self._inline, self._size
            self._step()  # short sequences are fed by then
        if not self._inline and not self.ended:
            self._cutting = threading.Lock()
            self._thread = threading.Thread(target=self._feed, name="achilles-feeder", daemon=True)
            self._thread.start()

    def close(self, key: Any, error: BaseException | None) -> None:
        """The call is over: its job is kept under `key` for the next one, or ended where an error ended the call.

        With an error, nothing more is fed or taken, and the feeder is joined, half a second at most. Any thread.
        """
        with self.link.lock:
            self.job.spent = self.job.spent or error is not None
            self.link.keep(key, self.job)
            if error is not None:
                self.results.fail(error)
        self.link.push()
        thread = self._thread
        if error is not None and thread and thread.is_alive() and thread is not threading.current_thread():
            thread.join(JOIN_SECONDS)
        for watcher in self._watchers:
            watcher.close()

    # The thread that takes.

    def take(self, timeout: float | None = None) -> Taken | None:
        """The next values: the index of the first, and an exception for each that has none. None behind the last.

        Blocks up to `timeout` seconds, then NotYet. Raises the error of the whole call. One thread at a time.
        """
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            again = self._inline and not self.ended and self._step()
            try:
                with self.link.lock:
                    found = self.results.take()
                    if found is not None or self.results.over:
                        break
                    left = threading.TIMEOUT_MAX if self.ended else PAUSE_SECONDS
                    again = again or bool(self.results.lines) or self.results.changed.wait(
                        max(0.0, min(left, deadline - time.monotonic())))
            finally:  # printed lines come before the result, or the error, of their call
                for _ in range(len(self.results.lines)):
                    self._show(*self.results.lines.popleft())
            if not again:
                self._nudge()
                if time.monotonic() >= deadline:
                    raise NotYet
        if found is None:
            return None
        taken = self.job.open(found)
        for watcher in self._watchers:
            watcher.taken(*taken)
        return taken

    def _nudge(self) -> None:
        """A thread looks for a result and finds none: send the open chunk, if the feeder is held up."""
        since, now = self._pulling, time.monotonic()
        held_up = bool(since) and now - since >= PAUSE_SECONDS
        if held_up:
            with self._cutting:
                if self._pulling:  # still
                    self._pulling = now
                    self._close(more=self._recall is not None)  # an argument that cannot be dumped ends the call
        if held_up or self._full:
            with self.link.lock:
                self.results.cut(self.job.next, stuck=not held_up)
                self.link.fill()
            self.link.push()

    # The feeder: its thread, or the thread that takes.

    def _feed(self) -> None:
        """The feeder thread."""
        while not self.ended and self.results.error is None:
            if not self._step():
                self._room(LOOK_SECONDS)

    def _step(self) -> bool:
        """Feed some chunks, as far as there is room; whether there was any. At the end, say so to the results."""
        more, error = False, None
        try:
            more = self._pull()
        except BaseException as e:  # the caller's iterable may raise anything; it is raised where results are taken
            if self._thread is not threading.current_thread() and not isinstance(e, Exception):
                raise  # Ctrl-C, or the like, in the caller's own thread
            error = e
        left = self._left()
        with self.link.lock:
            self.job.left = left / self._size if more else 0
            self.link.fill()
            if error is not None and self._eager:
                self.results.fail(error)
            if not more:
                self.results.finish(self.job.next, error)
                self.ended = True
        self.link.push()
        return not self._full

    def _pull(self) -> bool:
        """Read and dump, as far as there is room, half a millisecond of a sequence; False behind the last argument."""
        if self._iterator is None:
            self._iterator = iter(self._args() if callable(self._args) else self._args)
        until = time.monotonic() + STEP_SECONDS
        while True:
            us = self.job.pace.us
            if self._largest is not None and us:
                self._size = max(1, min(int(CHUNK_US / us), self._largest))
            room = self._room()
            self._full = room <= 0
            if not self._full and not self._read(1 if self._lists else min(self._burst, room)):
                return False
            if self._full or not self._sequence or time.monotonic() > until:
                return True  # a whole chunk goes before the next argument is read

    def _room(self, timeout: float = 0.0) -> int:
        """How many arguments may be read now. Without room, wait for it up to `timeout` seconds."""
        unsent, limit = len(self._open), self._buffersize
        if limit is None:
            limit = self.job.pace.window(self._size, self.link.workers)
        unit = 1 if self.results.by_argument else self._size
        with self.link.lock:
            free = self.results.free(limit, -(-(unsent + 1) // unit))
            if not free and self.results.error is None:
                self.results.changed.wait(timeout)
        return free * unit - unsent

    def _read(self, wanted: int) -> bool:
        """Let the iterator add to the open chunk; False if it has ended. A nudger sees each argument as it comes."""
        began, until, more = time.monotonic(), self._index + len(self._open) + wanted, False
        self._pulling = began if self._lists is False and not self._sequence else 0.0
        try:
            self._open.extend(islice(self._iterator, wanted))
            more = self._left() > 0
        finally:  # arguments that came before an error of the iterator are sent, too
            with self._cutting:
                self._pulling = 0.0  # from here on nobody nudges
                more = more and self._index + len(self._open) == until
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
        while self._lists and self._open:
            self._send_list(self._open.pop())  # lists are read one by one
        self._send_open(len(self._open) - (len(self._open) % self._size if more else 0))

    def _send_open(self, count: int) -> None:
        """Send the first of the arguments that are open; chunk by chunk where results may be recalled."""
        arguments = self._open[:count]
        del self._open[:count]  # behind them, the iterator may add others
        size = self._size if self._recall else max(count, 1)
        for at in range(0, len(arguments), size):
            self._send(arguments[at : at + size])

    def _send_list(self, argument: object) -> None:
        """A list of a list of lists: a packet of its own, in even chunks for the workers of the largest node."""
        if not isinstance(argument, list):
            found = f"args[{self._index}] is of type {type(argument).__name__}"
            raise mark(TypeError(f"{found}: where args[0] is a list, all must be lists"), index=self._index)
        with self.link.lock:
            while argument and self.results.error is None and not self.link.largest:
                self.link.changed.wait(LOOK_SECONDS)
        self._send(argument, self._index, -(-len(argument) // (self.link.largest or 1)))

    def _send(self, arguments: list[Any], place: int | None = None, size: int = 0) -> None:
        """Let chunks go: of args, or of the list at `place`, which is a packet. Chunks that are too large are cut."""
        run = Run(self.job.next, self._index if place is None else 0, size or self._size, [b""], len(arguments), place)
        try:
            letter = self._recall(run.index(0), arguments) if self._recall and arguments else None
            if letter is not None:
                run.letters = run.answers = [letter]
            elif arguments:
                run.letters = self._dump(run, arguments)
        except (DumpError, LetterTooLarge) as e:
            half = len(arguments) // 2
            half -= half % self._size if half > self._size else 0
            if half and place is None:
                self._send(arguments[:half])
                self._send(arguments[half:])
                return
            mark(e, index=run.index(0))
            if not self._flat:
                raise e from e.__cause__
            run.lost = {0: e}
        self._index += len(arguments) if place is None else 1
        with self.link.lock:
            if self.results.error is None:
                self.results.enter(run)
                self.job.enter(run)

    def _dump(self, run: Run, arguments: list[Any]) -> list[Letter]:
        """The letters of chunks. The error names an argument that cannot be dumped or sent."""
        try:
            found = dump_chunks(self.job.context, arguments, run.size)
            if max(map(len, found)) > SHORT_LETTER_BYTES:  # asked at the speed of C
                return [letter_of(letter, "a chunk") for letter in found]
            return [*found]
        except (DumpError, LetterTooLarge):
            for offset, argument in enumerate(arguments):
                name = run.name(offset)
                named = self.job.context.dump(argument, f"{name} (of type {type(argument).__qualname__})")
                letter_of(b"".join(named), name)
            raise
