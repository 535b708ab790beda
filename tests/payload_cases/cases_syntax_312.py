"""PEP 695: functions, classes and aliases with parameters of their own, as a script writes them."""

import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable

sys.path.insert(0, sys.argv[-1])
from peer import case, expect, gives, main, program, refused  # noqa: E402

type Number = int | float
type Pair[T] = tuple[T, T]
type Tree = dict[str, Tree | Number]
type Call[**P, R] = Callable[P, R]
type Rows[*Ts] = list[tuple[*Ts]]


def first[T](items: list[T], default: T | None = None) -> T:
    return items[0] if items else default


def applied[**P, R](function: Callable[P, R], *args: P.args, **more: P.kwargs) -> R:
    return function(*args, **more)


def bound[T: "Box", N: (int, str)](box: T, n: N) -> N:
    return n


class Box[T]:
    kind: Number = 3

    def __init__(self, item: T):
        self.item = item

    def map[R](self, function: Callable[[T], R]) -> "Box[R]":
        return Box(function(self.item))

    @classmethod
    def of[R](cls, item: R) -> "Box[R]":
        return cls(item)


class IntBox(Box[int]):
    def twice(self) -> int:
        return self.item * 2


class Named[K: str, *Ts]:
    def __init__(self, key: K, *rest: *Ts):
        self.key, self.rest = key, rest


@dataclasses.dataclass(frozen=True)
class Held[T]:
    value: T
    pairs: Pair[T] | None = None


class Reads[T](typing.Protocol):
    def read(self) -> T: ...


class Reader(Reads[str]):
    def read(self) -> str:
        return "read"


gives("a generic function", [1, 2], 1)(first)


@gives("generic functions that others use", 3, (3, 4, 5))
def functions(x):
    return first([x]), applied(lambda y: y + 1, x), bound(Box(1), 5)


@gives("the parameters of a function", 1, (["T"], ["P", "R"], True, (int, str), True))
def parameters(_):
    box, number = bound.__type_params__
    return ([p.__name__ for p in first.__type_params__], [p.__name__ for p in applied.__type_params__],
            box.__bound__ is not None, number.__constraints__,
            first.__annotations__["items"] == list[first.__type_params__[0]])


@case("generic classes", [Box(3), IntBox(4)],
      lambda a, b: type(a) is Box and a.item == 4 and type(b) is Box and b.item == 8)
def boxes(box):
    assert Box.__type_params__[0] is Box.__parameters__[0] and Box[int](3).item == 3
    assert IntBox.__orig_bases__ == (Box[int],) and isinstance(box, Box)
    return box.map(lambda x: x + 1) if type(box) is Box else Box.of(box.twice())


@case("a generic dataclass, a protocol", [Held(1), Reader()], lambda a, b: a == Held(2, (1, 1)) and b == "read")
def held(x):
    return Held[int](x.value + 1, (x.value, x.value)) if isinstance(x, Held) else x.read()


@gives("a class with a bound and a TypeVarTuple", Named("k", 1, 2), ("k", (1, 2), 2))
def named(x):
    return x.key, x.rest, len(Named.__parameters__)


@gives("aliases in a body", 1, ("Number", int | float, True, "Call", ["P", "R"], 1))
def aliases(_):
    return (Number.__name__, Number.__value__, Pair[int].__origin__ is Pair, Call.__name__,
            [p.__name__ for p in Call.__type_params__], len(Rows.__type_params__))


def tree(_):
    return Tree.__value__


@program("an alias that names itself is named", fork="a fork inherits it")
def recursive(peer):
    refused(peer, tree, 1, "the global 'Tree' of tree", "refers to itself")


def itself(x):
    return x


@program("aliases and generic aliases as arguments and results")
def there(peer):
    for thing in (Number, Pair, Call, Rows):
        assert peer.map(is_same, [(thing.__name__, thing)]) == [True], thing
        result, = peer.map(itself, [thing])
        assert result is thing, result
    expect(peer.map(itself, [Pair[int], Box[Number]]), [Pair[int], Box[Number]])


def is_same(pair):
    name, thing = pair
    return thing is {"Number": Number, "Pair": Pair, "Call": Call, "Rows": Rows}[name]


class Outer:
    type Inner = int | "Outer"
    value: Inner

    def method[T](self, x: T, y: Inner) -> T:
        return x


@gives("an alias in a class, a generic method", Outer(), (5, "Inner", ["self", "x", "y"], True))
def outer(o):
    annotations = Outer.method.__annotations__
    return (o.method(5, 1), Outer.Inner.__name__, [*inspect.signature(Outer.method).parameters],
            annotations["y"] is Outer.Inner and annotations["x"] is Outer.method.__type_params__[0])


def make[T](kind: type[T]):
    class Local[K]:
        made: T
        key: K

        def get(self) -> T:
            return kind()
    return Local


@gives("a generic class that a generic function makes", 1, (0, "Local", 1))
def local(_):
    cls = make(int)
    return cls().get(), cls.__name__, len(cls.__type_params__)


main()
