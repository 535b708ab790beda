"""A job in the controller: a function with its options, and the chunks of it that have no result.

Knows which chunks wait and which are out under which attempt, keeps each letter until its result is taken, and counts
deaths, losses and alterations. Knows no connection: frames go through its `link`. How arguments become chunks is
`feeder.py`'s, where answers go is `results.py`'s.

::

    enter ─▶ waiting ──next_batch──▶ out[attempt] ──answers──▶ sink.put
                ▲                        │
                └────── again ◀── GONE, altered, died: at the front, a doubtful chunk alone

`link.lock` guards everything here; every method but `answers` and `open` needs it. The reader thread calls `answers`,
`gone` and `given`. The caller's thread calls `open`: it alone loads results, and the reader runs no code of users.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Mapping
from itertools import chain
from typing import Any

from ..errors import ProtocolError
from ..objects import letters, outcomes
from ..objects.outcomes import mark
from ..protocol.fields import read_object
from ..protocol.frames import (
    CAREFUL,
    MAX_SHORT_BYTES,
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
from .pace import Pace
from .results import Answered, PacketResults, Run, Sink
from .singles import Singles
from .trouble import ATTEMPTS, Trouble, explained, lost

__all__ = ["Job", "Taken"]

RUN_CHUNKS = 4096  # in one Run of the queue: cutting a batch from it copies the rest

Taken = tuple[int, list[Any], dict[int, BaseException]]  # index of the first value, values, offset -> error


class Job:
    """A function and its options, under one number on a connection.

    :param context: of objects/, in which everything of this job is dumped and loaded.
    :param context_id: what nodes know it by, 16 bytes.
    :param options: those of a declaration; None values are left out.
    :ivar sink: where answers go.  :ivar left: chunks that the call still has to cut, infinity where nobody knows.
    """

    def __init__(
        self, context: letters.Context, context_id: bytes, function: Letter, initializer: Letter | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.context, self.context_id = context, context_id.hex()
        self.function, self.initializer = function, initializer
        self.options = {name: value for name, value in (options or {}).items() if value is not None}
        self.number = 0  # the link counts
        self.declared = False  # on the connection there is
        self.ended = False
        self.spent = False  # the next call of the function declares it anew
        self.pace = Pace()
        self.next = 0  # number of the next chunk
        self.left = 0.0
        self.waiting: deque[Run] = deque()
        self.queued = 0  # chunks in it
        self.out: dict[int, Run] = {}  # by attempt
        self.sink: Sink | None = None
        self._attempt = 0
        self._troubles: dict[int, Trouble] = {}
        self._deaths = 0  # workers that died while they loaded the function, without an answer between

    @property
    def owes(self) -> bool:
        """Whether a chunk has no answer."""
        return bool(self.waiting or self.out)

    def declaration(self) -> dict[str, Any]:
        """The first letter of its JOB, as an object."""
        return {"context": self.context_id, "initializer": self.initializer is not None, **self.options}

    # Sending.

    def enter(self, run: Run) -> None:
        """Queue chunks, which are the next ones of this job."""
        self.next = run.end
        self.queued += len(run.letters)
        last = self.waiting[-1] if self.waiting else None
        if (last and last.end == run.first and last.size == run.size and len(last.letters) < RUN_CHUNKS
                and last.arguments == last.size * len(last.letters) and not last.alone and last.place == run.place
                and self._wants_given(last) == self._wants_given(run)):  # those that are sent again were given
            last.letters += run.letters
            last.arguments += run.arguments
        else:
            self.waiting.append(run)

    def next_batch(self, worth_us: float, workers: int) -> Batch:
        """Cut a batch from the chunks that wait. There are some."""
        run = self.waiting.popleft()
        count = 1 if run.alone else self.pace.chunks(run.size, worth_us, self.left + self.queued, workers)
        count = min(count, self.options.get("maxtasksperchild", count), len(run.letters))
        while count > 1 and sum(map(len, run.letters[:count])) > MAX_SHORT_BYTES:
            count //= 2
        if count < len(run.letters):
            self.waiting.appendleft(run.cut(count))
            run = run.cut(0, count)
        self.queued -= count
        self._attempt = (self._attempt + 1) & U32
        self.out[self._attempt] = run
        flags = TELL if self._wants_given(run) else 0
        if run.alone and self._troubles[run.first].deaths:
            flags |= CAREFUL
        number = min(math.ceil(self.pace.us * run.arguments), U32)
        return Batch.pack(self.number, run.first, run.letters, attempt=self._attempt, number=number, flags=flags)

    def _wants_given(self, run: Run) -> bool:
        return isinstance(self.sink, PacketResults) and self.sink.tells and run.first >= self.sink.given

    def withdraw(self, number: int) -> bool:
        """Take a chunk out of the queue; False if it was sent already."""
        for at, run in enumerate(self.waiting):
            if run.first <= number < run.end:
                pieces = [run.cut(0, number - run.first), run.cut(number - run.first + 1)]
                del self.waiting[at]
                for piece in reversed([piece for piece in pieces if piece.letters]):
                    self.waiting.insert(at, piece)
                self.queued -= 1
                return True
        return False

    def forget_connection(self) -> None:
        """The connection is lost: every chunk that was out waits again, uncharged."""
        out, self.out, self.declared = sorted(self.out.values(), key=lambda run: run.first), {}, False
        for run in reversed(out):
            self._again(run)

    def _again(self, run: Run) -> None:
        """Chunks go to the front of the queue; those with a doubtful or a cancelled one among them each by itself."""
        runs, wanted = [run], self.sink.entries if isinstance(self.sink, Singles) else range(run.first, run.end)
        if any(self._is_doubtful(number) or number not in wanted for number in range(run.first, run.end)):
            runs = [run.cut(at, at + 1) for at in range(len(run.letters)) if run.first + at in wanted]
        for piece in reversed(runs):
            piece.alone = self._is_doubtful(piece.first)
            self.waiting.appendleft(piece)
            self.queued += len(piece.letters)

    def _is_doubtful(self, number: int) -> bool:
        return number in self._troubles and self._troubles[number].is_doubtful

    def abandon(self, error: BaseException, lock: threading.Lock) -> None:
        """In a child of the caller: the job is the parent's. Takes no lock; its holder may not exist."""
        self.ended, self.out = True, {}
        self.waiting.clear()
        if self.sink is not None:
            self.sink.abandon(error, lock)

    # Answers: the reader thread.

    def answered(self, batch: Batch, found: list[Letter]) -> bool:
        """A RESULT with these letters; whether a batch is not out any more. Ignored if nobody waits for it."""
        sink = self.sink
        if isinstance(sink, PacketResults) and sink.tells and batch.attempt in self.out and batch.end > sink.given:
            raise ProtocolError(f"chunk {batch.end - 1} was answered before it was given")
        run = self._claim(batch)
        if run is None:
            return False
        if len(run.letters) < batch.count:  # the server passes on what overlaps
            at = run.first - batch.first
            found, statuses = found[at : at + len(run.letters)], batch.statuses[at : at + len(run.letters)]
        else:
            statuses = batch.statuses
        over = batch.attempt not in self.out  # now: the sink may end the job
        self.pace.learn(batch.number, run.arguments)
        if not any(statuses):
            self._deaths = 0
            self._put(Answered(run, statuses, found))
        else:
            for at, (status, letter) in enumerate(zip(statuses, found)):
                try:
                    self._answer(run.cut(at, at + 1), status, letter)
                except ProtocolError:
                    self._again(run.cut(at))  # for the next connection
                    raise
        return over

    def gone(self, batch: Batch) -> bool:
        """GONE: these chunks are sent again; whether a batch is not out any more. Ignored if nobody waits for them."""
        run = self._claim(batch)
        if run is None:
            return False
        over = batch.attempt not in self.out
        if batch.flags == Gone.LOST and self._lose(run):
            for at in reversed(range(len(run.letters))):
                self._retry(run.cut(at, at + 1))
        else:
            self._again(run)
        return over

    def _claim(self, batch: Batch) -> Run | None:
        """The part of a batch that is out under this attempt, which is not any more; None if there is none."""
        run = self.out.get(batch.attempt)
        if run is None or batch.end <= run.first or run.end <= batch.first:
            return None
        low, high = max(batch.first, run.first) - run.first, min(batch.end, run.end) - run.first
        if low and high < len(run.letters):
            raise ProtocolError(f"chunks {batch.first} to {batch.end - 1} were answered before those in front of them")
        del self.out[batch.attempt]
        if low or high < len(run.letters):
            self.out[batch.attempt] = run.cut(0, low) if low else run.cut(high)
            return run.cut(low, high)
        return run

    def _put(self, answered: Answered) -> None:
        if self._troubles and isinstance(self.sink, Singles):
            for number in range(answered.run.first, answered.run.end):
                self._troubles.pop(number, None)
        if self.sink is not None:
            self.sink.put(answered)

    def _answer(self, chunk: Run, status: int, letter: Letter) -> None:
        """One answer out of the ordinary, or in the company of such a one."""
        if status == Status.ALTERED:
            self._trouble(chunk.first).alter(chunk)
            self._retry(chunk)
        elif status in (Status.DIED, Status.TIMEOUT):
            if isinstance(letter, LongLetter):
                raise ProtocolError("a note of more than 1,024 bytes on a lost chunk")
            self._die(chunk, status, read_object("the note on a lost chunk", bytes(letter), NOTE))
        else:
            self._deaths = 0
            self.spent = self.spent or status == Status.FAILED
            self._put(Answered(chunk, bytes([status]), [letter]))

    def _trouble(self, number: int) -> Trouble:
        return self._troubles.setdefault(number, Trouble())

    def _die(self, chunk: Run, status: int, note: dict[str, Any]) -> None:
        """A worker died of this chunk, or was killed for the time that it took."""
        if note["phase"] == "function":
            self._deaths += 1
            if self._deaths >= ATTEMPTS and self.sink is not None:
                self.spent = True
                self.sink.fail(lost("workers died while they loaded the function", note))
                return
        limit = f"timeout={self.options.get('timeout')} s" if status == Status.TIMEOUT else ""
        self._trouble(chunk.first).die(chunk, note, limit)
        self._retry(chunk)

    def _lose(self, run: Run) -> bool:
        """A node was lost with these chunks; whether any of them is given up."""
        chunks = [run.cut(at, at + 1) for at in range(len(run.letters))]
        return any([self._trouble(chunk.first).lose(chunk) for chunk in chunks])

    def _retry(self, chunk: Run) -> None:
        """Send a chunk again, without the arguments that are lost; if none is left, that is its answer."""
        given_up = self._trouble(chunk.first).lost
        if 0 < len(given_up) < chunk.arguments:
            skips = b"".join(letters.with_skips([joined(chunk.letters[0])], given_up))
            chunk = Run(chunk.first, chunk.start, chunk.size, [letter_of(skips)], chunk.arguments, chunk.place)
        if len(given_up) == chunk.arguments:
            self.give_up(chunk, given_up)
        else:
            self._again(chunk)

    def give_up(self, chunk: Run, lost: dict[int, BaseException]) -> None:
        """No argument of a chunk has a result, for these reasons."""
        self._trouble(chunk.first).lost.update(lost)
        if isinstance(self.sink, Singles):
            self.sink.give_up(chunk.first, self._troubles.pop(chunk.first).lost[0])
        elif self.sink is not None:
            self.sink.put(Answered(chunk, bytes([Status.RAISED]), [None]))

    # Loading: the caller's thread, without the lock.

    def open(self, answered: Answered) -> Taken:
        """Load the answers: values, with None for each error. Raises what the job as a whole failed with."""
        run, statuses, found = answered
        if not any(statuses) and not self._troubles:
            lists = outcomes.load_values(self.context, [
                joined(letter) if type(letter) is LongLetter else letter for letter in found])  # type: ignore[misc]
            values = list(chain.from_iterable(lists))
            if len(values) != run.arguments:  # all behind would be in the wrong place
                raise ProtocolError(f"{len(values)} results of {run.arguments} arguments")
            return run.start, values, {}
        values, errors = [], {}
        for at, (status, letter) in enumerate(zip(statuses, found)):
            chunk = run.cut(at, at + 1)
            some, failed = self._open_chunk(chunk, status, letter)
            errors.update({len(values) + offset: error for offset, error in failed.items()})
            values += some
        return run.start, values, errors

    def open_one(self, status: int, letter: Letter) -> Any:
        """Load the answer of a chunk of one argument, and return or raise it."""
        values, errors = outcomes.load_outcomes(self.context, joined(letter), status != Status.VALUES)
        if errors:
            raise explained(errors[0]) if status == Status.FAILED else errors[0]
        return values[0]

    def _open_chunk(self, chunk: Run, status: int, letter: Letter | None) -> tuple[list[Any], dict[int, BaseException]]:
        values: list[Any] = [None] * chunk.arguments
        errors: dict[int, BaseException] = {}
        if letter is not None:
            values, errors = outcomes.load_outcomes(self.context, joined(letter), status != Status.VALUES)
            if status == Status.FAILED:
                raise explained(errors[0])
        if len(values) != chunk.arguments:
            raise ProtocolError(f"{len(values)} results of {chunk.arguments} arguments")
        trouble = self._troubles.pop(chunk.first, None)
        if trouble is not None:
            errors.update(trouble.lost)
        if chunk.place is None:
            errors = {offset: mark(error, index=chunk.start + offset) for offset, error in errors.items()}
        return values, errors
