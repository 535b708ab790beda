"""Frames for the tests: a good body of every kind, recorded bytes, and ways to write, read and compare."""

import json

from achilles.protocol import frames
from achilles.protocol.frames import HEAD, TELL, Batch, Gone, Kind, LongLetter, Status
from achilles.protocol.kinds import FIELDS, LETTERS, RANGES, SERVER_FIELDS

LINKS = ("CS", "NS", "SC", "SN", "NW", "WN")
LONG = bytes(range(256)) * 5
LONG_DIGEST = bytes.fromhex("d414b085826eb06778483ba35564dc849e643359f69ed9747878ba6e54985bed")
HEX64, HEX32 = "0f" * 32, "0f" * 16
ABOUT = {"python": "3.11", "version": "1.0.0"}
CLIENT_HELLO = ABOUT | {"cpu_count": 8, "pid": 4711}
SERVER_HELLO = ABOUT | {"client_id": 0, "connections": 2}
DECLARATION = {"context": HEX32, "initializer": False}
CLUSTER = {"nodes": 1, "workers": 8, "largest": 8, "pythons": {"3.11": 1}}
NODE_STATE = {"id": 0, "address": "10.0.0.2", "python": "3.11", "version": "1.0.0", "cpu_count": 8, "busy": 3,
              "done": 12, "since": 1.5}
JOB_STATE = {"id": 7, "user": "ann", "queued": 5, "running": 3, "done": 2**40}
LONGEST = {"longest": 12.5, "node": 3, "pid": 4711}  # of a job; each may be absent
CHUNK_STATE = {"job": 7, "seconds": 12.5, "pid": 4711}
SERVER_STATE = {"version": "1.0.0", "uptime": 61.7, "memory": None}
STATUS = {"nodes": [NODE_STATE], "jobs": [JOB_STATE, JOB_STATE], "server": SERVER_STATE}
# A good body of each JSON kind, whatever the link.
GOOD = {
    Kind.HELLO: CLIENT_HELLO | SERVER_HELLO, Kind.BYE: {"reason": "leaving"}, Kind.PING: {},
    Kind.ERROR: {"code": "full", "message": "x"}, Kind.CLUSTER: CLUSTER, Kind.CLOSE: {"context": HEX32},
    Kind.STATUS: STATUS, Kind.KILL: {},
}


def letter(*parts):
    """A letter of these buffers, short or long as its length says."""
    length = sum(map(len, parts))
    if length <= frames.SHORT_LETTER_BYTES:
        return b"".join(parts)
    return LongLetter(parts, frames.digest(parts), length)


def batch(first, *letters, job=7, **fields):
    """A batch of chunks with these letters."""
    return Batch.pack(job, first, [letter(each) for each in letters], **fields)


def job(number=7, declaration=DECLARATION, function=b"f", initializer=None, sources=None):
    """The body of a JOB."""
    first = declaration if isinstance(declaration, bytes) else json.dumps(declaration, separators=(",", ":")).encode()
    made = batch(0, *[each for each in (first, function, initializer, sources) if each is not None], job=number)
    made.declaration = json.loads(first) if frames.SHORT_LETTER_BYTES >= len(first) else {}
    return made


def good(kind):
    """A good body of this kind."""
    if kind is Kind.JOB:
        return job()
    if kind in LETTERS:
        return batch(3, b"ab", statuses=b"\0" if kind is Kind.RESULT else b"")
    if kind in RANGES:
        return Batch(7, *(low for low, _ in RANGES[kind]))
    return GOOD[kind]


# A peer and its reader, kind, body, and the frame without its tag: head, envelope, long letters. All recorded bytes.
FRAMES = [
    ("CS", Kind.BYE, {"reason": "leaving"}, "0200000000000014" + b'{"reason":"leaving"}'.hex()),
    ("SC", Kind.PING, {}, "0300000000000002" + b"{}".hex()),
    ("NS", Kind.ERROR, {"code": "full", "message": ""},
     "040000000000001c" + b'{"code":"full","message":""}'.hex()),
    ("SC", Kind.CLUSTER, CLUSTER,
     "0500000000000038" + b'{"nodes":1,"workers":8,"largest":8,"pythons":{"3.11":1}}'.hex()),
    ("SN", Kind.JOB, job(),
     "060000000000006b" "00000007" "0000000000000000" "00000002" "00000000" "00000000"
     "0000000000000042" "0000000000000001" + b'{"context":"%b","initializer":false}f'.replace(
         b"%b", HEX32.encode()).hex()),
    ("SN", Kind.TASK, batch(40, b"hello", LONG, attempt=3, number=5000, flags=TELL),
     "070200000000004d" "00000007" "0000000000000028" "00000002" "00000003" "00001388"
     "0000000000000005" "0000000000000500"
     "d414b085826eb06778483ba35564dc849e643359f69ed9747878ba6e54985bed" "68656c6c6f" + LONG.hex()),
    ("SC", Kind.GIVEN, Batch(7, 3, 8, 1, 8),
     "0800000000000018" "00000007" "0000000000000003" "00000008" "00000001" "00000008"),
    ("WN", Kind.RESULT, batch(5, b"ab", b"c", attempt=2, number=258, statuses=bytes([Status.VALUES, Status.RAISED])),
     "090000000000002d" "00000007" "0000000000000005" "00000002" "00000002" "00000102" "0001"
     "0000000000000002" "0000000000000001" "616263"),
    ("NS", Kind.RETURNED, Batch(7, 2**64 - 2, 2, 2**32 - 1, 0, Gone.WAITED),
     "0a03000000000018" "00000007" "fffffffffffffffe" "00000002" "ffffffff" "00000000"),
    ("SC", Kind.GONE, Batch(7, 5, 1, 2, 0, Gone.LOST),
     "0b02000000000018" "00000007" "0000000000000005" "00000001" "00000002" "00000000"),
    ("CS", Kind.CANCEL, Batch(7, 0, 2**32 - 1), "0c00000000000018" "00000007" "0000000000000000" "ffffffff" + "00" * 8),
    ("SN", Kind.END, Batch(7), "0d00000000000018" "00000007" + "00" * 20),
    ("SN", Kind.CLOSE, {"context": HEX32}, "0e0000000000002e" + b'{"context":"%b"}'.replace(
        b"%b", HEX32.encode()).hex()),
    ("CS", Kind.STATUS, {}, "0f00000000000002" "7b7d"),
    ("CS", Kind.KILL, {}, "1000000000000002" "7b7d"),
]
IDS = [kind.name for _, kind, _, _ in FRAMES]


def plain(kind, body):
    """All of a frame that can be compared."""
    if not isinstance(body, Batch):
        return kind, body
    letters = [bytes(frames.joined(each)) for each in body.letters()] if kind in LETTERS else []
    digests = [long.digest for long in body.longs]
    return (kind, body.job, body.first, body.count, body.attempt, body.number, body.flags, body.statuses, letters,
            body.packed, digests, body.declaration)


def read(reader, pieces):
    """Feed a FrameReader. Each piece may take several turns, as with recv_into."""
    found = []
    for piece in pieces:
        while piece:
            with reader.space() as space:
                count = min(len(space), len(piece))
                space[:count] = piece[:count]
            piece = piece[count:]
            found += reader.received(count)
    return found


def pieces_of(data, step):
    """The bytes, `step` at a time."""
    return [data[start : start + step] for start in range(0, len(data), step)]


def encode(kind, body):
    """A frame's head, envelope and long letters."""
    signed, letters = frames.encode(kind, body)
    return signed[: HEAD.size], signed[HEAD.size :], letters


def decode(kind, flags, envelope):
    """The body of a frame that either side may send, and the lengths of the long letters that follow."""
    sides = {Kind.HELLO: (FIELDS, SERVER_FIELDS), Kind.STATUS: (FIELDS if envelope == b"{}" else SERVER_FIELDS,)}
    body, *_ = [frames.decode(kind, flags, envelope, fields) for fields in sides.get(kind, (SERVER_FIELDS,))]
    return body, [len(long) for long in getattr(body, "longs", ())]


def written(kind, body):
    """A frame as it travels where there is no tag."""
    signed, letters = frames.encode(kind, body)
    return b"".join([signed, *letters])
