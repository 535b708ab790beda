"""BasePool: a connection with a context, and the calls that a Pool or an Executor makes on it.

Knows how a call becomes a job, a chunk or a range of chunks. It does not know what a result is to the caller:
`async_results.py` and `executor.py` do.

::

    submit               a chunk in the job of its function: an entry of Singles
    start                a Call: a range of chunks in a job of its own, which is kept for the next call
    iterate              the same, taken by an iterator

Any thread may call any method. The connection's lock guards `_singles`; `_last` and `_state` need none.
"""

from __future__ import annotations

import hashlib
import operator
import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

from ..calls import connect
from ..config import SecretKey
from ..controller.call import Call
from ..controller.job import Job
from ..errors import DumpError, LetterTooLarge
from ..objects import letters
from ..objects.letters import dump_chunk, dump_function, joined, name_of
from ..objects.sources import own_sources
from ..options import Output, checked, shower
from ..protocol.frames import Letter, letter_of
from .async_results import PoolIterator
from .dispatcher import Dispatcher, SingleCall, Singles, Taker

__all__ = ["CLOSE", "RUN", "SEQUENCES", "TERMINATE", "BasePool", "More", "copied"]

RUN, CLOSE, TERMINATE = "RUN", "CLOSE", "TERMINATE"
LARGEST_CHUNK = 1 << 16  # arguments, of an endless input
CHUNKS_A_WORKER = 4  # chunks of a sequence for each worker, at the least: multiprocessing's own choice
SEQUENCES = list, tuple, range  # cut without an iterator
APPLY = {"call": "apply"}

Kind = TypeVar("Kind", bound=PoolIterator)


def copied(iterable: Iterable[Any]) -> Any:
    """A sequence of the same items, which the caller cannot change while it is read."""
    return iterable if type(iterable) in (tuple, range) else list(iterable)


class More(NamedTuple):
    """What the mapping methods take beyond the standard library's; see Pool."""

    buffersize: int | None = None
    timeout: float | None = None
    seed: int | None = None
    output: Output = None


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
        self._context, self._context_id = letters.Context(caller=True), secrets.token_bytes(16)
        name = "the initializer"
        self._initializer = None if initializer is None else letter_of(
            dump_function(self._context, (initializer, tuple(initargs)), name), name)
        self._last: tuple[bytes, Letter] = b"", b""  # the function of the last call, which many callers give again
        self._controller = connect(
            host, port, username, secret_key, encrypt, reconnect_seconds, executor, processes, wait_for_nodes)
        self._singles: dict[Any, Singles] = {}  # of jobs of single calls, while any waits; with its lock
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
        if not self._controller.forked:
            with self._controller.lock:
                self._controller.fail_jobs(InterruptedError("the pool was terminated before this was done"))
            self._dispatcher.stop()

    def join(self) -> None:
        """Block until all that was asked is done. ValueError before `close` or `terminate`."""
        self._dispatcher.check_process()
        if self._state == RUN:
            raise ValueError("Pool is still running")
        self._dispatcher.wait()
        self._dispatcher.stop()

    def __del__(self, terminate: str = TERMINATE) -> None:
        if self._state != terminate and not self._controller.forked:  # what a module holds may be gone by now
            self._dispatcher.end()

    def _check_running(self) -> None:
        if self._state != RUN or self._controller.forked:
            self._dispatcher.check_process()
            raise self._refusal[0](self._refusal[1])

    def _begin(self) -> Dispatcher:
        """The dispatcher, which runs."""
        self._check_running()
        self._dispatcher.start()
        return self._dispatcher

    # How a call begins.

    def _submit(
        self, single: SingleCall, func: Callable[..., Any], args: Iterable[Any], kwds: Mapping[str, Any]
    ) -> None:
        """Put one call into the job of its function, as an entry of its Singles."""
        link = self._controller
        try:
            key, function = self._function(func, APPLY)
            letter = letter_of(joined(dump_chunk(self._context, [(args, kwds)])), "the arguments")
        except (DumpError, LetterTooLarge) as error:
            self._dispatcher.settle([(single, (None, 0, None, error))])
            return
        with link.lock:
            singles = self._singles.get(key)
            if singles is None or singles.job.spent:
                job = link.take(key, partial(self._job, key, function, APPLY))
                self._singles[key] = job.sink = singles = Singles(self._dispatcher, job, partial(self._idle, key))
            singles.enter(single, letter)
            link.queue(singles.job)
        link.push()

    def _idle(self, key: Any, singles: Singles) -> None:
        """No call waits for this job any more. Needs the connection's lock."""
        if self._singles.get(key) is singles:
            del self._singles[key]
        self._controller.keep(key, singles.job)

    def _function(self, func: Callable[..., Any], options: Mapping[str, Any]) -> tuple[Any, Letter]:
        """What a job of this function is kept under, and the function's letter.

        The function is looked at anew at each call, since what it refers to may have changed.
        """
        dumped = dump_function(self._context, (func, None))
        letter, last = self._last
        if dumped is not letter:
            self._last = dumped, last = dumped, letter_of(dumped, name_of(func))
        on_cluster = self._controller.settings is not None
        sources = own_sources(at_once=options is not APPLY) if on_cluster else None
        return (dumped, sources, *options.values()), last

    def _job(self, key: Any, function: Letter, options: Mapping[str, Any]) -> Job:
        options = {**self._options, **options}
        return Job(self._context, self._context_id, function, self._initializer, options, sources=key[1])

    def _start(
        self, taker: Taker, func: Callable[..., Any], args: Any, chunksize: int | None, more: More, *,
        call: str = "one", ordered: bool = False, ready: Callable[[], object] | None = None, inline: bool = False,
    ) -> None:
        """Begin a mapping call for `taker`, which takes its results; `inline`: take them."""
        buffersize, timeout = checked(buffersize=more.buffersize, timeout=more.timeout)
        if chunksize is not None and chunksize < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize:n}")
        chunksize = None if chunksize is None else operator.index(chunksize)
        link = self._controller
        show = shower(more.output, link.settings is None and not link.in_place)
        options: dict[str, Any] = {"call": call, "timeout": timeout, "output": show and True}
        if more.seed is not None:
            args = (lambda given=args: enumerate(given())) if callable(args) else [*enumerate(args)]
            options["seed"] = hashlib.sha256(b"%x" % operator.index(more.seed)).hexdigest()
        try:
            taker.key, function = self._function(func, options)
        except DumpError as error:
            if ready is None:
                taker.finish(error)
            else:  # callbacks are the dispatcher's
                self._dispatcher.work.put(partial(taker.finish, error))
            return
        with self._controller.lock:
            job = self._controller.take(taker.key, partial(self._job, taker.key, function, options))
            largest = None
            if chunksize is None:  # of a sequence, what multiprocessing chooses
                largest = LARGEST_CHUNK if callable(args) else -(-len(args) // (CHUNKS_A_WORKER * self._processes)) or 1
            taker.call = Call(self._controller, job, args, chunksize=chunksize or 1, ordered=ordered, flat=True,
                              buffersize=buffersize, largest=largest, ready=ready, show=show)
            self._dispatcher.open.add(taker)
        try:
            taker.call.start(inline)
            if inline:
                taker.take_all()
        except BaseException as error:
            taker.cancel(error)
            raise

    def _iterate(
        self, kind: type[Kind], func: Any, iterable: Any, chunksize: int | None, more: More, *, call: str = "one",
        ordered: bool = True,
    ) -> Kind:
        iterator = kind(self._begin(), self)
        args = copied(iterable) if type(iterable) in SEQUENCES else lambda: iterable
        self._start(iterator._stream, func, args, chunksize, more, call=call, ordered=ordered)
        return iterator
