"""Ports of our own, for those that must be known before anyone listens there, or after.

A port that the system chose and that was closed again is anybody's at the next moment: of a test beside this one, or
of a connection that needs a port to go out from. So these are taken from below those that systems choose from
(Linux from 32768 up, others from 49152), and each of the processes that test at a time has a range to itself, by a
lock that it holds as long as it lives; where there are no such locks, by its number among those of one run.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import socket
import tempfile
from collections.abc import Iterator

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

EACH, RANGES = 1_000, 20  # ports of a process, and how many processes may have theirs


def _range() -> int:
    """The number of a range that no other process has."""
    if fcntl is None:
        return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % RANGES
    for number in range(RANGES):
        try:
            held = os.open(os.path.join(tempfile.gettempdir(), f"achilles-ports-{number}"), os.O_CREAT | os.O_RDWR)
        except PermissionError:  # another user's
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return number  # the descriptor stays open, and the lock with it
        except BlockingIOError:
            os.close(held)
    raise AssertionError(f"{RANGES} processes test on this machine already")


@functools.cache
def claim() -> Iterator[int]:
    """Take a range, and go round in it. The first who asks; a worker that imports this module needs none."""
    first = 10_000 + _range() * EACH
    ports = itertools.cycle(range(first, first + EACH))
    for _ in range(random.SystemRandom().randrange(EACH)):  # what the last holder used may not be free at once
        next(ports)
    return ports


def free_port() -> int:
    """A port that nobody listens at, nor will but who is given it; another one each time."""
    for port in claim():
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            pass
    raise AssertionError("unreachable: the ports go round")
