"""Frames as bytes: the layouts of PROTOCOL.md, sections 3 and 4.

A frame is a kind and a body. The body of a JSON kind is a dict. The body of every other kind is a Batch: consecutive
chunks of one job, with their letters or as a bare range.

::

    dict  ─▶ encode ─▶ head, JSON                                        ─▶ decode ─▶ dict, checked to its leaves
    Batch ─▶ encode ─▶ head, envelope with short letters, long letters   ─▶ decode ─▶ Batch; parts of letters follow

The module knows no socket, key or pickle. Its functions are pure, for any thread. No code changes a whole Batch.
A peer's mistake is a ProtocolError. `reader.py` cuts a stream into frames and checks tags before `decode` sees a byte.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeAlias

from ..errors import LetterTooLarge, ProtocolError
from .kinds import (
    CAREFUL,
    DECLARATION,
    FIELDS,
    FLAGS,
    LETTERS,
    MAX_CHUNKS,
    MORE,
    NOTE,
    RANGE_FIELDS,
    RANGES,
    TELL,
    TEXT_CHARS,
    U16,
    U32,
    U64,
    Field,
    Gone,
    Kind,
    Status,
    read_object,
)

__all__ = [
    "CAREFUL", "HEAD", "LETTER_LIMIT_BYTES", "MAX_CHUNKS", "MAX_LONG_BYTES", "MAX_SHORT_BYTES", "MORE", "NOTE",
    "SHORT_LETTER_BYTES", "TAG_BYTES", "TELL", "TEXT_CHARS", "U16", "U32", "U64", "Batch", "Buffer", "Frame", "Gone",
    "Kind", "Letter", "LongLetter", "Status", "decode", "digest", "encode", "joined", "letter_of",
]

HEAD = struct.Struct(">BBHI")  # kind, flags, zero, length of the envelope
RANGE = struct.Struct(">IQIII")  # job, first chunk, count, attempt, number: the beginning of a Batch's envelope
LENGTH_BYTES = 8  # of a letter's length in an envelope
TAG_BYTES = DIGEST_BYTES = 32  # HMAC-SHA256, SHA-256
SHORT_LETTER_BYTES = 1024  # a letter up to this size is in the envelope: to hash it twice is cheaper than a digest
MAX_ENVELOPE_BYTES = 4 << 20  # bounds the memory of an unverified frame; four times MAX_SHORT_BYTES
MAX_SHORT_BYTES = 1 << 20  # short letters of a batch together
MAX_LONG_BYTES = 8 << 20  # several long letters of a batch; a heartbeat waits for these, or for a single letter
LETTER_LIMIT_BYTES = 1 << 40  # of a letter; it only stops nonsense: memory grows as bytes arrive

Buffer: TypeAlias = "bytes | bytearray | memoryview"
_STATUS_BYTES = bytes(Status)


class LongLetter:
    """A letter of more than SHORT_LETTER_BYTES: consecutive buffers, with their SHA-256."""

    def __init__(self, parts: Sequence[Buffer], digest: bytes, length: int) -> None:
        self.parts, self.digest, self.length = parts, digest, length

    def __len__(self) -> int:
        return self.length

    def whole(self) -> bool:
        """Whether the letter matches its digest. A process that opens a letter checks this first."""
        return digest(self.parts) == self.digest


Letter: TypeAlias = "Buffer | LongLetter"


class Batch:
    """Consecutive chunks of one job that travel together: PROTOCOL.md, section 4.

    :ivar job: the job's number on this connection.  :ivar first: the number of the first chunk.
    :ivar count: of chunks; of letters in a JOB.  :ivar attempt: the number of this sending in its job.
    :ivar number: µs of a TASK or RESULT, workers of a GIVEN, else 0.  :ivar flags: of the head.
    :ivar statuses: of a RESULT, a byte a chunk.
    :ivar packed: lengths, digests of the long letters, short letters, as they travel.  :ivar longs: the long letters.
    :ivar declaration: of a JOB, its first letter as a dict.
    """

    __slots__ = ("attempt", "count", "declaration", "first", "flags", "job", "longs", "number", "packed", "statuses")

    def __init__(
        self, job: int, first: int = 0, count: int = 0, attempt: int = 0, number: int = 0, flags: int = 0, *,
        statuses: bytes = b"", packed: bytes = b"", longs: Sequence[LongLetter] = (),
        declaration: dict[str, Any] | None = None,
    ) -> None:
        self.job, self.first, self.count, self.attempt, self.number, self.flags = (
            job, first, count, attempt, number, flags)
        self.statuses, self.packed, self.longs, self.declaration = statuses, packed, longs, declaration or {}

    @classmethod
    def pack(
        cls, job: int, first: int, letters: Sequence[Letter], *, attempt: int = 0, number: int = 0, flags: int = 0,
        statuses: bytes = b"",
    ) -> Batch:
        """Return a batch with a letter for each chunk. A letter of more than SHORT_LETTER_BYTES is a LongLetter."""
        longs: list[Any] = [letter for letter in letters if len(letter) > SHORT_LETTER_BYTES]
        shorts: list[Any] = [letter for letter in letters if len(letter) <= SHORT_LETTER_BYTES]
        packed = b"".join([
            struct.pack(f">{len(letters)}Q", *map(len, letters)), *[long.digest for long in longs], *shorts])
        return cls(job, first, len(letters), attempt, number, flags, statuses=statuses, packed=packed, longs=longs)

    @property
    def end(self) -> int:
        """The number behind the last chunk."""
        return self.first + self.count

    @property
    def lengths(self) -> tuple[int, ...]:
        """Bytes of each letter."""
        return struct.unpack_from(f">{self.count}Q", self.packed)

    def letters(self) -> list[Letter]:
        """Return the letters."""
        lengths = self.lengths
        start = LENGTH_BYTES * self.count + DIGEST_BYTES * len(self.longs)
        longs = iter(self.longs)
        ends = accumulate([length if length <= SHORT_LETTER_BYTES else 0 for length in lengths], initial=start)
        return [self.packed[at:end] if length <= SHORT_LETTER_BYTES else next(longs)
                for (at, end), length in zip(pairwise(ends), lengths)]

    def renumbered(self, job: int) -> Batch:
        """Return the same batch with another connection's number of the job."""
        return Batch(job, self.first, self.count, self.attempt, self.number, self.flags, statuses=self.statuses,
                     packed=self.packed, longs=self.longs, declaration=self.declaration)


class Frame(NamedTuple):
    """One frame: its body is a dict if the kind is a JSON kind, else a Batch."""

    kind: Kind
    body: Any

    def __str__(self) -> str:
        """Return a line for the log. It has no letter, and of the texts in JSON only reason and context."""
        kind, body = self
        if not isinstance(body, Batch):
            return kind.name + "".join(f" {name} {body[name]!s:.16}" for name in ("reason", "context") if name in body)
        text = f"{kind.name} job {body.job}"
        if kind not in (Kind.JOB, Kind.END):
            chunks = f"chunk {body.first}" if body.count == 1 else f"chunks {body.first} to {body.end - 1}"
            text += f" {chunks} attempt {body.attempt} number {body.number}"
        return f"{text}, {sum(body.lengths)} bytes" if kind in LETTERS else text


def digest(parts: Iterable[Buffer]) -> bytes:
    """SHA-256 of consecutive buffers."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.digest()


def joined(letter: Letter) -> Buffer:
    """Return a letter in one piece."""
    parts = letter.parts if isinstance(letter, LongLetter) else [letter]
    return parts[0] if len(parts) == 1 else b"".join(parts)


def letter_of(letter: Buffer, name: str = "a letter") -> Letter:
    """Return a letter in its travelling form: a LongLetter with a digest, if it is long.

    LetterTooLarge, with `name`, if it may not travel.
    """
    if len(letter) <= SHORT_LETTER_BYTES:
        return letter
    if len(letter) > LETTER_LIMIT_BYTES:
        raise LetterTooLarge(
            f"{name} has {len(letter):,} bytes, no more than {LETTER_LIMIT_BYTES:,} travel in one piece")
    return LongLetter((letter,), digest((letter,)), len(letter))


def encode(kind: Kind, body: dict[str, Any] | Batch) -> tuple[bytes, list[memoryview]]:
    """Return head and envelope of a frame in one piece, and its long letters. The channel puts the tag between them."""
    if not isinstance(body, Batch):
        envelope = json.dumps(body, separators=(",", ":")).encode()
        return HEAD.pack(kind, 0, 0, len(envelope)) + envelope, []
    parts = [memoryview(part).cast("B") for long in body.longs for part in long.parts if len(part)]
    return b"".join((
        HEAD.pack(kind, body.flags, 0, RANGE.size + len(body.statuses) + len(body.packed)),
        RANGE.pack(body.job, body.first, body.count, body.attempt, body.number), body.statuses, body.packed)), parts


def decode(
    kind: Kind, flags: int, envelope: bytes, fields: Mapping[Kind, Mapping[str, Field]] = FIELDS
) -> dict[str, Any] | Batch:
    """Return the body of a frame; ProtocolError if it is malformed. The long letters of a Batch have no parts yet.

    :param fields: the sender's fields of the JSON kinds: FIELDS, or SERVER_FIELDS.
    """
    if flags not in FLAGS.get(kind, (0,)):
        raise ProtocolError(f"no {kind.name} with flags {flags} is known")
    if kind in fields:
        return read_object(kind.name, envelope, fields[kind])
    if len(envelope) < RANGE.size or (len(envelope) > RANGE.size and kind not in LETTERS):
        raise ProtocolError(f"a {kind.name} of {len(envelope)} bytes")
    job, *values = RANGE.unpack_from(envelope)
    for name, value, (low, high) in zip(RANGE_FIELDS, values, RANGES[kind]):
        if not low <= value <= high:
            raise ProtocolError(f"a {kind.name} with {name} {value}; it is {low} to {high}")
    batch = Batch(*(job, *values, flags))
    if batch.end > U64 + 1:
        raise ProtocolError(f"a {kind.name} of chunks beyond {U64}")
    if kind in LETTERS:
        _decode_letters(kind, batch, envelope)
    return batch


def _decode_letters(kind: Kind, batch: Batch, envelope: bytes) -> None:
    """Cut the envelope behind its range, and read the declaration of a JOB."""
    start = RANGE.size + (batch.count if kind is Kind.RESULT else 0)
    batch.statuses, batch.packed = envelope[RANGE.size : start], envelope[start:]
    if len(batch.packed) < LENGTH_BYTES * batch.count or batch.statuses.translate(None, _STATUS_BYTES):
        raise ProtocolError(f"a {kind.name} with {batch.count} letters in {len(envelope)} bytes, or with a status "
                            "that is not known")
    lengths, at = batch.lengths, LENGTH_BYTES * batch.count
    long = [length for length in lengths if length > SHORT_LETTER_BYTES]
    short_bytes = sum(lengths) - sum(long)
    if len(batch.packed) != at + DIGEST_BYTES * len(long) + short_bytes or short_bytes > MAX_SHORT_BYTES or (
            long and kind is Kind.OUTPUT):
        raise ProtocolError(f"the letters of a {kind.name} do not fill its envelope")
    if max(long, default=0) > LETTER_LIMIT_BYTES or (
            len(long) > 1 and sum(long) > MAX_LONG_BYTES and kind is not Kind.JOB):
        raise ProtocolError(f"a {kind.name} with long letters of {sum(long)} bytes; the limits are {MAX_LONG_BYTES} "
                            f"for several, and {LETTER_LIMIT_BYTES} for each")
    places = range(at, len(batch.packed), DIGEST_BYTES)
    batch.longs = [LongLetter((), batch.packed[at : at + DIGEST_BYTES], length) for at, length in zip(places, long)]
    if kind is Kind.JOB:
        declaration = joined(batch.letters()[0])  # a long letter is empty: its parts have not come
        batch.declaration = read_object("JOB", bytes(declaration), DECLARATION)
        for name, length in zip(("initializer", "sources"), lengths[2:]):
            if length and not batch.declaration.get(name):
                raise ProtocolError(f"a JOB brings a letter for {name} that it does not declare")
