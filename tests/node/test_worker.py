"""What a worker does with what its node says: the loop in a thread here, `main` in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import MaybeEncodingError
from typing import Any

import multiprocess
import pytest
from conftest import in_a_child
from multiprocess.sharedctypes import RawArray

from achilles.node import worker
from achilles.node.worker import CALL, DUMP, FUNCTION, IDLE, LOAD, PHASE, Worker
from achilles.objects.letters import Context, dump_slice, letter_digest, with_skips
from achilles.objects.outcomes import load_outcomes
from achilles.protocol.channel import Channel
from achilles.protocol.frames import MORE, Kind, Rows, Status, merge

CONTEXT = "c" * 32
LIMIT = 4096
seen: list[Any] = []  # what the functions below saw, since they run in this process
status: Any = None  # the array of the worker under test


class Node:
    """The node's end of a worker's socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.context = Context(caller=True)
        self.channel = Channel(sock, "WN")
        sock.settimeout(10)

    def keep(self, value: Any) -> str:
        parts = self.context.dump(value)
        return self.keep_letter(parts)

    def keep_letter(self, parts: Sequence[Any]) -> str:
        digest = letter_digest(parts)
        self.say(Kind.FUNCTION, Rows.single(0, 0, 0, 0, parts, digest))
        return digest.hex()

    def declare(
        self, function: Any, job: int = 1, initializer: Any = None, callback: Any = None, context: str = CONTEXT,
        **options: Any,
    ) -> None:
        first = None if initializer is None else self.keep(initializer)
        digest = function if isinstance(function, str) else self.keep((function, callback))
        body = {"job": job, "context": context, "function": digest, "initializer": first}
        self.say(Kind.JOB, body | {"resumed": False, "options": options})

    def slice(self, number: int, arguments: Sequence[Any], attempt: int = 0, skips: Sequence[int] = ()) -> Rows:
        parts = dump_slice(self.context, list(arguments))
        parts = with_skips(parts, skips) if skips else parts
        return Rows.single(1, number, attempt, 0, parts, letter_digest(parts))

    def run(self, *slices: Rows) -> list[tuple[int, int, Any, int]]:
        """Send one TASK; the answers: slice, status, letter, the frame it came in."""
        self.say(Kind.TASK, merge(slices))
        answers: list[tuple[int, int, Any, int]] = []
        frames = 0
        while sum(not answer[1] & MORE for answer in answers) < len(slices):
            got = self.channel.receive()
            assert got, "the worker ended or is silent"
            for kind, rows in got:
                assert kind is Kind.RESULT and rows.pace >= 1
                for number, state, (digest, letter) in zip(rows.slices, rows.statuses, rows.letters()):
                    assert not digest or digest == letter_digest(letter)
                    answers.append((number, state, bytearray(b"".join(letter)), frames))
                frames += 1
        return answers

    def outcomes(self, *slices: Rows) -> list[tuple[list[Any], dict[int, BaseException]]]:
        answers = self.run(*slices)
        return [load_outcomes(self.context, letter, state != Status.VALUES) for _, state, letter, _ in answers]

    def say(self, kind: Kind, body: Any) -> None:
        self.channel.send(kind, body)
        while not self.channel.flush():
            pass


@pytest.fixture
def node(monkeypatch: Any) -> Iterator[Node]:
    global status
    monkeypatch.setattr(worker, "LATE_NS", 10**12)  # however slow this machine is
    ours, theirs = socket.socketpair()
    status = RawArray("q", 3)
    seen.clear()
    with ours, theirs:
        thread = threading.Thread(target=Worker(theirs, status, LIMIT).serve, name="worker under test")
        thread.start()
        yield Node(ours)
        ours.shutdown(socket.SHUT_WR)
        thread.join(10)
        assert not thread.is_alive()


def double(x: Any) -> Any:
    return 2 * x


def raise_it(error: BaseException) -> None:
    raise error


def look(x: Any) -> Any:
    seen.append(tuple(status))
    return x


class Dumped:
    def __reduce__(self) -> Any:
        seen.append(tuple(status))
        return (int, ())


class Loaded:
    def __reduce__(self) -> Any:
        return (look, (1,))


class Target:
    pass


def remember(target: Target) -> None:
    seen.append(weakref.ref(target))
    if not seen[1:]:
        raise ValueError(target)


def large(size: int) -> bytes:
    return bytes(size)


def set_up(*values: Any) -> None:
    seen.append(values)


def fail_to_set_up() -> None:
    raise LookupError("no such thing")


def nap(seconds: float) -> None:
    threading.Event().wait(seconds)


def test_values_come_back_in_order_through_the_callback(node: Node) -> None:
    node.declare(double, callback=str)
    assert node.outcomes(node.slice(7, [1, 2]), node.slice(8, ["a"])) == [(["2", "4"], {}), (["aa"], {})]


@pytest.mark.parametrize(("call", "argument", "result"), [
    ("one", (1, 2), ((1, 2), {"c": 0})), ("star", (1, 2), (1, 2, {"c": 0})),
    ("apply", ((1,), {"c": 3}), (1, {"c": 3})), (None, 5, (5, {"c": 0})),
])
def test_the_function_is_called_as_its_job_says(node: Node, call: str | None, argument: Any, result: Any) -> None:
    node.declare(take, call=call)
    assert node.outcomes(node.slice(0, [argument])) == [([result], {})]


def take(*args: Any, c: int = 0) -> Any:
    return (*args, {"c": c})


def test_a_seed_and_an_index_give_the_same_numbers_whatever_ran_before(node: Node) -> None:
    node.declare(draw, seed=-3)
    (first, _), (second, _) = node.outcomes(node.slice(0, [(0, 1), (1, 1), (2, 9)]), node.slice(1, [(1, 1), (7, 1)]))
    assert first[1] == second[0] and len({*first, *second}) == 4
    node.declare(draw, job=1, seed=4)
    assert node.outcomes(node.slice(2, [(1, 1)])) != [([second[0]], {})]


def draw(times: int) -> float:
    return [random.random() for _ in range(times)][-1]


@pytest.mark.parametrize(
    "error", [ValueError("v"), SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration(5)]
)
def test_whatever_the_function_raises_is_an_answer_at_its_place(node: Node, error: BaseException) -> None:
    node.declare(raise_it)
    [(_, errors)] = node.outcomes(node.slice(0, [error, error]))
    assert [(p, type(e), e.args) for p, e in errors.items()] == [(p, type(error), error.args) for p in (0, 1)]
    assert "raise_it" in str(errors[0].__cause__) and "_call" not in str(errors[0].__cause__)


def test_skipped_positions_are_not_called_and_keep_their_place(node: Node) -> None:
    node.declare(look)
    [(values, errors)] = node.outcomes(node.slice(3, "abcd", skips=[0, 2]))
    assert (values, errors) == ([None, "b", None, "d"], {})
    assert [entry[:2] for entry in seen] == [(3, 1), (3, 3)]


def test_errors_after_a_skipped_position_count_it(node: Node) -> None:
    node.declare(raise_it)
    [(_, errors)] = node.outcomes(node.slice(0, [KeyError(0), KeyError(1)], skips=[0]))
    assert list(errors) == [1]


def test_an_altered_letter_is_seen_before_it_is_loaded(node: Node) -> None:
    node.declare(double)
    good, bad = node.slice(0, ["x" * 2000]), node.slice(1, ["x" * 2000, Loaded()])
    bad.digests = bytes(32)
    (_, first, _, _), (_, second, letter, _) = node.run(good, bad)
    assert (first, second, letter) == (Status.VALUES, Status.ALTERED, b"")
    assert seen == []


def test_a_function_that_cannot_be_loaded_fails_each_slice_with_its_reason(node: Node) -> None:
    node.declare(node.keep_letter([b"\0cno_such_module\nf\n."]))
    answers = node.run(node.slice(0, [1]), node.slice(1, [2]))
    assert [state for _, state, _, _ in answers] == [Status.FAILED] * 2
    for _, _, letter, _ in answers:
        error = load_outcomes(node.context, letter, True)[1][0]
        assert isinstance(error, ModuleNotFoundError) and "no_such_module" in str(error)


def test_arguments_that_cannot_be_loaded_fail_and_the_worker_goes_on(node: Node) -> None:
    node.declare(double)
    bad = Rows.single(1, 0, 0, 0, [b"\0\0\0cno_such_module\nf\n."])
    (_, state, letter, _), (_, good, _, _) = node.run(bad, node.slice(1, [2]))
    assert state == Status.FAILED and good == Status.VALUES
    assert "no_such_module" in str(load_outcomes(node.context, letter, True)[1][0])


def test_the_initializer_runs_once_a_context_before_the_function(node: Node) -> None:
    node.declare(look, initializer=(set_up, (1, 2)))
    node.outcomes(node.slice(0, [1]))
    node.declare(look, initializer=(set_up, (1, 2)))
    node.outcomes(node.slice(1, [1]))
    assert [len(entry) for entry in seen] == [2, 3, 3] and seen[0] == (1, 2)
    node.declare(look, initializer=(set_up, (1, 2)), context="d" * 32)
    node.outcomes(node.slice(2, [1]))
    assert seen[3] == (1, 2)


def test_an_initializer_that_raises_is_called_once_and_fails_each_slice(node: Node) -> None:
    node.declare(look, initializer=(fail_to_set_up, ()))
    for number in (0, 1):
        [(_, state, letter, _)] = node.run(node.slice(number, [1]))
        assert state == Status.FAILED
        assert isinstance(load_outcomes(node.context, letter, True)[1][0], LookupError)
    assert seen == []


def test_the_status_names_slice_position_and_phase(node: Node) -> None:
    node.declare(look, initializer=(look, (0,)), callback=look)
    node.outcomes(node.slice(5, [Loaded(), 2]))
    assert seen == [(5, -1, FUNCTION), (5, -1, LOAD), *[(5, 0, CALL)] * 2, *[(5, 1, CALL)] * 2]
    assert wait_until(lambda: status[2] == IDLE)


@pytest.mark.parametrize(("tiny_ns", "options", "attempt", "position"), [
    (10**9, {}, 0, -1), (10**9, {}, 1, 1), (10**9, {"timeout": 9.0}, 0, 1), (0, {}, 0, 1)])
def test_of_many_tiny_arguments_none_is_named_unless_somebody_needs_it(
    node: Node, monkeypatch: pytest.MonkeyPatch, tiny_ns: int, options: dict[str, float], attempt: int, position: int
) -> None:
    monkeypatch.setattr(worker, "TINY_NS", tiny_ns)
    node.declare(look, **options)
    node.outcomes(node.slice(5, [1, 2]))
    assert seen == [(5, 0, CALL), (5, 1, CALL)]  # of its pace nothing was known
    node.outcomes(node.slice(6, [1, 2], attempt))
    assert seen[3] == (6, position, CALL)
    node.outcomes(node.slice(7, [1]))
    assert seen[4] == (7, 0, CALL)  # there is no other one


def test_a_value_in_dumping_is_named_where_that_is_known(node: Node) -> None:
    node.declare(double_dumped)
    node.outcomes(node.slice(5, [1]))
    assert set(seen) == {(5, 0, DUMP)}
    seen.clear()
    node.outcomes(node.slice(5, [1, 2]))
    assert set(seen) == {(5, -1, DUMP)}
    seen.clear()
    node.outcomes(node.slice(5, [1, 2], attempt=1))
    assert seen[0] == (5, 0, DUMP) and (5, 1, DUMP) in seen


def double_dumped(x: Any) -> Dumped:
    return Dumped()


def test_nothing_of_a_slice_stays_alive(node: Node) -> None:
    node.declare(remember)
    gc.disable()
    try:
        for _ in range(2):  # the first call raises: tracebacks hold frames
            node.outcomes(node.slice(0, [Target()]))
        assert wait_until(lambda: [ref() for ref in seen] == [None, None])
    finally:
        gc.enable()


def test_a_result_over_the_limit_is_an_error_at_its_place(node: Node) -> None:
    node.declare(large)
    answers = node.run(node.slice(0, [10, LIMIT, 20]))
    assert [bool(state & MORE) for _, state, _, _ in answers] == [True] * (len(answers) - 1) + [False]
    values, errors = joined(node, answers)
    assert isinstance(errors[1], MaybeEncodingError) and "4096" in str(errors[1])
    assert (values[0], values[2], list(errors)) == (bytes(10), bytes(20), [1])


def test_results_over_the_limit_together_travel_in_parts(node: Node) -> None:
    node.declare(large)
    answers = node.run(node.slice(0, [1500] * 5))
    assert len(answers) > 1 and all(len(letter) <= LIMIT for _, _, letter, _ in answers)
    assert joined(node, answers) == ([bytes(1500)] * 5, {})


def test_a_death_between_parts_is_charged(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[int] = []
    flush = Worker._flush

    def look_and_flush(self: Worker, job: int) -> None:
        if self._table:
            phases.append(status[PHASE])
        flush(self, job)

    monkeypatch.setattr(Worker, "_flush", look_and_flush)
    node.declare(large)
    assert len(node.run(node.slice(0, [1500] * 5))) > 1
    assert set(phases) == {DUMP}


def joined(node: Node, answers: Sequence[Any]) -> tuple[list[Any], dict[int, BaseException]]:
    values: list[Any] = []
    errors: dict[int, BaseException] = {}
    for _, state, letter, _ in answers:
        some, failed = load_outcomes(node.context, letter, state & ~MORE != Status.VALUES)
        errors |= {len(values) + position: error for position, error in failed.items()}
        values += some
    return values, errors


def test_quick_answers_travel_together_and_slow_ones_do_not_wait(node: Node) -> None:
    node.declare(nap)
    assert node.run(*(node.slice(n, [0]) for n in range(50)))[-1][3] == 0
    assert node.run(*(node.slice(n, [0.02]) for n in range(3)))[-1][3] == 2


def test_what_is_not_begun_behind_a_slow_slice_goes_back(node: Node, monkeypatch: Any) -> None:
    node.declare(nap)
    monkeypatch.setattr(worker, "LATE_NS", 1_000_000)
    node.say(Kind.TASK, merge([node.slice(n, [seconds]) for n, seconds in enumerate([0.02, 0, 0, 5])]))
    frames: list[Any] = []
    while len(frames) < 2:
        frames += node.channel.receive() or ()
    assert [(kind, rows.slices) for kind, rows in frames] == [(Kind.RESULT, (0,)), (Kind.RETURNED, (1, 2, 3))]
    assert not any(frames[1].body.lengths)
    assert node.outcomes(node.slice(1, [0]))  # it goes on


def test_close_forget_and_end_drop_what_they_name(node: Node) -> None:
    kept = node.keep((double, None))
    node.declare(kept)
    assert node.outcomes(node.slice(0, [1])) == [([2], {})]
    node.say(Kind.END, {"job": 1})
    node.declare(kept)  # loaded still
    assert node.outcomes(node.slice(0, [1])) == [([2], {})]
    for kind, body in ((Kind.FORGET, {"function": kept}), (Kind.CLOSE, {"context": CONTEXT})):
        node.say(kind, body)
        assert node.keep((double, None)) == kept
        node.declare(kept)
        assert node.outcomes(node.slice(0, [1])) == [([2], {})]


# A real process.


def describe(_: Any) -> dict[str, Any]:
    held = ctypes.c_int()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(2, ctypes.byref(held))  # PR_GET_PDEATHSIG
    return {
        "interrupt": signal.getsignal(signal.SIGINT), "term": signal.getsignal(signal.SIGTERM),
        "wakeup": signal.set_wakeup_fd(-1), "with parent": held.value, "threads": os.environ["OMP_NUM_THREADS"],
        "main": vars(sys.modules["__main__"]).get("__file__"),
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_resets_what_the_node_set_and_closes_what_it_inherits() -> None:
    ours, theirs = socket.socketpair()
    other, far = socket.socketpair()
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    context = multiprocess.get_context("fork")
    process = context.Process(
        target=worker.main, args=(theirs, context.RawArray("q", 3), LIMIT, os.getpid(), (ours, other)), daemon=True)
    process.start()
    signal.signal(signal.SIGTERM, before)
    with ours, other, far:
        theirs.close()
        far.settimeout(10)
        node = Node(ours)
        node.declare(describe)
        [([said], _)] = node.outcomes(node.slice(0, [0]))
        other.close()
        assert far.recv(1) == b""  # no copy of its peer is open
        assert said["interrupt"] == signal.SIG_IGN and said["term"] == signal.SIG_DFL and said["wakeup"] == -1
        assert said["threads"] == os.environ.get("OMP_NUM_THREADS", "1")
        assert said["with parent"] == (signal.SIGKILL if sys.platform == "linux" else 0)
        ours.shutdown(socket.SHUT_WR)
        process.join(10)
        assert process.exitcode == 0
    process.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_worker_whose_node_is_gone_before_it_looks_ends_at_once() -> None:
    ours, theirs = socket.socketpair()
    context = multiprocess.get_context("fork")
    process = context.Process(target=worker.main, args=(theirs, context.RawArray("q", 3), LIMIT, 1), daemon=True)
    process.start()
    process.join(10)
    with ours, theirs:
        assert process.exitcode == 1
    process.close()


def wait_until(true: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        threading.Event().wait(0.005)
    return true()


def test_a_slice_is_not_slow_for_the_time_that_others_had_the_processor(monkeypatch):
    """Of 8 ms on the clock, it ran 1 ms and did not wait of itself; then it slept."""
    clock, own, waits = 0, 0, 0
    monkeypatch.setattr(worker.time, "monotonic_ns", lambda: clock)
    monkeypatch.setattr(worker._Stopwatch, "_look", lambda self: (clock, own, waits))
    watch = worker._Stopwatch()
    clock, own = clock + 20_000, own + 20_000
    assert watch.lap() == 20_000
    clock, own = clock + 8_000_000, own + 1_000_000
    assert watch.lap() == 1_000_000
    clock, own, waits = clock + 8_000_000, own + 1_000_000, waits + 1
    assert watch.lap() == 8_000_000
    clock, own = clock + 3_000_000, own + 3_000_000
    assert watch.lap() == 3_000_000


@pytest.mark.skipif(worker.RUSAGE_THREAD is None, reason="the system does not tell")
def test_sleep_is_a_slices_own_time():
    watch = worker._Stopwatch()
    time.sleep(0.01)
    assert watch.lap() >= 10_000_000


def test_a_slice_of_hours_is_answered(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pace has 32 bits: 71 minutes, in microseconds."""
    monkeypatch.setattr(worker._Stopwatch, "lap", lambda self: 5 * 3600 * 10**9)
    node.declare(double)
    assert node.outcomes(node.slice(0, [4])) == [([8], {})]


@pytest.mark.parametrize(("attempt", "skips"), [(0, ()), (1, ()), (1, (3,))])
def test_an_exception_from_a_signal_handler_moves_no_value(attempt: int, skips: tuple[int, ...]) -> None:
    """It comes between any two steps of the loop, after a value was kept and before the next argument, too."""
    def child() -> str:
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)  # a loop that never ends is ended
        armed = [False]

        def late(*_: Any) -> None:
            if armed[0]:
                armed[0] = False
                raise LookupError

        signal.signal(signal.SIGALRM, late)
        runner, hits = worker.Runner(memoryview(bytearray(24)).cast("q")), 0
        signal.setitimer(signal.ITIMER_VIRTUAL, 5)
        chosen, arguments = random.Random(1), list(range(500))
        for _ in range(4000):
            try:
                armed[0] = True
                signal.setitimer(signal.ITIMER_REAL, chosen.uniform(1e-5, 9e-5))
                values, errors = runner._call(abs, arguments, frozenset(skips), bool(attempt or skips))
                armed[0] = False
            except LookupError:  # it came before the first or behind the last
                continue
            hits += len(errors)
            wrong = [p for p, v in enumerate(values) if p not in errors and p not in skips and v != p]
            if len(values) != len(arguments) or wrong or errors.keys() & set(skips):
                return f"{len(values)} values, wrong from {wrong[:1]} on, errors {errors}"
        return "right" if hits else "never hit"

    assert in_a_child(child) == "right"
