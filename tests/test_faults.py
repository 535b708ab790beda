"""Whatever dies but the caller, the answer stays right: each row of the short table of faults, once."""

from __future__ import annotations

import functools
import itertools
import multiprocessing.pool
import os
import signal
import textwrap
import threading
import time
from contextlib import closing

import pytest
import tasks
from cluster import Cluster, Oracle, alive, shown  # noqa: F401
from conftest import wait_until

from achilles import RemoteError, WorkerLost, imap, imap_unordered, map  # noqa: A004

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two nodes of 2 workers, for tests that lose no more than workers."""
    with Cluster(tmp_path_factory.mktemp("pair"), 2, 2) as cluster:
        yield cluster


@pytest.fixture
def oracle(tmp_path):
    return Oracle(tmp_path)


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def squares(count):
    return [n ** 2 for n in range(count)]


class Call(threading.Thread):
    """`map` in a thread: its values, or its exception."""

    def __init__(self, function, args, **options):
        super().__init__(name="call", daemon=True)
        self.found = self.error = None
        self._work = functools.partial(map, function, args, **options)
        self.start()

    def run(self):
        try:
            self.found = flat(self._work())
        except BaseException as e:
            self.error = e

    def result(self, seconds=30.0):
        self.join(seconds)
        assert not self.is_alive(), "the call hangs"
        assert self.error is None, self.error
        return self.found


# A worker dies.


@pytest.mark.parametrize("chunksize", [1, 16])
@pytest.mark.parametrize(("how", "status"), [("exit", 1), ("segfault", -signal.SIGSEGV), ("kill", -signal.SIGKILL)])
def test_poison_is_lost_at_its_index_after_three_attempts(pair, oracle, how, status, chunksize):
    errors = []
    function = functools.partial(tasks.die_at, oracle.path, 37, how)
    found = flat(map(function, range(100), chunksize=chunksize, callback_error=errors.append, **pair.address))
    assert found == [None if n == 37 else n ** 2 for n in range(100)]
    (error,) = errors
    assert type(error) is WorkerLost
    runs = [pid for index, pid in oracle.runs() if index == 37]
    assert len(runs) == 3
    assert (error.index, error.pid, error.exitcode) == (37, runs[-1], status)
    assert error.node in (0, 1)
    said = f"signal {-status}" if status < 0 else f"status {status}"
    for part in ("argument 37", f"node {error.node}", f"pid {error.pid}", said):
        assert part in str(error)
    counts = oracle.counts()
    assert all(1 <= counts[n] <= 4 for n in range(100))  # once more, where it was in the same batch


def test_poison_among_tiny_tasks_that_travel_together(pair):
    def touchy(number):
        if number == 12_345:
            os._exit(9)
        return number

    errors = []
    found = flat(map(touchy, range(20_000), callback_error=errors.append, **pair.address))
    assert found == [None if n == 12_345 else n for n in range(20_000)]
    assert [(type(error), error.index, error.exitcode) for error in errors] == [(WorkerLost, 12_345, 9)]


def test_poison_everywhere_in_a_chunk(pair):
    errors = []
    found = flat(map(lambda _: os._exit(7), range(4), chunksize=2, callback_error=errors.append, **pair.address))
    assert found == [None] * 4
    assert sorted(error.index for error in errors) == [0, 1, 2, 3]


def test_poison_without_a_callback_is_raised(pair):
    with pytest.raises(WorkerLost) as raised:
        map(lambda n: os._exit(5) if n == 3 else n, range(50), **pair.address)
    assert raised.value.index == 3
    pair.wait_idle(5)
    assert flat(map(tasks.square, range(50), **pair.address)) == squares(50)


@pytest.mark.parametrize("chunksize", [1, 8])
def test_a_worker_killed_in_a_task_costs_one_attempt(pair, oracle, chunksize):
    function = functools.partial(tasks.die_once, oracle.path, 11)
    assert flat(map(function, range(40), chunksize=chunksize, **pair.address)) == squares(40)
    assert oracle.counts()[11] == 2


def test_a_worker_killed_although_its_child_lives(pair, oracle):
    """End of file does not come then. The child ends when the node has seen the death."""
    function = functools.partial(tasks.die_leaving_a_child, oracle.path, 5)
    assert flat(map(function, range(10), **pair.address)) == squares(10)
    (child,) = [pid for index, pid in oracle.runs() if index == -1]
    wait_until(lambda: not alive(child), "the end of the child")


def test_idle_workers_killed_are_replaced(pair):
    workers = flat(node.workers(2) for node in pair.nodes)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    assert flat(map(tasks.square, range(20), **pair.address)) == squares(20)
    for node in pair.nodes:
        wait_until(lambda: len(set(node.workers(2)) - set(workers)) == 2, "two new workers")  # noqa: B023


def test_workers_killed_all_the_time(pair, oracle):
    """Sixteen kills among 150 tasks; no argument is killed a third time on purpose."""
    call = Call(functools.partial(tasks.recorded_square, oracle.path, 0.05), range(150), **pair.address)
    killed = 0
    while killed < 16:
        runs, counts = oracle.runs(), oracle.counts()
        latest = {pid: index for index, pid in runs}
        victims = [pid for pid in latest if alive(pid) and counts[latest[pid]] == 1]
        if victims:
            os.kill(victims[-1], signal.SIGKILL)
            killed += 1
        oracle.wait_for(len(runs) + 6)
    assert call.result() == squares(150)


# A node dies.


def test_a_killed_nodes_chunks_go_to_another(tmp_path, oracle):
    with Cluster(tmp_path, 2, 3) as cluster:
        call = Call(functools.partial(tasks.recorded_square, oracle.path, 0.05), range(100), **cluster.address)
        oracle.wait_for(10)
        workers = cluster.nodes[1].workers(3)
        cluster.nodes[1].kill()
        wait_until(lambda: not any(map_alive(workers)), "the end of its workers", 5)
        assert call.result() == squares(100)
        assert sum(oracle.counts().values()) <= 100 + 2 * 3  # what was in its batches


def map_alive(pids):
    return [alive(pid) for pid in pids]


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_workers_of_a_killed_node_are_gone(tmp_path, oracle, method):
    with Cluster(tmp_path, 2, start_method=method) as cluster:
        call = Call(functools.partial(tasks.recorded_square, oracle.path, 0.02), range(200), **cluster.address)
        oracle.wait_for(4)
        workers = {pid for _, pid in oracle.runs()}
        cluster.nodes[0].kill()
        wait_until(lambda: not any(map_alive(workers)), "the end of its workers", 5)
        assert call.is_alive()
        cluster.start_node(2)
        assert call.result() == squares(200)


def test_the_only_node_is_killed_and_another_comes(tmp_path, oracle):
    function = functools.partial(tasks.recorded_square, oracle.path, 0.02)
    with Cluster(tmp_path, 2) as cluster:
        call = Call(function, range(60), chunksize=2, **cluster.address)
        oracle.wait_for(10)
        cluster.nodes[0].kill()
        wait_until(lambda: not cluster.status()["nodes"], "no node")
        cluster.start_node(3)
        assert call.result() == squares(60)


# The server dies.


@pytest.mark.parametrize("call", [imap, imap_unordered])
def test_a_killed_server_comes_back(tmp_path, oracle, call):
    """What was delivered is not run again."""
    with Cluster(tmp_path, 2, 1) as cluster:
        packets = call(functools.partial(tasks.recorded_square, oracle.path, 0.02), range(150), **cluster.address)
        taken = [next(packets) for _ in range(12)]
        done = {packet["ARGS_COUNTER"] + place for packet in taken for place in range(len(packet["RESULT"]))}
        before = oracle.counts()
        cluster.server.kill()
        cluster.start_server()
        taken += packets
        taken.sort(key=lambda packet: packet["ARGS_COUNTER"])
        assert flat(packet["RESULT"] for packet in taken) == squares(150)
        counts = oracle.counts()
        assert {n: counts[n] for n in done} == {n: before[n] for n in done} == dict.fromkeys(done, 1)
        assert sum(counts.values()) <= 150 + 2 * 64 + 12
        cluster.nodes[0].wait_for("CLIENT_ID: [^$]*CLIENT_ID: ")


def test_server_and_node_killed_together(tmp_path, oracle):
    with Cluster(tmp_path, 2, 1) as cluster:
        call = Call(functools.partial(tasks.recorded_square, oracle.path, 0.02), iter(range(150)), **cluster.address)
        oracle.wait_for(20)
        cluster.server.kill()
        cluster.nodes[0].kill()
        cluster.start_server()
        assert call.result() == squares(150)


def test_a_server_that_restarts_in_order(tmp_path, oracle):
    """SIGTERM: all are told, and come back."""
    with Cluster(tmp_path, 2) as cluster:
        call = Call(functools.partial(tasks.recorded_square, oracle.path, 0.02), [[n, n + 1] for n in range(40)],
                    **cluster.address)
        oracle.wait_for(10)
        cluster.server.signal(signal.SIGTERM)
        assert cluster.server.wait(10) == 0
        cluster.start_server()
        assert call.result() == flat([n ** 2, (n + 1) ** 2] for n in range(40))


def test_a_server_that_never_comes_back_is_an_error(tmp_path, oracle):
    with Cluster(tmp_path, 1) as cluster:
        call = Call(functools.partial(tasks.recorded_square, oracle.path, 0.02), itertools.count(),
                    reconnect_seconds=1, **cluster.address)
        oracle.wait_for(3)
        cluster.server.kill()
        call.join(15)
        assert isinstance(call.error, ConnectionError)
        assert "reconnect" in str(call.error)


# The caller dies.


def start_caller(cluster, oracle, work="", call="map"):
    """A script that maps far more than will be done."""
    script = cluster.start_script(textwrap.dedent(f"""
        import functools, sys, tasks
        from achilles import imap, map
        work = functools.partial(tasks.recorded_square, {oracle.path!r}, 0.1)
        for result in {call}(work, range(5000)):
            pass
        """))
    oracle.wait_for(4)
    return script


def test_a_killed_callers_job_is_forgotten(pair, oracle):
    caller = start_caller(pair, oracle)
    assert pair.status()["jobs"]
    caller.kill()
    pair.wait_idle(3)
    began = time.monotonic()
    assert flat(map(tasks.square, range(10), **pair.address)) == squares(10)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("call", ["map", "imap"])
def test_ctrl_c_interrupts_the_caller(pair, oracle, call):
    caller = start_caller(pair, oracle, call=call)
    began = time.monotonic()
    caller.signal(signal.SIGINT)
    assert caller.wait(5) == -signal.SIGINT
    assert time.monotonic() - began < 3
    assert caller.err.read_text().rstrip().endswith("KeyboardInterrupt")
    pair.wait_idle(3)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_of_the_caller_neither_keeps_nor_breaks_the_connection(pair, oracle):
    function = functools.partial(tasks.recorded_square, oracle.path, 0.02)
    with closing(imap(function, range(60), **pair.address)) as packets:
        first = next(packets)
        child = os.fork()
        if child == 0:
            code = 3
            signal.alarm(20)
            try:
                list(packets)  # what it had taken in before the fork, perhaps; then the error
            except ConnectionError:
                code = 0
            finally:
                os._exit(code)
        rest = [first, *packets]
    assert flat(packet["RESULT"] for packet in rest) == squares(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# The function raises.


def test_base_exceptions_are_results(pair):
    errors = []
    workers = set(flat(node.workers(2) for node in pair.nodes))
    found = flat(map(tasks.raise_base, range(9), chunksize=3, callback_error=errors.append, **pair.address))
    assert found == [None if n in tasks.BASES else n for n in range(9)]
    assert {error.index: type(error) for error in errors} == {n: type(error) for n, error in tasks.BASES.items()}
    assert next(error for error in errors if type(error) is SystemExit).code == 3
    assert set(flat(node.workers(2) for node in pair.nodes)) == workers  # none was replaced
    with pytest.raises(tasks.Stop):
        map(tasks.raise_base, [5], **pair.address)


def test_an_exception_with_other_arguments_than_its_init(pair):
    errors = []
    assert flat(map(tasks.raise_odd, range(4), callback_error=errors.append, **pair.address)) == [0, 1, None, 3]
    (error,) = errors
    assert isinstance(error, (tasks.OddError, RemoteError))
    assert error.index == 2
    assert "2 is odd" in str(error)
    assert "raise_odd" in str(error.__cause__)


@pytest.mark.parametrize("chunksize", [1, 4])
def test_a_result_that_cannot_be_dumped(pair, chunksize):
    errors = []
    options = {"chunksize": chunksize, "callback_error": errors.append}
    found = flat(map(tasks.return_generator, range(6), **options, **pair.address))
    assert found == [0, 1, None, 3, 4, 5]
    (error,) = errors
    assert type(error) is multiprocessing.pool.MaybeEncodingError
    assert error.index == 2
    assert "generator" in str(error)


def broken(count):
    yield from range(count)
    raise LookupError("no more")


@pytest.mark.parametrize("chunksize", [1, 4])
def test_an_argument_generator_that_raises(pair, chunksize):
    with pytest.raises(LookupError, match="no more"):
        map(tasks.square, broken(10), chunksize=chunksize, **pair.address)
    for call in (imap, imap_unordered):
        taken, packets = [], call(tasks.square, lambda: broken(10), chunksize=chunksize, **pair.address)
        with pytest.raises(LookupError, match="no more"):
            for packet in packets:
                taken += packet["RESULT"]
        assert sorted(taken) == squares(10)
    with pytest.raises(LookupError):
        map(tasks.square, broken(0), **pair.address)
    pair.wait_idle(5)


def test_callback_error_may_call_map_itself(pair):
    def again(error):
        return flat(map(tasks.square, [error.index], **pair.address))[0]

    found = flat(map(functools.partial(tasks.fail_at, (2, 5)), range(8), callback_error=again, **pair.address))
    assert found == squares(8)
