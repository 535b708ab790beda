"""output=: what functions print on real workers comes to the caller, in order, and in measure."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from cluster import PYTHON

import achilles
from achilles import LocalCluster, Pool, TaskTimeout, WorkerLost

pytestmark = pytest.mark.usefixtures("unconfigured")
MAPPINGS = ["map", "starmap", "map_async", "starmap_async", "imap", "imap_unordered"]


@pytest.fixture(scope="module")
def where():
    with LocalCluster(nodes=2, cpu_count=2) as cluster:
        yield {"host": cluster.host, "port": cluster.port, "username": cluster.username,
               "secret_key": cluster.secret_key}


def talk(x):
    print("first", x)
    print("second", x, file=sys.stderr)
    print("third", x, end="")
    return x


def flood(x):
    for number in range(20_000):
        print("line", number)
    return x


def lines_of(lines, index):
    return [text for text, at, _ in lines if at == index]


@pytest.mark.parametrize("chunksize", [1, 4])
@pytest.mark.parametrize("call", ["map", "imap", "imap_unordered"])
def test_every_line_comes_once_in_order_with_its_index_and_its_node(where, call, chunksize):
    lines = []
    more = where | {"chunksize": chunksize, "output": lambda *line: lines.append(line)}
    assert [*getattr(achilles, call)(talk, range(20), **more)]
    for index in range(20):
        assert lines_of(lines, index) == [f"first {index}", f"second {index}", f"third {index}"]
    assert len(lines) == 60 and {node for *_, node in lines} <= {0, 1}


def test_lines_come_before_the_result_of_their_argument(where):
    lines = []
    for packet in achilles.imap(talk, range(30), output=lambda *line: lines.append(line), **where):
        for index in range(packet["ARGS_COUNTER"], packet["ARGS_COUNTER"] + len(packet["RESULT"])):
            assert len(lines_of(lines, index)) == 3


@pytest.mark.parametrize("name", MAPPINGS)
def test_every_mapping_method_of_a_pool_takes_it(where, name):
    lines = []
    with Pool(**where) as pool:
        args = [(x,) for x in range(8)] if name.startswith("star") else range(8)
        found = getattr(pool, name)(talk, args, output=lambda *line: lines.append(line))
        found = found.get() if hasattr(found, "get") else [*found]
        assert sorted(found) == [*range(8)]
    assert sorted(lines_of(lines, 5)) == ["first 5", "second 5", "third 5"] and len(lines) == 24


def test_two_calls_of_one_function_do_not_mix_with_and_without(where, capfd):
    lines = []
    with Pool(**where) as pool:
        for output in (None, lambda *line: lines.append(line), None, False):
            assert pool.map(talk, range(3), output=output) == [0, 1, 2]
    assert len(lines) == 9


def test_true_writes_to_stderr_with_the_node(where, capsys):
    achilles.map(talk, [7], output=True, **where)
    shown = capsys.readouterr().err.splitlines()
    assert [line[6:] for line in shown if line.startswith("node ")] == [": first 7", ": second 7", ": third 7"]


def test_a_line_comes_while_its_function_runs(where):
    def wait(x):
        print("begun")
        time.sleep(1)
        return time.time()

    came = []
    [[ended]] = achilles.map(wait, [1], output=lambda *line: came.append(time.time()), **where)
    assert came[0] < ended - 0.3


def test_lists_of_lists_have_the_index_of_their_list(where):
    lines = []
    achilles.map(talk, [[1, 2], [3]], output=lambda *line: lines.append(line), **where)
    found = {(text, index) for text, index, _ in lines if "first" in text}
    assert found == {("first 1", 0), ("first 2", 0), ("first 3", 1)}


def test_a_flood_is_counted_and_delays_no_result(where):
    lines = []
    began = time.monotonic()
    assert achilles.map(flood, range(8), output=lambda *line: lines.append(line), **where)
    assert time.monotonic() - began < 20
    counts = [text for text, index, _ in lines if index is None]
    seen = len(lines) - len(counts)
    assert counts and all(text.endswith(" lines more") for text in counts)
    assert seen + sum(int(text.split()[0].replace(",", "")) for text in counts) == 8 * 20_000
    seconds = time.monotonic() - began
    assert sum(64 + len(text) for text, index, _ in lines if index is not None) <= 2 * (64 << 10) * (seconds + 2)


def test_what_the_initializer_prints_comes_too(where):
    lines = []
    with Pool(initializer=print, initargs=("set up",), **where) as pool:
        pool.map(abs, range(8), 1, output=lambda *line: lines.append(line))
    assert {text for text, *_ in lines} == {"set up"}


def test_the_last_words_before_a_death_and_a_time_limit_come(where):
    def die(x):
        print("I go")
        os._exit(3)

    def hang(x):
        print("I stay", end="\n")
        time.sleep(60)

    lines = []
    with pytest.raises(WorkerLost):
        achilles.map(die, [1], output=lambda *line: lines.append(line), **where)
    assert lines_of(lines, 0) == ["I go"] * 3
    with pytest.raises(TaskTimeout):
        achilles.map(hang, [1], timeout=0.5, output=lambda *line: lines.append(line), **where)
    assert lines_of(lines, 0)[3:] == ["I stay"]


def test_threads_and_forks_of_a_function(where):
    def spread(x):
        thread = threading.Thread(target=print, args=("thread",))
        thread.start()
        thread.join()
        if (child := os.fork()) == 0:
            print("of the child, on the node's own terminal")
            os._exit(0)
        return os.waitpid(child, 0)[1]

    lines = []
    assert achilles.map(spread, [1], output=lambda *line: lines.append(line), **where) == [[0]]
    assert [text for text, *_ in lines] == ["thread"]


def test_without_it_lines_go_to_the_nodes_own_streams():
    script = ("from achilles import LocalCluster, map\n"
              "if __name__ == '__main__':\n"
              "    with LocalCluster(1, 1) as c:\n"
              "        where = dict(host=c.host, port=c.port, username=c.username, secret_key=c.secret_key)\n"
              "        map(print, ['plain'], **where); map(print, ['mine'], output=True, **where)\n")
    done = subprocess.run([*PYTHON, "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "node 0: mine" in done.stderr and "node 0: plain" not in done.stderr and "mine" not in done.stdout


def test_bad_values_are_errors_before_anything_is_sent():
    for bad in (1, "yes", [print]):
        with pytest.raises(TypeError, match="output must be True, a function or None"):
            achilles.map(abs, [1], output=bad, host="localhost", port=1, username="a", secret_key="b" * 16)
    with ThreadPoolExecutor(1) as executor, pytest.raises(ValueError, match="output= is of workers of a node"):
        achilles.map(abs, [1], output=True, executor=executor)
