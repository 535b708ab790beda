"""ENCRYPT=yes, end to end: every way to ask for it, and what one hears where it is not to be had."""

from __future__ import annotations

import concurrent.futures
import signal
import subprocess
import sys

import pytest
from cluster import PYTHON, SECRET, USER, Cluster, environment, shown  # noqa: F401

import achilles
from achilles import configuring
from achilles.errors import ConfigurationError, ProtocolError

needs_tls = pytest.mark.skipif(not configuring.can_encrypt(), reason="this Python cannot encrypt")
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("encrypted"), 2, encrypt=True) as made:
        yield made


@needs_tls
@pytest.mark.usefixtures("no_leftovers")
def test_every_call_takes_encrypt(cluster):
    address = cluster.address
    assert address.pop("encrypt") is True
    for way in (achilles.imap, achilles.imap_unordered):
        assert sum(len(packet["RESULT"]) for packet in way(abs, range(10), **address, encrypt=True)) == 10
    assert achilles.map(abs, [-1], **address, encrypt=True) == [[1]]
    with achilles.Pool(**address, encrypt=True) as pool:
        assert pool.map(abs, [-1, -2]) == [1, 2]
    with achilles.Executor(**address, encrypt=True) as executor:
        assert executor.submit(abs, -3).result() == 3
    assert len(achilles.cluster_status(**address, encrypt=True)["nodes"]) == 1
    with pytest.raises(ProtocolError, match="ENCRYPT=yes here"):
        achilles.cluster_status(**address)


@needs_tls
def test_letters_of_100_mb_and_many_small_ones_travel_encrypted(cluster):
    big = bytes(range(256)) * 400_000
    assert achilles.map(lambda text: text[::-1], [big], **cluster.address) == [[big[::-1]]]
    found = achilles.map(lambda n: n + 1, range(20_000), **cluster.address)
    assert sum(found, []) == list(range(1, 20_001))


@needs_tls
@pytest.mark.parametrize("how", ["option", "environment", "file"])
def test_a_node_and_a_status_are_told_to_encrypt_in_three_ways(cluster, tmp_path, how):
    text = f"HOST=127.0.0.1\nPORT={cluster.port}\nUSERNAME={USER}\nSECRET_KEY='{SECRET}'\n"
    file = tmp_path / "env"
    file.touch(0o600)
    file.write_text(text + ("ENCRYPT=yes\n" if how == "file" else ""))
    options = ["--encrypt"] if how == "option" else []
    env = environment(ACHILLES_ENV_FILE=str(file)) | ({"ACHILLES_ENCRYPT": "yes"} if how == "environment" else {})
    done = run("server", "--status", *options, env=env)
    assert done.returncode == 0 and "nodes: 1" in done.stdout, done.stderr
    done = run("server", "--status", "--no-encrypt", env=env)
    assert done.returncode == 2 and "ENCRYPT=yes here" in done.stderr
    done = run("node", "--no-encrypt", env=env)
    assert done.returncode == 2 and "ENCRYPT=yes here" in done.stderr


@needs_tls
def test_kill_cluster_is_told_to_encrypt(tmp_path):
    with Cluster(tmp_path, 1, encrypt=True) as made:
        assert achilles.kill_cluster(True, **made.address)
        assert [process.wait() for process in (*made.nodes, made.server)] == [0, 0]


def run(command, *options, env):
    return subprocess.run(
        [*PYTHON, "-m", f"achilles.{command}", *options], env=env, capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL)


def test_write_config_turns_it_on_where_this_python_can_and_keeps_what_there_was(tmp_path):
    file = tmp_path / "env"
    env = environment(ACHILLES_ENV_FILE=str(file))
    can = "yes" if configuring.can_encrypt() else "no"
    for options, word in (([], can), (["--no-encrypt"], "no"), ([], "no"), (["--encrypt"], can), ([], can)):
        done = run("server", "--write-config", *options, env=env)
        assert f"ENCRYPT='{word}'\n" in file.read_text()
        if can == "no" and options == ["--encrypt"]:
            assert done.returncode == 2 and "Python 3.13" in done.stderr
        else:
            assert done.returncode == 0, done.stderr


@pytest.mark.skipif(configuring.can_encrypt(), reason="this Python can encrypt")
@pytest.mark.parametrize("command", ["server", "node"])
def test_a_python_that_cannot_encrypt_starts_nothing_and_says_so(tmp_path, command):
    options = ["--host", "127.0.0.1", "--port", "0", "--username", "u"]
    env = environment(ACHILLES_SECRET_KEY=SECRET, ACHILLES_ENV_FILE=str(tmp_path / "none"))
    for way in (["--encrypt"], []):
        done = run(command, *options, *way, env=env | ({} if way else {"ACHILLES_ENCRYPT": "yes"}))
        assert done.returncode == 2 and not done.stdout
        assert "this Python cannot do it: it takes Python 3.13 or later" in done.stderr


def test_a_cluster_of_this_process_does_not_encrypt(tmp_path):
    with pytest.raises(ConfigurationError, match="does not encrypt: leave encrypt out"):
        achilles.map(abs, [-1], host="local", encrypt=True)
    script = tmp_path / "script.py"
    script.write_text("import achilles\nif __name__ == '__main__':\n    print(achilles.map(abs, [-1], host='local'))\n")
    env = environment(ACHILLES_ENCRYPT="yes")  # meant for the clusters of others
    done = subprocess.run([*PYTHON, str(script)], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[[1]]\n", done.stderr


def test_an_executor_has_nothing_to_encrypt():
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        with pytest.raises(ValueError, match="cluster or on an executor"):
            achilles.map(abs, [-1], executor=executor, encrypt=True)


def test_a_script_in_a_local_cluster_finds_it_whatever_the_environment_says(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import achilles\nif __name__ == '__main__':\n    print(achilles.map(abs, [-1]))\n")
    done = subprocess.run(
        [sys.executable, "-m", "achilles.local", str(script)], env=environment(ACHILLES_ENCRYPT="yes"),
        capture_output=True, text=True, timeout=60)
    assert done.stdout == "[[1]]\n", done.stderr
