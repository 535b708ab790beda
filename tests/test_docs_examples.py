"""The examples of README.md and docs/: each script, command and log prints what its page says."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from ast import literal_eval
from pathlib import Path

import pytest
from conftest import wait_until
from pages import PAGES, ROOT, block, blocks, examples, section
from ports import free_port

import achilles
from achilles import console

SCRIPT_SECONDS = 30  # below the test's own limit, so that what hangs is shown
SHELL_SECONDS = 90  # the same, for scripts that start a cluster, and wait for a server that was killed
PYTHON = [sys.executable, "-W", "error"]
PACKAGE = Path(achilles.__file__).parent.parent


class Cluster:
    """A server and a node of eight workers, as the pages start them, at `port` instead of 9999."""

    def __init__(self, folder):
        self.folder = folder
        self.port = free_port()
        env_file = str(folder / "cluster.env")
        self.environment = clean_environment() | {"ACHILLES_ENV_FILE": env_file}
        self.run("-m", "achilles.server", "--write-config", "--port", str(self.port), "--env-file", env_file)
        self.server, self.server_says = self.start("server", lines=2)
        self.node, self.node_says = self.start("node", "--cpu-count", "8", lines=4)
        self.killed = False

    def start(self, role, *options, lines):
        """The process, and its first lines."""
        with open(self.folder / f"{role}.log", "wb") as log:
            process = subprocess.Popen(
                [*PYTHON, "-m", f"achilles.{role}", "--log-level", "debug", *options], stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=log, text=True, env=self.environment, cwd=self.folder)
        return process, "".join(process.stdout.readline() for _ in range(lines))

    def run(self, *arguments):
        """What a script or command printed: (stdout, stderr); it must end with status 0."""
        done = subprocess.run([*PYTHON, *map(str, arguments)], env=self.environment, cwd=self.folder, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=SCRIPT_SECONDS)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    def run_script(self, text):
        path = self.folder / "script.py"
        path.write_text(text)
        return self.run(path)

    def stop(self):
        if not self.killed:
            self.node.terminate()
        assert self.node.wait(SCRIPT_SECONDS) == 0
        self.server.send_signal(signal.SIGKILL if self.killed else signal.SIGTERM)  # it would stay for ten seconds
        self.server.wait(SCRIPT_SECONDS)
        for process in (self.server, self.node):
            process.stdout.close()


def clean_environment():
    """Ours, without what names a cluster; the package can be imported."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ACHILLES_")}
    return clean | {"PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH", "")]))}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        made = Cluster(tmp_path_factory.mktemp("pages"))
        stack.callback(made.stop)
        yield made


SHOWN = [*examples()]
RUN = [each for each in SHOWN if "kill_cluster" not in each[1]]


def test_all_examples_are_found():
    assert len(RUN) == 17 and len(SHOWN) == 18
    printed = [language for page in PAGES for language, _ in blocks(page) if language.startswith("out")]
    assert len(printed) == len(SHOWN) + 2, "and what the server and the node print"


@pytest.mark.parametrize("page, script, how, expected", RUN, ids=[f"{page}-{n}" for n, (page, *_) in enumerate(RUN)])
def test_an_example_prints_what_its_page_says(cluster, page, script, how, expected):
    out, _ = cluster.run_script(script)
    if "unordered" in how:
        out, expected = sorted(out.splitlines()), sorted(expected.splitlines())
    assert out == expected


def test_server_and_node_print_what_the_pages_say(cluster):
    server, node = (block("docs/cluster.md", f"out {role}") for role in ("server", "node"))
    assert cluster.server_says == server.replace("9999", str(cluster.port))
    assert cluster.node_says == node.replace("9999", str(cluster.port))


def test_status_has_the_columns_that_the_pages_show(cluster):
    out, _ = cluster.run("-m", "achilles.server", "--status")
    shown = block("docs/cluster.md", "text")
    heads = [[line.split() for line in text.splitlines() if line.startswith("id ")] for text in (out, shown)]
    assert heads[0] == heads[1] != []


def test_the_status_has_the_fields_of_its_table(cluster):
    status = achilles.cluster_status(port=cluster.port, **settings(cluster.folder / "cluster.env"))
    found = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1]))
             for row in re.findall(r"^\| (`\w+`) \| (.*) \|$", section("docs/cluster.md", "cluster_status"), re.M)}
    node, = status["nodes"]
    assert found == {"nodes": node.keys(), "jobs": {*console.TABLES["jobs"]},
                     "server": status["server"].keys()}


def settings(env_file):
    """Host, username, secret and encryption of a file."""
    values = dict(line.split("=", 1) for line in env_file.read_text().splitlines() if "=" in line)
    found = {name.lower(): shlex.split(values[name])[0] for name in ("HOST", "USERNAME", "SECRET_KEY", "ENCRYPT")}
    return found | {"encrypt": found["encrypt"] == "yes"}


def normal(line):
    """A line of a log without what is another one in each run."""
    return re.sub(r"\d+", "N", re.sub(r"\b[0-9a-f]{16}\b", "H", line))


def logged(log):
    """The normalised lines of a log, without time, level and logger."""
    return {normal(re.sub(r"^.*?(DEBUG|INFO)[: ]achilles\.[\w.]+: ?", "", line)) for line in log.splitlines()}


def test_the_map_that_is_followed_logs_these_lines(cluster):
    text = section("docs/tour.md", "One map, followed")
    lines = "".join(re.findall(r"```log\n(.*?)```", text, re.DOTALL)).splitlines()
    assert len(lines) > 20
    missing = [line.split(None, 1) for line in lines]
    _, log = cluster.run_script(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    deadline = time.monotonic() + SCRIPT_SECONDS
    while missing and time.monotonic() < deadline:
        cluster.run("-m", "achilles.server", "--status")  # meanwhile server and node write the end of their logs
        kept = {"caller": logged(log)}
        kept |= {role: logged((cluster.folder / f"{role}.log").read_text()) for role in ("server", "node")}
        missing = [(role, line) for role, line in missing if normal(line) not in kept[role]]
    assert not missing


# The commands, in an empty folder, with machines and Slurm that are this machine.


@pytest.fixture
def machine(tmp_path):
    """A folder with the commands that the pages use: `python`, `scp` to this machine, `hostname`, and Slurm's."""
    commands = {
        "python": f'exec {shlex.join([*PYTHON])} "$@"',
        "scp": '[ "$1" = -p ] && exec cp -p "$2" "${3/:/-}"',
        "hostname": "echo 127.0.0.1",
        "srun": 'shift; "$@" & other=$!; "$@"; wait $other',  # a step of two tasks
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    (tmp_path / "square.py").write_text(block("README.md", "python", "square(number)"))
    return tmp_path


def shell(machine, text, **more):
    """Start a script of bash; all that it starts is of one process group."""
    environment = clean_environment() | {"PATH": f"{machine / 'bin'}:{os.environ['PATH']}"} | more
    return subprocess.Popen(["bash", "-c", text], cwd=machine, env=environment, stdin=subprocess.DEVNULL, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def finish(process):
    """What it printed. It must end by itself, with status 0."""
    late = threading.Timer(SHELL_SECONDS, os.killpg, [process.pid, signal.SIGKILL])
    late.start()
    out, err = process.communicate()
    late.cancel()
    late.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    return out, err


def test_the_first_map_runs_by_its_command(machine):
    command = block("README.md", "sh", "achilles.local --nodes")
    out, _ = finish(shell(machine, command))
    assert out == next(text for page, script, _, text in examples() if "square(number)" in script)


def test_three_machines_are_a_screenful_that_works(machine):
    alpha, node, caller = (text for language, text in blocks("README.md") if "192.168" in text or "cluster.env" in text)
    port = free_port()
    made = alpha.replace("192.168.1.10", f"127.0.0.1 --port {port}")
    first, _, last = made.rstrip().rpartition("\n")
    finish(shell(machine, first))
    started = [shell(machine, last)]
    started += [shell(machine, node.replace("cluster.env", f"{name}-cluster.env")) for name in ("beta", "gamma")]
    status = caller.splitlines()[1]

    def there():
        done = subprocess.run(["bash", "-c", status], cwd=machine, capture_output=True, text=True,
                              env=clean_environment() | {"PATH": f"{machine / 'bin'}:{os.environ['PATH']}"})
        return "nodes: 2" in done.stdout

    try:
        wait_until(there, "both nodes", SCRIPT_SECONDS)
        out, _ = finish(shell(machine, caller))
        assert out.startswith("server: version")
        assert sum(literal_eval(out.splitlines()[-1]), []) == [number ** 2 for number in range(1, 11)]
    finally:
        for process in reversed(started):
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=SHELL_SECONDS)


def test_the_slurm_job_runs_and_ends_with_its_cluster(machine):
    """`srun` starts two nodes here."""
    text = block("docs/cluster.md", "sh", "#SBATCH").replace("0.0.0.0", "127.0.0.1")
    job = free_port() - 20000  # below 0, where the port is below 20000
    out, _ = finish(shell(machine, text, SLURM_JOB_ID=str(job), SLURM_CPUS_PER_TASK="1"))
    assert re.search(r"nodes: [12]", out) and [line for line in out.splitlines() if line.startswith("[[1")]
    assert not [*machine.glob("*.env")]


def test_the_two_commands_are_those_of_ci():
    commands = [text.strip() for language, text in blocks("README.md") if language == "sh"]
    ci = (ROOT / ".ci/run").read_text()
    assert commands[:2] == [
        "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/python -m achilles.local examples/word_count.py",
        "pip install tox && tox"]
    for pattern in (r"-m venv ", r"pip\" install (--quiet )?\.$", r"-m achilles\.local .*examples/\$example\.py",
                    r"for example in .*word_count", r"^pip install (--quiet )?tox$", r"^tox$"):
        assert re.search(pattern, ci, re.MULTILINE), pattern
    tox = (ROOT / "tox.ini").read_text()
    assert "commands = pytest -n 4 --dist worksteal {posargs}" in tox
    for name, command in (("lint", "ruff check"), ("lint", "python tests/plain_words.py"), ("types", "mypy --strict")):
        assert re.search(rf"^\[testenv:{name}\]\n(?:(?!\[).*\n)*.*{command}", tox, re.MULTILINE), name


def test_kill_cluster_prints_what_its_page_says(cluster):
    (_, script, _, expected), = [each for each in SHOWN if "kill_cluster" in each[1]]
    cluster.killed = True
    out, _ = cluster.run_script(script)
    assert out == expected
    assert cluster.node.wait(SCRIPT_SECONDS) == 0
