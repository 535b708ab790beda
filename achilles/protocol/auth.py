"""The handshake and the tag of a frame, as functions over bytes.

The module knows no socket, file or thread, and never waits. `connect.py` moves the bytes. PROTOCOL.md, section 2, is
the rule. This ladder adds the computation of each side::

      client                                              server
        │  ◀────────────── PLAIN + nonce_s ────────────────  │  M1
     proves: keys = session_keys(K, M1, M2[0:72])            │
        │  ──── claim(role, user, nonce_c) + proof_c ─────▶  │  M2
        │                 keys for each secret of that user, compared with proof_c
        │  ◀──────────── proof_s, or REFUSAL ──────────────  │  M3
     compares proof_s                                        │
        ▼  Taggers for client_data and server_data           ▼  the other way round

`hmac.compare_digest` compares every proof and tag. Only this module's objects hold keys, and none of them is printed
or logged. Any thread may call any function.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import AuthenticationError, ProtocolError
from .frames import Buffer

__all__ = [
    "CONTROLLER", "NODE", "Key", "Keys", "Tagger", "accept_claim", "check_answer", "check_mode", "check_opening",
    "check_user", "claim", "derive_key", "read_claim", "session_keys", "tls_key",
    "AUTH_BYTES", "NONCE_BYTES", "NO_BINDING", "OPENING_BYTES", "PLAIN", "PROOF_BYTES", "REFUSAL", "TLS",
]

CONTROLLER, NODE = b"C", b"N"
MAGIC = b"ACHL"
VERSION = 1
CLAIM = struct.Struct(">4sHsx32s32s")  # magic, version, role, nonce_c, user
NONCE_BYTES = PROOF_BYTES = USER_BYTES = 32
AUTH_BYTES = CLAIM.size + PROOF_BYTES
REFUSAL = bytes(PROOF_BYTES)
# The modes: the first 8 bytes of a server. M1 is PLAIN and nonce_s. A server that encrypts says TLS, and M1 inside.
PLAIN, TLS = struct.pack(">4sH2x", MAGIC, VERSION), struct.pack(">4sH2x", b"ACHS", VERSION)
OPENING_BYTES = len(PLAIN)
MISMATCH = {  # the mode of the other side, with the remedy
    PLAIN: "does not encrypt, and this side does: set ENCRYPT=yes there",
    TLS: "encrypts, and this side does not: set ENCRYPT=yes here, or --encrypt",
}
NO_BINDING = bytes(32)  # of a connection without TLS
LABEL = b"achilles/1 "
SCRYPT_N, SCRYPT_R, SCRYPT_P = 2**14, 8, 1  # 16 MiB and 40 to 80 ms a guess
KEPT_KEYS = 8  # derived keys that a process keeps: it uses fewer secrets in turns


class Key(bytes):
    """Key material. It prints as ``Key(***)``, also in a traceback that shows local variables."""

    def __repr__(self) -> str:
        return "Key(***)"

    __str__ = __repr__


_cache_key = Key(os.urandom(32))  # this process's: a hash with it tells nothing of a secret


class Keys(NamedTuple):
    """The proofs and keys of a connection. The protocol's labels have these names."""

    client_proof: bytes
    server_proof: bytes
    client_data: bytes
    server_data: bytes


def derive_key(username: str, secret: str, known: bytes = b"") -> bytes:
    """Return K: 32 bytes from the username and the secret (scrypt, RFC 7914).

    Takes 40 to 80 ms of one core, without the interpreter's lock. A cache keeps the last eight keys. It knows a secret
    by a keyed hash alone.

    :param known: K, if another process has derived it already.
    :raises ValueError: as :func:`check_user`.
    """
    hidden, secret = Key(secret.encode()), ""  # a traceback may show the locals
    user = check_user(username)
    place = _place(hmac.digest(_cache_key, user.ljust(USER_BYTES, b"\0") + hidden, "sha256"))
    if not place:
        place.append(Key(known or hashlib.scrypt(
            hidden, salt=LABEL + user, n=SCRYPT_N, r=SCRYPT_R, p=SCRYPT_P, dklen=32)))
    return place[0]


@functools.lru_cache(maxsize=KEPT_KEYS)
def _place(name: bytes) -> list[Key]:
    """Return the cache's place for a K, empty until K is derived."""
    return []


def check_user(username: str) -> bytes:
    """Return the username as bytes; ValueError unless it is 1 to 32 bytes of UTF-8 without NUL."""
    user = username.encode()
    if not 1 <= len(user) <= USER_BYTES or b"\0" in user:
        raise ValueError(f"a username has 1 to {USER_BYTES} bytes of UTF-8 and no NUL, this one has {len(user)}")
    return user


def check_opening(opening: bytes, mode: bytes) -> None:
    """Check that the first 8 bytes of a server are this side's mode, PLAIN or TLS.

    :raises ProtocolError: the bytes differ. The message has the remedy.
    """
    check_mode(opening, mode)
    if opening[:4] != mode[:4] or opening[6:] != bytes(2):
        raise ProtocolError("the program that listens there is not an achilles server: check host and port")
    if opening != mode:
        raise ProtocolError(
            f"the server speaks version {int.from_bytes(opening[4:6], 'big')} of the protocol, this is version "
            f"{VERSION}: install the same achilles everywhere"
        )


def check_mode(opening: bytes, mode: bytes) -> None:
    """ProtocolError if the first 8 bytes of a peer are the other mode. For both sides."""
    if opening != mode and opening in MISMATCH:
        raise ProtocolError(f"the other side {MISMATCH[opening]}")


def claim(role: bytes, username: str, nonce: bytes) -> bytes:
    """Return M2 without its proof: 72 bytes."""
    return CLAIM.pack(MAGIC, VERSION, role, nonce, check_user(username))


def read_claim(message: bytes) -> tuple[bytes, bytes]:
    """Return the role and the user that M2, of AUTH_BYTES, claims. Its proof is not checked yet.

    ProtocolError if M2 is malformed: then the client gets no answer.
    """
    _, _, role, nonce, padded = CLAIM.unpack_from(message)
    user = padded.rstrip(b"\0")
    if not user or b"\0" in user or role not in (CONTROLLER, NODE) or not message.startswith(
            CLAIM.pack(MAGIC, VERSION, role, nonce, user)):
        raise ProtocolError("the first bytes of a client are not an AUTH of this version")
    return role, user


def session_keys(key: bytes, m1: bytes, signed: bytes, binding: bytes = NO_BINDING) -> Keys:
    """Return a connection's four keys from K and the words of both sides (HKDF, RFC 5869).

    :param binding: of the TLS connection that carries these words; NO_BINDING in the clear.
    """
    prk = Key(hmac.digest(hashlib.sha256(binding + m1 + signed).digest(), key, "sha256"))
    return Keys(*(_expand(prk, name.replace("_", " ")) for name in Keys._fields))


def tls_key(username: str, key: bytes) -> tuple[str, Key]:
    """Return the identity and the pre-shared key of TLS for K. The network sees the identity."""
    prk = Key(hmac.digest(bytes(32), key, "sha256"))
    return f"{username}:{_expand(prk, 'psk id')[:4].hex()}", _expand(prk, "psk")


def _expand(prk: bytes, label: str) -> Key:
    """Return a label's 32 bytes (HKDF-Expand, RFC 5869)."""
    return Key(hmac.digest(prk, LABEL + label.encode() + b"\x01", "sha256"))


def accept_claim(keys: Sequence[bytes], m1: bytes, m2: bytes, binding: bytes = NO_BINDING) -> Keys | None:
    """Return the session's keys if any of these K made the proof of M2, else None. Each K costs the same work."""
    sessions = [session_keys(key, m1, m2[: CLAIM.size], binding) for key in keys]
    matches = [hmac.compare_digest(session.client_proof, m2[CLAIM.size :]) for session in sessions]
    return sessions[matches.index(True)] if any(matches) else None


def check_answer(keys: Keys, answer: bytes) -> None:
    """AuthenticationError unless M3 proves that the server knows the secret."""
    if not hmac.compare_digest(keys.server_proof, answer):
        raise AuthenticationError("the server refused the username or the secret" if answer == REFUSAL else
                                  "the peer does not know the secret: it is not our server")


class Tagger:
    """Signs or checks the frames of one direction, in their order. For one thread."""

    def __init__(self, key: bytes) -> None:
        self._base = hmac.new(key, digestmod="sha256")
        self._sequence = 0

    def tag(self, signed: Buffer) -> bytes:
        """Return the tag of the next frame from its head and envelope: HMAC-SHA256(key, seq || signed)."""
        mac = self._base.copy()
        mac.update(self._sequence.to_bytes(8, "big"))
        mac.update(signed)
        self._sequence += 1
        return mac.digest()

    def check(self, signed: Buffer, tag: Buffer) -> None:
        """Check the tag of the next frame. After an AuthenticationError the connection cannot go on."""
        if not hmac.compare_digest(self.tag(signed), tag):
            raise AuthenticationError("a frame with a wrong tag: the connection was altered on its way")
