"""A cluster on one machine: what it is, that it is gone afterwards, and scripts that run against one."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import tasks
from cluster import PYTHON, Process, alive, children, descendants, environment
from conftest import SECONDS, in_a_child, wait_until

from achilles import ClusterKilled, LocalCluster, ServerUnreachable, cluster_status, imap, map  # noqa: A004
from achilles import local as module
from achilles.launch.child import share
from achilles.local import START_SECONDS, STOP_SECONDS
from achilles.node.cores import usable_cores

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")


@pytest.fixture
def local(no_leftovers):
    """One that is shared by nothing: the tests look at its processes."""
    with LocalCluster(nodes=2, cpu_count=1) as cluster:
        yield cluster


def address(cluster):
    return {name: getattr(cluster, name) for name in ("host", "port", "username", "secret_key")}


def start(tmp_path, source, *command, **popen):
    """A script that imports what the tests can; `command` comes before it."""
    file = tmp_path / "caller.py"
    file.write_text(textwrap.dedent(source))
    return Process(tmp_path, "caller", [*PYTHON, *command, str(file)], environment(), **popen)


# LocalCluster.


def test_its_attributes_and_a_map(local):
    assert local.host == "127.0.0.1"
    assert 0 < local.port < 65536
    assert len(local.nodes) == 2
    assert all(isinstance(process, subprocess.Popen) for process in (local.server, *local.nodes))
    assert str(local.secret_key) == "***"
    assert map(tasks.square, [1, 2, 3], **address(local)) == [[1], [4], [9]]
    nodes = cluster_status(**address(local))["nodes"]
    assert [node["cpu_count"] for node in nodes] == [1, 1]


def hashes(_):
    return os.getpid(), hash("text")


def test_texts_have_one_hash_in_all_processes_and_in_the_script(local, tmp_path):
    found = dict(sum(map(hashes, range(20), chunksize=1, **address(local)), []))
    assert len(found) == 2 and len(set(found.values())) == 1
    script = start(tmp_path, """
        import achilles
        print(sum(achilles.map(hash, ["text"] * 4), [hash("text")]))
    """, "-m", "achilles.local", "--nodes", "1")
    script.wait()
    assert len(set(json.loads(script.out.read_text()))) == 1


def put(both):
    shared, value = both
    shared[value] = value * value
    return dict(shared)


@pytest.mark.parametrize("module", ["multiprocessing", "multiprocess"])
def test_proxies_of_a_manager_of_this_machine_work_in_workers(local, module):
    with importlib.import_module(module).Manager() as manager:
        shared, queue, lock = manager.dict(), manager.Queue(), manager.Lock()
        assert map(put, [(shared, 3)], **address(local)) == [[{3: 9}]] and dict(shared) == {3: 9}

        def locked(n):
            with lock:
                queue.put(n)
            return queue

        found, = sum(map(locked, [5], **address(local)), [])
        assert found.get(timeout=SECONDS) == 5, "a proxy comes back, too"


def test_usable_cores_are_divided(no_leftovers):
    for count, shares in ((7, [3, 2, 2]), (1, [1, 1, 1]), (6, [2, 2, 2])):
        assert [share(count, 3, index) for index in range(3)] == shares
    with LocalCluster(nodes=2) as cluster:
        found = [node["cpu_count"] for node in cluster_status(**address(cluster))["nodes"]]
    assert sorted(found) == sorted(share(usable_cores(), 2, index) for index in range(2))


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"nodes": -1}, {"nodes": "2"}, {"nodes": True}, {"cpu_count": 0}])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LocalCluster(**wrong)


@needs_proc
def test_nothing_is_left_after_the_block(no_leftovers):
    with LocalCluster(nodes=1, cpu_count=2) as cluster:
        processes = [cluster.server.pid, *(node.pid for node in cluster.nodes)]
        processes += [pid for each in processes for pid in descendants(each)]
        settings = address(cluster)
    assert not any(alive(pid) for pid in processes)
    assert cluster.nodes == []
    with pytest.raises(ServerUnreachable):
        cluster_status(**settings)


def test_an_error_in_the_block_ends_it_too(no_leftovers):
    with pytest.raises(LookupError), LocalCluster(nodes=1, cpu_count=1) as cluster:
        server = cluster.server
        raise LookupError
    assert server.returncode == 0


def test_a_call_that_is_open_ends_with_the_cluster(no_leftovers):
    with LocalCluster(nodes=1, cpu_count=1) as cluster:
        packets = imap(time.sleep, [60], **address(cluster))
        wait_until(lambda: cluster_status(**address(cluster))["nodes"][0]["busy"], "the call in a worker")
        began = time.monotonic()
    assert time.monotonic() - began < STOP_SECONDS
    with pytest.raises(ClusterKilled):
        next(packets)


def test_it_ends_soon_without_its_server(no_leftovers):
    with LocalCluster(nodes=2, cpu_count=1) as cluster:
        cluster.server.kill()
        cluster.server.wait()
        began = time.monotonic()
    assert time.monotonic() - began < STOP_SECONDS


@needs_proc
def test_the_secret_is_on_no_command_line_and_in_no_environment(local):
    secret = local.secret_key.reveal().encode()
    for process in (local.server, *local.nodes):
        for pid in (process.pid, *descendants(process.pid)):
            for name in ("cmdline", "environ"):
                assert secret not in Path(f"/proc/{pid}/{name}").read_bytes()
    seen = map(lambda _: dict(os.environ), [0], **address(local))
    assert secret.decode() not in "".join(seen[0][0].values())


@needs_proc
def test_it_has_a_session_of_its_own(local):
    """So that Ctrl-C in a terminal does not reach it."""
    for process in (local.server, *local.nodes):
        assert os.getsid(process.pid) not in (os.getsid(0), 0)
        os.kill(process.pid, signal.SIGINT)
    assert map(tasks.square, [2], **address(local)) == [[4]]


def test_a_child_that_cannot_start_is_an_error(monkeypatch, no_leftovers, capfd):
    monkeypatch.setattr("achilles.local.CHILD", ("-c", "raise SystemExit(2)"))
    with pytest.raises(ServerUnreachable, match="ended with status 2 before it was ready"):
        LocalCluster(nodes=1, cpu_count=1).start()
    assert START_SECONDS >= 10


def test_a_child_that_is_never_ready_is_an_error(monkeypatch, no_leftovers):
    monkeypatch.setattr("achilles.local.CHILD", ("-c", "import threading; threading.Event().wait()"))
    monkeypatch.setattr("achilles.local.START_SECONDS", 0.5)
    with pytest.raises(ServerUnreachable, match=r"was not ready within 0\.5 s"):
        LocalCluster(nodes=1, cpu_count=1).start()


KILLED = """
    import os, sys, time
    from achilles import LocalCluster
    from cluster import descendants
    with LocalCluster(nodes=1, cpu_count=2) as cluster:
        deadline = time.monotonic() + 20
        while len(descendants(os.getpid())) < 4 and time.monotonic() < deadline:
            pass
        family = descendants(os.getpid())
        child = os.fork() if {fork} else os.getpid()
        if child:
            print(child, *family, "ready", flush=True)
        time.sleep(60)
        os._exit(0)
"""


@needs_proc
@pytest.mark.parametrize("fork", [False, True])
def test_it_is_gone_soon_after_its_caller_is_killed(tmp_path, no_leftovers, fork):
    """Also where a forked child of the caller lives on, and holds all descriptors open."""
    caller = start(tmp_path, KILLED.format(fork=fork))
    child, *cluster = [int(pid) for pid in caller.wait_for(r"([\d ]+) ready")[1].split()]
    caller.kill()
    assert len(cluster) >= 4
    wait_until(lambda: not any(map_alive(cluster)), f"the end of {cluster}", 10)
    assert alive(child) == fork
    if fork:
        os.kill(child, signal.SIGKILL)


@needs_proc
def test_where_stdin_cannot_be_polled_it_is_gone_too(tmp_path, no_leftovers):
    """As on Windows: there a child cannot poll a pipe, and its parent's id stays the same when the parent dies."""
    source = KILLED.format(fork=False)
    child = "import achilles.launch.child as it; it.POLLS_STDIN = False; it.main()"
    patch = f"    import achilles.local\n    achilles.local.CHILD = ('-c', {child!r})\n"
    source = source.replace("    with LocalCluster", f"{patch}    with LocalCluster")
    caller = start(tmp_path, source)
    _, *cluster = [int(pid) for pid in caller.wait_for(r"([\d ]+) ready")[1].split()]
    assert len(cluster) >= 4
    caller.kill()
    wait_until(lambda: not any(map_alive(cluster)), f"the end of {cluster}", 10)


def map_alive(pids):
    return [alive(pid) for pid in pids]


# host="local".

EMBEDDED = """
    import os
    from achilles import cluster_status, imap, imap_unordered, map
    from cluster import children
    assert sum(map(lambda x: -x, range(5), host="local"), []) == [0, -1, -2, -3, -4]
    before = children(os.getpid())
    assert len(before) == 2
    assert [n for p in imap(lambda x: x, range(5), host="local") for n in p["RESULT"]] == list(range(5))
    assert sorted(n for p in imap_unordered(lambda x: x, range(5), host="local") for n in p["RESULT"]) == list(range(5))
    assert len(cluster_status(host="local")["nodes"]) == 1
    assert children(os.getpid()) == before
    print(*before, flush=True)
"""


@needs_proc
def test_the_embedded_cluster_is_one_a_process(tmp_path, no_leftovers):
    caller = start(tmp_path, EMBEDDED)
    assert caller.wait() == 0, caller.err.read_text()
    assert "atexit" not in caller.err.read_text(), caller.err.read_text()
    pids = [int(pid) for pid in caller.out.read_text().split()]
    assert not any(map_alive(pids))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_that_is_forked_while_the_embedded_cluster_starts_has_its_own(monkeypatch):
    """The thread that holds the lock is the parent's alone."""
    starts, go = threading.Event(), threading.Event()

    def start_embedded(pid):
        if pid == parent:
            starts.set()
            go.wait(SECONDS)
        return "a cluster"

    parent = os.getpid()
    monkeypatch.setattr(module, "_start_embedded", start_embedded)
    thread = threading.Thread(target=module.embedded)
    thread.start()
    assert starts.wait(SECONDS)
    try:
        assert in_a_child(module.embedded) == "a cluster"
    finally:
        go.set()
        thread.join()


# python -m achilles.local.

SCRIPT = """
    import json, os, signal, sys
    from achilles import cluster_status, map
    import beside
    if __name__ == "__main__":
        found = sum(map(beside.triple, [1, 2]), [])
        nodes = cluster_status()["nodes"]
        print(json.dumps([sys.argv[1:], found, [node["cpu_count"] for node in nodes]]))
        if sys.argv[1:] == ["die"]:
            os.kill(os.getpid(), signal.SIGTERM)
        sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(("arguments", "status"), [(("0", "--nodes", "7"), 0), (("5",), 5), (("die",), 143)])
def test_a_script_runs_with_its_folder_arguments_and_status(tmp_path, no_leftovers, arguments, status):
    (tmp_path / "beside.py").write_text("def triple(x):\n    return 3 * x\n")
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(SCRIPT))
    command = [*PYTHON, "-m", "achilles.local", "--nodes", "1", "--cpu-count", "2", str(file), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    if status == 143:
        return
    assert json.loads(done.stdout) == [list(arguments), [3, 6], [2]]


def test_wrong_options_of_the_command_exit_with_2(tmp_path):
    command = [sys.executable, "-m", "achilles.local", "--nodes", "0", "x.py"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "nodes" in done.stderr


@needs_proc
def test_ctrl_c_reaches_the_script_and_not_the_cluster(tmp_path, no_leftovers):
    """As a terminal does: SIGINT for the whole process group of the command."""
    source = """
        import tasks, time
        from achilles import map
        try:
            print("begun", flush=True)
            map(lambda n: time.sleep(0.5), range(1000))
        except KeyboardInterrupt:
            print(map(tasks.square, [3]), flush=True)
            raise SystemExit(7)
    """
    options = ("--nodes", "1", "--cpu-count", "1")
    command = start(tmp_path, source, "-m", "achilles.local", *options, start_new_session=True)
    command.wait_for("begun")
    wait_until(lambda: "successful" in command.err.read_text(), "the connection")
    family = {command.pid, *descendants(command.pid)}
    os.killpg(command.pid, signal.SIGINT)
    assert command.wait() == 7, command.err.read_text()
    assert "[[9]]" in command.out.read_text()
    wait_until(lambda: not any(map_alive(family)), "the end of all", 5)
    assert not set(children(os.getpid())) & family


def test_a_signal_to_the_command_ends_its_script_too(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text("import signal\nprint('ready', flush=True)\nsignal.pause()\n")
    command = [sys.executable, "-m", "achilles.local", "--nodes", "1", "--cpu-count", "1", str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as it:
        assert it.stdout.readline() == "ready\n"
        it.terminate()
        assert it.wait(SECONDS) == 128 + signal.SIGTERM
        assert it.stdout.read() == "", "the script has it open no more"
