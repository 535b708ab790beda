"""A Controller against a real server in this process, and a node that the test plays."""

from __future__ import annotations

import itertools
import os
import secrets
import select
import signal
import threading

import pytest
from conftest import wait_until
from fakes import SECONDS, SECRET, Node, serving, settings
from faults.proxy import Proxy

from achilles.controller import connection as controller_module
from achilles.controller.connection import Controller
from achilles.controller.job import Function, Job
from achilles.errors import AuthenticationError, ClusterKilled, ServerUnreachable, VersionError
from achilles.objects import letters
from achilles.protocol import auth
from achilles.protocol.frames import PACKED, Kind

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


def begin(controller, args, func=square, **options):
    """A job on this controller."""
    context = letters.Context(caller=True)
    function = Function(context.dump((func, None)))
    return controller.start(
        lambda link, number: Job(link, number, context, secrets.token_bytes(16), function, args, **options))


def results(job):
    """All that is left of it, flat."""
    out = []
    while (taken := job.take(SECONDS)) is not None:
        out += taken[1]
    return out


def test_open_and_close_leave_nothing(server):
    controller = Controller(lambda: settings(server.address[1]))
    controller.open()
    assert controller.connected and controller.workers() == (0, 0)
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


FIRST_WORD = auth.GREETING_BYTES + auth.PROOF_BYTES + 20  # bytes of the server's: within its HELLO


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
        node.wait(node.tasks)
        state = controller.status()
        (found,), (running,) = state["nodes"], state["jobs"]
        assert (found["id"], found["cpu_count"], found["done"]) == (0, 3, 0)
        assert found["since"] > 1e9 and found["address"] and found["python"] and found["version"]
        assert running["user"] == "ann" and running["queued"] + running["running"] == 3
        assert state["server"]["uptime"] >= 0
        node.let()
        assert results(job) == [0, 1, 4]
        controller.end(job)
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


def test_a_function_crosses_once_for_two_jobs(server, connect):
    controller = connect()
    with Node(server.address[1]) as node:
        context = letters.Context(caller=True)
        function = Function(context.dump((square, None)))
        for _ in range(2):
            job = controller.start(lambda link, number: Job(link, number, context, bytes(16), function, range(9)))
            assert results(job) == [n * n for n in range(9)]
            controller.end(job)
        assert len(node.kinds(Kind.FUNCTION)) == 1 and len(node.kinds(Kind.JOB)) == 2


def test_several_threads_with_several_jobs(server, connect):
    controller = connect()
    with Node(server.address[1]):
        found = {}

        def run(base):
            for n in range(3):
                args = range(base, base + 50)
                job = begin(controller, args, chunksize=n + 1)
                found[base, n] = results(job) == [x * x for x in args]
                controller.end(job)

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
    with Node(server.address[1], most=20) as node:
        link = controller._channel
        for _ in range(10):
            job = begin(controller, itertools.count())
            job.take(SECONDS) if node.most > 8 else node.wait(node.tasks)
            controller.end(job, cancel=True)
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
            job = begin(controller, range(12))
            first = job.take(SECONDS)
            assert first == (0, [0, 1, 4, 9], {})
            wait_until(lambda: job._waiting == set(range(6, 12)))
            packeted = set(node.tasks()) - set(range(6))
            assert packeted >= {6, 7}
    wait_until(lambda: not controller.connected)
    with serving(free_port), Node(free_port, cpu_count=4) as node:
        assert results(job) == [n * n for n in range(4, 12)]
        assert sorted(node.tasks()) == list(range(6, 12))
        assert node.kinds(Kind.JOB)[0]["resumed"] is True
        packed = {n for rows in node.kinds(Kind.TASK) for n, s in zip(rows.slices, rows.statuses) if s & PACKED}
        assert packed >= packeted
        controller.close()


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
        with pytest.raises(VersionError, match=rf"Python {controller_module.PYTHON}, the nodes run 3\.9"):
            begin(controller, range(3))


def test_free_threaded_nodes_are_another_python(server, connect):
    """A node that says in its HELLO that it is the other build of this version gets no job of this one."""
    this = controller_module.PYTHON
    other = this.removesuffix("t") if this.endswith("t") else f"{this}t"
    controller = connect()
    with Node(server.address[1], python=other) as node:
        wait_until(lambda: controller._cluster["nodes"])
        assert controller.workers()[0] == 0
        with pytest.raises(VersionError, match=rf"this is Python {this}, the nodes run {other}: .*free-threaded"):
            begin(controller, range(3))
        assert not node.tasks()


def test_while_the_only_node_drains_a_job_waits_for_another(server, connect):
    controller = connect()
    with Node(server.address[1]) as leaver:
        wait_until(lambda: controller.workers()[0])
        leaver.link.send(Kind.BYE, {"reason": "leaving"})
        wait_until(lambda: not controller.workers()[0])
        job = begin(controller, range(9))
        with Node(server.address[1]):
            assert results(job) == [n * n for n in range(9)]


def test_whatever_ends_the_reader_ends_the_jobs(server, connect, monkeypatch):
    def fail(self, rows):
        raise MemoryError("no room for a result")

    monkeypatch.setattr(Job, "answers", fail)
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
                controller.end(job, cancel=True)
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
            controller.end(job)
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

# Calls that follow each other.


@pytest.fixture
def call(monkeypatch):
    """Calls of one context, as a pool makes them: each ends when its results are taken. It may be followed for long."""
    monkeypatch.setattr(controller_module, "KEPT_SECONDS", 3600.0)
    context, context_id = letters.Context(caller=True), secrets.token_bytes(16)

    def run(controller, args, func=square, **options):
        function = Function(context.dump((func, None)))
        job = controller.start(lambda link, number: Job(
            link, number, context, context_id, function, args, **{"flat": True} | options))
        values = results(job)
        controller.end(job)
        return values

    return run


def test_a_short_call_alike_follows_under_the_same_number(server, connect, call):
    controller = connect()
    with Node(server.address[1]) as node:
        assert call(controller, range(3)) == [0, 1, 4]
        for n in range(20):
            assert call(controller, [n]) == [n * n]
        assert call(controller, range(4), chunksize=4) == [0, 1, 4, 9]
        assert len(node.kinds(Kind.JOB)) == 1 and not node.kinds(Kind.END)
        assert node.tasks() == list(range(24))


@pytest.mark.parametrize("change", [
    {"func": abs}, {"options": {"seed": 1}}, {"args": [1, 2]}, {"args": iter([1])}, {"flat": False}])
def test_another_function_or_option_or_a_longer_call_begins_anew(server, connect, call, change):
    controller = connect()
    with Node(server.address[1]) as node:
        assert call(controller, [1]) == [1]
        call(controller, **{"args": [1]} | change)
        assert len(node.kinds(Kind.JOB)) == 2


def test_what_no_call_follows_is_ended_within_seconds_and_before_a_status(server, connect, call, monkeypatch):
    controller = connect()
    with Node(server.address[1]) as node:
        assert call(controller, [2]) == [4]
        assert not node.kinds(Kind.END) and controller._kept
        monkeypatch.setattr(controller_module, "KEPT_SECONDS", 0.5)
        node.wait(lambda: len(node.kinds(Kind.END)) == 1)
        monkeypatch.setattr(controller_module, "KEPT_SECONDS", 3600.0)
        assert call(controller, [2]) == [4]
        assert controller.status()["jobs"] == []
        node.wait(lambda: len(node.kinds(Kind.END)) == 2)
        assert len(node.kinds(Kind.JOB)) == 2 and not controller._kept


def test_no_more_than_some_wait_to_be_followed(server, connect, call):
    controller = connect()
    with Node(server.address[1]) as node:
        for n in range(3 * controller_module.KEPT_JOBS):
            assert call(controller, [n], options={"seed": n}) == [n * n]
            assert len(controller._kept) <= controller_module.KEPT_JOBS
        ends = len(node.kinds(Kind.END))
        assert ends >= 2 * controller_module.KEPT_JOBS - 1
        assert {body["job"] for body in node.kinds(Kind.END)} == set(range(1, ends + 1))  # the oldest first


def test_a_call_that_was_cancelled_is_not_followed(server, connect, call):
    controller = connect()
    with Node(server.address[1]) as node:
        node.let(0)
        job = begin(controller, [1], flat=True)
        controller.end(job, cancel=True)
        node.let()
        assert not controller._kept
        node.wait(lambda: len(node.kinds(Kind.END)) == 1)


def test_after_a_reconnection_nothing_is_followed_and_a_follower_is_declared(free_port, monkeypatch, call):
    monkeypatch.setattr(controller_module, "BACKOFF_SECONDS", (0.02, 0.1))
    with serving(free_port):
        controller = Controller(lambda: settings(free_port))
        controller.open()
        with Node(free_port) as node:
            assert call(controller, [3]) == call(controller, [3]) == [9]
            assert node.tasks() == [0, 1]
    wait_until(lambda: not controller.connected)
    with serving(free_port), Node(free_port) as node:
        wait_until(lambda: controller.connected)
        assert call(controller, [3]) == [9]
        assert [body["resumed"] for body in node.kinds(Kind.JOB)] == [False] and node.tasks() == [0]
        controller.close()


def test_a_follower_is_sent_again_to_a_server_that_is_back(free_port, monkeypatch, call):
    monkeypatch.setattr(controller_module, "BACKOFF_SECONDS", (0.02, 0.1))
    answers = []
    with serving(free_port):
        controller = Controller(lambda: settings(free_port))
        controller.open()
        with Node(free_port) as node:
            assert call(controller, [3]) == [9]
            node.let(0)
            thread = threading.Thread(target=lambda: answers.append(call(controller, [4])))
            thread.start()
            node.wait(lambda: node.tasks() == [0, 1])
    wait_until(lambda: not controller.connected)
    with serving(free_port), Node(free_port) as node:
        thread.join(SECONDS)
        assert answers == [[16]] and node.tasks() == [1]
        assert [body["resumed"] for body in node.kinds(Kind.JOB)] == [True]
        controller.close()


def test_what_ended_a_call_before_it_began_to_follow_is_raised(server, connect, call):
    controller = connect()
    with Node(server.address[1]):
        context, context_id = letters.Context(caller=True), secrets.token_bytes(16)
        function = Function(context.dump((square, None)))

        def make(link, number, fails=False):
            job = Job(link, number, context, context_id, function, [3], flat=True)
            if fails:  # another thread, that knows the job by now
                job.fail(InterruptedError("cancelled"))
            return job

        job = controller.start(make)
        assert results(job) == [9]
        controller.end(job)
        job = controller.start(lambda link, number: make(link, number, True))
        with pytest.raises(InterruptedError):
            job.take(SECONDS)
        controller.end(job, cancel=True)


def test_a_call_that_ended_before_it_began_leaves_nothing(server, connect):
    controller = connect()

    def make(link, number):
        context = letters.Context(caller=True)
        job = Job(link, number, context, bytes(16), Function(context.dump((square, None))), [3], flat=True)
        controller.end(job, cancel=True)
        return job

    controller.start(make)
    assert not controller._jobs and controller.status()["jobs"] == []
