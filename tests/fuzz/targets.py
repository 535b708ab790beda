"""What must hold of any bytes that a peer may send: for `test_fuzz.py` (hypothesis) and `frames.py` (atheris).

Each function takes bytes, returns how far they got, and raises nothing unless something is wrong: what a parser
may raise (ProtocolError, AuthenticationError for a wrong tag) is caught here, all else is a find.
"""

from __future__ import annotations

import json
from typing import Any

from achilles.controller import job
from achilles.errors import AuthenticationError, ProtocolError
from achilles.protocol import auth, frames
from achilles.protocol.fields import read_object
from achilles.protocol.frames import HEAD, FrameReader, Kind, Rows

KEY = bytes(range(32))
LETTER_LIMIT_BYTES = 1 << 20
GREETING = auth.greeting(bytes(32))


def memory_bytes(reader: FrameReader) -> int:
    """What a reader holds for what has not come whole."""
    return len(reader._buffer) + len(reader._letter)


def read(reader: FrameReader, data: bytes, step: int) -> tuple[list[frames.Frame], int]:
    """Feed it `step` bytes at a time; the frames up to the first error, and how many bytes were taken until then."""
    found: list[frames.Frame] = []
    taken = 0
    while taken < len(data):
        with reader.space() as space:
            assert len(space), "no room: recv_into would take that for the end of file"
            count = min(len(space), step, len(data) - taken)
            space[:count] = data[taken : taken + count]
        taken += count
        try:
            found += reader.received(count)
        except (ProtocolError, AuthenticationError):
            return found, taken
        bound = frames.BUFFER_BYTES + frames.LETTER_STEP_BYTES + 2 * taken
        assert memory_bytes(reader) <= bound, "memory was taken from a length field"
    return found, taken


def plain(frame: frames.Frame) -> Any:
    """What there is to compare of a frame."""
    kind, body = frame
    if not isinstance(body, Rows):
        return kind, body
    letters = [(digest, b"".join(parts)) for digest, parts in body.letters()]
    return kind, body.job, body.pace, body.table, body.digests, letters


def encoded(frame: frames.Frame) -> bytes:
    """A frame as it travels where there is no tag."""
    head, envelope, letters = frames.encode(*frame)
    return b"".join([head, envelope, *letters])


def check_stream(link: str, data: bytes, step: int) -> int:
    """A worker's link, without tags: whatever the pieces, the same frames; each is what its bytes were; how many."""
    found, _ = read(FrameReader(link, None, LETTER_LIMIT_BYTES), data, step)
    whole, _ = read(FrameReader(link, None, LETTER_LIMIT_BYTES), data, len(data) or 1)
    # A whole piece may bring good frames together with the error that ends the connection: then they are dropped.
    assert list(map(plain, whole)) == list(map(plain, found))[: len(whole)]
    at = 0
    for frame in found:
        assert link in frames.DIRECTIONS[frame.kind]
        written = encoded(frame)
        if isinstance(frame.body, Rows):
            assert data[at : at + len(written)] == written
            check_rows(frame.kind, frame.body)
            at += len(written)
        else:
            again, lengths = frames.decode(frame.kind, 0, written[HEAD.size :])
            assert (again, lengths) == (frame.body, [])
            check_texts(again)
            at += HEAD.size + HEAD.unpack_from(data, at)[3]
        assert frames.describe(*frame).isprintable()
    return len(found)


def check_rows(kind: Kind, rows: Rows) -> None:
    """What the server and a node do with rows, without a look at their letters."""
    assert rows.size() == sum(sum(map(len, parts)) for _, parts in rows.letters())
    middle = len(rows) // 2
    pieces = [piece for piece in (rows.cut(0, middle), rows.cut(middle, len(rows))) if len(piece)]
    if pieces:
        assert plain(frames.Frame(kind, frames.merge(pieces))) == plain(frames.Frame(kind, rows))
    assert rows.renumbered(7).again().slices == rows.slices


def check_signed_stream(link: str, data: bytes, step: int) -> int:
    """A signed link: bytes of one who has not the key never become a frame."""
    frames, _ = read(FrameReader(link, auth.Checker(KEY).check, LETTER_LIMIT_BYTES), data, step)
    assert not frames, "a frame with a wrong tag was read"
    return 0


def check_control(kind: Kind, envelope: bytes) -> bool:
    """A payload by itself, under each number of rows that it could have; whether it is one."""
    for count in {0, 1, max(len(envelope) - frames.ADDRESS.size, 0) // frames.ROW.size & frames.U16}:
        try:
            body, lengths = frames.decode(kind, count, envelope)
        except ProtocolError:
            continue
        assert sum(lengths) <= max(frames.MAX_LONG_BYTES, frames.U32)
        if not isinstance(body, Rows):
            again = json.dumps(body)  # the server writes JSON of its peers anew
            assert frames.decode(kind, 0, again.encode())[0] == body
            check_texts(body)
        return True
    return False


def check_texts(body: dict[str, Any]) -> None:
    """Nothing of it does anything to a terminal or to a log."""
    assert json.dumps(body, ensure_ascii=False).isprintable(), "a text that is not printable was let through"


def check_note(letter: bytes) -> bool:
    """The letter of a slice that died; whether it is one. What is said of it can be shown."""
    try:
        note = read_object("the note", letter, frames.NOTE)
    except ProtocolError:
        return False
    check_texts(note)
    error = job._lost("x", note)
    assert str(error).isprintable()
    assert all(value is None or type(value) is int for value in (error.node, error.pid, error.exitcode))
    return True


def check_handshake(message: bytes) -> bool:
    """M1 and M2 of whoever connects: parsed or refused, and never accepted."""
    try:
        auth.read_greeting(message)
    except ProtocolError:
        pass
    try:
        claim = auth.read_claim(message)
    except ProtocolError:
        return False
    assert auth.accept_claim([KEY, KEY[::-1]], GREETING, claim) is None
    claim.user.decode(errors="replace")
    return True
