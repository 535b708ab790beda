"""Looking for the secret where it must not be: command lines, environments, logs, tracebacks, reprs.

They back "never an argument of a command" and "Where the secret is" of docs/security.md. What a worker that was forked
can read in its own memory, or in /proc/PID/environ of a node that was given the secret by its environment, it can read:
code that runs on a node has the secret, says that page, and the table has it as a remark.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import multiprocess
from faults import tree

import achilles
from achilles import LocalCluster, config, configuring, local
from achilles.controller.connection import Controller
from achilles.errors import AchillesError
from achilles.node import __main__ as node_command
from achilles.protocol import auth
from achilles.server import __main__ as server_command
from achilles.server import listen

from . import raw
from .bench import KEY, SECRET, USER, USER_BYTES, WRONG, Bench, Watched, attack
from .look import fail, look

OTHER = "another secret, long too"


def needles(secret: str = SECRET, key: bytes = KEY) -> list[str]:
    """The secret, and what it becomes, in the ways in which they might be printed."""
    return [secret, repr(secret)[1:-1], secret.encode().hex(), key.hex(), repr(key)[2:-1], str(list(key))]


def clean(text: object, where: str, secrets: Iterable[str] | None = None) -> None:
    """The secret is not in it."""
    found = text if isinstance(text, str) else repr(text)
    for needle in needles() if secrets is None else secrets:
        assert needle not in found, f"the secret is in {where}"


def command_lines(pids: Iterable[int]) -> dict[int, str]:
    """Of the processes that are there."""
    lines = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            lines[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return lines


def initial_environment(pid: int) -> str:
    """As /proc tells it: what a process was started with, whatever it did to it."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    return ""


@attack("node", "the secret in command lines and environments of a cluster, its workers and their children")
def secret_in_processes(bench: Bench) -> None:
    """It is given by the environment, a file, a file of its own; workers are forked, spawned, served: it is in none.

    Of a node that had it in its environment, /proc/PID/environ still tells, and that of its forked workers: a remark.
    """
    methods = [m for m in ("fork", "forkserver", "spawn") if m in multiprocess.get_all_start_methods()]
    remaining = set()
    for method in methods[:1] if bench.short else methods:
        cluster = bench.cluster(start_method=method)
        secret_file = cluster.folder / "secret"
        with open(os.open(secret_file, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            file.write(SECRET + "\n")
        ways: dict[str, tuple[dict[str, str], list[str]]] = {
            "environment": ({"ACHILLES_SECRET_KEY": SECRET, "ACHILLES_PREVIOUS_SECRET_KEY": SECRET}, []),
            "file": ({}, []), "file of its own": ({}, ["--secret-key-file", str(secret_file)]),
        }
        for way, (environment, options) in ways.items():
            if way == "file of its own" and bench.short:
                continue
            honest = dict(cluster.env)
            cluster.env.update(environment)
            started = cluster.start_node(1, *options)
            cluster.env.clear()
            cluster.env.update(honest)
            found = bench.call(cluster, "map", look, [0]).result(30)[0]
            clean(found, f"what a worker sees ({method}, {way})")
            pids = {cluster.server.pid} | tree.family(started.pid)
            assert found["pid"] in pids
            for pid, line in command_lines(pids).items():
                clean(line, f"the command line of {pid} ({method}, {way})")
                bench.count()
            if SECRET in initial_environment(found["pid"]):
                remaining.add(f"{method}, by the {way}")
            assert way == "environment" or SECRET not in initial_environment(started.pid)
            started.kill()
            bench.count()
    assert remaining <= {"fork, by the environment"}, remaining
    bench.note(remark=f"left in /proc/PID/environ of workers: {', '.join(sorted(remaining)) or 'nowhere'}")


@attack("node", "the secret in command lines and environments of a LocalCluster")
def secret_in_local_cluster(bench: Bench) -> None:
    """Its processes get it through stdin: it is in no command line, no environment, nor what a worker sees."""
    before = tree.family(os.getpid())
    with LocalCluster(nodes=1, cpu_count=1) as cluster:
        secret = cluster.secret_key.reveal()
        found = achilles.map(look, [0], host=cluster.host, port=cluster.port, username=cluster.username,
                             secret_key=secret)[0][0]
        secrets = needles(secret, raw.derive(cluster.username.encode(), secret))
        clean(found, "what a worker sees", secrets)
        pids = tree.family(os.getpid()) - before
        assert len(pids) >= 3, pids
        for pid, line in command_lines(pids).items():
            clean(line, f"the command line of {pid}", secrets)
            clean(initial_environment(pid), f"the environment of {pid}", secrets)
            bench.count(2)
        clean(repr(cluster) + str(vars(cluster)), "its repr", secrets)
    bench.count()


@attack("listens", "the secret in logs, at their most talkative")
def secret_in_logs(bench: Bench) -> None:
    """Of server, node and caller at level DEBUG, through work, refusals, errors of a task and of the protocol.

    Neither the secret nor the key that is made of it, nor what a client wrongly gave for it.
    """
    cluster = bench.cluster()
    started = cluster.start_node(1, "--log-level", "debug")
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logger = logging.getLogger("achilles")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        errors = [
            _error(lambda: achilles.map(fail, [1], **cluster.address)),
            _error(lambda: achilles.cluster_status(**cluster.address | {"secret_key": OTHER})),
        ]
        raw.claim(cluster.port, raw.proving(b"N", USER_BYTES, WRONG))
        with cluster.join(b"N", 1) as link:
            link.send("JOB")
            link.rest()
        with cluster.join(b"C") as link:
            link.sock.sendall(b"\xff" * 100)
            link.rest()
        refused = subprocess.run(
            [sys.executable, "-m", "achilles.node", "--log-level", "debug", "--cpu-count", "1"],
            env=cluster.env | {"ACHILLES_SECRET_KEY": OTHER}, capture_output=True, text=True, timeout=30, check=False)
        assert refused.returncode == 2, refused
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    started.popen.terminate()
    assert started.wait() == 0
    cluster.modules()
    texts = {"a caller's log": heard.getvalue(), "a refused node's": refused.stderr + refused.stdout}
    for process in (cluster.server, started):
        texts[process.out.name] = process.out.read_text()
        texts[process.err.name] = process.err.read_text()
    texts |= {f"the traceback of a {type(e).__name__}": "".join(traceback.format_exception(e)) for e in errors}
    assert "Traceback" in "".join(texts.values()) and "DEBUG" in texts[cluster.server.err.name]
    assert "HELLO" in texts["a caller's log"]
    for where, text in texts.items():
        clean(text, where, [*needles(), *needles(OTHER, WRONG)])
        bench.count()


def _error(work: Callable[[], object]) -> BaseException:
    try:
        work()
    except (AchillesError, ValueError) as e:
        return e
    raise AssertionError("no error")


@attack("listens", "the secret in messages of errors, and in what prints a setting")
def secret_in_messages(bench: Bench) -> None:
    """A file that cannot be read, a secret that will not do, and whatever has a repr: `***` at most."""
    folder = bench._folder("files")
    cluster = bench.cluster()
    errors: list[BaseException] = []

    def given(text: str, mode: int = 0o600) -> None:
        path = folder / f"env{len(errors)}"
        path.write_text(text)
        path.chmod(mode)
        errors.append(_error(lambda: config.resolve("127.0.0.1", 1, USER, env_file=path, ask=False)))

    given(f"SECRET_KEY='{SECRET}")
    given(f'SECRET_KEY="{SECRET}')
    given(f"SECRET_KEY='{SECRET}' {SECRET}")
    given(f"SECRET_KEY='{SECRET}'\n", 0o644)
    given(f"SECRET_KEY='{SECRET}\0'\n")
    path = folder / "env"
    for secret, host in ((SECRET + "\0", "127.0.0.1"), (SECRET[:15], "10.0.0.1"), (SECRET.encode(), "127.0.0.1")):
        write = functools.partial(configuring.write_config, host, 1, USER, secret, env_file=path)  # type: ignore[arg-type]
        errors.append(_error(write))
    errors.append(_error(lambda: configuring.write_config("127.0.0.1", 1, USER, SECRET + "\n", env_file=path)))
    errors.append(_error(lambda: achilles.cluster_status("127.0.0.1", 1, USER, SECRET)))
    for error in errors:
        clean("".join(traceback.format_exception(error)) + repr(error), repr(error), [*needles(), SECRET[:15]])
        bench.count()
    settings = config.resolve(**cluster.address)
    controller = Controller(lambda: settings)
    controller.open()
    try:
        for thing in _things(settings, controller, cluster):
            for text in (repr(thing), str(thing), f"{thing}", f"{thing!r:>200}"):
                clean(text, f"the repr of a {type(thing).__name__}")
            bench.count()
        clean(repr(vars(controller)), "a Controller's attributes")
    finally:
        controller.close()
    for copier in (pickle.dumps, copy.copy, copy.deepcopy, lambda s: pickle.dumps(settings)):
        try:
            copier(settings.secret)
            raise AssertionError("a Secret was copied")
        except TypeError:
            bench.count()


def _things(settings: config.Settings, controller: Controller, cluster: Watched) -> list[object]:
    key = auth.derive_key(USER, SECRET)
    keys = auth.session_keys(key, auth.PLAIN + bytes(32), auth.claim(auth.NODE, USER, bytes(32)))
    made = listen.Server(settings_of(0, settings))
    made._listener.server_close()
    pool = achilles.Pool(1, **cluster.address)
    pool.terminate()
    pool.join()
    return [settings, settings.secret, [settings], {"secret": settings.secret}, (settings.secret,), controller, made,
            controller._channel, keys, auth.Tagger(keys.client_data), pool]


def settings_of(port: int, settings: config.Settings) -> config.Settings:
    """The same at another port."""
    return config.Settings(settings.host, port, settings.username, settings.secret, None, settings.secret,
                           settings.encrypt)


@attack("secret", "a secret on a command line")
def secret_as_an_argument(bench: Bench) -> None:
    """There is no option for it, nor does a shorter or a longer one pass for one."""
    for command in (server_command, node_command, local):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            command.main(["--help"])
        assert "--secret-key-file" in out.getvalue() or command is local
        assert "--secret-key " not in out.getvalue().replace("\n", " ")
        for option in ("--secret-key", "--secret", "--secret_key", "--password", "--secret-key=x"):
            with contextlib.redirect_stderr(io.StringIO()) as err:
                try:
                    command.main([option, "x"])
                    raise AssertionError(f"{option} is taken")
                except SystemExit as e:
                    assert e.code == 2, e.code
            assert "unrecognized arguments" in err.getvalue() or "required: script" in err.getvalue(), err.getvalue()
            bench.count()
