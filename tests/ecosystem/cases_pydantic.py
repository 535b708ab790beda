"""Models of pydantic that a script defines."""

import enum
import sys
import typing

import pydantic
from pydantic import BaseModel, ConfigDict, Field, RootModel, TypeAdapter, ValidationError

sys.path.insert(0, sys.argv[-1])
from peer import case, expect, gives, main, program  # noqa: E402

LIMIT = 10
T = typing.TypeVar("T")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


def positive(value: int) -> int:
    if value <= 0 or value > LIMIT:
        raise ValueError("out of range")
    return value


Count = typing.Annotated[int, pydantic.AfterValidator(positive)]


class Point(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    x: int
    y: int = Field(default=2, ge=0)

    @pydantic.computed_field
    @property
    def total(self) -> int:
        return self.x + self.y

    def moved(self, by: int) -> "Point":
        return Point(x=self.x + by, y=self.y)


class Account(BaseModel):
    name: str = Field(min_length=2, alias="Name")
    count: Count = 1
    colour: Colour = Colour.RED
    origin: Point = Point(x=0)
    tags: list[str] = Field(default_factory=list)
    table: dict[Colour, Point] = {}
    friend: typing.Optional["Account"] = None
    _secret: int = pydantic.PrivateAttr(default=7)
    known: typing.ClassVar[list[Point]] = [Point(x=5)]

    @pydantic.field_validator("name")
    @classmethod
    def lowered(cls, value):
        return value.lower()

    @pydantic.model_validator(mode="after")
    def agrees(self):
        if self.count == LIMIT and self.colour is Colour.BLUE:
            raise ValueError("no such account")
        return self

    @pydantic.field_serializer("colour")
    def shout(self, value):
        return value.value.upper()

    def secret(self):
        return self._secret


class Special(Account):
    level: int = 3

    @pydantic.field_validator("level", mode="before")
    @classmethod
    def number(cls, value):
        return len(value) if isinstance(value, str) else value


class Box(BaseModel, typing.Generic[T]):
    item: T


class Cat(BaseModel):
    kind: typing.Literal["cat"] = "cat"
    lives: int = 9


class Dog(BaseModel):
    kind: typing.Literal["dog"] = "dog"
    good: bool = True


class Zoo(RootModel[list[typing.Annotated[Cat | Dog, Field(discriminator="kind")]]]):
    pass


@pydantic.dataclasses.dataclass
class Item:
    n: int
    at: Point = Point(x=1)


ADAPTER = TypeAdapter(dict[Colour, list[Count]])


@pydantic.validate_call
def add(a: Count, b: int = 1) -> int:
    return a + b


@case("a frozen model there and back", [Point(x=1)], lambda r: type(r) is Point and r == Point(x=6) and r.total == 8)
def moved(point):
    assert type(point) is Point and hash(point) == hash(Point(x=1))
    return point.moved(5)


gives("a method of a model", 1, Point(x=2))(Point(x=1).moved)


@case("a model with validators, made in the worker", ["ANN"],
      lambda r: type(r) is Account and r.name == "ann" and r.table[Colour.BLUE] == Point(x=3) and r.secret() == 7)
def made(name):
    account = Account(Name=name, count=3, table={"blue": {"x": 3}}, friend=Special(Name="bob", level="abcd"))
    assert account.friend.level == 4 and account.tags == [] and account.secret() == 7
    assert account.model_dump(by_alias=True)["colour"] == "RED" and Account.known == [Point(x=5)]
    return account


@gives("models are checked in the worker", 1, (["count"], ["()"], ["extra"], ["Name"], ["count", "a"]))
def checked(_):
    return (wrong(Account, Name="ann", count=0), wrong(Account, Name="ann", count=10, colour="blue"),
            wrong(Point, x=1, extra=2), wrong(Account, Name="a"),
            wrong(Account, Name="ann", count=11) + wrong(add, a=0))


def wrong(make, **options):
    try:
        return [make(**options)]
    except ValidationError as error:
        return [".".join(map(str, each["loc"])) or "()" for each in error.errors()]


@gives("schemas and copies", Account(Name="ann"), (["name", "count"], True, "Ann", '{"x":1,"y":2,"total":3}'))
def schemas(account):
    return ([*Account.model_fields][:2], account.model_copy() == account,
            account.model_copy(update={"name": "Ann"}).name,
            Point(x=1).model_dump_json())


@case("generic models", [Box[int](item=3), Box[Point](item=Point(x=1))],
      lambda a, b: a == Box[int](item=4) and isinstance(a, Box) and b.item == Point(x=2))
def boxes(box):
    assert isinstance(box, Box)
    return Box[int](item=box.item + 1) if isinstance(box.item, int) else Box[Point](item=box.item.moved(1))


@case("unions with a discriminator, a root model", [Zoo([Cat(), Dog()])],
      lambda r: type(r) is Zoo and [type(each) for each in r.root] == [Dog, Cat])
def zoo(z):
    assert Zoo.model_validate([{"kind": "cat"}]).root == [Cat()]
    return Zoo(z.root[::-1])


@case("dataclasses of pydantic", [Item(1)], lambda r: type(r) is Item and r.n == 7 and r.at == Point(x=1))
def items(item):
    return Item("7") if item.at == Point(x=1) else None


@gives("an adapter and a checked function as globals", {"red": ["3"]}, ({Colour.RED: [3]}, 5))
def adapted(data):
    return ADAPTER.validate_python(data), add(4)


@case("a ValidationError", [0], lambda e: "out of range" in str(e) and "count" in str(e))
def fails(n):
    return Account(Name="ann", count=n)


@program("models in several calls")
def calls(peer):
    expect(peer.map(moved, [Point(x=1)]), [Point(x=6)])
    expect(peer.map(checked, [1])[0][2], ["extra"])
    expect(peer.map(keep, [Account(Name="ann")] * 2), [(True, 1), (True, 1)])
    expect(peer.map(keep, [Special(Name="ann")]), [(True, 2)])


kept = []


def keep(account):
    kept.append(account)
    return all(isinstance(each, Account) for each in kept), len({type(each) for each in kept})


main()
