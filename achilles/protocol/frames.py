"""Frames as bytes: the layouts of PROTOCOL.md, sections 3 and 4.

A frame is a kind and a body. The body of a JSON kind is a dict. The body of every other kind is a Batch: consecutive
chunks of one job, with their letters or as a bare range.

::

    dict  ─▶ encode ─▶ head, JSON                                        ─▶ decode ─▶ dict, checked to its leaves
    Batch ─▶ encode ─▶ head, envelope with the short letters, long ones  ─▶ decode ─▶ Batch; long letters follow

The module knows no socket, key or pickle. Its functions are pure, for any thread. A Batch is immutable by agreement.
A peer's mistake is a ProtocolError. `reader.py` cuts a stream into frames and checks tags before `decode` sees a byte.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

from ..errors import ProtocolError
from .fields import TEXT_CHARS, U16, U32, U64, read_object
from .kinds import (
    CAREFUL,
    DECLARATION,
    FIELDS,
    FLAGS,
    LETTERS,
    MAX_CHUNKS,
    NOTE,
    RANGE_FIELDS,
    RANGES,
    TELL,
    Gone,
    Kind,
    Status,
)

__all__ = [
    "CAREFUL", "HEAD", "LETTER_LIMIT_BYTES", "MAX_CHUNKS", "MAX_LONG_BYTES", "MAX_SHORT_BYTES", "NOTE",
    "SHORT_LETTER_BYTES", "TAG_BYTES", "TELL", "TEXT_CHARS", "U16", "U32", "U64", "Batch", "Buffer", "Frame", "Gone",
    "Kind", "Letter", "LongLetter", "Status", "decode", "describe", "digest", "encode", "joined", "letter_of",
    "letters_of",
]

HEAD = struct.Struct(">BBHI")  # kind, flags, zero, length of the envelope
RANGE = struct.Struct(">IQIII")  # job, first chunk, count, attempt, number: the beginning of a Batch's envelope
LENGTH_BYTES = 8  # of a letter's length in an envelope
TAG_BYTES = 32  # HMAC-SHA256
DIGEST_BYTES = 32  # SHA-256
SHORT_LETTER_BYTES = 1024  # a letter up to this rides in the envelope: to hash it twice is cheaper than a digest
MAX_ENVELOPE_BYTES = 4 << 20  # four times MAX_SHORT_BYTES; bounds the memory of a frame that nobody has verified
MAX_SHORT_BYTES = 1 << 20  # short letters of a batch together
MAX_LONG_BYTES = 8 << 20  # long letters of a batch together; a heartbeat waits for at most this, or for one letter
LETTER_LIMIT_BYTES = 1 << 40  # of one letter; memory grows as bytes arrive, so the limit only stops nonsense

Buffer: TypeAlias = "bytes | bytearray | memoryview"
_STATUS_BYTES = bytes(Status)


class LongLetter:
    """A letter of more than SHORT_LETTER_BYTES, as buffers end to end, with its SHA-256."""

    __slots__ = ("digest", "length", "parts")

    def __init__(self, parts: Sequence[Buffer], digest: bytes, length: int) -> None:
        self.parts = parts
        self.digest = digest
        self.length = length

    def __len__(self) -> int:
        return self.length

    def whole(self) -> bool:
        """Return whether the letter matches its digest. A process that opens a letter asks this first."""
        return digest(self.parts) == self.digest


Letter: TypeAlias = "Buffer | LongLetter"


class Batch:
    """Consecutive chunks of one job that travel together: PROTOCOL.md, section 4.

    :ivar job: the job's number on this connection.  :ivar first: the number of the first chunk.
    :ivar count: of chunks; of letters in a JOB.  :ivar attempt: the number of this sending in its job.
    :ivar number: µs of a TASK or RESULT, workers of a GIVEN, else 0.  :ivar flags: of the head.
    :ivar statuses: of a RESULT, a byte a chunk.  :ivar table: the lengths of the letters, as they travel.
    :ivar digests, shorts: of the long letters; the short letters, end to end.  :ivar longs: the long letters.
    :ivar declaration: of a JOB, its first letter as a dict.
    """

    __slots__ = ("attempt", "count", "declaration", "digests", "first", "flags", "job", "longs", "number", "shorts",
                 "statuses", "table")

    def __init__(
        self, job: int, first: int = 0, count: int = 0, attempt: int = 0, number: int = 0, flags: int = 0, *,
        statuses: bytes = b"", table: bytes = b"", digests: bytes = b"", shorts: bytes = b"",
        longs: Sequence[LongLetter] = (),
    ) -> None:
        self.job, self.first, self.count, self.attempt, self.number, self.flags = (
            job, first, count, attempt, number, flags)
        self.statuses, self.table, self.digests, self.shorts, self.longs = statuses, table, digests, shorts, longs
        self.declaration: dict[str, Any] = {}

    @classmethod
    def pack(
        cls, job: int, first: int, letters: Sequence[Letter], *, attempt: int = 0, number: int = 0, flags: int = 0,
        statuses: bytes = b"",
    ) -> Batch:
        """Return a batch of these letters, one a chunk. A letter of more than SHORT_LETTER_BYTES is a LongLetter."""
        lengths = list(map(len, letters))
        shorts: Sequence[Any] = letters
        longs: list[Any] = []
        if max(lengths) > SHORT_LETTER_BYTES:
            shorts = [letter for letter in letters if len(letter) <= SHORT_LETTER_BYTES]
            longs = [letter for letter in letters if len(letter) > SHORT_LETTER_BYTES]
        return cls(
            job, first, len(letters), attempt, number, flags, statuses=statuses,
            table=struct.pack(f">{len(lengths)}Q", *lengths), digests=b"".join([long.digest for long in longs]),
            shorts=b"".join(shorts), longs=longs,
        )

    @property
    def end(self) -> int:
        """The number behind that of the last chunk."""
        return self.first + self.count

    @property
    def lengths(self) -> tuple[int, ...]:
        """Bytes of each letter."""
        return struct.unpack(f">{self.count}Q", self.table)

    def letters(self) -> list[Letter]:
        """Each chunk's letter."""
        lengths = self.lengths
        if not self.longs:
            ends = list(accumulate(lengths))
            return [self.shorts[start:end] for start, end in zip([0, *ends], ends)]
        longs = iter(self.longs)
        starts = accumulate([length if length <= SHORT_LETTER_BYTES else 0 for length in lengths], initial=0)
        return [next(longs) if length > SHORT_LETTER_BYTES else self.shorts[start : start + length]
                for start, length in zip(starts, lengths)]

    def size(self) -> int:
        """Bytes of all letters."""
        return len(self.shorts) + sum(map(len, self.longs))

    def renumbered(self, job: int) -> Batch:
        """The same batch under another connection's number of the job."""
        other: Batch = object.__new__(Batch)
        for name in Batch.__slots__:
            setattr(other, name, getattr(self, name))
        other.job = job
        return other


class Frame(NamedTuple):
    """One frame: a dict where the kind is a JSON one, else a Batch."""

    kind: Kind
    body: Any


def digest(parts: Iterable[Buffer]) -> bytes:
    """SHA-256 of buffers end to end."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.digest()


def joined(letter: Letter) -> Buffer:
    """A letter in one piece."""
    if not isinstance(letter, LongLetter):
        return letter
    return letter.parts[0] if len(letter.parts) == 1 else b"".join(letter.parts)


def letter_of(letter: Buffer) -> Letter:
    """A letter in one piece, as it travels: with its digest, if it is a long one."""
    return letter if len(letter) <= SHORT_LETTER_BYTES else LongLetter((letter,), digest((letter,)), len(letter))


def letters_of(found: Sequence[Buffer]) -> list[Letter]:
    """The same for many letters."""
    if max(map(len, found), default=0) <= SHORT_LETTER_BYTES:
        return list(found)
    return list(map(letter_of, found))


def encode(kind: Kind, body: dict[str, Any] | Batch) -> tuple[bytes, bytes, list[Buffer]]:
    """Head, envelope and long letters of a frame; the channel puts the tag behind the envelope."""
    if not isinstance(body, Batch):
        envelope = json.dumps(body, separators=(",", ":")).encode()
        return HEAD.pack(kind, 0, 0, len(envelope)), envelope, []
    start = RANGE.pack(body.job, body.first, body.count, body.attempt, body.number)
    envelope = b"".join((start, body.statuses, body.table, body.digests, body.shorts))
    return HEAD.pack(kind, body.flags, 0, len(envelope)), envelope, [part for long in body.longs for part in long.parts]


def decode(kind: Kind, flags: int, envelope: bytes) -> tuple[dict[str, Any] | Batch, list[int]]:
    """The body of a frame, and the lengths of the long letters that follow it; ProtocolError if it is not one."""
    if flags not in FLAGS.get(kind, (0,)):
        raise ProtocolError(f"no {kind.name} with flags {flags} is known")
    if kind in FIELDS:
        return read_object(kind.name, envelope, FIELDS[kind]), []
    if len(envelope) < RANGE.size:
        raise ProtocolError(f"a {kind.name} of {len(envelope)} bytes")
    batch = Batch(*(*RANGE.unpack_from(envelope), flags))
    _check_range(kind, batch)
    lengths = _decode_letters(kind, batch, envelope)
    if kind is Kind.JOB:
        _read_declaration(batch)
    return batch, lengths


def describe(kind: Kind, body: dict[str, Any] | Batch) -> str:
    """A frame in a line for the log: never a letter, nor a text of a JSON body but reason and context."""
    if not isinstance(body, Batch):
        return " ".join([kind.name, *(f"{name} {body[name][:16]}" for name in ("reason", "context") if name in body)])
    text = f"{kind.name} job {body.job}"
    if kind not in (Kind.JOB, Kind.END):
        chunks = f"chunk {body.first}" if body.count == 1 else f"chunks {body.first} to {body.end - 1}"
        text += f" {chunks} attempt {body.attempt} number {body.number}"
    return f"{text}, {body.size()} bytes" if kind in LETTERS else text


def _check_range(kind: Kind, batch: Batch) -> None:
    """ProtocolError if a field of the range is not between its limits, or the last chunk has no number."""
    values = (batch.first, batch.count, batch.attempt, batch.number)
    for name, value, (low, high) in zip(RANGE_FIELDS, values, RANGES[kind]):
        if not low <= value <= high:
            raise ProtocolError(f"a {kind.name} with {name} {value}; it is {low} to {high}")
    if batch.end > U64 + 1:
        raise ProtocolError(f"a {kind.name} of chunks beyond {U64}")


def _decode_letters(kind: Kind, batch: Batch, envelope: bytes) -> list[int]:
    """Cut the envelope behind its range, and return the lengths of the long letters."""
    count = batch.count if kind in LETTERS else 0
    table_start = RANGE.size + (count if kind is Kind.RESULT else 0)
    digests_start = table_start + LENGTH_BYTES * count
    batch.statuses, batch.table = envelope[RANGE.size : table_start], envelope[table_start:digests_start]
    if len(batch.table) != LENGTH_BYTES * count:
        raise ProtocolError(f"a {kind.name} with {count} letters in {len(envelope)} bytes")
    if batch.statuses.translate(None, _STATUS_BYTES):
        raise ProtocolError(f"a {kind.name} with a status that is not known")
    lengths = struct.unpack(f">{count}Q", batch.table)
    long = [length for length in lengths if length > SHORT_LETTER_BYTES]
    shorts_start = digests_start + DIGEST_BYTES * len(long)
    batch.digests, batch.shorts, batch.longs = envelope[digests_start:shorts_start], envelope[shorts_start:], []
    if len(envelope) - shorts_start != sum(lengths) - sum(long) or len(batch.shorts) > MAX_SHORT_BYTES:
        raise ProtocolError(f"the letters of a {kind.name} do not fill its envelope")
    if max(long, default=0) > LETTER_LIMIT_BYTES:
        raise ProtocolError(f"a letter of {max(long)} bytes; the limit is {LETTER_LIMIT_BYTES}")
    if len(long) > 1 and sum(long) > MAX_LONG_BYTES and kind is not Kind.JOB:
        raise ProtocolError(f"{len(long)} letters of {sum(long)} bytes in one {kind.name}")
    return long


def _read_declaration(batch: Batch) -> None:
    """Check the first letter of a JOB, which is JSON."""
    length = batch.lengths[0]
    if length > SHORT_LETTER_BYTES:
        raise ProtocolError(f"a JOB's declaration of {length} bytes; the limit is {SHORT_LETTER_BYTES}")
    batch.declaration = read_object("JOB", batch.shorts[:length], DECLARATION)
    if batch.count == 3 and not batch.declaration["initializer"]:
        raise ProtocolError("a JOB brings an initializer that it does not declare")
