"""Attacks on letters, on each link and in each direction, without the key and with it.

A letter of more than 1,024 bytes is not under its frame's tag, but under a digest that is: who opens it looks, and
the chunk is sent anew. What stands in the place of a letter here is a pickle that makes a folder where it is loaded.
They back "nothing is unpickled before its signature holds" (docs/security.md), and the row of `LetterAltered`.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from faults.work import echo

from achilles import LetterAltered
from achilles.objects import letters, outcomes

from . import raw
from .bench import KEY, Bench, attack
from .raw import Frame

MARK = b"mark" * 1000
ARGUMENTS: list[Any] = [(n, b"x" * 2000) for n in range(4)] + [(4, MARK)]
LINKS = [(at_node, way) for at_node in (False, True) for way in (raw.UP, raw.DOWN)]
TRIED: set[str] = set()  # kinds of bombs that are known to go off
LOAD = """
import sys
from achilles.objects import letters, outcomes
letter = open(sys.argv[1], "rb").read()
context = letters.Context(caller=False)
letters.load_chunk(context, letter) if sys.argv[2] == "chunk" else context.load(letter)
"""


class Bomb:
    """Makes a folder where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def bomb(bench: Bench, what: str, length: int) -> tuple[bytes, Path]:
    """A letter of this length for a chunk, a result or a function, and what it makes where it is loaded."""
    folder = bench._folder("bomb")

    def make(path: Path, pad: int) -> bytes:
        context = letters.Context(caller=what != "result")
        values = [Bomb(path), b"." * pad]
        if what == "chunk":
            return b"".join(letters.dump_chunk(context, values))
        if what == "result":
            return b"".join(outcomes.dump_outcomes(context, values, {})[1])
        return b"".join(context.dump(tuple(values)))

    pad = length
    while (more := len(make(folder / "made", pad)) - length) > 0:  # the parts of a letter lie where their lengths say
        pad -= more
    letter = make(folder / "made", pad)
    letter += bytes(length - len(letter))  # nobody looks behind the end
    assert len(letter) == length, (len(letter), length)
    if what not in TRIED:
        (folder / "letter").write_bytes(make(folder / "test", pad))
        subprocess.run([sys.executable, "-c", LOAD, folder / "letter", what], check=True, timeout=30)
        assert (folder / "test").is_dir(), "it does nothing where it is loaded"
        TRIED.add(what)
    return letter, folder / "made"


class _Spoiler:
    """A tamper that replaces one letter of a kind, so often; what it did last is on record."""

    def __init__(self, bench: Bench, kind: str, how: str, times: int = 1) -> None:
        self.bench, self.kind, self.how, self.left = bench, kind, how, times
        self.made: list[Path] = []  # what must never be
        self.done = 0

    def __call__(self, pair: raw.Pair, way: int, number: int, frame: Frame) -> bytes | Frame:
        if frame.kind != self.kind or not self.left:
            return frame.raw
        chunks = frame.chunks
        at = next((n for n, chunk in enumerate(chunks) if MARK[:64] in chunk.letter), None)
        if at is None:
            return frame.raw
        self.left -= 1
        self.done += 1
        chunk = chunks[at]
        if self.how == "envelope":  # without the key: the tag tells
            head, envelope = frame.head, frame.envelope
            return head + envelope[:-1] + bytes([envelope[-1] ^ 1]) + frame.tag + frame.letters
        if self.how == "digest":  # with the key: the letter is as it was, its digest is not
            chunks[at] = chunk._replace(digest=bytes(32))
        else:
            what = {"TASK": "chunk", "RESULT": "result"}.get(self.kind, "function")
            length = len(chunk.letter) + (100 if self.how == "longer" else 0)
            letter, made = bomb(self.bench, what, length)
            self.made.append(made)
            assert chunk.digest == hashlib.sha256(chunk.letter).digest()
            chunks[at] = chunk._replace(letter=letter)
        changed = raw.encode(frame.kind, chunks=chunks, job=frame.job, number=frame.span[4], flags=frame.flags)
        return frame._replace(letters=changed.letters).raw if self.how == "letter" else changed

    def check(self) -> None:
        """It was altered, and never loaded."""
        assert self.done and not self.left, "nothing was altered"
        assert not any(made.exists() for made in self.made), "what was altered was loaded"


class _Stage:
    """A caller and a node of one cluster, each behind an attacker of its own, who knows the key, and may not use it."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.cluster = bench, bench.cluster()
        self.middles = [bench.middle(self.cluster.port, key=KEY) for _ in range(2)]
        self.cluster.start_node(1, "--port", str(self.middles[1].port))

    def play(self, spoiler: _Spoiler, at_node: bool, function: Any, arguments: list[Any]) -> tuple[dict[int, Any], int]:
        """A call; what it found, and how often the connection that was attacked was made anew."""
        middle = self.middles[at_node]
        before = len(middle.pairs) - at_node
        middle.tamper = spoiler
        found = self.bench.call(
            self.cluster, "imap", function, arguments, port=self.middles[0].port).result(30)
        spoiler.check()
        middle.tamper = raw._pass_on
        return found, len(middle.pairs) - before - 1


@attack("path", "a letter altered, on each link in each direction, without the key")
def altered_letters(bench: Bench) -> None:
    """An argument, a result: seen by who opens it, never loaded, sent anew; the call is right, the connection goes on.

    What is altered in an envelope ends the connection instead, and all is sent again over the next one.
    """
    stage = _Stage(bench)
    for at_node, way in LINKS:
        down = (way == raw.DOWN) == at_node  # towards the worker
        kind = "TASK" if down else "RESULT"
        for how in ("letter", "envelope"):
            spoiler = _Spoiler(bench, kind, how)
            found, anew = stage.play(spoiler, at_node, echo, ARGUMENTS)
            assert found == dict(enumerate(ARGUMENTS)), f"{found!r:.300}"
            assert anew == (how == "envelope"), f"{how}: connected anew {anew} times"
            bench.count()


@attack("secret", "a letter altered, on each link in each direction, and its frame signed anew")
def altered_letters_with_the_key(bench: Bench) -> None:
    """Who can sign frames, but not the letters in them, is caught by the digest: that is all the server could alter.

    A letter of another length under the old digest, and an old letter under another digest.
    """
    stage = _Stage(bench)
    for at_node, way in LINKS:
        kind = "TASK" if (way == raw.DOWN) == at_node else "RESULT"
        for how in ("longer", "digest"):
            spoiler = _Spoiler(bench, kind, how)
            found, anew = stage.play(spoiler, at_node, echo, ARGUMENTS)
            assert found == dict(enumerate(ARGUMENTS)), f"{found!r:.300}"
            assert not anew, "the connection was given up"
            bench.count()


@attack("path", "a letter altered each time it is sent")
def altered_for_ever(bench: Bench) -> None:
    """After three times in a row it is LetterAltered at its index, and the others have their results."""
    stage = _Stage(bench)
    for at_node, way in LINKS:
        spoiler = _Spoiler(bench, "TASK" if (way == raw.DOWN) == at_node else "RESULT", "letter", 3)
        found, _ = stage.play(spoiler, at_node, echo, ARGUMENTS)
        assert isinstance(found.pop(4), LetterAltered)
        assert found == dict(enumerate(ARGUMENTS[:4]))
        bench.count(3)


@attack("path", "a function altered on its way to a worker")
def altered_functions(bench: Bench) -> None:
    """The worker hashes it before it loads it: the call is right, or told that letters are altered; no other call is.

    Without the key; and with it, under the old digest, or with the right letter under another one.
    """
    stage = _Stage(bench)
    for number, how in enumerate(("letter", "longer", "digest")):
        for at_node in (False, True):
            text = b"%s%d%d" % (MARK, number, at_node)
            function = functools.partial(operator.add, text)
            right = {n: text + b"%d" % n for n in range(3)}
            found, _ = stage.play(_Spoiler(bench, "JOB", how), at_node, function, [b"0", b"1", b"2"])
            for index, value in right.items():
                assert found[index] == value or isinstance(found[index], LetterAltered), f"{found!r:.300}"
            bench.count()
            again = bench.call(stage.cluster, "map", function, [b"0", b"1", b"2"])  # declared anew, by another caller
            assert again.result(30) == right
