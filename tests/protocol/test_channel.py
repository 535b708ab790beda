"""An authenticated connection over socket pairs and loopback: the handshake, the order of frames, its end.

Nothing here sleeps: what takes time is waited for by an event or a thread's end, and constants of
seconds are made small.
"""

import contextlib
import os
import socket
import sys
import sysconfig
import threading
import time

import pytest

from achilles.errors import AuthenticationError, ProtocolError, ServerUnreachable
from achilles.protocol import auth, channel, frames
from achilles.protocol.channel import Channel, SentFunctions, answer_claim, connect
from achilles.protocol.frames import ASKED, Frame, Kind, Rows

KEY = bytes(range(32))
OTHER_KEY = bytes(32)
DATA_KEYS = b"client to server", b"server to client"
SECONDS = 10.0  # a generous bound that tells a hang from a wait


def descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.fixture(autouse=True)
def closing():
    """What a test opens through this is closed; afterwards no thread and no descriptor is left."""
    threads, files = threading.active_count(), descriptors()
    with contextlib.ExitStack() as stack:
        yield stack
    assert threading.active_count() == threads, threading.enumerate()
    assert descriptors() <= files  # fewer, where what earlier tests left is collected meanwhile


@pytest.fixture
def pair(closing):
    """A controller's and a server's end of one connection, with a writer thread each."""
    ends = linked()
    for end in ends:
        closing.callback(end.close)
        end.start_writer()
    return ends


def linked(links=("SC", "CS"), keys=DATA_KEYS):
    ours, theirs = socket.socketpair()
    ours.settimeout(channel.TICK_SECONDS)
    theirs.settimeout(channel.TICK_SECONDS)
    return Channel(ours, links[0], keys), Channel(theirs, links[1], keys and keys[::-1])


def in_thread(closing, target, *args):
    """Run it beside the test; `wait()` gives what it returned."""
    results = []
    thread = threading.Thread(target=lambda: results.append(target(*args)), daemon=True)
    thread.start()
    closing.callback(thread.join, SECONDS)

    def wait():
        thread.join(SECONDS)
        assert not thread.is_alive()
        return results[0]

    return wait


def read_all(link):
    """What `run` was given until the end, and why it ended."""
    frames = []
    return frames, link.run(frames.append)


def row(slice_, letter=b"", job=1, status=0):
    return Rows.single(job, slice_, 0, status, (letter,), frames.digest([letter]))


# The handshake.


@pytest.fixture
def listener(closing):
    return closing.enter_context(socket.create_server(("127.0.0.1", 0)))


def serve(listener, key=KEY, close_first=0):
    """Accept one client, having closed so many before their WELCOME; its claim and whether it was proved."""
    for _ in range(close_first):
        listener.accept()[0].close()
    sock, _ = listener.accept()
    with sock:
        claimed, keys = answer_claim(sock, lambda claimed: [key], time.monotonic() + SECONDS)
        sock.sendall(keys.server_proof if keys else auth.REFUSAL)
        if keys is None:
            return claimed, None
        sock.settimeout(channel.TICK_SECONDS)
        link = Channel(sock, claimed.role.decode() + "S", (keys.server_data, keys.client_data))
        link.send(Kind.PING, {})
        assert link.flush()
        return claimed, read_all(link)


@pytest.mark.parametrize("role", [auth.CONTROLLER, auth.NODE])
def test_a_client_with_the_secret_gets_in(closing, listener, role):
    served = in_thread(closing, serve, listener)
    link = connect(*listener.getsockname(), role, "ann", KEY, SECONDS)
    closing.callback(link.close)
    assert link.receive() == [Frame(Kind.PING, {})]
    link.send(Kind.BYE, {"reason": "leaving"})
    link.finish()
    link.start_writer()
    claimed, (frames, why) = served()
    assert (claimed.role, claimed.user) == (role, b"ann")
    assert (frames, why) == ([Frame(Kind.BYE, {"reason": "leaving"})], "end of file")


def test_a_wrong_secret_is_refused(closing, listener):
    served = in_thread(closing, serve, listener)
    with pytest.raises(AuthenticationError, match="refused"):
        connect(*listener.getsockname(), auth.CONTROLLER, "ann", OTHER_KEY, SECONDS)
    assert served()[1] is None


def test_a_server_that_does_not_know_the_secret_is_not_ours(closing, listener):
    def impostor():
        sock, _ = listener.accept()
        with sock:
            sock.sendall(auth.greeting(bytes(32)))
            channel.receive_exactly(sock, auth.AUTH_BYTES, time.monotonic() + SECONDS)
            sock.sendall(bytes(range(32)))

    served = in_thread(closing, impostor)
    with pytest.raises(AuthenticationError, match="does not know the secret"):
        connect(*listener.getsockname(), auth.CONTROLLER, "ann", KEY, SECONDS)
    served()


def test_what_is_no_server_is_said_to_be_none(closing, listener):
    def web_server():
        sock, _ = listener.accept()
        with sock:
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

    served = in_thread(closing, web_server)
    with pytest.raises(ProtocolError, match="not an achilles server"):
        connect(*listener.getsockname(), auth.CONTROLLER, "ann", KEY, SECONDS)
    served()


def test_a_client_closed_before_its_welcome_tries_again(closing, listener, monkeypatch):
    monkeypatch.setattr(channel, "RETRY_SECONDS", 0.001)
    served = in_thread(closing, serve, listener, KEY, 3)
    link = connect(*listener.getsockname(), auth.CONTROLLER, "ann", KEY, SECONDS)
    link.close()
    assert served()[0].user == b"ann"


def test_a_silent_server_is_given_up(listener):
    started = time.monotonic()
    with pytest.raises(ServerUnreachable, match="does not answer"):
        connect(*listener.getsockname(), auth.CONTROLLER, "ann", KEY, 0.1)
    assert time.monotonic() - started < SECONDS / 2


def test_where_nobody_listens_is_said_at_once(free_port):
    with pytest.raises(ServerUnreachable, match=f"127.0.0.1:{free_port}"):
        connect("127.0.0.1", free_port, auth.CONTROLLER, "ann", KEY, SECONDS)


def answer(data, seconds=SECONDS, end=True):
    """A server's side of the handshake with a client that says `data`."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        if end:
            theirs.shutdown(socket.SHUT_WR)
        return answer_claim(ours, lambda claimed: [KEY], time.monotonic() + seconds)


def test_of_a_claim_104_bytes_are_read():
    """Whatever is behind them stays with the system until the claim was proved."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(auth.claim(auth.NODE, "ann", bytes(32)) + bytes(32) + b"x" * 1000)
        claimed, keys = answer_claim(ours, lambda claimed: [KEY], time.monotonic() + SECONDS)
        assert (claimed.user, keys) == (b"ann", None)
        assert ours.recv(2000) == b"x" * 1000


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n" + bytes(100), bytes(104), b"\xff" * 104])
def test_junk_is_no_claim(data):
    with pytest.raises(ProtocolError):
        answer(data)


@pytest.mark.parametrize("data", [b"", b"A", auth.claim(auth.NODE, "ann", bytes(32))])
def test_a_claim_cut_short_is_none(data):
    with pytest.raises(ServerUnreachable):
        answer(data)


@pytest.mark.parametrize("data", [b"", auth.claim(auth.NODE, "ann", bytes(32))])
def test_a_silent_client_has_until_the_deadline(data):
    with pytest.raises(TimeoutError):
        answer(data, 0.05, end=False)


def test_the_deadline_is_one_for_all_pieces(closing):
    """Bytes that drip keep nobody's place."""
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def drip():
        with theirs, contextlib.suppress(OSError):
            while not stop.wait(0.01):
                theirs.sendall(b"x")

    served = in_thread(closing, drip)
    with pytest.raises(TimeoutError):
        channel.receive_exactly(ours, 10_000, time.monotonic() + 0.1)
    stop.set()
    ours.close()
    served()


def test_what_comes_after_the_deadline_does_not_count():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"late")
        with pytest.raises(TimeoutError):
            channel.receive_exactly(ours, 4, time.monotonic() - 1)


# The outbox.


def test_urgent_frames_go_first(closing):
    link, peer = linked(("SN", "CS"))
    closing.callback(link.close)
    closing.callback(peer.close)
    link.send(Kind.JOB, JOB)
    link.send(Kind.TASK, row(0))
    link.send_ahead(Kind.CANCEL, {"job": 1})
    link.send_ahead(Kind.PING, {})
    link.send(Kind.END, {"job": 1})
    assert [kind for kind, _ in drain(link, peer)] == [Kind.CANCEL, Kind.PING, Kind.JOB, Kind.TASK, Kind.END]


JOB = {"job": 1, "context": "0" * 32, "function": "0" * 64, "initializer": None, "resumed": False, "options": {}}


def drain(link, peer):
    """Write all that waits at `link`, and read it at `peer`."""
    link.socket.setblocking(False)
    peer.socket.setblocking(False)
    frames = []
    while link.wants_write:
        link.flush()
        while new := peer.receive():
            frames += new
    return frames


@pytest.mark.parametrize(
    ("said", "frames"),
    [
        ([(Kind.TASK, row(n)) for n in range(300)], [300]),
        ([(Kind.TASK, row(n)) for n in range(1025)], [1024, 1]),
        ([(Kind.TASK, row(n, bytes(1024))) for n in range(1030)], [1024, 6]),
        ([(Kind.TASK, row(n, bytes(3 << 20))) for n in range(5)], [2, 2, 1]),
        ([(Kind.TASK, row(0)), (Kind.TASK, row(1, bytes(9 << 20))), (Kind.TASK, row(2))], [1, 1, 1]),
        ([(Kind.TASK, row(n, job=n % 2)) for n in range(4)], [1, 1, 1, 1]),
        ([(Kind.TASK, row(0)), (Kind.FLUSH, {"job": 1, "upto": 1}), (Kind.TASK, row(1))], [1, 0, 1]),
        ([(Kind.FUNCTION, row(0, b"f", job=0)), (Kind.FUNCTION, row(0, b"g", job=0))], [1, 1]),
    ],
    ids=["short", "1,025 rows", "1 MiB", "8 MiB", "one too long", "two jobs", "another kind between", "functions"],
)
def test_rows_of_a_job_leave_in_as_few_frames_as_the_limits_allow(closing, said, frames):
    link, peer = linked()
    closing.callback(link.close)
    closing.callback(peer.close)
    for kind, body in said:
        link.send(kind, body)
    heard = drain(link, peer)
    assert [len(body) if isinstance(body, Rows) else 0 for _, body in heard] == frames
    slices = [n for _, body in heard if isinstance(body, Rows) for n in body.slices]
    assert slices == [n for _, body in said if isinstance(body, Rows) for n in body.slices]


def test_what_is_returned_unasked_leaves_apart_from_the_answer_to_a_recall(closing):
    """Though one of them may be empty."""
    link, peer = linked(("SN", "NS"))
    closing.callback(link.close)
    closing.callback(peer.close)
    for rows in (row(0, b""), Rows(1, b"", pace=ASKED), Rows(1, b"", pace=ASKED), row(1, b"")):
        link.send(Kind.RETURNED, rows)
    heard = drain(link, peer)
    assert [(body.slices, body.pace) for _, body in heard] == [((0,), 0), ((), 1), ((), 1), ((1,), 0)]


def test_a_cancelled_jobs_tasks_are_dropped_and_nothing_else(closing):
    link, peer = linked()
    closing.callback(link.close)
    closing.callback(peer.close)
    link.send(Kind.FUNCTION, row(0, b"f", job=1))
    link.send(Kind.JOB, JOB)
    for n in range(3):
        link.send(Kind.TASK, row(n))
        link.send(Kind.TASK, row(n, job=2))
    link.drop_tasks(1)
    link.send(Kind.TASK, row(3, job=2))
    heard = drain(link, peer)
    assert [kind for kind, _ in heard] == [Kind.FUNCTION, Kind.JOB, *[Kind.TASK] * (len(heard) - 2)]
    tasks = [(body.job, n) for kind, body in heard[2:] for n in body.slices]
    assert tasks == [(2, 0), (2, 1), (2, 2), (2, 3)]


def test_after_finish_all_is_written_then_nothing_more(closing, pair):
    link, peer = pair
    link.send(Kind.TASK, row(0))
    link.finish("leaving")
    link.send(Kind.TASK, row(1))
    link.send_ahead(Kind.CANCEL, {"job": 1})
    link.finish("leaving")
    frames, why = read_all(peer)
    assert [kind for kind, _ in frames] == [Kind.TASK, Kind.BYE] and len(frames[0].body) == 1
    assert why == "end of file"
    link.wait_written(SECONDS)
    assert not link.wants_write


def test_one_that_finished_still_reads(closing, pair):
    link, peer = pair
    link.finish("leaving")
    assert read_all(peer)[1] == "end of file"


def test_what_was_said_before_the_end_is_read_although_writing_fails(closing):
    link, peer = linked()
    closing.callback(link.close)
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


def test_a_quiet_channel_sends_heartbeats(closing, monkeypatch):
    monkeypatch.setattr(channel, "HEARTBEAT_SECONDS", 0.01)
    link, peer = linked()
    closing.callback(link.close)
    closing.callback(peer.close)
    link.start_writer()
    heard = []
    while len(heard) < 3:
        heard += peer.receive()
    assert heard[:3] == [Frame(Kind.PING, {})] * 3


def test_a_silent_peer_is_gone(closing, monkeypatch):
    monkeypatch.setattr(channel, "SILENCE_SECONDS", 0.05)
    link, peer = linked()
    closing.callback(link.close)
    closing.callback(peer.close)
    link.socket.settimeout(0.01)
    assert "no byte came" in read_all(link)[1]


@pytest.mark.parametrize("altered", [False, True])
def test_heartbeats_in_a_frame_that_never_ends_are_silence(closing, altered):
    """A head whose length was altered on the way waits for what never comes; an idle peer's heartbeats are no such."""
    link, peer = linked()
    closing.callback(link.close)
    closing.callback(peer.close)
    peer.send(Kind.PING, {})
    peer._gather()
    data = bytearray(b"".join(peer._parts))
    data[5] ^= 0x10 * altered  # of the length, four bytes from the fourth on: a mebibyte more
    peer._parts.clear()
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


def test_a_worker_may_be_silent(closing, monkeypatch):
    monkeypatch.setattr(channel, "SILENCE_SECONDS", 0.0)
    link, peer = linked(("WN", "NW"), None)
    closing.callback(link.close)
    closing.callback(peer.close)
    link.socket.setblocking(False)
    assert link.receive() == []


def test_a_loop_ticks(closing, monkeypatch):
    link, peer = linked()
    closing.callback(link.close)
    closing.callback(peer.close)
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


def test_a_wrong_tag_closes_without_an_answer(closing):
    link, peer = linked()
    closing.callback(link.close)
    closing.callback(peer.close)
    link.start_writer()
    envelope = b'{"reason":"killed"}'
    peer.socket.sendall(frames.HEAD.pack(Kind.BYE, 0, 0, len(envelope)) + envelope + bytes(32))
    found, why = read_all(link)
    assert found == [] and "wrong tag" in why
    assert peer.socket.recv(1) == b""


@pytest.mark.parametrize("by", ["reader", "handler"])
def test_what_was_wrong_is_told(closing, pair, by):
    link, peer = pair
    frames = []

    def handle(frame):
        frames.append(frame)
        raise ProtocolError("job 3 was not declared")

    if by == "reader":
        link.send(Kind.CLUSTER, {})
    else:
        link.send(Kind.END, {"job": 3})
    why = peer.run(handle)
    (error,), end = read_all(link)
    assert error.kind is Kind.ERROR and error.body == {"code": "protocol", "message": why}
    assert ("CLUSTER" if by == "reader" else "job 3") in why
    assert (end, len(frames)) == ("end of file", by == "handler")


# Without threads.


def test_a_loop_writes_what_the_socket_takes(closing):
    link, peer = linked(("WN", "NW"), None)
    closing.callback(link.close)
    closing.callback(peer.close)
    link.socket.setblocking(False)
    peer.socket.setblocking(False)
    assert link.receive() == [] and peer.receive() == []
    letter = os.urandom(4 << 20)
    link.send(Kind.TASK, row(0, letter))
    assert link.wants_write and not link.flush()
    frames = []
    while not frames:
        link.flush()
        frames += peer.receive()
    assert not link.wants_write and link.flush()
    assert b"".join(map(bytes, frames[0].body.longs[0])) == letter
    link.finish()
    assert link.flush() and peer.receive() is None


def test_twenty_mebibytes_both_ways_at_once(closing, pair):
    link, peer = pair
    letters = [os.urandom(5 << 20) for _ in range(4)]
    for n, letter in enumerate(letters):
        link.send(Kind.TASK, row(n, letter))
        peer.send(Kind.RESULT, row(n, letter))

    def read_letters(end):
        heard = []

        def keep(frame):
            heard.extend(b"".join(letter) for letter in frame.body.longs)
            if len(heard) == len(letters):
                end.finish()

        return end.run(keep), heard

    theirs = in_thread(closing, read_letters, peer)
    assert read_letters(link) == theirs() == ("end of file", letters)


# The book of functions.


def test_a_function_is_sent_once():
    sent = SentFunctions()
    assert sent.use(b"f", 10)
    assert not sent.use(b"f", 10)
    assert sent.release(b"f") == [] == sent.release(b"f")
    assert not sent.use(b"f", 10)


def test_the_longest_unused_functions_are_forgotten():
    sent = SentFunctions(limit_bytes=25)
    for name in (b"a", b"b"):
        sent.use(name, 10)
        assert sent.release(name) == []
    sent.use(b"a", 10)
    sent.release(b"a")
    sent.use(b"c", 10)
    assert sent.release(b"c") == [b"b"]
    assert sent.use(b"b", 10)
    assert not sent.use(b"c", 10)


def test_a_function_in_use_is_never_forgotten():
    sent = SentFunctions(limit_bytes=5)
    sent.use(b"a", 10)
    sent.use(b"a", 10)
    sent.use(b"b", 10)
    assert sent.release(b"b") == [b"b"]
    assert sent.release(b"a") == []
    assert sent.release(b"a") == [b"a"]


@pytest.mark.skipif(not hasattr(os, "writev"), reason="needs writev")
def test_who_pushes_writes_what_is_queued_in_one_go_without_a_writer(closing):
    ours, theirs = linked()
    for end in (ours, theirs):
        closing.callback(end.close)
    ours.send(Kind.CANCEL, {"job": 1}, wake=False)
    ours.send(Kind.CANCEL, {"job": 2}, wake=False)
    ours.push()
    assert not ours.wants_write
    assert [frame.body["job"] for frame in theirs.receive()] == [1, 2]


def test_what_is_queued_without_waking_anybody_waits_for_a_push(pair):
    ours, theirs = pair
    ours.send(Kind.END, {"job": 1}, wake=False)
    assert ours.wants_write
    ours.push()
    assert [frame.body for frame in theirs.receive()] == [{"job": 1}]


@pytest.mark.parametrize("size", [channel.PUSH_BYTES // 2, channel.PUSH_BYTES + 1, 4 << 20])
def test_what_does_not_go_at_once_is_left_to_the_writer(closing, pair, size):
    """A push never blocks, though nobody reads: the socket is full, or a letter is large."""
    ours, theirs = pair
    letters = [os.urandom(size) for _ in range(40 if size < channel.PUSH_BYTES else 1)]
    for number, letter in enumerate(letters):
        ours.send(Kind.TASK, Rows.single(1, number, 0, 0, (letter,), frames.digest([letter])), wake=False)
        ours.push()
    ours.finish()
    found, _ = in_thread(closing, read_all, theirs)()
    assert [bytes(b"".join(parts)) for frame in found for _, parts in frame.body.letters()] == letters


def test_whoever_pushes_while_another_writes_does_not_wait(pair):
    ours, theirs = pair
    with ours._writing:
        ours.send(Kind.END, {"job": 1}, wake=False)
        ours.push()
        assert ours.wants_write
    assert [frame.body for frame in theirs.receive()] == [{"job": 1}]


def test_a_closed_channel_pushes_nothing(pair):
    ours, _ = pair
    ours.send(Kind.END, {"job": 1}, wake=False)
    ours.close()
    ours.push()
    assert ours.wants_write


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()])
def test_a_push_that_fails_ends_its_connection_so_that_nothing_is_missing_in_between(pair, monkeypatch, error):
    """What is no error of the connection's belongs to who pushes, but Ctrl-C alone is told to it."""
    ours, theirs = pair

    def fail(kind, body):
        raise error

    ours.send(Kind.END, {"job": 1}, wake=False)
    with monkeypatch.context() as patch:
        patch.setattr(frames, "encode", fail)
        with pytest.raises(KeyboardInterrupt) if isinstance(error, KeyboardInterrupt) else contextlib.nullcontext():
            ours.push()
    ours.send(Kind.END, {"job": 2})
    assert read_all(theirs) == ([], "end of file")


def test_a_peer_that_drips_is_silent(closing, monkeypatch):
    """Bytes come all the time, in the middle of a frame that never ends."""
    monkeypatch.setattr(channel, "SILENCE_SECONDS", 0.2)
    ours, theirs = linked()
    for end in (ours, theirs):
        closing.callback(end.close)
    head = frames.HEAD.pack(Kind.END, 0, 0, 4096)
    theirs.socket.sendall(head)
    over = threading.Event()

    def drip():
        with contextlib.suppress(OSError):
            while not over.wait(0.01):
                theirs.socket.sendall(b"x")

    wait = in_thread(closing, drip)
    assert "no byte came" in ours.run(lambda frame: None)
    over.set()
    wait()


@pytest.mark.parametrize(("disabled", "suffix"), [(None, ""), (0, ""), (1, "t")])
def test_a_free_threaded_build_names_itself(disabled, suffix, monkeypatch):
    """None: a Python before 3.13 does not know the question."""
    monkeypatch.setattr(sysconfig, "get_config_var", {"Py_GIL_DISABLED": disabled}.get)
    assert channel.python_name() == "{}.{}".format(*sys.version_info) + suffix


def test_hello_has_this_python():
    assert channel.hello()["python"] == channel.PYTHON == channel.python_name()
