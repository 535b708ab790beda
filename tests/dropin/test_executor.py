"""Executor: what `concurrent.futures` and those who build on it may expect of one."""

from __future__ import annotations

import _thread
import asyncio
import concurrent.futures
import gc
import inspect
import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from cluster import PYTHON, Cluster, environment
from conftest import SECONDS, in_a_child, wait_until
from fakes import address, serving

from achilles import Executor, LocalCluster, NoNodesError, ServerUnreachable, cluster_status
from achilles.controller.job import Job
from achilles.dropin.base_pool import Singles


def square(x):
    return x * x


def inverse(x):
    return 6 // x


def add(x, y=0, *, z=0):
    return x + y + z


def wait_for(path):
    """Ends when there is such a file; leaves one that says that it has begun."""
    open(path + ".begun", "w").close()
    while not os.path.exists(path):
        threading.Event().wait(0.01)


def begun(path):
    wait_until(lambda: os.path.exists(path + ".begun"), "the beginning of a call")


def release(path):
    open(path, "w").close()


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(nodes=1, cpu_count=2) as made:
        yield made


@pytest.fixture
def make(cluster, no_leftovers):
    made = []

    def run(*args, **more):
        made.append(Executor(*args, host=cluster.host, port=cluster.port, username=cluster.username,
                             secret_key=cluster.secret_key, **more))
        return made[-1]

    yield run
    for executor in made:
        executor.shutdown(cancel_futures=True)


def test_a_submitted_call_is_a_future_with_its_result_or_its_exception(make):
    executor = make()
    future = executor.submit(add, 1, 2, z=3)
    assert isinstance(future, concurrent.futures.Future) and future.result(SECONDS) == 6
    failed = executor.submit(inverse, 0)
    assert isinstance(failed.exception(SECONDS), ZeroDivisionError) and "6 // x" in str(failed.exception().__cause__)
    lost = executor.submit(lambda: 0, (n for n in ()))
    assert str(lost.exception(SECONDS)) == "cannot pickle 'generator' object"
    assert executor._max_workers == 2


def test_many_calls_are_done_in_any_order_and_their_callbacks_called(make):
    executor, told = make(), []
    futures = {executor.submit(square, n): n for n in range(300)}
    for future in futures:
        future.add_done_callback(lambda future: told.append(future.result()))
    for future in concurrent.futures.as_completed(futures, SECONDS):
        assert future.result() == futures[future] ** 2
    done, left = concurrent.futures.wait(futures, SECONDS)
    assert len(done) == 300 and not left
    wait_until(lambda: len(told) == 300)


def test_many_calls_that_cannot_be_sent_fail_one_by_one(make):
    executor = make()
    futures = [executor.submit(square, (n for n in ())) for _ in range(2000)]
    assert all(isinstance(future.exception(SECONDS), TypeError) for future in futures)


@pytest.mark.parametrize("where", ["the dump", "the first step", "the second step"])
def test_ctrl_c_while_a_call_is_queued_reaches_who_submits_and_breaks_nothing(make, monkeypatch, where):
    executor, began = make(), []
    steps = {"the dump": (executor, "_function"), "the first step": (Job, "__init__"),
             "the second step": (Singles, "enter")}

    def interrupt(*args, **more):
        began.append(args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*steps[where], interrupt)
        with pytest.raises(KeyboardInterrupt):
            executor.submit(square, 2)
    assert len(began) == 1 and not executor._dispatcher.open
    assert executor.submit(square, 3).result(SECONDS) == 9
    executor.shutdown()


def test_ctrl_c_in_the_taking_of_the_lock_of_a_connection_leaves_it_free(make, monkeypatch):
    """As test_pool.py has it for a pool."""
    executor, enter = make(), threading.Condition.__enter__

    def interrupted(condition):
        enter(condition)
        if condition is executor._controller.changed:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(threading.Condition, "__enter__", interrupted)
    future = executor.submit(square, 2)
    assert future.result(SECONDS) == 4 and not future.cancel()
    assert [*executor.map(square, [3])] == [9]
    executor.shutdown(cancel_futures=True)


def test_map_is_that_of_the_standard_library(make):
    executor = make()
    with concurrent.futures.ThreadPoolExecutor(2) as theirs:
        for case in (
            lambda e: list(e.map(square, range(50))), lambda e: list(e.map(square, range(50), chunksize=7)),
            lambda e: list(e.map(add, [1, 2, 3], (n for n in range(2)))), lambda e: list(e.map(square, [])),
            lambda e: next(e.map(inverse, [0, 1])), lambda e: list(e.map(square)),
            lambda e: list(e.map(square, 5)), lambda e: list(e.map(inverse, [1, 0], timeout=SECONDS)),
        ):
            assert outcome(case, executor) == outcome(case, theirs)


def outcome(case, executor):
    try:
        return case(executor)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("end", ["close", "drop"])
def test_a_map_that_is_closed_or_dropped_reads_no_more_though_it_has_no_end(make, end, read):
    executor = make()
    results = executor.map(square, itertools.count(), buffersize=4)
    if read:
        assert next(results) == 0
    if end == "close":
        results.close()
        assert list(results) == []
    del results
    gc.collect()
    wait_until(lambda: not executor._dispatcher.open, "the end of the work")
    executor.shutdown()


def test_a_map_that_nobody_reads_is_done_all_the_same(make, tmp_path):
    with make() as executor:
        executor.map(release, [str(tmp_path / f"{n}") for n in range(40)], chunksize=3)
        executor.map(release, iter([str(tmp_path / f"closed {n}") for n in range(40)])).close()
    assert len(list(tmp_path.iterdir())) == 80


def test_a_map_that_was_read_is_cancelled_when_it_is_dropped(make, tmp_path):
    with make(max_workers=1) as executor:
        results = executor.map(wait_for, [str(tmp_path / "first"), *[str(tmp_path / "never")] * 9])
        release(str(tmp_path / "first"))
        assert next(results) is None
        del results
        gc.collect()
        wait_until(lambda: not executor._dispatcher.open, "the end of the work")


@pytest.mark.parametrize("chunksize", [1, 5])
def test_map_reads_ahead_as_many_chunks_as_it_is_told(make, chunksize):
    read = []
    results = make().map(square, (read.append(n) or n for n in itertools.count()), buffersize=4, chunksize=chunksize)
    wait_until(lambda: len(read) == 4 * chunksize, "four chunks")
    for n in range(20):
        assert next(results) == n * n
        assert len(read) <= n - n % chunksize + 5 * chunksize
    results.close()


@pytest.mark.parametrize("end", ["drop", "close", "keep", "read"])
def test_of_an_endless_input_no_more_is_read_than_is_done_at_the_end(make, end):
    executor, numbers = make(), itertools.count()
    results = executor.map(square, numbers, buffersize=3, chunksize=2)
    taken = [next(results)] if end == "read" else []
    if end == "drop":
        del results
    elif end == "close":
        results.close()
    executor.shutdown()
    count = next(numbers)
    assert count == 6 or (end == "read" and count in (6, 8))
    if end in ("keep", "read"):
        taken += itertools.islice(results, count - len(taken))
        assert taken == [*map(square, range(count))]
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            next(results)
        assert list(results) == []


def test_maps_timeout_counts_from_the_call(make, tmp_path):
    results = make().map(wait_for, [str(tmp_path / "never")], timeout=0.1)
    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)


def test_a_queued_call_is_cancelled_for_certain(make, cluster, tmp_path):
    executor, path = make(max_workers=1), str(tmp_path / "go")
    first = executor.submit(wait_for, path)
    begun(path)
    queued = [executor.submit(wait_for, str(tmp_path / f"never {n}")) for n in range(5)]
    pending = [future for future in queued if not future.running()]
    assert len(pending) == 5 and not first.cancel() and first.running()
    assert all(future.cancel() and future.cancel() for future in pending)
    done, _ = concurrent.futures.wait(pending, SECONDS)
    assert len(done) == 5 and all(future.cancelled() for future in pending)
    wait_until(lambda: not any(job["queued"] for job in cluster_status(
        cluster.host, cluster.port, cluster.username, cluster.secret_key)["jobs"]))
    release(path)
    assert first.result(SECONDS) is None
    assert executor.submit(square, 3).result(SECONDS) == 9
    assert [name for name in os.listdir(tmp_path) if name.startswith("never")] == []


def raise_cancelled():
    raise concurrent.futures.CancelledError


def test_a_function_may_raise_what_a_cancelled_call_is(make):
    future = make().submit(raise_cancelled)
    assert type(future.exception(SECONDS)) is concurrent.futures.CancelledError
    assert not future.cancelled()


def test_a_running_call_is_stopped_with_kill(make, tmp_path):
    executor, path = make(max_workers=1), str(tmp_path / "never")
    future = executor.submit(wait_for, path)
    begun(path)
    assert not future.cancel() and future.cancel(kill=True)
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(SECONDS)
    assert future.cancelled() and future.cancel(kill=True)
    with pytest.raises(concurrent.futures.CancelledError):
        future.exception()
    assert executor.submit(square, 3).result(SECONDS) == 9


def test_asyncio_sees_a_call_that_is_killed_as_cancelled(make, tmp_path):
    executor, path = make(max_workers=1), str(tmp_path / "never")

    async def run():
        future = executor.submit(wait_for, path)
        waiting = asyncio.wrap_future(future)
        await asyncio.to_thread(begun, path)
        assert future.cancel(kill=True)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return waiting.cancelled()

    assert asyncio.run(run())


def test_a_call_that_is_killed_leaves_the_others_of_its_function_alone(make, tmp_path):
    executor, paths = make(), [str(tmp_path / str(n)) for n in range(2)]
    killed, kept = [executor.submit(wait_for, path) for path in paths]
    begun(paths[0]), begun(paths[1])
    assert killed.cancel(kill=True) and not kept.done()
    job, = executor._controller.jobs.values()
    wait_until(lambda: len(job.out) == 1, "the return of the call that was killed")
    assert not job.waiting, "it is not sent again"
    release(paths[1])
    assert kept.result(SECONDS) is None and executor.submit(square, 3).result(SECONDS) == 9


def test_shutdown_waits_for_what_was_submitted(make):
    executor = make()
    futures = [executor.submit(square, n) for n in range(50)]
    results = executor.map(square, range(50))
    executor.shutdown()
    assert all(future.done() for future in futures) and list(results) == [*map(square, range(50))]
    for call in (lambda: executor.submit(square, 1), lambda: executor.map(square, [1])):
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            call()


def test_shutdown_without_waiting_leaves_the_work_to_be_done(make, tmp_path):
    executor, path = make(), str(tmp_path / "go")
    futures = [executor.submit(wait_for, path) for _ in range(8)]
    executor.shutdown(wait=False)
    assert not any(future.done() for future in futures)
    release(path)
    assert [future.result(SECONDS) for future in futures] == [None] * 8
    wait_until(lambda: not executor._dispatcher._thread.is_alive(), "the end of the dispatcher")


def test_the_interpreter_waits_for_an_executor_that_was_shut_down_without_waiting(cluster):
    place = {name: getattr(cluster.settings, name) for name in ("host", "port", "username")}
    script = f"""if True:
        import achilles, time
        executor = achilles.Executor(**{place!r}, secret_key={cluster.settings.secret.reveal()!r})
        executor.submit(time.sleep, 0.5).add_done_callback(lambda future: print("done"))
        executor.shutdown(wait=False)"""
    done = subprocess.run([*PYTHON, "-c", script], env=environment(), capture_output=True, timeout=SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"done\n", b"")


def test_shutdown_may_cancel_what_is_queued(make, tmp_path):
    executor, path = make(max_workers=1), str(tmp_path / "go")
    futures = [executor.submit(wait_for, path) for _ in range(8)]
    begun(path)
    executor.shutdown(wait=False, cancel_futures=True)
    release(path)
    assert [future.cancelled() for future in futures] == [False] + [True] * 7


def test_an_executor_that_is_dropped_ends_in_silence(make, cluster):
    before = threading.active_count()
    Executor(host=cluster.host, port=cluster.port, username=cluster.username, secret_key=cluster.secret_key)
    gc.collect()
    wait_until(lambda: threading.active_count() == before, "the end of its threads")


@pytest.mark.parametrize("what", ["executor", "iterator"])
def test_what_is_dropped_under_locks_of_ours_blocks_nobody(cluster, no_leftovers, tmp_path, what):
    """The garbage collector may drop it in any thread, and at any moment."""
    executor = Executor(host=cluster.host, port=cluster.port, username=cluster.username, secret_key=cluster.secret_key)
    link = executor._controller
    if what == "iterator":
        path, kept = str(tmp_path / "never"), executor
        dropped = [executor.map(wait_for, [path])]
        begun(path)
    else:
        dropped, kept = [executor], None
    del executor

    def drop():
        with link.lock, link._channel._lock, link._channel._writing:
            dropped.clear()

    dropper = threading.Thread(target=drop, daemon=True)
    dropper.start()
    dropper.join(SECONDS)
    assert not dropper.is_alive()
    if kept is not None:
        release(path)
        kept.shutdown()


def set_state(value):
    global state
    state = value


def get_state():
    return state


def test_an_initializer_runs_before_the_first_call(make):
    assert make(2, initializer=set_state, initargs=(7,)).submit(get_state).result(SECONDS) == 7


def refuse():
    raise RuntimeError("this worker refuses")


def test_an_initializer_that_fails_is_the_error_of_every_call(make):
    executor = make(initializer=refuse)
    futures = [executor.submit(square, n) for n in range(5)]
    assert {str(future.exception(SECONDS)) for future in futures} == {"this worker refuses"}
    with pytest.raises(RuntimeError, match="this worker refuses"):
        list(executor.map(square, [1]))


def test_every_method_takes_what_that_of_the_standard_library_takes():
    theirs = concurrent.futures.ProcessPoolExecutor
    for name in ("__init__", "submit", "map", "shutdown"):
        here, there = (inspect.signature(getattr(each, name)).parameters for each in (Executor, theirs))
        base = inspect.signature(getattr(concurrent.futures.Executor, name)).parameters if name != "__init__" else there
        for parameter in base.values():
            assert (parameter.name == "max_tasks_per_child" and parameter.default is here[parameter.name].default
                    or parameter.replace(annotation=inspect.Parameter.empty)
                    == here[parameter.name].replace(annotation=inspect.Parameter.empty))
    assert not [name for name in vars(concurrent.futures.Executor) if not hasattr(Executor, name)]


def test_a_with_block_and_shutdown_may_follow_each_other(make):
    with make() as executor:
        futures = [executor.submit(square, n) for n in range(20)]
    assert all(future.done() for future in futures)
    executor.shutdown()
    executor.shutdown(wait=False, cancel_futures=True)
    with executor, pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(square, 1)


@pytest.mark.parametrize(("ended", "error"), [("the executor", RuntimeError), ("the server", ServerUnreachable)])
def test_a_wait_for_workers_ends_where_no_node_can_come(no_leftovers, ended, error):
    told = []

    def wait():
        with pytest.raises(error) as caught:
            executor.wait_for_workers()
        told.append(caught.value)

    with serving() as server, Executor(**address(server.address[1]), reconnect_seconds=0.1) as executor:
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        wait_until(lambda: executor._controller.changed._waiters, "the wait")
        if ended == "the server":
            server.end("leaving")
        else:
            executor.terminate_workers()
        thread.join(5)
    assert told


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_a_child_of_the_caller_submit_raises_and_shutdown_returns(make, tmp_path):
    executor = make()
    futures = [executor.submit(wait_for, str(tmp_path / "go")) for _ in range(8)]

    def use():
        with executor, pytest.raises(ServerUnreachable, match="belongs to the parent process"):
            executor.submit(square, 1)
        return "as promised"

    try:
        assert in_a_child(use) == "as promised"
    finally:
        release(str(tmp_path / "go"))
    assert [future.result(SECONDS) for future in futures] == [None] * 8


def test_a_submit_of_a_class_of_somebodys_own_sees_the_calls_of_map(cluster, no_leftovers):
    seen = []

    class Counting(Executor):
        def submit(self, fn, /, *args, **kwargs):
            seen.append(args)
            return super().submit(fn, *args, **kwargs)

    with Counting(host=cluster.host, port=cluster.port, username=cluster.username,
                  secret_key=cluster.secret_key) as executor:
        assert list(executor.map(square, range(5))) == [0, 1, 4, 9, 16] and len(seen) == 5


@pytest.mark.skipif(sys.version_info < (3, 14), reason="the standard library's map has no buffersize yet")
def test_a_map_through_a_submit_of_somebodys_own_reads_no_more_than_it_is_told(make):
    executor, seen = make(), []
    submit = executor.submit
    executor.submit = lambda *args, **more: seen.append(args) or submit(*args, **more)
    results = executor.map(square, itertools.count(), buffersize=2)
    assert [*itertools.islice(results, 3)] == [0, 1, 4] and len(seen) == 5
    results.close()
    del executor.submit


def test_wrong_arguments_are_refused(make):
    with pytest.raises(ValueError, match="max_workers must be greater than 0"):
        make(0)
    with pytest.raises(TypeError, match="initializer must be a callable"):
        make(initializer=5)
    with pytest.raises(ValueError, match="max_tasks_per_child must be >= 1"):
        make(max_tasks_per_child=0)
    with pytest.raises(TypeError, match="max_tasks_per_child must be an integer"):
        make(max_tasks_per_child="a")
    with pytest.raises(ValueError, match="chunksize must be >= 1."):
        make().map(square, [1], chunksize=0)


@pytest.mark.parametrize("way", ["terminate_workers", "kill_workers"])
def test_its_workers_are_ended_with_all_that_waits(make, tmp_path, way):
    executor = make(max_workers=1)
    futures = [executor.submit(wait_for, str(tmp_path / f"never {n}")) for n in range(3)]
    begun(str(tmp_path / "never 0"))
    getattr(executor, way)()
    errors = [future.exception(SECONDS) for future in futures]
    assert {type(error) for error in errors} == {InterruptedError} and len({*map(id, errors)}) == 3
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(square, 2)


def test_a_shutdown_that_cancels_ends_a_map(make, tmp_path):
    executor = make(max_workers=1)
    results = executor.map(wait_for, [str(tmp_path / "never")] * 3)
    begun(str(tmp_path / "never"))
    executor.shutdown(cancel_futures=True)
    with pytest.raises(concurrent.futures.CancelledError):
        next(results)


@pytest.mark.parametrize("where", ["the block", "the wait"])
def test_ctrl_c_ends_a_with_at_once(make, tmp_path, where):
    def raise_at(happened):
        wait_until(happened)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    executor, path = make(max_workers=1), str(tmp_path / "never")
    happened = (lambda: executor._state != "RUN") if where == "the wait" else (lambda: os.path.exists(path + ".begun"))
    thread = threading.Thread(target=raise_at, args=(happened,))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), executor:
        future = executor.submit(wait_for, path)
        thread.start()
        if where == "the block":
            threading.Event().wait(SECONDS)
    thread.join()
    assert type(future.exception(SECONDS)) is InterruptedError and time.monotonic() - began < SECONDS


SCRIPT = """
import achilles, os, sys, time
def job(path):
    time.sleep(0.1)
    open(path, "w").close()
if __name__ == "__main__":
    way, folder, *place = sys.argv[1:]
    executor = achilles.Executor(2, host=place[0], port=int(place[1]), username=place[2], secret_key=place[3])
    for n in range(6):
        executor.submit(job, os.path.join(folder, str(n)))
    if way == "map":
        executor.map(job, [os.path.join(folder, str(n)) for n in range(6, 12)])
    if way == "no wait":
        executor.shutdown(wait=False)
    if way == "gone":
        del executor
    if way == "exit":
        sys.exit(0)
    if way == "raises":
        raise ValueError("mine")
"""


def started(cluster, tmp_path, way):
    script, folder = tmp_path / "script.py", tmp_path / "folder"
    script.write_text(SCRIPT)
    folder.mkdir()
    place = cluster.host, str(cluster.port), cluster.username, cluster.settings.secret.reveal()
    return folder, subprocess.Popen(
        [*PYTHON, str(script), way, str(folder), *place], env=environment(), stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("way", ["open", "map", "no wait", "gone", "exit", "raises"])
def test_what_was_submitted_is_done_before_the_interpreter_ends(cluster, tmp_path, way):
    folder, process = started(cluster, tmp_path, way)
    _, said = process.communicate(timeout=SECONDS)
    assert len(list(folder.iterdir())) == (12 if way == "map" else 6)
    assert process.returncode == (way == "raises") and ("ValueError: mine" in said if way == "raises" else said == "")


def test_at_the_end_of_the_interpreter_nothing_more_is_taken(cluster):
    place = {name: getattr(cluster.settings, name) for name in ("host", "port", "username")}
    script = f"""if True:
        import achilles, atexit
        executor = achilles.Executor(**{place!r}, secret_key={cluster.settings.secret.reveal()!r})
        executor.submit(abs, -1).result()
        @atexit.register
        def late():
            try:
                executor.submit(print, "never seen")
            except RuntimeError as error:
                print(error)"""
    done = subprocess.run([*PYTHON, "-c", script], env=environment(), capture_output=True, timeout=SECONDS)
    assert (done.stdout, done.stderr) == (b"cannot schedule new futures after shutdown\n", b"")


def test_futures_that_wait_for_nodes_in_vain_end_and_so_do_the_next_ones(capsys):
    with serving() as server, Executor(wait_for_nodes=0.2, **address(server.address[1])) as executor:
        for _ in range(2):
            futures = [executor.submit(square, n) for n in range(3)]
            done, _ = concurrent.futures.wait(futures, SECONDS)
            assert [type(future.exception(0)) for future in done] == [NoNodesError] * 3
            assert capsys.readouterr().err.count("Calls of an Executor are not done: no node joined") == 1


LATE = """
import achilles, sys, time
def late(future):
    time.sleep(0.1)
    print(future.result(), flush=True)
if __name__ == "__main__":
    good, lonely = sys.argv[1:5], sys.argv[5:9]
    def executor(place, **more):
        return achilles.Executor(host=place[0], port=int(place[1]), username=place[2], secret_key=place[3], **more)
    kept = []
    for _ in range(3):
        kept += [executor(good), executor(lonely, wait_for_nodes=0.3)]
        for n in range(2):
            kept[-2].submit(abs, n).add_done_callback(late)
        kept[-1].submit(abs, 5)
    time.sleep(float(sys.argv[9]))
"""


@pytest.mark.parametrize("seconds", [0, 1])  # the lonely ones end before the interpreter does, or later
def test_at_the_end_of_the_interpreter_callbacks_run_and_one_executor_keeps_no_other(cluster, tmp_path, seconds):
    script = tmp_path / "script.py"
    script.write_text(LATE)
    with Cluster(tmp_path) as lonely:
        process = subprocess.run(
            [*PYTHON, str(script), cluster.host, str(cluster.port), cluster.username,
             cluster.settings.secret.reveal(), *map(str, lonely.address.values()), str(seconds)],
            env=environment(), capture_output=True, text=True, timeout=SECONDS)
    assert sorted(process.stdout.split()) == ["0", "0", "0", "1", "1", "1"], process.stderr
    assert process.stderr.count("Calls of an Executor are not done: no node joined the server") == 3


def test_at_the_end_of_the_interpreter_a_lost_server_is_named_and_ctrl_c_ends_the_wait(tmp_path):
    with LocalCluster(nodes=1, cpu_count=1) as own:
        folder, process = started(own, tmp_path, "open")
        wait_until(lambda: [*folder.iterdir()], "the first call")
        own.server.kill()
        told = process.stderr.readline()
    assert f"The server at 127.0.0.1:{own.port} cannot be reached any more; it is tried again for 300 s" in told
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=SECONDS)
    assert said == "Calls of an Executor are not done: Ctrl-C ended the wait for them\n"


def test_at_the_end_of_the_interpreter_a_cluster_that_is_ended_is_named(tmp_path):
    with LocalCluster(nodes=1, cpu_count=1) as own:
        folder, process = started(own, tmp_path, "open")
        wait_until(lambda: [*folder.iterdir()], "the first call")
    _, said = process.communicate(timeout=SECONDS)
    assert said == "Calls of an Executor are not done: the cluster was ended by kill_cluster\n"


def test_asyncio_runs_its_calls_there(make):
    async def several():
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(executor, square, n) for n in range(20)))

    executor = make()
    assert asyncio.run(several()) == [*map(square, range(20))]


def test_a_submit_of_somebodys_own_sees_the_calls_of_map(make):
    executor, seen = make(), []
    submit = executor.submit
    executor.submit = lambda *args, **more: seen.append(args) or submit(*args, **more)
    assert list(executor.map(square, range(5))) == [0, 1, 4, 9, 16] and len(seen) == 5
    del executor.submit


def test_single_calls_start_no_thread_and_make_no_lock(make, monkeypatch):
    """But those of the standard library's Future."""
    executor, made = make(), []
    executor.submit(square, 1).result(SECONDS)

    def refuse(*_):
        raise AssertionError("a thread for a call")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(threading, "Lock", lambda: made.append(1) or _thread.allocate_lock())
    futures = [executor.submit(square, n) for n in range(50)]
    assert [future.result(SECONDS) for future in futures] == [n * n for n in range(50)]
    assert not made
