"""An authenticated connection over socket pairs: the order of frames, heartbeats, and its end.

Nothing here sleeps: a test waits for an event or for a thread's end, and constants of seconds are made small.
"""

import contextlib
import logging
import os
import threading
import time
import tracemalloc

import pytest
from links import CAN_ENCRYPT, SECONDS, closing_fixture, in_thread, linked, read_all  # noqa: F401
from wire import DECLARATION, batch, job

from achilles.errors import ProtocolError, ServerUnreachable
from achilles.protocol import channel, frames
from achilles.protocol.frames import Batch, Frame, Kind


@pytest.fixture(params=["in the clear", "encrypted"])
def encrypt(request):
    """Whether both ends encrypt: a Channel keeps its promises in either mode."""
    if request.param == "encrypted" and not CAN_ENCRYPT:
        pytest.skip("this Python cannot encrypt")
    return request.param == "encrypted"


@pytest.fixture
def pair(closing, encrypt):
    """A controller's and a server's end of one connection, with a writer thread each."""
    ends = linked(closing, encrypt=encrypt)
    for end in ends:
        end.start_writer()
    return ends


@pytest.fixture
def ends(closing, encrypt):
    """The same without writer threads."""
    return linked(closing, encrypt=encrypt)


def drain(link, peer):
    """Write all that waits at `link`, and read it at `peer`."""
    link.socket.setblocking(False)
    peer.socket.setblocking(False)
    found = []
    while link.wants_write:
        link.flush()
        while new := peer.receive():
            found += new
    return found


# The outbox.


def test_only_what_is_said_ahead_goes_first(ends):
    link, peer = ends
    for kind, body in [(Kind.JOB, job(1)), (Kind.TASK, batch(0, b"", job=1)), (Kind.CANCEL, Batch(1, 0, 1))]:
        link.send(kind, body)
    link.send(Kind.PING, {}, ahead=True)
    link.send(Kind.END, Batch(1))
    assert [kind for kind, _ in drain(link, peer)] == [Kind.PING, Kind.JOB, Kind.TASK, Kind.CANCEL, Kind.END]


def test_each_batch_is_one_frame(ends):
    link, peer = ends
    said = [batch(10 * n, *[bytes(n)] * 10, attempt=n) for n in range(300)]
    for body in said:
        link.send(Kind.TASK, body)
    heard = drain(link, peer)
    assert [(body.first, body.count, body.attempt) for _, body in heard] == [(10 * n, 10, n) for n in range(300)]


def test_a_frame_that_cannot_be_encoded_fails_in_its_caller_and_leaves_the_connection_whole(ends):
    link, peer = ends
    for kind, body in [(Kind.END, Batch(2**32)), (Kind.ERROR, {"code": "x", "message": b"x"}),
                       (Kind.CANCEL, Batch(1, -1, 1))]:
        with pytest.raises(Exception, match=r"argument|format|serializable|convert"):
            link.send(kind, body)
    link.send(Kind.PING, {})
    assert drain(link, peer) == [Frame(Kind.PING, {})]


@pytest.mark.parametrize(("cancelled", "left"), [
    ((1,), []), ((1, 0), []), ((1, 0, 30), []), ((1, 10, 20), [0, 20]), ((1, 5, 20), [0, 20]), ((1, 5, 25), [0, 20]),
    ((1, 0, 29), [20]), ((1, 10), [0]), ((1, 11), [0, 10]), ((1, 30), [0, 10, 20]), ((3,), [0, 10, 20]),
])
def test_unwritten_tasks_wholly_in_a_cancelled_range_are_dropped_and_nothing_else(ends, cancelled, left):
    link, peer = ends
    link.send(Kind.JOB, job(1))
    for first in (0, 10, 20):
        link.send(Kind.TASK, batch(first, *[b""] * 10, job=1))
        link.send(Kind.TASK, batch(first, *[b""] * 10, job=2))
    link.send(Kind.END, Batch(2))
    link.drop_tasks(*cancelled)
    link.send(Kind.TASK, batch(30, b"", job=1))
    heard = drain(link, peer)
    tasks = [(body.job, body.first) for kind, body in heard if kind is Kind.TASK]
    assert [first for number, first in tasks if number == 1] == [*left, 30]
    assert [first for number, first in tasks if number == 2] == [0, 10, 20]
    assert [kind for kind, _ in heard if kind is not Kind.TASK] == [Kind.JOB, Kind.END]


def test_a_frame_in_writing_is_never_broken_off(ends):
    link, peer = ends
    link.socket.setblocking(False)
    peer.socket.setblocking(False)
    link.send(Kind.TASK, batch(0, bytes(4 << 20), job=1))
    assert not link.flush() and link.wants_write
    link.drop_tasks(1)
    link.send(Kind.PING, {}, ahead=True)
    assert [kind for kind, _ in drain(link, peer)] == [Kind.TASK, Kind.PING]


def test_after_finish_all_is_written_then_nothing_more(pair):
    link, peer = pair
    link.send(Kind.TASK, batch(0, b""))
    link.finish("leaving")
    link.send(Kind.TASK, batch(1, b""))
    link.send(Kind.PING, {}, ahead=True)
    link.finish("leaving")
    found, why = read_all(peer)
    assert [kind for kind, _ in found] == [Kind.TASK, Kind.BYE] and found[1].body == {"reason": "leaving"}
    assert why == "end of file"
    link.wait_written(SECONDS)
    assert not link.wants_write


def test_what_is_queued_while_the_writer_looks_is_written_although_the_end_comes_at_once(ends, monkeypatch):
    link, peer = ends

    def look():
        yield from ()  # nothing waits now
        link.send(Kind.PING, {})
        link.finish()

    with monkeypatch.context() as patch:
        patch.setattr(link, "_next_pieces", look)
        assert not link.flush()
    assert drain(link, peer) == [Frame(Kind.PING, {})]


def test_one_that_finished_still_reads(pair):
    link, peer = pair
    link.finish("leaving")
    peer.send(Kind.PING, {})
    peer.finish()
    assert read_all(link) == ([Frame(Kind.PING, {})], "end of file")
    assert read_all(peer)[1] == "end of file"


def test_what_was_said_before_the_end_is_read_although_writing_fails(ends):
    link, peer = ends
    peer.send(Kind.ERROR, {"code": "protocol", "message": "job 9"})
    peer.flush()
    peer.close()
    link.send(Kind.PING, {})
    link.start_writer()
    link.wait_written(SECONDS)
    assert read_all(link)[0] == [Frame(Kind.ERROR, {"code": "protocol", "message": "job 9"})]


def test_abort_ends_both_sides(closing, pair):
    link, peer = pair
    waits = in_thread(closing, read_all, peer)
    ours = in_thread(closing, read_all, link)
    link.abort()
    link.abort()
    assert waits()[0] == [] and ours()[1] in ("closed", "end of file")
    link.send(Kind.PING, {})
    assert not link.wants_write


# Heartbeats and silence.


def test_a_quiet_channel_sends_heartbeats(ends, monkeypatch):
    monkeypatch.setattr(channel, "HEARTBEAT_SECONDS", 0.01)
    link, peer = ends
    link.start_writer()
    heard = []
    while len(heard) < 3:
        heard += peer.receive()
    assert heard[:3] == [Frame(Kind.PING, {})] * 3


def test_a_silent_peer_is_gone(ends, monkeypatch):
    monkeypatch.setattr(channel, "SILENCE_SECONDS", 0.05)
    link, _ = ends
    link.socket.settimeout(0.01)
    assert "no byte came" in read_all(link)[1]


@pytest.mark.parametrize("altered", [False, True])
def test_heartbeats_in_a_frame_that_never_ends_are_silence(ends, altered):
    """A head whose length was altered on the way waits for what never comes; an idle peer's heartbeats are no such."""
    link, peer = ends
    peer.send(Kind.PING, {})
    data = bytearray(b"".join(peer._next_pieces()))
    data[5] ^= 0x10 * altered  # of the length, four bytes from the fourth on: a mebibyte more
    peer.socket.sendall(data)
    assert link.receive() == ([] if altered else [Frame(Kind.PING, {})])
    link.last_heard = before = time.monotonic() - channel.SILENCE_SECONDS / 2
    for _ in range(4):
        peer.send(Kind.PING, {})
        assert peer.flush()
        link.receive()
    assert (link.last_heard == before) is altered
    peer.socket.sendall(bytes(channel.TRICKLE_BYTES))  # whoever still writes is alive, however slow the way
    if altered:
        link.receive()
        assert link.last_heard > before


def test_the_heartbeats_of_a_silence_are_a_trickle():
    """So many fit in it, written by a peer that has nothing else to say."""
    heartbeat = len(frames.encode(Kind.PING, {})[0]) + frames.TAG_BYTES
    assert heartbeat * channel.SILENCE_SECONDS / channel.HEARTBEAT_SECONDS < channel.TRICKLE_BYTES


def test_a_peer_that_drips_is_silent(closing, ends, monkeypatch):
    """Bytes come all the time, in the middle of a frame that never ends."""
    monkeypatch.setattr(channel, "SILENCE_SECONDS", 0.2)
    ours, theirs = ends
    theirs.socket.sendall(frames.HEAD.pack(Kind.CLUSTER, 0, 0, 4096))
    over = threading.Event()

    def drip():
        with contextlib.suppress(OSError):
            while not over.wait(0.01):
                theirs.socket.sendall(b"x")

    wait = in_thread(closing, drip)
    assert "no byte came" in ours.run(lambda frame: None)
    over.set()
    wait()


def test_a_worker_may_be_silent(closing, monkeypatch):
    monkeypatch.setattr(channel, "SILENCE_SECONDS", 0.0)
    link, _ = linked(closing, ("WN", "NW"), None)
    link.socket.setblocking(False)
    assert link.receive() == []


def test_a_loop_ticks(ends):
    link, peer = ends
    link.tick()
    assert not link.wants_write
    link.last_written -= channel.HEARTBEAT_SECONDS + 1
    link.tick()
    link.tick()
    assert drain(link, peer) == [Frame(Kind.PING, {})]
    link.tick()
    assert not link.wants_write
    link.last_heard -= channel.SILENCE_SECONDS + 1
    with pytest.raises(ServerUnreachable):
        link.tick()


# What a peer gets wrong.


def test_a_wrong_tag_closes_without_an_answer(ends):
    link, peer = ends
    link.start_writer()
    envelope = b'{"reason":"killed"}'
    peer.socket.sendall(frames.HEAD.pack(Kind.BYE, 0, 0, len(envelope)) + envelope + bytes(32))
    found, why = read_all(link)
    assert found == [] and "wrong tag" in why
    assert peer.socket.recv_into(memoryview(bytearray(1))) == 0


@pytest.mark.parametrize("by", ["reader", "handler"])
def test_what_was_wrong_is_told(pair, by):
    link, peer = pair
    found = []

    def handle(frame):
        found.append(frame)
        raise ProtocolError("job 3 was not declared")

    if by == "reader":
        link.send(Kind.CLUSTER, {})
    else:
        link.send(Kind.END, Batch(3))
    why = str(peer.run(handle))
    (error,), end = read_all(link)
    assert error.kind is Kind.ERROR and error.body == {"code": "protocol", "message": why}
    assert ("CLUSTER" if by == "reader" else "job 3") in why
    assert (end, len(found)) == ("end of file", by == "handler")


def test_a_long_complaint_is_cut_to_what_may_be_said(pair):
    link, peer = pair
    peer.complain(ProtocolError("x" * 10_000))
    ((_, body),), _ = read_all(link)
    assert body["message"] == "x" * frames.TEXT_CHARS


def test_the_answers_to_frames_that_came_together_are_pushed_together(pair):
    link, peer = pair
    for number in range(3):
        link.send(Kind.CANCEL, Batch(number, 0, 1), wake=False)
    link.finish()
    calls = []
    assert peer.run(lambda frame: calls.append(frame.body.job), lambda: calls.append("done")) == "end of file"
    assert calls == [0, 1, 2, "done"]


# Without threads.


def test_a_loop_writes_what_the_socket_takes(closing):
    link, peer = linked(closing, ("WN", "NW"), None)
    link.socket.setblocking(False)
    peer.socket.setblocking(False)
    assert link.receive() == [] and peer.receive() == []
    data = os.urandom(4 << 20)
    link.send(Kind.TASK, batch(0, data))
    assert link.wants_write and not link.flush()
    found = []
    while not found:
        link.flush()
        found += peer.receive()
    assert not link.wants_write and link.flush()
    assert frames.joined(found[0].body.longs[0]) == data and found[0].body.longs[0].whole()
    link.finish()
    assert link.flush() and peer.receive() is None


def test_a_connection_that_has_written_all_holds_none_of_it(ends):
    link, peer = ends
    for body in [batch(0, *[bytes(1000)] * 500), batch(0, os.urandom(1 << 20))]:
        link.send(Kind.TASK, body)
        tracemalloc.start()
        found = drain(link, peer)
        while not found:
            found = peer.receive()
        del found
        _, most = tracemalloc.get_traced_memory()
        now = sum(trace.size for trace in tracemalloc.take_snapshot().traces if trace.size > 10_000)
        tracemalloc.stop()
        assert most > 200_000 and now < 20_000


def test_twenty_mebibytes_both_ways_at_once(closing, pair):
    link, peer = pair
    letters = [os.urandom(5 << 20) for _ in range(4)]
    for n, data in enumerate(letters):
        link.send(Kind.TASK, batch(n, data))
        peer.send(Kind.RESULT, batch(n, data, statuses=b"\0"))

    def read_letters(end):
        heard = []

        def keep(frame):
            heard.extend(map(frames.joined, frame.body.longs))
            if len(heard) == len(letters):
                end.finish()

        return end.run(keep), heard

    theirs = in_thread(closing, read_letters, peer)
    assert read_letters(link) == theirs() == ("end of file", letters)


# Pushing.


@pytest.mark.skipif(os.name != "posix", reason="there nobody pushes")
def test_who_pushes_writes_what_is_queued_in_one_go_without_a_writer(ends):
    ours, theirs = ends
    ours.send(Kind.END, Batch(1), wake=False)
    ours.send(Kind.END, Batch(2), wake=False)
    ours.push()
    assert not ours.wants_write
    assert [frame.body.job for frame in theirs.receive()] == [1, 2]


def test_what_is_queued_without_waking_anybody_waits_for_a_push(pair):
    ours, theirs = pair
    ours.send(Kind.END, Batch(1), wake=False)
    assert ours.wants_write
    ours.push()
    assert [frame.body.job for frame in theirs.receive()] == [1]


@pytest.mark.parametrize("size", [channel.PUSH_BYTES // 2, channel.PUSH_BYTES + 1, 4 << 20])
def test_what_does_not_go_at_once_is_left_to_the_writer(closing, pair, size):
    """A push never blocks, though nobody reads: the socket is full, or a letter is large."""
    ours, theirs = pair
    letters = [os.urandom(size) for _ in range(40 if size < channel.PUSH_BYTES else 1)]
    for number, data in enumerate(letters):
        ours.send(Kind.TASK, batch(number, data), wake=False)
        ours.push()
    ours.finish()
    found, _ = in_thread(closing, read_all, theirs)()
    assert [bytes(frames.joined(each)) for frame in found for each in frame.body.letters()] == letters


def test_whoever_pushes_while_another_writes_does_not_wait(pair):
    ours, theirs = pair
    with ours._writing:
        ours.send(Kind.END, Batch(1), wake=False)
        ours.push()
        assert ours.wants_write
    assert [frame.body.job for frame in theirs.receive()] == [1]


def test_many_that_push_at_once_lose_nothing(closing, pair):
    ours, theirs = pair
    theirs.socket.settimeout(SECONDS)

    def push_some(job_number):
        for first in range(200):
            ours.send(Kind.TASK, batch(first, b"x" * 100, job=job_number), wake=first % 3 == 0)
            ours.push()

    waits = [in_thread(closing, push_some, number) for number in range(4)]
    heard = []
    while len(heard) < 800:
        heard += theirs.receive()
    for wait in waits:
        wait()
    for number in range(4):
        assert [body.first for _, body in heard if body.job == number] == list(range(200))


def test_a_closed_channel_pushes_nothing(pair):
    ours, _ = pair
    ours.send(Kind.END, Batch(1), wake=False)
    ours.close()
    ours.push()
    assert ours.wants_write


def fail_in(monkeypatch, channel, where, error):
    def fail(*_):
        raise error

    if where == "the tag":
        monkeypatch.setattr(channel._tagger, "tag", fail)
    else:
        monkeypatch.setattr(os, "write", fail)


@pytest.mark.parametrize("where", ["the tag", "the write"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), TimeoutError("by SIGALRM"), Exception("mine"), OSError("mine")])
def test_a_push_in_the_main_thread_raises_the_error_of_a_signal_handler(ends, monkeypatch, where, error):
    """The connection ends, so that nothing is missing in between."""
    ours, theirs = ends
    ours.send(Kind.END, Batch(1), wake=False)
    with monkeypatch.context() as patch:
        fail_in(patch, ours, where, error)
        with pytest.raises(type(error)):
            ours.push()
    ours.send(Kind.END, Batch(2))
    assert read_all(theirs) == ([], "end of file")


def test_a_push_that_fails_in_a_thread_ends_its_connection_alone(ends, monkeypatch):
    """What is no error of the connection's belongs to who pushes, and only the main thread has signals."""
    ours, theirs = ends
    raised = []

    def push():
        try:
            ours.push()
        except BaseException as e:
            raised.append(e)

    ours.send(Kind.END, Batch(1), wake=False)
    with monkeypatch.context() as patch:
        fail_in(patch, ours, "the tag", MemoryError())
        thread = threading.Thread(target=push)
        thread.start()
        thread.join()
    ours.send(Kind.END, Batch(2))
    assert read_all(theirs) == ([], "end of file") and not raised


# The log.


def test_the_log_has_a_line_a_frame_each_way_and_no_letter(ends, caplog):
    link, peer = ends
    link.name, peer.name = "caller", "server"
    caplog.set_level(logging.DEBUG, channel.__name__)
    link.send(Kind.JOB, job(1, DECLARATION, b"secret"))
    link.send(Kind.TASK, batch(3, b"secret", b"x", job=1, attempt=2))
    drain(link, peer)
    lines = [record.getMessage() for record in caplog.records]
    task = "TASK job 1 chunks 3 to 4 attempt 2 number 0, 7 bytes"
    assert f"caller > {task}" in lines and f"server < {task}" in lines and len(lines) == 4
    assert "secret" not in "".join(lines)
