"""How a node's workers are started, fed, watched and ended: real processes, and a loop of our own for the node's."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import multiprocess
import pytest
from conftest import START_METHOD
from multiprocess import forkserver, resource_tracker

from achilles.errors import ProtocolError
from achilles.node import process
from achilles.node import workers as module
from achilles.node.board import CALL, CHUNK, FIRST, IDLE, PHASE, WORDS
from achilles.node.cores import default_start_method, usable_cores
from achilles.node.output import Flow
from achilles.node.process import STARTING
from achilles.node.workers import Workers
from achilles.objects.letters import Context, dump_chunk
from achilles.objects.outcomes import load_outcomes
from achilles.protocol.frames import (
    CAREFUL,
    MORE,
    NOTE,
    Batch,
    Gone,
    Kind,
    Letter,
    LongLetter,
    Status,
    digest,
    encode,
    joined,
)
from achilles.protocol.kinds import check_fields
from achilles.protocol.reader import FrameReader

METHODS = multiprocess.get_all_start_methods()
WARMING = 99  # the number of a job
SECONDS = 60.0  # tells a hang from a wait: on a busy machine a spawned worker may take 10 s to start, and to load


class Loop:
    """What a node's loop does, and what its server would hear."""

    def __init__(self, count: int = 1, method: str = START_METHOD or default_start_method()) -> None:
        self.selector = selectors.DefaultSelector()
        self.heard: list[tuple[Kind, Batch]] = []
        self.workers = Workers(count, method, self.selector, lambda kind, body: self.heard.append((kind, body)), node=3)
        self.given: dict[tuple[int, int], Letter] = {}  # by job and number
        self.waits = True  # for workers to start
        self.given_again = 0  # of what is heard, up to here
        self.context = Context(caller=True)
        self.had: set[str] = set()  # contexts whose initializer was sent

    def declare(
        self, function: Any, job: int = 1, context: str = "c", initializer: Any = None, **options: Any
    ) -> None:
        declaration = {"context": context * 32, "initializer": initializer is not None} | options
        letters = [json.dumps(declaration).encode(), letter(self.context.dump((function, None)))]
        if initializer is not None and context not in self.had:
            self.had.add(context)
            letters.append(letter(self.context.dump((initializer, ()))))
        self.workers.declare(came(Kind.JOB, Batch.pack(job, 0, letters)))

    def add(self, *chunks: Any, job: int = 1, first: int = 0, us: int = 0, flags: int = 0) -> None:
        """One batch, each chunk a list of arguments. The first one waits for all workers: it would be returned."""
        if not self.given and self.waits:
            self.until(lambda: len(self.pids) == self.workers.count and all(
                worker.batch is not STARTING for worker in self.workers._workers))
            self.waits = False
            if self.workers._method != "fork":
                self.warm()
        letters = [letter(dump_chunk(self.context, list(arguments))) for arguments in chunks]
        self.given.update(((job, number), each) for number, each in enumerate(letters, first))
        self.workers.add(came(Kind.TASK, Batch.pack(job, first, letters, attempt=2, number=us, flags=flags)))

    def warm(self) -> None:
        """Have every worker import this module. That takes longer than a chunk may, so a batch would come back."""
        self.declare(double, job=WARMING, context="f")
        for number in range(self.workers.count):
            self.add([number], job=WARMING, first=number)
        self.until(lambda: self.done(self.workers.count, job=WARMING))
        self.workers.end(WARMING)
        self.workers.close_context("f" * 32)
        self.heard.clear()
        self.given_again = 0

    def add_each(self, *chunks: Any, job: int = 1, first: int = 0) -> None:
        """A batch for each chunk."""
        for number, chunk in enumerate(chunks, first):
            self.add(chunk, job=job, first=number)

    def give_again(self) -> None:
        """Give what was returned, as a controller would that has no other node; each chunk by itself."""
        heard, self.given_again = self.heard[self.given_again :], len(self.heard)
        for kind, batch in heard:
            for number in range(batch.first, batch.end) if kind is Kind.RETURNED else ():
                self.workers.add(came(Kind.TASK, Batch.pack(
                    batch.job, number, [self.given[batch.job, number]], attempt=2)))

    def turn(self) -> None:
        self.workers.turn()
        for key, events in self.selector.select(min(0.02, max(0, self.workers.look_at - time.monotonic()))):
            key.data(events)

    def until(self, true: Callable[[], Any], seconds: float = SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"waited in vain; heard {self.answers()}"
            self.turn()

    def answers(self, job: int = 1) -> list[tuple[int, Status, Any]]:
        """Chunk, status and what the letter says, of all RESULTs so far."""
        return [
            (number, Status(state), self._open(Status(state), bytearray(joined(each))))
            for kind, batch in self.heard if kind is Kind.RESULT and batch.job == job
            for number, state, each in zip(range(batch.first, batch.end), batch.statuses, batch.letters())
        ]

    def values(self, job: int = 1) -> dict[int, Any]:
        return {number: values for number, state, values in self.answers(job) if state is Status.VALUES}

    def returned(self, reason: Gone | None = None) -> list[int]:
        return [
            number for kind, batch in self.heard if kind is Kind.RETURNED and reason in (None, batch.flags)
            for number in range(batch.first, batch.end)]

    def done(self, count: int, job: int = 1) -> bool:
        """Whether so many chunks have an answer; what was returned is given again."""
        self.give_again()
        return len(self.answers(job)) >= count

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.process.pid for worker in self.workers._workers]

    def at(self, chunk: int, worker: int = 0) -> bool:
        """Whether a worker is at a chunk, in its function."""
        status = self.workers._workers[worker].status if self.workers._workers else (None,) * 4
        return status[CHUNK] == chunk and status[PHASE] == CALL

    def _open(self, state: Status, letter: Any) -> Any:
        if state in (Status.DIED, Status.TIMEOUT):
            check_fields("a note", note := json.loads(letter), NOTE)
            return note
        values, errors = load_outcomes(self.context, letter, state is not Status.VALUES)
        return errors or values


def letter(parts: Any) -> Letter:
    length = sum(map(len, parts))
    return LongLetter(parts, digest(parts), length) if length > 1024 else b"".join(parts)


def came(kind: Kind, batch: Batch) -> Batch:
    """The batch as it comes over a link."""
    reader = FrameReader("SN", None)
    signed, letters = encode(kind, batch)
    data = b"".join([signed, *letters])
    while True:
        with reader.space() as space:
            count = min(len(space), len(data))
            space[:count] = data[:count]
        data = data[count:]
        for _, body in reader.received(count):
            return body  # type: ignore[no-any-return]


@pytest.fixture
def loop() -> Iterator[Callable[..., Loop]]:
    made: list[Loop] = []

    def make(*args: Any, **options: Any) -> Loop:
        made.append(Loop(*args, **options))
        return made[-1]

    yield make
    for each in made:
        processes = each.pids
        each.workers.stop()
        assert not each.selector.get_map(), "a descriptor is watched still"
        each.selector.close()
        assert not [pid for pid in processes if alive(pid)]
    assert multiprocess.active_children() == []
    forkserver._forkserver._stop()
    resource_tracker._resource_tracker._stop()


def alive(pid: int) -> bool:
    """Whether it runs: one that nobody has waited for yet does not."""
    try:
        if sys.platform == "linux":
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        os.kill(pid, 0)
    except OSError:
        return False
    return True


# Functions for the workers.


def double(x: Any) -> Any:
    return 2 * x


def pid_of(_: Any) -> int:
    return os.getpid()


def exit_on(x: Any) -> Any:
    if x == "die":
        os._exit(7)
    if x == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def die_with_child(path: str) -> None:
    if os.path.exists(path):
        return
    if not os.fork():  # lives on, and holds every descriptor of the worker open
        time.sleep(5)
        os._exit(0)
    Path(path).touch()
    os._exit(1)


def say(x: Any) -> Any:
    print(f"{x}\n" * (x if isinstance(x, int) else 1), end="")
    return exit_on(x)


def sleep(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def die_now() -> None:
    os._exit(9)


def set_up() -> None:
    os.environ["SET_UP"] = str(os.getpid())


def take_number() -> None:
    os.environ["SET_UP"] = os.environ["ACHILLES_WORKER"]


def get_up(_: Any) -> Any:
    return os.environ.get("SET_UP"), os.getpid()


class Deadly:
    def __init__(self, when: str) -> None:
        self.when = when

    def __reduce__(self) -> Any:
        if self.when == "dump" and multiprocess.parent_process():
            os._exit(5)
        return (os._exit if self.when == "load" else Deadly, (5,) if self.when == "load" else (self.when,))


def make_deadly(_: Any) -> Deadly:
    return Deadly("dump")


def count_up(_: Any) -> int:
    """Some seconds in C code that holds the interpreter."""
    return sum(range(10**8))


def busy_or_pid(x: Any) -> int:
    return count_up(x) if x else os.getpid()


def meet(given: tuple[str, str]) -> int:
    """Leave one file and wait for the other."""
    mine, other = given
    Path(mine).touch()
    deadline = time.monotonic() + 15
    while not os.path.exists(other) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.path.exists(other)
    return os.getpid()


def fork(given: tuple[str, str]) -> int:
    """A child returns from here, too, as the second of the two says how; the file has a line for each call."""
    path, how = given
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    warnings.simplefilter("ignore", DeprecationWarning)  # a worker may have a second thread, and forks all the same
    if how and os.fork() == 0:
        if how == "raise":
            raise ValueError
        if how == "exit":
            sys.exit(3)
        return -1
    time.sleep(0.2)
    return os.getpid()


# Starting and ending.


@pytest.mark.parametrize("method", METHODS)
def test_chunks_are_answered_under_each_start_method(loop: Any, method: str) -> None:
    it = loop(2, method)
    it.declare(double)
    for first in range(0, 300, 50):
        it.add(*([n, "x" * n] for n in range(first, first + 50)), first=first)
    it.until(lambda: it.done(300))
    assert it.values() == {n: [2 * n, "xx" * n] for n in range(300)}
    assert {batch.attempt for _, batch in it.heard} == {2}


@pytest.mark.parametrize("method", METHODS)
def test_each_worker_has_a_number_before_its_initializer_and_its_replacement_keeps_it(loop: Any, method: str) -> None:
    """Numbers from 0 on, each once at any time."""
    it = loop(3, method)
    it.declare(get_up, initializer=take_number)
    numbers = []
    for chunk, killed in enumerate([2, 0, 1]):
        it.add([chunk], first=chunk)
        it.until(lambda n=chunk: it.done(n + 1) and len(it.pids) == 3)
        ((number, pid),) = it.values()[chunk]
        workers = {worker.number: worker.process.pid for worker in it.workers._workers}
        assert sorted(workers) == [0, 1, 2] and workers[int(number)] == pid
        numbers.append(workers)
        os.kill(workers[killed], signal.SIGKILL)
        it.until(lambda old=workers[killed]: len(it.pids) == 3 and old not in it.pids)
    for before, after, killed in zip(numbers, numbers[1:], [2, 0]):
        assert [number for number in before if before[number] != after[number]] == [killed]


def test_the_longest_running_chunk_of_each_job_is_known(loop: Any, monkeypatch: Any) -> None:
    it = loop(3)
    it.declare(sleep)
    it.declare(sleep, job=2)
    it.declare(double, job=3)
    it.add([20], [20])
    it.until(lambda: it.at(0) and it.workers._workers[0].seen[0] == 0)
    time.sleep(0.05)
    it.add([30], job=2)
    it.add([30], job=2, first=5)
    it.until(lambda: it.at(0, 1) and it.at(5, 2))
    assert it.workers.long_chunks(time.monotonic()) == []
    began = [worker.chunk_at for worker in it.workers._workers]
    (one, two) = it.workers.long_chunks(began[0] + 10)
    if one["job"] == 2:
        one, two = two, one
    assert one == {"job": 1, "seconds": 10, "pid": it.pids[0]}
    assert two["job"] == 2 and two["seconds"] == began[0] + 10 - min(began[1:])
    assert two["pid"] == it.pids[1 + (began[2] < began[1])]
    assert it.workers.long_chunks(began[0] + 1.001) == [one | {"seconds": began[0] + 1.001 - began[0]}]
    it.workers.cancel(1)
    it.workers.cancel(2)
    it.until(lambda: len(it.pids) == 3 and not it.workers.busy)
    assert it.workers.long_chunks(time.monotonic() + 10) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_dead_worker_is_replaced_under_each_start_method(loop: Any, method: str) -> None:
    it = loop(1, method)
    it.declare(exit_on)
    it.add(["a", "die"], ["b"], flags=CAREFUL)
    it.until(lambda: it.done(2))
    (number, state, note), = [answer for answer in it.answers() if answer[1] is Status.DIED]
    assert (number, note["offset"], note["phase"], note["node"], note["exitcode"]) == (0, 1, "call", 3, 7)
    assert it.values() == {1: ["b"]} and alive(it.pids[0]) and note["pid"] not in it.pids


# Workers that read nothing, on a system whose kernel does not end them with their node.
ALONE = """
        import fcntl
        from achilles.node import worker
        del fcntl.F_SETSIG
        from achilles.protocol.frames import Batch, Kind
        worker.Worker.serve = lambda self: (self._write(Kind.IDLE, Batch(0)), time.sleep(60))
"""


@pytest.mark.parametrize(("method", "before"), [(method, "") for method in METHODS] + [
    pytest.param("fork", ALONE, id="fork, busy, without F_SETSIG",
                 marks=pytest.mark.skipif("fork" not in METHODS, reason="needs fork"))])
def test_workers_never_run_the_callers_main_and_end_with_a_killed_node(
    tmp_path: Path, method: str, before: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(f"""
        import selectors, sys, time
        {before}
        print("main runs", flush=True)
        from achilles.node.workers import Workers
        selector = selectors.DefaultSelector()
        workers = Workers(2, {method!r}, selector, print)
        while True:
            workers.turn()
            if all(worker.idle for worker in workers._workers):
                print(*(worker.process.pid for worker in workers._workers), flush=True)
                sys.stdin.read()
            for key, events in selector.select(0.02):
                key.data(events)
    """))
    node = subprocess.Popen(
        [sys.executable, "-W", "error", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])})
    assert node.stdout and node.stdin
    with node.stdout, node.stdin:
        assert node.stdout.readline() == "main runs\n"
        pids = [int(pid) for pid in node.stdout.readline().split()]
        assert len(pids) == 2
        node.kill()
        node.wait()
        wait_until(lambda: not any(map(alive, pids)))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_forked_worker_holds_no_descriptor_of_another(loop: Any) -> None:
    it = loop(3, "fork")
    it.until(lambda: len(it.pids) == 3 and all(worker.idle for worker in it.workers._workers))
    for pid in it.pids:
        held = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        mine = {os.readlink(f"/proc/self/fd/{w.channel.socket.fileno()}") for w in it.workers._workers}
        assert not mine & set(held) and not any("eventpoll" in name for name in held)


def test_a_worker_that_dies_before_it_is_ready_is_not_started_again_at_once(loop: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(process.process_of_worker, "main", die_at_start)
    it = loop(1)
    started: list[int] = []
    began, deadline = time.monotonic(), time.monotonic() + SECONDS
    while len(started) < 4 and time.monotonic() < deadline:
        it.turn()
        started += [pid for pid in it.pids if pid not in started]
    assert len(started) == 4 and time.monotonic() - began >= 3 * module.START_SECONDS


def test_the_time_in_which_a_worker_reads_a_batch_is_no_time_of_the_batch() -> None:
    """Else most of a batch of 40 ms goes back when its letters have taken 180 ms to come."""
    (ours, theirs), (lines, far) = socket.socketpair(), socket.socketpair()
    with ours, theirs, lines, far:
        worker = process.NodeWorker(types.SimpleNamespace(pid=1), ours, lines, bytearray(8 * WORDS), 0, None)
        worker.rest()
        batch = Batch.pack(1, 0, [b"x"] * 10, number=40_000)
        letters = [b"", b"f", b"", b""]
        job = process.NodeJob(("a context", None), (None, None), {"initializer": False}, letters, Flow())
        worker.begin(job, batch)
        began = worker.since
        assert not worker.look(began + 0.01) and not worker.look(began + 0.18)
        for number in range(10):
            worker.status[PHASE], worker.status[CHUNK] = CALL, number
            assert not worker.look(began + 0.181 + 0.004 * number)


def test_a_batch_whose_worker_does_not_start_is_returned(loop: Any, monkeypatch: Any) -> None:
    main = process.process_of_worker.main
    monkeypatch.setattr(process.process_of_worker, "main", lambda *given: (time.sleep(1.5), main(*given)))
    it = loop(1)
    it.waits = False
    it.declare(double)
    began = time.monotonic()
    it.add([1], [2])
    it.until(it.returned)
    assert 0.2 < time.monotonic() - began < 1.2 and it.returned(Gone.WAITED) == [0, 1]
    it.until(lambda: it.workers._workers[0].idle)
    it.add([3], first=2)
    it.until(lambda: it.done(3))
    assert it.values() == {0: [2], 1: [4], 2: [6]} and len(it.answers()) == 3


@pytest.mark.skipif("forkserver" not in METHODS, reason="needs a forkserver")
def test_a_forkserver_that_ends_in_the_middle_of_a_start_is_replaced(loop: Any) -> None:
    it = loop(1, "forkserver")
    it.declare(double)
    it.until(lambda: it.pids and it.workers._workers[0].idle)
    server = forkserver._forkserver._forkserver_pid
    os.kill(server, signal.SIGSTOP)
    killer = threading.Timer(0.5, os.kill, (server, signal.SIGKILL))  # as it ends where it cannot fork
    killer.start()
    it.workers.count = 2
    it.until(lambda: not killer.is_alive())
    it.add([1])
    it.until(lambda: it.done(1))
    assert it.values() == {0: [2]}


def test_a_worker_starts_beside_a_stdout_that_was_closed(loop: Any, monkeypatch: Any, tmp_path: Path) -> None:
    with open(tmp_path / "stdout", "w") as closed:
        pass
    monkeypatch.setattr(sys, "stdout", closed)
    it = loop(1, METHODS[0])
    it.declare(double)
    it.add([1])
    it.until(lambda: it.done(1))
    assert it.values() == {0: [2]}


def die_at_start(*_: Any) -> None:
    os._exit(1)


# Deaths.


@pytest.mark.parametrize("exitcode", [7, -signal.SIGKILL])
def test_a_death_among_quick_chunks_charges_one_chunk_and_returns_the_others(loop: Any, exitcode: int) -> None:
    it = loop(2)
    it.declare(exit_on)
    poison = "die" if exitcode > 0 else "kill"
    it.until(lambda: len(it.pids) == 2)
    for first in (50, 0):
        it.add(*([poison] if n == 75 else [n] for n in range(first, first + 50)), first=first)
    it.until(lambda: it.done(100))
    died = [(number, note) for number, state, note in it.answers() if state is Status.DIED]
    assert [(number, note["offset"], note["exitcode"]) for number, note in died] == [(75, 0, exitcode)]
    assert sorted(it.values()) == [n for n in range(100) if n != 75]
    assert set(it.returned(Gone.RETURNED)) >= set(range(76, 100)) and 75 not in it.returned()


@pytest.mark.parametrize("flags", [0, CAREFUL])
def test_a_careful_batch_names_the_argument(loop: Any, flags: int) -> None:
    it = loop(1)
    it.declare(exit_on)
    it.add(["a", "b", "die", "c"], flags=flags)
    it.until(it.answers)
    assert [note["offset"] for _, _, note in it.answers()] == [2 if flags else -1]


def test_a_death_is_seen_although_a_child_of_the_worker_lives(loop: Any, tmp_path: Path) -> None:
    it = loop(1)
    it.declare(die_with_child)
    it.add([str(tmp_path / "done")])
    it.until(lambda: it.answers(), seconds=4)  # the child lives for 5
    assert it.answers()[0][1] is Status.DIED


def test_what_a_worker_wrote_before_its_death_counts(loop: Any) -> None:
    it = loop(1)
    it.declare(pid_of)
    it.add([0], first=5)
    it.workers.turn()  # starts it and writes; nothing reads
    [worker] = it.workers._workers
    wait_until(lambda: worker.status[PHASE] == IDLE and worker.status[CHUNK] == 5)
    time.sleep(0.1)  # it writes last
    worker.process.kill()
    wait_until(lambda: worker.process.exitcode is not None)
    it.workers.look_at = 0.0
    it.workers.turn()
    assert list(it.values()) == [5] and not it.workers.busy and not it.returned()


def write_nonsense(_: Any) -> None:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.write(int(name), b"no frame at all")
    time.sleep(30)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_worker_whose_function_writes_to_its_socket_dies_of_it(loop: Any) -> None:
    it = loop(1)
    it.declare(write_nonsense)
    it.add([0], [0])
    it.until(it.answers)
    [(number, state, note)] = it.answers()
    assert (number, state, note["phase"], it.returned()) == (0, Status.DIED, "call", [1])


def test_a_death_and_a_time_limit_say_no_time(loop: Any) -> None:
    """The pace of a job is that of calls which end."""
    it = loop(1)
    it.declare(exit_on)
    it.declare(sleep, job=2, timeout=0.1)
    it.add(["die"])
    it.until(it.answers)
    it.add([30], job=2)
    it.until(lambda: it.give_again() or it.answers(2))
    assert [(*batch.statuses, batch.number) for kind, batch in it.heard if kind is Kind.RESULT] == [
        (Status.DIED, 0), (Status.TIMEOUT, 0)]


def test_an_idle_worker_that_is_killed_is_replaced_and_charges_nothing(loop: Any) -> None:
    it = loop(1)
    it.declare(pid_of)
    it.add([0])
    it.until(it.answers)
    os.kill(it.pids[0], signal.SIGKILL)
    it.add([0], first=1)
    it.until(lambda: it.done(2))
    (first,), (second,) = it.values()[0], it.values()[1]
    assert first != second


@pytest.mark.parametrize(("when", "offset"), [("load", -1), ("dump", 0)])
def test_a_death_in_loading_or_dumping_says_so(loop: Any, when: str, offset: int) -> None:
    it = loop(1)
    it.declare(make_deadly if when == "dump" else double)
    it.add([Deadly("load")] if when == "load" else [1])
    it.until(it.answers)
    [(_, state, note)] = it.answers()
    assert (state, note["phase"], note["offset"]) == (Status.DIED, when, offset)


def test_a_death_in_an_initializer_is_the_jobs(loop: Any) -> None:
    it = loop(1)
    it.declare(double, initializer=die_now)
    it.add([1], first=4)
    it.until(it.answers)
    [(number, state, note)] = it.answers()
    assert (number, state, note["phase"], note["offset"]) == (4, Status.DIED, "function", -1)
    assert note["exitcode"] == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", ["return", "raise", "exit"])
@pytest.mark.parametrize("chunks", [1, 4])
def test_a_child_that_returns_from_the_function_is_no_second_worker(
    loop: Any, tmp_path: Path, how: str, chunks: int, capfd: Any
) -> None:
    it = loop(1)
    it.declare(fork)
    path = str(tmp_path / "calls")
    arguments = [(path, how), (path, ""), (path, ""), (path, "")]
    it.add(*[arguments[n :: chunks] for n in range(chunks)])
    it.until(lambda: it.done(chunks))
    pids = {pid for values in it.values().values() for pid in values}
    assert pids == {it.pids[0]} and len(it.answers()) == chunks
    assert Path(path).read_text().split() == [str(it.pids[0])] * 4
    assert capfd.readouterr().err == "", "the child ends in silence"


def count_sockets_in_a_child(path: str) -> None:
    reading, writing = os.pipe()
    warnings.simplefilter("ignore", DeprecationWarning)
    if os.fork() == 0:
        found = [name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}") and
                 stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode)]
        Path(path).write_text(str(len(found)))
        os._exit(0)
    os.close(writing)
    os.read(reading, 1)  # until the child has ended


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_child_that_the_function_forks_does_not_hold_its_workers_socket(loop: Any, tmp_path: Path) -> None:
    it = loop(1)
    it.declare(count_sockets_in_a_child)
    it.add([str(tmp_path / "count")])
    it.until(it.answers)
    assert it.values() and (tmp_path / "count").read_text() == "0"


def test_a_stopped_worker_does_not_stop_the_loop(loop: Any) -> None:
    it = loop(2)
    it.waits = False
    it.until(lambda: len(it.pids) == 2)
    os.kill(it.pids[0], signal.SIGSTOP)
    it.declare(double)
    it.add_each([b"x" * (4 << 20)], *([n] for n in range(1, 9)))
    it.until(lambda: it.done(8))  # its own batch may wait for it


# Feeding, and taking back.


def test_the_rest_of_a_late_batch_is_returned_while_it_runs(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep)
    it.add([0], [1.0], [0], [0], us=5000)
    began = time.monotonic()
    it.until(it.returned)
    assert it.returned(Gone.RETURNED) == [2, 3] and time.monotonic() - began < 0.8
    it.until(lambda: len(it.answers()) == 1)
    assert list(it.values()) == [0]  # the node has taken it from the board
    it.until(lambda: not it.workers.busy)
    assert list(it.values()) == [0, 1]


def test_c_code_that_holds_the_interpreter_holds_up_no_other_chunk_of_its_batch(loop: Any) -> None:
    it = loop(2)
    it.declare(busy_or_pid)
    it.add([0], [0], [1], [0], [0])
    it.until(lambda: it.done(4) and it.values().keys() >= {0, 1, 3, 4}, seconds=15)
    assert 2 not in it.values() and it.workers.busy
    it.until(lambda: it.done(5))
    assert {number for number, _, _ in it.answers()} == set(range(5))
    it.until(lambda: not it.workers.busy)


def test_answers_that_a_dead_worker_has_not_sent_count(loop: Any) -> None:
    it = loop(1)
    it.declare(exit_on)
    it.add([0])
    it.until(it.answers)  # the function is loaded
    given = [n * "x" for n in (0, 5_000, 40, 100_000, *range(1, 36))]
    it.add(*[[each] for each in given], ["die"], [0], first=1, us=10**6)
    it.until(it.returned)
    assert list(it.values().values()) == [[0], *[[each] for each in given]] and it.returned() == [41]
    assert [(number, state) for number, state, _ in it.answers() if state] == [(40, Status.DIED)]


@pytest.mark.skipif("fork" not in METHODS, reason="needs fork")
@pytest.mark.parametrize("wrong", ["length", "status", "first", "moved"])
def test_a_board_that_a_function_wrote_over_gives_no_answer(loop: Any, monkeypatch: Any, wrong: str) -> None:
    monkeypatch.setattr(process.process_of_worker, "FLUSH_NS", 10**12)
    monkeypatch.setattr(module, "LATE_SECONDS", 3600.0)
    it = loop(1, "fork")
    it.declare(sleep)
    it.add([0], [0], [5], us=10**7)
    it.until(lambda: it.at(2))
    [worker] = it.workers._workers
    board = worker._board
    if wrong == "length":
        board.lengths[0] = 2**64 - 1
    elif wrong == "status":
        board.statuses[1] = 99
    elif wrong == "first":
        board.status[FIRST] = 1
    else:
        answers = board.answers
        board.answers = lambda *given: (answers(*given), board.status.__setitem__(CHUNK, 1))[0]
    it.workers._pass_on(worker, worker.waiting(2))
    assert it.answers() == [] and worker.next == 0
    worker.kill(None)
    it.until(lambda: not it.workers.busy)
    assert set(it.returned()) == {0, 1, 2} or wrong == "moved"


def test_two_chunks_of_a_batch_may_wait_for_each_other(loop: Any, tmp_path: Path) -> None:
    it = loop(2)
    it.declare(meet)
    one, two = str(tmp_path / "1"), str(tmp_path / "2")
    it.add([(one, two)], [(two, one)])
    it.until(lambda: it.done(2))
    assert it.values()[0] != it.values()[1]


def test_a_batch_that_takes_as_long_as_was_thought_is_not_taken_back(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep)
    it.add([0.2], [0.2], us=400_000)
    it.until(lambda: not it.workers.busy and len(it.answers()) == 2)
    assert it.returned() == []


def test_a_batch_whose_chunks_are_each_a_little_slower_than_thought_is_taken_back(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep)
    it.add(*[[0.01]] * 200, us=5000)
    began = time.monotonic()
    it.until(it.returned)
    assert time.monotonic() - began < 1 and len(it.returned()) > 100


def test_what_waited_in_the_queue_is_returned(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep)
    it.add([1.0])
    it.until(lambda: it.at(0))
    it.add([0], [0], first=1)
    began = time.monotonic()
    it.until(it.returned)
    assert it.returned(Gone.WAITED) == [1, 2] and 0.2 < time.monotonic() - began < 0.9
    it.until(lambda: not it.workers.busy)
    assert list(it.values()) == [0]


def test_an_idle_worker_gets_what_waits_behind_a_batch_that_it_may_not_run(loop: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "WAIT_SECONDS", 3600.0)
    monkeypatch.setattr(module, "SHARE_SECONDS", 3600.0)
    it = loop(2)
    for job, context in ((1, "a"), (2, "b")):
        it.declare(sleep, job=job, context=context, initializer=set_up)
    it.add([0], job=2)
    it.until(lambda: it.values(2) and not it.workers.busy)
    it.add([9.0], us=10**9)
    it.until(lambda: it.workers.busy)
    it.add([0], first=1)
    it.add([0], job=2, first=1)
    it.until(lambda: 1 in it.values(2))
    assert not it.values() and not it.returned()


def test_the_lines_of_a_chunk_come_before_its_result_and_so_does_the_count_of_the_others(loop: Any) -> None:
    it = loop(1)
    it.declare(say, output=True)
    it.add([3000], [2], us=10**6)
    [worker] = it.workers._workers
    it.workers.turn()  # gives the batch; nothing reads
    wait_until(lambda: worker.status[CHUNK] == 1 and worker.status[PHASE] == IDLE)
    while len(it.answers()) < 2:  # the node sees the RESULT first
        it.workers._read(worker, worker.channel)
    lines = [0, 0]
    for kind, batch in it.heard:
        if kind is Kind.OUTPUT:
            lines[batch.first] += batch.attempt if batch.flags == MORE else 1
        elif batch.first == 0:
            assert lines[0] >= 3000
    assert sum(lines) == 3002 and 100 < len(it.heard) < 2000


def test_what_a_worker_printed_before_its_death_comes_before_the_answer(loop: Any) -> None:
    it = loop(1)
    it.declare(say, output=True)
    it.add([1], ["die"])
    it.until(lambda: it.done(2))
    lines = [bytes(batch.letters()[0]) for kind, batch in it.heard if kind is Kind.OUTPUT]
    assert lines == [b"1", b"die"] and it.heard[-1][0] is Kind.RESULT


def test_an_answer_of_a_chunk_that_was_returned_is_passed_on_and_confuses_nobody(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep)
    it.add([0.3], [0.3], [0], us=10**6)
    it.until(lambda: it.at(0))
    [worker] = it.workers._workers
    it.workers._return(worker.batch, *worker.take_back(), Gone.RETURNED)
    worker.status[3] = 2  # the worker read the limit before the node wrote it
    it.until(lambda: not it.workers.busy)
    assert it.returned() == [1, 2] and list(it.values()) == [0, 1]
    it.add([0], first=2)
    it.until(lambda: len(it.answers()) == 3)


def test_a_chunk_at_which_a_worker_stopped_is_returned_although_the_node_left_it(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep)
    it.add([0.2], [0], [0], us=10**6)
    it.until(lambda: it.at(0))
    it.workers._workers[0].status[3] = 1  # the worker reads it; the node saw the worker behind it, and raised it
    it.until(lambda: it.returned() and not it.workers.busy)
    assert it.returned() == [1, 2] and list(it.values()) == [0]


def test_a_worker_is_told_of_a_job_once_and_of_an_initializer_once_a_context(loop: Any, monkeypatch: Any) -> None:
    it = loop(1)
    sent: list[tuple[int, bool]] = []  # jobs, and whether they came with an initializer
    send = process.Channel.send

    def note(self: Any, kind: Kind, body: Any) -> None:
        if kind is Kind.JOB and body.job != WARMING:
            sent.append((body.job, body.lengths[2] > 0))
        send(self, kind, body)

    monkeypatch.setattr(process.Channel, "send", note)
    for job in (1, 2, 1):
        if job not in dict(sent):
            it.declare(get_up, job, initializer=set_up)
        before = len(it.answers(job))
        it.add([1], job=job)
        it.until(lambda: len(it.answers(job)) > before)  # noqa: B023
    assert sent == [(1, True), (2, False)]


def test_a_worker_with_an_initializer_is_replaced_when_its_context_closes(loop: Any) -> None:
    it = loop(1)
    it.declare(get_up, initializer=set_up)
    it.add([0])
    it.until(lambda: it.done(1))
    it.workers.end(1)
    it.workers.close_context("c" * 32)
    it.declare(get_up, job=2, context="d")
    it.add([0], job=2)
    it.until(lambda: it.done(1, job=2))
    [(up, before)], [(none, after)] = it.values()[0], it.values(2)[0]
    assert up == str(before) and before != after and none is None


def test_a_job_outlives_a_context_that_is_closed_before_its_end(loop: Any) -> None:
    it = loop()
    it.declare(len)
    it.add_each(["abc"], ["de"])
    it.workers.close_context("c" * 32)
    it.until(lambda: it.values() == {0: [3], 1: [2]})


def test_a_context_that_waits_gets_a_worker_that_belongs_to_an_idle_one(loop: Any) -> None:
    it = loop(1)
    it.declare(get_up, job=1, context="c", initializer=set_up)
    it.add([0], job=1)
    it.until(it.answers)
    it.declare(get_up, job=2, context="d")
    it.add([0], job=2)
    it.until(lambda: it.give_again() or it.answers(2))
    [(state, pid)] = it.values(2)[0]
    assert state is None and pid != it.values(1)[0][0][1]


def own_all(it: Loop) -> None:
    """Every worker belongs to the context of job 1."""
    it.add_each(*([0.1] for n in range(len(it.pids))), job=1)
    it.until(lambda: all(worker.owner[0] for worker in it.workers._workers) and not it.workers.busy)


def test_idle_workers_of_one_context_go_to_another_that_has_too_few(loop: Any, monkeypatch: Any) -> None:
    it = loop(3)
    it.until(lambda: len(it.pids) == 3)
    it.declare(sleep, job=1, context="c", initializer=set_up)
    it.declare(sleep, job=2, context="d")
    own_all(it)
    it.add_each(*([0.1] for _ in range(200)), job=2)
    it.until(lambda: it.done(0) or len({pid for (pid,) in it.values(2).values()}) == 2)
    it.until(lambda: it.give_again() or len({pid for (pid,) in it.values(2).values()}) == 2)
    assert len(it.answers(2)) < 200
    assert [worker.owner for worker in it.workers._workers].count(("c" * 32, None)) == 1  # its part, for a minute
    monkeypatch.setattr(module, "KEEP_SECONDS", 1.0)
    it.until(lambda: it.give_again() or len({pid for (pid,) in it.values(2).values()}) == 3)
    assert len(it.answers(2)) < 200


def test_one_chunk_of_a_context_without_workers_takes_one(loop: Any) -> None:
    it = loop(3)
    it.until(lambda: len(it.pids) == 3)
    it.declare(sleep, job=1, context="c", initializer=set_up)
    it.declare(sleep, job=2, context="d")
    own_all(it)
    before = set(it.pids)
    it.add([0.2], job=2)
    it.until(lambda: it.done(1, job=2))
    assert len(before & set(it.pids)) == 2


def test_a_context_waits_a_second_for_a_worker_of_one_that_is_always_busy(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep, job=1, context="c", initializer=set_up)
    it.declare(sleep, job=2, context="d")
    it.add_each(*([0.01] for _ in range(2000)), job=1)
    it.until(lambda: it.answers(1))
    it.add([0.01], job=2)
    it.until(lambda: it.done(1, job=2))
    assert len(it.answers(1)) < 2000


@pytest.mark.skipif("fork" not in METHODS, reason="needs fork")
def test_a_batch_waits_for_the_worker_that_is_started_for_it(loop: Any, monkeypatch: Any) -> None:
    """Else it is returned just before the worker is ready, and the others get that worker."""
    monkeypatch.setattr(module, "SHARE_SECONDS", 0.8)
    monkeypatch.setattr(module, "WAIT_SECONDS", 1.0)
    it = loop(1, "fork")
    it.declare(sleep, job=1, context="c", initializer=set_up)
    it.declare(sleep, job=2, context="d")
    it.add([0.9], job=1, us=2_000_000)
    it.until(lambda: it.at(0))
    main = process.process_of_worker.main
    monkeypatch.setattr(process.process_of_worker, "main", lambda *given: (time.sleep(0.4), main(*given)))
    it.add([0], job=2)
    it.until(lambda: it.answers(2) or it.returned())
    assert it.answers(2) and not it.returned()


def test_a_context_gets_an_idle_worker_although_a_busy_one_is_to_end_for_it(loop: Any) -> None:
    it = loop(2)
    it.declare(sleep, job=1, context="a", initializer=set_up)
    it.add_each([1.5], [9.0])
    it.until(lambda: len([worker for worker in it.workers._workers if worker.status[PHASE] == CALL]) == 2)
    began = time.monotonic()
    it.declare(double, job=2, context="b")
    it.add([1], job=2)
    it.until(lambda: it.give_again() or it.values(2))
    assert time.monotonic() - began < 4  # the later worker was to end after 1 s; the other one is idle after 1.5 s


def test_of_busy_workers_the_one_whose_batch_began_last_makes_way(loop: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "SHARE_SECONDS", 0.0)
    it = loop(2)
    it.declare(sleep, job=1, context="a", initializer=set_up)
    it.add([9.0])
    it.until(lambda: it.at(0, worker=0) or it.at(0, worker=1))
    it.add([1.0], first=1)
    it.until(lambda: it.at(1, worker=0) or it.at(1, worker=1))
    it.declare(double, job=2, context="b")
    it.add([1], job=2)
    it.until(lambda: not all(worker.usable for worker in it.workers._workers))
    for _ in range(3):  # and no other one for the same batch
        it.workers.look_at = 0.0
        it.turn()
    assert [worker.batch.first for worker in it.workers._workers if worker.usable] == [0]
    it.until(lambda: it.give_again() or it.values(2))


def test_contexts_that_take_turns_keep_their_workers(loop: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "SHARE_SECONDS", 3600.0)
    it = loop(2)
    for job, context in enumerate("cd", 1):
        it.declare(sleep, job=job, context=context, initializer=set_up)
        it.add([0], job=job)
    it.until(lambda: it.answers(1) and it.answers(2))
    pids = set(it.pids)
    for number in range(1, 3):
        for job in (1, 2):
            it.add_each(*([0.06] for _ in range(5)), job=job, first=10 * number)
            it.until(lambda: it.done(5 * number + 1, job=job))  # noqa: B023
    assert set(it.pids) == pids


def test_workers_that_were_idle_for_long_get_the_next_batches_and_are_not_replaced(
    loop: Any, monkeypatch: Any
) -> None:
    """As after a server that was stopped for some seconds."""
    it = loop(2)
    it.declare(sleep)
    it.add_each([0.1], [0.1])
    it.until(lambda: it.done(2))
    pids = set(it.pids)
    monkeypatch.setattr(module, "SHARE_SECONDS", 0.0)
    for number in range(2, 12):
        it.workers.look_at = 0.0
        it.add([0.0], first=number)
        it.until(lambda: it.done(number + 1))  # noqa: B023
    assert set(it.pids) == pids


def test_maxtasksperchild_replaces_a_worker_after_so_many_chunks(loop: Any, monkeypatch: Any) -> None:
    # No batch is returned: its chunks would be given again one by one.
    monkeypatch.setattr(module, "WAIT_SECONDS", 3600.0)
    it = loop(1)
    it.declare(pid_of, maxtasksperchild=2)
    for first, count in ((0, 1), (1, 2), (3, 2), (5, 1), (6, 1)):  # the second does not fit behind the first
        it.add(*([n] for n in range(count)), first=first, us=10**9)
    it.until(lambda: it.done(7))
    pids = [values[0] for _, values in sorted(it.values().items())]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [1, 2, 2, 2]


def test_maxtasksperchild_counts_what_was_run_and_not_taken_back(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep, maxtasksperchild=4)
    it.add([0.3], [0], [0])
    it.until(lambda: it.returned() and not it.workers.busy)
    assert it.workers._workers[0].tasks_left == 4 - len(it.answers())
    it.until(lambda: it.done(3))
    assert len({pid for (pid,) in it.values().values()}) == 1


class Unwalked(dict[int, Any]):
    """Jobs that are looked up by their number alone."""

    def __iter__(self) -> Any:
        raise AssertionError("somebody walks over all jobs")

    keys = items = values = __iter__


class UnwalkedSet(set[Any]):
    """The same, of the jobs that a worker was told of."""

    __iter__ = __len__ = Unwalked.__iter__


def test_neither_a_turn_nor_a_frame_walks_over_the_jobs_of_the_workers(loop: Any) -> None:
    it = loop(2)
    for job in range(1, 101):
        it.declare(exit_on, job=job)
        it.add([job], job=job)
    it.until(lambda: it.give_again() or all(it.answers(job) for job in range(1, 101)))
    it.workers._jobs = Unwalked(it.workers._jobs)
    for worker in it.workers._workers:
        worker.told = UnwalkedSet(worker.told)
    it.add(["die"], [1], first=1)
    it.until(lambda: it.done(2))
    it.add([2], job=2, first=1)
    it.workers.cancel(2)
    it.workers.end(3)
    it.workers.close_context("c" * 32)
    it.workers.drain()
    it.until(lambda: not it.workers.busy and not it.workers._queue)
    it.workers.turn()


# Limits, cancels, draining.


def test_an_argument_over_its_time_limit_is_told_and_its_worker_replaced(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep, timeout=0.3)
    it.add([0, 30], [0])
    it.until(lambda: it.done(2))
    (_, state, note), = [answer for answer in it.answers() if answer[0] == 0]
    assert (state, note["offset"], note["phase"]) == (Status.TIMEOUT, 1, "call")
    assert list(it.values()) == [1]


def test_a_chunk_may_be_longer_than_the_time_limit_of_one_argument(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep, timeout=0.4)
    it.add([0.15] * 5)
    it.until(it.answers)
    assert list(it.values()) == [0]


def test_cancel_returns_what_overlaps_and_kills_what_runs_of_it(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep)
    it.add([30], [0], [0], us=10**9)
    it.until(lambda: it.at(0))
    it.add([0], [0], first=3)
    it.add([0], [0], first=5)
    it.workers.cancel(1, 0, 4)
    assert sorted(it.returned()) == [1, 2, 3, 4]
    pid, began = it.pids[0], time.monotonic()
    it.until(lambda: not alive(pid), seconds=5)
    assert time.monotonic() - began > 0.4
    it.until(lambda: 0 in it.returned() and {*it.values(), *it.returned()} == set(range(7)))
    assert not [1 for _, state, _ in it.answers() if state is Status.DIED]


def test_the_greatest_number_of_a_chunk_can_be_run_and_taken_back(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep)
    it.add([0.2], [0], first=2**63 - 3)
    it.until(lambda: it.at(2**63 - 3))
    it.workers.drain()
    it.until(lambda: not it.workers.busy)
    assert list(it.values()) == [2**63 - 3] and it.returned() == [2**63 - 2]


def test_cancel_of_what_has_not_begun_lets_run_what_has(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep)
    it.add([0.8], [0], [0], us=10**9)
    it.until(lambda: it.at(0))
    it.workers.cancel(1, 1, 3)
    assert it.returned() == [1, 2]
    it.until(lambda: not it.workers.busy)
    assert list(it.values()) == [0]


def test_end_returns_all_kills_what_runs_and_forgets_the_job(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep)
    it.add([30], [0], us=10**9)
    it.until(lambda: it.at(0))
    it.add([0], first=2)
    it.workers.end(1)
    it.until(lambda: not it.workers.busy, seconds=5)
    assert sorted(it.returned(Gone.RETURNED)) == [0, 1, 2] and it.answers() == []
    with pytest.raises(ProtocolError, match="not declared"):
        it.add([5])
    it.workers.end(1)
    it.workers.cancel(1)


def test_a_worker_is_free_again_when_its_batch_was_returned_before_it_began(loop: Any) -> None:
    it = loop(1)
    it.waits = False
    it.until(lambda: it.pids and it.workers._workers[0].idle)
    pid = it.pids[0]
    os.kill(pid, signal.SIGSTOP)
    it.declare(sleep)
    it.add([0], [0])
    it.turn()
    it.workers.cancel(1, 0, 1)
    os.kill(pid, signal.SIGCONT)
    it.add([0], first=2)
    it.until(lambda: len(it.answers()) == 1)
    assert it.returned() == [0, 1] and it.pids == [pid]


def test_draining_returns_what_has_not_begun_and_finishes_what_runs(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep)
    it.add([0.3], [0], us=10**9)
    it.until(lambda: it.at(0))
    it.add([0.2], [0], first=2)
    it.workers.drain()
    it.add([0.2], first=4)
    it.workers.drain()  # as the loop does before each turn
    assert sorted(it.returned(Gone.LEFT)) == [1, 2, 3, 4]
    it.until(lambda: not it.workers.busy)
    assert list(it.values()) == [0]


def test_draining_returns_what_a_worker_died_with(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep)
    it.add([0], [30], *([0] for _ in range(9)), us=10**9)
    it.until(lambda: it.at(1))
    it.workers.drain()
    os.kill(it.pids[0], signal.SIGKILL)
    it.until(lambda: not it.workers.busy)
    told = [number for number, *_ in it.answers()]
    assert sorted(told + it.returned()) == list(range(11))


# What may not be.


def test_a_job_whose_initializer_never_came_is_refused(loop: Any) -> None:
    it = loop()
    it.had.add("c")
    with pytest.raises(ProtocolError, match="not sent"):
        it.declare(double, initializer=set_up)
    it.had.clear()
    it.declare(double, initializer=set_up)
    it.declare(double, job=2, initializer=set_up)
    it.workers.close_context("c" * 32)
    with pytest.raises(ProtocolError, match="not sent"):
        it.declare(double, job=3, initializer=set_up)


# Cores.


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/a\n", "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "20000\n",
          "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n"}, 1),
        ({"proc/self/cgroup": "3:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_usable_cores_heed_affinity_and_quota(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert usable_cores(str(tmp_path)) == (cores or own)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)
