"""Nodes by ssh: what a hosts file may say, what goes wrong, and all of it against a real sshd."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import tasks
from cluster import PYTHON, Process, alive, descendants, environment
from conftest import SECONDS, wait_until
from sshd import Sshd

from achilles import LocalCluster, ServerUnreachable, cluster_status, imap, map  # noqa: A004
from achilles.launch import ssh
from achilles.launch.ssh import GREETING, read_hosts
from achilles.protocol.connect import CONNECT_SECONDS

GONE_SECONDS = CONNECT_SECONDS + 10  # a node that connects anew sees nothing else meanwhile
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")


def address(cluster):
    return {name: getattr(cluster, name) for name in ("host", "port", "username", "secret_key")}


def host(name, cores=None, python=None):
    return {"name": name, "cores": cores, "python": python}


def map_alive(pids):
    return [alive(pid) for pid in pids]


# The hosts.


@pytest.mark.parametrize(("line", "found"), [
    ("beta", host("beta")), ("  beta\t8  ", host("beta", "8")), ("8", host("8")),
    ("ann@10.0.0.2 16 # a comment", host("ann@10.0.0.2", "16")), ("ssh://ann@beta:22", host("ssh://ann@beta:22")),
    ("beta python=/opt/venv/bin/python", host("beta", python="/opt/venv/bin/python")),
    ("beta 8 python=~/a#b/python #", host("beta", "8", "~/a#b/python")),
])
def test_a_line_of_the_hosts(line, found):
    assert read_hosts(["# all of them", "", line, "\t# the end"]) == [found]


@pytest.mark.parametrize("line", [
    "-oProxyCommand=true", "beta 0", "beta -1", "beta 8.5", "beta 12345", "beta eight", "beta 8 8", "beta python=",
    "beta#x", "beta cores=8", "beta python=/a 8", "beta 8 python=/a b", "be\0ta", "beta python=/a\0b", "beta 8#",
])
def test_a_wrong_line_is_an_error_with_its_number(line, tmp_path):
    with pytest.raises(ValueError, match=r"^line 3 of the hosts must be `host \[cores\] \[python=PATH\]`, not "):
        LocalCluster(hosts=["alpha", "", line])
    if "\0" not in line:
        (tmp_path / "hosts").write_text(f"alpha\n\n{line}\n")
        with pytest.raises(ValueError, match="^line 3 of the hosts"):
            LocalCluster(hosts=tmp_path / "hosts")


def test_a_file_of_hosts_and_none(tmp_path):
    file = tmp_path / "hosts"
    with pytest.raises(ValueError, match="hosts cannot be read: No such file"):
        read_hosts(str(file))
    file.write_text("# nobody\n\n")
    for nobody in (file, str(file), [], ["# nobody"]):
        with pytest.raises(ValueError, match="the hosts name no host"):
            LocalCluster(hosts=nobody)
    file.write_text("\ufeffalpha 2\r\nbeta\r\n")
    assert read_hosts(file) == [host("alpha", "2"), host("beta")]
    with pytest.raises(TypeError):
        LocalCluster(hosts=[8])


@pytest.mark.parametrize("command", [[], "ssh -p 22", ["/nowhere/ssh"], [""]])
def test_a_command_that_is_no_program(command):
    with pytest.raises(ValueError, match="the first of them a program on this machine, not "):
        LocalCluster(hosts=["alpha"], ssh_command=command)


# An ssh of our own, for what a real one does seldom.

FAKE = """
    import os, sys, time
    tunnel, host, command = sys.argv[sys.argv.index("-R") + 1], *sys.argv[-2:]
    with open(__file__ + ".said", "a") as file:
        print(sys.argv[1:], file=file)
    if host == "refused":
        sys.exit("ssh: connect to host refused port 22: Connection refused\\x1b\\a")
    if host == "asleep":
        time.sleep(600)
    print("Welcome!\\n0\\nAllocated port 1 for remote forward to 127.0.0.1:1\\r", flush=True)
    sys.stderr.write("A banner without an end. ")
    sys.stderr.write(f"Allocated port {tunnel.split(':')[-1]} for remote forward to {tunnel[2:]}\\r\\n")
    if host == "shell":  # of a login that runs another program than it was told to
        print("0\\n$ achilles is a host of mine\\nachilles 0.0.1 for Python 3.0", flush=True)
        open(__file__ + ".heard", "wb").write(os.read(0, 1000))
    if host == "older":
        command = command.replace("'achilles ", "'achilles 9")
    print("0\\n$ ", end="", flush=True)
    os.execvp("sh", ["sh", "-c", command])
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # what is installed on its hosts
    file = tmp_path / "fake_ssh.py"
    file.write_text(textwrap.dedent(FAKE))
    return [sys.executable, str(file), "-p", "2222"]


def test_nodes_with_their_cores_beside_one_of_this_machine(fake, no_leftovers, capfd):
    hosts = ["good", "# the next is good, too", f"good 3 python={sys.executable}"]
    with LocalCluster(nodes=1, cpu_count=2, hosts=hosts, ssh_command=fake) as cluster:
        assert [type(node).__name__ for node in cluster.nodes] == ["Popen", "SshNode", "SshNode"]
        counts = [node["cpu_count"] for node in cluster_status(**address(cluster))["nodes"]]
        assert sorted(counts) == [2, 2, 3]
        found = sum(map(lambda text: (hash(text), os.getppid()), ["text"] * 40, **address(cluster)), [])
        assert len({number for number, _ in found}) == 1, "texts have one hash in all processes"
        map(lambda _: os.write(1, b"from a worker\n"), [0] * 20, **address(cluster))
        nodes = list(cluster.nodes)
    assert [node.returncode for node in nodes] == [0, 0, 0] and cluster.nodes == []
    said = capfd.readouterr().err
    assert "good: from a worker\n" in said and "Welcome!" not in said and "Allocated" not in said


def test_the_options_of_the_command_come_before_ours(fake, no_leftovers):
    with LocalCluster(hosts=["good 1"], ssh_command=fake) as cluster:
        said = Path(f"{fake[1]}.said").read_text()
    assert said.startswith("['-p', '2222', '-T', '-oBatchMode=yes'")
    assert f"'-R', '0:127.0.0.1:{cluster.port}', 'good', \"env PYTHONHASHSEED=" in said
    assert cluster.secret_key.reveal() not in said


def test_a_host_that_fails_is_left_out_and_named_with_the_words_of_ssh(fake, no_leftovers, caplog):
    with LocalCluster(hosts=["refused", "good 1", "refused"], ssh_command=fake) as cluster:
        assert len(cluster.nodes) == 1
        assert map(tasks.square, [3], **address(cluster)) == [[9]]
    warning, = [record for record in caplog.records if record.name == "achilles.launch.ssh"]
    assert warning.levelno == logging.WARNING
    lines = warning.getMessage().splitlines()
    assert lines[0].startswith("2 of 3 hosts have no node")
    assert lines[1:3] == ["refused: ssh: connect to host refused port 22: Connection refused"] * 2
    assert "`ssh HOST true`" in lines[3]


def test_hosts_that_all_fail_are_an_error_that_names_each(fake, tmp_path, no_leftovers):
    bare = tmp_path / "bare"
    bare.write_text(f"#!/bin/sh\nexec {sys.executable} -I -S \"$@\"\n")
    bare.chmod(0o700)
    hosts = ["refused", "older", f"good python={bare}", "good python=/nowhere/python"]
    with pytest.raises(ServerUnreachable) as error:
        LocalCluster(hosts=hosts, ssh_command=fake).start()
    head, refused, older, without, nowhere, remedy = str(error.value).splitlines()
    assert head.startswith("4 of 4 hosts have no node")
    assert refused.startswith("refused: ssh: connect")
    assert f"the host has {GREETING}, the caller has achilles 9" in older
    assert without.startswith("good: ") and "No module named 'achilles'" in without
    assert nowhere.startswith("good: ") and "/nowhere/python" in nowhere and "No such file" in nowhere
    assert GREETING in remedy and "python=PATH" in remedy


def test_a_host_that_is_never_ready(fake, no_leftovers, monkeypatch):
    monkeypatch.setattr(ssh, "START_SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(ServerUnreachable, match=r"1 of 1 hosts have no node, after 1 s at most:\nasleep: not a word\n"):
        LocalCluster(hosts=["asleep"], ssh_command=fake).start()
    assert time.monotonic() - began < SECONDS


def test_nothing_but_the_right_achilles_gets_the_secret(fake, no_leftovers, monkeypatch):
    monkeypatch.setattr(ssh, "START_SECONDS", 2.0)
    with pytest.raises(ServerUnreachable, match="shell: .*achilles 0.0.1 for Python 3.0"):
        LocalCluster(hosts=["shell"], ssh_command=fake).start()
    assert Path(f"{fake[1]}.heard").read_bytes() == b""


def test_ctrl_c_while_hosts_are_awaited_leaves_nothing(fake, no_leftovers, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("concurrent.futures.wait", interrupted)
    monkeypatch.setattr("achilles.local.STOP_SECONDS", 1.0)
    cluster = LocalCluster(hosts=["good 1", "asleep"], ssh_command=fake)
    with pytest.raises(KeyboardInterrupt):
        cluster.start()
    assert cluster.nodes == []


COMMANDS = [
    (["alpha eight"], "ssh", 2, "line 1 of the hosts must be"), (["alpha"], "'", 2, "--ssh-command"),
    (["alpha"], "/nowhere/ssh", 2, "a program on this machine"),
    (["refused"], "FAKE", 1, "refused: ssh: connect"), (["good 2"], "FAKE", 7, ""),
]


@pytest.mark.parametrize(("lines", "command", "status", "text"), COMMANDS)
def test_the_command(fake, tmp_path, no_leftovers, lines, command, status, text):
    (tmp_path / "hosts").write_text("\n".join(lines))
    (tmp_path / "script.py").write_text(
        "from achilles import map\nprint(map(abs, [-1, -2]))\nraise SystemExit(7)\n")
    done = subprocess.run(
        [*PYTHON, "-m", "achilles.local", "--hosts", str(tmp_path / "hosts"), "--ssh-command",
         command.replace("FAKE", " ".join(fake)), str(tmp_path / "script.py")],
        env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert text in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ("[[1, 2]]\n" if status == 7 else "")


# A real sshd.


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Sshd(tmp_path_factory.mktemp("sshd")) as it:
        yield it


@pytest.fixture
def sshd(server, no_leftovers):
    yield server
    server.wait_alone()


@needs_proc
def test_a_map_on_two_hosts_that_are_gone_with_the_block(sshd):
    with LocalCluster(hosts=["alpha 2", f"beta python={sys.executable}"], ssh_command=sshd.client) as cluster:
        counts = {node["cpu_count"] for node in cluster_status(**address(cluster))["nodes"]}
        assert 2 in counts and len(cluster.nodes) == 2
        found = sum(map(lambda n: (n * n, os.environ["FROM_SSH"], os.getcwd()), range(50), **address(cluster)), [])
        assert found == [(n * n, "yes", os.path.expanduser("~")) for n in range(50)]
        there = [pid for pid in sshd.family() if b"achilles.launch.ssh" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(there) >= 5, "nodes and workers"
    assert not any(map_alive(there))


@needs_proc
def test_the_secret_is_in_no_command_line_and_no_environment(sshd):
    with LocalCluster(nodes=1, cpu_count=1, hosts=["alpha 2"], ssh_command=sshd.client) as cluster:
        secret = cluster.secret_key.reveal()
        seen = sum(map(lambda _: dict(os.environ), range(20), **address(cluster)), [])
        assert {"FROM_SSH" in each for each in seen} == {True, False}
        assert secret not in str(seen)
        looked = []
        for process in Path("/proc").glob("[0-9]*"):
            for name in ("cmdline", "environ"):
                try:
                    text = (process / name).read_bytes()
                except OSError:  # another user's, or it has ended
                    continue
                assert secret.encode() not in text, f"{process}/{name}"
                looked.append(int(process.name))
        assert {*sshd.family(), cluster.nodes[1].pid} <= {*looked}


@pytest.mark.parametrize(("name", "words"), [
    ("gamma", "ssh: connect to host 127.0.0.1 port .*: Connection refused"),
    ("stranger", "Host key verification failed"),
    ("confined", "remote port forwarding failed"),
    ("alpha python=/nowhere/python", "/nowhere/python.*: No such file"),
])
def test_a_host_that_fails_is_named_with_the_words_of_a_real_ssh(sshd, name, words):
    with pytest.raises(ServerUnreachable, match=f"{name.split()[0]}: .*{words}"):
        LocalCluster(hosts=[name], ssh_command=sshd.client).start()


KILLED = """
    import os, time, warnings
    from achilles import LocalCluster, map
    warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside the threads that read what ssh says
    with LocalCluster(hosts=["alpha 2", "beta 1"], ssh_command={client}) as cluster:
        child = os.fork() if {fork} else 1
        if child:
            print(child, cluster.server.pid, "are ready", flush=True)
            map(time.sleep, [60] * 3, host=cluster.host, port=cluster.port, username=cluster.username,
                secret_key=cluster.secret_key)
        time.sleep(60)
        os._exit(0)
"""


@needs_proc
@pytest.mark.parametrize("how", ["the caller", "the caller and its server", "the caller, not its child"])
def test_all_nodes_end_soon_after_the_caller_is_killed(sshd, tmp_path, how):
    """Also where the server cannot tell them, and where a forked child of the caller holds the pipes to ssh open."""
    file = tmp_path / "caller.py"
    file.write_text(textwrap.dedent(KILLED.format(client=sshd.client, fork="child" in how)))
    caller = Process(tmp_path, "caller", [*PYTHON, str(file)], environment())
    child, server = (int(pid) for pid in caller.wait_for(r"(\d+) (\d+) are ready").groups())
    wait_until(lambda: len(sshd.family()) >= 7, "nodes and workers")
    family = {*descendants(caller.pid), *sshd.family()} - {child}
    if "server" in how:
        os.kill(server, signal.SIGKILL)
    caller.kill()
    wait_until(lambda: not any(map_alive(family)), lambda: f"the end of {family}", GONE_SECONDS)
    if "child" in how:
        assert alive(child)
        os.kill(child, signal.SIGKILL)


@needs_proc
def test_all_nodes_end_soon_after_the_command_is_killed(sshd, tmp_path):
    (tmp_path / "hosts").write_text("alpha 2\nbeta 1\n")
    (tmp_path / "script.py").write_text("import time\nfrom achilles import map\nmap(time.sleep, [60] * 3)\n")
    command = Process(tmp_path, "command", [
        *PYTHON, "-m", "achilles.local", "--hosts", str(tmp_path / "hosts"), "--ssh-command", " ".join(sshd.client),
        str(tmp_path / "script.py")], environment())
    wait_until(lambda: len(sshd.family()) >= 7, "nodes and workers")
    wait_until(lambda: "successful" in command.err.read_text(), "the script's connection")
    family = [*descendants(command.pid), *sshd.family()]
    command.kill()
    wait_until(lambda: not any(map_alive(family)), lambda: f"the end of {family}", GONE_SECONDS)
    assert "ClusterKilled" in command.err.read_text()


@needs_proc
def test_a_job_goes_on_when_a_host_is_lost(sshd, capfd):
    with LocalCluster(hosts=["alpha 1", "beta 1"], ssh_command=sshd.client) as cluster:
        packets = imap(lambda n: (tasks.never.wait(0.05), n)[1], range(60), **address(cluster))
        assert next(packets)["RESULT"] == [0]
        lost = sshd.family()
        sessions = [pid for pid in lost if b"sshd" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        its = descendants(sessions[0])
        for pid in {sessions[0], *its} & {*sessions}:
            os.kill(pid, signal.SIGKILL)
        assert [n for packet in packets for n in packet["RESULT"]] == list(range(1, 60))
        wait_until(lambda: not any(map_alive(its)), "the end of the node that was lost", GONE_SECONDS)
        wait_until(lambda: [node.poll() for node in cluster.nodes].count(None) == 1, "the end of its ssh")
    assert "closed by remote host" in capfd.readouterr().err
