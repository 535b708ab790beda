"""The dispatcher of a pool: the calls that are not over, and the thread that takes what nobody else takes.

Knows calls and their answers; what a result is to the caller is `async_results.py`'s and `executor.py`'s.

::

    reader thread: ready_to_take, put ─▶ Dispatcher.work ─▶ dispatcher thread: take, load ─▶ callbacks

Threads: the dispatcher, one a pool, takes results and runs callbacks, one at a time. It begins with the first call that
needs it, and refers to no Pool, so that a dropped pool is collected.
Locks: that of the connection guards `open`; `_taking` of a Taker is held by the thread that takes.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from _thread import start_new_thread
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

__all__ = ["Dispatcher", "SingleCall", "Singles", "Taker"]

Answer = tuple[Any, int, Any, BaseException | None]  # job, status and letter, or why there is none


class Dispatcher:
    """The calls of a pool that are not over, and the thread that takes the results that nobody else takes."""

    def __init__(self, link: Controller) -> None:
        self.link = link
        self.work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()  # to be called; None ends it
        self.changed = threading.Condition(link.lock)  # its lock guards `open`, and the start of the thread
        self.open: set[object] = set()  # Singles that have entries, and Takers
        self._thread = threading.Thread(target=self._run, name="achilles-dispatcher", daemon=True)

    def check_process(self) -> None:
        """ServerUnreachable in a child of the caller, where nothing will ever come."""
        if self.link.forked:
            self.link.check_usable()

    def start(self) -> None:
        """Begin the thread, if it has not begun."""
        if self._thread.ident is None:
            with self.link.lock:
                if self._thread.ident is None:
                    self._thread.start()

    def forget(self, call: object) -> None:
        """Calls are over: their results are there, or `work` has what brings them. Needs the connection's lock."""
        self.open.discard(call)
        self.changed.notify_all()

    def wait_for(self, wait: Callable[[float], object], timeout: float | None = None) -> bool:
        """Call `wait` with some seconds until it returns something true; False after `timeout` seconds.

        Raises NoNodesError if there is no node for too long, and ServerUnreachable in a child of the caller.
        """
        self.check_process()
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while not wait(max(0.0, min(self.link.look_seconds, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                return False
            self.link.look()
        return True

    def wait(self) -> None:
        """Block until all calls are over. Iterators keep the results that they have not given yet."""
        with self.link.lock:
            takers = [call for call in self.open if isinstance(call, Taker)]
        for taker in takers:
            taker.drain()
        with self.link.lock:
            self.wait_for(partial(self.changed.wait_for, lambda: not self.open))

    def stop(self) -> None:
        """Close the connection when all of `work` is done; idempotent. Joins the thread."""
        self.end()
        self.start()
        if self._thread.ident != threading.get_ident():
            self._thread.join()

    def end(self, start_thread: Callable[..., object] = start_new_thread) -> None:
        """The same, without blocking. Takes no lock: `__del__` calls it, in any thread at any moment."""
        self.work.put(None)
        if self._thread.ident is None:
            try:
                start_thread(self.start, ())
            except RuntimeError:  # the interpreter ends
                pass

    def _run(self) -> None:
        while (call := self.work.get()) is not None:
            self.do(call)
        self.link.close()
        while not self.work.empty():  # a call that began meanwhile has failed
            self.do(self.work.get() or bool)

    def settle(self, answered: list[tuple[SingleCall, Answer]]) -> None:
        """Give each call its answer. The dispatcher loads those that nobody else does."""
        later = [(single, answer) for single, answer in answered if not single.keep(answer)]
        if later:
            self.work.put(partial(self._load, later))

    def _load(self, answered: list[tuple[SingleCall, Answer]]) -> None:
        for single, answer in answered:
            self.do(single.load, *answer)

    def do(self, call: Callable[..., object], *args: Any) -> None:
        """Call it. What a callback raises is told, and the next one is called all the same."""
        try:
            call(*args)
        except BaseException:
            threading.excepthook(threading.ExceptHookArgs([*sys.exc_info(), threading.current_thread()]))


class SingleCall:
    """One apply or submit: an entry of Singles, under the number of its chunk."""

    singles: Singles | None = None  # None where the call was never sent
    number = 0

    def keep(self, answer: Answer) -> bool:
        """Whether the call keeps its answer, which the thread that asks loads. Must not block."""
        return False

    def load(self, job: Job | None, status: int, letter: Letter | None, error: BaseException | None) -> None:
        """Load an answer, and settle. Not under the connection's lock: that may run the user's code."""
        value = None
        if error is None:
            try:
                values, errors = job.load(status, letter)  # type: ignore[union-attr, arg-type]
                value, error = values[0], errors.get(0)
            except BaseException as e:  # of the call, or of loading what it returned
                error = e
        self.settle(value, own_error(error))

    def settle(self, value: Any, error: BaseException | None) -> None:
        """This is the result, or the exception. Subclasses take it."""


class Singles(Sink):
    """The entries of a job in which each chunk is a call of its own (apply, submit).

    :param idle: is called once, when there is no entry any more. It holds the pool, which lives until then.
    """

    def __init__(self, dispatcher: Dispatcher, job: Job, idle: Callable[[Singles], object]) -> None:
        self.job = job
        self.entries: dict[int, Any] = {}  # by chunk
        self._dispatcher = dispatcher
        self._idle: Callable[[Singles], object] | None = idle

    def enter(self, single: SingleCall, letter: Letter) -> None:
        """Put a call into the job. It is waited for when this returns, and not before: Ctrl-C may come anywhere."""
        single.singles, single.number = self, self.job.next
        self.job.enter(Run(single.number, 0, 1, [letter], 1))
        self.entries[single.number] = single
        self._dispatcher.open.add(self)

    def wants(self, number: int) -> bool:
        """As Sink says."""
        return number in self.entries

    def put(self, run: Run) -> None:
        """As Sink says."""
        error = mark(run.lost[0], index=0) if run.lost else None  # of a chunk by itself, which has one argument
        self._end([(self.entries.pop(number), (self.job, run.status, letter, error))
                   for number, letter in enumerate(run.answers or [None], run.first) if number in self.entries])

    def leave(self, number: int) -> None:
        """Nobody waits for this chunk any more."""
        del self.entries[number]
        self._end([])

    def fail(self, error: BaseException) -> None:
        """As Sink says; each entry has an exception of its own."""
        entries, self.entries = self.entries, {}
        self._end([(entry, (None, 0, None, fresh(error))) for entry in entries.values()])

    def _end(self, answered: list[tuple[SingleCall, Answer]]) -> None:
        self._dispatcher.settle(answered)  # before the pool may go, which ends the dispatcher
        if not self.entries and (idle := self._idle) is not None:
            self._idle = None
            self._dispatcher.forget(self)
            idle(self)


class Taker:
    """Takes the results of one mapping call."""

    def __init__(self, dispatcher: Dispatcher, owner: object) -> None:
        self.call: Call | None = None  # from its beginning until it is over
        self.key: Any = None  # under which its job is kept for the next call
        self._dispatcher = dispatcher
        self._owner: object = owner  # the pool, which lives as long as its calls
        # Guards `call`, and is held while results are taken. A generator that reads its own results in a worker, where
        # the thread that takes feeds as well, has an error of its own and does not wait for itself.
        self._taking = threading.RLock()
        self._called = False  # the dispatcher knows that there is something

    def ready_to_take(self) -> None:
        """Call.ready: let the dispatcher take."""
        if not self._called:
            self._called = True
            self._dispatcher.work.put(self._dispatch)

    def _dispatch(self) -> None:
        self._called = False
        while self.call is not None and self.take(0.0):
            pass

    def take(self, timeout: float) -> bool:
        """Take some results; False if there are none after `timeout` seconds. The call may be over then."""
        with self._taking:
            call = self.call
            if call is None:
                return True
            taken = error = None
            try:
                taken = call.take(timeout)
            except NotYet:
                return False
            except BaseException as e:  # of the iterable, or of the call as a whole
                error = e
            if taken is not None:
                self.add(*taken)
                if not call.results.over:
                    return True
            self.call = self._owner = None
            try:
                call.close(self.key, error)
                self.finish(error)
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

    def drain(self) -> None:
        """Block until the call is over, if nobody else would take its results."""

    def add(self, start: int, values: list[Any], errors: dict[int, BaseException]) -> None:
        """Results from `start` on. Needs `_taking`. Subclasses keep them."""

    def finish(self, error: BaseException | None) -> None:
        """There are no more. Subclasses tell."""
