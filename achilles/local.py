"""A cluster on this machine: a real server and real nodes, for tests, notebooks and first steps.

::

    with LocalCluster(nodes=2) as cluster:                   python -m achilles.local script.py
        map(f, args, host=cluster.host, …)                   the script finds the cluster in its environment

`launch/child.py` is a child's side. The secret is random. It travels through stdin, never on a command line nor in an
environment. The caller derives the key for all processes, while these import their roles. The children have a session
of their own, so Ctrl-C interrupts the caller alone. The caller keeps no thread, but a thread for each ssh that runs a
node on another machine (`launch/ssh.py`).

This module knows processes. The children see the caller's end.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from .config import PREFIX, Secret, Settings
from .errors import ConfigurationError, ServerUnreachable
from .launch.child import HOST, USERNAME
from .protocol import auth

__all__ = ["LocalCluster", "embedded", "main"]

START_SECONDS = 30.0  # for all processes to be ready: a cold disk, a loaded machine
STOP_SECONDS = 5.0  # for all processes to end by themselves
OPTIONS: dict[str, dict[str, Any]] = {  # of the command
    "--nodes": {"type": int, "help": "how many nodes on this machine (2; with --hosts none)"},
    "--cpu-count": {"type": int, "help": "workers of each node; the usable cores are divided by default"},
    "--hosts": {"metavar": "FILE", "help": "nodes on other machines by ssh, a line each: host [cores] [python=PATH]"},
    "--ssh-command": {
        "metavar": "COMMAND", "type": shlex.split, "default": ["ssh"], "help": "the ssh client with its options (ssh)"},
    "script": {"help": "the Python file to run"}, "args": {"nargs": "...", "help": "its own"},  # argparse.REMAINDER
}
CHILD = ("-P", "-c", f"from {__package__}.launch.child import main; main()")  # -P: the path is the caller's


class LocalCluster:
    """A server process and `nodes` node processes on loopback, as long as the `with` block.

    :param nodes: how many nodes on this machine, at least 1; by default 2, and none with `hosts`.
    :param cpu_count: workers of each node; by default the nodes divide the cores that this process may use,
        at least one each.
    :param hosts: nodes on other machines, by ssh: the path of a file, or a list of its lines (`launch/ssh.py`). A line
        without cores gets `cpu_count` workers; by default all usable cores of the host.
    :param ssh_command: the ssh client and its options, a list of words.
    :ivar host, port, username, secret_key: for the calls; the secret prints as ``***``.
    :ivar server: the server's Popen.  :ivar nodes: the nodes' Popens; for a node on another machine, its ssh.

    The cluster is ready when `__enter__` returns, after some 0.2 s. It is gone when `__exit__` returns, or seconds
    after the caller was killed. For one thread.
    """

    def __init__(
        self, nodes: int | None = None, cpu_count: int | None = None, *,
        hosts: str | os.PathLike[str] | Sequence[str] | None = None, ssh_command: Sequence[str] = ("ssh",),
    ) -> None:
        for name, value in (("nodes", nodes), ("cpu_count", cpu_count)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigurationError(f"{name} must be an int of at least 1, not {value!r}")
        self.host = HOST
        self.port = 0
        self.username = USERNAME
        self.secret_key = Secret(os.urandom(32).hex())
        self.server: subprocess.Popen[bytes] | None = None
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._count = nodes or (2 if hosts is None else 0)
        self._launch: Callable[..., None] | None = None  # starts nodes on other machines
        self._cpu_count = cpu_count
        self.hash_seed = os.environ.get("PYTHONHASHSEED") or str(int.from_bytes(os.urandom(4), "big"))  # `hash` agrees
        if hosts is not None:
            from .launch.ssh import Launcher

            self._launch = Launcher(hosts, ssh_command).start

    @property
    def settings(self) -> Settings:
        """The cluster's address and secret."""
        return Settings(self.host, self.port, self.username, self.secret_key)

    def start(self) -> LocalCluster:
        """Start all processes, and wait until all nodes have joined. ServerUnreachable if a node does not join."""
        late = threading.Timer(START_SECONDS, lambda: [*map(subprocess.Popen.kill, self._processes())])
        late.start()
        try:
            self.server = _spawn("server", self.hash_seed)
            self.nodes = [_spawn("node", self.hash_seed) for _ in range(self._count)]
            key = auth.derive_key(self.username, self.secret_key.reveal())  # while the children import their roles
            about = {"secret": self.secret_key, "key": key.hex(), "cpu_count": self._cpu_count, "nodes": self._count}
            _hand_over(self.server.stdin, about | {"port": 0})
            self.port = _wait_ready(self.server)
            for index, node in enumerate(self.nodes):
                _hand_over(node.stdin, about | {"port": self.port, "index": index})
            importlib.import_module(".controller.connection", __package__)  # there is time now
            for node in self.nodes:
                _wait_ready(node)
            if self._launch is not None:
                late.cancel()  # hosts have a time limit of their own
                self._launch(self.nodes, about | {"port": self.port}, self.hash_seed)
        except BaseException:
            self.stop()
            raise
        finally:
            late.cancel()
            late.join()
        return self

    def stop(self) -> None:
        """End all processes, and wait for their ends. After five seconds, kill them.

        An open call raises ClusterKilled. No thread is started: the interpreter may be at its end.
        """
        for pipe in filter(None, [process.stdin for process in self._processes()]):
            pipe.close()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._processes():
            with process:  # it closes the pipes
                try:
                    process.wait(max(deadline - time.monotonic(), 0.1))
                except subprocess.TimeoutExpired:
                    process.kill()
        self.nodes, self.server = [], None

    def _processes(self) -> list[subprocess.Popen[bytes]]:
        return [*self.nodes, self.server] if self.server is not None else []

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.stop()


_embedded_locks: dict[int, threading.Lock] = {}  # by process: a forked child may find the parent's lock held


def embedded() -> LocalCluster:
    """Return the cluster of `host="local"`. It starts at the first call, and ends with this process."""
    with _embedded_locks.setdefault(os.getpid(), threading.Lock()):
        return _start_embedded(os.getpid())


@functools.lru_cache(maxsize=1)
def _start_embedded(pid: int) -> LocalCluster:
    """Start the cluster of a process: a forked child gets its own."""
    cluster = LocalCluster(nodes=1).start()
    atexit.register(cluster.stop)  # in a forked child, the parent's Popen counts as ended
    return cluster


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m achilles.local [--nodes N] [--cpu-count N] script.py [args]`. Return the script's exit status."""
    from . import console  # a cluster starts sooner without it

    args = console.parser(
        "local", "Run a script against a cluster of its own on this machine, whose address is in its environment.",
        OPTIONS).parse_args(argv)
    sys.path.insert(0, os.path.dirname(os.path.abspath(args.script)))  # the nodes get our path
    with (
        console.errors_to_exit_status() as status,
        LocalCluster(args.nodes, args.cpu_count, hosts=args.hosts, ssh_command=args.ssh_command) as cluster,
    ):
        environment = os.environ | {
            "ACHILLES_HOST": cluster.host, "ACHILLES_PORT": str(cluster.port), "ACHILLES_USERNAME": cluster.username,
            "ACHILLES_SECRET_KEY": cluster.secret_key.reveal(), "PYTHONHASHSEED": cluster.hash_seed,
            "ACHILLES_ENCRYPT": "no",  # nothing leaves this machine
        }
        with subprocess.Popen([sys.executable, args.script, *args.args], env=environment) as script:

            def on_signal(number: int, _: object) -> None:
                if number != signal.SIGINT:  # a terminal sends SIGINT to the script, too
                    script.send_signal(number)

            with console.signal_handlers(on_signal):
                status.code = script.wait()
    return status.code if status.code >= 0 else 128 - status.code


# A child, for its caller.


def _spawn(role: str, hash_seed: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # workers import as the caller does
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return subprocess.Popen(
        [sys.executable, *CHILD, role], env=environment | {"PYTHONPATH": path, "PYTHONHASHSEED": hash_seed}, bufsize=0,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=os.name == "posix",
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )


def _hand_over(stdin: Any, about: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the child died: _wait_ready says so
        stdin.write(json.dumps(about, default=Secret.reveal).encode() + b"\n")


def _wait_ready(process: subprocess.Popen[bytes]) -> int:
    """Wait until a child is ready. Return the number that it writes: a server's port, or 0."""
    line = process.stdout.readline() if process.stdout else b""
    if not line:
        raise ServerUnreachable(
            f"a process of the local cluster ended with status {process.wait()} before it was ready, "
            f"or was not ready within {START_SECONDS:g} s; its complaint is on stderr")
    return int(line)


if __name__ == "__main__":
    raise SystemExit(main())
