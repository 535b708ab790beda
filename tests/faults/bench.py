"""A bench for faults: what a case needs of clusters and calls, and what it measures.

A case is a function that takes a Bench, registered by `@fault(...)` with the row that it has in the table. What
it starts it starts through the bench, which ends it, and checks that no process, thread or descriptor is left.
"""

from __future__ import annotations

import contextlib
import faulthandler
import random
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import conftest
import ports
from cluster import Cluster, descendants
from conftest import wait_until

import achilles

from .oracle import Again, Oracle
from .proxy import Proxy

__all__ = ["CASES", "Bench", "Call", "Case", "Skipped", "fault"]


class Skipped(Exception):
    """This machine cannot do that; the text says why."""


class Case(NamedTuple):
    """A row of the table."""

    name: str
    point: int  # of the promise's list: cases of a point stand together
    what: str  # the fault, for people
    run: Callable[[Bench], None]
    runs: int
    short: bool  # whether pytest runs it, too; what tests/test_faults.py has it need not
    limit: tuple[str, float] | None  # what is promised: "detect" or "recover" and seconds, or "ratio"


CASES: dict[str, Case] = {}


def fault(
    point: int, what: str, *, runs: int = 1, short: bool = False, limit: tuple[str, float] | None = None
) -> Callable[[Any], Any]:
    """Register a case. `runs`: how often where nothing else is said. Nine in ten must keep `limit`, but when short."""
    def register(run: Callable[[Bench], None]) -> Callable[[Bench], None]:
        name = run.__name__
        CASES[name] = Case(name, point, what, run, runs, short, limit)
        return run

    return register


class Call(threading.Thread):
    """One of the three calls in a thread: index -> value, or the exception that ended it.

    An argument's error stands in the place of its value, unless there is another `callback_error`. An index that
    comes twice is an error of the call. `starts`: the index of a packet's first value, where args are lists.
    """

    def __init__(self, way: str, function: Any, args: Any, *, pause: Callable[[], None] | None = None,
                 take: int | None = None, starts: Callable[[int], int] | None = None, **options: Any) -> None:
        super().__init__(name="call", daemon=True)
        self.found: dict[int, Any] = {}
        self.error: BaseException | None = None
        self.ended = threading.Event()
        self._way, self._function, self._args, self._options = way, function, args, options
        self._pause, self._take, self._starts = pause, take, starts or (lambda place: place)
        self.start()

    def run(self) -> None:
        try:
            self._run()
        except BaseException as e:
            self.error = e
        finally:
            self.ended.set()

    def _run(self) -> None:
        options = {"callback_error": _itself} | self._options
        if self._way == "map":
            packets = achilles.map(self._function, self._args, **options)
            starts = 0
            for packet in packets:
                self._note(starts, packet)
                starts += len(packet)
            return
        last = -1
        with getattr(achilles, self._way)(self._function, self._args, **options) as packets:
            for packet in packets:
                start = packet["ARGS_COUNTER"]
                assert start > last or self._way != "imap", f"{start} after {last}"
                last = start
                self._note(self._starts(start), packet["RESULT"])
                if self._pause is not None:
                    self._pause()
                if self._take is not None and len(self.found) >= self._take:
                    return

    def _note(self, start: int, values: list[Any]) -> None:
        for index, value in enumerate(values, start):
            assert index not in self.found, f"index {index} was delivered twice"
            self.found[index] = value

    @property
    def errors(self) -> dict[int, BaseException]:
        """index -> what it raised, or was lost to."""
        return {index: value for index, value in self.found.items() if isinstance(value, BaseException)}

    def result(self, seconds: float = 60.0) -> dict[int, Any]:
        """index -> value; raises what ended the call, or AssertionError if nothing does."""
        assert self.ended.wait(seconds), f"the call hangs: {len(self.found)} results in {seconds:g} s"
        self.join()
        if self.error is not None:
            raise self.error
        return self.found


def _itself(error: BaseException) -> BaseException:
    return error


class Bench:
    """One run of one case."""

    def __init__(self, rng: random.Random, *, short: bool = False, folder: Path | None = None) -> None:
        self.rng = rng
        self.short = short  # under pytest: a smaller form of the same
        self.detect: list[float] = []  # seconds
        self.recover: list[float] = []
        self.ratio: list[float] = []  # what it took, to the ideal
        self.repeated: list[int] = []
        self.remarks: list[str] = []
        self.folder = folder or Path(tempfile.mkdtemp(prefix="achilles-faults-"))
        self.clusters: list[Cluster] = []
        self._crashes: list[str] = []
        self._count = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Bench:
        ports.claim()  # its descriptor is there before
        self._before = set(threading.enumerate()), conftest.descriptors(), conftest.children()
        self._hook, threading.excepthook = threading.excepthook, self._note_crash
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        if error is not None and not isinstance(error, Skipped):
            self.dump()
        try:
            self._stack.close()
        finally:
            threading.excepthook = self._hook
        if error is None:
            self._check_quiet()
            wait_until(lambda: not self._left(), lambda: f"the end of {self._left()}", conftest.GONE_SECONDS)
        if error is None or isinstance(error, Skipped):  # what failed keeps what its processes said
            shutil.rmtree(self.folder, ignore_errors=True)

    def cluster(self, *nodes: int, **options: Any) -> Cluster:
        """A server and nodes of so many workers, until the end of the run."""
        cluster = self._stack.enter_context(Cluster(self._folder("cluster"), *nodes, **options))
        self.clusters.append(cluster)
        return cluster

    def oracle(self) -> Oracle:
        """A new file for tasks to write to."""
        return Oracle(self._folder("oracle"))

    def proxy(self, port: int) -> Proxy:
        """A network in front of this port, until the end of the run."""
        return self._stack.enter_context(Proxy(port))

    def enter(self, manager: Any) -> Any:
        """Whatever else ends with the run."""
        return self._stack.enter_context(manager)

    def call(self, cluster: Cluster, way: str, function: Any, args: Any, **options: Any) -> Call:
        """A call in a thread of its own. Options of this cluster's address may be overridden."""
        return Call(way, function, args, **cluster.address | options)

    def note(self, again: Again | None = None, *, detect: float | None = None, recover: float | None = None,
             repeated: int | None = None, remark: str | None = None) -> None:
        """What was measured. A fault that hit no chunk has nothing to say of time."""
        if again is not None and again.indexes:
            detect, recover = again.detect, again.recover
        for values, value in ((self.detect, detect), (self.recover, recover), (self.repeated, repeated),
                              (self.remarks, remark)):
            if value is not None:
                values.append(value)  # type: ignore[attr-defined]

    def in_the_clear(self) -> None:
        """For a run that must find some bytes on the path: skipped where they are encrypted."""
        if conftest.ENCRYPT:
            raise Skipped("who is on the path can read nothing; attacks.flipped_records alters what it sees")

    def dump(self) -> None:
        """Where everything is, for whoever has to understand a failure: into the run's folder."""
        with open(self.folder / "threads", "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        spy = shutil.which("py-spy")
        pids = [p for c in self.clusters for q in c.processes if q.popen.poll() is None
                for p in (q.pid, *descendants(q.pid))]
        for pid in pids if spy else ():
            with open(self.folder / f"stack-{pid}", "w") as file:
                subprocess.run([spy, "dump", "--pid", str(pid)], stdout=file, stderr=file, timeout=20, check=False)

    def _note_crash(self, args: Any) -> None:
        self._crashes.append(f"{args.thread.name}: {args.exc_type.__name__}: {args.exc_value}")
        self._hook(args)

    def _check_quiet(self) -> None:
        """No thread of ours, no server and no node has ended, or gone on, with a traceback."""
        assert not self._crashes, self._crashes
        for cluster in self.clusters:
            for process in cluster.processes:
                text = process.err.read_text(errors="replace")
                role = process.err.name.partition("-")[0] in ("server", "node")
                if process.popen.returncode == -signal.SIGKILL and ("forkserver.py" in text or "spawn.py" in text):
                    continue  # killed while a worker began, which says what it did not get to read
                assert not (role and "Traceback" in text), f"{process.err}: {text[text.index('Traceback') :][:1000]}"

    def _folder(self, name: str) -> Path:
        self._count += 1
        folder = self.folder / f"{name}-{self._count}"
        folder.mkdir()
        return folder

    def _left(self) -> list[object]:
        threads, descriptors, processes = self._before
        now = set(threading.enumerate()), conftest.descriptors(), conftest.children()
        return [each for was, still in zip((threads, descriptors, processes), now)
                for each in still - was]  # type: ignore[operator]
