"""The joblib backend, compared with joblib's own sequential one."""

from __future__ import annotations

import math
import os
import threading

import pytest
from cluster import Cluster

from achilles import LocalCluster, register_joblib_backend

joblib = pytest.importorskip("joblib")
if tuple(map(int, joblib.__version__.split(".")[:2])) < (1, 5):
    pytest.skip("joblib before 1.5", allow_module_level=True)


def inverse(x):
    return 6 // x


def nested(n):
    return joblib.Parallel(n_jobs=2)(joblib.delayed(os.getpid)() for _ in range(n)), os.getpid()


def slow(x):
    threading.Event().wait(60 if x else 0)
    raise ValueError(x)


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(nodes=1, cpu_count=2) as made:
        yield made


@pytest.fixture
def there(cluster, no_leftovers):
    """Parallel calls in the block go to the cluster."""
    register_joblib_backend()
    with joblib.parallel_config(backend="achilles", host=cluster.host, port=cluster.port,
                                username=cluster.username, secret_key=cluster.secret_key):
        yield


def test_calls_are_those_of_one_process(there):
    calls = [joblib.delayed(math.sqrt)(n) for n in range(500)]
    assert joblib.Parallel()(calls) == joblib.Parallel(backend="sequential")(calls)
    assert set(joblib.Parallel(n_jobs=2, batch_size=1)(joblib.delayed(os.getpid)() for _ in range(50))) != {os.getpid()}
    assert list(joblib.Parallel(return_as="generator")(calls)) == [*map(math.sqrt, range(500))]
    assert sorted(joblib.Parallel(return_as="generator_unordered")(calls)) == [*map(math.sqrt, range(500))]


def test_a_block_makes_several_calls(there):
    with joblib.Parallel() as parallel:
        assert [parallel(joblib.delayed(inverse)(n) for n in (1, 2)) for _ in range(3)] == [[6, 3]] * 3


def test_an_error_is_raised_and_stops_the_others(there):
    with pytest.raises(ValueError, match="^0$"):
        joblib.Parallel(batch_size=1)(joblib.delayed(slow)(n) for n in range(4))
    assert joblib.Parallel()([joblib.delayed(inverse)(2)]) == [3]


def test_nested_calls_run_in_the_worker(there):
    for pids, worker in joblib.Parallel()(joblib.delayed(nested)(3) for _ in range(4)):
        assert set(pids) == {worker} != {os.getpid()}


def test_n_jobs_counts_the_clusters_workers(there):
    assert [joblib.effective_n_jobs(n) for n in (-1, -2, 1, 7)] == [2, 2, 1, 7], "1 runs in the caller"
    with pytest.raises(ValueError, match="n_jobs == 0"):
        joblib.Parallel(n_jobs=0)([])
    joblib.parallel.get_active_backend()[0].terminate()


def most_at_once(folder, n):
    """How many of these calls run now, as files tell."""
    path = os.path.join(folder, str(n))
    open(path, "w").close()
    threading.Event().wait(0.2)
    count = len(os.listdir(folder))
    os.unlink(path)
    return count


def test_n_jobs_bounds_how_many_batches_run(there, tmp_path):
    calls = [joblib.delayed(most_at_once)(str(tmp_path), n) for n in range(6)]
    assert max(joblib.Parallel(n_jobs=-1, batch_size=1)(calls)) == 2
    assert max(joblib.Parallel(n_jobs=-2, batch_size=1)(calls)) == 1


def test_one_worker_and_no_node_yet_are_no_reason_to_run_in_the_caller(tmp_path, no_leftovers):
    register_joblib_backend()
    with Cluster(tmp_path) as own:
        adding = threading.Timer(0.3, own.start_node, args=(1,))
        adding.start()
        with joblib.parallel_config(backend="achilles", **own.address):
            pids = set(joblib.Parallel()(joblib.delayed(os.getpid)() for _ in range(4)))
        adding.join()
        assert len(pids) == 1 and os.getpid() not in pids


def remember(value):
    global remembered
    remembered = value


def recall(_):
    return remembered, os.environ["OMP_NUM_THREADS"]


def test_parallel_takes_the_arguments_of_an_executor_and_counts_of_threads(cluster, no_leftovers):
    register_joblib_backend()
    place = {"host": cluster.host, "port": cluster.port, "username": cluster.username, "secret_key": cluster.secret_key}
    calls = [joblib.delayed(recall)(n) for n in range(3)]
    more = {"initializer": remember, "initargs": ("mine",)}
    with joblib.parallel_config(backend="achilles", inner_max_num_threads=3, **place, **more):
        assert joblib.Parallel(n_jobs=2)(calls) == [("mine", "3")] * 3
    if tuple(map(int, joblib.__version__.split(".")[:2])) >= (1, 6):
        assert joblib.Parallel(backend="achilles", n_jobs=2, **place, **more)(calls) == [("mine", "1")] * 3


def test_a_timeout_of_one_job_is_warned_of_as_joblibs_own_backends_do(there):
    with pytest.warns(UserWarning, match="does not support timeout"):
        assert joblib.Parallel(n_jobs=1, timeout=1)([joblib.delayed(inverse)(2)]) == [3]


def test_what_was_learned_of_batches_ends_with_the_call(there):
    backend = joblib.parallel.get_active_backend()[0]
    joblib.Parallel(n_jobs=2)(joblib.delayed(inverse)(2) for _ in range(3000))
    assert backend._effective_batch_size == 1 and backend._smoothed_batch_duration == 0
