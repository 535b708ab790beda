"""What a pool's methods return: AsyncResult and PoolIterator, by the names that `multiprocessing.pool` gives them.

Knows what the dispatcher takes, and what the caller asks for; knows no arguments.

::

    dispatcher thread: take, load ─▶ callbacks ─▶ AsyncResult.get
    caller's thread: PoolIterator.next, Pool.map ─▶ take;  AsyncResult.get of one call ─▶ load

Any thread may use them.
"""

from __future__ import annotations

import builtins
import functools
import multiprocessing
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from operator import itemgetter
from typing import Any

from ..objects.outcomes import own_error
from .dispatcher import Answer, Dispatcher, SingleCall, Taker

__all__ = ["AsyncResult", "MapResult", "PoolIterator", "ResultTimeout"]

MOMENT_SECONDS = 0.001  # between two looks of a thread at a result that another thread is loading

Callback = Callable[[Any], object]


class ResultTimeout(multiprocessing.TimeoutError, builtins.TimeoutError):
    """There was no result within the timeout of `get` or `next`."""


def _timeout() -> ResultTimeout:
    """A ResultTimeout that is the TimeoutError of `multiprocess` too, where that is loaded."""
    theirs = getattr(sys.modules.get("multiprocess"), "TimeoutError", None)
    return ResultTimeout() if theirs is None else _timeout_class(theirs)()


@functools.cache
def _timeout_class(theirs: type[Exception]) -> type[ResultTimeout]:
    return type("ResultTimeout", (ResultTimeout, theirs), {"__module__": __name__})


class AsyncResult(SingleCall):
    """The result of an `_async` method; any thread may use it. As `multiprocessing.pool.AsyncResult`."""

    _callbacks: tuple[Callback | None, ...] | None = None  # of a value, of an error
    _ended = _settled = False  # the answer is there; it is loaded
    _answer: Answer | None = None  # not loaded yet, where no callback waits for that
    _value: Any = None
    _error: BaseException | None = None

    def __init__(self, dispatcher: Dispatcher, *callbacks: Callback | None) -> None:
        self._dispatcher = dispatcher
        if any(callbacks):
            self._callbacks = callbacks
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
        if not self._ended:
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
            self.load(*answer)
        while not self._settled:
            threading.Event().wait(MOMENT_SECONDS)

    def keep(self, answer: Answer) -> bool:
        """As SingleCall says: where there are no callbacks."""
        if self._callbacks is None:
            self._answer, self._ended = answer, True
            self._ending.release()
        return self._ended

    def settle(self, value: Any, error: BaseException | None) -> None:
        """As SingleCall says. The callbacks run before any thread is woken, as in the standard library."""
        self._value, self._error = value, error
        callbacks, self._callbacks = self._callbacks, None
        if callbacks and (callback := callbacks[error is not None]) is not None:
            self._dispatcher.do(callback, value if error is None else error)
        self._settled = True
        if not self._ended:
            self._ended = True
            self._ending.release()

    __class_getitem__: Any = classmethod(types.GenericAlias)


class MapResult(Taker, AsyncResult):
    """The list of results of a mapping method."""

    def __init__(self, dispatcher: Dispatcher, owner: object, *callbacks: Callback | None) -> None:
        AsyncResult.__init__(self, dispatcher, *callbacks)
        Taker.__init__(self, dispatcher, owner)
        self._parts: list[tuple[int, list[Any]]] = []  # by their start
        self._first: tuple[int, BaseException] | None = None  # the error with the lowest index

    def add(self, start: int, values: list[Any], errors: dict[int, BaseException]) -> None:
        """As Taker says."""
        self._parts.append((start, values))
        for offset, error in errors.items():
            if self._first is None or start + offset < self._first[0]:
                self._first = start + offset, error

    def finish(self, error: BaseException | None) -> None:
        """As Taker says."""
        parts, first = sorted(self._parts, key=itemgetter(0)), self._first
        self._parts, self._first = [], None
        if error is None and first is not None:
            error = first[1]
        self.settle([*chain.from_iterable(values for _, values in parts)], own_error(error))


class Stream(Taker):
    """The results of an imap, in the order in which they are to be returned."""

    def __init__(self, dispatcher: Dispatcher, owner: object) -> None:
        super().__init__(dispatcher, owner)
        self.values: deque[tuple[Any, BaseException | None]] = deque()  # taken, not returned yet

    def add(self, start: int, values: list[Any], errors: dict[int, BaseException]) -> None:
        """As Taker says."""
        if not errors:
            self.values.extend([(value, None) for value in values])
        else:
            self.values.extend((value, own_error(errors.get(offset))) for offset, value in enumerate(values))

    def finish(self, error: BaseException | None) -> None:
        """As Taker says; the error comes in its place."""
        if error is not None:
            self.values.append((None, own_error(error)))

    def drain(self) -> None:
        """As Taker says; the results are returned later."""
        if self.call is not None:
            self.take_all()
            if self.values and isinstance(error := self.values[-1][1], KeyboardInterrupt):
                raise error  # Ctrl-C in `join`

    def abandon(self) -> None:
        """Stop the work: nothing follows."""
        self.cancel(InterruptedError("the iterator was cancelled"))
        self.values.clear()


class PoolIterator(Iterator[Any]):
    """What imap and imap_unordered return: one result an argument. Dropping it leaves the work to be done."""

    def __init__(self, dispatcher: Dispatcher, owner: object) -> None:
        self._dispatcher = dispatcher
        self._stream = Stream(dispatcher, owner)

    def next(self, timeout: float | None = None) -> Any:
        """The next result, or its argument's exception; ResultTimeout after `timeout` seconds."""
        while True:
            over = self._stream.call is None  # before the look: another thread may take the last ones behind it
            try:
                value, error = self._stream.values.popleft()
            except IndexError:
                if over:
                    raise StopIteration from None
                if not self._dispatcher.wait_for(self._stream.take, timeout):
                    raise _timeout() from None
                continue
            if error is not None:
                raise error
            return value

    def __next__(self) -> Any:
        return self.next()

    def cancel(self) -> None:
        """Stop the work: nothing follows, not even the results that were taken. Beyond the standard library."""
        self._stream.abandon()

    def leave(self, nothing: Callable[..., deque[Any]] = deque) -> None:
        """Nobody wants the results, and the work is done all the same. Takes no lock."""
        stream = self._stream
        if (call := stream.call) is not None and not self._dispatcher.link.forked:
            stream.values = nothing(maxlen=0)
            call.results.ready = stream.ready_to_take
            stream.ready_to_take()

    __del__ = leave  # in any thread at any moment
