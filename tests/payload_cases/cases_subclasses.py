"""Subclasses of anything with `__init_subclass__`, also when base and subclass come in different letters."""

import abc
import collections
import contextlib
import functools
import string
import sys
import typing
import unittest

sys.path.insert(0, sys.argv[-1])
from peer import ask, case, expect, gives, main, program  # noqa: E402

T = typing.TypeVar("T")
K = typing.TypeVar("K", bound=str)


class Box(typing.Generic[T]):
    def __init__(self, x: T):
        self.x = x


class IntBox(Box[int]):
    def get(self):
        return self.x


class PairBox(IntBox, typing.Generic[K]):
    def both(self, key: K) -> tuple[K, int]:
        return key, self.x


gives("a subclass of a generic class", IntBox(3), 3)(IntBox.get)


@case("one that is made in the worker", [3], lambda r: type(r) is PairBox and r.get() == 3)
def made(n):
    box = PairBox[str](n)
    assert box.both("a") == ("a", n) and isinstance(box, Box) and IntBox.__orig_bases__ == (Box[int],)
    assert PairBox.__parameters__ == (K,) and typing.get_args(PairBox[str]) == (str,)
    return box


class Shape(typing.Protocol):
    def area(self) -> float: ...


class Square(Shape):
    def __init__(self, n):
        self.n = n

    def area(self):
        return self.n ** 2


@typing.runtime_checkable
class Closes(typing.Protocol[T]):
    limit: int = 3

    def close(self) -> T: ...


class Door(Closes[str]):
    def close(self):
        return "closed"


class Window:
    limit = 4

    def close(self):
        return "shut"


gives("an explicit Protocol", Square(3), 9)(Square.area)


@gives("a Protocol that is checked at run time", Door(), (True, True, False, "closed", 3))
def checked(door):
    return isinstance(door, Closes), isinstance(Window(), Closes), isinstance(3, Closes), door.close(), door.limit


@gives("a Protocol that an importable class fulfils", 1, (True, False))
def fulfilled(_):
    return isinstance(string.Template("a"), Substitutes), isinstance(3, Substitutes)


@typing.runtime_checkable
class Substitutes(typing.Protocol):
    def substitute(self) -> str: ...


class Command(abc.ABC, typing.Generic[T]):
    limit: int

    @abc.abstractmethod
    def run(self) -> T: ...


class Hello(Command[str]):
    def run(self):
        return "hello"


gives("an ABC that is generic", Hello(), "hello")(Hello.run)


@gives("an ABC's abstract methods", Hello(), (True, "hello", ["run"]))
def abstract(hello):
    try:
        Command()
    except TypeError:
        return isinstance(hello, Command), hello.run(), sorted(Command.__abstractmethods__)


class Plugin:
    known = []
    options = {}

    def __init_subclass__(cls, *, speed=0, **more):
        super().__init_subclass__(**more)
        Plugin.known.append(cls.__name__)
        Plugin.options[cls] = speed


class Early(Plugin):
    pass


class Late(Plugin, speed=3):
    def go(self):
        return "late", Plugin.known, Plugin.options[Late], Plugin.options[Early]


RIGHT = ("late", ["Early", "Late"], 3, 0)
gives("a registry of subclasses", Late(), RIGHT)(Late.go)


@program("a registry: the base in a letter before")
def base_first(peer):
    expect(peer.map(type, [Plugin()]), [Plugin])
    expect(peer.map(Late.go, [Late()]), [RIGHT])
    expect(peer.map(Late.go, [Late()]), [RIGHT])


@program("generic classes: each base in a letter before")
def generic_first(peer):
    for cls in (Box, IntBox, PairBox):
        expect([type(each) for each in peer.map(same, [cls(3)])], [cls])
    expect(ask(peer, made)[0].get(), 1)
    expect(peer.map(is_box, [Box(1), IntBox(1), PairBox(1)]), [(True, False, False), (True, True, False), (True,) * 3])


def same(x):
    return x


def is_box(x):
    return isinstance(x, Box), isinstance(x, IntBox), isinstance(x, PairBox)


@program("protocols and abstract classes: the base in a letter before")
def protocol_first(peer):
    expect(peer.map(is_shape, [3]), [False])
    expect(peer.map(Square.area, [Square(3)]), [9])
    expect(peer.map(Hello.run, [Hello()]), ["hello"])
    expect(peer.map(is_shape, [Square(2)]), [True])


def is_shape(x):
    return Shape in type(x).__mro__ and issubclass(Hello, Command)


def made_later(name, base):
    return type(base)(name, (base,), {"__module__": __name__, "go": lambda self: name})


@program("a subclass that is made after its base has travelled", fork="what is made after the fork is not inherited")
def after(peer):
    for base in (Plugin, IntBox, Shape, Command, Template, Case, object):
        peer.map(type, [base()] if base in (Plugin, object) else [3])
        cls = made_later(f"After{base.__name__}", base)
        expect(peer.map(lambda x: (cls.go(None), base in cls.__mro__), [1]), [(cls.__name__, True)])  # noqa: B023
    Plugin.known[2:] = []


class Template(string.Template):
    delimiter = "%"


class Case(unittest.TestCase):
    def test_it(self):
        self.assertEqual(1, 1)


@gives("string.Template", Template("a %b"), ("a 1", "x 2"))
def template(t):
    return t.substitute(b=1), Template("x %y").substitute(y=2)


@gives("unittest.TestCase", 1, (1, True))
def unittests(_):
    result = unittest.TestResult()
    Case("test_it").run(result)
    return result.testsRun, result.wasSuccessful()


class Numbers(collections.UserDict, typing.Generic[K]):
    def total(self):
        return sum(self.values())


class Words(list[str]):
    def text(self):
        return " ".join(self)


class Default(typing.Dict[str, int]):  # noqa: UP006
    def __missing__(self, key):
        return 0


@gives("subclasses of importable generic classes", [Numbers(a=1, b=2), Words(["a", "b"]), Default()], (3, "a b", 0))
def importable(three):
    numbers, words, default = three
    assert type(numbers) is Numbers and type(words) is Words
    return numbers.total(), words.text(), default["x"]


class Managed(contextlib.AbstractContextManager, contextlib.ContextDecorator):
    def __enter__(self):
        return 7

    def __exit__(self, *error):
        return None


@gives("subclasses of importable abstract classes", 1, (7, 8))
def managed(_):
    @Managed()
    def inner():
        return 8
    with Managed() as seven:
        return seven, inner()


class Keeps:
    """Its hook sets attributes, and refuses to run twice."""

    ran = set()

    def __init_subclass__(cls):
        assert cls.__qualname__ not in Keeps.ran
        Keeps.ran.add(cls.__qualname__)
        cls.table = {cls: cls.__name__}
        cls.made = staticmethod(functools.partial(cls))


class Kept(Keeps):
    def __init__(self):
        self.n = 5


@gives("what the hook set", Kept(), ("Kept", 5, {"Kept"}))
def kept(k):
    return type(k).table[Kept], k.made().n, Keeps.ran


@gives("a generic class whose parameter is one of the script", Box(Square(2)), (4, True, (Square,), (Hello,)))
def parameters(box):
    alias = Box[Square]
    return (alias(Square(2)).x.area(), isinstance(box.x, Square), typing.get_args(alias),
            typing.get_args(ALIASES["k"][0]))


class Holds:
    kind = Box[Hello]
    optional: typing.Optional[Box[int]] = None  # noqa: UP045
    maker = staticmethod(Box[int])


ALIASES = {"k": [Holds.kind]}
EARLY = typing.Callable[[IntBox], "Box[Square]"]


@gives("aliases as attributes, globals, annotations", Box[int], (True, True, 3, True, True))
def aliases(alias: Box[int], more: typing.Optional[Box[Square]] = None):  # noqa: UP045
    hints = typing.get_type_hints(Holds)
    optional = hints["optional"] == typing.Optional[Box[int]]  # noqa: UP045
    return (Holds.kind == Box[Hello], alias == Box[int], Holds.maker(3).x, optional,
            typing.get_args(EARLY)[0] == [IntBox])


class Tree(typing.Generic[T]):
    children: "list[Tree[T]]"

    def __init__(self, x: T):
        self.x, self.children = x, []


class Forest(Tree[int]):
    kinds = {Tree[int]: "int"}


Tree.INT, Tree.TABLE = Tree[int], {"own": [Tree[str], Forest]}


@gives("aliases of the class itself among its attributes", Forest(1), (3, True, True, "int"))
def own_aliases(forest):
    return (Tree.INT(3).x, Tree.TABLE["own"][0] == Tree[str], isinstance(forest, Tree.TABLE["own"][1]),
            Forest.kinds[Tree.INT])


@program("an alias of a class, in the letter that brings the class")
def alias_first(peer):
    expect(peer.map(origin, [Box[int]]), [(True, (int,))])
    expect(peer.map(origin, [PairBox[str]]), [(True, (str,))])
    result, = peer.map(give_alias, [Square])
    assert result == Box[Square]


def origin(alias):
    return issubclass(typing.get_origin(alias), Box), typing.get_args(alias)


def give_alias(kind):
    return Box[kind]


main()
