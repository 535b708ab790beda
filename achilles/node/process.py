"""A worker process as its node sees it: its start, its batch, its end.

The module knows one process, the socket pairs to it, and its board, and no queue, selector or server. The node's
one thread calls it.

The node gives a worker one batch at a time. The worker answers the chunks in order. The node may take back chunks
that have not begun. This lowers the batch's end::

    first ──answered── next ──done, on the board── the chunk that runs ──not begun── end ──taken back── first + count

A worker is idle when it sends IDLE, or has answered its batch. It ends when it retires, or the node kills it, or it
dies. `charge` is then the status of the chunk that ran::

    STARTING ──IDLE──▶ NOTHING ──begin──▶ a batch ──its last RESULT, or IDLE──▶ NOTHING
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import multiprocess

from ..errors import ProtocolError
from ..protocol.channel import Channel
from ..protocol.frames import HEAD, U32, Batch, Kind, Letter, Status, decode, encode
from . import worker as process_of_worker
from .board import CALL, CHUNK, FIRST, IDLE, LIMIT, NO_LIMIT, OFFSET, PHASES, UNNAMED, WORDS, Board
from .output import Flow

__all__ = ["LATE_SECONDS", "NOTHING", "STARTING", "NodeJob", "NodeWorker", "start"]

NEVER = float("inf")
STARTING, NOTHING = Batch(0), Batch(0)  # in place of a batch: the worker is not ready yet; the worker is idle
LATE_SECONDS = 0.02  # at one chunk: four times the 5 ms of a batch
LATE_BATCH_SECONDS = 0.1  # for a whole batch: a chunk of a batch of 50 ms waits 200 ms at most
LATE_FACTOR = 4  # a worker at one chunk is late after four times its batch's expected time
RETIRE_SECONDS = 2.0  # for an idle worker to end by itself, with its exit handlers
SOCKET_BYTES = 1 << 20  # buffer of a socket pair: fewer switches for a large letter


class NodeJob(NamedTuple):
    """A job of the server, until END."""

    names: tuple[str, str | None]  # of its context and its set of sources
    owner: tuple[str | None, str | None]  # the same, but None for a context that any worker can serve
    declaration: dict[str, Any]
    letters: list[Letter]  # declaration, function, the context's initializer and the sources, perhaps empty
    flow: Flow  # of the job's output here


class NodeWorker:
    """One worker process. Its owner writes and reads the channels.

    :param lines: brings the functions' output.
    :param number: of the worker in its node; its replacement has the same number.
    :param life: the node's end of a pipe. When it closes, the worker's whole process group ends.
    """

    def __init__(
        self, process: Any, sock: socket.socket, lines: socket.socket, shared: Any, number: int, life: Any
    ) -> None:
        self.process = process
        self.number, self.life = number, life
        self.channel, self.lines = Channel(sock, "WN"), Channel(lines, "WN")
        self.channel.name = self.lines.name = f"worker {process.pid}"
        self._board = Board(shared)
        self.status = self._board.status
        self.usable = True  # it neither retires nor was killed
        self.charge: Status | None = Status.DIED  # the status of the chunk that runs at its end
        self.told: set[int | str] = set()  # the jobs and contexts that it knows
        self.owner: tuple[str | None, str | None] = None, None  # its context and sources
        self.tasks_left = NEVER  # chunks that it may still begin: maxtasksperchild
        self.job: Any = None  # its batch's NodeJob, or its last batch's
        self.batch = STARTING
        self.next = self.end = 0  # the first unanswered chunk; behind the last chunk
        self.seen = (UNNAMED, UNNAMED, IDLE)  # chunk, offset and phase at the node's last look
        # The first look at these three; at this chunk. The time of its last change: idle or batch; owner.
        self.seen_at = self.chunk_at = self.since = self.owned_at = time.monotonic()
        self.kill_at = NEVER  # monotonic

    @property
    def idle(self) -> bool:
        """Whether it may begin a batch."""
        return self.usable and self.batch is NOTHING

    def begin(self, job: NodeJob, batch: Batch) -> None:
        """Give the worker a batch. It is idle, so it does not write the status array."""
        self.since = self.chunk_at = self.seen_at = time.monotonic()
        if self.owner != job.owner:
            self.owner, self.owned_at = job.owner, self.since
            self.tasks_left = min(self.tasks_left, job.declaration.get("maxtasksperchild") or NEVER)
        if batch.job not in self.told:
            letters = [*job.letters[:2], *(
                b"" if name in self.told else letter for name, letter in zip(job.names, job.letters[2:]))]
            self.channel.send(Kind.JOB, Batch.pack(batch.job, 0, letters))
            self.told.update((batch.job, *filter(None, job.names)))
        self.job, self.batch, self.next, self.end = job, batch, batch.first, batch.end
        self.seen = batch.first - 1, UNNAMED, IDLE  # not begun
        self.status[CHUNK], self.status[OFFSET], self.status[LIMIT] = batch.first - 1, UNNAMED, NO_LIMIT
        self.channel.send(Kind.TASK, batch)

    def fits(self, job: NodeJob) -> bool:
        """Whether it may run batches of this job: it has no owner, or the job's context and sources."""
        return all(own in (None, name) for own, name in zip(self.owner, job.owner))

    def forget(self, name: int | str, kind: Kind, body: dict[str, Any] | Batch) -> None:
        """Send END or CLOSE, if the worker knows the job or the context."""
        if name in self.told:
            self.told.remove(name)
            self.channel.send(kind, body)

    def answered(self, answer: Batch) -> None:
        """Note a RESULT; ProtocolError unless it belongs to the worker's batch.

        Answers that the node took from the board come again.
        """
        if (answer.job, answer.attempt) != (self.batch.job, self.batch.attempt) or not (
                self.batch.first <= answer.first <= self.next <= answer.end <= self.batch.end):
            raise ProtocolError(f"worker {self.process.pid} answers chunks that it was not given")
        self.tasks_left -= answer.end - self.next
        self.next = answer.end
        if self.next == self.batch.end:
            self.rest()

    def place(self) -> tuple[int, int, int]:
        """Return chunk, offset and phase. If a function wrote over them: the first unanswered chunk, called."""
        chunk, offset, phase = tuple(self.status)[:LIMIT]
        if self.batch.first - 1 <= chunk <= self.batch.end and UNNAMED <= offset <= U32 and phase in range(len(PHASES)):
            return chunk, offset, phase
        return self.next, UNNAMED, CALL if self.batch.count else IDLE

    def waiting(self, chunk: int) -> Iterator[Batch]:
        """Yield one RESULT: the unsent answers on the board, before `chunk`, the chunk that runs."""
        if self.status[FIRST] == self.next < chunk < self.end and (
                sum(self._board.lengths[: chunk - self.next]) <= len(self._board.letters)):
            answer = self._board.answers(self.batch, chunk - self.next)
            with contextlib.suppress(ProtocolError):  # a function wrote over the board
                decode(Kind.RESULT, 0, encode(Kind.RESULT, answer)[0][HEAD.size :])
                if self.status[CHUNK] == chunk:
                    yield answer

    def last_answers(self, node: int) -> Iterator[Batch]:
        """After its end, yield its unsent answers, and the answer that charges the chunk that ran."""
        chunk, offset, phase = self.seen if self.charge is Status.TIMEOUT else self.place()
        yield from self.waiting(chunk)
        if self.charge is not None and phase > IDLE and self.next <= chunk < self.end:
            note = {
                "offset": offset if phase >= CALL else -1, "phase": PHASES[phase], "node": node,
                "pid": self.process.pid, "exitcode": self.process.exitcode,
            }
            yield Batch.pack(self.batch.job, chunk, [json.dumps(note).encode()], attempt=self.batch.attempt,
                             statuses=bytes([self.charge]))

    def rest(self) -> None:
        """End the batch: the worker is idle, or retires."""
        self.end = self.next
        self.batch, self.since, self.kill_at = NOTHING, time.monotonic(), NEVER
        if not self.usable or self.tasks_left <= 0:
            self.retire()

    def take_back(self) -> tuple[int, int]:
        """Let no further chunk begin. Return the first chunk taken back, and the number behind the last."""
        last = self.end
        for _ in range(2):  # the worker may have read the old limit and moved on
            self.status[LIMIT] = limit = max(self.place()[0] + 1, self.next)
        self.end = min(limit, last)
        return self.end, last

    def look(self, now: float) -> bool:
        """Note where the worker is. Kill it if it is over its time. Return whether to take chunks back."""
        seen = chunk, _, phase = self.place()
        if chunk != self.seen[0]:
            self.chunk_at = now
            if self.seen[0] < self.batch.first:  # the time to load the batch does not count
                self.since = now
        if seen != self.seen:
            self.seen, self.seen_at = seen, now
        if now > self.kill_at:
            self.kill(None)
        elif phase == CALL and now - self.seen_at > (self.job.declaration.get("timeout") or NEVER):
            self.kill(Status.TIMEOUT)
        patience = max(LATE_SECONDS, LATE_FACTOR * self.batch.number / 1e6)
        late = now - self.chunk_at > patience or now - self.since > max(LATE_BATCH_SECONDS, patience)
        return late and self.batch.first <= chunk < self.end - 1

    def retire(self) -> None:
        """Let the worker end after its batch."""
        self.usable = False
        self.channel.finish()
        if self.batch is NOTHING:
            self.kill_at = time.monotonic() + RETIRE_SECONDS

    def kill(self, charge: Status | None) -> None:
        """End the worker. `charge` is TIMEOUT, or None: no chunk is charged."""
        self.usable, self.charge = False, charge
        self.process.kill()

    def close(self) -> None:
        """After its end, kill the processes that its tasks started."""
        with contextlib.suppress(AttributeError, OSError):  # Windows has no groups; or the group has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(ValueError):  # it was not gone in time
            for thing in (self.channel, self.lines, self.life, self.process):
                thing.close()


def start(method: str, node: int, number: int, inherited: Iterable[Any]) -> NodeWorker:
    """Start a worker's process. The node's ends of the socket pairs do not block. OSError or EOFError if that fails.

    :param method: "fork", "forkserver" or "spawn".
    :param number: of the worker in its node.
    :param inherited: the node's descriptors, which a forked worker must close.
    """
    context = multiprocess.get_context(method)
    shared = context.RawArray("q", WORDS)
    theirs_of_life, life = context.Pipe(duplex=False)
    main, (ours, theirs), (lines, theirs_of_lines) = sys.modules["__main__"], socket.socketpair(), socket.socketpair()
    for end in (ours, theirs, theirs_of_lines):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
    process = context.Process(
        target=process_of_worker.main, name="achilles-worker", daemon=True,
        args=(theirs, theirs_of_lines, shared, theirs_of_life, number,
              (ours, lines, life, *inherited) if method == "fork" else (), node),
    )
    sys.modules["__main__"] = types.ModuleType("__main__")  # a worker never runs the node's script again
    try:
        with theirs, theirs_of_lines, theirs_of_life:
            process.start()
    except BaseException:
        ours.close()
        lines.close()
        raise
    finally:
        sys.modules["__main__"] = main
    ours.setblocking(False)
    lines.setblocking(False)
    return NodeWorker(process, ours, lines, shared, number, life)
