"""Annotations that are not evaluated (PEP 649) and name what is not there, slices in code, templates (PEP 750)."""

import abc
import annotationlib
import dataclasses
import functools
import string.templatelib
import sys
import typing

sys.path.insert(0, sys.argv[-1])
from peer import case, expect, gives, main, program  # noqa: E402

if typing.TYPE_CHECKING:
    from nowhere import Ghost


def ghostly(x: Ghost, *more: list[Ghost], named: Ghost = 1) -> Ghost:
    return x


@dataclasses.dataclass
class Haunted:
    a: int
    ghost: Ghost | None = None

    def method(self, other: Ghost) -> Ghost:
        return self.a


class Shape(abc.ABC):
    size: Ghost
    count: int = 0

    @abc.abstractmethod
    def area(self) -> Ghost: ...


class Square(Shape):
    side: float

    def __init__(self, size: Ghost):
        self.size = size

    def area(self):
        return self.size ** 2


class Reads(typing.Protocol):
    limit: Ghost

    def read(self) -> Ghost: ...


class Reader(Reads):
    buffer: bytes

    def read(self):
        return "read"


class Whole(abc.ABC):
    """All its annotations can be evaluated, one by a class of the script."""

    x: int
    shape: Shape
    later: list[Whole]


class Point(typing.NamedTuple):
    x: Ghost
    y: int = 2


class Movie(typing.TypedDict):
    title: Ghost


gives("a function whose annotation names what is not there", 3, 3)(ghostly)
gives("a method of a dataclass with such annotations", 1, 5)(Haunted(5).method)


@case("instances of such classes", [Haunted(1), Square(3), Reader(), Point(1), Movie(title="a")],
      lambda *r: r == (Haunted(2, 3), 9, "read", Point(3), {"title": "a"}) and type(r[0]) is Haunted)
def ghosts(thing):
    if isinstance(thing, Haunted):
        return dataclasses.replace(thing, a=thing.a + 1, ghost=3)
    if isinstance(thing, Shape):
        return thing.area()
    return thing._replace(x=3) if isinstance(thing, Point) else thing.read() if isinstance(thing, Reader) else thing


STRING = annotationlib.Format.STRING


@gives("annotations as text", 1, (["Ghost", "list[Ghost]", "Ghost", "Ghost"], {"a": "int", "ghost": "Ghost | None"},
                                  ["x", "more", "named", "return"], {"size": "Ghost", "count": "int"}))
def texts(_):
    found = annotationlib.get_annotations(ghostly, format=STRING)
    return ([text.strip("'") for text in found.values()], annotationlib.get_annotations(Haunted, format=STRING),
            [*found], annotationlib.get_annotations(Shape, format=STRING))


@gives("annotations as values", 1, (int, True, True, float, bytes, int))
def values(_):
    found = annotationlib.get_annotations(Whole)
    return (found["x"], found["shape"] is Shape, Whole.__annotations__ == found, Square.__annotations__["side"],
            Reader.__annotations__["buffer"], Holder.__annotations__["x"])


class Holder:
    x: int
    y: Shape


@program("a class whose annotations were looked at between two calls")
def looked_at(peer):
    expect(peer.map(keep, [Holder()]), [(True, 1)])
    assert Holder.__annotations__["y"] is Shape
    expect(peer.map(keep, [Holder()]), [(True, 1)])
    expect(peer.map(look, [1]), [True])
    expect(peer.map(keep, [Holder()]), [(True, 1)])


kept = []


def keep(thing):
    kept.append(thing)
    return isinstance(kept[0], Holder), len({type(each) for each in kept})


def look(_):
    return Holder.__annotations__["y"] is Shape


def late(x: Later) -> Later:
    return x


class Later:
    pass


@gives("an annotation that names a class that comes later", 1, (True, True))
def comes_later(_):
    return late.__annotations__["x"] is Later, typing.get_type_hints(late)["return"] is Later


def make(ghost):
    class Local:
        value: ghost

        def get(self, x: ghost) -> ghost:
            return x
    return Local


@gives("annotations of a closure's variables", 1, (int, int, 3))
def closures(_):
    cls = make(int)
    return cls.__annotations__["value"], cls.get.__annotations__["x"], cls().get(3)


gives("a constant slice", "abcdef", "bc")(lambda s: s[1:3])


@gives("constant slices, nested", "abcdef", ("bc", "ace", "f", "ab"))
def slices(s):
    return (lambda t: t[1:3])(s), s[::2], [t[-1:] for t in [s]][0], s[:2]


@program("the same letter for the same slices", fork="there are no letters", pool="there are no letters")
def same_letter(peer):
    first = b"".join(peer.context.dump(slices))
    assert slices("abcdef")[0] == "bc"
    peer.context.refresh()
    expect(b"".join(peer.context.dump(slices)) == first, True)


NAME = "x"
TEMPLATE = t"a {NAME} {1 + 1:>3}"


@gives("template strings", 1, (["a ", " ", ""], ["x", 2], "NAME", ">3", ["x", 7]))
def templates(_):
    made = t"{NAME}{7}"
    return (list(TEMPLATE.strings), list(TEMPLATE.values), TEMPLATE.interpolations[0].expression,
            TEMPLATE.interpolations[1].format_spec, list(made.values))


@case("template strings there and back", [TEMPLATE], lambda r: r.values == ("x", 2))
def template(x):
    assert isinstance(x, string.templatelib.Template)
    return x


@gives("functools.Placeholder", 2, 8)
def placeholder(x):
    return functools.partial(pow, functools.Placeholder, 3)(x)


partial = functools.partial(pow, functools.Placeholder, 3)
gives("functools.Placeholder in a partial", 2, 8)(partial)

main()
