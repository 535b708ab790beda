"""The results that a pool's methods return: AsyncResult and PoolIterator, named as in `multiprocessing.pool`.

The module knows how results are taken and loaded. `base_pool.py` begins calls.

::

    dispatcher thread: take, load ─▶ callbacks ─▶ AsyncResult.get
    caller's thread: PoolIterator.next, Pool.map ─▶ take;  AsyncResult.get of one call ─▶ load

Any thread may use them. The thread that takes or loads holds `_taking`.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from ..controller.call import Call, NotYet, Watcher
from ..controller.job import Job, Taken
from ..objects.outcomes import own_error

if TYPE_CHECKING:
    from .base_pool import Dispatcher

__all__ = ["Answer", "AsyncResult", "Callback", "MapResult", "PoolIterator", "ResultTimeout", "Taker", "open_answer"]

Callback = Callable[[Any], object]
Answer = tuple[Job | None, int, Any]  # job, status and letter; or None, 0 and the error


class ResultTimeout(multiprocessing.TimeoutError, TimeoutError):
    """No result came within the timeout of `get` or `next`."""


def _timeout() -> ResultTimeout:
    """Return a ResultTimeout. If `multiprocess` is loaded, it is that package's TimeoutError, too."""
    return _timeout_class(getattr(sys.modules.get("multiprocess"), "TimeoutError", TimeoutError))()


@cache
def _timeout_class(theirs: type[Exception]) -> type[ResultTimeout]:
    return type("ResultTimeout", (ResultTimeout, theirs), {"__module__": __name__})


def open_answer(job: Job | None, status: int, found: Any) -> tuple[Any, BaseException | None]:
    """Load an answer: the value, or the exception. It may run the user's code: call it without the link's lock."""
    if job is None:
        return None, own_error(found)
    try:
        values, errors = job.load(status, found)
        return values[0], own_error(errors.get(0))
    except BaseException as error:
        return None, own_error(error)


class AsyncResult:
    """The result of an `_async` method; any thread may use it. As `multiprocessing.pool.AsyncResult`."""

    _ended = False  # the answer, or the loaded result, is there
    _answer: Answer | None = None  # not loaded yet

    def __init__(
        self, dispatcher: Dispatcher, callback: Callback | None = None, error_callback: Callback | None = None
    ) -> None:
        self._dispatcher = dispatcher
        self._callbacks = callback, error_callback
        self._ending = threading.Lock()  # held until the call has ended; Ctrl-C in `wait` may leave it held
        self._ending.acquire()
        self._taking = threading.RLock()  # held by the thread that loads the answer

    def ready(self) -> bool:
        """Whether the call has ended."""
        return self._ended

    def successful(self) -> bool:
        """Whether the call ended without an exception; ValueError if it has not ended."""
        if not self._ended:
            raise ValueError(f"{self!r} not ready")
        self._load()
        return self._error is None

    def wait(self, timeout: float | None = None) -> None:
        """Block until the call has ended, or for `timeout` seconds."""
        if not self._ended:
            self._dispatcher.wait_for(self._wait_some, timeout)

    def _wait_some(self, seconds: float) -> bool:
        if self._ending.acquire(timeout=seconds):
            self._ending.release()
        return self._ended

    def get(self, timeout: float | None = None) -> Any:
        """Return the result, or raise the call's exception. Blocks; ResultTimeout after `timeout` seconds."""
        self.wait(timeout)
        if not self._ended:
            raise _timeout()
        self._load()
        if self._error is not None:
            raise self._error
        return self._value

    def answer(self, answer: Answer) -> None:
        """Take the answer. If there is a callback, the dispatcher loads it, else the first thread that asks."""
        self._answer = answer
        if any(self._callbacks):
            self._dispatcher.work.put(self._load)
        else:
            self._end()

    def _load(self) -> None:
        with self._taking:
            if self._answer is not None:
                self.settle(*open_answer(*self._answer))

    def settle(self, value: Any, error: BaseException | None) -> None:
        """Set the result or the exception. Callbacks run before any thread wakes, as in the standard library."""
        callback = self._callbacks[error is not None]
        if callback is not None:
            self._dispatcher.do(callback, value if error is None else error)
        self._value, self._error, self._answer = value, error, None
        self._end()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._ending.release()

    __class_getitem__: Any = classmethod(types.GenericAlias)


class Taker(Watcher):
    """Takes the results of a mapping call. Subclasses keep these results, under `_taking`."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.call: Call | None = None  # until its end
        self.key: Any = None  # of the call's job, for the next call
        self.failure: BaseException | None = None  # of the call as a whole
        self.values: deque[Any] = deque()  # taken, not returned yet
        self._dispatcher = dispatcher
        # Guards `call`. The thread that takes results holds it. In a worker that thread also reads the arguments: a
        # generator that reads its own results then gets an error, and does not wait for itself.
        self._taking = threading.RLock()

    def drain(self) -> None:
        """Let the dispatcher take all results, now and later. Takes no lock: `__del__` of iterators calls it.

        The thread that takes may call it, as a progress function or a signal handler that ends the pool. That thread
        goes on to take, and must not wait for a dispatcher that waits for `_taking`.
        """
        if (call := self.call) is not None and not self._taking._is_owned():  # type: ignore[attr-defined]
            call.results.ready = self.drain
            self._dispatcher.work.put(self.take_all)

    def take(self, timeout: float) -> bool:
        """Take some results, or end the call; False if none came after `timeout` seconds."""
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
            with self._dispatcher.link.lock:
                self._dispatcher.forget(self)
            self.call = None  # behind `forget`: where Ctrl-C comes in between, the end is taken again
            call.close(self.key, self.failure)
            return True

    def take_all(self, timeout: float | None = 0.0) -> None:
        """Take results until the call is over, or none comes within `timeout` seconds. Raises NoNodesError if None."""
        while self.call is not None and self._dispatcher.wait_for(self.take, timeout):
            pass

    def cancel(self, error: BaseException) -> None:
        """End the call with this error, unless it is over."""
        if (call := self.call) is not None:
            with self._dispatcher.link.lock:
                call.results.fail(error)
            self.take_all(None)

    def answer(self, answer: Answer) -> None:
        """The call cannot begin."""
        self.failure = answer[-1]
        self.close()


class MapResult(AsyncResult, Taker):
    """The list of results of a mapping method."""

    def __init__(self, dispatcher: Dispatcher, *callbacks: Callback | None) -> None:
        Taker.__init__(self, dispatcher)
        AsyncResult.__init__(self, dispatcher, *callbacks)

    def taken(self, *taken: Any) -> None:
        """As Watcher says."""
        self.values.append(taken)

    def close(self) -> None:
        """As Watcher says. The error with the lowest index is the result."""
        taken: list[Taken] = sorted(self.values, key=itemgetter(0))
        self.values.clear()
        errors = (errors[min(errors)] for _, _, errors in taken if errors)
        self.settle([*chain.from_iterable(values for _, values, _ in taken)],
                    own_error(self.failure or next(errors, None)))


class Stream(Taker):
    """The results of an imap, in the order in which `next` returns them: pairs of a value and an error or None."""

    def taken(self, start: int, values: list[Any], errors: dict[int, BaseException]) -> None:
        """As Watcher says."""
        self.values.extend(zip(values, map(errors.get, range(len(values)))))

    def look(self, timeout: float) -> object:
        """As `take`; also true if another thread has taken results meanwhile."""
        return self.values or self.take(timeout)

    def close(self) -> None:
        """As Watcher says. The failure follows the results that were taken."""
        if self.failure is not None:
            self.values.append((None, self.failure))


class PoolIterator(Iterator[Any]):
    """The iterator of imap and imap_unordered. If it is dropped, the work is still done."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._stream = Stream(dispatcher)

    def next(self, timeout: float | None = None) -> Any:
        """Return the next result, or raise its argument's exception; ResultTimeout after `timeout` seconds."""
        while True:
            over = self._stream.call is None  # read before `values`: other threads take results
            try:
                value, error = self._stream.values.popleft()
                break
            except IndexError:
                if over:
                    raise StopIteration from None
            if not self._dispatcher.wait_for(self._stream.look, timeout):
                raise _timeout()
        if error is not None:
            raise own_error(error)
        return value

    __next__ = next

    def cancel(self) -> None:
        """Stop the work, and drop the results. Not in the standard library."""
        self._stream.cancel(InterruptedError("the iterator was cancelled"))
        self._stream.values.clear()

    def __del__(self, nothing: Callable[..., deque[Any]] = deque) -> None:
        """Drop the results. The dispatcher takes them, so the work is done. Takes no lock: any thread runs it."""
        self._stream.values = nothing(maxlen=0)
        self._stream.drain()
