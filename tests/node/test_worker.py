"""What a worker does with what its node says: the loop in a thread here, `main` in a process of its own."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import multiprocess
import pytest
from conftest import in_a_child
from multiprocess.sharedctypes import RawArray

from achilles.node import runner, worker
from achilles.node.board import (
    CALL,
    CHUNK,
    DUMP,
    FIRST,
    FUNCTION,
    IDLE,
    LIMIT,
    LOAD,
    MOST_ANSWERS,
    MOST_BYTES,
    NO_LIMIT,
    PHASE,
    WORDS,
    Board,
)
from achilles.node.worker import Worker
from achilles.objects.letters import Context, dump_chunk, with_skips
from achilles.objects.outcomes import load_outcomes
from achilles.protocol import frames
from achilles.protocol.channel import Channel
from achilles.protocol.frames import CAREFUL, Batch, Kind, Letter, LongLetter, Status, digest, joined

CONTEXT = "c" * 32
seen: list[Any] = []  # what the functions below saw, since they run in this process
status: Any = None  # the array of the worker under test


class Node:
    """The node's end of a worker's socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.context = Context(caller=True)
        self.channel = Channel(sock, "WN")
        self.worker: Any = None
        self.board: Any = None
        self.idle = 0  # how often the worker has said so
        sock.settimeout(10)

    def letter(self, value: Any) -> Letter:
        return letter(self.context.dump(value))

    def declare(
        self, function: Any, job: int = 1, initializer: Any = None, callback: Any = None, context: str = CONTEXT,
        again: bool = False, **options: Any,
    ) -> None:
        """JOB; with `again`, of a context whose initializer the worker has."""
        declaration = {"context": context, "initializer": initializer is not None} | options
        letters = [json.dumps(declaration).encode()]
        letters.append(function if isinstance(function, LongLetter) else self.letter((function, callback)))
        if initializer is not None and not again:
            letters.append(self.letter(initializer))
        self.say(Kind.JOB, Batch.pack(job, 0, letters))

    def chunk(self, arguments: Any, skips: Sequence[int] = ()) -> Letter:
        parts = dump_chunk(self.context, list(arguments))
        return letter(with_skips(parts, skips) if skips else parts)

    def give(self, *chunks: Letter, first: int = 0, flags: int = 0, job: int = 1) -> None:
        """One TASK; what is no letter is the arguments of a chunk."""
        status[CHUNK], status[LIMIT] = first - 1, NO_LIMIT
        letters = [each if isinstance(each, (bytes, LongLetter)) else self.chunk(each) for each in chunks]
        self.say(Kind.TASK, Batch.pack(job, first, letters, attempt=6, flags=flags))

    def results(self, count: int, first: int = 0) -> list[Batch]:
        """The RESULTs that answer so many chunks from `first` on."""
        answers: list[Batch] = []
        deadline = time.monotonic() + 10
        while sum(answer.count for answer in answers) < count:
            got = self.channel.receive()
            assert got is not None and time.monotonic() < deadline, "the worker ended or is silent"
            self.idle += sum(kind is Kind.IDLE for kind, _ in got)
            for kind, answer in got:
                if kind is Kind.IDLE:
                    continue
                assert (kind, answer.attempt) == (Kind.RESULT, 6) and answer.number >= 1
                assert answer.first == first + sum(each.count for each in answers)
                answers.append(answer)
        return answers

    def wait_idle(self, count: int) -> None:
        """Until the worker has said so often that it is idle: at its start, and after a batch that was taken back."""
        while self.idle < count:
            received = self.channel.receive()
            assert received and {kind for kind, _ in received} == {Kind.IDLE}
            self.idle += len(received)

    def run(self, *chunks: Any, first: int = 0, flags: int = 0) -> list[tuple[int, bytearray]]:
        """Status and letter of each chunk of a batch."""
        self.give(*chunks, first=first, flags=flags)
        return [
            (state, bytearray(joined(each)))
            for answer in self.results(len(chunks), first) for state, each in zip(answer.statuses, answer.letters())]

    def outcomes(self, *chunks: Any, **options: Any) -> list[tuple[list[Any], dict[int, BaseException]]]:
        answers = self.run(*chunks, **options)
        return [load_outcomes(self.context, each, state != Status.VALUES) for state, each in answers]

    def say(self, kind: Kind, body: Any) -> None:
        self.channel.send(kind, body)
        while not self.channel.flush():
            pass


def letter(parts: Sequence[Any]) -> Letter:
    length = sum(map(len, parts))
    return LongLetter(parts, digest(parts), length) if length > 1024 else b"".join(parts)


@pytest.fixture
def node() -> Iterator[Node]:
    global status
    (ours, theirs), (near, far) = socket.socketpair(), socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    shared = RawArray("q", WORDS)
    status = Board(shared).status
    seen.clear()
    with ours, theirs, near, far:
        made = Node(ours)
        made.board = Board(shared)
        made.worker = Worker(theirs, far, shared)
        thread = threading.Thread(target=made.worker.serve, name="worker under test")
        thread.start()
        yield made
        ours.shutdown(socket.SHUT_WR)
        thread.join(10)
        assert not thread.is_alive()


def double(x: Any) -> Any:
    return 2 * x


def raise_it(error: BaseException) -> None:
    raise error


def look(x: Any) -> Any:
    seen.append(tuple(status)[:3])
    return x


class Dumped:
    def __reduce__(self) -> Any:
        seen.append(tuple(status)[:3])
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


def long_name(given: tuple[int, int]) -> str:
    number, size = given
    return str(number).rjust(size)


def set_up(*values: Any) -> None:
    seen.append(values)


def fail_to_set_up() -> None:
    raise LookupError("no such thing")


def nap(seconds: float) -> None:
    threading.Event().wait(seconds)


def take(*args: Any, c: int = 0) -> Any:
    return (*args, {"c": c})


def draw(times: int) -> float:
    return [random.random() for _ in range(times)][-1]


def double_dumped(x: Any) -> Dumped:
    return Dumped()


def test_values_come_back_in_order_through_the_callback(node: Node) -> None:
    node.declare(double, callback=str)
    assert node.outcomes([1, 2], ["a"], first=7) == [(["2", "4"], {}), (["aa"], {})]


@pytest.mark.parametrize(("call", "argument", "result"), [
    ("one", (1, 2), ((1, 2), {"c": 0})), ("star", (1, 2), (1, 2, {"c": 0})),
    ("apply", ((1,), {"c": 3}), (1, {"c": 3})), (None, 5, (5, {"c": 0})),
])
def test_the_function_is_called_as_its_job_says(node: Node, call: str | None, argument: Any, result: Any) -> None:
    node.declare(take, call=call)
    assert node.outcomes([argument]) == [([result], {})]


def test_a_seed_and_an_index_give_the_same_numbers_whatever_ran_before(node: Node) -> None:
    node.declare(draw, seed="0" * 63 + "3")
    (first, _), (second, _) = node.outcomes([(0, 1), (1, 1), (2, 9)], [(1, 1), (7, 1)])
    assert first[1] == second[0] and len({*first, *second}) == 4
    random.seed(hashlib.sha256(bytes(31) + b"\3" + b"1").digest())
    assert first[1] == random.random()
    node.declare(draw, seed="0" * 63 + "4")
    assert node.outcomes([(1, 1)]) != [([second[0]], {})]


@pytest.mark.parametrize(
    "error", [ValueError("v"), SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration(5)]
)
def test_whatever_the_function_raises_is_an_answer_at_its_place(node: Node, error: BaseException) -> None:
    node.declare(raise_it)
    [(_, errors)] = node.outcomes([error, error])
    assert [(p, type(e), e.args) for p, e in errors.items()] == [(p, type(error), error.args) for p in (0, 1)]
    assert "raise_it" in str(errors[0].__cause__) and "_call" not in str(errors[0].__cause__)


def test_skipped_offsets_are_not_called_and_keep_their_place(node: Node) -> None:
    node.declare(look)
    [(values, errors)] = node.outcomes(node.chunk("abcd", skips=[0, 2]), first=3)
    assert (values, errors) == ([None, "b", None, "d"], {})
    assert [entry[:2] for entry in seen] == [(3, 1), (3, 3)]


def test_errors_after_a_skipped_offset_count_it(node: Node) -> None:
    node.declare(raise_it)
    [(_, errors)] = node.outcomes(node.chunk([KeyError(0), KeyError(1)], skips=[0]))
    assert list(errors) == [1]


def test_an_altered_letter_is_seen_before_it_is_loaded(node: Node) -> None:
    node.declare(double)
    bad = node.chunk(["x" * 2000, Loaded()])
    assert isinstance(bad, LongLetter)
    bad.digest = bytes(32)
    (first, _), (second, empty) = node.run(["x" * 2000], bad)
    assert (first, second, empty) == (Status.VALUES, Status.ALTERED, b"")
    assert seen == []


@pytest.mark.parametrize("which", ["function", "initializer", "sources"])
def test_an_altered_function_is_not_loaded(node: Node, which: str) -> None:
    bad = node.letter((Loaded(), "x" * 2000))
    assert isinstance(bad, LongLetter)
    seen.clear()  # it was dumped
    bad.digest = bytes(32)
    declaration: dict[str, Any] = {"context": CONTEXT, "initializer": which == "initializer"}
    if which == "sources":
        declaration["sources"] = "5" * 32
    place = ("function", "initializer", "sources").index(which) + 1
    letters = [json.dumps(declaration).encode(), node.letter((double, None)), b"", b""]
    letters[place] = bad
    node.say(Kind.JOB, Batch.pack(1, 0, letters[: place + 1]))
    assert node.run([1], [2]) == [(Status.ALTERED, b"")] * 2
    assert seen == []


def test_a_function_that_cannot_be_loaded_fails_each_chunk_with_its_reason(node: Node) -> None:
    node.declare(b"", job=2)
    node.say(Kind.JOB, Batch.pack(1, 0, [
        json.dumps({"context": CONTEXT, "initializer": False}).encode(), b"\x80\5cno_such_module\nf\n."]))
    answers = node.run([1], [2]) + node.run([3], first=2)
    assert [state for state, _ in answers] == [Status.FAILED] * 3
    for _, each in answers:
        error = load_outcomes(node.context, each, True)[1][0]
        assert isinstance(error, ModuleNotFoundError) and "no_such_module" in str(error)


def test_arguments_that_cannot_be_loaded_fail_and_the_worker_goes_on(node: Node) -> None:
    node.declare(double)
    (state, each), (good, _) = node.run(b"\x80\5cno_such_module\nf\n.", [2])
    assert state == Status.FAILED and good == Status.VALUES
    assert "no_such_module" in str(load_outcomes(node.context, each, True)[1][0])


def test_the_initializer_runs_once_a_context_before_the_function(node: Node) -> None:
    node.declare(look, initializer=(set_up, (1, 2)))
    node.outcomes([1])
    node.declare(look, job=2, initializer=(set_up, (1, 2)), again=True)
    node.give([1], job=2)
    node.results(1)
    assert [len(entry) for entry in seen] == [2, 3, 3] and seen[0] == (1, 2)
    node.declare(look, initializer=(set_up, (1, 2)), context="d" * 32)
    node.outcomes([1])
    assert seen[3] == (1, 2)


def test_an_initializer_that_raises_is_called_once_and_fails_each_chunk(node: Node) -> None:
    node.declare(look, initializer=(fail_to_set_up, ()))
    for number in (0, 1):
        [(state, each)] = node.run([1], first=number)
        assert state == Status.FAILED
        assert isinstance(load_outcomes(node.context, each, True)[1][0], LookupError)
    assert seen == []


def test_the_status_names_chunk_offset_and_phase(node: Node) -> None:
    node.declare(look, initializer=(look, (0,)), callback=look)
    node.outcomes([Loaded(), 2], [3], first=5, flags=CAREFUL)
    function, load, *calls = seen
    assert (function[0], function[2], load[0], load[2]) == (5, FUNCTION, 5, LOAD)
    assert calls == [*[(5, 0, CALL)] * 2, *[(5, 1, CALL)] * 2, *[(6, 0, CALL)] * 2]
    assert status[PHASE] == IDLE and status[CHUNK] == 6


@pytest.mark.parametrize(("options", "flags", "offset"), [({}, 0, -1), ({}, CAREFUL, 1), ({"timeout": 9.0}, 0, 1)])
def test_of_many_arguments_none_is_named_unless_somebody_needs_it(
    node: Node, options: dict[str, float], flags: int, offset: int
) -> None:
    node.declare(look, **options)
    node.outcomes([1, 2], first=5, flags=flags)
    assert seen[1] == (5, offset, CALL)
    node.outcomes([1], first=7)
    assert seen[2] == (7, 0, CALL)  # there is no other one


def test_a_value_in_dumping_is_named_where_that_is_known(node: Node) -> None:
    node.declare(double_dumped)
    node.outcomes([1], first=5)
    assert set(seen) == {(5, 0, DUMP)}
    seen.clear()
    node.outcomes([1, 2], first=5)
    assert set(seen) == {(5, -1, DUMP)}
    seen.clear()
    node.outcomes([1, 2], first=5, flags=CAREFUL)
    assert seen[0] == (5, 0, DUMP) and (5, 1, DUMP) in seen


def test_nothing_of_a_chunk_stays_alive(node: Node) -> None:
    node.declare(remember)
    gc.disable()
    try:
        for _ in range(2):  # the first call raises: tracebacks hold frames
            node.outcomes([Target()])
        assert wait_until(lambda: [ref() for ref in seen] == [None, None])
    finally:
        gc.enable()


def test_quick_answers_travel_together_and_slow_ones_do_not_wait(node: Node) -> None:
    node.declare(nap)
    node.give(*[[0]] * 50)
    assert len(node.results(50)) < 10
    node.give(*[[0.02]] * 3)
    assert [answer.count for answer in node.results(3)] == [1, 1, 1]


def test_a_frame_holds_no_more_letters_than_it_may(node: Node) -> None:
    node.declare(large)
    node.give(*[[900]] * 3000, [3_000_000], [3_000_000], [3_000_000], *[[900]] * 3)
    answers = node.results(3006)
    assert max(sum(answer.lengths) - sum(map(len, answer.longs)) for answer in answers) <= frames.MAX_SHORT_BYTES
    assert max(sum(map(len, answer.longs)) for answer in answers) <= frames.MAX_LONG_BYTES


def test_what_is_done_lies_on_the_board_while_a_chunk_lasts(node: Node) -> None:
    node.declare(nap)
    node.outcomes([0])  # the function is loaded
    node.give([0], [0], [0.5], [0], first=1)
    assert wait_until(lambda: status[CHUNK] == 3)
    answer = node.board.answers(Batch(1, 1, 4, 6), status[CHUNK] - status[FIRST], 7)
    assert (answer.job, answer.first, answer.count, answer.attempt, answer.number) == (1, 1, 2, 6, 7)
    assert [load_outcomes(node.context, bytearray(each), False)[0] for each in answer.letters()] == [[None]] * 2
    answers = node.results(4, first=1)
    assert [answer.count for answer in answers] == [3, 1] and answers[0].number > 300_000
    assert answers[0].letters()[:2] == answer.letters() and wait_until(lambda: status[FIRST] == 5)


@pytest.mark.parametrize(("count", "size"), [
    (3 * MOST_ANSWERS, 0), (3 * MOST_BYTES // 900, 900), (300, 5_000), (5, 250_000)])
def test_more_answers_than_the_board_holds_come_in_order(
    node: Node, monkeypatch: pytest.MonkeyPatch, count: int, size: int
) -> None:
    monkeypatch.setattr(worker, "FLUSH_NS", 10**12)
    node.declare(long_name)
    arguments = [(number, size) for number in range(count)]
    found = node.outcomes(*[[each] for each in arguments])
    assert [values for values, _ in found] == [[long_name(each)] for each in arguments]


def test_no_chunk_begins_at_the_limit_or_behind_it(node: Node) -> None:
    node.declare(nap)
    node.give([0.3], [0], [0])
    assert wait_until(lambda: status[CHUNK] == 0)
    status[LIMIT] = 1
    [answer] = node.results(1)
    node.wait_idle(2)
    assert status[CHUNK] == 1 and status[PHASE] == IDLE
    assert len(node.outcomes([0], [0], first=1)) == 2  # it goes on with the next batch


def test_a_batch_that_is_taken_back_whole_is_not_begun(node: Node) -> None:
    node.declare(look, initializer=(look, (0,)))
    letters = [node.chunk([1])]
    status[CHUNK], status[LIMIT] = -1, 0
    node.say(Kind.TASK, Batch.pack(1, 0, letters))
    node.wait_idle(2)
    assert status[CHUNK] == 0 and status[PHASE] == IDLE
    assert seen == []


def test_a_function_may_return_a_buffer_that_it_uses_again(node: Node) -> None:
    numpy = pytest.importorskip("numpy")
    buffer = numpy.zeros(50_000)

    def fill(x: int) -> Any:
        buffer[:] = x
        return buffer

    node.declare(abs)
    node.outcomes([1])
    node.worker.runner.jobs[1].function = fill  # it holds its buffer, whatever a letter would copy
    for arrays in ([[n] for n in range(20)], [[n] for n in range(3)]):
        assert [values[0][0] for values, _ in node.outcomes(*arrays)] == [float(n) for n in range(len(arrays))]


def test_close_and_end_drop_what_they_name(node: Node) -> None:
    node.declare(double)
    assert node.outcomes([1]) == [([2], {})]
    for _ in range(2):  # the second is ignored
        node.say(Kind.END, Batch(1))
    node.declare(double, job=2)
    for _ in range(2):
        node.say(Kind.CLOSE, {"context": CONTEXT})
    node.declare(double)
    assert node.outcomes([1]) == [([2], {})]
    assert list(node.worker.runner.jobs) == [2, 1] and list(node.worker.runner.contexts) == [CONTEXT]


# A real process.


def describe(_: Any) -> dict[str, Any]:
    return {
        "interrupt": signal.getsignal(signal.SIGINT), "term": signal.getsignal(signal.SIGTERM),
        "wakeup": signal.set_wakeup_fd(-1), "group": os.getpgid(0) == os.getsid(0) == os.getpid(),
        "number": os.environ["ACHILLES_WORKER"], "threads": os.environ["OMP_NUM_THREADS"],
        "main": vars(sys.modules["__main__"]).get("__file__"), "alone": threading.active_count() == 1,
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_resets_what_the_node_set_and_closes_what_it_inherits() -> None:
    global status
    ours, theirs = socket.socketpair()
    lines, theirs_of_lines = socket.socketpair()
    other, far = socket.socketpair()
    life, held = multiprocess.Pipe(duplex=False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    context = multiprocess.get_context("fork")
    shared = context.RawArray("q", WORDS)
    status = Board(shared).status
    process = context.Process(
        target=worker.main, args=(theirs, theirs_of_lines, shared, life, 5, (ours, lines, other, held)), daemon=True)
    process.start()
    signal.signal(signal.SIGTERM, before)
    with ours, lines, other, far, held:
        theirs.close()
        theirs_of_lines.close()
        life.close()
        far.settimeout(10)
        node = Node(ours)
        node.declare(describe)
        [([said], _)] = node.outcomes([0])
        other.close()
        assert far.recv(1) == b""  # no copy of its peer is open
        assert said["interrupt"] == signal.SIG_IGN and said["term"] == signal.SIG_DFL and said["wakeup"] == -1
        assert said["threads"] == os.environ.get("OMP_NUM_THREADS", "1")
        assert said["group"] and said["number"] == "5"
        assert said["alone"] == (sys.platform == "linux")  # so a function may fork without a warning
        ours.shutdown(socket.SHUT_WR)
        process.join(10)
        assert process.exitcode == 0
    process.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_worker_whose_node_is_gone_before_it_looks_ends_at_once() -> None:
    (ours, theirs), (lines, far) = socket.socketpair(), socket.socketpair()
    context = multiprocess.get_context("fork")
    life, held = context.Pipe(duplex=False)
    process = context.Process(
        target=worker.main, args=(theirs, far, context.RawArray("q", WORDS), life, 0), daemon=True)
    ours.close()
    held.close()
    process.start()
    process.join(10)
    with theirs, lines, far, life:
        assert process.exitcode == 0
    process.close()


def wait_until(true: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        threading.Event().wait(0.005)
    return true()


@pytest.mark.parametrize(("named", "skips"), [(False, ()), (True, ()), (False, (3,))])
def test_an_exception_from_a_signal_handler_moves_no_value(named: bool, skips: tuple[int, ...]) -> None:
    """It comes between any two steps of the loop, after a value was kept and before the next argument, too."""
    def child() -> str:
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)  # a loop that never ends is ended
        armed = [False]

        def late(*_: Any) -> None:
            if armed[0]:
                armed[0] = False
                raise LookupError

        signal.signal(signal.SIGALRM, late)
        tested, hits = runner.Runner(memoryview(bytearray(32)).cast("q")), 0
        signal.setitimer(signal.ITIMER_VIRTUAL, 5)
        chosen, arguments = random.Random(1), list(range(500))
        for _ in range(4000):
            try:
                armed[0] = True
                signal.setitimer(signal.ITIMER_REAL, chosen.uniform(1e-5, 9e-5))
                values, errors = tested._call(abs, arguments, frozenset(skips), named or bool(skips))
                armed[0] = False
            except LookupError:  # it came before the first or behind the last
                continue
            hits += len(errors)
            wrong = [p for p, v in enumerate(values) if p not in errors and p not in skips and v != p]
            if len(values) != len(arguments) or wrong or errors.keys() & set(skips):
                return f"{len(values)} values, wrong from {wrong[:1]} on, errors {errors}"
        return "right" if hits else "never hit"

    assert in_a_child(child) == "right"
