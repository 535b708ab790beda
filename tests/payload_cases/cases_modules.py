"""Modules that were loaded by their path, and functions that importable modules made."""

import importlib.machinery
import importlib.util
import os
import sys
import types

sys.path[:0] = [os.getcwd(), sys.argv[-1]]
import importable  # noqa: E402
from peer import case, expect, gives, main, program  # noqa: E402

PATH = os.path.abspath("plugin.txt")


def by_path(name, *, known):
    """The recipe of importlib's documentation, with or without its line that registers the module."""
    loader = importlib.machinery.SourceFileLoader(name, PATH)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    if known:
        sys.modules[name] = module
    loader.exec_module(module)
    return module


plugin, other, known = by_path("plugin", known=False), by_path("plugin", known=False), by_path("known", known=True)
other.LIMIT = 1
made = types.ModuleType("made", "Made by hand.")
exec("STEP = 4\ndef step(x): return x + STEP\nclass Kind:\n    step = STEP", vars(made))


@gives("a module that was loaded by its path", 9, (3, 3, 3 ** 0.5, "plugin.txt", "plugin", "plugin"))
def loaded(x):
    return (plugin.limited(x), plugin.LIMIT, *plugin.rooted(x), plugin.__name__)


@gives("two modules of one name", 9, (3, 1, False))
def two(x):
    return plugin.limited(x), other.limited(x), plugin is other


@gives("one that sys.modules knows", 9, (3, 3, "known"))
def registered(x):
    return known.limited(x), known.LIMIT, known.rooted(x)[2]


@gives("its class made in the function", 2, (6, 3))
def shapes(n):
    return plugin.Shape(n).area(), known.Shape.sides


@gives("a module that was made by hand", 1, (5, 4, "made", "Made by hand."))
def by_hand(x):
    return made.step(x), made.Kind().step, made.__name__, made.__doc__


class Uses:
    module = plugin
    table = {"plugin": [plugin, made]}

    def __init__(self):
        self.module_too = known

    def run(self, x):
        return self.module.limited(x), self.table["plugin"][1].step(x), self.module_too.limited(x)


USES = Uses()


@gives("such modules in attributes", 7, (3, 11, 3))
def attributes(x):
    return USES.run(x)


@gives("such a module as a default", 7, (3, True))
def default(x, module=plugin):
    return module.limited(x), module is plugin


@case("its instances as arguments and results", [plugin.Shape(5)], lambda r: r == plugin.Shape(6),
      fork="pickle does not find its class")
def instances(shape):
    assert type(shape) is plugin.Shape
    return plugin.Shape(shape.n + 1)


case("its functions and methods", [5], lambda r: r == 3, fork="pickle does not find it")(plugin.limited)


@case("a module as an argument", [plugin], lambda r: r == (3, "plugin"), fork="pickle knows no modules")
def argument(module):
    return module.limited(9), module.__name__


def set_limit(value):
    plugin.LIMIT = value


@program("what the worker changes in it stays")
def kept(peer):
    expect(peer.map(loaded, [9], [(set_limit, (2,))])[0][:2], (2, 2))
    expect(peer.map(two, [9]), [(2, 1, False)])
    expect(peer.map(attributes, [7]), [(2, 11, 3)])


importable.set_up("at run time")


@importable.decorate
def decorated(x):
    return x


lam, inner, cls = importable.make(), importable.make_closure(7), importable.make_class()
IMPORTED = "a fork has the module as the caller has it"


@gives("functions that an importable module made see it as it is imported there", 1,
       (("as imported", None, 1), ("as imported", ("as imported", 1), 7), ("as imported", 1)), fork=IMPORTED)
def imported(x):
    return lam(x), inner(x), cls().get(x)


gives("a function that an importable module decorates", 1, ("as imported", 1), fork=IMPORTED)(decorated)
gives("a lambda that an import finds by no name", 1, ("as imported", 1), fork=IMPORTED)(importable.checked)


@program("the remedy for it: an initializer")
def remedy(peer):
    expect(peer.map(lam_called, [1], [(importable.set_up, ("at run time",))]), [("at run time", "at run time", 1)])


def lam_called(x):
    return lam(x)


main()
