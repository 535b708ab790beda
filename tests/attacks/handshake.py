"""Attacks on the handshake: who does not know the secret is refused, learns nothing, and has nothing loaded.

They back the rows of docs/security.md "reaches the port", "listens on the network" and "sits on the path": nobody has
more read than its claim, gets anything run, or learns whether a username exists; nobody joins, replays or reflects.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from conftest import ENCRYPT

import achilles
from achilles.errors import AuthenticationError, ConfigurationError, ProtocolError, ServerUnreachable

from . import raw
from .bench import HELLO, KEY, SECRET, USER, USER_BYTES, WRONG, Bench, Watched, attack
from .victims import job, session_up


def victim(serve: Callable[[socket.socket], object], port: int = 0) -> Any:
    """A real caller asks a server that is played by `serve`: what it gets, or what it raises."""
    result: list[Any] = []
    listening = raw.listener()
    address = {"host": "127.0.0.1", "port": listening.getsockname()[1], "username": USER, "secret_key": SECRET,
               "encrypt": ENCRYPT}

    def ask() -> None:
        try:
            result.append(achilles.cluster_status(**address))
        except Exception as e:
            result.append(e)

    asking = threading.Thread(target=ask, name="victim", daemon=True)
    asking.start()
    try:
        sock = raw.accepted(listening)
        listening.close()
        with sock, contextlib.suppress(OSError, raw.Ended):
            sock.settimeout(raw.SECONDS)
            serve(sock)
            sock.shutdown(socket.SHUT_WR)
            raw.read_to_end(sock)
    finally:
        listening.close()
        asking.join(raw.SECONDS)
    assert not asking.is_alive(), "the caller hangs"
    return result[0]


def collect_auth(m1: bytes) -> bytes:
    """What a real caller says to a server that greets it so, and then hangs up."""
    auths: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        sock.sendall(m1)
        auths.append(raw.read(sock, raw.AUTH_BYTES))

    assert isinstance(victim(serve), ServerUnreachable)
    return auths[0]


def refused(cluster: Watched, auth: Callable[[bytes], bytes]) -> None:
    """The server answers with nothing or with 32 zero bytes, and closes."""
    said = raw.claim(cluster.port, auth)
    assert said in (b"", raw.REFUSAL), said


@attack("path", "proofs reflected, between one victim and itself, and between two")
def reflected_proofs(bench: Bench) -> None:
    """The labels differ, and the client proves first: what one end says proves nothing to any other.

    To a caller: its own proof, another caller's, the refusal, noise. To a caller as a greeting: another's AUTH.
    To a server: what another connection or a caller was made to say. Backs "nobody can reflect" (PROTOCOL.md, 2).
    """
    other = collect_auth(raw.greeting(os.urandom(32)))
    answers: dict[str, Callable[[bytes], bytes]] = {
        "its own proof": lambda auth: auth[raw.SIGNED_BYTES :], "its nonce": lambda auth: auth[8:40],
        "another caller's proof": lambda auth: other[raw.SIGNED_BYTES :], "zeros": lambda auth: raw.REFUSAL,
        "noise": lambda auth: os.urandom(32),
    }

    def to_caller(name: str) -> None:
        def serve(sock: socket.socket) -> None:
            sock.sendall(raw.greeting(os.urandom(32)))
            sock.sendall(answers[name](raw.read(sock, raw.AUTH_BYTES)))

        assert isinstance(victim(serve), AuthenticationError)

    bench.each(to_caller, answers)
    same_nonce: list[bytes] = []

    def two_victims(_: int) -> None:
        """Both are greeted with the same nonce, and each gets the other's proof."""
        m1 = raw.greeting(os.urandom(32))
        first = collect_auth(m1)

        def serve(sock: socket.socket) -> None:
            sock.sendall(m1)
            same_nonce.append(raw.read(sock, raw.AUTH_BYTES))
            sock.sendall(first[raw.SIGNED_BYTES :])

        assert isinstance(victim(serve), AuthenticationError)
        assert isinstance(victim(lambda sock: sock.sendall(first[: raw.GREETING_BYTES])), ProtocolError)

    bench.each(two_victims, range(2))
    cluster = bench.cluster()
    with contextlib.ExitStack() as stack:  # two connections to the server, which are played against each other
        one, m1 = raw.knock(cluster.port)
        stack.enter_context(one)

        def to_server(auth: bytes) -> None:
            refused(cluster, lambda mine: auth)

        signed = raw.signed_auth(b"C", USER_BYTES)
        bench.each(to_server, [
            other, same_nonce[0], m1 + m1 + m1[: raw.AUTH_BYTES - 80], signed + m1[8:], signed + raw.REFUSAL,
            signed + raw.session(KEY, m1, signed).server_proof, signed + raw.session(KEY, m1, signed).client_proof,
        ])

    def own_server_proof(m1: bytes) -> bytes:
        """What would prove the server, by somebody who had been told it."""
        return signed + raw.session(KEY, m1, signed).server_proof

    refused(cluster, own_server_proof)
    bench.count()
    cluster.check_alive()


@attack("path", "role, user or nonce of an honest AUTH exchanged on the way")
def exchanged_claims(bench: Bench) -> None:
    """All of M1 and M2 is in what the proof proves: a controller does not become a node, nor one user another."""
    cluster = bench.cluster()

    def work(change: Callable[[bytes], bytes]) -> None:
        def auth(m1: bytes) -> bytes:
            honest = raw.proving(b"C", USER_BYTES, KEY)(m1)
            made = change(honest)
            assert made != honest and len(made) == len(honest)
            return made

        refused(cluster, auth)

    bench.each(work, [
        lambda a: a[:6] + b"N" + a[7:], lambda a: a[:8] + os.urandom(32) + a[40:],
        lambda a: a[:40] + b"root".ljust(32, b"\0") + a[72:], lambda a: a[:40] + a[40:71] + b"x" + a[72:],
        lambda a: a[:72] + a[72:][::-1], lambda a: a[:72] + bytes([a[72] ^ 1]) + a[73:],
        lambda a: a[:103] + bytes([a[103] ^ 0x80]),
        lambda a: raw.proving(b"N", USER_BYTES, KEY)(bytes(40))[:72] + a[72:],
    ])
    cluster.join().close()  # what is not exchanged is let in
    cluster.check_alive()


@attack("listens", "a recorded AUTH replayed")
def replayed_auth(bench: Bench) -> None:
    """The server's nonce is fresh each time, so that a proof is good once."""
    cluster = bench.cluster()
    auth = _recorded(bench, cluster)[0]
    assert auth[40:72].rstrip(b"\0") == USER_BYTES
    bench.each(lambda _: refused(cluster, lambda m1: auth), range(8 if bench.short else 200), threads=40)
    cluster.check_alive()


@attack("listens", "a recorded session replayed, to a server and to a caller")
def replayed_session(bench: Bench) -> None:
    """Nothing of it is accepted: there is a fresh nonce on either side. No STATUS is answered, and no call returns.

    Nor are the secret, what is derived of it, or a key of the session among its bytes.
    """
    cluster = bench.cluster()
    up, down = _recorded(bench, cluster)
    keys = raw.session(KEY, down[: raw.GREETING_BYTES], up[: raw.SIGNED_BYTES])
    assert keys.client_proof in up and keys.server_proof in down
    assert not [key for key in (SECRET.encode(), KEY, *keys.data) if key in up + down]

    def to_server(_: int) -> None:
        sock, _m1 = raw.knock(cluster.port)
        with sock, contextlib.suppress(ConnectionError):
            sock.sendall(up)
            assert raw.read_to_end(sock) in (b"", raw.REFUSAL)

    bench.each(to_server, range(4 if bench.short else 50), threads=25)
    bench.each(
        lambda _: _is(AuthenticationError, victim(lambda sock: sock.sendall(down))), range(4 if bench.short else 50))
    cluster.check_alive()


def _recorded(bench: Bench, cluster: Watched) -> tuple[bytes, bytes]:
    """Both directions of an honest caller's session, which is listened to."""
    with raw.Middle(cluster.port) as middle:
        assert achilles.cluster_status(**cluster.address | {"port": middle.port})["nodes"] == []
        pair = middle.pairs[0]
        assert pair.over[0].wait(raw.SECONDS) and pair.over[1].wait(raw.SECONDS)
        up, down = (pair.handshake[way] + b"".join(f.raw for f in pair.frames[way]) for way in (raw.UP, raw.DOWN))
    return up, down


def _is(kind: type[BaseException], value: Any) -> None:
    assert isinstance(value, kind), repr(value)


@attack("port", "wrong magic, version, role, padding; too little")
def malformed_auth(bench: Bench) -> None:
    """Even from who knows the secret: no answer, and the end of the connection. A caller is as strict with a server."""
    cluster = bench.cluster()

    def auth(**changes: Any) -> Callable[[bytes], bytes]:
        def make(m1: bytes) -> bytes:
            signed = raw.signed_auth(**{"role": b"C", "user": USER_BYTES} | changes)
            return signed + raw.session(KEY, m1, signed).client_proof

        return make

    shapes: list[dict[str, Any]] = [
        *({"version": version} for version in (0, 2, 255, 256, 65535)),
        *({"magic": magic} for magic in (b"achl", b"ACHI", b"HTTP", b"\x80\x04\x95\0", bytes(4))),
        *({"role": bytes([role])} for role in (0, ord("S"), ord("W"), ord("c"), 255)),
        *({"pad": pad} for pad in (1, 255)),
        *({"user": user} for user in (b"", b"\0" + USER_BYTES, USER_BYTES + b"\0x", b"a\0" * 16)),
    ]
    cluster.join().close()  # the honest one is let in
    bench.each(lambda shape: _none(raw.claim(cluster.port, auth(**shape))), shapes)

    def short(count: int) -> None:
        sock, m1 = raw.knock(cluster.port)
        with sock:
            sock.sendall(auth()(m1)[:count])
            sock.shutdown(socket.SHUT_WR)
            assert raw.read_to_end(sock) == b""

    bench.each(short, range(0, raw.AUTH_BYTES, 13))
    greetings = [raw.greeting(os.urandom(32), version=version) for version in (0, 2, 65535)]
    greetings += [raw.greeting(os.urandom(32), magic=magic) for magic in (b"HTTP", b"SSH-", bytes(4))]
    greetings.append(b"ACHL\0\1\0\1" + os.urandom(32))
    bench.each(lambda m1: _is(ProtocolError, victim(lambda sock: sock.sendall(m1))), greetings)
    cluster.check_alive()


def _none(said: bytes) -> None:
    assert said == b"", said


@attack("port", "clients of other protocols: TLS, HTTP, ssh, the original's")
def strangers(bench: Bench) -> None:
    """Each gets M1, is not understood, and is let go without an answer; the server goes on."""
    cluster = bench.cluster()

    def tls() -> None:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with raw.dial(cluster.port) as sock:
            try:
                context.wrap_socket(sock)
                raise AssertionError("TLS")
            except (ssl.SSLError, ConnectionError):
                pass

    def web() -> None:
        client = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=raw.SECONDS)
        try:
            client.request("GET", "/", headers={"X-Long": "x" * 4000})
            client.getresponse()
            raise AssertionError("HTTP")
        except (http.client.HTTPException, ConnectionError):
            pass
        finally:
            client.close()

    def says(data: bytes) -> Callable[[], None]:
        def say() -> None:
            said = raw.claim(cluster.port, lambda m1: data.ljust(raw.AUTH_BYTES, b"\n"))
            assert said in (b"", raw.REFUSAL), said

        return say

    others = [tls, web, says(b"SSH-2.0-OpenSSH_9.6\r\n"), says(b"\x80\x03}q\x00X\x05\x00\x00\x00GREETq\x01."),
              says(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), says(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")]
    bench.each(lambda other: other(), others * (1 if bench.short else 10))
    cluster.check_alive()


@attack("port", "a pickle in every field, before authentication")
def pickles(bench: Bench) -> None:
    """What it would make never appears, and the server has imported neither pickle nor dill when it ends.

    Backs "unpickles nothing in the server", and of who reaches the port, "have more than those 104 bytes read, or
    anything run".
    """
    cluster = bench.cluster()
    folder = bench._folder("pickles")
    bomb = b"cos\nmkdir\n(S'pwn'\ntR."
    subprocess.run([sys.executable, "-c", f"import pickle; pickle.loads({bomb!r})"], cwd=folder, check=True)
    assert (folder / "pwn").is_dir(), "the pickle does what it shall"
    served = os.readlink(f"/proc/{cluster.server.pid}/cwd")
    target = os.path.join(served, "pwn")
    assert not os.path.exists(target)
    field = bomb.ljust(32, b"\0")
    noise = os.urandom(32)
    shapes = {
        "user": struct.pack(">4sHsx32s32s32s", b"ACHL", 1, b"C", noise, field, noise),
        "nonce": struct.pack(">4sHsx32s32s32s", b"ACHL", 1, b"N", field, USER_BYTES, noise),
        "proof": struct.pack(">4sHsx32s32s32s", b"ACHL", 1, b"C", noise, USER_BYTES, field),
        "magic": (bomb * 5)[: raw.AUTH_BYTES], "all": bomb.ljust(raw.AUTH_BYTES, b"\0"),
        "length first": struct.pack(">I", len(bomb)) + bomb.ljust(raw.AUTH_BYTES, b"\0"),
        "dill": b"\x80\x04\x95" + bomb.ljust(raw.AUTH_BYTES, b"."), "much": bomb * 10_000,
    }
    bench.each(lambda name: refused(cluster, lambda m1: shapes[name]), list(shapes))

    def frames_without(place: int) -> None:
        """The pickle in the envelope of a frame, which stands where its tag, if any, is wrong."""
        with cluster.join() as link:
            kind = ("HELLO", "JOB", "TASK", "TASK", "STATUS")[place]
            frame = raw.encode(kind, chunks=[raw.Chunk(0, letter=bomb)]) if place == 3 else raw.encode(kind, bomb)
            link.sock.sendall(frame._replace(tag=os.urandom(32)).raw)
            assert not [f for f in link.rest() if f.kind not in ("CLUSTER", "PING")]

    bench.each(frames_without, range(5))
    with cluster.join() as link:  # and where its tag is right: the server loads nothing then either
        link.sequence[raw.UP] = 0
        for frame in session_up(link)[1:]:
            link.sock.sendall(frame.raw)
        link.send("JOB", chunks=job(bomb, bomb), job=2)
        link.send("TASK", chunks=[raw.Chunk(0, letter=bomb)], job=2)
        link.send("STATUS")
        for _ in range(5):
            link.wait_for("STATUS")
        link.sock.shutdown(socket.SHUT_WR)
        link.rest()
    bench.count()
    cluster.check_alive()
    modules = cluster.modules()
    assert not os.path.exists(target), "it was loaded"
    assert "achilles.server.exchange" in modules
    loaders = {"pickle", "_pickle", "dill", "cloudpickle", "multiprocess", "achilles.objects.letters"}
    assert not modules & loaders, modules & loaders


@attack("port", "an unknown user, a wrong secret: which is it?")
def refusals_are_alike(bench: Bench) -> None:
    """The same bytes, after the same time: the medians are within 5 ms, and up to 5 more where halves of a kind differ.

    All kinds are tried in turn, in an order that is drawn anew each time, so that load falls on all alike. The short
    form allows 25 ms. Where the machine was too busy for that many tries to tell, there are more of them, and the
    medians are those of all. Backs "learn whether a username exists".
    """
    cluster = bench.cluster()
    claims = {
        "a wrong secret": (b"C", USER_BYTES, WRONG),
        "an unknown user": (b"C", b"nobody", raw.derive(b"nobody", SECRET)),
        "a node's wrong secret": (b"N", USER_BYTES, WRONG), "an unknown long user": (b"N", b"u" * 32, WRONG),
    }
    times: dict[str, list[float]] = {name: [] for name in claims}

    def work(name: str) -> None:
        role, user, key = claims[name]
        sock, m1 = raw.knock(cluster.port)
        with sock:
            auth = raw.proving(role, user, key)(m1)
            began = time.perf_counter()
            sock.sendall(auth)
            assert raw.read(sock, raw.PROOF_BYTES) == raw.REFUSAL
            times[name].append(time.perf_counter() - began)
            assert raw.read_to_end(sock) == b""

    work("a wrong secret")
    times["a wrong secret"].clear()
    rounds, threads, batches = (5, 10, 6) if bench.short else (40, 4, 3)  # few at a time: what is measured is not us
    for _ in range(batches):
        bench.each(work, [name for _ in range(rounds) for name in bench.rng.sample(list(claims), len(claims))], threads)
        medians = [statistics.median(each) for each in times.values()]
        spread = max(medians) - min(medians)
        noise = max(abs(statistics.median(each[::2]) - statistics.median(each[1::2])) for each in times.values())
        if spread < (bound := 0.025 if bench.short else 0.005 + min(noise, 0.005)):
            break
    found = (f"medians {', '.join(f'{1000 * m:.1f}' for m in medians)} ms: {1000 * spread:.1f} ms apart, "
             f"halves of one kind {1000 * noise:.1f} ms")
    bench.note(remark=found)
    assert spread < bound, found


@attack("port", "user names that are equal in the first 32 bytes")
def long_user_names(bench: Bench) -> None:
    """A name is refused, not cut: no other name passes for a user's, though the field has room for 32 bytes."""
    name = "u" * 32
    cluster = bench.cluster(user=name)
    honest = raw.derive(name.encode(), SECRET)
    raw.join(cluster.port, b"C", name.encode(), honest, HELLO).close()
    longer = [name + "x", name + "\0", name + " root", name + "u" * 1000, "é" * 17]
    for other in longer:
        try:
            achilles.cluster_status("127.0.0.1", cluster.port, other, SECRET)
            raise AssertionError("a longer name is let in")
        except ConfigurationError:
            bench.count()
    claims = [(name.encode(), raw.derive(other.encode(), SECRET)) for other in longer]  # cut, with the key of the whole
    claims += [(other.encode()[:32], raw.derive(other.encode(), SECRET)) for other in longer]
    for other in (name[:-1], "u" * 31 + "U", "u" * 31 + "\x01"):
        claims += [(other.encode(), honest), (other.encode(), raw.derive(other.encode(), SECRET))]
    bench.each(lambda claim: refused(cluster, raw.proving(b"C", *claim)), claims, threads=20)
