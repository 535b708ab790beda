"""The rules of the package that can be read off its source: who imports whom, and who may do what."""

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import achilles
from achilles.protocol.kinds import DIRECTIONS, Kind

PACKAGE = Path(achilles.__file__).parent
COMMON = {"errors", "config", "configuring", "console"}
# The folders and modules of the top that each may import from, besides itself.
MAY_IMPORT = {
    "errors": set(), "config": {"errors"}, "configuring": {"errors", "config"}, "console": {"errors", "config"},
    "protocol": {"errors"}, "objects": {"errors"},
    "server": {"protocol", *COMMON},
    "node": {"protocol", "objects", *COMMON}, "controller": {"protocol", "objects", *COMMON},
    "calls": {"controller", "objects", "protocol", "options", *COMMON},
    "launch": {"protocol", *COMMON}, "options": {"controller", *COMMON},
    "progress": {"options", "controller"}, "journal": {"objects"},
}
ANYTHING = {"dropin", "local", "lineReceiver"}
# Inside functions: a person is asked; `executor=`, `host="local"`, `journal=` and `progress=`.
WHEN_ASKED = {"config": {"configuring"}, "calls": {"dropin", "local"}, "launch": {"server", "node"},
              "options": {"journal", "progress"}}
LONGEST_MODULE_LINES = 330
LONGEST_FUNCTION_LINES, MOST_METHODS = 40, 28
# Statements (without docstrings) that a folder may have. The second edition's aim stands behind each: what is over it
# is to come down, and may not grow meanwhile.
BUDGETS = {
    "ring": 915, "protocol": 720, "server": 620, "node": 950, "objects": 1021, "controller": 969, "core": 4831,
    "drop-ins": 850, "launch/beside": 568, "whole": 5681,
}
AIMS = {
    "ring": 920, "protocol": 720, "server": 620, "node": 750, "objects": 800, "controller": 780, "core": 4270,
    "drop-ins": 850, "launch/beside": 650, "whole": 5120,
}
BESIDE = {"launch", "journal", "progress", "objects.canonical"}  # not on the way of a chunk
THIN_MODULES = {"dropin.joblib_backend": 75, "dropin.engine": 120}  # others' interfaces; lines of code are fewer
PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
PICKLING = {
    "objects.letters": "what a letter is made of",
    "objects.byvalue": "a Pickler with hooks; code objects, by marshal",
    "objects.definitions": "the pickle of all items",
    "objects.loading": "the form of a letter; an Unpickler with makers; code objects, by marshal",
    "objects.outcomes": "plain values, without a detour",
    "objects.sources": "a dict of texts",
    "objects.canonical": "digests, of which nothing is loaded; plain values for a journal",
}
RUNS_TEXT = {"eval", "exec", "compile", "__import__", "run_path", "run_module"}
PROOFS = ("proof", "proofs", "tag", "tags", "mac")  # names of what must be compared in constant time
AUTHENTICATES = {"protocol.auth", "protocol.channel", "server.exchange", "server.listen"}
EQUALITY = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)
PUBLIC = {"answer == REFUSAL"}  # 32 zero bytes, and it proves nothing


def path_of(name):
    path = PACKAGE.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


SOURCES = {name_of(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}


def own_imports(name, nodes=None):
    """The modules of the package that this one imports from, wherever in it, or in these statements of it."""
    for node in nodes if nodes is not None else ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = name.split(".") if path_of(name).name == "__init__.py" else name.split(".")[:-1]
            package = [] if name == "__init__" else package[: len(package) - node.level + 1]
            base = [*package, *(node.module or "").split(".")] if node.module else package
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                yield whole if whole in SOURCES else ".".join(base) or f"__init__.{alias.name}"


def outside_imports(name):
    """The modules of other packages that this one imports, wherever in it."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def calls_of(name):
    return [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]


def run(code):
    """Run code in a new interpreter that finds the package, and return what it printed."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def place_of(name):
    """The folder or module of the top that a module belongs to; the literal `__version__` belongs to nobody."""
    return name.partition(".")[0]


def needed_at_import(name):
    """The modules of the package that this one imports when it is imported itself."""
    return set(own_imports(name, [node for node in TREES[name].body if isinstance(node, ast.ImportFrom)]))


def test_every_module_has_its_place():
    assert {place_of(name) for name in SOURCES} == {*MAY_IMPORT, *ANYTHING, "__init__"}


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_imports_only_what_its_folder_may(name):
    place = place_of(name)
    if place in MAY_IMPORT:
        may = {place, *MAY_IMPORT[place]}
        assert {place_of(each) for each in needed_at_import(name)} <= may
        others = {place_of(each) for each in own_imports(name) if each != "__init__.__version__"}
        assert others <= may | WHEN_ASKED.get(place, set())
    elif place == "__init__":
        assert not needed_at_import(name), "the top loads all names when they are used"


def test_no_module_needs_itself_to_be_imported():
    graphlib.TopologicalSorter({name: needed_at_import(name) for name in SOURCES}).prepare()


def test_names_of_classes_are_unique():
    found = Counter(node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in found.items() if count > 1] == []


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_imports_the_package_by_its_name(name):
    assert not [module for module in outside_imports(name) if module.partition(".")[0] == PACKAGE.name]


def test_the_server_imports_nothing_that_unpickles():
    """Neither itself nor through the standard library."""
    loaded = run("import sys, achilles.server.__main__; print(*sys.modules)").split()
    assert "achilles.server.exchange" in loaded
    assert not {"dill", "pickle", "_pickle", "multiprocess", "multiprocessing", "achilles.objects"} & set(loaded)


def test_a_node_starts_processes_but_loads_no_letter():
    """multiprocess brings pickle and dill along; the node's own modules touch neither, nor objects/."""
    for name in (name for name in SOURCES if place_of(name) in ("node", "protocol") and name != "node.runner"):
        assert not PICKLERS & set(outside_imports(name))
        assert "objects" not in {place_of(each) for each in own_imports(name)}


def test_a_folder_gives_its_public_name_and_loads_nothing_before():
    """So a worker, which is node.worker, pays for no loop, and nobody who needs a submodule for another."""
    folders = sorted(name for name in SOURCES if path_of(name).name == "__init__.py" and name != "__init__")
    for folder in folders:
        out = run(f"import sys, achilles.{folder} as it; "
                  f"print(*[name for name in sys.modules if name.startswith('achilles.{folder}.')]); "
                  f"print(all(getattr(it, name) is not None for name in it.__all__), hasattr(it, 'nothing'))")
        assert out == "\nTrue False\n", folder


@pytest.mark.parametrize("name", SOURCES)
def test_only_payloads_pickle_and_nothing_runs_text(name):
    called = {id(call): ast.unparse(call.func).rpartition(".")[2] for call in calls_of(name)}
    by_name = {arg.value.partition(".")[0] for call in calls_of(name) if called[id(call)] == "import_module"
               for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    if name not in PICKLING:
        assert not PICKLERS & {module.partition(".")[0] for module in (*outside_imports(name), *by_name)}
    runs = [ast.unparse(call) for call in calls_of(name) if called[id(call)] in RUNS_TEXT]
    assert not [call for call in runs if not call.startswith("re.")]


def test_what_is_below_letters_is_known_in_its_folder_alone():
    below = {f"objects.{name}" for name in ("names", "loading", "byvalue", "definitions")}
    assert {place_of(name) for name in SOURCES if below & set(own_imports(name))} == {"objects"}


def test_nothing_happens_at_import():
    """No thread, no signal, no atexit, no start method; and the environment is not read by any module of ours."""
    names = sorted(name for name in SOURCES if name != "__init__")
    assert run(f"""
import atexit, importlib, os, signal, sys, threading
import multiprocess, dill  # what they do at import is theirs

def caller_is_ours():
    frame = sys._getframe(2)
    return frame.f_globals.get("__name__", "").partition(".")[0] == "achilles"

class Watched(type(os.environ)):
    def __getitem__(self, key):
        if caller_is_ours():
            print("reads", key)
        return super().__getitem__(key)
    def get(self, key, default=None):
        if caller_is_ours():
            print("reads", key)
        return super().get(key, default)

os.environ.__class__ = Watched
atexit.register = lambda *args: print("atexit", *args)
signal.signal = lambda *args: print("signal", *args)
threading.Thread.start = lambda self: print("thread", self)
multiprocess.set_start_method = lambda *args, **options: print("start method", *args)
import achilles
if any(name.startswith("achilles.") for name in sys.modules):
    print("loads", *[name for name in sys.modules if name.startswith("achilles.")])
for name in {names}:
    importlib.import_module("achilles." + name)
print("threads", threading.active_count())
""") == "threads 1\n"


@pytest.mark.parametrize("name", SOURCES)
def test_proofs_and_tags_are_compared_in_constant_time(name):
    """No ==, != or in on a proof or a tag anywhere, nor on a digest in what authenticates or caches."""
    words = {*PROOFS, "digest", "answer"} if name in AUTHENTICATES else set(PROOFS)
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Compare) and any(isinstance(op, EQUALITY) for op in node.ops):
            compared = {word for side in (node.left, *node.comparators) for word in words_of(side)}
            assert not compared & words or ast.unparse(node) in PUBLIC, f"{name}: {ast.unparse(node)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("startswith", "endswith", "__eq__", "index", "count"):
                asked = {word for side in (node.func.value, *node.args) for word in words_of(side)}
                assert not asked & words, f"{name}: {ast.unparse(node)}"


def test_each_proof_and_tag_is_compared_in_one_place():
    """The proof of a client, that of a server, the tag of a frame, and a username."""
    found = {name: [ast.unparse(call) for call in calls_of(name) if "compare_digest" in ast.unparse(call.func)]
             for name in SOURCES}
    assert {name: sorted(calls) for name, calls in found.items() if calls} == {
        "protocol.auth": ["hmac.compare_digest(keys.server_proof, answer)",
                 "hmac.compare_digest(self.tag(signed), tag)",
                 "hmac.compare_digest(session.client_proof, m2[CLAIM.size:])"],
        "server.listen": ["hmac.compare_digest(user, self.settings.username.encode())"],
    }


def test_clocks_are_monotonic():
    """The wall clock may be set while we wait. It is asked for what people read alone: since when a peer is there.

    And a journal compares the times of files with that of the process's start.
    """
    asked = []
    for name in SOURCES:
        assert not {"datetime", "sched"} & set(outside_imports(name)), name
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.ImportFrom) and node.module == "time" and not node.level:
                asked += [(name, alias.name) for alias in node.names]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time":
                asked += [(name, node.attr)]
    others = [pair for pair in asked if pair[1] not in ("monotonic", "monotonic_ns")]
    assert sorted(others) == [
        ("console", "gmtime"), ("journal", "CLOCK_BOOTTIME"), ("journal", "clock_gettime"), ("journal", "time"),
        ("server.exchange", "time")]
    (statement,) = [node for node in ast.walk(TREES["server.exchange"])
                    if isinstance(node, ast.Assign) and "time.time()" in ast.unparse(node.value)]
    assert ast.unparse(statement.targets[0]) == "(peer.hello, peer.since)"
    attributes = [node for node in ast.walk(TREES["server.exchange"]) if isinstance(node, ast.Attribute)]
    uses = [node for node in attributes if node.attr == "since"]
    assert len(uses) == 3  # set, set again, and told


def test_heartbeats_are_never_a_workers():
    """They come of a Channel's owner: a process that runs user code has no tick, no writer thread and no such kind."""
    words = {node.attr for node in ast.walk(TREES["node.worker"]) if isinstance(node, ast.Attribute)}
    assert not words & {"tick", "start_writer", "send_ahead", "PING"}
    assert not {"NW", "WN"} & set(DIRECTIONS[Kind.PING])


def words_of(expression):
    for node in ast.walk(expression):
        if isinstance(node, (ast.Name, ast.Attribute)):
            yield from (node.id if isinstance(node, ast.Name) else node.attr).lower().split("_")


@pytest.mark.parametrize("name", SOURCES)
def test_the_library_neither_prints_nor_asserts(name):
    assert not [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Assert)]
    if name != "console":
        mains = [node for node in TREES[name].body if isinstance(node, ast.FunctionDef) and node.name == "main"]
        allowed = {call for main in mains for call in ast.walk(main)}
        prints = [call for call in calls_of(name) if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not [ast.unparse(call) for call in prints if call not in allowed]


@pytest.mark.parametrize("name", SOURCES)
def test_every_module_and_public_name_says_what_it_is(name):
    tree = TREES[name]
    assert ast.get_docstring(tree)
    public = public_names(tree)
    assert public is not None, "no __all__"
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and (node.name in (public or []) or node.name[0] != "_"):
            assert ast.get_docstring(node), node.name
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in (public or []):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name[0] != "_":
                    assert ast.get_docstring(method), f"{node.name}.{method.name}"


@pytest.mark.parametrize("name", SOURCES)
def test_every_public_name_is_there(name):
    tree = TREES[name]
    defined = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))
               for alias in node.names}
    for node in tree.body:
        defined |= {node.name} if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else set()
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            defined |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    assert set(public_names(tree) or []) <= defined


def public_names(tree):
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and ast.unparse(node).startswith("__all__"):
            return ast.literal_eval(node.value)
    return None


def lines_of(node):
    docstring = node.body[0] if ast.get_docstring(node) is not None else None
    return node.end_lineno - node.lineno + 1 - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


@pytest.mark.parametrize("name", SOURCES)
def test_modules_functions_and_classes_are_short(name):
    assert len(SOURCES[name].splitlines()) <= LONGEST_MODULE_LINES
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert lines_of(node) <= LONGEST_FUNCTION_LINES, node.name
        if isinstance(node, ast.ClassDef):
            assert sum(isinstance(member, ast.FunctionDef) for member in node.body) <= MOST_METHODS, node.name


def statements_of(name):
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [node for node in ast.walk(TREES[name]) if isinstance(node, documented) and ast.get_docstring(node)]
    return sum(isinstance(node, ast.stmt) for node in ast.walk(TREES[name])) - len(docstrings)


def is_in(budget, name):
    place = place_of(name)
    if {name, place} & BESIDE or budget == "launch/beside":
        return budget == "launch/beside" and bool({name, place} & BESIDE)
    if budget == "ring":
        return place in ("errors", "protocol") or name == "server.listen"
    if budget in ("core", "drop-ins"):
        return (place in ("dropin", "local", "lineReceiver")) == (budget == "drop-ins")
    return budget in (place, "whole")


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_folder_keeps_its_budget_of_statements(budget):
    count = sum(statements_of(name) for name in SOURCES if is_in(budget, name))
    assert count <= BUDGETS[budget], f"{budget} has {count} statements; the aim is {AIMS[budget]}"


@pytest.mark.parametrize("name", THIN_MODULES)
def test_what_meets_other_packages_is_thin(name):
    """Lines of statements, without docstrings, comments and blank lines."""
    tree = ast.parse(SOURCES[name])
    said = {line for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            if ast.get_docstring(node) is not None for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    code = [line for number, line in enumerate(SOURCES[name].splitlines(), 1)
            if number not in said and line.strip() and not line.strip().startswith("#")]
    assert 30 < len(code) < THIN_MODULES[name]


def test_the_top_level_loads_each_public_name():
    assert all(getattr(achilles, name) is not None for name in achilles.__all__)
    assert set(achilles.__all__) <= set(dir(achilles))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        achilles.nothing  # noqa: B018
