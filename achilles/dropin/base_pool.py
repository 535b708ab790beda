"""BasePool: a connection with a context, and the calls that a Pool or an Executor makes on it.

The module knows the open calls, and how a call becomes a chunk or a range of chunks. `async_results.py` and
`executor.py` hand results to the caller.

::

    submit    a chunk in the job of its function: an entry of Singles
    start     a Call: a range of chunks in a job of its own, which is kept for the next call

    reader thread: drain, answer ─▶ Dispatcher.work ─▶ dispatcher thread: take, load ─▶ callbacks

Threads: a pool's dispatcher takes results that no other thread takes, and runs callbacks in turn. It refers to a pool
only while the pool has open calls: a dropped pool is collected. Any thread may call any method.
Locks: the connection's lock guards `open` and `entries`. `_state` needs no lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any

from ..calls import connect
from ..config import SecretKey
from ..controller.call import Call
from ..controller.connection import Controller
from ..controller.job import Job
from ..controller.results import Sink
from ..controller.run import Run
from ..errors import DumpError, LetterTooLarge
from ..objects.letters import Context, dump_chunk, dump_function, joined, name_of
from ..objects.outcomes import fresh, mark
from ..objects.sources import own_sources
from ..options import Output, Show, checked, shower, watching
from ..protocol.frames import Letter, letter_of
from .async_results import Taker

__all__ = ["CLOSE", "RUN", "SEQUENCES", "TERMINATE", "BasePool", "Dispatcher", "Singles"]

RUN, CLOSE, TERMINATE = "RUN", "CLOSE", "TERMINATE"
LARGEST_CHUNK = 1 << 16  # arguments, of an endless input
CHUNKS_A_WORKER = 4  # at least, of a sequence: multiprocessing's choice
STOP_SECONDS = 5.0  # for the dispatcher, which may wait for the thread that calls `terminate`: a little over `close`
SEQUENCES = list, tuple, range  # cut without an iterator
APPLY = {"call": "apply"}


class Dispatcher:
    """The open calls of a pool, and the dispatcher thread."""

    def __init__(self, link: Controller) -> None:
        self.link = link
        self.work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()  # None ends the thread
        # Singles with entries, by the key of their job; Takers, by themselves. Each keeps its pool alive.
        self.open: dict[Any, tuple[Any, BasePool]] = {}
        self._thread = threading.Thread(target=self._run, name="achilles-dispatcher", daemon=True)
        self._thread.start()

    def forget(self, key: object) -> bool:
        """Remove a call that is over: its results are there, or in `work`. Return whether it was open.

        Needs the connection's lock.
        """
        self.link.changed.notify_all()
        return self.open.pop(key, None) is not None

    def wait_for(self, wait: Callable[[float], object], timeout: float | None = None) -> bool:
        """Call `wait` with some seconds until it returns a true value; False after `timeout` seconds.

        Raises NoNodesError if no node is there for too long, and ServerUnreachable in a forked child of the caller.
        """
        if self.link.forked:  # no result will ever come
            self.link.check_usable()
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while not wait(max(0.0, min(self.link.look_seconds, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                return False
            self.link.look()
        return True

    def wait(self) -> None:
        """Block until all calls are over, or the thread has ended. Iterators keep their results."""
        self.drain()
        with self.link.lock:
            self.wait_for(partial(self.link.changed.wait_for, lambda: not (self.open and self._thread.is_alive())))

    def drain(self) -> None:
        """Let the thread take the results that perhaps no other thread takes."""
        for call, _ in [*self.open.values()]:
            call.drain()

    def stop(self, seconds: float | None = None) -> None:
        """Close the connection when all of `work` is done. Joins the thread, for some seconds at most. Idempotent."""
        self.drain()
        self.work.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(seconds)

    def _run(self) -> None:
        """The thread. It looks for nodes while futures are open: threads that wait for futures do not."""
        call: Callable[[], object] | None = bool
        while call is not None:
            self.do(call)
            try:
                call = self.work.get(timeout=self.link.look_seconds)
            except queue.Empty:
                call = next((pool._look for _, pool in [*self.open.values()] if pool._state == RUN), bool)
        self.link.close()
        while not self.work.empty():  # a call that began meanwhile has failed
            self.do(self.work.get() or bool)

    def do(self, call: Callable[..., object], *args: Any) -> None:
        """Call a function. `threading.excepthook` gets its exception, and the thread goes on, even if that raises."""
        try:
            call(*args)
        except BaseException as error:
            with contextlib.suppress(BaseException):
                threading.excepthook(threading.ExceptHookArgs(
                    (type(error), error, error.__traceback__, threading.current_thread())))


class Singles(Sink):
    """The entries of a job in which each chunk is a call (apply, submit): an AsyncResult or a Future.

    :param key: the link keeps the job under it when no entry is left.
    """

    def __init__(self, dispatcher: Dispatcher, job: Job, key: Any) -> None:
        self.job, self.key = job, key
        self.entries: dict[int, Any] = {}  # by chunk
        self._dispatcher = dispatcher
        job.sink = self  # last, because Ctrl-C may come anywhere

    def enter(self, single: Any, letter: Letter) -> None:
        """Put a call into the job. The entry is made last, because Ctrl-C may come anywhere."""
        single.singles, single.number = self, self.job.next
        self.job.enter(Run(single.number, 0, 1, [letter], 1))
        self.entries[single.number] = single

    def wants(self, number: int) -> bool:
        """As Sink says."""
        return number in self.entries

    def put(self, run: Run) -> None:
        """As Sink says."""
        # A lost chunk comes in a run of its own.
        answers: Any = [(self.job, run.status, letter) for letter in run.answers] or [
            (None, 0, mark(run.lost[0], index=0))]
        for number, answer in enumerate(answers, run.first):
            if number in self.entries:
                self.entries.pop(number).answer(answer)
        self._look()

    def leave(self, number: int) -> None:
        """Remove a chunk's entry: its future is cancelled."""
        del self.entries[number]
        self._look()

    def fail(self, error: BaseException) -> None:
        """As Sink says. Each entry gets a fresh exception."""
        for number in [*self.entries]:
            self.entries.pop(number).answer((None, 0, fresh(error)))
        self._look()

    def _look(self) -> None:
        """If no entry is left, let the pool go: the dispatcher has all answers."""
        if not self.entries and self._dispatcher.forget(self.key):
            self._dispatcher.link.keep(self.key, self.job)

    def drain(self) -> None:
        """Do nothing: answers come by themselves."""

    def cancel(self, _: BaseException) -> None:
        """Cancel the futures that were not sent yet. Without the lock."""
        for single in [*self.entries.values()]:
            single.cancel()


class BasePool:
    """The common part of Pool and Executor. Connects; blocks until the server has answered.

    :param host, port, username, secret_key, encrypt, reconnect_seconds: as of `achilles.map`.
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
        self._given = processes
        self._options = {"maxtasksperchild": maxtasksperchild}
        self._context = Context(caller=True)
        letter = None if initializer is None else letter_of(
            dump_function(self._context, (initializer, tuple(initargs)), "the initializer"), "the initializer")
        self._job = partial(Job, self._context, secrets.token_bytes(16), initializer=letter)
        self._letter_of = lru_cache(1)(letter_of)  # the last function: many callers give it again
        self._controller = connect(
            host, port, username, secret_key, encrypt, reconnect_seconds, executor, processes, wait_for_nodes)
        self._dispatcher = Dispatcher(self._controller)
        self._state = RUN

    @property
    def _processes(self) -> int:
        """How many batches may be out, at least 1. Libraries read this."""
        return max(1, self._given or self._controller.workers)

    size = _max_workers = _processes

    def close(self) -> None:
        """Refuse further calls. Open calls are done."""
        if self._state == RUN:
            self._state = CLOSE

    def terminate(self) -> None:
        """Stop all calls, and close the connection: some seconds at most. Missing results become InterruptedError."""
        self._state = TERMINATE
        self._controller.fail_jobs(InterruptedError("the pool was terminated before this was done"))
        self._dispatcher.stop(STOP_SECONDS)

    def join(self) -> None:
        """Block until all calls are done. ValueError before `close` or `terminate`."""
        if self._state == RUN:
            raise ValueError("Pool is still running")
        self._dispatcher.wait()
        self._dispatcher.stop()

    def __del__(self, terminate: str = TERMINATE) -> None:
        """Let the dispatcher close the connection. Takes no lock: any thread runs it at any moment."""
        if self._state != terminate:  # an argument, because the module's names may be gone
            self._dispatcher.work.put(None)

    def _look(self) -> None:
        """Do nothing: a thread that waits for a Pool's result looks for nodes itself. The dispatcher calls this."""

    def _begin(self) -> Dispatcher:
        """Return the dispatcher for a new call, or raise if no call may begin."""
        if self._state != RUN:
            raise self._refusal[0](self._refusal[1])
        self._controller.check_usable()
        return self._dispatcher

    def _submit(self, single: Any, func: Callable[..., Any], args: Iterable[Any], kwds: Mapping[str, Any]) -> Any:
        """Put a call into the job of its function, as an entry of the job's Singles. Return the call."""
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
            link.fill()
        link.push()
        return single

    def _function(self, func: Callable[..., Any], options: Mapping[str, Any]) -> tuple[Any, Letter]:
        """Return the key of a job of this function, and the function's letter.

        Each call dumps the function anew: the objects that it refers to may have changed.
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
        """Begin a mapping call; `taker` takes its results. With `inline`, take all results now.

        :param args: an iterable, or a function that returns `iterable`.
        """
        buffersize, timeout, _ = checked(buffersize=buffersize, timeout=timeout, progress=progress)
        if chunksize is not None and (chunksize < 1 or operator.index(chunksize) < 1):  # a float raises
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
        try:
            with link.lock:
                job = link.take(taker.key, partial(
                    self._job, function, options={**self._options, **options}, sources=taker.key[1]))
                largest = None
                if chunksize is None:
                    wanted = CHUNKS_A_WORKER * self._processes
                    largest = -(-len(args) // wanted) or 1 if isinstance(args, SEQUENCES) else LARGEST_CHUNK
                taker.call = Call(link, job, args, chunksize=operator.index(chunksize or 1), ordered=ordered, flat=True,
                                  buffersize=buffersize, largest=largest, show=show, watchers=[*watchers, taker])
                self._dispatcher.open[taker] = taker, self
            taker.call.start(inline)
            if inline:
                taker.take_all(None)
        except BaseException as error:
            taker.cancel(error)
            raise
