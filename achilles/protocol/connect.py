"""The beginning of a connection: TCP, the handshake of PROTOCOL.md, section 2, and HELLO.

::

    client: connect ─▶ [TLS] ─▶ M1, M2, M3 ─▶ Channel         server: accept ─▶ [TLS] ─▶ M1, M2, M3 ─▶ Channel

With ENCRYPT=yes on both sides, TLS carries the handshake and all frames (`tls.py`). A side with ENCRYPT=yes never goes
on in the clear. Two sides of different modes tell each other their modes with 8 bytes, and end at once. The server
decides how long a refusal takes.

The module knows sockets and deadlines. `auth.py` makes the bytes of the handshake. Every function blocks until its
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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import AuthenticationError, ProtocolError, ServerUnreachable
from . import auth
from .channel import SILENCE_SECONDS, TICK_SECONDS, Channel

__all__ = ["CONNECT_SECONDS", "PYTHON", "accept", "connect", "hello", "receive", "receive_exactly", "set_options"]

CONNECT_SECONDS = 10.0  # for the connection and the handshake together
RETRY_SECONDS = 0.2  # between tries, with jitter: a full server has a place again after some ms
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
    """Connect to a server and authenticate. Blocks up to `timeout` seconds.

    A server that closes before its WELCOME had no place for the client. The client tries again until the deadline.

    :param key: `auth.derive_key(username, secret)`.
    :param encrypt: by TLS; the server must do the same.
    :raises AuthenticationError: the server refuses, or does not know the secret itself.
    :raises ProtocolError: the peer is no achilles server, or a server of another version or mode.
    :raises ServerUnreachable: no answer came in time.
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


def accept(
    sock: socket.socket, find_keys: Callable[[bytes], Sequence[bytes]], deadline: float,
    tls_keys: Mapping[str, bytes] | None = None, hold: Callable[[], object] = lambda: None,
) -> tuple[Channel, bytes, bytes]:
    """Authenticate a client by `deadline` (monotonic). Return the connection, and the client's role and user.

    :param find_keys: returns the K of each valid secret of a user.
    :param tls_keys: the key of each identity; None if this server does not encrypt.
    :param hold: called before a refusal is sent.
    :raises AuthenticationError: the client was refused.
    :raises ProtocolError: the client has another mode or version, or is not an achilles client. It gets no answer.
    """
    stream: Any = sock
    if tls_keys is not None:
        from .tls import server  # without encryption, no OpenSSL

        stream = server(sock, tls_keys, _begin(sock, auth.TLS, deadline), deadline, hold)
    m1 = auth.PLAIN + secrets.token_bytes(auth.NONCE_BYTES)
    m2 = _begin(stream, m1, deadline) + receive_exactly(stream, auth.AUTH_BYTES - auth.OPENING_BYTES, deadline)
    role, user = auth.read_claim(m2)
    keys = auth.accept_claim(find_keys(user), m1, m2, getattr(stream, "binding", auth.NO_BINDING))
    if keys is None:
        hold()
        stream.sendall(auth.REFUSAL)
        raise AuthenticationError(f"the proof as user {user.decode(errors='replace')!r} is wrong")
    stream.sendall(keys.server_proof)
    stream.settimeout(TICK_SECONDS)
    return Channel(stream, role.decode() + "S", (keys.server_data, keys.client_data)), role, user


def _begin(sock: Any, said: bytes, deadline: float) -> bytes:
    """Send a server's first bytes, which begin with its mode. Return the first 8 bytes of the client."""
    sock.sendall(said)  # so little never blocks
    opening = receive_exactly(sock, auth.OPENING_BYTES, deadline)
    auth.check_mode(opening, said[: auth.OPENING_BYTES])
    return opening


def receive_exactly(sock: Any, count: int, deadline: float) -> bytes:
    """Return `count` bytes by `deadline` (monotonic). Raises as `receive`."""
    received = bytearray(count)
    filled = 0
    while filled < count:
        filled += receive(sock, memoryview(received)[filled:], deadline)
    return bytes(received)


def receive(sock: Any, place: memoryview, deadline: float) -> int:
    """Return how many bytes came into `place`, perhaps 0 if a TLS record was cut.

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
    """Set the options of every TCP connection of achilles, if the system has them."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # unacknowledged data ends the connection, too
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE_SECONDS * 1000))


def _connect_once(
    address: tuple[str, int], role: bytes, username: str, key: bytes, deadline: float, encrypt: bool
) -> Channel:
    """Connect and authenticate."""
    sock = socket.create_connection(address, timeout=max(deadline - time.monotonic(), 0.001))
    stream: Any = sock
    try:
        set_options(sock)
        if encrypt:
            from .tls import client  # without encryption, no OpenSSL

            _read_opening(sock, auth.TLS, deadline)
            stream = client(sock, auth.tls_key(username, key), deadline)
        m1 = _read_opening(stream, auth.PLAIN, deadline) + receive_exactly(stream, auth.NONCE_BYTES, deadline)
        signed = auth.claim(role, username, secrets.token_bytes(auth.NONCE_BYTES))
        keys = auth.session_keys(key, m1, signed, getattr(stream, "binding", auth.NO_BINDING))
        stream.sendall(signed + keys.client_proof)
        auth.check_answer(keys, receive_exactly(stream, auth.PROOF_BYTES, deadline))
        stream.settimeout(TICK_SECONDS)
        return Channel(stream, "S" + role.decode(), (keys.client_data, keys.server_data))
    except BaseException:
        sock.close()
        raise


def _read_opening(sock: Any, mode: bytes, deadline: float) -> bytes:
    """Read and check the first 8 bytes of a server. A server of another mode gets this side's mode as the answer."""
    opening = receive_exactly(sock, auth.OPENING_BYTES, deadline)
    try:
        auth.check_opening(opening, mode)
    except ProtocolError:
        with contextlib.suppress(OSError):
            sock.sendall(mode)
            receive(sock, memoryview(bytearray(auth.NONCE_BYTES)), deadline)  # a socket closed with unread bytes resets
        raise
    return opening
