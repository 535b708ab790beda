"""Link: the jobs of one connection, and the batches of them that are out.

Knows jobs, and how many batches may be out; knows no socket. The Controller is a Link over a server
(connection.py), the Engine one over somebody else's executor (dropin/engine.py).

::

    feeder: enter ─▶ fill ─▶ post JOB, TASK           reader: answered, gone, given ─▶ fill ─▶ post TASK
                      │ fewer than 2 * workers + 2 batches are out, or than `processes`; jobs take turns

One lock, `lock`, guards everything of a connection: its jobs, their chunks, results and windows. It is held for no
system call and while no code of a user runs.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from ..errors import LetterTooLarge
from ..objects.outcomes import fresh
from ..protocol import frames
from ..protocol.frames import Batch, Kind, Letter, LongLetter, Status
from .job import Job
from .pace import Worth
from .results import PacketResults, Results

__all__ = ["KEPT_BYTES", "KEPT_JOBS", "Link"]

AHEAD = 2  # batches for each worker: one runs, the next is there when it ends; and two are under way
KEPT_JOBS, KEPT_BYTES = 16, 256 << 20  # jobs that owe nothing stay open for the next call of their function


class Link:
    """Jobs and batches. `processes` is how many batches may be out, None for what the workers can take."""

    connected = True
    _lost: BaseException | None = None  # why no job can be started any more

    def __init__(self, processes: int | None = None) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)  # the cluster or the connection has changed
        self.processes = processes
        self.jobs: dict[int, Job] = {}
        self._numbers = 0
        self._out = 0  # batches
        self._worth = Worth(few=processes is not None)
        self._turns: deque[Job] = deque()  # jobs with chunks that wait
        self._contexts: set[str] = set()  # their initializers went over this connection
        self._kept: dict[Any, Job] = {}  # jobs that owe nothing, by what they are; the longest unused first

    def post(self, kind: Kind, body: Batch) -> None:
        """Send a frame soon: `push` does. Needs `lock`."""
        raise NotImplementedError

    def push(self) -> None:
        """Send what was posted. Without `lock`."""

    def workers(self) -> tuple[int, int]:
        """Workers of the cluster that can run this caller's functions, and those of the largest node."""
        raise NotImplementedError

    def check_size(self, name: str, size: int) -> None:
        """LetterTooLarge if a letter of `size` bytes may not travel."""
        if size > frames.LETTER_LIMIT_BYTES:
            limit = frames.LETTER_LIMIT_BYTES
            raise LetterTooLarge(f"{name} has {size:,} bytes, no more than {limit:,} travel in one piece")

    # Jobs: any thread, with `lock`.

    def start(self, job: Job) -> Job:
        """Give a job its number. It is declared just before its first batch."""
        self.check_usable()
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
        """A job that owes nothing may serve the next call with this key. Others are ended for it."""
        if job.spent or job.owes or self.jobs.get(job.number) is not job:
            self.end(job)
            return
        job.sink = None
        other = self._kept.pop(key, None)
        if other is not None:
            self.end(other)
        self._kept[key] = job
        while len(self._kept) > KEPT_JOBS or (
                len(self._kept) > 1 and sum(len(each.function) for each in self._kept.values()) > KEPT_BYTES):
            self.end(self._kept.pop(next(iter(self._kept))))

    def end(self, job: Job) -> None:
        """The job is over: what waits is dropped, and what runs is stopped. Idempotent."""
        job.ended = True
        if self.jobs.pop(job.number, None) is None:
            return
        self._out -= len(job.out)
        job.out.clear()
        job.waiting.clear()
        job.queued = 0
        if job.declared:
            self.drop(job)
            self.post(Kind.END, Batch(job.number))
        self.fill()

    def fail_jobs(self, error: BaseException) -> None:
        """Tell every call. Needs `lock`."""
        for job in list(self.jobs.values()):
            if job.sink is not None:
                job.sink.fail(error)

    def drop(self, job: Job, first: int = 0, end: float = float("inf")) -> None:
        """Take what is posted and not sent of these chunks back."""

    def cancel(self, job: Job, number: int) -> None:
        """Stop a chunk that is out. GONE says that it is not, and the job does not send it again."""
        self.post(Kind.CANCEL, Batch(job.number, number, 1))

    # Batches, with `lock`.

    def queue(self, job: Job) -> None:
        """The job has chunks that wait."""
        if job not in self._turns:
            self._turns.append(job)
        self.fill()

    def fill(self) -> None:
        """Make batches, as long as there is room for them."""
        if not self._turns or not self.connected:
            return
        workers = self.workers()[0]
        most = AHEAD * workers + 2
        if self.processes is not None:
            most, workers = min(most, self.processes), min(workers, self.processes)
        while self._out < most and self._turns:
            job = self._turns.popleft()
            if not job.waiting or job.ended:
                continue
            if self._out >= workers and job.pace.is_little(job.queued * job.waiting[0].size):
                self._turns.append(job)  # every worker has something: more chunks join these until one is done
                return
            self._worth.judge(late=self._out < workers)
            batch = job.next_batch(self._worth.us, workers)
            if job.waiting:
                self._turns.append(job)
            if not job.declared:
                self._declare(job)
            self.post(Kind.TASK, batch)
            self._out += 1

    def cluster_changed(self) -> None:
        """There may be room for more batches, and in the windows."""
        self.fill()
        for job in self.jobs.values():
            if isinstance(job.sink, Results):
                job.sink.room.notify_all()

    def forget_connection(self) -> None:
        """The connection is lost: everything that was out waits again."""
        self._out = 0
        self._contexts.clear()
        for job in self.jobs.values():
            job.forget_connection()
        self._turns = deque(job for job in self.jobs.values() if job.waiting)

    def _declare(self, job: Job) -> None:
        """JOB, with the initializer where the server has not had it."""
        job.declared = True
        declaration = job.declaration()
        parts: list[Letter] = [json.dumps(declaration, separators=(",", ":")).encode(), job.function]
        if job.initializer is not None and job.context_id not in self._contexts:
            self._contexts.add(job.context_id)
            parts.append(job.initializer)
        batch = Batch.pack(job.number, 0, parts)
        batch.declaration = declaration  # as if it had been read
        self.post(Kind.JOB, batch)

    # What came: the reader thread, without `lock`.

    def handle_batch(self, kind: Kind, batch: Batch) -> None:
        """A RESULT, GONE or GIVEN. Ignored if its job is over."""
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
                if isinstance(job.sink, PacketResults):
                    job.sink.give(batch.first, batch.count, batch.number, job.next)
                return
            over = job.answered(batch, letters) if kind is Kind.RESULT else job.gone(batch)
            self._out -= over
            if job.waiting and job not in self._turns:
                self._turns.append(job)
            self.fill()
