"""Progress: the line as it is drawn, and a function that is called, in the calls and in each mapping method of Pool."""

from __future__ import annotations

import io
import itertools
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from fakes import address

import achilles
from achilles import progress as module
from achilles.controller.connection import tell
from achilles.progress import Progress, length_of, time_of

pytestmark = pytest.mark.usefixtures("no_leftovers", "unconfigured")
CALLS = [achilles.map, achilles.imap, achilles.imap_unordered]
METHODS = {
    "map": lambda pool, args, **options: pool.map(double, args, **options),
    "starmap": lambda pool, args, **options: pool.starmap(double, [(x,) for x in args], **options),
    "map_async": lambda pool, args, **options: pool.map_async(double, args, **options).get(20),
    "starmap_async": lambda pool, args, **options: pool.starmap_async(double, [(x,) for x in args], **options).get(20),
    "imap": lambda pool, args, **options: list(pool.imap(double, args, **options)),
    "imap_unordered": lambda pool, args, **options: sorted(pool.imap_unordered(double, args, **options)),
}


def double(x):
    return 2 * x


@pytest.fixture
def executor():
    with ThreadPoolExecutor(3) as made:
        yield made


@pytest.fixture
def pool(executor):
    with achilles.Pool(executor=executor) as made:
        yield made


# The line.


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


class Drawn:
    """A Progress with a clock of its own, and what it writes."""

    def __init__(self, monkeypatch, total=5000, terminal=True, workers=16):
        self.now, self.stream = 1000.0, Stream(terminal)
        monkeypatch.setattr(sys, "stderr", self.stream)
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        self.link = SimpleNamespace(workers=workers, processes=1 << 32)
        self.progress = Progress(True, total, self.link)

    def after(self, seconds, count):
        """So many results come after this time; what is written then."""
        self.now += seconds
        before = len(self.stream.getvalue())
        self.progress.taken(0, [None] * count, {})
        return self.stream.getvalue()[before:]

    def end(self, seconds=0.0):
        self.now += seconds
        before = len(self.stream.getvalue())
        self.progress.close()
        return self.stream.getvalue()[before:]


def test_the_line_on_a_terminal(monkeypatch):
    drawn = Drawn(monkeypatch)
    assert drawn.after(4, 1204) == "1,204 of 5,000 · 16 workers · 301/s · 13 s left\r"
    assert drawn.after(0.2, 1) == "", "four a second at most"
    assert drawn.after(0.05, 1) == "1,206 of 5,000 · 16 workers · 284/s · 13 s left\r"
    drawn.link.workers = 1
    assert drawn.after(1, 3794) == "5,000 of 5,000 · 1 worker · 952/s · 0 s left   \r", "what was longer is covered"
    assert drawn.end() == "5,000 of 5,000 · 1 worker · 952/s · in 5 s  \n"
    assert drawn.end() == "", "once"


def test_other_lines_of_the_package_cover_the_line_on_a_terminal(monkeypatch):
    drawn = Drawn(monkeypatch)
    line = drawn.after(4, 1204).rstrip("\r")
    tell("node 1: text")
    assert drawn.stream.getvalue().endswith("\r" + "node 1: text".ljust(79) + "\n") and len(line) < 79
    drawn = Drawn(monkeypatch, terminal=False)
    tell("node 1: text")
    assert drawn.stream.getvalue() == "node 1: text\n"


def test_four_lines_a_second_at_most(monkeypatch):
    drawn = Drawn(monkeypatch)
    assert sum(bool(drawn.after(0.01, 1)) for _ in range(1000)) <= 41


def test_elsewhere_a_line_comes_after_ten_seconds_and_then_ever_more_rarely(monkeypatch):
    drawn = Drawn(monkeypatch, total=None, terminal=False)
    assert [drawn.after(1, 50) for _ in range(9)] == [""] * 9
    assert drawn.after(1, 50) == "500 · 16 workers · 50/s\n"
    lines = [line for _ in range(7 * 24 * 60) if (line := drawn.after(60, 3000))]
    assert 50 < len(lines) < 100, "a week"
    assert drawn.end() == "30,240,500 · 16 workers · 50/s · in 168.0 h\n"


def test_a_short_call_elsewhere_has_one_line(monkeypatch):
    drawn = Drawn(monkeypatch, total=3, terminal=False, workers=1)
    assert drawn.after(0.5, 3) == ""
    assert drawn.end(0.5) == "3 of 3 · 1 worker · 3/s · in 1 s\n"


def test_the_rate_follows_the_work(monkeypatch):
    """Results from a journal come at once, and then each takes its time."""
    drawn = Drawn(monkeypatch, total=20_000)
    assert "10,000/s" in drawn.after(1, 10_000)
    for _ in range(module.LINES_KEPT):
        line = drawn.after(1, 2)
    assert "2/s · 82.3 min left" in line


def test_slow_work_has_a_rate_of_two_digits(monkeypatch):
    drawn = Drawn(monkeypatch, total=3)
    assert drawn.after(100, 1) == "1 of 3 · 16 workers · 0.01/s · 3.3 min left\r"


def test_no_more_workers_than_may_work(monkeypatch):
    drawn = Drawn(monkeypatch, total=3)
    drawn.link.processes = 4
    assert "4 workers" in drawn.end()


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "0 s"), (119.4, "119 s"), (120, "2.0 min"), (7199, "120.0 min"), (7200, "2.0 h"), (1e6, "277.8 h")])
def test_times_for_people(seconds, text):
    assert time_of(seconds) == text


class Sized:
    def __len__(self):
        return 7

    def __iter__(self):
        return iter(range(7))


@pytest.mark.parametrize(("args", "lists", "length"), [
    ([1, 2], True, 2), (range(9), True, 9), ((), True, 0), ([[1, 2], [], [3]], True, 3), ([[1, 2], [], [3]], False, 3),
    ([[1, 2, 3]], False, 1), ([[1, 2, 3]], True, 3), (([1, 2], [3]), True, 3),
    (deque([[1, 2]]), True, None), ({1: [2, 3]}.values(), True, None), ({1: 2}, True, 1),
    (Sized(), True, 7), (iter([1, 2, 3]), True, 3),
    ((x for x in [1]), True, None), (itertools.count(), True, None), (lambda: [1], True, None)])
def test_how_long_the_input_is(args, lists, length):
    assert length_of(args, lists) == length


@pytest.mark.parametrize("stream", [None, SimpleNamespace(isatty=lambda: True), io.StringIO()])
def test_a_stderr_that_is_none_is_no_error(monkeypatch, stream):
    if isinstance(stream, io.StringIO):
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    Progress(True, 3, SimpleNamespace(workers=1, processes=1)).close()


class Broken(Stream):
    """As an object that somebody has put in the place of stderr."""

    def write(self, text):
        raise RuntimeError("nobody reads this any more")


def test_a_stderr_that_is_broken_ends_no_call(monkeypatch, pool):
    monkeypatch.setattr(sys, "stderr", Broken(True))
    tell("a line")
    assert pool.map_async(double, range(3), progress=True).get(20) == [0, 2, 4]


def test_a_length_that_was_too_short_is_none(executor):
    seen = []
    list(CALLS[0](double, iter([[1, 2], [3]]), executor=executor, progress=lambda *counts: seen.append(counts)))
    assert seen[-1] == (3, None)


# The calls.


@pytest.mark.parametrize("call", CALLS)
def test_a_function_is_called_in_the_thread_that_takes_with_what_is_done(executor, call):
    seen = []

    def show(done, total):
        seen.append((done, total, threading.current_thread()))

    list(call(double, range(100), chunksize=7, executor=executor, progress=show))
    assert [*dict.fromkeys(each[1:] for each in seen)] == [(100, threading.current_thread())]
    done = [each[0] for each in seen]
    assert done == sorted(set(done)) and done[-1] == 100


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("args", "last"), [
    ([[1, 2], [3], []], (3, 3)), (lambda: iter(range(5)), (5, None)), ((x for x in range(0)), None), ([], None)])
def test_of_other_inputs(executor, call, args, last):
    seen = []
    if last is None and call is not CALLS[0]:
        args = []  # a generator is used up
    list(call(double, args, executor=executor, progress=lambda *counts: seen.append(counts)))
    assert (seen or [None])[-1] == last


@pytest.mark.parametrize("call", CALLS)
def test_true_writes_one_last_line(executor, call, capfd):
    list(call(double, range(1000), executor=executor, progress=True))
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("1,000 of 1,000 · 3 workers · ")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("nothing", [None, False])
def test_none_and_false_write_nothing_and_load_nothing(executor, call, nothing, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "achilles.progress", None)  # an import would fail
    monkeypatch.setitem(sys.modules, "achilles.journal", None)
    list(call(double, range(10), executor=executor, progress=nothing))
    assert capfd.readouterr() == ("", "")


def fail_at_five(x):
    if x == 5:
        raise ValueError("five")


def test_errors_count_and_a_call_that_fails_ends_its_line(executor, capfd):
    seen = []
    options = {"executor": executor, "callback_error": repr, "progress": lambda *counts: seen.append(counts)}
    achilles.map(fail_at_five, range(9), **options)
    assert seen[-1] == (9, 9)
    with pytest.raises(ValueError, match="five"):
        list(achilles.imap(fail_at_five, itertools.count, executor=executor, progress=True))
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("call", CALLS)
def test_what_the_function_raises_the_call_raises_and_ends(executor, call):
    def raising(done, total):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(call(double, itertools.count if call is not CALLS[0] else range(99), executor=executor, progress=raising))


def test_of_the_window(executor):
    """Progress is what was taken, not what is done somewhere."""
    seen = []
    with achilles.imap(double, range(50), executor=executor, progress=lambda *counts: seen.append(counts)) as packets:
        taken = sum(len(next(packets)["RESULT"]) for _ in range(3))
        assert seen[-1] == (taken, 50)


BAD = [1, "yes", 0.5, [print]]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", BAD)
def test_what_will_not_do_is_refused_before_anything_is_connected(call, value):
    with pytest.raises(TypeError, match="progress must be True, a function or None, not"):
        call(double, [1], progress=value, **address(1))


# Pool.


@pytest.mark.parametrize("method", METHODS)
def test_each_mapping_method_of_pool(pool, method):
    seen = []
    found = METHODS[method](pool, range(100), chunksize=9, progress=lambda *counts: seen.append(counts))
    assert found == [2 * x for x in range(100)]
    done = [each[0] for each in seen]
    assert {total for _, total in seen} == {100} and done == sorted(set(done)) and done[-1] == 100


@pytest.mark.parametrize("method", METHODS)
def test_true_writes_a_last_line_in_pool(pool, method, capfd):
    METHODS[method](pool, range(100), progress=True)
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and err.startswith("100 of 100 · 3 workers · ")


@pytest.mark.parametrize("method", METHODS)
def test_what_the_function_raises_a_method_raises_and_the_pool_goes_on(pool, method):
    def raising(done, total):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        METHODS[method](pool, range(100), progress=raising)
    assert pool.map(double, [1, 2]) == [2, 4]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", BAD)
def test_bad_values_in_pool(pool, method, value):
    with pytest.raises(TypeError, match="progress must be True, a function or None, not"):
        METHODS[method](pool, [1], progress=value)


@pytest.mark.parametrize(("args", "total"), [
    (range(6), 6), ({1: 2, 3: 4}, 2), (Sized(), 7), ([[1], [2]], 2), (iter([1, 2]), 2), ((x for x in [1]), None)])
def test_totals_in_imap(pool, args, total):
    seen = []
    list(pool.imap(double, args, progress=lambda *counts: seen.append(counts)))
    assert {each[1] for each in seen} == {total}


def test_a_list_of_lists_is_so_many_lists_in_pool(pool):
    seen = []
    pool.map(sum, [[1, 2, 3], [4]], progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (2, 2)


def test_with_a_seed(pool):
    seen = []
    pool.map(double, range(5), seed=3, progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (5, 5)


def test_the_dispatcher_calls_it_for_map_async(pool):
    threads = []
    pool.map_async(double, range(9), progress=lambda *_: threads.append(threading.current_thread().name)).get(20)
    assert {*threads} == {"achilles-dispatcher"}
