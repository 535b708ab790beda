"""Frames: one table that drives writer and reader, what a reader refuses, and PROTOCOL.md held against the code."""

import json
import re
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import achilles
from achilles.errors import AuthenticationError, ProtocolError
from achilles.protocol import auth, fields, frames
from achilles.protocol.fields import read_object
from achilles.protocol.frames import (
    FIELDS,
    HEAD,
    MORE,
    PACKED,
    ROW,
    Frame,
    FrameReader,
    Kind,
    Rows,
    Status,
    decode,
    encode,
    merge,
)

PROTOCOL = (Path(achilles.__file__).parent / "PROTOCOL.md").read_text(encoding="utf-8")
LONG = bytes(range(256)) * 5
LONG_DIGEST = bytes.fromhex("d414b085826eb06778483ba35564dc849e643359f69ed9747878ba6e54985bed")
HEX64, HEX32 = "0f" * 32, "0f" * 16
ABOUT = {"python": "3.11", "version": "1.0.0", "letter_limit": 1 << 30}
JOB = {"job": 7, "context": HEX32, "function": HEX64, "initializer": None, "resumed": False, "options": {}}
CLUSTER = {"nodes": 1, "workers": 8, "largest": 8, "pythons": {"3.11": 1}, "letter_limit": 1 << 30}
NODE_STATE = {"id": 0, "address": "10.0.0.2", "python": "3.11", "version": "1.0.0", "cpu_count": 8, "busy": 3,
              "done": 12, "since": 1.5}
JOB_STATE = {"id": 7, "user": "ann", "queued": 5, "running": 3, "done": 2**40}
SERVER_STATE = {"version": "1.0.0", "uptime": 61.7, "memory": None}
STATUS = {"nodes": [NODE_STATE], "jobs": [JOB_STATE, JOB_STATE], "server": SERVER_STATE}


def row(slice_, letter=b"", attempt=0, status=0, job=7, pace=0):
    return Rows.single(job, slice_, attempt, status, (letter,), frames.digest([letter]), pace)


# Who says it, kind, body, and the frame without its tag: head, envelope, long letters. All from recorded bytes.
FRAMES = [
    ("CS", Kind.BYE, {"reason": "leaving"}, "0200000000000014" + b'{"reason":"leaving"}'.hex()),
    ("SC", Kind.PING, {}, "0300000000000002" + b"{}".hex()),
    ("NS", Kind.ERROR, {"code": "full", "message": ""},
     "040000000000001c" + b'{"code":"full","message":""}'.hex()),
    ("SC", Kind.CLUSTER, CLUSTER,
     "0500000000000052" + b'{"nodes":1,"workers":8,"largest":8,"pythons":{"3.11":1},"letter_limit":1073741824}'.hex()),
    ("CS", Kind.FLUSH, {"job": 7, "upto": 2}, "0a00000000000012" + b'{"job":7,"upto":2}'.hex()),
    ("SN", Kind.FUNCTION, row(0, b"f", job=0),
     "0700000100000019" "0000000000000000" "00000000000000000000000000000001" "66"),
    ("SN", Kind.TASK, merge([row(40, b"hello"), row(41, LONG, attempt=1)]),  # the second frame of the vectors
     "090000020000004d" "0000000700000000" "00000000000000280000000000000005" "00000000000000290001000000000500"
     "d414b085826eb06778483ba35564dc849e643359f69ed9747878ba6e54985bed" "68656c6c6f" + LONG.hex()),
    ("SC", Kind.PACKET, row(3, attempt=8),
     "0b00000100000018" "0000000700000000" "00000000000000030008000000000000"),
    ("WN", Kind.RESULT, merge([row(5, b"ab", 2, Status.VALUES | MORE), row(5, b"c", 2, Status.RAISED, pace=258)]),
     "0c0000020000002b" "0000000700000102" "00000000000000050002800000000002" "00000000000000050002010000000001"
     "616263"),
    ("NS", Kind.RETURNED, Rows(7, b""), "0e00000000000008" "0000000700000000"),
    ("CS", Kind.STATUS, {}, "1200000000000002" "7b7d"),
]
IDS = [kind.name for _, kind, _, _ in FRAMES]


def plain(kind, body):
    """What there is to compare of a frame."""
    if not isinstance(body, Rows):
        return kind, body
    letters = [(digest, b"".join(parts)) for digest, parts in body.letters()]
    return kind, body.job, body.pace, body.slices, body.attempts, body.statuses, body.lengths, body.digests, letters


def read(reader, pieces):
    """Feed a FrameReader; each piece may take several turns, as recv_into does."""
    frames = []
    for piece in pieces:
        while piece:
            with reader.space() as space:
                count = min(len(space), len(piece))
                space[:count] = piece[:count]
            piece = piece[count:]
            frames += reader.received(count)
    return frames


def written(kind, body):
    head, envelope, letters = encode(kind, body)
    return b"".join([head, envelope, *letters])


@pytest.mark.parametrize(("link", "kind", "body", "recorded"), FRAMES, ids=IDS)
def test_the_table_drives_writer_and_reader(link, kind, body, recorded):
    data = bytes.fromhex(recorded)
    assert written(kind, body) == data
    for pieces in ([data], [data[n : n + 1] for n in range(len(data))]):
        reader = FrameReader(link, None)
        frames = read(reader, pieces)
        assert [plain(*frame) for frame in frames] == [plain(kind, body)]
        assert isinstance(frames[0], Frame) and reader.at_boundary


def stream():
    """All frames of the table that a node may hear, thrice, with tags, and how they shall come out."""
    said = [(kind, body) for link, kind, body, _ in FRAMES if link == "SN"] * 3
    tagger, data = auth.Tagger(b"k"), b""
    for kind, body in said:
        head, envelope, letters = encode(kind, body)
        data += b"".join([head, envelope, tagger.tag(head, envelope), *letters])
    return data, [plain(*each) for each in said]


def test_a_stream_may_be_split_anywhere():
    data, said = stream()
    for at in range(len(data) + 1):
        reader = FrameReader("SN", auth.Checker(b"k").check)
        assert [plain(*frame) for frame in read(reader, [data[:at], data[at:]])] == said
        assert reader.at_boundary


@pytest.mark.parametrize("step", [1, 7, 33, 1000, 1 << 20])
def test_a_stream_may_come_in_pieces_of_any_size(step):
    data, said = stream()
    reader = FrameReader("SN", auth.Checker(b"k").check)
    pieces = [data[n : n + step] for n in range(0, len(data), step)]
    assert [plain(*frame) for frame in read(reader, pieces)] == said


def test_a_stream_that_ends_within_a_frame_is_seen():
    data, said = stream()
    reader = FrameReader("SN", auth.Checker(b"k").check)
    assert len(read(reader, [data[:-1]])) == len(said) - 1
    assert not reader.at_boundary


def test_nothing_of_an_envelope_is_looked_at_before_its_tag():
    reader = FrameReader("CS", auth.Checker(b"k").check)
    with pytest.raises(AuthenticationError):
        read(reader, [HEAD.pack(99, 1, 0, 4) + b"junk" + bytes(32)])


def test_a_frame_larger_than_the_buffer_comes_whole():
    letters = [bytes([n % 256]) * 1024 for n in range(1024)]
    batches = [merge([row(n + first, letter) for n, letter in enumerate(letters)]) for first in range(4)]
    data = b"".join(written(Kind.TASK, rows) for rows in batches)
    frames = read(FrameReader("CS", None), [data[:100_000], data[100_000:]])
    assert [plain(*frame) for frame in frames] == [plain(Kind.TASK, rows) for rows in batches]


def test_several_long_letters_follow_their_envelope_in_order():
    rows = merge([row(n, bytes([n]) * (1025 + n)) for n in range(5)])
    data = written(Kind.TASK, rows) + written(Kind.TASK, row(9))
    for step in (1000, 4096, len(data)):
        pieces = [data[n : n + step] for n in range(0, len(data), step)]
        frames = read(FrameReader("CS", None), pieces)
        assert [plain(*frame) for frame in frames] == [plain(Kind.TASK, rows), plain(Kind.TASK, row(9))]


# What a reader refuses.


def json_frame(kind, text):
    return HEAD.pack(kind, 0, 0, len(text)) + text


def rows_frame(kind, count, table, rest=b""):
    envelope = struct.pack(">II", 7, 0) + table + rest
    return HEAD.pack(kind, 0, count, len(envelope)) + envelope


def refused(link, data, **options):
    with pytest.raises(ProtocolError) as caught:
        read(FrameReader(link, None, **options), [data])
    return str(caught.value)


def test_whoever_may_not_say_it_is_refused():
    empty = {Kind.RETURNED: Rows(7, b"")}
    for kind in Kind:
        for link in frames.LINKS:
            data = written(kind, empty.get(kind, row(1)) if kind in frames.ROW_COUNTS else example(kind))
            if link in frames.DIRECTIONS[kind]:
                assert len(read(FrameReader(link, None), [data])) == 1
            else:
                assert kind.name in refused(link, data) and link in refused(link, data)


def example(kind):
    """A smallest good body of a JSON kind."""
    simple = {str: "x", int: 1, dict: {}, list: [], bool: False}
    body = {}
    if kind is Kind.STATUS:
        return STATUS
    for name, field in FIELDS[kind].items():
        value = simple[field.type]
        value = "3.11" if field.form and field.type is str else value
        value = "0" * int(field.low) if field.hex else max(value, field.low) if value == 1 else value
        body |= {name: value} if field.required else {}
    return body


@pytest.mark.parametrize("number", [0, 20, 99, 255])
def test_an_unknown_kind_is_refused(number):
    for link in frames.LINKS:
        assert f"kind {number}" in refused(link, json_frame(number, b"{}"))


@pytest.mark.parametrize("flags", [1, 128])
def test_flags_are_refused(flags):
    assert "flags" in refused("CS", HEAD.pack(Kind.PING, flags, 0, 2) + b"{}")


ZERO = ROW.pack(1, 0, 0, 0)
BAD_ROWS = [
    ("none", Kind.TASK, 0, b"", b""),
    ("two functions", Kind.FUNCTION, 2, ZERO * 2, b""),
    ("too many", Kind.TASK, 1025, ZERO * 1025, b""),
    ("too many returned", Kind.RETURNED, 1025, ZERO * 1025, b""),
    ("more than the envelope", Kind.TASK, 2, ZERO, b""),
    ("fewer than the envelope", Kind.TASK, 1, ZERO * 2, b""),
    ("a letter too short", Kind.TASK, 1, ROW.pack(1, 0, 0, 5), b"hell"),
    ("a letter too long", Kind.TASK, 1, ROW.pack(1, 0, 0, 5), b"hello!"),
    ("a digest too short", Kind.TASK, 1, ROW.pack(1, 0, 0, 1025), bytes(31)),
    ("no digest", Kind.TASK, 1, ROW.pack(1, 0, 0, 1025), b""),
    ("a packet with a letter", Kind.PACKET, 1, ROW.pack(1, 8, 0, 1), b"x"),
    ("a packet with a long letter", Kind.PACKET, 1, ROW.pack(1, 8, 0, 1025), bytes(32)),
    ("a returned letter", Kind.RETURNED, 1, ROW.pack(1, 0, 0, 1), b"x"),
    ("a status of TASK", Kind.TASK, 1, ROW.pack(1, 0, 2, 0), b""),
    ("a status of FUNCTION", Kind.FUNCTION, 1, ROW.pack(1, 0, 1, 0), b""),
    ("a status of PACKET", Kind.PACKET, 1, ROW.pack(1, 8, 1, 0), b""),
    ("a status of RETURNED", Kind.RETURNED, 1, ROW.pack(1, 0, 1, 0), b""),
    ("a status of RESULT", Kind.RESULT, 1, ROW.pack(1, 0, 6, 0), b""),
    ("more of a death", Kind.RESULT, 1, ROW.pack(1, 0, MORE | 2, 0), b""),
    ("long letters over 8 MiB together", Kind.TASK, 2, ROW.pack(1, 0, 0, 8 << 20) + ROW.pack(2, 0, 0, 1025), bytes(64)),
]


@pytest.mark.parametrize("bad", BAD_ROWS, ids=[bad[0] for bad in BAD_ROWS])
def test_rows_that_break_the_rules_are_refused(bad):
    _, kind, count, table, rest = bad
    refused(frames.DIRECTIONS[kind][0], rows_frame(kind, count, table, rest))


def test_an_envelope_too_short_for_its_address_is_refused():
    refused("NS", HEAD.pack(Kind.RETURNED, 0, 0, 4) + bytes(4))


def test_rows_of_a_kind_without_rows_are_refused():
    assert "no rows" in refused("CS", HEAD.pack(Kind.PING, 0, 1, 2) + b"{}")


@pytest.mark.parametrize("length", [(4 << 20) + 1, 2**32 - 1])
def test_an_envelope_over_the_limit_is_refused_at_its_head(length):
    assert "4194304" in refused("CS", HEAD.pack(Kind.PING, 0, 0, length))


def test_a_letter_over_the_limit_is_refused():
    data = rows_frame(Kind.TASK, 1, ROW.pack(1, 0, 0, 2001), bytes(32))
    assert "2000" in refused("CS", data, letter_limit=2000)
    assert read(FrameReader("CS", None, letter_limit=2001), [data]) == []


@pytest.mark.parametrize(
    "data",
    [
        HEAD.pack(Kind.PING, 0, 0, 2**32 - 1),
        HEAD.pack(Kind.PING, 0, 0, 4 << 20),
        rows_frame(Kind.TASK, 1, ROW.pack(1, 0, 0, 2**32 - 1), bytes(32)),
        rows_frame(Kind.TASK, 1, ROW.pack(1, 0, 0, 1 << 30), bytes(32)),
    ],
    ids=["envelope over the limit", "envelope", "letter over the limit", "letter"],
)
def test_memory_is_never_taken_from_a_length_field(data):
    tracemalloc.start()
    try:
        reader = FrameReader("CS", None)
        try:
            read(reader, [data, bytes(10_000)])
        except ProtocolError:
            pass
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


GOOD = {
    Kind.HELLO: ABOUT, Kind.BYE: {"reason": "leaving"}, Kind.ERROR: {"code": "full", "message": "x"},
    Kind.CLUSTER: CLUSTER, Kind.JOB: JOB, Kind.FORGET: {"function": HEX64},
    Kind.FLUSH: {"job": 2**32 - 1, "upto": 2**64 - 1},
    Kind.RECALL: {"job": 7, "number": 1}, Kind.CANCEL: {"job": 7}, Kind.END: {"job": 7}, Kind.CLOSE: {"context": HEX32},
    Kind.STATUS: STATUS, Kind.PING: {}, Kind.KILL: {},
}
MISSING = object()
BAD_FIELDS = [
    *[(kind, name, MISSING) for kind, fields in FIELDS.items() for name, field in fields.items() if field.required],
    *[(Kind.HELLO, "python", bad) for bad in (
        3.11, "", "x" * 65, None, ["3.11"], "3", "3.", ".14", "3.14.1", "3.14T", "3.14tt", "t", "3.14 t", "-3.14",
        "3.14\n", "\u0663.\u0661\u0664", "1" * 62 + ".1t")],
    *[(Kind.HELLO, "letter_limit", bad) for bad in (1024, 2**32, True, "9", 2000.0)],
    *[(Kind.HELLO, "cpu_count", bad) for bad in (-1, 65536, True, "8", 8.0)],
    *[(Kind.HELLO, "pid", bad) for bad in (-1, 2**32)],
    (Kind.BYE, "reason", 1), (Kind.BYE, "reason", ""),
    *[(kind, name, bad) for kind, name in (
        (Kind.HELLO, "python"), (Kind.HELLO, "version"), (Kind.ERROR, "code"), (Kind.ERROR, "message"))
      for bad in ("3.11\nnode 7 joined", "\x1b[2J", "\ud800")],
    (Kind.ERROR, "message", "x" * 4097), (Kind.ERROR, "code", "x" * 65),
    *[(Kind.CLUSTER, name, bad) for name in ("nodes", "workers", "largest") for bad in (-1, 2**32, "1", True, None)],
    (Kind.CLUSTER, "largest", 65536), (Kind.CLUSTER, "pythons", []), (Kind.CLUSTER, "letter_limit", 1024),
    *[(kind, "job", bad) for kind in (Kind.JOB, Kind.FLUSH, Kind.RECALL, Kind.CANCEL, Kind.END)
      for bad in (-1, 2**32, "7", 7.0, True, None, [7])],
    *[(Kind.JOB, "function", bad) for bad in ("0" * 63, "0" * 65, "g" * 64, "F" * 64, "00 " * 21 + "0", 0)],
    (Kind.JOB, "initializer", "x"), (Kind.JOB, "initializer", "z" * 64), (Kind.JOB, "context", "z" * 32),
    (Kind.JOB, "context", "0" * 31), (Kind.JOB, "resumed", 0), (Kind.JOB, "resumed", "no"), (Kind.JOB, "options", []),
    *[(Kind.JOB, "options", bad) for bad in (
        {"timeout": 0}, {"timeout": -1}, {"timeout": "1"}, {"timeout": True}, {"processes": 0}, {"processes": 1.5},
        {"maxtasksperchild": 0}, {"maxtasksperchild": 2**32}, {"seed": 1.5}, {"seed": "x"}, {"new": []}, {"new": {}},
        {"call": "two"}, {"call": 1},
    )],
    (Kind.FORGET, "function", "0" * 63), (Kind.CLOSE, "context", HEX64),
    *[(Kind.FLUSH, "upto", bad) for bad in (-1, 2**64, 1.0)],
    *[(Kind.RECALL, "number", bad) for bad in (0, 2**32)],
    *[(Kind.CLUSTER, "pythons", bad) for bad in (
        {"3.11": -1}, {"3.11": "1"}, {"3.11": None}, {"3.11": True}, {"3.11": [1]}, {"": 1}, {"x" * 65: 1},
        {"\x1b[2J": 1}, {f"3.{n}": 1 for n in range(65)},
    )],
    (Kind.STATUS, "nodes", {}), (Kind.STATUS, "jobs", 1), (Kind.STATUS, "server", []), (Kind.STATUS, "nodes", [1]),
    *[(Kind.STATUS, name, [state, state | {key: bad}])
      for name, state in (("nodes", NODE_STATE), ("jobs", JOB_STATE)) for key in state
      for bad in (None, "\x1b[2J", -1, [], {}, True, 1e300)],
    *[(Kind.STATUS, "server", SERVER_STATE | {key: bad}) for key in ("version", "uptime", "memory")
      for bad in ("\x1b[2J", -1, [], True, 1e300)],
    *[(Kind.STATUS, "server", {"uptime": 1} | bad) for bad in ({}, {"version": None}, {"version": "x" * 65})],
]


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_body_passes_and_unknown_keys_are_ignored(kind):
    body = GOOD[kind] | {"a_key_of_1.9": [1, {"deep": None}]}
    assert decode(kind, 0, json.dumps(body).encode()) == (body, [])


def test_an_answer_to_a_status_is_whole():
    """The question has no fields; a caller that was told so would look for what is not there."""
    for body in ({}, {"nodes": [], "jobs": []}, STATUS | {"server": None}):
        assert "STATUS" in refused("SC", written(Kind.STATUS, body))
        assert read(FrameReader("CS", None), [written(Kind.STATUS, body)]) == [(Kind.STATUS, body)]


NOTE = {"position": 0, "phase": "call", "node": 4, "pid": 77, "exitcode": -9, "lost": 10}


def test_a_good_note_passes():
    for note in (NOTE, NOTE | {"position": -1, "exitcode": 2**32 - 1}, {"position": 0, "phase": "node"},
                 NOTE | dict.fromkeys(("node", "pid", "exitcode", "lost")), NOTE | {"a_key_of_1.9": "x"}):
        assert read_object("a note", json.dumps(note).encode(), frames.NOTE) == note


@pytest.mark.parametrize("name", NOTE)
@pytest.mark.parametrize("bad", ["\x1b[2J", "x", "", [], {}, True, 1.5, -(2**40), 2**40])
def test_a_bad_note_is_refused(name, bad):
    with pytest.raises(ProtocolError, match="a note"):
        read_object("a note", json.dumps(NOTE | {name: bad}).encode(), frames.NOTE)


@pytest.mark.parametrize("python", ["3.11", "3.14t", "3.100", "4.0", "10.0t"])
def test_a_python_with_threads_or_without_passes(python):
    assert decode(Kind.HELLO, 0, json.dumps(ABOUT | {"python": python}).encode()) == (ABOUT | {"python": python}, [])


@pytest.mark.parametrize(
    "options",
    [{"timeout": 0.5, "processes": 1, "maxtasksperchild": 1, "seed": -(10**30)}, {"timeout": None, "new": "x"},
     {"call": "star"}, {"call": None}, {}],
)
def test_good_options_pass_and_unknown_ones_are_left_to_the_node(options):
    assert decode(Kind.JOB, 0, json.dumps(JOB | {"options": options}).encode())[0]["options"] == options


def test_a_job_is_short_since_the_server_writes_it_anew():
    body = JOB | {"options": {"new": "\N{GRINNING FACE}" * (15 << 10)}}
    envelope = json.dumps(body, ensure_ascii=False).encode()
    assert len(envelope) < frames.MAX_JOB_BYTES < len(json.dumps(body)) < frames.MAX_ENVELOPE_BYTES
    assert decode(Kind.JOB, 0, envelope)[0] == body
    refused("CS", json_frame(Kind.JOB, envelope + b" " * frames.MAX_JOB_BYTES))
    (frame,) = read(FrameReader("SN", None), [written(Kind.JOB, body)])  # what a node is sent of it is no error there
    assert frame.body == body


@pytest.mark.parametrize(("kind", "name", "bad"), BAD_FIELDS)
def test_a_bad_field_is_refused(kind, name, bad):
    body = {key: value for key, value in (GOOD[kind] | {name: bad}).items() if value is not MISSING}
    with pytest.raises(ProtocolError, match=kind.name):
        decode(kind, 0, json.dumps(body).encode())


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"{} {}", '{"reason":"x"}'.encode("utf-16"),
        b"\xef\xbb\xbf{}", b'{"a":NaN}', b'{"a":Infinity}', b'{"a":-Infinity}', b'{"a":1e999}',
        b'{"a":' * 100_000, b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_what_is_not_a_json_object_is_refused(text):
    for kind in (Kind.PING, Kind.BYE):
        refused("CS", json_frame(kind, text))


# Rows.

LETTER = st.one_of(st.binary(max_size=20), st.integers(1020, 1030).map(lambda n: bytes([n % 256]) * n))
ROWS = st.tuples(st.lists(LETTER, min_size=1, max_size=9), st.integers(0, 2**32 - 1)).map(
    lambda drawn: merge([row(n, letter, n % 3, n % 2, job=drawn[1]) for n, letter in enumerate(drawn[0])])
)


@given(ROWS, st.data())
@settings(max_examples=150, deadline=None)
def test_cut_and_merge_are_each_others_reverse(rows, data):
    at = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    pieces = [rows.cut(a, b) for a, b in zip([0, *at], [*at, len(rows)]) if a < b]
    assert plain(Kind.TASK, merge(pieces)) == plain(Kind.TASK, rows)
    for digest, parts in (letter for piece in pieces for letter in piece.letters()):
        length = sum(map(len, parts))
        assert digest == (frames.digest(parts) if length > 1024 else b"")


@given(ROWS)
@settings(max_examples=50, deadline=None)
def test_rows_survive_the_wire(rows):
    (frame,) = read(FrameReader("CS", None), [written(Kind.TASK, rows)])
    assert plain(*frame) == plain(Kind.TASK, rows)
    assert frame.body.size() == sum(rows.lengths) == rows.size()
    for n in range(len(rows)):
        assert plain(Kind.TASK, frame.body.cut(n, n + 1)) == plain(Kind.TASK, rows.cut(n, n + 1))


def test_a_letter_of_1024_bytes_is_short_and_of_1025_long():
    short, long = row(1, b"x" * 1024), row(1, b"x" * 1025)
    assert (short.shorts, short.digests, list(short.longs)) == (b"x" * 1024, b"", [])
    assert (long.shorts, long.digests, len(long.longs)) == (b"", frames.digest([b"x" * 1025]), 1)


def test_a_letter_may_be_given_in_buffers():
    parts = (b"x" * 1000, memoryview(b"y" * 1000))
    rows = Rows.single(7, 1, 0, 0, parts, frames.digest(parts))
    assert written(Kind.TASK, rows).endswith(b"x" * 1000 + b"y" * 1000)
    assert rows.lengths == (2000,)


def test_again_is_a_later_attempt_and_packed():
    rows = merge([row(1, b"a"), row(2, LONG, attempt=4), row(3, attempt=2**16 - 1)]).again()
    assert (rows.attempts, rows.statuses) == ((1, 5, 2**16 - 1), (PACKED,) * 3)
    assert [digest for digest, _ in rows.letters()] == [b"", LONG_DIGEST, b""]
    assert rows.again(0).attempts == rows.attempts


def test_renumbered_changes_job_and_pace_alone():
    rows = merge([row(1, b"a", pace=9), row(2, LONG)])
    rows.cut(0, 1)
    other = rows.renumbered(12)
    assert plain(Kind.TASK, other)[3:] == plain(Kind.TASK, rows)[3:]
    assert (other.job, other.pace, rows.job) == (12, 9, 7)
    assert rows.renumbered(12, pace=0).pace == 0


def test_merged_rows_have_the_slowest_pace():
    assert merge([row(1, pace=3), row(2, pace=8), row(3, pace=5)]).pace == 8


def test_the_log_shows_no_letter_and_no_words():
    for kind, body in [(Kind.TASK, row(1, b"secret")), (Kind.ERROR, {"code": "x", "message": "secret"}),
                       (Kind.JOB, JOB | {"options": {"note": "secret"}}), (Kind.RETURNED, Rows(7, b""))]:
        line = frames.describe(kind, body)
        assert kind.name in line and "secret" not in line and "\n" not in line
    two = merge([row(1, b"ab"), row(2, LONG)])
    assert frames.describe(Kind.TASK, two) == "TASK job 7 slices 1..2 (2 rows, 1282 bytes)"


# Numbers on the wire.


def test_every_number_on_the_wire_is_pinned():
    """A peer of another release reads these numbers: one that changes needs a new version in the handshake."""
    assert [(kind.name, kind.value) for kind in Kind] == list(zip(
        "HELLO BYE PING ERROR CLUSTER JOB FUNCTION FORGET TASK FLUSH PACKET RESULT RECALL RETURNED CANCEL END CLOSE"
        " STATUS KILL".split(), range(1, 20)))
    assert [(status.name, status.value) for status in Status] == list(zip(
        "VALUES RAISED DIED TIMEOUT ALTERED FAILED".split(), range(6)))
    assert (PACKED, MORE, frames.SHORT_LETTER_BYTES, frames.TAG_BYTES, frames.DIGEST_BYTES) == (1, 128, 1024, 32, 32)
    assert (HEAD.format, HEAD.size) == (">BBHI", 8)
    assert (frames.ADDRESS.format, frames.ADDRESS.size) == (">II", 8)
    assert (ROW.format, ROW.size) == (">QHBxI", 16)
    assert (auth.VERSION, auth.MAGIC, auth.CONTROLLER, auth.NODE) == (1, b"ACHL", b"C", b"N")


# PROTOCOL.md.


def section(number):
    return re.search(rf"^## {number}\. .*?\n(.*?)(?=^## |\Z)", PROTOCOL, re.M | re.S)[1]


def table(number, which=0):
    """A table of a section: its rows, without the heading, as lists of cells."""
    tables = re.findall(r"(?:^\|.*\n)+", section(number), re.M)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[which].splitlines()[2:]]


def test_a_role_that_the_page_does_not_name_is_malformed_and_not_refused():
    roles = [role.encode() for role in re.findall("`(.)`", dict((name, value) for name, _, value in table(2))["role"])]
    for byte in range(256):
        message = auth.claim(bytes([byte]), "ann", bytes(32)) + bytes(auth.PROOF_BYTES)
        if bytes([byte]) in roles:
            assert auth.read_claim(message).role in (auth.CONTROLLER, auth.NODE)
        else:
            with pytest.raises(ProtocolError):
                auth.read_claim(message)
    (refused,), (malformed,) = (re.findall(pattern, section(2)) for pattern in (
        r"([^.]*) get the same 32 zero bytes", r"Anything malformed is closed without an answer([^.]*)"))
    assert "role" not in refused and "role byte" in malformed


def test_the_table_of_kinds_is_the_codes():
    rows = table(5)
    assert [(int(number), name) for number, name, *_ in rows] == [(kind.value, kind.name) for kind in Kind]
    counts = {"one": (1, 1), "yes": (1, frames.MAX_ROWS), "any": (0, frames.MAX_ROWS), "no": None}
    for _, name, count, links, letters, _ in rows:
        kind = Kind[name]
        sent = frames.LINKS if links == "all links" else tuple(link.replace("→", "") for link in links.split())
        assert sorted(sent) == sorted(frames.DIRECTIONS[kind]), name
        assert counts[count] == frames.ROW_COUNTS.get(kind), name
        assert letters == ("" if kind not in frames.ROW_COUNTS else "no" if kind in frames.LETTERLESS else "yes"), name


def test_the_table_of_statuses_is_the_codes():
    assert [(int(n), name.upper()) for n, name, _ in table(4, 1)] == [(s.value, s.name) for s in Status]
    assert "bit 0, *packed*" in section(4) and "bit 7, *more*" in section(4)


def test_the_note_of_the_page_is_the_codes():
    text = dict((name, letter) for _, name, letter in table(4, 1))["died"]
    assert set(re.findall(r"`(\w+)`", text)) == {*frames.NOTE, *frames.PHASES}


def test_the_table_of_limits_is_the_codes():
    limits = dict(table(9))
    assert limits["envelope"] == f"{frames.MAX_ENVELOPE_BYTES >> 20} MiB"
    assert limits["envelope of a JOB"].startswith(f"{frames.MAX_JOB_BYTES >> 10} KiB")
    assert limits["rows of a frame"] == f"{frames.MAX_ROWS:,}"
    assert limits["short letters of a frame"] == f"{frames.MAX_SHORT_BYTES >> 20} MiB"
    assert limits["long letters of a frame"].startswith(f"{frames.MAX_LONG_BYTES >> 20} MiB together")
    assert limits["letter"].startswith(f"{frames.LETTER_LIMIT_BYTES >> 30} GiB")
    assert limits["before authentication"].startswith(f"{auth.AUTH_BYTES} bytes")
    assert f"at most {frames.SHORT_LETTER_BYTES:,} B is **short**" in section(4)
    assert f"at most {fields.TEXT_CHARS:,} characters, names and versions {fields.NAME_CHARS}" in section(6)
    assert f"`pythons`: version → nodes, at most {frames.MAX_PYTHONS}" in section(6)


def test_the_heartbeats_of_the_page_are_the_codes():
    from achilles.protocol import channel

    silence = dict(table(9))["silence"]
    assert silence.startswith(f"PING after {channel.HEARTBEAT_SECONDS:.0f} s")
    assert f"no byte for {channel.SILENCE_SECONDS:.0f} s" in silence


def test_the_table_of_fields_is_the_codes():
    documented = {}
    for kinds, text in table(6):
        pattern = r"`(reason|code|message)`()" if kinds in ("BYE", "ERROR") else r"`(\w+)`(\?)?"
        names = re.findall(pattern, text)
        for kind in kinds.split(", "):
            if kind in Kind.__members__:
                documented.setdefault(Kind[kind], {}).update({name: bool(mark) for name, mark in names})
    assert documented.keys() == FIELDS.keys()
    for kind, names in documented.items():
        assert names.keys() == FIELDS[kind].keys(), kind
    status = dict(re.findall(r"^- (?:each|the) (\w+): (.*)$", section(6), re.M))
    for name, states in (("node", frames.NODE_STATE), ("job", frames.JOB_STATE), ("server", frames.SERVER_STATE)):
        marks = {name: "" if field.required else "?" for name, field in states.items()}
        assert dict(re.findall(r"`(\w+)`(\??)", status[name])) == marks
    optional = {name for name, field in FIELDS[Kind.JOB].items() if not field.required}
    assert optional == {name for name, mark in documented[Kind.JOB].items() if mark}
    options = re.findall(r"`(\w+)`(\?)?", section(6).rpartition("`options` of a job:")[2])
    assert dict(options) == dict.fromkeys(frames.OPTIONS, "?")


def pieces_of_the_session():
    """Section 10: the title of each message and its bytes, a frame's as head, envelope, tag and letters."""
    example = re.findall(r"```\n(.*?)```", section(10), re.S)[1]
    for title, body in re.findall(r"^(\S.*)\n((?:  .*\n)+)", example, re.M):
        parts = re.split(r"^  (?:head|envelope|tag|letters) +", body, flags=re.M)
        yield title, [from_hex(part) for part in parts if part.strip()]


def from_hex(text):
    if text.startswith("{"):
        return text.strip().encode()
    return LONG if text.strip() == "00..ff x 5" else bytes.fromhex("".join(text.split()))


def test_the_session_of_section_10_is_one():
    (_, (m1,)), (_, (m2,)), (_, (m3,)), *messages = pieces_of_the_session()
    auth.read_greeting(m1)
    claimed = auth.read_claim(m2)
    assert (claimed.role, claimed.user) == (auth.CONTROLLER, b"ann")
    shown = dict(re.findall(r"^(K|key \S+) +([0-9a-f]{64})$", section(10), re.M))
    assert auth.derive_key("ann", "correct horse battery staple").hex() == shown["K"]
    keys = auth.accept_claim([bytes.fromhex(shown["K"])], m1, claimed)
    assert keys is not None and auth.is_proof(keys, m3)
    assert (keys.client_data.hex(), keys.server_data.hex()) == (shown["key client→server"], shown["key server→client"])

    readers = {"C→S": FrameReader("CS", auth.Checker(keys.client_data).check),
               "S→C": FrameReader("SC", auth.Checker(keys.server_data).check)}
    said, numbers = [], {"C→S": 0, "S→C": 0}
    for title, parts in messages:
        way, name, number = re.match(r"(C→S|S→C) (\w+) seq (\d+)", title).groups()
        (frame,) = read(readers[way], [b"".join(parts)])
        assert (frame.kind.name, numbers[way]) == (name, int(number))
        assert encode(*frame)[:2] == (parts[0], parts[1])
        numbers[way] += 1
        said.append((way, frame.kind, frame.body))

    function = b"a function"
    expected = [
        ("C→S", Kind.HELLO, ABOUT | {"cpu_count": 0, "pid": 4711}),
        ("S→C", Kind.HELLO, ABOUT | {"client_id": 0, "connections": 2}),
        ("S→C", Kind.CLUSTER, CLUSTER),
        ("C→S", Kind.FUNCTION, row(0, function, job=0)),
        ("C→S", Kind.JOB, JOB | {"job": 1, "context": "00112233445566778899aabbccddeeff",
                                 "function": frames.digest([function]).hex(), "options": {"timeout": 2.5}}),
        ("C→S", Kind.TASK, merge([row(0, b"hello", job=1), row(1, LONG, job=1)])),
        ("C→S", Kind.FLUSH, {"job": 1, "upto": 2}),
        ("S→C", Kind.PACKET, row(0, attempt=2, job=1)),
        ("S→C", Kind.RESULT, merge([row(0, b"HELLO", job=1), row(1, b"no", status=Status.RAISED, job=1)])),
        ("C→S", Kind.END, {"job": 1}),
        ("C→S", Kind.BYE, {"reason": "leaving"}),
    ]
    assert [(way, *plain(kind, body)) for way, kind, body in said] == [
        (way, *plain(kind, body)) for way, kind, body in expected
    ]
    assert all(reader.at_boundary for reader in readers.values())
