"""Dicts, sets and lists of a class that hold instances and methods of other classes.

A dict asks each key for its hash, and a list of bound classmethods looks each of them up: all while the worker makes
the classes.
"""

import bisect
import dataclasses
import enum
import functools
import operator
import sys
import typing

sys.path.insert(0, sys.argv[-1])
from peer import expect, gives, main, program  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Tile:
    name: str


@dataclasses.dataclass(frozen=True)
class Row:
    left: Tile
    right: Tile = Tile("z")


class Board:
    WORTH = {Tile("a"): 1, Tile("b"): 3}
    BAD = {Tile("x")}
    FIXED = frozenset({Tile("y")})
    NESTED = [({"row": {Tile("a"): [{Tile("b")}]}},)]
    ROWS = {Row(Tile("a")): "row"}

    def score(self, tile):
        return self.WORTH.get(tile, 0), tile in self.BAD


gives("a dict keyed by instances of another class", Tile("a"), (1, False))(Board().score)
gives("a set of instances of another class", Tile("x"), (0, True))(Board().score)


@gives("a frozen set, and keys in keys", Tile("y"), (True, True, "row", False))
def fixed(tile):
    nested, = Board.NESTED
    inner, = nested[0]["row"][Tile("a")]
    return tile in Board.FIXED, inner == {Tile("b")}, Board.ROWS[Row(Tile("a"))], Tile("a") in Board.FIXED


@gives("a class that only the function names", 1, (3, False))
def only_named(_):
    return Board().score(Tile("b"))


@gives("a class that the function makes its key of", Tile("b"), 3)
def as_argument(tile):
    return Board.WORTH[tile]


TABLE = {Tile("a"): 1}


@gives("a table of the module", Tile("a"), (1, 1, 1, 1))
def tables(tile, table={Tile("a"): 1}, *, also={Tile("a"): 1}):  # noqa: B006
    return TABLE.get(tile, 0), table.get(tile, 0), also.get(tile, 0), closed(tile)


def close():
    table = {Tile("a"): 1}

    def look(tile):
        return table.get(tile, 0)
    return look


closed = close()


class Folded(str):
    def __eq__(self, other):
        return str.__eq__(self.lower(), str(other).lower())

    def __hash__(self):
        return hash(self.lower())


class Headers:
    known = {Folded("Content-Type"): 1}


@gives("a subclass of str as the key", "content-type", (1, 1))
def headers(name):
    return Headers.known.get(Folded(name)), {Folded("A"): 1}[Folded("a")]


FACTOR = 31


def mixed(x, y):
    return x * FACTOR + y


class Cell:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __eq__(self, other):
        return isinstance(other, Cell) and (self.x, self.y) == (other.x, other.y)

    def __hash__(self):
        return mixed(self.x, self.y)


class Grid:
    alive = {Cell(1, 2), Cell(3, 4)}


SEEN = {Cell(1, 2): "seen"}


@gives("a hash that needs the script's globals", Cell(3, 4), (True, False, "seen", 2))
def grid(cell):
    return cell in Grid.alive, Cell(9, 9) in Grid.alive, SEEN[Cell(1, 2)], len(Grid.alive | {Cell(1, 2)})


class Suit(enum.Enum):
    HEARTS = 1
    SPADES = 2


class Pair(typing.NamedTuple):
    suit: Suit
    tile: Tile


class Deck:
    WORTH = {Suit.HEARTS: 5, Suit.SPADES: 7}
    PAIRS = {Pair(Suit.HEARTS, Tile("a")): "pair", (Suit.SPADES, Tile("b")): "tuple"}


@gives("enum members and named tuples as keys", Suit.SPADES, (7, "pair", "tuple"))
def deck(suit):
    return Deck.WORTH[suit], Deck.PAIRS[Pair(Suit.HEARTS, Tile("a"))], Deck.PAIRS[suit, Tile("b")]


class Load:
    @classmethod
    def read(cls, x):
        return f"{cls.__name__} {x}"

    @staticmethod
    def plain(x):
        return f"plain {x}"

    def bound(self, x):
        return f"bound {x}"


class Sub(Load):
    pass


class Pipeline:
    STEPS = [Load.read, Sub.read, Load.plain, Load().bound]
    PARTIAL = staticmethod(functools.partial(Load.read, "partial"))
    BY_NAME = {"read": Load.read, "call": operator.methodcaller("bound", 7)}

    def run(self, x):
        return [step(x) for step in self.STEPS], self.PARTIAL(), self.BY_NAME["read"](x), self.BY_NAME["call"](Load())


gives("bound methods of other classes", 1,
      (["Load 1", "Sub 1", "plain 1", "bound 1"], "Load partial", "Load 1", "bound 7"))(Pipeline().run)


@functools.total_ordering
class Rank:
    def __init__(self, n):
        self.n = n

    def __lt__(self, other):
        return self.n < other.n

    def __eq__(self, other):
        return self.n == other.n

    __hash__ = None


class Ranks:
    items = sorted([Rank(3), Rank(1), Rank(2)])


@gives("instances that have an order", 1, (1, 2))
def ranks(_):
    return min(Ranks.items).n, bisect.bisect(Ranks.items, Rank(2))


@program("the class of the keys first, then the class that holds them, in letters of their own")
def in_turn(peer):
    expect(peer.map(type, [Tile("a")]), [Tile])
    expect(peer.map(board_type, [Tile("a")]), ["Board"])
    expect(peer.map(Board().score, [Tile("a")]), [(1, False)])


def board_type(_):
    return Board.__name__


main()
