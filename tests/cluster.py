"""Real servers, nodes and callers as processes of their own, and one record of what was run.

Every process writes to files of its own, is waited for by what it prints, with a deadline, and is ended
by its process id. A Cluster that ends checks that nothing of it is left.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ENCRYPT, START_METHOD, wait_until
from ports import free_port

import achilles

SECONDS = 30.0  # tells a hang from a wait
TESTS = Path(__file__).parent
PACKAGE = Path(achilles.__file__).parent
PYTHON = (sys.executable, "-W", "error")
USER, SECRET = "tests", "no secret at all, but long"


def environment(*paths: Path, **more: str) -> dict[str, str]:
    """Ours, without what would name a cluster; `paths`, the tests and the package can be imported.

    The tests in `dropin/` send functions of their own modules, by name.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("ACHILLES_")}
    path = [*map(str, (*paths, TESTS, TESTS / "dropin", PACKAGE.parent)), *filter(None, [own.get("PYTHONPATH")])]
    return own | {"PYTHONPATH": os.pathsep.join(path)} | more


def alive(pid: int) -> bool:
    """Whether this process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def children(pid: int) -> list[int]:
    """The processes that this one started and that still are its children."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(folder.name))
        except (OSError, IndexError):  # it has ended meanwhile
            pass
    return found


def workers(pid: int) -> list[int]:
    """The workers of a node: its children, but for those of multiprocess's own, and the children of its fork server."""
    found = []
    for child in children(pid):
        try:
            command = Path(f"/proc/{child}/cmdline").read_text()
        except OSError:  # it has ended meanwhile
            continue
        if "multiprocess.forkserver" in command:
            found += children(child)
        elif "multiprocess.resource_tracker" not in command:
            found.append(child)
    return found


def descendants(pid: int) -> list[int]:
    """Its children, and theirs."""
    return [each for child in children(pid) for each in (child, *descendants(child))]


class Process:
    """A command, its process, and two files with what it printed."""

    def __init__(self, folder: Path, name: str, command: list[str], env: dict[str, str], **popen: Any) -> None:
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        self.family: set[int] = set()  # all its processes that were ever seen
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.popen = subprocess.Popen(
                command, env=env, **{"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err} | popen)
        self.pid = self.popen.pid

    def wait_for(self, pattern: str, seconds: float = SECONDS) -> re.Match[str]:
        """Wait until its stdout holds a match."""
        def look() -> re.Match[str] | None:
            found = re.search(pattern, self.out.read_text())
            assert found or self.popen.poll() is None, f"it ended: {self.err.read_text()}"
            return found

        return wait_until(look, f"{self.out.name} says {pattern!r}", seconds)  # type: ignore[return-value]

    def workers(self, count: int) -> list[int]:
        """A node's, once there are so many."""
        return wait_until(lambda: found if len(found := workers(self.pid)) >= count else [], f"{count} workers")

    def signal(self, number: int) -> None:
        """Send it a signal; its process tree is remembered."""
        self.family |= {self.pid, *descendants(self.pid)}
        self.popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = SECONDS) -> int:
        """Its exit status."""
        return self.popen.wait(seconds)

    def check_family_gone(self, seconds: float = 5.0) -> None:
        """None of its processes is left."""
        wait_until(lambda: not any(map(alive, self.family)), f"the end of {self.out.stem}'s {self.family}", seconds)

    def show(self) -> None:
        """Print what it has said since it was shown last: pytest shows that of tests that failed."""
        for file in (self.out, self.err):
            text = file.read_text(errors="replace")
            print(f"--- {file.stem} {self.pid} ({self.popen.returncode}): {file.name}\n{text[-1500:]}")


class Cluster:
    """A server and nodes in processes of their own.

    :param nodes: the workers of each node.
    :param paths: folders that come first on the import path of all of them.
    """

    running: list[Cluster] = []  # all that are open; the last things they said are shown where a test fails

    def __init__(
        self, folder: Path, *nodes: int, start_method: str | None = None, paths: tuple[Path, ...] = (),
        encrypt: bool = ENCRYPT,
    ) -> None:
        self.folder = folder
        self.encrypt = encrypt
        self.env_file = folder / "env"
        self.env = environment(*paths, ACHILLES_ENV_FILE=str(self.env_file))
        self.port = free_port()
        self.processes: list[Process] = []
        self.nodes: list[Process] = []
        self._start_method = start_method or START_METHOD
        self._counts = nodes

    def __enter__(self) -> Cluster:
        Cluster.running.append(self)
        try:
            self.start_server()
            for node in [self.start_node(count, wait=False) for count in self._counts]:
                node.wait_for("CLIENT_ID: ")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        Cluster.running.remove(self)
        for process in self.processes:
            process.family |= {process.pid, *descendants(process.pid)}
        for process in reversed(self.processes):  # nodes first: they would look for their server
            if process.popen.poll() is None:
                process.kill()
        for process in self.processes:
            process.check_family_gone()

    @property
    def address(self) -> dict[str, Any]:
        """What the calls take."""
        return {"host": "127.0.0.1", "port": self.port, "username": USER, "secret_key": SECRET,
                "encrypt": self.encrypt}

    def start_server(self, *options: str) -> Process:
        """On the same port each time."""
        self._write_settings()
        self.server = self._run("server", "-m", "achilles.server", *options)
        self.port = int(self.server.wait_for(r"initiated at 127\.0\.0\.1:(\d+)\nListening for connections\.\.\.")[1])
        self._write_settings()
        return self.server

    def start_node(self, cpu_count: int, *options: str, wait: bool = True) -> Process:
        """A node; returns when it has joined."""
        method = ["--start-method", self._start_method] if self._start_method else []
        node = self._run("node", "-m", "achilles.node", "--cpu-count", str(cpu_count), *method, *options)
        self.nodes.append(node)
        if wait:
            node.wait_for("CLIENT_ID: ")
        return node

    def start_script(self, source: str | Path, *arguments: str, **popen: Any) -> Process:
        """A caller, or whatever else: a Python script with this cluster's address in its environment."""
        if isinstance(source, str):
            file = self.folder / f"script_{len(self.processes)}.py"
            file.write_text(source)
            source = file
        return self._run(source.stem, str(source), *arguments, **popen)

    def status(self) -> dict[str, Any]:
        return achilles.cluster_status(**self.address)

    def wait_idle(self, seconds: float = SECONDS) -> None:
        """Until no job is there and no worker is busy."""
        def idle() -> bool:
            status = self.status()
            return not status["jobs"] and not any(node["busy"] for node in status["nodes"])

        wait_until(idle, "a cluster without work", seconds)

    def _run(self, name: str, *command: str, **popen: Any) -> Process:
        process = Process(self.folder, f"{name}-{len(self.processes)}", [*PYTHON, *command], self.env, **popen)
        self.processes.append(process)
        return process

    def _write_settings(self) -> None:
        text = f"HOST=127.0.0.1\nPORT={self.port}\nUSERNAME={USER}\nSECRET_KEY='{SECRET}'\n"
        text += "ENCRYPT=yes\n" * self.encrypt
        with open(os.open(self.env_file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)


class Oracle:
    """What was run, where: each task appends `index pid` to one file (`tasks.record`)."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "oracle")
        Path(self.path).touch()

    def runs(self) -> list[tuple[int, int]]:
        """(index, pid) in the order of the calls."""
        lines = Path(self.path).read_text().splitlines()
        return [(int(index), int(pid)) for index, pid in map(str.split, lines)]

    def counts(self) -> Counter[int]:
        """index -> how often it was run."""
        return Counter(index for index, _ in self.runs())

    def wait_for(self, count: int) -> None:
        """Until so many calls have begun."""
        wait_until(lambda: len(self.runs()) >= count, f"{count} calls recorded")


@pytest.fixture(autouse=True)
def shown(no_leftovers: None) -> Iterator[None]:
    """What the processes of all clusters said, for pytest to show if the test fails; and nothing is left of it."""
    yield
    for cluster in Cluster.running:
        for process in cluster.processes:
            process.show()
