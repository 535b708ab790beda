"""Tables that grow or shrink between any two steps: by another thread, by a signal handler, by the collector."""

from __future__ import annotations

import abc
import enum
import functools
import gc
import itertools
import json
import pickle
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from conftest import before_each_step

from achilles.objects import canonical, letters, names, sources


def meanwhile(functions: str, do: Callable[[int], object], module: str = "achilles") -> Any:
    """Do this before each instruction of these functions, and of their comprehensions, with its count."""
    def inside(frame: types.FrameType) -> bool:
        code, outer = frame.f_code, frame.f_back
        by = outer.f_code.co_name if code.co_name.startswith("<") and outer is not None else code.co_name
        return by in functions.split() and module in code.co_filename

    return before_each_step(inside, do)


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


def test_a_function_that_a_result_names_dies() -> None:
    """It is there, or the error says that it is not; never None."""
    found = set()
    for step in range(80):
        space: dict[str, Any] = {"__name__": "__main__"}
        exec("def function(): pass", space)
        caller, worker = letters.Context(caller=True), letters.Context(caller=False)
        letter = bytearray(b"".join(caller.dump((space["function"],))))
        back = bytearray(b"".join(worker.dump([worker.load(letter)[0]])))

        def die(at: int, space: dict[str, Any] = space, step: int = step) -> None:
            if at == step:
                space.clear()

        with meanwhile("_made_and_filled", die):
            try:
                found.add(type(caller.load(back)[0]).__name__)
            except pickle.UnpicklingError as error:
                assert "not known here" in str(error)
                found.add("an error")
    assert found == {"function", "an error"}


@pytest.mark.parametrize("kind", [weakref.WeakValueDictionary, weakref.WeakKeyDictionary])
def test_a_thing_in_a_weak_dict_dies(kind: Any) -> None:
    for step in range(60):
        things, table = [Thing(), Thing()], kind()
        for thing in things:
            table.update({0: thing} if kind is weakref.WeakValueDictionary else {thing: 0})
        del thing

        def die(at: int, things: list[Thing] = things, step: int = step) -> None:
            if at == step:
                things.clear()

        with meanwhile("items keys __getitem__", die, "weakref"):
            assert type(made(table)) is kind


def test_a_class_that_was_registered_dies() -> None:
    gc.freeze()
    try:
        for step in range(400):
            base: Any = abc.ABCMeta("Base", (), {"__module__": "__main__", "one": 1})
            kids = [type("Kid", (), {"__module__": "__main__"})]
            base.register(kids[0])

            def die(at: int, kids: list[type] = kids, step: int = step) -> None:
                if at == step:
                    kids.clear()
                    gc.collect()

            with meanwhile("_class", die):
                assert made(base).one == 1
    finally:
        gc.unfreeze()


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


def test_a_member_of_an_enum_gets_more_attributes() -> None:
    cls: Any = enum.Enum("cls", ["ONE", "TWO"], module="__main__")
    with meanwhile("_class", lambda at: setattr(cls.ONE, f"more_{at}", at)):
        assert made(cls).TWO.value == 2
    assert len(vars(cls.ONE)) > 20


def test_a_cache_gets_more_attributes() -> None:
    cache: Any = functools.cache(types.FunctionType((lambda: 1).__code__, {"__name__": "__main__"}))
    cache.one = 1
    with meanwhile("_cache", lambda at: setattr(cache, f"more_{at}", at)):
        assert len(canonical.digest_of(cache)) == 64
    assert len(vars(cache)) > 20


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


def test_another_thread_dumps_the_same_function_and_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The facts of the one must not be taken for those of the other."""
    space: dict[str, Any] = {"__name__": "__main__", "FACTOR": 1}
    exec("def function(): return FACTOR\ndef other(): return 1", space)
    context = letters.Context(caller=True)
    refresh = context.refresh

    def feed() -> None:
        letters.dump_chunk(context, [space["function"]])
        letters.dump_chunk(context, [space["other"]])

    def refresh_and_wait() -> None:
        refresh()
        thread = threading.Thread(target=feed)
        threads.append(thread)
        thread.start()
        thread.join(0.2)  # it may have to wait for this dump

    threads: list[threading.Thread] = []
    letters.dump_chunk(context, [space["function"]])
    monkeypatch.setattr(context, "refresh", refresh_and_wait)
    first = letters.dump_function(context, (space["function"], None))
    threads[0].join(20)
    monkeypatch.undo()
    space["FACTOR"] = 2
    assert letters.dump_function(context, (space["function"], None)) != first
