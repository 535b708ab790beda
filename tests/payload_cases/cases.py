"""The table of what must survive the way to another process and back.

How it is run, and against what, is peer.py's.
"""

import abc
import collections
import contextlib
import dataclasses
import enum
import functools
import math
import sys
import threading
import typing
import xml.etree.ElementTree

sys.path.insert(0, sys.argv[-1])
from peer import HERE, case, letters, main, program  # noqa: E402


@dataclasses.dataclass
class Point:
    x: int
    y: int = 2
    tags: list = dataclasses.field(default_factory=list)

    def moved(self, by):
        return Point(self.x + by, self.y)


@dataclasses.dataclass(frozen=True)
class Point3:
    z: int = 3


@dataclasses.dataclass
class Labelled(Point):
    label: str = "none"


@case("dataclass: a method returns its kind", [Point(1)], lambda r: type(r) is Point and r == Point(6))
def moved(p):
    return p.moved(5)


@case("dataclass: fields, replace, asdict", [Point(1)],
      lambda r: r == (["x", "y", "tags"], Point(9), {"z": 3}))
def fields(p):
    return [f.name for f in dataclasses.fields(p)], dataclasses.replace(p, x=9), dataclasses.asdict(Point3())


@case("dataclass: inherited", [Labelled(1, 2, label="a")],
      lambda r: type(r) is Labelled and r == Labelled(1, 3, label="a") and isinstance(r, Point))
def inherited(p):
    assert isinstance(p, Point) and isinstance(p, Labelled)
    return Labelled(p.x, p.y + 1, p.tags, label=p.label)


@case("isinstance inside the function", [Point(1), 3], lambda a, b: a is True and b is False)
def is_point(p):
    return isinstance(p, Point)


class Colour(enum.Enum):
    RED = 1
    GREEN = 2
    CRIMSON = 1

    def other(self):
        return Colour.GREEN if self is Colour.RED else Colour.RED


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 5


class Access(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()
    BOTH = READ | WRITE


class Planet(enum.Enum):
    EARTH = (5.97, 6.37)

    def __init__(self, mass, radius):
        self.mass = mass
        self.radius = radius

    @property
    def ratio(self):
        return self.mass / self.radius


class Word(str, enum.Enum):
    HELLO = "hello"


@case("enum members by identity", [Colour.RED, Colour.GREEN],
      lambda a, b: a[0] is Colour.GREEN and b[0] is Colour.RED and a[1:] == (True, 2))
def enum_member(c):
    assert Colour(1) is Colour.RED and Colour["CRIMSON"] is Colour.RED
    return c.other(), c in (Colour.RED, Colour.GREEN), len(Colour)


@case("IntEnum", [Level.LOW], lambda r: r[0] is Level.HIGH and r[1] == 6)
def int_enum(level):
    assert level is Level.LOW
    return Level.HIGH, level + Level.HIGH


@case("Flag, and what is combined of it", [Access.READ | Access.WRITE, Access.READ],
      lambda a, b: a is Access.BOTH and b is Access.BOTH)
def flag(a):
    assert Access.READ in a and a & Access.READ is Access.READ
    return a | Access.WRITE


@case("enum with its own __init__, and one that is a str", [Planet.EARTH],
      lambda r: r[0] is Planet.EARTH and r[1] == 5.97 / 6.37 and r[2] is Word.HELLO)
def planet(p):
    assert Word.HELLO == "hello" and p is Planet.EARTH
    return p, p.ratio, Word("hello")


class Shape(abc.ABC):
    def __init__(self, size):
        self.size = size

    @abc.abstractmethod
    def area(self):
        return self.size

    @staticmethod
    def unit():
        return 7

    @classmethod
    def made(cls, size):
        return cls(size)

    @property
    def double(self):
        return self.size * 2


class Square(Shape):
    def area(self):
        return super().area() ** 2


Shape.register(int)


@case("abstract base class, super(), register", [Square(3)], lambda r: r == (9, True, True))
def abstract(s):
    try:
        Shape(1)
    except TypeError:
        return s.area(), isinstance(s, Shape), isinstance(3, Shape)


@case("static and class methods, property", [4], lambda r: r[0] == (7, 8, 16) and type(r[1]) is Square)
def methods(n):
    return (Square.unit(), Square.made(n).double, Square(n).area()), Square.made(n)


Pair = collections.namedtuple("Pair", "a b", defaults=[5])


class Typed(typing.NamedTuple):
    a: int
    b: str = "x"

    def both(self):
        return f"{self.a}{self.b}"


class SubPair(collections.namedtuple("Base", "a")):
    __slots__ = ()

    def next(self):
        return SubPair(self.a + 1)


@case("named tuples", [Pair(1), Pair(2, 3)], lambda r, s: r == (Pair(1, 6), Typed(1, "y"), "1y", SubPair(2))
      and type(r[0]) is Pair and type(r[1]) is Typed and type(r[3]) is SubPair and s[0].a == 2)
def named_tuples(p):
    return p._replace(b=p.b + 1), Typed(1, "y"), Typed(1, "y").both(), SubPair(1).next()


CONSTANT = 10


def helper(x):
    return x + CONSTANT


@case("helper, constant, module of the module level", [1], lambda r: r == math.sqrt(11))
def uses_helper(x):
    return math.sqrt(helper(x))


@case("submodules of a package", ["<a>1</a>"], lambda r: r == "1")
def submodule(text):
    return xml.etree.ElementTree.fromstring(text).text


@case("recursion", [10], lambda r: r == 55)
def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)


def is_even(n):
    return n == 0 or is_odd(n - 1)


@case("mutual recursion", [7], lambda r: r is True)
def is_odd(n):
    return n != 0 and is_even(n - 1)


class Ring:
    def __init__(self):
        self.me = self
        self.also = [self, {"again": self}]


@case("an object that refers to itself", [Ring()],
      lambda r: type(r) is Ring and r.me is r and r.also[0] is r and r.also[1]["again"] is r)
def ring(r):
    assert r.me is r and isinstance(r, Ring)
    return Ring()


case("partial of a lambda", [2], lambda r: r == 12)(functools.partial(lambda a, b: a + b, 10))
case("bound method", [3], lambda r: r == Point(4))(Point(1).moved)
case("class method", [3], lambda r: type(r) is Square and r.size == 3)(Square.made)
case("a class as the function", [3], lambda r: r == Point(3))(Point)
case("lambda with defaults", [3], lambda r: r == 3 + 5 + 7 + 10)(lambda x, y=5, *, z=7: x + y + z + CONSTANT)
case("a builtin", [[1, 2]], lambda r: r == 2)(len)


class Adder:
    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return x + self.by + CONSTANT


case("a callable instance", [1], lambda r: r == 13)(Adder(2))


@case("a class made in a function", [4],
      lambda r: type(r).__name__ == "Local" and r.n == 4 and r.twice() == 8)
def local_class(n):
    class Local:
        def __init__(self, n):
            self.n = n

        def twice(self):
            return self.n * 2
    return Local(n)


def counter():
    count = 0

    def bump():
        nonlocal count
        count += 1
        return count

    def read():
        return count
    return bump, read


BUMP, READ = counter()


@case("a cell shared by two functions", [1], lambda r: r == (1, 2, 2))
def shared_cell(_):
    return BUMP(), BUMP(), READ()


def recursive_closure():
    def walk(n):
        return 0 if n == 0 else 1 + walk(n - 1)
    return walk


case("a closure that holds itself", [5], lambda r: r == 5)(recursive_closure())


class Failure(Exception):
    def __init__(self, code, reason):
        super().__init__(f"{reason}: {code}")
        self.code = code


class Plain(ValueError):
    pass


@case("an exception with its own __init__", [7], lambda r: type(r) is Failure and r.code == 7
      and r.args == ("bad: 7",) and "raises_failure" in str(r.__cause__))
def raises_failure(n):
    raise Failure(n, "bad")


@case("exceptions beside values", [0, 1, 2], lambda a, b, c: a == 0 and type(b) is Plain and b.args == (1,)
      and type(c) is KeyboardInterrupt)
def raises_some(n):
    if n == 1:
        raise Plain(n)
    if n == 2:
        raise KeyboardInterrupt
    return n


class Stubborn(Exception):
    def __reduce__(self):
        raise RuntimeError("never")


@case("an exception that cannot travel", [1], lambda r: type(r).__name__ == "RemoteError"
      and "Stubborn: why" in str(r) and "stubborn" in str(r.__cause__))
def stubborn(_):
    raise Stubborn("why")


@case("a result that cannot be dumped", [0, 1], lambda a, b: type(a).__name__ == "MaybeEncodingError"
      and "generator" in a.value and b == 1)
def undumpable(n):
    return n or (x for x in ())


def squares(n):
    for i in range(n):
        yield i * i


case("a generator function", [3], lambda r: r == [0, 1, 4])(lambda n: list(squares(n)))


class Slotted:
    __slots__ = ("a", "__b")

    def __init__(self, a):
        self.a = a
        self.__b = a + 1

    def b(self):
        return self.__b


@dataclasses.dataclass(slots=True)
class SlottedData:
    a: int


@case("__slots__", [Slotted(1)], lambda r: type(r[0]) is Slotted and r[0].b() == 3 and r[1] == SlottedData(4))
def slotted(s):
    assert not hasattr(s, "__dict__") and s.b() == 2
    return Slotted(s.a + 1), SlottedData(4)


class Chain:
    latest = None

    def __init__(self):
        assert __class__ is Chain
        Chain.latest = self

    def fresh(self):
        return __class__()


@case("the __class__ cell", [Chain()], lambda r: type(r) is Chain)
def chain(c):
    assert type(c) is Chain and c.fresh() is Chain.latest
    return Chain.latest


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return "wrapped", function(*args)
    return wrapper


@case("functools.wraps", [1], lambda r: r == ("wrapped", 11))
@decorated
def wrapped(x):
    return helper(x)


@case("lru_cache", [30], lambda r: r == 832040)
@functools.cache
def cached_fib(n):
    return n if n < 2 else cached_fib(n - 1) + cached_fib(n - 2)


@contextlib.contextmanager
def managed():
    yield CONSTANT


@case("contextmanager and singledispatch", [1], lambda r: r == (10, "int"))
def manages(n):
    with managed() as value:
        return value, kind(n)


@functools.singledispatch
def kind(_):
    return "any"


@kind.register
def _(n: int):
    return "int"


class Meta(type):
    made = []

    def __new__(mcs, name, bases, namespace, **options):
        namespace["stamp"] = mcs.__name__
        return super().__new__(mcs, name, bases, namespace)

    def __init__(cls, name, bases, namespace, *, colour):
        super().__init__(name, bases, namespace)
        cls.colour = colour
        Meta.made.append(name)

    def shout(cls):
        return cls.__name__.upper()


class WithMeta(metaclass=Meta, colour="red"):
    pass


class AlsoMeta(WithMeta, colour="blue"):
    pass


@case("a metaclass of __main__", [WithMeta(), AlsoMeta()], lambda a, b:
      a[1:] == ("red", "Meta", "WITHMETA", True) and type(b[0]) is AlsoMeta and b[1] == "blue" and b[4])
def meta(w):
    return w, type(w).colour, type(w).stamp, type(w).shout(), Meta.made == ["WithMeta", "AlsoMeta"]


class Plugin:
    known = {}

    def __init_subclass__(cls, *, name):
        Plugin.known[name] = cls


class Knife(Plugin, name="knife"):
    pass


class Saw(Plugin, name="saw"):
    pass


@case("__init_subclass__ is not run again", [Saw()], lambda r: r == (["knife", "saw"], True, True))
def plugin(s):
    return sorted(Plugin.known), Plugin.known["saw"] is type(s), Saw.__mro__ == (Saw, Plugin, object)


class Tool:
    friend = None


class Friend:
    tool = Tool()


Tool.friend = Friend()


@case("classes that refer to each other", [Friend()], lambda r: type(r) is Friend)
def friends(f):
    assert type(Friend.tool) is Tool and type(Tool.friend) is Friend and type(f) is Friend
    return Tool.friend


T = typing.TypeVar("T")


class Box(typing.Generic[T]):
    def __init__(self, item: T) -> None:
        self.item: T = item

    def get(self) -> T | None:
        return self.item


class Closes(typing.Protocol):
    def close(self) -> None: ...


@case("generic classes and annotations", [Box(3)], lambda r: type(r) is Box and r.item == 4)
def generic(box: "Box[int]", also: list[Closes] | None = None) -> Box[int]:
    assert Box.__parameters__ and typing.get_type_hints(generic)
    return Box[int](box.get() + 1)


class Descriptor:
    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, instance, owner):
        return self.name


class Described:
    field = Descriptor()
    nested = type("Nested", (), {"value": 1})


case("descriptors and __set_name__", [1], lambda r: r == ("field", 1))(
    lambda _: (Described().field, Described.nested.value))

MISSING = object()


@case("a mark compared by identity", [1], lambda r: r == (True, True))
def marked(_, mark=MISSING):
    return mark is MISSING, dataclasses.MISSING is dataclasses.fields(Point)[0].default


LOCK = threading.Lock()


@case("a lock among the globals", [1], lambda r: r == 2)
def locked(n):
    with LOCK:
        return n + 1


VIEW = {"a": 1}.keys()


@case("dill: a view among the globals, and beside an instance", [[Point(1), {2: 3}.values()]],
      lambda r: r[0] == Point(2) and list(r[1]) == ["a"] and r[2] is Colour.RED)
def view(pair):
    assert "a" in VIEW and list(pair[1]) == [3] and type(pair[0]) is Point
    return Point(2), VIEW, Colour.RED


class HoldsLock:
    def __init__(self):
        self.lock = threading.RLock()
        self.colour = Colour.RED
        self.me = self

    @functools.cached_property
    def value(self):
        return self.colour


@case("a lock in an instance", [HoldsLock()], lambda r: r[0] is Colour.RED and type(r[1]) is HoldsLock)
def holds_lock(h):
    with h.lock:
        assert h.me is h
        return h.value, h


@case("prints and types of C", [1], lambda r: r == (print, type(None), type(r[3]), r[3]) and r[3](1) == 11)
def builtins_too(_):
    return print, type(None), type(helper), helper


try:
    import numpy
except ImportError:
    numpy = None

if numpy:
    BIG = numpy.arange(100_000)

    @case("numpy", [numpy.ones(1 << 20), numpy.float64(2)], lambda a, b: a.sum() == 100_000 and b == 2)
    def arrays(a):
        if a.size == 1:
            return a * numpy.add(0, 1)
        a[0] = 1
        assert a.ctypes.data % 16 == 0
        return numpy.ones_like(BIG)

    SMALL = numpy.arange(4_000)

    @case("numpy, arrays among the globals are written", [1], lambda r: r == (7, 7))
    def written(_):
        BIG[0] = SMALL[0] = 7
        return BIG[0], SMALL[0]


shared = None


def initialise(a):
    global shared
    shared = a


def adds_shared(x):
    return shared + x


class Later:
    def total(self):
        return shared + later  # noqa: F821


@program("initializer globals")
def initializer(peer):
    assert peer.map(adds_shared, [1], [(initialise, [10])]) == [11]
    assert peer.map(adds_shared, [2]) == [12]
    assert peer.map(lambda o: shared * o, [3]) == [30]
    assert shared is None


def set_later(n):
    global later
    later = n


@program("a class whose method uses a global that is set later")
def set_later_case(peer):
    assert peer.map(lambda o: o.total(), [Later()], [(initialise, [1]), (set_later, [2])]) == [3]


@program("contexts share nothing")
def contexts(peer):
    peer.map(adds_shared, [1], [(initialise, [10])])
    peer.open("other than all")
    assert isinstance(peer.map(adds_shared, [1])[0], TypeError)


@program("what the caller changes comes through, what it does not stays")
def changes(peer):
    space = globals()
    space["config"], space["state"] = {"k": 1}, 0

    def define(source):
        exec(source, space)
    define("def part(): return 'old'\n"
           "def whole(x): global state; state += 1; return part(), config['k'], state")
    assert peer.map(space["whole"], [0]) == [("old", 1, 1)]
    define("def part(): return 'new'")
    assert peer.map(space["whole"], [0]) == [("new", 1, 2)]
    space["config"]["k"] = 2
    assert peer.map(lambda x: (config["k"], state), [0]) == [(2, 2)]  # noqa: F821
    space["state"] = 50
    assert peer.map(space["whole"], [0]) == [("new", 2, 51)]


@program("one class in a worker; a changed definition is a new one")
def one_class(peer):
    assert peer.map(lambda p: (id(Point), id(type(p))), [Point(1)])[0][0] == peer.map(lambda p: id(type(p)), [
        Point(2)])[0]
    before = peer.map(lambda t: id(Tool), [0])
    assert peer.map(lambda t: id(Tool), [0]) == before
    Tool.extra = 5
    assert peer.map(lambda t: Tool.extra, [Tool()]) == [5]
    returned = peer.map(lambda t: Tool(), [0])[0]
    assert type(returned) is Tool


@program("a class made in the worker comes back to it")
def returns(peer):
    made = peer.map(local_class, [3])[0]
    again = peer.map(lambda m: (m, type(m).__name__, m.twice()), [made])[0]
    assert again[1:] == ("Local", 6) and type(again[0]) is type(made)


@program("skipped offsets")
def skips(peer):
    assert peer.map(helper, [1, 2, 3, 4, 5, 6], skip=[0, 2, 3, 4, 5]) == [None, 12, None, None, None, None]


@program("the same bytes for the same function")
def same_bytes(peer):
    first = b"".join(peer.context.dump(planet))
    peer.context.refresh()
    assert b"".join(peer.context.dump(planet)) == first


@program("a module that the node lacks")
def lacks(peer):
    import only_here
    try:
        peer.map(only_here.function, [1])
    except ModuleNotFoundError as error:
        assert error.name == "only_here"
    else:
        raise AssertionError
    try:
        peer.map(lambda x: only_here.function(x), [1])
    except ModuleNotFoundError as error:
        assert error.name == "only_here"
    else:
        raise AssertionError


@program("what cannot be dumped is named")
def named(peer):
    for dump, thing in ((functools.partial(letters.dump_chunk, peer.context), [1, (x for x in ())]),
                        (peer.context.dump, lambda: peer.process)):
        try:
            dump(thing)
        except TypeError as error:
            assert type(error).__name__ == "DumpError" and error.__cause__ is not None
            assert str(error).startswith(("an argument of type generator", "function named.<locals>."))
        else:
            raise AssertionError
    deep = []
    for _ in range(100_000):
        deep = [deep]
    try:
        letters.dump_chunk(peer.context, [deep])
    except TypeError as error:
        assert "an argument of type list" in str(error) and isinstance(error.__cause__, RecursionError)
    while deep:
        deep = deep.pop()


sys.path.insert(0, str(HERE / "caller_only"))
main()
