"""BasePool: a connection with a context, and the calls that a Pool or an Executor makes on it.

Knows how a call becomes a job, a chunk or a range of chunks. It does not know what a result is to the caller:
`async_results.py` and `executor.py` do.

::

    submit    a chunk in the job of its function: an entry of Singles
    start     a Call: a range of chunks in a job of its own, which is kept for the next call

Any thread may call any method. `_state` needs no lock.
"""

from __future__ import annotations

import hashlib
import operator
import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any

from ..calls import connect
from ..config import SecretKey
from ..controller.call import Call
from ..controller.job import Job
from ..errors import DumpError, LetterTooLarge
from ..objects.letters import Context, dump_chunk, dump_function, joined, name_of
from ..objects.sources import own_sources
from ..options import Output, Show, checked, shower, watching
from ..protocol.frames import Letter, letter_of
from .dispatcher import Dispatcher, Singles, Taker

__all__ = ["CLOSE", "RUN", "SEQUENCES", "TERMINATE", "BasePool"]

RUN, CLOSE, TERMINATE = "RUN", "CLOSE", "TERMINATE"
LARGEST_CHUNK = 1 << 16  # arguments, of an endless input
CHUNKS_A_WORKER = 4  # chunks of a sequence for each worker, at the least: multiprocessing's own choice
SEQUENCES = list, tuple, range  # cut without an iterator
APPLY = {"call": "apply"}


class BasePool:
    """What Pool and Executor have in common.

    :param address: host, port, username, secret_key, encrypt and reconnect_seconds, as of `achilles.map`.
    Connects; blocks until the server has answered.
    """

    _state = TERMINATE  # until it runs
    _refusal: tuple[type[Exception], str] = ValueError, "Pool not running"

    def __init__(
        self, processes: int | None, initializer: Callable[..., object] | None, initargs: Iterable[Any],
        maxtasksperchild: int | None, wait_for_nodes: float | None, reconnect_seconds: float,
        executor: Any, host: str | None, port: int | None, username: str | None, secret_key: SecretKey,
        encrypt: bool | None,
    ) -> None:
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        wait_for_nodes, reconnect_seconds = checked(
            wait_for_nodes=wait_for_nodes, reconnect_seconds=reconnect_seconds)
        self._given = processes
        self._options = {"maxtasksperchild": maxtasksperchild}
        self._context = Context(caller=True)
        letter = None if initializer is None else letter_of(
            dump_function(self._context, (initializer, tuple(initargs)), "the initializer"), "the initializer")
        self._job = partial(Job, self._context, secrets.token_bytes(16), initializer=letter)
        self._letter_of = lru_cache(1)(letter_of)  # the function of the last call, which many callers give again
        self._controller = connect(
            host, port, username, secret_key, encrypt, reconnect_seconds, executor, processes, wait_for_nodes)
        self._dispatcher = Dispatcher(self._controller)
        self._state = RUN

    @property
    def _processes(self) -> int:
        """How many batches may be out at a time, at least 1; libraries read it."""
        return max(1, self._given or self._controller.workers)

    size = _max_workers = _processes

    def close(self) -> None:
        """Let nothing more be asked of this pool. What was asked is done."""
        if self._state == RUN:
            self._state = CLOSE

    def terminate(self) -> None:
        """Stop what runs, and close the connection: some seconds at most. Results not there are InterruptedError."""
        self._state = TERMINATE
        with self._controller.lock:
            self._controller.fail_jobs(InterruptedError("the pool was terminated before this was done"))
        self._dispatcher.stop()

    def join(self) -> None:
        """Block until all that was asked is done. ValueError before `close` or `terminate`."""
        if self._state == RUN:
            raise ValueError("Pool is still running")
        self._dispatcher.wait()
        self._dispatcher.stop()

    def __del__(self, terminate: str = TERMINATE) -> None:
        """Let the dispatcher close the connection: this takes no lock, and runs in any thread at any moment."""
        if self._state != terminate:  # what a module holds may be gone by now
            self._dispatcher.work.put(None)

    def _begin(self) -> Dispatcher:
        """The dispatcher of a call that begins. Raises why no call may begin."""
        if self._state != RUN:
            raise self._refusal[0](self._refusal[1])
        self._controller.check_usable()
        return self._dispatcher

    # How a call begins.

    def _submit(self, single: Any, func: Callable[..., Any], args: Iterable[Any], kwds: Mapping[str, Any]) -> Any:
        """Put one call into the job of its function, as an entry of its Singles. Return the same call."""
        link = self._controller
        try:
            key, function = self._function(func, APPLY)
            letter = letter_of(joined(dump_chunk(self._context, [(args, kwds)])), "the arguments")
        except (DumpError, LetterTooLarge) as error:
            single.answer((None, 0, error))
            return single
        with link.lock:
            singles, _ = self._dispatcher.open.get(key, (None, self))
            if singles is None:
                job = link.take(key, partial(self._job, function, options={**self._options, **APPLY}, sources=key[1]))
                singles = Singles(self._dispatcher, job, key)
            singles.enter(single, letter)
            self._dispatcher.open[key] = singles, self
            link.queue(singles.job)
        link.push()
        return single

    def _function(self, func: Callable[..., Any], options: Mapping[str, Any]) -> tuple[Any, Letter]:
        """What a job of this function is kept under, and the function's letter.

        The function is looked at anew at each call, since what it refers to may have changed.
        """
        dumped = dump_function(self._context, (func, None))
        on_cluster = self._controller.settings is not None
        sources = own_sources(at_once=options is not APPLY) if on_cluster else None
        return (dumped, sources, *options.values()), self._letter_of(dumped, name_of(func))

    def _start(
        self, taker: Taker, func: Callable[..., Any], args: Any, chunksize: int | None, buffersize: int | None = None,
        timeout: float | None = None, seed: int | None = None, output: Output = None, progress: Show = None, *,
        call: str = "one", ordered: bool = True, inline: bool = False, iterable: Any = None,
    ) -> None:
        """Begin a mapping call; `taker` takes its results. `inline`: take all of them now.

        :param args: an iterable, or a function that returns one.  :param iterable: what that function will return.
        """
        buffersize, timeout, _ = checked(buffersize=buffersize, timeout=timeout, progress=progress)
        if chunksize is not None and chunksize < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize:n}")
        link = self._controller
        watchers = watching(progress, iterable if callable(args) else args, link)
        show = shower(output, link.settings is None and not link.in_place)
        options: dict[str, Any] = {"call": call, "timeout": timeout, "output": show and True}
        if seed is not None:
            args = (lambda given=args: enumerate(given())) if callable(args) else [*enumerate(args)]
            options["seed"] = hashlib.sha256(b"%x" % operator.index(seed)).hexdigest()
        try:
            taker.key, function = self._function(func, options)
        except DumpError as error:
            taker.answer((None, 0, error))
            return
        with link.lock:
            job = link.take(taker.key, partial(
                self._job, function, options={**self._options, **options}, sources=taker.key[1]))
            largest = None
            if chunksize is None:  # of a sequence, what multiprocessing chooses
                wanted = CHUNKS_A_WORKER * self._processes
                largest = -(-len(args) // wanted) or 1 if isinstance(args, SEQUENCES) else LARGEST_CHUNK
            taker.call = Call(link, job, args, chunksize=operator.index(chunksize or 1), ordered=ordered, flat=True,
                              buffersize=buffersize, largest=largest, show=show, watchers=[*watchers, taker])
            self._dispatcher.open[taker] = taker, self
        try:
            taker.call.start(inline)
            if inline:
                taker.take_all()
        except BaseException as error:
            taker.cancel(error)
            raise
