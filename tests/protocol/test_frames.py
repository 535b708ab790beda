"""Frames as bytes: one table that drives encode and decode, and all that decode refuses."""

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire import (
    CHUNK_STATE,
    CLUSTER,
    DECLARATION,
    FRAMES,
    GOOD,
    HEX32,
    HEX64,
    IDS,
    JOB_STATE,
    LONG,
    LONG_DIGEST,
    LONGEST,
    NODE_STATE,
    SERVER_STATE,
    batch,
    decode,
    encode,
    good,
    job,
    letter,
    plain,
    read,
    written,
)

from achilles.errors import ProtocolError
from achilles.protocol import frames
from achilles.protocol.frames import HEAD, RANGE, TELL, Batch, Frame, Gone, Kind, LongLetter, Status
from achilles.protocol.kinds import DECLARATION as DECLARATION_FIELDS
from achilles.protocol.kinds import FIELDS, FLAGS, LETTERS, RANGE_FIELDS, RANGES, SERVER_FIELDS, read_object
from achilles.protocol.reader import FrameReader

U32, U64 = 2**32 - 1, 2**64 - 1


@pytest.mark.parametrize(("link", "kind", "body", "recorded"), FRAMES, ids=IDS)
def test_the_table_drives_encode_and_decode(link, kind, body, recorded):
    assert written(kind, body).hex() == recorded
    head, envelope, letters = encode(kind, body)
    number, flags, zero, length = HEAD.unpack(head)
    assert (number, zero, length) == (kind, 0, len(envelope))
    again, lengths = decode(kind, flags, envelope)
    assert lengths == [len(each) for each in letters]
    if isinstance(again, Batch):
        again.longs = body.longs
    assert plain(kind, again) == plain(kind, body)


# Ranges.


def envelope_of(kind, first=None, count=None, attempt=None, number=None, rest=None):
    """The envelope of a good frame of this kind, with another range, or with other bytes behind the range."""
    whole = encode(kind, good(kind))[1]
    fields = list(RANGE.unpack_from(whole))
    for index, value in enumerate((first, count, attempt, number), 1):
        fields[index] = fields[index] if value is None else value
    return RANGE.pack(*fields) + (whole[RANGE.size :] if rest is None else rest)


@pytest.mark.parametrize("kind", RANGES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("field", RANGE_FIELDS)
def test_a_field_of_a_range_is_between_its_limits(kind, field):
    low, high = dict(zip(RANGE_FIELDS, RANGES[kind]))[field]
    most = U64 if field == "first" else U32
    bad = [value for value in (low - 1, high + 1, most) if 0 <= value <= most and not low <= value <= high]
    for value in bad:
        with pytest.raises(ProtocolError, match=f"{kind.name} with {field} {value};"):
            decode(kind, 0, envelope_of(kind, **{field: value}))
    if kind not in LETTERS:
        for value in (low, high - 1 if field == "first" and high else high):
            assert getattr(decode(kind, 0, envelope_of(kind, **{field: value}))[0], field) == value


@pytest.mark.parametrize("kind", [kind for kind, limits in RANGES.items() if limits[0][1]], ids=lambda kind: kind.name)
def test_no_chunk_has_a_number_beyond_64_bits(kind):
    last, _ = decode(kind, 0, envelope_of(kind, first=U64))
    assert (last.first, last.count, last.end) == (U64, 1, 2**64)
    if kind not in LETTERS:
        decode(kind, 0, envelope_of(kind, first=U64 - 1, count=2))
        with pytest.raises(ProtocolError, match="beyond"):
            decode(kind, 0, envelope_of(kind, first=U64, count=2))


@pytest.mark.parametrize("kind", RANGES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("cut", [0, 1, 4, RANGE.size - 1])
def test_an_envelope_too_short_for_its_range_is_refused(kind, cut):
    with pytest.raises(ProtocolError, match=kind.name):
        decode(kind, 0, envelope_of(kind)[:cut])


@pytest.mark.parametrize("kind", sorted(RANGES.keys() - LETTERS), ids=lambda kind: kind.name)
@pytest.mark.parametrize("rest", [b"x", bytes(8), bytes(9)])
def test_a_bare_range_has_nothing_behind_it(kind, rest):
    with pytest.raises(ProtocolError, match=kind.name):
        decode(kind, 0, envelope_of(kind, rest=rest))


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_flags_that_a_kind_has_not_are_refused(kind):
    envelope = encode(kind, good(kind))[1]
    for flags in range(256):
        if flags in FLAGS.get(kind, (0,)):
            body, _ = decode(kind, flags, envelope)
            assert not isinstance(body, Batch) or body.flags == flags
        else:
            with pytest.raises(ProtocolError, match=f"{kind.name} with flags {flags}"):
                decode(kind, flags, envelope)


# Letters.

TABLE_1025, TABLE_8M = struct.pack(">Q", 1025), struct.pack(">Q", 8 << 20)
BAD_LETTERS = [
    ("no table", Kind.TASK, 1, b""),
    ("half a table", Kind.TASK, 2, struct.pack(">Q", 0)),
    ("more lengths than the count", Kind.TASK, 1, struct.pack(">QQ", 0, 0)),
    ("more chunks than the envelope", Kind.TASK, 65536, bytes(8)),
    ("a letter too short", Kind.TASK, 1, struct.pack(">Q", 5) + b"hell"),
    ("a letter too long", Kind.TASK, 1, struct.pack(">Q", 5) + b"hello!"),
    ("a digest too short", Kind.TASK, 1, TABLE_1025 + bytes(31)),
    ("a digest too long", Kind.TASK, 1, TABLE_1025 + bytes(33)),
    ("no digest", Kind.TASK, 1, TABLE_1025),
    ("long letters over 8 MiB together", Kind.TASK, 2, TABLE_8M + TABLE_1025 + bytes(64)),
    ("long results over 8 MiB together", Kind.RESULT, 2, b"\0\0" + TABLE_8M + TABLE_1025 + bytes(64)),
    ("short letters over 1 MiB together", Kind.TASK, 1025, struct.pack(">1025Q", *[1024] * 1025) + bytes(1025 << 10)),
    ("a letter over the limit", Kind.TASK, 1, struct.pack(">Q", 2**40 + 1) + bytes(32)),
    ("letters of 2^64-1 bytes", Kind.TASK, 2, struct.pack(">QQ", U64, U64) + bytes(64)),
    ("a long line", Kind.OUTPUT, 1, TABLE_1025 + bytes(32)),
    ("no status", Kind.RESULT, 1, struct.pack(">Q", 0)),
    ("a status that is not known", Kind.RESULT, 1, b"\6" + bytes(8)),
    ("a status that is not known among others", Kind.RESULT, 3, b"\0\xff\1" + bytes(24)),
    ("a status in a TASK", Kind.TASK, 1, b"\0" + bytes(8)),
    ("a declaration that is long", Kind.JOB, 2, TABLE_1025 + bytes(8) + bytes(32)),
    ("a declaration that is long, before JSON", Kind.JOB, 2,
     struct.pack(">QQ", 1025, 74) + bytes(32) + b'{"context":"%b","initializer":true}' % (b"0f" * 16) + b" " * 9),
    ("a declaration that is empty", Kind.JOB, 2, bytes(16)),
    ("a declaration that is no JSON", Kind.JOB, 2, struct.pack(">QQ", 1, 0) + b"{"),
]


@pytest.mark.parametrize("bad", BAD_LETTERS, ids=[bad[0] for bad in BAD_LETTERS])
def test_letters_that_break_the_rules_are_refused(bad):
    _, kind, count, rest = bad
    with pytest.raises(ProtocolError, match=r"TASK|RESULT|JOB|OUTPUT|letter of"):
        decode(kind, 0, envelope_of(kind, count=count, rest=rest))


def test_a_batch_is_as_large_as_its_limits():
    full = Batch.pack(7, 0, [b""] * 65536)
    assert decode(Kind.TASK, 0, encode(Kind.TASK, full)[1])[0].count == 65536
    answer = Batch.pack(7, 0, [b"x" * 16] * 65536, statuses=bytes(65536))
    envelope = encode(Kind.RESULT, answer)[1]
    assert len(envelope) < frames.MAX_ENVELOPE_BYTES
    assert sum(decode(Kind.RESULT, 0, envelope)[0].lengths) == frames.MAX_SHORT_BYTES
    two = struct.pack(">QQ", (8 << 20) - 1025, 1025) + bytes(64)
    assert decode(Kind.TASK, 0, envelope_of(Kind.TASK, count=2, rest=two))[1] == [(8 << 20) - 1025, 1025]
    one = struct.pack(">Q", 2**40) + bytes(32)
    assert decode(Kind.TASK, 0, envelope_of(Kind.TASK, rest=one))[1] == [2**40]


def test_the_letters_of_a_job_may_have_any_size():
    body = json.dumps(DECLARATION | {"initializer": True}).encode()
    rest = struct.pack(">QQQ", len(body), 2**40, 2**40) + bytes(64) + body
    assert decode(Kind.JOB, 0, envelope_of(Kind.JOB, count=3, rest=rest))[1] == [2**40, 2**40]


LETTER = st.one_of(st.binary(max_size=20), st.integers(1020, 1030).map(lambda n: bytes([n % 256]) * n))


@given(st.lists(LETTER, min_size=1, max_size=9), st.integers(0, U32), st.integers(0, U64 - 9), st.integers(0, U32))
@settings(max_examples=150, deadline=None)
def test_batches_survive_the_wire(letters, number, first, attempt):
    body = batch(first, *letters, job=number, attempt=attempt)
    assert [bytes(frames.joined(each)) for each in body.letters()] == letters
    (frame,) = read(FrameReader("CS", None), [written(Kind.TASK, body)])
    assert plain(*frame) == plain(Kind.TASK, body)
    assert sum(frame.body.lengths) == sum(map(len, letters)) == sum(body.lengths)
    assert frame.body.lengths == tuple(map(len, letters))
    assert frame.body.end == first + len(letters)


def test_a_letter_of_1024_bytes_is_short_and_of_1025_long():
    short, long = batch(1, b"x" * 1024), batch(1, b"x" * 1025)
    assert (short.packed[8:], list(short.longs)) == (b"x" * 1024, [])
    assert (long.packed[8:], len(long.longs)) == (frames.digest([b"x" * 1025]), 1)


@pytest.mark.parametrize("wrong", [b"x" * 1025, LongLetter((b"x",), frames.digest([b"x"]), 1)])
@pytest.mark.parametrize("others", [[], [b"x"], [letter(LONG)]])
def test_a_letter_in_the_wrong_form_fails_where_it_is_packed(wrong, others):
    with pytest.raises((AttributeError, TypeError)):
        Batch.pack(7, 0, [*others, wrong])


def test_a_letter_may_be_given_in_buffers():
    parts = (b"x" * 1000, memoryview(b"y" * 1000))
    body = Batch.pack(7, 1, [letter(*parts)])
    assert written(Kind.TASK, body).endswith(b"x" * 1000 + b"y" * 1000)
    assert body.lengths == (2000,) and body.longs[0].whole()
    assert frames.joined(body.longs[0]) == b"x" * 1000 + b"y" * 1000


def test_an_altered_letter_does_not_match_its_digest():
    assert letter(LONG).whole() and letter(LONG).digest == LONG_DIGEST
    assert not LongLetter((LONG[:-1] + b"x",), LONG_DIGEST, len(LONG)).whole()


def test_renumbered_changes_the_job_alone():
    body = batch(1, b"a", LONG, attempt=9, number=4, flags=TELL)
    other = body.renumbered(12)
    assert (body.job, other.job) == (7, 12)
    assert plain(Kind.TASK, other)[2:] == plain(Kind.TASK, body)[2:]
    assert job().renumbered(12).declaration == DECLARATION


# A JOB.


@pytest.mark.parametrize(("declaration", "initializer", "count"), [
    (DECLARATION, None, 2), (DECLARATION | {"initializer": True}, None, 2),
    (DECLARATION | {"initializer": True}, b"i", 3), (DECLARATION | {"initializer": True}, LONG, 3),
])
def test_an_initializer_comes_where_it_is_declared(declaration, initializer, count):
    """It may be missing: the receiver has had it in this context."""
    (frame,) = read(FrameReader("CS", None), [written(Kind.JOB, job(7, declaration, LONG, initializer))])
    assert (frame.body.count, frame.body.declaration) == (count, declaration)
    letters = [bytes(frames.joined(each)) for each in frame.body.letters()]
    assert letters[1:] == [LONG, initializer][: count - 1]


def test_an_initializer_that_is_not_declared_is_refused():
    with pytest.raises(ProtocolError, match="initializer"):
        decode(Kind.JOB, 0, encode(Kind.JOB, job(7, DECLARATION, b"f", b"i"))[1])


OPTIONS = [
    {"timeout": 0.5, "maxtasksperchild": 1, "seed": HEX64}, {"timeout": None, "new": "x"}, {"timeout": 3},
    {"call": "one"}, {"call": "star"}, {"call": "apply"}, {"call": None}, {"new": [{"deep": None}]}, {},
]


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_good_options_pass_and_unknown_ones_are_left_to_the_node(options):
    declared = DECLARATION | options
    assert decode(Kind.JOB, 0, encode(Kind.JOB, job(7, declared))[1])[0].declaration == declared


BAD_DECLARATIONS = [
    *[{"context": bad} for bad in (None, "z" * 32, "0" * 31, "0" * 33, "F" * 32, 0)],
    *[{"initializer": bad} for bad in (None, 0, 1, "yes", [])],
    *[{"timeout": bad} for bad in (0, -1, "1", True, 2**33, [])],
    *[{"maxtasksperchild": bad} for bad in (0, 2**32, 1.5, True, "1")],
    *[{"seed": bad} for bad in (1, 1.5, "x", "0" * 63, "0" * 65, "F" * 64, "00 " * 21 + "0")],
    *[{"call": bad} for bad in ("two", 1, "", "one ", "One", ["one"])],
    {"new": "\x1b[2J"}, {"\n": 1}, {"new": [{"deep": "\u202e"}]},
]


@pytest.mark.parametrize("bad", BAD_DECLARATIONS, ids=lambda bad: repr(bad)[:40])
def test_a_bad_declaration_is_refused(bad):
    with pytest.raises(ProtocolError, match="JOB"):
        decode(Kind.JOB, 0, encode(Kind.JOB, job(7, DECLARATION | bad))[1])


@pytest.mark.parametrize("name", [name for name, field in DECLARATION_FIELDS.items() if field.required])
def test_a_declaration_has_what_it_must_have(name):
    declared = {key: value for key, value in DECLARATION.items() if key != name}
    with pytest.raises(ProtocolError, match=name):
        decode(Kind.JOB, 0, encode(Kind.JOB, job(7, declared))[1])


# JSON.

MISSING = object()
BAD_FIELDS = [
    *[(kind, name, MISSING) for kinds in (FIELDS, SERVER_FIELDS) for kind, fields in kinds.items()
      for name, field in fields.items() if field.required],
    *[(Kind.HELLO, "python", bad) for bad in (
        3.11, "", "x" * 65, None, ["3.11"], "3", "3.", ".14", "3.14.1", "3.14T", "3.14tt", "t", "3.14 t", "-3.14",
        "3.14\n", "\u0663.\u0661\u0664", "1" * 62 + ".1t")],
    *[(Kind.BYE, "reason", bad) for bad in (1, "", "bored", "leaving ", "Leaving", None, ["leaving"])],
    *[(kind, name, bad) for kind, name in (
        (Kind.HELLO, "python"), (Kind.HELLO, "version"), (Kind.ERROR, "code"), (Kind.ERROR, "message"))
      for bad in ("3.11\nnode 7 joined", "\x1b[2J", "\ud800")],
    (Kind.ERROR, "message", "x" * 4097), (Kind.ERROR, "code", "x" * 65),
    *[(Kind.CLUSTER, name, bad) for name in ("nodes", "workers", "largest") for bad in (-1, 2**32, "1", True, None)],
    (Kind.CLUSTER, "largest", 65536), (Kind.CLUSTER, "pythons", []),
    *[(Kind.CLUSTER, "pythons", bad) for bad in (
        {"3.11": -1}, {"3.11": "1"}, {"3.11": None}, {"3.11": True}, {"3.11": [1]}, {"": 1}, {"x" * 65: 1},
        {"\x1b[2J": 1}, {f"3.{n}": 1 for n in range(65)},
    )],
    *[(Kind.CLOSE, "context", bad) for bad in (HEX64, "z" * 32, HEX32.upper(), None, 0)],
    (Kind.STATUS, "nodes", {}), (Kind.STATUS, "jobs", 1), (Kind.STATUS, "server", []), (Kind.STATUS, "nodes", [1]),
    *[(Kind.STATUS, name, [state, state | {key: bad}])
      for name, state in (("nodes", NODE_STATE), ("jobs", JOB_STATE)) for key in state
      for bad in (None, "\x1b[2J", -1, [], {}, True, 1e300)],
    *[(Kind.STATUS, "jobs", [JOB_STATE, JOB_STATE | LONGEST | {key: bad}]) for key in LONGEST
      for bad in ("12", "\x1b[2J", -1, [], {}, True, 1e300)],
    *[(Kind.PING, "chunks", bad) for bad in (1, {}, "", True, [1], [None], [{}], [CHUNK_STATE] * 65_536)],
    *[(Kind.PING, "chunks", [CHUNK_STATE, CHUNK_STATE | {key: bad}]) for key in CHUNK_STATE
      for bad in (None, "12", "\x1b[2J", -1, [], {}, True, 2**32, 1e300)],
    *[(Kind.STATUS, "server", SERVER_STATE | {key: bad}) for key in ("version", "uptime", "memory")
      for bad in ("\x1b[2J", -1, [], True, 1e300)],
    *[(Kind.STATUS, "server", {"uptime": 1} | bad) for bad in ({}, {"version": None}, {"version": "x" * 65})],
]


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.name)
def test_a_good_body_passes_and_unknown_keys_are_ignored(kind):
    body = GOOD[kind] | {"a_key_of_1.9": [1, {"deep": None}]}
    assert decode(kind, 0, json.dumps(body).encode()) == (body, [])


@pytest.mark.parametrize("body", [
    (Kind.PING, {"chunks": []}), (Kind.PING, {"chunks": None}),
    (Kind.PING, {"chunks": [CHUNK_STATE | {"seconds": 2**32 - 1}, {"job": 0, "seconds": 0, "pid": 2**32 - 1}]}),
    (Kind.STATUS, GOOD[Kind.STATUS] | {"jobs": [JOB_STATE | LONGEST, JOB_STATE | dict.fromkeys(LONGEST)]}),
], ids=repr)
def test_what_may_be_absent_passes_where_it_is_there(body):
    kind, said = body
    assert decode(kind, 0, json.dumps(said).encode()) == (said, [])


@pytest.mark.parametrize(("kind", "name", "bad"), BAD_FIELDS)
def test_a_bad_field_is_refused(kind, name, bad):
    body = {key: value for key, value in (GOOD[kind] | {name: bad}).items() if value is not MISSING}
    with pytest.raises(ProtocolError, match=kind.name):
        decode(kind, 0, json.dumps(body).encode())


@pytest.mark.parametrize("python", ["3.11", "3.14t", "3.100", "4.0", "10.0t"])
def test_a_python_with_threads_or_without_passes(python):
    body = GOOD[Kind.HELLO] | {"python": python}
    assert decode(Kind.HELLO, 0, json.dumps(body).encode()) == (body, [])
    body = CLUSTER | {"pythons": {python: 2**32 - 1}}
    assert decode(Kind.CLUSTER, 0, json.dumps(body).encode()) == (body, [])


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
        with pytest.raises(ProtocolError, match=kind.name):
            decode(kind, 0, text)
    with pytest.raises(ProtocolError, match="JOB"):
        decode(Kind.JOB, 0, encode(Kind.JOB, batch(0, text[:1024], b"f"))[1])


NOTE = {"offset": 0, "phase": "call", "node": 4, "pid": 77, "exitcode": -9}


def test_a_good_note_passes():
    for note in (NOTE, NOTE | {"offset": -1, "exitcode": 2**32 - 1}, {"offset": 0, "phase": "dump"},
                 NOTE | dict.fromkeys(("node", "pid", "exitcode")), NOTE | {"a_key_of_1.9": "x"}):
        assert read_object("a note", json.dumps(note).encode(), frames.NOTE) == note


@pytest.mark.parametrize("name", NOTE)
@pytest.mark.parametrize("bad", ["\x1b[2J", "x", "", [], {}, True, 1.5, -(2**40), 2**40])
def test_a_bad_note_is_refused(name, bad):
    with pytest.raises(ProtocolError, match="a note"):
        read_object("a note", json.dumps(NOTE | {name: bad}).encode(), frames.NOTE)


# The log.


def test_the_log_shows_no_letter_and_no_words():
    for kind, body in [(Kind.TASK, batch(1, b"secret")), (Kind.ERROR, {"code": "x", "message": "secret"}),
                       (Kind.JOB, job(7, DECLARATION | {"note": "secret"}, b"secret")),
                       (Kind.RESULT, batch(1, b"secret" * 500, statuses=b"\0"))]:
        line = str(Frame(kind, body))
        assert kind.name in line and "secret" not in line and "\n" not in line


@pytest.mark.parametrize(("kind", "body", "line"), [
    (Kind.TASK, batch(1, b"ab", LONG, attempt=3), "TASK job 7 chunks 1 to 2 attempt 3 number 0, 1282 bytes"),
    (Kind.RESULT, batch(1, b"ab", number=9, statuses=bytes([Status.DIED])),
     "RESULT job 7 chunk 1 attempt 0 number 9, 2 bytes"),
    (Kind.GONE, Batch(7, 5, 2, 1, 0, Gone.LOST), "GONE job 7 chunks 5 to 6 attempt 1 number 0"),
    (Kind.END, Batch(7), "END job 7"),
    (Kind.JOB, job(), "JOB job 7, 67 bytes"),
    (Kind.BYE, {"reason": "killed"}, "BYE reason killed"),
    (Kind.HELLO, {"reason": 5}, "HELLO reason 5"),  # a key that is unknown there, of any type
    (Kind.CLOSE, {"context": HEX32}, f"CLOSE context {HEX32[:16]}"),
    (Kind.PING, {}, "PING"),
], ids=lambda value: getattr(value, "name", ""))
def test_a_frame_has_a_line_in_the_log(kind, body, line):
    assert str(Frame(kind, body)) == line
