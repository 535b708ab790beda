"""Instances that `pickle` makes by methods of their class, as attributes of other classes."""

import copyreg
import dataclasses
import sys
import threading

sys.path.insert(0, sys.argv[-1])
from peer import expect, gives, main, program  # noqa: E402


class Money:
    def __init__(self, amount):
        self.amount = amount

    def __reduce__(self):
        return Money, (self.amount,)

    def __eq__(self, other):
        return self.amount == other.amount

    def __hash__(self):
        return hash(self.amount)


def rebuilt(amount):
    made = Coin.__new__(Coin)
    made.amount = amount
    return made


class Coin(Money):
    def __reduce_ex__(self, protocol):
        return rebuilt, (self.amount,), {"protocol": protocol}


class Bank:
    START = Money(100)
    COIN = Coin(5)
    KNOWN = {Money(1): "one"}


@gives("instances with __reduce__ and __reduce_ex__", 1, (100, 5, "one", "Coin"))
def bank(_):
    return Bank.START.amount, Bank.COIN.amount, Bank.KNOWN[Money(1)], type(Bank.COIN).__name__


class Gauge:
    """Its state is no dict."""

    def __init__(self, degrees):
        self.degrees, self.lock = degrees, threading.Lock()

    def __getstate__(self):
        return (self.degrees,)

    def __setstate__(self, state):
        self.degrees, = state
        self.lock = threading.Lock()


class Room:
    now = Gauge(20)
    all = {"kitchen": [Gauge(21)]}


@gives("__setstate__ of a state that is no dict", Gauge(3), (20, 21, 3))
def room(gauge):
    with Room.now.lock, Room.all["kitchen"][0].lock, gauge.lock:
        return Room.now.degrees, Room.all["kitchen"][0].degrees, gauge.degrees


class Exact:
    def __new__(cls, amount, *, unit):
        made = super().__new__(cls)
        made.text = f"{amount} {unit}"
        return made

    def __getnewargs_ex__(self):
        amount, unit = self.text.split()
        return (amount,), {"unit": unit}


class Positive(int):
    def __new__(cls, value):
        assert value > 0
        return super().__new__(cls, value)


class Words(tuple):
    def __new__(cls, *words):
        return super().__new__(cls, words)

    def __getnewargs__(self):
        return tuple(self)


class Rules:
    limit = Exact(3, unit="kg")
    count = Positive(4)
    words = {Words("a", "b"): 1}


@gives("__new__ with arguments of its own", 1, ("3 kg", 4, "Positive", 1))
def rules(_):
    return Rules.limit.text, int(Rules.count), type(Rules.count).__name__, Rules.words[Words("a", "b")]


class Slots:
    __slots__ = ("x", "__hidden")

    def __init__(self, x):
        self.x, self.__hidden = x, -x

    def __eq__(self, other):
        return self.x == other.x

    def __hash__(self):
        return hash(self.x)

    def hidden(self):
        return self.__hidden


class Frozen:
    """Takes no attribute but in `__init__`."""

    __slots__ = ("value",)

    def __init__(self, value):
        object.__setattr__(self, "value", value)

    def __setattr__(self, name, value):
        raise AttributeError("frozen")

    def __getstate__(self):
        return self.value

    def __setstate__(self, value):
        object.__setattr__(self, "value", value)


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    name: str


class Shape:
    origin = Slots(1)
    table = {Slots(2): "two", Place("p"): "place"}
    frozen = Frozen(5)


@gives("slots", 1, (1, -1, "two", "place", 5))
def shape(_):
    return Shape.origin.x, Shape.origin.hidden(), Shape.table[Slots(2)], Shape.table[Place("p")], Shape.frozen.value


class Registered:
    def __init__(self, n):
        self.n, self.lock = n, threading.Lock()

    def __eq__(self, other):
        return self.n == other.n

    def __hash__(self):
        return hash(self.n)


copyreg.pickle(Registered, lambda thing: (Registered, (thing.n,)))


class Keeps:
    registered = {Registered(1): Registered(2)}


@gives("instances with a reducer of copyreg", Registered(1), (2, True))
def registered(thing):
    return Keeps.registered[thing].n, thing in Keeps.registered


class Scaled:
    """Its maker is a function that is new each time."""

    def __init__(self, n):
        self.n = n

    def __reduce__(self):
        return (lambda n: Scaled(n * FACTOR)), (self.n // FACTOR,)


FACTOR = 2
SCALED = Scaled(8)


class HoldsScaled:
    inside = {"deep": [Scaled(10)]}


@program("a __reduce__ that makes a function", fork="pickle does not find a lambda")
def scaled_there(peer):
    expect(peer.map(scaled, [Scaled(6)]), [(6, 8, 10)])
    expect(peer.map(scaled, [Scaled(4)]), [(4, 8, 10)])


def scaled(thing):
    return thing.n, SCALED.n, HoldsScaled.inside["deep"][0].n


main()
