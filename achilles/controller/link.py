"""Link: the jobs of one connection, and the batches of them that are out.

Knows jobs, and how many batches may be out; knows no socket. The Controller is a Link over a server
(connection.py), the Engine one over somebody else's executor (dropin/engine.py).

::

    feeder: enter ─▶ fill ─▶ post JOB, TASK           reader: answered, gone, given ─▶ fill ─▶ post TASK
                      │ fewer than 2 * workers + 2 batches are out, or than `processes`; jobs take turns

One lock, `lock`, guards everything of a connection: its jobs, their chunks, results and windows. It is held for no
system call and while no code of a user runs, but for signal handlers and `__del__`. Either may end a pool in the thread
that holds the lock, so it is an RLock.
"""

from __future__ import annotations

import functools
import json
import operator
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from ..config import Settings
from ..errors import ServerUnreachable
from ..objects.outcomes import fresh
from ..protocol.frames import U32, Batch, Kind, Letter, LongLetter, Status
from .job import Job
from .pace import worth_of
from .results import NOBODY

__all__ = ["KEPT_BYTES", "KEPT_JOBS", "Link"]

AHEAD = 2  # batches for each worker: one runs, the next is there when it ends; and two are under way
KEPT_JOBS, KEPT_BYTES = 16, 256 << 20  # jobs that owe nothing stay open for the next call of their function


class Link:
    """Jobs and batches. `processes` batches may be out; None means as many as the workers can take."""

    connected = True  # whether batches may be posted
    workers = largest = 0  # that can run this caller's functions: of the cluster, and of its largest node
    look_seconds = 1.0  # how often a waiting call calls `look`; also how Ctrl-C gets through on Windows
    settings: Settings | None = None  # of the server, where there is one
    in_place = False  # batches run where they are pushed: in the thread that takes their results
    forked = False  # this process is a child of the caller's: threads and connections are the parent's
    _lost: BaseException | None = None  # why no job can be started any more

    def __init__(self, processes: int | None = None) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)  # the cluster or the connection has changed
        self.processes = processes or U32
        self.jobs: OrderedDict[int, Job] = OrderedDict()  # the next to send a batch first
        self._numbers = 0
        self._worth_us = 0.0  # of the last batch, of whichever job
        self._contexts: set[str] = set()  # their initializers, and sets of sources, went over this connection
        self._kept: dict[Any, Job] = {}  # jobs that owe nothing, by function and options; the longest unused first
        _of_this_process().add(self)

    def post(self, kind: Kind, body: Batch) -> None:
        """Send a frame soon: `push` does. Needs `lock`."""

    def push(self) -> None:
        """Send the frames that were posted. Without `lock`."""

    def look(self) -> None:
        """No result came for `look_seconds`. NoNodesError if there was no node for too long. Any thread."""

    # Jobs: any thread, with `lock`.

    def start(self, job: Job) -> Job:
        """Give a job its number. It is declared just before its first batch."""
        self.check_usable()
        sources = job.declaration.get("sources")
        for key in [key for key, kept in self._kept.items() if kept.declaration.get("sources") != sources]:
            self.end(self._kept.pop(key))  # a file has changed: nobody will ask for the old set
        self._numbers += 1
        job.number = self._numbers
        self.jobs[job.number] = job
        return job

    def check_usable(self) -> None:
        """Raise why no job can be started, an exception of its own for each caller."""
        if self._lost is not None:
            raise fresh(self._lost)

    def take(self, key: Any, make: Callable[[], Job]) -> Job:
        """The job that was kept under `key`, or the new one that `make` returns."""
        self.check_usable()
        job = self._kept.pop(key, None)
        return self.start(make()) if job is None else job

    def keep(self, key: Any, job: Job) -> None:
        """A job that owes nothing may serve the next call with this key. Others are ended."""
        if job.spent or job.owes or key in self._kept:
            self.end(job)
            return
        job.sink = NOBODY
        self._kept[key] = job
        while len(self._kept) > KEPT_JOBS or (
                len(self._kept) > 1 and sum(len(each.function) for each in self._kept.values()) > KEPT_BYTES):
            self.end(self._kept.pop(next(iter(self._kept))))

    def end(self, job: Job) -> None:
        """The job is over: chunks that wait are dropped, and chunks that run are stopped. Idempotent."""
        job.spent = True
        if self.jobs.pop(job.number, None) is None:
            return
        job.out.clear()
        job.waiting.clear()
        if job.declared:
            self.post(Kind.END, Batch(job.number))
            sources = job.declaration.get("sources")  # the last job of a set closes it, here as there
            if all(other.declaration.get("sources") != sources for other in self.jobs.values() if other.declared):
                self._contexts.discard(sources)
        self.fill()

    def leave_to_parent(self) -> None:
        """In a child of the caller: all is the parent's. Takes no lock; its holder may not exist."""
        jobs = self.jobs
        Link.__init__(self, self.processes)
        self.forked = True
        self._lost = ServerUnreachable("this connection belongs to the parent process; open one after the fork")
        for job in jobs.values():
            job.sink.error = self._lost

    def fail_jobs(self, error: BaseException) -> None:
        """Tell every call, and end its job. Takes `lock`."""
        with self.lock:
            for job in list(self.jobs.values()):
                job.sink.fail(error)
                self.end(job)
            self._kept.clear()

    def cancel(self, job: Job, number: int) -> None:
        """Stop a chunk that is out. GONE says that it is not, and the job does not send it again."""
        self.post(Kind.CANCEL, Batch(job.number, number, 1))

    # Batches, with `lock`.

    def fill(self) -> None:
        """Make batches of the chunks that wait, as long as there is room for batches. Jobs take turns.

        Ctrl-C may end this anywhere, in the caller's thread: no chunk of another call must be lost by that. One that
        was posted and not noted is sent again; an answer to the attempt that nobody knows is ignored.
        """
        turns = deque([job for job in self.jobs.values() if job.waiting])
        if not turns or not self.connected:
            return
        workers = min(self.workers, self.processes)
        most = min(AHEAD * self.workers + 2, self.processes)
        out = sum([len(job.out) for job in self.jobs.values()])
        while turns and out < most:
            job = turns.popleft()
            if out >= workers and job.is_little():
                continue  # every worker has a batch: more chunks join these until a batch is done
            self.jobs.move_to_end(job.number)
            self._worth_us = worth_of(self._worth_us, late=out < workers, few=self.processes < U32)
            if not job.declared:
                self._declare(job)
            job.send_batch(self.post, self._worth_us, workers)
            out += 1
            if job.waiting:
                turns.append(job)

    def forget_connection(self) -> None:
        """The connection is lost: everything that was out waits again."""
        self._contexts.clear()
        for job in self.jobs.values():
            job.forget_connection()

    def _declare(self, job: Job) -> None:
        """JOB, with the initializer and the sources where the server has not had them."""
        job.declared = True
        declaration = job.declaration
        parts: list[Letter] = [json.dumps(declaration, separators=(",", ":")).encode(), job.function, b"", b""]
        names = declaration["context"], declaration.get("sources")
        for place, (name, letter) in enumerate(zip(names, (job.initializer, job.sources)), 2):
            if letter is not None and name not in self._contexts:
                self._contexts.add(name)
                parts[place] = letter
        self.post(Kind.JOB, Batch.pack(job.number, 0, parts))

    # Frames that came: the reader thread, without `lock`.

    def handle_batch(self, kind: Kind, batch: Batch) -> None:
        """A RESULT, GONE, GIVEN or OUTPUT. Ignored if its job is over."""
        letters = batch.letters() if kind is Kind.RESULT else []
        if batch.longs:
            batch.statuses = bytes(
                Status.ALTERED if isinstance(letter, LongLetter) and not letter.whole() else status
                for status, letter in zip(batch.statuses, letters))
        with self.lock:
            job = self.jobs.get(batch.job)
            if job is None:
                return
            if kind is Kind.GIVEN:
                whole = (run := job.out.get(batch.attempt)) is not None and run.end == batch.end
                job.sink.give(batch.first, batch.count if whole else 0, batch.number, job.next)
            elif kind is Kind.RESULT:
                job.answered(batch, letters)
            elif kind is Kind.OUTPUT:
                job.printed(batch)
            else:
                job.gone(batch)
            self.fill()


@functools.cache
def _of_this_process() -> weakref.WeakSet[Link]:
    """The links that are left to the parent where this process forks."""
    links: weakref.WeakSet[Link] = weakref.WeakSet()
    if hasattr(os, "register_at_fork"):
        # A list: where the collector runs meanwhile, it takes links out of the set.
        os.register_at_fork(after_in_child=lambda: [*map(operator.methodcaller("leave_to_parent"), list(links))])
    return links
