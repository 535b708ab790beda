"""The Runner as a process of somebody else's uses it: no frames, no socket, and a status array that nobody sees."""

from __future__ import annotations

from typing import Any

from achilles.node.runner import Runner
from achilles.objects.letters import Context, dump_chunk
from achilles.objects.outcomes import load_outcomes
from achilles.protocol.frames import LongLetter, Status, digest

CONTEXT = "c" * 32
seen: list[Any] = []  # what the functions below were called with


def note(*values: Any) -> Any:
    seen.append(values)
    return values


def joined(parts: Any) -> bytes:
    return b"".join(parts)


def declare(runner: Runner, caller: Context, number: int = 1, initializer: Any = None, **options: Any) -> None:
    first = None if initializer is None else joined(caller.dump(initializer))
    declaration = {"context": CONTEXT, "initializer": first is not None} | options
    runner.declare(number, declaration, joined(caller.dump((note, None))), first)


def test_it_runs_chunks_and_calls_an_initializer_once_a_context() -> None:
    seen.clear()
    runner, caller = Runner(), Context(caller=True)
    for number in (1, 2):
        declare(runner, caller, number, initializer=(note, ("up",)), call="star")
        [(state, parts)] = runner.run(number, 7, [joined(dump_chunk(caller, [(1, 2), (3,)]))])
        assert state == Status.VALUES
        assert load_outcomes(caller, bytearray(joined(parts)), False)[0] == [(1, 2), (3,)]
    assert seen == [("up",), (1, 2), (3,), (1, 2), (3,)]


def test_an_altered_letter_is_not_loaded() -> None:
    runner, caller = Runner(), Context(caller=True)
    declare(runner, caller)
    parts = dump_chunk(caller, ["x" * 2000])
    letter = LongLetter(parts, digest(parts), sum(map(len, parts)))
    assert [state for state, _ in runner.run(1, 0, [letter])] == [Status.VALUES]
    letter.digest = bytes(32)
    assert list(runner.run(1, 0, [letter])) == [(Status.ALTERED, (b"",))]
