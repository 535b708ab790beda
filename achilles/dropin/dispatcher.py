"""The dispatcher of a pool: the calls that are not over, and the thread that takes what nobody else takes.

Knows calls and their answers; what a result is to the caller is `async_results.py`'s and `executor.py`'s.

::

    reader thread: drain, answer ─▶ Dispatcher.work ─▶ dispatcher thread: take, load ─▶ callbacks

Threads: the dispatcher, one a pool, takes results and runs callbacks, one at a time. It refers to no Pool but those of
open calls, so that a dropped pool is collected.
Locks: that of the connection guards `open`; `_taking` of a Taker is held by the thread that takes.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ..controller.call import Call, NotYet
from ..controller.connection import Controller
from ..controller.job import Job
from ..controller.results import Sink
from ..controller.run import Run
from ..objects.outcomes import fresh, mark, own_error
from ..protocol.frames import Letter

__all__ = ["Answer", "Dispatcher", "Singles", "Taker", "open_answer"]

Answer = tuple[Job | None, int, Any]  # job, status and letter; or None, 0 and why there is none


class Dispatcher:
    """The calls of a pool that are not over, and the thread that takes the results that nobody else takes."""

    def __init__(self, link: Controller) -> None:
        self.link = link
        self.work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()  # to be called; None ends it
        self.changed = threading.Condition(link.lock)  # its lock guards `open`
        # Singles with entries, by the key of their job, and Takers, by themselves. The pool of each lives until then.
        self.open: dict[Any, tuple[Any, object]] = {}
        self._thread = threading.Thread(target=self._run, name="achilles-dispatcher", daemon=True)
        self._thread.start()

    def forget(self, key: object) -> bool:
        """A call is over: its results are there, or `work` has what brings them. Return whether that is news.

        Needs the connection's lock.
        """
        self.changed.notify_all()
        return self.open.pop(key, None) is not None

    def wait_for(self, wait: Callable[[float], object], timeout: float | None = None) -> bool:
        """Call `wait` with some seconds until it returns something true; False after `timeout` seconds.

        Raises NoNodesError if there is no node for too long, and ServerUnreachable in a child of the caller.
        """
        if self.link.forked:  # nothing will ever come
            self.link.check_usable()
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while not wait(max(0.0, min(self.link.look_seconds, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                return False
            self.link.look()
        return True

    def wait(self) -> None:
        """Block until all calls are over. Iterators keep the results that they have not given yet."""
        self.drain()
        with self.link.lock:
            self.wait_for(partial(self.changed.wait_for, lambda: not self.open))

    def drain(self) -> None:
        """Let the thread take what is left of all calls: nobody else may ever do it."""
        for call, _ in [*self.open.values()]:
            call.drain()

    def stop(self) -> None:
        """Close the connection when all of `work` is done; idempotent. Joins the thread."""
        self.drain()
        self.work.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while (call := self.work.get()) is not None:
            self.do(call)
        self.link.close()
        while not self.work.empty():  # a call that began meanwhile has failed
            self.do(self.work.get() or bool)

    def do(self, call: Callable[..., object], *args: Any) -> None:
        """Call it. What a callback raises is told, and the next one is called all the same."""
        try:
            call(*args)
        except BaseException:
            threading.excepthook(threading.ExceptHookArgs([*sys.exc_info(), threading.current_thread()]))


def open_answer(job: Job | None, status: int, found: Any) -> tuple[Any, BaseException | None]:
    """Load an answer: the value, or the exception. Not under the connection's lock: that may run the user's code."""
    if job is None:
        return None, own_error(found)
    try:
        values, errors = job.load(status, found)
        return values[0], own_error(errors.get(0))
    except BaseException as error:  # of the call, or of loading what it returned
        return None, own_error(error)


class Singles(Sink):
    """The entries of a job in which each chunk is a call of its own (apply, submit): an AsyncResult or a Future.

    :param key: under which the job is kept when there is no entry any more.
    """

    def __init__(self, dispatcher: Dispatcher, job: Job, key: Any) -> None:
        self.job, self.key = job, key
        job.sink = self
        self.entries: dict[int, Any] = {}  # by chunk
        self._dispatcher = dispatcher

    def enter(self, single: Any, letter: Letter) -> None:
        """Put a call into the job. It is waited for when this returns, and not before: Ctrl-C may come anywhere."""
        single.singles, single.number = self, self.job.next
        self.job.enter(Run(single.number, 0, 1, [letter], 1))
        self.entries[single.number] = single

    def wants(self, number: int) -> bool:
        """As Sink says."""
        return number in self.entries

    def put(self, run: Run) -> None:
        """As Sink says."""
        # A chunk that is lost comes by itself. It has one argument.
        answers: Any = [(self.job, run.status, letter) for letter in run.answers] or [
            (None, 0, mark(run.lost[0], index=0))]
        for number, answer in enumerate(answers, run.first):
            if number in self.entries:
                self.entries.pop(number).answer(answer)
        self._look()

    def leave(self, number: int) -> None:
        """Nobody waits for this chunk any more."""
        del self.entries[number]
        self._look()

    def fail(self, error: BaseException) -> None:
        """As Sink says; each entry has an exception of its own."""
        for number in [*self.entries]:
            self.entries.pop(number).answer((None, 0, fresh(error)))
        self._look()

    def _look(self) -> None:
        """Without an entry the pool may go, and end the dispatcher: it has what it needs for each answer by now."""
        if not self.entries and self._dispatcher.forget(self.key):
            self._dispatcher.link.keep(self.key, self.job)

    def drain(self) -> None:
        """The entries' answers come by themselves."""

    def cancel(self, _: BaseException) -> None:
        """Cancel the futures that were not sent yet. Without the lock."""
        for single in [*self.entries.values()]:
            single.cancel()


class Taker:
    """Takes the results of one mapping call, and watches what it takes."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.call: Call | None = None  # from its beginning until it is over
        self.key: Any = None  # under which its job is kept for the next call
        self.failure: BaseException | None = None  # of the call as a whole
        self._dispatcher = dispatcher
        # Guards `call`, and is held while results are taken. A generator that reads its own results in a worker, where
        # the thread that takes feeds as well, has an error of its own and does not wait for itself.
        self._taking = threading.RLock()

    def drain(self) -> None:
        """Let the dispatcher take what is there, and all that comes. Takes no lock: `__del__` of iterators calls it."""
        if (call := self.call) is not None:
            call.results.ready = self.drain
            self._dispatcher.work.put(self._dispatch)

    def _dispatch(self) -> None:
        while self.call is not None and self.take(0.0):
            pass

    def take(self, timeout: float) -> bool:
        """Take some results; False if there are none after `timeout` seconds. The call may be over then."""
        with self._taking:
            call = self.call
            if call is None:
                return True
            try:
                call.take(timeout)
                if not call.results.over:
                    return True
            except NotYet:
                return False
            except BaseException as error:  # of the iterable, or of the call as a whole
                self.failure = error
            self.call = None
            try:
                call.close(self.key, self.failure)
            finally:  # however it ended, `join` waits for this call no longer
                with self._dispatcher.link.lock:
                    self._dispatcher.forget(self)
            return True

    def take_all(self) -> None:
        """Take everything. Raises NoNodesError."""
        while self.call is not None:
            self._dispatcher.wait_for(self.take)

    def cancel(self, error: BaseException) -> None:
        """End the call with this error, unless it is over."""
        if (call := self.call) is not None:
            with self._dispatcher.link.lock:
                call.results.fail(error)
            self.take_all()

    def answer(self, answer: Answer) -> None:
        """The call cannot begin."""
        self.failure = answer[-1]
        self.close()

    def taken(self, start: int, values: list[Any], errors: dict[int, BaseException]) -> None:
        """As Watcher says. Needs `_taking`. Subclasses keep the results."""

    def close(self) -> None:
        """As Watcher says: there are no more. Subclasses tell."""
