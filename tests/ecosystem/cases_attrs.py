"""Classes of attrs that a script defines."""

import sys
import typing

import attr
import attrs

sys.path.insert(0, sys.argv[-1])
from peer import case, expect, gives, main, program  # noqa: E402

LIMIT = 10
T = typing.TypeVar("T")


def small(instance, attribute, value):
    if value > LIMIT:
        raise ValueError(f"{attribute.name} is too large")


@attrs.frozen
class Tile:
    name: str
    n: int = attrs.field(default=1, validator=small, converter=int)


@attrs.define
class Point:
    x: int
    y: int = attrs.field(default=2)
    tags: list = attrs.Factory(list)
    tile: Tile = attrs.field(factory=lambda: Tile("a"), repr=False)
    total: int = attrs.field(init=False)

    def __attrs_post_init__(self):
        self.total = self.x + self.y

    @y.validator
    def _check(self, attribute, value):
        small(self, attribute, value)

    def moved(self, by):
        return attrs.evolve(self, x=self.x + by)


@attrs.define
class Point3(Point):
    z: int = attrs.field(default=3, kw_only=True)

    def moved(self, by):
        return super().moved(by)


@attrs.define(slots=False, order=True)
class Loose:
    n: int
    other = None


@attr.s(auto_attribs=True, hash=True, cache_hash=True)
class Old:
    a: int
    b: str = attr.ib(default="b", eq=False)


@attrs.define
class Box(typing.Generic[T]):
    item: T


class Board:
    WORTH = {Tile("a"): 1, Tile("b", "2"): 3}
    OLD = {Old(1): "old"}


@case("define, with slots, factories, validators", [Point(1)],
      lambda r: type(r) is Point and r == Point(6) and r.total == 8 and not hasattr(r, "__dict__"))
def moved(point):
    assert type(point) is Point and point.tile == Tile("a") and point.tags == []
    return point.moved(5)


gives("a method", 1, Point(2))(Point(1).moved)
case("super() in a class with slots", [Point3(1, z=5)], lambda r: type(r) is Point3 and (r.x, r.z) == (2, 5))(
    lambda point: point.moved(1))


@gives("frozen instances as keys", Tile("b", 2), (3, 1, "old"))
def keys(tile):
    return Board.WORTH[tile], Board.WORTH[Tile("a")], Board.OLD[Old(1, "other")]


@gives("validators and converters run in the worker", "20", ("n is too large", "y is too large", 3, True))
def checked(text):
    found = []
    for make in (lambda: Tile("a", text), lambda: Point(1, int(text))):
        try:
            make()
        except ValueError as error:
            found.append(str(error))
    try:
        Tile("a").name = "b"
    except attrs.exceptions.FrozenInstanceError:
        return *found, Tile("a", "3").n, True


@gives("fields, asdict, order", Loose(1), (["x", "y", "tags", "tile", "total"], {"name": "a", "n": 1}, True, [1, 2]))
def fields(loose):
    return ([f.name for f in attrs.fields(Point)], attrs.asdict(Tile("a")), loose < Loose(2),
            [each.n for each in sorted([Loose(2), loose])])


@case("generic classes", [Box(1)], lambda r: type(r) is Box and r == Box("a"))
def boxes(box):
    return Box[str]("a")


@case("a class with slots that is made in a function", [3], lambda r: type(r).__name__ == "Local" and r.twice() == 6,
      fork="pickle does not find it")
def local(n):
    @attrs.define
    class Local:
        n: int

        def twice(self):
            return self.n * len([__class__]) * 2
    return Local(n)


@program("instances in several calls")
def calls(peer):
    expect(peer.map(keep, [Point(1), Point3(1)]), [(True, 1), (True, 2)])
    expect(peer.map(keep, [Point(1)]), [(True, 2)])


kept = []


def keep(point):
    kept.append(point)
    return all(isinstance(each, Point) for each in kept), len({type(each) for each in kept})


main()
