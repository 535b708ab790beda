"""How a connection begins, over loopback and socket pairs: TCP, the handshake, and HELLO.

Nothing here sleeps: a test waits for an event, for a thread's end or for a deadline of some milliseconds.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import wait_until
from links import CAN_ENCRYPT, SECONDS, closing_fixture, in_thread, read_all  # noqa: F401

import achilles
from achilles.config import Secret, Settings
from achilles.errors import AuthenticationError, ProtocolError, ServerUnreachable
from achilles.protocol import auth
from achilles.protocol import connect as connecting
from achilles.protocol.connect import PYTHON, accept, connect, hello, receive_exactly
from achilles.protocol.frames import Frame, Kind
from achilles.server.listen import Server

KEY = bytes(range(32))
OTHER_KEY = bytes(32)
needs_tls = pytest.mark.skipif(not CAN_ENCRYPT, reason="this Python cannot encrypt")


# The handshake.


@pytest.fixture
def listener(closing):
    return closing.enter_context(socket.create_server(("127.0.0.1", 0)))


def serve(listener, key=KEY, close_first=0):
    """Accept one client, having closed so many before their WELCOME; its claim, and what was read, if it was proved."""
    for _ in range(close_first):
        listener.accept()[0].close()
    sock, _ = listener.accept()
    with sock:
        try:
            link, *claimed = accept(sock, lambda _: [key], time.monotonic() + SECONDS)
        except AuthenticationError:
            return None
        link.send(Kind.PING, {})
        assert link.flush()
        return claimed, read_all(link)


@pytest.mark.parametrize("role", [auth.CONTROLLER, auth.NODE])
def test_a_client_with_the_secret_gets_in(closing, listener, role):
    served = in_thread(closing, serve, listener)
    link = connect(*listener.getsockname(), role, "ann", KEY, SECONDS)
    closing.callback(link.close)
    assert link.receive() == [Frame(Kind.PING, {})]
    link.send(Kind.BYE, {"reason": "leaving"})
    link.finish()
    link.start_writer()
    claimed, (frames, why) = served()
    assert claimed == [role, b"ann"]
    assert (frames, why) == ([Frame(Kind.BYE, {"reason": "leaving"})], "end of file")


def test_a_wrong_secret_is_refused(closing, listener):
    served = in_thread(closing, serve, listener)
    with pytest.raises(AuthenticationError, match="refused"):
        connect(*listener.getsockname(), auth.CONTROLLER, "ann", OTHER_KEY, SECONDS)
    assert served() is None


def test_a_server_that_does_not_know_the_secret_is_not_ours(closing, listener):
    def impostor():
        sock, _ = listener.accept()
        with sock:
            sock.sendall(auth.PLAIN + bytes(32))
            receive_exactly(sock, auth.AUTH_BYTES, time.monotonic() + SECONDS)
            sock.sendall(bytes(range(32)))

    served = in_thread(closing, impostor)
    with pytest.raises(AuthenticationError, match="does not know the secret"):
        connect(*listener.getsockname(), auth.CONTROLLER, "ann", KEY, SECONDS)
    served()


def test_what_is_no_server_is_said_to_be_none(closing, listener):
    def web_server():
        sock, _ = listener.accept()
        with sock:
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

    served = in_thread(closing, web_server)
    with pytest.raises(ProtocolError, match="not an achilles server"):
        connect(*listener.getsockname(), auth.CONTROLLER, "ann", KEY, SECONDS)
    served()


def test_a_client_closed_before_its_welcome_tries_again(closing, listener, monkeypatch):
    monkeypatch.setattr(connecting, "RETRY_SECONDS", 0.001)
    served = in_thread(closing, serve, listener, KEY, 3)
    link = connect(*listener.getsockname(), auth.CONTROLLER, "ann", KEY, SECONDS)
    link.close()
    assert served()[0][1] == b"ann"


def test_a_silent_server_is_given_up(listener):
    started = time.monotonic()
    with pytest.raises(ServerUnreachable, match="no achilles server answers at 127.0.0.1"):
        connect(*listener.getsockname(), auth.CONTROLLER, "ann", KEY, 0.1)
    assert time.monotonic() - started < SECONDS / 2


def test_where_nobody_listens_is_said_at_once(free_port):
    with pytest.raises(ServerUnreachable, match=f"127.0.0.1:{free_port}"):
        connect("127.0.0.1", free_port, auth.CONTROLLER, "ann", KEY, SECONDS)


# Encryption.


@pytest.fixture
def encrypted_server(closing):
    """A real one, which encrypts."""
    made = Server(Settings("127.0.0.1", 0, "ann", Secret("correct horse battery"), encrypt=True))
    thread = threading.Thread(target=made.run)
    thread.start()
    yield made
    made.end("restart")
    thread.join(SECONDS)


@needs_tls
@pytest.mark.parametrize("role", [auth.CONTROLLER, auth.NODE])
def test_a_client_that_encrypts_gets_in(encrypted_server, closing, role):
    key = auth.derive_key("ann", "correct horse battery")
    link = connect("127.0.0.1", encrypted_server.address[1], role, "ann", key, SECONDS, True)
    closing.callback(link.close)
    link.send(Kind.HELLO, hello(1))
    assert link.flush()
    while not (frames := link.receive()):
        pass
    assert frames[0].kind is Kind.HELLO


@needs_tls
def test_two_that_differ_are_told_at_once_on_both_sides(encrypted_server, closing, listener, caplog):
    caplog.set_level("INFO")
    began = time.monotonic()
    with pytest.raises(ProtocolError, match="the other side encrypts, and this side does not: set ENCRYPT=yes here"):
        connect("127.0.0.1", encrypted_server.address[1], auth.NODE, "ann", KEY, SECONDS)
    wait_until(lambda: "the other side does not encrypt, and this side does: set ENCRYPT=yes there" in caplog.text)

    def plain_server():
        sock, _ = listener.accept()
        with sock, pytest.raises(ProtocolError, match="the other side encrypts, and this side does not"):
            accept(sock, lambda _: [KEY], time.monotonic() + SECONDS)
        return True

    served = in_thread(closing, plain_server)
    with pytest.raises(ProtocolError, match="the other side does not encrypt, and this side does: set ENCRYPT=yes th"):
        connect(*listener.getsockname(), auth.NODE, "ann", KEY, SECONDS, True)
    assert served() and time.monotonic() - began < SECONDS / 3


@needs_tls
def test_an_encrypting_client_closed_before_its_welcome_tries_again(encrypted_server, monkeypatch):
    monkeypatch.setattr(connecting, "RETRY_SECONDS", 0.001)
    real, calls = connecting._read_opening, []

    def lose_three(sock, *more):
        calls.append(sock)
        if len(calls) <= 3:  # in the clear
            sock.shutdown(socket.SHUT_RDWR)
        return real(sock, *more)

    monkeypatch.setattr(connecting, "_read_opening", lose_three)
    key = auth.derive_key("ann", "correct horse battery")
    connect("127.0.0.1", encrypted_server.address[1], auth.NODE, "ann", key, SECONDS, True).close()
    assert len(calls) == 5  # the last one is inside TLS


@needs_tls
def test_a_silent_server_that_encrypts_is_given_up(closing, listener):
    def begin():
        sock, _ = listener.accept()
        sock.sendall(auth.TLS)
        return sock

    served = in_thread(closing, begin)
    with pytest.raises(ServerUnreachable, match="no achilles server answers"):
        connect(*listener.getsockname(), auth.NODE, "ann", KEY, 0.2, True)
    served().close()


# The server's side.


def answer(data, seconds=SECONDS, end=True):
    """A server's side of the handshake with a client that says `data`."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        if end:
            theirs.shutdown(socket.SHUT_WR)
        return accept(ours, lambda _: [KEY], time.monotonic() + seconds)


def test_of_a_claim_104_bytes_are_read():
    """Whatever is behind them stays with the system until the claim was proved."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(auth.claim(auth.NODE, "ann", bytes(32)) + bytes(32) + b"x" * 1000)
        with pytest.raises(AuthenticationError, match="'ann'"):
            accept(ours, lambda _: [KEY], time.monotonic() + SECONDS)
        assert ours.recv(2000) == b"x" * 1000


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n" + bytes(100), bytes(104), b"\xff" * 104])
def test_junk_is_no_claim(data):
    with pytest.raises(ProtocolError):
        answer(data)


@pytest.mark.parametrize("data", [b"", b"A", auth.claim(auth.NODE, "ann", bytes(32))])
def test_a_claim_cut_short_is_none(data):
    with pytest.raises(ServerUnreachable):
        answer(data)


@pytest.mark.parametrize("data", [b"", auth.claim(auth.NODE, "ann", bytes(32))])
def test_a_silent_client_has_until_the_deadline(data):
    with pytest.raises(TimeoutError):
        answer(data, 0.05, end=False)


def test_the_deadline_is_one_for_all_pieces(closing):
    """Bytes that drip keep nobody's place."""
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def drip():
        with theirs, contextlib.suppress(OSError):
            while not stop.wait(0.01):
                theirs.sendall(b"x")

    served = in_thread(closing, drip)
    with pytest.raises(TimeoutError):
        receive_exactly(ours, 10_000, time.monotonic() + 0.1)
    stop.set()
    ours.close()
    served()


def test_what_comes_after_the_deadline_does_not_count():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"late")
        with pytest.raises(TimeoutError):
            receive_exactly(ours, 4, time.monotonic() - 1)


# HELLO.


@pytest.mark.parametrize(("disabled", "suffix"), [(None, ""), (0, ""), (1, "t")])
def test_a_free_threaded_build_names_itself(disabled, suffix):
    """None: a Python before 3.13 does not know the question."""
    code = f"import sysconfig; sysconfig.get_config_var = {{'Py_GIL_DISABLED': {disabled}}}.get\n" \
        "from achilles.protocol.connect import PYTHON; print(PYTHON)"
    folder = os.path.dirname(achilles.__path__[0])
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "{}.{}".format(*sys.version_info) + suffix + "\n", done.stderr


def test_hello_says_what_this_process_is():
    assert hello(8) == {"python": PYTHON, "version": achilles.__version__, "cpu_count": 8, "pid": os.getpid()}
    assert hello()["cpu_count"] == 0
