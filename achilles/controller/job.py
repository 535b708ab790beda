"""A job in the controller: a function with its options, and the chunks of it that have no result.

Knows which chunks wait and which are out under which attempt, keeps each letter until its result is taken, and counts
deaths, losses and alterations. Knows no connection: frames go through its `link`. How arguments become chunks is
`feeder.py`'s, where answers go is `results.py`'s.

::

    enter ─▶ waiting ──next_batch──▶ out[attempt] ──answers──▶ sink.put
                ▲                        │
                └────── again ◀── GONE, altered, died: at the front, a doubtful chunk alone

`link.lock` guards everything here; every method but `open` and `open_one` needs it. The reader thread calls `answered`,
`printed` and `gone`. The caller's thread calls `open`: it alone loads results, and the reader runs no code of users.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
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
    Letter,
    LongLetter,
    Status,
    joined,
    letter_of,
)
from ..protocol.kinds import read_object
from .pace import Pace
from .results import NOBODY, Answered, Run, Sink
from .trouble import ATTEMPTS, NO_TROUBLE, Trouble, lost

__all__ = ["Job", "Taken"]

RUN_CHUNKS = 4096  # in one Run of the queue: cutting a batch from it copies the rest

Taken = tuple[int, list[Any], dict[int, BaseException]]  # index of the first value, values, offset -> error


class Job:
    """A function and its options, under one number on a connection.

    :param context: of objects/, in which everything of this job is dumped and loaded.
    :param context_id: what nodes know it by, 16 bytes.
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
            self.sources = letter_of(sources.letter, "the set of modules beside the script")
            self.declaration["sources"] = sources.name
        self.declaration.update({name: value for name, value in (options or {}).items() if value is not None})
        self.number = 0  # the link counts
        self.declared = False  # on the connection there is
        self.spent = False  # the next call of the function declares it anew
        self.pace = Pace()
        self.next = 0  # number of the next chunk
        self.left = 0.0
        self.waiting: deque[Run] = deque()
        self.out: dict[int, Run] = {}  # by attempt
        self.sink: Sink = NOBODY
        self._attempt = 0
        self._troubles: dict[int, Trouble] = {}
        self._deaths = 0  # workers that died while they loaded the function, without an answer between

    @property
    def owes(self) -> bool:
        """Whether a chunk has no answer."""
        return bool(self.waiting or self.out)

    # Sending.

    def enter(self, run: Run) -> None:
        """Queue chunks, which are the next ones of this job."""
        self.next = run.end
        last = self.waiting[-1] if self.waiting else None
        if (last and last.end == run.first and last.size == run.size and last.place == run.place and not last.alone
                and last.arguments == last.size * len(last.letters) and len(last.letters) < RUN_CHUNKS):
            last.letters += run.letters
            last.arguments += run.arguments
        else:
            self.waiting.append(run)

    def waits(self) -> int:
        """Arguments that wait; more where chunks are sent again."""
        return (self.next - self.waiting[0].first) * self.waiting[0].size

    def next_batch(self, worth_us: float, workers: int) -> tuple[Batch, Run, Run]:
        """Cut a batch from the chunks that wait: there are some. Also its chunks, and the rest, for `send`."""
        run = self.waiting[0]
        count = 1
        if not run.alone:
            count = self.pace.chunks(run.size, worth_us, self.left + self.next - run.first, workers)
            count = min(count, self.declaration.get("maxtasksperchild", count), len(run.letters))
        while count > 1 and sum(map(len, run.letters[:count])) > MAX_SHORT_BYTES:
            count //= 2
        run, rest = run.cut(0, count), run.cut(count)
        self._attempt = (self._attempt + 1) & U32
        flags = TELL if run.end > self.sink.given else 0
        if run.alone and self._troubles.get(run.first, NO_TROUBLE).has_died:
            flags |= CAREFUL
        number = min(math.ceil(self.pace.us * run.arguments), U32)
        batch = Batch.pack(self.number, run.first, run.letters, attempt=self._attempt, number=number, flags=flags)
        return batch, run, rest

    def send(self, batch: Batch, run: Run, rest: Run) -> None:
        """A batch was posted: its chunks are out. Calls nothing before its end, so that Ctrl-C finds all or nothing."""
        self.out[batch.attempt] = run
        if rest.letters:
            self.waiting[0] = rest
        else:
            self.waiting.popleft()

    def withdraw(self, number: int) -> bool:
        """Take a chunk out of the queue; False if it was sent already."""
        for at, run in enumerate(self.waiting):
            if run.first <= number < run.end:
                del self.waiting[at]
                for piece in run.cut(number - run.first + 1), run.cut(0, number - run.first):
                    if piece.letters:
                        self.waiting.insert(at, piece)
                return True
        return False

    def forget_connection(self) -> None:
        """The connection is lost: every chunk that was out waits again, uncharged."""
        out, self.out, self.declared = sorted(self.out.values(), key=lambda run: run.first), {}, False
        for run in reversed(out):
            self._again(run)

    def _again(self, run: Run) -> None:
        """Chunks go to the front of the queue, but for what is given up and what nobody wants any more.

        A doubtful chunk goes by itself.
        """
        runs, numbers = [run], range(run.first, run.end)
        if any(self._troubles.get(number, NO_TROUBLE).is_doubtful or not self.sink.wants(number) for number in numbers):
            runs = [run.cut(at, at + 1) for at, number in enumerate(numbers) if self.sink.wants(number)]
        for piece in reversed(runs):
            trouble = self._troubles.get(piece.first, NO_TROUBLE)
            piece.alone = trouble.is_doubtful
            if trouble.lost and len(trouble.lost) == piece.arguments:
                self.give_up(piece, self._troubles.pop(piece.first).lost)
                continue
            if trouble.lost:
                skips = letters.with_skips([joined(piece.letters[0])], trouble.lost)
                piece.letters = [letter_of(b"".join(skips))]
            self.waiting.appendleft(piece)

    # Answers: the reader thread.

    def answered(self, batch: Batch, found: list[Letter]) -> None:
        """A RESULT with these letters. Ignored if nobody waits for it."""
        if batch.attempt in self.out and batch.end > self.sink.given:
            raise ProtocolError(f"chunk {batch.end - 1} was answered before it was given")
        run = self._claim(batch)
        if run is None:
            return
        at = run.first - batch.first  # the server passes on what overlaps
        found, statuses = found[at : at + len(run.letters)], batch.statuses[at : at + len(run.letters)]
        self.pace.learn(batch.number, run.arguments)
        if not any(statuses):
            self._put(run, statuses, found)
            return
        for at, (status, letter) in enumerate(zip(statuses, found)):
            try:
                self._answer(run.cut(at, at + 1), status, letter)
            except ProtocolError:
                self._again(run.cut(at))  # for the next connection
                raise

    def printed(self, batch: Batch) -> None:
        """An OUTPUT: a line, or a count of lines that were left out. It has an index while its chunk is out."""
        if batch.flags == MORE:
            self.sink.leave_out(batch.number, batch.attempt)
            return
        runs = [run for run in self.out.values() if run.first <= batch.first < run.end]
        index = runs[0].cut(batch.first - runs[0].first).index(batch.attempt) if runs else None
        self.sink.hear(bytes(joined(batch.letters()[0])).decode(errors="replace"), index, batch.number)

    def gone(self, batch: Batch) -> None:
        """GONE: these chunks are sent again. Ignored if nobody waits for them."""
        run = self._claim(batch)
        if run is None:
            return
        for at in range(len(run.letters) if batch.flags == Gone.LOST else 0):
            chunk = run.cut(at, at + 1)
            self._trouble(chunk).lose(chunk)
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

    def _put(self, run: Run, statuses: bytes, found: list[Letter]) -> None:
        """These are answers, not notes of what went wrong."""
        gone: dict[int, BaseException] = {}
        for number in self._troubles and range(run.first, run.end):
            gone.update(self._troubles.pop(number, NO_TROUBLE).lost)  # of a chunk that was alone
        self._deaths = 0
        self.sink.put(Answered(run, statuses, found, gone))

    def _answer(self, chunk: Run, status: int, letter: Letter) -> None:
        """One answer out of the ordinary, or in the company of such a one."""
        if status in (Status.DIED, Status.TIMEOUT):
            note = read_object("the note on a lost chunk", bytes(joined(letter)), NOTE)
            limit = f"timeout={self.declaration.get('timeout')} s" if status == Status.TIMEOUT else ""
            self._die(chunk, note, limit)
        elif status == Status.ALTERED:
            self._trouble(chunk).alter(chunk)
        else:
            self.spent = self.spent or status == Status.FAILED
            self._put(chunk, bytes([status]), [letter])
            return
        self._again(chunk)

    def _trouble(self, chunk: Run) -> Trouble:
        return self._troubles.setdefault(chunk.first, Trouble())

    def _die(self, chunk: Run, note: dict[str, Any], limit: str) -> None:
        """A worker died of this chunk, or was killed where it ran longer than `limit`, a text."""
        if note["phase"] != "function":
            self._trouble(chunk).die(chunk, note, limit)
            return
        self._deaths += 1
        if self._deaths >= ATTEMPTS:
            self.spent = True
            self.sink.fail(lost("workers died while they loaded the function", note))

    def give_up(self, chunk: Run, gone: Mapping[int, BaseException]) -> None:
        """No argument of a chunk has a result, for these reasons."""
        self.next = max(self.next, chunk.end)
        self.sink.put(Answered(chunk, bytes([Status.RAISED]), [None], gone))

    # Loading: the caller's thread, without the lock.

    def open(self, pieces: Sequence[Answered]) -> Taken:
        """Load a delivery: values, with None for each error. Raises what the job as a whole failed with."""
        values: list[Any] = []
        errors: dict[int, BaseException] = {}
        for run, statuses, found, gone in pieces:
            start = len(values)
            if not any(statuses):
                lists = outcomes.load_values(self.context, [
                    joined(letter) if type(letter) is LongLetter else letter for letter in found])  # type: ignore[misc]
                values.extend(chain.from_iterable(lists))
                statuses = b""
            for status, letter in zip(statuses, found):
                some, raised = ([None] * run.arguments, {}) if letter is None else self._load(status, letter)
                for offset, error in raised.items():
                    errors[len(values) + offset] = mark(error, index=run.index(len(values) - start + offset))
                values += some
            errors.update({start + offset: error for offset, error in gone.items()})
            if len(values) - start != run.arguments:  # all behind would be in the wrong place
                raise ProtocolError(f"{len(values) - start} results of {run.arguments} arguments")
        return pieces[0].run.index(0), values, errors

    def open_one(self, status: int, letter: Letter) -> Any:
        """Load the answer of a chunk of one argument, and return or raise it."""
        if status == Status.VALUES:
            return outcomes.load_values(self.context, [joined(letter)])[0][0]
        values, errors = self._load(status, letter)
        if errors:
            raise errors[0]
        return values[0]

    def _load(self, status: int, letter: Letter) -> tuple[list[Any], dict[int, BaseException]]:
        values, errors = outcomes.load_outcomes(self.context, joined(letter), status != Status.VALUES)
        for error in errors.values():
            if isinstance(error, ModuleNotFoundError) and error.name:
                error.msg = f"{error} on node {getattr(error, 'node', None)}: {reason(error.name)}"
        if status == Status.FAILED:
            raise errors[0]
        return values, errors
