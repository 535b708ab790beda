"""A stream of frames, cut anywhere: the same frames come out, in memory that grows as bytes arrive."""

import gc
import struct
import tracemalloc
import weakref

import pytest
from wire import (
    CLIENT_HELLO,
    CLUSTER,
    FRAMES,
    IDS,
    LINKS,
    LONG,
    SERVER_HELLO,
    STATUS,
    batch,
    encode,
    good,
    job,
    pieces_of,
    plain,
    read,
    written,
)

from achilles.errors import AuthenticationError, ProtocolError
from achilles.protocol import auth, reader
from achilles.protocol.frames import HEAD, RANGE, Frame, Kind
from achilles.protocol.kinds import DIRECTIONS
from achilles.protocol.reader import FrameReader


@pytest.mark.parametrize(("link", "kind", "body", "recorded"), FRAMES, ids=IDS)
def test_recorded_frames_come_out_whole_or_byte_by_byte(link, kind, body, recorded):
    data = bytes.fromhex(recorded)
    for step in (len(data), 1):
        stream = FrameReader(link, None)
        found = read(stream, pieces_of(data, step))
        assert [plain(*frame) for frame in found] == [plain(kind, body)]
        assert isinstance(found[0], Frame)


def stream():
    """All frames of the table that a node may hear, thrice, with tags, and how they shall come out."""
    said = [(kind, body) for link, kind, body, _ in FRAMES if link == "SN"] * 3
    tagger, data = auth.Tagger(b"k"), b""
    for kind, body in said:
        head, envelope, letters = encode(kind, body)
        data += b"".join([head, envelope, tagger.tag(head + envelope), *letters])
    return data, [plain(*each) for each in said]


def test_a_stream_may_be_split_anywhere():
    data, said = stream()
    for at in range(len(data) + 1):
        node = FrameReader("SN", auth.Tagger(b"k").check)
        assert [plain(*frame) for frame in read(node, [data[:at], data[at:]])] == said


@pytest.mark.parametrize("step", [1, 7, 33, 1000, 1 << 20])
def test_a_stream_may_come_in_pieces_of_any_size(step):
    data, said = stream()
    node = FrameReader("SN", auth.Tagger(b"k").check)
    assert [plain(*frame) for frame in read(node, pieces_of(data, step))] == said


def test_a_frame_comes_out_with_its_last_byte():
    data, said = stream()
    node, whole = FrameReader("SN", auth.Tagger(b"k").check), []
    for at in range(len(data)):
        before = len(whole)
        whole += read(node, [data[at : at + 1]])
        rest = FrameReader("SN", auth.Tagger(b"k").check)
        assert len(read(rest, [data[:at]])) == before
    assert [plain(*frame) for frame in whole] == said


def test_nothing_of_an_envelope_is_looked_at_before_its_tag():
    for head in (HEAD.pack(99, 1, 1, 4), HEAD.pack(Kind.KILL, 0, 0, 4), HEAD.pack(Kind.TASK, 9, 0, 4)):
        with pytest.raises(AuthenticationError):
            read(FrameReader("CS", auth.Tagger(b"k").check), [head + b"junk" + bytes(32)])


def test_a_tag_belongs_to_head_envelope_and_place():
    head, envelope, _ = encode(Kind.END, good(Kind.END))
    tag = auth.Tagger(b"k").tag(head + envelope)
    for altered in (0, 1, 2, 3, 7, 9, len(head) + 23, len(head) + len(envelope)):
        data = bytearray(head + envelope + tag)
        data[altered] ^= 1
        with pytest.raises(AuthenticationError):
            read(FrameReader("CS", auth.Tagger(b"k").check), [bytes(data) + bytes(99)])
    with pytest.raises(AuthenticationError):
        read(FrameReader("CS", auth.Tagger(b"k").check), [2 * (head + envelope + tag)])


def test_frames_larger_than_the_buffer_come_whole_and_leave_no_large_buffer():
    batches = [batch(1024 * first, *[bytes([n % 256]) * 1024 for n in range(1024)]) for first in range(4)]
    data = b"".join(written(Kind.TASK, body) for body in batches)
    server = FrameReader("CS", None)
    found = read(server, [data[:100_000], data[100_000:]])
    assert [plain(*frame) for frame in found] == [plain(Kind.TASK, body) for body in batches]
    with server.space() as space:
        assert len(space) == reader.BUFFER_BYTES


@pytest.mark.parametrize("sizes", [
    [1025, 1026, 1027, 5, 1028], [70_000, 1, 70_000], [reader.DIRECT_BYTES, 1025], [300_000, 300_000, 1025],
    [reader.BUFFER_BYTES + 1, 2000], [9 << 20], [0, 0, 1025],
])
def test_several_long_letters_follow_their_envelope_in_order(sizes):
    body = batch(0, *[bytes([n]) * size for n, size in enumerate(sizes)])
    data = written(Kind.TASK, body) + written(Kind.TASK, batch(9, b"")) + written(Kind.TASK, batch(10, LONG))
    said = [plain(Kind.TASK, body), plain(Kind.TASK, batch(9, b"")), plain(Kind.TASK, batch(10, LONG))]
    for step in (1000, 4096, 100_000, len(data)):
        assert [plain(*frame) for frame in read(FrameReader("CS", None), pieces_of(data, step))] == said


def test_a_long_letter_is_one_writable_buffer():
    """Arrays that are views of it may be changed by the function."""
    for size in (2000, 500_000, 20 << 20):
        (frame,) = read(FrameReader("CS", None), pieces_of(written(Kind.TASK, batch(0, bytes(size))), 100_000))
        (part,) = frame.body.longs[0].parts
        assert isinstance(part, bytearray) and len(part) == size


def test_a_reader_holds_no_frame_that_it_gave():
    """An idle connection would keep its last letters."""
    data = written(Kind.TASK, batch(0, bytes(4 << 20)))
    tracemalloc.start()
    try:
        server = FrameReader("CS", None)
        assert len(read(server, pieces_of(data, 100_000))) == 1
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()


def test_an_altered_letter_passes_the_reader_and_not_its_digest():
    """The server and the node's own process need not hash it; a worker and the controller do."""
    data = bytearray(written(Kind.TASK, batch(0, b"x", LONG)))
    data[-1] ^= 1
    (frame,) = read(FrameReader("CS", None), [bytes(data)])
    assert not frame.body.longs[0].whole()


# What a reader refuses.


def json_frame(kind, text):
    return HEAD.pack(kind, 0, 0, len(text)) + text


def task_frame(*lengths, rest=b""):
    """A TASK whose letters are said to have these lengths."""
    envelope = RANGE.pack(7, 0, len(lengths), 0, 0) + struct.pack(f">{len(lengths)}Q", *lengths) + rest
    return HEAD.pack(Kind.TASK, 0, 0, len(envelope)) + envelope


def refused(link, data):
    with pytest.raises(ProtocolError) as caught:
        read(FrameReader(link, None), [data])
    return str(caught.value)


def test_a_kind_in_a_direction_that_it_has_not_is_refused():
    for kind in Kind:
        data = written(kind, good(kind))
        for link in LINKS:
            if link in DIRECTIONS[kind]:
                assert [frame.kind for frame in read(FrameReader(link, None), [data])] == [kind]
            else:
                assert kind.name in refused(link, data) and link in refused(link, data)


@pytest.mark.parametrize("number", [0, 19, 99, 255])
def test_an_unknown_kind_is_refused(number):
    for link in LINKS:
        assert f"kind {number}" in refused(link, json_frame(number, b"{}"))


@pytest.mark.parametrize("zero", [1, 256, 65535])
def test_the_reserved_bytes_of_a_head_are_zero(zero):
    for kind in (Kind.PING, Kind.END):
        head, envelope, _ = encode(kind, good(kind))
        assert "head" in refused("CS", HEAD.pack(kind, 0, zero, len(envelope)) + envelope)


@pytest.mark.parametrize("flags", [1, 128])
def test_flags_are_refused(flags):
    assert "flags" in refused("CS", HEAD.pack(Kind.PING, flags, 0, 2) + b"{}")


@pytest.mark.parametrize("length", [(4 << 20) + 1, 2**32 - 1])
def test_an_envelope_over_the_limit_is_refused_at_its_head(length):
    assert "4194304" in refused("CS", HEAD.pack(Kind.PING, 0, 0, length))


def test_a_letter_over_the_limit_is_refused_before_a_byte_of_it():
    assert str(2**40) in refused("CS", task_frame(2**40 + 1, rest=bytes(32)))
    assert read(FrameReader("CS", None), [task_frame(2**40, rest=bytes(32))]) == []


@pytest.mark.parametrize(
    "data",
    [
        HEAD.pack(Kind.PING, 0, 0, 2**32 - 1),
        HEAD.pack(Kind.PING, 0, 0, 4 << 20),
        task_frame(2**64 - 1, rest=bytes(32)),
        task_frame(2**40, rest=bytes(32)),
        task_frame(1 << 30, rest=bytes(32)),
        HEAD.pack(Kind.TASK, 0, 0, 4 << 20) + RANGE.pack(7, 0, 2**32 - 1, 0, 0),
    ],
    ids=["envelope over the limit", "envelope", "letter over the limit", "letter at the limit", "letter", "count"],
)
def test_memory_is_never_taken_from_a_length_field(data):
    tracemalloc.start()
    try:
        server = FrameReader("CS", None)
        try:
            read(server, [data, bytes(10_000)])
        except ProtocolError:
            pass
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
        server.space()
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("came", [10_000, 100_000, 1 << 20, 20 << 20])
def test_memory_for_a_letter_follows_its_bytes(came):
    """PROTOCOL.md, section 9: 256 KiB for a length alone, 8 MiB after 64 KiB, later twice the bytes that have come."""
    server = FrameReader("CS", None)
    read(server, [task_frame(1 << 40, rest=bytes(32)), *pieces_of(bytes(came), 50_000)])
    server.space().release()
    most = reader.BUFFER_BYTES if came < reader.DIRECT_BYTES else max(reader.LETTER_STEP_BYTES, 2 * came)
    taken = len(server._place.obj)
    assert came - reader.BUFFER_BYTES <= taken <= most + reader.DIRECT_BYTES
    assert len(server._buffer) == reader.BUFFER_BYTES


# Fields that belong to a link.


@pytest.mark.parametrize(("links", "body"), [(("CS", "NS"), CLIENT_HELLO), (("SC", "SN"), SERVER_HELLO)])
def test_a_hello_has_the_fields_of_its_side(links, body):
    for link in LINKS[:4]:
        data = written(Kind.HELLO, body)
        if link not in links:
            assert "HELLO" in refused(link, data)
            continue
        assert read(FrameReader(link, None), [data]) == [(Kind.HELLO, body)]
        for name in body:
            assert name in refused(link, written(Kind.HELLO, {key: body[key] for key in body if key != name}))


@pytest.mark.parametrize(("link", "name", "bad"), [
    *[(link, "cpu_count", bad) for link in ("CS", "NS") for bad in (-1, 65536, True, "8", 8.0, None)],
    *[(link, "pid", bad) for link in ("CS", "NS") for bad in (-1, 2**32, None)],
    *[(link, name, bad) for link in ("SC", "SN") for name in ("client_id", "connections")
      for bad in (-1, 2**32, "1", True, None, [1])],
])
def test_a_bad_field_of_a_hello_is_refused(link, name, bad):
    body = CLIENT_HELLO | SERVER_HELLO | {name: bad}
    assert name in refused(link, written(Kind.HELLO, body))


def test_an_answer_to_a_status_is_whole():
    """The question has no fields; a caller that was told so would look for what is not there."""
    for body in ({}, {"nodes": [], "jobs": []}, STATUS | {"server": None}):
        assert "STATUS" in refused("SC", written(Kind.STATUS, body))
        assert read(FrameReader("CS", None), [written(Kind.STATUS, body)]) == [(Kind.STATUS, body)]


def test_frames_before_a_mistake_in_one_piece_are_dropped_with_it():
    """The connection has no future: its peer is told, and what it said last is not acted upon."""
    assert "CLUSTER" in refused("CS", written(Kind.END, good(Kind.END)) + written(Kind.CLUSTER, CLUSTER))


def test_nothing_is_read_behind_a_mistake():
    """An owner that reads on, such as a node that reads a dying worker's last words, gets no frame and no memory."""
    server = FrameReader("CS", None)
    for data in (json_frame(Kind.CLUSTER, b"{}"), written(Kind.END, good(Kind.END)), bytes(1 << 20)):
        with pytest.raises(ProtocolError):
            read(server, [data])
    checked = FrameReader("CS", auth.Tagger(b"k").check)
    with pytest.raises(AuthenticationError):
        read(checked, [json_frame(Kind.PING, b"{}") + bytes(32)])
    with pytest.raises(ProtocolError):
        read(checked, [written(Kind.END, good(Kind.END))])


def test_a_job_comes_to_a_worker_as_to_the_server():
    body = job(7, function=LONG)
    for link in DIRECTIONS[Kind.JOB]:
        (frame,) = read(FrameReader(link, None), [written(Kind.JOB, body)])
        assert plain(*frame) == plain(Kind.JOB, body)
    assert frame.body.longs[0].whole()


def test_a_closed_reader_gives_its_buffer_back_at_once():
    """Without the cyclic collector, which knows nothing of the size of a buffer."""
    reader = FrameReader("CS", None)
    reader.space()[:4] = b"\x01\x00\x00\x00"
    reader.received(4)
    gone = weakref.ref(reader)
    gc.disable()
    try:
        reader.close()
        del reader
        assert gone() is None
    finally:
        gc.enable()
