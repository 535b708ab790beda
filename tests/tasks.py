"""Functions that run in workers. Imported there by name, so this imports next to nothing."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
import warnings
from typing import Any

never = threading.Event()


def record(path: str, index: int) -> None:
    """Append `index pid` to the oracle's file, in one write."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(file, b"%d %d\n" % (index, os.getpid()))
    os.close(file)


def calls(path: str, index: int) -> int:
    """How many calls with this index were recorded."""
    with open(path) as file:
        return sum(line.startswith(f"{index} ") for line in file)


def square(number: int) -> int:
    return number ** 2


def recorded_square(path: str, seconds: float, number: int) -> int:
    """Note the call, take some time, and square."""
    record(path, number)
    never.wait(seconds)
    return number ** 2


def pid_after(seconds: float, _: object) -> int:
    never.wait(seconds)
    return os.getpid()


def reverse(data: Any) -> Any:
    return data[::-1]


def fail_at(indexes: tuple[int, ...], number: int) -> int:
    if number in indexes:
        raise ValueError(f"no {number}")
    return number ** 2


def hang_at(index: int, number: int) -> int:
    if number == index:
        never.wait(120)
    return number ** 2


def die_at(path: str, index: int, how: str, number: int) -> int:
    record(path, number)
    if number == index:
        die(how)
    return number ** 2


def die_once(path: str, index: int, number: int) -> int:
    """As die_at by SIGKILL, but the first time alone."""
    record(path, number)
    if number == index and calls(path, number) == 1:
        die("kill")
    return number ** 2


def die_leaving_a_child(path: str, index: int, number: int) -> int:
    """As die_once, but a child of the worker's, with the index -1, lives on."""
    warnings.simplefilter("ignore", DeprecationWarning)  # a worker has two threads, and forks all the same
    if number == index and not calls(path, number):
        if os.fork() == 0:
            record(path, -1)
            time.sleep(60)
            os._exit(0)
        while not calls(path, -1):
            time.sleep(0.001)
    return die_once(path, index, number)


def die(how: str) -> None:
    if how == "exit":
        os._exit(1)
    if how == "segfault":
        ctypes.string_at(0)
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


class OddError(Exception):
    """Its arguments are not what its __init__ takes."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"{number} is {reason}")
        self.number = number


def raise_odd(number: int) -> int:
    if number == 2:
        raise OddError(number, "odd")
    return number


class Stop(BaseException):
    """No Exception at all."""


def raise_base(number: int) -> int:
    if number in BASES:
        raise BASES[number]
    return number


BASES = {1: SystemExit(3), 3: KeyboardInterrupt("no"), 5: Stop("stop"), 7: GeneratorExit()}


def return_generator(number: int) -> Any:
    return (each for each in ()) if number == 2 else number
