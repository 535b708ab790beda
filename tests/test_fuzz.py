"""Whatever a peer sends, a parser returns or raises ProtocolError; the same inputs in every run.

The search for new inputs is `tests/fuzz/frames.py`.
"""

from __future__ import annotations

import json
import socket
import time
from collections import Counter

import pytest
from fuzz import targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_exchange import CONTEXT, OTHER_CONTEXT, Cluster, FakeChannel, digest_of, row
from test_frames import GOOD

from achilles.errors import ProtocolError, ServerUnreachable
from achilles.protocol import auth, channel, frames
from achilles.protocol.frames import ASKED, DIRECTIONS, HEAD, LINKS, MORE, PACKED, ROW, Kind, Rows, Status
from achilles.server.exchange import Peer


def budget(examples):
    """So many inputs, which do not change from run to run."""
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.fixture(autouse=True, scope="module")
def small_buffers():
    """Short inputs, too, make a reader's buffers move and grow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "BUFFER_BYTES", 64)
        patch.setattr(frames, "LETTER_STEP_BYTES", 256)
        yield


# Bytes that are almost frames: most heads name a kind and their envelope's length, most bodies are almost right.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**64) | st.floats() | st.text(max_size=9), lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)), max_leaves=6)
WRONG = JSON | st.sampled_from(["", "0f" * 16, "0F" * 32, "x\ny", "x" * 4097, 0, 1025, 2**16 - 1, 2**16, 2**32])
LETTER_BYTES = [0, 1, 5, 1024, 1025, 1025, 2**32 - 1]


@st.composite
def payloads(draw, kind):
    """An envelope of this kind and its number of rows: right, wrong in a place or two, or junk."""
    wrong = draw(st.sampled_from(["nothing", "nothing", "a place", "a place", "two", "all"]))
    if wrong == "all":
        return draw(st.integers(0, 3)), draw(st.binary(max_size=80))
    if kind in frames.ROW_COUNTS:
        count = 1 if kind is Kind.FUNCTION else draw(st.integers(1, 3))
        rows = [[draw(st.integers(0, 3)), draw(st.integers(0, 2)), 0, draw(st.sampled_from(LETTER_BYTES))]
                for _ in range(count)]
        for table_row in rows if kind in frames.LETTERLESS else ():
            table_row[3] = 0
        if wrong != "nothing" or kind is Kind.RESULT:
            draw(st.sampled_from(rows))[2] = draw(st.sampled_from([0, 1, 5, 6, 128, 129, 130]))
        lengths = [table_row[3] for table_row in rows]
        rest = bytes(32 * sum(n > 1024 for n in lengths) + sum(n for n in lengths if n <= 1024))
        rest += bytes(draw(st.integers(0, 1))) if wrong == "two" else b""
        return count, draw(st.binary(min_size=8, max_size=8)) + b"".join(ROW.pack(*each) for each in rows) + rest
    body = dict(GOOD[kind])
    for _ in range({"nothing": 0, "a place": 1, "two": 2}[wrong]):
        if body and kind is Kind.JOB and draw(st.booleans()):
            body["options"] = {draw(st.sampled_from([*frames.OPTIONS, "new"])): draw(WRONG)}
        elif body:
            body[draw(st.sampled_from(sorted(body)))] = draw(WRONG)
    return 0, json.dumps(body, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")


def lengths_in(envelope, count):
    """The lengths of letters that its rows tell of, as far as it has rows."""
    table = envelope[8 : 8 + 16 * count]
    return [ROW.unpack_from(table, at)[3] for at in range(0, len(table) - 15, 16)]


@st.composite
def streams(draw):
    """A link, and bytes of a few frames on it, with an alteration."""
    link, data = draw(st.sampled_from(LINKS)), b""
    kinds = [kind for kind in Kind if link in DIRECTIONS[kind]]
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3)):
        count, envelope = draw(payloads(kind))
        data += HEAD.pack(kind, 0, count, len(envelope)) + envelope
        if kind in frames.ROW_COUNTS:  # its long letters, where they are not gigabytes
            data += bytes(sum(n for n in lengths_in(envelope, count) if 1024 < n < 4096))
    if draw(st.integers(0, 3)):
        return link, data
    at = draw(st.integers(0, len(data)))
    return link, data[:at] + draw(st.binary(max_size=2)) + data[at + draw(st.integers(0, 2)):]


@given(streams(), st.sampled_from([1, 3, 50, 1 << 16]))
@budget(150)
def test_a_stream_is_frames_or_a_protocol_error(stream, step):
    targets.check_stream(*stream, step)


@given(streams(), st.sampled_from([1, 50, 1 << 16]))
@budget(50)
def test_nothing_unsigned_becomes_a_frame(stream, step):
    targets.check_signed_stream(*stream, step)


@given(st.sampled_from(list(Kind)).flatmap(lambda kind: st.tuples(st.just(kind), payloads(kind))))
@budget(300)
def test_a_control_payload_is_one_or_a_protocol_error(drawn):
    kind, (_, envelope) = drawn
    targets.check_control(kind, envelope)


@given(payloads(Kind.ERROR) | st.tuples(st.just(0), JSON.map(lambda value: json.dumps(value).encode())))
@budget(100)
def test_the_note_on_a_lost_slice_is_one_or_a_protocol_error(drawn):
    for text in (drawn[1], b'{"position":0,"phase":"call","pid":%b,"node":%b,"exitcode":%b}' % ((drawn[1],) * 3)):
        targets.check_note(text)


# The handshake.


CLAIMS = st.tuples(
    st.sampled_from([b"ACHL", b"ACHL", b"HTTP", b"\x16\x03\x01\0"]), st.sampled_from([1, 1, 1, 0, 2, 2**16 - 1]),
    st.sampled_from([b"C", b"N", b"S", b"\0"]), st.sampled_from([b"\0", b"\0", b"\1"]), st.binary(max_size=32),
    st.binary(min_size=0, max_size=66),
).map(lambda t: (t[0] + t[1].to_bytes(2, "big") + t[2] + t[3] + bytes(32) + t[4].ljust(32, b"\0") + t[5]))


@given(CLAIMS | st.binary(max_size=120) | CLAIMS.map(lambda message: message.ljust(auth.AUTH_BYTES, b"\0")[:104]))
@budget(400)
def test_a_handshake_is_parsed_or_a_protocol_error_and_never_accepted(message):
    targets.check_handshake(message)


@given(st.binary(max_size=200) | CLAIMS)
@budget(40)
def test_a_client_is_let_in_refused_or_dropped_and_nothing_else(data):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        try:
            claimed, keys = channel.answer_claim(ours, lambda _: [targets.KEY], time.monotonic() + 5)
        except (ProtocolError, ServerUnreachable):
            return
        assert keys is None and len(data) >= auth.AUTH_BYTES and claimed.role in (auth.CONTROLLER, auth.NODE)


# The server's dealings: well-formed frames of nodes and controllers in any order.


class Outbox(FakeChannel):
    """What the server says must be right, whatever made it say that: only its peers break the protocol."""

    def send(self, kind, body, wake=True):
        if not self.finished:
            link = "SN" if self.name.startswith("node") else "SC"
            assert self.name.startswith("client") or link in DIRECTIONS[kind], f"{kind.name} to {self.name}"
            try:
                super().send(kind, body)
            except ProtocolError as error:
                raise AssertionError(f"the server itself breaks the protocol: {error}") from error

    send_ahead = send


FUNCTIONS = [b"f", b"g" * 2000]
DIGESTS = [digest_of(letter).hex() for letter in FUNCTIONS]
LETTERS = [b"", b"ab", b"x" * 1025]
# What a client says, each kind as often as it takes to come far.
SAYS = {
    "CS": {Kind.FUNCTION: 4, Kind.JOB: 16, Kind.TASK: 60, Kind.FLUSH: 16, Kind.CANCEL: 6, Kind.END: 6, Kind.FORGET: 2,
           Kind.CLOSE: 4, Kind.STATUS: 4, Kind.KILL: 1, Kind.BYE: 1, Kind.PING: 1, Kind.ERROR: 1, Kind.HELLO: 1},
    "NS": {Kind.RESULT: 40, Kind.RETURNED: 20, Kind.BYE: 2, Kind.PING: 1, Kind.ERROR: 1, Kind.HELLO: 1},
}


def body_of(kind, random, jobs, upto):
    """A well-formed body: jobs and slices that are there as a rule, and others now and then."""
    odd = random.random() < 0.03
    number = random.randrange(4) if odd or not jobs else random.choice(jobs)
    some = [random.randrange(upto + 1) for _ in range(random.randint(1, 4))]
    if kind is Kind.FUNCTION:
        return row(0, random.choice(FUNCTIONS), job=0)
    if kind is Kind.TASK:
        first = random.randrange(9) if odd else upto
        status = random.choice([0, 0, PACKED])
        return frames.merge([row(first + n, random.choice(LETTERS), number, status) for n in range(len(some))])
    if kind is Kind.RESULT:
        statuses = [*Status, Status.VALUES | MORE]
        return frames.merge([row(n, random.choice(LETTERS), number, random.choice(statuses), random.choice([0, 0, 1]),
                               random.choice([0, 9, 9000])) for n in some])
    if kind is Kind.RETURNED:
        return Rows(number, b"".join(ROW.pack(n, 0, 0, 0) for n in some[1:]))
    python = random.choice(["3.11"] * 5 + ["3.12"])
    about = {"python": python, "version": "1", "cpu_count": 0 if odd else random.randint(1, 3)}
    options = random.choice([{}, {}, {"processes": 1}, {"processes": 3}, {"unknown": "\N{GRINNING FACE}" * 15_000}])
    context, function = random.choice([CONTEXT, OTHER_CONTEXT]), random.choice(DIGESTS)
    job = {"job": random.randrange(4 if odd else 10**6), "context": context, "resumed": False, "function": function,
           "initializer": random.choice([None, *DIGESTS]), "options": options}
    return {
        Kind.HELLO: about, Kind.BYE: {"reason": "leaving"}, Kind.JOB: job, Kind.FLUSH: {"job": number, "upto": upto},
        Kind.ERROR: {"code": "protocol", "message": "\x1b[2J\n"}, Kind.CANCEL: {"job": number},
        Kind.END: {"job": number}, Kind.FORGET: {"function": random.choice([*DIGESTS, "0f" * 32])},
        Kind.CLOSE: {"context": context},
    }.get(kind, {})


class Fuzzed(Cluster):
    """An Exchange whose peers say anything; one that breaks the protocol is let go, as `listen.py` does."""

    def __init__(self, random):
        super().__init__()
        self.random = random
        self.peers = []
        self.cut = Counter()  # (peer, job) -> slices that were sent
        self.reached = Counter()  # what the server was brought to say
        for role in (auth.NODE, auth.CONTROLLER, auth.NODE):
            self.join(role)

    def join(self, role):
        peer = Peer(Outbox(), role, "ann", "127.0.0.1")
        self.exchange.enter(peer, 6)
        self.peers.append(peer)
        self.say(peer, Kind.HELLO, body_of(Kind.HELLO, self.random, [], 0))
        for letter in FUNCTIONS if role == auth.CONTROLLER and peer in self.peers else ():
            self.say(peer, Kind.FUNCTION, row(0, letter, job=0))

    def say(self, peer, kind, body):
        try:
            super().say(peer, kind, body)
        except ProtocolError:
            self.leave(peer)

    def leave(self, peer):
        self.exchange.leave(peer)
        self.peers.remove(peer)

    def step(self):
        """One event: a peer comes or goes, a node answers what it was given, or a peer says something."""
        what = self.random.choices(["join", "leave", "answer", "say"], [3, 1, 6, 20])[0]
        if what == "join" or not self.peers:
            return self.join(self.random.choice([auth.NODE, auth.CONTROLLER]))
        peer = self.random.choice(self.peers)
        if what == "leave":
            return self.leave(peer)
        if what == "answer":
            return self.answer(self.random.choice([each for each in self.peers if each.role == auth.NODE] or [None]))
        says = SAYS["NS" if peer.role == auth.NODE else "CS"]
        kind = self.random.choices(list(says), list(says.values()))[0]
        jobs = list(self.exchange._jobs if peer.role == auth.NODE else peer.jobs)
        some = [self.random.choice(jobs)] if jobs else []
        if not jobs and kind in (Kind.TASK, Kind.FLUSH, Kind.END) and self.random.random() > 0.03:
            kind = Kind.JOB
        upto = self.cut[peer, some[0]] if some and peer.role == auth.CONTROLLER else 4
        body = body_of(kind, self.random, some, upto)
        if kind is Kind.TASK and [body.job] == some:
            self.cut[peer, body.job] = max(upto, body.slices[-1] + 1)
        return self.say(peer, kind, body)

    def answer(self, node):
        """Results of what it was given since it was asked last; RETURNED where it was asked for that."""
        came = node.channel.take() if node else []
        self.reached.update(kind for kind, _ in came)
        for kind, body in came:
            if kind is Kind.TASK and node in self.peers:
                answers = [row(n, b"r", body.job, 0, a, 9) for n, a in zip(body.slices, body.attempts)]
                self.say(node, Kind.RESULT, frames.merge(answers))
            elif kind is Kind.RECALL and node in self.peers:
                back = ROW.pack(self.random.randrange(9), 0, 0, 0)
                self.say(node, Kind.RETURNED, Rows(body["job"], back, pace=ASKED))

    def check(self):
        """What the server has noted of jobs is the same everywhere."""
        jobs, scheduler = self.exchange._jobs, self.exchange._scheduler
        assert jobs.keys() == scheduler._jobs.keys()
        assert sorted(jobs) == sorted(each.number for peer in self.peers for each in peer.jobs.values())
        assert self.exchange._nodes.keys() == scheduler._nodes.keys()
        for node in scheduler._nodes.values():
            assert all(node.held.values()) and all(each.number in jobs for each in node.held)


REACHED: Counter[Kind] = Counter()


@given(st.randoms(use_true_random=True))
@budget(120)
def test_frames_in_any_order_are_served_or_a_protocol_error(random):
    cluster = Fuzzed(random)
    for _ in range(60):
        cluster.step()
        cluster.check()
    for peer in list(cluster.peers):
        REACHED.update(kind for kind, _ in peer.channel.said)
        cluster.leave(peer)
        cluster.check()
    REACHED.update(cluster.reached)
    assert not cluster.exchange._jobs and not cluster.exchange._nodes, "something outlived its peers"


def test_every_kind_is_tried_and_the_server_says_all_that_it_can():
    """Otherwise the test above would walk about at the door."""
    for link, says in SAYS.items():
        assert says.keys() == {kind for kind in Kind if link in DIRECTIONS[kind]}
    if not REACHED:
        test_frames_in_any_order_are_served_or_a_protocol_error()
    wanted = {kind for kind in Kind if {"SC", "SN"} & set(DIRECTIONS[kind])}
    # The first four are the channel's to say, or a full server's, or come when a cache is full.
    assert wanted - REACHED.keys() <= {Kind.BYE, Kind.PING, Kind.ERROR, Kind.FORGET}
