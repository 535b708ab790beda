"""The handshake and the tag of a frame, as functions over bytes.

No sockets, no files, no threads, no waiting: `channel.py` moves the bytes, and
decides when a refusal is sent. PROTOCOL.md, section 2, is the rule; the same
ladder, with who computes what::

      client                                              server
        │  ◀──────────── greeting(nonce_s) ────────────────  │  M1
     proves: keys = session_keys(K, M1, M2[0:72])            │
        │  ──── claim(role, user, nonce_c) + proof_c ─────▶  │  M2
        │                 keys for each secret of that user, compared with proof_c
        │  ◀──────────── proof_s, or REFUSAL ──────────────  │  M3
     compares proof_s                                        │
        ▼  Tagger(client_data), Checker(server_data)         ▼  the other way round

Every comparison of a proof or a tag is `hmac.compare_digest`. Keys live in the
objects made here and in nothing that is printed or logged.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import AuthenticationError, ProtocolError
from .frames import Buffer

__all__ = [
    "CONTROLLER", "NODE", "Checker", "Claim", "Key", "Keys", "Tagger", "accept_claim", "check_user", "claim",
    "derive_key", "greeting", "is_proof", "read_claim", "read_greeting", "session_keys",
    "AUTH_BYTES", "GREETING_BYTES", "NONCE_BYTES", "PROOF_BYTES", "REFUSAL",
]

CONTROLLER, NODE = b"C", b"N"
MAGIC = b"ACHL"
VERSION = 1
GREETING = struct.Struct(">4sH2x32s")  # magic, version, nonce_s
CLAIM = struct.Struct(">4sHsx32s32s")  # magic, version, role, nonce_c, user
NONCE_BYTES = PROOF_BYTES = USER_BYTES = 32
GREETING_BYTES = GREETING.size
AUTH_BYTES = CLAIM.size + PROOF_BYTES
REFUSAL = bytes(PROOF_BYTES)
BINDING = bytes(32)  # room for the hash of a TLS certificate
LABEL = b"achilles/1 "
SCRYPT_N, SCRYPT_R, SCRYPT_P = 2**14, 8, 1  # 16 MiB and 40 ms a guess; paid once a process
SEQUENCE = struct.Struct(">Q")


class Key(bytes):
    """Key material, which prints as ``Key(***)``, in a traceback that shows local variables too."""

    def __repr__(self) -> str:
        return "Key(***)"

    __str__ = __repr__


class Keys(NamedTuple):
    """What both sides of one connection derive: a proof and a key for each direction."""

    client_proof: bytes
    server_proof: bytes
    client_data: bytes
    server_data: bytes

    def __repr__(self) -> str:
        return "Keys(***)"


class Claim(NamedTuple):
    """What a client says of itself in M2; nothing of it is true before its proof is checked."""

    role: bytes
    user: bytes
    signed: bytes
    proof: bytes


def derive_key(username: str, secret: str) -> bytes:
    """K: 32 bytes from the username and the secret (scrypt, RFC 7914). Takes some 40 ms of one core."""
    hidden, secret = Key(secret.encode()), ""
    user = check_user(username)
    return Key(hashlib.scrypt(hidden, salt=LABEL + user, n=SCRYPT_N, r=SCRYPT_R, p=SCRYPT_P, dklen=32))


def check_user(username: str) -> bytes:
    """The username as it is signed; ValueError unless it is 1 to 32 bytes of UTF-8 without NUL."""
    user = username.encode()
    if not 1 <= len(user) <= USER_BYTES or b"\0" in user:
        raise ValueError(f"a username has 1 to {USER_BYTES} bytes of UTF-8 and no NUL, this one has {len(user)}")
    return user


def greeting(nonce: bytes) -> bytes:
    """M1, which the server sends first."""
    return GREETING.pack(MAGIC, VERSION, nonce)


def read_greeting(message: bytes) -> None:
    """ProtocolError unless `message` is an M1 of this version. All of M1 is signed, so there is nothing to keep."""
    magic, version, _ = GREETING.unpack(message) if len(message) == GREETING_BYTES else (b"", 0, b"")
    if magic != MAGIC or message[6:8] != bytes(2):
        raise ProtocolError("what listens there is not an achilles server: check host and port")
    if version != VERSION:
        raise ProtocolError(
            f"the server speaks version {version} of the protocol, this is version {VERSION}: "
            "install the same achilles everywhere"
        )


def claim(role: bytes, username: str, nonce: bytes) -> bytes:
    """M2 without its proof: 72 bytes."""
    return CLAIM.pack(MAGIC, VERSION, role, nonce, check_user(username))


def read_claim(message: bytes) -> Claim:
    """M2 taken apart; ProtocolError if it is malformed, in which case it gets no answer."""
    if len(message) != AUTH_BYTES:
        raise ProtocolError(f"an AUTH has {AUTH_BYTES} bytes, this one has {len(message)}")
    signed, proof = message[: CLAIM.size], message[CLAIM.size :]
    magic, version, role, _, padded = CLAIM.unpack(signed)
    user = padded.rstrip(b"\0")
    well_formed = magic == MAGIC and version == VERSION and signed[7:8] == b"\0" and role in (CONTROLLER, NODE)
    if not well_formed or not user or b"\0" in user:
        raise ProtocolError("the first bytes of a client are not an AUTH of this version")
    return Claim(role, user, signed, proof)


def session_keys(key: bytes, m1: bytes, signed: bytes) -> Keys:
    """The four keys of one connection from K and what both sides said (HKDF, RFC 5869)."""
    transcript = hashlib.sha256(BINDING + m1 + signed).digest()
    prk = Key(hmac.digest(transcript, key, "sha256"))
    labels = (b"client proof", b"server proof", b"client data", b"server data")
    return Keys(*(Key(hmac.digest(prk, LABEL + label + b"\x01", "sha256")) for label in labels))


def accept_claim(keys: Sequence[bytes], m1: bytes, claimed: Claim) -> Keys | None:
    """The session's keys if one of these K made the proof, else None. The same work, whichever it was."""
    sessions = [session_keys(key, m1, claimed.signed) for key in keys]
    matches = [hmac.compare_digest(session.client_proof, claimed.proof) for session in sessions]
    return sessions[matches.index(True)] if any(matches) else None


def is_proof(keys: Keys, answer: bytes) -> bool:
    """Whether M3 proves that the server knows the secret."""
    return hmac.compare_digest(keys.server_proof, answer)


class Tagger:
    """Signs the frames of one direction, in the order in which they are written. For one thread."""

    def __init__(self, key: bytes) -> None:
        self._base = hmac.new(key, digestmod="sha256")
        self._sequence = 0

    def tag(self, head: Buffer, envelope: Buffer) -> bytes:
        """The tag of the next frame: HMAC-SHA256(key, seq || head || envelope)."""
        mac = self._base.copy()
        mac.update(SEQUENCE.pack(self._sequence) + head)
        mac.update(envelope)
        self._sequence += 1
        return mac.digest()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(***)"


class Checker(Tagger):
    """Checks the frames of one direction, in the order in which they come. For one thread."""

    def check(self, head: Buffer, envelope: Buffer, tag: Buffer) -> None:
        """AuthenticationError if this is not the tag of the next frame; the connection has no future then."""
        if not hmac.compare_digest(self.tag(head, envelope), tag):
            raise AuthenticationError("a frame with a wrong tag: the connection was altered on its way")
