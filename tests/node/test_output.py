"""Output in a worker and a node, without processes: lines, their places, a second's share, the order of frames."""

from __future__ import annotations

import functools
import io
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from achilles.node import output as module
from achilles.node.board import CHUNK, OFFSET
from achilles.node.output import FRAME_BYTES, SHARE_BYTES, Flow, Output
from achilles.protocol.frames import MORE, Batch, Kind, joined

BATCH = Batch.pack(7, 40, [b"x"] * 3, attempt=1)
ANSWER = Batch.pack(7, 40, [b"y"], attempt=1, statuses=b"\0")


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
    """An Output, with the frames that it has written."""

    def __init__(self) -> None:
        self.status = [0] * 5
        self.frames: list[tuple[Kind, Batch]] = []
        self.output = Output(self.status, 3, lambda kind, body: self.frames.append((kind, body)))

    def at(self, chunk: int, offset: int = 0) -> None:
        self.status[CHUNK], self.status[OFFSET] = chunk, offset

    @property
    def lines(self) -> list[tuple[str, int, int]]:
        """Text, chunk and offset of each line."""
        return [(bytes(joined(body.letters()[0])).decode(), body.first, body.attempt)
                for kind, body in self.frames if kind is Kind.OUTPUT and body.flags != MORE]

    @property
    def counts(self) -> list[int]:
        return [body.attempt for kind, body in self.frames if kind is Kind.OUTPUT and body.flags == MORE]


@pytest.fixture
def worker(clock: Clock) -> Worker:
    return Worker()


@pytest.fixture
def captured(worker: Worker) -> Worker:
    """The Worker of a test that runs `inside`."""
    return worker


def inside(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test while its Worker captures: pytest has streams of its own between a fixture and its test."""
    @functools.wraps(test)
    def run(captured: Worker, **more: Any) -> None:
        with captured.output.capture(BATCH, True):
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
    assert {body.number for _, body in captured.frames} == {3} and {body.job for _, body in captured.frames} == {7}


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
    captured.output.answer(ANSWER)
    assert captured.lines[2:] == [("rest", 40, 1)]
    assert [kind for kind, _ in captured.frames][-1] is Kind.RESULT


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
    captured.output.answer(ANSWER)
    assert captured.counts == [5] and [kind for kind, _ in captured.frames][-2:] == [Kind.OUTPUT, Kind.RESULT]
    captured.output.answer(ANSWER)
    assert captured.counts == [5]
    clock.now += 1.1
    print("again")
    assert captured.lines[fits:] == [("again", 40, 0)]


def test_the_share_of_one_job_is_not_that_of_the_next(worker: Worker) -> None:
    with worker.output.capture(BATCH, True):
        print("x\n" * 5000)
    before = len(worker.lines)
    with worker.output.capture(BATCH.renumbered(8), True):
        print("mine")
    assert len(worker.lines) == before + 1 < 5000


def test_nothing_is_captured_where_nobody_wants_it_and_all_is_as_before(worker: Worker) -> None:
    before = sys.stdout, sys.stderr
    with worker.output.capture(BATCH, False):
        assert (sys.stdout, sys.stderr) == before
    with worker.output.capture(BATCH, True):
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before and worker.frames == []


def test_a_handler_of_an_earlier_batch_writes_to_the_stream_between_batches(
    worker: Worker, monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with worker.output.capture(BATCH, True):
        handler = logging.StreamHandler()
        handler.emit(logging.makeLogRecord({"msg": "inside"}))
    handler.emit(logging.makeLogRecord({"msg": "between"}))
    with worker.output.capture(BATCH, True):
        handler.emit(logging.makeLogRecord({"msg": "again"}))
    assert [text for text, *_ in worker.lines] == ["inside", "again"] and stream.getvalue() == "between\n"


def test_a_forked_child_writes_to_the_stream(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with worker.output.capture(BATCH, True):
        worker.output.abandon()
        print("child")
    assert stream.getvalue() == "child\n" and worker.frames == []


def test_a_line_that_is_printed_while_a_frame_is_written_follows_it(clock: Clock) -> None:
    """As a signal handler prints, or another thread: neither may break into a frame, nor wait for the writer."""
    worker = Worker()
    inside = False

    def write(kind: Kind, body: Batch) -> None:
        nonlocal inside
        assert not inside
        inside = True
        if not worker.frames:
            print("of a handler")
            thread = threading.Thread(target=print, args=("of a thread",))
            thread.start()
            thread.join(10)
            assert not thread.is_alive()
        inside = False
        worker.frames.append((kind, body))

    worker.output = Output(worker.status, 3, write)
    with worker.output.capture(BATCH, True):
        print("first")
        assert [text for text, *_ in worker.lines] == ["first", "of a handler", "of a thread"]


@inside
def test_threads_lose_no_line(captured: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARE_BYTES", 1 << 30)
    captured.output._flow = Flow()
    threads = [threading.Thread(target=lambda: [print(f"line {i}\n", end="") for i in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    captured.output.answer(ANSWER)
    assert len(captured.lines) == 2000


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
    [count] = flow.count(17, 3)
    assert (count.job, count.number, count.flags) == (17, 3, MORE)
    assert count.attempt == 1000 + passed.count(False) and flow.count(17, 3) == []
