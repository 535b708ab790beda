"""What runs in the workers of all peers. Imported there by name, so this imports next to nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

WAIT_SECONDS = 10.0  # a call that waits longer for another one hangs


def successor(number: int) -> int:
    """The smallest task there is."""
    return number + 1


def ends_of(data: Any) -> tuple[int, int, int]:
    """Proof that all of it came, at no cost: how much, and its first and last byte."""
    return len(data), data[0], data[-1]


def incremented(array: Any) -> Any:
    """As large as what came, and new, so that nobody can answer with a reference."""
    return array + 1


def lengthened(data: bytes) -> bytes:
    """As large as what came and a byte more, and new."""
    return data + b"."


class Chunks:
    """A function of a chunk, for peers that have no chunks."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, chunk: Sequence[Any]) -> list[Any]:
        """The results of one chunk."""
        return [self.function(argument) for argument in chunk]


def nap(seconds: float) -> float:
    """Wait."""
    time.sleep(seconds)
    return seconds


class Scene:
    """A function that is instant but for some calls: of those it has a deed, each.

    :param deeds: number of a call to a pair. ("nap", seconds) sleeps, ("sum", count) spends the time in C code that
        holds the interpreter, ("say", path) makes a file, ("wait", path) waits until that file is there.
    """

    def __init__(self, deeds: Mapping[int, tuple[str, Any]]) -> None:
        self.deeds = deeds

    def __call__(self, number: int) -> tuple[int, bool]:
        """The number, and whether all went well: False after a wait that was in vain."""
        if number not in self.deeds:
            return number, True
        deed, value = self.deeds[number]
        if deed == "wait":
            return number, wait_for_file(value)
        if deed == "nap":
            time.sleep(value)
        elif deed == "sum":
            sum(range(value))
        else:
            open(value, "x").close()
        return number, True


def wait_for_file(path: str) -> bool:
    """Whether the file is there within WAIT_SECONDS."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def spin_1_us(number: int) -> int:
    """A microsecond or so of work; the number's successor."""
    return _spin(number, 1_000)


def spin_10_us(number: int) -> int:
    """Ten of them."""
    return _spin(number, 10_000)


def spin_100_us(number: int) -> int:
    """A hundred of them."""
    return _spin(number, 100_000)


def spin_200_us(number: int) -> int:
    """Two hundred of them."""
    return _spin(number, 200_000)


def spin_1_ms(number: int) -> int:
    """A thousand of them."""
    return _spin(number, 1_000_000)


def spin_10_ms(number: int) -> int:
    """Ten thousand of them."""
    return _spin(number, 10_000_000)


SPINS = {1: spin_1_us, 10: spin_10_us, 100: spin_100_us, 1_000: spin_1_ms, 10_000: spin_10_ms}


def _spin(number: int, nanoseconds: int) -> int:
    """By the thread's own clock where it is long, so that who shares a core with others does the same work."""
    clock = time.thread_time_ns if nanoseconds > 50_000 else time.perf_counter_ns
    end = clock() + nanoseconds
    while clock() < end:
        pass
    return number + 1
