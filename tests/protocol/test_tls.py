"""A socket that encrypts, over socket pairs: the handshake, what a selector sees, and the end.

Nothing here sleeps. The Channel's own tests run over it as well (`test_channel.py`).
"""

import contextlib
import hmac
import os
import random
import select
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from links import CAN_ENCRYPT, KEY, SECONDS, closing_fixture, in_thread, tls_pair  # noqa: F401
from wire import batch, encode

from achilles.errors import AchillesError, AuthenticationError, ProtocolError, ServerUnreachable
from achilles.protocol import auth, channel, connect, reader
from achilles.protocol.channel import Channel
from achilles.protocol.frames import Frame, Kind

pytestmark = pytest.mark.skipif(not CAN_ENCRYPT, reason="this Python cannot encrypt")
if CAN_ENCRYPT:
    from achilles.protocol import tls
ANN = auth.tls_key("ann", KEY)
OTHER = auth.tls_key("ann", bytes(32))
WRONG_KEY = ANN[0], OTHER[1]


@pytest.fixture
def ends(closing):
    """The server's end and the client's, which do not block."""
    made = tls_pair(closing)
    for end in made:
        closing.callback(end.close)
        end.setblocking(False)
    return made


def receive(end, room=1 << 16):
    """What one recv_into gives; None where no record is whole."""
    place = bytearray(room)
    try:
        return bytes(place[: end.recv_into(memoryview(place))])
    except BlockingIOError:
        return None


def is_readable(end):
    return bool(select.select([end], [], [], 0)[0])


# The handshake.


def test_both_ends_have_one_binding_that_no_other_connection_has(closing):
    bindings = []
    for _ in range(3):
        made = tls_pair(closing)
        assert made[0].binding == made[1].binding != auth.NO_BINDING
        assert (made[0]._tls.version(), made[1]._tls.cipher()[0]) == ("TLSv1.3", "TLS_CHACHA20_POLY1305_SHA256")
        bindings.append(made[0].binding)
        for end in made:
            end.close()
    assert len({*bindings}) == 3 and {*map(len, bindings)} == {32}


def test_the_binding_is_in_the_proof_so_that_two_connections_cannot_be_joined(closing):
    m1, signed = auth.PLAIN + bytes(32), auth.claim(auth.NODE, "ann", bytes(32))
    proof = auth.session_keys(KEY, m1, signed, b"a" * 32).client_proof
    assert auth.accept_claim([KEY], m1, signed + proof, b"a" * 32) is not None
    for other in (b"b" * 32, auth.NO_BINDING):
        assert auth.accept_claim([KEY], m1, signed + proof, other) is None


def meet(closing, known, client_known):
    """Why the server's handshake ended, and why the client's did."""
    ours, theirs = socket.socketpair()
    closing.callback(ours.close)
    closing.callback(theirs.close)
    deadline = time.monotonic() + SECONDS

    def serve():
        with pytest.raises(AchillesError) as caught:
            tls.server(ours, known, b"", deadline, bool)
        ours.close()
        return caught.value

    served = in_thread(closing, serve)
    with pytest.raises(AchillesError) as caught:
        tls.client(theirs, client_known, deadline)
    return served(), caught.value


@pytest.mark.parametrize("known", [OTHER, WRONG_KEY, auth.tls_key("bob", KEY)], ids=["secret", "key", "user"])
def test_a_client_with_another_key_is_refused(closing, known):
    server_error, client_error = meet(closing, dict([ANN]), known)
    assert isinstance(server_error, AuthenticationError) and "does not know the secret" in str(server_error)
    assert isinstance(client_error, AuthenticationError) and "refused the username or the secret" in str(client_error)


def test_a_previous_secret_is_known_by_its_identity(closing):
    for key in (KEY, bytes(32)):
        for end in tls_pair(closing, key, dict([ANN, OTHER])):
            end.close()


def test_a_client_that_does_not_encrypt_is_named(closing):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(auth.PLAIN)
        with pytest.raises(ProtocolError, match="the other side does not encrypt, and this side does: set ENCRYPT=yes"):
            connect.accept(ours, list, time.monotonic() + SECONDS, {})
        assert theirs.recv(100) == auth.TLS == b"ACHS\0\1\0\0"


@pytest.mark.parametrize("first", [b"\x16\x03\x01\x40\x00\x01\x01\x86\xa0", b"\x16\x03\x01\x10\x00\x01\x01\x86\xa0"])
def test_of_a_client_that_has_proved_nothing_8_kib_are_read(first):
    """A ClientHello may have 128 KiB as far as OpenSSL is concerned."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall((first + bytes(4096 + 5 - len(first))) * 5)
        with pytest.raises(AchillesError):
            tls.server(ours, dict([ANN]), b"", time.monotonic() + 0.2, bool)
        left = len(ours.recv(1 << 20, socket.MSG_DONTWAIT))
        assert left >= 5 * (4096 + 5) - tls.HANDSHAKE_BYTES


def hello():
    """What a client says first."""
    outgoing = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_psk_client_callback(lambda hint: ANN)
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


HELLO = hello() if CAN_ENCRYPT else b""


@settings(deadline=None, max_examples=200)
@given(some.one_of(
    some.binary(min_size=8, max_size=600), some.binary(max_size=600).map(lambda junk: HELLO + junk),
    some.integers(8, max(len(HELLO), 8)).map(lambda cut: HELLO[:cut]),
    some.lists(some.tuples(some.integers(8, max(len(HELLO) - 1, 8)), some.integers(1, 255)), min_size=1).map(
        lambda flips: bytes(byte ^ dict(flips).get(place, 0) for place, byte in enumerate(HELLO)))))
def test_half_handshakes_and_junk_end_in_an_error_of_ours(data):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises((AuthenticationError, ProtocolError, ServerUnreachable)):
            connect.accept(ours, list, time.monotonic() + SECONDS, dict([ANN]))


def test_the_handshake_has_one_deadline_whatever_arrives(closing):
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def drip():
        with theirs, contextlib.suppress(OSError):
            for byte in HELLO:
                theirs.send(bytes([byte]))
                if stop.wait(0.002):
                    return

    dripping = in_thread(closing, drip)
    with ours, pytest.raises(TimeoutError):
        tls.server(ours, dict([ANN]), b"", time.monotonic() + 0.1, bool)
    stop.set()
    dripping()


def test_a_server_gives_no_ticket_and_takes_no_session_again(ends):
    server, client = ends
    server.sendall(b"x")
    assert receive(client) == b"x" and not client._tls.session.has_ticket


def test_a_configuration_of_openssl_does_not_take_forward_secrecy_away(tmp_path):
    """It may allow a handshake without (EC)DHE for all programs of a machine. A ClientHello tells."""
    (tmp_path / "openssl.cnf").write_text(
        "openssl_conf = all\n[all]\nssl_conf = ssl\n[ssl]\nsystem_default = ours\n[ours]\nOptions = AllowNoDHEKEX\n")
    code = (
        "import socket, ssl, time\n"
        "context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)\n"
        "from achilles.protocol import tls\n"
        "print(bool(context.options & tls.ALLOW_NO_DHE_KEX))\n"
        "ours, theirs = socket.socketpair()\n"
        "theirs.shutdown(socket.SHUT_WR)\n"
        "try: tls.client(ours, ('ann:12345678', bytes(32)), time.monotonic() + 10)\n"
        "except OSError: pass\n"
        "print(theirs.recv(4096).hex())")
    env = os.environ | {"OPENSSL_CONF": str(tmp_path / "openssl.cnf")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    allowed, said = done.stdout.split()
    assert allowed == "True", "the file does what it shall"
    assert "002d00020101" in said, "psk_key_exchange_modes has psk_dhe_ke alone"


# What a selector sees.


def test_whatever_has_come_whole_is_given_where_a_selector_sees_nothing_any_more(ends):
    """So a loop never waits for bytes that it has. Places of a reader have 64 KiB at least."""
    server, client = ends
    rng = random.Random(1)
    sent = got = b""
    while len(sent) < 3 << 20:
        data = os.urandom(rng.choice([1, 40, 5000, 20_000, 150_000]))
        unsent = server.encrypt(data)
        while unsent:
            with contextlib.suppress(BlockingIOError):
                unsent = unsent[server.send(unsent) :]
            while is_readable(client):
                got += receive(client, rng.choice([64 << 10, 100_000, 256 << 10])) or b""
        sent += data
        assert got == sent, "bytes that no selector sees"


def test_every_place_of_a_reader_has_64_kib():
    """While a letter of 40 MB comes in pieces of all sizes."""
    head, envelope, letters = encode(Kind.TASK, batch(0, bytes(40_000_000)))
    data = b"".join([head, envelope, *letters])
    stream, rng, place, found = reader.FrameReader("SN", None), random.Random(2), 0, []
    while place < len(data):
        space = stream.space()
        assert len(space) >= 64 << 10
        piece = data[place : place + min(len(space), rng.choice([1, 1000, 65_536, 10**6]))]
        space[: len(piece)] = piece
        del space
        found += stream.received(len(piece))
        place += len(piece)
    assert [frame.kind for frame in found] == [Kind.TASK]


def test_frames_that_came_with_the_welcome_are_given_without_the_selector(closing, ends):
    """A place of the handshake is short, and its record may be long."""
    server, client = ends
    server.sendall(b"W" * 32 + bytes.fromhex("0300 0000 00000002") + b"{}")
    client.settimeout(SECONDS)
    assert connect.receive_exactly(client, 32, time.monotonic() + SECONDS) == b"W" * 32
    client.setblocking(False)
    link = Channel(client, "SN")
    closing.callback(link.close)
    assert link.receive() == [Frame(Kind.PING, {})]


def test_a_record_that_is_cut_gives_nothing_but_counts_as_a_sign_of_life(closing, ends, monkeypatch):
    server, client = ends
    server._tls.write(bytes(10_000))
    data = server._outgoing.read()
    link = Channel(client, "SN")
    closing.callback(link.close)
    heard = link.last_heard
    monkeypatch.setattr(channel.time, "monotonic", lambda: heard + 1)
    for start, expected in ((0, heard), (1000, heard + 1), (2000, heard + 1)):
        server._sock.sendall(data[start : start + 1000])
        assert link.receive() == [] and link.last_heard == expected
    server._sock.sendall(data[3000:])
    with pytest.raises(ProtocolError):  # ten thousand zeros are no frame
        link.receive()


# The end.


def test_one_that_has_ended_writing_still_reads(ends):
    server, client = ends
    client.sendall(b"the last")
    client.shutdown(socket.SHUT_WR)
    assert (receive(server), receive(server)) == (b"the last", b"")
    for size in (10, 40_000):
        server.sendall(bytes(size))
        assert b"".join(iter(lambda: receive(client) or b"", b"")) == bytes(size)
    server.shutdown(socket.SHUT_WR)
    assert receive(client) == b""


def test_the_end_of_writing_is_said_in_tls_as_well(ends):
    server, client = ends
    client.shutdown(socket.SHUT_WR)
    assert server._sock.recv(100)[0] == 23  # a record, as all are in TLS 1.3, before the end of file
    assert server._sock.recv(100) == b""


def test_an_end_without_close_notify_is_an_end(ends):
    server, client = ends
    server.sendall(b"cut")
    server.shutdown(socket.SHUT_RDWR)
    assert (receive(client), receive(client), receive(client)) == (b"cut", b"", b"")


@pytest.mark.parametrize("place", [0, 3, 5, 20, -1])
def test_an_altered_record_ends_the_connection(ends, place):
    server, client = ends
    server._tls.write(b"x" * 100)
    data = bytearray(server._outgoing.read())
    data[place] ^= 1
    server._sock.sendall(data + bytes(20_000))
    with pytest.raises(AuthenticationError, match="the connection was altered on its way"):
        while receive(client) is None:
            pass


# Keys: vectors of PROTOCOL.md, section 2.


def test_identity_and_key_of_the_vectors():
    key = auth.derive_key("ann", "correct horse battery staple")
    prk = hmac.digest(bytes(32), key, "sha256")
    identity, psk = auth.tls_key("ann", key)
    assert identity == "ann:" + hmac.digest(prk, b"achilles/1 psk id\x01", "sha256")[:4].hex() == "ann:7bb56d94"
    assert psk == hmac.digest(prk, b"achilles/1 psk\x01", "sha256")
    assert psk.hex() == "8167f37fe2a124cdcf405d8001c020ab18d2319b4d4997f45b6bb0bde7d3ca22"
    assert psk != key and str(psk) == "Key(***)"
