"""Output in a worker and a node, without processes: lines, their places, a second's share, the order of frames."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import before_each_step, wait_until

from achilles.node import output as module
from achilles.node.board import CHUNK, OFFSET
from achilles.node.output import FRAME_BYTES, SHARE_BYTES, Flow, Output
from achilles.protocol.channel import Channel
from achilles.protocol.frames import MORE, Batch, Kind, joined

BATCH = Batch.pack(7, 40, [b"x"] * 3, attempt=1)


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Worker:
    """An Output, with the frames that its node gets."""

    def __init__(self) -> None:
        self.status = [0] * 5
        self.node, self.sock = socket.socketpair()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.node.setblocking(False)
        self._channel = Channel(self.node, "WN")
        self._frames: list[Batch] = []
        self.output = Output(self.status, 3, self.sock)

    @property
    def frames(self) -> list[Batch]:
        with contextlib.suppress(BlockingIOError):
            while self.node.recv(1, socket.MSG_PEEK):
                for kind, body in self._channel.receive() or ():
                    assert kind is Kind.OUTPUT
                    self._frames.append(body)
        return self._frames

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """As the worker does while it runs BATCH."""
        streams = sys.stdout, sys.stderr
        self.output.install()
        self.output.begin(BATCH)
        try:
            yield
        finally:
            self.output.batch = None
            sys.stdout, sys.stderr = streams

    def at(self, chunk: int, offset: int = 0) -> None:
        self.status[CHUNK], self.status[OFFSET] = chunk, offset

    @property
    def lines(self) -> list[tuple[str, int, int]]:
        """Text, chunk and offset of each line."""
        return [(bytes(joined(body.letters()[0])).decode(), body.first, body.attempt)
                for body in self.frames if body.flags != MORE]

    @property
    def counts(self) -> list[int]:
        return [body.attempt for body in self.frames if body.flags == MORE]


@pytest.fixture
def worker(clock: Clock) -> Iterator[Worker]:
    made = Worker()
    with made.node, made.sock:
        yield made


@pytest.fixture
def captured(worker: Worker) -> Worker:
    """The Worker of a test that runs `inside`."""
    return worker


def inside(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test while its Worker captures: pytest has streams of its own between a fixture and its test."""
    @functools.wraps(test)
    def run(captured: Worker, **more: Any) -> None:
        with captured.capturing():
            captured.at(40)
            test(captured=captured, **more)
    return run


@inside
def test_each_line_leaves_when_it_ends_with_its_chunk_and_offset(captured: Worker) -> None:
    print("one\ntwo")
    assert captured.lines == [("one", 40, 0), ("two", 40, 0)]
    captured.at(41, 5)
    print("three", file=sys.stderr)
    assert captured.lines[2:] == [("three", 41, 5)]
    assert {(body.number, body.job) for body in captured.frames} == {(3, 7)}


@inside
def test_an_empty_line_is_one(captured: Worker) -> None:
    print()
    assert captured.lines == [("", 40, 0)]


@inside
def test_a_line_that_has_not_ended_goes_before_the_answer_and_before_what_the_next_argument_prints(
    captured: Worker,
) -> None:
    print("half", end="")
    captured.at(40, 1)
    print("whole")
    assert captured.lines == [("half", 40, 0), ("whole", 40, 1)]
    print("rest", end="")
    captured.output.end_lines()  # the worker, when the function is done
    assert captured.lines[2:] == [("rest", 40, 1)]


@inside
def test_a_line_without_an_end_is_cut(captured: Worker) -> None:
    for _ in range(30):
        print("x" * 1000, end="")
    assert sum(len(text) for text, *_ in captured.lines) > 10_000


@pytest.mark.parametrize("text", ["ä" * 2000, "x" * 1025, "\U0001f600" * 700, "a" + "€" * 1000])
@inside
def test_a_long_line_goes_in_pieces_of_whole_characters(captured: Worker, text: str) -> None:
    print(text)
    pieces = [piece for piece, *_ in captured.lines]
    assert "".join(pieces) == text and len(pieces) > 1
    assert max(len(piece.encode()) for piece in pieces) <= 1024


@inside
def test_what_utf_8_does_not_have_is_replaced(captured: Worker) -> None:
    print("a\ud800b")
    assert captured.lines == [("a?b", 40, 0)]


@inside
def test_a_line_costs_its_text_and_a_frame_and_the_rest_of_a_second_is_counted(captured: Worker, clock: Clock) -> None:
    fits = SHARE_BYTES // (FRAME_BYTES + 100)
    for _ in range(fits + 5):
        print("x" * 100)
    assert len(captured.lines) == fits and captured.counts == []
    captured.output.count()
    assert captured.counts == [5]
    captured.output.count()
    assert captured.counts == [5]
    clock.now += 1.1
    print("again")
    assert captured.lines[fits:] == [("again", 40, 0)]


def test_the_share_of_one_job_is_not_that_of_the_next(worker: Worker) -> None:
    with worker.capturing():
        print("x\n" * 5000)
        before = len(worker.lines)
        worker.output.begin(BATCH.renumbered(8))
        print("mine")
    assert len(worker.lines) == before + 1 < 5000


def test_nothing_is_captured_beside_a_batch_with_output(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with worker.capturing():
        worker.output.batch = None
        print("plain", end="", flush=True)
        assert sys.stdout.getvalue() == "plain"
    assert sys.stdout is stream and worker.frames == []


def test_a_handler_that_was_there_before_writes_to_both(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `logging` does that an initializer has set up."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with worker.capturing():
        worker.output.batch = None
        handler = logging.StreamHandler()
        handler.emit(logging.makeLogRecord({"msg": "before"}))
        worker.output.begin(BATCH)
        handler.emit(logging.makeLogRecord({"msg": "inside"}))
        worker.output.batch = None
        handler.emit(logging.makeLogRecord({"msg": "behind"}))
    assert [text for text, *_ in worker.lines] == ["inside"] and stream.getvalue() == "before\nbehind\n"


def test_streams_that_were_closed_are_captured_too(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with worker.capturing():
        print("captured", flush=True)
        worker.output.batch = None
        print("lost", flush=True)
        sys.stdout._stream.close()  # type: ignore[union-attr]
    assert [text for text, *_ in worker.lines] == ["captured"]


@inside
def test_of_a_line_that_was_written_over_the_last_state_comes(captured: Worker) -> None:
    """As progress bars write, and terminals show."""
    print("10 %\r50 %\r100 %")
    print("a line of Windows", end="\r\n")
    assert [text for text, *_ in captured.lines] == ["100 %", "a line of Windows"]


@inside
def test_a_very_long_line_costs_no_more_than_its_share(captured: Worker) -> None:
    began = time.thread_time()
    print("y" * (16 << 20))
    assert time.thread_time() - began < 2
    assert 10 < len(captured.lines) < 100


INTERRUPTED = """
import os, signal, socket, sys, threading, time
from achilles.node import output as module
from achilles.node.output import Output
from achilles.protocol.channel import Channel
from achilles.protocol.frames import Batch

class Late(Exception):
    pass

def raise_late(*_):
    if armed:
        armed.clear()
        print("of a handler")
        raise Late

def read():
    while (received := channel.receive()) is not None:
        frames.extend(received)

armed, frames = [], []
module.SHARE_BYTES = 1 << 40
node, worker = socket.socketpair()
channel = Channel(node, "WN")
reader = threading.Thread(target=read)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGVTALRM})
reader.start()
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGVTALRM})
output = Output([0] * 5, 3, worker)
output.install()
output.begin(Batch.pack(7, 40, [b"x"], attempt=1))
signal.signal(signal.SIGVTALRM, raise_late)
signal.setitimer(signal.ITIMER_VIRTUAL, 0.0005, 0.0005)
deadline, late = time.monotonic() + 2, 0
while time.monotonic() < deadline:
    try:
        armed.append(True)
        for number in range(10):
            print("line\\n" * 50)
            print("x" * 5000)
    except Late:
        late += 1
    armed.clear()
signal.setitimer(signal.ITIMER_VIRTUAL, 0)
print("last")
worker.close()
reader.join(20)
lines = [bytes(frame.body.letters()[0]) for frame in frames]
assert late > 20 and lines[-1] == b"last" and {line[:4] for line in lines} >= {b"line", b"xxxx", b"of a"}
os.write(1, b"well")
"""


def test_a_handler_that_prints_and_raises_leaves_no_lock_and_no_half_frame() -> None:
    """A timer that interrupts a printing function, as time limits of users do."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60)
    assert done.stdout == "well", done.stderr


def test_a_thread_that_prints_beside_the_batches_disturbs_nobody(
    worker: Worker, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(module, "SHARE_BYTES", 1 << 30)
    errors: list[BaseException] = []
    over = threading.Event()

    def talk() -> None:
        try:
            while not over.is_set():
                print("x")
        except BaseException as error:
            errors.append(error)

    with worker.capturing():
        thread = threading.Thread(target=talk)
        thread.start()
        for number in range(2000):
            worker.status[CHUNK] = -1  # as the node leaves it
            worker.output.begin(Batch.pack(number, 5, [b"x"]))
            worker.output.count()
            worker.output.batch = None
            worker.frames  # noqa: B018  the node reads
        over.set()
        wait_until(lambda: worker.frames and not thread.is_alive(), "the end of the thread")
    assert errors == [] and all(chunk >= 5 for _, chunk, _ in worker.lines)


def test_a_forked_child_writes_to_the_stream(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with worker.capturing():
        worker.output.batch = None
        print("child")
    assert stream.getvalue() == "child\n" and worker.frames == []


@inside
def test_threads_lose_no_line(captured: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARE_BYTES", 1 << 30)
    captured.output._flow = Flow()
    threads = [threading.Thread(target=lambda: [print(f"line {i}\n", end="") for i in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(captured.lines) == 400


@contextlib.contextmanager
def meanwhile(function: Callable[..., Any], step: int, do: Callable[[], object]) -> Iterator[None]:
    """Before so many instructions of a function, another thread does this. It may have to wait for the function."""
    other = threading.Thread(target=do)

    def begin(count: int) -> None:
        if count == step:
            other.start()
            other.join(0.02)

    with before_each_step(lambda frame: frame.f_code is function.__code__, begin):
        yield
    if other.ident is not None:
        other.join(20)


def test_a_function_ends_while_a_thread_of_it_prints(worker: Worker) -> None:
    """No part of the thread's line goes twice."""
    with worker.capturing():
        worker.at(40)
        for step in range(60):
            seen = len(worker.lines)
            print("half", end="")
            with meanwhile(module.Tap.write, step, worker.output.end_lines):
                print(" a line", end="")
            worker.output.end_lines()
            assert "".join(text for text, *_ in worker.lines[seen:]) == "half a line", step


def test_lines_are_counted_while_a_thread_of_the_function_prints(
    worker: Worker, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SHARE_BYTES", 0)
    with worker.capturing():
        worker.at(40)
        for step in range(80):
            seen = sum(worker.counts)
            print("left out")
            with meanwhile(Flow.admits, step, worker.output.count):
                print("left out")
            worker.output.count()
            assert sum(worker.counts) - seen == 2, step


@inside
def test_the_stream_in_the_place_of_stdout_has_what_stdout_has(captured: Worker) -> None:
    sys.stdout.flush()
    assert sys.stdout.writable() and sys.stdout.encoding
    sys.stdout.writelines(["a\n", "b\n"])
    assert [text for text, *_ in captured.lines] == ["a", "b"]


def test_a_node_adds_the_counts_of_its_workers_to_its_own(clock: Clock) -> None:
    flow = Flow()

    def line(**more: Any) -> Batch:
        return Batch.pack(7, 40, [b"x" * 1000], number=3, **more)

    passed = [flow.admits(line()) for _ in range(100)]
    assert 0 < passed.count(True) < 100
    assert not flow.admits(Batch.pack(7, 0, [b""], attempt=1000, number=3, flags=MORE))
    (count,) = flow.count(17, 3)
    assert (count.job, count.number, count.flags) == (17, 3, MORE)
    assert count.attempt == 1000 + passed.count(False) and [*flow.count(17, 3)] == []
