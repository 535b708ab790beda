"""letters.py: the table of cases between two real processes, and the letters themselves."""

from __future__ import annotations

import array
import collections
import dataclasses
import gc
import json
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import types
import weakref
from pathlib import Path
from typing import Any

import pytest

from achilles.errors import DumpError, RemoteError
from achilles.objects import letters, outcomes

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "payload_cases"
NAMES = re.findall(r'(?:case|program)\("([^"]+)"', (FOLDER / "cases.py").read_text())
NOTEBOOK = ("import sys, pathlib; exec(compile(pathlib.Path({path!r}).read_text(), '<cell>', 'exec'), "
            "{{'__name__': '__main__'}})")


def table_of(mode: str, folder: Path) -> dict[str, str]:
    """Run the whole table once; the worker's package has another name than the caller's."""
    package = folder / "ventured"
    shutil.copytree(ROOT / "achilles" / "objects", package / "objects", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "achilles" / "errors.py", package)
    # A letter names the file of its code, and must not name the package: the checkout may have its name.
    path = str(shutil.copy(FOLDER / "cases.py", folder / "table.py"))
    start = [path] if mode == "script" else ["-c", NOTEBOOK.format(path=path)]
    start += ["payload", str(ROOT), str(folder), "ventured", "error", str(FOLDER)]
    run = subprocess.run([sys.executable, "-W", "error", *start],
                         stdout=subprocess.PIPE, timeout=60, check=True)
    return dict(json.loads(run.stdout))


@pytest.fixture(scope="session", params=["script", "notebook"])
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return table_of(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", NAMES)
def test_survives_the_way_to_another_process(table: dict[str, str], name: str) -> None:
    if name not in table and name.startswith("numpy"):
        pytest.skip("numpy is not installed")
    assert table[name] == ""


def joined(parts: list[letters.Buffer]) -> bytearray:
    return bytearray(b"".join(parts))


@pytest.mark.parametrize("value", [
    [5], [], list(range(1000)), [1.5, "a", b"b", None, True], {"a": [1]}, collections.OrderedDict(a=1),
    ["__main__"], ["__main__"] * 100, b"x" * 100_000, json.dumps, range(3), [json.JSONDecoder],
])
def test_value_comes_back(value: object) -> None:
    caller, worker = letters.Context(caller=True), letters.Context(caller=False)
    assert worker.load(joined(caller.dump(value))) == value


def test_a_plain_letter_is_a_pickle() -> None:
    assert letters.Context(caller=True).dump([5]) == [pickle.dumps([5], 5)]


def test_large_buffers_are_not_copied_and_are_aligned() -> None:
    memory = bytearray(100_000)
    context = letters.Context(caller=True)
    parts = letters.dump_chunk(context, [pickle.PickleBuffer(memory), 1, pickle.PickleBuffer(b"small")])
    large = [part for part in parts if isinstance(part, memoryview) and part.obj is memory]
    memory[0] = 7
    assert len(large) == 1 and large[0][0] == 7
    for sent in (parts, letters.with_skips(parts, [1, 0])):
        letter = joined(sent)
        arguments, skipped = letters.load_chunk(letters.Context(caller=False), letter)
        assert skipped == (frozenset() if sent is parts else {0, 1})
        arguments[0][1] = 9
        assert letter.count(b"\7\x09") == 1 and letter.index(b"\7\x09") % 16 == 0
        assert arguments[1:] == [1, b"small"]


def test_skips_are_replaced() -> None:
    context = letters.Context(caller=True)
    parts = letters.dump_chunk(context, list(range(10)))
    many = letters.with_skips(letters.with_skips(parts, {3}), {1, 2, 4, 7, 9})
    assert letters.load_chunk(context, joined(many)) == (list(range(10)), frozenset({1, 2, 4, 7, 9}))
    assert letters.load_chunk(context, joined(letters.with_skips(many, ()))) == (list(range(10)), frozenset())


def test_outcomes_without_error_are_the_plain_values() -> None:
    context = letters.Context(caller=False)
    raised, parts = outcomes.dump_outcomes(context, [1, 2], {})
    assert not raised and parts == context.dump([1, 2])
    assert outcomes.load_outcomes(context, joined(parts), raised) == ([1, 2], {})


def test_outcomes_keep_errors_and_values_apart() -> None:
    context = letters.Context(caller=False)
    values = [array.array("d", [1.0]), None, (x for x in ())]
    raised, parts = outcomes.dump_outcomes(context, values, {1: ValueError("no")})
    kept, errors = outcomes.load_outcomes(letters.Context(caller=True), joined(parts), raised)
    assert raised and kept == [array.array("d", [1.0]), None, None]
    assert repr(errors[1]) == "ValueError('no')" and "ValueError: no" in str(errors[1].__cause__)
    assert type(errors[2]).__name__ == "MaybeEncodingError" and "generator" in str(errors[2])


def test_exception_that_loads_as_something_else_is_text() -> None:
    class Odd(Exception):
        def __reduce__(self) -> tuple[object, ...]:
            return int, ("5",)

    context = letters.Context(caller=False)
    raised, parts = outcomes.dump_outcomes(context, [None], {0: Odd("why")})
    error = outcomes.load_outcomes(context, joined(parts), raised)[1][0]
    assert isinstance(error, RemoteError) and "Odd: why" in str(error)


class Mute(Exception):
    def __repr__(self) -> str:
        raise ZeroDivisionError("of a repr")


class Refusing:
    def __reduce__(self) -> Any:
        raise Mute


class Unbound:
    """As a proxy of a web framework is, outside of a request."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"outside of a request: {name}")


@pytest.mark.parametrize(("kind", "reason"), [(Refusing, "<Mute>"), (Unbound, "outside of a request")])
def test_whatever_a_value_raises_in_its_dump_is_its_own_error(kind: type, reason: str) -> None:
    """Else it would end the worker."""
    raised, parts = outcomes.dump_outcomes(letters.Context(caller=False), [1, kind()], {})
    values, errors = outcomes.load_outcomes(letters.Context(caller=True), joined(parts), raised)
    assert values == [1, None] and type(errors[1]).__name__ == "MaybeEncodingError" and reason in str(errors[1])


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


def test_a_frozen_exception_has_its_traceback_its_node_and_its_index() -> None:
    raised, parts = outcomes.dump_outcomes(letters.Context(caller=False, node=4), [None], {0: Frozen(7)})
    error: Any = outcomes.load_outcomes(letters.Context(caller=True), joined(parts), raised)[1][0]
    outcomes.mark(error, index=3)
    assert type(error) is Frozen and error.code == 7 and (error.node, error.index) == (4, 3)
    assert "Frozen" in str(error.__cause__)


class Hiding(dict[Any, Any]):
    def items(self) -> Any:
        raise ZeroDivisionError("of items")


@pytest.mark.parametrize("kind", [dict, Hiding])
def test_dump_error_is_the_error_where_the_way_to_the_object_cannot_be_told(kind: type) -> None:
    with pytest.raises(DumpError, match="^an argument of type (dict|Hiding) cannot be sent"):
        letters.dump_chunk(letters.Context(caller=True), [kind({Mute(): (x for x in ())})])


def closure(megabytes: int) -> Any:
    """A function by value that refers to so much, and nobody else does."""
    data = bytes(megabytes << 20)
    space: dict[str, Any] = {"__name__": "__main__"}
    exec("def make(data):\n    return lambda: len(data)", space)
    return space["make"](data)


@pytest.mark.parametrize("dump", [
    lambda context, function: letters.dump_function(context, (function, None)),
    lambda context, function: letters.dump_chunk(context, [function])])
def test_the_functions_that_are_held_are_bounded_by_their_bytes(dump: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(letters, "HELD_BYTES", 4 << 20)
    context, alive = letters.Context(caller=True), weakref.WeakSet[Any]()
    for _ in range(30):
        function = closure(1)
        alive.add(function)
        dump(context, function)
    gc.collect()
    assert 2 <= len(alive) <= 7


def test_a_function_that_is_larger_than_all_that_are_held_is_known_in_its_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(letters, "HELD_BYTES", 1 << 10)
    caller, worker = letters.Context(caller=True), letters.Context(caller=False)
    letter = joined(letters.dump_chunk(caller, [closure(1)]))
    function = caller.load(joined(worker.dump(worker.load(letter))))[0]
    assert function() == 1 << 20


def test_dump_error_names_the_argument() -> None:
    with pytest.raises(DumpError, match="^an argument of type generator cannot be sent"):
        letters.dump_chunk(letters.Context(caller=True), [1, (x for x in ())])


def test_letters_take_neither_dill_nor_multiprocess() -> None:
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import achilles.objects.letters as p; import pickle;"
            "c = p.Context(True); c.dump(lambda: 1); c.dump([1]); c.dump({}.keys()); assert not {'dill',"
            "'multiprocess','multiprocessing.pool'} & set(sys.modules), sys.modules")
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(ROOT)], check=True, timeout=30)


RARE = {
    "keys": {1: 2}.keys(), "values": {1: 2}.values(), "items": {1: 2}.items(),
    "ordered keys": collections.OrderedDict(a=1).keys(), "a proxy's keys": types.MappingProxyType({1: 2}).keys(),
    "code": (lambda x: x + 1).__code__, "super": super(bool, True), "a class's super": super(bool, bool),
    "a descriptor": vars(types.FunctionType)["__code__"], "a member": vars(types.FunctionType)["__closure__"],
    "a method of a class": vars(dict)["fromkeys"],
    "a type": types.FunctionType, "a type of views": type({}.keys()), "a type of code": types.CodeType,
    "a type of methods": types.MethodType,
}


@pytest.mark.parametrize("name", RARE)
@pytest.mark.parametrize("is_global", [True, False])
def test_what_pickle_alone_refuses_comes_back(name: str, is_global: bool) -> None:
    """What dill could dump, and pickle cannot: as an argument, and as a global of a function."""
    value = RARE[name]
    if "super" not in name:  # from Python 3.14 on, pickle takes it
        with pytest.raises((TypeError, ValueError, pickle.PicklingError)):
            pickle.dumps(value)
    context, worker = letters.Context(caller=True), letters.Context(caller=False)
    if is_global:
        space = {"__name__": "__main__", "value": value}
        exec("def function(): return value", space)
        found = worker.load(joined(context.dump((space["function"], None))))[0]()
    else:
        found = worker.load(joined(context.dump([value])))[0]
    assert type(found) is type(value)
    if "super" in name:
        assert (found.__thisclass__, found.__self__) == (value.__thisclass__, value.__self__)
    else:
        assert list(found) == list(value) if "keys" in name or name in ("values", "items") else found == value


def test_a_class_of_an_installed_module_needs_no_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("hashless")
    exec("class Meta(type):\n    def __eq__(cls, other): return True\nclass Thing(metaclass=Meta): pass", vars(module))
    monkeypatch.setitem(sys.modules, "hashless", module)
    context = letters.Context(caller=True)
    found = context.load(joined(context.dump([vars(module)["Thing"], lambda: 1])))[0]
    assert found is vars(module)["Thing"]


def test_a_view_and_its_dict_are_of_one_piece() -> None:
    table = {1: 2}
    context = letters.Context(caller=True)
    held, keys = context.load(joined(context.dump([table, table.keys()])))
    held[3] = 4
    assert list(keys) == [1, 3]


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("arguments", [
    [], [1, "a", b"b", None, 2.5], [[1], {"a": (2,)}], [collections.OrderedDict(a=1), 3], ["__main__"] * 4,
    [json.loads, 1],
])
def test_chunks_are_the_letters_of_their_arguments(arguments: list[object], size: int) -> None:
    context, worker = letters.Context(caller=True), letters.Context(caller=False)
    made = letters.dump_chunks(context, arguments, size)
    assert made is not None and all(type(letter) is bytes for letter in made)
    loaded = [letters.load_chunk(worker, bytearray(letter)) for letter in made]
    assert [skipped for _, skipped in loaded] == [frozenset()] * len(made)
    assert [values for values, _ in loaded] == [arguments[at:at + size] for at in range(0, len(arguments), size)]


def test_chunks_with_instances_of_a_script() -> None:
    class Local:
        pass

    made = letters.dump_chunks(letters.Context(caller=True), [Local(), 1, Local()], 2)
    assert made is not None
    worker = letters.Context(caller=False)
    values = [value for letter in made for value in letters.load_chunk(worker, bytearray(letter))[0]]
    assert type(values[0]) is type(values[2]) and type(values[0]).__name__ == "Local" and values[1] == 1


def test_large_chunks_are_copies() -> None:
    context, memory = letters.Context(caller=True), array.array("d", [1.0]) * 100_000
    large, small = letters.dump_chunks(context, [pickle.PickleBuffer(memory), 1], 1)
    memory[0] = 7.0
    assert bytes(letters.load_chunk(context, large)[0][0])[:8] == array.array("d", [1.0]).tobytes()
    assert letters.load_chunk(context, small)[0] == [1]


def test_a_chunk_that_cannot_be_dumped_names_the_argument() -> None:
    with pytest.raises(DumpError, match="^an argument of type generator cannot be sent"):
        letters.dump_chunks(letters.Context(caller=True), [1, 2, (x for x in ())], 1)


def test_values_of_many_answers() -> None:
    worker, caller = letters.Context(caller=False), letters.Context(caller=True)
    answers = [[1, "a"], [array.array("d", [1.0]) * 10_000], [{"a": [2]}], []]
    sent = [joined(outcomes.dump_outcomes(worker, values, {})[1]) for values in answers]
    assert outcomes.load_values(caller, sent) == answers


def make_function() -> types.FunctionType:
    """A function by value, of a module that no import gives, with all that a function can refer to."""
    space: dict[str, Any] = {"__name__": "__main__", "FACTOR": 2, "TABLE": [1], "Scale": type("Scale", (), {"by": 3}),
                             "json": json}
    exec(textwrap.dedent("""
        def helper(x, more=1):
            return x * FACTOR + more
        def close(cell):
            def function(x, *, key=4) -> "int":
                return helper(x), cell, key, json.dumps(x), missing
            return function
        function = close(5)
        def listed(x): return TABLE, function(x)
        def scaled(x): return Scale.by
    """), space)
    return space["function"]


CHANGES = {
    "a global": "FACTOR = 3", "a global that was not there": "missing = 1",
    "another function": "def helper(x): return 1",
    "code of another function": "helper.__code__ = (lambda x, more=1: 7).__code__",
    "a default": "helper.__defaults__ = (8,)", "a keyword's default": "function.__kwdefaults__['key'] = 8",
    "an attribute": "function.note = 1", "a cell": "function.__closure__[0].cell_contents = 6",
    "a list": "TABLE.append(2)", "a class": "Scale.by = 4", "its text": "helper.__doc__ = 'new'",
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_function_is_dumped_again_once_something_has_changed(name: str) -> None:
    context, space = letters.Context(caller=True), make_function().__globals__
    function = space[{"a list": "listed", "a class": "scaled"}.get(name, "function")]
    first = letters.dump_function(context, (function, None))
    assert letters.dump_function(context, (function, None)) == first
    other = letters.dump_function(context, (space["helper"], None))
    exec(CHANGES[name], space)
    second = letters.dump_function(context, (function, None))
    assert second != first and second == letters.dump_function(context, (function, None))
    assert other != second and joined(context.dump((function, None))) == second


def test_a_function_whose_global_changes_and_changes_back_has_another_letter() -> None:
    """A worker that has loaded both of the letters takes the last one's global."""
    context, space = letters.Context(caller=True), make_function().__globals__
    first = letters.dump_function(context, (space["function"], None))
    space["FACTOR"] = 3
    letters.dump_function(context, (space["helper"], None))
    space["FACTOR"] = 2
    assert letters.dump_function(context, (space["function"], None)) != first


def test_a_name_that_plain_pickles_must_not_have_is_imported_where_it_is_a_modules() -> None:
    """Connections are refused, and what else their module has is found there."""
    from multiprocessing.connection import Client
    space: dict[str, Any] = {"__name__": "__main__", "Client": Client}
    exec("def function(): return Client", space)
    letter = bytearray(letters.dump_function(letters.Context(caller=True), (space["function"], None)))
    assert letters.Context(caller=False).load(letter)[0]() is Client


def test_an_unchanged_function_has_the_very_same_letter() -> None:
    context, function = letters.Context(caller=True), make_function()
    for value in ((json.dumps, None), (len, None), (function, None), (function, json.loads), (function, (1, "a"))):
        assert letters.dump_function(context, value) is letters.dump_function(context, value)


def test_a_function_that_is_dumped_again_takes_the_changes_of_arguments() -> None:
    """An instance's class is looked at anew, although the function is only compared."""
    context, worker, space = letters.Context(caller=True), letters.Context(caller=False), make_function().__globals__
    scale = space["Scale"]()
    for by in (3, 4):
        type(scale).by = by
        letters.dump_function(context, (json.dumps, None))
        arguments, _ = letters.load_chunk(worker, joined(letters.dump_chunk(context, [scale])))
        assert arguments[0].by == by


def test_a_function_that_cannot_be_dumped_is_named() -> None:
    space = make_function().__globals__
    space["FACTOR"] = (x for x in ())
    with pytest.raises(DumpError, match="the initializer cannot be sent to a node: the global 'FACTOR' of helper"):
        letters.dump_function(letters.Context(caller=True), (space["helper"], ()), "the initializer")


class Node:
    other: Any = None


def test_globals_that_hold_each_other_are_made_before_they_are_filled() -> None:
    left, right = Node(), Node()
    left.other, right.other = right, left
    first: list[Any] = []
    table = {"first": first}
    first.append(table)
    space = {"__name__": "__main__", "left": left, "right": right, "first": first, "table": table}
    exec("def function(): return left, right, first, table", space)
    context, worker = letters.Context(caller=True), letters.Context(caller=False)
    made = worker.load(joined(context.dump((space["function"], None))))[0]()
    assert made[0].other is made[1] and made[1].other is made[0] and made[0] is not left
    assert made[2][0] is made[3] and made[3]["first"] is made[2]


def test_what_was_not_filled_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module of a global comes only after a first letter has failed."""
    lacking = types.ModuleType("lacking")
    lacking.Thing = type("Thing", (), {"__module__": "lacking"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lacking", lacking)
    space: dict[str, Any] = {"__name__": "__main__", "table": [lacking.Thing()]}  # type: ignore[attr-defined]
    exec("class Holder:\n    table = table\ndef function(): return Holder.table", space)
    letter = joined(letters.Context(caller=True).dump((space["function"], None)))
    worker = letters.Context(caller=False)
    monkeypatch.delitem(sys.modules, "lacking")
    with pytest.raises(ModuleNotFoundError):
        worker.load(letter)
    monkeypatch.setitem(sys.modules, "lacking", lacking)
    assert type(worker.load(letter)[0]()[0]).__name__ == "Thing"


def test_a_cache_of_a_function_has_one_version() -> None:
    """A worker that has loaded it keeps it, with what it has remembered."""
    context, space = letters.Context(caller=True), dict[str, Any](__name__="__main__")
    exec("import functools\n@functools.cache\ndef slow(x): return x\ndef other(x): return slow(x)", space)
    slow, other = space["slow"], space["other"]
    first = letters.dump_function(context, (slow, None))
    assert letters.dump_function(context, (slow, None)) == first
    worker = letters.Context(caller=False)
    there = worker.load(bytearray(first))[0]
    loaded = worker.load(bytearray(letters.dump_function(context, (other, None))))[0]
    assert loaded.__globals__["slow"] is there
