"""The secret of a running cluster is changed as docs/cluster.md says, while a job runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from cluster import Cluster, Oracle
from conftest import wait_until
from pages import section

import achilles
from achilles import config
from achilles.errors import AuthenticationError

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the server is told by SIGHUP")

# It takes its results one by one, and ends with all of them; each call waits until a file says that it may go on.
JOB = """
import os, sys, tasks
from achilles import imap
oracle, gate = sys.argv[1:]

def work(number):
    tasks.record(oracle, number)
    while number >= 40 and not os.path.exists(gate):
        tasks.never.wait(0.02)
    return number

for packet in imap(work, range(80)):
    print(*packet["RESULT"], flush=True)
"""


def steps():
    """The commands of the page's walk, in their order."""
    walk = section("docs/cluster.md", "Changing the secret")
    return [re.sub("^ *", "", text, flags=re.M) for text in re.findall(r"```sh\n(.*?)```", walk, re.S)]


@pytest.mark.parametrize("file", [
    "SECRET_KEY=the first of them\n", "HOST=127.0.0.1\nexport SECRET_KEY=the first of them\nPORT=9999\n",
    " SECRET_KEY = 'the first of them'\nUSERNAME=ann\n", "\texport \tSECRET_KEY\t=\tthe first of them # mine\nPORT=1",
    "PORT=1\nSECRET_KEY=the first of them", "MY_SECRET_KEY=x\n# SECRET_KEY=\nSECRET_KEY=the first of them\n",
    "SECRET_KEY=the first of them\n export PREVIOUS_SECRET_KEY = one that was forgotten"])
def test_the_walk_takes_whatever_a_file_may_say(tmp_path, file):
    """Every form of a line that is read is changed, and nothing else is; without a line end after the last one, too."""
    tmp_path.joinpath("python").symlink_to(sys.executable)
    path = tmp_path / "cluster.env"
    path.write_text(file)
    path.chmod(0o600)
    before = config.read_file(path)
    before.pop("PREVIOUS_SECRET_KEY", None)

    def do(step):
        subprocess.run(["bash", "-ec", step.replace("kill -HUP PID", "true")], cwd=tmp_path, check=True, timeout=30,
                       env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
        return config.read_file(path)

    make_new, remove_old, _ = steps()
    both = do(make_new)
    assert both["PREVIOUS_SECRET_KEY"] == before["SECRET_KEY"] == "the first of them" != both["SECRET_KEY"]
    assert len(both["SECRET_KEY"]) >= 43 and both.items() >= before.items() - {("SECRET_KEY", "the first of them")}
    assert do(remove_old) == before | {"SECRET_KEY": both["SECRET_KEY"]}
    assert "the first of them" not in path.read_text() and path.stat().st_mode & 0o777 == 0o600
    kept = [line for line in file.splitlines() if "MY_" in line or line.startswith("#")]
    assert [line for line in path.read_text().splitlines() if line in kept] == kept
    assert {each.name for each in tmp_path.iterdir()} == {"python", "cluster.env"}


def test_a_secret_is_changed_without_losing_a_job(tmp_path):
    tmp_path.joinpath("bin").mkdir()
    tmp_path.joinpath("bin", "python").symlink_to(sys.executable)
    with Cluster(tmp_path) as cluster:
        oracle, gate = Oracle(tmp_path), tmp_path / "gate"
        files = [tmp_path / name for name in ("cluster.env", "beta.env", "gamma.env", "caller.env")]
        first = config.read_file(cluster.env_file)["SECRET_KEY"]
        server_file, *others = files

        def copy(*to):
            for file in to:
                shutil.copy(server_file, file)  # with its mode, as scp -p

        def do(step):
            path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
            subprocess.run(["bash", "-ec", step.replace("PID", str(cluster.server.pid))], cwd=tmp_path, check=True,
                           env=cluster.env | {"PATH": path}, timeout=30)

        def says(text):
            wait_until(lambda: text in cluster.server.err.read_text(), f"{text!r} in the server's log")

        def let_in(secret):
            address = cluster.address | {"secret_key": secret}
            return len(achilles.cluster_status(**address)["nodes"])

        cluster.server.kill()
        shutil.copy(cluster.env_file, server_file)
        cluster.env_file = server_file
        cluster.env["ACHILLES_ENV_FILE"] = str(server_file)
        cluster.server = cluster._run("server", "-m", "achilles.server", "--env-file", "cluster.env", cwd=tmp_path)
        cluster.server.wait_for("Listening for connections")
        copy(*others)
        nodes = [cluster.start_node(2, "--env-file", str(file)) for file in others[:2]]
        cluster.env["ACHILLES_ENV_FILE"] = str(others[2])
        job = cluster.start_script(JOB, oracle.path, str(gate))
        oracle.wait_for(42)  # all those that do not wait, and two that do

        make_new, remove_old, restart = steps()
        do(make_new)
        says("the secret is a new one, the previous one good as well")
        second = config.read_file(server_file)["SECRET_KEY"]
        assert second != first and let_in(first) == let_in(second) == 2
        copy(*others)
        do(remove_old)
        says("no other one good")
        assert first not in server_file.read_text() and not (tmp_path / "cluster.env.old").exists()
        assert let_in(second) == 2
        with pytest.raises(AuthenticationError):
            let_in(first)
        assert job.popen.poll() is None and all(node.popen.poll() is None for node in nodes), "a connection was lost"

        # Whoever has only the old one in mind is refused when it comes again, reads its file, and is in.
        assert "systemctl restart" in restart
        cluster.server.signal(signal.SIGTERM)
        assert cluster.server.wait() == 0
        cluster.env["ACHILLES_ENV_FILE"] = str(server_file)
        cluster.server = cluster._run("server", "-m", "achilles.server", "--env-file", "cluster.env", cwd=tmp_path)
        wait_until(lambda: let_in_safely(let_in, second) == 2, "both nodes, with the new secret")
        gate.touch()
        assert job.wait() == 0
        with pytest.raises(AuthenticationError):
            let_in(first)
        numbers = [int(word) for word in job.out.read_text().split()]
        assert numbers == list(range(80)), "each result once, in its place"
        said = "".join(process.err.read_text() + process.out.read_text() for process in cluster.processes)
        assert first not in said and second not in said


def let_in_safely(let_in, secret):
    """0 while the server is not there yet."""
    try:
        return let_in(secret)
    except ConnectionError:
        return 0
