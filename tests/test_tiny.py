"""examples/tiny.py: its map, its handshake against ours, and the weaknesses that its header names."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import math
import operator
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import tasks
from cluster import PYTHON, Oracle, Process, descendants, environment
from conftest import wait_until
from plain_words import findings

from achilles.errors import AuthenticationError
from achilles.protocol import auth
from achilles.protocol.connect import accept, connect, receive_exactly

pytestmark = [
    pytest.mark.usefixtures("no_leftovers"),
    pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes in /proc"),
]
FILE = Path(__file__).parent.parent / "examples" / "tiny.py"
SECRET = "correct horse battery staple"
SECONDS = 30.0  # tells a hang from a wait
STUCK_SECONDS = 0.7  # a map that waits for ever is looked at for so long
TASK, RESULT = 7, 9


def load():
    spec = importlib.util.spec_from_file_location("tiny", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = load()
USER = tiny.USER.decode()


class Caller:
    """A map that a thread reads, so that a test sees what has come."""

    def __init__(self, results):
        self.results, self.error = [], None
        self._iterator = results
        self._thread = threading.Thread(target=self._read, name="caller")
        self._thread.start()

    def _read(self):
        try:
            for result in self._iterator:
                self.results.append(result)
        except Exception as error:
            self.error = error

    def wait(self, count):
        wait_until(lambda: len(self.results) >= count, lambda: f"{count} results, not {self.results}", SECONDS)

    def check_stuck_at(self, results):
        """These results come, and then nothing."""
        self.wait(len(results))
        self._thread.join(STUCK_SECONDS)
        assert self._thread.is_alive() and self.results == results, self.error

    def join(self):
        """Wait for the end of the map; return all results."""
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        return self.results


class TinyCluster:
    """A server and nodes, each a process of its own; what of it is left at the end is killed."""

    def __init__(self, folder):
        self._folder, self._callers, self.nodes = folder, [], []
        self.server = self._start("server", "0")
        self.port = int(self.server.wait_for(r"\d+\n")[0])
        self.address = "127.0.0.1", self.port

    def _start(self, role, port):
        env = environment(TINY_SECRET=SECRET)
        command = [*PYTHON, str(FILE), role, "127.0.0.1", port]
        return Process(self._folder, f"{role}-{len(self.nodes)}", command, env)

    def start_node(self):
        node = self._start("node", str(self.port))
        self.nodes.append(node)
        node.wait_for(f"{self.port}\n")
        return node

    def imap(self, function, arguments):
        return tiny.imap(function, arguments, self.address, SECRET)

    def call(self, function, arguments):
        """A map that a thread reads."""
        self._callers.append(Caller(self.imap(function, arguments)))
        return self._callers[-1]

    def close(self):
        processes = [self.server, *self.nodes]
        for process in processes:
            process.signal(signal.SIGCONT)  # its workers are remembered, too
        for process in processes:
            process.kill()
        for caller in self._callers:
            caller.join()
        for process in processes:
            for pid in process.family - {process.pid}:  # workers that are in a long call
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            process.check_family_gone()


@pytest.fixture
def empty(tmp_path):
    """A server without a node."""
    cluster = TinyCluster(tmp_path)
    yield cluster
    cluster.close()


@pytest.fixture
def node(empty):
    """The only node of the cluster."""
    return empty.start_node()


@pytest.fixture
def one(empty, node):
    """A cluster with one node."""
    return empty


@pytest.fixture
def cluster(one):
    """A cluster with two nodes."""
    one.start_node()
    return one


@pytest.fixture
def oracle(tmp_path):
    return Oracle(tmp_path)


# The file and its command.


def test_the_file_is_short_and_needs_no_other():
    source = FILE.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 250
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {name for node in found for name in ([node.module] if hasattr(node, "module") else
                                                 [alias.name for alias in node.names])}
    assert names <= sys.stdlib_module_names
    assert list(findings(source)) == []  # in plain words


def test_each_weakness_names_functions_of_the_file():
    weaknesses = re.findall(r"^- ([\w ]+): .*", tiny.__doc__, re.MULTILINE)
    named = {name for line in re.findall(r"^- .*", tiny.__doc__, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)}
    assert len(weaknesses) == 12
    known = {*vars(tiny), *vars(tiny.Link), *vars(tiny.Server)}
    assert named and named <= known


def test_the_command_prints_a_map_and_leaves_nothing():
    command = subprocess.Popen([*PYTHON, str(FILE)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    out, err = command.communicate(timeout=SECONDS)
    assert (command.returncode, out, err) == (0, "[0, 1, 4, 9, 16, 25, 36, 49, 64, 81]\n", "")

    def of_its_session():
        found = []
        for file in Path("/proc").glob("[0-9]*/stat"):
            try:
                session = file.read_text().rpartition(")")[2].split()[3]
            except OSError:  # it has ended meanwhile
                continue
            if int(session) == command.pid:
                found.append(file)
        return found

    wait_until(lambda: not of_its_session(), of_its_session)


# The map.


def test_every_result_comes_in_its_place(cluster):
    assert list(cluster.imap(tasks.square, range(300))) == [number**2 for number in range(300)]
    assert list(cluster.imap(tasks.square, [])) == []


def test_both_nodes_work(cluster):
    pids = set(cluster.imap(partial(tasks.pid_after, 0.05), range(8)))
    first, second = (set(descendants(node.pid)) for node in cluster.nodes)
    assert pids & first and pids & second and pids <= first | second


def test_two_maps_at_once(cluster):
    callers = [cluster.call(tasks.square, range(start, start + 100)) for start in (0, 1000)]
    assert callers[0].join() == [number**2 for number in range(100)]
    assert callers[1].join() == [number**2 for number in range(1000, 1100)]


def test_large_arguments_and_results(cluster):
    data = [os.urandom(3_000_000) for _ in range(4)]
    assert list(cluster.imap(tasks.reverse, data)) == [each[::-1] for each in data]


def test_tasks_wait_for_a_node(empty):
    caller = empty.call(tasks.square, [3])
    caller.check_stuck_at([])
    empty.start_node()
    assert caller.join() == [9]


# The handshake, against our own.


def test_the_keys_are_ours():
    m1, claim = auth.PLAIN + bytes(range(32)), auth.claim(auth.CONTROLLER, USER, bytes(range(32, 64)))
    assert tuple(tiny.session_keys(SECRET, m1, claim)) == auth.session_keys(auth.derive_key(USER, SECRET), m1, claim)


@pytest.mark.parametrize("role", [auth.CONTROLLER, auth.NODE])
def test_our_client_is_welcome(empty, role):
    connect("127.0.0.1", empty.port, role, USER, auth.derive_key(USER, SECRET)).close()


@pytest.mark.parametrize(("user", "secret"), [(USER, "no secret at all"), ("bob", SECRET)])
def test_a_client_with_another_secret_or_name_is_refused(empty, user, secret):
    with pytest.raises(AuthenticationError, match="refused the username or the secret"):
        connect("127.0.0.1", empty.port, auth.CONTROLLER, user, auth.derive_key(user, secret))


def test_its_own_client_with_another_secret_is_refused(empty):
    for role in (b"C", b"N"):
        with pytest.raises(ConnectionError, match="another secret"):
            tiny.connect(empty.address, role, "no secret at all")


def test_a_client_of_another_version_is_not_answered(empty):
    with socket.create_connection(empty.address, SECONDS) as sock:
        m1 = receive_exactly(sock, len(auth.PLAIN) + auth.NONCE_BYTES, time.monotonic() + SECONDS)
        claim = bytearray(auth.claim(auth.CONTROLLER, USER, os.urandom(32)))
        claim[5] = 2
        keys = auth.session_keys(auth.derive_key(USER, SECRET), m1, claim)
        sock.sendall(bytes(claim) + keys.client_proof)
        assert sock.recv(1) == b""


def our_client(address):
    """Do the handshake with our own functions; return the socket and the keys."""
    sock = socket.create_connection(address, SECONDS)
    m1 = receive_exactly(sock, len(auth.PLAIN) + auth.NONCE_BYTES, time.monotonic() + SECONDS)
    claim = auth.claim(auth.CONTROLLER, USER, os.urandom(32))
    keys = auth.session_keys(auth.derive_key(USER, SECRET), m1, claim)
    sock.sendall(claim + keys.client_proof)
    auth.check_answer(keys, receive_exactly(sock, auth.PROOF_BYTES, time.monotonic() + SECONDS))
    return sock, keys


def frame(kind, number, payload):
    """A frame of tiny.py without its tag."""
    envelope = number.to_bytes(8, "big") + payload
    return bytes([kind, 0, 0, 0]) + len(envelope).to_bytes(4, "big") + envelope


def test_frames_have_our_heads_and_tags_in_both_directions(one):
    sock, keys = our_client(one.address)
    sender, receiver = auth.Tagger(keys.client_data), auth.Tagger(keys.server_data)
    with sock:
        for number in (0, 1):
            signed = frame(TASK, number, pickle.dumps((tasks.square, 7)))
            sock.sendall(signed + sender.tag(signed))
            head = receive_exactly(sock, 8, time.monotonic() + SECONDS)
            envelope = receive_exactly(sock, int.from_bytes(head[4:], "big"), time.monotonic() + SECONDS)
            receiver.check(head + envelope, receive_exactly(sock, 32, time.monotonic() + SECONDS))
            assert head + envelope == frame(RESULT, number, pickle.dumps((True, 49)))


def test_a_frame_with_a_wrong_tag_ends_the_connection(one, oracle):
    sock, keys = our_client(one.address)
    with sock:
        signed = frame(TASK, 0, pickle.dumps((partial(tasks.recorded_square, oracle.path, 0), 7)))
        sock.sendall(signed + auth.Tagger(keys.server_data).tag(signed))  # the other direction's key
        assert sock.recv(1) == b""
    assert list(one.imap(tasks.square, [2])) == [4]
    assert oracle.runs() == []


@pytest.mark.parametrize("secret", [SECRET, "no secret at all"])
def test_its_client_and_our_server(secret):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ended = []

        def serve():
            sock, _ = listener.accept()
            with sock:
                try:
                    link, role, user = accept(
                        sock, lambda user: [auth.derive_key(user.decode(), SECRET)], time.monotonic() + SECONDS)
                except AuthenticationError as e:
                    ended.append(str(e))
                    return
                signed = frame(TASK, 5, b"task")
                sock.sendall(signed + link._tagger.tag(signed))
                signed = frame(RESULT, 5, b"result")
                assert receive_exactly(sock, len(signed), time.monotonic() + SECONDS) == signed
                link._reader._verify(signed, receive_exactly(sock, 32, time.monotonic() + SECONDS))
                ended.append((role, user))

        server = threading.Thread(target=serve)
        server.start()
        try:
            link = tiny.connect(listener.getsockname(), b"N", secret)
            with link.sock:
                assert link.recv() == (TASK, 5, b"task")
                link.send(RESULT, 5, b"result")
                server.join(SECONDS)
        except ConnectionError:
            assert secret != SECRET
        server.join(SECONDS)
    assert ended == [(b"N", tiny.USER) if secret == SECRET else f"the proof as user {tiny.USER.decode()!r} is wrong"]


def wait_sent():
    """Until the feeders of all maps have sent all tasks."""
    wait_until(lambda: not any("feed" in thread.name for thread in threading.enumerate()), "all tasks sent")


# Its weaknesses, in the order in which the header names them.


def test_a_killed_worker_loses_its_task(one, oracle):
    caller = one.call(partial(tasks.die_at, oracle.path, 3, "kill"), range(10))
    oracle.wait_for(10)
    caller.check_stuck_at([0, 1, 4])
    assert oracle.counts()[3] == 1  # nobody tries again


def test_a_killed_node_loses_its_tasks(one, node, oracle):
    caller = one.call(partial(tasks.hang_at, 2), range(4))
    caller.wait(2)
    node.kill()
    one.start_node()
    caller.check_stuck_at([0, 1])
    assert list(one.imap(tasks.square, [5])) == [25]  # others go on with the new node


def test_a_silent_node_is_not_missed(one, node):
    node.signal(signal.SIGSTOP)
    caller = one.call(tasks.square, range(4))
    caller.check_stuck_at([])
    node.signal(signal.SIGCONT)
    assert caller.join() == [0, 1, 4, 9]


def test_a_map_and_the_nodes_end_with_the_server(one, node):
    caller = one.call(partial(tasks.hang_at, 1), range(3))
    caller.wait(1)
    node.family |= set(descendants(node.pid))
    one.server.kill()
    assert caller.join() == [0] and isinstance(caller.error, ConnectionError)
    assert node.wait() == 0
    node.check_family_gone()


def test_an_endless_generator_is_swallowed(one, oracle):
    class StillReading(Exception):
        pass

    def endless():
        for number in itertools.count():
            if number == 50_000:
                raise StillReading
            yield number

    with pytest.raises(StillReading):
        next(one.imap(partial(tasks.recorded_square, oracle.path, 0), endless()))
    assert oracle.runs() == []


def test_results_that_a_caller_does_not_read_stop_the_others(one):
    unread = one.imap(bytes, [1 << 20] * 64)
    assert next(unread) == bytes(1 << 20)
    threading.Event().wait(STUCK_SECONDS)  # until the buffers are full
    other = one.call(tasks.square, range(3))
    other.check_stuck_at([])
    assert sum(1 for _ in unread) == 63
    assert other.join() == [0, 1, 4]


def test_each_task_is_a_frame():
    sent = []

    class Recorder:
        def send(self, *frame):
            sent.append(frame)

    tiny.feed(Recorder(), [b"first", b"second"])
    assert sent == [(TASK, 0, b"first"), (TASK, 1, b"second")]


def test_results_wait_behind_a_slow_one(one):
    caller = one.call(partial(tasks.hang_at, 0), range(20))
    wait_sent()
    assert list(one.imap(tasks.square, range(4))) == [0, 1, 4, 9]  # the other worker has come to these
    caller.check_stuck_at([])


def test_a_second_map_stands_behind_the_first(one, oracle):
    first = one.call(partial(tasks.recorded_square, oracle.path, 0.03), range(60))
    oracle.wait_for(2)
    wait_sent()
    assert list(one.imap(tasks.square, [5])) == [25]
    assert len(oracle.runs()) >= 59
    first.join()


def test_the_tasks_of_a_caller_that_left_run(one, oracle):
    results = one.imap(partial(tasks.recorded_square, oracle.path, 0.02), range(30))
    assert next(results) == 0
    wait_sent()
    results.close()
    oracle.wait_for(30)


def test_a_lambda_does_not_travel(one):
    with pytest.raises((pickle.PicklingError, AttributeError)):
        next(one.imap(lambda number: number, [1]))


def test_a_function_of_the_script_is_unknown_to_the_nodes(one, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(FILE.parent)!r}); import tiny\n"
        "def double(number):\n    return 2 * number\n"
        f"print(list(tiny.imap(double, [1], {one.address!r}, {SECRET!r})))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 1
    assert "RuntimeError: AttributeError(" in done.stderr and "double" in done.stderr


def test_an_exception_arrives_as_text(one):
    results = one.imap(partial(tasks.fail_at, (2,)), range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(RuntimeError, match=re.escape("ValueError('no 2')")):
        next(results)
    with pytest.raises(RuntimeError, match="generator"):  # neither does every result travel
        list(one.imap(tasks.return_generator, range(5)))


def test_silent_strangers_keep_threads(one):
    folder = f"/proc/{one.server.pid}/task"
    before = len(os.listdir(folder))
    strangers = [socket.create_connection(one.address, SECONDS) for _ in range(50)]
    wait_until(lambda: len(os.listdir(folder)) >= before + 50, "a thread for each stranger")
    assert list(one.imap(operator.neg, [1])) == [-1]
    for stranger in strangers:
        stranger.close()
    wait_until(lambda: len(os.listdir(folder)) <= before + 1, "the end of the threads")
    assert list(one.imap(math.sqrt, [4])) == [2]
