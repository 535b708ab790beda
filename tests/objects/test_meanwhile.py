"""Tables that grow or shrink between any two steps: by another thread, by a signal handler, by the collector."""

from __future__ import annotations

import contextlib
import enum
import gc
import itertools
import json
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from achilles.objects import letters, names, sources


@contextlib.contextmanager
def meanwhile(function: str, do: Callable[[int], object]) -> Iterator[None]:
    """Do this before each instruction of a function of the package, and of its comprehensions, with its count."""
    count, before = itertools.count(), sys.gettrace()

    def trace(frame: types.FrameType, event: str, _: object) -> Any:
        code, outer = frame.f_code, frame.f_back
        inside = code.co_name.startswith("<") and outer is not None and outer.f_code.co_name == function
        if (inside or code.co_name == function) and "achilles" in code.co_filename:
            frame.f_trace_opcodes = True
            if event == "opcode":
                do(next(count))
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class Thing:
    pass


def test_the_thing_whose_entry_must_go_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "OWNED_KEPT", 3)

    def owned(step: int) -> int:
        things, found = [Thing() for _ in range(4)], names.Names()
        last = things.pop()
        for at in range(3):
            found.hold(things[at], None)
        with meanwhile("own", lambda at: things.pop(0) if at == step else None):
            found.name(last)
        return len(found.owned)

    assert {owned(step) for step in range(60)} == {2, 3}


def test_a_name_that_other_processes_lack_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(letters, "UNFOUND", set(letters.UNFOUND))
    with meanwhile("is_plain", lambda at: letters.UNFOUND.add(b"not there %d" % at)):
        assert letters.dump_plain([json.JSONDecoder]) == [pickle.dumps([json.JSONDecoder], 5)]
    assert len(letters.UNFOUND) > 3


def made(value: object) -> Any:
    """What a worker has of a global of a script."""
    space: dict[str, Any] = {"__name__": "__main__", "value": value}
    exec("def function(): return value", space)
    letter = bytearray(letters.dump_function(letters.Context(caller=True), (space["function"], None)))
    return letters.Context(caller=False).load(letter)[0]()


def test_a_module_gets_more_globals() -> None:
    module = types.ModuleType("made_here")
    module.one = 1  # type: ignore[attr-defined]
    with meanwhile("_module", lambda at: setattr(module, f"more_{at}", at)):
        assert made(module).one == 1
    assert len(vars(module)) > 20


def test_a_class_gets_more_attributes() -> None:
    cls: Any = type("Made", (), {"__module__": "__main__", "one": 1, "more": [1]})
    with meanwhile("_class", lambda at: setattr(cls, f"more_{at}", at)):
        assert made(cls).one == 1
    assert len(vars(cls)) > 20


def test_a_function_gets_more_attributes() -> None:
    function: Any = types.FunctionType((lambda: 1).__code__, {"__name__": "__main__"})
    function.one = 1
    with meanwhile("_placed", lambda at: setattr(function, f"more_{at}", at)):
        assert made(function).one == 1
    assert len(vars(function)) > 20


def test_flags_are_combined() -> None:
    bits: Any = enum.Flag("bits", [f"BIT_{at}" for at in range(12)], module="__main__")
    with meanwhile("_class", lambda at: bits(at % 4096)):
        assert made(bits).BIT_3.value == 8
    assert len(bits._value2member_map_) > 50


def test_a_module_is_imported_when_the_own_modules_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector of Python 3.11 runs wherever memory is taken, and then whatever a dead object's class says."""
    class Dying:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            monkeypatch.setitem(sys.modules, f"of_the_dead_{next(count)}", types.ModuleType("of_the_dead"))

    count, before = itertools.count(), gc.get_threshold()
    gc.freeze()
    try:
        for more in range(1, 200, 10):
            gc.disable()
            gc.collect()
            Dying()
            gc.set_threshold(gc.get_count()[0] + more)
            gc.enable()
            sources.own_files("/nowhere")
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
        gc.enable()
    assert next(count) > 10
