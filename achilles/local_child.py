"""A process of a LocalCluster: a server or a node, which ends when its caller is gone.

::

    python -m achilles.local_child ROLE          imports what the role needs, while the caller prepares
    stdin    one line of JSON: port, username, secret, its derived key, cpu_count       from the caller
    stdout   one line of JSON when it is ready: its port, or its number                 to the caller

After that, stdout is the caller's stderr. The process ends when its stdin ends or its parent changes. It looks for
both, because a forked child of the caller may hold the pipe open. Where a pipe cannot be polled (Windows), a thread
reads stdin until its end.

This module knows the roles; the roles know nothing of it. `local.py` starts it; it is not for people.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from .config import Secret, Settings
from .protocol import auth

__all__ = ["Caller", "main"]

LOOK_SECONDS = 1.0  # how often a server looks for its caller
TURN_SECONDS = 0.1  # how often a node does, at most: its loop turns much more often
POLLS_STDIN = os.name == "posix"


class Caller:
    """The process that started this one. For one thread."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._ended = threading.Event()  # stdin has, where it cannot be polled
        self.about: dict[str, Any] = json.loads(sys.stdin.readline() or "{}")
        if not self.about:
            raise SystemExit(1)  # it has gone before it said anything
        about = self.about
        self.settings = Settings("127.0.0.1", about["port"], about["username"], Secret(about.pop("secret")))
        auth.derive_key(self.settings.username, self.settings.secret.reveal(), bytes.fromhex(about.pop("key")))
        self._report = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # users' functions print to the caller's stderr, like the log
        if not POLLS_STDIN:
            threading.Thread(target=self._read, name="achilles-stdin", daemon=True).start()

    def tell(self, **about: object) -> None:
        """Tell the caller that this process is ready. A node that joins again has told already."""
        if not self._report.closed:
            with contextlib.suppress(OSError):
                self._report.write(json.dumps(about) + "\n")
                self._report.close()

    def is_gone(self, seconds: float) -> bool:
        """Return whether the caller is gone; wait for that up to `seconds`. The caller writes no second line."""
        if not POLLS_STDIN:
            return self._ended.wait(seconds)
        return bool(select.select([0], [], [], seconds)[0]) or os.getppid() != self._parent

    def _read(self) -> None:
        """The thread that waits for the end of stdin. It holds no lock of `sys.stdin`: this process may end."""
        with contextlib.suppress(OSError):
            os.read(0, 1)
        self._ended.set()


def main(argv: Sequence[str] | None = None) -> int:
    """Be a server or a node until the caller is gone: `python -m achilles.local_child server`, or `node`."""
    role, = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if role == "server":
        _serve()
    else:
        _lend()
    return 0


def share(cores: int, nodes: int, index: int) -> int:
    """Return the workers of a node: the cores are divided among the nodes, at least one each."""
    return max(1, cores // nodes + (index < cores % nodes))


def _serve() -> None:
    from .server.listen import Server

    caller = Caller()
    server = Server(caller.settings)

    def watch() -> None:
        while not caller.is_gone(LOOK_SECONDS):
            pass
        server.end("leaving")

    threading.Thread(target=watch, name="achilles-watch", daemon=True).start()
    caller.tell(port=server.address[1])
    server.run()


def _lend() -> None:
    """Run a node. It has one thread, so its own loop looks for the caller."""
    from .node.cores import default_start_method, usable_cores
    from .node.loop import Node

    caller = Caller()

    class LocalNode(Node):
        """A node that tells its caller that it has joined, and ends with it."""

        looked = 0.0

        def greet(self, number: int, connections: int) -> None:
            caller.tell(number=number)

        def look(self) -> None:
            if time.monotonic() - self.looked > TURN_SECONDS:
                self.looked = time.monotonic()
                if caller.is_gone(0):
                    raise SystemExit(0)

    about = caller.about
    cpu_count = about["cpu_count"] or share(usable_cores(), about["nodes"], about["index"])
    made = LocalNode(caller.settings, cpu_count, default_start_method())
    with contextlib.closing(made) as node, node.signals():
        node.run()


if __name__ == "__main__":
    sys.exit(main())
