"""What `typing` makes in a script, annotations that are evaluated, and singletons that pickle by their name."""

import collections.abc
import dataclasses
import decimal
import functools
import inspect
import sys
import typing

sys.path.insert(0, sys.argv[-1])
from peer import ask, case, expect, gives, main, program  # noqa: E402

UserId = typing.NewType("UserId", int)
Names = typing.NewType("Names", list[str])
P = typing.ParamSpec("P")
T = typing.TypeVar("T")
Bound = typing.TypeVar("Bound", bound="Record", covariant=True)
Either = typing.TypeVar("Either", int, str)
Ts = typing.TypeVarTuple("Ts")
Handler = typing.Callable[P, UserId]
Rows = dict[UserId, list["Record"]]
Mode = typing.Literal["r", "w"]
Positive = typing.Annotated[int, "positive", decimal.Decimal("1.5")]


class Record:
    def __init__(self, v):
        self.v = v


class Stated(typing.Generic[T]):
    kind: UserId


class Array(typing.Generic[typing.Unpack[Ts]]):
    def __init__(self, *items: typing.Unpack[Ts]):
        self.items = items


class Wrapped(typing.Generic[P, T]):
    def __init__(self, function: typing.Callable[P, T]):
        self.function = function

    def __call__(self, *args: P.args, **more: P.kwargs) -> T:
        return self.function(*args, **more)


@gives("NewType in a body", 1, (UserId(3), ["a"], int, "UserId"))
def new_types(x):
    return UserId(3), Names(["a"]), UserId.__supertype__, UserId.__name__


@case("NewType as argument and result", [UserId, Names], lambda a, b: a is UserId and b is Names)
def new_type(kind):
    return kind


@program("NewType is one in all calls")
def same_type(peer):
    expect(ask(peer, new_types, argument=1)[0][2], int)
    expect(peer.map(is_user_id, [UserId]), [True])


def is_user_id(kind, default=UserId):
    return kind is UserId and default is UserId


def logged(function: typing.Callable[P, T]) -> typing.Callable[P, T]:
    @functools.wraps(function)
    def inner(*args: P.args, **more: P.kwargs) -> T:
        return function(*args, **more)
    return inner


@gives("ParamSpec in decorators and generic classes", 2, (4, 4, "double"))
def decorated(x):
    return double(x), Wrapped(double)(x), double.__name__


@logged
def double(x: UserId) -> UserId:
    return UserId(x * 2)


@gives("TypeVarTuple", Array(1, "a"), ((1, "a"), True))
def arrays(array):
    return array.items, typing.get_args(Array[int, str]) == (int, str)


VARIABLES = [T, Bound, Either, P, Ts]


def is_variable(pair):
    number, variable = pair
    return variable is VARIABLES[number], str(variable)


@program("variables of types: one in all calls, with what they had")
def variables(peer):
    for number, variable in enumerate(VARIABLES):
        expect(peer.map(is_variable, [(number, variable)]), [(True, str(variable))])
    expect(peer.map(details, [1]), [(True, (int, str), "Record", (T,))])
    result, = peer.map(give_variables, [1])
    assert all(a is b for a, b in zip(result, VARIABLES)), result


def details(_):
    return Bound.__covariant__, Either.__constraints__, Bound.__bound__.__forward_arg__, Stated.__parameters__


def give_variables(_):
    return VARIABLES


@gives("aliases in the module", 1, (int, ("r", "w"), ("positive", decimal.Decimal("1.5")), True, True))
def aliases(_):
    return (typing.get_args(Handler)[1].__supertype__, typing.get_args(Mode), Positive.__metadata__,
            typing.get_origin(Rows) is dict, typing.get_args(Rows)[0] is UserId)


def hinted(x: UserId, handler: Handler, *rest: Mode, box: typing.Optional[Stated[UserId]] = None) -> Rows:  # noqa: UP045
    return {x: [Record(handler(x))]}


@gives("annotations of a function", 1, (["x", "handler", "rest", "box", "return"], "UserId", 2))
def annotated(x):
    return [*hinted.__annotations__], hinted.__annotations__["x"].__name__, hinted(x, lambda y: y + 1)[UserId(1)][0].v


class Movie(typing.TypedDict, total=False):
    title: typing.Required[str]
    year: int


class Sequel(Movie):
    of: str


class Point(typing.NamedTuple):
    x: int
    y: UserId = UserId(5)

    def both(self) -> int:
        return self.x + self.y


@dataclasses.dataclass(slots=True, kw_only=True, order=True)
class Item:
    name: str
    tags: list[str] = dataclasses.field(default_factory=list)
    size: dataclasses.InitVar[int] = 1
    kind: typing.ClassVar[str] = "item"
    total: int = dataclasses.field(init=False, default=0, compare=False)

    def __post_init__(self, size):
        self.total = size


@dataclasses.dataclass(frozen=True, slots=True)
class Fixed:
    value: object
    made: dataclasses.InitVar[typing.Optional[int]] = None  # noqa: UP045


@gives("TypedDict and NamedTuple", Point(1), (6, {"title": "a", "of": "b"}, {"of", "title"}, Point(2, UserId(3))))
def typed(point):
    return point.both(), Sequel(title="a", of="b"), set(Sequel.__required_keys__), Point(2, UserId(3))


@case("dataclasses with slots, keywords, factories", [Item(name="a", size=7), Fixed(3)],
      lambda a, b: a == (Item(name="b"), 7, "item", ["name", "tags", "total"], True) and b == Fixed("x"))
def items(item):
    if isinstance(item, Fixed):
        return Fixed("x")
    assert not hasattr(item, "__dict__")
    first = Item(name="b")
    assert first.tags is not Item(name="b").tags
    return first, item.total, Item.kind, [f.name for f in dataclasses.fields(Item)], item < first


@typing.overload
def overloaded(x: int) -> int: ...


@typing.overload
def overloaded(x: str) -> str: ...


def overloaded(x):
    return x


class Typed:
    @typing.final
    def last(self) -> typing.Self:
        return self

    @typing.no_type_check
    def untyped(self, x: "not a type"):  # noqa: F722
        return x


gives("overloads", 4, 4)(overloaded)
gives("decorators of typing", 1, (True, 5))(lambda _: (lambda t: (t.last() is t, t.untyped(5)))(Typed()))

FORWARD = typing.ForwardRef("Record")
OPTIONAL = typing.Optional["Record"]


@gives("forward references", 1, ("Record", "Record", "Record"))
def forward(_):
    return FORWARD.__forward_arg__, typing.get_args(OPTIONAL)[0].__forward_arg__, Bound.__bound__.__forward_arg__


@case("a forward reference as argument and result", [FORWARD, OPTIONAL], lambda a, b: a == FORWARD and b == OPTIONAL,
      fork="pickle knows none that was compiled")
def forward_there(reference):
    assert reference in (FORWARD, OPTIONAL)
    return reference


@gives("a signature", 1, ["x", "handler", "rest", "box"])
def signed(_):
    return [*inspect.signature(hinted).parameters]


class Named:
    """A singleton that pickles by its name, as those of libraries do."""

    def __reduce__(self):
        return "NAMED"


class Deep:
    """Its reduce gives a dotted name."""

    def __reduce__(self):
        return "Deep.ONLY"


NAMED, Deep.ONLY = Named(), Deep()


@program("singletons whose __reduce__ gives a name: global, default, argument, result, attribute")
def singletons(peer):
    expect(peer.map(is_named, [1, NAMED, [Deep.ONLY]]), [(False, True, True), (True, True, True), (False, True, True)])
    for thing in (NAMED, Deep.ONLY):
        assert peer.map(itself, [thing])[0] is thing
        assert peer.map(held, [[{"deep": (thing, thing)}]])[0] is True


def is_named(x, default=NAMED, *, deep=Deep.ONLY):
    return x is NAMED, default is NAMED, deep is Deep.ONLY


def itself(x):
    return x


def held(x):
    one, other = x[0]["deep"]
    return one is other and (one is NAMED or one is Deep.ONLY)


class Handles(collections.abc.Callable):
    def __call__(self, x: UserId) -> Named:
        return x


gives("an instance whose __call__ has annotations", 3, 3)(Handles())

main()
