"""Ports of our own, for those that must be known before anyone listens there, or after.

A port that the system chose and that was closed again is anybody's at the next moment: of a test beside this one, or
of a connection that needs a port to go out from. So these are taken from below those that systems choose from
(Linux from 32768 up, others from 49152), and each of the processes that test at a time has a range to itself.
"""

from __future__ import annotations

import itertools
import os
import random
import socket

EACH = 1_000  # ports of a process
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 20
_ports = itertools.cycle(range(10_000 + _worker * EACH, 10_000 + (_worker + 1) * EACH))
for _ in range(random.SystemRandom().randrange(EACH)):  # another run of the tests may be on this machine
    next(_ports)


def free_port() -> int:
    """A port that nobody listens at, nor will but who is given it; another one each time."""
    for port in _ports:
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            pass
    raise AssertionError("unreachable: the ports go round")
