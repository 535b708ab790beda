"""A Controller against a real server in this process, and a node that the test plays."""

from __future__ import annotations

import itertools
import os
import secrets
import select
import signal
import threading

import pytest
from conftest import in_a_child, wait_until
from fakes import SECONDS, SECRET, Node, serving, settings
from faults.proxy import Proxy

from achilles.controller import connection as controller_module
from achilles.controller.call import Call
from achilles.controller.connection import Controller
from achilles.controller.job import Job
from achilles.controller.link import Link
from achilles.errors import (
    AuthenticationError,
    ClusterKilled,
    NoNodesError,
    ProtocolError,
    ServerUnreachable,
    VersionError,
)
from achilles.objects import letters
from achilles.protocol import auth
from achilles.protocol.connect import PYTHON
from achilles.protocol.frames import Batch, Kind, Status

pytestmark = pytest.mark.usefixtures("no_leftovers")


@pytest.fixture
def server():
    with serving() as made:
        yield made


@pytest.fixture
def connect(server):
    """Open a Controller to the server; it is closed in the end."""
    made = []

    def run(port=server.address[1], **options):
        made.append(Controller(lambda: settings(port), **options))
        made[-1].open()
        return made[-1]

    yield run
    for each in made:
        each.close()


def square(x):
    return x * x


def begin(controller, args, func=square, *, options=None, **more):
    """A call of a job of its own on this controller."""
    context = letters.Context(caller=True)
    with controller.lock:
        job = controller.start(Job(
            context, secrets.token_bytes(16), letters.dump_function(context, (func, None)), options=options))
    call = Call(controller, job, args, **more)
    call.start()
    return call


def end(call, error=None):
    """The call is over; its job, too."""
    call.close(None, error or InterruptedError("over"))


def results(call):
    """All that is left of it, flat."""
    out = []
    while (taken := call.take(SECONDS)) is not None:
        out += taken[1]
    return out


def test_open_and_close_leave_nothing(server):
    controller = Controller(lambda: settings(server.address[1]))
    controller.open()
    assert controller.connected and (controller.workers, controller.largest) == (0, 0)
    controller.close()
    controller.close()
    for use in (controller.status, lambda: begin(controller, [1])):
        with pytest.raises(ServerUnreachable, match="closed"):
            use()


def test_a_wrong_secret_is_told_apart_from_nothing_and_says_what_to_compare(server, monkeypatch):
    monkeypatch.setattr("achilles.server.listen.REFUSAL_SECONDS", 0.01)
    port = server.address[1]
    with pytest.raises(AuthenticationError) as caught:
        Controller(lambda: settings(port, "another secret, long")).open()
    text = str(caught.value)
    assert f"127.0.0.1:{port}" in text and "'ann'" in text and "SECRET_KEY" in text and "another secret" not in text


def test_an_unreachable_server_is_named_with_the_command_that_starts_one(free_port):
    with pytest.raises(ServerUnreachable) as caught:
        Controller(lambda: settings(free_port)).open()
    assert f"127.0.0.1:{free_port}" in str(caught.value) and "python -m achilles.server" in str(caught.value)


FIRST_WORD = auth.OPENING_BYTES + auth.NONCE_BYTES + auth.PROOF_BYTES + 20  # bytes of the server's: within its HELLO


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_lost_before_the_first_word_is_made_anew(server, connect, reset):
    with Proxy(server.address[1]) as proxy:
        proxy.once = True
        proxy.down.cut_after, proxy.down.reset = FIRST_WORD, reset
        assert connect(proxy.port).connected
        assert proxy.accepted == 2


def test_who_never_gets_to_the_first_word_is_told_so(server, monkeypatch):
    monkeypatch.setattr(controller_module, "REPLY_SECONDS", 0.5)
    with Proxy(server.address[1]) as proxy:
        proxy.down.cut_after = FIRST_WORD
        controller = Controller(lambda: settings(proxy.port))
        with pytest.raises(ServerUnreachable, match="first word"):
            controller.open()
        assert proxy.accepted > 1


def test_a_refusal_is_told_at_once_after_a_connection_was_lost_too(server, monkeypatch):
    monkeypatch.setattr("achilles.server.listen.REFUSAL_SECONDS", 0.01)
    said = itertools.chain([SECRET], itertools.repeat("another secret, long"))
    with Proxy(server.address[1]) as proxy:
        proxy.once, proxy.down.cut_after = True, FIRST_WORD
        controller = Controller(lambda: settings(proxy.port, next(said)))
        with pytest.raises(AuthenticationError):
            controller.open()
        assert proxy.accepted == 2


def test_a_full_server_says_so_at_once(server, monkeypatch, connect):
    monkeypatch.setattr("achilles.server.listen._most_connections", lambda: 0)
    with pytest.raises(ServerUnreachable, match="no room"):
        connect()


def test_status_is_nodes_jobs_and_server(server, connect):
    controller = connect()
    with Node(server.address[1], cpu_count=3, most=0) as node:
        job = begin(controller, range(3))
        node.wait(lambda: len(node.tasks()) == 3)
        state = controller.status()
        (found,), (running,) = state["nodes"], state["jobs"]
        assert (found["id"], found["cpu_count"], found["done"]) == (0, 3, 0)
        assert found["since"] > 1e9 and found["address"] and found["python"] and found["version"]
        assert running["user"] == "ann" and running["queued"] + running["running"] == 3
        assert state["server"]["uptime"] >= 0
        node.let()
        assert results(job) == [0, 1, 4]
        end(job)
        assert controller.status()["nodes"][0]["done"] == 3
        assert controller.status()["jobs"] == []


def test_kill_is_cluster_killed_in_running_calls_and_at_who_comes_back(server, connect, monkeypatch):
    monkeypatch.setattr("achilles.server.listen.KILLED_SECONDS", 2.0)
    controller = connect()
    job = begin(controller, range(3))
    connect().kill()
    with pytest.raises(ClusterKilled):
        job.take(SECONDS)
    with pytest.raises(ClusterKilled):
        begin(controller, range(3))
    with pytest.raises(ClusterKilled):
        connect()


def test_several_threads_with_several_jobs(server, connect):
    controller = connect()
    with Node(server.address[1]):
        found = {}

        def run(base):
            for n in range(3):
                args = range(base, base + 50)
                job = begin(controller, args, chunksize=n + 1)
                found[base, n] = results(job) == [x * x for x in args]
                end(job)

        threads = [threading.Thread(target=run, args=(1000 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert list(found.values()) == [True] * 12
        assert controller.status()["jobs"] == []


def test_cancelled_jobs_leave_the_connection_whole(server, connect):
    """Frames of a job that has ended would be a breach, and end the connection."""
    controller = connect()
    with Node(server.address[1], most=0) as node:
        link = controller._channel
        for number in range(10):
            job = begin(controller, itertools.count())
            node.wait(lambda: len(node.kinds(Kind.JOB)) > number)  # noqa: B023
            if number % 2:
                node.let(200)  # more than all jobs have there
                job.take(SECONDS)
                node.let(0)
            end(job)
        node.let()
        job = begin(controller, range(10))
        assert results(job) == [n * n for n in range(10)]
        assert controller._channel is link, "it had to reconnect"


def test_a_lost_server_gets_the_jobs_anew_and_only_what_is_not_answered(free_port, monkeypatch):
    monkeypatch.setattr(controller_module, "BACKOFF_SECONDS", (0.02, 0.1))
    with serving(free_port):
        controller = Controller(lambda: settings(free_port))
        controller.open()
        with Node(free_port, cpu_count=4, most=6) as node:
            call = begin(controller, range(12))
            assert call.take(SECONDS) == (0, [0, 1, 4, 9], {})
            wait_until(  # of four: 4 and 5 are answered
                lambda: sum(len(piece.answers) for piece in call.results._units[0].pieces) == 2)
            node.wait(lambda: set(node.tasks()) >= {*range(8)})
    wait_until(lambda: not controller.connected)
    with serving(free_port), Node(free_port, cpu_count=4) as node:
        assert call.take(SECONDS) == (4, [16, 25, 36, 49], {}), "the packet that had begun stays what it is"
        assert results(call) == [n * n for n in range(8, 12)]
        assert sorted(node.tasks()) == list(range(6, 12))
        assert len(node.kinds(Kind.JOB)) == 1
        controller.close()


@pytest.mark.parametrize("minutes", [1, 60])
def test_what_was_before_nobody_looked_does_not_count(minutes):
    """A pool that works or rests for an hour looks at nothing; then its cluster is started anew."""
    controller = Controller(lambda: settings(1), wait_for_nodes=30)
    controller._learn({"workers": 0})
    controller.look()

    def wait(seconds):
        controller._looked -= seconds
        controller._lonely_since -= seconds

    wait(60 * minutes)
    controller.look()
    for _ in range(29):
        wait(1)
        controller.look()
    wait(1)
    with pytest.raises(NoNodesError, match="within 30 s"):
        controller.look()


def test_who_waits_for_a_lost_server_is_told_once(capfd):
    controller = Controller(lambda: settings(1), reconnect_seconds=60)
    controller._learn({"workers": 4})
    controller._learn({})
    for _ in range(12):
        controller.look()
        controller._looked -= 1
        controller._lonely_since -= 1
    told, = capfd.readouterr().err.splitlines()
    assert told == "The server at 127.0.0.1:1 cannot be reached any more; it is tried again for 60 s"


def test_a_connection_that_is_made_anew_is_given_the_whole_patience():
    """A server that is back has no nodes yet, however long there was none before it was lost."""
    controller = Controller(lambda: settings(1), wait_for_nodes=30)

    def looks(cluster):
        controller._learn(cluster)
        for _ in range(29):
            controller._looked -= 1
            controller._lonely_since -= 1
            controller.look()

    looks({"workers": 0})
    looks({})
    looks({"workers": 0})
    controller._lonely_since -= 1
    with pytest.raises(NoNodesError, match="within 30 s"):
        controller.look()


def test_a_server_that_stays_away_is_named(free_port, monkeypatch):
    monkeypatch.setattr(controller_module, "BACKOFF_SECONDS", (0.02, 0.1))
    with serving(free_port):
        controller = Controller(lambda: settings(free_port), reconnect_seconds=0.2)
        controller.open()
        job = begin(controller, range(3))
    with pytest.raises(ServerUnreachable, match=rf"127.0.0.1:{free_port}.*0.2 s \(reconnect_seconds\)"):
        job.take(SECONDS)
    with pytest.raises(ServerUnreachable):
        begin(controller, range(3))
    controller.close()


def test_a_server_that_complains_each_time_is_believed_the_third_time(server, connect, monkeypatch):
    """To connect again, and to say the same, would never end."""
    monkeypatch.setattr(controller_module, "BACKOFF_SECONDS", (0.02, 0.1))
    declared = []

    def refuse(exchange, peer, batch):
        declared.append(batch)
        raise ProtocolError("this is no JOB")

    monkeypatch.setattr("achilles.server.exchange.Exchange._declare", refuse)
    controller = connect()
    with Node(server.address[1]):
        call = begin(controller, [1])
        with pytest.raises(ServerUnreachable, match="says: this is no JOB"):
            call.take(SECONDS)
    assert len(declared) == 3


def test_a_letter_that_is_altered_twice_is_a_reason_to_declare_the_job_anew(server, connect, monkeypatch):
    """A function that was altered on its way is kept at the server, and at the node."""
    monkeypatch.setattr(controller_module, "BACKOFF_SECONDS", (0.02, 0.1))
    controller = connect()
    with Node(server.address[1], cpu_count=1, most=0) as node:
        call = begin(controller, [3])
        for _ in range(2):
            node.wait(lambda: len(node.held) == 1)
            held, = node.held
            node.held.clear()
            node.link.send(Kind.RESULT, Batch.pack(
                held.job, held.number, [b""], attempt=held.attempt, statuses=bytes([Status.ALTERED])))
        node.wait(lambda: len(node.kinds(Kind.JOB)) == 2)
        node.let()
        assert results(call) == [9]


def test_close_while_it_reconnects_leaves_nothing(free_port, monkeypatch):
    with serving(free_port):
        controller = Controller(lambda: settings(free_port))
        controller.open()
        job = begin(controller, range(3))
    wait_until(lambda: not controller.connected)
    controller.close()
    with pytest.raises((ServerUnreachable, InterruptedError)):
        job.take(SECONDS)


def test_a_connection_made_after_close_is_closed(server, connect, monkeypatch):
    controller = connect()
    controller._closing.set()
    with pytest.raises(ServerUnreachable):
        controller._connect()
    controller._closing.clear()


def test_nodes_of_another_python_are_an_error_that_names_both(server, connect):
    controller = connect()
    with Node(server.address[1], python="3.9"):
        wait_until(lambda: controller._cluster["nodes"])
        with pytest.raises(VersionError, match=rf"Python {PYTHON}, the nodes run 3\.9"):
            begin(controller, range(3))


def test_free_threaded_nodes_are_another_python(server, connect):
    """A node that says in its HELLO that it is the other build of this version gets no job of this one."""
    this = PYTHON
    other = this.removesuffix("t") if this.endswith("t") else f"{this}t"
    controller = connect()
    with Node(server.address[1], python=other) as node:
        wait_until(lambda: controller._cluster["nodes"])
        assert controller.workers == 0
        with pytest.raises(VersionError, match=rf"this is Python {this}, the nodes run {other}: .*free-threaded"):
            begin(controller, range(3))
        assert not node.tasks()


def test_while_the_only_node_drains_a_job_waits_for_another(server, connect):
    controller = connect()
    with Node(server.address[1]) as leaver:
        wait_until(lambda: controller.workers)
        leaver.link.send(Kind.BYE, {"reason": "leaving"})
        wait_until(lambda: not controller.workers)
        job = begin(controller, range(9))
        with Node(server.address[1]):
            assert results(job) == [n * n for n in range(9)]


def test_whatever_ends_the_reader_ends_the_jobs(server, connect, monkeypatch):
    def fail(self, batch, found):
        raise MemoryError("no room for a result")

    monkeypatch.setattr(Job, "answered", fail)
    controller = connect()
    with Node(server.address[1]):
        with pytest.raises(ServerUnreachable, match="no room for a result") as caught:
            begin(controller, range(9)).take(SECONDS)
    assert isinstance(caught.value.__cause__, MemoryError)


def test_without_any_node_a_job_waits(server, connect):
    controller = connect()
    job = begin(controller, range(9))
    with pytest.raises(TimeoutError):
        job.take(0.05)
    with Node(server.address[1]):
        assert results(job) == [n * n for n in range(9)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_beside_a_controller_that_is_half_made_leaves_the_others_too(server):
    """Its settings may take their time, as a local cluster does, or an answer at a terminal."""
    asked, answer = threading.Event(), threading.Event()

    def resolve():
        asked.set()
        answer.wait(SECONDS)
        return settings(server.address[1])

    thread = threading.Thread(target=Controller, args=(resolve,))
    thread.start()
    assert asked.wait(SECONDS)
    others = [Link() for _ in range(20)]
    try:
        assert in_a_child(lambda: sum(link.forked for link in others)) == "20"
    finally:
        answer.set()
        thread.join()


def test_ctrl_c_while_a_controller_opens_leaves_nothing(server, monkeypatch):
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        if thread.name == "achilles-reader":
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Controller(lambda: settings(server.address[1])).open()
    wait_until(lambda: not server._exchange._peers, "the end of the connection, as the server sees it")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_neither_keeps_nor_breaks_the_connection(server, connect):
    controller = connect()
    with Node(server.address[1], most=0) as node:
        job = begin(controller, range(10))
        node.wait(node.tasks)
        stay_read, stay_write = os.pipe()
        say_read, say_write = os.pipe()
        held, forked = threading.Event(), threading.Event()

        def hold():
            with controller.lock:
                held.set()
                forked.wait(SECONDS)

        holder = threading.Thread(target=hold)  # which the child does not have
        holder.start()
        assert held.wait(SECONDS)
        connection = controller._channel.socket.fileno()
        child = os.fork()
        if not child:
            try:
                os.close(stay_write)
                said = []
                try:
                    os.fstat(connection)
                except OSError:
                    said.append(True)
                for use in (lambda: job.take(1), lambda: begin(controller, [1]), controller.status):
                    try:
                        use()
                    except ServerUnreachable as e:
                        said.append("parent process" in str(e))
                end(job)
                controller.close()
                os.write(say_write, b"%d" % sum(said))
                os.read(stay_read, 1)
            finally:
                os._exit(0)
        try:
            forked.set()
            holder.join()
            os.close(say_write)
            assert select.select([say_read], [], [], SECONDS)[0] and os.read(say_read, 1) == b"4"
            node.let()
            assert results(job) == [n * n for n in range(10)]
            end(job)
            controller.close()
            wait_until(lambda: len(server._exchange._peers) == 1, "the end of the connection, as the server sees it")
        finally:
            os.close(stay_write)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(stay_read)
            os.close(say_read)


def test_settings_are_resolved_anew_for_each_connection(free_port, monkeypatch):
    """A secret that was changed meanwhile is found."""
    monkeypatch.setattr(controller_module, "BACKOFF_SECONDS", (0.02, 0.1))
    asked = []

    def resolve():
        asked.append(1)
        return settings(free_port, SECRET)

    with serving(free_port):
        controller = Controller(resolve)
        controller.open()
    wait_until(lambda: len(asked) > 1)
    controller.close()


# Jobs that are kept.


@pytest.fixture
def call_again():
    """Calls of one context, as a pool makes them: the job is kept when its results are taken."""
    context, context_id = letters.Context(caller=True), secrets.token_bytes(16)

    def run(controller, args, func=square, **options):
        function = letters.dump_function(context, (func, None))
        key = function, str(options)
        with controller.lock:
            job = controller.take(key, lambda: Job(context, context_id, function, options=options))
        call = Call(controller, job, args, flat=True)
        call.start()
        values = results(call)
        call.close(key, None)
        return values

    return run


def test_calls_of_one_function_go_on_in_one_job(server, connect, call_again):
    controller = connect()
    with Node(server.address[1]) as node:
        for n in range(20):
            assert call_again(controller, [n]) == [n * n]
        assert len(node.kinds(Kind.JOB)) == 1 and not node.kinds(Kind.END)
        assert node.tasks() == list(range(20))
        assert call_again(controller, [-3], abs) == [3]
        assert call_again(controller, [3], timeout=9) == [9]
        assert len(node.kinds(Kind.JOB)) == 3


def test_no_more_than_sixteen_jobs_are_open_anywhere(server, connect, call_again):
    controller = connect()
    with Node(server.address[1]) as node:
        for n in range(40):
            assert call_again(controller, [n], timeout=n + 1) == [n * n]
        node.wait(lambda: len(node.kinds(Kind.END)) == 40 - 16)
        assert [body.job for body in node.kinds(Kind.END)] == [body.job for body in node.kinds(Kind.JOB)[:24]]
        assert len(controller.jobs) == len(controller.status()["jobs"]) == 16


def test_a_kept_job_is_declared_anew_to_a_server_that_is_back(free_port, monkeypatch, call_again):
    monkeypatch.setattr(controller_module, "BACKOFF_SECONDS", (0.02, 0.1))
    answers = []
    with serving(free_port):
        controller = Controller(lambda: settings(free_port))
        controller.open()
        with Node(free_port) as node:
            assert call_again(controller, [3]) == call_again(controller, [3]) == [9]
            node.let(0)
            thread = threading.Thread(target=lambda: answers.append(call_again(controller, [4])))
            thread.start()
            node.wait(lambda: node.tasks() == [0, 1, 2])
    wait_until(lambda: not controller.connected)
    with serving(free_port), Node(free_port) as node:
        thread.join(SECONDS)
        assert answers == [[16]] and node.tasks() == [2]
        assert call_again(controller, [5]) == [25] and len(node.kinds(Kind.JOB)) == 1
        controller.close()
