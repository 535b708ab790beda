"""letters.py: the table of cases between two real processes, and the letters themselves."""

from __future__ import annotations

import array
import collections
import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from achilles.errors import DumpError, RemoteError
from achilles.objects import letters, looks, outcomes

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
    if name not in table and name == "numpy":
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


def test_plain_letter_is_one_byte_and_the_pickle() -> None:
    assert letters.Context(caller=True).dump([5]) == [b"\0" + pickle.dumps([5], 5)]


def test_large_buffers_are_not_copied_and_are_aligned() -> None:
    memory = bytearray(100_000)
    context = letters.Context(caller=True)
    parts = letters.dump_slice(context, [pickle.PickleBuffer(memory), 1, pickle.PickleBuffer(b"small")])
    large = [part for part in parts if isinstance(part, memoryview) and part.obj is memory]
    memory[0] = 7
    assert len(large) == 1 and large[0][0] == 7
    for sent in (parts, letters.with_skips(parts, [1, 0])):
        letter = joined(sent)
        arguments, skipped = letters.load_slice(letters.Context(caller=False), letter)
        assert skipped == (frozenset() if sent is parts else {0, 1})
        arguments[0][1] = 9
        assert letter.count(b"\7\x09") == 1 and letter.index(b"\7\x09") % 16 == 0
        assert arguments[1:] == [1, b"small"]


def test_skips_are_replaced() -> None:
    context = letters.Context(caller=True)
    parts = letters.dump_slice(context, list(range(10)))
    many = letters.with_skips(letters.with_skips(parts, {3}), {1, 2, 4, 7, 9})
    assert letters.load_slice(context, joined(many)) == (list(range(10)), frozenset({1, 2, 4, 7, 9}))
    assert joined(letters.with_skips(many, ())) == joined(parts)


def test_digest_and_length_are_of_the_whole_letter() -> None:
    parts = [b"ab", bytearray(b"c"), memoryview(b"defg")]
    assert letters.letter_digest(parts) == hashlib.sha256(b"abcdefg").digest()
    assert letters.letter_length(parts) == 7


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


def test_dump_error_names_the_argument() -> None:
    with pytest.raises(DumpError, match="^an argument of type generator cannot be sent"):
        letters.dump_slice(letters.Context(caller=True), [1, (x for x in ())])


def test_import_takes_neither_dill_nor_multiprocess() -> None:
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import achilles.objects.letters as p; import pickle;"
            "c = p.Context(True); c.dump(lambda: 1); c.dump([1]); assert not {'dill', 'multiprocess',"
            "'multiprocessing.pool'} & set(sys.modules), sys.modules")
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(ROOT)], check=True, timeout=30)


def test_old_dill_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import dill
    looks._dill_pickler.cache_clear()
    monkeypatch.setattr(dill, "__version__", "0.3.9")
    with pytest.raises(RuntimeError, match="0.3.9 is too old: pip install"):
        letters.Context(caller=True).dump({1: 2}.keys())
    looks._dill_pickler.cache_clear()


def test_dill_leaves_its_settings_and_c_pickle_alone() -> None:
    import copyreg

    import dill
    settings, table, own = dict(dill.settings), dict(copyreg.dispatch_table), dict(dill.Pickler.dispatch)
    context = letters.Context(caller=True)
    assert list(context.load(joined(context.dump({1: 2}.keys())))) == [1]
    assert settings == dict(dill.settings) and table == copyreg.dispatch_table
    assert own == dict(dill.Pickler.dispatch)


@pytest.mark.xfail(sys.version_info >= (3, 15), raises=DumpError, strict=True,
                   reason="dill 0.4.1 reads co_lnotab, which code of 3.15 has no more; the README says so")
def test_a_bare_code_object_comes_back() -> None:
    """By dill alone. Once this passes on 3.15, the README's line on it goes, and the skip in test_bench.py."""
    context = letters.Context(caller=True)
    code = context.load(joined(context.dump((lambda x: x + 1).__code__)))
    assert types.FunctionType(code, {})(1) == 2
