"""Executor: a `concurrent.futures.Executor` over the cores of a cluster.

Knows futures and a Pool, whose connection, dispatcher and iterators it uses; a call is a job of one slice.

::

    submit ─▶ queue ─▶ two calls a worker are out ─▶ Job ─▶ dispatcher thread ─▶ Future.set_result
                │ cancel(): never sent                  │ cancel(kill=True): stopped where it runs

A future is RUNNING from when its call was given out. Any thread may call any method; what futures call back
runs in the pool's dispatcher thread. `_changed` is a condition, and guards the queue and the counts.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..config import SecretKey
from ..controller.connection import RECONNECT_SECONDS
from ..objects.outcomes import own_error
from .async_results import Dispatcher, PoolIterator, ResultTimeout, Taker
from .pool import CLOSE, Pool, _More

__all__ = ["Executor", "Future"]

AHEAD = 2  # calls given out for each worker: one runs, the next is there when it ends


class Future(concurrent.futures.Future[Any]):
    """A future whose `cancel` can stop a call that runs."""

    _call: _Call | None = None
    _killed = False

    def cancel(self, kill: bool = False) -> bool:
        """Cancel the call if it was not given out yet; with `kill`, also where it runs. Whether that was done."""
        call = self._call
        if super().cancel():
            if call is not None:
                call.executor._withdraw(call)
            return True
        return kill and call is not None and call.kill()

    def cancelled(self) -> bool:
        """Whether it was cancelled, or killed."""
        return super().cancelled() or (self._killed and self.done())

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the call raised, or None. Blocks `timeout` seconds at most; CancelledError if it was cancelled."""
        error = super().exception(timeout)
        if error is not None and self._killed:
            raise error
        return error


class _Call(Taker):
    """One call: its future, and what it needs to begin."""

    def __init__(self, executor: Executor, dispatcher: Dispatcher, work: tuple[Any, Any, Any]) -> None:
        super().__init__(dispatcher, executor)
        self.executor = executor
        self.future = Future()
        self.future._call = self
        self.claimed = False  # somebody sees to it that the future leaves PENDING; guarded by the executor's lock
        self.out = False  # it counts among those that are out; likewise
        self._work = work  # func, args, kwds, until it is given out
        self._value: Any = None
        self._error: BaseException | None = None
        self._kill = concurrent.futures.CancelledError()  # what the job fails with when it is killed

    def begin(self, pool: Pool) -> None:
        """Give it out, unless it was cancelled."""
        try:
            if not self.future.set_running_or_notify_cancel():
                self.executor._ended(self)
                return
            (func, args, kwds), self._work = self._work, (None, (), {})
            pool._start(self, func, [(args, kwds)], call="apply", ready=self.call)
        except BaseException as error:  # whatever it is, the future has it
            self.finish(error)
            if not isinstance(error, Exception):  # Ctrl-C, which is for who submits
                raise

    def kill(self) -> bool:
        """Stop it; whether it was still running."""
        job = self.job
        if job is not None:
            job.fail(self._kill)
        return job is not None

    def _add(self, start: int, values: list[Any], errors: dict[int, BaseException]) -> None:
        self._value, self._error = values[0], errors.get(0)

    def finish(self, error: BaseException | None) -> None:
        """The future gets what came."""
        future, value, error = self.future, self._value, own_error(error or self._error)
        future._call = self._value = self._error = None
        try:
            if future.done():  # Ctrl-C came when the job had begun
                return
            if error is not None:
                future._killed = error is self._kill
                future.set_exception(error)
            else:
                future.set_result(value)
        finally:
            self.executor._ended(self)


class Executor(concurrent.futures.Executor):
    """As `concurrent.futures.ProcessPoolExecutor`, whose arguments it takes; the other ones are those of Pool."""

    def __init__(
        self, max_workers: int | None = None, mp_context: object = None,
        initializer: Callable[..., object] | None = None, initargs: tuple[Any, ...] = (), *,
        max_tasks_per_child: int | None = None, host: str | None = None, port: int | None = None,
        username: str | None = None, secret_key: SecretKey = None, wait_for_nodes: float | None = None,
        reconnect_seconds: float = RECONNECT_SECONDS,
    ) -> None:
        if max_workers is not None and max_workers < 1:
            raise ValueError("max_workers must be greater than 0")
        if max_tasks_per_child is not None and not isinstance(max_tasks_per_child, int):
            raise TypeError("max_tasks_per_child must be an integer")
        if max_tasks_per_child is not None and max_tasks_per_child < 1:
            raise ValueError("max_tasks_per_child must be >= 1")
        self._changed = threading.Condition(threading.Lock())  # guards all below
        self._queue: deque[_Call] = deque()  # not given out yet
        self._out = 0  # given out, and not ended
        self._giving = False  # some thread gives out; one at a time, so that they keep their order
        self._down = False
        self._pool = Pool(
            max_workers, initializer, initargs, max_tasks_per_child, host=host, port=port, username=username,
            secret_key=secret_key, wait_for_nodes=wait_for_nodes, reconnect_seconds=reconnect_seconds,
        )

    @property
    def _max_workers(self) -> int:
        """How many calls may run at a time, at least 1; libraries read it."""
        return self._pool._processes

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Have a worker call `fn(*args, **kwargs)`; returns its future at once. RuntimeError after `shutdown`."""
        self._pool._dispatcher.check_process()
        call = _Call(self, self._pool._dispatcher, (fn, args, kwargs))
        with self._changed:
            self._check_up()
            self._queue.append(call)
        self._give_out()
        return call.future

    def map(
        self, fn: Callable[..., Any], *iterables: Iterable[Any], timeout: float | None = None,
        chunksize: int | None = 1, buffersize: int | None = None,
    ) -> Iterator[Any]:
        """The results of `fn` for the zipped iterables, in their order, which are read `buffersize` calls ahead.

        :param timeout: seconds from now, for each result to be there; then TimeoutError.
        :param chunksize: arguments that travel together; None finds a good one.
        An iterator that ends early, or is closed, cancels what is left.
        """
        if chunksize is not None and chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if getattr(self.submit, "__func__", None) is not Executor.submit:  # somebody counts the calls by his own
            return super().map(fn, *iterables, timeout=timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._check_up()
        short = all(isinstance(each, (list, tuple, range)) for each in iterables)
        args: Iterable[Any] = list(zip(*iterables)) if short else zip(*iterables)
        results = self._pool._iterate(fn, args, chunksize, _More(buffersize), call="star")
        return _Results(results, deadline)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take nothing more; end when all is done, and with `wait` block until then."""
        if self._pool._dispatcher.forked():
            return
        with self._changed:
            self._down = True
            queued = [*self._queue] if cancel_futures else []
        for call in queued:
            call.future.cancel()
        with self._changed:
            while wait and (self._out or self._queue):
                self._changed.wait()
        self._end_if_idle()
        if wait:
            self._pool.join()

    def _check_up(self) -> None:
        if self._down:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def _give_out(self) -> None:
        """Begin calls, in their order, as long as there is room."""
        mine, call = False, None
        try:
            with self._changed:
                if self._giving:
                    return
                mine = self._giving = True
            while True:
                with self._changed:
                    if not self._queue or self._out >= AHEAD * self._max_workers:
                        self._giving = mine = False
                        self._changed.notify_all()
                        return
                    call = self._queue.popleft()
                    if call.claimed:
                        continue
                    call.claimed = call.out = True
                    self._out += 1
                call.begin(self._pool)
        except BaseException as error:  # Ctrl-C: what others have submitted must not wait for it
            if mine:
                with self._changed:
                    self._giving = False
                    self._changed.notify_all()
                if call is not None and call.out and call.job is None:
                    call.finish(error)
                self._give_out()
            raise

    def _withdraw(self, call: _Call) -> None:
        """Its future was cancelled: whoever waits for that is told now."""
        with self._changed:
            mine, call.claimed = not call.claimed, True
        if mine:
            call.future._call = None
            call.future.set_running_or_notify_cancel()
            self._give_out()

    def _ended(self, call: _Call) -> None:
        """A call that was given out is over."""
        with self._changed:
            self._out -= call.out
            call.out = False
        self._give_out()
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        with self._changed:
            over = self._down and not self._out and not self._queue
        if over:
            self._pool.close()
            self._pool._dispatcher.stop_when_idle()

    def __del__(self) -> None:
        if (pool := getattr(self, "_pool", None)) is not None:
            pool._state = CLOSE  # no warning; it ends when nobody refers to it any more


class _Results(Iterator[Any]):
    """What `map` returns. Ends with the first error; closed or dropped, it cancels what is left."""

    def __init__(self, results: PoolIterator, deadline: float | None) -> None:
        self._results = results
        self._deadline = deadline
        self._open = True

    def __next__(self) -> Any:
        if not self._open:
            raise StopIteration
        try:
            return self._results.next(None if self._deadline is None else max(0.0, self._deadline - time.monotonic()))
        except ResultTimeout:
            self.close()
            raise TimeoutError from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Nothing follows."""
        if self._open:
            self._open = False
            self._results.cancel()

    dispatch = close  # what the dispatcher calls, see below

    def __del__(self) -> None:
        dispatcher = self._results._dispatcher
        if self._open and not dispatcher.forked():
            dispatcher.work.put(self)  # takes no lock: this runs in any thread at any moment
