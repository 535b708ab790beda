"""What runs in a worker process: it loads slices, calls the function, and dumps what comes of it.

Knows payloads, and one socket to its node; knows nothing of the server, other
workers, or attempts. It reads a frame, works, writes, and reads again: so all
that it is told comes in the order in which it was said.

::

    node ──FUNCTION JOB TASK END FORGET CLOSE──▶ socket pair ──▶ serve ──┐ a slice:
                                                                         │  check, load,
    node ◀──────────RESULT RETURNED───────────── socket pair ◀── flush ◀─┘  call, dump
    node ◀── (slice, position, phase) ────────── status, shared memory: whom a death is charged to

It ends when its node shuts down writing. Two threads: the main one does all of
this, a guard looks every second whether the node is still there. There are no
locks: the status array is written here and only read in the node.

Limits: a RESULT frame is written after 5 ms, 1 MiB or 1,024 rows at the latest. When a slice ends and its TASK has
taken more than 20 ms, those behind it go back: others may be idle.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import operator
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import multiprocess

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from ..errors import LetterTooLarge
from ..objects.letters import Context, letter_digest, letter_length, load_slice
from ..objects.outcomes import dump_outcomes, encoding_error
from ..protocol import frames
from ..protocol.channel import Channel
from ..protocol.frames import MAX_ROWS, MAX_SHORT_BYTES, MORE, ROW, SHORT_LETTER_BYTES, U32, Buffer, Kind, Rows, Status

__all__ = [
    "Closeable", "Runner", "Worker", "main", "run_alone",
    "CALL", "DUMP", "FUNCTION", "IDLE", "LOAD", "PHASES", "START", "WHOLE",
]

SLICE, POSITION, PHASE = range(3)  # places in the status array, of signed 64-bit integers
PHASES = ("start", "idle", "function", "load", "call", "dump")
START, IDLE, FUNCTION, LOAD, CALL, DUMP = range(6)
WHOLE = -1  # a position: every argument of the slice
LATE_NS = 20_000_000  # four times what a message is worth: it was judged by quicker slices
FLUSH_NS = 5_000_000  # so long a result may wait for company: what a message to a worker is worth, too
TINY_NS = 2_000  # an argument, of a slice: below, to say which one is called costs more than it tells
DOUBTFUL_NS = 100_000  # a slice that took longer may have been kept from the processor: looking costs 1.5 us
CONTEXTS_KEPT = 8  # in a process that is not ours: nobody tells it which are closed
GUARD_SECONDS = 1.0  # how often the guard looks
PR_SET_PDEATHSIG = 1  # linux/prctl.h
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS",
           "VECLIB_MAXIMUM_THREADS", "BLIS_NUM_THREADS")  # each worker has one core, not all of them

RUSAGE_THREAD: int | None = getattr(resource, "RUSAGE_THREAD", None)  # Linux

_alone = threading.local()  # `runner` and `contexts`, of each thread that `run_alone` is called in

Function = Callable[[Any], Any]
Answer = tuple[int, Sequence[Buffer]]  # the status of a RESULT row, and its letter


class Closeable(Protocol):
    """A descriptor that a forked worker inherits and has no use for."""

    def close(self) -> object:
        """Give it back in this process."""


class _Context:
    """What one context has in this process, functions by their digests in hex."""

    def __init__(self, node: int | None, own: bool) -> None:
        self.payload = Context(caller=False, node=node, own=own)
        self.letters: dict[str, Buffer] = {}  # not loaded yet
        self.loaded: dict[str, Any] = {}
        self.failed: dict[str, Answer] = {}  # could not be loaded, or raised: what every slice is answered
        self.initialized: set[str] = set()  # initializers that were called, even if forgotten since


class WorkerJob(NamedTuple):
    """What a worker knows of a job: what to call, in which context."""

    context: _Context
    initializer: str | None
    function: str
    call: str | None = None
    seed: int | None = None
    timeout: float | None = None

    def digests(self) -> list[str]:
        """In the order in which they are to be loaded."""
        return [self.initializer, self.function] if self.initializer else [self.function]


class Runner:
    """Contexts, functions and slices of one process; knows no frames. For one thread.

    :param status: a view of three signed 64-bit integers, which says what runs: slice, position and phase. The
        position is WHOLE where all are meant, and in a first attempt where a job's arguments are tiny.
    :param letter_limit: bytes of a letter, at most.
    :param node: the node's id, for exceptions to name.
    :param own: whether the process is ours, so that its ``__main__`` may be the caller's.
    """

    def __init__(
        self, status: Any, letter_limit: int = frames.LETTER_LIMIT_BYTES, node: int | None = None, own: bool = False
    ) -> None:
        self._status = status
        self._own = own
        self._limit = letter_limit
        self._node = node
        self._letters: dict[str, Buffer] = {}  # functions that came and that no JOB has named yet
        self._contexts: dict[str, _Context] = {}
        self._jobs: dict[int, WorkerJob] = {}
        self._tiny: set[int] = set()  # those whose arguments take too little to be named one by one

    def keep(self, letter: Buffer) -> None:
        """FUNCTION."""
        self._letters[letter_digest((letter,)).hex()] = letter

    def knows(self, context: str, digest: str) -> bool:
        """Whether a function was loaded in a context, or could not be."""
        known = self._contexts.get(context)
        return known is not None and (digest in known.loaded or digest in known.failed)

    def declare(self, body: dict[str, Any]) -> None:
        """JOB."""
        if body["context"] not in self._contexts:
            self._contexts[body["context"]] = _Context(self._node, self._own)
        context, options = self._contexts[body["context"]], body["options"]
        called = [options.get(name) for name in ("call", "seed", "timeout")]
        self._jobs[body["job"]] = job = WorkerJob(context, body.get("initializer"), body["function"], *called)
        for digest in filter(self._letters.__contains__, job.digests()):
            job.context.letters[digest] = self._letters.pop(digest)

    def end(self, job: int) -> None:
        """END."""
        self._jobs.pop(job, None)
        self._tiny.discard(job)

    def close_context(self, context: str) -> None:
        """CLOSE."""
        self._contexts.pop(context, None)

    def forget(self, digest: str) -> None:
        """FORGET."""
        for context in self._contexts.values():
            for table in (context.letters, context.loaded, context.failed):
                table.pop(digest, None)

    def prepare(self, number: int) -> Answer | None:
        """Load a job's functions and call its initializer, if not done yet; the answer if it failed."""
        job = self._jobs[number]
        context = job.context
        context.payload.become_main()
        for digest in job.digests():
            letter = context.letters.pop(digest, None)
            if letter is not None and digest not in context.initialized:
                try:
                    context.loaded[digest] = pair = context.payload.load(letter)
                    if digest == job.initializer:
                        context.initialized.add(digest)
                        pair[0](*pair[1])
                except BaseException as error:  # what a user's code raises is an answer, whatever it is
                    context.failed[digest] = _failure(context.payload, error)
            if digest in context.failed:
                return context.failed[digest]
        return None

    def attempt(self, job_number: int, number: int, attempt: int, digest: bytes, letter: Buffer) -> list[Answer]:
        """Run one slice of a job that is prepared."""
        self.mark(number, LOAD)
        job = self._jobs[job_number]
        context = job.context.payload
        if digest and letter_digest((letter,)) != digest:
            return [(Status.ALTERED, ())]
        try:
            arguments, skipped = load_slice(context, letter)
        except BaseException as error:
            return [_failure(context, error)]
        function, many = _wrapped(job, *job.context.loaded[job.function]), len(arguments) > 1
        named = bool(attempt or skipped) or (many and job_number not in self._tiny)
        began = time.monotonic_ns()
        values, errors = self._call(function, arguments, skipped, named)
        if many and job.timeout is None:
            tiny = time.monotonic_ns() - began < TINY_NS * len(arguments)
            (self._tiny.add if tiny else self._tiny.discard)(job_number)
        try:
            self._find_deadly(context, attempt, values)
            return self._dump(context, values, errors)
        finally:
            errors.clear()  # a traceback refers to frames, and those to it: nothing may outlive its slice

    def mark(self, number: int, phase: int) -> None:
        """A new slice: say so in an order that never blames the wrong one."""
        self._status[PHASE] = IDLE
        self._status[SLICE], self._status[POSITION] = number, WHOLE
        self._status[PHASE] = phase

    def _call(
        self, function: Function, arguments: list[Any], skipped: frozenset[int], named: bool
    ) -> tuple[list[Any], dict[int, BaseException]]:
        """The values, one a position (None where skipped or raised), and the exceptions by position.

        With `named` the status says at any time which position is called: that costs 40 ns, as much as a tiny
        function. Without, whoever ends this process is named by the next attempt.
        """
        values: list[Any] = []
        errors: dict[int, BaseException] = {}
        left: Iterator[Any] = enumerate(arguments) if named else iter(arguments)
        if skipped:  # all in C: what a signal handler raises would end a generator of ours
            left = itertools.compress(left, [position not in skipped for position in range(len(arguments))])
        status, append = self._status, values.append
        status[POSITION] = WHOLE if named or len(arguments) > 1 else 0
        status[PHASE] = CALL
        while True:  # goes on behind an exception
            try:
                if named:
                    for status[POSITION], argument in left:
                        append(function(argument))
                else:
                    for argument in left:
                        append(function(argument))
                break
            except BaseException as error:  # of the one that was taken last, even if it came when its value was there
                position = status[POSITION] if named else len(arguments) - 1 - operator.length_hint(left)
                if position < 0:  # it came before any was
                    taken = next(left)
                    position = taken[0] if named else 0
                del values[position - sum(other < position for other in skipped) :]
                append(None)
                errors[position] = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
        for position in sorted(skipped):
            values.insert(position, None)
        return values, errors

    def _find_deadly(self, context: Context, attempt: int, values: list[Any]) -> None:
        """On a further attempt, dump each value by itself before all together: so the deadly one is named."""
        self._status[POSITION] = 0 if len(values) == 1 else WHOLE
        self._status[PHASE] = DUMP
        if attempt and len(values) > 1:
            for self._status[POSITION], value in enumerate(values):
                with contextlib.suppress(Exception):
                    context.dump(value)
            self._status[POSITION] = WHOLE

    def _dump(self, context: Context, values: list[Any], errors: dict[int, BaseException]) -> list[Answer]:
        """The answer, cut in two as often as it takes to keep each letter under the limit."""
        raised, parts = dump_outcomes(context, values, errors)
        if letter_length(parts) <= self._limit:
            return [(Status.RAISED if raised else Status.VALUES, parts)]
        if len(values) > 1:
            half = len(values) // 2
            front = {p: error for p, error in errors.items() if p < half}
            back = {p - half: error for p, error in errors.items() if p >= half}
            *first, (status, last) = self._dump(context, values[:half], front)
            return [*first, (status | MORE, last), *self._dump(context, values[half:], back)]
        what = LetterTooLarge(f"a result of {letter_length(parts)} bytes; the limit is {self._limit}")
        _, parts = dump_outcomes(context, [None], {0: encoding_error(what, type(values[0]))})
        return [(Status.RAISED, parts)]


class _Stopwatch:
    """How long slices take, less the time for which the system gave the processor to others while they could run.

    On a busy machine some slice of any sixty loses some milliseconds so. By that, a job of quick slices would be
    judged slow, and each would travel alone. Linux tells; elsewhere it is the time on the clock.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """A first slice begins now."""
        self.now = time.monotonic_ns()
        self._mark = self._look()

    def lap(self) -> int:
        """A slice has ended, and the next one begins: nanoseconds of the one that has ended."""
        before, self.now = self.now, time.monotonic_ns()
        took = self.now - before
        return took if took < DOUBTFUL_NS else max(1, took - self._lost())

    def _lost(self) -> int:
        (wall, own, waits), self._mark = self._mark, self._look()
        waited = waits != self._mark[2]  # it slept, or read: that time is its own
        return 0 if waited else max(0, self._mark[0] - wall - (self._mark[1] - own))

    def _look(self) -> tuple[int, int, int]:
        """Clock, own processor time, and how often this thread waited of itself."""
        if RUSAGE_THREAD is None:
            return 0, 0, 0
        waits = resource.getrusage(RUSAGE_THREAD).ru_nvcsw
        return (self.now, time.thread_time_ns(), waits) if waits else (0, 0, 0)  # who never waited is not counted


class Worker:
    """One worker's state and its loop, for the thread that calls `serve`.

    :param sock: blocking; the other end is the node's.
    :param status: three signed 64-bit integers that the node can see.
    :param letter_limit: bytes of a letter, at most.
    :param node: the node's id, for exceptions to name.
    """

    def __init__(
        self, sock: socket.socket, status: Any, letter_limit: int = frames.LETTER_LIMIT_BYTES, node: int | None = None
    ) -> None:
        self._channel = Channel(sock, "NW", letter_limit=letter_limit)
        self._channel.name = f"worker {os.getpid()}"
        self._status = memoryview(status).cast("B").cast("q")  # written at half the cost of a ctypes array
        self._runner = Runner(self._status, letter_limit, node, own=True)
        self._handlers: dict[Kind, Callable[[Any], object]] = {
            Kind.FUNCTION: self._keep, Kind.JOB: self._runner.declare, Kind.TASK: self._run,
            Kind.END: lambda body: self._runner.end(body["job"]),
            Kind.CLOSE: lambda body: self._runner.close_context(body["context"]),
            Kind.FORGET: lambda body: self._runner.forget(body["function"]),
        }
        self._watch = _Stopwatch()
        self._slowest_ns = 0  # the slowest slice of the next RESULT frame
        self._clear()

    def serve(self) -> None:
        """Do what the node says until it shuts down writing. Blocks."""
        self._status[PHASE] = IDLE
        while self._turn():
            pass

    def _turn(self) -> bool:
        """One read and what it brought. Nothing of it is alive while the next read waits."""
        frames = self._channel.receive()
        for kind, body in frames or ():
            self._handlers[kind](body)
        return frames is not None

    def _keep(self, rows: Rows) -> None:
        _, (letter,) = next(rows.letters())
        self._runner.keep(letter)

    def _run(self, rows: Rows) -> None:
        """Answer every slice of a TASK."""
        runner = self._runner
        runner.mark(rows.slices[0], FUNCTION)
        failure = runner.prepare(rows.job)
        self._watch.restart()
        self._flushed, spent = self._watch.now, 0
        for place, (number, attempt, (digest, (letter,))) in enumerate(zip(rows.slices, rows.attempts, rows.letters())):
            if spent > LATE_NS:
                self._flush(rows.job)
                self._write(Kind.RETURNED, rows.cut(place, len(rows)).bare())
                return
            answers = [failure] if failure else runner.attempt(rows.job, number, attempt, digest, letter)
            took = self._watch.lap()
            spent += took
            for status, parts in answers:
                self._gather(rows.job, number, attempt, status, parts, took)
            # Who dies between two parts is charged: sent again uncharged, the first came twice. And parts may be
            # views of a result that the function still holds, and may write to at its next call.
            if self._watch.now - self._flushed > FLUSH_NS or len(parts) > 1 or len(answers) > 1:
                self._flush(rows.job)
            self._status[PHASE] = IDLE
        self._flush(rows.job)

    def _gather(
        self, job: int, number: int, attempt: int, status: int, parts: Sequence[Buffer], took_ns: int
    ) -> None:
        """Put an answer into the next RESULT frame; one that does not fit any more leaves before."""
        length = letter_length(parts)
        if self._size + length > MAX_SHORT_BYTES or len(self._table) == MAX_ROWS:
            self._flush(job)
        self._table.append(ROW.pack(number, attempt, status, length))
        self._size += length
        self._slowest_ns = max(self._slowest_ns, took_ns)
        if length > SHORT_LETTER_BYTES:
            self._digests.append(letter_digest(parts))
            self._longs.append(parts)
        else:
            self._shorts += parts

    def _flush(self, job: int) -> None:
        """Write what was gathered."""
        self._flushed = time.monotonic_ns()
        if self._table:
            table, digests, shorts = b"".join(self._table), b"".join(self._digests), b"".join(self._shorts)
            pace = min(max(1, self._slowest_ns // 1000), U32)
            self._write(Kind.RESULT, Rows(job, table, digests, shorts, self._longs, pace))
            self._clear()

    def _write(self, kind: Kind, rows: Rows) -> None:
        self._channel.send(kind, rows)
        while not self._channel.flush():
            pass

    def _clear(self) -> None:
        """Begin the next RESULT frame."""
        self._table: list[bytes] = []
        self._digests: list[bytes] = []
        self._shorts: list[Buffer] = []
        self._longs: list[Sequence[Buffer]] = []
        self._size = self._slowest_ns = 0  # bytes of its letters


def main(
    sock: socket.socket, status: Any, letter_limit: int, parent: int | None,
    inherited: Iterable[Closeable] = (), node: int | None = None,
) -> None:
    """The target of a worker's process; returns when the node shuts down writing.

    :param sock, status, letter_limit, node: as for Worker.
    :param parent: the node's process id where the node starts its workers itself (fork, spawn), else None.
    :param inherited: what a forked worker must not keep open.
    """
    _die_with(parent)
    _reset_signals()
    for thing in inherited:
        thing.close()
    for name in THREADS:
        os.environ.setdefault(name, "1")
    if hasattr(sys.stdout, "reconfigure"):  # what a function printed before its worker is killed is not lost
        sys.stdout.reconfigure(line_buffering=True)
    with contextlib.suppress(ConnectionError):  # the node is gone
        Worker(sock, status, letter_limit, node).serve()


def run_alone(
    job: dict[str, Any], functions: dict[str, Buffer], number: int, attempt: int, letter: Buffer
) -> tuple[int, list[tuple[int, bytes]]]:
    """Run one slice in a process that is no worker of ours, and is told nothing else (engine.py).

    :param job: the body of its JOB.
    :param functions: the letters of the function and the initializer, by their digests in hex.
    :returns: its pace in microseconds, and its answers: each a status and a letter.
    """
    runner = _lone_runner(job["context"])
    for digest, function in functions.items():
        if not runner.knows(job["context"], digest):
            runner.keep(function)
    runner.declare(job)
    began = time.monotonic_ns()
    failure = runner.prepare(job["job"])
    answers = [failure] if failure else runner.attempt(job["job"], number, attempt, b"", letter)
    pace = min(max(1, (time.monotonic_ns() - began) // 1000), U32)
    runner.end(job["job"])
    return pace, [(int(status), b"".join(parts)) for status, parts in answers]


def _lone_runner(context: str) -> Runner:
    """This thread's, with room for this context; some engines run slices in several threads of a process."""
    if not hasattr(_alone, "runner"):
        _alone.runner, _alone.contexts = Runner([0, 0, 0]), {}
    runner: Runner = _alone.runner
    contexts: dict[str, None] = _alone.contexts
    contexts[context] = contexts.pop(context, None)
    while len(contexts) > CONTEXTS_KEPT:
        oldest = next(iter(contexts))
        del contexts[oldest]
        runner.close_context(oldest)
    return runner


def _wrapped(job: WorkerJob, function: Function, callback: Function | None) -> Function:
    """As it is called with an argument as that travels: PROTOCOL.md, section 6."""
    if job.call in _CALLS:
        function = functools.partial(_CALLS[job.call], function)
    if job.seed is not None:
        function = functools.partial(_call_seeded, function, job.seed)
    return function if callback is None else functools.partial(_call_back, function, callback)


def _call_back(function: Function, callback: Function, x: Any) -> Any:
    return callback(function(x))


def _call_star(function: Callable[..., Any], x: Any) -> Any:
    return function(*tuple(x))  # as itertools.starmap, of what is no iterable, too


def _call_apply(function: Callable[..., Any], x: Any) -> Any:
    return function(*x[0], **x[1])


_CALLS: dict[str | None, Callable[..., Any]] = {"star": _call_star, "apply": _call_apply}


def _call_seeded(function: Function, seed: int, x: tuple[int, Any]) -> Any:
    """The same random numbers for the same seed and index, whoever had which arguments before."""
    index, argument = x
    state = hashlib.sha256(b"%d %d" % (seed, index)).digest()
    random.seed(state)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(struct.unpack("<8I", state))
    return function(argument)


def _failure(context: Context, error: BaseException) -> Answer:
    """FAILED: the letter is that of a slice whose only argument raised this."""
    own = error.__traceback__
    return Status.FAILED, dump_outcomes(context, [None], {0: error.with_traceback(own and own.tb_next)})[1]


def _reset_signals() -> None:
    """What the node set for itself. Ctrl-C in a terminal reaches the workers too: the node ends them."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _die_with(parent: int | None) -> None:
    """End with the node: at once where Linux sees to it, even inside C code; else in a second."""
    if parent is not None and sys.platform == "linux":
        prctl = getattr(ctypes.CDLL(None), "prctl", None)
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if _orphaned(parent):  # it died before that
        os._exit(1)
    threading.Thread(target=_guard, args=(parent,), name="achilles-guard", daemon=True).start()


def _guard(parent: int | None) -> None:
    never = threading.Event()
    while not _orphaned(parent):
        never.wait(GUARD_SECONDS)
    os._exit(1)


def _orphaned(parent: int | None) -> bool:
    """Whether the node is gone. Under forkserver the parent is another, but the pipe to the node tells it."""
    return parent not in (None, os.getppid()) or not multiprocess.parent_process().is_alive()
