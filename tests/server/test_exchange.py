"""The server's dealings without sockets: frames of peers in, frames to peers out."""

import hashlib

import pytest

from achilles.errors import ProtocolError
from achilles.protocol import auth, frames
from achilles.protocol.frames import PACKED, Frame, Kind, Rows, Status
from achilles.server.exchange import Exchange, Peer

CONTEXT, OTHER_CONTEXT = "0c" * 16, "0d" * 16
FUNCTION = b"a function"
LONG_FUNCTION = b"x" * 2000


def digest_of(letter):
    return hashlib.sha256(letter).digest()


class FakeChannel:
    """An outbox that keeps what it was told, in the order in which it would leave."""

    def __init__(self):
        self.name = ""
        self.said = []
        self.dropped = []
        self.finished = False

    def push(self):
        pass

    def send(self, kind, body, wake=True):
        if not self.finished:
            frames.decode(kind, len(body) if isinstance(body, Rows) else 0, frames.encode(kind, body)[1])
            self.said.append((kind, body))

    send_ahead = send

    def drop_tasks(self, job):
        self.dropped.append(job)

    def finish(self, reason=None):
        if reason and not self.finished:
            self.send(Kind.BYE, {"reason": reason})
        self.finished = True

    def take(self):
        """What was said since this was asked last."""
        said, self.said = self.said, []
        return said


class Cluster:
    """An Exchange, and its peers as a test sees them."""

    def __init__(self):
        self.kills = []
        self.exchange = Exchange("1.0.0", kill=lambda: self.kills.append(True))

    def enter(self, role, most=100, user="ann"):
        peer = Peer(FakeChannel(), role, user, "127.0.0.1")
        self.exchange.enter(peer, most)
        return peer

    def join(self, role, python="3.11", **about):
        peer = self.enter(role)
        self.say(peer, Kind.HELLO, {"python": python, "version": "1.0.0", "letter_limit": 1 << 30} | about)
        return peer

    def node(self, cpu_count=2, python="3.11", **about):
        return self.join(auth.NODE, python, cpu_count=cpu_count, **about)

    def controller(self, python="3.11"):
        return self.join(auth.CONTROLLER, python)

    def say(self, peer, kind, body):
        self.exchange.handle(peer, Frame(kind, body))

    def declare(self, peer, job=3, letter=FUNCTION, context=CONTEXT, initializer=None, **options):
        """FUNCTION and JOB, as a controller sends them."""
        for each in (letter, initializer):
            if each is not None:
                self.say(peer, Kind.FUNCTION, row(0, each, job=0))
        self.say(peer, Kind.JOB, {
            "job": job, "context": context, "function": digest_of(letter).hex(), "resumed": False, "options": options,
            "initializer": initializer and digest_of(initializer).hex(),
        })

    def tasks(self, peer, count, job=3, first=0, status=0):
        self.say(peer, Kind.TASK, frames.merge([row(first + n, b"args", job, status) for n in range(count)]))


def row(slice_, letter=b"", job=3, status=0, attempt=0, pace=0):
    return Rows.single(job, slice_, attempt, status, (letter,), digest_of(letter), pace)


def kinds(said):
    return [kind for kind, _ in said]


def of_kind(said, kind):
    return [body for each, body in said if each is kind]


def answer(cluster, node, tasks, letter=b"result"):
    """A node's RESULTs to TASKs it was sent."""
    for rows in tasks:
        for slice_, attempt in zip(rows.slices, rows.attempts):
            cluster.say(node, Kind.RESULT, row(slice_, letter, rows.job, Status.VALUES, attempt, pace=100))


@pytest.fixture
def cluster():
    return Cluster()


# Coming.


def test_the_first_frame_is_hello(cluster):
    for role in (auth.CONTROLLER, auth.NODE):
        peer = cluster.enter(role)
        for kind, body in [(Kind.PING, {}), (Kind.FUNCTION, row(0, FUNCTION, job=0)), (Kind.STATUS, {})]:
            with pytest.raises(ProtocolError, match="HELLO"):
                cluster.say(peer, kind, body)
        assert peer.channel.take() == [] and not peer.functions


def test_hello_comes_once(cluster):
    for peer in (cluster.node(), cluster.controller()):
        with pytest.raises(ProtocolError, match="second HELLO"):
            cluster.say(peer, Kind.HELLO, peer.hello)


def test_a_node_that_names_no_letter_limit_has_the_default(cluster):
    cluster.node(letter_limit=None)
    (body,) = of_kind(cluster.controller().channel.take(), Kind.CLUSTER)
    assert body["letter_limit"] == frames.LETTER_LIMIT_BYTES


@pytest.mark.parametrize("about", [{}, {"cpu_count": 0}])
def test_a_node_has_workers(cluster, about):
    with pytest.raises(ProtocolError, match="workers"):
        cluster.join(auth.NODE, **about)


def test_nodes_and_controllers_are_counted_apart(cluster):
    peers = [cluster.controller(), cluster.node(), cluster.node(), cluster.controller()]
    hellos = [of_kind(peer.channel.take(), Kind.HELLO)[0] for peer in peers]
    assert [(hello["client_id"], hello["connections"]) for hello in hellos] == [(0, 1), (0, 2), (1, 3), (1, 4)]
    cluster.exchange.leave(peers[1])
    late = of_kind(cluster.node().channel.take(), Kind.HELLO)[0]
    assert (late["client_id"], late["connections"]) == (2, 4)  # ids are never reused, connections are those of now


def test_who_finds_no_room_is_told_and_is_not_one_of_the_cluster(cluster):
    controller = cluster.controller()
    full = cluster.enter(auth.NODE, most=1)
    assert of_kind(full.channel.take(), Kind.ERROR)[0]["code"] == "full" and full.channel.finished
    with pytest.raises(ProtocolError, match="no room"):
        cluster.say(full, Kind.HELLO, {"python": "3.11", "version": "1", "letter_limit": 1 << 30, "cpu_count": 8})
    cluster.exchange.leave(full)
    assert kinds(controller.channel.take()) == [Kind.HELLO, Kind.CLUSTER]


def test_controllers_are_told_of_the_nodes_of_their_python(cluster):
    old, new = cluster.controller("3.11"), cluster.controller("3.12")
    first = of_kind(new.channel.take(), Kind.CLUSTER)
    assert first == [{"nodes": 0, "workers": 0, "largest": 0, "pythons": {}, "letter_limit": 1 << 30}]
    cluster.node(4, "3.12", letter_limit=1 << 20)
    small = cluster.node(1, "3.12")
    cluster.node(8, "3.11")
    last = {"nodes": 3, "pythons": {"3.11": 1, "3.12": 2}, "letter_limit": 1 << 20}
    assert of_kind(new.channel.take(), Kind.CLUSTER)[-1] == last | {"workers": 5, "largest": 4}
    assert of_kind(old.channel.take(), Kind.CLUSTER)[-1] == last | {"workers": 8, "largest": 8}
    cluster.exchange.leave(small)
    assert of_kind(new.channel.take(), Kind.CLUSTER)[-1]["workers"] == 4


def test_of_many_pythons_those_with_the_most_nodes_are_named(cluster):
    controller = cluster.controller("3.11")
    for n in range(frames.MAX_PYTHONS + 1):
        cluster.node(1, f"3.{n}")
    cluster.node(1, f"3.{frames.MAX_PYTHONS}")
    last = of_kind(controller.channel.take(), Kind.CLUSTER)[-1]
    assert len(last["pythons"]) == frames.MAX_PYTHONS and last["pythons"][f"3.{frames.MAX_PYTHONS}"] == 2
    assert last["nodes"] == frames.MAX_PYTHONS + 2


def test_a_free_threaded_build_is_another_python(cluster):
    """The faked HELLO of a node and a controller: neither works for the other's kind."""
    plain, free = cluster.controller("3.14"), cluster.controller("3.14t")
    node = cluster.node(2, "3.14t")
    assert of_kind(plain.channel.take(), Kind.CLUSTER)[-1]["workers"] == 0
    assert of_kind(free.channel.take(), Kind.CLUSTER)[-1] == {
        "nodes": 1, "workers": 2, "largest": 2, "pythons": {"3.14t": 1}, "letter_limit": 1 << 30}
    for controller in (plain, free):
        node.channel.take()
        cluster.declare(controller)
        cluster.tasks(controller, 2)
        assert (Kind.TASK in kinds(node.channel.take())) == (controller is free)


# A job.


def test_a_job_goes_to_a_node_and_its_answers_come_back(cluster):
    node = cluster.node(2)
    other, controller = cluster.controller(), cluster.controller()
    for peer in (node, other, controller):
        peer.channel.take()
    cluster.declare(controller, timeout=2.0)
    assert node.channel.take() == []
    cluster.tasks(controller, 2)
    said = node.channel.take()
    assert kinds(said) == [Kind.FUNCTION, Kind.JOB, Kind.TASK]
    function, job, tasks = (body for _, body in said)
    assert [bytes(part) for _, parts in function.letters() for part in parts] == [FUNCTION]
    assert job["function"] == digest_of(FUNCTION).hex() and job["options"] == {"timeout": 2.0}
    assert tasks.job == job["job"] and tasks.slices == (0, 1)
    assert [(kind, body.job, body.slices, body.attempts) for kind, body in controller.channel.take()] == [
        (Kind.PACKET, 3, (0,), (2,))]

    answer(cluster, node, [tasks], b"42")
    results = controller.channel.take()
    assert [(kind, body.job, body.slices, body.pace, body.shorts) for kind, body in results] == [
        (Kind.RESULT, 3, (0,), 100, b"42"), (Kind.RESULT, 3, (1,), 100, b"42")]
    cluster.say(controller, Kind.END, {"job": 3})
    assert node.channel.take() == [(Kind.END, {"job": tasks.job})]
    assert other.channel.take() == []


def test_packets_are_announced_before_their_slices_can_be_answered(cluster):
    controller = cluster.controller()
    cluster.declare(controller)
    cluster.tasks(controller, 3)
    controller.channel.take()
    node = cluster.node(2)
    assert kinds(controller.channel.take()) == [Kind.CLUSTER, Kind.PACKET]
    assert [len(rows) for rows in of_kind(node.channel.take(), Kind.TASK)] == [2]
    cluster.say(controller, Kind.FLUSH, {"job": 3, "upto": 3})
    assert [(body.slices, body.attempts) for body in of_kind(controller.channel.take(), Kind.PACKET)] == [((2,), (1,))]
    assert kinds(node.channel.take()) == [Kind.TASK]  # it knows the job by now


def test_two_controllers_may_use_the_same_number(cluster):
    node = cluster.node(8)
    ann, bob = cluster.controller(), cluster.controller()
    for peer in (ann, bob):
        cluster.declare(peer)
        cluster.tasks(peer, 1, status=PACKED)
    jobs = of_kind(node.channel.take(), Kind.TASK)
    assert len({rows.job for rows in jobs}) == 2
    for peer in (ann, bob):
        peer.channel.take()
    answer(cluster, node, jobs[1:], b"for bob")
    assert ann.channel.take() == []
    assert [(body.job, body.shorts) for body in of_kind(bob.channel.take(), Kind.RESULT)] == [(3, b"for bob")]


# Functions.


@pytest.mark.parametrize("letter", [FUNCTION, LONG_FUNCTION], ids=["short", "long"])
def test_a_node_is_sent_a_function_once(cluster, letter):
    node, controller = cluster.node(8), cluster.controller()
    for number in (3, 4):
        cluster.declare(controller, number, letter)
        cluster.tasks(controller, 1, number, status=PACKED)
    functions = of_kind(node.channel.take(), Kind.FUNCTION)
    assert [b"".join(parts) for rows in functions for _, parts in rows.letters()] == [letter]
    late = cluster.node(8)
    cluster.tasks(controller, 16, 4, first=1, status=PACKED)
    assert kinds(late.channel.take()).count(Kind.FUNCTION) == 1


def test_an_initializer_travels_like_a_function(cluster):
    node, controller = cluster.node(), cluster.controller()
    cluster.declare(controller, initializer=b"init")
    cluster.tasks(controller, 1, status=PACKED)
    functions = of_kind(node.channel.take(), Kind.FUNCTION)
    assert [rows.shorts for rows in functions] == [FUNCTION, b"init"]


def test_unused_functions_beyond_the_limit_are_forgotten_by_the_node(cluster):
    node, controller = cluster.node(), cluster.controller()
    node.sent._limit = 15
    for number, letter in ((3, FUNCTION), (4, b"another one")):
        cluster.declare(controller, number, letter)
        cluster.tasks(controller, 1, number, status=PACKED)
        answer(cluster, node, of_kind(node.channel.take(), Kind.TASK))
        cluster.say(controller, Kind.END, {"job": number})
    assert of_kind(node.channel.take(), Kind.FORGET) == [{"function": digest_of(FUNCTION).hex()}]


def test_a_function_under_anothers_digest_is_refused(cluster):
    controller = cluster.controller()
    rows = Rows.single(0, 0, 0, 0, (LONG_FUNCTION,), digest_of(FUNCTION))
    with pytest.raises(ProtocolError, match="digest"):
        cluster.say(controller, Kind.FUNCTION, rows)
    assert controller.functions == {}


@pytest.mark.parametrize("name", ["function", "initializer"])
def test_a_job_that_names_an_unknown_function_is_refused(cluster, name):
    controller = cluster.controller()
    cluster.declare(controller, 2)
    known = digest_of(FUNCTION).hex()
    body = {"job": 3, "context": CONTEXT, "function": known, "initializer": None, "resumed": False, "options": {}}
    with pytest.raises(ProtocolError, match="not sent"):
        cluster.say(controller, Kind.JOB, body | {name: "0" * 64})
    with pytest.raises(ProtocolError, match="not sent"):  # what another connection sent does not count
        cluster.say(cluster.controller(), Kind.JOB, body)


def test_a_forgotten_function_serves_the_jobs_that_named_it(cluster):
    controller = cluster.controller()
    cluster.declare(controller)
    cluster.say(controller, Kind.FORGET, {"function": digest_of(FUNCTION).hex()})
    cluster.say(controller, Kind.FORGET, {"function": digest_of(FUNCTION).hex()})
    cluster.tasks(controller, 1, status=PACKED)
    assert kinds(cluster.node().channel.take()) == [Kind.HELLO, Kind.FUNCTION, Kind.JOB, Kind.TASK]
    with pytest.raises(ProtocolError, match="not sent"):
        cluster.say(controller, Kind.JOB, {
            "job": 4, "context": CONTEXT, "function": digest_of(FUNCTION).hex(), "resumed": False, "options": {}})


# What is not one's own.


def test_a_controller_reaches_its_own_jobs_alone(cluster):
    node, ann, bob = cluster.node(), cluster.controller(), cluster.controller()
    cluster.declare(ann)
    cluster.tasks(ann, 1, status=PACKED)
    node.channel.take()
    for kind, body in [(Kind.TASK, row(1)), (Kind.FLUSH, {"job": 3, "upto": 9}), (Kind.END, {"job": 3})]:
        with pytest.raises(ProtocolError, match="job 3"):
            cluster.say(bob, kind, body)
    cluster.say(bob, Kind.CANCEL, {"job": 3})
    assert node.channel.take() == [] and node.channel.dropped == []


def test_a_job_number_is_declared_once(cluster):
    controller = cluster.controller()
    cluster.declare(controller)
    with pytest.raises(ProtocolError, match="already"):
        cluster.declare(controller)


def test_a_node_answers_only_what_it_holds(cluster):
    node, other, controller = cluster.node(1), cluster.node(1), cluster.controller()
    cluster.declare(controller)
    cluster.tasks(controller, 1, status=PACKED)
    held = of_kind(node.channel.take(), Kind.TASK)
    controller.channel.take()
    answer(cluster, other, held)  # not with this node
    cluster.say(node, Kind.RESULT, row(0, job=99))  # no such job
    cluster.say(node, Kind.RESULT, row(5, job=held[0].job))  # no such slice
    cluster.say(node, Kind.RESULT, row(0, job=held[0].job, attempt=1))  # no such attempt
    cluster.say(node, Kind.RETURNED, Rows(99, b""))
    assert controller.channel.take() == []
    answer(cluster, node, held * 2)
    assert kinds(controller.channel.take()) == [Kind.RESULT]


# Ends.


def test_cancel_drops_and_end_forgets(cluster):
    node, controller = cluster.node(1), cluster.controller()
    cluster.declare(controller)
    cluster.tasks(controller, 5, status=PACKED)
    held = of_kind(node.channel.take(), Kind.TASK)
    number = held[0].job
    cluster.say(controller, Kind.CANCEL, {"job": 3})
    assert node.channel.take() == [(Kind.CANCEL, {"job": number})] and node.channel.dropped == [number]
    controller.channel.take()
    cluster.tasks(controller, 1, first=5)
    answer(cluster, node, held)
    assert controller.channel.take() == [] == node.channel.take()
    cluster.say(controller, Kind.END, {"job": 3})
    assert node.channel.take() == [(Kind.END, {"job": number})]
    with pytest.raises(ProtocolError):
        cluster.tasks(controller, 1)


def test_a_cancel_may_be_ahead_of_its_job(cluster):
    node, controller = cluster.node(), cluster.controller()
    node.channel.take()
    cluster.say(controller, Kind.CANCEL, {"job": 3})
    cluster.declare(controller)
    cluster.tasks(controller, 2, status=PACKED)
    cluster.say(controller, Kind.END, {"job": 3})
    assert node.channel.take() == []
    assert controller.cancelled == set() and controller.jobs == {}


def test_a_context_is_closed_where_it_is_known(cluster):
    node, idle, controller = cluster.node(1), cluster.node(1), cluster.controller()
    cluster.declare(controller)
    cluster.tasks(controller, 1, status=PACKED)
    node.channel.take(), idle.channel.take()
    cluster.say(controller, Kind.CLOSE, {"context": OTHER_CONTEXT})
    cluster.say(controller, Kind.CLOSE, {"context": CONTEXT})
    cluster.say(controller, Kind.CLOSE, {"context": CONTEXT})
    assert node.channel.take() == [(Kind.CLOSE, {"context": CONTEXT})] and idle.channel.take() == []


@pytest.mark.parametrize("left", [False, True])
def test_a_context_that_another_connection_has_open_is_closed_with_the_last(cluster, left):
    """It is the same caller's, who came back before its old connection was missed, or an intruder's."""
    node, old, new = cluster.node(4), cluster.controller(), cluster.controller()
    for peer in (old, new):
        cluster.declare(peer)
        cluster.tasks(peer, 1, status=PACKED)
    node.channel.take()

    def close(peer):
        if left:
            cluster.exchange.leave(peer)
        else:
            cluster.say(peer, Kind.CLOSE, {"context": CONTEXT})
        return of_kind(node.channel.take(), Kind.CLOSE)

    assert close(old) == [] and len(cluster.exchange._jobs) == 2 - left
    assert close(new) == [{"context": CONTEXT}]


def test_a_lost_controllers_jobs_end_and_its_contexts_close(cluster):
    node, controller, other = cluster.node(4), cluster.controller(), cluster.controller()
    for number, context in ((3, CONTEXT), (4, OTHER_CONTEXT)):
        cluster.declare(controller, number, context=context)
        cluster.tasks(controller, 1, number, status=PACKED)
    cluster.declare(other, context="0e" * 16)
    cluster.tasks(other, 1, status=PACKED)
    given = {rows.job for rows in of_kind(node.channel.take(), Kind.TASK)}
    cluster.exchange.leave(controller)
    said = node.channel.take()
    ended = [body["job"] for body in of_kind(said, Kind.END)]
    assert len(ended) == 2 and set(ended) < given
    assert {body["context"] for body in of_kind(said, Kind.CLOSE)} == {CONTEXT, OTHER_CONTEXT}
    assert kinds(said).index(Kind.CLOSE) > kinds(said).index(Kind.END)
    assert controller.jobs == {} and len(cluster.exchange._jobs) == 1


def test_a_lost_nodes_slices_go_to_another(cluster):
    node, controller = cluster.node(2), cluster.controller()
    cluster.declare(controller)
    cluster.tasks(controller, 2, status=PACKED)
    assert of_kind(node.channel.take(), Kind.TASK)
    other = cluster.node(2)
    other.channel.take()
    cluster.exchange.leave(node)
    said = other.channel.take()
    assert kinds(said)[:2] == [Kind.FUNCTION, Kind.JOB]
    slices = [pair for rows in of_kind(said, Kind.TASK) for pair in zip(rows.slices, rows.attempts)]
    assert sorted(slices) == [(0, 1), (1, 1)]


def test_a_slice_that_ten_nodes_went_down_with_is_answered(cluster):
    controller = cluster.controller()
    cluster.declare(controller)
    cluster.tasks(controller, 1, status=PACKED)
    for _ in range(10):
        cluster.exchange.leave(cluster.node(1))
    (rows,) = of_kind(controller.channel.take(), Kind.RESULT)
    assert (rows.job, rows.slices, rows.statuses) == (3, (0,), (Status.DIED,))
    assert rows.shorts == b'{"position":-1,"phase":"node","lost":10}'


def test_a_node_that_says_bye_gets_nothing_more_and_is_not_counted(cluster):
    node, controller = cluster.node(2), cluster.controller()
    cluster.declare(controller)
    cluster.tasks(controller, 2, status=PACKED)
    held = of_kind(node.channel.take(), Kind.TASK)
    controller.channel.take()
    cluster.say(node, Kind.BYE, {"reason": "leaving"})
    assert of_kind(controller.channel.take(), Kind.CLUSTER)[-1]["workers"] == 0
    cluster.tasks(controller, 2, first=2, status=PACKED)
    assert node.channel.take() == []
    cluster.say(node, Kind.RETURNED, Rows(held[0].job, frames.ROW.pack(1, 0, 0, 0)))
    answer(cluster, node, [rows.cut(0, 1) for rows in held[:1]])
    assert kinds(controller.channel.take()) == [Kind.RESULT]
    slices = [n for rows in of_kind(cluster.node(4).channel.take(), Kind.TASK) for n in rows.slices]
    assert sorted(slices) == [1, 2, 3]


def test_an_idle_node_is_fed_from_a_full_one(cluster):
    node, controller = cluster.node(1), cluster.controller()
    cluster.declare(controller)
    cluster.tasks(controller, 2, status=PACKED)
    held = of_kind(node.channel.take(), Kind.TASK)
    idle = cluster.node(1)
    number = held[0].job
    assert of_kind(node.channel.take(), Kind.RECALL) == [{"job": number, "number": 1}]
    cluster.say(node, Kind.RETURNED, Rows(number, frames.ROW.pack(1, 0, 0, 0)))
    (rows,) = of_kind(idle.channel.take(), Kind.TASK)
    assert (rows.slices, rows.attempts) == ((1,), (0,))


# Status and the end.


def test_status_shows_nodes_and_jobs_without_peers(cluster):
    node, controller = cluster.node(2), cluster.controller()
    cluster.declare(controller)
    cluster.tasks(controller, 3, status=PACKED)
    answer(cluster, node, [of_kind(node.channel.take(), Kind.TASK)[0].cut(0, 1)])
    controller.channel.take()
    cluster.say(controller, Kind.STATUS, {})
    (status,) = of_kind(controller.channel.take(), Kind.STATUS)
    (shown,), (job,) = status["nodes"], status["jobs"]
    assert shown.keys() == {"id", "address", "python", "version", "cpu_count", "busy", "done", "since"}
    assert (shown["id"], shown["address"], shown["cpu_count"], shown["done"]) == (0, "127.0.0.1", 2, 1)
    assert job.keys() == {"id", "user", "queued", "running", "done"}
    assert (job["user"], job["queued"] + job["running"], job["done"]) == ("ann", 2, 1)
    assert status["server"].keys() == {"version", "uptime", "memory"}


@pytest.mark.parametrize(("user", "shown"), [("J\xf6rg", "J\xf6rg"), ("a\x1b[2J\n\u202e", r"'a\x1b[2J\n\u202e'")])
def test_status_shows_a_username_that_is_not_printable_escaped(cluster, user, shown):
    peer = cluster.enter(auth.CONTROLLER, user=user)
    cluster.say(peer, Kind.HELLO, {"python": "3.11", "version": "1.0.0"})
    cluster.declare(peer)
    cluster.say(peer, Kind.STATUS, {})
    (status,) = of_kind(peer.channel.take(), Kind.STATUS)
    assert [job["user"] for job in status["jobs"]] == [shown]


def test_kill_and_the_goodbye_after_it(cluster):
    node, controller = cluster.node(), cluster.controller()
    cluster.say(controller, Kind.KILL, {})
    assert cluster.kills == [True]
    assert set(cluster.exchange.say_goodbye("killed")) == {node, controller}
    for peer in (node, controller):
        assert peer.channel.take()[-1] == (Kind.BYE, {"reason": "killed"}) and peer.channel.finished
    for late in (cluster.node(), cluster.controller()):
        assert kinds(late.channel.take()) == [Kind.HELLO, Kind.BYE]
    cluster.exchange.leave(node)
    cluster.exchange.leave(controller)
