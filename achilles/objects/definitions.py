"""What a letter must bring so that its functions and classes are whole, in an order in which each part can be used.

Knows names, parts and looks.py, which says what refers to what. Knows no letters, jobs or peers.

All goes into one stream, so that pickle's memo keeps together what belongs together. Pickle makes a function or class
empty at its first mention. A later step fills it, after everything that its attributes need. So a dict that is keyed by
instances of a class finds their `__hash__` and `__eq__`, and these find their globals, wherever they were defined.
Where two values need each other at that moment, no order is right, and loading raises what Python raises.

Threads: all callers have the context's lock. User code, such as a `__reduce__`, runs under it.
"""

from __future__ import annotations

import enum
import functools
import importlib
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

from .byvalue import CACHE_TYPE, DEFINE, Step
from .loading import Buffer, Loader
from .looks import Item, Looks, is_atomic
from .names import Entry, Names, Space, importable, is_class, travels_by_value
from .parts import parts_of

__all__ = ["Definitions"]

SHARED_KEPT = 64  # lists and dicts that initializers get
LOOKS_KEPT = 4096  # contents looked at in one job; classes made in functions would add up


class Definitions:
    """Brings functions, classes and their globals; one a context.

    :param carries: whether letters bring what a process (16 bytes) has made, or only name it.
    """

    def __init__(self, names: Names, carries: Callable[[bytes], bool]) -> None:
        self.names, self.carries = names, carries
        self.looks = Looks(names, carries)
        self._shared: deque[Entry] = deque(maxlen=SHARED_KEPT)

    def dump(self, roots: list[Any]) -> Any:
        """Pickle what these functions, classes and values need, and them."""
        if len(self.looks) > LOOKS_KEPT:
            self.looks.refresh()
        items = self._in_order(roots)
        entries = [item for item in items if isinstance(item, Entry)]
        self.looks.settle([entry for entry in entries if self.carries(entry.token[:16])])
        spaces: list[Any] = [item[0] for item in items if isinstance(item, tuple)]
        spaces += [self.names.space_of(each.thing.__globals__) for each in entries if type(each.thing) is FunctionType]
        opened = [_opening(space) for space in dict.fromkeys(spaces)
                  if isinstance(space, Space) and self.carries(space.key[0])]
        steps = [step for item in items for step in (*self._members(item), *self._steps(item))]
        return self.looks.dumped(DEFINE, [opened, steps, Step(tuple, (roots,))])

    def load(self, data: Buffer, buffers: Iterable[Any]) -> tuple[Any, Any]:
        """What `dump` was given, and what must live until it is used."""
        loader = Loader(self.names, data, buffers)
        return loader.load()[-1], loader.alive

    def share(self, value: Any) -> None:
        """Give tokens to what a function belongs to, or an initializer gets: a global may be the same thing.

        :param value: a function with its callback, or an initializer with a tuple of arguments.
        """
        pair = value if type(value) is tuple else (value,)
        is_initializer = len(pair) == 2 and type(pair[1]) is tuple
        found = [*pair]
        for each in found:  # grows while it is walked
            if type(each) is tuple:
                found += each
            elif type(each) is functools.partial and is_initializer:
                found += [each.func, *each.args, *each.keywords.values()]
            elif type(each) in (MethodType, BuiltinFunctionType):
                found.append(each.__self__)
            elif is_initializer or type(each) in (list, dict, set, CACHE_TYPE) or travels_by_value(type(each)):
                entry = None if is_class(each) or type(each) is FunctionType else self.looks.hold(each, None)
                if entry is not None:
                    entry.anchor()
                    self._shared.append(entry)

    def _in_order(self, roots: list[Any]) -> list[Item]:
        """All that these need, and they: each behind what it needs. A class waits for the values that it holds."""
        order: dict[Any, Item] = {}
        waiting: dict[Any, list[Item]] = {}  # for each item that was begun: it, and the classes that hold it
        stack: list[tuple[Item | None, list[Item], Iterator[Item]]] = []
        first = [item for root in roots for item in self._items_of(root, False)]
        stack.append((None, first, iter(first)))
        while stack:
            item, needs, left = stack[-1]
            inner = next((each for each in left if _key(each) not in waiting), None)
            if inner is not None:
                waiting[_key(inner)] = [inner]
                more = self._needs(inner)
                stack.append((inner, more, iter(more)))
                continue
            stack.pop()
            if item is not None:
                held = [each for each in needs if isinstance(each, Entry) and each.is_value and each not in order]
                if held and isinstance(item, Entry) and is_class(item.thing):
                    waiting[held[0]].append(item)
                else:
                    order.update({_key(each): each for each in waiting[_key(item)]})
        return list(order.values())

    def _needs(self, item: Item) -> list[Item]:
        if isinstance(item, tuple):
            return self._items_of(item[0].value(item[1]), True)
        if isinstance(item, str) or item.thing is None or not self.carries(item.token[:16]):
            return []
        return self.looks.look(item)

    def _items_of(self, value: Any, is_named: bool) -> list[Item]:
        if isinstance(value, ModuleType) and not importable(value.__name__):
            return self.looks.look(self.names.name(value))
        if isinstance(value, enum.Enum):
            value = type(value)
        entry = self.looks.hold(value, None, is_named)
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
        return [Step(Loader.fill_class, (thing, *fill[1:]))]

    def _members(self, item: Item) -> list[Step]:
        """What makes the members of the enums that this item refers to, or is: a table may have them as keys."""
        enums = [each for each in (*self._needs(item), item) if isinstance(each, Entry)
                 and isinstance(each.thing, enum.EnumMeta) and self.carries(each.token[:16])]
        return [Step(Loader.fill_members, (each.thing, parts_of(self.names, each)[1][0])) for each in enums]

    def _bring(self, space: Space, name: str) -> list[Step]:
        value = space.value(name)
        entry = self.looks.hold(value, None)
        now, version = (value, 0) if entry is None else (entry, entry.version)
        before, known, number = space.sent.get(name, (None, -1, 0))
        alike = is_atomic(now) and is_atomic(before) and pickle.dumps(before) == pickle.dumps(now)
        if known != version or not (before is now or alike):
            number = next(self.names.numbers)
        space.sent[name] = now, version, number
        if not self.carries(space.key[0]):
            return []
        return [Step(Loader.bring, (space.key if space.key[0] else space.key[1], name, number, value))]

def _key(item: Item) -> Any:
    return (item[0].key, item[1]) if isinstance(item, tuple) else item


def _opening(space: Space) -> Step:
    attributes = {name: space.names[name] for name in ("__package__", "__file__", "__doc__") if name in space.names}
    spec = space.names.get("__spec__")
    return Step(Loader.open_space, (space.key, attributes, None if spec is None else (spec.name, spec.origin)))
