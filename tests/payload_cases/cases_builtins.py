"""Subclasses of built-in types, and what else a review of the by-value pickles found: as globals and as results."""

import array
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import struct
import sys
import time
import types

sys.path.insert(0, sys.argv[-1])
from peer import ask, expect, gives, main, program  # noqa: E402


class MySet(set):
    pass


class MyFrozen(frozenset):
    pass


class MyDeque(collections.deque):
    pass


class MyDecimal(decimal.Decimal):
    pass


class MyDelta(datetime.timedelta):
    pass


class MyTime(datetime.datetime):
    pass


class MyArray(array.array):
    pass


class MyBytes(bytearray):
    pass


class MyPartial(functools.partial):
    pass


class MyOrdered(collections.OrderedDict):
    pass


class MySpace(types.SimpleNamespace):
    pass


class MyZone(datetime.tzinfo):
    def utcoffset(self, when):
        return datetime.timedelta(hours=1)

    def __repr__(self):
        return "MyZone()"


class Logged(list):
    def append(self, item):
        super().append(item * 2)

    extend = append


class Table(dict):
    def __init__(self, *args):
        super().__init__(*args)
        self.log = []

    def __setitem__(self, key, value):
        self.log.append(key)
        super().__setitem__(key, value)


class Attributes(dict):
    __getattr__ = dict.__getitem__


THINGS = [MySet([1, 2]), MyFrozen([1]), MyDeque([1, 2], 3), MyDecimal("1.50"), MyDelta(1, 2), MyTime(2020, 1, 2),
          MyArray("d", [1.5]), MyBytes(b"ab"), MyOrdered(a=1), MySpace(a=1), Logged([2]), Table({"a": 1}),
          datetime.datetime(2020, 1, 1, tzinfo=MyZone()), Attributes(a=1)]
CALL, HEADER, BUNCH = MyPartial(int, "3"), struct.Struct(">I"), Attributes(n=7)


@gives("subclasses of built-in types keep what they hold", 1, [(type(t).__name__, repr(t)) for t in THINGS])
def held(_):
    return [(type(t).__name__, repr(t)) for t in THINGS]


@gives("a partial, a Struct, a dict whose __getattr__ raises KeyError", 1, (3, b"\0\0\0\5", 7))
def called(_):
    return CALL(), HEADER.pack(5), BUNCH.n


class Colour(enum.Enum):
    RED = 1


class Access(enum.Flag):
    READ = 1
    WRITE = 2


DEFAULT, BOTH = Colour.RED, Access.READ | Access.WRITE


@gives("members of enums that the function does not name", 1, ("RED", 3))
def members(_):
    return DEFAULT.name, BOTH.value


class Keyed(enum.Enum):
    LEFT = 1
    RIGHT = 2


TABLE = {Keyed.LEFT: Keyed.RIGHT}
Keyed.table = TABLE
SPACE = globals()


@gives("an enum whose table is keyed by its own members, and the globals as a global", 1, (2, True, True))
def keyed(_):
    return TABLE[Keyed.LEFT].value, Keyed.table is TABLE, SPACE is globals()


@dataclasses.dataclass(slots=True)
class Interval:
    start: int
    stop: int


@gives("a slot named stop", Interval(1, 2), Interval(2, 4))
def doubled(interval):
    return Interval(interval.start * 2, interval.stop * 2)


class Lost(OSError):
    pass


class Missing(ImportError):
    pass


@program("what the built-in base of an exception keeps")
def errors(peer):
    for found in (peer.map(lose, [1])[0], *peer.map(itself, [Lost(2, "no", "file.txt")])):
        assert type(found) is Lost and (found.errno, found.filename) == (2, "file.txt"), vars(found)
    found, = peer.map(itself, [Missing("x", name="mod")])
    expect((type(found), found.name), (Missing, "mod"))


def lose(_):
    raise Lost(2, "no", "file.txt")


def itself(x):
    return x


class Angry(Exception):
    node = property(lambda self: 1 / 0)

    def __getattr__(self, name):
        raise ValueError(name)


@program("an exception whose attributes raise is itself", fork="up to Python 3.12 its traceback cannot be printed")
def angry(peer):
    found, = peer.map(rage, [1])
    expect(type(found), Angry)


def rage(_):
    raise Angry("why")


SHARED = [1]
CACHE = {"shared": SHARED}


def use_cache(x):
    CACHE[x] = 1
    return len(CACHE)


def use_shared(x):
    return len(SHARED)


@program("a part that gets a name later costs the whole nothing")
def later(peer):
    expect(ask(peer, use_cache, use_shared), [2, 1])
    expect(peer.map(use_cache, [2]), [3])


class Totals:
    total = 1.5
    n = 0


def add_twice(_):
    Totals.total += 1
    Totals.total += 1
    return Totals.total


@program("a number that the worker changed twice is its own", fork="the caller's later changes are not seen by a fork")
def own_number(peer):
    expect(peer.map(add_twice, [1]), [3.5])
    Totals.n += 1
    expect(peer.map(lambda _: (Totals.total, Totals.n), [1]), [(3.5, 1)])


LIST = []


class Queue:
    items = LIST


def collect(_, into=LIST):
    into.append(1)
    return len(into)


@program("a list with two owners outlives one of them", fork="the caller's later changes are not seen by a fork")
def owners(peer):
    global LIST
    del LIST
    expect(peer.map(lambda x: collect(x), [1]), [1])
    expect(peer.map(lambda x: len(Queue.items), [1]), [1])
    Queue.items = []
    expect(peer.map(lambda x: collect(x), [1]), [2])


class Counted:
    def __init__(self):
        self.k = 0

    def up(self):
        self.k += 1


COUNTED = Counted()


def call(function):
    function()


def read_counted(_):
    return COUNTED.k


@program("an initializer that gets a method, and one that is a partial")
def initializers(peer):
    expect(peer.map(read_counted, [1], [(call, (COUNTED.up,))]), [1])
    peer.open("another")
    expect(peer.map(read_counted, [1], [(functools.partial(call, COUNTED.up), ())]), [1])


def wrap(registry, function):
    def wrapper(x):
        return len(registry)
    registry[len(registry)] = wrapper
    return wrapper


@program("five hundred closures over one registry, in seconds", fork="pickle does not find an inner function")
def registry(peer):
    found = {}
    for _ in range(500):
        last = wrap(found, call)
    started = time.monotonic()
    expect(peer.map(last, [1]), [500])
    assert time.monotonic() - started < 20


Z = 0.0


def sign(_):
    return str(Z)


@program("a zero changes its sign", fork="the caller's later changes are not seen by a fork")
def signs(peer):
    global Z
    expect(peer.map(sign, [1]), ["0.0"])
    Z = -0.0
    expect(peer.map(sign, [1]), ["-0.0"])


def deep(n):
    space = {"__name__": __name__}
    exec("def f0(x): return x\n" + "".join(f"def f{i}(x): return f{i - 1}(x + 1) if x < 3 else x\n"
                                          for i in range(1, n)), space)
    return space[f"f{n - 1}"]


@program("a chain of a thousand functions", fork="pickle does not find what exec has made")
def chain(peer):
    expect(peer.map(deep(1000), [0]), [3])


main()
