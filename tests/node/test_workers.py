"""How a node's workers are started, fed, watched and ended: real processes, and a loop of our own for the node's."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import multiprocess
import pytest
from conftest import START_METHOD
from multiprocess import forkserver, resource_tracker

from achilles.errors import ProtocolError
from achilles.node import workers as module
from achilles.node.cores import default_start_method, usable_cores
from achilles.node.workers import Workers
from achilles.objects.letters import Context, dump_slice, letter_digest
from achilles.objects.outcomes import load_outcomes
from achilles.protocol.frames import ASKED, PACE_SLICES, Kind, Rows, Status, merge

METHODS = multiprocess.get_all_start_methods()
SECONDS = 20.0  # tells a hang from a wait


class Loop:
    """What a node's loop does, and what its server would hear."""

    def __init__(self, count: int = 1, method: str = START_METHOD or default_start_method()) -> None:
        self.selector = selectors.DefaultSelector()
        self.heard: list[tuple[Kind, Rows]] = []
        self.workers = Workers(count, method, self.selector, lambda kind, rows: self.heard.append((kind, rows)), node=3)
        self.given: dict[int, Rows] = {}
        self.given_again = 0  # of what is heard, up to here
        self.context = Context(caller=True)

    def declare(
        self, function: Any, job: int = 1, context: str = "c", initializer: Any = None, **options: Any
    ) -> None:
        first = None if initializer is None else self.keep((initializer, ()))
        body = {"job": job, "context": context * 32, "function": self.keep((function, None)), "initializer": first}
        self.workers.declare(body | {"resumed": False, "options": options})

    def keep(self, value: Any) -> str:
        parts = self.context.dump(value)
        digest = letter_digest(parts)
        self.workers.keep(Rows.single(0, 0, 0, 0, parts, digest if sum(map(len, parts)) > 1024 else b""))
        return digest.hex()

    def add(self, *slices: Any, job: int = 1, first: int = 0) -> None:
        """Each slice a list of arguments."""
        letters = [dump_slice(self.context, list(arguments)) for arguments in slices]
        rows = [Rows.single(job, first + n, 2, 0, parts, letter_digest(parts)) for n, parts in enumerate(letters)]
        self.given.update(enumerate(rows, first))
        self.workers.add(merge(rows))

    def give_again(self) -> None:
        """Give what was returned, as a server would that has no other node."""
        heard, self.given_again = self.heard[self.given_again :], len(self.heard)
        for number in [n for kind, rows in heard if kind is Kind.RETURNED for n in rows.slices]:
            self.workers.add(self.given[number])

    def turn(self) -> None:
        self.workers.turn()
        for key, events in self.selector.select(0.02):
            key.data(events)

    def until(self, true: Callable[[], Any], seconds: float = SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"waited in vain; heard {self.answers()}"
            self.turn()

    def answers(self, job: int = 1) -> list[tuple[int, Status, Any]]:
        """Slice, status and what the letter says, of all RESULTs so far."""
        return [
            (number, Status(state), self._open(Status(state), b"".join(letter)))
            for kind, rows in self.heard if kind is Kind.RESULT and rows.job == job
            for number, state, (_, letter) in zip(rows.slices, rows.statuses, rows.letters())
        ]

    def values(self, job: int = 1) -> dict[int, Any]:
        return {number: values for number, state, values in self.answers(job) if state is Status.VALUES}

    def returned(self) -> list[int]:
        return [number for kind, rows in self.heard if kind is Kind.RETURNED for number in rows.slices]

    def _open(self, state: Status, letter: bytes) -> Any:
        if state in (Status.DIED, Status.TIMEOUT):
            return json.loads(letter)
        values, errors = load_outcomes(self.context, bytearray(letter), state is not Status.VALUES)
        return errors or values


@pytest.fixture
def loop(monkeypatch: Any) -> Iterator[Callable[..., Loop]]:
    made: list[Loop] = []
    monkeypatch.setattr(module.process_of_worker, "LATE_NS", 10**12)  # however slow this machine is

    def make(*args: Any, **options: Any) -> Loop:
        made.append(Loop(*args, **options))
        return made[-1]

    yield make
    for each in made:
        processes = each.workers.pids
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


def sleep(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def die_now() -> None:
    os._exit(9)


def set_up() -> None:
    os.environ["SET_UP"] = str(os.getpid())


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


# Starting and ending.


@pytest.mark.parametrize("method", METHODS)
def test_slices_are_answered_under_each_start_method(loop: Any, method: str) -> None:
    it = loop(2, method)
    it.declare(double)
    it.add(*([n, "x" * n] for n in range(300)))
    it.until(lambda: len(it.answers()) == 300)
    assert it.values() == {n: [2 * n, "xx" * n] for n in range(300)}
    assert {attempt for _, rows in it.heard for attempt in rows.attempts} == {2}


@pytest.mark.parametrize("method", METHODS)
def test_a_dead_worker_is_replaced_under_each_start_method(loop: Any, method: str) -> None:
    it = loop(1, method)
    it.declare(exit_on)
    it.add(["a", "die"], ["b"])
    it.until(lambda: len(it.answers()) == 2)
    (number, state, note), = [answer for answer in it.answers() if answer[1] is Status.DIED]
    assert (number, note["position"], note["phase"], note["node"], note["exitcode"]) == (0, 1, "call", 3, 7)
    assert it.values() == {1: ["b"]} and alive(it.workers.pids[0]) and note["pid"] not in it.workers.pids


@pytest.mark.parametrize("method", METHODS)
def test_workers_never_run_the_callers_main_and_end_with_a_killed_node(tmp_path: Path, method: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(f"""
        import selectors, sys, time
        print("main runs", flush=True)
        from achilles.node.workers import Workers
        selector = selectors.DefaultSelector()
        workers = Workers(2, {method!r}, selector, print)
        while True:
            workers.turn()
            if all(worker.status[2] for worker in workers._workers):
                print(*workers.pids, flush=True)
                sys.stdin.read()
            selector.select(0.02)
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
    it.until(lambda: len(it.workers.pids) == 3 and all(worker.status[2] for worker in it.workers._workers))
    for pid in it.workers.pids:
        held = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        mine = {os.readlink(f"/proc/self/fd/{w.channel.socket.fileno()}") for w in it.workers._workers}
        assert not mine & set(held) and not any("eventpoll" in name for name in held)


def test_a_worker_that_dies_before_it_is_ready_is_not_started_again_at_once(loop: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module.process_of_worker, "main", die_at_start)
    it = loop(1)
    started: list[int] = []
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        it.turn()
        started += [pid for pid in it.workers.pids if pid not in started]
    assert 2 <= len(started) <= 5  # after 0.1, 0.2, 0.4 s


def die_at_start(*_: Any) -> None:
    os._exit(1)


# Deaths.


@pytest.mark.parametrize("exitcode", [7, -signal.SIGKILL])
def test_a_death_charges_the_argument_that_ran_and_nobody_else(loop: Any, exitcode: int) -> None:
    it = loop(2)
    it.declare(exit_on)
    it.add(*([n] for n in range(200)))
    it.until(lambda: len(it.answers()) == 200)  # quick now: slices travel together
    poison = "die" if exitcode > 0 else "kill"
    it.add(*([n, poison] if n == 50 else [n, n] for n in range(200)), first=200)
    it.until(lambda: it.give_again() or len(it.answers()) == 400)
    died = [(number, note) for number, state, note in it.answers() if state is Status.DIED]
    assert [(number, note["position"], note["exitcode"]) for number, note in died] == [(250, 1, exitcode)]
    assert sorted(it.values()) == [n for n in range(400) if n != 250]


def test_what_a_dead_worker_had_is_returned_if_it_is_short(loop: Any) -> None:
    it = loop(1)
    it.declare(exit_on)
    it.add(*([n] for n in range(200)))
    it.until(lambda: len(it.answers()) == 200)
    it.workers._jobs[1].paces.extend([10] * PACE_SLICES)  # whatever they took here: slices travel together now
    it.add(["die"], *([n] for n in range(201, 205)), first=200)
    it.until(lambda: len(it.answers()) + len(it.returned()) == 205)
    returned = it.returned()
    assert returned and [n for n, state, _ in it.answers() if state is Status.DIED] == [200]
    it.add(["die", "x" * 2000], *(["x" * 1_200_000] for _ in range(4)), first=300)
    it.until(lambda: len(it.answers()) + len(returned) == 210)
    assert it.returned() == returned and [n for n in it.values() if n > 300] == [301, 302, 303, 304]


@pytest.mark.parametrize("text", ["", "x" * 2000, "x" * 40_000])
def test_what_waits_behind_a_slow_slice_is_shared(loop: Any, monkeypatch: Any, text: str) -> None:
    """It goes to the server, which knows who is idle, or, where it is large, to the next worker here."""
    monkeypatch.setattr(module.process_of_worker, "LATE_NS", 20_000_000)
    monkeypatch.setattr(module, "MAX_SHORT_BYTES", 35_000)  # less than one large slice, more than 13 others
    it = loop(2)
    it.declare(sleep_beside)
    it.add(*([(0, text)] for n in range(50)))
    it.until(lambda: it.give_again() or len(it.answers()) == 50)
    before = len(it.returned())
    it.workers._jobs[1].paces.extend([10] * PACE_SLICES)  # whatever they took here: slices travel together now
    it.add(*([(0.1, text)] for n in range(8)), *([(0, text)] for n in range(42)), first=50)
    it.until(lambda: it.give_again() or len(it.answers()) == 100)
    slow = [pid for n, [pid] in it.values().items() if 50 <= n < 58]
    assert len(slow) == 8 and len({*slow}) == 2
    assert (len(it.returned()) > before) is (len(text) < 10_000)
    assert not any(rows.pace for kind, rows in it.heard if kind is Kind.RETURNED)


def sleep_beside(pair: Any) -> int:
    return sleep(pair[0])


@pytest.mark.skipif(START_METHOD not in (None, "fork"), reason="only a forked worker inherits what this test patches")
def test_maxtasksperchild_counts_what_was_run_and_not_given_back(loop: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module.process_of_worker, "LATE_NS", 1_000_000)
    it = loop(1)
    it.declare(sleep, maxtasksperchild=60)
    it.add(*([0] for n in range(20)))
    it.until(lambda: it.give_again() or len(it.answers()) == 20)
    it.workers._jobs[1].paces.extend([10] * PACE_SLICES)
    it.add([0.01], *([0] for n in range(10)), first=20)
    it.until(lambda: it.give_again() or len(it.answers()) == 31)
    assert it.returned()
    (worker,) = it.workers._workers
    assert worker.tasks_left == 60 - 31


def test_a_death_is_charged_where_two_messages_left_in_one_frame(loop: Any) -> None:
    it = loop(1)
    it.declare(exit_on)
    it.add(*([n] for n in range(100)))
    it.until(lambda: len(it.answers()) == 100)  # quick now: a second message is there before the first is written
    it.add(["a"], ["die"], first=100)
    it.until(lambda: len(it.answers()) == 102)
    assert it.values()[100] == ["a"] and [n for n, state, _ in it.answers() if state is Status.DIED] == [101]


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
    wait_until(lambda: module._has_more(worker.channel.socket))
    worker.process.kill()
    wait_until(lambda: worker.process.exitcode is not None)
    it.workers.turn(woken=True)
    assert list(it.values()) == [5] and not it.workers.busy


def test_an_idle_worker_that_is_killed_is_replaced_and_charges_nothing(loop: Any) -> None:
    it = loop(1)
    it.declare(pid_of)
    it.add([0])
    it.until(it.answers)
    it.until(lambda: it.workers._workers[0].status[2] == 1)
    os.kill(it.workers.pids[0], signal.SIGKILL)
    it.add([0], first=1)
    it.until(lambda: it.give_again() or len(it.answers()) == 2)
    (first,), (second,) = it.values()[0], it.values()[1]
    assert first != second


@pytest.mark.parametrize(("when", "position"), [("load", -1), ("dump", 0)])
def test_a_death_in_loading_or_dumping_says_so(loop: Any, when: str, position: int) -> None:
    it = loop(1)
    it.declare(make_deadly if when == "dump" else double)
    it.add([Deadly("load")] if when == "load" else [1])
    it.until(it.answers)
    [(_, state, note)] = it.answers()
    assert (state, note["phase"], note["position"]) == (Status.DIED, when, position)


def test_a_death_in_an_initializer_is_the_jobs(loop: Any) -> None:
    it = loop(1)
    it.declare(double, initializer=die_now)
    it.add([1])
    it.until(it.answers)
    [(_, state, note)] = it.answers()
    assert (state, note["phase"], note["position"], note["exitcode"]) == (Status.DIED, "function", -1, 9)


def test_a_stopped_worker_does_not_stop_the_loop(loop: Any) -> None:
    it = loop(2)
    it.until(lambda: len(it.workers.pids) == 2)
    os.kill(it.workers.pids[0], signal.SIGSTOP)
    it.declare(double)
    it.add([b"x" * (4 << 20)], *([n] for n in range(1, 9)))
    it.until(lambda: len(it.answers()) >= 4)  # its own slices wait for it, the others have gone to the other one


# Feeding.


def test_slow_slices_go_one_by_one_and_quick_ones_together(loop: Any) -> None:
    it = loop(1)
    it.declare(double, job=1)
    it.declare(sleep, job=2)
    it.add(*([n] for n in range(500)))
    it.until(lambda: len(it.answers()) == 500)
    assert max(len(rows) for _, rows in it.heard) > 4
    it.heard.clear()
    it.add(*([0.01] for _ in range(5)), job=2)
    it.workers.turn()
    assert [len(rows) for _, rows in it.workers._workers[0].messages] == [1]
    it.until(lambda: len(it.answers(2)) == 5)
    assert [len(rows) for _, rows in it.heard] == [1] * 5


def test_a_function_goes_to_a_worker_once_a_context(loop: Any, monkeypatch: Any) -> None:
    it = loop(1)
    sent: list[Kind] = []
    send = module.Channel.send
    monkeypatch.setattr(module.Channel, "send", lambda self, kind, body: (sent.append(kind), send(self, kind, body))[1])
    for job, context in enumerate("ccdc"):
        it.declare(double, job, context)
        it.add([1], job=job)
        it.until(lambda job=job: it.answers(job))
    assert (sent.count(Kind.FUNCTION), sent.count(Kind.JOB)) == (2, 4)


def test_a_worker_with_an_initializer_is_replaced_when_its_context_closes(loop: Any) -> None:
    it = loop(1)
    it.declare(get_up, initializer=set_up)
    it.add([0], [0])
    it.until(lambda: len(it.answers()) == 2)
    pids = {pid for [values] in it.values().values() for pid in values}
    assert len(pids) == 2 and it.values()[0] == [(str(it.workers.pids[0]), it.workers.pids[0])]


def test_a_job_outlives_a_context_that_is_closed_before_its_end(loop: Any) -> None:
    it = loop()
    it.declare(len)
    it.add(["abc"], ["de"])
    it.workers.close_context("c" * 32)
    it.until(lambda: it.values() == {0: [3], 1: [2]})


def test_a_context_that_waits_gets_a_worker_that_belongs_to_an_idle_one(loop: Any) -> None:
    it = loop(1)
    it.declare(get_up, job=1, context="c", initializer=set_up)
    it.add([0], job=1)
    it.until(it.answers)
    it.declare(get_up, job=2, context="d")
    it.add([0], job=2)
    it.until(lambda: it.answers(2))
    [(state, pid)] = it.values(2)[0]
    assert state is None and pid != it.values(1)[0][0][1]


def test_idle_workers_of_one_context_go_to_another_that_has_too_few(loop: Any, monkeypatch: Any) -> None:
    it = loop(3)
    it.declare(get_up, job=1, context="c", initializer=set_up)
    it.declare(sleep, job=2, context="d")
    it.add(*([n] for n in range(200)), job=1)
    it.until(lambda: len(it.answers()) == 200 and all(worker.owner for worker in it.workers._workers))
    it.add(*([0.1] for _ in range(200)), job=2)
    it.until(lambda: len({pid for (pid,) in it.values(2).values()}) == 2)
    assert len(it.answers(2)) < 200
    assert [worker.owner for worker in it.workers._workers].count("c" * 32) == 1  # its part, for a minute
    monkeypatch.setattr(module, "KEEP_SECONDS", 1.0)
    it.until(lambda: len({pid for (pid,) in it.values(2).values()}) == 3)
    assert len(it.answers(2)) < 200


def test_one_slice_of_a_context_without_workers_takes_one(loop: Any) -> None:
    it = loop(3)
    it.declare(get_up, job=1, context="c", initializer=set_up)
    it.declare(sleep, job=2, context="d")
    it.add(*([n] for n in range(200)), job=1)
    it.until(lambda: len(it.answers()) == 200 and all(worker.owner for worker in it.workers._workers))
    before = set(it.workers.pids)
    it.add([0.2], job=2)
    it.until(lambda: it.answers(2))
    assert len(before & set(it.workers.pids)) == 2


def test_a_context_waits_a_second_for_a_worker_of_one_that_is_always_busy(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep, job=1, context="c", initializer=set_up)
    it.declare(sleep, job=2, context="d")
    it.add(*([0.01] for _ in range(1000)), job=1)
    it.until(lambda: it.answers(1))
    it.add([0.01], job=2)
    it.until(lambda: it.answers(2))
    assert len(it.answers(1)) < 1000


def test_contexts_that_take_turns_keep_their_workers(loop: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "SHARE_SECONDS", 3600.0)
    it = loop(2)
    for job, context in enumerate("cd", 1):
        it.declare(sleep, job=job, context=context, initializer=set_up)
        it.add([0], job=job)
    it.until(lambda: it.answers(1) and it.answers(2))
    pids = set(it.workers.pids)
    for number in range(1, 3):
        for job in (1, 2):
            it.add(*([0.06] for _ in range(5)), job=job, first=10 * number)
            it.until(lambda: it.give_again() or len(it.answers(job)) == 5 * number + 1)  # noqa: B023
    assert set(it.workers.pids) == pids


def test_maxtasksperchild_replaces_a_worker_after_so_many_slices(loop: Any) -> None:
    it = loop(1)
    it.declare(pid_of, maxtasksperchild=2)
    it.add(*([n] for n in range(6)))
    it.until(lambda: len(it.answers()) == 6)
    pids = [values[0] for _, values in sorted(it.values().items())]
    assert len(set(pids)) == 3 and all(pids.count(pid) == 2 for pid in pids)


def test_contexts_share_the_workers_by_time(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep, job=1, context="c")
    it.declare(sleep, job=2, context="d")
    it.add(*([0.1] for _ in range(20)), job=1)
    it.add(*([0.02] for _ in range(20)), job=2)
    it.until(lambda: len(it.answers(1)) + len(it.answers(2)) >= 12)
    assert len(it.answers(2)) > len(it.answers(1)) > 0  # by turns they would be even


# Limits, cancels, recalls, draining.


def test_an_argument_over_its_time_limit_is_told_and_its_worker_replaced(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep, timeout=0.3)
    it.add([0, 30], [0])
    it.until(lambda: len(it.answers()) == 2)
    (_, state, note), = [answer for answer in it.answers() if answer[0] == 0]
    assert (state, note["position"], note["phase"]) == (Status.TIMEOUT, 1, "call")
    assert list(it.values()) == [1]


def test_a_slice_may_be_longer_than_the_time_limit_of_one_argument(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep, timeout=0.4)
    it.add([0.15] * 5)
    it.until(it.answers)
    assert list(it.values()) == [0]


def test_cancel_replaces_the_worker_that_is_at_it_and_drops_its_answers(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep, job=1)
    it.add(*([30] for _ in range(3)), job=1)
    it.declare(double, job=2)
    it.until(lambda: it.workers._workers and it.workers._workers[0].status[2] == 4)
    it.workers.cancel(1)
    it.add([5], job=1, first=9)  # under way when the server cancelled: dropped
    it.add([1], job=2)
    it.until(lambda: it.answers(2), seconds=5)
    assert it.answers(1) == [] and not it.workers.busy
    it.workers.cancel(9)  # not known, and remembered all the same
    it.add([5], job=9)
    for job in (1, 9):
        it.workers.end(job)
        with pytest.raises(ProtocolError, match="not declared"):
            it.add([5], job=job)


def test_end_frees_a_worker_like_cancel(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep)
    it.add([30])
    it.until(lambda: it.workers._workers and it.workers._workers[0].status[2] == 4)
    it.workers.cancel(1)
    it.workers.end(1)
    it.until(lambda: not it.workers.busy, seconds=5)
    assert it.heard == []


def test_recall_gives_back_the_last_slices_that_no_worker_has(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep)
    it.add(*([0.5] for _ in range(4)))
    it.add(*([0.5] for _ in range(4)), first=4)
    it.until(lambda: it.workers.busy)
    it.workers.recall(1, 5)
    assert it.returned() == [3, 4, 5, 6, 7]
    it.workers.recall(1, 100)
    it.workers.recall(1, 100)
    it.workers.recall(77, 1)
    assert it.returned() == [3, 4, 5, 6, 7, 1, 2] and [len(rows) for _, rows in it.heard] == [5, 2, 0, 0]
    assert all(rows.pace == ASKED for _, rows in it.heard)
    assert all(not rows.shorts and not any(rows.lengths) for _, rows in it.heard)
    it.until(it.answers)


def test_draining_gives_back_the_queue_and_whatever_comes_and_finishes_what_runs(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep)
    it.add(*([0.2] for _ in range(4)))
    it.until(lambda: it.workers.busy)
    it.workers.drain()
    it.add([0.2], first=4)
    assert it.returned() == [1, 2, 3, 4] and not any(rows.pace for _, rows in it.heard)
    it.until(lambda: not it.workers.busy)
    assert list(it.values()) == [0]


def test_draining_gives_back_what_a_worker_died_with(loop: Any) -> None:
    it = loop(1)
    it.declare(sleep)
    it.add(*([0] for _ in range(60)))
    it.until(lambda: len(it.answers()) == 60)
    it.add([30], *([0] for _ in range(9)), first=60)
    it.until(lambda: it.workers.busy)
    it.workers.drain()
    os.kill(it.workers.pids[0], signal.SIGKILL)
    it.until(lambda: not it.workers.busy)
    told = [number for number, *_ in it.answers()]
    assert sorted(told[60:] + it.returned()) == list(range(60, 70))


# What may not be.


def test_a_function_that_is_not_what_its_digest_says_is_refused(loop: Any) -> None:
    with pytest.raises(ProtocolError, match="altered"):
        loop().workers.keep(Rows.single(0, 0, 0, 0, [bytes(2000)], bytes(32)))


def test_a_job_without_its_function_is_refused(loop: Any) -> None:
    body = {"job": 1, "context": "c" * 32, "function": "0" * 64, "initializer": None, "options": {}}
    with pytest.raises(ProtocolError, match="not sent"):
        loop().workers.declare(body)


def test_a_forgotten_function_has_to_be_sent_again(loop: Any) -> None:
    it = loop(1)
    it.declare(double)
    it.add([1])
    it.until(it.answers)
    it.workers.end(1)
    it.workers.forget(it.keep((double, None)))
    with pytest.raises(ProtocolError, match="not sent"):
        it.workers.declare({"job": 2, "context": "c" * 32, "function": it.context and letter_digest(
            it.context.dump((double, None))).hex(), "initializer": None, "options": {}})
    it.declare(double, job=3)
    it.add([1], job=3)
    it.until(lambda: it.answers(3))
    assert it.values(3) == {0: [2]}


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


def test_a_single_slice_of_a_job_that_was_quick_waits_for_the_first_free_worker(loop: Any) -> None:
    it = loop(2)
    it.declare(time.sleep, job=1)
    it.declare(time.sleep, job=2)
    it.add(*[[0]] * 100, job=1)
    it.until(lambda: len(it.values(1)) == 100)
    it.workers._jobs[1].paces.extend([10] * PACE_SLICES)  # whatever they took here, on a busy machine
    assert it.workers._jobs[1].worth() > 1
    it.add([SECONDS], [SECONDS], job=2)
    it.until(lambda: all(len(worker.messages) == 1 for worker in it.workers._workers))
    it.add([0], job=1, first=100)
    it.turn()
    assert it.workers._jobs[1].queued == 1
