"""What must hold of any bytes that a peer may send: for `test_fuzz.py` (hypothesis) and `frames.py` (atheris).

Each function takes bytes, returns how far they got, and raises nothing unless something is wrong: what a parser
may raise (ProtocolError, AuthenticationError for a wrong tag) is caught here, all else is a find.
"""

from __future__ import annotations

import json
from typing import Any

from achilles.controller import run
from achilles.errors import AuthenticationError, ProtocolError
from achilles.protocol import auth, frames
from achilles.protocol import reader as reading
from achilles.protocol.frames import HEAD, Batch, Kind, LongLetter, joined
from achilles.protocol.kinds import DIRECTIONS, FIELDS, FLAGS, LETTERS, SERVER_FIELDS, read_object
from achilles.protocol.reader import FrameReader

KEY = bytes(range(32))
GREETING = auth.PLAIN + bytes(32)


def memory_bytes(reader: FrameReader) -> int:
    """What a reader holds for what has not come whole."""
    return len(reader._buffer) + len(reader._place.obj)


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
        bound = reading.BUFFER_BYTES + reading.LETTER_STEP_BYTES + 2 * taken
        assert memory_bytes(reader) <= bound, "memory was taken from a length field"
    return found, taken


def plain(frame: frames.Frame) -> Any:
    """What there is to compare of a frame."""
    kind, body = frame
    if not isinstance(body, Batch):
        return kind, body
    letters = [bytes(joined(letter)) for letter in body.letters()] if kind in LETTERS else []
    digests = [long.digest for long in body.longs]
    span = body.job, body.first, body.count, body.attempt, body.number, body.flags
    return kind, span, body.statuses, body.packed, digests, letters, body.declaration


def encoded(frame: frames.Frame) -> bytes:
    """A frame as it travels where there is no tag."""
    signed, letters = frames.encode(*frame)
    return b"".join([signed, *letters])


def check_stream(link: str, data: bytes, step: int) -> int:
    """A worker's link, without tags: whatever the pieces, the same frames; each is what its bytes were; how many."""
    found, _ = read(FrameReader(link, None), data, step)
    whole, _ = read(FrameReader(link, None), data, len(data) or 1)
    # A whole piece may bring good frames together with the error that ends the connection: then they are dropped.
    assert list(map(plain, whole)) == list(map(plain, found))[: len(whole)]
    at = 0
    for frame in found:
        assert link in DIRECTIONS[frame.kind]
        written = encoded(frame)
        if isinstance(frame.body, Batch):
            assert data[at : at + len(written)] == written
            check_batch(frame.kind, frame.body)
            at += len(written)
        else:
            again = frames.decode(frame.kind, 0, written[HEAD.size :], SERVER_FIELDS if link[0] == "S" else FIELDS)
            assert again == frame.body and isinstance(again, dict)
            check_texts(again)
            at += HEAD.size + HEAD.unpack_from(data, at)[3]
        assert str(frame).isprintable()
    return len(found)


def check_batch(kind: Kind, batch: Batch) -> None:
    """What the server and a node do with a batch, without a look at its letters."""
    assert batch.flags in FLAGS.get(kind, (0,)) and 0 <= batch.first <= batch.end <= 2**64
    other = plain(frames.Frame(kind, batch.renumbered(7)))
    assert (other[1][1:], other[2:]) == (plain(frames.Frame(kind, batch))[1][1:], plain(frames.Frame(kind, batch))[2:])
    if kind in LETTERS:
        letters = batch.letters()
        assert len(letters) == batch.count and list(map(len, letters)) == list(batch.lengths)
        for letter in letters:
            assert isinstance(letter, LongLetter) == (len(letter) > frames.SHORT_LETTER_BYTES)
        statuses = batch.statuses if kind is Kind.RESULT else b""
        again = Batch.pack(batch.job, batch.first, letters, attempt=batch.attempt, number=batch.number,
                           flags=batch.flags, statuses=statuses)
        again.declaration = batch.declaration
        assert plain(frames.Frame(kind, again)) == plain(frames.Frame(kind, batch))


def check_signed_stream(link: str, data: bytes, step: int) -> int:
    """A signed link: bytes of one who has not the key never become a frame."""
    frames, _ = read(FrameReader(link, auth.Tagger(KEY).check), data, step)
    assert not frames, "a frame with a wrong tag was read"
    return 0


def check_control(kind: Kind, envelope: bytes) -> bool:
    """An envelope by itself, under each flag that it could have; whether it is one."""
    good = False
    for flags in range(5):
        try:
            body = frames.decode(kind, flags, envelope)
        except ProtocolError:
            continue
        good = True
        lengths = [len(long) for long in getattr(body, "longs", ())]
        assert max(lengths, default=0) <= frames.LETTER_LIMIT_BYTES
        assert len(lengths) < 2 or kind is Kind.JOB or sum(lengths) <= frames.MAX_LONG_BYTES
        if isinstance(body, Batch):
            assert frames.encode(kind, body)[0][HEAD.size :] == envelope
            check_texts(body.declaration)
        else:
            again = json.dumps(body)  # the server writes JSON of its peers anew
            assert frames.decode(kind, 0, again.encode()) == body
            check_texts(body)
    return good


def check_texts(body: dict[str, Any]) -> None:
    """Nothing of it does anything to a terminal or to a log."""
    assert json.dumps(body, ensure_ascii=False).isprintable(), "a text that is not printable was let through"


def check_note(letter: bytes) -> bool:
    """The letter of a chunk that died; whether it is one. What is said of it can be shown."""
    try:
        note = read_object("the note", letter, frames.NOTE)
    except ProtocolError:
        return False
    check_texts(note)
    error = run.worker_lost("x", note)
    assert str(error).isprintable()
    assert all(value is None or type(value) is int for value in (error.node, error.pid, error.exitcode))
    return True


def check_handshake(message: bytes) -> bool:
    """M1 and M2 of whoever connects: parsed or refused, and never accepted. Of M2, 104 bytes are read, or none."""
    try:
        auth.check_opening(message[:auth.OPENING_BYTES], auth.PLAIN)
    except ProtocolError:
        pass
    message = message[: auth.AUTH_BYTES].ljust(auth.AUTH_BYTES, b"\0")
    try:
        _, user = auth.read_claim(message)
    except ProtocolError:
        return False
    assert auth.accept_claim([KEY, KEY[::-1]], GREETING, message) is None
    user.decode(errors="replace")
    return True
