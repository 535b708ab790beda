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
from test_exchange import CONTEXT, OTHER_CONTEXT, SET, Cluster, FakeChannel
from wire import DECLARATION, GOOD, LINKS, job, letter

from achilles.errors import AuthenticationError, ProtocolError, ServerUnreachable
from achilles.protocol import auth, connect, reader
from achilles.protocol.frames import HEAD, MORE, RANGE, TELL, Batch, Gone, Kind, Status
from achilles.protocol.kinds import DECLARATION as DECLARATION_FIELDS
from achilles.protocol.kinds import DIRECTIONS, FLAGS, LETTERS, RANGES
from achilles.server.exchange import Peer


def budget(examples):
    """So many inputs, which do not change from run to run."""
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.fixture(autouse=True, scope="module")
def small_buffers():
    """Short inputs, too, make a reader's buffers move and grow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "BUFFER_BYTES", 64)
        patch.setattr(reader, "DIRECT_BYTES", 16)
        patch.setattr(reader, "LETTER_STEP_BYTES", 256)
        yield


# Bytes that are almost frames: most heads name a kind and their envelope's length, most bodies are almost right.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**64) | st.floats() | st.text(max_size=9), lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)), max_leaves=6)
WRONG = JSON | st.sampled_from(["", "0f" * 16, "0F" * 32, "x\ny", "x" * 4097, 0, 1025, 2**16 - 1, 2**16, 2**32])
LETTER_BYTES = [0, 1, 5, 1024, 1025, 1025, 2**40 + 1, 2**64 - 1]


@st.composite
def batches(draw, kind, wrong):
    """An envelope with a range: as its kind may have it, or wrong in places."""
    limits = list(RANGES[kind])
    for _ in range({"nothing": 0, "a place": 1, "two": 2}[wrong]):
        limits[draw(st.integers(0, 3))] = (0, 2**32 - 1)
    first, count, attempt, number = (draw(st.integers(*ends) | st.sampled_from(ends)) for ends in limits)
    if kind not in LETTERS:
        return RANGE.pack(7, first, count, attempt, number) + bytes(draw(st.integers(0, 1)) if wrong == "two" else 0)
    count = min(count, draw(st.integers(1, 3)))
    lengths = [draw(st.sampled_from(LETTER_BYTES)) for _ in range(count)]
    declaration = b""
    if kind is Kind.JOB and count:
        declared = dict(DECLARATION)
        if wrong != "nothing":
            declared[draw(st.sampled_from([*DECLARATION_FIELDS, "new"]))] = draw(WRONG)
        declaration = json.dumps(declared, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
        lengths[0] = len(declaration)
    statuses = bytes(draw(st.lists(st.integers(0, 6), min_size=count, max_size=count)) if kind is Kind.RESULT else ())
    table = b"".join(length.to_bytes(8, "big") for length in lengths)
    rest = bytes(32 * sum(n > 1024 for n in lengths)) + declaration
    rest += bytes(sum(n for n in lengths[bool(declaration) :] if n <= 1024))
    rest += bytes(draw(st.integers(0, 1))) if wrong == "two" else b""
    return RANGE.pack(7, first, count, attempt, number) + statuses + table + rest


@st.composite
def payloads(draw, kind):
    """An envelope of this kind: right, wrong in a place or two, or junk."""
    wrong = draw(st.sampled_from(["nothing", "nothing", "a place", "a place", "two", "all"]))
    if wrong == "all":
        return draw(st.binary(max_size=80))
    if kind in RANGES:
        return draw(batches(kind, wrong))
    body = dict(GOOD[kind])
    for _ in range({"nothing": 0, "a place": 1, "two": 2}[wrong]):
        if body:
            body[draw(st.sampled_from(sorted(body)))] = draw(WRONG)
    return json.dumps(body, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")


def lengths_in(kind, envelope):
    """The lengths of letters that an envelope tells of, as far as it has them."""
    if kind not in LETTERS or len(envelope) < RANGE.size:
        return []
    count = min(RANGE.unpack_from(envelope)[2], 9)
    start = RANGE.size + (count if kind is Kind.RESULT else 0)
    table = envelope[start : start + 8 * count]
    return [int.from_bytes(table[at : at + 8], "big") for at in range(0, len(table), 8)]


@st.composite
def streams(draw):
    """A link, and bytes of a few frames on it, with an alteration."""
    link, data = draw(st.sampled_from(LINKS)), b""
    kinds = [kind for kind in Kind if link in DIRECTIONS[kind]]
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3)):
        envelope = draw(payloads(kind))
        flags = draw(st.sampled_from([0, 0, *FLAGS.get(kind, (0,)), 9]))
        data += HEAD.pack(kind, flags, 0, len(envelope)) + envelope
        # Its long letters, where they are not gigabytes.
        data += bytes(sum(n for n in lengths_in(kind, envelope) if 1024 < n < 4096))
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
def test_an_envelope_is_one_or_a_protocol_error(drawn):
    targets.check_control(*drawn)


@given(payloads(Kind.ERROR) | JSON.map(lambda value: json.dumps(value).encode()))
@budget(100)
def test_the_note_on_a_lost_chunk_is_one_or_a_protocol_error(drawn):
    for text in (drawn, b'{"offset":0,"phase":"call","pid":%b,"node":%b,"exitcode":%b}' % ((drawn,) * 3)):
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
        with pytest.raises((AuthenticationError, ProtocolError, ServerUnreachable)) as caught:
            connect.accept(ours, lambda _: [targets.KEY], time.monotonic() + 5)
        is_claim = len(data) >= auth.AUTH_BYTES and data[6:7] in (auth.CONTROLLER, auth.NODE)
        assert is_claim or caught.type is not AuthenticationError


# The server's dealings: well-formed frames of nodes and controllers in any order.


class Outbox(FakeChannel):
    """What the server says must be right, whatever made it say that: only its peers break the protocol."""

    def send(self, kind, body, *, wake=True):
        if not self.finished:
            link = "SN" if self.name.startswith("node") else "SC"
            assert self.name.startswith("client") or link in DIRECTIONS[kind], f"{kind.name} to {self.name}"
            try:
                super().send(kind, body)
            except ProtocolError as error:
                raise AssertionError(f"the server itself breaks the protocol: {error}") from error


FUNCTIONS = [b"f", b"g" * 2000]
LETTERS_OF_CHUNKS = [b"", b"ab", b"x" * 1025]
# What a client says, each kind as often as it takes to come far.
SAYS = {
    "CS": {Kind.JOB: 16, Kind.TASK: 60, Kind.CANCEL: 6, Kind.END: 6, Kind.STATUS: 4, Kind.KILL: 1, Kind.BYE: 1,
           Kind.PING: 1, Kind.ERROR: 1, Kind.HELLO: 1},
    "NS": {Kind.RESULT: 40, Kind.RETURNED: 20, Kind.OUTPUT: 10, Kind.BYE: 2, Kind.PING: 1, Kind.ERROR: 1,
           Kind.HELLO: 1},
}


def body_of(kind, random, jobs, upto):
    """A well-formed body: jobs and chunks that are there as a rule, and others now and then."""
    odd = random.random() < 0.03
    number = random.randrange(4) if odd or not jobs else random.choice(jobs)
    first, count = random.randrange(upto + 1), random.randint(1, 4)
    some = [letter(random.choice(LETTERS_OF_CHUNKS)) for _ in range(count)]
    attempt, taken = random.randrange(max(upto, 1) + 1), random.choice([0, 9, 9000, 90_000])
    if kind is Kind.JOB:
        has = random.random() < 0.3
        sources = random.choice([None, None, SET, "0f" * 16])
        declaration = {
            "context": random.choice([CONTEXT, OTHER_CONTEXT]), "initializer": has, "new": "x", "sources": sources}
        made = b"i" if has else b"", b"modules" if sources and not odd else b""
        return job(random.randrange(4 if odd else 10**6), declaration, random.choice(FUNCTIONS), *made)
    if kind is Kind.TASK:  # an attempt is its own, but for odd ones
        return Batch.pack(number, random.randrange(9) if odd else upto, some, attempt=attempt if odd else upto,
                          number=taken, flags=random.choice([0, TELL]))
    if kind is Kind.RESULT:
        statuses = bytes(random.choices(list(Status), k=count))
        return Batch.pack(number, first, some, attempt=attempt, number=taken, statuses=statuses)
    if kind is Kind.OUTPUT:
        return Batch.pack(number, first, [b"a line"], attempt=attempt, number=taken, flags=random.choice([0, MORE]))
    if kind is Kind.RETURNED:
        return Batch(number, first, count, attempt, 0, random.choice([Gone.RETURNED, Gone.LEFT, Gone.WAITED]))
    if kind is Kind.CANCEL:
        return Batch(number, first, count)
    if kind is Kind.END:
        return Batch(number)
    python = random.choice(["3.11"] * 5 + ["3.12"])
    about = {"python": python, "version": "1", "cpu_count": 0 if odd else count, "pid": 1}
    return {Kind.HELLO: about, Kind.BYE: {"reason": "leaving"},
            Kind.ERROR: {"code": "protocol", "message": "\x1b[2J\n"}}.get(kind, {})


class Fuzzed(Cluster):
    """An Exchange whose peers say anything; one that breaks the protocol is let go, as `listen.py` does."""

    def __init__(self, random):
        super().__init__()
        self.random = random
        self.peers = []
        self.cut = Counter()  # (peer, job) -> chunks that were sent
        self.reached = Counter()  # what the server was brought to say
        for role in (auth.NODE, auth.CONTROLLER, auth.NODE):
            self.join(role)

    def join(self, role):
        peer = Peer(Outbox(), role, "ann", "127.0.0.1")
        self.exchange.enter(peer, 6)
        self.peers.append(peer)
        self.say(peer, Kind.HELLO, body_of(Kind.HELLO, self.random, [], 0))

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
        if not jobs and kind in (Kind.TASK, Kind.CANCEL, Kind.END) and self.random.random() > 0.03:
            kind = Kind.JOB
        upto = self.cut[peer, some[0]] if some and peer.role == auth.CONTROLLER else 4
        body = body_of(kind, self.random, some, upto)
        if kind is Kind.TASK and [body.job] == some:
            self.cut[peer, body.job] = max(upto, body.end)
        return self.say(peer, kind, body)

    def answer(self, node):
        """Results of what it was given since it was asked last, chunk by chunk or whole; some of it is given back."""
        came = node.channel.take() if node else []
        self.reached.update(kind for kind, _ in came)
        for body in [body for kind, body in came if kind is Kind.TASK]:
            whole = self.random.random() < 0.5
            for first, count in [(body.first, body.count)] if whole else [(n, 1) for n in range(body.first, body.end)]:
                if node in self.peers and self.random.random() < 0.2:
                    self.say(node, Kind.RETURNED, Batch(body.job, first, count, body.attempt, 0, Gone.WAITED))
                elif node in self.peers:
                    self.say(node, Kind.RESULT, Batch.pack(
                        body.job, first, [b"r"] * count, attempt=body.attempt, number=9, statuses=bytes(count)))

    def check(self):
        """What the server has noted of jobs is the same everywhere."""
        jobs, scheduler = self.exchange._jobs, self.exchange._scheduler
        assert jobs.keys() == scheduler.jobs.keys()
        assert sorted(jobs) == sorted(each.number for peer in self.peers for each in peer.jobs.values())
        assert self.exchange._nodes.keys() == scheduler.nodes.keys()
        opened = Counter(name for peer in self.peers for name in peer.contexts)
        assert opened == self.exchange._open and opened.keys() == self.exchange._contexts.keys()
        for peer in self.peers:
            assert {each.sources for each in peer.jobs.values()} - {None} == peer.contexts.keys() & {SET, "0f" * 16}
        for node in scheduler.nodes.values():
            for (number, attempt), held in node.held.items():
                assert held.first < held.end
                assert number not in jobs or scheduler.jobs[number].held[attempt] is held  # or ended, and not returned


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
    assert wanted - REACHED.keys() <= {Kind.BYE, Kind.PING, Kind.ERROR}  # the channel's to say, or a full server's
