"""How a connection begins: TCP, the handshake of PROTOCOL.md, section 2, and HELLO.

::

    client: connect ─▶ [TLS] ─▶ Channel         server: accept ─▶ [TLS] ─▶ answer_claim ─▶ Channel

With ENCRYPT=yes on both sides, TLS carries the handshake and all that follows (`tls.py`). A side that is told to
encrypt never goes on in the clear. Two sides of different modes say so to each other with 8 bytes, and end at once.

The module knows sockets and deadlines. The bytes of the handshake are `auth.py`'s. Every function blocks until its
deadline at most. Any thread may call it.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import AuthenticationError, ProtocolError, ServerUnreachable
from . import auth
from .channel import SILENCE_SECONDS, TICK_SECONDS, Channel, Stream

__all__ = ["CONNECT_SECONDS", "PYTHON", "answer_claim", "connect", "hello", "receive", "receive_exactly", "set_options"]

CONNECT_SECONDS = 10.0  # for the connection and the handshake together
RETRY_SECONDS = 0.2  # between two tries, with jitter; a server without a place has one again after some ms
# This Python's name for HELLO (PROTOCOL.md, section 6): "3.14", or "3.14t" for a free-threaded build.
PYTHON = "{}.{}".format(*sys.version_info) + "t" * bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
LOST = ConnectionResetError, ConnectionAbortedError, BrokenPipeError, ServerUnreachable  # the server had no place


def hello(cpu_count: int = 0) -> dict[str, Any]:
    """Return the body of a client's HELLO for this process (PROTOCOL.md, section 6)."""
    from .. import __version__

    return {"python": PYTHON, "version": __version__, "cpu_count": cpu_count, "pid": os.getpid()}


def connect(
    host: str, port: int, role: bytes, username: str, key: bytes, timeout: float = CONNECT_SECONDS,
    encrypt: bool = False,
) -> Channel:
    """Connect to a server and authenticate; blocks up to `timeout` seconds.

    A server that closes before its WELCOME had no place for the client. The client tries again until the time is over.

    :param key: `auth.derive_key(username, secret)`.
    :param encrypt: by TLS, as the server must.
    :raises AuthenticationError: the server refuses, or does not know the secret itself.
    :raises ProtocolError: the peer is no achilles server, or a server of another version or mode.
    :raises ServerUnreachable: there is no answer in time.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return _connect_once((host, port), role, username, key, deadline, encrypt)
        except AuthenticationError as e:
            raise AuthenticationError(
                f"{e} ({host}:{port}, user {username!r}): compare USERNAME and SECRET_KEY with those "
                "in the server's configuration file"
            ) from None
        except ProtocolError as e:
            raise ProtocolError(f"{host}:{port}: {e}") from None
        except OSError as e:
            if not isinstance(e, LOST) or time.monotonic() + RETRY_SECONDS > deadline:
                raise ServerUnreachable(f"no achilles server answers at {host}:{port} ({e.strerror or e})") from e
        threading.Event().wait(RETRY_SECONDS * (0.5 + random.random()))


def answer_claim(
    sock: Stream, find_keys: Callable[[bytes], Sequence[bytes]], deadline: float, binding: bytes = auth.NO_BINDING,
) -> tuple[bytes, bytes, auth.Keys | None]:
    """Send M1 and read M2 by `deadline` (monotonic). The caller sends the answer.

    :param find_keys: gives the K of each secret that would do for a user.
    :returns: the claimed role and user, and the session's keys, or None if no secret proves the claim.
    """
    m1 = auth.greeting(secrets.token_bytes(auth.NONCE_BYTES))
    sock.sendall(m1)  # so little never blocks
    opening = receive_exactly(sock, auth.OPENING_BYTES, deadline)
    auth.check_mode(opening, auth.PLAIN)
    m2 = opening + receive_exactly(sock, auth.AUTH_BYTES - auth.OPENING_BYTES, deadline)
    role, user = auth.read_claim(m2)
    return role, user, auth.accept_claim(find_keys(user), m1, m2, binding)


def receive_exactly(sock: Stream, count: int, deadline: float) -> bytes:
    """Return `count` bytes by `deadline` (monotonic). Raises as `receive`."""
    received = bytearray(count)
    filled = 0
    while filled < count:
        filled += receive(sock, memoryview(received)[filled:], deadline)
    return bytes(received)


def receive(sock: Stream, place: memoryview, deadline: float) -> int:
    """Return how many bytes came into `place`, perhaps 0 where a TLS record was cut.

    ServerUnreachable at end of file, TimeoutError after `deadline` (monotonic).
    """
    count = 0
    sock.settimeout(max(deadline - time.monotonic(), 0.001))
    with contextlib.suppress(BlockingIOError):
        count = sock.recv_into(place)
        if not count:
            raise ServerUnreachable("the connection was closed during the handshake")
    if time.monotonic() > deadline:
        raise TimeoutError("the handshake took too long")
    return count


def set_options(sock: socket.socket) -> None:
    """Set the options of every TCP connection of achilles, where the system has them."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # data that nobody acknowledges ends the connection, too
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE_SECONDS * 1000))


def _connect_once(
    address: tuple[str, int], role: bytes, username: str, key: bytes, deadline: float, encrypt: bool
) -> Channel:
    """Connect, and climb the client's side of the ladder."""
    sock = socket.create_connection(address, timeout=max(deadline - time.monotonic(), 0.001))
    try:
        set_options(sock)
        stream, binding, opening = _open(sock, username, key, deadline, encrypt)
        m1 = opening + receive_exactly(stream, auth.GREETING_BYTES - len(opening), deadline)
        auth.read_greeting(m1)
        signed = auth.claim(role, username, secrets.token_bytes(auth.NONCE_BYTES))
        keys = auth.session_keys(key, m1, signed, binding)
        stream.sendall(signed + keys.client_proof)
        auth.check_answer(keys, receive_exactly(stream, auth.PROOF_BYTES, deadline))
        stream.settimeout(TICK_SECONDS)
        return Channel(stream, "S" + role.decode(), (keys.client_data, keys.server_data))
    except BaseException:
        sock.close()
        raise


def _open(
    sock: socket.socket, username: str, key: bytes, deadline: float, encrypt: bool
) -> tuple[Stream, bytes, bytes]:
    """Read the mode of a server. Return the stream for the handshake, its binding, and the part of M1 that is read."""
    mode = auth.TLS if encrypt else auth.PLAIN
    opening = receive_exactly(sock, auth.OPENING_BYTES, deadline)
    try:
        auth.read_greeting(opening, mode)
    except ProtocolError:
        with contextlib.suppress(OSError):
            sock.sendall(mode)  # a server of the other mode says so, too
            sock.recv(auth.GREETING_BYTES)  # the rest of M1: a socket that closes with unread bytes resets
        raise
    if not encrypt:
        return sock, auth.NO_BINDING, opening
    from .tls import client  # a process that does not encrypt pays for no OpenSSL

    stream = client(sock, auth.tls_key(username, key), deadline)
    return stream, stream.binding, b""
