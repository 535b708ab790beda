"""Executor: a `concurrent.futures.Executor` over the cores of a cluster.

The module knows futures and a BasePool. A call is a chunk in the job of its function.

::

    submit ─▶ waits in the job ─▶ sent in a batch ─▶ answer ─▶ dispatcher thread ─▶ Future.set_result
                │ cancel(): never sent                  │ cancel(kill=True): stopped where it runs

A future runs from the making of its batch. Any thread may call any method. Callbacks of futures run in the
dispatcher thread. The connection's lock guards all state. `running` looks without the lock.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

from ..config import SecretKey
from ..controller.connection import RECONNECT_SECONDS, tell
from ..errors import AchillesError, NoNodesError
from .async_results import Answer, PoolIterator, open_answer
from .base_pool import SEQUENCES, BasePool, Dispatcher, Singles

__all__ = ["Executor", "Future"]


class Future(concurrent.futures.Future[Any]):
    """A future with a `cancel` that can stop a running call. Its state is PENDING until its answer is loaded."""

    singles: Singles | None = None  # the entry's; None if the call could not be dumped
    number = 0  # the chunk's

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__()
        self._dispatcher = dispatcher

    def running(self) -> bool:
        """Whether the call was sent and is not done."""
        return not self.done() and not (
            self.singles and any(run.first <= self.number < run.end for run in [*self.singles.job.waiting]))

    def cancel(self, kill: bool = False) -> bool:
        """Cancel the call if it was not sent yet; with `kill`, also while it runs. Return whether it is cancelled."""
        link, singles = self._dispatcher.link, self.singles
        with link.lock:
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

    def answer(self, answer: Answer) -> None:
        """Let the dispatcher load the answer."""
        self._dispatcher.work.put(partial(self._load, answer))

    def _load(self, answer: Answer) -> None:
        value, error = open_answer(*answer)
        if error is not None:
            self.set_exception(error)
        else:
            self.set_result(value)


class Executor(BasePool, concurrent.futures.Executor):
    """As `concurrent.futures.ProcessPoolExecutor`, with its arguments; the other arguments are as Pool's."""

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
        """Wait for a node. Return how many calls may run at a time. NoNodesError after `wait_for_nodes`.

        Raises as `submit`, where no node can come any more.
        """
        link = self._controller
        with link.lock:
            self._dispatcher.wait_for(partial(link.changed.wait_for, lambda: link.workers or not self._begin()))
        return self._processes

    def _look(self) -> None:
        """The dispatcher looks for nodes. If there was none for `wait_for_nodes`, all calls end with NoNodesError.

        Perhaps nobody looks at their futures: so stderr says it, too.
        """
        try:
            self._controller.look()
        except NoNodesError as error:
            tell(f"Calls of an Executor are not done: {error}")
            self._controller.fail_jobs(error)
            self._controller.push()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Have a worker call `fn(*args, **kwargs)`. Return its future at once. RuntimeError after `shutdown`."""
        return self._submit(Future(self._begin()), fn, args, kwargs)  # type: ignore[no-any-return]

    def map(
        self, fn: Callable[..., Any], *iterables: Iterable[Any], timeout: float | None = None,
        chunksize: int | None = 1, buffersize: int | None = None,
    ) -> Iterator[Any]:
        """Return an iterator over the results of `fn` for the zipped iterables, in their order.

        :param timeout: seconds from now, for each result; then TimeoutError.
        :param chunksize: arguments that travel together; None finds a good count.
        :param buffersize: how many chunks may be out and not taken; None follows the pace.
        An iterator cancels the other calls if it ends early, or is closed or dropped after it was read.
        """
        if chunksize is not None and chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if getattr(self.submit, "__func__", None) is not Executor.submit:  # a subclass counts the calls
            return super().map(  # `buffersize` since Python 3.14
                fn, *iterables, timeout=timeout, **({} if buffersize is None else {"buffersize": buffersize}))
        short = all(isinstance(each, SEQUENCES) for each in iterables)
        args: Any = list(zip(*iterables)) if short else zip(*iterables)
        results = PoolIterator(self._begin())
        if buffersize is not None:
            gate = self._gate(buffersize * (chunksize or 1), weakref.ref(results))
            args = (arg for _, arg in zip(gate, args))  # the gate comes before the argument
        self._start(results._stream, fn, args, chunksize, buffersize, call="star")
        return _read(results, time.monotonic() + (float("inf") if timeout is None else timeout))

    def _gate(self, count: int, reader: Callable[[], object]) -> Iterator[object]:
        """Let `count` arguments pass, and more while the results may be read and calls may begin."""
        yield from range(count)
        while reader() is not None:
            self._begin()
            yield None

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Refuse further calls. End when all calls are done; with `wait`, block until then.

        :param cancel_futures: cancel the calls that were not sent yet, and the rest of each `map`.
        """
        if self._controller.forked:
            return
        self.close()
        _left_open().discard(self)
        if cancel_futures:
            for call, _ in [*self._dispatcher.open.values()]:
                call.cancel(concurrent.futures.CancelledError())
        if wait:
            self.join()
        else:
            threading.Thread(target=self.join, name="achilles-shutdown").start()  # the interpreter waits for it

    # The cluster's workers live on, for other callers.
    terminate_workers = kill_workers = BasePool.terminate

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """As `shutdown`; on Ctrl-C in the block or here, as `terminate_workers`."""
        try:
            if kind is not KeyboardInterrupt:
                self.shutdown()
        finally:
            self.terminate()


@cache
def _left_open() -> weakref.WeakSet[Executor]:
    """The open executors: their calls are done before the interpreter ends.

    `threading` calls `_finish` while threads are still there. `atexit` would call it later.
    """
    executors: weakref.WeakSet[Executor] = weakref.WeakSet()
    getattr(threading, "_register_atexit", atexit.register)(_finish, executors)
    return executors


def _finish(executors: Iterable[Executor]) -> None:
    """Close the open executors, and wait until their calls are done. Ctrl-C ends the wait."""
    for executor in [*executors]:
        executor.close()
    for executor in [*executors]:
        try:
            if executor._dispatcher.open and not executor._controller.forked:
                executor._dispatcher.wait()
                executor._controller.check_usable()
            executor._dispatcher.stop()  # it runs the waiting callbacks
        except (AchillesError, KeyboardInterrupt) as error:
            tell(f"Calls of an Executor are not done: {str(error) or 'Ctrl-C ended the wait for them'}")
            if isinstance(error, KeyboardInterrupt):
                return


def _read(results: PoolIterator, deadline: float) -> Iterator[Any]:
    """Yield the results of `map` up to the first error. At the end, cancel the other calls.

    A generator that was never read runs no code at its end: its calls are done.

    :param deadline: monotonic, of every result.
    """
    try:
        while True:
            yield results.next(max(0.0, deadline - time.monotonic()))
    except StopIteration:
        pass
    finally:  # takes no lock: any thread runs this
        results._dispatcher.work.put(results.cancel)
