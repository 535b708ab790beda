"""The server's dealings without sockets: frames of peers in, frames to peers out."""

import hashlib
import hmac
import json
import logging
import threading
import time
import types

import pytest

from achilles.errors import ProtocolError
from achilles.protocol import auth, frames
from achilles.protocol.frames import MORE, TELL, Batch, Frame, Gone, Kind, LongLetter, Status
from achilles.protocol.kinds import MAX_PYTHONS, SERVER_FIELDS
from achilles.server import exchange
from achilles.server.exchange import Exchange, Peer

CONTEXT, OTHER_CONTEXT, SET = "0c" * 16, "0d" * 16, "0e" * 16
FUNCTION = b"a function"
LONG_FUNCTION = b"x" * 2000
INITIALIZER = b"an initializer"
DEADLINE_SECONDS = 10.0


class FakeChannel:
    """An outbox that keeps what it was told, in the order in which it would leave."""

    def __init__(self):
        self.name = ""
        self.said = []
        self.finished = False
        self.pushed = 0  # frames that would have left
        self.waiting = 0  # frames, as a test says
        self.gate = threading.Event()  # `send` waits for it
        self.gate.set()

    def push(self):
        self.pushed = len(self.said)

    def send(self, kind, body, *, wake=True):
        assert self.gate.wait(DEADLINE_SECONDS)
        if not self.finished:
            flags = body.flags if isinstance(body, Batch) else 0
            frames.decode(kind, flags, frames.encode(kind, body)[0][frames.HEAD.size :], SERVER_FIELDS)
            self.said.append((kind, body))

    def finish(self, reason=None):
        self.finished = True

    def take(self):
        """What was said since this was asked last."""
        said, self.said = self.said, []
        return said


class Cluster:
    """An Exchange, and its peers as a test sees them."""

    def __init__(self):
        self.kills = []
        self.exchange = Exchange(kill=lambda: self.kills.append(True))
        self.attempts = iter(range(1, 10**6))
        self.now = 1e9

    def enter(self, role, most=100, user="ann"):
        peer = Peer(FakeChannel(), role, user, "127.0.0.1")
        self.exchange.enter(peer, most)
        return peer

    def join(self, role, python="3.11", **about):
        peer = self.enter(role)
        self.say(peer, Kind.HELLO, {"python": python, "version": "1.0.0"} | about)
        return peer

    def node(self, cpu_count=2, python="3.11", **about):
        return self.join(auth.NODE, python, cpu_count=cpu_count, **about)

    def controller(self, python="3.11"):
        return self.join(auth.CONTROLLER, python)

    def say(self, peer, kind, body):
        self.exchange.handle(peer, Frame(kind, body))
        self.exchange.push()

    def tick(self):
        """A second goes by."""
        self.now += 1
        self.exchange.tick(self.now)

    def declare(
        self, peer, job=3, letter=FUNCTION, context=CONTEXT, initializer=None, has_initializer=None,
        set_of_sources=b"", **options,
    ):
        """A JOB as it is read from a controller."""
        has = bool(initializer) if has_initializer is None else has_initializer
        declaration = json.dumps({"context": context, "initializer": has} | options).encode()
        if len(letter) > frames.SHORT_LETTER_BYTES:
            letter = LongLetter((letter,), hashlib.sha256(letter).digest(), len(letter))
        batch = Batch.pack(job, 0, [declaration, letter, initializer or b"", set_of_sources])
        longs, batch.longs = batch.longs, []
        batch = frames.decode(Kind.JOB, 0, frames.encode(Kind.JOB, batch)[0][frames.HEAD.size :])
        batch.longs = longs
        self.say(peer, Kind.JOB, batch)

    def task(self, peer, count=1, job=3, first=0, flags=0, number=0):
        batch = Batch.pack(job, first, [b"args"] * count, attempt=next(self.attempts), number=number, flags=flags)
        self.say(peer, Kind.TASK, batch)
        return batch


def kinds(said):
    return [kind for kind, _ in said]


def of_kind(said, kind):
    return [body for each, body in said if each is kind]


def answer(cluster, node, *tasks, letter=b"result"):
    """A node's RESULTs to TASKs it was sent."""
    for task in tasks:
        statuses = bytes([Status.VALUES]) * task.count
        cluster.say(node, Kind.RESULT, Batch.pack(
            task.job, task.first, [letter] * task.count, attempt=task.attempt, number=100, statuses=statuses))


def returned(task, reason=Gone.RETURNED):
    return Batch(task.job, task.first, task.count, task.attempt, flags=reason)


def range_of(batch):
    return batch.job, batch.first, batch.count, batch.attempt


@pytest.fixture
def cluster():
    return Cluster()


# Coming.


def test_the_first_frame_is_hello(cluster):
    for role in (auth.CONTROLLER, auth.NODE):
        peer = cluster.enter(role)
        for kind, body in [(Kind.PING, {}), (Kind.CANCEL, Batch(0)), (Kind.STATUS, {})]:
            with pytest.raises(ProtocolError, match="HELLO"):
                cluster.say(peer, kind, body)
        assert peer.channel.take() == []


def test_hello_comes_once(cluster):
    for peer in (cluster.node(), cluster.controller()):
        with pytest.raises(ProtocolError, match="second HELLO"):
            cluster.say(peer, Kind.HELLO, peer.hello)


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


def test_a_client_that_finds_no_room_is_told_and_is_not_one_of_the_cluster(cluster):
    controller = cluster.controller()
    full = cluster.enter(auth.NODE, most=1)
    assert of_kind(full.channel.take(), Kind.ERROR)[0]["code"] == "full" and full.channel.finished
    with pytest.raises(ProtocolError, match="no room"):
        cluster.say(full, Kind.HELLO, {"python": "3.11", "version": "1", "cpu_count": 8})
    cluster.exchange.leave(full)
    cluster.tick()
    assert kinds(controller.channel.take()) == [Kind.HELLO, Kind.CLUSTER]


def test_controllers_are_told_of_the_nodes_of_their_python(cluster):
    old, new = cluster.controller("3.11"), cluster.controller("3.12")
    first = of_kind(new.channel.take(), Kind.CLUSTER)
    assert first == [{"nodes": 0, "workers": 0, "largest": 0, "pythons": {}}]
    cluster.node(4, "3.12")
    small = cluster.node(1, "3.12")
    cluster.node(8, "3.11")
    cluster.tick()
    last = {"nodes": 3, "pythons": {"3.11": 1, "3.12": 2}}
    assert of_kind(new.channel.take(), Kind.CLUSTER)[-1] == last | {"workers": 5, "largest": 4}
    assert of_kind(old.channel.take(), Kind.CLUSTER)[-1] == last | {"workers": 8, "largest": 8}
    cluster.exchange.leave(small)
    cluster.tick()
    assert of_kind(new.channel.take(), Kind.CLUSTER)[-1]["workers"] == 4


def test_the_first_node_is_announced_at_once_and_a_crowd_once(cluster):
    controller = cluster.controller()
    controller.channel.take()
    cluster.node(1)
    assert of_kind(controller.channel.take(), Kind.CLUSTER)[0]["nodes"] == 1
    cluster.exchange._announce_after = float("inf")  # however slow this machine is
    nodes = [cluster.node(1) for _ in range(50)]
    cluster.exchange.leave(nodes[0])
    cluster.say(nodes[1], Kind.BYE, {"reason": "leaving"})
    assert controller.channel.take() == []
    cluster.exchange._announce_after = 0.0
    cluster.tick()
    assert [body["nodes"] for body in of_kind(controller.channel.take(), Kind.CLUSTER)] == [49]
    cluster.tick()
    assert controller.channel.take() == []


def test_a_crowd_that_comes_and_goes_costs_controllers_and_nodes_once(cluster, monkeypatch):
    """Of 40 nodes and 40 controllers, not 1,600 steps under the lock."""
    steps = []

    class Peers(set):
        def __iter__(self):
            steps.append("peers")
            return super().__iter__()

    class Nodes(dict):
        def values(self):
            steps.append("nodes")
            return super().values()

        __iter__ = keys = items = values

    exchange, scheduler = cluster.exchange, cluster.exchange._scheduler
    count = scheduler.cluster
    monkeypatch.setattr(scheduler, "cluster", lambda python: steps.append("count") or count(python))
    for _ in range(40):
        cluster.controller()
    exchange._peers, exchange._nodes, scheduler.nodes = Peers(exchange._peers), Nodes(), Nodes()
    exchange._announce_after, steps[:] = float("inf"), []
    nodes = [cluster.node(1) for _ in range(40)]
    for node in nodes[:20]:
        cluster.say(node, Kind.BYE, {"reason": "leaving"})
    for node in nodes:
        exchange.leave(node)
    assert steps == []
    exchange._announce_after = 0.0
    cluster.tick()
    assert sorted(steps) == ["count", "nodes", "peers"]


def test_of_many_pythons_those_with_the_most_nodes_are_named(cluster):
    controller = cluster.controller("3.11")
    for n in range(MAX_PYTHONS + 1):
        cluster.node(1, f"3.{n}")
    cluster.node(1, f"3.{MAX_PYTHONS}")
    cluster.tick()
    last = of_kind(controller.channel.take(), Kind.CLUSTER)[-1]
    assert len(last["pythons"]) == MAX_PYTHONS and last["pythons"][f"3.{MAX_PYTHONS}"] == 2
    assert last["nodes"] == MAX_PYTHONS + 2


def test_a_free_threaded_build_is_another_python(cluster):
    """The faked HELLO of a node and a controller: neither works for the other's kind."""
    plain, free = cluster.controller("3.14"), cluster.controller("3.14t")
    node = cluster.node(2, "3.14t")
    assert of_kind(plain.channel.take(), Kind.CLUSTER)[-1]["workers"] == 0
    assert of_kind(free.channel.take(), Kind.CLUSTER)[-1] == {
        "nodes": 1, "workers": 2, "largest": 2, "pythons": {"3.14t": 1}}
    for controller in (plain, free):
        node.channel.take()
        cluster.declare(controller)
        cluster.task(controller)
        assert (Kind.TASK in kinds(node.channel.take())) == (controller is free)


# A job.


def test_a_job_goes_to_a_node_and_its_answers_come_back(cluster):
    node = cluster.node(2)
    other, controller = cluster.controller(), cluster.controller()
    for peer in (node, other, controller):
        peer.channel.take()
    cluster.declare(controller, timeout=2.0)
    assert node.channel.take() == []
    sent = cluster.task(controller, 2, number=77, flags=frames.CAREFUL)
    said = node.channel.take()
    assert kinds(said) == [Kind.JOB, Kind.TASK]
    job, task = (body for _, body in said)
    declaration, function, *nothing = job.letters()
    assert json.loads(declaration) == {"context": CONTEXT, "initializer": False, "timeout": 2.0}
    assert function == FUNCTION and not any(nothing) and task.job == job.job
    assert (task.first, task.count, task.attempt, task.number, task.flags) == (0, 2, sent.attempt, 77, frames.CAREFUL)
    assert task.letters() == [b"args", b"args"]
    assert controller.channel.take() == []

    answer(cluster, node, task, letter=b"42")
    (kind, result), = controller.channel.take()
    assert kind is Kind.RESULT and range_of(result) == range_of(sent)
    assert (result.number, result.letters(), result.statuses) == (100, [b"42", b"42"], bytes(2))
    cluster.say(controller, Kind.END, Batch(3))
    (kind, end), = node.channel.take()
    assert kind is Kind.END and range_of(end) == (task.job, 0, 0, 0)
    assert other.channel.take() == []


def test_given_is_said_before_the_batch_can_be_answered(cluster):
    controller = cluster.controller()
    cluster.declare(controller)
    tell, plain = cluster.task(controller, 3, flags=TELL), cluster.task(controller, 3, first=3)
    controller.channel.take()
    node = cluster.node(2)
    said = [(kind, body) for kind, body in cluster_free(controller.channel.take())]
    assert kinds(said) == [Kind.GIVEN] and range_of(said[0][1]) == range_of(tell) and said[0][1].number == 2
    assert [body.first for body in of_kind(node.channel.take(), Kind.TASK)] == [0, plain.first]


def cluster_free(said):
    """All but CLUSTER."""
    return [(kind, body) for kind, body in said if kind is not Kind.CLUSTER]


def test_two_controllers_may_use_the_same_number(cluster):
    node = cluster.node(8)
    ann, bob = cluster.controller(), cluster.controller()
    for peer in (ann, bob):
        cluster.declare(peer)
        cluster.task(peer)
    jobs = of_kind(node.channel.take(), Kind.TASK)
    assert len({batch.job for batch in jobs}) == 2
    for peer in (ann, bob):
        peer.channel.take()
    answer(cluster, node, jobs[1], letter=b"for bob")
    assert ann.channel.take() == []
    assert [(body.job, body.letters()) for body in of_kind(bob.channel.take(), Kind.RESULT)] == [(3, [b"for bob"])]


@pytest.mark.parametrize("letter", [FUNCTION, LONG_FUNCTION], ids=["short", "long"])
def test_each_node_is_told_of_a_job_once(cluster, letter):
    node, controller = cluster.node(1), cluster.controller()
    cluster.declare(controller, letter=letter)
    cluster.task(controller, number=100)
    cluster.task(controller, first=1, number=100)
    said = node.channel.take()
    assert kinds(said) == [Kind.HELLO, Kind.JOB, Kind.TASK, Kind.TASK]
    assert bytes(frames.joined(said[1][1].letters()[1])) == letter
    late = cluster.node(1)
    cluster.task(controller, first=2)
    assert kinds(late.channel.take()) == [Kind.HELLO, Kind.JOB, Kind.TASK]


def test_an_initializer_goes_to_each_node_once_for_its_context(cluster):
    node, controller = cluster.node(8), cluster.controller()
    cluster.declare(controller, 3, initializer=INITIALIZER)
    cluster.declare(controller, 4, has_initializer=True)  # the connection has had it
    cluster.declare(controller, 5, context=OTHER_CONTEXT)
    for job in (4, 3, 5):
        cluster.task(controller, job=job)
    jobs = of_kind(node.channel.take(), Kind.JOB)
    assert [job.letters()[1:] for job in jobs] == [
        [FUNCTION, INITIALIZER], [FUNCTION, b""], [FUNCTION, b""]]
    late = cluster.node(8)
    cluster.task(controller, job=3, first=1)
    for _ in range(9):
        cluster.task(controller, job=3, first=2)
    assert [job.letters()[2] for job in of_kind(late.channel.take(), Kind.JOB)] == [INITIALIZER]


def test_an_initializer_that_was_not_sent_on_this_connection_is_refused(cluster):
    other, controller = cluster.controller(), cluster.controller()
    cluster.declare(other, initializer=INITIALIZER)
    with pytest.raises(ProtocolError, match="initializer"):
        cluster.declare(controller, has_initializer=True)
    with pytest.raises(ProtocolError, match="initializer"):
        cluster.declare(other, 4)  # this context has one
    assert controller.jobs == {} and controller.contexts == {}


def test_sources_go_to_each_node_once_for_their_name_and_are_closed_with_the_last_connection(cluster):
    node, controller, other = cluster.node(8), cluster.controller(), cluster.controller()
    cluster.declare(controller, 3, sources=SET, set_of_sources=b"modules")
    cluster.declare(controller, 4, context=OTHER_CONTEXT, sources=SET)  # the connection has had them
    cluster.declare(other, 3, sources=SET, set_of_sources=b"modules")
    for peer, job in ((controller, 4), (controller, 3), (other, 3)):
        cluster.task(peer, job=job)
    jobs = of_kind(node.channel.take(), Kind.JOB)
    assert [job.letters()[1:] for job in jobs] == [
        [FUNCTION, b"", b"modules"], [FUNCTION, b"", b""], [FUNCTION, b"", b""]]
    assert [json.loads(job.letters()[0])["sources"] for job in jobs] == [SET] * 3
    cluster.exchange.leave(controller)
    assert {"context": SET} not in [body for _, body in node.channel.take()]
    cluster.exchange.leave(other)
    assert {"context": SET} in [body for _, body in node.channel.take()]


def test_sources_that_were_not_sent_on_this_connection_are_refused(cluster):
    with pytest.raises(ProtocolError, match="no sources"):
        cluster.declare(cluster.controller(), sources=SET)


# What is not one's own.


def test_a_controller_reaches_its_own_jobs_alone(cluster):
    node, ann, bob = cluster.node(), cluster.controller(), cluster.controller()
    cluster.declare(ann)
    cluster.task(ann)
    node.channel.take()
    for kind in (Kind.TASK, Kind.CANCEL, Kind.END):
        with pytest.raises(ProtocolError, match="job 3"):
            cluster.say(bob, kind, Batch.pack(3, 0, [b"args"], attempt=9))
    assert node.channel.take() == []


def test_a_job_number_is_declared_once(cluster):
    controller = cluster.controller()
    cluster.declare(controller)
    with pytest.raises(ProtocolError, match="already"):
        cluster.declare(controller)


def test_a_chunk_beyond_the_numbers_of_workers_is_refused(cluster):
    controller, _ = cluster.controller(), cluster.node()
    cluster.declare(controller)
    cluster.task(controller, count=1, first=2**63 - 2)
    with pytest.raises(ProtocolError, match="beyond"):
        cluster.task(controller, count=1, first=2**63 - 1)


def test_an_attempt_is_out_once(cluster):
    controller = cluster.controller()
    cluster.declare(controller)
    batch = cluster.task(controller)
    with pytest.raises(ProtocolError, match="out already"):
        cluster.say(controller, Kind.TASK, batch)


def test_a_node_answers_only_what_it_holds(cluster):
    node, other, controller = cluster.node(1), cluster.node(1), cluster.controller()
    cluster.declare(controller)
    cluster.task(controller)
    held, = of_kind(node.channel.take(), Kind.TASK)
    controller.channel.take()
    answer(cluster, other, held)  # not with this node
    for job, first, attempt in [(99, 0, held.attempt), (held.job, 5, held.attempt), (held.job, 0, 77)]:
        answer(cluster, node, Batch(job, first, 1, attempt))
        cluster.say(node, Kind.RETURNED, Batch(job, first, 1, attempt))
    assert controller.channel.take() == []
    answer(cluster, node, held, held)
    cluster.say(node, Kind.RETURNED, returned(held))
    assert kinds(controller.channel.take()) == [Kind.RESULT]


# What comes back.


@pytest.mark.parametrize("reason", [Gone.RETURNED, Gone.LEFT, Gone.WAITED])
def test_what_a_node_returns_is_gone(cluster, reason):
    node, controller = cluster.node(2), cluster.controller()
    cluster.declare(controller)
    sent = cluster.task(controller, 3)
    held, = of_kind(node.channel.take(), Kind.TASK)
    controller.channel.take()
    cluster.say(node, Kind.RETURNED, Batch(held.job, 1, 2, held.attempt, flags=reason))
    (kind, gone), = controller.channel.take()
    assert kind is Kind.GONE and range_of(gone) == (3, 1, 2, sent.attempt)
    assert gone.flags == (Gone.RETURNED if reason is Gone.WAITED else reason)


def test_a_lost_nodes_batches_are_gone_and_nothing_is_sent_again(cluster):
    node, other, controller = cluster.node(1), cluster.node(8), cluster.controller()
    cluster.declare(controller)
    for first in range(10):
        cluster.task(controller, first=first, number=100)
    tasks = [of_kind(peer.channel.take(), Kind.TASK) for peer in (node, other)]
    assert [len(each) for each in tasks] == [1, 9] or [len(each) for each in tasks] == [2, 8]
    controller.channel.take()
    cluster.exchange.leave(node)
    gone = of_kind(controller.channel.take(), Kind.GONE)
    assert [(body.first, Gone(body.flags)) for body in gone] == [
        (task.first, reason) for task, reason in zip(tasks[0], [Gone.LOST, Gone.RETURNED])]
    assert other.channel.take() == []


def test_a_node_that_says_bye_gets_nothing_more_and_is_not_counted(cluster):
    node, controller = cluster.node(2), cluster.controller()
    cluster.declare(controller)
    cluster.task(controller)
    cluster.task(controller, first=1)
    answered, left = of_kind(node.channel.take(), Kind.TASK)
    controller.channel.take()
    cluster.say(node, Kind.BYE, {"reason": "leaving"})
    cluster.tick()
    assert of_kind(controller.channel.take(), Kind.CLUSTER)[-1]["workers"] == 0
    cluster.task(controller, first=2)
    assert node.channel.take() == []
    cluster.say(node, Kind.RETURNED, returned(left, Gone.LEFT))
    answer(cluster, node, answered)
    cluster.exchange.leave(node)
    assert kinds(controller.channel.take()) == [Kind.GONE, Kind.RESULT]
    assert [task.first for task in of_kind(cluster.node(4).channel.take(), Kind.TASK)] == [2]


def test_places_that_were_taken_away_come_back_with_time(cluster):
    node, controller = cluster.node(1), cluster.controller()
    cluster.declare(controller)
    for first in range(3):
        cluster.task(controller, first=first, number=100)
    cluster.say(node, Kind.RETURNED, returned(of_kind(node.channel.take(), Kind.TASK)[1], Gone.WAITED))
    assert node.channel.take() == []
    cluster.tick()
    assert [task.first for task in of_kind(node.channel.take(), Kind.TASK)] == [2]


# Ends.


def test_cancel_goes_to_nodes_and_back_for_what_waits(cluster):
    node, controller = cluster.node(1), cluster.controller()
    cluster.declare(controller)
    held, waiting = cluster.task(controller, 2), cluster.task(controller, 2, first=2)
    cluster.task(controller, 2, first=4)
    number = of_kind(node.channel.take(), Kind.TASK)[0].job
    controller.channel.take()
    cluster.say(controller, Kind.CANCEL, Batch(3, 1, 3))
    (kind, cancel), = node.channel.take()
    assert kind is Kind.CANCEL and range_of(cancel) == (number, 1, 3, 0)
    (kind, gone), = controller.channel.take()
    assert kind is Kind.GONE and range_of(gone) == range_of(waiting) and gone.flags == Gone.RETURNED
    cluster.say(node, Kind.RETURNED, Batch(number, 1, 1, held.attempt))
    answer(cluster, node, Batch(number, 0, 1, held.attempt))
    assert kinds(controller.channel.take()) == [Kind.GONE, Kind.RESULT]
    assert [task.first for task in of_kind(node.channel.take(), Kind.TASK)] == [4]


def test_end_forgets_the_job_and_its_node_keeps_its_place_until_it_has_answered(cluster):
    node, controller = cluster.node(1), cluster.controller()
    cluster.declare(controller)
    cluster.declare(controller, 4)
    cluster.task(controller, 2)
    cluster.task(controller, 2, first=2)
    cluster.task(controller, 1, job=4)
    held, = of_kind(node.channel.take(), Kind.TASK)
    controller.channel.take()
    cluster.say(controller, Kind.END, Batch(3))
    assert kinds(node.channel.take()) == [Kind.END]
    with pytest.raises(ProtocolError, match="job 3"):
        cluster.task(controller)
    answer(cluster, node, Batch(held.job, 0, 1, held.attempt))
    cluster.say(node, Kind.RETURNED, Batch(held.job, 1, 1, held.attempt))
    assert controller.channel.take() == []
    assert kinds(node.channel.take()) == [Kind.JOB, Kind.TASK]
    cluster.declare(controller)  # the number is free again


def test_a_context_that_another_connection_has_open_is_closed_with_the_last(cluster):
    """It is the same caller's, who came back before its old connection was missed, or an intruder's."""
    node, idle, old, new = cluster.node(4), cluster.node(4), cluster.controller(), cluster.controller()
    lost = cluster.node(4)
    for peer in (old, new):
        cluster.declare(peer)
    for number in range(3):
        cluster.task(new, first=number)
    cluster.exchange.leave(lost)
    for peer in (node, idle):
        peer.channel.take()
    late = cluster.node(4)
    cluster.exchange.leave(old)
    assert of_kind(node.channel.take(), Kind.CLOSE) == []
    cluster.exchange.leave(new)
    said = node.channel.take()
    assert kinds(said) == [Kind.END, Kind.CLOSE] and said[1][1] == {"context": CONTEXT}
    assert kinds(late.channel.take()) == [Kind.HELLO]
    assert cluster.exchange._contexts == {}


def test_a_lost_controllers_jobs_end_and_its_contexts_close(cluster):
    node, controller, other = cluster.node(4), cluster.controller(), cluster.controller()
    for number, context in ((3, CONTEXT), (4, OTHER_CONTEXT)):
        cluster.declare(controller, number, context=context)
        cluster.task(controller, job=number)
    cluster.declare(other, context="0e" * 16)
    cluster.task(other)
    given = {batch.job for batch in of_kind(node.channel.take(), Kind.TASK)}
    cluster.exchange.leave(controller)
    said = node.channel.take()
    ended = {body.job for body in of_kind(said, Kind.END)}
    assert len(ended) == 2 and ended < given
    assert {body["context"] for body in of_kind(said, Kind.CLOSE)} == {CONTEXT, OTHER_CONTEXT}
    assert kinds(said) == [Kind.END, Kind.END, Kind.CLOSE, Kind.CLOSE]
    assert controller.jobs == {} and len(cluster.exchange._jobs) == 1


# Order, and nobody waits.


def test_a_log_that_blocks_does_not_block_another_connections_frames(cluster):
    """A terminal in Ctrl-S: the connection whose coming is logged waits for it, and no other does."""
    node, controller = cluster.node(1), cluster.controller()
    cluster.declare(controller)
    blocked, open_again = threading.Event(), threading.Event()

    class Terminal(logging.Handler):
        def emit(self, record):
            blocked.set()
            open_again.wait(DEADLINE_SECONDS)

    log = logging.getLogger("achilles.server.exchange")
    terminal, level = Terminal(), log.level
    log.addHandler(terminal)
    log.setLevel(logging.INFO)
    late = cluster.enter(auth.NODE)
    hello = Frame(Kind.HELLO, {"python": "3.11", "version": "1.0.0", "cpu_count": 1})
    comer = threading.Thread(target=lambda: cluster.exchange.handle(late, hello), name="late node")
    try:
        comer.start()
        assert blocked.wait(DEADLINE_SECONDS)
        assert kinds(late.channel.said) == [Kind.HELLO]  # its own frames left before
        cluster.task(controller)
        task, = of_kind(node.channel.take(), Kind.TASK)
        answer(cluster, node, task)
        cluster.tick()
        assert of_kind(controller.channel.take(), Kind.RESULT) and comer.is_alive()
    finally:
        open_again.set()
        comer.join(DEADLINE_SECONDS)
        log.removeHandler(terminal)
        log.setLevel(level)
    assert not comer.is_alive()


def test_nothing_is_encoded_hashed_or_logged_under_the_lock(cluster, monkeypatch):
    """Whatever a peer says or sends, the others do not wait for that."""
    seen, lock = set(), cluster.exchange._lock

    def note(place, name):
        real = getattr(place, name)

        def call(*args, **options):
            assert not lock.locked(), f"{name} under the lock"
            seen.add(name)
            return real(*args, **options)

        monkeypatch.setattr(place, name, call)

    for place, name in ((frames, "encode"), (frames, "digest"), (json, "dumps"), (hashlib, "sha256"), (hmac, "digest"),
                        (hmac, "new"), (logging.Logger, "handle")):
        note(place, name)
    for name in ("exchange", "scheduler"):
        monkeypatch.setattr(logging.getLogger(f"achilles.server.{name}"), "level", logging.DEBUG)
    node, controller, other = cluster.node(2), cluster.controller(), cluster.controller()
    cluster.declare(controller, letter=LONG_FUNCTION, initializer=b"initializer")
    for first in range(6):
        cluster.task(controller, first=first, flags=TELL)
    first, second, *_ = of_kind(node.channel.take(), Kind.TASK)
    answer(cluster, node, first)
    cluster.say(node, Kind.RETURNED, returned(second, Gone.WAITED))
    cluster.say(controller, Kind.CANCEL, Batch(3, 0, 6))
    for kind in (Kind.STATUS, Kind.KILL):
        cluster.say(controller, kind, {})
    with pytest.raises(ProtocolError):
        cluster.task(other, job=99)
    cluster.say(node, Kind.BYE, {"reason": "leaving"})
    cluster.say(other, Kind.ERROR, {"code": "protocol", "message": "no"})
    cluster.say(controller, Kind.END, Batch(3))
    for peer in (node, controller):
        cluster.exchange.leave(peer)
    cluster.tick()
    cluster.exchange.say_goodbye("restart")
    assert {"encode", "dumps", "sha256", "handle"} <= seen


def test_frames_keep_the_order_of_events_whichever_thread_delivers_them(cluster):
    """A reader that finds another one delivering leaves its frames to it, and does not wait."""
    node, controller = cluster.node(1), cluster.controller()
    cluster.declare(controller)
    for number in range(20):
        cluster.task(controller, first=number)
    task, = of_kind(node.channel.take(), Kind.TASK)
    controller.channel.take()
    controller.channel.gate.clear()
    deliverer = threading.Thread(target=lambda: answer(cluster, node, task), name="deliverer")
    deliverer.start()
    try:
        while not cluster.exchange._delivering.locked():
            threading.Event().wait(0.001)
        for number in range(1, 20):
            batch = Batch(task.job, number, 1, task.attempt + number)
            answer(cluster, node, batch)
        assert controller.channel.said == []
    finally:
        controller.channel.gate.set()
        deliverer.join(DEADLINE_SECONDS)
    assert [body.first for body in of_kind(controller.channel.said, Kind.RESULT)] == list(range(20))
    assert [body.first for body in of_kind(node.channel.said, Kind.TASK)] == list(range(1, 20))
    assert controller.channel.pushed == len(controller.channel.said)


# Status and the end.


def test_status_shows_nodes_and_jobs(cluster):
    node, controller = cluster.node(2), cluster.controller()
    cluster.declare(controller)
    for first in range(3):
        cluster.task(controller, 5, first=5 * first)
    answer(cluster, node, Batch(of_kind(node.channel.take(), Kind.TASK)[0].job, 0, 2, 1))
    controller.channel.take()
    cluster.say(controller, Kind.STATUS, {})
    (status,) = of_kind(controller.channel.take(), Kind.STATUS)
    (shown,), (job,) = status["nodes"], status["jobs"]
    assert shown.pop("since") > 0
    assert shown == {"id": 0, "address": "127.0.0.1", "python": "3.11", "version": "1.0.0", "cpu_count": 2, "busy": 2,
                     "done": 2}
    assert job.pop("id") >= 0 and job == {
        "user": "ann", "queued": 5, "running": 8, "done": 2, "longest": 0, "node": None, "pid": None}
    assert status["server"].keys() == {"version", "uptime", "memory"}


def test_status_shows_the_longest_running_chunk_of_each_job_as_the_nodes_last_told(cluster, monkeypatch):
    clock = types.SimpleNamespace(now=time.monotonic() + 100)
    monkeypatch.setattr(exchange, "time", types.SimpleNamespace(monotonic=lambda: clock.now, time=time.time))
    first, second, controller = cluster.node(2), cluster.node(2), cluster.controller()
    for job in (3, 4, 5):
        cluster.declare(controller, job=job)

    def longest():
        cluster.say(controller, Kind.STATUS, {})
        (status,) = of_kind(controller.channel.take(), Kind.STATUS)
        jobs = sorted(status["jobs"], key=lambda job: job["id"])
        return [(job["longest"], job["node"], job["pid"]) for job in jobs]

    cluster.task(controller, job=3)
    cluster.task(controller, job=3)
    nothing = (0, None, None)
    assert longest() == [nothing] * 3
    ids = sorted(cluster.exchange._jobs)
    cluster.say(first, Kind.PING, {"chunks": [
        {"job": ids[0], "seconds": 2.04, "pid": 11}, {"job": ids[1], "seconds": 7, "pid": 12},
        {"job": 99, "seconds": 900, "pid": 13}]})
    clock.now += 3
    cluster.say(second, Kind.PING, {"chunks": [
        {"job": ids[0], "seconds": 9.6, "pid": 21}, {"job": ids[1], "seconds": 9.5, "pid": 22}]})
    clock.now += 10
    assert longest() == [(20, 1, 21), (20.0, 0, 12), nothing]
    cluster.say(second, Kind.PING, {"chunks": []})
    assert longest() == [(15.0, 0, 11), (20.0, 0, 12), nothing]
    cluster.say(second, Kind.PING, {"chunks": [{"job": ids[0], "seconds": 2**32 - 1, "pid": 21}]})
    assert longest()[0] == (2**32 - 1, 1, 21)
    cluster.say(second, Kind.PING, {})
    cluster.exchange.leave(first)
    assert longest() == [nothing] * 3


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
    cluster.declare(controller)
    cluster.task(controller)
    cluster.say(controller, Kind.KILL, {})
    assert cluster.kills == [True]
    assert set(cluster.exchange.say_goodbye("killed")) == {node, controller}
    for peer in (node, controller):
        assert peer.channel.take()[-1] == (Kind.BYE, {"reason": "killed"}) and peer.channel.finished
    for late in (cluster.node(), cluster.controller()):
        assert kinds(late.channel.take()) == [Kind.HELLO, Kind.BYE] and late.channel.finished
    cluster.exchange.leave(node)
    cluster.exchange.leave(controller)


def with_output(cluster):
    """A node, a controller, and the TASK that the node was given of the controller's job 3."""
    node, controller = cluster.node(), cluster.controller()
    cluster.declare(controller, job=3, output=True)
    cluster.task(controller, job=3)
    [given] = of_kind(node.channel.take(), Kind.TASK)
    controller.channel.take()
    return node, controller, given


def test_lines_go_to_the_controller_under_its_own_number_and_in_front_of_the_answer(cluster):
    node, controller, given = with_output(cluster)
    cluster.say(node, Kind.OUTPUT, Batch.pack(given.job, 0, [b"hello"], attempt=2, number=5))
    cluster.say(node, Kind.RESULT, Batch.pack(given.job, 0, [b"r"], attempt=given.attempt, statuses=b"\0"))
    (first, line), (second, _) = controller.channel.take()
    assert (first, second) == (Kind.OUTPUT, Kind.RESULT)
    assert (line.job, line.attempt, line.number, line.letters()) == (3, 2, 5, [b"hello"])


def test_lines_for_a_controller_that_does_not_read_are_counted_and_results_are_not_kept_back(cluster):
    node, controller, given = with_output(cluster)
    controller.channel.waiting = exchange.OUTPUT_FRAMES
    for number in (0, 5, 10**9):  # a node's word for its own id is not what the server counts by
        cluster.say(node, Kind.OUTPUT, Batch.pack(given.job, 0, [b"hello"], number=number))
    cluster.say(node, Kind.OUTPUT, Batch.pack(given.job, 0, [b""], attempt=40, number=0, flags=MORE))
    assert controller.channel.take() == []
    cluster.say(node, Kind.RESULT, Batch.pack(given.job, 0, [b"r"], attempt=given.attempt, statuses=b"\0"))
    (_, count), (kind, _) = controller.channel.take()
    assert (count.job, count.attempt, count.number, count.flags) == (3, 43, node.id, MORE) and kind is Kind.RESULT


def test_lines_of_a_job_that_has_ended_lead_nowhere(cluster):
    node, controller, given = with_output(cluster)
    cluster.say(controller, Kind.END, Batch(3))
    controller.channel.take()
    cluster.say(node, Kind.OUTPUT, Batch.pack(given.job, 0, [b"late"], number=5))
    assert controller.channel.take() == []
