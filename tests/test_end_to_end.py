"""The three calls on real servers and nodes: shapes, order, arguments, options, errors, who comes and goes."""

from __future__ import annotations

import array
import collections
import functools
import importlib
import io
import itertools
import logging
import multiprocessing.pool
import os
import pickle
import queue
import random
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import tasks
from cluster import SECRET, Cluster, Oracle, environment, shown  # noqa: F401
from conftest import START_METHOD, wait_until

import achilles
from achilles import ClusterKilled, TaskTimeout, imap, imap_unordered, map  # noqa: A004
from achilles.protocol.connect import PYTHON

METHODS = ("fork", "forkserver", "spawn")
SIZES = (1, 3, 8)
TEN = list(range(1, 11))


@pytest.fixture(scope="module", params=METHODS)
def mixed(request, tmp_path_factory):
    """Nodes of 1, 3 and 8 workers."""
    with Cluster(tmp_path_factory.mktemp(request.param), *SIZES, start_method=request.param) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """One node of 8 workers, as in the original's examples."""
    with Cluster(tmp_path_factory.mktemp("eight"), 8) as cluster:
        yield cluster


@pytest.fixture
def oracle(tmp_path):
    return Oracle(tmp_path)


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def check_packets(packets, expected, sizes):
    """Contiguous, right, and each but the last as long as a node's packet."""
    place = 0
    for number, packet in enumerate(packets, 1):
        assert packet.keys() == {"ARGS_COUNTER", "RESULT"}
        assert packet["ARGS_COUNTER"] == place
        assert len(packet["RESULT"]) in sizes or (number == len(packets) and packet["RESULT"])
        place += len(packet["RESULT"])
    assert flat(packet["RESULT"] for packet in packets) == expected


# Shapes.


@pytest.mark.parametrize("chunksize", [1, 4])
@pytest.mark.parametrize("count", [1, 12, 101])
def test_packets_have_the_lengths_of_nodes(mixed, chunksize, count):
    expected, sizes = [n ** 2 for n in range(count)], [size * chunksize for size in SIZES]
    options = {"chunksize": chunksize, **mixed.address}
    lists = map(tasks.square, range(count), **options)
    assert flat(lists) == expected
    assert all(len(each) in sizes for each in lists[:-1])
    check_packets(list(imap(tasks.square, range(count), **options)), expected, sizes)
    unordered = sorted(imap_unordered(tasks.square, range(count), **options), key=lambda p: p["ARGS_COUNTER"])
    check_packets(unordered, expected, sizes)


def test_packets_of_20_000_instant_calls_are_contiguous_and_have_the_lengths_of_nodes(tmp_path):
    expected = [n ** 2 for n in range(20_000)]
    with Cluster(tmp_path, 2, 6) as cluster:
        for call in (imap, imap_unordered):
            packets = sorted(call(tasks.square, range(20_000), **cluster.address), key=lambda p: p["ARGS_COUNTER"])
            check_packets(packets, expected, (2, 6))
            assert {len(packet["RESULT"]) for packet in packets[:-1]} == {2, 6}


def test_ten_arguments_on_eight_workers_are_eight_and_two(eight):
    for _ in range(15):
        found = map(lambda x: x ** 2, TEN, lambda r: r ** 2, **eight.address)
        assert found == [[1, 16, 81, 256, 625, 1296, 2401, 4096], [6561, 10000]]
    for call in (imap, imap_unordered):
        found = sorted(call(lambda x: x ** 2, TEN, lambda r: r ** 2, **eight.address), key=lambda p: p["ARGS_COUNTER"])
        assert found == [
            {"ARGS_COUNTER": 0, "RESULT": [1, 16, 81, 256, 625, 1296, 2401, 4096]},
            {"ARGS_COUNTER": 8, "RESULT": [6561, 10000]},
        ]


def test_imap_keeps_the_order_and_imap_unordered_does_not_wait(eight):
    def slow_first(number):
        tasks.never.wait(0.6 if number == 0 else 0)
        return number

    packets = list(imap(slow_first, range(32), **eight.address))
    assert [packet["ARGS_COUNTER"] for packet in packets] == [0, 8, 16, 24]
    packets = list(imap_unordered(slow_first, range(64), **eight.address))
    assert [packet["ARGS_COUNTER"] for packet in packets].index(0) > 3


def test_all_workers_run_at_once(eight):
    began = time.monotonic()
    pids = flat(map(functools.partial(tasks.pid_after, 0.5), range(8), **eight.address))
    assert len(set(pids)) == 8
    assert time.monotonic() - began < 3


# Arguments.


def three():
    yield from (1, 2, 3)


ITERABLES = {
    "list": lambda: [1, 2, 3],
    "tuple": lambda: (1, 2, 3),
    "range": lambda: range(1, 4),
    "generator function": lambda: three,
    "lambda": lambda: lambda: [1, 2, 3],
    "generator": three,
    "generator expression": lambda: (n for n in [1, 2, 3]),
    "iterator": lambda: iter([1, 2, 3]),
    "array": lambda: array.array("i", [1, 2, 3]),
    "keys": lambda: {1: "a", 2: "b", 3: "c"},
    "deque": lambda: collections.deque([1, 2, 3]),
    "chain": lambda: itertools.chain([1], (2, 3)),
    "bytes": lambda: b"\x01\x02\x03",
}


@pytest.mark.parametrize("call", [map, imap, imap_unordered])
@pytest.mark.parametrize("make", ITERABLES.values(), ids=ITERABLES)
def test_any_iterable_will_do(eight, call, make):
    found = call(tasks.square, make(), **eight.address)
    lists = found if call is map else [packet["RESULT"] for packet in found]
    assert sorted(flat(lists)) == [1, 4, 9]


def test_a_file_is_its_lines(eight, tmp_path):
    (tmp_path / "text").write_text("abc\ndef\n")
    with open(tmp_path / "text") as file:
        assert flat(map(str.strip, file, **eight.address)) == ["abc", "def"]
    assert flat(map(str.strip, io.StringIO("x\ny\n"), **eight.address)) == ["x", "y"]


def test_no_arguments_need_no_node(tmp_path):
    with Cluster(tmp_path) as cluster:
        for nothing in ([], (), iter([]), lambda: []):
            assert map(tasks.square, nothing, **cluster.address) == []
            assert list(imap(tasks.square, nothing, **cluster.address)) == []


def test_what_is_not_iterable_is_a_type_error_at_once(eight):
    with pytest.raises(TypeError, match="int"):
        map(tasks.square, 3, **eight.address)
    with pytest.raises(TypeError, match="NoneType"):
        map(tasks.square, lambda: None, **eight.address)


def test_each_list_of_lists_is_a_packet(mixed):
    lists = [[1, 2, 3], [], [4], list(range(40)), []]
    expected = [[n ** 2 for n in each] for each in lists]
    for args in (lists, iter(lists), lambda: iter(lists)):
        for chunksize in (1, 5):
            assert map(tasks.square, args(), chunksize=chunksize, **mixed.address) == expected if callable(args) \
                else map(tasks.square, lists, chunksize=chunksize, **mixed.address) == expected
    packets = list(imap(tasks.square, lists, **mixed.address))
    assert packets == [{"ARGS_COUNTER": place, "RESULT": result} for place, result in enumerate(expected)]
    unordered = imap_unordered(tasks.square, lists, **mixed.address)
    assert sorted(unordered, key=lambda packet: packet["ARGS_COUNTER"]) == packets
    assert map(tasks.square, [[]], **mixed.address) == [[]]


@pytest.mark.parametrize("wrap", [list, iter])
def test_among_lists_everything_must_be_a_list(eight, wrap):
    with pytest.raises(TypeError, match=r"args\[2\] is of type int"):
        map(tasks.square, wrap([[1], [2], 3, [4]]), **eight.address)


def test_a_list_later_on_is_an_argument(eight):
    assert flat(map(len, [(1, 2), [1], [2, 3]], **eight.address)) == [2, 1, 2]


# Windows.


@pytest.mark.parametrize("call", [imap, imap_unordered])
@pytest.mark.parametrize(("seconds", "window"), [(0.06, 2 * 8 + 64 + 36), (0.0, 2 * 8 + 64 + 65_536)])
def test_an_endless_generator_is_pulled_as_far_as_the_window(eight, call, seconds, window):
    """Wider where calls are quick: 50 ms of work in each of 36 batches. But it stands still where nobody takes."""
    last, taken = [0], [0]

    def endless():
        for last[0] in itertools.count():
            yield last[0]

    def stands_still():
        before = last[0]
        tasks.never.wait(0.2)
        return before == last[0]

    with call(functools.partial(tasks.pid_after, seconds), endless, **eight.address) as packets:
        for _ in range(2):
            taken[0] += sum(len(next(packets)["RESULT"]) for _ in range(10))
            wait_until(stands_still, "a full window")
            assert taken[0] + 2 * 8 + 64 - 9 <= last[0] <= taken[0] + window + 8 * 10
    assert stands_still()


@pytest.mark.parametrize("chunksize", [1, 4])
@pytest.mark.parametrize("call", [imap, imap_unordered])
def test_a_generator_may_wait_for_earlier_results(eight, call, chunksize):
    results = queue.Queue()

    def args():
        yield from range(3)
        for _ in range(5):
            yield results.get(timeout=20) + 1

    found = []
    for packet in call(tasks.square, args, chunksize=chunksize, **eight.address):
        found += packet["RESULT"]
        for result in packet["RESULT"]:
            results.put(min(result, 9))
    assert len(found) == 8
    assert sorted(found[:3]) == [0, 1, 4]


@pytest.mark.parametrize("chunksize", [1, 4])
@pytest.mark.parametrize("size", [1, 3])
def test_buffersize_bounds_what_is_read_ahead(eight, chunksize, size):
    pulled = []

    def args():
        for n in range(12):
            pulled.append(n)
            yield n

    taken = []
    for packet in imap(tasks.square, args, chunksize=chunksize, buffersize=size, **eight.address):
        taken += packet["RESULT"]
        assert len(packet["RESULT"]) <= size
        assert len(pulled) <= len(taken) + size
    assert taken == [n ** 2 for n in range(12)]
    assert flat(map(tasks.square, range(12), buffersize=size, chunksize=chunksize, **eight.address)) == taken


# Options and errors.


def test_the_callback_runs_in_the_worker(eight):
    found = flat(map(lambda n: (n, os.getpid()), range(8), lambda pair: (*pair, os.getpid()), **eight.address))
    assert [n for n, _, _ in found] == list(range(8))
    assert all(function == callback != os.getpid() for _, function, callback in found)


@pytest.mark.parametrize("chunksize", [1, 4])
def test_callback_error_replaces_what_failed(mixed, chunksize):
    seen = []

    def replace(error):
        seen.append(error)
        assert threading.current_thread() is threading.main_thread()
        return -error.index

    found = flat(map(functools.partial(tasks.fail_at, (3, 17)), range(20), chunksize=chunksize,
                     callback_error=replace, **mixed.address))
    assert found == [-n if n in (3, 17) else n ** 2 for n in range(20)]
    assert sorted(error.index for error in seen) == [3, 17]
    for error in seen:
        assert type(error) is ValueError
        assert str(error) == f"no {error.index}"
        assert error.node in range(3)
        assert type(error.__cause__) is multiprocessing.pool.RemoteTraceback
        assert "in fail_at" in str(error.__cause__)


def test_an_error_of_the_callback_is_an_error_of_its_argument(eight):
    found = flat(map(tasks.square, range(4), lambda r: 1 / r, callback_error=lambda e: (type(e), e.index),
                     **eight.address))
    assert found == [(ZeroDivisionError, 0), 1.0, 1 / 4, 1 / 9]


def test_in_lists_the_index_is_the_lists(eight):
    found = map(functools.partial(tasks.fail_at, (3,)), [[1, 2], [3, 4]], callback_error=lambda e: e.index,
                **eight.address)
    assert found == [[1, 4], [1, 16]]


@pytest.mark.parametrize("call", [map, imap, imap_unordered])
def test_the_first_error_is_raised_and_the_job_cancelled(eight, oracle, call):
    def fail(number):
        tasks.record(oracle.path, number)
        if number == 3:
            raise ValueError("no 3")
        tasks.never.wait(0.02)

    with pytest.raises(ValueError, match="no 3") as raised:
        list(call(fail, range(100_000), **eight.address))
    assert raised.value.index == 3
    eight.wait_idle(5)
    assert len(oracle.runs()) < 10_000
    assert map(tasks.square, TEN, **eight.address)[0][0] == 1


def test_an_exception_of_callback_error_ends_the_call(eight):
    def give_up(error):
        raise LookupError("enough") from error

    with pytest.raises(LookupError, match="enough"):
        map(functools.partial(tasks.fail_at, (1,)), range(9), callback_error=give_up, **eight.address)
    eight.wait_idle(5)


@pytest.mark.parametrize("chunksize", [1, 4])
def test_a_call_over_its_time_is_a_task_timeout_there(mixed, chunksize):
    errors = []
    found = flat(map(functools.partial(tasks.hang_at, 5), range(12), chunksize=chunksize, timeout=0.5,
                     callback_error=errors.append, **mixed.address))
    assert found == [None if n == 5 else n ** 2 for n in range(12)]
    (error,) = errors
    assert type(error) is TaskTimeout
    assert isinstance(error, TimeoutError)
    assert error.index == 5
    assert error.node in range(3)
    assert "0.5" in str(error)


def test_a_timeout_is_raised(eight):
    with pytest.raises(TaskTimeout):
        map(functools.partial(tasks.hang_at, 1), range(3), timeout=0.3, **eight.address)


def test_wrong_options_are_errors_of_the_caller(eight):
    for wrong in ({"chunksize": 0}, {"buffersize": 0}, {"timeout": 0}, {"wait_for_nodes": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            map(tasks.square, TEN, **wrong, **eight.address)
    for wrong in ({"chunksize": "1"}, {"callback_error": 3}, {"timeout": "x"}, {"unknown": 1}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            map(tasks.square, TEN, **wrong, **eight.address)


def test_the_wrong_secret_is_refused(eight):
    with pytest.raises(achilles.AuthenticationError, match="refused"):
        map(tasks.square, TEN, **eight.address | {"secret_key": SECRET + "x"})


def test_no_server_is_said_at_once():
    with pytest.raises(achilles.ServerUnreachable, match="127.0.0.1:1 "):
        map(tasks.square, TEN, host="127.0.0.1", port=1, username="u", secret_key="s" * 20)


def test_the_alert_goes_to_stderr_once_a_call(eight, capsys):
    map(tasks.square, TEN, **eight.address)
    out, err = capsys.readouterr()
    where = f"127.0.0.1:{eight.port}"
    assert (out, err) == ("", f"ALERT: Connection to achilles_server at {where} and authentication successful.\n\n")


def test_what_cannot_be_dumped_is_named(eight):
    with pytest.raises(achilles.DumpError, match="generator"):
        map((n for n in TEN).send, TEN, **eight.address)
    with pytest.raises(achilles.DumpError, match="generator"):
        map(tasks.square, [1, (n for n in TEN)], **eight.address)


def test_a_module_that_the_node_lacks_is_named(eight, tmp_path, monkeypatch):
    (tmp_path / "only_the_caller_has.py").write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_the_caller_has

    with pytest.raises(ModuleNotFoundError, match="only_the_caller_has"):
        map(only_the_caller_has.double, TEN, **eight.address)
    assert map(tasks.square, [3], **eight.address) == [[9]]


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_arguments_and_results_of_20_mib(eight, kind):
    block = kind(random.Random(1).randbytes(20 << 20))
    found = flat(map(tasks.reverse, [block] * 3, **eight.address))
    assert [type(each) for each in found] == [kind] * 3
    assert all(each == block[::-1] for each in found)


def test_many_tiny_tasks(mixed):
    assert flat(map(tasks.square, range(30_000), **mixed.address)) == [n ** 2 for n in range(30_000)]
    total = sum(sum(packet["RESULT"]) for packet in imap_unordered(tasks.square, iter(range(30_000)), **mixed.address))
    assert total == sum(n ** 2 for n in range(30_000))


# Several at once.


def test_threads_share_a_cluster(mixed):
    found = {}

    def call(start):
        args = range(start, start + 50)
        found[start] = flat(map(tasks.square, args, chunksize=3, **mixed.address)) == [n ** 2 for n in args]

    threads = [threading.Thread(target=call, args=(100 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {100 * n: True for n in range(8)}


def test_controllers_of_several_processes_share_chunk_by_chunk(eight):
    """A small job does not wait for the large one that came before it."""
    large = eight.start_script("""
        import functools, tasks
        from achilles import imap
        for packet in imap(functools.partial(tasks.pid_after, 0.05), range(400)):
            print(packet["ARGS_COUNTER"], flush=True)
        """.replace("\n        ", "\n"))
    large.wait_for("^0\n")
    small = [eight.start_script("""
        import functools, tasks
        from achilles import map
        print(sum(len(r) for r in map(functools.partial(tasks.pid_after, 0.01), range(20))), flush=True)
        """.replace("\n        ", "\n")) for _ in range(2)]
    for script in small:
        script.wait_for("^20\n")
        assert script.wait() == 0
    assert large.popen.poll() is None
    assert large.wait() == 0


def test_two_iterators_at_a_time(eight):
    pair = zip(imap(tasks.square, range(20), **eight.address), imap(tasks.square, range(20), **eight.address))
    assert all(one == other for one, other in pair)


def test_closing_an_iterator_cancels_its_job(eight, oracle):
    packets = imap(functools.partial(tasks.recorded_square, oracle.path, 0.02), itertools.count(), **eight.address)
    next(packets)
    packets.close()
    packets.close()
    assert list(packets) == []
    eight.wait_idle(5)
    packets = imap(functools.partial(tasks.recorded_square, oracle.path, 0.02), itertools.count(), **eight.address)
    next(packets)
    del packets
    eight.wait_idle(5)


# Who comes and goes.


def test_nodes_join_and_leave_while_a_job_runs(tmp_path, oracle):
    function, found = functools.partial(tasks.recorded_square, oracle.path, 0.05), []
    with Cluster(tmp_path, 2) as cluster:
        for packet in imap(function, iter(range(80)), **cluster.address):
            found += packet["RESULT"]
            if len(found) == 10:
                cluster.start_node(3)
                wait_until(lambda: len(cluster.status()["nodes"]) == 2, "two nodes")
                cluster.nodes[0].signal(signal.SIGTERM)
        assert found == [n ** 2 for n in range(80)]
        assert cluster.nodes[0].wait() == 0
        cluster.nodes[0].check_family_gone()
        assert len(cluster.status()["nodes"]) == 1
        cluster.start_node(1)
        assert [node["id"] for node in cluster.status()["nodes"]] == [1, 2]
    assert oracle.counts() == dict.fromkeys(range(80), 1)


def test_a_job_waits_for_a_node_or_says_that_there_is_none(tmp_path, capsys):
    with Cluster(tmp_path) as cluster:
        with pytest.raises(achilles.NoNodesError, match="achilles.node"):
            map(tasks.square, TEN, wait_for_nodes=0.3, **cluster.address)
        packets = imap(tasks.square, TEN, **cluster.address)
        cluster.start_node(2)
        assert flat(packet["RESULT"] for packet in packets) == [n ** 2 for n in TEN]


def test_kill_cluster_ends_all_and_callers_are_told(tmp_path, oracle):
    told = []

    def call():
        try:
            map(functools.partial(tasks.recorded_square, oracle.path, 0.05), range(5000), **cluster.address)
        except BaseException as e:
            told.append(e)

    with Cluster(tmp_path, 1, 2) as cluster:
        caller = threading.Thread(target=call)
        caller.start()
        oracle.wait_for(4)
        with pytest.raises(ValueError, match="command_verified"):
            achilles.kill_cluster(**cluster.address)
        assert achilles.kill_cluster(True, **cluster.address) is True
        caller.join(10)
        assert [type(error) for error in told] == [ClusterKilled]
        with pytest.raises(ClusterKilled):
            map(tasks.square, TEN, **cluster.address)
        assert [node.wait(10) for node in cluster.nodes] == [0, 0]
        assert cluster.server.wait(20) == 0


def test_status_is_plain_dicts(eight):
    with imap(functools.partial(tasks.pid_after, 0.2), range(40), **eight.address) as packets:
        next(packets)
        status = eight.status()
    assert status.keys() == {"nodes", "jobs", "server"}
    (node,), (job,) = status["nodes"], status["jobs"]
    assert node.keys() == {"id", "address", "python", "version", "cpu_count", "busy", "done", "since"}
    assert (node["id"], node["address"], node["cpu_count"]) == (0, "127.0.0.1", 8)
    assert node["python"] == PYTHON
    assert node["version"] == status["server"]["version"] == achilles.__version__
    assert 0 <= node["busy"] <= 8
    assert abs(time.time() - node["since"]) < 600
    assert job.keys() == {"id", "user", "queued", "running", "done", "longest", "node", "pid"}
    assert job["user"] == "tests"
    assert job["done"] >= 8
    assert job["queued"] + job["running"] + job["done"] <= 40
    assert status["server"].keys() == {"version", "uptime", "memory"}
    assert 0 < status["server"]["uptime"] < 600


def pid_or_stuck(path, number):
    if number == 3:
        Path(path).write_text(str(os.getpid()))
        while os.path.exists(path):
            tasks.never.wait(0.02)
    return number


def test_status_says_where_a_job_is_stuck(eight, tmp_path):
    path = tmp_path / "stuck"
    with achilles.Pool(**eight.address) as pool:
        assert pool.map(tasks.square, [2]) == [4]
        result = pool.map_async(functools.partial(pid_or_stuck, str(path)), range(20), chunksize=2)
        # On a busy machine the others may take a second, too, and a figure may be a second old.
        job = wait_until(lambda: next(
            (job for job in eight.status()["jobs"] if job["longest"] and job["running"] == 1
             and (job["node"], job["pid"]) == (0, int(path.read_text()))), None))
        assert job["longest"] >= 1
        quick, stuck = sorted(eight.status()["jobs"], key=lambda job: job["running"])
        assert (quick["longest"], quick["node"], quick["pid"]) == (0, None, None)
        assert job["longest"] <= stuck["longest"] < 60
        path.unlink()
        assert result.get(30) == [*range(20)]
        wait_until(lambda: not any(job["longest"] for job in eight.status()["jobs"]))


# Scripts.

MAIN_SCRIPT = """
import dataclasses, enum, os, sys
from achilles import map, imap

FACTOR = 3
log = []

class Color(enum.Enum):
    RED = 1
    BLUE = 2

@dataclasses.dataclass
class Point:
    x: int
    color: Color = Color.RED
    def twin(self):
        return Point(self.x * FACTOR, Color.BLUE)

class Mine(Exception):
    def __init__(self, x, why):
        super().__init__(x, why)
        self.x = x

def even(n):
    return True if n == 0 else odd(n - 1)

def odd(n):
    return False if n == 0 else even(n - 1)

def count(n):
    log.append(n)
    return n in log and isinstance(n, int)

def work(point):
    assert isinstance(point, Point) and point.color is Color.RED
    return point.twin()

def fail(x):
    raise Mine(x, "why")

print("main", os.getpid(), flush=True)
if __name__ == "__main__":
    (found,) = map(work, [Point(1)], chunksize=2)
    assert found == [Point(3, Color.BLUE)] and type(found[0]) is Point and found[0].color is Color.BLUE
    assert sum(map(even, range(4)), []) == [True, False, True, False]
    assert all(sum(map(count, range(9)), [])) and log == []
    assert sum(map(lambda p: p.color, [Point(1)]), []) == [Color.RED]
    try:
        map(fail, [7])
    except Mine as e:
        assert e.x == 7 and e.index == 0
    print("done", flush=True)
"""


def test_functions_and_classes_of_a_script(mixed):
    script = mixed.start_script(MAIN_SCRIPT)
    assert script.wait() == 0, script.err.read_text()
    assert script.out.read_text() == f"main {script.pid}\ndone\n"


@pytest.mark.parametrize("method", METHODS)
def test_a_node_of_a_script_without_a_main_guard(tmp_path, method):
    """Its workers never run the script again."""
    with Cluster(tmp_path) as cluster:
        node = cluster.start_script(textwrap.dedent(f"""
            print("main")
            from achilles import run_node
            run_node(cpu_count=2, start_method={method!r})
            """))
        node.wait_for("CLIENT_ID: 0")
        pids = set()  # the first worker may have done it all before the second one has started

        def both_work():
            pids.update(flat(map(functools.partial(tasks.pid_after, 0.1), range(4), **cluster.address)))
            return len(pids) == 2

        wait_until(both_work, "work of both workers")
        node.signal(signal.SIGTERM)
        assert node.wait() == 0
        assert node.out.read_text().count("main") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="fork is the default on Linux")
@pytest.mark.parametrize("threads", [0, 1])
def test_a_node_of_a_process_with_threads_forks_no_worker(tmp_path, threads):
    """Its workers are children of a fork server: no child has a copy of a lock that a thread held."""
    with Cluster(tmp_path) as cluster:
        node = cluster.start_script(textwrap.dedent(f"""
            import threading
            from achilles import run_node
            for _ in range({threads}):
                threading.Thread(target=threading.Event().wait, daemon=True).start()
            run_node(cpu_count=2)
            """))
        node.wait_for("CLIENT_ID: 0")
        parents = set(flat(map(lambda _: os.getppid(), range(4), **cluster.address)))
        assert (parents == {node.pid}) == (threads == 0)
        assert len(parents) == 1
        node.signal(signal.SIGTERM)
        assert node.wait() == 0
        assert "Warning" not in node.err.read_text()


HIDE = """
import ctypes, os, signal, socket
for module, name in ((os, "fork"), (os, "forkpty"), (os, "register_at_fork"), (os, "sched_getaffinity"),
                     (signal, "SIGCHLD"), (socket, "TCP_USER_TIMEOUT")):
    delattr(module, name)

class Library:
    def __init__(self, name, *_, **__):
        pass

ctypes.CDLL = Library
import multiprocess
multiprocess.get_all_start_methods = lambda: ["spawn"]
multiprocess.context._default_context.get_all_start_methods = multiprocess.get_all_start_methods
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is nothing to hide")
@pytest.mark.skipif(START_METHOD not in (None, "spawn"), reason="the other methods are hidden, too")
def test_nothing_that_only_unix_has_is_needed(tmp_path):
    """All processes run without fork, SIGCHLD, affinity, prctl and TCP_USER_TIMEOUT."""
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE)
    with Cluster(tmp_path, 2, paths=(tmp_path / "hide",)) as cluster:
        script = cluster.start_script(textwrap.dedent("""
            import os, socket, signal, tasks
            from achilles import map
            assert not hasattr(os, "fork") and not hasattr(signal, "SIGCHLD")
            hidden = lambda _: not (hasattr(os, "fork") or hasattr(signal, "SIGCHLD"))
            assert all(sum(map(hidden, range(4)), []))
            print(sum(map(tasks.square, range(100)), []) == [n ** 2 for n in range(100)])
            """))
        assert script.wait() == 0, script.err.read_text()
        assert script.out.read_text() == "True\n"
        cluster.nodes[0].signal(signal.SIGTERM)
        assert cluster.nodes[0].wait() == 0


def test_the_environment_of_nodes_names_no_secret(eight):
    assert SECRET not in "".join(environment().values())
    found = flat(map(lambda _: dict(os.environ), [0], **eight.address))
    assert not any(SECRET in value for value in found[0].values())


# What a chunk may expect, whatever it travels with.


def test_quick_calls_do_not_wait_for_the_slow_one_that_travels_with_them(eight):
    """3,000 instant calls say that a batch of hundreds is right; then one of them takes 4 s."""
    assert len(flat(map(tasks.square, range(3000), **eight.address))) == 3000

    def quick_but_one(number):
        tasks.never.wait(4 if number == 700 else 0)
        return number

    began, times = time.monotonic(), {}
    for packet in imap_unordered(quick_but_one, range(2000), **eight.address):
        times.update(dict.fromkeys(packet["RESULT"], time.monotonic() - began))
    assert times.keys() == set(range(2000)) and times.pop(700) >= 4
    assert max(time_ for number, time_ in times.items() if not 693 <= number <= 707) < 2.5, "half a second, alone"


def test_in_a_pool_1999_of_2000_come_at_once(eight):
    def quick_but_one(number):
        tasks.never.wait(4 if number == 700 else 0)
        return number

    with achilles.Pool(**eight.address) as pool:
        assert len(pool.map(tasks.square, range(3000))) == 3000
        began, times = time.monotonic(), {}
        for number in pool.imap_unordered(quick_but_one, range(2000)):
            times[number] = time.monotonic() - began
    assert times.keys() == set(range(2000)) and times.pop(700) >= 4
    assert max(times.values()) < 2.5, "half a second, alone"


@pytest.mark.parametrize("chunksize", [1, 3])
@pytest.mark.parametrize("slow", ["sleep", "c"])
def test_two_calls_of_one_map_that_wait_for_each_other_meet(eight, tmp_path, slow, chunksize):
    """Also where the worker that holds the other one back is in C code, which lets no thread of it run."""
    def meet(number):
        mine, other = 64 * (number // 64), 64 * (number // 64) + 1 + 2 * chunksize
        if number not in (mine, other):
            return number
        (tmp_path / f"{number}").touch()
        partner = tmp_path / f"{other if number == mine else mine}"
        until = time.monotonic() + 20
        while not partner.exists():
            assert time.monotonic() < until, f"{number} is alone"
            if slow == "c":
                sum(range(10**8))
            else:
                time.sleep(0.01)
        return number

    assert flat(map(tasks.square, range(3000), chunksize=chunksize, **eight.address)) == [n ** 2 for n in range(3000)]
    count = 60 if slow == "c" else 6 * 64  # some worker of the eight is always free
    assert flat(map(meet, range(count), chunksize=chunksize, **eight.address)) == [*range(count)]


def test_a_function_may_return_a_buffer_that_it_uses_again(eight, oracle):
    """In batches of many chunks, too: these calls are quick. A value may say that its bytes need no copy.

    A letter that changed after its digest was made is sent again, which nobody would see but for the calls.
    """
    class Uncopied:
        def __init__(self, buffer):
            self.buffer = buffer

        def __reduce_ex__(self, protocol):
            return bytes, (pickle.PickleBuffer(self.buffer),)

    def filled(number):
        tasks.record(oracle.path, number)
        buffer = filled.__dict__.setdefault("buffer", bytearray(50_000))
        buffer[:] = bytes([number % 256]) * len(buffer)
        return buffer if number % 2 else Uncopied(buffer)

    found = flat(map(filled, range(1000), **eight.address))
    assert [(each[0], each[-1], len(each)) for each in found] == [(n % 256, n % 256, 50_000) for n in range(1000)]
    assert sum(oracle.counts().values()) < 1050, "1,000, and perhaps a few twice"


def test_a_function_may_change_its_argument(eight):
    """The same object many times in args is another one in each chunk, as in multiprocessing."""
    def grow(things):
        things.append(len(things))
        return things

    shared = []
    for args in ([shared] * 500, iter([shared] * 500)):
        with achilles.Pool(**eight.address) as pool:
            assert pool.map(grow, args, chunksize=1) == [[0]] * 500
    assert shared == []


def test_a_death_among_quick_calls_charges_one_argument(eight, oracle):
    def touchy(number):
        if number == 1234:
            tasks.record(oracle.path, number)
            os._exit(3)
        return number

    assert len(flat(map(tasks.square, range(3000), **eight.address))) == 3000
    errors = []
    found = flat(map(touchy, range(3000), callback_error=errors.append, **eight.address))
    assert found == [None if n == 1234 else n for n in range(3000)]
    assert [(type(error), error.index) for error in errors] == [(achilles.WorkerLost, 1234)]
    assert oracle.counts() == {1234: 3}


def test_a_letter_over_a_lowered_limit_is_letter_too_large(eight, away, monkeypatch):
    monkeypatch.setattr("achilles.protocol.frames.LETTER_LIMIT_BYTES", 5000)
    with pytest.raises(achilles.LetterTooLarge, match=r"argument 1 has 6,\d+ bytes, no more than 5,000") as raised:
        map(len, [b"x", b"x" * 6000], **eight.address)
    assert raised.value.index == 1


@pytest.mark.parametrize("seed", [0, -7, 10**5000], ids=["0", "-7", "large"])
def test_any_seed_gives_the_same_numbers_each_time(eight, seed):
    def roll(_):
        return random.random()

    with achilles.Pool(**eight.address) as pool:
        first = pool.map(roll, range(20), chunksize=3, seed=seed)
        assert [*pool.imap(roll, range(20), seed=seed)] == first
        assert pool.map(roll, range(20), seed=1) != first
    assert len(set(first)) == 20


def about_its_process(module):
    process = importlib.import_module(module)
    current, parent = process.current_process(), process.parent_process()
    record = logging.LogRecord("a", 20, "path", 1, "text", (), None)
    return {"name": current.name, "number": current._identity[-1], "pid": current.pid == os.getpid(),
            "parent": parent.pid == os.getppid() and parent.is_alive(), "children": process.active_children(),
            "log": record.processName, "daemon": current.daemon}


@pytest.mark.parametrize("module", ["multiprocessing", "multiprocess"])
def test_a_worker_has_a_name_a_number_and_a_parent_of_its_own(eight, module):
    found = [about for packet in map(about_its_process, [module] * 40, **eight.address) for about in packet]
    for about in found:
        assert about["number"] >= 1 and about["name"] == f"achilles-worker-{about['number']}"
        assert about["pid"] and about["children"] == [] and not about["daemon"]
        assert about["log"] == about["name"], "as multiprocessing tells logging"
        assert about["parent"] or START_METHOD == "forkserver"
    assert len({about["name"] for about in found}) > 1
