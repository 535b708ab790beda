"""Nodes on other machines for a LocalCluster: one ssh for each host, with a reverse tunnel to the server.

::

    caller                                                            host
    server at 127.0.0.1:PORT ◀═══ ssh -R 0:127.0.0.1:PORT ═══════════ sshd at 127.0.0.1:N ◀── node
    reader thread    ◀─ Allocated port N for remote forward to … ──── (ssh itself)
                     ◀─ achilles 1.0.0 for Python 3.13 ────────────── `python -m achilles.launch.ssh`
                     ── one line of JSON: N, secret, key ───────────▶ `child.py`, as a node
                     ◀─ 0, when it has joined ───────────────────────
                     ◀─ all that its workers print ──────────────────
    the end of stdin ───────────────────────────────────────────────▶ the end of the node

ssh encrypts, and checks the host's identity. No port is open to other machines, and no file is copied. The secret
leaves the caller only for a process that has named the caller's versions. The secret is on no disk or command
line, and in no environment. A killed caller loses the pipe to ssh. So the node loses its stdin, and ends.

This module knows processes and lines of text. A thread for each ssh reads all its lines, and ends when ssh has ended.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from .. import config, console
from ..errors import ConfigurationError, ServerUnreachable
from ..protocol.connect import hello
from . import child

__all__ = ["Launcher", "SshNode", "main", "read_hosts"]

START_SECONDS = 60.0  # for all hosts to be ready: a cold disk that many machines share
JOIN_SECONDS = 1.0  # for the reader thread of an ssh that has ended
OPTIONS = (  # ssh takes the first value of an option: a user's options go before these
    "-T",  # a terminal would show the secret
    "-oBatchMode=yes",  # no person would see a question
    "-oExitOnForwardFailure=yes", "-oConnectTimeout=10",
    "-oServerAliveInterval=15", "-oServerAliveCountMax=3",  # a dead link ends ssh after 45 s
    "-oClearAllForwardings=no", "-oControlPath=none",  # a shared connection would keep the tunnel after this ssh
    "-oLogLevel=INFO",  # ssh names the tunnel's port
)
LINE = (  # of the hosts; a name that begins with "-" would be an option for ssh
    r"""(?x) \s* (?: (?P<name>[^\s\#\0-][^\s\#\0]*) (?:\s+(?P<cores>[1-9][0-9]{0,3}))?"""
    r"""(?:\s+python=(?P<python>[^\s\0]+))? )? (?:(?:\s+|^)\#.*)? \s*""")
ALLOCATED = rb".*Allocated port (\d+) for remote forward to 127\.0\.0\.1:%d\s"
GREETING = "achilles {version} for Python {python}".format(**hello())  # the same for a node and its caller
READY = rb"0\s"  # the word of `child.py` on a node
LINE_BYTES = 1 << 16  # a longer line goes on in parts
WORDS = 5  # lines that an error shows
REMEDY = (
    f"A host must let ssh in without a question: try `ssh HOST true`. It must have {GREETING}: install it there, and "
    "name the Python that has it in the host's line, by python=PATH.")

log = logging.getLogger(__name__)


def read_hosts(hosts: str | os.PathLike[str] | Sequence[str]) -> list[dict[str, Any]]:
    """Return name, cores and python of each host; None if the line lacks cores or python.

    :param hosts: the path of a file, or a list of its lines: ``host [cores] [python=PATH]``, and comments after ``#``.
    :raises ConfigurationError: the file cannot be read, a line is wrong, or there is no host.
    """
    lines = config.read_lines(hosts) if isinstance(hosts, (str, os.PathLike)) else hosts
    matches = [re.fullmatch(LINE, line) for line in lines]
    if None in matches:
        wrong = matches.index(None)
        raise ConfigurationError(
            f"line {wrong + 1} of the hosts must be `host [cores] [python=PATH]`, not {lines[wrong]!r}")
    found = [match.groupdict() for match in matches if match and match["name"]]
    if not found:
        raise ConfigurationError("the hosts name no host")
    return found


class SshNode(subprocess.Popen[bytes]):
    """The ssh of a host, in the place of its node's Popen, and the thread that reads all its lines.

    :ivar joined: whether the node has joined. Set once; False if ssh ends before.
    :ivar words: the last lines before that.
    """

    def __init__(self, host: dict[str, Any], ssh: Sequence[str], about: dict[str, Any], hash_seed: str) -> None:
        self.host: str = host["name"]
        self.joined: concurrent.futures.Future[bool] = concurrent.futures.Future()
        self.words: list[str] = []
        python = (host["python"] or sys.executable).removeprefix("~/")  # ssh begins in the home
        node = ["env", f"PYTHONHASHSEED={hash_seed}", python, "-P", "-m", f"{__package__}.ssh", GREETING]
        super().__init__(
            [*ssh, *OPTIONS, "-R", f"0:127.0.0.1:{about['port']}", self.host, shlex.join(node)], bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=os.name == "posix", creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0))
        about = about | {"cpu_count": int(host["cores"] or about["cpu_count"] or 0), "nodes": 1, "index": 0}
        pipes, self.stdout = (self.stdin, self.stdout), None  # only the thread that reads stdout may close it
        self._reader = threading.Thread(target=self._read, args=(*pipes, about), name="achilles-ssh", daemon=True)
        self._reader.start()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._reader.join(JOIN_SECONDS)

    def _read(self, stdin: Any, stdout: Any, about: dict[str, Any]) -> None:
        """In the thread, hand over the secret, and pass on the node's output after it has joined."""
        with io.BufferedReader(stdout) as pipe:
            lines = iter(lambda: pipe.readline(LINE_BYTES), b"")
            tunnel = self._find(ALLOCATED % about["port"], lines)
            if tunnel and self._find(re.escape(GREETING).encode(), lines):
                with contextlib.suppress(OSError, ValueError):  # ssh has ended, or the cluster ends
                    about["port"] = int(tunnel[1])
                    stdin.write(json.dumps(about, default=config.Secret.reveal).encode() + b"\n")
            self.joined.set_result(self._find(READY, lines) is not None)
            for line in lines:
                with contextlib.suppress(OSError):  # stderr is closed
                    os.write(2, f"{self.host}: ".encode() + line)

    def _find(self, pattern: bytes, lines: Iterator[bytes]) -> re.Match[bytes] | None:
        """Read up to the line that matches, and return the match; None at the end. Keep the other lines as words."""
        for line in lines:
            if match := re.match(pattern, line):
                return match
            text = "".join(filter(str.isprintable, line.decode(errors="backslashreplace")))  # a terminal obeys others
            self.words = [*self.words, text][-WORDS:]
        return None


class Launcher:
    """Starts nodes on the hosts of a LocalCluster.

    :param hosts: as for `read_hosts`.
    :param ssh: the ssh client and its options.
    :raises ConfigurationError: a line of the hosts is wrong, or the ssh client is not there.
    """

    def __init__(self, hosts: str | os.PathLike[str] | Sequence[str], ssh: Sequence[str]) -> None:
        if not ssh or shutil.which(ssh[0]) is None:
            raise ConfigurationError(
                f"ssh_command must be a list of words, the first of them a program on this machine, not {ssh!r}")
        self._ssh = ssh
        self._hosts = read_hosts(hosts)

    def start(self, nodes: list[subprocess.Popen[bytes]], about: dict[str, Any], hash_seed: str) -> None:
        """Add the ssh of each host to `nodes`. Block until all have joined or failed. Remove the failed again.

        :param about: port, username, secret, key, and the cpu_count of hosts without cores.
        :raises ServerUnreachable: no node is left. Else failures are a warning in the log.
        """
        started = []
        for host in self._hosts:
            started.append(SshNode(host, self._ssh, about, hash_seed))
            nodes.append(started[-1])
        concurrent.futures.wait([node.joined for node in started], START_SECONDS)
        failed = [node for node in started if not (node.joined.done() and node.joined.result())]
        for node in failed:
            nodes.remove(node)
            with node:
                node.kill()
        if failed:
            words = [f"{node.host}: {'; '.join(filter(None, node.words)) or 'not a word'}" for node in failed]
            head = f"{len(failed)} of {len(started)} hosts have no node, after {START_SECONDS:g} s at most:"
            text = "\n".join([head, *words, REMEDY])
            if not nodes:
                raise ServerUnreachable(text)
            log.warning("%s", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the node of a host, if the caller's greeting is ours. Only `SshNode` starts this."""
    wanted, = sys.argv[1:] if argv is None else argv
    if wanted != GREETING:
        raise SystemExit(f"the host has {GREETING}, the caller has {wanted}")
    config.remove_from_environment()
    console.say(f"\n{GREETING}")  # on a new line: the shell may have written before
    child.main("node")
    return 0


if __name__ == "__main__":
    sys.exit(main())
