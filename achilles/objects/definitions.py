"""What a letter must bring so that its functions and classes are whole, in an order in which each part can be used.

Knows names, classes and the hooks of byvalue.py. Knows no letters, jobs or peers.

Content is looked at before it is dumped: each entry is pickled by itself, cut at every other entry. That tells what it
refers to, and its digest, by which its version changes. Then all is dumped into one stream, so that pickle's memo
keeps together what belongs together. A function or class is made empty where it is met first, and filled in its turn:
behind all that it needs, where there is such an order. So a dict that is keyed by instances of a class finds their
`__hash__` and `__eq__`, and these find their globals, wherever they were defined. Where two values need each other at
that moment, no order is right, and loading raises what Python raises.

Threads: all callers have the context's lock. User code, such as a `__reduce__`, runs under it.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib
import io
import pickle
import re
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

from ..errors import DumpError, VersionError
from .byvalue import DEFINE, LOOK, PICKLE, VALUE, Reducer, Step
from .loading import PIDS, Buffer, Loader
from .names import ATOMS, Entry, Names, Place, Slot, Space, importable, is_stream, travels_by_value
from .parts import is_global, needs_of, parts_of

__all__ = ["Buffers", "Definitions"]

OUT_OF_BAND_BYTES = 16_384  # below, a copy costs less than the parts and a letter kept alive by it
DIGEST_BYTES = 16  # 2**64 contents before two are likely to be equal
LOOKS_KEPT = 4096  # contents looked at in one job; classes made in functions would add up
DEEPEST, WIDEST = 10, 1000  # of a search for what cannot be dumped
DILL_OLDEST = (0, 4, 1)  # the first that knows Python 3.13's code and threads
DILL_KINDS = {"save_code", "_save_dict_view", "save_super", "save_wrapper_descriptor", "save_singleton", "save_type",
              "save_slice"}  # what dill does with files and references would open, truncate and delete

Item = Entry | Slot | str  # what a letter brings; a str is a module to import
Held = tuple[Any, Place | None]  # a value, and what holds it


class Buffers:
    """Takes the large buffers of a pickle out of its band."""

    def __init__(self) -> None:
        self.views: list[memoryview] = []  # flat, in their order

    def __call__(self, buffer: pickle.PickleBuffer) -> bool:
        """Take one, or leave it to the pickle (true)."""
        view = buffer.raw()
        large = view.nbytes >= OUT_OF_BAND_BYTES
        if large:
            self.views.append(view)
        return not large


class Dumper(Reducer):
    """One attempt to dump by value; mixed in before C pickle's Pickler, and dill's."""

    def __init__(self, definitions: Definitions, mode: int, entry: Entry | None, shared: bool) -> None:
        self.names, self.carries = definitions.names, definitions.carries
        self.mode, self.entry, self.shared = mode, entry, shared
        self.pids = self.names.pids if mode == LOOK or shared else dict(PIDS)
        if mode == DEFINE:
            self.pids.update({id(space.names): space.key for space in self.names.scripts})
        self.roots, self.indices, self.refs, self.begun, self.plain, self.fresh = [], {}, [], {}, set(), False
        self.file, self.buffers = io.BytesIO(), Buffers()
        super().__init__(self.file, PICKLE, buffer_callback=self.buffers)  # type: ignore[call-arg]


class _Pickler(Dumper, pickle.Pickler):
    """The fast way."""


@functools.lru_cache(None)
def _dill_pickler() -> Any:
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


class Definitions:
    """Brings functions, classes and their globals; one a context.

    :param carries: whether letters bring what a process (16 bytes) has made, or only name it.
    """

    def __init__(self, names: Names, carries: Callable[[bytes], bool]) -> None:
        self.names, self.carries = names, carries
        names.pids.update(PIDS)
        self._looks: dict[Entry, list[Item]] = {}  # of this job

    def refresh(self) -> None:
        """Look anew at all content."""
        self._looks.clear()

    def dump_value(self, value: Any, shared: bool) -> Any:
        """Pickle a value; `roots` of the result are the things that definitions must bring.

        :param shared: whether things with names are the same on the other side, not copies.
        """
        return self._dumped(VALUE, value, shared=shared)

    def dump(self, roots: list[Any]) -> Any:
        """Pickle what these functions, classes and values need, and them."""
        if len(self._looks) > LOOKS_KEPT:
            self.refresh()
        order: dict[Any, Item] = {}
        seen: set[Any] = set()
        for root in roots:
            self._visit(self._items_of(root, False), order, seen)
        spaces = [item[0] for item in order.values() if isinstance(item, tuple)]
        spaces += [self.names.space_of(item.thing.__globals__) for item in order.values()  # type: ignore[misc]
                   if isinstance(item, Entry) and isinstance(item.thing, FunctionType)]
        opened = [_opening(space) for space in dict.fromkeys(spaces)
                  if isinstance(space, Space) and self.carries(space.key[0])]
        steps = [step for item in order.values() for step in self._steps(item)]
        return self._dumped(DEFINE, [opened, steps, Step(tuple, (roots,))])

    def load(self, data: Buffer, buffers: Iterable[Any]) -> tuple[Any, Any]:
        """What `dump` was given, and what must live until it is used."""
        loader = Loader(self.names, data, buffers)
        return loader.load()[-1], loader.alive

    def way_to(self, value: Any) -> str:
        """Where in a value the thing is that cannot be dumped; nothing if it is the value itself."""
        way, owner = "", value
        for _ in range(DEEPEST):
            found = next(((step, child) for step, child in _children(value) if not self._can_dump(child)), None)
            if found is None:
                break
            way, owner, value = way + found[0], value, found[1]
        return f"its {way}, held by an object of type {type(owner).__qualname__}: " if way else ""

    def _visit(self, items: Iterable[Item], order: dict[Any, Item], seen: set[Any]) -> None:
        """Put items in order, each behind what it needs."""
        for item in items:
            key = (item[0].key, item[1]) if isinstance(item, tuple) else item
            if key not in seen:
                seen.add(key)
                self._visit(self._needs(item), order, seen)
                order[key] = item

    def _needs(self, item: Item) -> list[Item]:
        if isinstance(item, tuple):
            return self._items_of(item[0].value(item[1]), True)
        if isinstance(item, str) or item.thing is None or not self.carries(item.token[:16]):
            return []
        return self._look(item)

    def _items_of(self, value: Any, is_named: bool) -> list[Item]:
        if isinstance(value, ModuleType) and not importable(value.__name__):
            return self._look(self.names.name(value))
        entry = self._hold(value, None, is_named)
        return [] if entry is None else [entry]

    def _steps(self, item: Item) -> list[Step]:
        """How this item is made or filled on the other side."""
        if isinstance(item, str):
            return [Step(importlib.import_module, (item,))]
        if isinstance(item, tuple):
            return self._bring(*item)
        thing = item.thing
        if thing is None:
            return []
        if not self.carries(item.token[:16]):
            return [Step(Loader.refer, (item.token,), item)] if item.is_value else []
        if item.is_value:
            return [Step(Loader.keep, (*item.label, thing), item)]
        fill = parts_of(self.names, item)[1]
        if isinstance(thing, CellType):
            return [Step(Loader.fill_cell, (thing, *fill))]
        if isinstance(thing, FunctionType):
            return [Step(Loader.fill_function, (thing, *fill))] if any(fill) else []
        members, *data = fill
        first = [] if members is None else [Step(Loader.fill_members, (thing, members))]
        return [*first, Step(Loader.fill_class, (thing, *data))]

    def _bring(self, space: Space, name: str) -> list[Step]:
        value = space.value(name)
        entry = self._hold(value, None)
        now, version = (value, 0) if entry is None else (entry, entry.version)
        before, known, number = space.sent.get(name, (None, -1, 0))
        if known != version or not (before is now or (_is_atomic(now) and type(before) is type(now) and before == now)):
            number = next(self.names.numbers)
        space.sent[name] = now, version, number
        if not self.carries(space.key[0]):
            return []
        return [Step(Loader.bring, (space.key if space.key[0] else space.key[1], name, number, value))]

    def _hold(self, value: Any, place: Place | None, is_named: bool = True) -> Entry | None:
        """The entry of a value that something holds; None for what needs no name.

        :param is_named: whether what holds it has a name.
        """
        if isinstance(value, (type, FunctionType)):
            if not travels_by_value(value):
                return None
        elif isinstance(value, (ModuleType, BuiltinFunctionType, enum.Enum)) or _is_atomic(value) or is_stream(value):
            return None
        entry = self.names.name(value)
        entry.place = place or entry.place
        entry.named = entry.named or is_named
        return entry

    def _look(self, entry: Entry) -> list[Item]:
        """What an entry needs; its version is right then."""
        if entry not in self._looks:
            thing = entry.thing
            entry.named = entry.named or (isinstance(thing, FunctionType) and is_global(thing))
            content = thing if entry.is_value else parts_of(self.names, entry)
            held = self._held(entry, content)
            needs: list[Any] = []
            if isinstance(thing, FunctionType):
                needs = needs_of(thing, self.names.space_of(thing.__globals__))
            kept = [self._hold(value, place, entry.named) for value, place in held]
            kept += [self._hold(each[0].value(each[1]), ("global", each[1], thing.__qualname__))
                     for each in needs if isinstance(each, tuple)]
            try:
                dumper = self._dumped(LOOK, content, entry)
                if dumper.fresh:  # from now on a token stands where that value stood
                    dumper = self._dumped(LOOK, content, entry)
            except VersionError:
                raise
            except Exception as error:
                raise self._named_error(error, entry, held) from error
            digest = hashlib.sha256(dumper.file.getbuffer())
            for view in dumper.buffers.views:
                digest.update(view)
            if digest.digest()[:DIGEST_BYTES] != entry.digest:
                entry.digest, entry.version = digest.digest()[:DIGEST_BYTES], next(self.names.numbers)
            entry.holds = [*dumper.refs, *kept]
            self._looks[entry] = [*dumper.refs, *needs]
        return self._looks[entry]

    def _held(self, entry: Entry, content: Any) -> list[Held]:
        """The values that a function, class or cell holds, and where."""
        thing = entry.thing
        if isinstance(thing, CellType):
            return [(value, entry.place) for value in content[1]]
        name, found = getattr(thing, "__qualname__", ""), []
        if isinstance(thing, FunctionType):
            code, (attributes, own) = thing.__code__, content[1]
            defaults = attributes.get("__defaults__", ())
            optional = code.co_varnames[code.co_argcount - len(defaults) :]
            found += [("default", *each) for each in zip(optional, defaults)]
            found += [("default", *each) for each in attributes.get("__kwdefaults__", {}).items()]
            found += [("variable", *each) for each in zip(code.co_freevars, thing.__closure__ or ())]
            found += [("attribute", *each) for each in own.items()]
        elif isinstance(thing, type) and not isinstance(thing, enum.EnumMeta):  # whose tables need its members at once
            found += [("attribute", *each) for each in content[1][1].items()]
        return [(value, (kind, each, name)) for kind, each, value in found]

    def _named_error(self, error: Exception, entry: Entry, held: list[Held]) -> DumpError:
        """What says which global, default, variable or attribute holds what cannot be dumped."""
        thing, place = entry.thing, entry.place
        for value, where in held:
            if not isinstance(value, CellType) and not self._can_dump(value):
                thing, place = value, where
        told = DumpError()
        told.where = f"the {place[0]} {place[1]!r} of {place[2]}: " if place is not None else ""
        told.args = (f"{told.where}{self.way_to(thing)}{error}",)
        return told

    def _can_dump(self, value: Any) -> bool:
        try:
            self.dump_value(value, shared=False)
        except Exception:
            return False
        return True

    def _dumped(self, mode: int, value: Any, entry: Entry | None = None, shared: bool = False) -> Any:
        """Dump by the fast way, or by the slow one."""
        try:
            dumper: Any = _Pickler(self, mode, entry, shared)
            dumper.dump(value)
        except (RecursionError, DumpError):
            raise
        except Exception as error:
            try:
                dumper = _dill_pickler()(self, mode, entry, shared)
                dumper.dump(value)
            except Exception as second:
                raise second from error
        return dumper


def _opening(space: Space) -> Step:
    attributes = {name: space.names[name] for name in ("__package__", "__file__", "__doc__") if name in space.names}
    spec = space.names.get("__spec__")
    return Step(Loader.open_space, (space.key, attributes, None if spec is None else (spec.name, spec.origin)))


def _children(value: Any) -> list[tuple[str, Any]]:
    """What a value holds, and how it is reached."""
    if isinstance(value, dict):
        return [(f"[{key!r:.40}]", child) for key, child in list(value.items())[:WIDEST]]
    if isinstance(value, (list, tuple)):
        return [(f"[{index}]", child) for index, child in enumerate(value[:WIDEST])]
    if isinstance(value, MethodType):
        return [(".__self__", value.__self__)]
    return [(f".{name}", child) for name, child in getattr(value, "__dict__", {}).items()]


def _is_atomic(value: Any) -> bool:
    kind = type(value)
    return kind in ATOMS or (kind in (tuple, frozenset) and all(type(each) in ATOMS for each in value))
