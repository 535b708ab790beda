"""A job in the controller: a function with its options, and the chunks of it that have no result.

Knows which chunks wait and which are out under which attempt, and keeps each letter until its result is taken. Knows no
connection. `call.py` cuts arguments into chunks, `results.py` takes the answers, and `run.py` counts deaths and losses.

::

    enter ─▶ waiting ──send_batch──▶ out[attempt] ──answers──▶ sink.put
                ▲                        │
                └────── again ◀── GONE, altered, died: at the front, a doubtful chunk alone

`link.lock` guards everything here; every method but `open` and `load` needs it. The reader thread calls `answered`,
`printed` and `gone`. The caller's thread calls `open` or `load`: it alone loads results, and the reader runs no code of
users.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from ..errors import ProtocolError
from ..objects import letters, outcomes
from ..objects.outcomes import mark
from ..objects.sources import Sources, reason
from ..protocol.frames import (
    CAREFUL,
    MAX_SHORT_BYTES,
    MORE,
    NOTE,
    TELL,
    U32,
    Batch,
    Gone,
    Kind,
    Letter,
    LongLetter,
    Status,
    joined,
    letter_of,
)
from ..protocol.kinds import read_object
from .pace import LITTLE_US, Pace
from .results import NOBODY, Sink
from .run import ALTERED, ATTEMPTS, LOST, Run, worker_lost

__all__ = ["Job", "Taken"]

RUN_CHUNKS = 4096  # in one Run of the queue: cutting a batch from it copies the rest

Taken = tuple[int, list[Any], dict[int, BaseException]]  # index of the first value, values, offset -> error


class Job:
    """A function and its options, under one number on a connection.

    :param context: of objects/, in which everything of this job is dumped and loaded.
    :param context_id: its name at the nodes, 16 bytes.
    :param options: those of a declaration; None values are left out.
    :param sources: the caller's own modules.
    :ivar declaration: the first letter of its JOB, as an object.  :ivar sink: where answers go.
    :ivar left: chunks that the call still has to cut, very many where nobody knows.
    """

    def __init__(
        self, context: letters.Context, context_id: bytes, function: Letter, initializer: Letter | None = None,
        options: Mapping[str, Any] | None = None, sources: Sources | None = None,
    ) -> None:
        self.context, self.function, self.initializer = context, function, initializer
        self.declaration: dict[str, Any] = {"context": context_id.hex(), "initializer": initializer is not None}
        self.sources: Letter | None = None
        if sources is not None:
            self.sources = _letter_of_sources(sources)
            self.declaration["sources"] = sources.name
        self.declaration.update({name: value for name, value in (options or {}).items() if value is not None})
        self.number = 0  # the link counts
        self.declared = False  # on the connection there is
        self.spent = False  # the next call of the function declares it anew
        self.pace = Pace()
        self.next = 0  # number of the next chunk
        self.left = 0.0
        self.waiting: list[Run] = []
        self.out: dict[int, Run] = {}  # by attempt
        self.sink: Sink = NOBODY
        self._attempt = 0
        self._deaths = 0  # workers that died while they loaded the function, without an answer between

    @property
    def owes(self) -> bool:
        """Whether a chunk has no answer."""
        return bool(self.waiting or self.out)

    # Sending.

    def enter(self, run: Run) -> None:
        """Queue chunks, which are the next ones of this job. Those with an answer, or without a letter, are done."""
        self.next = run.end
        last = self.waiting[-1] if self.waiting else None
        if run.answers or len(run.lost) == run.arguments:
            self.sink.put(run)
        elif (last and last.end == run.first and last.size == run.size and last.place == run.place and not last.counts
                and last.arguments == last.size * len(last.letters) and len(last.letters) < RUN_CHUNKS):
            last.letters += run.letters
            last.arguments += run.arguments
        else:
            self.waiting.append(run)

    def is_little(self) -> bool:
        """Whether the chunks that wait are not worth a batch while all workers are busy. Some wait."""
        first = self.waiting[0]
        return 0 < self.pace.us * (self.next - first.first) * first.size < LITTLE_US

    def send_batch(self, post: Callable[[Kind, Batch], None], worth_us: float, workers: int) -> None:
        """Cut a batch from the chunks that wait, and post it: then its chunks are out. Some wait.

        Behind `post` nothing is called, so that Ctrl-C finds all or nothing.
        """
        run = self.waiting[0]
        count = 1
        if not run.is_doubtful:
            count = self.pace.chunks(run.size, worth_us, self.left + self.next - run.first, workers)
            count = min(count, self.declaration.get("maxtasksperchild", count), len(run.letters))
        while count > 1 and sum(map(len, run.letters[:count])) > MAX_SHORT_BYTES:
            count //= 2
        run, rest = run.cut(0, count), run.cut(count)
        self._attempt = (self._attempt + 1) & U32
        flags = TELL if run.end > self.sink.given else 0
        if run.has_died:
            flags |= CAREFUL
        number = min(math.ceil(self.pace.us * run.arguments), U32)
        batch = Batch.pack(self.number, run.first, run.letters, attempt=self._attempt, number=number, flags=flags)
        post(Kind.TASK, batch)
        self.out[batch.attempt] = run
        self.waiting[:1] = [rest] if rest.letters else []

    def withdraw(self, number: int) -> bool:
        """Take a chunk out of the queue; False if it was sent already."""
        for at, run in enumerate(self.waiting):
            if run.first <= number < run.end:
                pieces = run.cut(0, number - run.first), run.cut(number - run.first + 1)
                self.waiting[at : at + 1] = [piece for piece in pieces if piece.letters]
                return True
        return False

    def forget_connection(self) -> None:
        """The connection is lost: every chunk that was out waits again, uncharged."""
        out, self.out, self.declared = sorted(self.out.values(), key=lambda run: run.first), {}, False
        for run in reversed(out):
            self._again(run)

    def _again(self, run: Run) -> None:
        """Chunks go to the front of the queue. Those that are given up, or that nobody wants any more, do not.

        A doubtful chunk goes by itself.
        """
        pieces, wanted = [run], [self.sink.wants(number) for number in range(run.first, run.end)]
        if run.is_doubtful or not all(wanted):
            pieces = [run.cut(at, at + 1) for at, wants in enumerate(wanted) if wants]
        for piece in reversed(pieces):
            if len(piece.lost) == piece.arguments:
                self.sink.put(piece)
                continue
            if piece.lost:
                skips = letters.with_skips([joined(piece.letters[0])], piece.lost)
                piece.letters = [letter_of(b"".join(skips))]
            self.waiting.insert(0, piece)

    # Answers: the reader thread.

    def answered(self, batch: Batch, found: list[Letter]) -> None:
        """A RESULT with these letters. Ignored if nobody waits for it."""
        if batch.attempt in self.out and batch.end > self.sink.given:
            raise ProtocolError(f"chunk {batch.end - 1} was answered before it was given")
        run = self._claim(batch)
        if run is None:
            return
        at = run.first - batch.first  # the server passes on the whole answer
        found, statuses = found[at : at + len(run.letters)], batch.statuses[at : at + len(run.letters)]
        self.pace.learn(batch.number, run.arguments)
        step = 1 if any(statuses) else len(statuses)  # chunks with an answer out of the ordinary come by themselves
        for at in range(0, len(statuses), step):
            try:
                self._answer(run.cut(at, at + step), statuses[at], found[at : at + step])
            except ProtocolError:
                self._again(run.cut(at))  # for the next connection
                raise

    def printed(self, batch: Batch) -> None:
        """An OUTPUT: a line, or a count of lines that were left out. It has an index while its chunk is out."""
        if batch.flags == MORE:
            self.sink.leave_out(batch.number, batch.attempt)
            return
        runs = [run for run in self.out.values() if run.first <= batch.first < run.end]
        index = None
        if runs:
            at = batch.first - runs[0].first
            index = runs[0].cut(at, at + 1).index(batch.attempt)
        self.sink.hear(bytes(joined(batch.letters()[0])).decode(errors="replace"), index, batch.number)

    def gone(self, batch: Batch) -> None:
        """GONE: these chunks are sent again. Ignored if nobody waits for them."""
        run = self._claim(batch)
        if run is None:
            return
        if batch.flags == Gone.LOST:
            run.charge(LOST)
        self._again(run)

    def _claim(self, batch: Batch) -> Run | None:
        """The part of a batch that is out under this attempt, which is not any more; None if there is none."""
        run = self.out.get(batch.attempt)
        if run is None or batch.end <= run.first or run.end <= batch.first:
            return None
        low, high = max(batch.first - run.first, 0), batch.end - run.first
        if low and batch.end < run.end:
            raise ProtocolError(f"chunks {batch.first} to {batch.end - 1} were answered before those in front of them")
        del self.out[batch.attempt]
        if low or batch.end < run.end:
            self.out[batch.attempt] = run.cut(0, low) if low else run.cut(high)
        return run.cut(low, high)

    def _answer(self, run: Run, status: int, found: list[Letter]) -> None:
        """Answers of this status. A note on a death, a time limit or an alteration is of one chunk."""
        if status in (Status.DIED, Status.TIMEOUT):
            note = read_object("the note on a lost chunk", bytes(joined(found[0])), NOTE)
            if note["phase"] == "function":
                self._deaths += 1
                if self._deaths >= ATTEMPTS:
                    self.spent = True
                    self.sink.fail(worker_lost("workers died while they loaded the function", note))
            else:
                limit = f"timeout={self.declaration.get('timeout')} s" if status == Status.TIMEOUT else ""
                run.die(note, limit)
        elif status == Status.ALTERED:
            run.charge(ALTERED)
        else:
            self._deaths = 0
            self.spent = self.spent or status == Status.FAILED
            run.status, run.answers = status, found
            self.sink.put(run)
            return
        self._again(run)

    # Loading: the caller's thread, without the lock.

    def open(self, runs: Sequence[Run]) -> Taken:
        """Load a delivery: values, with None for each error. Raises the error of the whole job."""
        values: list[Any] = []
        errors: dict[int, BaseException] = {}
        for run in runs:
            start = len(values)
            if not run.answers:
                values += [None] * run.arguments
            elif run.status == Status.VALUES:
                lists = outcomes.load_values(self.context, [
                    joined(letter) if type(letter) is LongLetter else letter  # type: ignore[misc]
                    for letter in run.answers])
                values.extend(chain.from_iterable(lists))
            else:
                some, raised = self.load(run.status, run.answers[0])
                values += some
                errors.update({start + at: mark(error, index=run.index(at)) for at, error in raised.items()})
            errors.update({start + at: error for at, error in run.lost.items()})
            if len(values) - start != run.arguments:  # all behind would be in the wrong place
                raise ProtocolError(f"{len(values) - start} results of {run.arguments} arguments")
        return runs[0].index(0), values, errors

    def load(self, status: int, letter: Letter) -> tuple[list[Any], dict[int, BaseException]]:
        """Load the answer of one chunk: values, and errors by offset. Raises the error of the whole job."""
        values, errors = outcomes.load_outcomes(self.context, joined(letter), status != Status.VALUES)
        for error in errors.values():
            if isinstance(error, ModuleNotFoundError) and error.name and getattr(error, "node", None) is not None:
                error.msg = f"{error} on node {vars(error)['node']}: {reason(error.name)}"
        if status == Status.FAILED:
            raise errors[0]
        return values, errors


@functools.lru_cache(1)
def _letter_of_sources(sources: Sources) -> Letter:
    """Hashed once for all jobs."""
    return letter_of(sources.letter, "the set of modules beside the script")
