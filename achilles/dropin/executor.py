"""Executor: a `concurrent.futures.Executor` over the cores of a cluster.

Knows futures and a BasePool, as Pool does; a call is a chunk in the job of its function.

::

    submit ─▶ waits in the job ─▶ sent in a batch ─▶ answer ─▶ dispatcher thread ─▶ Future.set_result
                │ cancel(): never sent                  │ cancel(kill=True): stopped where it runs

A future is running from when its batch was made. Any thread may call any method. Callbacks of futures run in the
dispatcher thread. The connection's lock guards all state.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import functools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

from ..config import SecretKey
from ..controller.connection import RECONNECT_SECONDS, tell
from ..errors import AchillesError
from .async_results import PoolIterator, Stream
from .base_pool import RUN, SEQUENCES, BasePool, More
from .dispatcher import Dispatcher, SingleCall, Singles, Taker

__all__ = ["Executor", "Future"]


class Future(SingleCall, concurrent.futures.Future[Any]):
    """A future with a `cancel` that can stop a call that runs. Its state is PENDING until its answer is loaded."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__()
        self._dispatcher = dispatcher

    def running(self) -> bool:
        """Whether the call was sent, and is not done."""
        with self._dispatcher.link.lock:
            waits = self.singles and any(run.first <= self.number < run.end for run in self.singles.job.waiting)
        return not waits and not self.done()

    def cancel(self, kill: bool = False) -> bool:
        """Cancel the call if it was not sent yet; with `kill`, also where it runs. Whether that was done."""
        link = self._dispatcher.link
        with link.lock:
            singles = self.singles
            if singles is None or self.number not in singles.entries:
                return self.cancelled()
            if not singles.job.withdraw(self.number):
                if not kill:
                    return False
                link.cancel(singles.job, self.number)
            singles.leave(self.number)
        link.push()
        super().cancel()
        self.set_running_or_notify_cancel()
        return True

    def settle(self, value: Any, error: BaseException | None) -> None:
        """As SingleCall says."""
        if error is not None:
            self.set_exception(error)
        else:
            self.set_result(value)


class Executor(BasePool, concurrent.futures.Executor):
    """As `concurrent.futures.ProcessPoolExecutor`, with its arguments; the other ones are those of Pool."""

    _refusal = RuntimeError, "cannot schedule new futures after shutdown"

    def __init__(
        self, max_workers: int | None = None, mp_context: object = None,
        initializer: Callable[..., object] | None = None, initargs: tuple[Any, ...] = (), *,
        max_tasks_per_child: int | None = None, host: str | None = None, port: int | None = None,
        username: str | None = None, secret_key: SecretKey = None, wait_for_nodes: float | None = None,
        reconnect_seconds: float = RECONNECT_SECONDS, encrypt: bool | None = None,
    ) -> None:
        if max_workers is not None and max_workers < 1:
            raise ValueError("max_workers must be greater than 0")
        if max_tasks_per_child is not None and not isinstance(max_tasks_per_child, int):
            raise TypeError("max_tasks_per_child must be an integer")
        if max_tasks_per_child is not None and max_tasks_per_child < 1:
            raise ValueError("max_tasks_per_child must be >= 1")
        super().__init__(max_workers, initializer, initargs, max_tasks_per_child, wait_for_nodes, reconnect_seconds,
                         None, host, port, username, secret_key, encrypt)
        _left_open().add(self)

    def wait_for_workers(self) -> int:
        """How many calls may run at a time, as soon as a node is there. NoNodesError after `wait_for_nodes`."""
        link = self._controller
        with link.lock:
            self._dispatcher.wait_for(partial(link.changed.wait_for, lambda: link.workers))
        return self._processes

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Have a worker call `fn(*args, **kwargs)`; returns its future at once. RuntimeError after `shutdown`."""
        future = Future(self._begin())
        self._submit(future, fn, args, kwargs)
        return future

    def map(
        self, fn: Callable[..., Any], *iterables: Iterable[Any], timeout: float | None = None,
        chunksize: int | None = 1, buffersize: int | None = None,
    ) -> Iterator[Any]:
        """The results of `fn` for the zipped iterables, in their order.

        :param timeout: seconds from now, for each result to be there; then TimeoutError.
        :param chunksize: arguments that travel together; None finds a good one.
        :param buffersize: how many chunks may be out and not taken; None follows the pace.
        An iterator that ends early cancels what is left. So does one that is closed or dropped, if it was read.
        """
        if chunksize is not None and chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if getattr(self.submit, "__func__", None) is not Executor.submit:  # somebody counts the calls by his own
            known = {} if buffersize is None else {"buffersize": buffersize}  # since Python 3.14
            return super().map(fn, *iterables, timeout=timeout, **known)
        short = all(isinstance(each, SEQUENCES) for each in iterables)
        args: Iterable[Any] = list(zip(*iterables)) if short else zip(*iterables)
        left: list[bool] = []
        if buffersize is not None:
            args = self._ahead(args, buffersize * (chunksize or 1), left)
        results = self._iterate(MapIterator, fn, args, chunksize, More(buffersize), call="star")
        results.left = left
        results.deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        return results

    def _ahead(self, args: Iterable[Any], count: int, left: list[bool]) -> Iterator[Any]:
        """The arguments. Behind the first `count`, none is read when nobody wants its result, or nobody may submit."""
        for number, arg in enumerate(args, 1):
            yield arg
            if number >= count and left:
                return
            if number >= count:
                self._check_running()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take nothing more; end when all is done, and with `wait` block until then.

        :param cancel_futures: cancel what was not sent yet, and what is left of each `map`.
        """
        if self._controller.forked:
            return
        self.close()
        _left_open().discard(self)
        if cancel_futures:
            with self._controller.lock:
                calls = [*self._dispatcher.open, *chain.from_iterable(
                    call.entries.values() for call in self._dispatcher.open if isinstance(call, Singles))]
            for call in calls:
                if isinstance(call, Future):
                    call.cancel()
                elif isinstance(call, Taker):
                    call.cancel(concurrent.futures.CancelledError())
        if wait:
            self.join()
        else:
            threading.Thread(target=self.join, name="achilles-shutdown").start()  # the interpreter waits for it

    def terminate_workers(self) -> None:
        """Stop what runs, and take nothing more; futures without a result are InterruptedError. Some seconds at most.

        The workers are the cluster's, and work for others.
        """
        self.terminate()

    kill_workers = terminate_workers

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """As `shutdown`; on Ctrl-C, here or in the block, as `terminate_workers`."""
        try:
            if kind is not KeyboardInterrupt:
                self.shutdown()
        finally:
            if self._state == RUN or self._dispatcher.open:
                self.terminate()


@functools.cache
def _left_open() -> weakref.WeakSet[Executor]:
    """The executors: what was submitted is done before the interpreter ends, as in the standard library.

    At the end, threads are still there only for functions that `threading` itself calls: concurrent.futures does so.
    """
    executors: weakref.WeakSet[Executor] = weakref.WeakSet()
    register = getattr(threading, "_register_atexit", atexit.register)
    register(_finish, executors)
    return executors


def _finish(executors: Iterable[Executor]) -> None:
    """Take nothing more, and wait until the calls of executors are done that nobody shut down. Ctrl-C ends the wait."""
    left = [each for each in executors if not each._controller.forked]
    for executor in left:
        executor.close()
    for executor in left:
        try:
            if executor._dispatcher.open:
                executor._dispatcher.wait()
                executor._controller.check_usable()
            executor._dispatcher.stop()  # which runs the callbacks that wait
        except (AchillesError, KeyboardInterrupt) as error:
            tell(f"Calls of an Executor are not done: {str(error) or 'Ctrl-C ended the wait for them'}")
            if isinstance(error, KeyboardInterrupt):
                return


class MapIterator(PoolIterator):
    """What `map` returns. Ends with the first error. Closed or dropped when it was read, it cancels what is left."""

    deadline = float("inf")  # monotonic, of every result
    left: Any = deque(maxlen=0)  # gets something when nobody will read more; of a `map` that began, its own
    _read = False  # as a generator does, an iterator that nobody has read leaves the work to be done

    def __next__(self) -> Any:
        self._read = True
        try:
            return self.next(max(0.0, self.deadline - time.monotonic()))
        except BaseException:
            self.cancel()
            raise

    def leave(self, *more: Any) -> None:
        """As PoolIterator says. What nobody has read of the input, beyond `buffersize`, stays so."""
        self.left.append(True)
        super().leave(*more)

    def close(self) -> None:
        """Nothing follows. What is left is cancelled, if a result was read."""
        if self._read:
            self.cancel()
        else:
            self.leave()
            self._stream = Stream(self._dispatcher, None)

    def __del__(self, _: object = None) -> None:
        if not self._read:
            self.leave()
        elif self._stream.call is not None and not self._dispatcher.link.forked:
            self._dispatcher.work.put(self._stream.abandon)  # takes no lock: this runs in any thread at any moment
