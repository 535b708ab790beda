"""Attacks from inside: who knows the secret, but does what its role may not.

Whoever has the secret can run code on nodes, so that these walls guard against mistakes and half-owned machines
rather than against thieves: a node that answers for others, or a controller that ends another's job, is refused.
They back "an answer counts from who holds the slice, once" and the table of kinds in PROTOCOL.md, section 5.
"""

from __future__ import annotations

import hashlib
import os

from . import raw
from .bench import KEY, USER_BYTES, Bench, Watched, attack, eventually
from .raw import Row
from .victims import FUNCTION, LONG, job

MAY = {
    b"C": {"HELLO", "BYE", "PING", "ERROR", "JOB", "FUNCTION", "FORGET", "TASK", "FLUSH", "CANCEL", "END", "CLOSE",
           "STATUS", "KILL"},
    b"N": {"HELLO", "BYE", "PING", "ERROR", "RESULT", "RETURNED"},
}
BODIES = {
    "CLUSTER": {"nodes": 9, "workers": 9, "largest": 9, "pythons": {"3.11": 9}, "letter_limit": 1 << 30},
    "FORGET": {"function": "0" * 64}, "FLUSH": {"job": 1, "upto": 9}, "RECALL": {"job": 1, "number": 1},
    "CANCEL": {"job": 1}, "END": {"job": 1}, "CLOSE": {"context": "0" * 32}, "JOB": job(1, FUNCTION),
}


def declare(caller: raw.Link, slices: int, number: int = 1, **options: object) -> None:
    caller.send("FUNCTION", rows=[Row(0, letter=FUNCTION)])
    caller.send("JOB", job(number, FUNCTION, **options))
    caller.send("TASK", rows=[Row(n, status=1, letter=b"slice %d" % n) for n in range(slices)], job=number)


def take(node: raw.Link, number: int) -> tuple[int, list[Row]]:
    """So many slices that a node is given, and the job's number there."""
    rows: list[Row] = []
    frame = None
    while len(rows) < number:
        frame = node.wait_for("TASK")
        rows += frame.rows
    assert frame is not None
    return frame.job, rows


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
    cases = [(role, kind) for role, may in MAY.items() for kind in [*raw.KINDS, 0, 20, 77, 255]
             if kind not in may]

    def work(case: tuple[bytes, str | int]) -> None:
        role, kind = case
        with cluster.join(role, 1) as link:
            rows = [Row(0, letter=b"x")] if kind in raw.WITH_ROWS else None
            link.send(kind, BODIES.get(str(kind), {}), rows, 1)
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
            rows = [Row(0, letter=b"x")] if kind in raw.WITH_ROWS else None
            link.send(kind, {"reason": "leaving", "code": "x", "message": "x"} | BODIES.get(kind, {}), rows, 1)
            assert [frame.kind for frame in link.rest()] == ["ERROR"], kind

    bench.each(work, [(role, kind) for role, may in MAY.items() for kind in sorted(may - {"HELLO"})])

    def twice(role: bytes) -> None:
        with cluster.join(role, 1) as link:
            link.send("HELLO", {"python": "3.11", "version": "1", "cpu_count": 1})
            assert link.wait_for("ERROR") and not [f for f in link.rest() if f.kind == "HELLO"]

    bench.each(twice, [b"C", b"N"])
    with raw.join(cluster.port, b"N", USER_BYTES, KEY) as link:
        link.send("HELLO", {"python": "3.11", "version": "1", "cpu_count": 0})
        assert [frame.kind for frame in link.rest()] == ["ERROR"]
    bench.count()
    cluster.check_alive()


@attack("node", "a node that answers another node's slice")
def answers_for_another_node(bench: Bench) -> None:
    """Who does not hold a slice is not heard: the caller gets the holder's answer, once, and no other."""
    cluster = bench.cluster()
    with cluster.join(b"N", 1) as one, cluster.join(b"N", 1) as two, cluster.join() as caller:
        declare(caller, 2)
        number, (mine,) = take(one, 1)
        number2, (other,) = take(two, 1)
        assert number == number2 and {mine.slice, other.slice} == {0, 1}
        for row in (mine, mine._replace(status=1), mine._replace(letter=LONG), mine._replace(attempt=1)):
            two.send("RESULT", rows=[row._replace(letter=b"forged")], job=number)
            two.send("RETURNED", rows=[Row(mine.slice)], job=number)
            bench.count(2)
        two.send("RESULT", rows=[other._replace(letter=b"honest")], job=number)
        _sync_node(cluster, two, 1)
        one.send("RESULT", rows=[mine._replace(letter=b"honest")], job=number)
        _answered(caller, 2)


def _answered(caller: raw.Link, slices: int) -> None:
    """The caller has an honest answer of each slice, and no other."""
    rows: list[Row] = []
    while len(rows) < slices:
        rows += caller.wait_for("RESULT").rows
    rows += [row for frame in _sync(caller) if frame.kind == "RESULT" for row in frame.rows]
    assert sorted((row.slice, row.letter) for row in rows) == [(n, b"honest") for n in range(slices)], rows


@attack("node", "a node that answers an old attempt, twice, or what it gave back")
def old_attempts(bench: Bench) -> None:
    """An answer counts for the attempt that its node holds: earlier, later and further ones are dropped."""
    cluster = bench.cluster()
    with cluster.join() as caller:
        with cluster.join(b"N", 1) as lost:
            declare(caller, 1)
            _, (first,) = take(lost, 1)
        with cluster.join(b"N", 1) as heir:
            number, (row,) = take(heir, 1)
            assert row.attempt == first.attempt + 1
            for attempt in (first.attempt, row.attempt + 1, 65535):
                heir.send("RESULT", rows=[row._replace(attempt=attempt, letter=b"forged")], job=number)
                bench.count()
            heir.send("RESULT", rows=[row._replace(letter=b"honest")], job=number)
            for letter in (b"forged", LONG):
                heir.send("RESULT", rows=[row._replace(letter=letter)], job=number)
                bench.count()
            caller.send("TASK", rows=[Row(1, status=1, letter=b"slice 1")], job=1)
            number, (row,) = take(heir, 1)
            heir.send("RESULT", rows=[row._replace(letter=b"honest")], job=number)  # the server has read all before it
            _answered(caller, 2)
    with cluster.join(b"N", 1) as giver, cluster.join() as caller:
        declare(caller, 1)
        number, (row,) = take(giver, 1)
        giver.send("BYE", {"reason": "leaving"})
        giver.send("RETURNED", b"", [], 0)
        table = raw.encode("RETURNED", rows=[Row(row.slice)], job=number)
        giver.sock.sendall(raw.tag(giver.keys.data[raw.UP], giver.sequence[raw.UP], table).raw)
        giver.sequence[raw.UP] += 1
        giver.send("RESULT", rows=[row._replace(letter=b"forged")], job=number)
        bench.count()
        with cluster.join(b"N", 1) as heir:
            number, (row,) = take(heir, 1)
            heir.send("RESULT", rows=[row._replace(letter=b"honest")], job=number)
            _answered(caller, 1)


@attack("node", "a node that answers an unknown job, an ended one, a slice that does not exist")
def unknown_jobs(bench: Bench) -> None:
    """Nothing comes of it: no caller hears, and nobody's job is touched."""
    cluster = bench.cluster()
    with cluster.join(b"N", 1) as node, cluster.join() as caller:
        declare(caller, 1)
        number, (row,) = take(node, 1)
        for other in (0, number + 1, number + 2, 2**32 - 1):
            node.send("RESULT", rows=[row._replace(letter=b"forged")], job=other)
            node.send("RETURNED", rows=[Row(0)], job=other)
            bench.count(2)
        for other in (1, 2, 2**32, 2**64 - 1):
            node.send("RESULT", rows=[row._replace(slice=other, letter=b"forged")], job=number)
            node.send("RETURNED", rows=[Row(other)], job=number)
            bench.count(2)
        node.send("RESULT", rows=[row._replace(letter=b"honest")], job=number)
        _answered(caller, 1)
        caller.send("END", {"job": 1})
        _sync(caller)
        node.send("RESULT", rows=[row._replace(letter=b"forged")], job=number)
        declare(caller, 1, number=2)
        number, (row,) = take(node, 1)
        node.send("RESULT", rows=[row._replace(letter=b"honest")], job=number)  # the server has read all before it
        assert [row.letter for row in caller.wait_for("RESULT").rows] == [b"honest"]
        bench.count()
    cluster.check_alive()


@attack("secret", "a controller that cancels, ends, feeds or closes another's job")
def jobs_of_others(bench: Bench) -> None:
    """A job's number is its connection's own: what another controller says of it, it says of its own jobs alone.

    Nor does it close another's context on the nodes, though it should have learnt which it is, and has declared a job
    in it: neither by CLOSE nor by its end.
    """
    cluster = bench.cluster()
    context = os.urandom(16).hex()
    with cluster.join(b"N", 1) as node, cluster.join() as owner:
        declare(owner, 2, context=context)
        number, rows = take(node, 2)
        words = [("CANCEL", {"job": n}) for n in (1, number)] + [("END", {"job": n}) for n in (1, number)]
        words += [("FLUSH", {"job": 1, "upto": 9}), ("CLOSE", {"context": context})]
        for kind, body in words:
            with cluster.join() as intruder:
                intruder.send(kind, body)
                intruder.send("STATUS")
                answer = intruder.wait_for("STATUS", "ERROR").kind
                assert answer == ("ERROR" if kind in ("END", "FLUSH") else "STATUS"), (kind, answer)
            bench.count()
        for closes in (True, False):
            with cluster.join() as intruder:
                intruder.send("FUNCTION", rows=[Row(0, letter=FUNCTION)])
                intruder.send("JOB", job(1, FUNCTION, context=context))
                if closes:
                    intruder.send("CLOSE", {"context": context})
                _sync(intruder)
            eventually(lambda: len(cluster.status()["jobs"]) == 1, "the end of the intruder's job")
            bench.count()
        with cluster.join() as intruder:
            intruder.send("TASK", rows=[Row(2, status=1, letter=b"slipped in")], job=1)
            assert intruder.wait_for("ERROR")
            bench.count()
        owner.send("TASK", rows=[Row(2, status=1, letter=b"slice 2")], job=1)
        for row in rows:
            node.send("RESULT", rows=[row._replace(status=0, letter=b"honest")], job=number)
        came = [node.read()]
        while came[-1].kind != "TASK":
            came.append(node.read())
        assert {frame.kind for frame in came} <= {"TASK", "PING"}, [frame.kind for frame in came]
        assert [row.letter for row in came[-1].rows] == [b"slice 2"]
        for row in came[-1].rows:
            node.send("RESULT", rows=[row._replace(status=0, letter=b"honest")], job=number)
        _answered(owner, 3)


@attack("secret", "a function uploaded under another's digest")
def function_of_another_name(bench: Bench) -> None:
    """Who keeps it hashes it: the connection ends, and the name still means what it did. Backs PROTOCOL.md, 4.

    Nor can a controller name a function that another one has sent.
    """
    cluster = bench.cluster()
    good, bad = b"the good function " * 100, b"an evil function! " * 100
    with cluster.join(b"N", 1) as node, cluster.join() as owner:
        for letter in (bad, bad[:-1], bad + b"!", good[:-1] + b"!"):
            with cluster.join() as intruder:
                intruder.send("FUNCTION", rows=[Row(0, letter=letter, digest=hashlib.sha256(good).digest())])
                intruder.send("JOB", job(1, good))
                intruder.send("TASK", rows=[Row(0, status=1, letter=b"x")], job=1)
                assert [f.kind for f in intruder.rest() if f.kind not in ("CLUSTER", "PING")] == ["ERROR"]
            bench.count()
        owner.send("FUNCTION", rows=[Row(0, letter=good)])
        _sync(owner)
        with cluster.join() as intruder:
            intruder.send("JOB", job(1, good))
            assert intruder.wait_for("ERROR")
            bench.count()
        owner.send("JOB", job(1, good))
        owner.send("TASK", rows=[Row(0, status=1, letter=b"x")], job=1)
        functions = []
        while (frame := node.read()).kind != "TASK":
            functions += [row.letter for row in frame.rows] if frame.kind == "FUNCTION" else []
        assert functions == [good], functions
        node.send("RESULT", rows=[frame.rows[0]._replace(status=0, letter=b"honest")], job=frame.job)
        _answered(owner, 1)


@attack("secret", "a JOB with fields that are missing, of another type, out of range, too long or deep")
def job_fields(bench: Bench) -> None:
    """Such a JOB is an ERROR and the end of the connection, and the server goes on."""
    cluster = bench.cluster()
    honest = job(1, FUNCTION)
    bad: list[object] = [
        *({name: value for name, value in honest.items() if name != left} for left in
          ("job", "context", "function", "resumed", "options")),
        *(honest | {"job": value} for value in (-1, 2**32, 1.5, "1", True, None, [])),
        *(honest | {"context": value} for value in ("", "0" * 31, "G" * 32, "A" * 32, 7)),
        *(honest | {"function": value} for value in ("0" * 64, "../" * 20 + "abcd", "F" * 64)),
        *(honest | {"options": value} for value in (
            [], {"timeout": 0}, {"timeout": -1}, {"timeout": "1"}, {"processes": 0}, {"maxtasksperchild": 0},
            {"call": "eval"}, {"seed": "x"}, {"x": [1]}, {"x": {"y": 1}})),
        b"[" * 20_000, b'{"a":' * 5000, b"\xff\xfe", b"NaN", b'{"job":NaN}', b"null", b"[]", b"1", b'"x"', b"",
        honest | {"x": "x" * (64 << 10)},
    ]

    def work(body: object) -> None:
        with cluster.join() as link:
            link.send("FUNCTION", rows=[Row(0, letter=FUNCTION)])
            link.send("JOB", body)
            link.send("STATUS")
            assert [f.kind for f in link.rest() if f.kind not in ("CLUSTER", "PING")] == ["ERROR"]

    bench.each(work, bad)
    cluster.check_alive()
