"""What runs in workers while things go wrong. Imported there by name, so this imports next to nothing."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

never = threading.Event()


def note(path: str, index: int, word: str) -> None:
    """Append `index word pid nanoseconds` (monotonic) to the oracle's file, in one write."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(file, b"%d %s %d %d\n" % (index, word.encode(), os.getpid(), time.monotonic_ns()))
    os.close(file)


def noted(path: str, index: int, word: str = "begin") -> int:
    """How often this was noted of an index."""
    with open(path) as file:
        return sum(line.startswith(f"{index} {word} ") for line in file)


@dataclass(frozen=True)
class Work:
    """A task that tells the oracle when it begins and ends, and answers with the square of its index.

    An argument is its index, or a tuple that begins with it. `bad` indexes do `how`, the first `times` times.
    `busy`: the time is spent in C with the GIL held, `pad`: bytes that the result carries with it.
    """

    path: str
    seconds: float = 0.0
    bad: tuple[int, ...] = ()
    how: str = "exit"
    times: int = 1 << 30
    pad: int = 0

    def __call__(self, argument: Any) -> Any:
        """Note, work, note."""
        index = argument if isinstance(argument, int) else argument[0]
        note(self.path, index, "begin")
        if index in self.bad and noted(self.path, index) <= self.times:
            if self.how == "dump":
                return Deadly()
            misbehave(self.how, index)
        if self.seconds:
            never.wait(self.seconds)
        note(self.path, index, "end")
        return (index * index, bytes(self.pad)) if self.pad else index * index


class WorkHere(Work):
    """Work that takes as long as this machine is slow: the variable SLOW of its node, or 50 ms."""

    def __call__(self, argument: Any) -> Any:
        """Note, wait, note."""
        note(self.path, argument, "begin")
        never.wait(float(os.environ.get("SLOW", "0.05")))
        note(self.path, argument, "end")
        return argument * argument


class WorkSlower(Work):
    """Work that becomes slower: some half a millisecond each at first, and `seconds` each from index 12 on."""

    def __call__(self, argument: Any) -> Any:
        """Note, wait, note; index 0 first does what it is bad at."""
        note(self.path, argument, "begin")
        if argument in self.bad and noted(self.path, argument) <= self.times:
            misbehave(self.how, argument)
        never.wait(self.seconds if argument >= 12 else 0.0005)
        note(self.path, argument, "end")
        return argument * argument


class Deadly:
    """A value that kills whoever dumps it."""

    def __reduce__(self) -> Any:
        os._exit(1)


def misbehave(how: str, index: int) -> None:
    """What a bad argument does."""
    if how == "exit":
        os._exit(1)
    elif how == "segfault":
        ctypes.string_at(0)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "memory":
        run_out_of_memory()
    elif how == "child":
        os.posix_spawn("/bin/sleep", ["sleep", "60"], os.environ)  # the worker has a living child
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "raise":
        raise ValueError(f"no {index}")
    elif how == "memory-error":
        run_into_memory_error()
    elif how == "hang":
        never.wait(3600)
    elif how == "c-call":  # with the GIL held: no thread of Python's runs meanwhile
        ctypes.PyDLL(None).sleep(3600)
    elif how == "long-c-call":  # longer than the limit of silence
        ctypes.PyDLL(None).sleep(25)
        return
    never.wait(60)


def run_out_of_memory() -> None:
    """Hit RLIMIT_AS in C, and die of it as C code does."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    while libc.malloc(1 << 20):
        pass
    os.abort()


def run_into_memory_error() -> None:
    """Hit RLIMIT_AS in Python, which raises; the limit is as it was, then."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), before[1]))
    try:
        bytearray(256 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def leave_a_child(index: int) -> tuple[int, int, int]:
    """Start a process that lives on, and return: (index, this process, the child)."""
    return index, os.getpid(), os.posix_spawn("/bin/sleep", ["sleep", "60"], os.environ)


def sleep(argument: tuple[int, float]) -> int:
    """(index, seconds) -> index."""
    never.wait(argument[1])
    return argument[0]


def echo(argument: Any) -> Any:
    """The argument itself."""
    return argument


def length(argument: Any) -> int:
    """How long it is."""
    return len(argument)


def unit(_: Any) -> int:
    """1, at once."""
    return 1
