"""Parameters of types with defaults (PEP 696), and what 3.13 adds to `typing`."""

import sys
import typing
import warnings

sys.path.insert(0, sys.argv[-1])
from peer import case, gives, main  # noqa: E402

T = typing.TypeVar("T", default=int)
P = typing.ParamSpec("P", default=[int])
Ts = typing.TypeVarTuple("Ts", default=typing.Unpack[tuple[int, str]])
Inferred = typing.TypeVar("Inferred", infer_variance=True)


class Old(typing.Generic[T]):
    pass


class Box[K = str]:
    def __init__(self, item: K):
        self.item = item


def first[K = int](items: list[K]) -> K:
    return items[0]


type Pair[K = int] = tuple[K, K]


class Row(typing.TypedDict):
    key: typing.ReadOnly[int]


@gives("defaults of parameters", 1, (int, str, int, int, True, False, [int]))
def defaults(_):
    return (T.__default__, Box.__type_params__[0].__default__, first.__type_params__[0].__default__,
            Pair.__type_params__[0].__default__, Inferred.__infer_variance__, Inferred.has_default(), P.__default__)


@gives("what they make of aliases", Box("a"), ((int,), (str,), "a", 1))
def made(box):
    return typing.get_args(Old[int]), typing.get_args(Box[str]), box.item, first([1])


@case("a class with a default, there and back", [Box(1)], lambda r: type(r) is Box and r.item == 2)
def there(box):
    return Box(box.item + 1)


class Legacy:
    @warnings.deprecated("use other")
    def old(self):
        return 1


@warnings.deprecated("no longer", category=None)
def deprecated(x):
    return x


gives("deprecated functions", 5, 5)(deprecated)


@gives("deprecated methods", 1, (1, ["use other"], {"key": 1}, "use other"))
def warns(_):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return Legacy().old(), [str(w.message) for w in caught], Row(key=1), Legacy.old.__deprecated__


main()
