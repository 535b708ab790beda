"""The server: places, refusals and its end in this process; its commands as processes of their own."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest
from conftest import wait_until
from fakes import SECONDS, SECRET, Node, address, serving, settings

from achilles import console
from achilles.calls import cluster_status, kill_cluster
from achilles.config import Secret, Settings
from achilles.configuring import can_encrypt
from achilles.controller.connection import Controller
from achilles.errors import AddressError, AuthenticationError, ClusterKilled, ServerUnreachable
from achilles.protocol import auth, channel
from achilles.protocol import connect as connecting
from achilles.protocol.connect import connect
from achilles.protocol.frames import Kind
from achilles.server import listen
from achilles.server.__main__ import main
from achilles.server.listen import Server

pytestmark = pytest.mark.usefixtures("no_leftovers", "unconfigured")
M1_BYTES = auth.OPENING_BYTES + auth.NONCE_BYTES
COMMAND = [sys.executable, "-W", "error", "-m", "achilles.server"]


@pytest.fixture
def running():
    with serving() as made:
        yield made


@pytest.fixture
def run(unconfigured):
    """Start `python -m achilles.server` with these options, and end it in the end."""
    made = []

    def start(*options, secret=SECRET, **popen):
        env = os.environ | {"ACHILLES_HOST": "127.0.0.1", "ACHILLES_USERNAME": "ann"} | popen.pop("env", {})
        if secret:
            env["ACHILLES_SECRET_KEY"] = secret
        made.append(subprocess.Popen([*COMMAND, *map(str, options)], env=env, text=True, **{
            "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen))
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.communicate()


def listening(process):
    """The port at which it listens, by what it prints."""
    where, listens = process.stdout.readline(), process.stdout.readline()
    assert where.startswith("ALERT: achilles_server initiated at 127.0.0.1:"), where + process.stderr.read()
    assert listens == "Listening for connections...\n"
    return int(where.rpartition(":")[2])


def finish(process):
    out, err = process.communicate(timeout=SECONDS)
    assert "Traceback" not in err and "Warning" not in err, err
    return process.returncode, out, err


def silent(port):
    """A client that only reads the greeting."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
    assert len(sock.recv(M1_BYTES, socket.MSG_WAITALL)) == M1_BYTES
    return sock


def controller(port, secret=SECRET):
    made = Controller(lambda: settings(port, secret))
    made.open()
    return made


# Its commands.


def test_it_prints_two_lines_at_once_and_sigterm_ends_it_with_0(run):
    process = run("--port", 0)
    port = listening(process)
    controller(port).close()
    process.terminate()
    status, out, _ = finish(process)
    assert (status, out) == (0, "")


def test_ctrl_c_ends_it_with_130(run):
    process = run("--port", 0)
    listening(process)
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130


DEAF = """
import os
import sys
from achilles.server.__main__ import main
from achilles.server.listen import Server
Server._wait_for_reason = lambda self: [os.write(1, (self._reasons.get() + chr(10)).encode()) for _ in range(9)]
sys.exit(main(["--port", "0"]))
"""


def test_a_second_signal_ends_it_where_the_first_does_not(monkeypatch):
    options(0)
    command = [sys.executable, "-c", DEAF]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as it:
        listening(it)
        it.terminate()
        assert it.stdout.readline() == "restart\n"
        it.terminate()
        assert finish(it)[0] == 128 + signal.SIGTERM


def test_after_a_kill_it_answers_for_a_while_unless_it_is_told_to_end(run):
    process = run("--port", 0)
    port = listening(process)
    assert kill_cluster(True, **address(port))
    with pytest.raises(ClusterKilled):
        controller(port)
    process.terminate()
    began = time.monotonic()
    assert finish(process)[0] == 0 and time.monotonic() - began < listen.KILLED_SECONDS - 3


def test_write_config_writes_a_private_file_and_tells_the_next_step_but_no_secret(run, unconfigured):
    process = run("--write-config", "--host", "10.1.2.3", secret=None)
    status, out, err = finish(process)
    assert status == 0 and str(unconfigured) in out
    text = unconfigured.read_text()
    secret = text.partition("SECRET_KEY='")[2].partition("'")[0]
    assert "HOST='10.1.2.3'" in text and len(secret) >= 32 and secret not in out + err
    assert stat.S_IMODE(unconfigured.stat().st_mode) == 0o600
    assert "scp -p" in out and "python -m achilles.node --env-file FILE" in out


def test_what_is_missing_is_named_and_exits_2(run):
    process = run(secret=None)
    status, out, err = finish(process)
    assert (status, out) == (2, "") and "secret_key" in err and "ACHILLES_SECRET_KEY" in err


def test_a_secret_comes_from_a_file_and_never_from_the_command_line(run, tmp_path):
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\nmore\n")
    file.chmod(0o600)
    process = run("--port", 0, "--secret-key-file", file, secret=None)
    controller(listening(process)).close()
    assert "--secret-key " not in subprocess.run([*COMMAND, "--help"], capture_output=True, text=True).stdout


def test_bind_is_where_it_listens_and_host_is_what_it_says(run):
    process = run("--port", 0, "--bind", "127.0.0.2")
    port = listening(process)
    with socket.create_connection(("127.0.0.2", port), timeout=SECONDS):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=SECONDS)


def test_a_short_secret_is_not_bound_to_where_others_can_connect(run):
    status, out, err = finish(run("--port", 0, "--bind", "0.0.0.0", secret="bar"))
    assert (status, out) == (2, "") and "0.0.0.0" in err and "16 characters" in err


def test_a_port_in_use_is_named_and_exits_1(run, running):
    port = running.address[1]
    status, out, err = finish(run("--port", port))
    assert (status, out) == (1, "") and f"127.0.0.1:{port}: another program does" in err and "another port" in err


@pytest.mark.parametrize(("number", "text"), [
    (errno.EACCES, "below 1024"), (errno.EADDRNOTAVAIL, "address of this machine")])
def test_other_reasons_not_to_listen_are_told_with_a_remedy(monkeypatch, number, text):
    def create(*args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(listen._Listener, "server_bind", create)
    with pytest.raises(AddressError, match=text) as caught:
        Server(settings(80))
    assert "127.0.0.1:80" in str(caught.value) and caught.value.errno == number


def test_a_host_that_has_no_address(monkeypatch):
    def fail(*args, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(AddressError, match="Name or service"):
        Server(settings())


def test_status_is_a_table_or_json_and_tells_by_its_exit_status(run, running, capfd):
    port = running.address[1]
    assert main(["--status", *options(port)]) == 3
    with Node(port, cpu_count=5):
        assert main(["--status", *options(port)]) == 0
        out = capfd.readouterr().out
        assert "nodes: 1" in out and "jobs: 0" in out and "server: version" in out
        row = out[out.index("cpu_count"):].splitlines()[1].split()
        assert row[0] == "0" and row[4] == "5"
        assert main(["--status", "--json", *options(port)]) == 0
        assert json.loads(capfd.readouterr().out)["nodes"][0]["cpu_count"] == 5


def options(port):
    os.environ.update({"ACHILLES_USERNAME": "ann", "ACHILLES_SECRET_KEY": SECRET, "ACHILLES_HOST": "127.0.0.1"})
    return ["--port", str(port)]


@pytest.fixture(autouse=True)
def own_environment():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_status_of_nobody_exits_1_and_names_it(free_port, capfd):
    assert main(["--status", *options(free_port)]) == 1
    err = capfd.readouterr().err
    assert f"127.0.0.1:{free_port}" in err and "python -m achilles.server" in err


def test_status_with_a_wrong_secret_exits_2(running, capfd, monkeypatch):
    monkeypatch.setattr(listen, "REFUSAL_SECONDS", 0.01)
    given = options(running.address[1])
    monkeypatch.setenv("ACHILLES_SECRET_KEY", "another secret, long")
    assert main(["--status", *given]) == 2
    err = capfd.readouterr().err
    assert str(running.address[1]) in err and "'ann'" in err and "another secret" not in err


# Places.


def test_of_65_silent_clients_the_oldest_is_closed_and_a_good_one_gets_in(running):
    port = running.address[1]
    clients = [silent(port) for _ in range(listen.PLACES)]
    try:
        wait_until(lambda: len(running._places) == listen.PLACES)
        clients.append(silent(port))
        assert clients[0].recv(1) == b"", "the oldest is closed"
        made = controller(port)
        assert clients[1].recv(1) == b"", "so is the next"
        made.close()
        for each in clients[2:]:
            each.setblocking(False)
            with pytest.raises(BlockingIOError):
                each.recv(1)
    finally:
        for each in clients:
            each.close()


def test_the_handshake_has_one_deadline_whatever_arrives(running, monkeypatch):
    monkeypatch.setattr(listen, "HANDSHAKE_SECONDS", 0.3)
    with silent(running.address[1]) as sock:
        began = time.monotonic()
        pause = threading.Event()
        closed = False
        while not closed and time.monotonic() - began < SECONDS:
            try:
                sock.send(b"A" if time.monotonic() - began > 0.01 else b"")
                sock.settimeout(0.05)
                closed = sock.recv(1) == b""
            except TimeoutError:
                pause.wait(0.05)
            except OSError:
                closed = True
        assert closed and time.monotonic() - began < 5


def test_a_refusal_takes_its_time_keeps_its_place_and_is_32_zero_bytes(running, monkeypatch):
    monkeypatch.setattr(listen, "REFUSAL_SECONDS", 0.4)
    with silent(running.address[1]) as sock:
        began = time.monotonic()
        sock.sendall(auth.claim(auth.NODE, "ann", bytes(32)) + bytes(32))
        wait_until(lambda: len(running._places) == 1)
        assert sock.recv(100) == bytes(32) and time.monotonic() - began >= 0.4
        assert sock.recv(1) == b""
    wait_until(lambda: not running._places)


@pytest.fixture
def encrypting():
    """A server that encrypts."""
    if not can_encrypt():
        pytest.skip("this Python cannot encrypt")
    server = Server(settings()._replace(encrypt=True))
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.end("restart")
    thread.join(SECONDS)


def half_handshake(port):
    """A client that has begun TLS, and says no more."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
    assert sock.recv(8, socket.MSG_WAITALL) == auth.TLS
    sock.sendall(b"\x16\x03\x01\x01\x00\x01\x00\x00\xfc\x03\x03")
    return sock


def test_half_a_handshake_of_tls_has_the_same_deadline_and_places(encrypting, monkeypatch):
    monkeypatch.setattr(listen, "PLACES", 3)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(half_handshake(encrypting.address[1])) for _ in range(10)]
        wait_until(lambda: len(encrypting._places) == 3 and len(encrypting._readers) == 3)
        assert [each.recv(1) for each in clients[:7]] == [b""] * 7
        assert cluster_status(**address(encrypting.address[1]) | {"encrypt": True})["nodes"] == []
    monkeypatch.setattr(listen, "HANDSHAKE_SECONDS", 0.1)
    with half_handshake(encrypting.address[1]) as sock:
        assert sock.recv(1) == b""


def test_a_refusal_in_tls_takes_its_time_and_keeps_its_place(encrypting, monkeypatch):
    monkeypatch.setattr(listen, "REFUSAL_SECONDS", 0.4)
    with half_handshake(encrypting.address[1]) as sock:
        began = time.monotonic()
        sock.sendall(bytes(300))
        wait_until(lambda: len(encrypting._places) == 1)
        assert sock.recv(100)[0] == 0x15 and time.monotonic() - began >= 0.4  # an alert
        assert sock.recv(1) == b""
    wait_until(lambda: not encrypting._places)


def test_who_loses_its_place_while_it_is_refused_has_no_thread_any_more(running, monkeypatch):
    monkeypatch.setattr(listen, "REFUSAL_SECONDS", SECONDS)
    monkeypatch.setattr(listen, "PLACES", 2)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            sock = stack.enter_context(silent(running.address[1]))
            sock.sendall(auth.claim(auth.NODE, "ann", bytes(32)) + bytes(32))
        wait_until(lambda: len(running._readers) <= 2, seconds=SECONDS / 2)
        assert len(running._places) == 2
        running.end("restart")


def test_a_connection_has_its_place_before_it_has_a_thread(running, monkeypatch):
    """A crowd of threads that have not begun is no larger than the places."""
    found, begin = [], running._listener.process_request

    def note(request, client):
        found.append(request in running._places)
        begin(request, client)

    monkeypatch.setattr(running._listener, "process_request", note)
    silent(running.address[1]).close()
    assert found == [True]


def test_who_loses_its_place_before_its_thread_runs_is_closed_in_silence(running, monkeypatch, caplog):
    monkeypatch.setattr(listen, "PLACES", 1)
    begin, go_on = running._listener.process_request_thread, threading.Event()

    def wait(request, client):
        assert go_on.wait(SECONDS)
        begin(request, client)

    monkeypatch.setattr(running._listener, "process_request_thread", wait)
    first, second = (socket.create_connection(("127.0.0.1", running.address[1]), timeout=SECONDS) for _ in range(2))
    with first, second:
        assert first.recv(1) == b"", "the second one has taken its place"
        go_on.set()
        assert second.recv(M1_BYTES, socket.MSG_WAITALL)
    wait_until(lambda: not running._readers)
    assert "a connection failed" not in caplog.text


def test_who_leaves_before_it_has_authenticated_leaves_its_place(running):
    silent(running.address[1]).close()
    with silent(running.address[1]) as sock:
        sock.sendall(b"GET / HTTP/1.1".ljust(104))
    wait_until(lambda: not running._places)


def test_refusals_of_a_user_do_not_keep_that_user_out(running, monkeypatch):
    """Failures are delayed and bounded by place, not by name: whoever fails as ann does not lock ann out."""
    monkeypatch.setattr(listen, "REFUSAL_SECONDS", SECONDS)
    with contextlib.ExitStack() as stack:
        for _ in range(2 * listen.PLACES):
            sock = stack.enter_context(silent(running.address[1]))
            sock.sendall(auth.claim(auth.CONTROLLER, "ann", bytes(32)) + bytes(32))
        for _ in range(3):
            controller(running.address[1]).close()
        running.end("restart")


@pytest.mark.parametrize(("user", "secret"), [("bob", SECRET), ("ann", "another secret, long")])
def test_an_unknown_user_and_a_wrong_secret_get_the_same(running, monkeypatch, user, secret):
    monkeypatch.setattr(listen, "REFUSAL_SECONDS", 0.01)
    with pytest.raises(AuthenticationError, match="^the server refused the username or the secret "):
        connect("127.0.0.1", running.address[1], auth.NODE, user, auth.derive_key(user, secret))


def test_a_previous_secret_is_good_while_it_is_replaced():
    new, old = Secret("n" * 20), Secret(SECRET)
    made = Server(Settings("127.0.0.1", 0, "ann", new, None, old))
    thread = threading.Thread(target=made.run)
    thread.start()
    try:
        controller(made.address[1]).close()
        controller(made.address[1], "n" * 20).close()
    finally:
        made.end("restart")
        thread.join(SECONDS)


# The secrets, read again.


needs_hangup = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")


def next_line(process, text):
    """The next line of its log that holds this."""
    while text not in (line := process.stderr.readline()):
        assert line, f"it ended without a word of {text!r}"
    return line


@needs_hangup
def test_a_file_that_is_no_good_changes_nothing_and_drops_nobody(run, unconfigured):
    new = "another secret, long"

    def write(text, mode=0o600):
        unconfigured.write_text(text)
        unconfigured.chmod(mode)

    write(f"SECRET_KEY='{SECRET}'\n")
    process = run("--port", 0, secret=None)
    port = listening(process)
    stays = controller(port)
    for text, mode, why in [(f"SECRET_KEY='{new}'\n", 0o644, "chmod 600"), ("", 0o600, "no SECRET_KEY"),
                            (f"SECRET_KEY='{new}\n", 0o600, "line 1"), ("SECRET_KEY=\n", 0o600, "is empty")]:
        write(text, mode)
        process.send_signal(signal.SIGHUP)
        line = next_line(process, "the secrets stay as they were")
        assert why in line and new not in line and " ERROR " in line
        controller(port).close()
    write(f"SECRET_KEY='{new}'\n")
    process.send_signal(signal.SIGHUP)
    line = next_line(process, "was read again")
    assert "a new one, no other one good" in line and new not in line and str(unconfigured) in line
    controller(port, new).close()
    with pytest.raises(AuthenticationError):
        controller(port)
    assert stays.status()["server"]["version"] and process.poll() is None
    stays.close()


@needs_hangup
def test_a_secret_from_elsewhere_is_not_read_again(run, unconfigured):
    unconfigured.write_text("SECRET_KEY='another secret, long'\n")
    unconfigured.chmod(0o600)
    process = run("--port", 0)
    port = listening(process)
    process.send_signal(signal.SIGHUP)
    assert "did not come from a configuration file" in next_line(process, "the secrets stay as they were")
    controller(port).close()


@pytest.mark.skipif(sys.platform != "linux", reason="there a session's leader gets the terminal that it opens first")
def test_a_server_in_a_terminal_reads_again_and_ends_when_that_is_closed(unconfigured):
    unconfigured.write_text(f"HOST=127.0.0.1\nPORT=0\nUSERNAME=ann\nSECRET_KEY='{SECRET}'\n")
    unconfigured.chmod(0o600)
    ours, theirs = os.openpty()
    name = os.ttyname(theirs)
    with subprocess.Popen(["sh", "-c", f'exec "$0" "$@" <{name}', *COMMAND], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, start_new_session=True,
                          preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)) as process:  # under nohup
        try:
            listening(process)
            os.close(theirs)
            process.send_signal(signal.SIGHUP)
            assert next_line(process, "was read again") and process.poll() is None
            os.close(ours)
            assert finish(process)[0] == 0
        finally:
            process.kill()


def test_beyond_the_most_connections_a_peer_is_told_so(running, monkeypatch):
    first = controller(running.address[1])
    monkeypatch.setattr(listen, "_most_connections", lambda: 1)
    with pytest.raises(ServerUnreachable, match="no room for another connection"):
        controller(running.address[1])
    assert first.status()["nodes"] == []
    first.close()
    monkeypatch.undo()


NO_FILES = """
import resource, sys, threading, time
sys.path.insert(0, sys.argv[1])
from fakes import settings
from achilles.server.listen import Server
made = Server(settings())
accepts = []
real = made._listener.get_request
made._listener.get_request = lambda: accepts.append(1) or real()
import os
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 3,) * 2)
threading.Thread(target=made.run, daemon=True).start()
print(made.address[1], flush=True)
sys.stdin.readline()
print(len(accepts), time.process_time(), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_without_descriptors_accepting_does_not_spin():
    folder = os.path.dirname(os.path.dirname(__file__))  # of fakes.py
    with subprocess.Popen([sys.executable, "-c", NO_FILES, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        port = int(process.stdout.readline())
        clients = [socket.create_connection(("127.0.0.1", port), timeout=SECONDS) for _ in range(8)]
        complaints = [process.stderr.readline()]
        began = time.monotonic()
        complaints += [process.stderr.readline() for _ in range(2)]
        took = time.monotonic() - began
        process.stdin.write("\n")
        process.stdin.flush()
        accepts, seconds = process.stdout.readline().split()
        for client in clients:
            client.close()
        process.kill()
    assert all("cannot accept a connection" in line for line in complaints)
    assert took > listen.NO_ROOM_SECONDS and int(accepts) < 50 and float(seconds) < 5


@pytest.mark.parametrize("name", ["process_request_thread", "achilles-writer"])
def test_without_threads_it_goes_on_and_does_not_spin(running, monkeypatch, caplog, name):
    """As where systemd's TasksMax is reached: whoever came then is closed, and the next one gets in."""
    real, failed = threading.Thread.start, []

    def start(thread):
        if name in thread.name and len(failed) < 2:
            failed.append(time.monotonic())
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(connecting, "RETRY_SECONDS", 0.01)
    link = connect("127.0.0.1", running.address[1], auth.CONTROLLER, "ann", auth.derive_key("ann", SECRET))
    wait_until(lambda: failed)
    link.close()
    wait_until(lambda: "can't start new thread" in caplog.text)
    monkeypatch.undo()
    controller(running.address[1]).close()
    assert failed
    assert name == "achilles-writer" or failed[1] - failed[0] >= listen.NO_ROOM_SECONDS


class OwnedLock:
    """A lock that knows its holder."""

    def __init__(self):
        self.lock, self.owner = threading.Lock(), None

    def __enter__(self):
        self.lock.acquire()
        self.owner = threading.get_ident()

    def __exit__(self, *raised):
        self.owner = None
        self.lock.release()


def test_no_log_is_written_under_the_lock_of_the_places(running, monkeypatch):
    """A log may wait for a disk or a terminal, and all who connect would wait with it."""
    monkeypatch.setattr(listen, "REFUSAL_SECONDS", 0.01)
    monkeypatch.setattr(listen, "PLACES", 2)
    running._places_lock = OwnedLock()
    lines = []

    class Handler(logging.Handler):
        def emit(self, record):
            lines.append((record.getMessage(), running._places_lock.owner == threading.get_ident()))

    handler, logger = Handler(), logging.getLogger("achilles")
    logger.addHandler(handler)
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    logging.getLogger("achilles.server.listen").setLevel(logging.DEBUG)
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(silent(running.address[1])).sendall(b"GET / HTTP/1.1".ljust(104))
            with pytest.raises(AuthenticationError):
                controller(running.address[1], "another secret, long")
            controller(running.address[1]).close()
            for _ in range(4):
                stack.enter_context(silent(running.address[1]))
        wait_until(lambda: any("left" in line for line, _ in lines))
        running.end("restart")
        wait_until(lambda: not running._readers)
    finally:
        logger.removeHandler(handler)
        logging.getLogger("achilles.server.listen").setLevel(logging.NOTSET)
    said = " ".join(line for line, _ in lines)
    assert "refused" in said and "did not authenticate" in said and not any(held for _, held in lines)


# Its end.


def test_after_a_kill_whoever_comes_back_is_told_the_same(running, monkeypatch):
    monkeypatch.setattr(listen, "KILLED_SECONDS", 2.0)
    port = running.address[1]
    with Node(port) as node:
        assert kill_cluster(True, **address(port)) is True
        node.wait(lambda: node.kinds(Kind.BYE) == [{"reason": "killed"}])
    with pytest.raises(ClusterKilled):
        controller(port)
    with Node(port) as late:
        late.wait(lambda: late.kinds(Kind.BYE) == [{"reason": "killed"}])


def test_the_end_closes_all_even_those_who_never_authenticated(running, monkeypatch):
    monkeypatch.setattr(listen, "HANDSHAKE_SECONDS", 10 * SECONDS)
    port = running.address[1]
    with silent(port) as sock, Node(port) as node:
        running.end("restart")
        node.wait(lambda: node.kinds(Kind.BYE) == [{"reason": "restart"}])
        assert sock.recv(1) == b""
    wait_until(lambda: not running._readers)


def test_the_limit_of_connections_stays_well_below_that_of_files(monkeypatch):
    for files, most in ((1024, 762), (16, 6), (8, 1), (10**6, 2000), (-1, 2000)):
        monkeypatch.setattr(os, "sysconf", lambda _, files=files: files)
        assert listen._most_connections() == most
    monkeypatch.delattr(os, "sysconf")
    assert listen._most_connections() == 2000, "on Windows"


def test_run_server_works_outside_the_main_thread_and_takes_no_signal(monkeypatch, capfd):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    statuses, made = [], []
    monkeypatch.setattr(listen, "Server", lambda *args: made.append(Server(*args)) or made[-1])
    thread = threading.Thread(target=lambda: statuses.append(listen.run_server("127.0.0.1", 0, "ann", SECRET)))
    thread.start()
    wait_until(lambda: made)
    controller(made[0].address[1]).close()
    made[0].end("restart")
    thread.join(SECONDS)
    assert statuses == [0] and before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert capfd.readouterr().out == (
        f"ALERT: achilles_server initiated at 127.0.0.1:{made[0].address[1]}\nListening for connections...\n")


def test_a_backlog_and_limits_as_documented():
    assert (listen.BACKLOG, listen.PLACES) == (1024, 64)
    assert (listen.HANDSHAKE_SECONDS, listen.REFUSAL_SECONDS, listen.KILLED_SECONDS) == (5, 1, 10)
    assert channel.SILENCE_SECONDS == 20


def test_write_config_keeps_a_secret_that_nodes_may_have(run, unconfigured):
    def secret():
        return next(line for line in unconfigured.read_text().splitlines() if line.startswith("SECRET_KEY"))

    assert finish(run("--write-config"))[0] == 0
    first = secret()
    assert finish(run("--write-config", "--host", "10.1.2.3"))[0] == 0
    assert secret() == first and "10.1.2.3" in unconfigured.read_text()


def test_write_config_refuses_an_address_that_nobody_can_connect_to(run, unconfigured):
    code, _, err = finish(run("--write-config", "--host", "0.0.0.0"))
    assert code == 2 and "--bind 0.0.0.0" in err and not unconfigured.exists()


@pytest.mark.parametrize("option", ["--json", "--follow"])
def test_an_option_of_a_status_starts_no_server(run, option):
    code, _, err = finish(run(option))
    assert code == 2 and "--status" in err


# A status that is followed.


def followed(run, running, *options, **popen):
    return run("--status", "--follow", "--port", running.address[1], *options, **popen)


def test_a_followed_status_is_printed_again_and_again_on_one_connection_until_ctrl_c(run, running):
    process = followed(run, running)
    heads = []
    began = time.monotonic()
    with Node(running.address[1]):
        while len(heads) < 4:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            assert "\033" not in line
            if line.startswith("server: version"):
                heads.append(line)
    assert time.monotonic() - began > 1.5
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 0
    wait_until(lambda: not running._exchange._peers, "the end of its connection")
    assert next(running._exchange._ids[auth.CONTROLLER]) == 1


def test_a_followed_status_as_json_is_one_object_after_the_other(run, running):
    process = followed(run, running, "--json")
    text = "".join(iter(lambda: process.stdout.readline(), "}\n")) + "}"
    assert json.loads(text)["nodes"] == []
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 0


def test_on_a_terminal_a_followed_status_is_drawn_in_place_as_far_as_it_has_room(run, running):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 5, 80, 0, 0))
    with open(ours, "rb", buffering=0) as terminal:
        process = followed(run, running, stdout=theirs)
        os.close(theirs)
        shown = b""
        while shown.count(console.CLEAR.encode()) < 3:
            shown += terminal.read(4096)
        process.send_signal(signal.SIGINT)
        while process.poll() is None:
            with contextlib.suppress(OSError):  # the terminal has no other side any more
                terminal.read(4096)
    assert finish(process)[0] == 0
    first, *drawn, _ = shown.decode().split(console.CLEAR)
    assert first == "" and len(drawn) == 2
    for each in drawn:
        assert each.startswith("server: version") and each.count("\n") == 4  # of the five lines, and one is empty


def test_a_followed_status_ends_when_nobody_reads_it(run, running):
    process = followed(run, running)
    assert process.stdout.readline().startswith("server: version")
    process.stdout.close()
    assert process.wait(SECONDS) == 0 and process.stderr.read() == ""


def test_a_followed_status_ends_with_its_server_and_says_so(run):
    with serving() as made:
        process = followed(run, made)
        assert process.stdout.readline().startswith("server: version")
    code, _, err = finish(process)
    assert code == 1 and f"127.0.0.1:{made.address[1]} gave no status" in err
