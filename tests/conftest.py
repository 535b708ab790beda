"""What many tests use: a free port, a wait with a deadline, and a check that nothing is left behind."""

from __future__ import annotations

import contextlib
import ctypes  # noqa: F401  now: some builds keep the file of libffi open, which would be left behind by a test
import gc
import io
import itertools
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import ports
import pytest

import achilles

# What a test starts as a process imports the same package as the test does, installed or not.
PACKAGE_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(achilles.__file__)))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [PACKAGE_FOLDER, os.environ.get("PYTHONPATH")]))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Of the workers of all nodes whose test names no method; unset: the default. tox.ini has a command for each.
START_METHOD = os.environ.get("START_METHOD")
NODE_OPTIONS = ("--start-method", START_METHOD) if START_METHOD else ()
ENCRYPT = os.environ.get("ENCRYPT") == "yes"  # whether clusters of the tests encrypt; tox.ini has a command for it
SECONDS = 20.0  # tells a hang from a wait
GONE_SECONDS = 8.0  # for what a test has started: longer than a goodbye and the joins after it


def wait_until(happened: Callable[[], Any], what: object = "it", seconds: float = SECONDS) -> Any:
    """Wait until `happened()` is true and return that; an AssertionError that names `what` after `seconds`."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not (value := happened()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what() if callable(what) else what}"
        pause.wait(0.005)
    return value


def descriptors() -> set[tuple[str, str]]:
    """This process's open descriptors with what they stand for; none where the system does not tell."""
    found = set()
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        try:
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
        except OSError:  # the one that listed them
            pass
    return found


def children() -> set[int]:
    """The processes that this one has started and that are there, zombies too."""
    found: set[int] = set()
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            found.update(map(int, file.read_text().split()))
    return found


def in_a_child(function: Callable[[], object]) -> str:
    """What `function` returns, as text, in a forked child, which is ended if it takes too long."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process has threads: that is what is tried
        child = os.fork()
    if child == 0:
        try:
            os.write(writing, str(function()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        try:
            wait_until(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT), "the end of the child")
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        return pipe.read()


@contextlib.contextmanager
def before_each_step(inside: Callable[[FrameType], bool], do: Callable[[int], object]) -> Iterator[None]:
    """In this thread, do this before each instruction of the frames that are `inside`, with its count."""
    count, before = itertools.count(), sys.gettrace()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not inside(frame):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            do(next(count))
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def pytest_configure() -> None:
    ports.claim()  # its descriptor is there before any test looks


def pytest_report_header() -> str:
    return f"start method: {START_METHOD or 'the default'}; encryption: {'yes' if ENCRYPT else 'no'}"


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens at."""
    return ports.free_port()


@pytest.fixture
def no_leftovers() -> Iterator[None]:
    """After the test there is no thread, descriptor or child process that was not there before it."""
    if multiprocessing.get_context().get_start_method() == "forkserver":  # the default since Python 3.14
        multiprocessing.resource_tracker.ensure_running()  # both are started once, and stay
        multiprocessing.forkserver.ensure_running()
    threads, open_before, processes = set(threading.enumerate()), descriptors(), children()

    def left() -> list[object]:
        return [*(set(threading.enumerate()) - threads), *(descriptors() - open_before), *(children() - processes)]

    yield
    if left():
        gc.collect()
    wait_until(lambda: not left(), lambda: f"the end of {left()}", GONE_SECONDS)


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working directory: no module of the tests is below it, so none travels with a function."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def unconfigured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No setting in the environment, and a configuration file of the test's own, which does not exist yet."""
    for name in [name for name in os.environ if name.startswith("ACHILLES_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACHILLES_ENV_FILE", str(tmp_path / "env"))
    return tmp_path / "env"


@pytest.fixture
def nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No environment, no terminal, and a package directory of the test's own."""
    for name in [name for name in os.environ if name.startswith("ACHILLES_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("achilles.config.__file__", str(tmp_path / "package" / "config.py"))
    (tmp_path / "package").mkdir()
    monkeypatch.setattr("sys.stdin", io.StringIO())


@pytest.fixture
def own_file(tmp_path: Path) -> str:
    return str(tmp_path / "package" / ".env")


@pytest.fixture
def other_file(tmp_path: Path) -> str:
    return str(tmp_path / "other.env")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A person at a terminal: put what they type into the list that this returns."""
    answers: list[str] = []

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def type_next(prompt: str = "") -> str:
        if not answers:
            raise EOFError
        return answers.pop(0)

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", type_next)
    monkeypatch.setattr("getpass.getpass", type_next)
    return answers
