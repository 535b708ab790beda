"""Pool, against `multiprocessing.Pool` itself where that has the method: the same case runs on both."""

from __future__ import annotations

import _thread
import functools
import gc
import inspect
import itertools
import multiprocessing
import operator
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from multiprocessing.pool import MaybeEncodingError, RemoteTraceback, ThreadPool
from pathlib import Path

import pytest
import tasks
from cluster import PYTHON, Cluster, Process, environment
from conftest import NODE_OPTIONS, SECONDS, in_a_child, wait_until
from fakes import SECRET, USER, address, serving
from hypothesis import given, settings
from hypothesis import strategies as st

import achilles
from achilles import (
    ClusterKilled,
    LetterTooLarge,
    LocalCluster,
    NoNodesError,
    Pool,
    ServerUnreachable,
    TaskTimeout,
    WorkerLost,
    kill_cluster,
)
from achilles.controller.call import Call
from achilles.controller.connection import Controller
from achilles.controller.results import NOBODY
from achilles.dropin.async_results import AsyncResult, PoolIterator, ResultTimeout
from achilles.dropin.base_pool import STOP_SECONDS, Dispatcher, Singles
from achilles.objects import letters
from achilles.protocol.channel import Channel
from achilles.protocol.frames import Kind

# Run in workers.


def square(x):
    return x * x


def power(x, y=2):
    return x ** y


def inverse(x):
    return 6 // x


def pair(*args, **kwds):
    return args, kwds


def after(seconds, value=None):
    threading.Event().wait(seconds)
    return value


def set_start(value):
    global start
    start = value


def add_start(x):
    return start + x


def until(path):
    """Ends when there is such a file."""
    while not path.exists():
        threading.Event().wait(0.01)
    return "done"


def leave(x):
    if x == 3:
        raise SystemExit(7)
    return x


def unsendable(x):
    return (n for n in ()) if x == 2 else x


def pid(_=None):
    return os.getpid()


def die(x):
    if x == 5:
        os._exit(3)
    return x


def note(path, name):
    with open(path, "a") as file:
        file.write(f"{name} {os.getpid()}\n")


def busy(path, x, seconds=0.02):
    """Notes when it begins and when it ends."""
    note(path, "+")
    threading.Event().wait(seconds)
    note(path, "-")
    return x


def die_first(path, x):
    """Takes its worker along, the first time that anybody calls it with 3."""
    if x == 3 and not os.path.exists(path):
        open(path, "w").close()
        os._exit(1)
    return random.random()


def numbers(_):
    return random.random()


def refuse():
    raise RuntimeError("this worker refuses")


class Several(Exception):
    """An exception of two arguments."""

    def __init__(self, a, b):
        super().__init__(a, b)
        self.b = b


def raise_it(n):
    if n == 2:
        try:
            inverse(0)
        except ZeroDivisionError as error:
            raise ValueError("outer") from error
    assert n != 3, "three"
    raise {1: Several(1, 2), 4: KeyError("four"), 5: TimeoutError("five"), 6: StopIteration(6)}[n]


def breaking():
    yield from (1, 2)
    raise OSError("the disk")


class Result:
    """A result that says when it is gone."""

    def __init__(self, x):
        self.x = x


class Odd:
    """An object that says when it is gone."""


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(nodes=2, cpu_count=2) as made:
        yield made


def where(cluster):
    return {"host": cluster.host, "port": cluster.port, "username": cluster.username, "secret_key": cluster.secret_key}


@pytest.fixture(scope="module")
def ours(cluster):
    with Pool(**where(cluster)) as pool:
        yield pool


@pytest.fixture(scope="module")
def theirs():
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        yield pool


@pytest.fixture
def make(cluster, no_leftovers):
    """Make a pool; it is terminated in the end."""
    made = []

    def run(*args, **more):
        made.append(Pool(*args, **where(cluster), **more))
        return made[-1]

    yield run
    for pool in made:
        pool.terminate()


# Like the standard library's.

CASES = {
    "apply": lambda p: p.apply(pair, (1, 2), {"a": 3}),
    "apply without arguments": lambda p: p.apply(pair),
    "apply raises": lambda p: p.apply(inverse, (0,)),
    "apply_async": lambda p: p.apply_async(pair, (1,), {"b": 2}).get(SECONDS),
    "apply_async raises": lambda p: p.apply_async(inverse, (0,)).get(SECONDS),
    "map": lambda p: p.map(square, range(100)),
    "map of a generator": lambda p: p.map(square, (n for n in range(10))),
    "map of nothing": lambda p: p.map(square, []),
    "map of a set": lambda p: sorted(p.map(square, {1, 2, 3})),
    "map of a dict": lambda p: p.map(str.upper, {"a": 1, "b": 2}),
    "map of lists": lambda p: p.map(sum, [[1, 2], [], [3]]),
    "map in chunks": lambda p: p.map(square, range(10), 3),
    "map raises": lambda p: p.map(inverse, [3, 0, 2], 1),
    "map of what is no iterable": lambda p: p.map(square, 5),
    "map of what breaks": lambda p: p.map(square, breaking()),
    "map of what cannot be dumped": lambda p: p.map(square, [1, (n for n in ()), 3], 1),
    "map_async": lambda p: p.map_async(square, range(10)).get(SECONDS),
    "map_async raises": lambda p: p.map_async(inverse, [1, 0], 1).get(SECONDS),
    "map_async of nothing": lambda p: p.map_async(square, []).get(SECONDS),
    "starmap": lambda p: p.starmap(power, [(2, 3), (3,)]),
    "starmap raises": lambda p: p.starmap(power, [(2, 3, 4, 5)]),
    "starmap_async": lambda p: p.starmap_async(power, zip(range(5), range(5))).get(SECONDS),
    "imap": lambda p: list(p.imap(square, range(20))),
    "imap in chunks": lambda p: list(p.imap(square, range(20), chunksize=7)),
    "imap of nothing": lambda p: list(p.imap(square, [])),
    "imap raises in its place": lambda p: outcomes(p.imap(inverse, [1, 0, 3])),
    "imap of what breaks": lambda p: outcomes(p.imap(square, breaking())),
    "imap of what is no iterable": lambda p: outcomes(p.imap(square, 5)),
    "imap of what cannot be dumped": lambda p: outcomes(p.imap(square, [1, (n for n in ()), 3])),
    "imap_unordered": lambda p: sorted(p.imap_unordered(square, iter(range(20)))),
    "imap_unordered in chunks": lambda p: sorted(p.imap_unordered(square, range(20), 7)),
    "a chunksize of nothing": lambda p: p.imap(square, [1], 0),
    "BaseException of the iterable's worker": lambda p: p.map(unsendable, [1], 1),
    "successful, and not": lambda p: [finished(p.apply_async(inverse, (n,))).successful() for n in (1, 0)],
    "apply of lists and strings": lambda p: [p.apply(pair, [1, 2]), p.apply(pair, "ab"), p.apply(abs, (-1,))],
    "apply by keywords": lambda p: p.apply(func=pair, args=(1,), kwds={"a": 2}),
    "apply of what are no arguments": lambda p: p.apply(pair, 5),
    "apply of what are no keywords": lambda p: p.apply(pair, (), None),
    "apply of a key that is no name": lambda p: p.apply(pair, (), {1: 2}),
    "apply of too many arguments": lambda p: p.apply(square, (1, 2)),
    "map of what is no function": lambda p: p.map(5, [1]),
    "imap of what is no function": lambda p: outcomes(p.imap(None, [1])),
    "map of a string": lambda p: p.map(str.upper, "abc"),
    "map of bytes": lambda p: p.map(square, b"abc"),
    "map of a partial": lambda p: p.map(functools.partial(power, y=3), [1, 2]),
    "map of a method": lambda p: p.map("abc".startswith, ["a", "b"]),
    "map of a class": lambda p: p.map(complex, ["1", "2"]),
    "map of an object": lambda p: p.map(operator.itemgetter(0), ["ab"]),
    "map by keywords": lambda p: p.map(func=square, iterable=[1], chunksize=1),
    "map without arguments": lambda p: p.map(square),
    "map in chunks of a word": lambda p: type(outcome(lambda: p.map(square, [1], "a"))[0]),
    "map that returns exceptions": lambda p: list(map(repr, p.map(ValueError, [5]))),
    "starmap of what are no arguments": lambda p: p.starmap(pair, [1]),
    "starmap of strings and generators": lambda p: p.starmap(pair, (each for each in ("ab", [1, 2]))),
    "starmap_async raises": lambda p: p.starmap_async(inverse, [(0,)]).get(SECONDS),
    "an exception of several arguments": lambda p: p.map(raise_it, [1]),
    "an exception with a cause": lambda p: p.map(raise_it, [2]),
    "an assertion": lambda p: p.map(raise_it, [3]),
    "a KeyError": lambda p: p.map(raise_it, [4]),
    "a TimeoutError of the function's own": lambda p: p.map(raise_it, [5]),
    "a StopIteration of the function's": lambda p: p.apply(raise_it, (6,)),
    "a result that cannot be sent": lambda p: p.apply(unsendable, (2,)),
    "results of which one cannot be sent": lambda p: outcomes(p.imap(unsendable, range(4))),
    "callbacks of a map": lambda p: told(p.map_async, square, [1, 2]),
    "callbacks of a map that raises": lambda p: told(p.map_async, inverse, [1, 0], 1),
    "callbacks of a starmap": lambda p: told(p.starmap_async, power, [(1, 2)]),
    "callbacks of a call": lambda p: told(p.apply_async, square, (3,)),
    "callbacks of a call that raises": lambda p: told(p.apply_async, inverse, (0,)),
    "callbacks of a call that cannot be dumped": lambda p: told(p.apply_async, square, ((n for n in ()),)),
    "callbacks of a map that cannot be dumped": lambda p: told(p.map_async, square, [(n for n in ())]),
    "a negative wait": lambda p: p.apply_async(after, (0.05,)).wait(-1),
    "imap in chunks of less than nothing": lambda p: p.imap(square, [1], -1),
    "imap_unordered in chunks of less than nothing": lambda p: p.imap_unordered(square, [1], -2),
    "imap in chunks of a word": lambda p: p.imap(square, [1], "a"),
    "imap by keywords": lambda p: list(p.imap(func=square, iterable=[1], chunksize=1)),
    "imap of a dict": lambda p: list(p.imap(square, {2: 1})),
    "imap_unordered of what breaks": lambda p: sorted(map(str, outcomes(p.imap_unordered(square, breaking())))),
    "an iterator is its own": lambda p: [iter(i) is i for i in [p.imap(square, [1]), p.imap_unordered(square, [1])]],
    "AsyncResult of something": lambda p: str(type(p.apply_async(square, (1,)))[int]).rpartition("[")[2],
    "next after the end": lambda p: outcomes(itertools.chain(p.imap(square, [1]), p.imap(square, []))),
}


def finished(result):
    result.wait(SECONDS)
    assert result.ready()
    return result


def outcomes(iterator):
    """What each next gives, up to the end."""
    found = []
    while len(found) < 100:
        found.append(outcome(lambda: next(iterator)))
        if found[-1][0] is StopIteration:
            break
    return found


def told(method, *args):
    """What comes of an async call, and what its callbacks were called with."""
    heard = []
    result = method(*args, callback=lambda value: heard.append(("value", value)),
                    error_callback=lambda error: heard.append((type(error), str(error))))
    return outcome(lambda: result.get(SECONDS)), heard, result.ready(), result.successful()


def outcome(call):
    try:
        return "value", call()
    except Exception as error:
        return type(error), re.sub("0x[0-9a-f]+", "0x", str(error)), type(error.__cause__)


@pytest.mark.parametrize("case", CASES)
def test_a_case_ends_as_in_the_standard_library(ours, theirs, case):
    assert outcome(lambda: CASES[case](ours)) == outcome(lambda: CASES[case](theirs))


def test_every_method_takes_what_that_of_the_standard_library_takes():
    """The same arguments in the same order, with the same defaults; ours come behind them, by keyword alone.

    But for `buffersize` of imap and imap_unordered, which is their fourth argument from Python 3.16 on.
    """
    theirs = multiprocessing.pool.Pool
    names = {name for name in vars(theirs) if not name.startswith("_")} - {"Process"}
    assert names == {"apply", "apply_async", "map", "map_async", "imap", "imap_unordered", "starmap",
                     "starmap_async", "close", "terminate", "join"}
    for name in names | {"__init__"}:
        here, there = (list(inspect.signature(getattr(pool, name)).parameters.values()) for pool in (Pool, theirs))
        assert [(p.name, p.default) for p in here[:len(there)]] == [(p.name, p.default) for p in there]
        by_place = [p.name for p in here[len(there):] if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        assert by_place == (["buffersize"] if name.startswith("imap") and len(there) == 4 else [])
    of_results = (AsyncResult, multiprocessing.pool.AsyncResult), (PoolIterator, multiprocessing.pool.IMapIterator)
    for classes in of_results:
        for name in {name for name in vars(classes[1]) if not name.startswith("_")}:
            here, there = (inspect.signature(getattr(each, name)).parameters for each in classes)
            assert [(p.name, p.default) for p in here.values()] == [(p.name, p.default) for p in there.values()]


LIVES = {
    "join while it runs": lambda p: [p.join],
    "map after close": lambda p: [p.close, lambda: p.map(square, [1])],
    "nothing is pulled after close": lambda p: [p.close, lambda: p.map(square, breaking())],
    "imap after close": lambda p: [p.close, lambda: p.imap(square, [1])],
    "apply_async after close": lambda p: [p.close, lambda: p.apply_async(square)],
    "starmap_async after close": lambda p: [p.close, lambda: p.starmap_async(pow, [(1, 2)])],
    "with after close": lambda p: [p.close, p.__enter__],
    "close, join, and again": lambda p: [p.close, p.close, p.join, p.join, p.terminate],
    "terminate, join, and again": lambda p: [p.terminate, p.join, p.terminate, p.join, p.close],
    "map after terminate": lambda p: [p.terminate, lambda: p.map(square, [1])],
    "results after join": lambda p: [p.close, p.join, *closed(p.map_async(abs, [-1]), p.imap(abs, [-1, -2]))],
    "with": lambda p: [lambda: p.__enter__() is p, lambda: p.__exit__(None, None, None), lambda: p.map(abs, [1])],
    "with, and an error": lambda p: [lambda: p.__exit__(KeyError, KeyError("x"), None), lambda: p._state],
    "states": lambda p: [lambda: p._state, p.close, lambda: p._state, p.terminate, lambda: p._state],
    "repr": lambda p: [lambda: repr(p).partition(" ")[2], p.close, lambda: repr(p).partition(" ")[2]],
}


def closed(result, iterator):
    """Steps that look at what was asked before the pool was closed."""
    return [result.ready, result.successful, result.get, iterator.next, lambda: iterator.next(1), iterator.__next__]


@pytest.mark.parametrize("case", LIVES)
def test_a_pool_lives_and_ends_as_in_the_standard_library(make, case):
    """ThreadPool is its Pool but for the processes; what `close`, `terminate` and `join` allow is the same."""
    ended = []
    for pool in (make(2), ThreadPool(2)):
        ended.append([outcome(step) for step in LIVES[case](pool)])
        pool.terminate()
    assert ended[0] == ended[1]


def test_where_the_standard_library_hangs_or_loses_what_it_was_given_this_one_does_not(ours):
    """Each of these is silent, or waits for ever, in multiprocessing.Pool."""
    with pytest.raises(ValueError, match="Chunksize must be 1[+], not 0"):
        ours.map(square, [1], 0)  # there: [None]
    with pytest.raises(StopIteration):
        ours.map(raise_it, [6])  # there: []
    with pytest.raises(TypeError, match="not iterable"):
        ours.map(square, type("Sized", (), {"__len__": lambda _: 3})())  # there it hangs
    heard = []
    assert ours.map_async(square, [], callback=heard.append).get(SECONDS) == [] == heard[0]  # there it is not called
    found = outcomes(ours.imap(square, breaking(), 7))  # there the first two are lost
    assert [kind for kind, *_ in found] == ["value", "value", OSError, StopIteration]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3, 3), max_size=30), st.sampled_from([None, 1, 2, 7]))
def test_any_map_ends_as_in_one_process(ours, values, chunksize):
    """The lowest error is raised, which is the one that plain map meets."""
    assert outcome(lambda: ours.map(inverse, values, chunksize))[:2] == outcome(lambda: list(map(inverse, values)))[:2]
    assert list(ours.imap(square, iter(values), chunksize)) == [*map(square, values)]


def test_an_exception_has_the_remote_traceback_for_its_cause(ours):
    with pytest.raises(ZeroDivisionError) as caught:
        ours.map(inverse, [1, 0])
    assert type(caught.value.__cause__) is RemoteTraceback and "return 6 // x" in str(caught.value.__cause__)


def test_a_result_that_cannot_be_sent_and_a_systemexit_are_errors_in_their_place(ours):
    found = outcomes(ours.imap(unsendable, range(4)))
    assert [kind for kind, *_ in found] == ["value", "value", MaybeEncodingError, "value", StopIteration]
    with pytest.raises(SystemExit, match="7"):
        ours.map(leave, range(5))


def test_callbacks_run_before_the_result_is_ready_and_one_at_a_time(ours):
    told, threads = [], set()

    def keep(value):
        threads.add(threading.current_thread().name)
        told.append(value)

    assert ours.map_async(square, range(3), callback=keep, error_callback=keep).get(SECONDS) == told[-1] == [0, 1, 4]
    error = outcome(ours.apply_async(inverse, (0,), callback=keep, error_callback=keep).get)
    assert error[0] is ZeroDivisionError and isinstance(told[-1], ZeroDivisionError)
    with pytest.raises(TypeError, match="generator"):
        ours.apply_async(square, ((n for n in ()),), error_callback=keep).get(SECONDS)
    generator = (n for n in ())
    with pytest.raises(TypeError, match="generator"):  # the function itself cannot be sent
        ours.apply_async(lambda: generator, error_callback=keep).get(SECONDS)
    assert len(told) == 4
    assert threads == {"achilles-dispatcher"}


def test_a_callback_that_raises_is_told_and_the_next_one_is_called(make, monkeypatch):
    pool, heard, complaints = make(), [], []
    monkeypatch.setattr(threading, "excepthook", complaints.append)
    assert pool.apply_async(square, (3,), callback=inverse_of_nothing).get(SECONDS) == 9
    assert pool.map_async(square, [4], callback=heard.append).get(SECONDS) == heard[0] == [16]
    assert pool.map_async(square, [5], callback=inverse_of_nothing).get(SECONDS) == [25]
    pool.close()
    joining = threading.Thread(target=pool.join, daemon=True)
    joining.start()
    joining.join(SECONDS)
    assert not joining.is_alive() and [each.exc_type for each in complaints] == [ZeroDivisionError] * 2


def inverse_of_nothing(_):
    return 6 // 0


def test_a_timeout_is_both_kinds_of_timeout(ours, tmp_path):
    path = tmp_path / "go"
    result, iterator = ours.apply_async(until, (path,)), ours.imap(until, [path])
    for call in (result.get, iterator.next):
        for kind in (multiprocessing.TimeoutError, TimeoutError):
            with pytest.raises(kind) as caught:
                call(timeout=0)
            assert isinstance(caught.value, ResultTimeout)  # of multiprocess, too, where another test has loaded that
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    result.wait(0.001)
    assert not result.ready()
    path.touch()
    assert result.get(SECONDS) == iterator.next(SECONDS) == "done"


@pytest.mark.parametrize("wrong, error", [
    (dict(processes=0), "Number of processes must be at least 1"), (dict(processes=-1), "Number of processes"),
    (dict(maxtasksperchild=0), "maxtasksperchild must be a positive int or None"),
    (dict(maxtasksperchild=1.5), "maxtasksperchild must be"), (dict(processes=1.5), "'float' object cannot be interp"),
    (dict(processes="2"), "'<' not supported between"), (dict(initializer=5), "initializer must be a callable"),
])
def test_wrong_arguments_are_refused_with_the_standard_librarys_words(wrong, error):
    kinds = []
    for pool in (Pool, multiprocessing.get_context("spawn").Pool):
        with pytest.raises((ValueError, TypeError), match=error) as caught:
            pool(**wrong)
        kinds.append(caught.type)
        del caught
        gc.collect()  # theirs is half made: its locks go now, not while multiprocessing's tracker registers others
    assert kinds[0] is kinds[1]


def test_libraries_find_a_number_of_workers(ours, make):
    assert (ours._processes, ours.size, ours._max_workers) == (4, 4, 4)
    assert make(7).size == 7 and "state=RUN pool_size=4" in repr(ours)


# Its life.


def test_after_close_nothing_more_is_taken_and_what_was_asked_is_done(make, tmp_path):
    pool, told = make(), []
    with pytest.raises(ValueError, match="Pool is still running"):
        pool.join()
    results = pool.map_async(square, range(1000), 1), pool.apply_async(square, (3,), callback=told.append)
    ordered, loose = pool.imap(square, range(1000)), pool.imap_unordered(square, iter(range(1000)), buffersize=5)
    pool.imap(note, []), pool.map_async(after, [0.1])
    pool.close()
    pool.join()
    assert told == [9] and [result.ready() for result in results] == [True, True]
    assert results[0].get() == list(ordered) == sorted(loose) == [*map(square, range(1000))]
    for call in (lambda: pool.map(square, [1]), lambda: pool.imap(square, [1]), lambda: pool.apply_async(square),
                 pool.__enter__):
        with pytest.raises(ValueError, match="Pool not running"):
            call()


def test_an_iterator_and_a_result_that_are_dropped_are_done_all_the_same(make, tmp_path):
    pool, path = make(), str(tmp_path / "oracle")
    calls = [(path, str(n)) for n in range(300)]
    pool.starmap_async(note, calls[:100])
    for call in calls[100:200]:
        pool.apply_async(note, call)
    pool.imap(lambda call: note(*call), calls[200:], buffersize=2)
    pool.close()
    pool.join()
    with open(path) as file:
        assert sorted(int(line.split()[0]) for line in file) == list(range(300))


def test_ctrl_c_reaches_a_join_that_waits_for_an_iterator(make, tmp_path):
    """The iterator goes on, as in the standard library."""
    pool, path = make(), tmp_path / "go"
    iterator = pool.imap(until, [path])
    pool.close()
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        pool.join()
    timer.join()
    path.touch()
    pool.join()
    assert iterator.next(SECONDS) == "done"


def test_ctrl_c_in_the_taking_of_the_lock_of_a_connection_leaves_it_free(make, monkeypatch):
    """Entering a condition runs Python code, which Ctrl-C may end when the lock is taken; entering a lock does not."""
    pool, enter = make(), threading.Condition.__enter__

    def interrupted(condition):
        enter(condition)
        if condition is pool._controller.changed:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(threading.Condition, "__enter__", interrupted)
    assert pool.map(square, [1]) == [1] and pool.apply(square, (2,)) == 4 and [*pool.imap(square, [3])] == [9]
    assert pool._controller.status()["jobs"]
    pool.close()
    pool.join()


def test_a_thread_that_waits_for_an_iterator_sees_what_another_thread_has_taken(make, tmp_path):
    """As the dispatcher does for a `join`."""
    iterator = make().imap(until, [tmp_path / "never"])
    timer = threading.Timer(0.2, lambda: iterator._stream.values.append(("taken", None)))
    timer.start()
    assert iterator.next(SECONDS) == "taken"
    timer.join()


@pytest.mark.parametrize("method", ["map", "imap"])
@pytest.mark.parametrize("how", ["a progress function", "a signal handler"])
def test_the_thread_that_takes_may_terminate_its_pool(make, tmp_path, how, method):
    """It holds the lock of what takes, which the dispatcher must not wait for while that thread waits for the end."""
    pool, never = make(), tmp_path / "never"
    began, progress = time.monotonic(), None
    if how == "a progress function":
        progress = lambda done, total: pool.terminate()  # noqa: E731
    else:
        signal.signal(signal.SIGALRM, lambda *_: pool.terminate())
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(InterruptedError, match="the pool was terminated"):
            [*getattr(pool, method)(lambda x: until(never) if x else x, [0, 1, 2], 1, progress=progress)]
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    pool.join()
    assert time.monotonic() - began < STOP_SECONDS and not pool._dispatcher._thread.is_alive()


def test_a_pool_that_was_terminated_by_a_call_that_nobody_takes_any_more_is_joined(make):
    pool = make()
    iterator = pool.imap(square, [1, 2, 3], progress=lambda done, total: pool.terminate())
    assert next(iterator) == 1
    pool.join()


@pytest.mark.parametrize("lock", [lambda link: link.lock, lambda link: link._channel._lock], ids=["link", "channel"])
def test_a_pool_ends_in_a_thread_that_holds_a_lock_of_it(make, monkeypatch, lock):
    """Where a signal handler or the collector comes while the thread holds it."""
    monkeypatch.setattr("achilles.dropin.base_pool.STOP_SECONDS", 0.2)
    pool = make()
    result = pool.apply_async(after, (60,))
    with lock(pool._controller):
        pool.terminate()
    with pytest.raises(InterruptedError):
        result.get(SECONDS)
    pool.join()


def test_ctrl_c_behind_the_beginning_of_a_call_leaves_nothing_open(make, monkeypatch):
    """Else `join` would wait for a call that nobody feeds."""
    pool, begin = make(), Call.__init__

    def interrupted(self, *args, **more):
        begin(self, *args, **more)
        open_ = pool._dispatcher.open

        class Once(dict):
            def __setitem__(self, key, value):
                super().__setitem__(key, value)
                pool._dispatcher.open = open_
                open_[key] = value
                raise KeyboardInterrupt

        pool._dispatcher.open = Once()

    monkeypatch.setattr(Call, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.map(square, [1])
    monkeypatch.undo()
    assert not pool._dispatcher.open and not pool._controller.jobs
    assert pool.map(square, [2]) == [4]
    pool.close()
    pool.join()


@pytest.mark.parametrize("name", ["entries", "_dispatcher"])
def test_ctrl_c_in_the_making_of_an_entry_leaves_no_half_of_it_in_the_job(make, monkeypatch, name):
    """Else whatever ends all jobs would stop there, and leave the others waiting."""
    def interrupted(self, attribute, value):
        if attribute == name:
            raise KeyboardInterrupt
        object.__setattr__(self, attribute, value)

    pool = make()
    monkeypatch.setattr(Singles, "__setattr__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.apply_async(square, (1,))
    monkeypatch.undo()
    result = pool.map_async(after, [60])
    pool.terminate()
    with pytest.raises(InterruptedError):
        result.get(SECONDS)


@pytest.mark.parametrize("method", ["map", "imap"])
def test_ctrl_c_while_the_end_of_a_call_is_noted_leaves_nothing_to_wait_for(make, monkeypatch, method):
    pool, forget = make(), Dispatcher.forget

    def interrupted(self, key):
        monkeypatch.setattr(Dispatcher, "forget", forget)
        raise KeyboardInterrupt

    monkeypatch.setattr(Dispatcher, "forget", interrupted)
    with pytest.raises(KeyboardInterrupt):
        [*getattr(pool, method)(square, [1])]
    pool.close()
    thread = threading.Thread(target=pool.join, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()


def test_a_chunksize_that_is_no_int_leaves_no_job(make):
    pool = make()
    for _ in range(3):
        with pytest.raises(TypeError):
            pool.map(square, [1], 1.5)
    assert not pool._controller.jobs


@pytest.mark.parametrize("error", [SystemExit, ZeroDivisionError])
def test_a_hook_for_exceptions_that_raises_does_not_end_the_dispatcher(make, monkeypatch, error):
    pool, told = make(), []

    def hook(about):
        told.append(about.exc_type)
        raise error

    monkeypatch.setattr(threading, "excepthook", hook)
    assert pool.apply_async(square, (2,), callback=lambda _: inverse(0)).get(SECONDS) == 4
    assert pool.map_async(square, [3]).get(SECONDS) == [9] and told == [ZeroDivisionError]


def test_where_no_thread_can_be_started_the_call_says_so_and_is_over(make, monkeypatch):
    pool, start = make(), threading.Thread.start

    def refuse(thread):
        if thread.name == "achilles-feeder":
            raise RuntimeError("no more threads")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="no more threads"):
        pool.imap(square, iter([1]))
    assert not pool._dispatcher.open and pool.map(square, [2]) == [4]


def test_an_iterator_that_is_left_over_at_the_end_of_the_interpreter_is_silent(cluster):
    place = where(cluster) | {"secret_key": cluster.settings.secret.reveal()}
    script = f"import achilles, operator; pool = achilles.Pool(**{place!r}); " \
        "iterator = pool.imap(operator.neg, range(2000), buffersize=4); next(iterator); pool._state = 'TERMINATE'"
    done = subprocess.run([*PYTHON, "-c", script], env=environment(), capture_output=True, timeout=SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_an_iterator_that_is_dropped_when_its_window_is_full_goes_on(make):
    pool = make()
    iterator = pool.imap(square, range(50), buffersize=2)
    call = iterator._stream.call
    wait_until(lambda: call.results.out == 2 and not call.job.owes, "a full window, all answered")
    del iterator
    wait_until(lambda: not pool._dispatcher.open, "the end of its call")
    assert call.results.over


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
def test_an_iterator_that_is_dropped_under_locks_of_ours_blocks_nobody(make, tmp_path, name):
    """The garbage collector may drop it in any thread, and at any moment."""
    pool, path = make(), tmp_path / "go"
    dropped = [getattr(pool, name)(until, [path])]
    call, channel = dropped[0]._stream.call, pool._controller._channel
    wait_until(lambda: call.job.out, "the sending of the call")

    def drop():
        with pool._controller.lock, channel._lock, channel._writing, call._cutting:
            dropped.clear()

    dropper = threading.Thread(target=drop, daemon=True)
    dropper.start()
    dropper.join(SECONDS)
    assert not dropper.is_alive()
    path.touch()
    pool.close()
    pool.join()


def test_terminate_ends_who_waits(make):
    pool = make()
    result, iterator, told = pool.map_async(after, [60, 60]), pool.imap(after, [60, 60]), []
    waiting = threading.Thread(target=lambda: told.append(outcome(lambda: pool.map(after, [60]))))
    waiting.start()
    wait_until(lambda: len(pool._controller.jobs) == 3)
    pool.terminate()
    pool.join()
    waiting.join(SECONDS)
    for found in (outcome(result.get), outcome(iterator.next), *told):
        assert found[:2] == (InterruptedError, "the pool was terminated before this was done")
    assert len(told) == 1


def test_each_single_call_of_a_pool_that_is_terminated_has_an_exception_of_its_own(make, tmp_path):
    """Threads that raise one object would share its traceback."""
    pool = make()
    results = [pool.apply_async(until, (tmp_path / "never",)) for _ in range(3)]
    pool.terminate()
    caught = []
    for result in results:
        with pytest.raises(InterruptedError) as raised:
            result.get(SECONDS)
        caught.append(raised.value)
    assert len(set(map(id, caught))) == 3


def test_a_call_that_begins_while_its_pool_is_terminated_fails(make, monkeypatch):
    pool, fail_jobs = make(), Controller.fail_jobs
    result = []

    def fail_and_begin(self, error):
        fail_jobs(self, error)
        if not result:
            monkeypatch.setattr(Controller, "fail_jobs", fail_jobs)
            threading.Timer(0, lambda: result.append(pool.map_async(after, [60]))).start()
            wait_until(lambda: result)

    monkeypatch.setattr(Controller, "fail_jobs", fail_and_begin)
    with monkeypatch.context() as patch:
        patch.setattr(pool, "_begin", lambda *_: pool._dispatcher)  # it has looked just before
        pool.terminate()
    with pytest.raises(ServerUnreachable):
        result[0].get(SECONDS)


def test_a_pool_that_is_dropped_warns_and_closes(cluster, no_leftovers):
    pool = Pool(**where(cluster))
    with pytest.warns(ResourceWarning, match="unclosed running multiprocessing pool"):
        del pool
        gc.collect()


@pytest.mark.filterwarnings("error", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_pool_that_is_dropped_closes_also_where_its_warning_is_an_error(cluster, no_leftovers):
    pool = Pool(**where(cluster))
    thread = pool._dispatcher._thread
    del pool
    gc.collect()
    thread.join(SECONDS)
    assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_a_child_of_the_caller_nothing_hangs(make, tmp_path):
    """What is there is returned; what is not is an error, and the parent's pool goes on."""
    pool, path = make(), tmp_path / "go"
    there, open_, iterator = pool.map_async(square, [2]), pool.apply_async(until, (path,)), pool.imap(until, [path])
    assert there.get(SECONDS) == [4]
    calls = (there.get, open_.get, open_.wait, iterator.next, lambda: pool.map(square, [1]),
             lambda: pool.apply_async(square, (1,)), pool.close, pool.join, pool.terminate)
    found = in_a_child(lambda: [kind if kind == "value" else kind.__name__ for kind, *_ in map(outcome, calls)])
    lost = "ServerUnreachable"
    assert found == str(["value", lost, lost, lost, lost, lost, "value", lost, "value"])
    path.touch()
    assert open_.get(SECONDS) == iterator.next(SECONDS) == "done" and pool.map(square, [3]) == [9]


def test_a_result_keeps_its_pool_until_it_is_there(cluster, no_leftovers, tmp_path):
    pool, path = Pool(**where(cluster)), tmp_path / "go"
    result, seen = pool.apply_async(until, (path,)), weakref.ref(pool)
    del pool
    gc.collect()
    assert seen() is not None
    with pytest.warns(ResourceWarning, match="unclosed running multiprocessing pool") as told:
        path.touch()
        assert result.get(SECONDS) == "done"
        wait_until(lambda: gc.collect() is not None and len(told), "the end of the pool")


def test_nothing_is_kept_alive_after_it_is_delivered(make):
    pool = make()
    arguments = [Odd() for _ in range(4)]
    seen = [weakref.ref(each) for each in arguments]
    iterator = pool.imap(type, arguments)
    result = pool.map_async(square, range(10))
    assert next(iterator).__name__ == "Odd" and result.get(SECONDS)
    assert [*iterator] and result.call is None and iterator._stream.call is None
    del arguments
    wait_until(lambda: gc.collect() is not None and not any(ref() for ref in seen), "the end of the arguments")
    wait_until(lambda: not pool._dispatcher.open, "the end of the calls")
    assert all(job.sink is NOBODY and not job.owes for job in pool._controller.jobs.values())


def test_a_result_is_gone_when_the_caller_lets_go_of_it(make):
    pool = make()
    seen = [weakref.ref(each) for each in pool.imap(Result, range(5))]
    result = pool.apply_async(Result, (1,))
    seen += [weakref.ref(result.get(SECONDS)), *map(weakref.ref, pool.map(Result, range(5)))]
    del result
    wait_until(lambda: gc.collect() is not None and not any(ref() for ref in seen), "the end of the results")


loads: list[int] = []


class SlowToLoad:
    """A result that takes its time where it is loaded."""

    def __reduce__(self):
        return load_slowly, ()


def load_slowly():
    loads.append(threading.get_ident())
    return after(0.3, SlowToLoad())


def test_a_result_is_loaded_once_and_threads_wait_for_it_together(make):
    result, found = make().apply_async(SlowToLoad), []
    threads = [threading.Thread(target=lambda: found.append(result.get(SECONDS))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(found) == 5 and len({*map(id, found)}) == len(loads) == 1 and result.successful()


def test_many_threads_may_use_one_pool(make):
    pool, found = make(), []
    threads = [threading.Thread(target=lambda n=n: found.append(pool.map(square, range(n)))) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert sorted(map(len, found)) == list(range(20))


# Options.


def test_processes_bounds_what_runs_of_all_calls_together(make, tmp_path):
    pool, path = make(processes=2), str(tmp_path / "oracle")
    results = [pool.starmap_async(busy, [(path, n) for n in range(6)], 1) for _ in range(3)]
    results += [pool.apply_async(busy, (path, n)) for n in range(4)]
    results += [pool.starmap_async(busy, [(path, n, 0.001) for n in range(100)], chunksize) for chunksize in (1, None)]
    for result in results:
        result.get(SECONDS)
    with open(path) as file:
        running = [*itertools.accumulate(1 if line[0] == "+" else -1 for line in file)]
    assert len(running) == 444 and max(running) == 2


def test_slow_calls_behind_quick_ones_are_shared_by_few_processes(make):
    """Quick ones go together, but not so many that all slow ones behind them are one worker's."""
    pids = make(processes=2).map(pid_of, [0.0] * 2000 + [0.02] * 40, 1)
    assert len({*pids[2000:]}) > 1  # two at a time, of four


def pid_of(seconds):
    threading.Event().wait(seconds)
    return os.getpid()


def test_quick_chunks_of_few_processes_go_together(make, monkeypatch):
    batches, send = [], Channel.send

    def counting(self, kind, body, **options):
        batches.extend([body] if kind is Kind.TASK else [])
        send(self, kind, body, **options)

    monkeypatch.setattr(Channel, "send", counting)
    pool = make(processes=1)
    assert pool.map(square, range(3000), 1) == list(pool.imap(square, range(3000))) == [*map(square, range(3000))]
    assert len(batches) < 1500


def test_the_number_of_workers_is_that_of_the_cluster_as_it_grows_and_shrinks(tmp_path):
    with Cluster(tmp_path) as cluster, Pool(**cluster.address) as pool, Pool(3, **cluster.address) as three:
        assert [pool.size, pool._processes, pool._max_workers, three.size] == [1, 1, 1, 3]
        result = pool.map_async(tasks.square, range(5))
        cluster.start_node(1)
        assert result.get(SECONDS) == [0, 1, 4, 9, 16]
        second = cluster.start_node(2)
        wait_until(lambda: pool.size == 3, "the second node")
        assert len(set(pool.map(functools.partial(tasks.pid_after, 0.2), range(6), 1))) == 3
        second.kill()
        wait_until(lambda: pool.size == 1, "the loss of the second node")
        assert pool.map(tasks.square, range(5)) == [0, 1, 4, 9, 16] and three.size == 3


def test_a_pool_outlives_its_server(tmp_path):
    """What was asked is done, and initializer and functions are there again."""
    with Cluster(tmp_path, 2) as cluster, Pool(initializer=set_start, initargs=(5,), **cluster.address) as pool:
        assert pool.map(add_start, range(3)) == [5, 6, 7]
        result = pool.map_async(functools.partial(after, 0.05), range(40), 1)
        iterator = pool.imap(add_start, range(100))
        cluster.server.kill()
        cluster.start_server()
        assert result.get(SECONDS) == [*range(40)] and list(iterator) == [*range(5, 105)]
        assert pool.map(add_start, range(3)) == [5, 6, 7]


def test_a_pool_that_waits_for_nodes_in_vain_says_so():
    with serving() as server, Pool(wait_for_nodes=0.1, **address(server.address[1])) as pool:
        result, iterator = pool.apply_async(square, (1,)), pool.imap(square, [1])
        for call in (result.get, result.wait, iterator.next, lambda: pool.map(square, [1])):
            with pytest.raises(NoNodesError, match="no node joined the server"):
                call()


def test_an_initializer_runs_once_in_each_worker_before_its_first_task(make, tmp_path):
    path = str(tmp_path / "oracle")
    pool = make(None, note, (path, "init"))
    for _ in range(3):
        assert len(pool.map(functools.partial(after, 0.02), range(20), 1)) == 20
    pool.starmap(note, [(path, "task")] * 20, 1)
    with open(path) as file:
        lines = [line.split() for line in file]
    begun = [worker for name, worker in lines if name == "init"]
    assert 1 <= len(begun) == len(set(begun)) <= 4
    for number, (name, worker) in enumerate(lines):
        assert name == "init" or ["init", worker] in lines[:number]


def test_maxtasksperchild_replaces_workers(make):
    pids = make(maxtasksperchild=2).map(pid, range(12), 1)
    assert max(map(pids.count, pids)) <= 2


def test_an_initializer_that_fails_is_the_callers_error(make):
    pool = make(initializer=refuse)
    for call in (lambda: pool.map(square, [1]), pool.apply_async(square, (1,)).get, pool.imap(square, [1, 2]).next):
        assert outcome(call)[:2] == (RuntimeError, "this worker refuses")


def test_chunking_is_invisible(ours):
    for chunksize in (1, 3, None):
        assert list(ours.imap(square, range(50), chunksize)) == [*map(square, range(50))]
    assert ours.map(square, range(30_000)) == [*map(square, range(30_000))]
    with pytest.raises(WorkerLost) as caught:
        ours.map(die, range(10), chunksize=10)
    assert caught.value.index == 5


def test_buffersize_bounds_how_far_an_endless_iterable_is_read_ahead(make):
    pool, read = make(), []

    def endless():
        for n in itertools.count():
            read.append(n)
            yield n

    iterator = pool.imap(square, endless(), 2, 7)
    assert [next(iterator) for _ in range(50)] == [*map(square, range(50))]
    assert len(read) <= 50 + 2 * 8


@pytest.mark.parametrize("method", ["map_async", "starmap_async", "imap", "imap_unordered"])
def test_a_list_that_changes_after_the_call_has_the_results_of_before(make, method):
    pool, args = make(), [[n] for n in range(20_000)]
    result = getattr(pool, method)(sum if method != "starmap_async" else abs, args, chunksize=1)
    args.clear()
    assert sorted(result.get(SECONDS) if "async" in method else result) == [*range(20_000)]


def test_timeout_ends_the_call_of_one_argument_alone(ours):
    found = outcomes(ours.imap(after, [0, 60, 0], timeout=0.5))
    assert [kind for kind, *_ in found] == ["value", TaskTimeout, "value", StopIteration]


def test_a_timeout_is_that_of_multiprocess_too_where_it_is_loaded(make):
    multiprocess = pytest.importorskip("multiprocess")
    pool = make()
    for wait in (pool.apply_async(after, (60,)).get, pool.imap(after, [60]).next):
        with pytest.raises(multiprocess.TimeoutError) as caught:
            wait(0.01)
        assert isinstance(caught.value, multiprocessing.TimeoutError) and isinstance(caught.value, TimeoutError)


def test_a_seed_gives_the_same_numbers_however_the_work_is_cut(ours, make):
    alone = make(processes=1)
    first = ours.map(numbers, range(40), chunksize=1, seed=-7)
    assert len(set(first)) == 40
    assert first == ours.map(numbers, range(40), chunksize=9, seed=-7) == alone.map(numbers, iter(range(40)), seed=-7)
    assert first == list(alone.imap(numbers, (n for n in range(40)), 3, seed=-7))
    assert first != ours.map(numbers, range(40), seed=8)
    assert ours.starmap(power, [(2, 3)], seed=1) == [8]


def test_a_seed_gives_the_same_numbers_after_a_worker_was_lost(ours, tmp_path):
    twice = [ours.map(functools.partial(die_first, str(tmp_path / "died")), range(10), 5, seed=1) for _ in range(2)]
    assert twice[0] == twice[1] == ours.map(numbers, range(10), seed=1)


def test_whatever_is_over_a_lowered_limit_is_letter_too_large_and_the_pool_goes_on(make, away, monkeypatch):
    monkeypatch.setattr("achilles.protocol.frames.LETTER_LIMIT_BYTES", 5000)
    pool, large = make(), b"x" * 6000
    places = outcomes(pool.imap(len, [b"1", large, b"22"]))
    assert [kind for kind, *_ in places] == ["value", LetterTooLarge, "value", StopIteration]
    for call, text in ((lambda: pool.map(len, [b"1", large]), "argument 1 has 6,"),
                       (lambda: pool.apply(len, (large,)), "the arguments has 6,"),
                       (lambda: pool.map(functools.partial(operator.contains, large), [1]), "function partial has 6,"),
                       (lambda: pool.apply(functools.partial(len, large)), "function partial has 6,")):
        with pytest.raises(LetterTooLarge, match=f"^{text}.* no more than 5,000"):
            call()
    assert pool.map(len, [b"333"]) == [3] and pool.apply(len, (b"22",)) == 2


@pytest.mark.parametrize("more, error", [
    (dict(seed=1.5), TypeError), (dict(buffersize=0), ValueError), (dict(timeout=0), ValueError),
    (dict(chunksize=0), ValueError), (dict(unknown=1), TypeError),
])
def test_wrong_options_are_refused(ours, more, error):
    with pytest.raises(error):
        ours.map(square, [1], **more)


# What is sent.


def test_a_large_function_crosses_each_link_once(away, monkeypatch, unconfigured):
    """From the caller to the server, and from there to the node, over a hundred maps."""
    sent, greeted, send = [], [], Channel.send

    def counting(self, kind, body, **options):
        if kind is Kind.JOB:
            sent.append((self.name.split()[0], sum(map(len, body.letters()))))
        elif kind is Kind.HELLO:
            greeted.append(self.name.split()[0])
        send(self, kind, body, **options)

    monkeypatch.setattr(Channel, "send", counting)
    data = os.urandom(20 << 20)
    with serving() as server, Pool(**address(server.address[1])) as pool:
        env = environment(ACHILLES_HOST="127.0.0.1", ACHILLES_PORT=str(server.address[1]), ACHILLES_USERNAME=USER,
                          ACHILLES_SECRET_KEY=SECRET)
        node = Process(away, "node", [*PYTHON, "-m", "achilles.node", "--cpu-count", "2", *NODE_OPTIONS], env)
        try:
            for _ in range(100):
                assert pool.map(lambda x: len(data) + x, range(8)) == [*range(len(data), len(data) + 8)]
        finally:
            node.signal(signal.SIGTERM)
            assert node.wait() == 0
    assert sorted(where for where, _ in sent) == ["node", "server"]
    assert greeted.count("server") == 1, "one connection serves the pool's life"
    assert all(len(data) < size < len(data) + 10_000 for _, size in sent)


def test_a_function_that_has_changed_is_sent_anew(ours):
    held = [1]

    def add(x):
        return x + held[0]

    found = []
    for held[0] in (1, 2, 2, 1):
        found.append(ours.map(add, [10, 20]))
    held.append(5)
    assert found == [[11, 21], [12, 22], [12, 22], [11, 21]] and ours.map(lambda x: x + sum(held), [1]) == [7]


def test_a_pool_may_be_captured_by_what_is_sent_and_raises_when_it_is_used_there(make):
    pool = make()

    class Sampler:
        def __init__(self):
            self.map, self.pool = pool.map, pool

        def run(self, x):
            return x + 1

        def misuse(self, x):
            return self.map(abs, [x])

    sampler = Sampler()
    assert pool.map(sampler.run, [1, 2]) == [2, 3]
    with pytest.raises(NotImplementedError, match="pool objects cannot be passed"):
        pool.map(sampler.misuse, [1])
    letter = b"".join(map(bytes, letters.Context(caller=True).dump((pool, pool.map))))
    assert b"achilles" not in letter
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(pool)


SCRIPT = """
import sys
from achilles import Pool
{}

def init(a):
    global shared
    shared = a

def f(x):
    return shared + x

if __name__ == "__main__":
    with Pool(initializer=init, initargs=(5,)) as pool:
        assert pool.map(f, range(10)) == list(range(5, 15)), pool.map(f, range(10))
        with Pool(2, init, (100,)) as other:
            assert other.map(f, range(10)) == list(range(100, 110))
        assert list(pool.imap(f, range(10))) == list(range(5, 15))
    print("as promised")
"""


@pytest.mark.parametrize("shared", ["", "shared = None"])
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_what_an_initializer_sets_is_there_for_the_function(tmp_path, method, shared):
    with Cluster(tmp_path, 2, 2, start_method=method) as cluster:
        script = cluster.start_script(SCRIPT.format(shared))
        assert script.wait() == 0, script.err.read_text()
        assert script.out.read_text() == "as promised\n"


def test_a_script_that_leaves_its_pool_open_ends(tmp_path, cluster):
    script = tmp_path / "script.py"
    script.write_text("from achilles import Pool\npool = Pool(2)\nresult = pool.map_async(abs, [-1] * 100)\n"
                      "it = pool.imap(abs, [-1] * 100)\nprint(result.get()[0], next(it))\n")
    env = environment(ACHILLES_HOST=cluster.host, ACHILLES_PORT=str(cluster.port),
                      ACHILLES_USERNAME=cluster.username, ACHILLES_SECRET_KEY=cluster.secret_key.reveal())
    began = time.monotonic()
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "1 1\n", done.stderr
    assert time.monotonic() - began < SECONDS


def test_a_cluster_that_is_killed_ends_the_calls():
    with LocalCluster(nodes=1, cpu_count=1) as doomed, Pool(**where(doomed)) as pool:
        result = pool.apply_async(after, (60,))
        kill_cluster(True, **where(doomed))
        with pytest.raises(ClusterKilled):
            result.get(SECONDS)
        with pytest.raises(ClusterKilled):
            pool.map(square, [1])


def test_ctrl_c_in_a_get_leaves_the_result_to_the_next_one(make, monkeypatch):
    """It may come when the lock of a result was taken, and was not given back yet."""
    result = make().apply_async(square, (3,))

    def interrupted(seconds):
        assert result._ending.acquire(timeout=SECONDS)
        raise KeyboardInterrupt

    monkeypatch.setattr(result, "_wait_some", interrupted)
    if not result.ready():
        with pytest.raises(KeyboardInterrupt):
            result.get()
    monkeypatch.undo()
    assert result.get(SECONDS) == 9 and result.successful()


def test_a_breach_that_comes_again_on_each_connection_ends_the_call(make, away, monkeypatch):
    """As a result beyond the caller's own limit does: to connect again for ever is of no use."""
    pool = make()
    monkeypatch.setattr("achilles.protocol.frames.LETTER_LIMIT_BYTES", 5000)
    with pytest.raises(ServerUnreachable, match="lost the server 3 times in a row: a RESULT with long letters of"):
        pool.map(bytes, [6000])


class RecordedLock:
    """A lock that notes where in the package it was made, once it is used."""

    used: set[str] = set()

    def __init__(self):
        self.lock, frame = _thread.allocate_lock(), sys._getframe(1)
        while "threading.py" in frame.f_code.co_filename:
            frame = frame.f_back
        self.place = f"{Path(frame.f_code.co_filename).stem}.{frame.f_lineno}"
        self.own = "achilles" in Path(frame.f_code.co_filename).parts

    def acquire(self, *args, **options):
        if self.own:
            self.used.add(self.place)
        return self.lock.acquire(*args, **options)

    def release(self):
        self.lock.release()

    def locked(self):
        return self.lock.locked()

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *_):
        self.release()


def threads_during(call):
    """The names of our threads that begin while this is called."""
    seen, before, done = set(), set(threading.enumerate()), threading.Event()

    def watch():
        while not done.wait(0.005):
            seen.update(each.name.split()[0] for each in {*threading.enumerate()} - before
                        if each.name.startswith("achilles-"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return seen


def test_a_map_of_a_list_starts_no_thread_and_has_five_locks(make, monkeypatch):
    monkeypatch.setattr(threading, "Lock", RecordedLock)
    pool = make()
    RecordedLock.used.clear()
    assert not threads_during(lambda: pool.map(square, list(range(20_000)), 1))
    assert len(RecordedLock.used) <= 5, RecordedLock.used


def test_the_original_map_of_a_list_has_two_threads(cluster):
    call = functools.partial(achilles.map, square, list(range(20_000)), chunksize=100, **where(cluster))
    assert threads_during(call) == {"achilles-reader", "achilles-writer"}


def test_single_calls_start_no_thread_and_make_one_lock_each(make, monkeypatch):
    """The lock with which a thread waits for the result."""
    pool, made = make(), []
    pool.apply(square, (1,))

    def refuse(*_):
        raise AssertionError("a thread for a call")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    monkeypatch.setattr(threading, "Lock", lambda: made.append(sys._getframe(1).f_globals["__name__"]) or
                        _thread.allocate_lock())
    results = [pool.apply_async(square, (n,)) for n in range(50)]
    assert [pool.apply(square, (n,)) for n in range(50)] == [result.get(SECONDS) for result in results]
    assert made == ["achilles.dropin.async_results"] * 100
