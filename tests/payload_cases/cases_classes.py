"""Classes that hold each other and themselves, and what gives a class more than its methods."""

import abc
import dataclasses
import functools
import sys

sys.path.insert(0, sys.argv[-1])
from peer import case, expect, gives, main, program  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Tile:
    name: str


class Inner:
    def __init__(self, n):
        self.n = n


class Middle:
    inner = Inner(1)

    def __init__(self):
        self.held = Inner(2)


class Outer:
    middle = Middle()
    kind = Middle
    kinds = {Inner: "inner", Middle: Inner}


@gives("instances of classes whose attributes hold instances", 1, (1, 2, "inner", True))
def outer(_):
    return Outer.middle.inner.n, Outer.middle.held.n, Outer.kinds[Inner], Outer.kinds[Outer.kind] is Inner


class Left:
    back = None

    def __init__(self, n):
        self.n = n

    def __eq__(self, other):
        return self.n == other.n

    def __hash__(self):
        return hash(self.n)


class Right(Left):
    table = {Left(1): "left"}
    read = [Left(2)]


Left.back = [Right(3), {"a": Right(4)}]


@gives("classes that hold each other's instances", Right(5), ("left", 2, 3, True, 5))
def both(right):
    assert type(right) is Right and isinstance(right, Left)
    return Right.table[Left(1)], Right.read[0].n, Left.back[0].n, isinstance(Left.back[1]["a"], Right), right.n


class Colour:
    def __init__(self, name):
        self.name = name

    def __eq__(self, other):
        return self.name == other.name

    def __hash__(self):
        return hash(self.name)

    def shout(self):
        return self.name.upper()


Colour.RED = Colour("red")
Colour.BY_NAME = {"red": Colour.RED}
Colour.METHODS = {"shout": Colour.shout}
Colour.BOUND = [Colour.RED.shout]
Colour.OPPOSITE = {Colour.RED: Colour("green")}


@gives("a class that holds its own instances and methods", Colour("red"), ("red", True, "RED", "RED", "green", True))
def colours(red):
    return (Colour.RED.name, Colour.BY_NAME["red"] is Colour.RED, Colour.METHODS["shout"](Colour.RED),
            Colour.BOUND[0](), Colour.OPPOSITE[red].name, Colour.BOUND[0].__self__ is Colour.RED)


class Single:
    made = None

    def __new__(cls):
        if cls.made is None:
            cls.made = super().__new__(cls)
        return cls.made


Single().count = 3


class Once(type):
    instances = {}

    def __call__(cls, *args):
        if cls not in Once.instances:
            Once.instances[cls] = super().__call__(*args)
        return Once.instances[cls]


class Settings(metaclass=Once):
    def __init__(self):
        self.level = 4


Settings().level = 5


@gives("singletons, by __new__ and by a metaclass", 1, (3, True, 5, True))
def singles(_):
    return Single().count, Single() is Single.made, Settings().level, Settings() is Once.instances[Settings]


class Field:
    def __init__(self, kind):
        self.kind, self.name, self.owner = kind, None, None

    def __set_name__(self, owner, name):
        assert self.name is None
        self.name, self.owner = name, owner

    def __get__(self, instance, owner):
        return self if instance is None else instance.__dict__[self.name]

    def __set__(self, instance, value):
        instance.__dict__[self.name] = self.kind(value)


class Record:
    age = Field(int)
    tile = Field(Tile)

    def __init__(self, age, tile):
        self.age, self.tile = age, tile


@case("descriptors with __set_name__", [Record("3", "a")],
      lambda r: type(r) is Record and (r.age, r.tile.name) == (5, "b"))
def record(r):
    assert (r.age, r.tile) == (3, Tile("a")) and (Record.age.name, Record.tile.owner) == ("age", Record)
    return Record("5", "b")


@functools.singledispatch
def kind(_):
    return "any"


@kind.register
def _(_: Tile):
    return "tile"


@kind.register(Left)
def _(_):
    return "left"


class Printer:
    @functools.singledispatchmethod
    def show(self, thing):
        return "any"

    @show.register
    def _(self, thing: Tile):
        return f"tile {thing.name}"

    @functools.cached_property
    def once(self):
        return object()

    half = functools.partialmethod(lambda self, by, x: x / by, 2)


class Office:
    printer = Printer()


@gives("singledispatch, and what functools makes of methods", Tile("a"),
       ("tile", "left", "any", "tile a", "any", True, 2))
def dispatches(tile):
    printer = Office.printer
    return (kind(tile), kind(Right(1)), kind(3), printer.show(tile), printer.show(3),
            printer.once is printer.once, printer.half(4))


class Sized(abc.ABC):
    @abc.abstractmethod
    def size(self):
        ...


@Sized.register
class Duck:
    pass


class Zoo(Sized):
    animals = {Duck: [Duck()]}

    def size(self):
        return len(self.animals)


@gives("abstract classes and what is registered with them", Zoo(), (True, True, False, 1))
def zoo(z):
    return isinstance(Zoo.animals[Duck][0], Sized), issubclass(Duck, Sized), isinstance(3, Sized), z.size()


class Unit(Sized):
    def size(self):
        return 1


Unit.ONE, Unit.KNOWN = Unit(), {Unit: [Unit()]}


@gives("a class with abstract methods that holds its own instances", Unit(), (1, 1, True))
def unit(u):
    return Unit.ONE.size(), Unit.KNOWN[Unit][0].size(), isinstance(u, Sized)


class Bad(Exception):
    CODES = {Tile("a"): 7}

    def __init__(self, tile):
        super().__init__(tile.name)
        self.code = self.CODES[tile]


@case("an exception whose class has such a table", [Tile("a")], lambda e: type(e) is Bad and e.code == 7,
      fork="an exception whose __init__ takes other arguments ends its Pool")
def fails(tile):
    raise Bad(tile)

@program("base first, then its subclass, in letters of their own")
def in_turn(peer):
    expect(peer.map(type, [Left(1)]), [Left])
    expect(peer.map(type, [Right(1)]), [Right])
    expect(peer.map(both, [Right(5)]), [("left", 2, 3, True, 5)])


main()
