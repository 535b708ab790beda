"""The floors: what the machine and the standard library take by themselves, before anything of ours is done."""

from __future__ import annotations

import argparse
import hashlib
import hmac
import multiprocessing
import pickle
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import dill

from achilles.protocol import auth

from .rows import import_ms
from .sections import section
from .table import markdown, number
from .timing import Spread, enough, spread
from .work import successor

__all__ = ["FLOORS", "measure"]

MIB = 1 << 20
MANY = 2_000  # echoes, or MB
LETTER = bytes(4 * MIB)
SMALL = list(range(1000))
DUMPED, LAMBDA = pickle.dumps(SMALL, 5), lambda n: n + 1
TAGGER = auth.Tagger(secrets.token_bytes(32))
FLOORS: dict[str, Callable[[], Any]] = {
    "HMAC-SHA256 of 4 MiB": lambda: hmac.digest(b"k" * 32, LETTER, "sha256"),
    "SHA-256 of 4 MiB": lambda: hashlib.sha256(LETTER).digest(),
    "HMAC-SHA256 of 100 bytes, as a frame's tag": lambda: TAGGER.tag(LETTER[:100]),
    "a copy of 4 MiB": lambda: bytearray(LETTER),
    "pickle: dump 1,000 ints": lambda: pickle.dumps(SMALL, 5),
    "dill: dump 1,000 ints": lambda: dill.dumps(SMALL, 5),
    "pickle: load 1,000 ints": lambda: pickle.loads(DUMPED),
    "pickle: dump a function, by name": lambda: pickle.dumps(successor, 5),
    "dill: dump a lambda": lambda: dill.dumps(LAMBDA, 5),
    "a process that does nothing (fork, wait)": lambda: _child(),
    "Python that does nothing": lambda: subprocess.run([sys.executable, "-c", "pass"], check=True),
    "scrypt of the secret, once a process": lambda: auth.derive_key("ann", "correct horse battery"),
}
IMPORTS = ("import achilles", "from achilles import Pool", "from achilles import run_server",
           "from achilles import run_node", "import dill", "import multiprocess")


def _child() -> None:
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()


def echo_socket(count: int) -> None:
    """So many bytes over loopback to a process and back, one after the other."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        child = multiprocessing.get_context("fork").Process(target=_echo_socket, args=(server,))
        child.start()
        with socket.create_connection(server.getsockname()) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(count):
                sock.sendall(b"x")
                sock.recv(1)
        child.join()


def _echo_socket(server: socket.socket) -> None:
    sock, _ = server.accept()
    with sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := sock.recv(1):
            sock.sendall(data)


def echo_pipe(count: int) -> None:
    """The same over a pipe of multiprocessing's."""
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_echo_pipe, args=(theirs,))
    child.start()
    for _ in range(count):
        ours.send_bytes(b"x")
        ours.recv_bytes()
    ours.send_bytes(b"")
    child.join()
    ours.close()
    theirs.close()


def _echo_pipe(pipe: Connection) -> None:
    while data := pipe.recv_bytes():
        pipe.send_bytes(data)


def stream(megabytes: int) -> None:
    """So much over loopback, one way, to a thread that throws it away."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_drain, args=(server,))
        thread.start()
        with socket.create_connection(server.getsockname()) as sock:
            for _ in range(max(1, megabytes // 4)):
                sock.sendall(LETTER)
        thread.join()


def _drain(server: socket.socket) -> None:
    sock, _ = server.accept()
    space = bytearray(MIB)
    with sock:
        while sock.recv_into(space):
            pass


def measure(run: Callable[[int], Any], seconds: float, times: int, least: int = 1) -> Spread:
    """µs of one of many, `least` at the least: so that what begins and ends them does not count."""
    count = enough(run, seconds, least)
    found = []
    for _ in range(times):
        began = time.perf_counter()
        run(count)
        found.append((time.perf_counter() - began) / count * 1e6)
    return spread(found)


def _many(run: Callable[[], Any]) -> Callable[[int], None]:
    def often(count: int) -> None:
        for _ in range(count):
            run()

    return often


@section("floors", "Floors: what is done, and µs of the clock for one")
def report(args: argparse.Namespace) -> str:
    """All of them."""
    runs = {"an echo over loopback, two processes": echo_socket, "an echo over a pipe, two processes": echo_pipe,
            "1 MB over loopback, one way": stream}
    runs |= {what: _many(run) for what, run in FLOORS.items()}
    seconds, times = (0.001, 1) if args.small else (args.seconds / 2, args.times)
    lines = [["", "µs", "least–most"]]
    for what, run in runs.items():
        found = measure(run, seconds, times, 1 if what in FLOORS or args.small else MANY)
        lines.append([what, number(found.median), f"{number(found.low)}–{number(found.high)}"])
    for statement in IMPORTS[: 1 if args.small else None]:
        lines.append([f"{statement}, over bare Python", number(import_ms(statement) * 1e3), ""])
    return markdown(lines)
