"""A node's workers and its queue: giving batches, taking chunks back, charging deaths.

The module knows jobs, batches and worker processes, and no server: RESULT and RETURNED go to `send`. It opens no
letter.

::

    TASK ─▶ queue ──feed──▶ an idle worker: one batch ──RESULT──▶ send
              │ waited 250 ms       │ 20 ms at one chunk      ──▶ RESULT, the answers on its board
              ▼                     │ late, or cancelled      ──▶ RETURNED, the chunks that have not begun
           RETURNED                 │ died: its board         ──▶ RESULT died, one chunk; RETURNED, the others
                                    └ killed by the node      ──▶ RESULT timeout, one chunk, or nothing; RETURNED

Each chunk that comes leaves as an answer or as RETURNED. This frees the server's places, also after the job's end.
A late worker that goes on sends the answers on its board again. The server drops these copies.

The worker of a job with an initializer or maxtasksperchild belongs to that context until CLOSE, or until another
context needs it more. Then it is replaced. A worker also belongs to the set of sources that it has imported.

A death shows in `exitcode` alone: sentinel and end of file wait for the worker's children, too. The end of a worker's
socket makes the node look at once.

All code runs in the thread of the node's loop, without locks. The loop calls `turn`, and the function in `data` of
each selector entry.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import AchillesError, ProtocolError
from ..protocol.channel import Channel
from ..protocol.frames import U64, Batch, Gone, Kind, Letter
from .board import PHASES
from .output import Flow
from .process import LATE_SECONDS, STARTING, NodeJob, NodeWorker, start

__all__ = ["LONG_SECONDS", "LOOK_SECONDS", "Workers", "pump"]

LOOK_SECONDS = 0.02  # between looks at the workers
WAIT_SECONDS = 0.25  # a batch that has waited so long goes back: workers of other nodes may be idle
EXIT_SECONDS = 0.01  # from a socket's end to the exit code: mostly less, unless a child lives
CANCEL_SECONDS = 0.5  # for a cancelled chunk that runs to end by itself
SHARE_SECONDS = 1.0  # a worker stays with its context so long while another context needs a worker
KEEP_SECONDS = 60.0  # the same for an idle worker that is its context's only worker
START_SECONDS = 0.5  # the pause after a worker that could not be started, or died before it was ready
LONG_SECONDS = 1.0  # a chunk that has run so long is in each second's PING
STOP_SECONDS = 5.0  # for killed workers to be gone

log = logging.getLogger(__name__)


class Workers:
    """All workers of a node, for one connection to its server.

    :param count: how many workers are kept alive.
    :param method: "fork", "forkserver" or "spawn".
    :param selector: the loop's. It calls an entry's `data` with the events. A forked worker closes all its entries.
    :param send: takes OUTPUT, RESULT and RETURNED with their batch.
    :param node: the node's id, for the notes on deaths.
    :ivar look_at: `turn` is due then, even if no frame comes (monotonic).
    """

    def __init__(
        self, count: int, method: str, selector: selectors.BaseSelector, send: Callable[[Kind, Batch], None],
        node: int = 0,
    ) -> None:
        self.count = count
        self.node = node
        self._method = method
        self._selector = selector
        self._send = send
        self._shared: dict[str, Letter] = {}  # initializers and sources, by context and set, until CLOSE
        self._jobs: dict[int, NodeJob] = {}
        self._queue: dict[Batch, float] = {}  # batches that no worker has, with their arrival (monotonic)
        self._workers: list[NodeWorker] = []
        self._reason = Gone.RETURNED  # why chunks go back; LEFT when this node drains
        self.look_at = self._start_at = 0.0  # monotonic; no worker is started before the second

    @property
    def busy(self) -> bool:
        """Whether any worker has a batch."""
        return any(worker.batch.count for worker in self._workers)

    def long_chunks(self, now: float) -> list[dict[str, Any]]:
        """Return the longest-running chunk of each job, if it has run for a second, in the form of a PING."""
        long = sorted((worker for worker in self._workers
                       if worker.next < worker.end and now - worker.chunk_at > LONG_SECONDS),
                      key=lambda worker: -worker.chunk_at)  # a job's last entry stays
        return list({worker.batch.job: {
            "job": worker.batch.job, "seconds": now - worker.chunk_at, "pid": worker.process.pid} for worker in long
        }.values())

    # The server's frames.

    def declare(self, batch: Batch) -> None:
        """Keep a JOB. ProtocolError if its initializer or its sources never came."""
        letters, options = [*batch.letters(), b"", b""][:4], batch.declaration
        names = context, sources = options["context"], options.get("sources")
        for place, name in enumerate((context if options["initializer"] else None, sources), 2):
            if name is not None:
                letters[place] = self._shared[name] = letters[place] or self._shared.get(name, b"")
                if not letters[place]:
                    raise ProtocolError(f"job {batch.job} needs an initializer or sources that were not sent")
        owner = context if options["initializer"] or options.get("maxtasksperchild") else None, sources
        self._jobs[batch.job] = NodeJob(names, owner, options, letters, Flow())

    def add(self, batch: Batch) -> None:
        """Queue the batch of a TASK. ProtocolError if its job is not known."""
        if batch.job not in self._jobs:
            raise ProtocolError(f"a batch of job {batch.job}, which was not declared")
        self._queue[batch] = time.monotonic()

    def cancel(self, number: int, first: int = 0, end: int = U64) -> None:
        """Give back the chunks of batches that overlap the range. Kill running chunks later."""
        def overlaps(batch: Batch) -> bool:
            return batch.job == number and batch.first < end and first < batch.end

        self._take_back(overlaps, self._reason)
        for worker in self._workers:
            if overlaps(worker.batch) and first < worker.end <= end:  # its last chunk runs
                worker.kill_at = time.monotonic() + CANCEL_SECONDS

    def end(self, number: int) -> None:
        """Cancel all chunks of a job, and forget it."""
        self.cancel(number)
        self._jobs.pop(number, None)
        for worker in self._workers:
            worker.forget(number, Kind.END, Batch(number))

    def close_context(self, context: str) -> None:
        """Let workers drop a context. Replace the workers that belong to it."""
        self._shared.pop(context, None)
        for worker in self._workers:
            worker.forget(context, Kind.CLOSE, {"context": context})
            if worker.owner[0] == context:
                worker.retire()

    def drain(self) -> None:
        """Give back the chunks that have not begun. Call it every turn: further batches may come."""
        self._reason = Gone.LEFT
        self._take_back(lambda batch: True, self._reason)

    def _take_back(self, unwanted: Callable[[Batch], bool], reason: Gone) -> None:
        """Give back the chunks of unwanted batches that have not begun."""
        for batch in filter(unwanted, list(self._queue)):
            del self._queue[batch]
            self._return(batch, batch.first, batch.end, reason)
        for worker in self._workers:
            if unwanted(worker.batch):
                self._return(worker.batch, *worker.take_back(), reason)

    def _return(self, batch: Batch, first: int, end: int, reason: Gone) -> None:
        if first < end:
            self._send(Kind.RETURNED, Batch(batch.job, first, end - first, batch.attempt, flags=reason))

    # The loop.

    def turn(self) -> None:
        """Give workers batches, look at them, and write. Does not block."""
        if self._queue:
            self._feed()  # first: a look replaces workers for batches that no idle worker may run
        now = time.monotonic()
        if now >= self.look_at:
            self._look(now)
        for worker in self._workers:
            pump(self._selector, worker.channel)

    def stop(self) -> None:
        """Kill all workers, and wait for their ends, 5 s at most."""
        self.count, deadline = 0, time.monotonic() + STOP_SECONDS
        for worker in self._workers:
            worker.kill(None)
        while self._workers:
            for worker in [each for each in self._workers
                           if each.process.exitcode is not None or time.monotonic() > deadline]:
                self._bury(worker, deadline)
            self._selector.select(0.005)

    def _look(self, now: float) -> None:
        """Look at all workers and the queue: every 20 ms, and after the end of a worker's socket."""
        self.look_at = now + LOOK_SECONDS
        for worker in [worker for worker in self._workers if worker.process.exitcode is not None]:
            self._bury(worker, now)
        for worker in self._workers:
            if worker.look(now):
                self._return(worker.batch, *worker.take_back(), self._reason)
            if now - worker.chunk_at > LATE_SECONDS:
                self._pass_on(worker, worker.waiting(worker.seen[0]))
        self._take_back(lambda batch: now - self._queue.get(batch, now) > WAIT_SECONDS, Gone.WAITED)
        self._make_way(now)
        while len(self._workers) < self.count and now >= self._start_at:
            self._start(now)

    def _make_way(self, now: float) -> None:
        """For batches that wait, replace a worker of another context.

        A context without a worker gets an idle worker at once. If all are busy, it gets the worker with the latest
        batch, after the worker's second of service; one at a time. A context with workers gets an idle worker after
        some time: workers may be slow to set up, and pools often take turns. An idle worker of a closed set of sources
        goes first, then the worker that has been idle for longest.
        """
        if not self._queue or len(self._workers) < self.count or any(
                not worker.batch.count and not worker.idle for worker in self._workers):
            return  # a worker is missing, starts or ends: a new worker comes
        usable = [worker for worker in self._workers if worker.usable]
        free = [worker for worker in usable if worker.idle]
        needy = [batch for batch in self._queue if not any(worker.fits(self._jobs[batch.job]) for worker in usable)]
        owners = [worker.owner for worker in usable]
        spent = [worker for worker in free if worker.owner[1] not in (None, *self._shared)]  # their sets are closed
        if needy and not free and len(usable) == self.count:
            free = [worker for worker in usable if now - worker.owned_at > SHARE_SECONDS]
        elif not needy:
            free = [worker for worker in free if worker in spent or now - worker.since > (
                SHARE_SECONDS if owners.count(worker.owner) > 1 else KEEP_SECONDS)]
        free.sort(key=lambda worker: (worker not in spent, worker.since if worker.idle else -worker.since))
        if free:
            free[0].retire()
            first = dict.fromkeys(needy, now)  # the new worker is for these batches: their wait begins anew
            self._queue = first | self._queue | first

    def _feed(self) -> None:
        """Give batches to idle workers, the oldest batch first. It prefers workers of its context."""
        idle = sorted((worker for worker in self._workers if worker.idle), key=lambda worker: worker.owner.count(None))
        for batch in list(self._queue):
            worker = next((worker for worker in idle if worker.fits(self._jobs[batch.job])), None)
            if worker is not None:
                idle.remove(worker)
                if worker.tasks_left < batch.count:
                    worker.retire()
                else:
                    del self._queue[batch]
                    worker.begin(self._jobs[batch.job], batch)

    # One worker.

    def _start(self, now: float) -> None:
        try:
            number = min({*range(self.count)}.difference(worker.number for worker in self._workers))
            worker = start(self._method, self.node, number, [
                self._selector, *(key.fileobj for key in self._selector.get_map().values()),
                *(worker.life for worker in self._workers)])
            self._workers.append(worker)
            for channel in (worker.channel, worker.lines):
                self._selector.register(
                    channel.socket, selectors.EVENT_READ, functools.partial(self._read, worker, channel))
        except (OSError, EOFError) as e:  # no process or descriptor is left, here or in the forkserver
            log.error("a worker could not be started: %r", e)
            self._start_at = now + START_SECONDS

    def _read(self, worker: NodeWorker, channel: Channel, _: int = 0) -> None:
        """Pass on the frames that came. Kill a worker after the end of its socket."""
        try:
            received = channel.receive()
            for kind, body in received or ():
                if kind is Kind.RESULT:
                    self._answer(worker, body)
                elif kind is Kind.IDLE:
                    self._return(worker.batch, worker.next, worker.end, self._reason)
                    worker.rest()
                elif worker.job.flow.admits(body):
                    self._send(kind, body)
        except (OSError, AchillesError) as e:
            log.log(logging.INFO if worker.usable else logging.DEBUG, "%s: %s", channel.name, e)  # DEBUG: killed by us
            received = None
        if received is None:
            worker.process.kill()
            worker.process.join(EXIT_SECONDS)
            self.look_at = 0.0

    def _read_all(self, worker: NodeWorker, channel: Channel) -> None:
        with contextlib.suppress(OSError):
            while channel.socket.recv(1, socket.MSG_PEEK):
                self._read(worker, channel)

    def _answer(self, worker: NodeWorker, answer: Batch) -> None:
        """Pass on a RESULT, after its lines and the count of left-out lines."""
        worker.answered(answer)
        if worker.job.declaration.get("output"):
            self._read_all(worker, worker.lines)
            for count in worker.job.flow.count(answer.job, self.node):
                self._send(Kind.OUTPUT, count)
        self._send(Kind.RESULT, answer)

    def _pass_on(self, worker: NodeWorker, answers: Iterable[Batch]) -> None:
        """Pass on answers that the worker did not send. Return earlier chunks without an answer."""
        for answer in answers:
            self._return(worker.batch, worker.next, answer.first, self._reason)
            worker.next = answer.first
            self._answer(worker, answer)

    def _bury(self, worker: NodeWorker, now: float) -> None:
        """Pass on a dead worker's answers, charge one chunk at most, and return the others."""
        for channel in (worker.lines, worker.channel):
            self._read_all(worker, channel)
            self._selector.unregister(channel.socket)
        if worker.usable:
            log.warning("worker %d ended with %s in phase %s",
                        worker.process.pid, worker.process.exitcode, PHASES[worker.place()[2]])
        if worker.batch is STARTING:
            self._start_at = now + START_SECONDS
        self._pass_on(worker, worker.last_answers(self.node))
        self._return(worker.batch, worker.next, worker.end, self._reason)
        self._workers.remove(worker)
        worker.close()


def pump(selector: selectors.BaseSelector, channel: Channel) -> None:
    """Write as much as the socket takes now. The selector tells when it takes more."""
    if channel.wants_write:
        with contextlib.suppress(OSError, KeyError):
            events = selectors.EVENT_READ | selectors.EVENT_WRITE * (not channel.flush())
            key = selector.get_key(channel.socket)
            selector.modify(channel.socket, events, key.data)
