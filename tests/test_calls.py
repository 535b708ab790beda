"""The original calls: their signatures to the letter, their options, and what they tell whom."""

from __future__ import annotations

import inspect
import io
import itertools
import numbers
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction

import pytest
from conftest import wait_until
from fakes import SECONDS, SECRET, Node, address, serving

from achilles import errors
from achilles.calls import cluster_status, imap, imap_unordered, kill_cluster
from achilles.calls import map as map_
from achilles.controller import connection
from achilles.journal import Journal
from achilles.lineReceiver import achilles_main, achilles_node, achilles_server
from achilles.options import checked
from achilles.protocol.frames import Kind

pytestmark = pytest.mark.usefixtures("no_leftovers", "unconfigured")
CALLS = [map_, imap, imap_unordered]
ORIGINAL = "func, args, callback=None, chunksize=1, host=None, port=None, username=None, secret_key=None"
OPTIONS = ["callback_error", "buffersize", "wait_for_nodes", "reconnect_seconds", "timeout", "executor", "output",
           "progress", "journal", "encrypt"]


@pytest.fixture
def server():
    with serving() as made:
        yield made


@pytest.fixture
def where(server):
    """What the calls take, to reach the server."""
    return address(server.address[1])


@pytest.fixture
def node(where):
    with Node(where["port"]) as made:
        yield made


def square(x):
    return x * x


def below_five(x):
    if x >= 5:
        raise ValueError(f"{x} is too much")
    return x


# Signatures.


def positional(function):
    """Its parameters that may be given by position, as the original's documentation writes them."""
    parameters = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return str(inspect.Signature(plain))[1:-1]


@pytest.mark.parametrize("function", CALLS)
def test_the_calls_have_the_originals_signature_and_keyword_only_options(function):
    assert positional(function) == ORIGINAL
    keywords = [n for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert keywords == OPTIONS


@pytest.mark.parametrize(("function", "signature"), [
    (achilles_server.runAchillesServer, "host=None, port=None, username=None, secret_key=None"),
    (achilles_node.runAchillesNode, "host=None, port=None, username=None, secret_key=None"),
    (achilles_main.genConfig, "host=None, port=None, username=None, secret_key=None"),
    (achilles_server.genConfig, "host=None, port=None, username=None, secret_key=None"),
    (achilles_node.genConfig, "host=None, port=None"),
    (achilles_main.killCluster, "command_verified=False, host=None, port=None, username=None, secret_key=None"),
    (achilles_main.getClusterStatus, "host=None, port=None, username=None, secret_key=None"),
])
def test_the_other_functions_take_what_the_originals_take(function, signature):
    assert positional(function) == signature


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize(("options", "error", "text"), [
    ({"chunk_size": 1}, TypeError, "chunk_size"),
    ({"chunksize": 0}, ValueError, "chunksize must be at least 1, not 0"),
    ({"chunksize": 1.5}, TypeError, "chunksize must be an int, not float"),
    ({"chunksize": None}, TypeError, "chunksize must be an int"),
    ({"chunksize": True}, TypeError, "chunksize must be an int, not bool"),
    ({"buffersize": 0}, ValueError, "buffersize must be at least 1"),
    ({"buffersize": "9"}, TypeError, "buffersize must be an int, not str"),
    ({"timeout": 0}, ValueError, "timeout must be a finite number of seconds, more than 0"),
    ({"timeout": -1}, ValueError, "timeout"),
    ({"timeout": "1"}, TypeError, "timeout must be a number of seconds, not str"),
    ({"wait_for_nodes": float("inf")}, ValueError, "wait_for_nodes"),
    ({"wait_for_nodes": float("nan")}, ValueError, "wait_for_nodes"),
    ({"reconnect_seconds": -1}, ValueError, "reconnect_seconds"),
    ({"reconnect_seconds": "soon"}, TypeError, "reconnect_seconds must be a number"),
    ({"callback": 1}, TypeError, "callback must be callable or None, not int"),
    ({"callback_error": "x"}, TypeError, "callback_error must be callable or None, not str"),
    ({"func": 3}, TypeError, "func must be callable, not int"),
    ({"args": 3}, TypeError, "not iterable"),
    ({"port": 70_000}, ValueError, "port must be an int in 0..65535"),
])
def test_what_will_not_do_is_refused_before_anything_is_connected(function, options, error, text):
    with pytest.raises(error, match=text):
        function(**({"func": square, "args": [1], **address(1)} | options))


@pytest.mark.parametrize("options", [
    {"chunksize": Fraction(3)}, {"buffersize": "3"}, {"timeout": complex(3)}, {"chunksize": Decimal(3)}])
def test_numbers_of_other_kinds_are_refused(options):
    with pytest.raises(TypeError, match="must be a"):
        checked(**options)


@numbers.Integral.register
class Whole:
    """A number as numpy has them: no int, but registered as one of its kind."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value

    def __lt__(self, other):
        return self.value < other

    def __ge__(self, other):
        return self.value >= other


def test_numbers_as_numpy_has_them_count_as_pythons_own():
    found = checked(chunksize=Whole(3), buffersize=None, timeout=Fraction(3, 2), wait_for_nodes=Whole(2))
    assert found == [3, None, 1.5, 2] and [*map(type, found)] == [int, type(None), float, int]
    with pytest.raises(ValueError, match="chunksize must be at least 1"):
        checked(chunksize=Whole(0))


# Results.


def test_the_originals_results(where, node):
    def func(arg):
        return arg ** 2

    args = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    first = [1, 16, 81, 256, 625, 1296, 2401, 4096]
    assert map_(func, args, func, chunksize=1, **where) == [first, [6561, 10000]]
    packets = [{"ARGS_COUNTER": 0, "RESULT": first}, {"ARGS_COUNTER": 8, "RESULT": [6561, 10000]}]
    assert list(imap(func, args, func, chunksize=1, **where)) == packets
    assert sorted(imap_unordered(func, args, func, 1, *where.values()), key=lambda p: p["ARGS_COUNTER"]) == packets


def test_lists_of_lists_count_lists(where, node):
    assert map_(square, [[1, 2, 3], [], [4]], **where) == [[1, 4, 9], [], [16]]
    assert [p["ARGS_COUNTER"] for p in imap(square, [[1, 2, 3], [], [4]], **where)] == [0, 1, 2]


@pytest.mark.parametrize("args", [[], (), range(0), iter(()), lambda: iter(())])
def test_no_arguments_no_node(where, args):
    assert map_(square, args, **where) == []
    assert list(imap(square, [], **where)) == []


def test_an_endless_generator_function(where, node):
    with imap(square, itertools.count, **where) as packets:
        found = [next(packets) for _ in range(50)]
    assert [p["ARGS_COUNTER"] for p in found] == [8 * n for n in range(50)]
    assert [x for p in found for x in p["RESULT"]] == [n * n for n in range(400)]


# What is told to whom.


def test_the_alert_goes_to_stderr_with_a_blank_line_and_stdout_stays_empty(where, node, capfd):
    assert map_(square, [3], **where) == [[9]]
    out, err = capfd.readouterr()
    text = f"ALERT: Connection to achilles_server at 127.0.0.1:{where['port']} and authentication successful."
    assert (out, err) == ("", f"{text}\n\n")


def test_without_a_node_the_caller_is_told_once_how_to_start_one(where, capfd, monkeypatch):
    monkeypatch.setattr(connection, "NOTICE_SECONDS", 0.05)
    monkeypatch.setattr(connection.Controller, "look_seconds", 0.05)
    results = []
    thread = threading.Thread(target=lambda: results.extend(map_(square, [3], **where)))
    thread.start()
    err = ""

    def told():
        nonlocal err
        err += capfd.readouterr().err
        return "no nodes" in err

    wait_until(told)
    threading.Event().wait(0.3)  # several looks more
    with Node(where["port"]):
        thread.join(SECONDS)
    err += capfd.readouterr().err
    assert results == [[9]] and err.count("no nodes") == 1
    assert f"127.0.0.1:{where['port']}" in err and "python -m achilles.node" in err


@pytest.mark.parametrize("seconds", [0, 0.2])
def test_wait_for_nodes_is_an_error_that_names_the_command(where, seconds):
    began = time.monotonic()
    with pytest.raises(errors.NoNodesError, match=rf"{where['port']} within {seconds} s.*python -m achilles\.node"):
        map_(square, [3], wait_for_nodes=seconds, **where)
    assert seconds <= time.monotonic() - began < 10


def test_wait_for_nodes_does_not_count_while_there_is_one(where, monkeypatch):
    looks, look = [], connection.Controller.look
    monkeypatch.setattr(connection.Controller, "look", lambda self: looks.append(1) or look(self))
    with Node(where["port"], most=0) as node, imap(square, [1, 2], wait_for_nodes=0, **where) as packets:
        timer = threading.Timer(0.3, node.let)
        timer.start()
        assert next(packets)["RESULT"] == [1, 4]
        timer.join()
    assert 1 <= len(looks) < 30, "waiting is no busy loop"


# Packets.


def ended(server):
    wait_until(lambda: not server._exchange._jobs, "the end of the job at the server")


def test_close_cancels_and_the_end_stays_the_end(server, where):
    with Node(where["port"], most=8) as node:
        packets = imap(square, itertools.count, **where)
        assert iter(packets) is packets and next(packets)["ARGS_COUNTER"] == 0
        packets.close()
        packets.close()
        assert list(packets) == [] and next(packets, None) is None
        node.wait(lambda: node.kinds(Kind.END))
        ended(server)


def test_dropping_cancels(server, where):
    with Node(where["port"], most=8) as node:
        packets = imap(square, itertools.count, **where)
        next(packets)
        del packets
        node.wait(lambda: node.kinds(Kind.END))
        ended(server)


def test_dropping_cancels_though_a_thread_of_ours_collects_it_under_a_lock(server, where, monkeypatch):
    starters, start = [], threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda each: starters.append(threading.get_ident()) or start(each))
    with Node(where["port"], most=8) as node:
        packets = imap(square, itertools.count, **where)
        next(packets)
        lock, dropped = packets._controller.lock, [packets]
        del packets

        def collect():
            with lock:
                dropped.clear()

        collector = threading.Thread(target=collect, name="achilles-feeder in a test", daemon=True)
        collector.start()
        collector.join(SECONDS)
        assert not collector.is_alive()
        node.wait(lambda: node.kinds(Kind.END))
        ended(server)
    assert starters and collector.ident not in starters, "whoever starts a Thread waits until that has begun"


def test_leaving_the_block_cancels_even_by_an_exception(server, where):
    with Node(where["port"], most=8) as node:
        with pytest.raises(ZeroDivisionError), imap_unordered(square, itertools.count, **where) as packets:
            next(packets)
            raise ZeroDivisionError
        node.wait(lambda: node.kinds(Kind.END))
        ended(server)


def test_closing_in_another_thread_ends_the_iteration(where):
    packets = imap(square, itertools.count, **where)
    threading.Timer(0.1, packets.close).start()
    assert list(packets) == []


def test_an_error_handler_that_closes_and_raises_is_heard(where, node):
    def handle(error):
        packets.close()
        raise error

    with imap(below_five, range(20), callback_error=handle, **where) as packets:
        with pytest.raises(ValueError, match="5 is too much"):
            next(packets)
        assert list(packets) == []


def test_after_the_last_packet_it_stays_ended(where, node):
    packets = imap(square, range(3), **where)
    assert len(list(packets)) == 1
    assert list(packets) == []


def test_ctrl_c_in_the_taking_thread_cancels_and_the_next_call_works(server, where):
    with Node(where["port"], most=0) as node:
        def interrupt():
            node.wait(node.tasks)
            signal.raise_signal(signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            map_(square, range(20), **where)
        thread.join()
        node.wait(lambda: node.kinds(Kind.END))
        ended(server)
        node.let()
        assert map_(square, [3], **where) == [[9]]


class Twice(list):
    """A list with an iterator of its own, which does not know how long it is."""

    def __iter__(self):
        for item in super().__iter__():
            yield item
            yield item


@pytest.mark.parametrize("chunksize", [1, 3])
def test_a_list_is_read_by_its_own_iterator_to_its_end(chunksize):
    with ThreadPoolExecutor(1) as executor:
        found = map_(square, Twice(range(100)), chunksize=chunksize, executor=executor)
    assert sum(found, []) == [n * n for n in range(100) for _ in range(2)]


def test_the_connection_ends_also_where_the_end_of_a_journal_is_an_error(where, node, tmp_path, monkeypatch):
    """As on a network's disk that is full."""
    def fail(self):
        close(self)
        raise OSError("no space left")

    close = Journal.close
    monkeypatch.setattr(Journal, "close", fail)
    packets = imap(square, range(5), journal=tmp_path / "journal", **where)
    with pytest.raises(OSError, match="no space left"):
        packets.close()
    assert not packets._controller._reader.is_alive()


# Errors of arguments.


@pytest.mark.parametrize("function", CALLS)
def test_the_first_error_is_raised_and_the_job_cancelled(server, where, node, function):
    with pytest.raises(ValueError, match="5 is too much") as caught:
        list(function(below_five, range(100), **where))
    assert caught.value.index == 5 and "Traceback" in str(caught.value.__cause__)
    ended(server)


@pytest.mark.parametrize("function", CALLS)
def test_what_callback_error_returns_takes_the_place(where, node, function):
    seen = []

    def handle(error):
        seen.append((error.index, threading.current_thread(), "Traceback" in str(error.__cause__)))
        return "bad"

    found = list(function(below_five, range(7), callback_error=handle, **where))
    expected = [0, 1, 2, 3, 4, "bad", "bad"]
    assert found == ([expected] if function is map_ else [{"ARGS_COUNTER": 0, "RESULT": expected}])
    assert seen == [(5, threading.current_thread(), True), (6, threading.current_thread(), True)]


def test_a_callback_error_that_raises_ends_the_job(server, where, node):
    def handle(error):
        raise KeyError("mine") from error

    with pytest.raises(KeyError, match="mine"):
        map_(below_five, range(20), callback_error=handle, **where)
    ended(server)


def test_the_iterables_own_error(where, node):
    def breaking():
        yield from range(8)
        raise OSError("the disk")

    with imap(square, breaking, **where) as packets:
        assert next(packets)["RESULT"] == [n * n for n in range(8)]
        with pytest.raises(OSError, match="the disk"):
            next(packets)
    with pytest.raises(OSError, match="the disk"):
        map_(square, breaking, **where)


@pytest.mark.parametrize("error", [TimeoutError("mine"), InterruptedError("mine"), KeyError("mine")])
def test_the_iterables_own_error_is_not_taken_for_one_of_ours(where, node, error):
    def breaking():
        yield 1
        raise error

    with pytest.raises(type(error), match="mine"):
        map_(square, breaking, **where)
    with imap(square, breaking, **where) as packets:
        assert next(packets)["RESULT"] == [1]
        with pytest.raises(type(error), match="mine"):
            next(packets)


# Errors of settings and things.


def test_a_wrong_secret(where, monkeypatch):
    monkeypatch.setattr("achilles.server.listen.REFUSAL_SECONDS", 0.01)
    with pytest.raises(PermissionError) as caught:
        map_(square, [1], **where | {"secret_key": "not it, but long enough"})
    text = str(caught.value)
    assert f"127.0.0.1:{where['port']}" in text and "'ann'" in text and "SECRET_KEY" in text
    assert "not it" not in text and SECRET not in text


@pytest.mark.parametrize("function", [
    lambda **where: map_(square, [1], **where), cluster_status, lambda **where: kill_cluster(True, **where)])
def test_an_unreachable_server(free_port, function):
    with pytest.raises(ConnectionError, match=rf"127\.0\.0\.1:{free_port}.*python -m achilles\.server"):
        function(**address(free_port))


def test_what_answers_there_is_no_server_of_ours(monkeypatch):
    monkeypatch.setattr("achilles.protocol.connect.CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def answer():
            sock, _ = listener.accept()
            with sock:
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 100\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(errors.AchillesError):
            map_(square, [1], **address(listener.getsockname()[1]))
        thread.join()


def test_a_function_that_cannot_be_dumped_is_named_before_anything_is_connected():
    unfit = (n for n in ())

    def func(x):
        return unfit

    with pytest.raises(TypeError, match=r"function .*func cannot be sent to a node: .* in the function"):
        map_(func, [1], **address(1))


def test_an_argument_that_cannot_be_dumped_is_named(where, node):
    with pytest.raises(TypeError, match=r"argument 1 \(of type generator\) cannot be sent"):
        map_(square, [1, (n for n in ())], **where)


def test_a_function_over_the_limit(where, monkeypatch):
    monkeypatch.setattr("achilles.protocol.frames.LETTER_LIMIT_BYTES", 5000)
    data = bytes(6000)
    with pytest.raises(errors.LetterTooLarge, match=r"function .* has 6,.* bytes, no more than 5,000"):
        map_(lambda x: data, [1], **where)


def test_nodes_of_another_python(where, server):
    with Node(where["port"], python="3.9"), pytest.raises(errors.VersionError, match=r"the nodes run 3\.9"):
        map_(square, [1], **where)


# kill_cluster and cluster_status.


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_kill_cluster_without_a_terminal_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("YES\n"))
    with pytest.raises(ValueError, match="command_verified=True"):
        kill_cluster(**address(1))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="command_verified=True"):
        kill_cluster(**address(1))


@pytest.mark.parametrize("answer", ["", "yes", "no", "YES!"])
def test_any_other_answer_leaves_all_running(where, node, monkeypatch, capfd, answer):
    monkeypatch.setattr(sys, "stdin", Terminal(answer + "\n"))
    assert kill_cluster(**where) is False
    out, err = capfd.readouterr()
    assert out == "" and "YES" in err
    assert map_(square, [3], **where) == [[9]]


def test_yes_ends_all(where, node, monkeypatch):
    monkeypatch.setattr("achilles.server.listen.KILLED_SECONDS", 0.3)
    monkeypatch.setattr(sys, "stdin", Terminal("YES\n"))
    assert kill_cluster(**where) is True
    node.wait(lambda: node.kinds(Kind.BYE) == [{"reason": "killed"}])


def test_running_callers_raise_cluster_killed(where, monkeypatch):
    monkeypatch.setattr("achilles.server.listen.KILLED_SECONDS", 0.3)
    with Node(where["port"], most=0) as node, imap(square, range(3), **where) as packets:
        node.wait(node.tasks)
        assert kill_cluster(command_verified=True, **where) is True
        with pytest.raises(errors.ClusterKilled, match="kill_cluster"):
            next(packets)


def test_cluster_status_is_plain_dicts(where, node):
    state = cluster_status(**where)
    (found,) = state["nodes"]
    assert set(found) == {"id", "address", "python", "version", "cpu_count", "busy", "done", "since"}
    assert set(state["server"]) == {"version", "uptime", "memory"} and state["jobs"] == []
    assert abs(found["since"] - time.time()) < 60


def test_an_index_is_kept_by_exceptions_of_all_kinds(where, node):
    def strange(x):
        class Slotted(Exception):
            __slots__ = ()

            def __setattr__(self, name, value):
                if not name.startswith("__"):
                    raise AttributeError(name)

        raise Slotted

    assert map_(strange, [1, 2], callback_error=lambda e: type(e).__name__, **where)[0][0] in ("Slotted", "RemoteError")


@pytest.mark.parametrize("callback_error", [None, lambda error: next(iter(()))])
def test_a_stop_iteration_of_the_users_does_not_pass_for_the_end(where, callback_error):
    def stops(x):
        if x == 3:
            raise StopIteration
        return x

    with Node(where["port"]):
        for call in CALLS:
            with pytest.raises(RuntimeError, match="StopIteration") as caught:
                list(call(stops, range(10), callback_error=callback_error, **where))
            assert callback_error is not None or caught.value.index == 3


def test_a_stop_iteration_of_what_makes_the_arguments_does_not_either(where):
    with Node(where["port"]), pytest.raises(RuntimeError, match="StopIteration"):
        map_(square, lambda: next(iter(())), **where)


def test_several_threads_take_each_packet_once():
    with ThreadPoolExecutor(2) as engine, ThreadPoolExecutor(4) as callers:
        packets = imap(abs, range(400), executor=engine)
        parts = [callers.submit(list, packets) for _ in range(4)]
        got = [value for part in parts for packet in part.result(SECONDS) for value in packet["RESULT"]]
    assert sorted(got) == [*range(400)]
