"""Pool, against `multiprocessing.Pool` itself where that has the method: the same case runs on both."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import weakref
from multiprocessing.pool import MaybeEncodingError, RemoteTraceback

import pytest
from cluster import environment
from conftest import SECONDS, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from achilles import ClusterKilled, LocalCluster, Pool, TaskTimeout, WorkerLost, kill_cluster, payload
from achilles.channel import Channel
from achilles.takers import ResultTimeout
from achilles.wire import Kind

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


def busy(path, x):
    """Notes when it begins and when it ends."""
    note(path, "+")
    threading.Event().wait(0.02)
    note(path, "-")
    return x


def numbers(_):
    return random.random()


def refuse():
    raise RuntimeError("this worker refuses")


def breaking():
    yield from (1, 2)
    raise OSError("the disk")


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


def outcome(call):
    try:
        return "value", call()
    except Exception as error:
        return type(error), str(error), type(error.__cause__)


@pytest.mark.parametrize("case", CASES)
def test_a_case_ends_as_in_the_standard_library(ours, theirs, case):
    assert outcome(lambda: CASES[case](ours)) == outcome(lambda: CASES[case](theirs))


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
    assert threads == {"achilles-dispatcher"}


def test_a_timeout_is_both_kinds_of_timeout(ours):
    result, iterator = ours.apply_async(after, (0.3,)), ours.imap(after, [0.3])
    for call in (result.get, iterator.next):
        for kind in (multiprocessing.TimeoutError, TimeoutError):
            with pytest.raises(kind) as caught:
                call(timeout=0)
            assert type(caught.value) is ResultTimeout
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    result.wait(0.001)
    assert not result.ready() and result.get() is None and iterator.next() is None


@pytest.mark.parametrize("wrong, error", [
    (dict(processes=0), "Number of processes must be at least 1"), (dict(processes=-1), "Number of processes"),
    (dict(maxtasksperchild=0), "maxtasksperchild must be a positive int or None"),
    (dict(maxtasksperchild=1.5), "maxtasksperchild must be"), (dict(initializer=5), "initializer must be a callable"),
])
def test_wrong_arguments_are_refused_with_the_standard_librarys_words(wrong, error):
    kinds = []
    for pool in (Pool, multiprocessing.get_context("spawn").Pool):
        with pytest.raises((ValueError, TypeError), match=error) as caught:
            pool(**wrong)
        kinds.append(caught.type)
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


def test_an_iterator_that_is_dropped_when_its_window_is_full_goes_on(make):
    pool = make()
    iterator = pool.imap(square, range(50), buffersize=2)
    job = iterator.job
    wait_until(lambda: len(job.slices) == 2 and not job._waiting, "a full window, all answered")
    del iterator
    wait_until(lambda: not pool._controller._jobs, "the end of its job")


def test_terminate_ends_who_waits(make):
    pool = make()
    result, iterator, told = pool.map_async(after, [60, 60]), pool.imap(after, [60, 60]), []
    waiting = threading.Thread(target=lambda: told.append(outcome(lambda: pool.map(after, [60]))))
    waiting.start()
    wait_until(lambda: len(pool._controller._jobs) == 3)
    pool.terminate()
    pool.join()
    waiting.join(SECONDS)
    for found in (outcome(result.get), outcome(iterator.next), *told):
        assert found[:2] == (InterruptedError, "the pool was terminated before this was done")
    assert len(told) == 1


def test_a_pool_that_is_dropped_warns_and_closes(cluster, no_leftovers):
    pool = Pool(**where(cluster))
    with pytest.warns(ResourceWarning, match="unclosed running multiprocessing pool"):
        del pool
        gc.collect()


def test_nothing_is_kept_alive_after_it_is_delivered(make):
    pool = make()
    arguments = [Odd() for _ in range(4)]
    seen = [weakref.ref(each) for each in arguments]
    iterator = pool.imap(type, arguments)
    result = pool.map_async(square, range(10))
    assert next(iterator).__name__ == "Odd" and result.get(SECONDS)
    assert [*iterator] and result.job is None and iterator.job is None
    del arguments
    wait_until(lambda: gc.collect() is not None and not any(ref() for ref in seen), "the end of the arguments")
    assert not pool._dispatcher.kept and not pool._controller._jobs


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
    for result in results:
        result.get(SECONDS)
    with open(path) as file:
        running = [*itertools.accumulate(1 if line[0] == "+" else -1 for line in file)]
    assert len(running) == 44 and max(running) == 2


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

    iterator = pool.imap(square, endless(), buffersize=7)
    assert [next(iterator) for _ in range(50)] == [*map(square, range(50))]
    assert len(read) <= 60


def test_timeout_ends_the_call_of_one_argument_alone(ours):
    found = outcomes(ours.imap(after, [0, 60, 0], timeout=0.5))
    assert [kind for kind, *_ in found] == ["value", TaskTimeout, "value", StopIteration]


def test_a_seed_gives_the_same_numbers_however_the_work_is_cut(ours, make):
    alone = make(processes=1)
    first = ours.map(numbers, range(40), chunksize=1, seed=-7)
    assert len(set(first)) == 40
    assert first == ours.map(numbers, range(40), chunksize=9, seed=-7) == alone.map(numbers, iter(range(40)), seed=-7)
    assert first == list(alone.imap(numbers, (n for n in range(40)), 3, seed=-7))
    assert first != ours.map(numbers, range(40), seed=8)
    assert ours.starmap(power, [(2, 3)], seed=1) == [8]


@pytest.mark.parametrize("more, error", [
    (dict(seed=1.5), TypeError), (dict(buffersize=0), ValueError), (dict(timeout=0), ValueError),
    (dict(chunksize=0), ValueError), (dict(unknown=1), TypeError),
])
def test_wrong_options_are_refused(ours, more, error):
    with pytest.raises(error):
        ours.map(square, [1], **more)


# What is sent.


def test_a_large_function_crosses_the_link_once(make, monkeypatch):
    sent = []
    send = Channel.send

    def counting(self, kind, body):
        if kind is Kind.FUNCTION:
            sent.append(body.size())
        send(self, kind, body)

    monkeypatch.setattr(Channel, "send", counting)
    pool, data = make(), bytes(20 << 20)
    for _ in range(100):
        assert pool.map(lambda x: len(data) + x, range(8)) == [*range(len(data), len(data) + 8)]
    assert len(sent) == 1 and sent[0] > len(data)


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
    letter = b"".join(map(bytes, payload.Context(caller=True).dump((pool, pool.map))))
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
    from cluster import Cluster

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
