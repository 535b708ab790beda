"""Attacks on who reads: texts that break out of their line in a log, or that a terminal obeys.

What a peer says is refused, or is one line, escaped. The objects that a call returns and raises are the user's.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from conftest import ENCRYPT

import achilles
from achilles import config, console
from achilles.errors import AchillesError, TaskTimeout, VersionError, WorkerLost
from achilles.server.__main__ import ask_status

from . import raw
from .bench import HELLO, KEY, SECRET, USER, USER_BYTES, WRONG, Bench, Watched, attack, eventually
from .roles import declare, take
from .victims import ANSWER, WORKER_HELLO, NodeVictim, answer_of, attack_controller

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}Z (DEBUG|INFO|WARNING|ERROR) [\w.]+: ")
FORGED = "2026-01-01 00:00:00,000Z INFO achilles.server.exchange: node 7 at 10.0.0.1 joined"
NAMES = (
    f"a\n{FORGED}"[:32], "a\r\nb", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b2J", "\u202eevil", "a\u2028b",
    "a\u0085b", "\b\b\b\bname", "%s%n%(name)s{0}", "\x7f", "\u200bhidden",
)
UNFIT = tuple(name for name in NAMES if not name.isprintable())
DIED, TIMEOUT = 2, 3  # statuses of a RESULT
CLUSTER = {"nodes": 1, "workers": 0, "largest": 0, "pythons": {"3.9": 1}}
STATUS: dict[str, Any] = {
    "nodes": [{"id": 0, "address": "10.0.0.2", "python": "3.11", "version": "1.0.0", "cpu_count": 8, "busy": 3,
               "done": 12, "since": 1.5}],
    "jobs": [{"id": 7, "user": "ann", "queued": 5, "running": 3, "done": 12}],
    "server": {"version": "1.0.0", "uptime": 61.7, "memory": 1 << 20},
}
BROKEN = (b"\xff\xfe\n\x1b[2J", b"\xc3(", b"\xed\xa0\x80\n")


def check_log(text: str) -> list[str]:
    """Every line is one of the log's own, and can be shown on a terminal; returns the lines."""
    lines = text.rstrip("\n").split("\n") if text.strip() else []
    for line in lines:
        assert LINE.match(line), f"no line of the log: {line!r}"
        assert line.isprintable(), f"not fit for a terminal: {line!r}"
    return lines


@attack("port", "newlines and escapes in a user name")
def names_before_authentication(bench: Bench) -> None:
    """Whoever reaches the port writes one line a try into the server's log, escaped, and no other."""
    cluster = bench.cluster()
    users = [name.encode() for name in NAMES] + list(BROKEN)
    for _ in range(1 if bench.short else 5):
        bench.each(lambda user: raw.claim(cluster.port, raw.proving(b"C", user, WRONG)), users, threads=40)
    eventually(lambda: cluster.log().count("refused 127.0.0.1: the proof as user") >= bench.tries, "a line a try")
    lines = [line for line in check_log(cluster.log()) if "refused" in line]
    assert len(lines) == bench.tries, lines


@attack("secret", "newlines and escapes in what a peer says of itself")
def names_after_authentication(bench: Bench) -> None:
    """Versions, reasons, messages, in HELLO, BYE, ERROR: refused, or one escaped line in the server's log."""
    cluster = bench.cluster()

    def hello(case: tuple[str, str]) -> None:
        field, text = case
        with raw.join(cluster.port, b"C", USER_BYTES, raw.derive(USER_BYTES, cluster.address["secret_key"])) as link:
            link.send("HELLO", HELLO | {field: text})
            link.send("STATUS")
            frames = [frame.kind for frame in link.rest()]
            assert "STATUS" not in frames and "ERROR" in frames, frames

    bench.each(hello, [(field, text) for field in ("python", "version") for text in UNFIT])

    def last_word(case: tuple[str, dict[str, str]]) -> None:
        kind, body = case
        with cluster.join() as link:
            link.send(kind, body)
            link.sock.shutdown(1)
            link.rest()

    bench.each(last_word, [("BYE", {"reason": text}) for text in UNFIT]
               + [("ERROR", {"code": "protocol", "message": text}) for text in NAMES]
               + [("ERROR", {"code": text, "message": "m"}) for text in UNFIT])
    cluster.check_alive()
    check_log(cluster.log())


@attack("server", "newlines and escapes in what a server says, to a node's log and to a caller")
def names_from_a_server(bench: Bench) -> None:
    """Even who plays the server writes no line of its own into a node's log, nor escapes into a caller's errors."""
    cluster = bench.cluster()
    texts = NAMES[:2] if bench.short else NAMES
    with NodeVictim(cluster, bench._folder("node")) as victim:
        victim.check_honest()
        for text in texts:
            for body in ({"code": "protocol", "message": text}, {"code": text, "message": "m"}):
                def change(messages: list[bytes], body: dict[str, str] = body) -> list[bytes]:
                    if len(messages) == 1:
                        return messages
                    forged = raw.tag(victim.keys.data[raw.DOWN], 2, raw.encode("ERROR", body))
                    return [*messages[:4], forged.raw]

                victim.attack(change)
                bench.count()
        victim.check_honest()
        check_log(victim.process.err.read_text())
    sessions: list[raw.Keys] = []
    for text in texts:
        def say(messages: list[bytes], text: str = text) -> list[bytes]:
            if len(messages) == 1:
                return messages
            body = {"code": "protocol", "message": text}
            forged = raw.tag(sessions[-1].data[raw.DOWN], 2, raw.encode("ERROR", body))
            return [*messages[:4], forged.raw]

        called = attack_controller(say, sessions=sessions)
        assert isinstance(called.error, AchillesError), called
        assert str(called.error).isprintable(), str(called.error)
        bench.count()


def check_shown(error: BaseException | None) -> None:
    """An error of ours, of which nothing that people may print does anything to a terminal."""
    assert isinstance(error, AchillesError), repr(error)
    assert str(error).isprintable(), ascii(str(error))
    for line in "".join(traceback.format_exception(error)).split("\n"):
        assert line.isprintable(), ascii(line)
    for name in ("node", "pid", "exitcode"):
        assert isinstance(getattr(error, name, None), (int, type(None))), (name, getattr(error, name))


@contextlib.contextmanager
def telling(state: Any = None, cluster: Any = None) -> Iterator[int]:
    """A server that says this of its cluster, and in answer to STATUS, and ends whoever comes back; its port."""
    listening = raw.listener()

    def serve() -> None:
        for number in range(2):
            with raw.accept(listening, KEY) as link, contextlib.suppress(raw.Ended):
                link.send("HELLO", WORKER_HELLO)
                if number:
                    link.send("BYE", {"reason": "killed"})
                else:
                    link.send("CLUSTER", cluster or CLUSTER)
                    link.wait_for("STATUS")
                    link.send("STATUS", state)
                link.rest()

    def serve_until_shut() -> None:
        with contextlib.suppress(OSError):
            serve()

    with _serving(listening, serve_until_shut):
        yield listening.getsockname()[1]


@contextlib.contextmanager
def _serving(listening: socket.socket, serve: Callable[[], None]) -> Iterator[None]:
    """Run it in a thread, until the block ends."""
    thread = threading.Thread(target=serve, name="a server of the attacker's", daemon=True)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        thread.join(raw.SECONDS)
        listening.close()
    assert not thread.is_alive()


@attack("server", "escapes in the names of Pythons that a server says its nodes have")
def pythons_from_a_server(bench: Bench) -> None:
    """The keys of CLUSTER's `pythons` end in a VersionError: they are few names, and short, or all is refused."""
    def call(pythons: Any) -> BaseException:
        with telling(cluster=CLUSTER | {"pythons": pythons}) as port:
            try:
                achilles.map(abs, [1], host="127.0.0.1", port=port, username=USER, secret_key=SECRET, encrypt=ENCRYPT)
            except AchillesError as error:
                check_shown(error)
                assert len(str(error)) < 8000, f"an error of {len(str(error))} characters"
                return error
        raise AssertionError("no error")

    assert isinstance(call({"3.9": 1}), VersionError)  # so that the names come to be shown
    bad: list[Any] = [{text: 1} for text in UNFIT] + [{"3.9": text} for text in UNFIT]
    bad += [{"3.9": 1, f"3.1{text}": 1} for text in UNFIT[:2]] + [{f"3.{n}": 1 for n in range(5000)}, {"3" * 65: 1}]

    def refused(pythons: Any) -> None:
        error = call(pythons)
        assert not isinstance(error, VersionError), ascii(error)

    bench.each(refused, bad)


def notes(text: Any) -> list[tuple[int, dict[str, Any]]]:
    """Status and note of chunks that were lost: this stands in each field that an error tells, or that it has."""
    gone = {"offset": -1, "phase": "call", "node": 0, "pid": 1, "exitcode": 1}
    return [
        *((DIED, gone | {name: text}) for name in ("node", "pid", "exitcode", "offset")),
        (DIED, {"offset": 0, "phase": text}), (TIMEOUT, {"offset": 0, "phase": "call", "node": text}),
        (DIED, gone | {"new": text}),
    ]


def lose(link: raw.Link, status: int, note: dict[str, Any]) -> None:
    """Be a server of a node on which a worker dies so under each chunk that comes: three times under each argument."""
    link.send("HELLO", WORKER_HELLO)
    link.send("CLUSTER", CLUSTER | {"workers": 1, "largest": 1, "pythons": {HELLO["python"]: 1}})
    deaths = 0
    while True:
        frame = link.wait_for("TASK")
        told = note | ({"offset": deaths // 3} if note["offset"] == 0 else {})
        letter = json.dumps(told).encode()
        if frame.flags & raw.TELL:
            link.send("GIVEN", chunks=frame.chunks, job=frame.job, number=1)
        answers = [chunk._replace(status=status, letter=letter, digest=None) for chunk in frame.chunks]
        link.send("RESULT", chunks=answers, job=frame.job)
        deaths += 1


@contextlib.contextmanager
def losing(status: int, note: dict[str, Any]) -> Iterator[int]:
    """A server on which every worker dies so; its port. Whoever comes back is ended."""
    listening = raw.listener()

    def serve() -> None:
        with contextlib.suppress(OSError, raw.Ended):
            with raw.accept(listening, KEY) as link:
                lose(link, status, note)
        with contextlib.suppress(OSError, raw.Ended):
            with raw.accept(listening, KEY) as link:
                link.send("HELLO", WORKER_HELLO)
                link.send("BYE", {"reason": "killed"})
                link.rest()

    with _serving(listening, serve):
        yield listening.getsockname()[1]


@attack("server", "escapes in what a server says of a dead worker")
def notes_from_a_server(bench: Bench) -> None:
    """Phase, node, pid and exit code of a note end in a WorkerLost: they are what they should be, or refused."""
    def call(status: int, note: dict[str, Any]) -> BaseException:
        with losing(status, note) as port:
            try:
                achilles.map(abs, ANSWER, chunksize=len(ANSWER), host="127.0.0.1", port=port, username=USER,
                             secret_key=SECRET, encrypt=ENCRYPT)
            except AchillesError as error:
                check_shown(error)
                return error
        raise AssertionError("no error")

    good = [*notes(3)[:3], (DIED, {"offset": 0, "phase": "dump"}), (TIMEOUT, {"offset": 0, "phase": "call"})]
    for status, note in good:
        error = call(status, note)
        assert isinstance(error, WorkerLost if status == DIED else TaskTimeout), repr(error)
    for text in ([bench.rng.choice(UNFIT)] if bench.short else UNFIT):
        for what in (text, [text], {text: 1}):
            for status, note in notes(what):
                assert not isinstance(call(status, note), achilles.TaskError), (status, note)
                bench.count()


@attack("node", "escapes in what a node says of a dead worker")
def notes_from_a_node(bench: Bench) -> None:
    """The same through an honest server, which looks into no letter: refused, and the call gets its right answer."""
    cluster = bench.cluster()
    with cluster.join(b"N", 1) as node:
        call = bench.call(cluster, "map", abs, [-7])
        for text in UNFIT[:1] if bench.short else UNFIT:
            for status, note in notes(text):
                number, (chunk,) = take(node, 1)
                letter = json.dumps(note).encode()
                node.send("RESULT", chunks=[chunk._replace(status=status, letter=letter)], job=number)
                assert not call.ended.wait(0.01), ascii(call.error or call.found)
                bench.count()
        number, (chunk,) = take(node, 1)  # the caller has connected anew, and sent its job again
        node.send("RESULT", chunks=[chunk._replace(letter=answer_of([7]))], job=number)
        assert call.result(30) == {0: 7}
    cluster.check_alive()
    check_log(cluster.log())


def states(text: str) -> Iterator[dict[str, Any]]:
    """Answers to STATUS that have this in one place: in a field of a thing, in a new field, as a field's name."""
    for what, shown in STATUS.items():
        thing = shown[0] if isinstance(shown, list) else shown
        for changed in (*(thing | {name: text} for name in (*thing, "new")), thing | {text: 1}):
            yield STATUS | {what: [thing, changed] if isinstance(shown, list) else changed}
        yield STATUS | {what: text}
    yield STATUS | {"new": [{"deep": text}]}


MALFORMED: list[Any] = [
    {}, b"[]", 1, *({name: value for name, value in STATUS.items() if name != left} for left in STATUS),
    *(STATUS | {name: value} for name in STATUS for value in (None, 1, [1], [[]], [{}], {"": {}}, "x")),
    *(STATUS | {"server": STATUS["server"] | {"uptime": value}} for value in (10**400, -1, "1", None, [], True)),
    b'{"nodes":[],"jobs":[],"server":{"version":"1","uptime":NaN,"memory":1}}',
]


def told(port: int, options: tuple[str, ...], cluster: Watched) -> None:
    """`--status` as a command: whatever it prints can be shown, and it fails with a line, not with a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "achilles.server", "--status", "--port", str(port), *options], env=cluster.env,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False)
    for line in (done.stdout + done.stderr).split("\n"):
        assert line.isprintable(), ascii(line)
    assert "Traceback" not in done.stderr, done.stderr
    assert (done.returncode, done.stdout) == (1, "") and "error: " in done.stderr, (done.returncode, done.stdout)


@attack("server", "escapes in a server's status, and one that is none")
def status_from_a_server(bench: Bench) -> None:
    """Each field of each node, job and server is what it should be, or there is no status: as a table, as JSON, as
    what cluster_status returns.
    """
    cluster = bench.cluster()

    def ask(state: Any) -> None:
        with telling(state) as port:
            settings = config.Settings("127.0.0.1", port, USER, config.Secret(SECRET), None, encrypt=ENCRYPT)
            try:
                answer = ask_status(settings)
            except AchillesError as error:
                return check_shown(error)
        raise AssertionError(f"taken for a status: {ascii(console.status_table(answer))}")

    def call(state: Any) -> None:
        with telling(state) as port:
            try:
                answer = achilles.cluster_status("127.0.0.1", port, USER, SECRET, encrypt=ENCRYPT)
            except AchillesError as error:
                return check_shown(error)
        raise AssertionError(f"taken for a status: {ascii(answer)}")

    def run(state: Any) -> None:
        with telling(state) as port:
            told(port, ("--json",) if bench.rng.random() < 0.5 else (), cluster)

    with telling(STATUS) as port:
        assert achilles.cluster_status("127.0.0.1", port, USER, SECRET, encrypt=ENCRYPT) == STATUS
    bad = [state for text in UNFIT for state in states(text)]
    bench.each(ask, bench.some(bad, 40))
    bench.each(ask, MALFORMED)
    bench.each(call, [*bench.some(bad, 5), *bench.some(MALFORMED, 5)])
    bench.each(run, bench.rng.sample(bad + MALFORMED, 4 if bench.short else 40), threads=2)


@attack("secret", "a node of which a status, or an error, would write escapes to others")
def status_of_a_peer(bench: Bench) -> None:
    """What a peer says of itself comes to others by STATUS and CLUSTER: it is never let in with such a word.

    Nor does the server's own username, which may have any character, break the status of those who ask for it.
    """
    user = "a\x1b[2J\u202e"
    cluster = bench.cluster(user=user)
    key = raw.derive(user.encode(), SECRET)
    with raw.join(cluster.port, b"C", user.encode(), key, HELLO) as link:
        declare(link, 1)
        for text in UNFIT:
            for name in ("python", "version", "new", text):
                with raw.join(cluster.port, b"N", user.encode(), key) as node:
                    node.send("HELLO", HELLO | {"cpu_count": 1, name: text})
                    assert [frame.kind for frame in node.rest()] == ["ERROR"]
                bench.count()
        state = achilles.cluster_status("127.0.0.1", cluster.port, user, SECRET, encrypt=ENCRYPT)
    assert state["nodes"] == [] and [each["user"] for each in state["jobs"]] == [ascii(user)]
    for line in console.status_table(state).split("\n"):
        assert line.isprintable(), ascii(line)
    bench.count()
    check_log(cluster.log())
