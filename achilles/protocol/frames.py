"""Frames as bytes: what PROTOCOL.md says in its sections 3 to 6, carried out.

Bytes in, frames out, and the reverse. No sockets, no keys, no pickle, no
threads: a FrameReader belongs to the one thread that reads its connection.

A frame is a kind and a body. The body is a dict where the kind is a JSON one,
and a Rows where the kind has rows. Rows are kept as they travel (one bytes for
the table, one for the short letters), so that a thousand slices are cut, joined
and passed on without an object a slice.

::

    bytes ─▶ FrameReader ─▶ (head, envelope, tag) ─verify─▶ Frame(kind, dict | Rows)
    Frame ─▶ encode ─▶ (head, envelope, long letters)      the tag is the channel's

Whatever a peer got wrong raises ProtocolError. Nothing of an envelope is read
before `verify` passed, and memory grows as bytes arrive: a length alone takes next to none.
"""

from __future__ import annotations

import enum
import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, repeat
from typing import Any, NamedTuple, TypeAlias

from ..errors import ProtocolError
from .fields import NAME_CHARS, TEXT_CHARS, U16, U32, U64, Field, check_fields, read_object

__all__ = [
    "Frame", "FrameReader", "Kind", "Rows", "Status", "encode", "merge",
    "HEAD", "LETTER_LIMIT_BYTES", "MAX_ROWS", "MORE", "NOTE", "PACKED", "SHORT_LETTER_BYTES", "TAG_BYTES",
    "TEXT_CHARS", "U16", "U32", "U64",
]

HEAD = struct.Struct(">BBHI")  # kind, flags, count of rows, length of the envelope
ADDRESS = struct.Struct(">II")  # job, pace: how an envelope with rows begins
ROW = struct.Struct(">QHBxI")  # slice, attempt, status, length of its letter
TAG_BYTES = 32  # HMAC-SHA256
DIGEST_BYTES = 32  # SHA-256
SHORT_LETTER_BYTES = 1024  # up to here a letter rides in the envelope: hashing it twice is cheaper than a digest
MAX_ENVELOPE_BYTES = 4 << 20  # no sender of ours comes near; bounds what an unread frame can hold
MAX_JOB_BYTES = 64 << 10  # of a controller's JOB: the server writes it anew for nodes, perhaps three times as long
MAX_ROWS = 1024  # beyond, a frame saves nothing more and others wait longer behind it
MAX_SHORT_BYTES = 1 << 20  # MAX_ROWS letters of SHORT_LETTER_BYTES
MAX_LONG_BYTES = 8 << 20  # a heartbeat waits for at most this much of queued letters (or for one long one)
LETTER_LIMIT_BYTES = 1 << 30  # a default: a letter is held in memory by every process that it passes
ASKED = 1  # in the place of a RETURNED's pace: it answers a RECALL
MESSAGE_US = 5000  # of work that travel together, by the pace: far over a message's cost, far under what people notice
PACE_SLICES = 64  # a job is as slow as the slowest of so many of its last slices
MAX_PYTHONS = 64  # versions in a CLUSTER: people have two or three, and the list of them ends in an error message
BUFFER_BYTES = 256 << 10  # one recv takes up to this much
DIRECT_BYTES = 64 << 10  # from here on a letter is received where it will stay; less is copied there, many a recv
LETTER_STEP_BYTES = (8 << 20) + (64 << 10)  # memory for a long letter that has begun to come (8 MiB have a head)

PACKED = 0x01  # status bit of a TASK row
MORE = 0x80  # status bit of a RESULT row

Buffer: TypeAlias = "bytes | bytearray | memoryview"
Verify = Callable[[Buffer, Buffer, Buffer], None]


class Kind(enum.IntEnum):
    """What a frame is; PROTOCOL.md, section 5."""

    HELLO = 1
    BYE = 2
    PING = 3
    ERROR = 4
    CLUSTER = 5
    JOB = 6
    FUNCTION = 7
    FORGET = 8
    TASK = 9
    FLUSH = 10
    PACKET = 11
    RESULT = 12
    RECALL = 13
    RETURNED = 14
    CANCEL = 15
    END = 16
    CLOSE = 17
    STATUS = 18
    KILL = 19


class Status(enum.IntEnum):
    """How a slice was answered: the low seven bits of a RESULT row's status."""

    VALUES = 0
    RAISED = 1
    DIED = 2
    TIMEOUT = 3
    ALTERED = 4
    FAILED = 5


_KINDS = {int(kind): kind for kind in Kind}

# Who may say what: the receiver looks here before it looks at a body. "S" is what a server
# accepts from a controller ("CS") or a node ("NS"), and so on; "W" is a worker.
LINKS = ("CS", "NS", "SC", "SN", "NW", "WN")
_TCP, _DOWN = ("CS", "NS", "SC", "SN"), ("CS", "SN", "NW")
DIRECTIONS: dict[Kind, tuple[str, ...]] = {
    Kind.HELLO: _TCP, Kind.BYE: _TCP, Kind.PING: _TCP, Kind.ERROR: _TCP, Kind.CLUSTER: ("SC",),
    Kind.JOB: _DOWN, Kind.FUNCTION: _DOWN, Kind.FORGET: _DOWN, Kind.TASK: _DOWN, Kind.FLUSH: ("CS",),
    Kind.PACKET: ("SC",), Kind.RESULT: ("WN", "NS", "SC"), Kind.RECALL: ("SN",), Kind.RETURNED: ("WN", "NS"),
    Kind.CANCEL: ("CS", "SN"), Kind.END: _DOWN, Kind.CLOSE: _DOWN, Kind.STATUS: ("CS", "SC"), Kind.KILL: ("CS",),
}

# Rows a kind may have, and whether they bring letters. All other kinds are JSON.
ROW_COUNTS: dict[Kind, tuple[int, int]] = {
    Kind.FUNCTION: (1, 1), Kind.TASK: (1, MAX_ROWS), Kind.PACKET: (1, MAX_ROWS),
    Kind.RESULT: (1, MAX_ROWS), Kind.RETURNED: (0, MAX_ROWS),
}
LETTERLESS = frozenset({Kind.PACKET, Kind.RETURNED})
# What the status of a row may be, where it is not always 0.
STATUSES: dict[Kind, frozenset[int]] = {
    Kind.TASK: frozenset({0, PACKED}),
    Kind.RESULT: frozenset({*Status, Status.VALUES | MORE, Status.RAISED | MORE}),
}
_ZERO = frozenset({0})


_NAME, _TEXT = Field(str, 1, NAME_CHARS), Field(str, 0, TEXT_CHARS)
PYTHON_FORM = r"[0-9]+\.[0-9]+t?"  # "3.14"; "3.14t" is a free-threaded build
_PYTHON = _NAME._replace(form=PYTHON_FORM)
_U32, _U64, _SECONDS = Field(int), Field(int, 0, U64), Field((int, float), 0, U64)
_DIGEST, _CONTEXT, _JOB = Field(str, 64, 64, hex=True), Field(str, 32, 32, hex=True), {"job": Field(int)}
_LETTER_LIMIT = Field(int, SHORT_LETTER_BYTES + 1, U32)
CALLS = ("one", "star", "apply")  # how a worker calls a job's function
OPTIONS: dict[str, Field] = {
    "timeout": Field((int, float), 1e-9, float(U32), False), "processes": Field(int, 1, U32, False),
    "maxtasksperchild": Field(int, 1, U32, False), "seed": Field(int, float("-inf"), float("inf"), False),
    "call": Field(str, 1, NAME_CHARS, False, choices=CALLS),
}
# What a STATUS says of each node, of each job, and of the server.
NODE_STATE: dict[str, Field] = {
    "id": _U32, "address": _NAME, "python": _PYTHON, "version": _NAME, "cpu_count": Field(int, 0, U16),
    "busy": Field(int, 0, U16), "done": _U64, "since": _SECONDS,
}
JOB_STATE: dict[str, Field] = {"id": _U32, "user": _TEXT, "queued": _U64, "running": _U64, "done": _U64}
SERVER_STATE: dict[str, Field] = {"version": _NAME, "uptime": _SECONDS, "memory": _U64._replace(required=False)}
PHASES = ("function", "load", "call", "dump", "node")  # at which a slice may be lost
# The letter of a RESULT row that says died or timeout.
NOTE: dict[str, Field] = {
    "position": Field(int, -1, U32), "phase": Field(str, 1, NAME_CHARS, choices=PHASES),
    "node": Field(int, required=False), "pid": Field(int, required=False),
    "exitcode": Field(int, -U32, U32, False), "lost": Field(int, required=False),
}
FIELDS: dict[Kind, dict[str, Field]] = {
    Kind.HELLO: {
        "python": _PYTHON, "version": _NAME, "letter_limit": _LETTER_LIMIT._replace(required=False),
        "cpu_count": Field(int, 0, U16, False), "pid": Field(int, required=False),
        "client_id": Field(int, required=False), "connections": Field(int, required=False),
    },
    Kind.BYE: {"reason": _NAME},
    Kind.PING: {},
    Kind.ERROR: {"code": _NAME, "message": _TEXT},
    Kind.CLUSTER: {
        "nodes": _U32, "workers": _U32, "largest": Field(int, 0, U16),
        "pythons": Field(dict, 0, MAX_PYTHONS, form=PYTHON_FORM, entry=_U32), "letter_limit": _LETTER_LIMIT,
    },
    Kind.JOB: {
        **_JOB, "context": _CONTEXT, "function": _DIGEST, "initializer": _DIGEST._replace(required=False),
        "resumed": Field(bool), "options": Field(dict, inside=OPTIONS),
    },
    Kind.FORGET: {"function": _DIGEST},
    Kind.FLUSH: {**_JOB, "upto": _U64},
    Kind.RECALL: {**_JOB, "number": Field(int, 1, U32)},
    Kind.CANCEL: _JOB,
    Kind.END: _JOB,
    Kind.CLOSE: {"context": _CONTEXT},
    Kind.STATUS: {
        "nodes": Field(list, required=False, inside=NODE_STATE), "jobs": Field(list, required=False, inside=JOB_STATE),
        "server": Field(dict, required=False, inside=SERVER_STATE),
    },
    Kind.KILL: {},
}
# Of a STATUS, the answer has all fields, the question none. What is inside of them is checked by then.
ANSWER = {name: field._replace(required=True, inside=None) for name, field in FIELDS[Kind.STATUS].items()}


class Rows:
    """Slices of one job that travel together: PROTOCOL.md, section 4.

    Immutable by agreement. `slices`, `attempts`, `statuses` and `lengths` are
    tuples of ints of the same length; `table` is the same as bytes. `shorts`
    holds the short letters end to end, `digests` the digests of the long ones,
    and `longs` each long letter as a sequence of buffers to be sent end to end.
    """

    __slots__ = ("digests", "job", "longs", "pace", "shorts", "table", "_columns", "_offsets")

    def __init__(
        self, job: int, table: bytes, digests: bytes = b"", shorts: bytes = b"",
        longs: Sequence[Sequence[Buffer]] = (), pace: int = 0,
    ) -> None:
        self.job = job
        self.table = table
        self.digests = digests
        self.shorts = shorts
        self.longs = longs
        self.pace = pace
        self._columns: tuple[tuple[int, ...], ...] = ()  # of the table, once somebody asks: who passes it on need not
        self._offsets: tuple[list[int], list[int]] | None = None

    @classmethod
    def single(
        cls, job: int, slice_: int, attempt: int, status: int, letter: Sequence[Buffer], digest: bytes = b"",
        pace: int = 0,
    ) -> Rows:
        """One slice, its letter given as buffers end to end; `digest` (32 bytes) where it is a long one."""
        length = sum(map(len, letter))
        table = ROW.pack(slice_, attempt, status, length)
        if length > SHORT_LETTER_BYTES:
            return cls(job, table, digest, b"", (letter,), pace)
        return cls(job, table, b"", b"".join(letter), (), pace)

    @classmethod
    def build(
        cls, job: int, slices: Sequence[int], attempts: Sequence[int], statuses: Sequence[int],
        letters: Sequence[Buffer], digests: Sequence[bytes],
    ) -> Rows:
        """Many slices, each letter one buffer, its digest b"" where it is a short one."""
        table = b"".join(map(ROW.pack, slices, attempts, statuses, map(len, letters)))
        if not any(digests):
            return cls(job, table, b"", b"".join(letters))
        shorts = b"".join([letter for letter, digest in zip(letters, digests) if not digest])
        return cls(job, table, b"".join(digests), shorts, [(letter,) for letter, d in zip(letters, digests) if d])

    def __len__(self) -> int:
        return len(self.table) // ROW.size

    @property
    def slices(self) -> tuple[int, ...]:
        """The number of each slice."""
        return self._unpacked()[0]

    @property
    def attempts(self) -> tuple[int, ...]:
        """Of each slice, how often it was lost before."""
        return self._unpacked()[1]

    @property
    def statuses(self) -> tuple[int, ...]:
        """The status of each row."""
        return self._unpacked()[2]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Bytes of each letter."""
        return self._unpacked()[3]

    def cut(self, start: int, stop: int) -> Rows:
        """The rows from `start` up to `stop`, with their letters."""
        if start == 0 and stop >= len(self):
            return self
        shorts, longs = self._letter_offsets()
        first, last = longs[start], longs[stop]
        rows = Rows(
            self.job, self.table[start * ROW.size : stop * ROW.size],
            self.digests[first * DIGEST_BYTES : last * DIGEST_BYTES],
            self.shorts[shorts[start] : shorts[stop]], self.longs[first:last], self.pace,
        )
        rows._columns = tuple(column[start:stop] for column in self._columns)
        return rows

    def letters(self) -> Iterator[tuple[bytes, Sequence[Buffer]]]:
        """Each row's letter with its digest, or with b"" where it is short and under the envelope's tag."""
        return self._mixed_letters() if self.longs else zip(repeat(b""), zip(self.short_letters()))

    def short_letters(self) -> list[bytes]:
        """Each row's letter, where none is long."""
        ends = list(accumulate(self.lengths))
        return [self.shorts[start:end] for start, end in zip([0, *ends], ends)]

    def _mixed_letters(self) -> Iterator[tuple[bytes, Sequence[Buffer]]]:
        start = long = 0
        for length in self.lengths:
            if length > SHORT_LETTER_BYTES:
                yield self.digests[long * DIGEST_BYTES : (long + 1) * DIGEST_BYTES], self.longs[long]
                long += 1
            else:
                yield b"", (self.shorts[start : start + length],)
                start += length

    def renumbered(self, job: int, pace: int | None = None) -> Rows:
        """The same rows under another connection's number of the job."""
        other: Rows = object.__new__(Rows)
        for name in Rows.__slots__:
            setattr(other, name, getattr(self, name))
        other.job = job
        other.pace = self.pace if pace is None else pace
        return other

    def again(self, steps: int = 1) -> Rows:
        """The same slices for a further attempt, `steps` later, and packed."""
        rows = zip(self.slices, self.attempts, self.statuses, self.lengths)
        table = b"".join(ROW.pack(n, min(a + steps, U16), s | PACKED, length) for n, a, s, length in rows)
        return Rows(self.job, table, self.digests, self.shorts, self.longs, self.pace)

    def bare(self) -> Rows:
        """The rows without their letters, as RETURNED has them."""
        return Rows(self.job, b"".join([ROW.pack(n, attempt, 0, 0) for n, attempt in zip(self.slices, self.attempts)]))

    def size(self) -> int:
        """Bytes of all letters."""
        return sum(self.lengths)

    def _unpacked(self) -> tuple[tuple[int, ...], ...]:
        if not self._columns:
            self._columns = tuple(zip(*ROW.iter_unpack(self.table))) or ((), (), (), ())
        return self._columns

    def _letter_offsets(self) -> tuple[list[int], list[int]]:
        """Where each row's letter begins: in `shorts`, and in `longs`."""
        if self._offsets is None:
            long = [length > SHORT_LETTER_BYTES for length in self.lengths]
            short = [0 if is_long else n for n, is_long in zip(self.lengths, long)] if self.longs else self.lengths
            self._offsets = list(accumulate(short, initial=0)), list(accumulate(long, initial=0))
        return self._offsets


def merge(batch: Sequence[Rows]) -> Rows:
    """Rows of one job, joined in their order."""
    if len(batch) == 1:
        return batch[0]
    return Rows(
        batch[0].job, b"".join([r.table for r in batch]), b"".join([r.digests for r in batch]),
        b"".join([r.shorts for r in batch]), [letter for r in batch for letter in r.longs],
        max(r.pace for r in batch),
    )


class Frame(NamedTuple):
    """One frame: a dict where the kind is a JSON one, else Rows."""

    kind: Kind
    body: Any


def digest(letter: Iterable[Buffer]) -> bytes:
    """SHA-256 of a letter given as buffers end to end."""
    sha = hashlib.sha256()
    for part in letter:
        sha.update(part)
    return sha.digest()


def encode(kind: Kind, body: dict[str, Any] | Rows) -> tuple[bytes, bytes, list[Buffer]]:
    """Head, envelope and long letters of a frame; the channel puts the tag behind the envelope."""
    if not isinstance(body, Rows):
        envelope = json.dumps(body, separators=(",", ":")).encode()
        return HEAD.pack(kind, 0, 0, len(envelope)), envelope, []
    envelope = b"".join((ADDRESS.pack(body.job, body.pace), body.table, body.digests, body.shorts))
    return HEAD.pack(kind, 0, len(body), len(envelope)), envelope, [part for letter in body.longs for part in letter]


def decode(kind: Kind, count: int, envelope: bytes) -> tuple[dict[str, Any] | Rows, list[int]]:
    """The body of a frame, and the lengths of the long letters that follow it; ProtocolError if it is not one."""
    if kind in ROW_COUNTS:
        return _decode_rows(kind, count, envelope)
    if count:
        raise ProtocolError(f"{kind.name} has no rows, this one has {count}")
    body = read_object(kind.name, envelope, FIELDS[kind])
    if kind is Kind.JOB and any(isinstance(value, (dict, list)) for value in body["options"].values()):
        raise ProtocolError("a JOB option is a number, a text, true, false or null")
    return body, []


def describe(kind: Kind, body: dict[str, Any] | Rows) -> str:
    """A frame in a line for the log: never a letter, nor what a JSON body says in words of its own."""
    if not isinstance(body, Rows):
        names = ("job", "function", "upto", "number", "reason", "context")
        return " ".join([kind.name, *(f"{name} {str(body[name])[:16]}" for name in names if name in body)])
    if kind is Kind.FUNCTION:
        return f"{kind.name} ({body.size()} bytes)"
    if kind is Kind.PACKET:
        shown = [f"{first}..{first + count - 1}" for first, count in zip(body.slices, body.attempts)]
        return f"{kind.name} job {body.job} slices {', '.join(shown[:4])}{', ...' if len(shown) > 4 else ''}"
    if len(body) == 1:
        return f"{kind.name} job {body.job} slice {body.slices[0]} ({body.size()} bytes)"
    span = f"{min(body.slices)}..{max(body.slices)}" if body.slices else "none"
    return f"{kind.name} job {body.job} slices {span} ({len(body)} rows, {body.size()} bytes)"


class FrameReader:
    """Bytes of one direction in, frames out.

    Use it in a loop: read into `space()`, tell `received(n)` how many bytes came,
    take the frames that it returns. `verify(head, envelope, tag)` raises on a wrong
    tag; None on a worker's link, where there is no tag. `link` says who speaks to
    whom ("CS": a controller to its server). Not for several threads.
    """

    def __init__(self, link: str, verify: Verify | None, letter_limit: int = LETTER_LIMIT_BYTES) -> None:
        self.letter_limit = letter_limit
        self._link = link
        self._verify = verify
        self._tag_bytes = 0 if verify is None else TAG_BYTES
        self._buffer = bytearray(BUFFER_BYTES)
        self._start = 0  # of what is not decoded yet, in the buffer
        self._end = 0  # of what was received into it
        self._frame: Frame | None = None  # waits for its long letters
        self._lengths: list[int] = []  # of those that have not come whole, the next one first
        self._letter = bytearray()  # the one that is coming
        self._filled = 0  # how much of it came
        self._direct = False  # the next bytes go there, not into the buffer

    @property
    def at_boundary(self) -> bool:
        """Whether all that came is whole frames, so that an end of file here cuts none."""
        return self._frame is None and self._start == self._end

    def space(self) -> memoryview:
        """Where the next bytes belong; release it (or let it go) before `received`."""
        self._direct = self._start == self._end and self._missing() >= DIRECT_BYTES
        if self._direct:
            if self._filled == len(self._letter):
                self._grow_letter()
            return memoryview(self._letter)[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == len(self._buffer):
            self._make_room()
        return memoryview(self._buffer)[self._end :]

    def received(self, count: int) -> list[Frame]:
        """The frames that `count` further bytes make whole, in their order."""
        frames: list[Frame] = []
        if self._direct:
            self._filled += count
        else:
            self._end += count
        while self._step(frames):
            pass
        return frames

    def _missing(self) -> int:
        """Bytes of the letter that is coming which have not come."""
        return self._lengths[0] - self._filled if self._lengths else 0

    def _step(self, frames: list[Frame]) -> bool:
        """Take one thing out of the buffer, an envelope or a piece of a letter; False if nothing is whole."""
        if self._frame is None:
            return self._take_envelope(frames)
        if self._missing() and self._start < self._end:
            self._fill_from_buffer()
        if self._missing():
            return False
        self._frame.body.longs.append((self._letter,))
        del self._lengths[0]
        self._letter, self._filled = bytearray(), 0
        if not self._lengths:
            frames.append(self._frame)
            self._frame = None
        return True

    def _take_envelope(self, frames: list[Frame]) -> bool:
        have = self._end - self._start
        if have < HEAD.size:
            return False
        number, flags, count, length = HEAD.unpack_from(self._buffer, self._start)
        if length > MAX_ENVELOPE_BYTES:
            raise ProtocolError(f"an envelope of {length} bytes; the limit is {MAX_ENVELOPE_BYTES}")
        whole = HEAD.size + length + self._tag_bytes
        if have < whole:
            return False
        with memoryview(self._buffer)[self._start : self._start + whole] as view:
            head, envelope = bytes(view[: HEAD.size]), bytes(view[HEAD.size : HEAD.size + length])
            if self._verify is not None:
                self._verify(head, envelope, bytes(view[HEAD.size + length :]))
        self._start += whole
        frame, self._lengths = self._open(number, flags, count, envelope)
        if self._lengths:
            self._frame = frame
        else:
            frames.append(frame)
        return True

    def _open(self, number: int, flags: int, count: int, envelope: bytes) -> tuple[Frame, list[int]]:
        if number not in _KINDS or flags:
            raise ProtocolError(f"no frame of kind {number} with flags {flags} is known")
        kind = _KINDS[number]
        if self._link not in DIRECTIONS[kind]:
            raise ProtocolError(f"{kind.name} may not travel here ({self._link})")
        if kind is Kind.JOB and self._link == "CS" and len(envelope) > MAX_JOB_BYTES:
            raise ProtocolError(f"a JOB of {len(envelope)} bytes; the limit is {MAX_JOB_BYTES}")
        body, lengths = decode(kind, count, envelope)
        if kind is Kind.STATUS and self._link == "SC":
            check_fields(kind.name, body, ANSWER)
        if lengths and max(lengths) > self.letter_limit:
            raise ProtocolError(f"a letter of {max(lengths)} bytes; the limit is {self.letter_limit}")
        return Frame(kind, body), lengths

    def _fill_from_buffer(self) -> None:
        """Move what of the letter came into the buffer, with its envelope or because it is short."""
        stop = min(self._end, self._start + self._missing())
        del self._letter[self._filled :]
        self._letter += memoryview(self._buffer)[self._start : stop]
        self._filled = len(self._letter)
        self._start = stop

    def _grow_letter(self) -> None:
        """Memory for more of the letter: some, then much, then twice as much as has come; little for a length alone."""
        least = LETTER_STEP_BYTES if self._filled >= DIRECT_BYTES else BUFFER_BYTES
        grown = bytearray(min(self._lengths[0], max(2 * self._filled, least)))
        grown[: self._filled] = self._letter
        self._letter = grown

    def _make_room(self) -> None:
        """The buffer is full with the beginning of a frame: move it to the front, then grow as bytes come."""
        if self._start:
            self._buffer[: self._end - self._start] = self._buffer[self._start : self._end]
            self._start, self._end = 0, self._end - self._start
        else:
            self._buffer.extend(bytes(len(self._buffer)))


def _decode_rows(kind: Kind, count: int, envelope: bytes) -> tuple[Rows, list[int]]:
    low, high = ROW_COUNTS[kind]
    end = ADDRESS.size + count * ROW.size
    if not low <= count <= high or len(envelope) < end:
        raise ProtocolError(f"{kind.name} with {count} rows in {len(envelope)} bytes")
    job, pace = ADDRESS.unpack_from(envelope)
    rows = Rows(job, envelope[ADDRESS.size : end], pace=pace)
    if not STATUSES.get(kind, _ZERO).issuperset(rows.statuses):
        raise ProtocolError(f"a row of a {kind.name} with a status that is not known")
    lengths = [n for n in rows.lengths if n > SHORT_LETTER_BYTES]
    start = end + len(lengths) * DIGEST_BYTES
    rows.digests, rows.shorts, rows.longs = envelope[end:start], envelope[start:], []
    if len(envelope) - start != sum(rows.lengths) - sum(lengths) or (kind in LETTERLESS and len(envelope) != end):
        raise ProtocolError(f"the letters of a {kind.name} do not fill its envelope")
    if len(lengths) > 1 and sum(lengths) > MAX_LONG_BYTES:
        raise ProtocolError(f"{len(lengths)} letters of {sum(lengths)} bytes in one {kind.name}")
    return rows, lengths
