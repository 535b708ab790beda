"""A bench for attacks: servers to attack, figures to fill in, and the register of what there is.

An attack is a function that takes a Bench, registered by `@attack(...)`. It raises AssertionError where it
succeeds, which is the failure. What it starts it starts through the bench, which ends it, and checks that no
process, thread or descriptor is left, and that no server and no node has said a traceback.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cluster import SECRET, USER, Cluster, Process
from conftest import wait_until
from faults import tree
from faults.bench import Bench as FaultBench
from faults.bench import Call, Skipped

import achilles
from achilles.protocol.connect import PYTHON

from . import raw

__all__ = ["ATTACKS", "KEY", "SECRET", "USER", "USER_BYTES", "Attack", "Bench", "Call", "Skipped", "WHO", "attack"]

T = TypeVar("T")
USER_BYTES = USER.encode()
KEY = raw.derive(USER_BYTES, SECRET)
WRONG = raw.derive(USER_BYTES, "another secret, long too")
HELLO = {"python": PYTHON, "version": achilles.__version__, "cpu_count": 0, "pid": 4711}
WHO = {
    "port": "reaches the port", "listens": "listens on the network", "path": "sits on the path",
    "secret": "has the secret", "node": "owns a node", "server": "owns the server",
}
WATCHED = Path(__file__).parent / "watched.py"


class Attack(NamedTuple):
    """A row of the table."""

    name: str
    who: str  # of the table of attackers in docs/security.md
    what: str  # for people
    run: Callable[[Bench], None]


ATTACKS: dict[str, Attack] = {}


def attack(who: str, what: str) -> Callable[[Any], Any]:
    """Register an attack by one of WHO."""
    assert who in WHO, who

    def register(run: Callable[[Bench], None]) -> Callable[[Bench], None]:
        name = run.__name__
        assert name not in ATTACKS and run.__doc__, name
        ATTACKS[name] = Attack(name, who, what, run)
        return run

    return register


class Watched(Cluster):
    """A cluster whose server writes, when it ends, what modules it has imported."""

    log_level = "debug"

    def __init__(self, *args: Any, user: str = USER, **options: Any) -> None:
        super().__init__(*args, **options)
        self.user = user
        raw.encrypt_for(user.encode(), raw.derive(user.encode(), SECRET))

    def _write_settings(self) -> None:
        super()._write_settings()
        self.env_file.write_text(self.env_file.read_text().replace(f"USERNAME={USER}", f"USERNAME='{self.user}'"))

    def start_server(self) -> Process:
        self._write_settings()
        self.modules_file = self.folder / "modules"
        self.server = self._run(
            "server", str(WATCHED), str(self.modules_file), "--log-level", self.log_level)
        self.port = int(self.server.wait_for(r"initiated at 127\.0\.0\.1:(\d+)\nListening for connections\.\.\.")[1])
        self._write_settings()
        return self.server

    def modules(self) -> set[str]:
        """End the server, in order, and see what it had imported."""
        self.server.popen.terminate()
        assert self.server.wait() == 0
        return set(self.modules_file.read_text().split())

    def check_alive(self) -> None:
        """The server runs, and takes a good client at once."""
        assert self.server.popen.poll() is None, "the server has ended"
        assert self.status()["server"]["version"] == achilles.__version__

    def join(self, role: bytes = b"C", cpu_count: int = 0, **hello: Any) -> raw.Link:
        """A raw client with the secret."""
        return raw.join(self.port, role, USER_BYTES, KEY, HELLO | {"cpu_count": cpu_count} | hello)

    def log(self) -> str:
        """What the server said on stderr."""
        return self.server.err.read_bytes().decode(errors="surrogateescape")


class Bench(FaultBench):
    """One run of one attack, and its figures."""

    tries = 0
    refused = 0
    memory: int | None = None  # bytes by which the attacked process has grown, at most

    def cluster(self, *nodes: int, **options: Any) -> Watched:  # type: ignore[override]
        """A server to attack, and honest nodes of so many workers."""
        cluster: Watched = self.enter(Watched(self._folder("cluster"), *nodes, **options))
        self.clusters.append(cluster)
        return cluster

    def middle(self, target: int, tamper: raw.Tamper = raw._pass_on, key: bytes | None = None) -> raw.Middle:
        """Somebody on the path."""
        middle: raw.Middle = self.enter(raw.Middle(target, tamper, key))
        return middle

    def count(self, number: int = 1) -> None:
        """So many tries, all of which were refused: who calls this has seen it."""
        self.tries += number
        self.refused += number

    def each(self, work: Callable[[T], Any], cases: Iterable[T], threads: int = 8) -> None:
        """Try each case, several at a time; the first that is not refused ends it. What returns False was no try."""
        lock = threading.Lock()

        def run(case: T) -> None:
            refused = 0
            tried = 1
            try:
                tried = refused = int(work(case) is not False)
            except Exception as e:
                raise AssertionError(f"{case!r:.300}: {type(e).__name__}: {e}") from e
            finally:
                with lock:
                    self.tries += tried
                    self.refused += refused

        with ThreadPoolExecutor(threads, "attacker") as pool:
            futures = [pool.submit(run, case) for case in cases]
            try:
                for future in futures:
                    future.result()
            finally:
                for future in futures:
                    future.cancel()

    def some(self, cases: Sequence[T], number: int) -> Sequence[T]:
        """All of them, or in the short form so many, at random: even steps could step over a kind of them."""
        if not self.short or len(cases) <= number:
            return cases
        return [cases[n] for n in sorted(self.rng.sample(range(len(cases)), number))]

    def growth(self, pid: int) -> Callable[[], int]:
        """Measures how much a process has grown from now on, and keeps the most."""
        before = tree.memory(pid)

        def measure() -> int:
            grown = tree.memory(pid) - before
            self.memory = max(self.memory or 0, grown)
            return grown

        return measure


def eventually(happened: Callable[[], Any], what: object, seconds: float = 20.0) -> Any:
    """wait_until, under a name that says what it is for here."""
    return wait_until(happened, what, seconds)
