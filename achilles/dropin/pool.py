"""Pool: the methods of `multiprocessing.pool.Pool`, over the cores of a whole cluster.

The module knows which call each method makes. `base_pool.py` begins the call, `async_results.py` takes its results.
Each method does as in the standard library. A pool has one connection.

::

    apply                  a chunk in the job of its function
    map, starmap           a call; the calling thread takes its results
    …_async                a call; the dispatcher takes its results ─▶ callbacks ─▶ AsyncResult.get
    imap, imap_unordered   a call; the iterator takes its results, or the dispatcher, if the iterator is dropped

A call runs to its end, also if nobody reads its results. Any thread may call any method.
"""

from __future__ import annotations

import operator
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from typing import Any

from ..config import SecretKey
from ..controller.connection import RECONNECT_SECONDS
from ..options import Output, Show
from .async_results import AsyncResult, Callback, MapResult, PoolIterator
from .base_pool import RUN, SEQUENCES, BasePool

__all__ = ["AsyncResult", "Pool", "PoolIterator"]

METHODS = ("apply", "apply_async", "imap", "imap_unordered", "map", "map_async", "starmap", "starmap_async",
           "close", "join", "terminate")


class Pool(BasePool):
    """A pool of the cluster's workers, with all methods of `multiprocessing.Pool`, and `with`.

    :param processes: how many batches of this pool may be out at a time; None is the whole cluster, as it grows
        and shrinks.
    :param initializer: each worker of this pool calls it once with `initargs`, before its first chunk; the calls
        raise its exception.
    :param maxtasksperchild: chunks after which a worker is replaced.
    :param context: ignored: nodes choose their start method.
    :param host, port, username, secret_key, wait_for_nodes, reconnect_seconds, executor, encrypt: as of `achilles.map`.
    :raises AchillesError: the cluster cannot be found, or refuses the caller.

    Connects; blocks until the server has answered. `chunksize=None` finds a good count. Each mapping method takes five
    further options by keyword. `buffersize` is how many chunks may be out and not taken. `timeout` is the seconds of
    one call of the function. `output` and `progress` are as of `achilles.map`. `seed` is an int. Before each call, the
    worker seeds `random` from it and the argument's index. It also seeds numpy's global generator, if numpy is loaded.
    """

    def __init__(
        self, processes: int | None = None, initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (), maxtasksperchild: int | None = None, context: object = None, *,
        host: str | None = None, port: int | None = None, username: str | None = None, secret_key: SecretKey = None,
        wait_for_nodes: float | None = None, reconnect_seconds: float = RECONNECT_SECONDS,
        executor: Executor | None = None, encrypt: bool | None = None,
    ) -> None:
        if processes is not None and processes < 1:
            raise ValueError("Number of processes must be at least 1")
        if maxtasksperchild is not None and (not isinstance(maxtasksperchild, int) or maxtasksperchild <= 0):
            raise ValueError("maxtasksperchild must be a positive int or None")
        super().__init__(processes and operator.index(processes), initializer, initargs, maxtasksperchild,
                         wait_for_nodes, reconnect_seconds, executor, host, port, username, secret_key, encrypt)

    def apply(self, func: Callable[..., Any], args: Iterable[Any] = (), kwds: Mapping[str, Any] = {}) -> Any:  # noqa: B006
        """Return `func(*args, **kwds)`, called in a worker. Blocks."""
        return self.apply_async(func, args, kwds).get()

    def apply_async(
        self, func: Callable[..., Any], args: Iterable[Any] = (), kwds: Mapping[str, Any] = {},  # noqa: B006
        callback: Callback | None = None, error_callback: Callback | None = None,
    ) -> AsyncResult:
        """As `apply`, but return at once. The dispatcher thread calls a callback with the result or error."""
        return self._submit(  # type: ignore[no-any-return]
            AsyncResult(self._begin(), callback, error_callback), func, args, kwds)

    def map(
        self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = None, *,
        buffersize: int | None = None, timeout: float | None = None, seed: int | None = None, output: Output = None,
        progress: Show = None,
    ) -> Any:
        """Return the results of `func(x)` for each x, in order. Blocks until the end, then raises the first error.

        :param buffersize, timeout, seed, output, progress: see the class.
        """
        return self._list("one", True, func, iterable, chunksize, buffersize, timeout, seed, output, progress).get()

    def starmap(
        self, func: Callable[..., Any], iterable: Iterable[Iterable[Any]], chunksize: int | None = None, *,
        buffersize: int | None = None, timeout: float | None = None, seed: int | None = None, output: Output = None,
        progress: Show = None,
    ) -> Any:
        """As `map`, but call `func(*x)`."""
        return self._list("star", True, func, iterable, chunksize, buffersize, timeout, seed, output, progress).get()

    def map_async(
        self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = None,
        callback: Callback | None = None, error_callback: Callback | None = None, *,
        buffersize: int | None = None, timeout: float | None = None, seed: int | None = None, output: Output = None,
        progress: Show = None,
    ) -> AsyncResult:
        """As `map`, but return at once. The callbacks get the whole list, or the first error."""
        return self._list("one", False, func, iterable, chunksize, buffersize, timeout, seed, output, progress,
                          callback, error_callback)

    def starmap_async(
        self, func: Callable[..., Any], iterable: Iterable[Iterable[Any]], chunksize: int | None = None,
        callback: Callback | None = None, error_callback: Callback | None = None, *,
        buffersize: int | None = None, timeout: float | None = None, seed: int | None = None, output: Output = None,
        progress: Show = None,
    ) -> AsyncResult:
        """As `starmap`, but return at once."""
        return self._list("star", False, func, iterable, chunksize, buffersize, timeout, seed, output, progress,
                          callback, error_callback)

    def imap(
        self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = 1,
        buffersize: int | None = None, *, timeout: float | None = None, seed: int | None = None, output: Output = None,
        progress: Show = None,
    ) -> PoolIterator:
        """Return an iterator over the results of `func(x)`, in order. `iterable` is read ahead, and may be endless."""
        return self._iterate(True, func, iterable, chunksize, buffersize, timeout, seed, output, progress)

    def imap_unordered(
        self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = 1,
        buffersize: int | None = None, *, timeout: float | None = None, seed: int | None = None, output: Output = None,
        progress: Show = None,
    ) -> PoolIterator:
        """As `imap`, in the order in which the results come."""
        return self._iterate(False, func, iterable, chunksize, buffersize, timeout, seed, output, progress)

    def _list(
        self, call: str, inline: bool, func: Any, iterable: Any, chunksize: int | None, buffersize: int | None,
        timeout: float | None, seed: int | None, output: Output, progress: Show, *callbacks: Callback | None,
    ) -> MapResult:
        result = MapResult(self._begin(), *callbacks)
        self._start(result, func, _copied(iterable), chunksize, buffersize, timeout, seed, output, progress, call=call,
                    ordered=False, inline=inline or self._controller.in_place)
        result.drain()
        return result

    def _iterate(self, ordered: bool, func: Any, iterable: Any, *more: Any) -> PoolIterator:
        results = PoolIterator(self._begin())
        self._start(results._stream, func, _copied(iterable) if type(iterable) in SEQUENCES else lambda: iterable,
                    *more, ordered=ordered, iterable=iterable)
        return results

    def __enter__(self) -> Pool:
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__qualname__} state={self._state} pool_size={self._processes}>"

    def __reduce__(self) -> Any:
        """Travel as an object with methods that raise: samplers' functions refer to their pool."""
        code = _raise_absent.__code__.replace(co_filename="<pool>", co_qualname="pool")
        absent = types.FunctionType(code, {"__name__": "__main__"}, "pool")  # by value
        return types.SimpleNamespace, (), dict.fromkeys(METHODS, absent)

    def __del__(self, run: str = RUN, warn: Callable[..., object] = warnings.warn) -> None:
        super().__del__()  # first: a warning may be an error
        if self._state == run and not self._controller.forked:
            warn(f"unclosed running multiprocessing pool {self!r}", ResourceWarning, 2, source=self)


def _copied(iterable: Iterable[Any]) -> Any:
    """Return a sequence of the same items, which the caller cannot change."""
    return iterable if type(iterable) in (tuple, range) else list(iterable)


def _raise_absent(*args: object, **more: object) -> None:
    raise NotImplementedError("pool objects cannot be passed between processes or pickled")
