"""A real node process against a small server that says what the test wants, frame by frame."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import multiprocess
import pytest
from multiprocess import resource_tracker

from achilles.errors import AuthenticationError, ConfigurationError
from achilles.node import loop
from achilles.objects.letters import Context, dump_chunk
from achilles.objects.outcomes import load_outcomes
from achilles.protocol import auth, connect
from achilles.protocol.channel import Channel
from achilles.protocol.connect import PYTHON, hello
from achilles.protocol.frames import Batch, Gone, Kind, LongLetter, Status, digest, joined

USER, SECRET = "u", "s" * 20
SECONDS = 20.0  # tells a hang from a wait
GREETING = "GREETING: Welcome! There are currently 1 open connections.\n\nConnected to achilles_server running at "


class Server:
    """One listening socket, and at most one node at a time."""

    def __init__(self, port: int = 0) -> None:
        self.listener = socket.create_server(("127.0.0.1", port))
        self.listener.settimeout(SECONDS)
        self.port = self.listener.getsockname()[1]
        self.context = Context(caller=True)
        self.peer: Channel | None = None
        self.frames: list[tuple[Kind, Any]] = []
        self.given: dict[tuple[int, int], Batch] = {}  # by job and number

    def accept(self, client_id: int = 0, secret: str = SECRET, greet: bool = True) -> dict[str, Any]:
        """The handshake and both HELLOs; the node's."""
        sock, _ = self.listener.accept()
        try:
            link, role, _ = connect.accept(
                sock, lambda _: [auth.derive_key(USER, secret)], time.monotonic() + 5)
        except AuthenticationError:
            sock.close()
            return {}
        assert role == auth.NODE
        link.socket.settimeout(0.1)
        if self.peer:
            self.peer.close()
        self.peer, self.frames = link, []
        body = self.expect(Kind.HELLO)
        if greet:
            self.say(Kind.HELLO, hello() | {"client_id": client_id, "connections": 1})
        return body

    def say(self, kind: Kind, body: Any) -> None:
        assert self.peer
        self.peer.send(kind, body)
        while not self.peer.flush():
            pass

    def expect(self, kind: Kind) -> Any:
        """The body of the next frame of this kind; those of others are dropped."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for index, (came, body) in enumerate(self.frames):
                if came is kind:
                    del self.frames[: index + 1]
                    return body
            assert self.read(), f"the node closed; wanted {kind.name}"
        raise AssertionError(f"no {kind.name} came")

    def read(self) -> bool:
        """Take what comes within a tenth of a second; False at end of file."""
        assert self.peer
        frames = self.peer.receive()
        self.frames += frames or []
        return frames is not None

    def give(self, function: Any, arguments: list[Any], job: int = 1) -> None:
        """A job, and a batch for each argument."""
        parts = self.context.dump((function, None))
        length = sum(map(len, parts))
        letter = LongLetter(parts, digest(parts), length) if length > 1024 else b"".join(parts)
        declaration = json.dumps({"context": "c" * 32, "initializer": False}).encode()
        self.say(Kind.JOB, Batch.pack(job, 0, [declaration, letter]))
        for number, argument in enumerate(arguments):
            parts = dump_chunk(self.context, [argument])
            self.given[job, number] = Batch.pack(job, number, [b"".join(parts)])
            self.say(Kind.TASK, self.given[job, number])

    def give_again(self) -> None:
        """Give what has waited for too long again, as a controller would: its worker may begin late."""
        assert self.read(), "the node closed"
        for frame in [(kind, body) for kind, body in self.frames if kind is Kind.RETURNED]:
            if frame[1].flags == Gone.WAITED:
                self.frames.remove(frame)  # type: ignore[arg-type]
                self.say(Kind.TASK, self.given[frame[1].job, frame[1].first])

    def results(self, count: int) -> dict[int, Any]:
        """The values of so many chunks, by their numbers. What waited for too long is given again."""
        values: dict[int, Any] = {}
        deadline = time.monotonic() + SECONDS
        while len(values) < count and time.monotonic() < deadline:
            while self.frames:
                kind, batch = self.frames.pop(0)
                if kind is Kind.RETURNED and batch.flags == Gone.WAITED:
                    self.say(Kind.TASK, self.given[batch.job, batch.first])
                elif kind is Kind.RESULT:
                    values |= self._values(batch)
            assert len(values) == count or self.read(), "the node closed"
        return values

    def _values(self, batch: Batch) -> dict[int, Any]:
        assert set(batch.statuses) == {Status.VALUES}
        return {
            number: load_outcomes(self.context, bytearray(joined(letter)), False)[0][0]
            for number, letter in enumerate(batch.letters(), batch.first)}

    def close(self) -> None:
        if self.peer:
            self.peer.close()
        self.listener.close()


class Process:
    """`python -m achilles.node` and what it prints."""

    def __init__(self, port: int, *options: str, secret: str | None = SECRET, **popen: Any) -> None:
        from conftest import NODE_OPTIONS  # here, since workers import this module for its functions

        env = {**os.environ, "ACHILLES_HOST": "127.0.0.1", "ACHILLES_PORT": str(port), "ACHILLES_USERNAME": USER}
        env["PYTHONPATH"] = os.pathsep.join([str(Path(auth.__file__).parents[2]), str(Path(__file__).parent)])
        if secret:
            env["ACHILLES_SECRET_KEY"] = secret
        command = [sys.executable, "-W", "error", "-m", "achilles.node", "--cpu-count", "2", *NODE_OPTIONS, *options]
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            **popen)
        self.errors: list[str] = []
        self.thread = threading.Thread(target=self._read_errors, name="stderr of the node")
        self.thread.start()

    def _read_errors(self) -> None:
        assert self.process.stderr
        self.errors.extend(iter(self.process.stderr.readline, ""))

    def read(self, lines: int) -> str:
        assert self.process.stdout
        return "".join(self.process.stdout.readline() for _ in range(lines))

    def wait(self) -> int:
        return self.process.wait(SECONDS)

    def children(self) -> list[int]:
        """Its workers; Linux alone."""
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as file:
            return [int(pid) for pid in file.read().split()]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.thread.join(SECONDS)
        assert self.process.stdout and self.process.stderr
        self.process.stdout.close()
        self.process.stderr.close()
        text = "".join(self.errors)
        # A worker that was starting when its node was killed: multiprocess's own trace.
        starting = "multiprocess.spawn" in text or "multiprocess.forkserver" in text
        assert starting or "Traceback" not in text
        assert "Warning:" not in text


@pytest.fixture
def server() -> Iterator[Server]:
    with contextlib.closing(Server()) as made:
        yield made


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def run(*args: Any, **options: Any) -> Process:
        made.append(Process(*args, **options))
        return made[-1]

    yield run
    for each in made:
        left = each.children() if sys.platform == "linux" and each.process.poll() is None else []
        each.close()
        wait_until(lambda left=left: not any(map(alive, left)))


def square(x: int) -> int:
    return x * x


def pid_of(_: Any) -> int:
    return os.getpid()


def environment(_: Any) -> list[str]:
    return sorted(name for name in os.environ if "SECRET" in name)


def note_and_sleep(given: tuple[str, float]) -> float:
    """Leaves a byte in the file when it begins."""
    path, seconds = given
    with open(path, "ab", buffering=0) as file:
        file.write(b"x")
    time.sleep(seconds)
    return seconds


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def end_by(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(1)


def test_it_joins_greets_and_runs_what_it_is_given(server: Server, start: Any) -> None:
    it = start(server.port)
    about = server.accept(client_id=5)
    assert about["cpu_count"] == 2 and about["pid"] == it.process.pid
    assert about["python"] == PYTHON
    assert it.read(4) == f"{GREETING}127.0.0.1:{server.port}\nCLIENT_ID: 5\n"
    server.give(square, list(range(50)))
    assert server.results(50) == {n: n * n for n in range(50)}


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_it_runs_under_each_start_method(server: Server, start: Any, method: str) -> None:
    start(server.port, "--start-method", method)
    server.accept()
    server.give(square, [1, 2, 3])
    assert server.results(3) == {0: 1, 1: 4, 2: 9}


def test_it_waits_for_a_server_that_is_not_there_yet_and_says_so_once(start: Any, free_port: int) -> None:
    it = start(free_port)
    wait_until(lambda: it.errors)
    threading.Event().wait(0.7)  # it tries again after 0.1, 0.2, 0.4 s
    with contextlib.closing(Server(free_port)) as late:
        late.accept()
        assert it.read(4).startswith("GREETING")
    assert sum("waiting for it" in line for line in it.errors) == 1


def test_it_says_once_each_time_that_it_lost_the_server(server: Server, start: Any) -> None:
    it = start(server.port)

    def said(words: str) -> int:
        return sum(words in line for line in it.errors)

    for client_id in range(3):
        server.accept(client_id)
        it.read(4)
        assert said("lost the server") == client_id
        if client_id < 2:
            server.peer.close()  # type: ignore[union-attr]

    server.close()
    wait_until(lambda: said("lost the server") == 3)
    threading.Event().wait(0.7)  # it tries again after 0.1, 0.2, 0.4 s
    assert said("lost the server") == 3 and said("waiting for it") == 0


def test_a_refusal_before_the_first_join_ends_it_and_says_what_to_do(server: Server, start: Any) -> None:
    it = start(server.port, secret="another secret, long")
    assert server.accept() == {}
    assert it.wait() == 2
    it.close()
    assert "python -m achilles.node --env-file" in "".join(it.errors)


def test_a_refusal_after_a_join_is_tried_again_with_the_file_read_anew(
    server: Server, start: Any, tmp_path: Path
) -> None:
    file = tmp_path / "env"
    file.write_text(f"SECRET_KEY={SECRET}\n")
    file.chmod(0o600)
    it = start(server.port, "--env-file", str(file), secret=None)
    server.accept()
    it.read(4)
    server.peer.close()  # type: ignore[union-attr]
    assert server.accept(secret="n" * 20) == {}
    file.chmod(0o644)
    assert server.accept(secret="n" * 20) == {}
    wait_until(lambda: any("stays what it was" in line and "chmod 600" in line for line in it.errors))
    file.chmod(0o600)
    file.write_text(f"SECRET_KEY={'n' * 20}\n")
    for _ in range(3):
        if server.accept(client_id=1, secret="n" * 20):
            break
    assert it.read(4).endswith("CLIENT_ID: 1\n")


def test_when_it_loses_the_server_it_forgets_everything_and_comes_back(server: Server, start: Any) -> None:
    start(server.port)
    server.accept()
    server.give(pid_of, [0, 0])
    before = set(server.results(2).values())
    server.give(sleep, [60, 60, 60], job=2)
    server.peer.close()  # type: ignore[union-attr]
    server.accept(client_id=1)
    wait_until(lambda: not any(map(alive, before)))
    server.give(pid_of, [0, 0])
    assert not before & set(server.results(2).values())


@pytest.mark.parametrize(("reason", "ends"), [("killed", True), ("restart", False)])
def test_bye_killed_ends_it_and_bye_restart_does_not(server: Server, start: Any, reason: str, ends: bool) -> None:
    it = start(server.port)
    server.accept()
    server.say(Kind.BYE, {"reason": reason})
    if ends:
        assert it.wait() == 0
    else:
        assert server.accept(client_id=1)["cpu_count"] == 2


def test_sigterm_gives_back_what_no_worker_has_finishes_what_runs_and_exits_0(
    server: Server, start: Any, path: str
) -> None:
    it = start(server.port)
    server.accept()
    server.give(note_and_sleep, [(path, 3.0) for _ in range(2)])
    wait_for_work(server, it, 2, path)
    server.give(note_and_sleep, [(path, 1.0) for _ in range(3)], job=2)
    threading.Event().wait(0.1)  # it has them in its queue
    it.process.terminate()
    wait_until(lambda: server.read() and [kind for kind, _ in server.frames].count(Kind.RETURNED) == 3)
    came = [(kind, body) for kind, body in server.frames if kind in (Kind.BYE, Kind.RETURNED)]
    returned = [body for kind, body in came if kind is Kind.RETURNED]
    assert [(batch.job, batch.first, batch.count) for batch in returned] == [(2, n, 1) for n in range(3)]
    at = came.index((Kind.BYE, {"reason": "leaving"}))  # else the server gives it other batches in their place
    assert [batch.flags for _, batch in came[:at]] + [batch.flags for _, batch in came[at + 1 :]] == (
        [Gone.WAITED] * at + [Gone.LEFT] * (3 - at))
    server.frames = [frame for frame in server.frames if frame[0] is Kind.RESULT]
    assert server.results(2) == {0: 3.0, 1: 3.0}
    while server.read():
        pass
    server.peer.close()  # type: ignore[union-attr]
    assert it.wait() == 0


def test_a_node_that_loses_its_server_while_it_drains_does_not_look_for_it(
    server: Server, start: Any, path: str
) -> None:
    it = start(server.port)
    server.accept()
    server.give(note_and_sleep, [(path, 60.0)] * 2)
    wait_for_work(server, it, 2, path)
    it.process.terminate()
    server.expect(Kind.BYE)
    server.close()
    assert it.wait() == 0


def test_a_second_sigterm_ends_it_at_once(server: Server, start: Any, path: str) -> None:
    it = start(server.port)
    server.accept()
    server.give(note_and_sleep, [(path, 60.0)] * 2)
    wait_for_work(server, it, 2, path)
    it.process.terminate()
    server.expect(Kind.BYE)
    it.process.terminate()
    assert it.wait() == 128 + signal.SIGTERM


def test_sigterm_without_a_server_ends_it(start: Any, free_port: int) -> None:
    it = start(free_port)
    wait_until(lambda: it.errors)
    it.process.terminate()
    assert it.wait() == 0


def test_ctrl_c_ends_it_and_its_workers_at_once(server: Server, start: Any, path: str) -> None:
    it = start(server.port, start_new_session=True)
    server.accept()
    server.give(note_and_sleep, [(path, 60.0)] * 2)
    pids = wait_for_work(server, it, 2, path)
    os.killpg(it.process.pid, signal.SIGINT)  # the terminal tells the workers, too
    assert it.wait() == 130
    wait_until(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize("method", multiprocess.get_all_start_methods())
def test_workers_end_with_a_killed_node_in_the_middle_of_a_call(server: Server, start: Any, method: str) -> None:
    it = start(server.port, "--start-method", method)
    server.accept()
    server.give(pid_of, [0, 0, 0, 0])
    pids = set(server.results(4).values())
    server.give(sleep, [60.0, 60.0], job=2)
    threading.Event().wait(0.2)
    it.process.kill()
    wait_until(lambda: not any(map(alive, pids)))


def test_it_tells_of_chunks_that_run_long_and_when_there_is_none(
    server: Server, start: Any, path: str
) -> None:
    it = start(server.port)
    server.accept()
    server.give(note_and_sleep, [(path, 0.0), (path, 2.5)])
    pids = wait_for_work(server, it, 2, path)
    told = [server.expect(Kind.PING)["chunks"]]
    while told[-1]:
        told.append(server.expect(Kind.PING)["chunks"])
    (first,), *_ = told
    assert first["job"] == 1 and first["pid"] in pids and 1 < first["seconds"] < 20
    assert all(second["seconds"] > first["seconds"] for (first,), (second,) in pairwise(told[:-1]))
    server.give(note_and_sleep, [(path, 0.2)] * 4, job=2)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        server.read()
    assert Kind.PING not in [kind for kind, _ in server.frames]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_worker_dies_of_a_signal_that_its_node_handles(server: Server, start: Any, number: int) -> None:
    start(server.port)
    server.accept()
    assert note_on_death(server, number)["exitcode"] == -number


def test_a_death_is_seen_where_the_node_was_started_with_children_ignored(server: Server, start: Any) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        start(server.port)
    finally:
        signal.signal(signal.SIGCHLD, before)
    server.accept()
    assert note_on_death(server, signal.SIGKILL)["phase"] == "call"


def note_on_death(server: Server, number: int) -> Any:
    """The answer of a worker that has ended by this signal."""
    server.give(end_by, [number])
    deadline = time.monotonic() + SECONDS
    while not (found := [body for kind, body in server.frames if kind is Kind.RESULT]):
        assert time.monotonic() < deadline
        server.give_again()
    assert found[0].statuses == bytes([Status.DIED])
    return json.loads(joined(found[0].letters()[0]))


def test_workers_that_do_not_end_in_time_are_not_watched_any_more(server: Server, monkeypatch: Any) -> None:
    """Else their sockets stay open, and the ends of these wake the next connection's loop, again and again."""
    monkeypatch.setattr("achilles.node.workers.STOP_SECONDS", 0.0)
    watched: list[int] = []

    class Watched(loop.Node):
        def look(self) -> None:
            watched.append(len(self.selector.get_map()))

    monkeypatch.setattr(loop, "Node", Watched)
    with in_thread(server):
        for _ in range(2):
            if server.peer:
                server.peer.close()
            server.accept()
            server.give(square, [3])
            assert server.results(1) == {0: 9}
        assert watched[-1] == 3  # the server, and a worker's two
        monkeypatch.undo()
        server.say(Kind.BYE, {"reason": "killed"})


def test_heartbeats_go_on_while_workers_work_and_silence_is_noticed(server: Server, monkeypatch: Any) -> None:
    monkeypatch.setattr("achilles.protocol.channel.HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr("achilles.protocol.channel.SILENCE_SECONDS", 1.0)
    with in_thread(server):
        server.accept()
        server.give(sleep, [60.0])
        for _ in range(3):
            server.expect(Kind.PING)
        server.accept()  # it heard nothing for a second, and connects anew
        server.say(Kind.BYE, {"reason": "killed"})


@pytest.mark.parametrize("kind", [Kind.TASK, Kind.HELLO])
def test_what_may_not_be_said_is_told_and_ends_the_connection(server: Server, start: Any, kind: Kind) -> None:
    it = start(server.port)
    server.accept(greet=kind is Kind.HELLO)
    if kind is Kind.HELLO:
        server.say(kind, hello() | {"client_id": 0, "connections": 1})
    else:
        server.say(kind, Batch.pack(1, 0, [b""]))
    assert server.expect(Kind.ERROR)["code"] == "protocol"
    server.accept(client_id=1)
    assert it.process.poll() is None


def test_the_secret_is_in_no_workers_environment(server: Server, start: Any) -> None:
    start(server.port)
    server.accept()
    server.give(environment, [0])
    assert server.results(1) == {0: []}


def test_run_node_restores_the_signals(server: Server) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def kill() -> None:
        server.accept()
        server.say(Kind.BYE, {"reason": "killed"})

    thread = threading.Thread(target=kill)
    thread.start()
    loop.run_node("127.0.0.1", server.port, USER, SECRET, cpu_count=1, start_method="spawn")
    thread.join(SECONDS)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert signal.set_wakeup_fd(-1) == -1
    resource_tracker._resource_tracker._stop()


def test_run_node_works_in_any_thread(server: Server) -> None:
    with in_thread(server):
        server.accept()
        server.give(square, [3])
        assert server.results(1) == {0: 9}
        server.say(Kind.BYE, {"reason": "killed"})


@pytest.mark.parametrize("options", [{"cpu_count": 0}, {"cpu_count": 70_000}, {"start_method": "teleport"}])
def test_settings_that_will_not_do_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        loop.run_node("127.0.0.1", 1, USER, SECRET, **options)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Of a file where calls of `note_and_sleep` show that they have begun."""
    return str(tmp_path / "begun")


def wait_for_work(server: Server, it: Process, count: int, path: str) -> list[int]:
    """Until so many calls of `note_and_sleep` have begun; its workers."""
    if sys.platform != "linux":
        pytest.skip("needs /proc")
    wait_until(lambda: server.give_again() or (os.path.exists(path) and os.path.getsize(path) == count))
    return it.children()


def alive(pid: int) -> bool:
    """Whether it runs: one that nobody has waited for yet does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@contextlib.contextmanager
def in_thread(server: Server) -> Iterator[None]:
    """A node in this process, which must end by itself."""
    options = {"cpu_count": 1, "start_method": "spawn"}
    thread = threading.Thread(target=loop.run_node, args=("127.0.0.1", server.port, USER, SECRET), kwargs=options)
    thread.start()
    yield
    thread.join(SECONDS)
    assert not thread.is_alive() and multiprocess.active_children() == []
    resource_tracker._resource_tracker._stop()


def wait_until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)
