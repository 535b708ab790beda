"""A cluster on this machine: a real server and real nodes, for tests, notebooks and first steps.

::

    with LocalCluster(nodes=2) as cluster:                   python -m achilles.local script.py
        map(f, args, host=cluster.host, …)                   the script finds the cluster in its environment

    caller ──stdin: one line of JSON (role, port, secret)──▶ child: server, or node
           ◀──stdout: one line of JSON, when it is ready──── then its stdout is the caller's stderr

Knows processes and the roles; the roles know nothing of it. The secret is random and is handed over
through stdin, never on a command line nor in an environment. The children have a session of their own,
so that Ctrl-C interrupts the caller alone; they end when their stdin ends or their parent changes, looked
at each second, since a forked child of the caller may hold the pipe open. No thread is started in the caller.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from . import config, console
from .config import Secret, Settings
from .errors import AchillesError, ServerUnreachable

__all__ = ["LocalCluster", "embedded", "main"]

HOST, USERNAME = "127.0.0.1", "local"
START_SECONDS = 30.0  # for all processes to be ready: a cold disk, a loaded machine
STOP_SECONDS = 5.0  # for all of them to end by themselves
LOOK_SECONDS = 1.0  # how often a child looks whether its caller is there


class LocalCluster:
    """A server process and `nodes` node processes on loopback, for as long as the `with` block lasts.

    :param nodes: how many nodes, at least 1.
    :param cpu_count: workers of each node; by default the cores that this process may use are divided
        among the nodes, at least one each.
    :ivar host, port, username, secret_key: what the calls take; the secret prints as ``***``.
    :ivar server: its Popen.  :ivar nodes: theirs.

    Ready when `__enter__` returns, which takes some 0.5 s; gone when `__exit__` does, and within seconds
    when the caller is killed. Not for several threads.
    """

    def __init__(self, nodes: int = 2, cpu_count: int | None = None) -> None:
        for name, value in (("nodes", nodes), ("cpu_count", cpu_count)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be an int of at least 1, not {value!r}")
        self.host = HOST
        self.port = 0
        self.username = USERNAME
        self.secret_key = Secret(config.make_secret())
        self.server: subprocess.Popen[bytes] | None = None
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._count = nodes
        self._cpu_count = cpu_count

    @property
    def settings(self) -> Settings:
        """Where it is and how to get in, as the calls want it."""
        return Settings(self.host, self.port, self.username, self.secret_key)

    def start(self) -> LocalCluster:
        """Start all processes and wait until every node has joined. Raises ServerUnreachable if one does not."""
        deadline = time.monotonic() + START_SECONDS
        try:
            self.server = _spawn()
            self.nodes = [_spawn() for _ in range(self._count)]
            about = {"username": self.username, "secret": self.secret_key}
            _hand_over(self.server, about | {"role": "server", "port": 0})
            self.port = _wait_ready(self.server, deadline)["port"]
            for node, cpu_count in zip(self.nodes, self._shares()):
                _hand_over(node, about | {"role": "node", "port": self.port, "cpu_count": cpu_count})
            for node in self.nodes:
                _wait_ready(node, deadline)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End all processes, nodes first, and wait until they are gone: some seconds at most, then they are killed."""
        for processes in (self.nodes, [self.server] if self.server else []):
            for process in processes:
                if process.stdin is not None:
                    with contextlib.suppress(OSError):
                        process.stdin.close()
            deadline = time.monotonic() + STOP_SECONDS
            for process in processes:
                _wait_gone(process, deadline)
        self.nodes, self.server = [], None

    def __enter__(self) -> LocalCluster:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _shares(self) -> list[int]:
        """Workers of each node."""
        if self._cpu_count is not None:
            return [self._cpu_count] * self._count
        from .node.cores import usable_cores

        each, more = divmod(usable_cores(), self._count)
        return [max(1, each + (node < more)) for node in range(self._count)]


_embedded_lock = threading.Lock()


def embedded() -> LocalCluster:
    """The cluster that `host="local"` means: started at the first call, ended when this process ends."""
    with _embedded_lock:
        return _start_embedded(os.getpid())


@functools.lru_cache(maxsize=1)
def _start_embedded(pid: int) -> LocalCluster:
    """One a process: a forked child gets its own."""
    cluster = LocalCluster(nodes=1).start()

    def stop() -> None:
        if os.getpid() == pid:
            cluster.stop()

    atexit.register(stop)
    return cluster


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m achilles.local [--nodes N] [--cpu-count N] script.py [args…]`: the script's exit status."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.local",
        description="Run a script against a cluster of its own on this machine, whose address is in its environment.",
    )
    parser.add_argument("--nodes", type=int, default=2, help="how many nodes (2)")
    parser.add_argument("--cpu-count", type=int, help="workers of each node; the usable cores are divided by default")
    parser.add_argument("script")
    parser.add_argument("args", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    folder = os.path.dirname(os.path.abspath(args.script))
    try:
        cluster = LocalCluster(args.nodes, args.cpu_count)
    except ValueError as e:
        parser.error(str(e))
    sys.path.insert(0, folder)  # the nodes get our path
    try:
        with cluster:
            return _run_script([args.script, *args.args], cluster)
    except AchillesError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    finally:
        sys.path.remove(folder)


def _run_script(command: list[str], cluster: LocalCluster) -> int:
    environment = os.environ | {
        "ACHILLES_HOST": cluster.host, "ACHILLES_PORT": str(cluster.port), "ACHILLES_USERNAME": cluster.username,
        "ACHILLES_SECRET_KEY": cluster.secret_key.reveal(),
    }
    with subprocess.Popen([sys.executable, *command], env=environment) as script:

        def on_signal(number: int, _: object) -> None:
            if number != signal.SIGINT:  # from a terminal the script has that, too
                script.send_signal(number)

        with console.signal_handlers(on_signal):
            code = script.wait()
    return code if code >= 0 else 128 - code


# The caller's side of a child.


def _spawn() -> subprocess.Popen[bytes]:
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # what the caller can import, the workers can
    environment = {name: value for name, value in os.environ.items() if not name.startswith(config.PREFIX)}
    return subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.local", CHILD], env=environment | {"PYTHONPATH": path},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=os.name == "posix",
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )


def _hand_over(process: subprocess.Popen[bytes], about: dict[str, Any]) -> None:
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):  # it died: _wait_ready says so
            process.stdin.write(json.dumps(about, default=Secret.reveal).encode() + b"\n")
            process.stdin.flush()


def _wait_ready(process: subprocess.Popen[bytes], deadline: float) -> dict[str, Any]:
    """The line that a child writes when it is ready; ServerUnreachable if none comes by `deadline`."""
    line = b""
    if process.stdout is not None:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n") and selector.select(max(deadline - time.monotonic(), 0)):
                piece = os.read(process.stdout.fileno(), 4096)
                if not piece:
                    break
                line += piece
    if not line.endswith(b"\n"):
        how = f"was not ready within {START_SECONDS:g} s"
        if time.monotonic() < deadline:  # its end of file came instead
            with contextlib.suppress(subprocess.TimeoutExpired):
                how = f"ended with status {process.wait(LOOK_SECONDS)} before it was ready"
        raise ServerUnreachable(f"a process of the local cluster {how}; what it says is on stderr")
    about: dict[str, Any] = json.loads(line)
    return about


def _wait_gone(process: subprocess.Popen[bytes], deadline: float) -> None:
    """Wait for a child that was told to end, by `deadline`; then kill it."""
    try:
        process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


# The child's side.

CHILD = "--child"  # the first argument of a child; not for people


def _child() -> int:
    """A server or a node, as the line on stdin says, until the caller is gone."""
    parent = os.getppid()
    about = json.loads(sys.stdin.readline() or "null")
    if about is None:
        return 1
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what users' functions print goes to the caller's stderr, like the log

    def ready(**what: object) -> None:
        if not report.closed:  # a node that joins again has told already
            with contextlib.suppress(OSError):
                report.write(json.dumps(what) + "\n")
                report.close()

    settings = Settings(HOST, about["port"], about["username"], Secret(about.pop("secret")))
    if about["role"] == "server":
        _serve(settings, ready, parent)
    else:
        _lend(settings, ready, parent, about["cpu_count"])
    return 0


def _lend(settings: Settings, ready: Callable[..., None], parent: int, cpu_count: int) -> None:
    """A node. It has one thread, so its own loop looks whether the caller is there."""
    from .node.cores import default_start_method
    from .node.loop import Node

    class LocalNode(Node):
        """A node that tells its caller that it has joined, and ends with it."""

        looked = 0.0

        def greet(self, number: int, connections: int) -> None:
            ready(number=number)

        def look(self) -> None:
            if time.monotonic() - self.looked > LOOK_SECONDS / 10:
                self.looked = time.monotonic()
                if _stdin_ended(0) or os.getppid() != parent:
                    raise SystemExit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.closing(LocalNode(settings, cpu_count, default_start_method())) as node, node.signals():
        node.run()


def _serve(settings: Settings, ready: Callable[..., None], parent: int) -> None:
    from .server.listen import Server

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = Server(settings)

    def watch() -> None:
        while not _stdin_ended(LOOK_SECONDS) and os.getppid() == parent:
            pass
        server.end("leaving")

    threading.Thread(target=watch, name="achilles-watch", daemon=True).start()
    ready(port=server.address[1])
    server.run()


def _stdin_ended(timeout: float) -> bool:
    """Whether the caller has closed our stdin, waiting for it up to `timeout` seconds.

    It never writes a second line, so readable means ended.
    """
    if os.name != "posix":  # a pipe cannot be polled there: the parent's process id must do
        threading.Event().wait(timeout)
        return False
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        return bool(selector.select(timeout))


if __name__ == "__main__":
    raise SystemExit(_child() if sys.argv[1:] == [CHILD] else main())
