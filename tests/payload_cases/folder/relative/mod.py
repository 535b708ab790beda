"""`python -m relative.mod`, with relative imports at the head, in functions and in methods."""

import functools
import importlib
import os
import sys
from importlib import resources

from . import helper
from .helper import Thing, help

sys.path.insert(0, sys.argv[-1])
from peer import case, gives, main  # noqa: E402


@gives("names that were imported relatively", 1, 21)
def top(x):
    return help(x) + helper.K


@gives("a relative import in a function", 1, 11)
def lazy(x):
    from . import helper as module
    return module.help(x)


@gives("a relative import from a subpackage", 1, 100)
def deeper(x):
    from .sub import late
    return late.late(x)


@gives("the module's own names", 1, ("relative", "__main__", "relative.mod", "mod.py", "relative", True))
def names(_):
    return (__package__, __name__, __spec__.name, os.path.basename(__file__), __spec__.parent, __spec__.has_location)


@gives("import_module with the package's name", 1, (10, 10))
def by_name(_):
    return (importlib.import_module(".helper", __package__).K,
            importlib.import_module(".helper", __spec__.parent).K)


@gives("a file beside the module, by importlib.resources and by __file__", 1, ("data", "data"))
def data(_):
    with open(os.path.join(os.path.dirname(__file__), "data.txt")) as file:
        return resources.files(__package__).joinpath("data.txt").read_text().strip(), file.read().strip()


class Own:
    def __init__(self, v):
        self.v = v

    def lazy(self):
        from .helper import K
        return self.v + K

    @functools.cached_property
    def late(self):
        from .sub.late import late
        return late(self.v)


@case("instances of the package's classes and of its own", [1], lambda a: a == Thing(1))
def thing(x):
    from .helper import Thing as Same
    assert Same is Thing
    return Thing(x)


@case("an instance of the module itself", [1], lambda a: type(a) is Own and a.v == 1)
def own(x):
    return Own(x)


gives("a relative import in a method", Own(1), 11)(Own.lazy)


@gives("a relative import in a cached property", Own(2), 200)
def cached(o):
    return o.late


def close():
    def inner(x):
        from . import helper as module
        return module.K + x
    inner.__qualname__ = "inner"
    return inner


inner = close()
gives("a relative import in an inner function", 1, 11)(inner)

main()
