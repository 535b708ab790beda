"""TLS 1.3 with the cluster's secret as its key: a socket that encrypts, for `channel.py` and `connect.py`.

The module knows one TCP socket and one pre-shared key, and no certificate, frame or role. PROTOCOL.md, section 2,
is the rule. It needs Python 3.13: `config.py` refuses ENCRYPT=yes for older versions.

::

    Channel ─▶ encrypt ─▶ outgoing ─▶ Channel ──send──▶ socket    the thread that writes: the Channel's `_writing`
    Channel ◀─ decrypt ◀─ incoming ◀───── recv_into ◀── socket    the thread that reads

Two threads must not use OpenSSL's object at once. So it works on memory alone, and `_lock` guards it and both buffers.
No system call runs under `_lock`. `send` sends encrypted bytes: the Channel keeps the bytes that the socket left.

- *A selector sees the socket alone.* `recv_into` reads only as many bytes as fit into its place after decryption. So no
  whole record stays in memory, if the place has 64 KiB. All places of a FrameReader are so large. Places of the
  handshake are smaller, so a loop receives once before it waits.
- *The end*: `shutdown(SHUT_WR)` sends close_notify first. An end without close_notify is an end of file, too. The
  frames tell whether an end is clean.

Limits: 8 KiB of a peer that has not proved its key. OpenSSL chooses the cipher: ChaCha20-Poly1305.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import AuthenticationError, ProtocolError
from . import connect
from .frames import Buffer

__all__ = ["Tls", "client", "server"]

HANDSHAKE_BYTES = 8 << 10  # a client of OpenSSL 3.6 sends 1,584 before its proof is checked
RECORD_BYTES = 17 << 10  # more than a record has: 2^14 and 261 (RFC 8446, 5.2)
ALLOW_NO_DHE_KEX = 0x400  # an option of OpenSSL (ssl.h) that its configuration file may set: no forward secrecy


class Tls:
    """A connected socket that encrypts, for a Channel, after `handshake` has returned.

    :ivar binding: 32 bytes for `auth.session_keys`.
    :param begun: the bytes of the peer that were read already.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_side: bool, begun: bytes = b"") -> None:
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
        context.options &= ~ALLOW_NO_DHE_KEX
        self._sock = sock
        self.fileno, self.close, self.send = sock.fileno, sock.close, sock.send
        self.settimeout, self.setblocking = sock.settimeout, sock.setblocking
        self._lock = threading.Lock()  # guards all below
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._incoming.write(begun)
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side)

    def handshake(self, deadline: float, hold: Callable[[], object] = lambda: None) -> None:
        """Prove the key to the peer, and check the peer's proof, by `deadline` (monotonic). Blocks. For one thread.

        :param hold: called before a peer is told that its key is wrong.
        :raises AuthenticationError: the peer has another key, or none.
        :raises ProtocolError: the peer sends more than HANDSHAKE_BYTES.
        """
        place = memoryview(bytearray(HANDSHAKE_BYTES))
        while True:
            try:
                self._tls.do_handshake()
                # SHA-256 of tls-unique, which both ends know, and which differs for each connection.
                self.binding = hashlib.sha256(self._tls.get_channel_binding("tls-unique") or b"").digest()
                return
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as e:
                hold()
                told = "ALERT" in str(e.reason) and not self._tls.server_side
                said = "server refused the username or the secret" if told else (
                    f"peer does not know the secret (TLS: {e.reason})")
                raise AuthenticationError(f"the {said}") from None
            finally:
                with contextlib.suppress(OSError):  # the peer may be gone: the next recv tells
                    self._sock.sendall(self._outgoing.read())  # a step or an alert: so few bytes never block
            if not len(place):
                raise ProtocolError(f"a TLS handshake of more than {HANDSHAKE_BYTES} bytes")
            count = connect.receive(self._sock, place, deadline)
            self._incoming.write(place[:count])
            place = place[count:]

    def recv_into(self, place: memoryview) -> int:
        """Put decrypted bytes into `place`, and return their count; 0 at the end. One recv at most.

        :raises BlockingIOError: no whole record is here; `characters_written` is the count of bytes that came.
        :raises AuthenticationError: a record is not the peer's. The connection cannot go on.
        """
        with contextlib.suppress(BlockingIOError):
            return self._decrypt(place, 0)
        room = len(place) - RECORD_BYTES if len(place) > 2 * RECORD_BYTES else len(place)
        came = self._sock.recv_into(place, room)
        return self._decrypt(place, came) if came else 0

    def _decrypt(self, place: memoryview, came: int) -> int:
        """Decrypt whole records into `place`. Raises and returns as `recv_into`.

        :param came: the count of new encrypted bytes in `place`, at its front.
        """
        count = 0
        with self._lock:
            self._incoming.write(place[:came])
            try:
                while count < len(place) and (more := self._tls.read(len(place) - count, place[count:])):
                    count += int(more)
            except ssl.SSLWantReadError:
                if not count:
                    raise BlockingIOError(errno.EAGAIN, "a TLS record is cut", came) from None
            except ssl.SSLZeroReturnError:  # both sides have sent close_notify
                pass
            except ssl.SSLError as e:
                raise AuthenticationError(f"the connection was altered on its way (TLS: {e.reason})") from None
        return count

    def encrypt(self, data: Buffer) -> memoryview:
        """Return the encrypted bytes of `data`, which the socket must send in this order. Empty for no data."""
        with self._lock:
            self._tls.write(data)
            return memoryview(self._outgoing.read())

    def sendall(self, data: bytes) -> None:
        """Encrypt and send few bytes, so that this never blocks."""
        self._sock.sendall(self.encrypt(data))

    def shutdown(self, how: int) -> None:
        """End writing with close_notify (SHUT_WR), or both ways at once."""
        if how == socket.SHUT_WR:
            with self._lock:
                with contextlib.suppress(ssl.SSLError):  # the peer's close_notify is not waited for
                    self._tls.unwrap()
                last = self._outgoing.read()
            with contextlib.suppress(OSError):
                self._sock.send(last)
        self._sock.shutdown(how)


def client(sock: socket.socket, known: tuple[str, bytes], deadline: float) -> Tls:
    """Return a client's side after its handshake. Blocks and raises as `Tls.handshake`.

    The client demands a certificate and trusts no authority. So a server with a certificate but without the key fails.
    Else that server could relay and read all frames.

    :param known: identity and key: `auth.tls_key`.
    """
    context: Any = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # without the next line, this allows any certificate
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_psk_client_callback(lambda hint: known)
    made = Tls(sock, context, False)
    made.handshake(deadline)
    return made


def server(
    sock: socket.socket, keys: Mapping[str, bytes], begun: bytes, deadline: float, hold: Callable[[], object]
) -> Tls:
    """Return a server's side after its handshake. Blocks and raises as `Tls.handshake`.

    :param keys: the key of each identity. An unknown identity gets a random key, and fails as with a wrong key.
    :param begun: the bytes of the client that were read already.
    """
    context: Any = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # no session is resumed, so there is no early data
    context.set_psk_server_callback(lambda identity: keys.get(identity, os.urandom(32)))
    made = Tls(sock, context, True, begun)
    made.handshake(deadline, hold)
    return made
