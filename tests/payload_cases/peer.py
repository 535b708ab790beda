"""How a table of cases is run: the decorators that fill it, and the peers against which it runs.

A file of cases is a script. It begins with `sys.path.insert(0, sys.argv[-1])`, so that it finds this module,
and it ends with `main()`. Its arguments name the peer::

    payload ROOT FOLDER PACKAGE WARNINGS HERE   letters alone: a worker process whose package has another name
    pool HERE                                   achilles.Pool, on the cluster that the environment names
    fork HERE                                   multiprocessing's own Pool under fork, which says what is right

The script runs in a copy of `folder`, which workers import from too.

`main` prints a JSON object, its last line: for each case "" or what went wrong, or "skipped: " and why.
"""

import importlib
import json
import pickle
import struct
import subprocess
import sys
import traceback
from pathlib import Path

ARGUMENTS = sys.argv[:]
MODE, HERE = ARGUMENTS[1], Path(ARGUMENTS[-1])
sys.argv[2:] = []  # they travel, and must not name the package there
LETTERS, OUTCOMES = "objects.letters", "objects.outcomes"  # the package's modules; the worker is told them
SECONDS = 30  # for one answer

CASES = []  # (name, function of a peer, {mode: why the case does not run there})
_held = []  # the function of a fork's first call, if pickle cannot name it

if MODE == "payload":
    sys.path.insert(0, ARGUMENTS[2])
    letters, outcomes = (importlib.import_module(f"achilles.{name}") for name in (LETTERS, OUTCOMES))


def case(name, arguments, check, **skip):
    """A function, its arguments, and a check of its results.

    :param skip: of `fork`, `pool`, `payload`: why the case does not run there.
    """
    def add(function):
        def run(peer):
            results = peer.map(function, arguments)
            assert check(*results), results
        CASES.append((name, run, skip))
        return function
    return add


def gives(name, argument, right, **skip):
    """A function, its one argument, and the right value."""
    return case(name, [argument], lambda result: result == right, **skip)


def program(name, **skip):
    """A case that drives the peer by itself."""
    def add(function):
        CASES.append((name, function, skip))
        return function
    return add


def expect(found, right):
    """Assert that both are equal."""
    assert found == right, f"{found!r} is not {right!r}"


def ask(peer, *functions, argument=1):
    """What each function gives, in calls of their own."""
    return [peer.map(function, [argument])[0] for function in functions]


def refused(peer, function, argument, *names, error=TypeError, initializers=()):
    """Assert that a call ends with this error, whose text has all these names."""
    try:
        got, = peer.map(function, [argument], initializers)
    except Exception as raised:
        got = raised
    assert isinstance(got, error), f"{type(got).__name__}: {got}"
    missing = [name for name in names if name not in str(got)]
    assert not missing, f"{missing} not in {type(got).__name__}: {got}"


class Payload:
    """A worker process, and this side of its context."""

    def __init__(self):
        command = [sys.executable, "-W", ARGUMENTS[5], "-c", (HERE / "worker.py").read_text(), *ARGUMENTS[3:5],
                   LETTERS, OUTCOMES]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ARGUMENTS[3])
        self.letters = []
        self.open("0")

    def open(self, name):
        self.name, self.context = name, letters.Context(caller=True)

    def bytes_of(self, parts):
        letter = b"".join(parts)
        self.letters.append(letter)
        assert b"achilles" not in letter and ARGUMENTS[4].encode() not in letter
        return letter

    def map(self, function, arguments, initializers=(), skip=()):
        self.context.refresh()
        start = [self.bytes_of(self.context.dump(pair)) for pair in initializers]
        letter = self.bytes_of(self.context.dump(function))
        parts = letters.dump_chunk(self.context, arguments)
        if skip:
            parts = letters.with_skips(parts, skip)
        request = pickle.dumps((self.name, start, letter, self.bytes_of(parts)))
        self.process.stdin.write(struct.pack(">Q", len(request)) + request)
        self.process.stdin.flush()
        size, = struct.unpack(">Q", self.process.stdout.read(8))
        reply = pickle.loads(self.process.stdout.read(size))
        if isinstance(reply, Exception):
            raise reply
        raised, answer = reply
        assert b"achilles" not in answer and ARGUMENTS[4].encode() not in answer
        values, errors = outcomes.load_outcomes(self.context, bytearray(answer), raised)
        for offset, error in errors.items():
            values[offset] = error
        return values

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(SECONDS)


class _Pools:
    """A Pool of one worker for each case, opened by its first call."""

    pool = None

    def open(self, name):
        self.close()

    def map(self, function, arguments, initializers=()):
        if self.pool is None:
            self.pool = self.make(*(initializers[0] if initializers else ()))
        results, found = self.pool.imap(function, arguments), []
        for _ in arguments:
            try:
                found.append(results.next(SECONDS))
            except Exception as error:
                found.append(error)
        return found

    def close(self):
        if self.pool is not None:
            self.pool.terminate()
            self.pool.join()
        self.pool = None


class Pool(_Pools):
    """achilles' own, on a cluster."""

    make = staticmethod(lambda *start: importlib.import_module("achilles").Pool(1, *start))


class Fork(_Pools):
    """multiprocessing's own. A first function that pickle cannot name is inherited."""

    make = staticmethod(lambda *start: importlib.import_module("multiprocessing").get_context("fork").Pool(1, *start))

    def map(self, function, arguments, initializers=()):
        if self.pool is None:
            try:
                pickle.dumps(function)
            except Exception:
                _held[:] = [function]
                function = _call_held
        return super().map(function, arguments, initializers)


def _call_held(argument):
    return _held[0](argument)


def main():
    peer, found = {"payload": Payload, "pool": Pool, "fork": Fork}[MODE](), {}
    for number, (name, run, skip) in enumerate(CASES):
        assert name not in found, f"two cases are named {name!r}"
        if MODE in skip:
            found[name] = f"skipped: {skip[MODE]}"
            continue
        peer.open(str(number))
        try:
            run(peer)
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
    peer.close()
    print(json.dumps(found))
