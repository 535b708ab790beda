"""Attacks on encryption. Their clusters always encrypt, so they need Python 3.13.

They back the rows of docs/security.md "reaches the port", "listens on the network" and "sits on the path" for clusters
with ENCRYPT=yes: nobody without the secret reads, relays, downgrades or alters; nobody keeps others out.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import wait_until
from faults.work import Work

import achilles
from achilles import configuring
from achilles.errors import AchillesError, AuthenticationError, ProtocolError

from . import raw
from .bench import KEY, SECRET, USER, USER_BYTES, WRONG, Bench, Skipped, Watched, attack

CERTIFICATE = Path(__file__).parent / "certificate.pem"  # of 127.0.0.1, signed by itself; it protects nothing
AT_ONCE_SECONDS = 3.0  # less than any timeout
MARK = "a marker that nobody may see 0123456789"
KNOWN = raw.tls_key(USER_BYTES, KEY)
CLEAR, ENCRYPTED = raw.OPENINGS
ALERT, HANDSHAKE = 0x15, 0x16  # first bytes of TLS records
PSK_DHE_KE = bytes.fromhex("002d 0002 01 01")  # the extension psk_key_exchange_modes (RFC 8446, 4.2.9) with one mode
ONLY_1_3 = bytes.fromhex("002b 0003 02 0304")  # supported_versions with one version


def encrypting(bench: Bench, *nodes: int) -> Watched:
    """A cluster to attack. Skipped where this Python has no pre-shared keys."""
    if not configuring.can_encrypt():
        raise Skipped("this Python cannot encrypt")
    return bench.cluster(*nodes, encrypt=True)


class Tap:
    """Sits on the path to `target`, records all bytes, and alters those that `alter(way, place, data)` alters."""

    def __init__(self, target: int, alter: Callable[[int, int, bytes], bytes] = lambda way, place, data: data) -> None:
        self.target, self.alter = target, alter
        self.record = [b"", b""]  # UP and DOWN, of all connections
        self.accepted = 0
        self._listener = raw.listener()
        self._listener.settimeout(None)
        self.port: int = self._listener.getsockname()[1]
        self._socks: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="tap", daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._listener, *self._socks):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(raw.SECONDS)
        for sock in (self._listener, *self._socks):
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.accepted += 1
                self._socks += [client, server := socket.create_connection(("127.0.0.1", self.target))]
                for way, ends in enumerate(((client, server), (server, client))):
                    self._threads.append(threading.Thread(target=self._pump, args=(way, *ends), daemon=True))
                    self._threads[-1].start()

    def _pump(self, way: int, source: socket.socket, target: socket.socket) -> None:
        place = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.record[way] += data
                target.sendall(self.alter(way, place, data))
                place += len(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def ask(port: int, **more: Any) -> Any:
    """What a real caller gets that is told to encrypt, or what it raises; and that came at once."""
    began = time.monotonic()
    try:
        return achilles.cluster_status(**{
            "host": "127.0.0.1", "port": port, "username": USER, "secret_key": SECRET, "encrypt": True} | more)
    except AchillesError as e:
        return e
    finally:
        assert time.monotonic() - began < AT_ONCE_SECONDS, "it waited for a timeout"


def playing(serve: Callable[[socket.socket], None], **more: Any) -> Any:
    """What a real caller says of a server that is played by `serve`."""
    with raw.listener() as listening:
        def play() -> None:
            sock, _ = listening.accept()
            with sock, contextlib.suppress(OSError, raw.Ended):
                sock.settimeout(raw.SECONDS)
                serve(sock)

        player = threading.Thread(target=play, name="player")
        player.start()
        try:
            return ask(listening.getsockname()[1], **more)
        finally:
            player.join(raw.SECONDS)


def certified(known: tuple[str, bytes] | None = None) -> Any:
    """The context of a server that has a certificate, and perhaps a key."""
    made = raw.context(True, known)
    made.load_cert_chain(CERTIFICATE)
    return made


@attack("path", "a server with a certificate, and without the secret, relays the handshake inside")
def relayed_by_certificate(bench: Bench) -> None:
    """A client that took any certificate would be read and relayed by whoever has one. Ours takes none.

    With the certificate, with another secret beside it, and with a certificate that the system trusts. A client of our
    own that takes any certificate shows that the attack is one.
    """
    cluster = encrypting(bench)
    heard: list[bytes] = []

    def relay(context: Any) -> Callable[[socket.socket], None]:
        def serve(sock: socket.socket) -> None:
            sock.sendall(ENCRYPTED)
            with context.wrap_socket(sock, server_side=True) as inside:
                heard.append(b"it would relay now" + inside.recv(1000))

        return serve

    def sloppy(sock: socket.socket) -> None:
        with certified().wrap_socket(sock, server_side=True) as inside:
            heard.append(inside.recv(1000))

    with raw.listener() as listening:
        victim = threading.Thread(target=lambda: sloppy(listening.accept()[0]))
        victim.start()
        with raw.context(False, KNOWN).wrap_socket(raw.dial(listening.getsockname()[1])) as client:
            client.sendall(b"read by anybody")
        victim.join(raw.SECONDS)
    assert heard.pop() == b"read by anybody", "the attack is none"
    environment = dict(os.environ)
    try:
        os.environ |= {"SSL_CERT_FILE": str(CERTIFICATE), "SSL_CERT_DIR": str(CERTIFICATE.parent)}
        for context in (certified(), certified(raw.tls_key(USER_BYTES, WRONG)), certified((KNOWN[0], os.urandom(32)))):
            error = playing(relay(context))
            assert isinstance(error, AuthenticationError) and "does not know the secret" in str(error), error
            bench.count()
    finally:
        os.environ.clear()
        os.environ.update(environment)
    assert not heard, heard
    cluster.check_alive()


@attack("listens", "a marker looked for in recorded sessions")
def recorded_marker(bench: Bench) -> None:
    """Arguments, results, names of functions, errors, prints, a status, and a refusal: none of it can be read.

    The username can, which is the identity; the secret, K and the key of TLS cannot.
    """
    cluster = encrypting(bench)
    with Tap(cluster.port) as nodes, Tap(cluster.port) as callers:
        cluster.start_node(1, "--port", str(nodes.port))
        address = cluster.address | {"port": callers.port}

        def work(text: str) -> str:
            print(text)
            if text.endswith("!"):
                raise ValueError(text)
            return text[::-1]

        work.__name__ = work.__qualname__ = MARK
        lines: list[str] = []
        errors: list[BaseException] = []
        args = [MARK, MARK * 1000, MARK + "!"]
        found = achilles.map(
            work, args, callback_error=errors.append, output=lambda line, *_: lines.append(line), **address)
        assert sum(found, []) == [MARK[::-1], (MARK * 1000)[::-1], None], "the call was carried out"
        assert str(errors[0]) == MARK + "!" and MARK in lines
        ask(callers.port)
        assert isinstance(ask(callers.port, secret_key="another secret, long too"), AuthenticationError)
        record = b"".join((*nodes.record, *callers.record))
    hidden = [MARK.encode(), MARK[::-1].encode(), MARK[:12].encode(), b"ValueError", b"cpu_count", b"python",
              SECRET.encode(), KEY, KNOWN[1]]
    assert len(record) > 2 * len(MARK * 1000) and not [each for each in hidden if each in record]
    assert USER_BYTES + b":" in record, "the page says that it is visible"
    bench.count(len(hidden))
    cluster.check_alive()


@attack("path", "downgrades: to no encryption, to TLS 1.2, to no (EC)DHE; tickets, early data")
def downgrades(bench: Bench) -> None:
    """A side that is told to encrypt says 8 bytes in the clear, and nothing else. Each mismatch is told at once."""
    cluster = encrypting(bench)

    def as_in_the_clear(way: int, place: int, data: bytes) -> bytes:
        return data.replace(ENCRYPTED, CLEAR + bytes(32)) if way == raw.DOWN and not place else data

    with Tap(cluster.port, as_in_the_clear) as tap:
        error = ask(tap.port)
        assert isinstance(error, ProtocolError) and "ENCRYPT=yes there" in str(error), error
        wait_until(lambda: tap.record[raw.UP], "the client's mode")
        assert tap.record[raw.UP] == ENCRYPTED, "it went on"
        bench.count()
    error = ask(cluster.port, encrypt=False)
    assert isinstance(error, ProtocolError) and "ENCRYPT=yes here" in str(error), error
    wait_until(lambda: "the other side does not encrypt, and this side does" in cluster.log(), "the server's own word")
    plain = bench.cluster(encrypt=False)
    error = ask(plain.port)
    assert isinstance(error, ProtocolError) and "ENCRYPT=yes there" in str(error), error
    wait_until(lambda: "the other side encrypts, and this side does not" in plain.log(), "the server's own word")
    bench.count(2)
    hello: list[bytes] = []

    def listen(sock: socket.socket) -> None:
        sock.sendall(ENCRYPTED)
        hello.append(sock.recv(4096))
        sock.sendall(bytes([ALERT, 3, 3, 0, 2, 2, 40]))  # handshake_failure: it need not try again

    def old(sock: socket.socket) -> None:
        context = certified(KNOWN)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        sock.sendall(ENCRYPTED)
        with context.wrap_socket(sock, server_side=True):
            raise AssertionError("TLS 1.2")

    assert isinstance(playing(listen), AchillesError) and isinstance(playing(old), AuthenticationError)
    (said,) = hello
    assert said[0] == HANDSHAKE and PSK_DHE_KE in said and ONLY_1_3 in said
    assert b"\0\x2a\0\0" not in said, "early data is offered"
    bench.count(4)
    client = raw.context(False, KNOWN)
    client.options |= 0x400  # SSL_OP_ALLOW_NO_DHE_KEX: psk_ke is offered too
    with raw.dial(cluster.port) as sock:
        assert raw.read(sock, 8) == ENCRYPTED
        with client.wrap_socket(sock) as inside:
            assert len(raw.read(inside, raw.GREETING_BYTES)) == 40 and inside.version() == "TLSv1.3"
            assert not inside.session.has_ticket, "a ticket"
    bench.count()
    cluster.check_alive()


@attack("port", "TLS clients without the key: none, a wrong one, an unknown user, certificates, TLS 1.2")
def without_the_key(bench: Bench) -> None:
    """Each gets an alert after a second, and never the handshake inside.

    A wrong secret and an unknown user get the same bytes after the same time.
    """
    cluster = encrypting(bench)
    old = raw.context(False, KNOWN)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    clients = {
        "a wrong secret": raw.context(False, (KNOWN[0], raw.tls_key(USER_BYTES, WRONG)[1])),
        "another secret": raw.context(False, raw.tls_key(USER_BYTES, WRONG)),
        "an unknown user": raw.context(False, raw.tls_key(b"nobody", raw.derive(b"nobody", SECRET))),
        "no key": raw.context(False, None), "TLS 1.2": old,
    }
    answers: dict[str, set[bytes]] = {name: set() for name in clients}
    times: dict[str, list[float]] = {name: [] for name in clients}

    def work(name: str) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = clients[name].wrap_bio(incoming, outgoing)
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        with raw.dial(cluster.port) as sock:
            raw.read(sock, 8)
            began = time.monotonic()
            sock.sendall(outgoing.read())
            answers[name].add(raw.read_to_end(sock))
            times[name].append(time.monotonic() - began)

    rounds = 2 if bench.short else 20
    bench.each(work, [name for _ in range(rounds) for name in clients], threads=10)
    assert all(len(each) == 1 and next(iter(each))[0] == ALERT for each in answers.values()), answers
    assert answers["a wrong secret"] == answers["another secret"] == answers["an unknown user"]
    assert min(map(min, times.values())) >= 0.99, times
    medians = [statistics.median(each) for each in times.values()]
    bench.note(remark=f"medians {1000 * (max(medians) - min(medians)):.0f} ms apart")
    assert cluster.log().count("refused 127.0.0.1: the peer does not know the secret") == rounds * len(clients)
    cluster.check_alive()


@attack("port", "a flood of half handshakes, and handshakes that never end")
def half_handshakes(bench: Bench) -> None:
    """They have the places, the deadline and the patience of all that has not authenticated, and 8 KiB of memory."""
    cluster = encrypting(bench)
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        raw.context(False, KNOWN).wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    hello = outgoing.read()
    ask(cluster.port)
    grown = bench.growth(cluster.server.pid)
    times = []
    with contextlib.ExitStack() as stack:
        for number in range(200 if bench.short else 1000):
            sock = stack.enter_context(raw.dial(cluster.port))
            sock.sendall(hello[: bench.rng.randrange(len(hello))])
            bench.count()
            if number % 50 == 49:
                began = time.monotonic()
                assert ask(cluster.port)["jobs"] == []
                times.append(time.monotonic() - began)
                grown()

    def endless(_: int) -> None:
        """A ClientHello of 100,000 bytes, which is within TLS's own limits."""
        with raw.dial(cluster.port) as sock, contextlib.suppress(ConnectionError):
            began = time.monotonic()
            for _ in range(20):
                sock.sendall(b"\x16\x03\x01\x10\x00" + (b"\x01\x01\x86\xa0" + bytes(4092)))
            assert raw.read_to_end(sock) in (b"", ENCRYPTED)
            assert time.monotonic() - began < AT_ONCE_SECONDS

    bench.each(endless, range(8))
    assert grown() < 64 << 20
    bench.note(remark=f"honest callers in after {1000 * max(times):.0f} ms at most")
    cluster.check_alive()


@attack("path", "each record with a bit turned, in the handshake and after it")
def flipped_records(bench: Bench) -> None:
    """The connection ends, and is made anew: the answer is right, or there is an error. Nothing altered is loaded."""
    cluster = encrypting(bench, 1)
    with Tap(cluster.port) as tap:
        oracle = bench.oracle()
        bench.call(cluster, "map", Work(oracle.path), range(6), port=tap.port).result(30)
        lengths = [*map(len, tap.record)]
    places = [(way, place) for way in (raw.UP, raw.DOWN) for place in range(lengths[way])]
    bits = 1 << bench.rng.randrange(8)

    def flip(case: tuple[int, int]) -> None:
        flipped = threading.Event()

        def alter(way: int, place: int, data: bytes) -> bytes:
            at = case[1] - place
            if way != case[0] or flipped.is_set() or not 0 <= at < len(data):
                return data
            flipped.set()
            return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]

        with Tap(cluster.port, alter) as tap:
            oracle = bench.oracle()
            try:
                call = bench.call(cluster, "map", Work(oracle.path), range(6), port=tap.port, reconnect_seconds=20)
                oracle.check(call.result(60), 6, repeats=6)
                assert tap.accepted > 1 or not flipped.is_set() or case[1] >= lengths[case[0]] - 64, "it went on"
            except (AuthenticationError, ProtocolError):
                assert flipped.is_set()

    bench.each(flip, bench.some(places, 24) if bench.short else bench.rng.sample(places, 400), threads=4)
    cluster.check_alive()
