"""Annotations as text, which may name what is not there."""

from __future__ import annotations

import dataclasses
import functools
import sys
import typing

sys.path.insert(0, sys.argv[-1])
from peer import case, gives, main  # noqa: E402

if typing.TYPE_CHECKING:
    from nowhere import Ghost


def ghostly(x: Ghost, *more: list[Ghost]) -> Ghost:
    return x


@dataclasses.dataclass
class Haunted:
    a: int
    ghost: Ghost | None = None

    def method(self, other: Ghost) -> Ghost:
        return self.a


gives("annotations that name what is not there", 3, 3)(ghostly)
gives("a method and a dataclass with such annotations", 1, 5)(Haunted(5).method)


@case("such a dataclass as argument and result", [Haunted(1)], lambda r: type(r) is Haunted and r == Haunted(2, 3))
def haunted(h):
    return dataclasses.replace(h, a=h.a + 1, ghost=3)


class Movie(typing.TypedDict):
    title: Ghost


class Point(typing.NamedTuple):
    x: Ghost
    y: int = 2


class Shape(typing.Protocol):
    size: Ghost

    def area(self) -> Ghost: ...


class Square(Shape):
    def __init__(self, size: Ghost):
        self.size = size

    def area(self) -> Ghost:
        return self.size ** 2


@functools.singledispatch
def kind(x: Ghost) -> Ghost:
    return "any"


@kind.register(int)
def _(x: Ghost):
    return "int"


@case("named tuples, typed dicts, protocols", [Point(1), Square(3)], lambda a, b: a == Point(3) and type(b) is Square)
def shapes(x):
    if isinstance(x, Point):
        assert Movie(title="a") == {"title": "a"} and kind(1) == "int" and kind("") == "any"
        return x._replace(x=3)
    assert x.area() == 9
    return x


main()
