"""The executor of another package instead of a cluster: Dask, MPI, Slurm, or a ProcessPoolExecutor.

The Engine is a Link, as the Controller is. It submits each batch. Without an executor, each batch runs in this process,
in the thread that pushes it: calls inside a worker do that. The module knows `concurrent.futures.Executor` of any
package. The executor alone keeps promises about its processes: lost workers and cancelling.

::

    Link.fill ─post─▶ events ─▶ engine thread: submit(run_batch, …)                … Runner
     ▲ handle_batch ◀──────────────┘  ▲──── Future.add_done_callback ◀──────────────┘

Threads: the engine thread alone submits and takes answers. Any thread posts, and so do the executor's callbacks, under
any of its locks.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from ..controller.job import Job
from ..controller.link import Link
from ..node.runner import Runner
from ..protocol.frames import CAREFUL, TELL, U32, Batch, Gone, Kind, joined, letter_of

__all__ = ["Engine"]

CONTEXTS_KEPT = 8  # in a thread of an executor's process, which no CLOSE reaches


class Engine(Link):
    """Jobs on an `executor`, which stays open; or in place, if `executor` is None."""

    def __init__(self, executor: Executor | None, processes: int | None = None) -> None:
        super().__init__(1 if executor is None else processes)
        self._executor, self.in_place = executor, executor is None
        self.workers = self.largest = 1 if executor is None else _count_workers(executor)
        self._submitted: dict[Future[Any], Batch] = {}  # the engine thread's
        self._events: queue.SimpleQueue[tuple[Callable[..., object], Batch, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="achilles-engine", daemon=True)
        if not self.in_place:
            self._thread.start()

    def start(self, job: Job) -> Job:
        """As Link says. ValueError for an option that only nodes can keep; inside a worker, a warning."""
        for name in {"timeout", "maxtasksperchild"} & job.declaration.keys():
            if not self.in_place:
                raise ValueError(f"only our own nodes can end a call or a worker: {name} is not possible there")
            warnings.warn(f"{name} is not kept in a call inside a worker, which runs in place", RuntimeWarning, 2)
        return super().start(job)

    def close(self) -> None:
        """Cancel the open jobs, and join the thread. Idempotent."""
        self._lost = InterruptedError("the engine was closed")
        self.fail_jobs(self._lost)
        self._events.put(None)
        if self._thread.ident not in (None, threading.get_ident()):
            self._thread.join()

    def post(self, kind: Kind, body: Batch) -> None:
        """As Link says: queue for the engine thread. A JOB is dropped: each batch brings its letters."""
        if kind is not Kind.JOB:
            self._events.put((self._submit if kind is Kind.TASK else self._cancel, body, kind))

    def push(self) -> None:
        """As Link says: in place, run the posted batches."""
        with contextlib.suppress(queue.Empty):
            while self.in_place and (event := self._events.get_nowait()) is not None:
                self._act(*event)

    # In the engine thread; in place, in the thread that pushes.

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            self._act(*event)

    def _act(self, act: Callable[..., object], batch: Batch, more: Any) -> None:
        try:
            act(batch, more)
        except BaseException as error:  # the executor's; the function's are in the answers
            with self.lock:
                if (job := self.jobs.get(batch.job)) is not None:
                    job.sink.fail(error)
            if self.in_place and not isinstance(error, Exception):
                raise

    def _submit(self, batch: Batch, _: Kind) -> None:
        job = self.jobs.get(batch.job)
        if job is None:
            return
        if batch.flags & TELL:
            self.handle_batch(Kind.GIVEN, Batch(batch.job, batch.first, batch.count, batch.attempt, self.workers))
        letters = [bytes(joined(letter)) for letter in (job.function, job.initializer) if letter is not None]
        chunks = [bytes(joined(letter)) for letter in batch.letters()]
        arguments = job.number, job.declaration, letters, batch.first, chunks, bool(batch.flags & CAREFUL)
        if self._executor is not None:
            future = self._executor.submit(run_batch, *arguments)
        else:
            future = Future()
            self.workers, self.processes = self.workers + 1, self.processes + 1  # the function may call this pool
            future.set_result(run_batch(*arguments))
            self.workers, self.processes = self.workers - 1, self.processes - 1
        self._submitted[future] = batch
        future.add_done_callback(lambda done: self._events.put((self._answer, batch, done)))

    def _answer(self, batch: Batch, future: Future[Any]) -> None:
        del self._submitted[future]
        if future.cancelled():
            self.handle_batch(
                Kind.GONE, Batch(batch.job, batch.first, batch.count, batch.attempt, flags=Gone.RETURNED))
        else:
            us, statuses, letters = future.result()
            self.handle_batch(Kind.RESULT, Batch.pack(
                batch.job, batch.first, [*map(letter_of, letters)], attempt=batch.attempt, number=us,
                statuses=statuses))

    def _cancel(self, chunks: Batch, kind: Kind) -> None:
        for future, batch in list(self._submitted.items()):
            if batch.job == chunks.job and (
                    kind is Kind.END or batch.first < chunks.end and chunks.first < batch.end):
                future.cancel()


def run_batch(
    number: int, declaration: dict[str, Any], letters: list[bytes], first: int, chunks: list[bytes], careful: bool
) -> tuple[int, bytes, list[bytes]]:
    """Run a batch in an executor's process, which knows nothing else.

    :param letters: the function's, and perhaps the initializer's.
    :returns: the batch's µs, statuses, and the letters of the answers.
    """
    runner = _alone.runner_of(declaration["context"])
    runner.declare(number, declaration, letters[0], letters[1] if len(letters) > 1 else b"")
    began = time.monotonic_ns()
    answers = [(status, b"".join(parts)) for status, parts in runner.run(number, first, chunks, careful)]
    runner.jobs.pop(number, None)
    return (min(max(1, (time.monotonic_ns() - began) // 1000), U32), bytes(status for status, _ in answers),
            [letter for _, letter in answers])


class _Alone(threading.local):
    """The Runners of this thread, by context: some executors have several threads in a process."""

    def __init__(self) -> None:
        self.runner_of = functools.lru_cache(CONTEXTS_KEPT)(lambda context: Runner())


_alone = _Alone()


def _count_workers(executor: Any) -> int:
    """How many batches the executor says that it runs at a time; else the count of cores."""
    if (nthreads := getattr(getattr(executor, "_client", None), "nthreads", None)) is not None:  # Dask's
        return max(1, int(sum(nthreads().values())))
    told = [getattr(executor, name, None) for name in ("num_workers", "max_workers", "_max_workers")]
    return next((number for number in told if isinstance(number, int) and number > 0), os.cpu_count() or 1)
