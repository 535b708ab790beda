"""A real sshd on loopback, for as long as a `with` block lasts; nothing of it is the system's.

`ACHILLES_TEST_SSHD` names the program; without it, it is the one on PATH or in /usr/sbin. It has a host key, a user
key, a configuration and a port of its own, and lets in the user that runs the tests. As root, sshd wants a user `sshd`
and a folder in /run: where there is none, it gets them in a mount namespace of its own.
"""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest
from cluster import Process, alive, descendants, environment
from conftest import wait_until
from ports import free_port

PROGRAM = os.environ.get("ACHILLES_TEST_SSHD") or shutil.which("sshd", path=os.pathsep.join([
    os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
PRIVATE = ("unshare", "--mount", "--propagation", "private", "sh", "-c",
           'mount --bind "$0" /etc/passwd && mount -t tmpfs -o mode=0755 none /run && mkdir /run/sshd && exec "$@"')


class Sshd:
    """The server, and the configuration of a client that knows it under several names.

    alpha, beta   let in
    gamma         nobody listens there
    stranger      a host key that the client does not know
    confined      let in, without tunnels
    """

    def __init__(self, folder: Path) -> None:
        for program in (PROGRAM or "sshd", "ssh", "ssh-keygen"):
            if not shutil.which(program):
                pytest.skip(f"there is no {program} here")
        self.folder = folder
        self.port = free_port()
        for key in ("host", "user", "confined"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        keys = [(folder / f"{key}.pub").read_text() for key in ("user", "confined")]
        (folder / "authorized_keys").write_text(f"{keys[0]}restrict {keys[1]}")
        (folder / "known").write_text(f"[127.0.0.1]:{self.port} {(folder / 'host.pub').read_text()}")
        (folder / "unknown").touch()
        (folder / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {folder}/host\nPidFile none\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
            f"SetEnv PYTHONPATH={environment(Path(__file__).parent)['PYTHONPATH']} FROM_SSH=yes\n")
        (folder / "ssh_config").write_text(
            f"Host gamma\n  Port {free_port()}\nHost stranger\n  UserKnownHostsFile {folder}/unknown\n"
            f"Host confined\n  IdentityFile {folder}/confined\nHost *\n  HostName 127.0.0.1\n  Port {self.port}\n"
            f"  User {getpass.getuser()}\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {folder}/known\n  GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n")
        self.client = ["ssh", "-F", str(folder / "ssh_config")]

    def __enter__(self) -> Sshd:
        command = [str(PROGRAM), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        users = [user.pw_name for user in pwd.getpwall()]
        if os.getuid() == 0 and not ("sshd" in users and os.path.isdir("/run/sshd")):
            passwd = self.folder / "passwd"
            passwd.write_text(f"{Path('/etc/passwd').read_text()}sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n")
            command = [*PRIVATE, str(passwd), *command]
        self.process = Process(self.folder, "sshd", command, dict(os.environ))
        wait_until(lambda: "Server listening" in self.said() or self.process.popen.poll() is not None, "sshd")
        if self.process.popen.poll() is not None:
            pytest.skip(f"sshd does not start here: {self.said()}")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.popen.terminate()
        self.process.wait()

    def said(self) -> str:
        """Its log."""
        return self.process.err.read_text()

    def family(self) -> list[int]:
        """The processes of all who are logged in, and what they run."""
        return [pid for pid in descendants(self.process.pid) if alive(pid)]

    def wait_alone(self) -> None:
        """Until nobody is logged in."""
        wait_until(lambda: not self.family(), lambda: f"the end of {self.family()}\n{self.said()}", 20)


