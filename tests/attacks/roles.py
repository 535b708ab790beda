"""Attacks from inside: who knows the secret, but does what its role may not.

Whoever has the secret can run code on nodes, so that these walls guard against mistakes and half-owned machines
rather than against thieves: a node that answers for others, or a controller that ends another's job, is refused.
They back "an answer counts from who holds the chunk, once" and the table of kinds in PROTOCOL.md, section 5.
"""

from __future__ import annotations

import hashlib
import json
import os

from . import raw
from .bench import HELLO, KEY, USER_BYTES, Bench, Watched, attack, eventually
from .raw import Chunk
from .victims import FUNCTION, LONG, job

MAY = {
    b"C": {"HELLO", "BYE", "PING", "ERROR", "JOB", "TASK", "CANCEL", "END", "STATUS", "KILL"},
    b"N": {"HELLO", "BYE", "PING", "ERROR", "RESULT", "RETURNED"},
}
BODIES = {
    "CLUSTER": {"nodes": 9, "workers": 9, "largest": 9, "pythons": {"3.11": 9}}, "CLOSE": {"context": "0" * 32},
}


def say(link: raw.Link, kind: str | int, body: dict[str, object] | None = None) -> None:
    """A good frame of this kind, whatever may follow from it."""
    if kind not in raw.WITH_RANGE:
        link.send(kind, (body or {}) | BODIES.get(str(kind), {}))
    elif kind == "JOB":
        link.send(kind, chunks=job(FUNCTION), job=1)
    else:
        link.send(kind, chunks=[] if kind == "END" else [Chunk(0, letter=b"x")], job=1, number=int(kind == "GIVEN"))


def declare(caller: raw.Link, chunks: int, number: int = 1, **options: object) -> None:
    """A job with so many chunks, each a batch of its own."""
    caller.send("JOB", chunks=job(FUNCTION, **options), job=number)
    for n in range(chunks):
        caller.send("TASK", chunks=[Chunk(n, n, letter=b"chunk %d" % n)], job=number)


def take(node: raw.Link, number: int) -> tuple[int, list[Chunk]]:
    """So many chunks that a node is given, and the job's number there."""
    chunks: list[Chunk] = []
    frame = None
    while len(chunks) < number:
        frame = node.wait_for("TASK")
        chunks += frame.chunks
    assert frame is not None
    return frame.job, chunks


def _sync(link: raw.Link) -> list[raw.Frame]:
    """Wait until the server has read all that a controller said; the frames that came meanwhile."""
    link.send("STATUS")
    frames = []
    while (frame := link.read()).kind != "STATUS":
        frames.append(frame)
    return frames


def _sync_node(cluster: Watched, node: raw.Link, done: int) -> None:
    """Wait until the server has read all that a node said, by an answer of it that counts."""
    eventually(lambda: sum(each["done"] for each in cluster.status()["nodes"]) >= done, "its answer")


@attack("secret", "a node that sends tasks, a controller that sends results: every kind in every wrong role")
def kinds_of_other_roles(bench: Bench) -> None:
    """Each kind that a role may not send, and each that nobody knows, is an ERROR and the end of that connection."""
    cluster = bench.cluster()
    cases = [(role, kind) for role, may in MAY.items() for kind in [*raw.KINDS, 0, 17, 77, 255]
             if kind not in may]

    def work(case: tuple[bytes, str | int]) -> None:
        role, kind = case
        with cluster.join(role, 1) as link:
            say(link, kind)
            if role == b"C":
                link.send("STATUS")
            frames = [frame.kind for frame in link.rest() if frame.kind not in ("CLUSTER", "PING")]
        assert frames == ["ERROR"], frames

    bench.each(work, cases)
    cluster.check_alive()


@attack("secret", "a first frame that is no HELLO, a second HELLO, a node without workers")
def hello_out_of_turn(bench: Bench) -> None:
    """Nothing is done for a peer that has not said what it is: a KILL as the first word kills nobody."""
    cluster = bench.cluster()

    def work(case: tuple[bytes, str]) -> None:
        role, kind = case
        with raw.join(cluster.port, role, USER_BYTES, KEY) as link:
            say(link, kind, {"reason": "leaving", "code": "x", "message": "x"})
            assert [frame.kind for frame in link.rest()] == ["ERROR"], kind

    bench.each(work, [(role, kind) for role, may in MAY.items() for kind in sorted(may - {"HELLO"})])

    def twice(role: bytes) -> None:
        with cluster.join(role, 1) as link:
            link.send("HELLO", HELLO | {"cpu_count": 1})
            assert link.wait_for("ERROR") and not [f for f in link.rest() if f.kind == "HELLO"]

    bench.each(twice, [b"C", b"N"])
    with raw.join(cluster.port, b"N", USER_BYTES, KEY) as link:
        link.send("HELLO", HELLO | {"cpu_count": 0})
        assert [frame.kind for frame in link.rest()] == ["ERROR"]
    bench.count()
    cluster.check_alive()


@attack("node", "a node that answers another node's chunk")
def answers_for_another_node(bench: Bench) -> None:
    """Who does not hold a chunk is not heard: the caller gets the holder's answer, once, and no other."""
    cluster = bench.cluster()
    with cluster.join(b"N", 1) as one, cluster.join(b"N", 1) as two, cluster.join() as caller:
        declare(caller, 2)
        number, (mine,) = take(one, 1)
        number2, (other,) = take(two, 1)
        assert number == number2 and {mine.number, other.number} == {0, 1}
        for chunk in (mine, mine._replace(status=1), mine._replace(letter=LONG), mine._replace(attempt=9)):
            forged = chunk._replace(letter=b"forged" + chunk.letter)
            two.send("RESULT", chunks=[forged], job=number)
            two.send("RETURNED", chunks=[forged], job=number)
            bench.count(2)
        both = sorted([mine, other])
        if mine.attempt == other.attempt:  # a range that is its own in part: that part alone counts
            two.send("RESULT", chunks=[chunk._replace(letter=b"forged") for chunk in both], job=number)
        two.send("RESULT", chunks=[other._replace(letter=b"honest")], job=number)
        _sync_node(cluster, two, 1)
        one.send("RESULT", chunks=[mine._replace(letter=b"honest")], job=number)
        _answered(caller, 2)


def _answered(caller: raw.Link, count: int) -> None:
    """The caller has an honest answer of each chunk, and no other, and none is gone."""
    frames = []
    while sum(len(frame.chunks) for frame in frames) < count:
        frames.append(caller.wait_for("RESULT", "GONE"))
    frames += [frame for frame in _sync(caller) if frame.kind in ("RESULT", "GONE")]
    assert {frame.kind for frame in frames} == {"RESULT"}, frames
    chunks = [chunk for frame in frames for chunk in frame.chunks]
    assert sorted((chunk.number, chunk.letter) for chunk in chunks) == [(n, b"honest") for n in range(count)], chunks


@attack("node", "a node that answers an old attempt, twice, or what it gave back")
def old_attempts(bench: Bench) -> None:
    """An answer counts for the attempt that its node holds: earlier, later and further ones are dropped."""
    cluster = bench.cluster()
    with cluster.join() as caller:
        with cluster.join(b"N", 1) as lost:
            declare(caller, 1)
            take(lost, 1)
        assert caller.wait_for("GONE").span[1:4] == (0, 1, 0)
        with cluster.join(b"N", 1) as heir:
            caller.send("TASK", chunks=[Chunk(0, 7, letter=b"chunk 0")], job=1)
            number, (chunk,) = take(heir, 1)
            assert chunk.attempt == 7
            for attempt in (0, 6, 8, 2**32 - 1):
                heir.send("RESULT", chunks=[chunk._replace(attempt=attempt, letter=b"forged")], job=number)
                heir.send("RETURNED", chunks=[chunk._replace(attempt=attempt)], job=number)
                bench.count(2)
            heir.send("RESULT", chunks=[chunk._replace(letter=b"honest")], job=number)
            for letter in (b"forged", LONG):
                heir.send("RESULT", chunks=[chunk._replace(letter=letter)], job=number)
                heir.send("RETURNED", chunks=[chunk], job=number)
                bench.count(2)
            caller.send("TASK", chunks=[Chunk(1, 8, letter=b"chunk 1")], job=1)
            number, (chunk,) = take(heir, 1)
            heir.send("RESULT", chunks=[chunk._replace(letter=b"honest")], job=number)  # all before it has been read
            _answered(caller, 2)
    with cluster.join(b"N", 1) as giver, cluster.join() as caller:
        declare(caller, 1)
        number, (chunk,) = take(giver, 1)
        giver.send("BYE", {"reason": "leaving"})
        giver.send("RETURNED", chunks=[chunk], job=number, flags=1)
        giver.send("RESULT", chunks=[chunk._replace(letter=b"forged")], job=number)
        bench.count()
        assert caller.wait_for("GONE").flags == 1
        caller.send("TASK", chunks=[Chunk(0, 1, letter=b"chunk 0")], job=1)
        giver.send("RESULT", chunks=[chunk._replace(attempt=1, letter=b"forged")], job=number)
        with cluster.join(b"N", 1) as heir:
            number, (chunk,) = take(heir, 1)
            heir.send("RESULT", chunks=[chunk._replace(letter=b"honest")], job=number)
            _answered(caller, 1)
        bench.count()


@attack("node", "a node that answers an unknown job, an ended one, a chunk that does not exist")
def unknown_jobs(bench: Bench) -> None:
    """Nothing comes of it: no caller hears, and nobody's job is touched."""
    cluster = bench.cluster()
    with cluster.join(b"N", 1) as node, cluster.join() as caller:
        declare(caller, 1)
        number, (chunk,) = take(node, 1)
        for other in (number + 1, number + 2, 2**32 - 1):
            node.send("RESULT", chunks=[chunk._replace(letter=b"forged")], job=other)
            node.send("RETURNED", chunks=[chunk], job=other)
            bench.count(2)
        for other in (1, 2, 2**32, 2**64 - 1):
            node.send("RESULT", chunks=[chunk._replace(number=other, letter=b"forged")], job=number)
            node.send("RETURNED", chunks=[chunk._replace(number=other)], job=number)
            bench.count(2)
        node.send("RESULT", chunks=[chunk._replace(letter=b"honest")], job=number)
        _answered(caller, 1)
        caller.send("END", job=1)
        _sync(caller)
        node.send("RESULT", chunks=[chunk._replace(letter=b"forged")], job=number)
        declare(caller, 1, number=2)
        number, (chunk,) = take(node, 1)
        node.send("RESULT", chunks=[chunk._replace(letter=b"honest")], job=number)  # all before it has been read
        frame = caller.wait_for("RESULT")
        assert (frame.job, [chunk.letter for chunk in frame.chunks]) == (2, [b"honest"])
        bench.count()
    cluster.check_alive()


@attack("secret", "ranges that end beyond all numbers, have no chunk, or fields where there are none")
def ranges_out_of_bounds(bench: Bench) -> None:
    """Each is an ERROR and the end of the connection, before any job is looked for; the others go on."""
    cluster = bench.cluster()
    last = Chunk(2**64 - 1)
    frames = {
        b"C": [
            raw.encode("TASK", chunks=[last, Chunk(0)], job=1), raw.encode("TASK", chunks=[], job=1),
            raw.encode("TASK", chunks=[Chunk(n) for n in range(65_537)], job=1),
            raw.encode("CANCEL", chunks=[last], job=1, count=2), raw.encode("CANCEL", job=1, count=0),
            raw.encode("CANCEL", chunks=[Chunk(0, 1)], job=1), raw.encode("END", job=1, count=1),
            raw.encode("END", job=1, number=1), raw.encode("CANCEL", job=1, count=1, flags=1),
            raw.encode("JOB", chunks=job(FUNCTION)[:1], job=1),
            raw.encode("JOB", chunks=job(FUNCTION), job=1, number=1),
            raw.encode("JOB", chunks=[*job(FUNCTION), Chunk(2, letter=b"an initializer that is not declared")], job=1),
            raw.encode("TASK", chunks=[Chunk(0)], job=1, flags=4), raw.encode("END", bytes(23)),
        ],
        b"N": [
            raw.encode("RESULT", chunks=[last, Chunk(0)], job=1), raw.encode("RESULT", chunks=[], job=1),
            raw.encode("RETURNED", job=1, count=0), raw.encode("RETURNED", chunks=[last], job=1, count=2),
            raw.encode("RETURNED", job=1, count=65_537), raw.encode("RETURNED", job=1, count=1, number=1),
            raw.encode("RETURNED", job=1, count=1, flags=2), raw.encode("RESULT", chunks=[Chunk(0, status=6)], job=1),
            raw.encode("RESULT", chunks=[Chunk(0)], job=1, flags=1),
        ],
    }

    def work(case: tuple[bytes, raw.Frame]) -> None:
        role, frame = case
        with cluster.join(role, 1) as link:
            if role == b"C" and frame.kind != "JOB":
                link.send("JOB", chunks=job(FUNCTION), job=1)
            link.sock.sendall(raw.tag(link.keys.data[raw.UP], link.sequence[raw.UP], frame).raw)
            assert [f.kind for f in link.rest() if f.kind not in ("CLUSTER", "PING", "JOB", "TASK")] == ["ERROR"]

    bench.each(work, [(role, frame) for role, those in frames.items() for frame in those])
    cluster.check_alive()


@attack("secret", "a controller that cancels, ends or feeds another's job")
def jobs_of_others(bench: Bench) -> None:
    """A job's number is its connection's own: what another controller says of it, it says of its own jobs alone.

    Nor does it close another's context on the nodes by its end, though it should have learnt which it is, and has
    declared a job in it.
    """
    cluster = bench.cluster()
    context = os.urandom(16).hex()
    with cluster.join(b"N", 2) as node, cluster.join() as owner:
        declare(owner, 2, context=context)
        number, chunks = take(node, 2)
        for kind, those in (("CANCEL", [Chunk(0), Chunk(1)]), ("END", []), ("TASK", [Chunk(2, letter=b"slipped in")])):
            for job_number in (1, number):
                with cluster.join() as intruder:
                    intruder.send(kind, chunks=those, job=job_number)
                    intruder.send("STATUS")
                    assert intruder.wait_for("STATUS", "ERROR").kind == "ERROR", kind
                bench.count()
        for ends in (True, False):
            with cluster.join() as intruder:
                intruder.send("JOB", chunks=job(FUNCTION, context=context), job=1)
                if ends:
                    intruder.send("END", job=1)
                _sync(intruder)
            eventually(lambda: len(cluster.status()["jobs"]) == 1, "the end of the intruder's job")
            bench.count()
        for chunk in chunks:
            node.send("RESULT", chunks=[chunk._replace(letter=b"honest")], job=number)
        owner.send("TASK", chunks=[Chunk(2, 2, letter=b"chunk 2")], job=1)
        came = [node.read()]
        while came[-1].kind != "TASK":
            came.append(node.read())
        assert {frame.kind for frame in came} <= {"TASK", "PING"}, [frame.kind for frame in came]
        assert [chunk.letter for chunk in came[-1].chunks] == [b"chunk 2"]
        for chunk in came[-1].chunks:
            node.send("RESULT", chunks=[chunk._replace(letter=b"honest")], job=number)
        _answered(owner, 3)


@attack("secret", "a function under another's digest")
def function_of_another_digest(bench: Bench) -> None:
    """Nothing is found by a digest: the letter and the digest that came with it go to the nodes of its own job alone.

    There the worker sees that they do not match (`letters.py`). The job that has the good function keeps it.
    """
    cluster = bench.cluster()
    good, bad = b"the good function " * 100, b"an evil function! " * 100
    with cluster.join(b"N", 4) as node, cluster.join() as owner:
        owner.send("JOB", chunks=job(good), job=1)
        for letter in (bad, bad[:-1], bad + b"!", good[:-1] + b"!"):
            with cluster.join() as intruder:
                declaration, _ = job(good)
                forged = Chunk(1, letter=letter, digest=hashlib.sha256(good).digest())
                intruder.send("JOB", chunks=[declaration, forged], job=1)
                intruder.send("TASK", chunks=[Chunk(0, letter=b"x")], job=1)
                function = node.wait_for("JOB").chunks[1]
                assert (function.letter, function.digest) == (forged.letter, forged.digest)
                number, (chunk,) = take(node, 1)
                node.send("RESULT", chunks=[chunk._replace(status=4, letter=b"")], job=number)
                assert [chunk.status for chunk in intruder.wait_for("RESULT").chunks] == [4]
            bench.count()
        owner.send("TASK", chunks=[Chunk(0, letter=b"x")], job=1)
        function = node.wait_for("JOB").chunks[1]
        assert function.letter == good and function.digest == hashlib.sha256(good).digest()
        number, (chunk,) = take(node, 1)
        node.send("RESULT", chunks=[chunk._replace(letter=b"honest")], job=number)
        _answered(owner, 1)


@attack("secret", "a JOB whose declaration has fields missing, of another type, out of range, too long or deep")
def job_fields(bench: Bench) -> None:
    """Such a JOB is an ERROR and the end of the connection, and the server goes on."""
    cluster = bench.cluster()
    honest = {"context": os.urandom(16).hex(), "initializer": False}
    bad: list[object] = [
        *({name: value for name, value in honest.items() if name != left} for left in honest),
        *(honest | {"context": value} for value in ("", "0" * 31, "G" * 32, "A" * 32, "../" * 10 + "ab", 7, None)),
        *(honest | {"initializer": value} for value in (True, 1, "no", None, [])),
        *(honest | options for options in (
            {"timeout": 0}, {"timeout": -1}, {"timeout": "1"}, {"timeout": True}, {"maxtasksperchild": 0},
            {"maxtasksperchild": 2**32}, {"call": "eval"}, {"call": 1}, {"seed": 1}, {"seed": "x" * 64},
            {"seed": "0" * 63}, {"x": "\x1b[2J"}, {"\n": 1})),
        b"[" * 1000, b'{"a":' * 200, b"\xff\xfe", b"NaN", b'{"context":NaN}', b"null", b"[]", b"1", b'"x"', b"",
        honest | {"x": "x" * 1024},
    ]

    def work(declaration: object) -> None:
        letter = declaration if isinstance(declaration, bytes) else json.dumps(declaration).encode()
        with cluster.join() as link:
            link.send("JOB", chunks=[Chunk(0, letter=letter), Chunk(1, letter=FUNCTION)], job=1)
            link.send("STATUS")
            assert [f.kind for f in link.rest() if f.kind not in ("CLUSTER", "PING")] == ["ERROR"]

    bench.each(work, bad)
    cluster.check_alive()
