"""Processes that tasks start: tasks may, with any library, and these processes end with their worker."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import multiprocess
import pytest
import tasks
from cluster import Cluster, alive, descendants
from conftest import wait_until

import achilles

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
METHODS = ("fork", "forkserver", "spawn")


# In workers.


def squares_of(library, method):
    """The squares of four numbers, by processes of this library."""
    with library.get_context(method).Pool(2) as pool:
        return pool.map(tasks.square, range(4))


def squares_by_executor(method):
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        return list(executor.map(tasks.square, range(4)))


def squares(case):
    library, method = case
    return squares_by_executor(method) if library == "futures" else squares_of(
        {"multiprocessing": multiprocessing, "multiprocess": multiprocess}[library], method)


def start_all(file, fork):
    """Start processes in every way, and a child of a child. The file has our process id when all of them run.

    :param fork: also a fork of this process, which holds its descriptors open.
    """
    subprocess.Popen(["sleep", "1000"])
    multiprocess.get_context("spawn").Process(target=time.sleep, args=(1000,)).start()
    if fork:
        multiprocessing.get_context("fork").Process(target=subprocess.run, args=(["sleep", "1000"],)).start()
    context = multiprocessing.get_context("forkserver")
    executor = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
    executor.submit(os.getpid).result()
    executor.submit(time.sleep, 1000)
    executor.submit(time.sleep, 1000)
    Path(file).write_text(f"{os.getpid()}\n")


def start_and(what, fork, file):
    """Start them once. Then wait, die or return."""
    if os.path.exists(file):
        return os.getpid()
    start_all(file, fork)
    if what == "die":
        wait_until(lambda: os.path.exists(f"{file} seen"))
        os._exit(3)
    if what == "wait":
        tasks.never.wait(1000)
    return os.getpid()


# Tests.


@pytest.fixture(scope="module", params=METHODS)
def cluster(request, tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster"), 2, start_method=request.param) as made:
        yield made


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("library", ["multiprocessing", "multiprocess", "futures"])
def test_a_task_may_start_processes_with_any_library(cluster, library, method):
    assert achilles.map(squares, [(library, method)] * 2, **cluster.address) == [[[0, 1, 4, 9]] * 2]


def start(cluster, file, what, fork, maxtasksperchild=None, timeout=None):
    """Call `start_and` for one argument; the pool, its result, the worker, and all that the worker has started."""
    pool = achilles.Pool(**cluster.address, maxtasksperchild=maxtasksperchild)
    result = pool.starmap_async(start_and, [(what, fork, str(file))], 1, timeout=timeout)
    wait_until(lambda: file.exists() and file.read_text().endswith("\n"), "the processes of a task")
    worker = int(file.read_text())
    started = descendants(worker)
    assert sum(command(pid) == "sleep 1000" for pid in started) == 1 + fork
    Path(f"{file} seen").touch()
    return pool, result, worker, started


def command(pid):
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").replace("\0", " ")


def check_gone(pids):
    wait_until(lambda: not any(map(alive, pids)), lambda: f"the end of {[*filter(alive, pids)]}", 10)


@pytest.mark.parametrize(("way", "what", "options"), [
    ("killed", "wait", {}), ("died", "die", {}), ("replaced", "return", {"maxtasksperchild": 1}),
    ("cancelled", "wait", {}), ("over its time", "wait", {"timeout": 4}),
])
def test_they_end_with_their_worker(tmp_path, cluster, way, what, options):
    pool, result, worker, started = start(cluster, tmp_path / "started", what, False, **options)
    with pool:
        if way == "killed":
            os.kill(worker, signal.SIGKILL)
        if way == "cancelled":
            pool.terminate()
        elif way == "over its time":
            with pytest.raises(achilles.TaskTimeout):
                result.get(30)
        else:
            assert (result.get(30) == [worker]) == (way == "replaced")
        check_gone([worker, *started])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, "cluster killed"])
def test_they_end_with_the_node(tmp_path, way, method):
    """Also under SIGKILL, after which the node does nothing."""
    with Cluster(tmp_path, 2, start_method=method) as cluster:
        pool, result, worker, started = start(
            cluster, tmp_path / "started", "return" if way is signal.SIGTERM else "wait", True)
        (node,) = cluster.nodes
        if way == "cluster killed":
            achilles.kill_cluster(True, **cluster.address)
        else:
            node.signal(way)
        node.wait()
        check_gone([worker, *started])
        pool.terminate()
