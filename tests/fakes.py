"""A real server in a thread of this process, and a node that is played by a thread of it."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from achilles.config import Secret, Settings
from achilles.objects import letters, outcomes
from achilles.protocol import auth, connect
from achilles.protocol.frames import (
    SHORT_LETTER_BYTES,
    Batch,
    Buffer,
    Frame,
    Gone,
    Kind,
    Letter,
    LongLetter,
    Status,
    digest,
    joined,
)
from achilles.server.listen import Server

SECONDS = 20.0  # tells a hang from a wait
USER, SECRET = "ann", "correct horse battery"


def settings(port: int = 0, secret: str = SECRET) -> Settings:
    return Settings("127.0.0.1", port, USER, Secret(secret))


def address(port: int) -> dict[str, Any]:
    """What the calls take."""
    return {"host": "127.0.0.1", "port": port, "username": USER, "secret_key": SECRET}


@contextlib.contextmanager
def serving(port: int = 0) -> Iterator[Server]:
    """A server that listens, until the block ends or `server.end` is called."""
    server = Server(settings(port))
    thread = threading.Thread(target=server.run, name="server in a test")
    thread.start()
    try:
        yield server
    finally:
        server.end("restart")
        thread.join(SECONDS)
        assert not thread.is_alive(), "the server did not end"


class Held(NamedTuple):
    """A chunk that a Node was given, and has not answered."""

    job: int
    number: int
    attempt: int
    letter: Letter


class Node:
    """A node of one thread: it runs chunks where it reads them, in this process; `most` of them, then it holds them."""

    def __init__(self, port: int, cpu_count: int = 8, python: str = connect.PYTHON, most: float = float("inf")) -> None:
        self.link = connect.connect("127.0.0.1", port, auth.NODE, USER, _derive_key(USER, SECRET))
        self.changed = threading.Condition()  # guards all below
        self.came: list[Frame] = []
        self.most = most
        self.held: list[Held] = []  # chunks that wait for room in `most`
        self._jobs: dict[int, tuple[letters.Context, Letter]] = {}  # with the letter of the function
        self.link.send(Kind.HELLO, connect.hello(cpu_count) | {"python": python})
        self.link.start_writer()
        self.thread = threading.Thread(target=self.link.run, args=(self._handle,), name="node in a test")
        self.thread.start()
        self.wait(lambda: self.kinds(Kind.HELLO))

    def kinds(self, kind: Kind) -> list[Any]:
        return [body for came, body in self.came if came is kind]

    def tasks(self) -> list[int]:
        """The numbers of the chunks that came, in their order."""
        return [number for batch in self.kinds(Kind.TASK) for number in range(batch.first, batch.end)]

    def wait(self, happened: Any, seconds: float = SECONDS) -> Any:
        with self.changed:
            value = self.changed.wait_for(happened, seconds)
        assert value, [kind.name for kind, _ in self.came]
        return value

    def let(self, most: float = float("inf")) -> None:
        """Run so many chunks more."""
        with self.changed:
            self.most = most
            self._run()

    def give_back(self, reason: Gone = Gone.RETURNED) -> None:
        """Return all that is held."""
        with self.changed:
            self._return(lambda held: True, reason)

    def close(self) -> None:
        self.link.close()
        self.thread.join(SECONDS)

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _handle(self, frame: Frame) -> None:
        kind, body = frame
        with self.changed:
            self.came.append(frame)
            if kind is Kind.JOB:
                self._jobs[body.job] = letters.Context(caller=False), body.letters()[1]
            elif kind is Kind.TASK:
                self.held += [Held(body.job, number, body.attempt, letter)
                              for number, letter in enumerate(body.letters(), body.first)]
                self._run()
            elif kind is Kind.CANCEL:
                self._return(lambda held: held.job == body.job and body.first <= held.number < body.end)
            elif kind is Kind.END:
                self._return(lambda held: held.job == body.job)
                del self._jobs[body.job]
            self.changed.notify_all()

    def _return(self, goes: Callable[[Held], bool], reason: Gone = Gone.RETURNED) -> None:
        for held in filter(goes, self.held):
            self.link.send(Kind.RETURNED, Batch(held.job, held.number, 1, held.attempt, 0, reason))
        self.held = [held for held in self.held if not goes(held)]

    def _run(self) -> None:
        while self.held and self.most > 0:
            self.most -= 1
            held = self.held.pop(0)
            context, function = self._jobs[held.job]
            func, callback = context.load(joined(function))
            arguments, skipped = letters.load_chunk(context, joined(held.letter))
            results: list[Any] = [None] * len(arguments)
            errors: dict[int, BaseException] = {}
            for offset, argument in enumerate(arguments):
                if offset not in skipped:
                    try:
                        results[offset] = callback(func(argument)) if callback else func(argument)
                    except Exception as e:
                        errors[offset] = e
            raised, parts = outcomes.dump_outcomes(context, results, errors)
            status = Status.RAISED if raised else Status.VALUES
            self.link.send(Kind.RESULT, Batch.pack(
                held.job, held.number, [letter_of(parts)], attempt=held.attempt, number=1, statuses=bytes([status])))


def letter_of(parts: Sequence[Buffer]) -> Letter:
    """These buffers as a letter, short or long."""
    length = sum(map(len, parts))
    return LongLetter(parts, digest(parts), length) if length > SHORT_LETTER_BYTES else b"".join(parts)


_derive_key = functools.cache(auth.derive_key)  # 40 ms
