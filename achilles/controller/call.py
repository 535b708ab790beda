"""One mapping call: its job, its feeder and its results together.

::

    feeder, or the thread that takes ─▶ job ─▶ link … ─▶ results ─▶ take ─▶ values and errors

Knows which range of the job's chunks is its own, and when it is over. One thread at a time takes. Threads and locks are
those of `link.py` and `feeder.py`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from ..objects.outcomes import fresh
from .feeder import PAUSE_SECONDS, UNKNOWN_LENGTH, Feeder
from .job import Job, Taken
from .link import Link
from .results import Results

__all__ = ["Call", "NotYet", "Watcher"]


class NotYet(TimeoutError):
    """Nothing to take came in time. A class of its own: a user's function may raise TimeoutError, too."""


class Watcher(Protocol):
    """Is told what the thread that takes has taken. What it raises, the call fails with."""

    def taken(self, start: int, values: list[Any], errors: dict[int, BaseException]) -> None:
        """These were taken: see Taken."""

    def close(self) -> None:
        """The call is over. Any thread; perhaps more than once."""


class Call:
    """A map, imap or the like, from its first argument to its last result. Made under the connection's lock.

    :param flat: every chunk is delivered by itself (Pool, Executor). Otherwise packets are, or lists.
    :param ordered: `take` follows the order of args.
    :param eager: an error of the iterable is raised at once, not in its place.
    :param buffersize: chunks that may be out and not taken where the call is flat, else arguments; None follows the
        pace.
    :param largest: arguments of a chunk at most, where the call finds `chunksize` itself.
    :param watchers: are told what was taken, in their order.
    :param recall: gives the letter of the results of arguments from this index on, where they need not run. Then each
        chunk is a packet, and goes when it is whole. The thread that feeds calls it.
    :param ready: is called under the connection's lock when there may be something to take; must not block.
    """

    def __init__(
        self, link: Link, job: Job, args: Iterable[Any] | Callable[[], Any], *, chunksize: int = 1,
        ordered: bool = True, flat: bool = False, eager: bool = False, buffersize: int | None = None,
        largest: int | None = None, ready: Callable[[], object] | None = None, watchers: Sequence[Watcher] = (),
        recall: Callable[[int, list[Any]], bytes | None] | None = None,
    ) -> None:
        self.link, self.job = link, job
        self.recall, self._watchers = recall, watchers
        self.eager, self.buffersize = eager, buffersize
        self.results = Results(link.lock, ordered, buffersize is not None and not flat, not flat, ready, job.next)
        self.results.single = recall is not None
        if buffersize is not None and not flat:  # a chunk has room in the window
            chunksize = min(chunksize, buffersize)
        self._feeder = Feeder(self, args, chunksize, largest, packets=not flat)
        job.sink = self.results

    def start(self, inline: bool = False) -> None:
        """Begin to iterate, dump and send. `inline`: the calling thread takes all results now.

        Raises why nothing can be sent: the connection, or the job, may have ended since the job was taken.
        """
        with self.link.lock:
            self.link.check_usable()
            if self.job.number not in self.link.jobs:
                raise fresh(self.results.error or InterruptedError("the job was cancelled"))
        self._feeder.start(inline)

    def fail(self, error: BaseException) -> None:
        """The call has failed: `take` raises the error. Any thread."""
        with self.link.lock:
            self.results.fail(error)

    def close(self, key: Any, error: BaseException | None) -> None:
        """The call is over: its job is kept under `key` for the next one, or ended where an error ended the call.

        With an error, nothing more is fed or taken, and the feeder is joined, half a second at most. Any thread.
        """
        with self.link.lock:
            self.job.spent = self.job.spent or error is not None
            self.link.keep(key, self.job)
        self.link.push()
        if error is not None:
            self.fail(error)
            self._feeder.join()
        for watcher in self._watchers:
            watcher.close()

    def lift_window(self) -> None:
        """Let everything out: nobody will take before all is done."""
        self.buffersize = UNKNOWN_LENGTH

    def take(self, timeout: float | None = None) -> Taken | None:
        """The next values: the index of the first, and an exception for each that has none. None behind the last.

        Blocks up to `timeout` seconds, then NotYet. Raises what the call as a whole failed with. One thread at a time.
        """
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        feeder, results = self._feeder, self.results
        while True:
            fed = feeder.inline and not feeder.ended and feeder.step()
            with self.link.lock:
                found = results.take()
                if found is None and not fed and not results.over:
                    left = threading.TIMEOUT_MAX if feeder.ended else PAUSE_SECONDS
                    results.changed.wait(max(0.0, min(left, deadline - time.monotonic())))
                    found = results.take()
            if found is not None:
                taken = self.job.open(found)
                for watcher in self._watchers:
                    watcher.taken(*taken)
                return taken
            if results.over:
                return None
            feeder.nudge()
            if time.monotonic() >= deadline and not fed:
                raise NotYet
