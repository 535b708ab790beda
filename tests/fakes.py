"""A real server in a thread of this process, and a node that is played by a thread of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from achilles.config import Secret, Settings
from achilles.controller import connection
from achilles.objects import letters, outcomes
from achilles.protocol import auth, channel
from achilles.protocol.frames import ASKED, Frame, Kind, Rows, Status
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


class Node:
    """A node of one thread: it runs slices where it reads them, in this process; `most` of them, then it holds them."""

    def __init__(self, port: int, cpu_count: int = 8, python: str = channel.PYTHON, most: float = float("inf")) -> None:
        key = connection.derive_key(USER, SECRET)
        self.link = channel.connect("127.0.0.1", port, auth.NODE, USER, key)
        self.changed = threading.Condition()  # guards all below
        self.came: list[Frame] = []
        self.most = most
        self.held: list[Rows] = []  # single slices that wait for room in `most`
        self._functions: dict[str, Any] = {}
        self._jobs: dict[int, tuple[letters.Context, Any]] = {}
        self.link.send(Kind.HELLO, channel.hello(cpu_count) | {"python": python})
        self.link.start_writer()
        self.thread = threading.Thread(target=self.link.run, args=(self._handle,), name="node in a test")
        self.thread.start()
        self.wait(lambda: self.kinds(Kind.HELLO))

    def kinds(self, kind: Kind) -> list[Any]:
        return [body for came, body in self.came if came is kind]

    def tasks(self) -> list[int]:
        """The numbers of the slices that came, in their order."""
        return [number for rows in self.kinds(Kind.TASK) for number in rows.slices]

    def wait(self, happened: Any, seconds: float = SECONDS) -> Any:
        with self.changed:
            value = self.changed.wait_for(happened, seconds)
        assert value, [kind.name for kind, _ in self.came]
        return value

    def let(self, most: float = float("inf")) -> None:
        """Run so many slices more."""
        with self.changed:
            self.most = most
            self._run()

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
            if kind is Kind.FUNCTION:
                (_, letter), = body.letters()
                self._functions[letters.letter_digest(letter).hex()] = b"".join(letter)
            elif kind is Kind.JOB:
                self._jobs[body["job"]] = letters.Context(caller=False), self._functions[body["function"]]
            elif kind is Kind.TASK:
                self.held += [body.cut(n, n + 1) for n in range(len(body))]
                self._run()
            elif kind is Kind.RECALL:
                self.link.send(Kind.RETURNED, Rows(body["job"], b"", pace=ASKED))
            elif kind in (Kind.CANCEL, Kind.END):
                self.held = [rows for rows in self.held if rows.job != body["job"]]
            self.changed.notify_all()

    def _run(self) -> None:
        while self.held and self.most > 0:
            self.most -= 1
            rows = self.held.pop(0)
            context, letter = self._jobs[rows.job]
            func, callback = context.load(letter)
            (_, slice_), = rows.letters()
            arguments, skipped = letters.load_slice(context, b"".join(slice_))
            results: list[Any] = [None] * len(arguments)
            errors: dict[int, BaseException] = {}
            for place, argument in enumerate(arguments):
                if place not in skipped:
                    try:
                        results[place] = callback(func(argument)) if callback else func(argument)
                    except Exception as e:
                        errors[place] = e
            raised, parts = outcomes.dump_outcomes(context, results, errors)
            answer = [b"".join(parts)]
            status = Status.RAISED if raised else Status.VALUES
            self.link.send(Kind.RESULT, Rows.single(
                rows.job, rows.slices[0], rows.attempts[0], status, answer, letters.letter_digest(answer), pace=1))
