"""What a letter must bring so that its functions and classes are whole, in an order in which each part can be used.

Knows names, parts and byvalue.py. Knows no letters, jobs or peers.

Each item is *looked at*: its content is pickled by itself, with a number in place of whatever else has a token. The
digest of that pickle says whether the content has changed, the numbers say what it refers to. The letter is these
pickles, each behind those that it needs. The other side makes a thing when a number asks for it, and fills it in its
turn. So a dict that is keyed by instances of a class finds their `__hash__` and `__eq__`, and these find their globals,
wherever they were defined. Where two things need each other before either of them is made, loading raises an error.

Limits: an object that has no token is one object in one item. Two globals that hold it, while no global, default,
attribute or variable does, get a copy each.

Threads: all callers have the context's lock. User code, such as a `__reduce__`, runs under it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import pickle
import re
from collections import deque
from itertools import islice, repeat
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any

from ..errors import VersionError
from .byvalue import CACHE_TYPE, Dumper
from .loading import letter_of
from .names import MISSING, Entry, Names, by_import, travels_by_value
from .parts import content_of, global_names, pieces_of

__all__ = ["Definitions", "dumped", "facts_of", "way_to"]

DILL_OLDEST = (0, 4, 1)  # the first that knows Python 3.13's code and threads
DILL_KINDS = {"save_code", "_save_dict_view", "save_super", "save_wrapper_descriptor", "save_singleton", "save_type",
              "save_slice"}  # what dill does with files and references would open, truncate and delete
SHARED_KEPT = 64  # lists and dicts that initializers get
BELONGS: Any = {  # what a function belongs to, or consists of
    FunctionType: lambda _: (), tuple: list, MethodType: lambda method: [method.__self__],
    BuiltinFunctionType: lambda method: [method.__self__],
    functools.partial: lambda partial: [partial.func, *partial.args, *partial.keywords.values()],
}
# In place of a pickle, where the token is enough.
NAMED: Any = SimpleNamespace(refs={}, views=[], file=io.BytesIO(), content=None)
DEEPEST, WIDEST = 10, 1000  # of a search for what cannot be dumped


class Definitions:
    """Brings functions, classes and their globals; one a context.

    :param caller: whether letters bring everything; else they only name what other processes have made.
    """

    def __init__(self, names: Names, caller: bool) -> None:
        self.names, self._caller = names, caller
        self.order: list[Any] = []  # what was dumped last
        self._shared: deque[Entry | None] = deque(maxlen=SHARED_KEPT)

    def carries(self, item: Any) -> bool:
        """Whether letters bring an item, and do not only name it."""
        return self._caller or item.token[:16] == self.names.process

    def dump(self, *roots: Entry) -> bytes:
        """The letter that brings what these functions, classes and values need, and them."""
        named = self.names.values
        looks = self._in_order(roots)
        if self.names.values != named:
            looks = self._in_order(roots)  # with numbers for what has got a token only behind what holds it
        self.order = [*looks]
        self._settle(looks)
        numbers = {item: number for number, item in enumerate(looks)}
        records: list[Any] = []
        views: list[memoryview] = []
        for item, dumper in looks.items():
            kind = item.kind if dumper is not NAMED else ""
            label = (item.token, item.version) if item.named or not kind else (b"", 0)
            refs = [numbers[each] for each in dumper.refs]
            records.append((kind, *label, refs, dumper.file.getvalue(), len(dumper.views)))
            views += dumper.views
        head = pickle.dumps((records, [numbers[root] for root in roots]))
        return b"".join(letter_of(head, views))

    def functions(self, value: tuple[Any, ...]) -> list[Any] | None:
        """The functions that were dumped last, with this value; None if it is not enough to compare these."""
        is_fixed = all(type(each) is FunctionType or by_import(each) for each in value) and all(
            item.kind in ("function", "cell", "slot", "space") for item in self.order)
        return [item.thing for item in self.order if item.kind == "function"] if is_fixed else None

    def share(self, value: Any) -> None:
        """Give tokens to what a function belongs to, or an initializer gets: a global may be the same thing.

        :param value: a function with its callback, or an initializer with a tuple of arguments.
        """
        is_initializer = type(value) is tuple and len(value) == 2 and type(value[1]) is tuple
        found = [value]
        for each in found:  # grows while it is walked
            kind = type(each)
            if kind in BELONGS and (is_initializer or kind is not functools.partial):
                found += BELONGS[kind](each)
            elif is_initializer or kind in (list, dict, set, CACHE_TYPE) or travels_by_value(kind):
                self._shared.append(self.names.hold(each, None))

    def _in_order(self, roots: tuple[Entry, ...]) -> dict[Any, Any]:
        """All that these need, and they: each behind what it needs, with its pickle if a letter brings it."""
        looks: dict[Any, Any] = {}
        order: list[Any] = []
        stack: list[Any] = [*roots]
        while stack:
            item = stack.pop()
            if type(item) is tuple:  # all that the item needs is in order
                order += item
            elif item not in looks:
                looks[item] = self._look(item) if self.carries(item) else NAMED
                stack += [(item,), *reversed(looks[item].refs)]
        return {item: looks[item] for item in order}

    def _settle(self, looks: dict[Any, Any]) -> None:
        """Give items another version, if their content or that of what they hold has changed."""
        version = next(self.names.numbers)
        is_settled = False
        while not is_settled:
            is_settled = True
            for item, dumper in looks.items():
                # A global is set in its place, a class changed.
                state = dumper.content, [each.version for each in item.refs if each.kind not in ("class", "slot")]
                if item.state != state and dumper is not NAMED:
                    self.names.changes += item.state is not None
                    item.version, item.state, is_settled = version, state, False

    def _look(self, item: Any) -> Any:
        """The pickle of an item. What it needs is known then."""
        found = [self.names.hold(value, place, item.named) for value, place in pieces_of(item)]
        held = [entry for entry in found if entry is not None]
        item.refs = [*item.refs, *held]  # those of the last time stay alive until they are found again
        try:
            dumper = dumped(self.names, item.thing, entry=item, only=item.state and item.state[0][1])
            dumper.content = _content(dumper)
            if item.state and dumper.content != item.state[0]:
                dumper = dumped(self.names, item.thing, entry=item)  # now tokens stand where those values stood
                dumper.content = _content(dumper)
        except Exception as error:
            error.__dict__["item"] = item
            raise
        for entry in held:
            dumper.refs.setdefault(entry, len(dumper.refs))
        item.refs = [*dumper.refs]
        return dumper


class _Pickler(Dumper, pickle.Pickler):
    """The fast way."""


@functools.lru_cache(None)
def dill_pickler() -> Any:
    """The slow way: dill's table of types, but for those that would touch files or lose what they refer to."""
    try:
        dill = importlib.import_module("dill")
    except ModuleNotFoundError:
        raise VersionError("dill is needed here: pip install 'dill>=0.4.1'") from None
    if tuple(map(int, re.findall(r"\d+", dill.__version__)[:3])) < DILL_OLDEST:
        raise VersionError(f"dill {dill.__version__} is too old: pip install 'dill>=0.4.1'")
    stock: Any = pickle._Pickler
    table = {kind: save for kind, save in dill.Pickler.dispatch.items()
             if save.__module__ == pickle.__name__ or save.__name__ in DILL_KINDS}
    table |= {dict: stock.save_dict, FunctionType: stock.save_global}
    return type("_DillPickler", (Dumper, dill.Pickler), {"dispatch": table, "save": stock.save})


def dumped(names: Names, value: Any, **options: Any) -> Any:
    """Dump arguments, or the thing of an entry, by the fast way or by the slow one; with a Dumper of these options."""
    try:
        return _Pickler(names, value, **options)
    except RecursionError:
        raise
    except Exception as error:
        try:
            return dill_pickler()(names, value, **options)
        except Exception as second:
            raise second from error


def facts_of(functions: list[Any]) -> list[Any]:
    """All that functions refer to: if each is the very same later, nothing has changed that is no value by itself."""
    found: list[Any] = []
    for function in functions:
        code = function.__code__
        found += (code, function.__defaults__, function.__name__, function.__qualname__, function.__module__,
                  function.__doc__, *map(function.__globals__.get, global_names(code), repeat(MISSING)))
        for table in filter(None, (function.__kwdefaults__, function.__dict__)):
            found += (*table, *table.values())
        for cell in function.__closure__ or ():
            found += content_of(cell)
    return found


def way_to(names: Names, value: Any, way: str = "", owner: Any = None, left: int = DEEPEST) -> str:
    """Where in a value the thing is that cannot be dumped; nothing if it is the value itself.

    :param way: to the value, from an owner, with so many steps left to look.
    """
    for step, child in _children(value).items() if left else ():
        try:
            dumped(names, child, shares=False)
        except Exception:
            return way_to(names, child, way + step, value, left - 1)
    return f"its {way}, held by an object of type {type(owner).__qualname__}: " if way else ""


def _children(value: Any) -> dict[str, Any]:
    """What a value holds, by the way to it."""
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {f"[{key!r:.40}]": child for key, child in islice(pairs, WIDEST)}
    attributes = {"__self__": value.__self__} if isinstance(value, MethodType) else getattr(value, "__dict__", {})
    return {f".{name}": child for name, child in attributes.items()}


def _content(dumper: Any) -> Any:
    """What tells whether a content is another one."""
    digest = hashlib.sha256(b"".join([dumper.file.getvalue(), *dumper.views])).digest()
    return digest, [entry.token for entry in dumper.refs]
