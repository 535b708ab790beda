"""The attacker's own client, server and middle: raw bytes over plain sockets, written from PROTOCOL.md alone.

Nothing of achilles is imported, so that a mistake of the package is not made here too. What is here can do the
handshake as node and controller, and as a server; send frames with good, wrong and no tags; and sit between two
honest ends, where it passes on, alters, keeps, repeats and inserts what it likes.

Where clusters encrypt, its client and its server do, too, by Python's own TLS sockets. Its Middle could pass on bytes
alone, so an attack that needs the Middle is skipped then: `encryption.py` has those that are left.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import json
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from conftest import ENCRYPT

SECONDS = 20.0  # tells a hang from a wait
GREETING_BYTES, SIGNED_BYTES, PROOF_BYTES, TAG_BYTES, SHORT_BYTES = 40, 72, 32, 32, 1024
AUTH_BYTES = SIGNED_BYTES + PROOF_BYTES
REFUSAL = bytes(PROOF_BYTES)
KINDS = {name: number for number, name in enumerate((
    "HELLO", "BYE", "PING", "ERROR", "CLUSTER", "JOB", "TASK", "GIVEN", "RESULT", "RETURNED", "GONE", "CANCEL", "END",
    "CLOSE", "STATUS", "KILL"), 1)}
NAMES = {number: name for name, number in KINDS.items()}
WITH_LETTERS = {"JOB", "TASK", "RESULT"}
WITH_RANGE = WITH_LETTERS | {"GIVEN", "RETURNED", "GONE", "CANCEL", "END"}
RANGE = ">IQIII"  # job, first, count, attempt, number
RANGE_BYTES = struct.calcsize(RANGE)
CAREFUL, TELL = 1, 2  # flags of a TASK
UP, DOWN = 0, 1  # client to server, and back


class Ended(Exception):
    """The other end closed the connection."""


class Unreadable(Exception):
    """Who sits on the path can read nothing."""


class Keys(NamedTuple):
    """Section 2: the two proofs, and the keys of the two directions."""

    client_proof: bytes
    server_proof: bytes
    data: tuple[bytes, bytes]  # UP, DOWN


class Chunk(NamedTuple):
    """A chunk with its letter; `digest` is sent as it is, where it is given. In a JOB, one of its letters."""

    number: int
    attempt: int = 0
    status: int = 0
    letter: bytes = b""
    digest: bytes | None = None


class Frame(NamedTuple):
    """A frame as it travelled."""

    kind: str
    head: bytes
    envelope: bytes
    tag: bytes
    letters: bytes

    @property
    def raw(self) -> bytes:
        """Its bytes."""
        return self.head + self.envelope + self.tag + self.letters

    @property
    def body(self) -> dict[str, Any]:
        """Of a JSON kind."""
        return json.loads(self.envelope)  # type: ignore[no-any-return]

    @property
    def span(self) -> tuple[int, int, int, int, int]:
        """Of a kind with a range: job, first, count, attempt, number."""
        return struct.unpack_from(RANGE, self.envelope)

    @property
    def job(self) -> int:
        """The number of the job."""
        return self.span[0]

    @property
    def flags(self) -> int:
        """Of the head."""
        return self.head[1]

    @property
    def chunks(self) -> list[Chunk]:
        """Each chunk with its letter, and with its digest where that is a long one; of a bare range, the chunks."""
        _, first, count, attempt, _ = self.span
        if self.kind not in WITH_LETTERS:
            return [Chunk(first + n, attempt) for n in range(count)]
        statuses = self.envelope[RANGE_BYTES : RANGE_BYTES + count] if self.kind == "RESULT" else bytes(count)
        lengths, digests = _table(self.kind, self.envelope)
        short, after, chunks = digests + 32 * sum(length > SHORT_BYTES for length in lengths), 0, []
        for n, length in enumerate(lengths):
            if length > SHORT_BYTES:
                digest = self.envelope[digests : digests + 32]
                chunks.append(Chunk(first + n, attempt, statuses[n], self.letters[after : after + length], digest))
                digests, after = digests + 32, after + length
            else:
                chunks.append(Chunk(first + n, attempt, statuses[n], self.envelope[short : short + length]))
                short += length
        return chunks


@functools.lru_cache(None)
def derive(user: bytes, secret: str) -> bytes:
    """K of section 2."""
    salt = b"achilles/1 " + user
    return hashlib.scrypt(secret.encode(), salt=salt, n=2**14, r=8, p=1, dklen=32)


def session(key: bytes, m1: bytes, signed: bytes) -> Keys:
    """The proofs and keys of one connection, which is known by its M1."""
    prk = hmac.new(hashlib.sha256(bindings.get(m1, bytes(32)) + m1 + signed).digest(), key, "sha256").digest()
    made = [hmac.new(prk, b"achilles/1 " + label + b"\x01", "sha256").digest()
            for label in (b"client proof", b"server proof", b"client data", b"server data")]
    return Keys(made[0], made[1], (made[2], made[3]))


bindings: dict[bytes, bytes] = {}  # M1 -> the binding of the TLS connection that carried it
OPENINGS = b"ACHL\0\1\0\0", b"ACHS\0\1\0\0"  # the first 8 bytes: in the clear, encrypted
_known: list[tuple[str, bytes]] = []  # identity and key of TLS: the last cluster's


def tls_key(user: bytes, key: bytes) -> tuple[str, bytes]:
    """Identity and pre-shared key of TLS for K."""
    prk = hmac.new(bytes(32), key, "sha256").digest()
    name, psk = (hmac.new(prk, b"achilles/1 " + label + b"\x01", "sha256").digest() for label in (b"psk id", b"psk"))
    return f"{user.decode()}:{name[:4].hex()}", psk


def encrypt_for(user: bytes, key: bytes) -> None:
    """From now on, every connection of ours is encrypted for this user's cluster, if clusters encrypt."""
    _known[:] = [tls_key(user, key)]


class Sealed(ssl.SSLSocket):
    """A TLS socket that fails as a plain one does, has half-closed connections, and knows its M1."""

    @property
    def binding(self) -> bytes:
        """Of this connection."""
        return hashlib.sha256(self.get_channel_binding("tls-unique") or b"").digest()

    def sendall(self, data: Any, flags: int = 0) -> None:
        """A server's M1 is noted."""
        if data[:8] == OPENINGS[0] and len(data) == GREETING_BYTES:
            bindings[bytes(data)] = self.binding
        try:
            super().sendall(data, flags)
        except ssl.SSLError as e:
            raise ConnectionResetError(str(e)) from e

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """An alert is an end."""
        try:
            return super().recv(buflen, flags)
        except ssl.SSLError as e:
            raise ConnectionResetError(str(e)) from e

    def shutdown(self, how: int) -> None:
        """Python's own would read what comes as if it were in the clear."""
        socket.socket.shutdown(self, how)


def context(server: bool, known: tuple[str, bytes] | None) -> Any:
    """TLS 1.3 with this key, or without one."""
    made: Any = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.sslsocket_class = Sealed
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    if known is not None and server:
        made.set_psk_server_callback(lambda identity: known[1] if identity == known[0] else b"")
    elif known is not None:
        made.set_psk_client_callback(lambda hint: known)
    return made


def sealed(sock: socket.socket) -> socket.socket:
    """A client's end, encrypted where clusters are: as it was dialled, it has heard nothing."""
    if not ENCRYPT:
        return sock
    assert read(sock, 8) == OPENINGS[1], "the server does not encrypt"
    return context(False, _known[0]).wrap_socket(sock)  # type: ignore[no-any-return]


def accepted(listening: socket.socket) -> socket.socket:
    """The next client of a server that is played, encrypted where clusters are."""
    sock, _ = listening.accept()
    sock.settimeout(SECONDS)
    if not ENCRYPT:
        return sock
    sock.sendall(OPENINGS[1])
    return context(True, _known[0]).wrap_socket(sock, server_side=True)  # type: ignore[no-any-return]


def greeting(nonce: bytes, magic: bytes = b"ACHL", version: int = 1) -> bytes:
    """M1."""
    return struct.pack(">4sH2x32s", magic, version, nonce)


def signed_auth(
    role: bytes, user: bytes, nonce: bytes | None = None, magic: bytes = b"ACHL", version: int = 1, pad: int = 0,
) -> bytes:
    """M2 without its proof."""
    nonce = os.urandom(32) if nonce is None else nonce
    return struct.pack(">4sHsB32s32s", magic, version, role, pad, nonce, user)


def encode(
    kind: str | int, body: Any = None, chunks: Sequence[Chunk] | None = None, job: int = 0, *, count: int | None = None,
    number: int = 0, flags: int = 0,
) -> Frame:
    """A frame without its tag; `body` is JSON, or bytes that shall be the envelope.

    The range is that of the chunks, which are consecutive and of one attempt; `count` gives it another length.
    """
    code = KINDS[kind] if isinstance(kind, str) else kind
    if kind not in WITH_RANGE or body is not None:
        envelope = body if isinstance(body, bytes) else json.dumps(body or {}, separators=(",", ":")).encode()
        return Frame(str(kind), struct.pack(">BBHI", code, flags, 0, len(envelope)), envelope, b"", b"")
    chunks = chunks or []
    first = chunks[0] if chunks else Chunk(0)
    envelope = struct.pack(RANGE, job, first.number, len(chunks) if count is None else count, first.attempt, number)
    long = [chunk for chunk in chunks if len(chunk.letter) > SHORT_BYTES and kind in WITH_LETTERS]
    if kind == "RESULT":
        envelope += bytes(chunk.status for chunk in chunks)
    if kind in WITH_LETTERS:
        envelope += b"".join((
            *(struct.pack(">Q", len(chunk.letter)) for chunk in chunks),
            *(hashlib.sha256(chunk.letter).digest() if chunk.digest is None else chunk.digest for chunk in long),
            *(chunk.letter for chunk in chunks if len(chunk.letter) <= SHORT_BYTES)))
    head = struct.pack(">BBHI", code, flags, 0, len(envelope))
    return Frame(str(kind), head, envelope, b"", b"".join(chunk.letter for chunk in long))


def tag(key: bytes, sequence: int, frame: Frame) -> Frame:
    """The frame with its tag."""
    mac = hmac.new(key, struct.pack(">Q", sequence) + frame.head + frame.envelope, "sha256")
    return frame._replace(tag=mac.digest())


def read(sock: socket.socket, count: int) -> bytes:
    """So many bytes; Ended if the other end closes before, or has reset the connection."""
    data = b""
    while len(data) < count:
        try:
            piece = sock.recv(min(count - len(data), 1 << 20))
        except ConnectionError:
            piece = b""
        if not piece:
            raise Ended(f"{len(data)} of {count} bytes")
        data += piece
    return data


def read_frame(sock: socket.socket) -> Frame:
    """The next frame, whatever its tag is."""
    head = read(sock, 8)
    number, _, _, length = struct.unpack(">BBHI", head)
    envelope = read(sock, length)
    mac = read(sock, TAG_BYTES)
    name = NAMES.get(number, str(number))
    long = sum(length for length in _table(name, envelope)[0] if length > SHORT_BYTES) if name in WITH_LETTERS else 0
    return Frame(name, head, envelope, mac, read(sock, long))


def read_to_end(sock: socket.socket) -> bytes:
    """All that comes until the other end closes."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(1 << 16):
            data += piece
    return data


def _table(kind: str, envelope: bytes) -> tuple[tuple[int, ...], int]:
    """The lengths of the letters in an envelope, and where the digests begin."""
    count = struct.unpack_from(RANGE, envelope)[2]
    start = RANGE_BYTES + (count if kind == "RESULT" else 0)
    return struct.unpack_from(f">{count}Q", envelope, start), start + 8 * count


class Link:
    """One end of a connection after its handshake. `way` is the direction in which it writes."""

    def __init__(self, sock: socket.socket, keys: Keys, way: int) -> None:
        self.sock, self.keys, self.way = sock, keys, way
        self.sequence = [0, 0]  # of the next frame each way

    def make(
        self, kind: str | int, body: Any = None, chunks: Sequence[Chunk] | None = None, job: int = 0, **more: int,
    ) -> Frame:
        """The next frame, tagged; arguments as of `encode`."""
        frame = tag(self.keys.data[self.way], self.sequence[self.way], encode(kind, body, chunks, job, **more))
        self.sequence[self.way] += 1
        return frame

    def send(
        self, kind: str | int, body: Any = None, chunks: Sequence[Chunk] | None = None, job: int = 0, **more: int,
    ) -> None:
        """Make it and send it. Lost, if the other end has closed; what it said before that is there to be read."""
        with contextlib.suppress(ConnectionError):
            self.sock.sendall(self.make(kind, body, chunks, job, **more).raw)

    def read(self) -> Frame:
        """The next frame, whose tag must be good. Ended at end of file."""
        frame = read_frame(self.sock)
        good = tag(self.keys.data[1 - self.way], self.sequence[1 - self.way], frame)
        assert hmac.compare_digest(good.tag, frame.tag), f"a {frame.kind} with a wrong tag"
        self.sequence[1 - self.way] += 1
        return frame

    def wait_for(self, *kinds: str) -> Frame:
        """The next frame of one of these kinds; what comes before is dropped."""
        while (frame := self.read()).kind not in kinds:
            pass
        return frame

    def rest(self) -> list[Frame]:
        """All frames until the other end closes."""
        frames = []
        with contextlib.suppress(Ended):
            while True:
                frames.append(self.read())
        return frames

    def close(self) -> None:
        """The socket."""
        self.sock.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def dial(port: int, source: str = "127.0.0.1", buffer: int = 0) -> socket.socket:
    """A plain connection from this address; `buffer`: bytes of its receive buffer."""
    sock = socket.socket()
    sock.settimeout(SECONDS)
    if buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.bind((source, 0))
    sock.connect(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def knock(port: int, source: str = "127.0.0.1") -> tuple[socket.socket, bytes]:
    """A connection, and the server's M1."""
    sock = dial(port, source)
    try:
        sock = sealed(sock)
        m1 = read(sock, GREETING_BYTES)
        if isinstance(sock, Sealed):
            bindings[m1] = sock.binding
        return sock, m1
    except BaseException:
        sock.close()
        raise


def claim(port: int, auth: Callable[[bytes], bytes]) -> bytes:
    """Send what `auth` makes of M1; all that the server says to it, until it closes."""
    sock, m1 = knock(port)
    with sock, contextlib.suppress(ConnectionError):
        sock.sendall(auth(m1))
        return read_to_end(sock)
    return b""


def proving(role: bytes, user: bytes, key: bytes) -> Callable[[bytes], bytes]:
    """M2 as PROTOCOL.md has it, for `claim`."""
    def auth(m1: bytes) -> bytes:
        signed = signed_auth(role, user)
        return signed + session(key, m1, signed).client_proof

    return auth


def join(port: int, role: bytes, user: bytes, key: bytes, hello: dict[str, Any] | None = None) -> Link:
    """Authenticate, say HELLO where it is given, and wait for the server's."""
    sock, m1 = knock(port)
    try:
        signed = signed_auth(role, user)
        keys = session(key, m1, signed)
        sock.sendall(signed + keys.client_proof)
        assert read(sock, PROOF_BYTES) == keys.server_proof, "the server refuses who knows the secret"
        link = Link(sock, keys, UP)
        if hello is not None:
            link.send("HELLO", hello)
            link.wait_for("HELLO")
        return link
    except BaseException:
        sock.close()
        raise


def listener(port: int = 0) -> socket.socket:
    """Of a server that is none of achilles's."""
    sock = socket.create_server(("127.0.0.1", port))
    sock.settimeout(SECONDS)
    return sock


def accept(listening: socket.socket, key: bytes) -> Link:
    """Be a server that knows the secret, for one client."""
    sock = accepted(listening)
    try:
        m1 = greeting(os.urandom(32))
        sock.sendall(m1)
        auth = read(sock, AUTH_BYTES)
        keys = session(key, m1, auth[:SIGNED_BYTES])
        assert keys.client_proof == auth[SIGNED_BYTES:], "a client that does not know the secret"
        sock.sendall(keys.server_proof)
        return Link(sock, keys, DOWN)
    except BaseException:
        sock.close()
        raise


class Pair:
    """One connection through a Middle."""

    def __init__(self, number: int, client: socket.socket, server: socket.socket) -> None:
        self.number = number  # of the connection, from 0
        self.ends = (server, client)  # where UP and DOWN are written
        self.sources = (client, server)
        self.handshake = [b"", b""]  # what each direction said in it
        self.frames: tuple[list[Frame], list[Frame]] = ([], [])
        self.written = [0, 0]  # frames passed on, by which one that knows the keys numbers its own
        self.keys: Keys | None = None
        self.over = [threading.Event(), threading.Event()]  # a direction has ended, and both ends know
        self.lock = threading.Lock()  # held while something is written

    def write(self, way: int, data: bytes) -> None:
        """Put bytes on the wire."""
        with self.lock, contextlib.suppress(OSError):
            self.ends[way].sendall(data)

    def cut(self) -> None:
        """End it both ways."""
        for sock in self.sources:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


Tamper = Callable[[Pair, int, int, Frame], "bytes | Frame"]


def _pass_on(pair: Pair, way: int, number: int, frame: Frame) -> bytes:
    return frame.raw


class Middle:
    """Sits on the path to `target`: clients connect to `port`. Sees, and may change, each frame.

    `tamper(pair, way, number, frame)` returns the bytes to pass on, or a Frame, which is tagged anew; for that,
    and for the frames after it, the attacker needs `key`. One thread accepts, two serve each connection.
    """

    def __init__(self, target: int, tamper: Tamper = _pass_on, key: bytes | None = None) -> None:
        if ENCRYPT:
            raise Unreadable("who sits on the path can read no frame")
        self.target, self.tamper, self.key = target, tamper, key
        self.pairs: list[Pair] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, name="middle", daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Middle:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join(SECONDS)
        for pair in self.pairs:
            pair.cut()
        for thread in self._threads:
            thread.join(SECONDS)
        for pair in self.pairs:
            for sock in pair.sources:
                sock.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket()
            try:
                server.connect(("127.0.0.1", self.target))
            except OSError:
                client.close()
                server.close()
                continue
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = Pair(len(self.pairs), client, server)
            self.pairs.append(pair)
            for way in (UP, DOWN):
                thread = threading.Thread(target=self._pump, args=(pair, way), name=f"middle {way}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, pair: Pair, way: int) -> None:
        try:
            for count in ((AUTH_BYTES,), (GREETING_BYTES, PROOF_BYTES))[way]:
                data = read(pair.sources[way], count)
                if way == UP and self.key:
                    pair.keys = session(self.key, pair.handshake[DOWN], data[:SIGNED_BYTES])
                pair.handshake[way] += data
                pair.write(way, data)
            while True:
                frame = read_frame(pair.sources[way])
                pair.frames[way].append(frame)
                changed = self.tamper(pair, way, len(pair.frames[way]) - 1, frame)
                if pair.keys is not None and (isinstance(changed, Frame) or changed == frame.raw):
                    changed = frame if changed == frame.raw else changed
                    changed = tag(pair.keys.data[way], pair.written[way], changed)  # type: ignore[arg-type]
                pair.write(way, changed.raw if isinstance(changed, Frame) else changed)
                pair.written[way] += 1
        except (Ended, OSError):
            pass
        with contextlib.suppress(OSError):
            pair.ends[way].shutdown(socket.SHUT_WR)
        pair.over[way].set()
