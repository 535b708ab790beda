"""Results that wait to be taken: AsyncResult, PoolIterator, and the dispatcher that takes for them.

Knows jobs and their results, and what `multiprocessing.pool` calls these classes; knows no arguments.

::

    reader thread: Job.ready ─▶ Dispatcher.work ─▶ dispatcher thread: Job.take ─▶ callbacks ─▶ AsyncResult.get
    caller's thread: PoolIterator.next, Pool.map ─▶ Job.take

Threads: the dispatcher, one a pool, takes what nobody waits for, and runs the callbacks, one at a time.
`_taking` of a Taker is held by whoever takes from its job; `_changed` of a Dispatcher guards its state and
its takers. The dispatcher thread refers to no Pool, so that a pool that is dropped is collected.
"""

from __future__ import annotations

import builtins
import multiprocessing
import os
import queue
import sys
import threading
import time
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

from ..calls import Lookout
from ..controller.connection import Controller
from ..controller.job import Job
from ..controller.results import NotYet
from ..errors import ServerUnreachable
from ..objects.outcomes import own_error

__all__ = ["AsyncResult", "Dispatcher", "PoolIterator", "ResultTimeout", "Taker"]

FORKED = "this pool belongs to the parent process; open one after the fork"

Callback = Callable[[Any], object]


class ResultTimeout(multiprocessing.TimeoutError, builtins.TimeoutError):
    """There was no result within the timeout of `get` or `next`."""


class Dispatcher:
    """The thread of a pool that takes what nobody waits for, and the list of those whose jobs are not over."""

    def __init__(self, controller: Controller, lookout: Lookout) -> None:
        self.controller = controller
        self.lookout = lookout
        self.pid = os.getpid()
        self.work: queue.SimpleQueue[Any] = queue.SimpleQueue()  # whose `dispatch` is to be called; None ends it
        self.takers: weakref.WeakSet[Taker] = weakref.WeakSet()
        self.kept: set[Taker] = set()  # of them, those that get their results even if the caller drops them
        self.changed = threading.Condition(threading.Lock())  # guards both
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="achilles-dispatcher", daemon=True)
        self._thread.start()

    def forked(self, getpid: Callable[[], int] = os.getpid) -> bool:
        """Whether this is a child of the caller: its threads and its connection are the parent's. Takes no lock."""
        return getpid() != self.pid

    def check_process(self) -> None:
        """ServerUnreachable in a child of the caller, where nothing will ever come."""
        if self.forked():
            raise ServerUnreachable(FORKED)

    def add(self, taker: Taker, keep: bool) -> None:
        """A job begins."""
        with self.changed:
            self.takers.add(taker)
            if keep:
                self.kept.add(taker)

    def forget(self, taker: Taker) -> None:
        """Its job is over."""
        with self.changed:
            self.takers.discard(taker)
            self.kept.discard(taker)
            self.changed.notify_all()
        if self._ending:
            self.stop_when_idle()

    def fail(self, error: BaseException) -> None:
        """End all jobs."""
        with self.changed:
            takers = {*self.takers, *self.kept}
        for taker in takers:
            if (job := taker.job) is not None:
                job.fail(error)

    def wait(self) -> None:
        """Block until all that was asked is done; what iterators have not yielded yet, they keep."""
        with self.changed:
            takers = [*self.takers]
        for taker in takers:
            if isinstance(taker, PoolIterator):
                taker.drain()
        with self.changed:
            while self.kept:
                self.changed.wait(self.lookout.seconds)
                self.lookout.look()

    def stop_when_idle(self) -> None:
        """Close the connection when the last job is over. Does not block."""
        with self.changed:
            self._ending = True
            idle = not self.takers and not self.kept
        if idle:
            self.work.put(None)

    def stop(self) -> None:
        """Close the connection when what was queued is taken; idempotent. Joins the thread, unless it is this one."""
        self.work.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (taker := self.work.get()) is not None:
            try:
                taker.dispatch()
            except BaseException:  # of a callback: the next one is called all the same
                threading.excepthook(threading.ExceptHookArgs([*sys.exc_info(), self._thread]))
            del taker
        self.controller.close()


class Taker:
    """Takes the results of one job. Base of all that a pool's methods return."""

    def __init__(self, dispatcher: Dispatcher, owner: object) -> None:
        self.job: Job | None = None  # from its beginning until it is over
        self._dispatcher = dispatcher
        self._owner: object = owner  # the pool, which lives as long as its jobs
        self._taking = threading.Lock()  # guards `job`, and is held while something is taken
        self._called = False  # the dispatcher knows that there is something

    def call(self) -> None:
        """Job.ready: let the dispatcher take."""
        if not self._called:
            self._called = True
            self._dispatcher.work.put(self)

    def dispatch(self) -> None:
        """The dispatcher: take what is there."""
        self._called = False
        try:
            while self._take(0.0):
                pass
        except NotYet:
            pass

    def _take(self, timeout: float | None) -> bool:
        """Take one unit, waiting up to `timeout` seconds, then NotYet. False when the job is over."""
        with self._taking:
            if self.job is None:
                return False
            try:
                taken = self.job.take(timeout)
            except NotYet:
                raise
            except BaseException as error:  # of the iterable, or of the job as a whole
                self._close(error)
                return False
            if taken is None:
                self._close(None)
                return False
            self._add(*taken)
            return True

    def _close(self, error: BaseException | None) -> None:
        """The job is over. Needs `_taking`."""
        job, self.job, self._owner = self.job, None, None
        try:
            if job is not None:
                self._dispatcher.controller.end(job, cancel=error is not None)
            self.finish(error)
        finally:
            self._dispatcher.forget(self)

    def _add(self, start: int, values: list[Any], errors: dict[int, BaseException]) -> None:
        """Results from `start` on. Needs `_taking`."""
        raise NotImplementedError

    def finish(self, error: BaseException | None) -> None:
        """There are no more."""
        raise NotImplementedError


class _Discarder(Taker):
    """Takes the place of an iterator that was dropped: the work is done, and its results are nobody's."""

    def _add(self, start: int, values: list[Any], errors: dict[int, BaseException]) -> None:
        pass

    def finish(self, error: BaseException | None) -> None:
        pass


class AsyncResult(Taker):
    """The result of an `_async` method; any thread may use it. As `multiprocessing.pool.AsyncResult`."""

    def __init__(
        self, dispatcher: Dispatcher, owner: object, single: bool, callback: Callback | None = None,
        error_callback: Callback | None = None,
    ) -> None:
        super().__init__(dispatcher, owner)
        self._single = single  # the result of one call, not a list
        self._callback = callback
        self._error_callback = error_callback
        self._parts: list[tuple[int, list[Any]]] = []  # by their start
        self._first: tuple[int, BaseException] | None = None  # the error with the lowest index
        self._done = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None

    def ready(self) -> bool:
        """Whether the call has ended."""
        return self._done.is_set()

    def successful(self) -> bool:
        """Whether it ended without an exception; ValueError if it has not ended."""
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return self._error is None

    def wait(self, timeout: float | None = None) -> None:
        """Block until the call has ended, or for `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self.ready():
            self._dispatcher.check_process()
        while not self._done.wait(_left(self._dispatcher.lookout.seconds, deadline)):
            if deadline is not None and time.monotonic() >= deadline:
                return
            self._dispatcher.lookout.look()

    def get(self, timeout: float | None = None) -> Any:
        """The result. Blocks until it is there; ResultTimeout after `timeout` seconds, or the call's own exception."""
        self.wait(timeout)
        if not self.ready():
            raise ResultTimeout
        if self._error is not None:
            raise self._error
        return self._value

    def take_all(self) -> Any:
        """What `get` returns, taken by this thread; where it is interrupted, the dispatcher goes on."""
        try:
            while True:
                try:
                    while self._take(self._dispatcher.lookout.seconds):
                        pass
                    return self.get()
                except NotYet:
                    self._dispatcher.lookout.look()
        except BaseException:
            if (job := self.job) is not None:
                job.ready = self.call
                self.call()
            raise

    def _add(self, start: int, values: list[Any], errors: dict[int, BaseException]) -> None:
        self._parts.append((start, values))
        for place, error in errors.items():
            if self._first is None or start + place < self._first[0]:
                self._first = start + place, error

    def finish(self, error: BaseException | None) -> None:
        """The callbacks run before anybody is woken, as in the standard library."""
        if error is None and self._first is not None:
            error = self._first[1]
        if error is None:
            values: list[Any] = []
            for _, part in sorted(self._parts, key=itemgetter(0)):
                values += part
            self._value = values[0] if self._single else values
        else:
            self._error = own_error(error)
        callback, argument = self._callback, self._value
        if self._error is not None:
            callback, argument = self._error_callback, self._error
        self._callback = self._error_callback = self._first = None
        self._parts = []
        try:
            if callback is not None:
                callback(argument)
        finally:
            self._done.set()

    def __class_getitem__(cls, item: Any) -> Any:
        return types.GenericAlias(cls, item)


class PoolIterator(Taker, Iterator[Any]):
    """What imap and imap_unordered return: one result an argument. Dropping it leaves the work to be done."""

    def __init__(self, dispatcher: Dispatcher, owner: object) -> None:
        super().__init__(dispatcher, owner)
        self._values: deque[tuple[Any, BaseException | None]] = deque()  # taken, not returned yet

    def __iter__(self) -> PoolIterator:
        return self

    def __next__(self) -> Any:
        return self.next()

    def next(self, timeout: float | None = None) -> Any:
        """The next result, or its argument's exception; ResultTimeout after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                value, error = self._values.popleft()
                break
            except IndexError:
                if not self._wait(deadline):
                    raise StopIteration from None
        if error is not None:
            raise error
        return value

    def _wait(self, deadline: float | None) -> bool:
        """Whether there is, or may be, another value."""
        self._dispatcher.check_process()
        try:
            return self._take(_left(self._dispatcher.lookout.seconds, deadline)) or bool(self._values)
        except NotYet:
            if deadline is not None and time.monotonic() >= deadline:
                raise ResultTimeout from None
        self._dispatcher.lookout.look()
        return True

    def _add(self, start: int, values: list[Any], errors: dict[int, BaseException]) -> None:
        self._values.extend((value, own_error(errors.get(place))) for place, value in enumerate(values))

    def finish(self, error: BaseException | None) -> None:
        """Nothing follows; the error comes in its place."""
        if error is not None:
            self._values.append((None, own_error(error)))

    def drain(self) -> None:
        """Wait for all results, to be returned later."""
        if (job := self.job) is not None:
            job.lift_window()
        while self.job is not None:
            try:
                self._take(self._dispatcher.lookout.seconds)
            except NotYet:
                self._dispatcher.lookout.look()

    def cancel(self) -> None:
        """Stop the work: nothing follows what was taken. Beyond the standard library."""
        if (job := self.job) is not None:
            job.fail(InterruptedError("the iterator was cancelled"))
            self.drain()
            self._values.clear()

    def __del__(self) -> None:
        job, dispatcher = getattr(self, "job", None), self._dispatcher
        if job is not None and not dispatcher.forked():
            heir = _Discarder(dispatcher, self._owner)  # takes no lock: this runs in any thread at any moment
            heir.job, job.ready = job, heir.call
            dispatcher.kept.add(heir)
            heir.call()


def _left(most: float, deadline: float | None) -> float:
    """Seconds to wait: up to `most`, and no longer than to the deadline."""
    return most if deadline is None else max(0.0, min(most, deadline - time.monotonic()))
