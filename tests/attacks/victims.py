"""Whole sessions against a real server, a real controller and a real node, altered as an attack wants them.

The attacker here plays the honest other end, too, since only so it is known to the byte what will be said; what is
altered is what somebody without the secret could alter on the way.

::

    attack_server      raw client ── AUTH HELLO STATUS JOB TASK ... ────▶ [altered] ──▶ real server
    attack_controller  raw server ── M1 M3 HELLO CLUSTER GIVEN RESULT ──▶ [altered] ──▶ achilles.map in this process
    NodeVictim         raw server ── M1 M3 HELLO STALE JOB TASK ────────▶ [altered] ──▶ real node, which comes back
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from conftest import ENCRYPT, wait_until
from faults.oracle import Oracle
from faults.work import Work

import achilles
from achilles.objects import letters, outcomes

from . import raw
from .bench import HELLO, KEY, SECRET, USER, USER_BYTES, Watched
from .raw import Chunk, Frame

LONG = bytes(range(256)) * 4 + b"!"  # the shortest long letter
FUNCTION = b"a function, to a server"
ANSWER = (1, -2, 3)  # what `abs` is called with
ALTERED = 4  # status of a RESULT
WORKER_HELLO = {"python": HELLO["python"], "version": achilles.__version__, "client_id": 0, "connections": 1}

Change = Callable[[list[bytes]], "list[bytes]"]  # a session's messages in one direction, and as they arrive


class Told(NamedTuple):
    """What a server answered."""

    welcomed: bool
    statuses: int
    errors: list[str]  # messages of ERROR frames
    rest: int  # bytes after the last good frame


def job(function: bytes, initializer: bytes | None = None, **more: Any) -> list[Chunk]:
    """The letters of a JOB: its declaration with these options, its function, perhaps an initializer."""
    context = more.pop("context") if "context" in more else os.urandom(16).hex()
    declaration = {"context": context, "initializer": initializer is not None} | more
    parts = [json.dumps(declaration).encode(), function] + ([] if initializer is None else [initializer])
    return [Chunk(n, letter=part) for n, part in enumerate(parts)]


def session_up(link: raw.Link) -> list[Frame]:
    """What a controller says: each thing is followed by a question, so that it shows how far the server has gone."""
    return [
        link.make("HELLO", HELLO), link.make("STATUS"), link.make("JOB", chunks=job(FUNCTION), job=1),
        link.make("STATUS"),
        link.make("TASK", chunks=[Chunk(0, letter=b"hello"), Chunk(1, letter=LONG)], job=1, flags=raw.TELL),
        link.make("STATUS"), link.make("CANCEL", job=1, count=1), link.make("END", job=1), link.make("STATUS"),
    ]


def attack_server(
    port: int, change: Callable[[list[bytes], list[bytes]], bytes | None], patience: float = 0.25,
) -> tuple[Told, int, int] | None:
    """One session; `change` gets its messages (AUTH and frames), and those of the server so far, and returns the
    stream to send, or None to leave it. Returns what the server said, how many questions were before the
    change, and where that was.

    A server that waits for the rest of a frame is told that there is none after `patience` seconds of its silence:
    not at once, since it drops what it has not said yet when it sees the end.
    """
    sock, m1 = raw.knock(port)
    with sock:
        signed = raw.signed_auth(b"C", USER_BYTES)
        keys = raw.session(KEY, m1, signed)
        frames = session_up(raw.Link(sock, keys, raw.UP))
        messages = [signed + keys.client_proof, *(frame.raw for frame in frames)]
        stream = change(messages, [m1])
        if stream is None:
            return None
        with contextlib.suppress(OSError):
            sock.sendall(stream)
        said = _read_until_quiet(sock, patience)
        at = first_difference(b"".join(messages), stream)
        asked = end = 0
        for frame, message in zip([None, *frames], messages):
            end += len(message)
            asked += end <= at and frame is not None and frame.kind == "STATUS"
        return _heard(said, keys), asked, at


def _read_until_quiet(sock: socket.socket, patience: float) -> bytes:
    said = b""
    sock.settimeout(patience)
    with contextlib.suppress(ConnectionError):
        try:
            while piece := sock.recv(1 << 16):
                said += piece
            return said
        except TimeoutError:
            sock.settimeout(raw.SECONDS)
            sock.shutdown(socket.SHUT_WR)
            said += raw.read_to_end(sock)
    return said


def _heard(said: bytes, keys: raw.Keys) -> Told:
    here, there = socket.socketpair()
    with here, there:
        there.settimeout(raw.SECONDS)
        writer = threading.Thread(target=lambda: (here.sendall(said), here.shutdown(socket.SHUT_WR)))
        writer.start()
        try:
            welcomed = said[: raw.PROOF_BYTES] == keys.server_proof
            frames = []
            if welcomed:
                raw.read(there, raw.PROOF_BYTES)
                frames = raw.Link(there, keys, raw.UP).rest()
            used = sum(len(frame.raw) for frame in frames) + (raw.PROOF_BYTES if welcomed else 0)
            while there.recv(1 << 16):
                pass
        finally:
            writer.join()
    errors = [frame.body["message"] for frame in frames if frame.kind == "ERROR"]
    return Told(welcomed, sum(frame.kind == "STATUS" for frame in frames), errors, len(said) - used)


def first_difference(one: bytes, other: bytes) -> int:
    """The first place at which two streams differ; the end of the shorter where that is none."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


class Called(NamedTuple):
    """What a call made of a session."""

    value: Any
    error: BaseException | None
    said: list[Frame]  # by the controller


def attack_controller(
    change: Change, way: str = "map", *, goodbye: str | None = None,
    answers: Sequence[Sequence[Any]] = ((1, 2, 3),), sessions: list[raw.Keys] | None = None,
    workers: int = 1, taken: int = 0,
) -> Called:
    """One session: `change` gets M1, M3, HELLO, CLUSTER, all GIVENs, RESULTs, and returns what arrives of each.

    It is asked once more, for all of them, when the TASKs have come, since GIVEN and RESULT repeat their attempts.
    `sessions` is told the keys before `change` is asked for more than M1. From the first message that is not as it
    was on, all is sent without waiting for the controller but for `taken` packets of an imap, and then the end of
    file. `workers` of the node that all is given to: so many answers has a packet.
    """
    values: list[Any] = []
    errors: list[BaseException] = []
    listening = raw.listener()
    address = {"host": "127.0.0.1", "port": listening.getsockname()[1], "username": USER, "secret_key": SECRET,
               "encrypt": ENCRYPT}

    def call() -> None:
        try:
            made = getattr(achilles, way)(abs, ANSWER, chunksize=len(ANSWER) // len(answers),
                                          reconnect_seconds=0.001, **address)
            if way == "map":
                values.append(made)
            else:
                with made:
                    values.extend(made)
        except BaseException as e:
            errors.append(e)

    victim = threading.Thread(target=call, name="victim", daemon=True)
    victim.start()
    said: list[Frame] = []
    try:
        sock = raw.accepted(listening)
        listening.close()
        with sock, contextlib.suppress(raw.Ended, OSError):
            sock.settimeout(raw.SECONDS)
            _serve(sock, change, answers, workers, said, goodbye,
                   [] if sessions is None else sessions, lambda: len(values) >= taken or bool(errors))
    finally:
        listening.close()
        victim.join(raw.SECONDS)
    assert not victim.is_alive(), "the call hangs"
    return Called(values[0] if way == "map" and values else values, errors[0] if errors else None, said)


def _serve(
    sock: socket.socket, change: Change, answers: Sequence[Sequence[Any]], workers: int, said: list[Frame],
    goodbye: str | None, sessions: list[raw.Keys], enough: Callable[[], bool],
) -> None:
    m1 = raw.greeting(os.urandom(32))
    changed = change([m1])
    sock.sendall(changed[0])
    if len(changed[0]) != len(m1):
        sock.shutdown(socket.SHUT_WR)
        raw.read_to_end(sock)
        return
    auth = raw.read(sock, raw.AUTH_BYTES)
    keys = raw.session(KEY, m1, auth[: raw.SIGNED_BYTES])
    sessions.append(keys)
    link = raw.Link(sock, keys, raw.DOWN)
    batches = [(0, len(answers), 0)]

    def make() -> list[bytes]:
        link.sequence[raw.DOWN] = 0
        down = [m1, keys.server_proof, *session_down(link, answers, workers, batches)]
        return down + ([link.make("BYE", {"reason": goodbye}).raw] if goodbye else [])

    messages = make()
    arriving = change(messages)
    waited = False
    number = 1
    while number < len(arriving):
        honest = messages[: number + 1] == arriving[: number + 1]
        if number >= 4 and messages[:4] == arriving[:4] and not waited:
            tasks = _read_tasks(link, len(answers))
            said += tasks
            waited = True
            batches[:] = [frame.span[1:4] for frame in tasks if frame.kind == "TASK"]
            messages = make()
            arriving = change(messages)
            continue
        if not honest:
            wait_until(enough, "the caller to take what came")
        sock.sendall(arriving[number])
        number += 1
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
    said += link.rest()


def _read_tasks(link: raw.Link, chunks: int) -> list[Frame]:
    frames: list[Frame] = []
    while sum(frame.span[2] for frame in frames if frame.kind == "TASK") < chunks:
        frames.append(link.read())
    return frames


def session_down(
    link: raw.Link, answers: Sequence[Sequence[Any]], workers: int, batches: Sequence[tuple[int, int, int]],
) -> list[bytes]:
    """What a server says to a controller whose chunks came in these batches (first, count, attempt): all GIVENs, then
    a RESULT for each answer."""
    cluster = {"nodes": 1, "workers": workers, "largest": workers, "pythons": {HELLO["python"]: 1}}
    messages = [link.make("HELLO", WORKER_HELLO).raw, link.make("CLUSTER", cluster).raw]
    given = [link.make("GIVEN", chunks=[Chunk(first, attempt)], job=1, count=count, number=workers).raw
             for first, count, attempt in batches]
    messages.append(b"".join(given))
    for n, values in enumerate(answers):
        attempt = next(attempt for first, count, attempt in batches if first <= n < first + count)
        messages.append(link.make("RESULT", chunks=[Chunk(n, attempt, letter=answer_of(values))], job=1, number=1).raw)
    return messages


def answer_of(values: Sequence[Any]) -> bytes:
    """The letter of these results."""
    return b"".join(outcomes.dump_outcomes(letters.Context(caller=False), list(values), {})[1])


class NodeVictim:
    """A real node of one worker, whose server is a raw one; it comes back after each attack."""

    def __init__(self, cluster: Watched, folder: Any) -> None:
        self.oracle = Oracle(folder)
        self.listening = raw.listener()
        context = letters.Context(caller=True)
        self.function = b"".join(context.dump((Work(self.oracle.path), None)))
        self.arguments = b"".join(letters.dump_chunk(context, [7]))
        self.process = cluster.start_node(1, "--port", str(self.listening.getsockname()[1]), wait=False)
        self.runs = 0

    def __enter__(self) -> NodeVictim:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.listening.close()

    def attack(self, change: Change) -> list[Frame]:
        """One session: `change` gets M1, M3, HELLO, JOB, TASK, TASK. Returns what the node said after its answer to the
        first TASK, for which it is waited, so that it has joined. Where nothing is changed: its second RESULT.
        """
        sock = raw.accepted(self.listening)
        said: list[Frame] = []
        honest = False
        with sock:
            sock.settimeout(raw.SECONDS)
            try:
                m1 = raw.greeting(os.urandom(32))
                arrives = change([m1])[0]
                sock.sendall(arrives)
                if len(arrives) != len(m1):
                    sock.shutdown(socket.SHUT_WR)
                    raw.read_to_end(sock)
                    return said
                auth = raw.read(sock, raw.AUTH_BYTES)
                keys = raw.session(KEY, m1, auth[: raw.SIGNED_BYTES])
                self.keys = keys
                link = raw.Link(sock, keys, raw.DOWN)
                messages = [m1, keys.server_proof, *(frame.raw for frame in self.session(link))]
                arriving = change(messages)
                honest = messages == arriving
                sock.sendall(b"".join(arriving[1:5]))
                if messages[:5] == arriving[:5]:
                    assert [chunk.status for chunk in link.wait_for("RESULT").chunks] == [ALTERED]
                sock.sendall(b"".join(arriving[5:]))
                if honest:
                    said.append(link.wait_for("RESULT"))
                else:
                    sock.shutdown(socket.SHUT_WR)
                    said += link.rest()
            except (raw.Ended, OSError):
                if honest:
                    raise
        return said

    def session(self, link: raw.Link) -> list[Frame]:
        """What a server says to a node: its first TASK has a letter that does not match its digest."""
        return [
            link.make("HELLO", WORKER_HELLO), link.make("JOB", chunks=job(self.function), job=1),
            link.make("TASK", chunks=[Chunk(0, letter=LONG, digest=bytes(32))], job=1),
            link.make("TASK", chunks=[Chunk(1, 1, letter=self.arguments)], job=1),
        ]

    def check_honest(self) -> None:
        """An honest session, which is carried out: so that this node takes heart, and it is known what is refused."""
        before = sum(self.oracle.counts().values())
        said = self.attack(lambda messages: messages)
        assert [frame.kind for frame in said] == ["RESULT"], said
        assert said[0].chunks[0].status == 0, said
        wait_until(lambda: sum(self.oracle.counts().values()) == before + 1)
        self.runs = before + 1

    def check_idle(self) -> None:
        """Nothing was run since."""
        assert sum(self.oracle.counts().values()) == self.runs, "what was altered was run"
