"""The canonical form: the same digest in each process, and another one for each change that a user would call one."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest

import achilles
from achilles.objects.canonical import digest_of, digests_of, dump_values, is_users

SCRIPT = '''
import collections, dataclasses, enum, functools, json, logging, os, sys, threading, typing
import helper
from helper import scale

lock = threading.Lock()
log = logging.getLogger("work")
names = {"a", "b", "cc", "d"}
table = {"one": (1, "a text"), "two": frozenset(["x", "y"])}

class Colour(enum.Enum):
    RED, BLUE = 1, 2

@dataclasses.dataclass
class Point:
    x: int
    y: list = dataclasses.field(default_factory=lambda: [1])
    def far(self): return helper.far(self.x) + len(names)

class Base:
    limit = 3
    __slots__ = ("a",)
    @property
    def more(self): return Colour.BLUE
    @staticmethod
    def plain(): return table

class Kid(Base):
    @functools.cached_property
    def cached(self): return work
    @functools.lru_cache(3)
    def known(self): return super().limit

@functools.lru_cache
def again(x): return work(x) if x else None

def work(x, more=(1, 2), *, key="k"):
    def inner(): return x, log
    with lock:
        return Point(x), scale(x), helper.sub.deep, again(x), json.dumps(x), x in {"p", "q"}, Kid, inner, lambda: names

if __name__ == "__main__":
    from achilles.objects.canonical import digest_of, digests_of
    of_thing = functools.lru_cache(digest_of)
    arguments = [Point(1, [2]), {"z", "y", "xx"}, Colour.RED, ("a", ["b"]), work, Kid, {"k": 1.5}]
    print(json.dumps([digests_of(work), digest_of(arguments, of_thing)]))
'''
HELPER = "from . import sub\nFACTOR = 2\nunused = 1\ndef scale(x): return x * FACTOR\ndef far(x): return x + 1\n"
CHANGES = {  # of the script or the helper, and the part that is another one then
    "a constant": ("return x, log", "return x, 2, log", "the code of work"),
    "a default": ("more=(1, 2)", "more=(1, 3)", "the code of work"),
    "a default by keyword": ('key="k"', 'key="l"', "the code of work"),
    "a name": ("json.dumps(x)", "json.loads(x)", "the code of work"),
    "a set of constants": ('{"p", "q"}', '{"p", "r"}', "the code of work"),
    "a global": ('names = {"a",', 'names = {"e",', "the global names"),
    "a value in a global": ('(1, "a text")', '(1, "another")', "the global Kid"),
    "a class's function": ("len(names)", "min(names)", "the global Point"),
    "a class's default": ("[1])", "[2])", "the global Point"),
    "a base's attribute": ("limit = 3", "limit = 4", "the global Kid"),
    "a property": ("return Colour.BLUE", "return Colour.RED", "the global Kid"),
    "a member": ("RED, BLUE = 1, 2", "RED, BLUE = 1, 3", "the global Kid"),
    "a cache": ("lru_cache(3)", "lru_cache(4)", "the global Kid"),
    "under a cache": ("work(x) if x", "work(x) if not x", "the global again"),
    "a helper's function": ("x * FACTOR", "x + FACTOR", "the global scale"),
    "a helper's global": ("FACTOR = 2", "FACTOR = 3", "the global scale"),
    "of the module that a method names": ("return x + 1", "return x + 2", "the global Point"),
    "of a module's module": ("deep = 1", "deep = 2", "the global helper.sub.deep"),
}


def digests(folder, script=SCRIPT, helper=HELPER, sub="deep = 1\n", *arguments, **environment):
    """What a process of its own prints: the digests of `work` by part, and that of some arguments."""
    (folder / "helper").mkdir(parents=True)
    (folder / "script.py").write_text(script)
    (folder / "helper" / "__init__.py").write_text(helper)
    (folder / "helper" / "sub.py").write_text(sub)
    package = str(Path(achilles.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-W", "error", folder / "script.py", *arguments], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": package, **environment})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return digests(tmp_path_factory.mktemp("first"))


def test_another_process_has_the_same_digests(first, tmp_path):
    """Another folder, order of sets, command line and line numbers; compiled helpers; comments."""
    moved = SCRIPT.replace("def work", "# a comment\n\n\ndef work").replace("@dataclasses", "\n# one\n@dataclasses")
    for seed in "0", "1", "77":
        folder = tmp_path / seed / "in" / "depth"
        helper = HELPER.replace("unused = 1", "\n# nobody reads this\nunused = 3")
        assert digests(folder, moved, helper, "deep = 1\n", "--resume", PYTHONHASHSEED=seed) == first
    command = [sys.executable, folder / "script.py"]  # now from helpers that are compiled
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True,
                           env={**os.environ, "PYTHONPATH": str(Path(achilles.__file__).parent.parent)})
    assert json.loads(again.stdout) == first


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_another_digest(first, tmp_path, change):
    before, after, part = CHANGES[change]
    files = [SCRIPT, HELPER, "deep = 1\n"]
    changed = [text.replace(before, after) for text in files]
    assert changed != files
    found, _ = digests(tmp_path, *changed)
    assert found.keys() == first[0].keys()
    assert part in {name for name in found if found[name] != first[0][name]}


# Programs that differ in one place: what stands before the bar there, and what stands behind it.
OTHERS = {
    "a function of C": "from {math|cmath} import sqrt\ndef work(x): return sqrt(x)",
    "a function of C in an argument": "import math, cmath\ndef work(x): pass\nargument = [{math|cmath}.sqrt]",
    "a global of the machine's kind": "__FACTOR = {2|3}\ndef work(x): return __FACTOR",
    "a singleton": """
class One:
    def __init__(self, x): self.x = x
    def __reduce__(self): return "one"
one = One({1|2})
def work(x): return one.x""",
    "a new type": "import typing\nN = typing.NewType('N', {int|str})\ndef work(x): return N.__supertype__",
    "a type variable": "import typing\nT = typing.TypeVar('T', bound={int|str})\ndef work(x): return T.__bound__",
    "a class's data": "class C:\n    __tablename__ = '{a|b}'\ndef work(x): return C",
    "a class's text": "class C:\n    '{a|b}'\ndef work(x): return C.__doc__",
    "a class's slots": "class C:\n    __slots__ = {()|'a', 'b'}\ndef work(x): return C",
    "a cached call": """
import functools
class C:
    @functools.lru_cache
    def __call__(self): return {1|2}
def work(x): return C()()""",
    "a partial method": """
import functools
class C:
    def add(self, x, y): return x + y
    __add__ = functools.partialmethod(add, {1|2})
def work(x): return C() + 1""",
    "the match of a class": "class C:\n    __match_args__ = {'a', 'b'|'b', 'a'}\ndef work(x): return C",
    "a metaclass": """
class M(type):
    def __len__(cls): return {1|2}
class C(metaclass=M): pass
def work(x): return len(C)""",
    "a metaclass's base": """
class M(type): n = {1|2}
class N(M): pass
class C(metaclass=N): pass
def work(x): return C.n""",
    "a module passed on": "import helper\ndef other(m): return m.FACTOR\ndef work(x): return other(helper)",
    "a module's module passed on": "import helper\ndef other(m): return m.v\ndef work(x): return other(helper.sub)",
    "a module by getattr": "import helper\ndef work(x): return getattr(helper, 'FAC' + 'TOR')",
    "a module under another name": "import helper\ndef work(x):\n    m = helper\n    return m.FACTOR",
    "a module in a closure": """
import helper
def make(m):
    def work(x): return m.FACTOR
    return work
work = make(helper)""",
    "a module that is a default": "import helper\ndef work(x, m=helper): return m.FACTOR",
    "a module in a dict": "import helper\ndict = {'m': helper}\ndef work(x): return dict['m'].FACTOR",
    "a module in a class": "import helper\nclass C:\n    m = helper\ndef work(x): return C.m.FACTOR",
    "a module in an argument": "import helper\ndef work(m): return m.FACTOR\nargument = [helper]",
    "under an installed decorator": """
import types
def one(x): yield {1|2}
work = types.coroutine(one)""",
    "in what an installed function made": """
import functools
wrapped = functools.singledispatch(lambda x: {1|2})
wrapped.__module__, wrapped.__qualname__ = "functools", "wrapper"
del wrapped.__wrapped__
def work(x): return wrapped(x)""",
    "a class that an installed function made": """
import types
def add(self): return {1|2}
made = type("made", (), {"add": add, "__module__": "types"})
def work(x): return made""",
    "a function that says that it is installed": """
def add(x): return {1|2}
add.__module__, add.__qualname__ = "json", "dumps"
def work(x): return add(x)""",
    "a weak dict": """
import weakref
class C:
    def __init__(self, x): self.x = x
held = C({1|2})
weak = weakref.WeakValueDictionary(a=held)
def work(x): return weak["a"].x""",
    "a weak reference": "import weakref\nclass C: pass\nC.n = {1|2}\nr = weakref.ref(C)\ndef work(x): return r().n",
    "a weak set": "import weakref\nclass C: n = {1|2}\nweak = weakref.WeakSet([C])\ndef work(x): return len(weak)",
    "a view": "D = {'a': {1|2}}\nview = D.values()\ndef work(x): return sum(view)",
    "a view of keys": "view = {{1|2}: 3}.keys()\ndef work(x): return list(view)",
    "a module without a file": """
import sys, types
made = types.ModuleType("made")
sys.modules["made"] = made
exec("def add(x): return x + {1|2}", vars(made))
def work(x): return made.add(x)""",
    "a function of a module without a file": """
import sys, types
made = sys.modules["made"] = types.ModuleType("made")
exec("def add(x): return x + {1|2}", vars(made))
from made import add
def work(x): return add(x)""",
    "an attribute of a cached function": """
import functools
@functools.cache
def add(x): return x
add.n = {1|2}
def work(x): return add.n""",
}
SAME = {  # what may differ
    "a comment in a module passed on": "import helper\ndef work(x): return list(map(str, [helper]))",
    "a module's other attribute": "import helper\ndef work(x): return helper.unused, {'# a'|'# a'}",
    "a place": "# {a|a longer one}\nclass C:\n    x: int\n    def f(self): self.b = self.a = 1\ndef work(x): return C",
    "an annotation": "class C:\n    x: {int|str}\ndef work(x: {int|str}) -> {int|str}: return C",
    "the names that are the file's": "def work(x): return __name__, __file__, '{a|a}'",
    "a hash that attrs made": """
class C: pass
code = compile("def __hash__(self): return {1|2}", "<attrs generated hash __main__.C>", "exec")
exec(code, globals(), made := dict())
C.__hash__ = made["__hash__"]
def work(x): return C""",
    "a dataclass's address": """
import dataclasses
class C: pass
other = [C() for _ in range({1|9})]
@dataclasses.dataclass
class D:
    c: C = C()
    __hash__ = None
def work(x): return D""",
}
PRINTED = """
if __name__ == "__main__":
    import functools, json
    from achilles.objects.canonical import digest_of, digests_of
    print(json.dumps([digests_of(work), digest_of(globals().get("argument"), functools.lru_cache(digest_of))]))
"""
BARRED = re.compile(r"\{([^{}|]*)\|([^{}|]*)\}")


def digests_of_both(folder, script, helpers):
    found = []
    for side, helper in enumerate(helpers):
        written = BARRED.sub(lambda match, side=side: match[side + 1], script) + PRINTED
        found.append(digests(folder / str(side), written, "from . import sub\n" + helper, helper))
    return found


@pytest.mark.parametrize("other", OTHERS)
def test_programs_that_differ_have_other_digests(tmp_path, other):
    one, two = digests_of_both(tmp_path, OTHERS[other], ["FACTOR = v = 2\n", "FACTOR = v = 3\n"])
    assert one != two


@pytest.mark.parametrize("same", SAME)
def test_programs_that_do_the_same_have_the_same_digests(tmp_path, same):
    one, two = digests_of_both(tmp_path, SAME[same], ["unused = 2\n", "# a comment\nunused = 2\n"])
    assert one == two


def test_a_chain_of_many_functions_has_a_digest(tmp_path):
    chain = "".join(f"def f{n}(x): return f{n + 1}(x)\n" for n in range(500))
    script = chain + "def f500(x): return {1|2}\ndef work(x): return f0(x)"
    one, two = digests_of_both(tmp_path, script, ["", ""])
    assert one != two


def test_a_function_in_a_set_that_it_names_has_a_digest(tmp_path):
    script = "def work(x): return {1|2}, every\ndef more(x): return every\nevery = {more, work}"
    one, two = digests_of_both(tmp_path, script, ["", ""])
    assert one != two


def test_the_parts_say_what_a_user_has_written(first):
    assert set(first[0]) == {
        "the code of work", *(f"the global {name}" for name in (
            "lock", "Point", "scale", "helper.sub.deep", "again", "json", "Kid", "log", "names"))}


@pytest.mark.parametrize(("one", "other"), [
    ([1], [2]), ([1], [True]), ([1], [1.0]), ([1], ["1"]), (["1"], [b"1"]), ([(1,)], [[1]]), ([{1}], [frozenset([1])]),
    ([{1, 2}], [{1, 3}]), ([[1, 2]], [[2, 1]]), ([{1: 2}], [{1: 3}]), ([1, 2], [[1, 2]]), ([""], [None]),
    ([0.0], [-0.0]), ([bytearray(b"x")], [b"x"]), ([{(1, 2)}], [{(2, 1)}]), ([range(3)], [range(4)]),
    ([Path("a")], [Path("b")]), ([[]], [()]), ([functools.partial(int, 2)], [functools.partial(int, 3)]),
], ids=repr)
def test_other_arguments_have_another_digest(one, other):
    assert digest_of(one, digest_of) != digest_of(other, digest_of)


def test_equal_texts_are_one_text_and_tuples_have_no_identity():
    text, pair = "".join(["some ", "text"]), (1, "x")
    same = [text, text, pair, pair]
    others = ["some text", "".join(["some", " text"]), (1, "x"), (1, "".join(["x"]))]
    assert digest_of(same, digest_of) == digest_of(others, digest_of)


def test_tuples_that_are_shared_are_written_once():
    def nested(base, depth):
        for _ in range(depth):
            base = base, base
        return base

    for base in ["a"], "a", {1}, 0.5:
        assert len(digest_of([nested(base, 60)], digest_of)) == 64
    one, other = nested(("a", 1), 4), ast.literal_eval(repr(nested(("a", 1), 4)))
    assert digest_of([one, one], digest_of) == digest_of([one, other], digest_of)
    assert digest_of([(0.0,), (0.0,)], digest_of) != digest_of([(0.0,), (-0.0,)], digest_of)
    assert digest_of([(1,), (1,)], digest_of) != digest_of([(1,), (True,)], digest_of)
    assert digest_of([({1},), ({1},)], digest_of) != digest_of([({1},), (frozenset([1]),)], digest_of)


def test_what_holds_itself_has_a_digest():
    ring = [1]
    ring.append((ring, {"ring": ring}))

    def own(x):
        return own, ring, x

    assert len(digest_of(ring, digest_of)) == len(digest_of(own)) == 64


def test_an_argument_that_pickle_cannot_take_apart_has_none_and_a_global_counts_by_its_type():
    with pytest.raises(TypeError):
        digest_of([threading.Lock()], digest_of)
    with pytest.raises(TypeError):
        digest_of([{1: 2}.keys()], digest_of)
    assert digest_of(threading.Lock()) == digest_of(threading.Lock()) != digest_of({1: 2}.keys())


def test_what_is_installed_counts_by_its_name():
    assert digest_of(json.dumps) != digest_of(json.loads)
    assert not any(map(is_users, ("json", "sys", "pytest", "os.path", "achilles", "achilles.calls")))
    assert all(map(is_users, ("__main__", "nowhere", __name__)))
    assert digests_of(json.dumps).keys() == {"the function dumps"}
    assert digests_of(len).keys() == {"the function len"}
    assert digests_of(functools.partial(int, base=2)) != digests_of(functools.partial(int, base=3))


Pair = namedtuple("Pair", "left right")


def test_a_method_counts_with_what_it_belongs_to():
    assert digests_of(Pair(1, 2)._replace) != digests_of(Pair(1, 3)._replace)


def test_a_large_value_is_not_copied_and_its_bytes_count():
    large = bytearray(1 << 20)
    before = digest_of([large], digest_of)
    large[-1] = 1
    assert digest_of([large], digest_of) != before


def test_a_set_of_many_texts_is_sorted_by_digests():
    words = {f"word {n}" for n in range(300)}
    assert digest_of(words) == digest_of(set(sorted(words, reverse=True)))


@pytest.mark.parametrize("value", [threading.Lock(), lambda: None], ids=["lock", "lambda"])
def test_what_no_import_finds_is_not_dumped(value):
    assert dump_values([value]) is None


def test_values_are_plain_letters():
    assert dump_values([1, Pair(1, 2)])[0] == 0x80


class Unbound:
    """As a proxy of a web framework is, outside of a request."""

    def __getattribute__(self, name):
        raise RuntimeError(f"outside of a request: {name}")


def test_a_global_that_raises_whatever_is_asked_counts_by_its_type():
    space = {"__name__": "__main__", "request": Unbound()}
    exec("def function(x): return request.path", space)
    assert [*digests_of(space["function"])] == ["the code of function", "the global request"]
