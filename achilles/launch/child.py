"""A server or a node that serves one caller, and ends with the caller.

::

    caller ──stdin: one line of JSON (port, secret, its derived key, cpu_count)──▶ child
           ◀──stdout: one line when it is ready: a server's port, or 0────────────

The caller is a LocalCluster on this machine, or at the other end of an ssh (`ssh.py`). When a child is ready, its
stdout is the caller's stderr.

The server ends when its stdin ends or its parent changes. It looks for both, because a forked child of the caller may
hold the pipe open. Then it tells the nodes that the cluster is killed. A node looks for both too, because the server
may be killed already, or at the other end of an ssh. On Windows, only the server's thread reads stdin until its end.

This module knows the roles and its parent. The roles do not know it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from ..config import Secret, Settings
from ..protocol import auth

__all__ = ["HOST", "USERNAME", "main", "share"]

HOST, USERNAME = "127.0.0.1", "local"
LOOK_SECONDS = 1.0  # between a server's looks for its parent
POLLS_STDIN = os.name == "posix"


def main(role: str = "") -> None:
    """Run a server or a node, by `role` or the command line, until the caller is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    {"server": _serve, "node": _lend}[role or sys.argv[1]](os.getppid())


def _serve(parent: int) -> None:
    from ..server.listen import Server

    _, settings = _hear()
    server = Server(settings)
    threading.Thread(target=_watch, args=(parent, server.end), name="achilles-watch", daemon=True).start()
    _tell(server.address[1])
    server.run()


def _watch(parent: int, end: Callable[[str], None]) -> None:
    """In the server's thread, wait until the caller is gone. The caller writes no second line."""
    with contextlib.suppress(OSError):
        while POLLS_STDIN and not select.select([0], [], [], LOOK_SECONDS)[0] and os.getppid() == parent:
            pass
        if not POLLS_STDIN:
            os.read(0, 1)
    end("killed")
    end("leaving")  # at once: no peer comes later


def _lend(parent: int) -> None:
    """Run a node. It has one thread, so its own loop looks for the parent."""
    from ..node.cores import default_start_method, usable_cores
    from ..node.loop import Node

    class LocalNode(Node):
        """A node that tells its caller when it has joined, and ends with its caller."""

        def greet(self, number: int, connections: int) -> None:
            _tell(0)

        def look(self) -> None:
            if POLLS_STDIN and (os.getppid() != parent or select.select([0], [], [], 0)[0]):
                raise SystemExit(0)

    about, settings = _hear()
    cpu_count = about["cpu_count"] or share(usable_cores(), about["nodes"], about["index"])
    LocalNode(settings, cpu_count, default_start_method()).run()


def _hear() -> tuple[dict[str, Any], Settings]:
    """Read the caller's line. End if the caller is gone before."""
    line = sys.stdin.readline()
    if not line:
        raise SystemExit(1)
    about: dict[str, Any] = json.loads(line)
    settings = Settings(HOST, about["port"], USERNAME, Secret(about.pop("secret")))
    auth.derive_key(settings.username, settings.secret.reveal(), bytes.fromhex(about.pop("key")))
    return about, settings


@functools.cache  # a node that joins again has told already
def _tell(number: int) -> None:
    """Tell the caller that this process is ready. Then let users' functions print to the caller's stderr."""
    with contextlib.suppress(OSError):
        os.write(1, f"{number}\n".encode())
    os.dup2(2, 1)


def share(cores: int, nodes: int, index: int) -> int:
    """Divide the cores among the nodes, at least one each. Return a node's share."""
    return max(1, cores // nodes + (index < cores % nodes))
