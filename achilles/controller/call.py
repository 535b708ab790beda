"""One mapping call: its job, its feeder and its results together.

::

    feeder, or the thread that takes ─▶ enter ─▶ job ─▶ link … ─▶ results ─▶ take ─▶ values and errors

Knows which range of the job's chunks is its own, and when it is over. One thread at a time takes. Threads and locks are
those of `link.py` and `feeder.py`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..objects.outcomes import fresh, mark
from ..protocol.frames import Buffer, letters_of
from .feeder import CANCELLED, Feeder
from .job import Job, Taken
from .link import Link
from .results import Answered, FlatResults, PacketResults, Run, Unit

__all__ = ["Call", "NotYet", "check_counts", "check_seconds"]

CHUNK_US = 1_000  # of work in a chunk of a call that finds its chunksize: far over the cost of a chunk
LIFTED = 1 << 62  # chunks or arguments, of a window without a limit
NUDGE_SECONDS = 0.010  # how often a thread that waits for results looks whether the feeder is held up


class NotYet(TimeoutError):
    """Nothing to take came in time. A class of its own: a user's function may raise TimeoutError, too."""


class Call:
    """A map, imap or the like, from its first argument to its last result.

    :param flat: every chunk is delivered by itself (Pool, Executor). Otherwise packets are, or lists.
    :param ordered: `take` follows the order of args.
    :param eager: an error of the iterable is raised at once, not in its place.
    :param buffersize: arguments that may be out and not taken; None follows the pace.
    :param largest: arguments of a chunk at most, where the call finds `chunksize` itself.
    :param ready: is called under the connection's lock when there may be something to take; must not block.
    """

    def __init__(
        self, link: Link, job: Job, args: Iterable[Any] | Callable[[], Any], *, chunksize: int = 1,
        ordered: bool = True, flat: bool = False, eager: bool = False, buffersize: int | None = None,
        largest: int | None = None, ready: Callable[[], object] | None = None,
    ) -> None:
        self.link, self.job = link, job
        self._largest = largest and min(largest, buffersize or largest)
        self._buffersize: float | None = buffersize
        self._eager = eager
        size = min(chunksize, buffersize or chunksize)
        self.results: FlatResults | PacketResults = (
            FlatResults(link.lock, ordered, buffersize is not None, ready) if flat
            else PacketResults(link.lock, ordered, buffersize is not None))
        self._feeder = Feeder(self, args, size, lists=not flat)
        self._over = False

    def start(self, inline: bool = False) -> None:
        """Begin to iterate, dump and send. `inline`: the calling thread takes all results now.

        Raises why nothing can be sent: the connection may have ended since the job was taken.
        """
        with self.link.lock:
            self.link.check_usable()
            if self.job.ended:
                raise InterruptedError(CANCELLED)
            self.job.sink = self.results
            self.job.left = float("inf") if self._feeder.length is None else 0.0
            if isinstance(self.results, FlatResults):
                self.results.begin(self.job.next)
        self._feeder.start(inline)

    @property
    def fed(self) -> threading.Event:
        """Set when the input has ended, or the call has."""
        return self._feeder.ended

    def stop(self) -> None:
        """Nothing more is fed or taken; joins the feeder, half a second at most. Any thread."""
        self.fail(InterruptedError(CANCELLED))
        self._feeder.stop()

    def fail(self, error: BaseException) -> None:
        """The call has failed: `take` raises the error. Any thread."""
        with self.link.lock:
            self.results.fail(error)

    def close(self, key: Any, error: BaseException | None) -> None:
        """The call is over: its job is kept under `key` for the next one, or ended where an error ended the call."""
        with self.link.lock:
            if error is None:
                self.link.keep(key, self.job)
            else:
                self.link.end(self.job)
        self.link.push()
        if error is not None:
            self.stop()

    def lift_window(self) -> None:
        """Let everything out: nobody will take before all is done."""
        with self.link.lock:
            self._buffersize = LIFTED
            self.results.room.notify_all()

    # The thread that takes.

    def take(self, timeout: float | None = None) -> Taken | None:
        """The next values: the index of the first, and an exception for each that has none. None behind the last.

        Blocks up to `timeout` seconds, then NotYet. Raises what the call as a whole failed with.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            fed = self._feeder.step() if self._feeder.inline and not self._feeder.ended.is_set() else False
            with self.link.lock:
                found = self._find()
                if found is None and not fed and not self._over:
                    left = NUDGE_SECONDS if not self._feeder.ended.is_set() else float("inf")
                    left = left if deadline is None else min(left, deadline - time.monotonic())
                    if left > 0:
                        self.results.changed.wait(None if left == float("inf") else left)
                        found = self._find()
            if found is not None:
                return self._open(found)
            if self._over:
                return None
            self._feeder.nudge()
            if deadline is not None and time.monotonic() >= deadline and not fed:
                raise NotYet

    def _find(self) -> Answered | Unit | None:
        """The next thing to deliver; sets `_over` behind the last. Needs the lock."""
        if self.results.error is not None:
            raise fresh(self.results.error)
        found = self.results.take()
        if found is None and self.results.over:
            if self.results.last_error is not None:
                raise self.results.last_error
            self._over = True
        return found

    def _open(self, found: Answered | Unit) -> Taken:
        if isinstance(found, Answered):
            return self.job.open(found)
        values: list[Any] = []
        errors: dict[int, BaseException] = {}
        start = found.place if found.place is not None else found.pieces[0].run.start
        for piece in found.pieces:
            _, some, failed = self.job.open(piece)
            errors.update({len(values) + offset: error for offset, error in failed.items()})
            values += some
        if found.place is not None:
            errors = {offset: mark(error, index=found.place) for offset, error in errors.items()}
        return start, values, errors

    # What the feeder needs.

    def weight(self, arguments: int, size: int | None = None) -> int:
        """What these arguments take of the window."""
        return arguments if self.results.by_argument else -(-arguments // (size or arguments))

    def room(self, weight: int = 1, timeout: float = 0.0) -> float:
        """What the window has left, 0 where that is less than `weight` after `timeout` seconds."""
        with self.link.lock:
            if not (room := self.results.free(self._limit(), weight)) and timeout and self.results.error is None:
                self.results.room.wait(timeout)
                room = self.results.free(self._limit(), weight)
            return room if self.results.error is None else 0

    def _limit(self) -> float:
        if self._buffersize is not None:
            return self._buffersize
        return self.job.pace.window(self._feeder.size, self.link.workers()[0])

    def good_size(self, size: int) -> int:
        """Arguments of the next chunk: `size`, unless the call finds it itself, by the pace."""
        if self._largest is None or not self.job.pace.us:
            return size
        return max(1, min(int(CHUNK_US / self.job.pace.us), self._largest))

    def check_letters(self, found: Sequence[Buffer]) -> None:
        """LetterTooLarge if any may not travel."""
        self.link.check_size("a chunk", max(map(len, found), default=0))

    def enter(self, found: Sequence[Buffer], start: int, size: int, arguments: int, *, fill: bool = True) -> None:
        """Queue chunks of the job, and with `fill` send what there is room for."""
        with self.link.lock:
            self._enter(Run(self.job.next, start, size, letters_of(found), arguments))
            if fill:
                self.link.queue(self.job)
        if fill:
            self.link.push()

    def _enter(self, run: Run) -> None:
        if self.results.error is None:
            self.results.enter(run)
            self.job.enter(run)

    def fill(self, left: int) -> None:
        """Send what was entered and there is room for; `left` arguments follow."""
        with self.link.lock:
            self.job.left = left / self._feeder.size
            self.link.queue(self.job)
        self.link.push()

    def enter_list(self, parts: Sequence[tuple[int, int, Any]], place: int) -> None:
        """Queue the chunks of one list: offset of the first argument, size, letters."""
        with self.link.lock:
            first = self.job.next
            count = sum(len(found) for _, _, found in parts)
            if isinstance(self.results, PacketResults):
                self.results.add_list(place, first, first + count)
            for start, size, found in parts:
                if found:
                    run = Run(self.job.next, start, size, letters_of(found), size * len(found), place)
                    self._enter(run)
            self.link.queue(self.job)
        self.link.push()

    def spoil(self, index: int, error: BaseException) -> None:
        """The argument at `index` cannot be sent: that is its result."""
        with self.link.lock:
            chunk = Run(self.job.next, index, 1, [b""], 1)
            self.results.enter(chunk)
            self.job.next += 1
            self.job.give_up(chunk, {0: error})

    def cut_packet(self, stuck: bool = False) -> None:
        """The feeder is held up: the last packet need not be full."""
        if isinstance(self.results, PacketResults):
            with self.link.lock:
                self.results.cut(self.job.next, stuck)

    def finish(self, error: BaseException | None) -> None:
        """The input has ended, perhaps with an error."""
        with self.link.lock:
            self.job.left = 0.0
            if error is not None and self._eager:
                self.results.fail(error)
            self.results.finish(self.job.next, error)

    def wait_for_node(self, timeout: float) -> int:
        """Workers of the largest node; where there is none, 0 after at most `timeout` seconds."""
        with self.link.changed:
            if not self.link.workers()[1]:
                self.link.changed.wait(timeout)
            return self.link.workers()[1]


def check_counts(**counts: object) -> None:
    """TypeError or ValueError unless each is an int of at least 1; buffersize may be None."""
    for name, value in counts.items():
        if value is None and name == "buffersize":
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, not {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def check_seconds(**seconds: object) -> None:
    """TypeError or ValueError unless each is None or a finite number, and a timeout more than 0."""
    for name, value in seconds.items():
        if value is None:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
        if not 0 <= value < float("inf") or (name == "timeout" and value == 0):
            raise ValueError(f"{name} must be a finite number of seconds, more than 0, not {value}")
