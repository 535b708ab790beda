"""The calls and the Pool on executors that are not ours: those of processes and threads, and Dask's where it is."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import multiprocessing
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import test_pool
from conftest import SECONDS, wait_until

import achilles
from achilles import Pool
from achilles.dropin.engine import CONTEXTS_KEPT


def square(x):
    return x * x


def inverse(x):
    return 6 // x


def numbers(_):
    return random.random()


go = threading.Event()


def wait_for_go(_):
    """By name, so that the event is the test's own and no copy: that one would never be set."""
    return go.wait(SECONDS)


def leave(x):
    os._exit(1)


def set_state(value):
    global state
    state = value


def add_state(x):
    return state + x


def processes():
    return concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))


def dask():
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1", silence_logs=50)
    client = distributed.Client(cluster)
    executor = client.get_executor()

    def close(wait=True):
        client.close()
        cluster.close()

    executor.shutdown = close
    return executor


@pytest.fixture(scope="module", params=[processes, lambda: concurrent.futures.ThreadPoolExecutor(2), dask],
                ids=["processes", "threads", "dask"])
def executor(request):
    made = request.param()
    yield made
    made.shutdown()


@pytest.fixture
def pool(executor):
    with Pool(executor=executor) as made:
        yield made


def test_the_three_calls_give_packets_in_order(executor):
    on = {"executor": executor}
    assert achilles.map(square, range(5), **on) == [[0, 1], [4, 9], [16]]
    assert achilles.map(square, [], **on) == [] and achilles.map(len, [["a", "bc"], []], **on) == [[1, 2], []]
    assert achilles.map(square, range(5), lambda x: -x, 2, **on) == [[0, -1, -4, -9], [-16]]
    packets = [*achilles.imap(square, (n for n in range(5)), chunksize=3, **on)]
    assert packets == [{"ARGS_COUNTER": 0, "RESULT": [0, 1, 4, 9, 16]}]
    unordered = achilles.imap_unordered(square, range(50), **on)
    assert sorted(n for packet in unordered for n in packet["RESULT"]) == [*map(square, range(50))]


def test_errors_are_those_of_a_cluster(executor):
    seen = []
    assert achilles.map(inverse, [1, 0, 3], callback_error=seen.append, executor=executor) == [[6, None], [2]]
    assert [(type(error), error.index) for error in seen] == [(ZeroDivisionError, 1)]
    with pytest.raises(ZeroDivisionError) as caught:
        achilles.map(inverse, [1, 0], executor=executor)
    assert "return 6 // x" in str(caught.value.__cause__)


def test_a_pool_has_all_its_methods(pool):
    assert pool.map(lambda x: x + 1, range(1000)) == [*range(1, 1001)]
    assert pool.starmap(pow, [(2, 3), (3, 2)]) == [8, 9] and pool.apply(pow, (2,), {"exp": 5}) == 32
    squares = [*map(square, range(20))]
    assert [*pool.imap(square, range(20), 3)] == sorted(pool.imap_unordered(square, range(20))) == squares
    assert pool.map_async(square, range(3)).get(SECONDS) == [0, 1, 4] and pool.size == 2
    with pytest.raises(ZeroDivisionError):
        pool.map(inverse, [1, 0])


def test_a_pool_on_other_processes_ends_as_the_standard_librarys():
    """All the cases of a cluster's."""
    with processes() as executor, Pool(executor=executor) as ours, multiprocessing.get_context("spawn").Pool(2) as mp:
        for name, case in test_pool.CASES.items():
            found = [test_pool.outcome(functools.partial(case, pool)) for pool in (ours, mp)]
            assert found[0] == found[1], name


def test_a_seed_gives_the_same_numbers_in_other_processes():
    """Threads of one process would share one generator."""
    with processes() as executor, Pool(executor=executor) as pool:
        first = pool.map(numbers, range(20), 1, seed=5)
        assert first == pool.map(numbers, range(20), 7, seed=5) and len(set(first)) == 20


def test_an_endless_iterable_is_read_as_far_ahead_as_the_window_says(pool):
    read = []
    results = pool.imap(square, (read.append(n) or n for n in itertools.count()), buffersize=5)
    assert [next(results) for _ in range(30)] == [*map(square, range(30))] and len(read) <= 36
    results.cancel()


def test_an_initializer_runs_once_in_each_process(executor):
    for value in range(CONTEXTS_KEPT + 2):
        with Pool(initializer=set_state, initargs=(value,), executor=executor) as pool:
            assert pool.map(add_state, range(5), 1) == [*range(value, value + 5)]


def test_close_and_join_wait_for_the_work(executor):
    pool = Pool(executor=executor)
    results = pool.imap(square, range(100))
    pool.close()
    pool.join()
    assert [*results] == [*map(square, range(100))]


def test_processes_bounds_what_is_out():
    running, most, lock = [], [], threading.Lock()

    class Counting(concurrent.futures.ThreadPoolExecutor):
        def submit(self, fn, /, *args):
            with lock:
                running.append(1)
                most.append(len(running))
            future = super().submit(fn, *args)
            future.add_done_callback(lambda _: running.pop())
            return future

    with Counting(8) as executor, Pool(2, executor=executor) as pool:
        assert [pool.map_async(square, range(20), 1) for _ in range(3)][2].get(SECONDS) == [*map(square, range(20))]
    assert max(most) == 2


def test_what_has_not_begun_is_cancelled_with_its_job(tmp_path):
    def wait_there(n):
        (tmp_path / f"begun {n}").touch()
        while not (tmp_path / "go").exists():
            threading.Event().wait(0.01)

    with concurrent.futures.ThreadPoolExecutor(1) as executor, Pool(executor=executor) as pool:
        results = pool.imap(wait_there, range(5))
        wait_until((tmp_path / "begun 0").exists, "the first call")
        wait_until(lambda: executor._work_queue.qsize(), "a second one behind it")
        results.cancel()
        wait_until(lambda: not pool._controller.jobs, "the end of the job")
        wait_until(lambda: len(pool._controller._submitted) == 1, "the cancelling of all but the first")
        (tmp_path / "go").touch()
    assert [*tmp_path.glob("begun *")] == [tmp_path / "begun 0"]


def test_a_call_that_begins_as_its_pool_is_terminated_hangs_nobody(executor):
    pool = Pool(executor=executor)
    pool.terminate()
    pool._state = "RUN"  # as the thread of the call has seen it
    for method in (pool.map, pool.map_async, pool.imap, pool.apply_async):
        with pytest.raises(InterruptedError, match="closed"):
            method(square, [1, 2])
    pool.terminate()


def test_what_breaks_the_executor_is_the_error_of_the_call():
    with processes() as executor, Pool(executor=executor) as pool:
        with pytest.raises(concurrent.futures.BrokenExecutor):
            pool.map(leave, [1])
        with pytest.raises(concurrent.futures.BrokenExecutor):
            pool.map(square, [1])


def test_what_the_executor_refuses_is_the_error_of_that_call_and_others_go_on(monkeypatch):
    with concurrent.futures.ThreadPoolExecutor(1) as executor, Pool(executor=executor) as pool:
        first = pool.map_async(wait_for_go, [1])
        wait_until(lambda: executor._threads, "its submit")
        with monkeypatch.context() as patch:
            patch.setattr(executor, "submit", lambda *args: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                pool.map(square, [1])
        go.set()
        assert first.get(SECONDS) == [True] and pool.map(square, range(3)) == [0, 1, 4]


def test_what_only_our_nodes_can_do_is_refused(executor):
    for call in (lambda: achilles.map(square, [1], timeout=1, executor=executor),
                 lambda: achilles.map(square, [1], host="127.0.0.1", executor=executor)):
        with pytest.raises(ValueError, match="not possible there|on a cluster or on an executor"):
            call()
    with Pool(maxtasksperchild=1, executor=executor) as pool, pytest.raises(ValueError, match="maxtasksperchild"):
        pool.map(square, [1])


def test_the_example_estimates_the_same_number_here_and_there():
    pytest.importorskip("distributed")
    example = str(Path(__file__).parents[2] / "examples/outgrow_with_dask.py")
    found = []
    for command in (["-m", "achilles.local", example], [example, "--dask"]):
        done = subprocess.run([sys.executable, *command, "--calls", "10"], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split()[-1])
    assert found[0] == found[1] and 3.1 < float(found[0]) < 3.2
