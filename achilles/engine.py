"""Somebody else's executor in the place of a cluster: Dask, MPI, Slurm, or a ProcessPoolExecutor.

Takes the Controller's place under a Job, with the server's own scheduler, in this process; each slice is one
`submit`. Knows `concurrent.futures.Executor` and nothing of whose it is. It has no say over that one's
processes: what is promised of lost workers, time limits and cancelling is theirs to keep.

::

    Job ─post─▶ events ─▶ engine thread: Scheduler ─▶ submit(run_slice, …)       … run_slice: Runner
     ▲ answers ◀───────────────┘  ▲───────────────── Future.add_done_callback ◀──────────┘

Threads: the engine's alone touches the scheduler and submits; any thread posts. `lock` guards the jobs.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .channel import PYTHON
from .errors import LetterTooLarge, ServerUnreachable
from .job import Job
from .scheduler import Action, Announce, Give, Scheduler
from .wire import LETTER_LIMIT_BYTES, Kind, Rows

if TYPE_CHECKING:
    from .worker import Runner

__all__ = ["Engine", "run_slice"]

NODE = 0  # the scheduler's number for all of the executor
JOB = 0  # a slice's, in the process that runs it: each slice brings what is to be known of its job
CONTEXTS_KEPT = 8  # in a process of the executor: nobody tells it which are closed
UNSUPPORTED = "an executor that is not ours cannot end a call or a worker: {} is not possible there"

_here = threading.local()  # a Runner and its contexts for each thread that runs slices: some engines have several


class Engine:
    """What a Controller is to its jobs, on somebody else's `executor`, which stays open."""

    connected = True
    letter_limit = LETTER_LIMIT_BYTES

    def __init__(self, executor: concurrent.futures.Executor) -> None:
        self.lock = threading.Lock()
        self._executor = executor
        self._count = _count_workers(executor)
        self._jobs: dict[int, Job] = {}
        self._numbers = itertools.count(1)
        self._scheduler = Scheduler()  # the engine thread's, like the next two
        self._futures: dict[int, set[concurrent.futures.Future[Any]]] = {}  # by job
        self._specs: dict[int, tuple[Any, ...]] = {}  # what a process needs to know of each job
        self._events: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="achilles-engine", daemon=True)
        self._put(self._join)
        self._thread.start()

    def start(self, make: Callable[[Any, int], Job]) -> Job:
        """As `Controller.start`. ValueError for an option that only our own nodes can keep."""
        job = make(self, next(self._numbers))
        for name in ("timeout", "maxtasksperchild"):
            if name in job.options:
                raise ValueError(UNSUPPORTED.format(name))
        self._jobs[job.number] = job
        self._put(self._declare, job)
        job.start()
        return job

    def end(self, job: Job, cancel: bool = False) -> None:
        """As `Controller.end`; what runs, runs to its end."""
        with self.lock:
            job.ended = True
            if self._jobs.pop(job.number, None) is not None:
                self._put(self._end, job.number)
        job.stop()

    def close(self) -> None:
        """Cancel what is open, and join the thread. Idempotent."""
        for job in list(self._jobs.values()):
            job.fail(ServerUnreachable("this engine was closed by its owner"))
            self.end(job, cancel=True)
        self._events.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # What a Job needs of its link.

    def push(self) -> None:
        """What was posted is with the engine's thread already."""

    def post(self, kind: Kind, body: dict[str, Any] | Rows) -> None:
        """TASK and FLUSH are the scheduler's; there is nobody to tell anything else."""
        if isinstance(body, Rows):
            self._put(self._add, body)
        elif kind is Kind.FLUSH:
            self._put(self._flush, body["job"], body["upto"])

    def check_size(self, what: str, size: int) -> None:
        """LetterTooLarge for more than a letter may have."""
        if size > self.letter_limit:
            raise LetterTooLarge(f"{what} has {size:,} bytes; the limit is {self.letter_limit:,} in one piece")

    def workers(self) -> tuple[int, int]:
        """The executor's, as of one node."""
        return self._count, self._count

    def wait_for_workers(self, timeout: float) -> None:
        """They are there."""

    # The engine thread.

    def _put(self, event: Callable[..., None], *args: Any) -> None:
        self._events.put((event, args))

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            event[0](*event[1])

    def _join(self) -> None:
        self._scheduler.join(NODE, PYTHON, self._count)

    def _declare(self, job: Job) -> None:
        self._futures[job.number] = set()
        functions = {each.digest.hex(): bytes(each.letter) for each in (job.initializer, job.function) if each}
        body = {
            "context": job.context_id.hex(), "function": job.function.digest.hex(), "options": job.options,
            "initializer": job.initializer.digest.hex() if job.initializer else None,
        }
        self._specs[job.number] = body, functions
        self._scheduler.declare(job.number, self, PYTHON, job.options.get("processes"), job.context_id)

    def _add(self, rows: Rows) -> None:
        self._carry_out(self._scheduler.add(rows.job, rows))

    def _flush(self, job: int, upto: int) -> None:
        self._carry_out(self._scheduler.flush(job, upto))

    def _end(self, job: int) -> None:
        self._scheduler.end(job)
        del self._specs[job]
        for future in self._futures.pop(job):
            future.cancel()

    def _carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            job = self._jobs.get(action.job)
            if job is None:
                continue
            if isinstance(action, Announce):
                for first, count in action.packets:
                    job.packet(first, count)
            elif isinstance(action, Give):
                for rows in action.rows:
                    self._submit(job, rows)

    def _submit(self, job: Job, rows: Rows) -> None:
        for number, attempt, (_, parts) in zip(rows.slices, rows.attempts, rows.letters()):
            try:
                letter = b"".join(parts)
                future = self._executor.submit(run_slice, self._specs[job.number], number, attempt, letter)
            except Exception as error:  # it is broken, or shut down
                job.fail(error)
                return
            self._futures[job.number].add(future)
            future.add_done_callback(functools.partial(self._put, self._answer, job, number, attempt))

    def _answer(self, job: Job, number: int, attempt: int, future: concurrent.futures.Future[Any]) -> None:
        if job.number not in self._futures:
            return
        self._futures[job.number].discard(future)
        try:
            pace, answers = future.result()
        except BaseException as error:  # not of the user's function: those are in the answers
            job.fail(error)
            return
        for status, letter in answers:
            rows = Rows.single(job.number, number, attempt, status, (letter,), pace=pace)
            _, actions = self._scheduler.answer(NODE, job.number, rows)
            job.answers(rows)
            self._carry_out(actions)


def run_slice(spec: tuple[Any, ...], number: int, attempt: int, letter: bytes) -> tuple[int, list[tuple[int, bytes]]]:
    """In a process of the executor: a slice's pace in µs, and its answers as (status, letter)."""
    body, functions = spec
    runner = _runner(body["context"])
    for digest, function in functions.items():
        if not runner.knows(body["context"], digest):
            runner.keep(function)
    runner.declare({"job": JOB, **body})
    began = time.monotonic_ns()
    failure = runner.prepare(JOB)
    answers = [failure] if failure else runner.attempt(JOB, number, attempt, b"", letter)
    pace = max(1, (time.monotonic_ns() - began) // 1000)
    runner.end(JOB)
    return pace, [(int(status), b"".join(parts)) for status, parts in answers]


def _runner(context: str) -> Runner:
    """This thread's, with room for this context."""
    from .worker import Runner

    if not hasattr(_here, "runner"):
        _here.runner, _here.contexts = Runner([0, 0, 0]), {}
    contexts: dict[str, None] = _here.contexts
    contexts[context] = contexts.pop(context, None)
    while len(contexts) > CONTEXTS_KEPT:
        oldest = next(iter(contexts))
        del contexts[oldest]
        _here.runner.close_context(oldest)
    runner: Runner = _here.runner
    return runner


def _count_workers(executor: Any) -> int:
    """How many slices it can run at a time, if it tells."""
    nthreads = getattr(getattr(executor, "_client", None), "nthreads", None)  # Dask's
    if nthreads is not None:
        return max(1, int(sum(nthreads().values())))
    for name in ("num_workers", "max_workers", "_max_workers"):
        if isinstance(number := getattr(executor, name, None), int) and number > 0:
            return number
    return os.cpu_count() or 1
