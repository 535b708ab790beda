"""Pool: what `multiprocessing.pool.Pool` is, over the cores of a whole cluster.

Knows how each of its methods becomes a job; how results are taken is async_results.py's. The standard library's
Pool decides what every method does. One connection for the pool's life, any number of jobs and threads at
once; results are flat, one an argument.

::

    map, starmap, apply    a job whose results the calling thread takes
    …_async                a job whose results the dispatcher takes ─▶ callbacks ─▶ AsyncResult.get
    imap, imap_unordered   a job whose results the iterator takes; one that is dropped, the dispatcher

A job runs to its end, whether anybody reads its results or not. Any thread may call any method; `_lock`
guards the state.
"""

from __future__ import annotations

import functools
import operator
import secrets
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..calls import Lookout, check_counts, check_seconds, connect
from ..config import SecretKey
from ..controller.connection import RECONNECT_SECONDS, Controller
from ..controller.feeder import join
from ..controller.job import SLICE_US, Function, Job
from ..errors import DumpError
from ..objects import letters
from ..objects.outcomes import own_error
from ..protocol.frames import MESSAGE_US
from .async_results import AsyncResult, Callback, Dispatcher, PoolIterator, Taker

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["AsyncResult", "Pool", "PoolIterator"]

RUN, CLOSE, TERMINATE = "RUN", "CLOSE", "TERMINATE"
TASKS_A_WORKER = 4  # slices of a sequence for each worker, at the least: multiprocessing's own choice
LARGEST_SLICE = 1 << 16  # arguments of an endless input: more than 50 ms of any call
JOINED = 16  # quick arguments of a pool of few processes that go together: a slow one keeps no more than these waiting
TERMINATED = "the pool was terminated before this was done"
METHODS = ("apply", "apply_async", "imap", "imap_unordered", "map", "map_async", "starmap", "starmap_async",
           "close", "join", "terminate")


class _More(NamedTuple):
    """What the mapping methods take beyond the standard library's; see Pool."""

    buffersize: int | None = None
    timeout: float | None = None
    seed: int | None = None


PLAIN = _More()


class Pool:
    """A pool of the cluster's workers; all that `multiprocessing.Pool` has, and `with`.

    :param processes: how many slices of this pool may run at a time; None is the whole cluster, as it grows
        and shrinks.
    :param initializer: called once with `initargs` in each worker that works for this pool, before its first
        task; what it raises is raised by the calls.
    :param maxtasksperchild: slices after which a worker is replaced.
    :param context: for the standard library's sake; nodes choose their own start method.
    :param host, port, username, secret_key, wait_for_nodes, reconnect_seconds, executor: as of `achilles.map`.
    :raises AchillesError: the cluster cannot be found, or does not let us in.

    Connects; blocks until the server has answered. `chunksize=None` finds a good one by itself, and each
    mapping method takes, by keyword, `buffersize` (arguments that may be out and not taken), `timeout`
    (seconds of one call) and `seed` (an int: before each call `random`, and numpy's global generator where
    it is loaded, are seeded from it and the argument's index).
    """

    def __init__(
        self, processes: int | None = None, initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (), maxtasksperchild: int | None = None, context: object = None, *,
        host: str | None = None, port: int | None = None, username: str | None = None, secret_key: SecretKey = None,
        wait_for_nodes: float | None = None, reconnect_seconds: float = RECONNECT_SECONDS,
        executor: Executor | None = None,
    ) -> None:
        self._state = TERMINATE  # until it runs, for __del__
        if processes is not None and processes < 1:
            raise ValueError("Number of processes must be at least 1")
        processes = None if processes is None else operator.index(processes)
        if maxtasksperchild is not None and (not isinstance(maxtasksperchild, int) or maxtasksperchild <= 0):
            raise ValueError("maxtasksperchild must be a positive int or None")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        check_seconds(wait_for_nodes=wait_for_nodes, reconnect_seconds=reconnect_seconds)
        self._given = processes
        options = {"processes": processes, "maxtasksperchild": maxtasksperchild}
        self._options = {name: value for name, value in options.items() if value is not None}
        self._context, self._context_id = letters.Context(caller=True), secrets.token_bytes(16)
        self._initializer = None
        if initializer is not None:
            self._initializer = Function(self._context.dump((initializer, tuple(initargs)), "the initializer"))
        self._last: Function | None = None  # the function of the last call, which many callers give again
        self._lock = threading.Lock()  # guards `_state`
        self._controller: Controller = connect(host, port, username, secret_key, reconnect_seconds, executor)
        self._dispatcher = Dispatcher(self._controller, Lookout(self._controller, wait_for_nodes))
        self._state = RUN

    @property
    def _processes(self) -> int:
        """How many slices may run at a time, at least 1; libraries read it."""
        return max(1, self._given or self._controller.workers()[0])

    size = _max_workers = _processes

    # One call.

    def apply(self, func: Callable[..., Any], args: Iterable[Any] = (), kwds: Mapping[str, Any] = {}) -> Any:  # noqa: B006
        """`func(*args, **kwds)` in a worker. Blocks until it is done."""
        return self._run(self._result(True), func, [(args, kwds)], call="apply")

    def apply_async(
        self, func: Callable[..., Any], args: Iterable[Any] = (), kwds: Mapping[str, Any] = {},  # noqa: B006
        callback: Callback | None = None, error_callback: Callback | None = None,
    ) -> AsyncResult:
        """As `apply`, at once; one of the callbacks is called, in the dispatcher thread, with what comes of it."""
        result = self._result(True, callback, error_callback)
        return self._run_async(result, func, [(args, kwds)], call="apply")

    # A list of results.

    def map(
        self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = None, *,
        buffersize: int | None = None, timeout: float | None = None, seed: int | None = None,
    ) -> Any:
        """The results of `func(x)` for each x, in their order. Blocks until all is done, then raises the first error.

        :param buffersize, timeout, seed: see the class.
        """
        more = _More(buffersize, timeout, seed)
        return self._run(self._result(False), func, self._sequence(iterable), chunksize, more)

    def starmap(
        self, func: Callable[..., Any], iterable: Iterable[Iterable[Any]], chunksize: int | None = None, *,
        buffersize: int | None = None, timeout: float | None = None, seed: int | None = None,
    ) -> Any:
        """As `map`, of `func(*x)`."""
        more = _More(buffersize, timeout, seed)
        return self._run(self._result(False), func, self._sequence(iterable), chunksize, more, call="star")

    def map_async(
        self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = None,
        callback: Callback | None = None, error_callback: Callback | None = None, *,
        buffersize: int | None = None, timeout: float | None = None, seed: int | None = None,
    ) -> AsyncResult:
        """As `map`, at once; the callbacks get the whole list, or the first error."""
        result, more = self._result(False, callback, error_callback), _More(buffersize, timeout, seed)
        return self._run_async(result, func, self._sequence(iterable), chunksize, more)

    def starmap_async(
        self, func: Callable[..., Any], iterable: Iterable[Iterable[Any]], chunksize: int | None = None,
        callback: Callback | None = None, error_callback: Callback | None = None, *,
        buffersize: int | None = None, timeout: float | None = None, seed: int | None = None,
    ) -> AsyncResult:
        """As `starmap`, at once."""
        result, more = self._result(False, callback, error_callback), _More(buffersize, timeout, seed)
        return self._run_async(result, func, self._sequence(iterable), chunksize, more, call="star")

    # One result after the other.

    def imap(
        self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = 1, *,
        buffersize: int | None = None, timeout: float | None = None, seed: int | None = None,
    ) -> PoolIterator:
        """An iterator over the results of `func(x)`, in their order. `iterable` is read ahead, and may be endless."""
        return self._iterate(func, iterable, chunksize, _More(buffersize, timeout, seed))

    def imap_unordered(
        self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = 1, *,
        buffersize: int | None = None, timeout: float | None = None, seed: int | None = None,
    ) -> PoolIterator:
        """As `imap`, in the order in which they come."""
        return self._iterate(func, iterable, chunksize, _More(buffersize, timeout, seed), ordered=False)

    # The end.

    def close(self) -> None:
        """Let nothing more be asked of this pool. What was asked is done."""
        with self._lock:
            if self._state == RUN:
                self._state = CLOSE

    def terminate(self) -> None:
        """Stop what runs, and close the connection: some seconds at most. Results not there are InterruptedError."""
        with self._lock:
            self._state = TERMINATE
        if self._dispatcher.forked():
            return
        self._dispatcher.fail(InterruptedError(TERMINATED))
        self._dispatcher.stop()

    def join(self) -> None:
        """Block until all that was asked is done. ValueError before `close` or `terminate`."""
        self._dispatcher.check_process()
        with self._lock:
            if self._state == RUN:
                raise ValueError("Pool is still running")
            state = self._state
        if state == CLOSE:
            self._dispatcher.wait()
        self._dispatcher.stop()

    def __enter__(self) -> Pool:
        self._check_running()
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()

    def __repr__(self) -> str:
        cls = type(self)
        return f"<{cls.__module__}.{cls.__qualname__} state={self._state} pool_size={self._processes}>"

    def __reduce__(self) -> Any:
        """In a worker it has the same methods, which raise: samplers send functions that refer to their pool."""
        return types.SimpleNamespace, (), dict.fromkeys(METHODS, _absent())

    def __del__(self, run: str = RUN, terminate: str = TERMINATE, warn: Callable[..., None] = warnings.warn) -> None:
        if self._state != terminate and not self._dispatcher.forked():  # what a module holds may be gone by now
            if self._state == run:
                warn(f"unclosed running multiprocessing pool {self!r}", ResourceWarning, 2, source=self)
            self._dispatcher.work.put(None)

    def _check_running(self) -> None:
        self._dispatcher.check_process()
        if self._state != RUN:
            raise ValueError("Pool not running")

    # How a call begins.

    def _start(
        self, taker: Taker, func: Callable[..., Any], args: Any, chunksize: int | None = 1, more: _More = PLAIN, *,
        call: str = "one", ordered: bool = False, ready: Callable[[], object] | None = None,
    ) -> None:
        """Dump the function, and start a job whose results `taker` takes."""
        self._check_running()
        buffersize, timeout, seed = more
        check_counts(buffersize=buffersize)
        check_seconds(timeout=timeout)
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise TypeError(f"seed must be an int, not {type(seed).__name__}")
        if chunksize is not None and chunksize < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize:n}")
        options = {**self._options, "call": call, "seed": seed, "timeout": timeout}
        if seed is not None:
            args = _numbered(args)
        function = self._dump(func)

        # Of few slices at a time none waits at a node for its turn: some quick ones go together, as in a message there.
        joins = self._given is not None and "maxtasksperchild" not in self._options
        largest = self._largest_slice(args) if chunksize is None else JOINED if joins else None
        slice_us = SLICE_US if chunksize is None else MESSAGE_US

        def make(link: Controller, number: int) -> Job:
            """The job, known to its taker before it begins."""
            taker.job = Job(
                link, number, self._context, self._context_id, function, args, chunksize=chunksize or 1,
                ordered=ordered, flat=True, buffersize=buffersize, options=options, initializer=self._initializer,
                largest=largest, slice_us=slice_us, ready=ready,
            )
            return taker.job

        self._dispatcher.add(taker, keep=not isinstance(taker, PoolIterator))
        try:
            self._controller.start(make)
        except BaseException:
            self._dispatcher.forget(taker)
            taker.job = None
            raise

    def _dump(self, func: Callable[..., Any]) -> Function:
        """It may have changed since the last call, so it is dumped anew; to compare is cheaper than a digest."""
        name = f"function {getattr(func, '__qualname__', type(func).__name__)}"
        self._context.refresh()
        letter, last = join(self._context.dump((func, None), name)), self._last
        self._controller.check_size(name, len(letter))
        if last is None or last.letter != letter:
            self._last = last = Function([letter])
        return last

    def _sequence(self, iterable: Iterable[Any]) -> Any:
        """Something of a known length; the iterable's own error is raised here."""
        self._check_running()
        return iterable if type(iterable) in (list, tuple, range) else list(iterable)

    def _largest_slice(self, args: Any) -> int:
        """Of a sequence, what multiprocessing would take."""
        if not isinstance(args, (list, tuple, range)):
            return LARGEST_SLICE
        return max(1, -(-len(args) // (TASKS_A_WORKER * self._processes)))

    def _run(self, taker: AsyncResult, *args: Any, **more: Any) -> Any:
        try:
            self._start(taker, *args, **more)
        except DumpError as error:
            raise own_error(error) from None
        return taker.take_all()

    def _run_async(self, taker: AsyncResult, *args: Any, **more: Any) -> AsyncResult:
        try:
            self._start(taker, *args, ready=taker.call, **more)
        except DumpError as error:  # the callback for it runs where all of them do
            self._dispatcher.work.put(types.SimpleNamespace(dispatch=functools.partial(taker.finish, error)))
        return taker

    def _result(self, *about: Any) -> AsyncResult:
        return AsyncResult(self._dispatcher, self, *about)

    def _iterate(
        self, func: Any, iterable: Any, chunksize: int | None, more: _More, *, call: str = "one", ordered: bool = True,
    ) -> PoolIterator:
        taker = PoolIterator(self._dispatcher, self)
        args = iterable if type(iterable) in (list, tuple, range) else lambda: iterable
        try:
            self._start(taker, func, args, chunksize, more, call=call, ordered=ordered)
        except DumpError as error:
            taker.finish(error)
        return taker


def _numbered(args: Any) -> Any:
    """Each argument with its index, for `seed`."""
    return (lambda: enumerate(args())) if callable(args) else list(enumerate(args))


def _absent() -> Any:
    """A function that raises when it is called. It travels by value, since it is of no module."""
    code = _raise_absent.__code__.replace(co_filename="<pool>")
    function = types.FunctionType(code, {"__name__": "__main__"}, "pool")
    function.__module__, function.__qualname__ = "__main__", "pool"
    return function


def _raise_absent(*args: object, **more: object) -> None:
    raise NotImplementedError("pool objects cannot be passed between processes or pickled")
