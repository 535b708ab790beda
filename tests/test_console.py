"""What the commands share: options, exit statuses, the log, signals, the table of a status."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import threading

import pytest

from achilles import console
from achilles.errors import AddressError, AuthenticationError, ConfigurationError, ServerUnreachable


def test_say_prints_at_once(monkeypatch):
    class Stream(io.StringIO):
        flushed = ""

        def flush(self):
            self.flushed = self.getvalue()

    monkeypatch.setattr(sys, "stdout", Stream())
    console.say("one")
    assert sys.stdout.flushed == "one\n"


def test_a_closed_stdout_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    sys.stdout.close()
    console.say("one")


@pytest.mark.parametrize(("error", "status"), [
    (ConfigurationError("what"), 2), (AuthenticationError("what"), 2), (ServerUnreachable("what"), 1),
    (AddressError(98, "what"), 1), (KeyboardInterrupt(), 130)])
def test_errors_become_a_line_and_a_status(error, status, capfd):
    with console.errors_to_exit_status() as found:
        raise error
    out, err = capfd.readouterr()
    assert found.code == status and out == ""
    assert status == 130 or (err.startswith("error: ") and "what" in err and "Traceback" not in err)


def test_no_error_is_0_and_others_are_not_hidden():
    with console.errors_to_exit_status() as status:
        pass
    assert status.code == 0
    with pytest.raises(ZeroDivisionError), console.errors_to_exit_status():
        raise ZeroDivisionError


def test_there_is_no_option_for_a_secret():
    text = console.parser("server", "x").format_help()
    for option in ("--host", "--port", "--username", "--secret-key-file", "--env-file", "--log-level"):
        assert option in text
    assert "python -m achilles.server" in text
    with pytest.raises(SystemExit):
        console.parser("server", "x").parse_args(["--secret-key", "x"])


def test_a_prefix_of_an_option_is_no_secret_either(capfd):
    """`--secret bar` must not be taken for --secret-key-file: it would stand in the process list."""
    with pytest.raises(SystemExit):
        console.parser("server", "x").parse_args(["--secret", "bar"])


def test_the_log_goes_to_stderr_with_the_time():
    source = "import logging; from achilles import console as c; c.parse(c.parser('x', ''), [])\n" \
        "logging.getLogger('achilles.x').info('came'); logging.getLogger('achilles.x').debug('not')"
    done = subprocess.run([sys.executable, "-W", "error", "-c", source], capture_output=True, text=True)
    assert done.stdout == "" and "INFO achilles.x: came\n" in done.stderr and "not" not in done.stderr
    assert done.stderr[:2] == "20" and "Z INFO" in done.stderr


def test_no_handler_is_in_the_library():
    done = subprocess.run(
        [sys.executable, "-c", "import logging, achilles.calls, achilles.server, achilles.node\n"
         "print(logging.getLogger().handlers, logging.getLogger('achilles').handlers)"], capture_output=True, text=True)
    assert done.stdout == "[] []\n", done.stderr


def test_the_secret_of_a_file_is_its_first_line(tmp_path):
    file = tmp_path / "secret"
    file.write_text("a secret\nand more\n")
    file.chmod(0o600)
    assert console.read_secret(None) is None
    assert console.read_secret(str(file)).reveal() == "a secret"
    if os.name == "posix":
        file.chmod(0o644)
        with pytest.raises(ConfigurationError, match="chmod 600"):
            console.read_secret(str(file))
    with pytest.raises(ConfigurationError, match="gone"):
        console.read_secret(str(tmp_path / "gone"))


def test_handlers_are_set_for_a_while_in_the_main_thread_alone():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    children = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    came = []
    with console.signal_handlers(lambda number, frame: came.append(number)):
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert came == [signal.SIGTERM, signal.SIGINT]
    assert signal.signal(signal.SIGCHLD, children) == signal.SIG_IGN
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))

    def elsewhere():
        with console.signal_handlers(lambda number, frame: None):
            came.append(signal.getsignal(signal.SIGTERM) == before[0])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert came[-1] is True


def test_the_table_shows_all_nodes_and_jobs():
    node = {"id": 0, "address": "10.0.0.2", "python": "3.11", "version": "1.0.0", "cpu_count": 8, "busy": 3, "done": 12,
            "since": 1.0}
    job = {"id": 7, "user": "ann", "queued": 5, "running": 3, "done": 12, "longest": 0, "node": None, "pid": None}
    stuck = job | {"id": 11, "longest": 62, "node": 2, "pid": 4711}
    older = {key: job[key] for key in ("id", "user", "queued", "running", "done")}
    server = {"version": "1.0.0", "uptime": 61.7, "memory": 10}
    text = console.status_table({"nodes": [node, node | {"id": 11}], "jobs": [job, stuck, older],
                                 "server": server})
    assert text.splitlines() == [
        "server: version 1.0.0, up 62 s", "",
        "nodes: 2",
        "id  address   python  version  cpu_count  busy  done",
        "0   10.0.0.2  3.11    1.0.0    8          3     12",
        "11  10.0.0.2  3.11    1.0.0    8          3     12", "",
        "jobs: 3",
        "id  user  queued  running  done  longest  node  pid",
        "7   ann   5       3        12    0        -     -",
        "11  ann   5       3        12    62       2     4711",
        "7   ann   5       3        12    -        -     -",
    ]
    assert console.status_table({"nodes": [], "jobs": [], "server": server}).endswith("nodes: 0\n\njobs: 0")


def test_what_stdout_has_no_bytes_for_is_escaped_and_all_else_is_shown(monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="latin-1"))
    console.say("J\xf6rg \N{GRINNING FACE}\n7 nodes")
    console.say("J\xf6rg")
    assert out.getvalue() == b"J\xf6rg \\U0001f600\n7 nodes\nJ\xf6rg\n"


def test_a_stream_that_takes_nothing_does_not_become_the_exit_status(monkeypatch):
    class Full:
        def flush(self):
            raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(sys, "stderr", Full())
    with console.errors_to_exit_status() as status:
        pass
    assert sys.stderr is None and status.code == 0


needs_hangup = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")


@needs_hangup
@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_hangup_is_a_word_to_read_again_even_under_nohup(monkeypatch, before):
    monkeypatch.setattr(console, "_has_terminal", lambda: False)
    came = []
    own = signal.signal(signal.SIGHUP, before)
    try:
        with console.signal_handlers(lambda number, frame: came.append(number), lambda: came.append("again")):
            signal.raise_signal(signal.SIGHUP)
        assert came == ["again"] and signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, own)


@needs_hangup
@pytest.mark.parametrize(("before", "last"), [(signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, "again")])
def test_a_hangup_of_the_terminal_itself_ends_unless_under_nohup(monkeypatch, before, last):
    there, came = [True], []
    monkeypatch.setattr(console, "_has_terminal", lambda: there[0])
    own = signal.signal(signal.SIGHUP, before)
    try:
        with console.signal_handlers(lambda number, frame: came.append(number), lambda: came.append("again")):
            signal.raise_signal(signal.SIGHUP)
            there[0] = False
            signal.raise_signal(signal.SIGHUP)
        assert came == ["again", last]
    finally:
        signal.signal(signal.SIGHUP, own)


@needs_hangup
@pytest.mark.parametrize(("number", "gone"), [
    (errno.EMFILE, False), (errno.ENFILE, False), (errno.ENOMEM, False), (errno.EACCES, False),
    (errno.ENXIO, True), (errno.ENOENT, True), (errno.ENODEV, True), (errno.EIO, True)])
def test_a_terminal_that_cannot_be_opened_for_another_reason_is_not_gone(monkeypatch, number, gone):
    """A server with no descriptor left must not take the word to read again for the end of its terminal."""
    came, answers = [], [None, number]

    def tty(path, flags):
        assert path == "/dev/tty"
        failure = answers.pop(0)
        if failure is not None:
            raise OSError(failure, os.strerror(failure))
        return 4711

    own = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(console.os, "open", tty)
            patched.setattr(console.os, "close", lambda descriptor: None)
            with console.signal_handlers(lambda number, frame: came.append(number), lambda: came.append("again")):
                signal.raise_signal(signal.SIGHUP)
        assert came == ([signal.SIGHUP] if gone else ["again"]) and not answers
    finally:
        signal.signal(signal.SIGHUP, own)
