"""What a pool's methods return: AsyncResult and PoolIterator, by the names that `multiprocessing.pool` gives them.

Knows what the dispatcher takes, and what the caller asks for; knows no arguments.

::

    dispatcher thread: take, load ─▶ callbacks ─▶ AsyncResult.get
    caller's thread: PoolIterator.next, Pool.map ─▶ take;  AsyncResult.get of one call ─▶ load

Any thread may use them.
"""

from __future__ import annotations

import functools
import multiprocessing
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from ..objects.outcomes import own_error
from .dispatcher import Answer, Dispatcher, Taker, open_answer

__all__ = ["AsyncResult", "Callback", "MapResult", "PoolIterator", "ResultTimeout"]

MOMENT_SECONDS = 0.001  # between two looks of a thread at a result that another thread is loading

Callback = Callable[[Any], object]


class ResultTimeout(multiprocessing.TimeoutError, TimeoutError):
    """There was no result within the timeout of `get` or `next`."""


def _timeout() -> ResultTimeout:
    """A ResultTimeout that is the TimeoutError of `multiprocess` too, where that is loaded."""
    return _timeout_class(getattr(sys.modules.get("multiprocess"), "TimeoutError", TimeoutError))()


@functools.cache
def _timeout_class(theirs: type[Exception]) -> type[ResultTimeout]:
    return type("ResultTimeout", (ResultTimeout, theirs), {"__module__": __name__})


class AsyncResult:
    """The result of an `_async` method; any thread may use it. As `multiprocessing.pool.AsyncResult`."""

    _ended = _settled = False  # the answer is there; the answer is loaded

    def __init__(
        self, dispatcher: Dispatcher, callback: Callback | None = None, error_callback: Callback | None = None
    ) -> None:
        self._dispatcher = dispatcher
        self._callbacks = callback, error_callback
        self._ending = threading.Lock()  # held until the call has ended; Ctrl-C in `wait` may leave it held
        self._ending.acquire()

    def ready(self) -> bool:
        """Whether the call has ended."""
        return self._ended

    def successful(self) -> bool:
        """Whether it ended without an exception; ValueError if it has not ended."""
        if not self._ended:
            raise ValueError(f"{self!r} not ready")
        self._load_answer()
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
        """The result. Blocks until it is there; ResultTimeout after `timeout` seconds, or the call's own exception."""
        self.wait(timeout)
        if not self._ended:
            raise _timeout()
        self._load_answer()
        if self._error is not None:
            raise self._error
        return self._value

    def _load_answer(self) -> None:
        """Load the answer, in the first thread that asks for it. Others wait for that thread."""
        if not self._settled and (answer := self.__dict__.pop("_answer", None)) is not None:
            self.settle(*open_answer(*answer))
        while not self._settled:
            threading.Event().wait(MOMENT_SECONDS)

    def keep(self, answer: Answer) -> bool:
        """The answer is here. Return whether it is kept: without callbacks, the thread that asks for it loads it."""
        if not any(self._callbacks):
            self._answer, self._ended = answer, True
            self._ending.release()
        return self._ended

    def settle(self, value: Any, error: BaseException | None) -> None:
        """This is the result, or the exception. Callbacks run before any thread is woken, as in the standard library.
        """
        callback = self._callbacks[error is not None]
        if callback is not None:
            self._dispatcher.do(callback, value if error is None else error)
        self._value, self._error, self._settled = value, error, True
        if not self._ended:
            self._ended = True
            self._ending.release()

    __class_getitem__: Any = classmethod(types.GenericAlias)


class MapResult(Taker, AsyncResult):
    """The list of results of a mapping method."""

    def __init__(self, dispatcher: Dispatcher, *callbacks: Callback | None) -> None:
        AsyncResult.__init__(self, dispatcher, *callbacks)
        Taker.__init__(self, dispatcher)
        self._parts: dict[int, list[Any]] = {}  # by their start
        self._first: tuple[float, BaseException | None] = float("inf"), None  # the error with the lowest index

    def add(self, start: int, values: list[Any], errors: dict[int, BaseException]) -> None:
        """As Taker says."""
        self._parts[start] = values
        if errors:
            self._first = min(self._first, (start + min(errors), errors[min(errors)]))

    def finish(self, error: BaseException | None) -> None:
        """As Taker says."""
        parts, self._parts = self._parts, {}
        values = [*chain.from_iterable(parts[start] for start in sorted(parts))]
        self.settle(values, own_error(error or self._first[1]))


class Stream(Taker):
    """The results of an imap, in the order in which they are to be returned."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__(dispatcher)
        self.values: deque[tuple[Any, BaseException | None]] = deque()  # taken, not returned yet

    def add(self, start: int, values: list[Any], errors: dict[int, BaseException]) -> None:
        """As Taker says."""
        self.values.extend(zip(values, map(errors.get, range(len(values)))))

    def look(self, timeout: float) -> object:
        """As `take`; also true where the dispatcher, or another thread, has taken some results meanwhile."""
        return self.values or self.take(timeout)

    def finish(self, error: BaseException | None) -> None:
        """As Taker says; the error comes in its place."""
        if error is not None:
            self.values.append((None, error))


class PoolIterator(Iterator[Any]):
    """What imap and imap_unordered return: one result an argument. Dropping it leaves the work to be done."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._stream = Stream(dispatcher)

    def next(self, timeout: float | None = None) -> Any:
        """The next result, or its argument's exception; ResultTimeout after `timeout` seconds."""
        while True:
            over = self._stream.call is None  # before the look: another thread may take the last ones behind it
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

    def __next__(self) -> Any:
        return self.next()

    def cancel(self) -> None:
        """Stop the work: nothing follows, not even the results that were taken. Beyond the standard library."""
        self._stream.cancel(InterruptedError("the iterator was cancelled"))
        self._stream.values.clear()

    def __del__(self, nothing: Callable[..., deque[Any]] = deque) -> None:
        """Nobody wants the results, and the work is done all the same. Takes no lock: any thread, at any moment."""
        self._stream.values = nothing(maxlen=0)
        self._stream.drain()
