"""The items that a letter brings for its functions and classes, each item behind the items that it needs.

Knows code objects, classes and byvalue.py. Knows no letters, jobs or peers.

Each item's content is pickled alone, with numbers in place of other things with tokens. The pickle's digest tells a
change of the content. The numbers name the needed items. The other side makes a thing when a number asks for it, and
fills it in its turn. So a dict of a class's instances finds their `__hash__` and `__eq__`, and these find their
globals. Loading fails where two things need each other before either is made.

A function, class or cell by value is made in two steps, so that references may have any order (PARTS)::

    make     a function: globals, code, cells   a class: metaclass, name, bases, `__slots__`; functions and plain
                                                constants; members of an enum. From here on its instances can be made
                                                and compared
    fill     defaults, attributes               all attributes: they may hold instances of this class and of others
             a cell: its content

Limits: an object that is inside two globals, and itself no global, default, attribute or variable, is copied for each.

Threads: all callers have the context's lock. User code, such as a `__reduce__`, runs under it.
"""

from __future__ import annotations

import abc
import contextlib
import enum
import functools
import io
import pickle
import sys
from itertools import islice, repeat
from operator import is_
from types import (
    BuiltinFunctionType,
    CellType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

from .byvalue import CACHE_TYPE, Dumper, arguments_of
from .loading import CAME, MAKERS, letter_of
from .names import (
    ATOMS,
    MAINS,
    MISSING,
    Entry,
    Names,
    by_import,
    global_names,
    slots_of,
    submodules_of,
    travels_by_value,
)

__all__ = ["Definitions", "is_same", "way_to"]

BELONGS: Any = {  # by a function's kind: the objects that it holds
    FunctionType: lambda _: (), tuple: list, MethodType: lambda method: [method.__self__],
    BuiltinFunctionType: lambda method: [method.__self__],
    functools.partial: lambda partial: [partial.func, *partial.args, *partial.keywords.values()],
}
# In place of a pickle, where the token is enough.
NAMED: Any = SimpleNamespace(refs={}, views=[], file=io.BytesIO(), content=None)
DEEPEST, WIDEST = 10, 1000  # of a search for the object that cannot be dumped
CODE = (FunctionType, staticmethod, classmethod)
MADE_ANEW = {  # by type.__new__, by abc, by annotationlib, by pickling itself
    "__dict__", "__weakref__", "__module__", "__qualname__", "__slots__", "__slotnames__", "_abc_impl",
    "__annotations_cache__", CAME,
}
FILLED = ("__defaults__", "__kwdefaults__", "__type_params__", "__qualname__", "__module__", "__doc__")


class Definitions:
    """Brings a context's functions, classes and their globals.

    :param caller: whether letters bring everything; else they only name the things of other processes.
    """

    def __init__(self, names: Names, caller: bool) -> None:
        self.names, self._caller = names, caller
        self.order: list[Any] = []  # the items of the last dump

    def carries(self, item: Any) -> bool:
        """Whether letters bring an item, not only name it."""
        return self._caller or item.token[:16] == self.names.process

    def dump(self, *roots: Entry) -> bytes:
        """The letter that brings these functions, classes and values, and the items that they need."""
        named = self.names.values
        looks = self._in_order(roots)
        if self.names.values != named:
            looks = self._in_order(roots)  # a value may get its token after its holder was pickled
        self.order = [*looks]
        self._settle(looks)
        numbers = {item: number for number, item in enumerate(looks)}
        records: list[Any] = []
        views: list[memoryview] = []
        for item, dumper in looks.items():
            kind = item.kind if dumper is not NAMED else ""
            label = (item.token, item.version) if item.named or not kind else (b"", 0)
            records.append((
                kind, *label, [numbers[each] for each in dumper.refs], dumper.file.getvalue(), len(dumper.views)))
            views += dumper.views
        return b"".join(letter_of([pickle.dumps((records, [numbers[root] for root in roots])), *views]))

    def facts(self, value: tuple[Any, ...]) -> list[tuple[Any, list[Any]]] | None:
        """The functions of the last dump, of this value, with their facts; None if facts cannot tell a change."""
        is_fixed = all(type(each) is FunctionType or by_import(each) for each in value) and all(
            item.kind in ("function", "cell", "slot", "space") for item in self.order)
        return [(item.thing, item.facts) for item in self.order if item.kind == "function"] if is_fixed else None

    def share(self, value: Any) -> None:
        """Give tokens to objects that a function holds or an initializer gets: a global may be the same object.

        :param value: a function and its callback, or an initializer and its arguments.
        """
        is_initializer = type(value) is tuple and len(value) == 2 and type(value[1]) is tuple
        found = [value]
        for each in found:  # grows while it is walked
            kind = type(each)
            if kind in BELONGS and (is_initializer or kind is not functools.partial):
                found += BELONGS[kind](each)
            elif is_initializer or kind in (list, dict, set, CACHE_TYPE) or travels_by_value(kind):
                self.names.recent.append(self.names.hold(each, None))

    def _in_order(self, roots: tuple[Entry, ...]) -> dict[Any, Any]:
        """These entries and all needed items, each behind the items that it needs, with its Dumper or NAMED."""
        looks: dict[Any, Any] = {}
        stack: list[Any] = [*roots]
        while stack:
            item = stack.pop()
            if type(item) is tuple:  # its needed items are in order
                looks[item[0]] = looks.pop(item[0])
            elif item not in looks:
                looks[item] = self._look(item) if self.carries(item) else NAMED
                stack += [(item,), *reversed(looks[item].refs)]
        return looks

    def _settle(self, looks: dict[Any, Any]) -> None:
        """Give each item another version if its content, or an item that it holds, has changed."""
        version = next(self.names.numbers)
        is_settled = False
        while not is_settled:
            is_settled = True
            for item, dumper in looks.items():
                # A global is set in its place, a class changed.
                state = dumper is not NAMED and (
                    dumper.content, [each.version for each in item.refs if each.kind not in ("class", "slot")])
                if state and item.state != state:
                    self.names.changes += item.state is not None
                    item.version, item.state, is_settled = version, state, False

    def _look(self, item: Any) -> Any:
        """The pickle of an item; sets its `refs`, the items that it needs."""
        try:
            pieces, reduced = PARTS[item.kind](item, item.thing)
            held = [entry for value, place in pieces if (entry := self.names.hold(value, place, item.named))]
            item.refs = [*item.refs, *held]  # keeps the old refs alive
            dumper = Dumper(self.names, item.thing, item, reduced, only=item.state and item.state[0][1])
            if item.state and dumper.content != item.state[0]:  # now with tokens in place of these values
                dumper = Dumper(self.names, item.thing, item, reduced)
        except Exception as error:
            where = "the {} {!r} of {}: ".format(*item.place) if item.place else ""
            error.__dict__["way"] = where + way_to(self.names, item.thing)
            raise
        for entry in held:
            dumper.refs.setdefault(entry, len(dumper.refs))
        item.refs = [*dumper.refs]
        return dumper


def _placed(owner: Any, role: str, table: dict[str, Any]) -> list[Any]:
    return [(value, (role, name, owner.__qualname__)) for name, value in table.items()]


def _space(space: Any, thing: dict[str, Any]) -> tuple[list[Any], Any]:
    names = () if space.is_imported else ("__package__", "__file__", "__doc__", "__spec__")
    attributes = {name: thing[name] for name in names if thing.get(name) is not None}
    if space.name in MAINS:  # a script's arguments are there in a worker, too
        attributes["__argv__"] = list(sys.argv)
    return [], (MAKERS["space"], (space.name, attributes))


def _function(entry: Any, function: Any) -> tuple[list[Any], Any]:
    entry.facts = facts_of(function)  # first, so that a later change is seen
    code, defaults, slots = function.__code__, function.__defaults__ or (), slots_of(function, entry.names)
    optional = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    pieces = [
        *_placed(function, "default", {**dict(zip(optional, defaults)), **(function.__kwdefaults__ or {})}),
        *_placed(function, "variable", dict(zip(code.co_freevars, function.__closure__ or ()))),
        *_placed(function, "attribute", dict(vars(function))), *_placed(function, "global", slots),
    ]
    modules = [slot.thing.__name__ for slot in slots.values() if isinstance(slot.thing, ModuleType)]
    annotations = "__annotate__" if getattr(function, "__annotate__", None) else "__annotations__"  # unevaluated
    filled = {key: value for key in (*FILLED, annotations) if (value := getattr(function, key, None))}
    arguments = function.__globals__, code, function.__name__, function.__closure__, submodules_of(code, modules)
    return pieces, (MAKERS["function"], arguments, (dict(vars(function)), filled))


def _class(_: Any, cls: Any) -> tuple[list[Any], Any]:
    """A class's functions and plain constants come twice: to make it, and among its attributes."""
    namespace = {name: vars(cls)[name] for name in ("__module__", "__slots__") if name in vars(cls)}
    namespace["__qualname__"] = cls.__qualname__
    attributes = {name: value for name, value in vars(cls).copy().items() if name not in MADE_ANEW and not (
        isinstance(value, MemberDescriptorType) and value.__objclass__ is cls)}  # of its `__slots__`
    code = {name: value for name, value in attributes.items() if type(value) in ATOMS or (
        type(value) in CODE and isinstance(getattr(value, "__func__", value), FunctionType))}
    pieces = _placed(cls, "attribute", {name: value for name, value in attributes.items() if name not in code})
    members: dict[str, Any] = {}
    if isinstance(cls, enum.EnumMeta):  # its tables need its members; `_value2member_map_` has combined flags, too
        pieces, members = [], {name: member for name, member in cls._member_map_.items() if member._name_ == name}
        attributes["_value2member_map_"] = {
            value: member for value, member in cls._value2member_map_.copy().items()
            if members.get(member._name_) is member}
    states = {name: {key: value for key, value in vars(member).copy().items() if key != "_inverted_"}
              for name, member in members.items()}
    references = abc._get_dump(cls)[0] if isinstance(cls, abc.ABCMeta) else ()  # type: ignore[attr-defined]
    registered = [each for ref in references if (each := ref()) is not None]
    made = {name: arguments_of(member) for name, member in members.items()}
    arguments = type(cls), cls.__name__, cls.__bases__, namespace, code, made
    return pieces, (MAKERS["new_class"], arguments, (attributes, states, registered), None, None, MAKERS["fill_class"])


def _cell(entry: Any, cell: CellType) -> tuple[list[Any], Any]:
    contents = content_of(cell)
    pieces = [(content, entry.place) for content in contents]
    if entry.place[1] == "__classdict__":  # the variable with the names for annotations (Python 3.14)
        pieces, contents = [], [{
            key: value for key, value in names.items()
            if not (key in MADE_ANEW or key[0] == key[-1] == "_" or isinstance(value, (*CODE, property)))
        } for names in contents]
    return pieces, (MAKERS["cell"], (), *[(None, {"cell_contents": content}) for content in contents])


# By an entry's kind: the values that its thing holds, with their places, and its reduction.
PARTS: dict[str, Any] = {
    "space": _space,
    "function": _function,
    "class": _class,
    "cell": _cell,
    "slot": lambda slot, value: ([(value, slot.place)], (MAKERS["slot"], (slot.space.thing, slot.name, value))),
    "value": lambda entry, value: ([], None),
}


def content_of(cell: CellType) -> list[Any]:
    """The content of a variable's cell; no item if it is empty."""
    return [] if cell == CellType() else [cell.cell_contents]


def facts_of(function: Any) -> list[Any]:
    """The objects that a function refers to. If each is the same object later, only the inside of values can differ."""
    code = function.__code__
    found = [code, function.__defaults__, function.__name__, function.__qualname__, function.__module__,
             function.__doc__, *map(function.__globals__.get, global_names(code), repeat(MISSING))]
    for table in filter(None, (function.__kwdefaults__, function.__dict__)):
        found += (*table, *table.values())
    for cell in function.__closure__ or ():
        found += content_of(cell)
    return found


def is_same(function: Any, facts: list[Any]) -> bool:
    """Whether a function refers to the same objects as before."""
    found = facts_of(function)
    return len(found) == len(facts) and all(map(is_, found, facts))


def way_to(names: Names, value: Any, way: str = "", owner: Any = None, left: int = DEEPEST) -> str:
    """The place in a value of the object that cannot be dumped; "" if the value itself cannot.

    :param way: from the `owner` to the value.  :param left: steps left to look.
    """
    with contextlib.suppress(Exception):  # of a user's `__repr__` or `items`
        for step, child in _children(value).items() if left else ():
            try:
                Dumper(names, child, shares=False)
            except Exception:
                return way_to(names, child, way + step, value, left - 1)
    return f"its {way}, held by an object of type {type(owner).__qualname__}: " if way else ""


def _children(value: Any) -> dict[str, Any]:
    """The objects that a value holds, by the way to them."""
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {f"[{key!r:.40}]": child for key, child in islice(pairs, WIDEST)}
    attributes = {"__self__": value.__self__} if isinstance(value, MethodType) else getattr(value, "__dict__", {})
    return {f".{name}": child for name, child in attributes.items()}
