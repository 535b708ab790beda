"""A Link that only records what is posted: the test plays the server and the worker. No cluster, no socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from conftest import SECONDS, wait_until

from achilles.controller.call import Call
from achilles.controller.job import Job
from achilles.controller.link import Link
from achilles.dropin.base_pool import Dispatcher
from achilles.objects import letters, outcomes
from achilles.protocol.frames import MORE, Batch, Gone, Kind, Status, joined, letter_of

__all__ = [
    "MOMENT_SECONDS", "FakeLink", "OpenCalls", "begin", "begin_fed", "begin_fixture", "make_job", "take_all", "values"]

MOMENT_SECONDS = 0.25  # for what must not happen


class OpenCalls(Dispatcher):
    """A dispatcher without a thread: its table of open calls."""

    def __init__(self, link: Link) -> None:
        self.link, self.open = link, {}  # type: ignore[assignment]


class FakeLink(Link):
    """`workers` of the cluster, and of its largest node."""

    def __init__(self, workers: int = 8, largest: int = 0, processes: int | None = None) -> None:
        super().__init__(processes)
        self.workers, self.largest = workers, largest or workers
        self.context = letters.Context(caller=False)
        self.came = threading.Condition()  # guards what follows
        self.posts: list[tuple[Kind, Batch]] = []

    def post(self, kind: Kind, body: Batch) -> None:
        assert self.lock._is_owned()
        with self.came:
            self.posts.append((kind, body))
            self.came.notify_all()

    def set_workers(self, workers: int, largest: int = 0) -> None:
        """The server says CLUSTER."""
        with self.changed:
            self.workers, self.largest = workers, largest or workers
            self.changed.notify_all()
            self.fill()

    # What was posted.

    def of(self, kind: Kind) -> list[Batch]:
        with self.came:
            return [body for came, body in self.posts if came is kind]

    def wait(self, happened: Any, seconds: float = SECONDS) -> Any:
        """Whether `happened()` is true after some post, or now."""
        with self.came:
            return self.came.wait_for(happened, seconds)

    def wait_for_more(self, count: int) -> None:
        """For 10 ms at most, until more than so many batches were sent."""
        self.wait(lambda: len(self.of(Kind.TASK)) > count, 0.01)

    def batches(self, count: int = 0) -> list[Batch]:
        """The TASKs, once there are so many."""
        assert self.wait(lambda: len(self.of(Kind.TASK)) >= count), self.posts
        return self.of(Kind.TASK)

    def chunks(self, count: int = 0) -> list[list[Any]]:
        """The arguments of each chunk that was sent, once there are so many; None where an offset is skipped."""
        assert self.wait(lambda: sum(batch.count for batch in self.of(Kind.TASK)) >= count), self.posts
        return [each for batch in self.of(Kind.TASK) for each in self.arguments(batch)]

    def arguments(self, batch: Batch) -> list[list[Any]]:
        """What a worker would call the function with, a list for each chunk; None where an offset is skipped."""
        found = []
        for letter in batch.letters():
            arguments, skipped = letters.load_chunk(self.context, joined(letter))
            found.append([None if at in skipped else argument for at, argument in enumerate(arguments)])
        return found

    # What the server says.

    def answer(
        self, batch: Batch, results: Iterable[list[Any]], *, first: int | None = None, us: int = 0,
        errors: dict[int, BaseException] | None = None, status: int | None = None,
    ) -> None:
        """RESULT: these values, a list for each chunk from `first` on. `errors` are those of each chunk, by offset."""
        found, statuses = [], b""
        for each in results:
            raised, parts = outcomes.dump_outcomes(self.context, each, dict(errors or {}))
            found.append(letter_of(b"".join(parts)))
            statuses += bytes([raised if status is None else status])
        start = batch.first if first is None else first
        self.handle_batch(Kind.RESULT, Batch.pack(
            batch.job, start, found, attempt=batch.attempt, number=us, statuses=statuses))

    def square(self, batch: Batch, us: int = 0) -> None:
        """RESULT: the square of each argument of a batch."""
        self.answer(batch, [[x if x is None else x * x for x in each] for each in self.arguments(batch)], us=us)

    def finish(self) -> None:
        """RESULT: squares for all that was sent, and for whatever that brings. What is answered already is ignored."""
        done = 0
        while done < len(found := self.of(Kind.TASK)):
            self.square(found[done])
            done += 1

    def say(self, batch: Batch, status: int, number: int | None = None, letter: bytes = b"") -> None:
        """RESULT of one chunk, the first one where no `number` is given, with this letter."""
        self.handle_batch(Kind.RESULT, Batch.pack(
            batch.job, batch.first if number is None else number, [letter], attempt=batch.attempt,
            statuses=bytes([status])))

    def die(
        self, batch: Batch, offset: int = -1, phase: str = "call", *, number: int | None = None,
        status: int = Status.DIED, **more: Any,
    ) -> None:
        """RESULT: a worker died of this chunk."""
        note = {"offset": offset, "phase": phase, "node": 4, "pid": 77, "exitcode": -9} | more
        self.say(batch, status, number, json.dumps(note).encode())

    def gone_back(self, batch: Batch, reason: Gone = Gone.RETURNED, first: int | None = None, count: int = 0) -> None:
        """GONE of a range of a batch, or of all of it."""
        start = batch.first if first is None else first
        self.handle_batch(Kind.GONE, Batch(
            batch.job, start, count or batch.end - start, batch.attempt, flags=reason))

    def print(self, batch: Batch, text: str, offset: int = 0, *, number: int | None = None, node: int = 5) -> None:
        """OUTPUT: a line of one chunk, the first one where no `number` is given."""
        self.handle_batch(Kind.OUTPUT, Batch.pack(
            batch.job, batch.first if number is None else number, [text.encode()], attempt=offset, number=node))

    def leave_out(self, batch: Batch, lines: int, node: int = 5) -> None:
        """OUTPUT: a count of lines."""
        self.handle_batch(Kind.OUTPUT, Batch.pack(batch.job, 0, [b""], attempt=lines, number=node, flags=MORE))

    def give(self, batch: Batch, workers: int) -> None:
        """GIVEN."""
        self.handle_batch(Kind.GIVEN, Batch(batch.job, batch.first, batch.count, batch.attempt, workers))


def make_job(link: Link, number: int = 0, **options: Any) -> Job:
    """A job of this link, which has its number."""
    with link.lock:
        return link.start(Job(letters.Context(caller=True), bytes(15) + bytes([number]), b"a function", **options))


def begin(
    link: Link, args: Any, *, inline: bool = False, options: dict[str, Any] | None = None, us: float = 0.0, **more: Any
) -> Call:
    """A call of a new job, begun. `us`: what an argument is known to take."""
    call = Call(link, make_job(link, options=options), args, **more)
    call.job.pace.us = us
    call.start(inline)
    return call


def begin_fed(link: FakeLink, args: Any, **more: Any) -> Call:
    """A call of which nothing is sent before all is fed, however slow this machine is."""
    link.connected = False
    call = begin(link, args, flat=True, **more)
    wait_until(lambda: call.ended)
    link.connected = True
    with link.lock:
        link.fill()
    return call


@pytest.fixture
def begin_fixture() -> Iterator[Any]:
    """`begin` on a link of its own: `start(args, workers=8, largest=…, …)`. Calls are stopped at the end."""
    made: list[Call] = []

    def run(args: Any, workers: int = 8, largest: int = 0, processes: int | None = None, **more: Any) -> Call:
        made.append(begin(FakeLink(workers, largest, processes), args, **more))
        return made[-1]

    yield run
    for call in made:
        call.close(None, InterruptedError())


def take_all(call: Call) -> list[Any]:
    """What is left of a call that is answered."""
    found = []
    while (taken := call.take(SECONDS)) is not None:
        found.append(taken)
    return found


def values(call: Call) -> list[Any]:
    """The values that are left of a call that is answered, end to end."""
    return [value for _, some, _ in take_all(call) for value in some]
