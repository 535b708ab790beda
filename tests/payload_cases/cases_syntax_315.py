"""`lazy import` and `sentinel`."""

import dataclasses
import sys
import typing

sys.path.insert(0, sys.argv[-1])
lazy import json
lazy import xml.etree.ElementTree
lazy from decimal import Decimal as Exact
lazy from math import sqrt

from peer import ask, case, expect, gives, main, program  # noqa: E402
lazy import importable as renamed

MISSING = sentinel("MISSING")
UNSET = sentinel("UNSET")


@gives("lazy imports", "[4]", (2.0, [4], "1.5", "as imported"))
def lazily(text):
    return sqrt(json.loads(text)[0]), json.loads(text), str(Exact("1.5")), renamed.SETTING


@gives("a lazy import of a submodule", "<a>1</a>", "1")
def submodule(text):
    return xml.etree.ElementTree.fromstring(text).text


class Parser:
    def parse(self, text):
        return json.loads(text)


def close():
    def inner(text):
        return sqrt(json.loads(text))
    return inner


gives("a lazy import in a method", "[1]", [1])(Parser().parse)
closed = close()
closed.__qualname__ = "closed"
gives("a lazy import in an inner function", "4", 2.0)(closed)


def default(x, mark=MISSING, *, other=UNSET):
    return mark is MISSING, other is UNSET, x is MISSING


class Option:
    NONE = sentinel("Option.NONE")

    def get(self, x, mark=NONE):
        return mark is Option.NONE, mark is self.NONE


@dataclasses.dataclass
class Point:
    x: int
    mark: object = MISSING
    tags: list = dataclasses.field(default_factory=list)


@program("sentinels as globals, defaults, arguments and results")
def sentinels(peer):
    expect(peer.map(default, [1, MISSING, UNSET]), [(True, True, False), (True, True, True), (True, True, False)])
    result, = peer.map(itself, [[MISSING, {"k": UNSET}]])
    assert result[0] is MISSING and result[1]["k"] is UNSET, result
    assert peer.map(give, [1]) == [MISSING]


@program("sentinels of a class and of two functions")
def more_sentinels(peer):
    expect(ask(peer, Option().get, default, default), [(True, True), (True, True, False), (True, True, False)])


def itself(x):
    return x


def give(_):
    return MISSING


@gives("dataclasses' own sentinels", 1, (True, True, True, True))
def own(_):
    fields = {f.name: f for f in dataclasses.fields(Point)}
    return (fields["x"].default is dataclasses.MISSING, fields["mark"].default is MISSING,
            fields["tags"].default is dataclasses.MISSING, dataclasses.KW_ONLY is not dataclasses.MISSING)


VIEW = {"a": MISSING}.values()


@gives("a sentinel in a letter that needs dill", 1, (True, True, True))
def by_dill(_):
    return [*VIEW][0] is MISSING, dataclasses.fields(Point)[0].default is dataclasses.MISSING, str(MISSING) == "MISSING"


@case("a dataclass with a sentinel for its default", [Point(1)], lambda r: r == Point(2) and r.mark is MISSING)
def points(point):
    assert point.mark is MISSING and Point(3).tags == []
    return Point(2)


def optional(x: int | MISSING = MISSING) -> int | MISSING:
    return x


@gives("a sentinel in annotations", 1, (1, True))
def annotated(x):
    return optional(x), MISSING in typing.get_args(optional.__annotations__["x"])


main()
