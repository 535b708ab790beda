"""Enums whose members are more than their values, as the enum HOWTO has them: as globals, arguments, results."""

import dataclasses
import datetime
import enum
import functools
import operator
import sys

sys.path.insert(0, sys.argv[-1])
from peer import case, expect, gives, main, program  # noqa: E402


class Coordinate(bytes, enum.Enum):
    def __new__(cls, value, label):
        made = bytes.__new__(cls, [value])
        made._value_ = value
        made.label = label
        return made

    PX = (0, "P.X")
    PY = (1, "P.Y")


class Code(str, enum.Enum):
    def __new__(cls, text, number):
        made = str.__new__(cls, text)
        made._value_ = number
        return made

    OK = ("ok", 200)
    NO = ("no", 404)


class Level(int, enum.Enum):
    def __new__(cls, rank, name):
        made = int.__new__(cls, rank)
        made._value_ = name
        return made

    LOW = (1, "low")
    HIGH = (2, "high")


class Period(datetime.timedelta, enum.Enum):
    """Two periods."""

    _ignore_ = "Period i"
    Period = vars()
    for i in range(1, 3):
        Period[f"day_{i}"] = i


class Weight(float, enum.Enum):
    def __new__(cls, kilos):
        made = float.__new__(cls, kilos * 1000)
        made._value_ = kilos
        return made

    A = 1.5


class Planet(enum.Enum):
    EARTH = (5.97, 6.37)
    MARS = (0.64, 3.39)

    def __init__(self, mass, radius):
        self.mass, self.radius = mass, radius

    @property
    def ratio(self):
        return self.mass / self.radius


@dataclasses.dataclass
class Animal:
    size: str
    legs: int

    def both(self):
        return f"{self.size} {self.legs}"


class Creature(Animal, enum.Enum):
    BEETLE = "small", 6
    DOG = "medium", 4


class Op(enum.Enum):
    ADD = enum.member(lambda a, b: a + b)
    MUL = enum.member(operator.mul)
    INC = enum.member(functools.partial(operator.add, 1))

    def __call__(self, *args):
        return self.value(*args)


@gives("bytes with __new__", Coordinate.PX, (b"\1", 1, "P.Y", True, True, b"\0"))
def coordinate(x):
    return (bytes(Coordinate.PY), Coordinate.PY.value, Coordinate.PY.label, x is Coordinate.PX,
            Coordinate(1) is Coordinate.PY, bytes(x))


@gives("str with __new__", Code.NO, ("ok", True, 200, True, "no", True))
def code(x):
    return str.__str__(Code.OK), Code.OK == "ok", Code.OK.value, Code(200) is Code.OK, str.__str__(x), x is Code.NO


@gives("int with __new__", Level.LOW, (2, True, "high", True, 1))
def level(x):
    return int(Level.HIGH), Level.HIGH > x, Level.HIGH.value, Level("low") is x, int(x)


@gives("timedelta, and members made in a loop", Period.day_1, (2, Period.day_1.value, True, ["day_1", "day_2"]))
def period(x):
    return Period.day_2.days, Period.day_1.value, x is Period.day_1, [*Period.__members__]


@gives("float with __new__", Weight.A, (1500.0, 1.5, True))
def weight(x):
    return float(Weight.A), Weight.A.value, x is Weight.A


@gives("__init__ and a property", Planet.EARTH, (5.97, (5.97, 6.37), 5.97 / 6.37, True))
def planet(x):
    return Planet.EARTH.mass, Planet.EARTH.value, x.ratio, x is Planet((5.97, 6.37))


@gives("a dataclass as the mixin", Creature.DOG, (6, "small", "medium 4", True))
def creature(x):
    return Creature.BEETLE.legs, Creature.BEETLE.size, x.both(), x is Creature.DOG


@gives("members that are functions", 1, (3, 6, 5, 3))
def op(_):
    return Op.ADD.value(1, 2), Op.MUL(2, 3), Op.INC(4), len(Op)


BY_VALUE = "pickle names a member by its value, which here is a lambda"


@case("members that are functions, as argument and result", [Op.ADD, Op.INC], lambda *r: r == ((True, 3), Op.INC),
      fork=BY_VALUE)
def op_there(x):
    return (x is Op.ADD, x(1, 2)) if x is Op.ADD else x


MEMBERS = [Coordinate.PY, Code.OK, Level.HIGH, Period.day_2, Weight.A, Planet.MARS, Creature.BEETLE,
           Op.MUL]


@case("members there and back", [MEMBERS], lambda r: len(r) == 8 and all(a is b for a, b in zip(r, MEMBERS)))
def same(members):
    assert all(a is b for a, b in zip(members, MEMBERS))
    return members


@program("members of one enum in calls of their own")
def in_turn(peer):
    for member in MEMBERS:
        there, = peer.map(itself, [member])
        assert there is member, there
    expect(peer.map(keyed, [Level.LOW, Creature.DOG]), ["low", "mars"])


def itself(x):
    assert any(x is each for each in MEMBERS)
    return x


TABLE = {Level.LOW: "low", Op.ADD: "add"}


def keyed(x):
    return TABLE[x] if x is Level.LOW else {Planet.MARS: "mars"}[Planet.MARS]


class Auto(enum.StrEnum):
    @staticmethod
    def _generate_next_value_(name, start, count, last):
        return name[::-1]

    AB = enum.auto()
    CD = enum.auto()

    @classmethod
    def _missing_(cls, value):
        return cls.AB if value == "?" else None


class Unordered(enum.Enum):
    """Members with values that cannot be hashed, aliases, and a method of the class."""

    LIST = [1, 2]  # noqa: RUF012
    DICT = {"a": 1}  # noqa: RUF012
    ALSO = LIST

    @classmethod
    def first(cls):
        return next(iter(cls))


class Access(enum.Flag, boundary=enum.KEEP):
    READ = enum.auto()
    WRITE = enum.auto()
    BOTH = READ | WRITE


class Bits(enum.IntFlag):
    A = 1
    C = 4


@gives("_generate_next_value_, _missing_ and StrEnum", Auto.AB, ("BA", "DC", True, "ba"))
def auto(x):
    return str(Auto.AB), Auto.CD.value, Auto("?") is x, x.lower()


@gives("values without a hash, and aliases", Unordered.LIST, (True, {"a": 1}, ["LIST", "DICT"], True, True))
def unordered(x):
    return (Unordered.ALSO is x, Unordered.DICT.value, [each.name for each in Unordered], Unordered.first() is x,
            Unordered([1, 2]) is x)


@gives("flags and their boundary", Access.READ | Access.WRITE, (True, 8, True, 7, True))
def flags(x):
    return x is Access.BOTH, Access(8).value, Access.READ in x, (Bits.A | Bits.C | 2).value, bool(x & Access.WRITE)


class Shape(enum.Enum):
    """A base without members, its nonmembers, and a nested class."""

    @enum.nonmember
    class Inner:
        value = 5

    def area(self):
        return self.value ** 2

    def __str__(self):
        return f"<{self.name}>"


class Square(Shape):
    SMALL = 1
    LARGE = 3


@enum.unique
class Verified(enum.Enum):
    A = "a"

    @enum.property
    def upper(self):
        return self.value.upper()


@gives("an enum with a base of its own, nonmembers and properties", Square.LARGE, (9, "<LARGE>", 5, True, "A"))
def shapes(x):
    return x.area(), str(x), Shape.Inner.value, isinstance(x, Shape), Verified.A.upper


class Reduced(enum.Enum):
    """Its members pickle by a method of the script's own."""

    ONE = 1

    def __reduce_ex__(self, protocol):
        return self.__reduce__()

    def __reduce__(self):
        return getattr, (Reduced, self._name_)


@case("a __reduce__ of the enum's own", [Reduced.ONE], lambda r: r[0] is Reduced.ONE and r[1] == 1)
def reduced(x):
    assert x is Reduced.ONE
    return x, Reduced(1).value


class Meta(enum.EnumMeta):
    def __contains__(cls, value):
        return value in cls._value2member_map_ or isinstance(value, cls)


class Loose(enum.Enum, metaclass=Meta):
    ONE = 1
    TWO = 2


@gives("a metaclass of the script's own", Loose.ONE, (True, True, False, True))
def loose(x):
    return 1 in Loose, x in Loose, 3 in Loose, x is Loose.ONE


Made = enum.Enum("Made", "A B", module=__name__)
Named = enum.Enum("Named", {"A": (1, 2), "B": [3]}, type=None)


@gives("enums by the functional way", Made.B, (True, ["A", "B"], (1, 2), [3]))
def made(x):
    return x is Made.B, [each.name for each in Made], Named.A.value, Named.B.value


class Timed(enum.Enum):
    """A member whose value is an instance of a class of the script, and one that is a class."""

    ANIMAL = Animal("big", 2)
    KIND = enum.member(Animal)

    def __init__(self, value):
        self.extra = getattr(value, "legs", None)


@gives("values that are instances and classes of the script", 1, (2, "big", True, "tiny"))
def timed(_):
    return Timed.ANIMAL.extra, Timed.ANIMAL.value.size, Timed.KIND.value is Animal, Timed.KIND.value("tiny", 1).size


@case("members in exceptions and as results", [Level.HIGH], lambda e: type(e) is ValueError and e.args[0] is Level.HIGH)
def fails(x):
    raise ValueError(x)


main()
