"""Calls inside a worker: they run in place, so that workers that wait for others hang nobody."""

from __future__ import annotations

import os
import threading
import warnings

import pytest

import achilles
from achilles import LocalCluster

SIZE = 8  # of them at a time, on two workers


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(nodes=1, cpu_count=2) as made:
        yield made


@pytest.fixture
def pool(cluster, no_leftovers):
    with achilles.Pool(host=cluster.host, port=cluster.port, username=cluster.username,
                       secret_key=cluster.secret_key) as made:
        yield made


def square(x):
    return x * x


def where(_):
    return os.getpid(), threading.current_thread() is threading.main_thread()


def fail(x):
    raise ValueError(x)


def with_map(n):
    return achilles.map(square, range(n), chunksize=2)


def with_imap(n):
    return [*achilles.imap(square, (x for x in range(n)))]


def with_imap_unordered(n):
    return sorted(packet["ARGS_COUNTER"] for packet in achilles.imap_unordered(square, range(n)))


def with_lists(n):
    return achilles.map(sum, [[[1], [2]], [[n]]])


def with_pool(n):
    with achilles.Pool() as inner:
        called = []
        results = [
            inner.map(square, range(n)), inner.starmap(pow, [(2, n)]), [*inner.imap(square, iter(range(n)))],
            sorted(inner.imap_unordered(square, range(n))), inner.apply(square, (n,)),
            inner.apply_async(square, (n,), callback=called.append).get(),
            inner.map_async(square, range(n), callback=called.append).get(),
        ]
        inner.close()
        inner.join()
        return results, called


def with_executor(n):
    with achilles.Executor() as inner:
        inner.map(square, range(n))
        return [future.result() for future in [inner.submit(square, x) for x in range(n)]], [*inner.map(square, [n])]


def twice(n):
    return achilles.map(with_map, [n])


def endless(n):
    squares = achilles.Pool().imap(square, iter(int, 1))
    return [next(squares) for _ in range(n)]


def with_error(n):
    try:
        achilles.map(fail, [n])
    except ValueError as error:
        return error.args, error.index


def with_timeout(n):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return achilles.map(square, [n], timeout=5), [str(each.message) for each in caught]


def with_feedback(_):
    """A generator that reads its own results has an error: the thread that takes feeds, and cannot wait for itself."""
    def numbers():
        yield 1
        yield next(results)

    found = []
    for make in (achilles.Pool().imap, achilles.imap):
        results = make(square, numbers())
        try:
            found.append([*results])
        except Exception as error:
            found.append(type(error).__name__)
    return found


def with_callback(_):
    def fail(values):
        raise KeyError(values)

    told = []
    threading.excepthook = lambda about: told.append(about.exc_type.__name__)
    return achilles.Pool().map_async(square, [1, 2], callback=fail).get(), told


def begin(count):
    global pool_of_worker
    pool_of_worker = achilles.Pool(count)


def again(x):
    return pool_of_worker.apply(square, (x,))


def with_itself(count):
    begin(count)
    return pool_of_worker.apply(again, (2,)), pool_of_worker.map(again, range(8), 1)


@pytest.mark.parametrize(("function", "expected"), [
    (with_map, [[0, 1], [4, 9]]), (with_imap, [{"ARGS_COUNTER": n, "RESULT": [n * n]} for n in range(4)]),
    (with_imap_unordered, [0, 1, 2, 3]), (twice, [[[[0, 1], [4, 9]]]]),
    (with_pool, ([[0, 1, 4, 9], [16], [0, 1, 4, 9], [0, 1, 4, 9], 16, 16, [0, 1, 4, 9]], [16, [0, 1, 4, 9]])),
    (with_executor, ([0, 1, 4, 9], [16])), (endless, [0] * 4), (with_error, ((4,), 0)),
    (with_feedback, ["ValueError", "RuntimeError"]), (with_callback, ([1, 4], ["KeyError"])),
    (with_timeout, ([[16]], ["timeout is not kept in a call inside a worker, which runs in place"])),
])
def test_calls_in_a_worker_run_there(pool, function, expected):
    assert pool.map(function, [4] * SIZE, chunksize=1) == [expected] * SIZE


@pytest.mark.parametrize("count", [None, 1, 2])
def test_a_pool_of_a_worker_may_be_used_by_what_it_runs(pool, count):
    assert pool.map(with_itself, [count], 1) == [(4, [n * n for n in range(8)])]


def test_they_run_on_the_calling_thread_of_the_workers_own_process(pool):
    def both(_):
        return [achilles.map(where, [0]), [*achilles.Pool().imap(where, iter([0]))], where(0)]

    for (packet,), pooled, here in pool.map(both, range(4)):
        assert packet == pooled == [here] and here[1] and here[0] != os.getpid()


def test_a_given_place_and_a_cluster_of_its_own_work_there_as_anywhere(pool, cluster):
    place = {"host": cluster.host, "port": cluster.port, "username": cluster.username,
             "secret_key": cluster.settings.secret.reveal()}

    def there(_):
        with achilles.LocalCluster(nodes=1, cpu_count=1) as own:
            mine = {"host": own.host, "port": own.port, "username": own.username, "secret_key": own.secret_key}
            return os.getpid(), sum(achilles.map(where, [0], **mine), []), sum(achilles.map(where, [0], **place), [])

    pid, own, given = pool.apply(there, (0,))
    assert own[0][0] != pid and given[0][0] != pid
