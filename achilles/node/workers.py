"""How a node starts, feeds, watches and ends its workers.

Knows processes, the socket pair to each, and which slices each has; knows no
server: what is to be told goes to `send`, as RESULT and RETURNED. It never
loads a letter, and opens none but a function's, to check its digest.

::

    TASK ─▶ queue of the job ──feed──▶ worker: at most two messages ──RESULT──▶ send
                ▲                         │ died: status array     ──▶ DIED, one slice, charged
                │                         │ killed by us           ──▶ TIMEOUT, one slice, or nothing
                └─ over a MiB of letters ─┴ all its other slices   ──▶ RETURNED
                                            or what it has left of a message that turns out to be slow

A message is slices of one job that travel together: as many as 5 ms are worth
by the job's slowest of late, and no more than a fair share. A worker whose job
has an initializer or counts tasks belongs to that context until CLOSE, or until
another needs it more, and is then replaced; the others change context when
idle, the least served first. A death is seen in `exitcode`, which alone tells
the truth: sentinel and end of file wait for the worker's own children, too.

Everything runs in the one thread of the node's loop: the loop calls `turn`, and
the selector's entries carry the function to call in `data`. No locks.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import selectors
import socket
import sys
import threading
import time
import types
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import multiprocess

from ..errors import AchillesError, ProtocolError
from ..protocol import frames
from ..protocol.channel import Channel
from ..protocol.frames import ASKED, LETTER_LIMIT_BYTES, MAX_ROWS, MAX_SHORT_BYTES, MORE, Kind, Rows, Status
from . import worker as process_of_worker
from .backlog import Backlog
from .worker import CALL, IDLE, PHASES, START, Closeable

__all__ = ["Workers", "pump"]

LOOK_SECONDS = 0.05  # how often exits, time limits and cancels are looked at: a death is known within 100 ms
MESSAGES = 2  # unanswered, a worker: one runs, the next is there when it ends
CANCEL_SECONDS = 0.5  # for a cancelled job's running slice to end by itself
RETIRE_SECONDS = 2.0  # for a worker to end by itself, its exit handlers included
SHARE_SECONDS = 1.0  # so long may a worker belong to a context that is busy while another one has none, or idle, ...
KEEP_SECONDS = 60.0  # ... or so long, if the idle context has no more workers than others
START_SECONDS, MAX_START_SECONDS = 0.1, 5.0  # pauses after workers that died before they were ready
STOP_SECONDS = 5.0  # for killed workers to be gone
SOCKET_BYTES = 1 << 20  # buffer of a worker's socket pair: fewer switches for a large letter

log = logging.getLogger(__name__)


class _Worker:
    """One worker process, as its node sees it."""

    def __init__(self, process: Any, channel: Channel, status: Any) -> None:
        self.process = process
        self.channel = channel
        self.status: Sequence[int] = status  # slice, position, phase
        self.watched = True  # in the selector: until end of file
        self.context: str | None = None  # of its last message
        self.owner: str | None = None  # the context that it belongs to until CLOSE
        self.tasks_left: int | None = None  # maxtasksperchild
        self.retiring = False  # gets nothing more and ends by itself
        self.killed = False  # by us: nothing is charged, but ...
        self.overdue: tuple[int, int] | None = None  # ... the slice and position that ran too long
        self.known: set[tuple[str, str]] = set()  # (context, digest) of the functions it was sent
        self.jobs: set[int] = set()  # that it was told of
        self.messages: deque[tuple[Backlog, Rows]] = deque()  # not answered whole, the oldest first
        self.answered = 0  # slices of the oldest
        self.since = time.monotonic()  # it began what it is at, or ended what it had
        self.owned_at = 0.0  # it got its owner
        self.seen: tuple[int, ...] = ()  # status when it was last looked at, and ...
        self.seen_at = 0.0  # ... when it became so
        self.done = 0  # slices answered in all

    @property
    def usable(self) -> bool:
        """Whether it may get messages."""
        return not (self.retiring or self.killed or not self.watched)

    def advance(self, rows: Rows) -> Backlog:
        """Take note of a RESULT; the job it is of. ProtocolError if these slices are not the next ones."""
        job = self.messages[0][0] if self.messages else None
        for number, status in zip(rows.slices, rows.statuses):
            if not self.messages or self.messages[0][1].slices[self.answered] != number:
                raise ProtocolError(f"worker {self.process.pid} answers a slice that it was not given")
            if not status & MORE:
                self.answered += 1
                self.done += 1
                if self.answered == len(self.messages[0][1]):
                    self.messages.popleft()
                    self.answered = 0
        if job is None or job.number != rows.job:
            raise ProtocolError(f"worker {self.process.pid} answers a job that it was not given")
        return job

    def unanswered(self) -> list[tuple[Backlog, Rows]]:
        """What it still has, the oldest first."""
        starts = (self.answered, *repeat(0, len(self.messages)))
        return [(job, rows.cut(start, len(rows))) for start, (job, rows) in zip(starts, self.messages)]

    def give_back(self, rows: Rows) -> list[tuple[Backlog, Rows]]:
        """Take note of a RETURNED; of which messages these slices are. ProtocolError if they are not the next ones."""
        left, back = self.unanswered(), []
        slices = rows.slices
        while slices and left and left[0][0].number == rows.job and slices[: len(left[0][1])] == left[0][1].slices:
            back.append(left.pop(0))
            slices = slices[len(back[-1][1]) :]
            self.messages.popleft()
            self.answered = 0
        if slices:
            raise ProtocolError(f"worker {self.process.pid} gives back slices that it was not given")
        if self.tasks_left is not None:
            self.tasks_left += len(rows)
        return back

    def retire(self) -> None:
        """Let it end when it has done what it has."""
        self.retiring = True
        self.channel.finish()


class Workers:
    """All workers of a node, for one connection to its server.

    :param count: how many are kept alive.
    :param method: "fork", "forkserver" or "spawn".
    :param selector: the loop's; `data` of an entry is called with the events.
    :param send: takes RESULT and RETURNED with their rows.
    :param node: the node's id, for what is said of the dead.
    :param inherited: what else of the node's a forked worker must close.
    """

    def __init__(
        self, count: int, method: str, selector: selectors.BaseSelector, send: Callable[[Kind, Rows], None], *,
        node: int = 0, inherited: Sequence[Closeable] = (), letter_limit: int = LETTER_LIMIT_BYTES,
    ) -> None:
        self._count = count
        self._method = method
        self._selector = selector
        self._send = send
        self._node = node
        self._inherited = inherited
        self._limit = letter_limit
        self._workers: list[_Worker] = []
        self._functions: dict[str, Rows] = {}  # by digest in hex: the cache that the server's connection fills
        self._jobs: dict[int, Backlog] = {}
        self._cancelled: set[int] = set()  # jobs, known or not, until END
        self._used: dict[str, float] = {}  # seconds of work that each context has had
        self._draining = False
        self._look_at = 0.0  # monotonic
        self._pause = 0.0  # before the next start, after workers that died before they were ready
        self._start_at = 0.0

    @property
    def busy(self) -> bool:
        """Whether any worker has slices."""
        return any(worker.messages for worker in self._workers)

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.process.pid for worker in self._workers]

    # What the server says.

    def keep(self, rows: Rows) -> None:
        """FUNCTION: keep it under its digest. ProtocolError if it is not what its digest says."""
        (claimed, letter), = rows.letters()
        digest = frames.digest(letter)
        if claimed and not hmac.compare_digest(claimed, digest):
            raise ProtocolError("a function does not match its digest: it was altered on the way")
        self._functions[digest.hex()] = rows

    def forget(self, digest: str) -> None:
        """FORGET: drop a function, here and in workers."""
        self._functions.pop(digest, None)
        for worker in self._workers:
            if known := {pair for pair in worker.known if pair[1] == digest}:
                worker.known -= known
                worker.channel.send(Kind.FORGET, {"function": digest})

    def declare(self, body: dict[str, Any]) -> None:
        """JOB: get ready for its slices. ProtocolError if its functions did not come before."""
        job = Backlog(body)
        if not all(digest in self._functions for digest in job.functions):
            raise ProtocolError(f"job {job.number} names a function that was not sent")
        if job.number not in self._cancelled:
            self._jobs[job.number] = job
            self._used.setdefault(job.context, min(self._used.values(), default=0.0))

    def add(self, rows: Rows) -> None:
        """TASK: queue slices. ProtocolError if their job is not known."""
        if rows.job in self._cancelled:
            return
        if rows.job not in self._jobs:
            raise ProtocolError(f"slices of job {rows.job}, which was not declared")
        if self._draining:
            self._send(Kind.RETURNED, rows.bare())
        else:
            self._jobs[rows.job].put(rows)

    def recall(self, number: int, count: int) -> None:
        """RECALL: give back up to `count` slices that no worker has, the last ones first; perhaps none."""
        job = self._jobs.get(number)
        tables = [rows.bare().table for rows in (job.take_last(count) if job else ())]
        self._send(Kind.RETURNED, Rows(number, b"".join(tables), pace=ASKED))

    def cancel(self, number: int) -> None:
        """CANCEL: drop what is queued; a worker that is still at it after half a second is replaced."""
        self._cancelled.add(number)
        if number in self._jobs:
            self._jobs[number].drop()

    def end(self, number: int) -> None:
        """END: forget the job, as if it had been cancelled if it still runs here."""
        self._cancelled.discard(number)
        if number in self._jobs:
            self._jobs.pop(number).drop()
        for worker in self._workers:
            if number in worker.jobs:
                worker.jobs.discard(number)
                worker.channel.send(Kind.END, {"job": number})

    def close_context(self, context: str) -> None:
        """CLOSE: workers drop the context; those that belong to it are replaced."""
        self._used.pop(context, None)
        for worker in self._workers:
            if known := {pair for pair in worker.known if pair[0] == context}:
                worker.known -= known
                worker.channel.send(Kind.CLOSE, {"context": context})
            if worker.owner == context:
                worker.retire()

    def drain(self) -> None:
        """Give back what no worker has, now and whatever still comes."""
        self._draining = True
        for job in self._jobs.values():
            while rows := job.take(MAX_ROWS):
                self._send(Kind.RETURNED, rows.bare())

    # The loop.

    def turn(self, woken: bool = False) -> None:
        """Everything that is not an answer: exits, limits, starts, and who gets what. Does not block.

        :param woken: a child may have died: look now, and not only every 50 ms.
        """
        now = time.monotonic()
        if look := woken or now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._look(now)
        if any(job.queued for job in self._jobs.values()):
            self._feed()
            if look:
                self._make_way(now)  # for what is left
        for worker in self._workers:
            if worker.watched and worker.channel.wants_write:
                self._write(worker)

    def stop(self) -> None:
        """Kill all workers, and wait until they are gone: 5 s at most."""
        for worker in self._workers:
            worker.process.kill()
        deadline, pause = time.monotonic() + STOP_SECONDS, threading.Event()
        while any(worker.process.exitcode is None for worker in self._workers) and time.monotonic() < deadline:
            pause.wait(0.005)
        while self._workers:
            self._remove(self._workers[-1])

    def _look(self, now: float) -> None:
        for worker in list(self._workers):
            if worker.process.exitcode is not None:
                self._bury(worker, now)
            elif not worker.killed and self._must_die(worker, now):
                worker.killed = True
                worker.process.kill()
        self._fill(now)

    def _must_die(self, worker: _Worker, now: float) -> bool:
        """Whether it is at what was cancelled, runs over its job's time limit, or does not end."""
        seen = (worker.done, *worker.status)
        if seen != worker.seen:
            worker.seen, worker.seen_at = seen, now
        if not worker.messages:
            return worker.retiring and now - worker.since > RETIRE_SECONDS
        job = worker.messages[0][0]
        if job.cancelled_at is not None:
            return now - job.cancelled_at > CANCEL_SECONDS
        _, number, position, phase = seen
        if job.timeout is not None and phase == CALL and now - worker.seen_at > job.timeout:
            worker.overdue = (number, position)
        return worker.overdue is not None

    def _make_way(self, now: float) -> None:
        """For what no worker may run, one that belongs to another context is replaced.

        At once for a context that has none, even a busy one if it has served its second. A context that has some
        gets one that is idle: it may have cost its pool much to set up, and pools often take turns.
        """
        waiting = {job.context for job in self._jobs.values() if job.queued}
        coming = any(not worker.usable and not worker.messages for worker in self._workers)  # a new one in its place
        if not waiting or coming or len(self._workers) < self._count:
            return
        idle = [worker for worker in self._workers if not worker.messages]
        owned = Counter(worker.owner for worker in self._workers if not worker.killed)
        if None in owned or waiting <= owned.keys():
            part = self._count // len((waiting | owned.keys()) - {None})
            keep = {owner: SHARE_SECONDS if number > part else KEEP_SECONDS for owner, number in owned.items()}
            free = [worker for worker in idle if now - worker.since > keep[worker.owner]]
        else:
            free = idle or [w for w in self._workers if w.usable and now - w.owned_at > SHARE_SECONDS]
        if free:
            min(free, key=lambda worker: (len(worker.messages), -worker.since)).retire()

    # Feeding.

    def _feed(self) -> None:
        """Give out what is queued: idle workers first, then second messages."""
        for depth in range(MESSAGES):
            for worker in self._workers:
                if len(worker.messages) == depth and worker.usable and (job := self._choose(worker)):
                    self._give(worker, job)

    def _choose(self, worker: _Worker) -> Backlog | None:
        """The job of the least served context that this worker may run now; jobs of a context take turns."""
        waiting = (j for j in self._jobs.values() if j.queued and worker.owner in (None, j.context))
        job = min(waiting, key=lambda job: self._used.get(job.context, 0.0), default=None)
        if job and worker.messages and (worker.context != job.context or min(job.worth(), job.queued) < 2):
            return None
        return job

    def _give(self, worker: _Worker, job: Backlog) -> None:
        """One message."""
        share = -(-job.queued // (MESSAGES * self._count))
        limit = worker.tasks_left if worker.tasks_left is not None else job.tasks or MAX_ROWS
        rows = job.take(min(job.worth(), share, limit))
        if rows is None:
            return
        self._introduce(worker, job)
        worker.channel.send(Kind.TASK, rows)
        worker.messages.append((job, rows))
        self._jobs[job.number] = self._jobs.pop(job.number)  # the others of its context are next
        if job.tasks is not None:
            worker.tasks_left = limit - len(rows)
            if not worker.tasks_left:
                worker.retire()

    def _introduce(self, worker: _Worker, job: Backlog) -> None:
        """Tell a worker of a job, and send the functions that it has not had in this context."""
        if not worker.messages:
            worker.since = time.monotonic()
        for digest in job.functions:
            if (job.context, digest) not in worker.known:
                worker.known.add((job.context, digest))
                worker.channel.send(Kind.FUNCTION, self._functions[digest])
        if job.number not in worker.jobs:
            worker.jobs.add(job.number)
            worker.channel.send(Kind.JOB, job.body)
        worker.context = job.context
        if worker.owner is None and (len(job.functions) > 1 or job.tasks is not None):
            worker.owner, worker.owned_at = job.context, worker.since

    # One worker.

    def _fill(self, now: float) -> None:
        """Start the workers that are missing."""
        while len(self._workers) < self._count and now >= self._start_at:
            try:
                self._start()
            except OSError as e:  # no process or descriptor to be had
                log.error("a worker could not be started: %s", e)
                self._hold_back(now)

    def _hold_back(self, now: float) -> None:
        self._pause = min(max(2 * self._pause, START_SECONDS), MAX_START_SECONDS)
        self._start_at = now + self._pause

    def _start(self) -> None:
        context = multiprocess.get_context(self._method)
        status = context.RawArray("q", 3)
        ours, theirs = socket.socketpair()
        with theirs:
            channel = Channel(ours, "WN", letter_limit=self._limit)
            worker = _Worker(None, channel, status)
            others = (channel.socket, *(w.channel.socket for w in self._workers), self._selector, *self._inherited)
            worker.process = context.Process(
                target=process_of_worker.main, name="achilles-worker", daemon=True,
                args=(theirs, status, self._limit, None if self._method == "forkserver" else os.getpid(),
                      others if self._method == "fork" else (), self._node),
            )
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
            with _without_main():
                worker.process.start()
        channel.name = f"worker {worker.process.pid}"
        ours.setblocking(False)
        self._selector.register(ours, selectors.EVENT_READ, lambda events: self._serve(worker, events))
        self._workers.append(worker)

    def _serve(self, worker: _Worker, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._write(worker)
        if events & selectors.EVENT_READ and worker.watched and not self._read(worker):
            self._unwatch(worker)

    def _write(self, worker: _Worker) -> None:
        try:
            pump(self._selector, worker.channel)
        except OSError:  # it is dying: what it wrote before is read when it is buried
            self._unwatch(worker)

    def _read(self, worker: _Worker) -> bool:
        """Take what it wrote; False when nothing will come any more."""
        try:
            frames = worker.channel.receive()
            for kind, rows in frames or ():
                (self._answered if kind is Kind.RESULT else self._given_back)(worker, rows)
        except (OSError, AchillesError) as e:
            log.log(logging.DEBUG if worker.killed else logging.WARNING, "%s: %s", worker.channel.name, e)
            return False
        return frames is not None

    def _answered(self, worker: _Worker, rows: Rows) -> None:
        job, now = worker.advance(rows), time.monotonic()
        if job.context in self._used:
            self._used[job.context] += now - worker.since
        worker.since = now
        self._pause = 0.0
        if job.cancelled_at is None:
            job.judge(rows)
            self._send(Kind.RESULT, rows)

    def _given_back(self, worker: _Worker, rows: Rows) -> None:
        """RETURNED: what it had of this job, and has not begun, since a slice before it took long."""
        left = worker.give_back(rows)
        for job, rest in reversed(left):
            self._take_back(job, rest)

    def _unwatch(self, worker: _Worker) -> None:
        """Its socket is of no more use, nor is it, unless it is on its way out."""
        if worker.watched:
            worker.watched = False
            self._selector.unregister(worker.channel.socket)
        if not worker.retiring:
            worker.process.kill()

    def _bury(self, worker: _Worker, now: float) -> None:
        """A worker has ended: pass on what it wrote, charge one slice at most, take the others back."""
        while _has_more(worker.channel.socket) and self._read(worker):
            pass
        number, status, note = self._blame(worker, now)
        left = worker.unanswered()
        self._remove(worker)
        for job, rows in reversed(left):
            if job is left[0][0] and number in rows.slices:  # what it runs is of the job that it has had longest
                at = rows.slices.index(number)
                if job.cancelled_at is None:
                    self._send(Kind.RESULT, Rows.single(job.number, number, rows.attempts[at], status, [note], pace=1))
                self._take_back(job, rows.cut(at + 1, len(rows)))
                rows = rows.cut(0, at)
            self._take_back(job, rows)

    def _take_back(self, job: Backlog, rows: Rows) -> None:
        """Slices that go to another worker, as if they had not been given to this one.

        The server knows where one is idle. Only large ones are not worth the way there and back.
        """
        if not rows or job.cancelled_at is not None:
            return
        if rows.size() > MAX_SHORT_BYTES and not self._draining:
            job.put(rows, back=True)
        else:
            self._send(Kind.RETURNED, rows.bare())

    def _blame(self, worker: _Worker, now: float) -> tuple[int, Status, bytes]:
        """The slice under which this worker ended, -1 if that is none's fault; RESULT's status and letter for it."""
        (number, position, phase), status = worker.status, Status.DIED
        pid, exitcode = worker.process.pid, worker.process.exitcode
        if worker.overdue:
            (number, position), phase, status = worker.overdue, CALL, Status.TIMEOUT
        elif worker.killed or phase in (START, IDLE):
            number = -1
        if not worker.killed and not worker.retiring:
            log.warning("worker %d ended with %s in phase %s", pid, exitcode, PHASES[phase])
        if phase == START and not worker.killed:
            self._hold_back(now)
        note = {"position": position, "phase": PHASES[phase], "node": self._node, "pid": pid, "exitcode": exitcode}
        return number, status, json.dumps(note).encode()

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        if worker.watched:
            self._selector.unregister(worker.channel.socket)
        worker.channel.close()
        if worker.process.exitcode is not None:
            worker.process.close()


def pump(selector: selectors.BaseSelector, channel: Channel) -> None:
    """Write what the channel's socket takes now, and have the selector say when it takes more. May raise OSError."""
    if channel.wants_write:
        channel.flush()
    key = selector.get_key(channel.socket)
    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.wants_write else 0)
    if key.events != events:
        selector.modify(channel.socket, events, key.data)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Whatever starts here knows no main module: a worker never runs the caller's script again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _has_more(sock: socket.socket) -> bool:
    """Whether there is anything to read, without waiting for it."""
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except OSError:
        return False
