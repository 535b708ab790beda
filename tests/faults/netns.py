"""Two machines on one: network namespaces joined by a cable whose directions can be made to swallow everything.

A wrong permanent neighbour entry sends what is meant for the other to a card that nobody has: no reset, no error,
no end of file, as when a cable is pulled out somewhere on the way. Nothing outside these namespaces is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

from .bench import Skipped

CLONE_NEWNET = 0x40000000  # linux/sched.h
NOBODY = "02:00:00:00:00:99"  # a card's address that is not there
_counter = iter(range(1 << 20))


class Link:
    """Namespace 0 (the server's and the callers', 10.99.0.1) and 1 (the nodes', 10.99.0.2), for a `with` block."""

    addresses = ("10.99.0.1", "10.99.0.2")

    def __init__(self) -> None:
        self._ip = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or ""
        number = f"{os.getpid() % 100000}{next(_counter)}"
        self.names = (f"achilles-a{number}", f"achilles-b{number}")
        self._made: list[str] = []

    def __enter__(self) -> Link:
        if not self._ip:
            raise Skipped("there is no `ip` command here")
        try:
            for name in self.names:
                self._run("netns", "add", name)
                self._made.append(name)
                self._run("-n", name, "link", "set", "lo", "up")
            self._run("-n", self.names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable",
                      "netns", self.names[1])
            for name, address in zip(self.names, self.addresses):
                self._run("-n", name, "address", "add", f"{address}/24", "dev", "cable")
                self._run("-n", name, "link", "set", "cable", "up")
            self._cards = [self._card(name) for name in self.names]
            self.heal()
        except BaseException as e:
            self.__exit__()
            if isinstance(e, subprocess.CalledProcessError):
                text = e.stderr.decode(errors="replace").strip()
                raise Skipped(f"no network namespaces are to be had: {text}") from e
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._made:
            with contextlib.suppress(subprocess.CalledProcessError):
                self._run("netns", "delete", name)

    def swallow(self, *sides: int) -> None:
        """What these sides send is lost from now on."""
        for side in sides:
            self._neighbour(side, NOBODY)

    def heal(self) -> None:
        """Everything arrives again."""
        for side in (0, 1):
            self._neighbour(side, self._cards[1 - side])

    @contextlib.contextmanager
    def inside(self, side: int) -> Iterator[None]:
        """This thread, and what it starts, is in that namespace meanwhile."""
        with open("/proc/thread-self/ns/net") as before, open(f"/run/netns/{self.names[side]}") as there:
            _enter(there)
            try:
                yield
            finally:
                _enter(before)

    def _neighbour(self, side: int, card: str) -> None:
        self._run("-n", self.names[side], "neigh", "replace", self.addresses[1 - side], "lladdr", card,
                  "dev", "cable", "nud", "permanent")

    def _card(self, name: str) -> str:
        words = self._run("-n", name, "-o", "link", "show", "cable").split()
        return words[words.index("link/ether") + 1]

    def _run(self, *words: str) -> str:
        done = subprocess.run([self._ip, *words], capture_output=True, check=True, timeout=20)
        return done.stdout.decode()


def _enter(namespace: Any) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
        raise Skipped(f"a thread may not change its network namespace: {os.strerror(ctypes.get_errno())}")
