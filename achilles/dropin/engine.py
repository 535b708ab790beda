"""Somebody else's executor in the place of a cluster: Dask, MPI, Slurm, or a ProcessPoolExecutor.

Takes the Controller's place under a Job, with the server's own scheduler, in this process; each slice is one
`submit`. Knows `concurrent.futures.Executor` and nothing of whose it is. It has no say over that one's
processes: what is promised of lost workers, time limits and cancelling is theirs to keep.

::

    Job ─post─▶ events ─▶ engine thread: Scheduler ─▶ submit(run_alone, …)       … worker.run_alone: Runner
     ▲ answers ◀───────────────┘  ▲───────────────── Future.add_done_callback ◀──────────┘

An event is a method that returns what is to be done next: the scheduler's own, but for answers. Threads: the
engine's alone touches the scheduler and submits; any thread posts, an executor's while it holds who knows
which locks. `lock` guards the jobs.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any

from ..controller.job import Job, Link
from ..node.worker import run_alone
from ..protocol.channel import PYTHON
from ..protocol.frames import LETTER_LIMIT_BYTES, Kind, Rows
from ..server.scheduler import Action, Announce, Give, Scheduler

__all__ = ["Engine"]

NODE = 0  # the scheduler's number for all of the executor


class Engine(Link):
    """What a Controller is to its jobs, on somebody else's `executor`, which stays open."""

    connected = True

    def __init__(self, executor: Executor) -> None:
        self.lock, self.letter_limit = threading.Lock(), LETTER_LIMIT_BYTES
        self._executor, self._workers = executor, _count_workers(executor)
        self._jobs: dict[int, Job] = {}
        self._numbers, self._scheduler = itertools.count(1), Scheduler()
        self._out: dict[Future[Any], int] = {}  # what the executor has, and of which job
        self._events: queue.SimpleQueue[Callable[[], Iterable[Action] | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="achilles-engine", daemon=True)
        self._put(self._scheduler.join, NODE, PYTHON, self._workers)
        self._thread.start()

    def start(self, make: Callable[[Any, int], Job]) -> Job:
        """As `Controller.start`. ValueError for an option that only our own nodes can keep."""
        job = make(self, next(self._numbers))
        for name in {"timeout", "maxtasksperchild"} & job.options.keys():
            raise ValueError(f"only our own nodes can end a call or a worker: {name} is not possible there")
        self._jobs[job.number] = job
        self._put(self._scheduler.declare, job.number, self, PYTHON, job.options.get("processes"), job.context_id)
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
            self.end(job, cancel=True)
        self._events.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # What a Job needs of its link.

    def post(self, kind: Kind, body: dict[str, Any] | Rows) -> None:
        """TASK and FLUSH are the scheduler's; there is nobody to tell anything else."""
        if isinstance(body, Rows):
            self._put(self._scheduler.add, body.job, body)
        elif kind is Kind.FLUSH:
            self._put(self._scheduler.flush, body["job"], body["upto"])

    def workers(self) -> tuple[int, int]:
        """The executor's, as of one node."""
        return self._workers, self._workers

    # The engine thread.

    def _put(self, event: Callable[..., Iterable[Action] | None], *args: Any) -> None:
        self._events.put(partial(event, *args))

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            try:
                for action in event() or ():
                    job = self._jobs.get(action.job)
                    if job and isinstance(action, Announce):
                        for packet in action.packets:
                            job.packet(*packet)
                    elif job and isinstance(action, Give):
                        self._give(job, action.rows)
            except BaseException as error:  # nobody else would ever end the calls that wait
                logging.getLogger(__name__).exception("the engine failed")
                for each in [*self._jobs.values()]:
                    each.fail(error)

    def _give(self, job: Job, batches: list[Rows]) -> None:
        run = partial(run_alone, job.declaration(), {f.digest.hex(): f.letter for f in job.functions().values()})
        for rows in batches:
            for number, attempt, (_, parts) in zip(rows.slices, rows.attempts, rows.letters()):
                future = self._executor.submit(run, number, attempt, b"".join(parts))  # raises if it is shut down
                self._out[future] = job.number
                future.add_done_callback(partial(self._put, self._answer, job, number, attempt))

    def _answer(self, job: Job, number: int, attempt: int, future: Future[Any]) -> Iterable[Action]:
        del self._out[future]
        try:
            pace, answers = future.result()
        except BaseException as error:  # not of the user's function: those are in the answers
            job.fail(error)
            return
        for status, letter in answers:
            rows = Rows.single(job.number, number, attempt, status, (letter,), pace=pace)
            job.answers(rows)
            yield from self._scheduler.answer(NODE, job.number, rows)[1]

    def _end(self, job: int) -> None:
        self._scheduler.end(job)
        for future in [each for each, its_job in self._out.items() if its_job == job]:
            future.cancel()


def _count_workers(executor: Any) -> int:
    """How many slices it can run at a time, if it tells."""
    if (nthreads := getattr(getattr(executor, "_client", None), "nthreads", None)) is not None:  # Dask's
        return max(1, int(sum(nthreads().values())))
    told = [getattr(executor, name, None) for name in ("num_workers", "max_workers", "_max_workers")]
    return next((number for number in told if isinstance(number, int) and number > 0), os.cpu_count() or 1)
