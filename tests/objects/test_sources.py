"""Which modules travel, how they are found again when they change, and how a worker imports them."""

from __future__ import annotations

import importlib.resources
import os
import pickle
import pkgutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import achilles
from achilles.errors import DumpError
from achilles.objects import sources as module
from achilles.objects.sources import Finder, own_sources, reason, root


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory on the path, as a notebook has it. What a test imports from there is forgotten after it."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, "_look", module.Look())
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder, name, text="VALUE = 1\n"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    importlib.invalidate_caches()
    return path


def modules():
    found = own_sources()
    return {} if found is None else pickle.loads(found.letter)


def test_nothing_of_its_own_is_no_set(folder):
    assert own_sources() is None and own_sources(at_once=False) is None


def test_what_was_imported_from_the_folder_travels_with_its_package_and_nothing_else(folder):
    for name in ("one.py", "pack/__init__.py", "pack/part.py", "pack/other.py", "plain/deep/leaf.py", "unused.py"):
        write(folder, name, f"NAME = {name!r}\n")
    for name in ("one", "pack.part", "plain.deep.leaf", "json"):
        importlib.import_module(name)
    found = modules()
    assert sorted(found) == ["one", "pack", "pack.part", "plain", "plain.deep", "plain.deep.leaf"]
    assert found["one"] == (str(folder / "one.py"), b"NAME = 'one.py'\n")
    assert found["pack"][0] == str(folder / "pack" / "__init__.py")
    assert found["plain"] == ("", b"")


@pytest.mark.parametrize(("place", "rule"), [
    ("site-packages/lib.py", "installed here"), ("dist-packages/lib.py", "installed here"),
    (".venv/lib/python3.13/site-packages/lib.py", "installed here"),
])
def test_what_an_environment_has_does_not_travel_even_below_the_folder(folder, monkeypatch, place, rule):
    path = write(folder, place)
    monkeypatch.syspath_prepend(str(path.parent))
    importlib.import_module("lib")
    assert modules() == {} and rule in reason("lib")


def test_each_rule_says_why_and_what_to_do(folder, tmp_path_factory, monkeypatch):
    elsewhere = write(tmp_path_factory.mktemp("elsewhere"), "far.py")
    monkeypatch.syspath_prepend(str(elsewhere.parent))
    importlib.import_module("far")
    sys.modules["compiled"] = types.ModuleType("compiled")
    sys.modules["compiled"].__file__ = str(write(folder, "compiled.so"))
    own = importlib.import_module(write(folder, "mine.py").stem)
    assert str(elsewhere) in reason("far") and "install it on the node" in reason("far")
    assert "no Python source file" in reason("compiled")
    assert "install it on the node, too" in reason("json")
    assert "has not imported it" in reason("nowhere") and "import it here" in reason("nowhere")
    assert "after the call began" in reason("mine") and own.VALUE == 1
    assert list(modules()) == ["mine"]


def test_achilles_itself_never_travels(folder, monkeypatch):
    monkeypatch.chdir(Path(achilles.__file__).parent.parent)
    assert not [name for name in modules() if name.startswith("achilles")]


def test_a_changed_file_is_a_changed_set_at_the_next_look(folder):
    path = write(folder, "one.py", "VALUE = 1\n")
    importlib.import_module("one")
    first = own_sources()
    assert own_sources() is first
    path.write_text("VALUE = 22\n")
    second = own_sources()
    assert second.name != first.name and b"VALUE = 22" in second.letter
    path.write_text("VALUE = 1\n")
    assert own_sources().name == first.name


def test_a_new_import_is_seen_also_by_single_calls_and_a_change_by_them_a_moment_later(folder):
    write(folder, "one.py")
    importlib.import_module("one")
    first = own_sources()
    path = write(folder, "two.py")
    importlib.import_module("two")
    second = own_sources(at_once=False)
    assert second.name != first.name
    path.write_text("VALUE = 3\n")
    deadline = time.monotonic() + 20
    while own_sources(at_once=False) is second:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_single_calls_do_not_look_at_the_files_each_time(folder, monkeypatch):
    write(folder, "one.py")
    importlib.import_module("one")
    own_sources()
    looks = []
    monkeypatch.setattr(module, "stamp_of", lambda path: looks.append(path) or ())
    monkeypatch.setattr(module, "LOOK_SECONDS", 60.0)
    own_sources()
    for _ in range(1000):
        own_sources(at_once=False)
    assert len(looks) <= 2


def test_the_same_modules_are_the_same_set_in_any_process(folder):
    for name in ("one.py", "two.py"):
        write(folder, name)
    script = ("import {}, {}\nfrom achilles.objects.sources import own_sources\nprint(own_sources().name)")
    names = {subprocess.run([sys.executable, "-c", script.format(*order)], capture_output=True, text=True, check=True,
                            env=os.environ | {"PYTHONHASHSEED": seed}, cwd=folder, timeout=60).stdout
             for order, seed in ((("one", "two"), "1"), (("two", "one"), "2"))}
    assert len(names) == 1 and len(names.pop().strip()) == 32


def test_too_much_is_an_error_that_names_the_largest(folder, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    write(folder, "small.py")
    write(folder, "large.py", "#" * 2000)
    importlib.import_module("small"), importlib.import_module("large")
    with pytest.raises(DumpError, match=r"2,010 bytes, and at most 1,000 .*large\.py with 2,000\. Install"):
        own_sources()


def test_a_change_of_the_working_directory_is_another_root(folder, tmp_path_factory, monkeypatch):
    write(folder, "one.py")
    importlib.import_module("one")
    assert list(modules()) == ["one"]
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert modules() == {}


def test_a_file_that_is_gone_is_left_out(folder):
    path = write(folder, "one.py")
    importlib.import_module("one")
    path.unlink()
    assert modules() == {} and "no Python source file here" in reason("one")


def test_a_renamed_file_is_another_module_at_the_next_look(folder):
    path = write(folder, "one.py")
    importlib.import_module("one")
    assert list(modules()) == ["one"]
    path.rename(folder / "two.py")
    assert modules() == {}


def test_a_file_that_goes_between_look_and_reading_is_left_out(folder, monkeypatch):
    for name in ("one", "two"):
        write(folder, f"{name}.py")
        importlib.import_module(name)
    found = module.own_files(str(folder)) | {"one": str(folder / "gone.py")}
    monkeypatch.setattr(module, "own_files", lambda folder: found)
    assert list(modules()) == ["two"]


def test_another_module_under_the_same_name_is_seen(folder, monkeypatch, tmp_path_factory):
    """Also where as many modules are loaded as before."""
    write(folder, "first/cfg.py", "VALUE = 'first'\n")
    write(folder, "second/cfg.py", "VALUE = 'second'\n")
    for name in ("first", "second"):
        monkeypatch.syspath_prepend(str(folder / name))
        importlib.import_module("cfg")
        assert name.encode() in modules()["cfg"][1]
        count = len(sys.modules)
        if name == "first":
            del sys.modules["cfg"]
            assert len(sys.modules) == count - 1


def test_a_module_with_the_name_of_a_standard_one_stays_here_and_says_why(folder, monkeypatch):
    path = write(folder, "statistics.py")
    monkeypatch.delitem(sys.modules, "statistics", raising=False)
    importlib.import_module("statistics")
    assert modules() == {} and f"give {path} another one" in reason("statistics")


def test_a_removed_working_directory_has_no_modules(folder, monkeypatch, tmp_path_factory):
    away = tmp_path_factory.mktemp("removed")
    monkeypatch.chdir(away)
    away.rmdir()
    assert modules() == {}


def test_modules_that_load_at_their_first_use_are_not_loaded(folder):
    class Lazy(types.ModuleType):
        def __getattribute__(self, name):
            raise AssertionError(name)

    sys.modules["lazy_one"] = Lazy("lazy_one")
    assert modules() == {}


@pytest.mark.parametrize(("command", "expected"), [
    (["script.py"], "scripts"), (["link.py"], "scripts"), (["bin/tool"], "."), (["-m", "scripts.script"], "."),
    (["-c", ""], "."),
])
def test_the_root_is_the_scripts_folder_or_the_working_directory(folder, command, expected):
    text = "from achilles.objects.sources import root\nprint(root())\n"
    write(folder, "scripts/script.py", text)
    write(folder, "one.py", "")
    (folder / "link.py").symlink_to(folder / "scripts" / "script.py")
    if command == ["script.py"]:
        command = [str(folder / "scripts" / "script.py")]
    if command[0] == "-c":
        command = ["-c", text]
    if command == ["bin/tool"]:  # as a command of an environment, such as pytest
        write(folder, "bin/tool", f"import sys\nsys.prefix = {str(folder)!r}\n{text}")
    command = [sys.executable, *command]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, timeout=60)
    assert os.path.samefile(done.stdout.strip(), folder / expected)


def test_under_pytest_it_is_the_working_directory(folder):
    assert os.path.samefile(root(), folder)


# The worker's side.


@pytest.fixture
def import_from(monkeypatch, tmp_path):
    before = set(sys.modules)

    def run(**found):
        monkeypatch.setattr(sys, "meta_path", [Finder({name: tuple(module) for name, module in found.items()}),
                                               *sys.meta_path])
        return importlib.import_module

    yield run
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_modules_come_from_memory_with_packages_and_relative_imports(import_from):
    load = import_from(**{
        "pack": ["/nowhere/pack/__init__.py", b"from . import part\n"],
        "pack.part": ["/nowhere/pack/part.py", b"from .deep.leaf import VALUE\n"],
        "pack.deep": ["", b""], "pack.deep.leaf": ["/nowhere/pack/deep/leaf.py", b"VALUE = 5\n"]})
    pack = load("pack")
    assert pack.part.VALUE == 5 and pack.__file__ == "/nowhere/pack/__init__.py"
    assert pack.part.__package__ == "pack" and pack.part.__name__ == "pack.part"


def test_they_come_before_a_file_of_the_same_name(import_from, folder):
    write(folder, "one.py", "VALUE = 'the node’s'\n")
    assert import_from(one=["/nowhere/one.py", b"VALUE = 'the caller'\n"])("one").VALUE == "the caller"


def test_a_traceback_shows_their_lines(import_from):
    import traceback

    one = import_from(one=["/nowhere/one.py", b"def fail():\n    raise ValueError('x')  # this line\n"])("one")
    with pytest.raises(ValueError, match="x") as caught:
        one.fail()
    assert "# this line" in "".join(traceback.format_exception(caught.value))


def test_a_source_in_another_encoding(import_from):
    one = import_from(one=["/nowhere/one.py", "# coding: latin-1\nVALUE = 'ü'\n".encode("latin-1")])("one")
    assert one.VALUE == "ü"


def test_what_is_not_in_the_set_is_found_as_ever(import_from):
    load = import_from(one=["/nowhere/one.py", b""])
    assert load("json").dumps(1) == "1"
    with pytest.raises(ModuleNotFoundError):
        load("not_there_at_all")


def test_a_worker_that_had_another_module_of_that_name_imports_the_set(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    for name in ("stale_one", "achilles"):
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or types.ModuleType(name))
    module.install({"stale_one": ("/nowhere/stale_one.py", b"VALUE = 'new'\n"), "achilles": ("", b"")})
    assert importlib.import_module("stale_one").VALUE == "new" and sys.modules["achilles"] is achilles


def test_a_namespace_package_does_not_hide_what_the_node_has(import_from, folder):
    write(folder, "acme/core.py", "VALUE = 'of the node'\n")
    load = import_from(**{"acme": ["", b""], "acme.app": ["/nowhere/acme/app.py", b"VALUE = 'own'\n"]})
    assert load("acme.core").VALUE == "of the node" and load("acme.app").VALUE == "own"


def test_an_own_package_does_not_hide_the_rest_of_it_on_the_node(import_from, folder):
    write(folder, "acme/__init__.py")
    write(folder, "acme/core.py", "VALUE = 'of the node'\n")
    load = import_from(acme=["/nowhere/acme/__init__.py", b""])
    assert load("acme.core").VALUE == "of the node" and load("acme").__file__ == "/nowhere/acme/__init__.py"


def test_neither_a_file_nor_its_bytecode_counts_at_the_place_of_the_callers_file(import_from, folder, monkeypatch):
    """As on the caller's own machine, where the file may have changed meanwhile."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = write(folder, "one.py", "VALUE = 'of the file'\n")
    assert importlib.import_module("one").VALUE == "of the file"
    [cached] = (folder / "__pycache__").iterdir()
    before = cached.read_bytes()
    del sys.modules["one"]
    assert import_from(one=[str(path), b"VALUE = 'of the set'\n"])("one").VALUE == "of the set"
    assert cached.read_bytes() == before


def test_data_files_are_found_on_the_callers_machine(import_from, folder):
    path = write(folder, "pack/__init__.py")
    write(folder, "pack/table.txt", "some data")
    pack = import_from(pack=[str(path), b""])("pack")
    assert importlib.resources.files(pack).joinpath("table.txt").read_text() == "some data"
    assert pkgutil.get_data("pack", "table.txt") == b"some data"


def test_a_package_of_another_system_is_one(import_from):
    load = import_from(**{
        "pack": [r"C:\scripts\pack\__init__.py", b""], "pack.part": [r"C:\scripts\pack\part.py", b"A = 1"]})
    assert load("pack.part").A == 1
