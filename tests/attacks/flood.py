"""Attacks by number: places, patience, memory. They back "keep others out for good", which nobody can who only
reaches the port, and "take up one of 64 places for 5 s"."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Iterator

from conftest import wait_until
from faults import tree

import achilles

from . import raw
from .bench import USER_BYTES, WRONG, Bench, Skipped, Watched, attack

BOUND_SECONDS = 10.0  # how long a good client may take, where a test must bound it; the table has the figure
PLACES = 64


@contextlib.contextmanager
def _many_files(number: int) -> Iterator[None]:
    """This process may open so many. Skipped where the system does not let it."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = before
    if 0 <= hard < number:
        raise Skipped(f"needs {number} descriptors, this process may have {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _let_in(cluster: Watched) -> float:
    """How long an honest caller takes from its first byte to an answer."""
    began = time.monotonic()
    assert achilles.cluster_status(**cluster.address)["jobs"] == []
    took = time.monotonic() - began
    assert took < BOUND_SECONDS, f"it took {took:.1f} s"
    return took


def _is_open(sock: socket.socket) -> bool:
    """Whether the server has not closed it yet."""
    sock.setblocking(False)
    try:
        while sock.recv(4096):
            pass
    except BlockingIOError:
        return True
    except ConnectionError:
        pass
    return False


def _told(times: list[float], cluster: Watched) -> str:
    return f"honest callers in after {1000 * max(times):.0f} ms at most; {tree.threads(cluster.server.pid)} threads"


@attack("port", "slow clients, one byte each 0.2 s, in all places, again and again")
def slow_clients(bench: Bench) -> None:
    """A handshake has 5 s in all, whatever arrives, and places are given to the newest: good clients get in meanwhile.

    Who loses its place comes back at once, as an attacker would.
    """
    cluster = bench.cluster()
    times = [_let_in(cluster)]
    grown = bench.growth(cluster.server.pid)
    auth = raw.signed_auth(b"C", USER_BYTES) + bytes(32)
    stop = threading.Event()
    opened = [0]

    def dribble() -> None:
        clients: list[tuple[socket.socket, int]] = []
        try:
            while not stop.wait(0.2):
                left = []
                for sock, sent in clients:
                    try:
                        sock.send(auth[sent : sent + 1])
                        left.append((sock, sent + 1))
                    except OSError:
                        sock.close()
                clients = left
                while len(clients) < 2 * PLACES:
                    clients.append((raw.dial(cluster.port), 0))
                    opened[0] += 1
        finally:
            for sock, _ in clients:
                sock.close()

    attacker = threading.Thread(target=dribble, name="dribble")
    attacker.start()
    try:
        wait_until(lambda: opened[0] >= 2 * PLACES, "a full house")
        until = time.monotonic() + (1.5 if bench.short else 15)
        while time.monotonic() < until:
            times.append(_let_in(cluster))
            grown()
    finally:
        stop.set()
        attacker.join(raw.SECONDS)
    times.append(_let_in(cluster))
    bench.note(remark=_told(times, cluster))
    bench.count(opened[0])


@attack("port", "a thousand silent connections")
def silent_connections(bench: Bench) -> None:
    """Of those that say nothing the last 64 are kept, and a good client is let in at its first try."""
    cluster = bench.cluster()
    times = [_let_in(cluster)]
    grown = bench.growth(cluster.server.pid)
    with _many_files(2048), contextlib.ExitStack() as stack:
        silent: list[socket.socket] = []
        for number in range(1000):
            silent.append(stack.enter_context(raw.dial(cluster.port)))
            if number % 250 == 249:
                cluster.join().close()  # it was accepted behind all of them, and does not try again
                left = sum(map(_is_open, silent))
                assert left <= PLACES, f"{left} have a place"
                times.append(_let_in(cluster))
                grown()
        wait_until(lambda: tree.threads(cluster.server.pid) <= PLACES + 8, "as many threads as places")
        assert tree.descriptors(cluster.server.pid) < PLACES + 30
        times.append(_let_in(cluster))
        bench.note(remark=_told(times, cluster))
    assert grown() < 64 << 20
    bench.count(1000)


@attack("port", "slow clients that leave places free")
def patient_clients(bench: Bench) -> None:
    """A byte each 0.2 s makes an AUTH in 21 s: after 5 s in all the connection is closed, whatever arrived."""
    cluster = bench.cluster()
    auth = raw.signed_auth(b"C", USER_BYTES) + bytes(32)
    number = 10 if bench.short else 50

    def dribble(_: int) -> None:
        sock, _m1 = raw.knock(cluster.port)
        with sock, contextlib.suppress(ConnectionError):
            for place in range(50):  # 10 s
                sock.send(auth[place : place + 1])
                sock.settimeout(0.2)
                with contextlib.suppress(TimeoutError):
                    assert sock.recv(1) == b"", "an answer to half an AUTH"
                    return
            raise AssertionError("it has its place still")

    bench.each(dribble, range(number), threads=number)
    cluster.check_alive()


@attack("port", "a lock-out turned against an honest user: 1,000 failures under its name")
def lock_out(bench: Bench) -> None:
    """Failures are delayed and bounded by place, never by name: the user gets in at once, meanwhile and afterwards."""
    cluster = bench.cluster()
    number = 120 if bench.short else 1000
    times = [_let_in(cluster)]
    grown = bench.growth(cluster.server.pid)
    failed = threading.Semaphore(0)
    stop = threading.Event()

    def watch() -> None:
        for _ in range(number // 20):
            failed.acquire(timeout=raw.SECONDS)
            if stop.is_set():
                return
            times.append(_let_in(cluster))
            grown()

    honest = threading.Thread(target=watch, name="honest")
    honest.start()

    def fail(n: int) -> None:
        assert raw.claim(cluster.port, raw.proving(b"C", USER_BYTES, WRONG)) in (b"", raw.REFUSAL)
        if n % 20 == 0:
            failed.release()

    try:
        bench.each(fail, range(number), threads=60)
    finally:
        stop.set()
        failed.release()
        honest.join(raw.SECONDS)
    times.append(_let_in(cluster))
    bench.note(remark=_told(times, cluster))
    said = cluster.log().count(f"as user {USER_BYTES.decode()!r}")
    assert said >= number, f"{said} failures in the log"


@attack("port", "places taken by refusals, from one address")
def other_address(bench: Bench) -> None:
    """The address that holds most places loses them first: another address keeps what it has, however slow it is."""
    cluster = bench.cluster()
    sock, m1 = raw.knock(cluster.port, "127.0.0.2")
    with sock, contextlib.ExitStack() as stack:
        for _ in range(4 * PLACES):
            mine, greeting = raw.knock(cluster.port)
            stack.enter_context(mine)
            mine.sendall(raw.proving(b"C", USER_BYTES, WRONG)(greeting))
            bench.count()
        signed = raw.signed_auth(b"C", USER_BYTES)
        keys = raw.session(raw.derive(USER_BYTES, cluster.address["secret_key"]), m1, signed)
        sock.sendall(signed + keys.client_proof)
        assert raw.read(sock, raw.PROOF_BYTES) == keys.server_proof
    cluster.check_alive()
