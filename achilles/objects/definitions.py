"""What a letter must bring so that its functions and classes are whole, in an order in which each part can be used.

Knows names, parts and byvalue.py. Knows no letters, jobs or peers.

Each item is *looked at*: its content is pickled by itself, with a number in place of whatever else has a token. The
digest of that pickle says whether the content has changed, the numbers say what it refers to. Then all items of a
letter go into one stream, so that pickle's memo keeps together what belongs together: first all functions, classes
and cells are made, empty, and then each is filled, after everything that its content needs. So a dict that is keyed by
instances of a class finds their `__hash__` and `__eq__`, and these find their globals, wherever they were defined.
Where two values need each other at that moment, no order is right, and loading raises what Python raises.

Threads: all callers have the context's lock. User code, such as a `__reduce__`, runs under it.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib
import pickle
import re
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from operator import methodcaller
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from ..errors import DumpError, VersionError
from .byvalue import CACHE_TYPE, Dumper
from .names import MISSING, Entry, Names, Place, by_import, is_class, is_stream, travels_by_value
from .parts import cell_content, fill_of, global_names, is_global, needs_of, pieces_of, shell_of

__all__ = ["Definitions", "dumped", "facts_of", "way_to"]

DILL_OLDEST = (0, 4, 1)  # the first that knows Python 3.13's code and threads
DILL_KINDS = {"save_code", "_save_dict_view", "save_super", "save_wrapper_descriptor", "save_singleton", "save_type",
              "save_slice"}  # what dill does with files and references would open, truncate and delete
SHARED_KEPT = 64  # lists and dicts that initializers get
DIGEST_BYTES = 16  # 2**64 contents before two are likely to be equal
DEEPEST, WIDEST = 10, 1000  # of a search for what cannot be dumped


class Definitions:
    """Brings functions, classes and their globals; one a context.

    :param carries: whether letters bring what a process (16 bytes) has made, or only name it.
    """

    def __init__(self, names: Names, carries: Callable[[bytes], bool]) -> None:
        self.names, self._carried = names, carries
        self._looks = 0  # how often all content was to be looked at anew
        self.order: list[Any] = []  # what was dumped last
        self._alive: list[Any] = []  # until the definitions are made
        self._shared: deque[Entry | None] = deque(maxlen=SHARED_KEPT)

    def refresh(self) -> None:
        """Look anew at all content."""
        self._looks += 1

    def carries(self, item: Any) -> bool:
        """Whether letters bring an item, and do not only name it."""
        return self._carried(item.token[:16])

    def dump(self, roots: list[Entry]) -> Any:
        """Pickle what these functions, classes and values need, and them."""
        self.order = order = self._in_order(roots)
        numbers = {item: number for number, item in enumerate(order)}
        carried = [item for item in order if self.carries(item)]
        self._settle(carried)
        modules = [need for item in carried for need in item.needs if isinstance(need, str)]
        makes = sorted((item for item in carried if item.kind not in ("slot", "value")), key=_rank)
        fills = {item: content for item in carried if (content := fill_of(item))}
        heads = [(item.kind, item.label) if self.carries(item) else ("", (item.token, 0)) for item in order]
        lists = [[numbers[item] for item in items] for items in (makes, fills, roots)]
        head = pickle.dumps((heads, *lists, [*dict.fromkeys(modules)]))

        def write(dumper: Any) -> None:
            dumper.dump(head)
            dumper.refs = {item: numbers[item] for item in order if item not in fills or item in makes}
            for item in makes:
                dumper.dump(shell_of(item))
            for dumper.entry, content in fills.items():
                dumper.dump(content)
                dumper.refs[dumper.entry] = numbers[dumper.entry]
        dumper = dumped(self.names, write, refs={})
        self._alive = []
        return dumper

    def functions(self) -> list[Any] | None:
        """The functions that were dumped last; None if it is not enough to compare these."""
        is_fixed = all(item.kind in ("function", "cell", "slot", "space") for item in self.order)
        return [item.thing for item in self.order if item.kind == "function"] if is_fixed else None

    def hold(self, value: Any, place: Place | None, is_named: bool = True) -> Entry | None:
        """The entry of a value that something holds; None for what needs no name.

        :param is_named: whether letters say the token of the holder.
        """
        if by_import(value) or isinstance(value, enum.Enum) or is_stream(value):
            return None
        entry = self.names.name(value)
        entry.place = place or entry.place
        entry.named = entry.named or is_named
        return self.names.own(entry)

    def share(self, value: Any) -> None:
        """Give tokens to what a function belongs to, or an initializer gets: a global may be the same thing.

        :param value: a function with its callback, or an initializer with a tuple of arguments.
        """
        found = [*value] if type(value) is tuple else [value]
        is_initializer = len(found) == 2 and type(found[1]) is tuple
        for each in found:  # grows while it is walked
            kind = type(each)
            if kind is tuple:
                found += each
            elif kind is functools.partial and is_initializer:
                found += [each.func, *each.args, *each.keywords.values()]
            elif kind in (MethodType, BuiltinFunctionType):
                found.append(each.__self__)
            elif is_initializer or kind in (list, dict, set, CACHE_TYPE) or travels_by_value(kind):
                if kind is not FunctionType and not is_class(each):
                    self._shared.append(self.hold(each, None))

    def _in_order(self, roots: list[Entry]) -> list[Any]:
        """All that these need, and they: each behind what it needs."""
        order: list[Any] = []
        begun: set[Any] = set()
        stack: list[tuple[Any, Iterator[Any]]] = [(None, iter(roots))]
        while stack:
            item, left = stack[-1]
            inner = next((each for each in left if each not in begun and not isinstance(each, str)), None)
            if inner is None:
                order.append(item)
                stack.pop()
                continue
            begun.add(inner)
            stack.append((inner, iter(self._look(inner) if self.carries(inner) else ())))
        return _values_first(order[:-1])

    def _settle(self, items: list[Any]) -> None:
        """Give items other versions, if their content or that of what they hold has changed."""
        changed: set[Any] = set()
        while more := [item for item in items if item not in changed and item.state != _state(item)]:
            for item in more:
                item.version = next(self.names.numbers)
                self.names.changes += item.state is not None
            changed.update(more)
        for item in items:
            item.state = _state(item)

    def _look(self, item: Any) -> list[Any]:
        """What an item needs; its digest is right then."""
        if item.looked == self._looks:
            return list(item.needs)
        if item.kind == "function" and is_global(item.thing):
            item.named = True
            self.names.own(item)
        held = self._hold_all(item)
        dump = functools.partial(dumped, self.names, methodcaller("dump", (shell_of(item), fill_of(item))), entry=item)
        try:
            dumper = dump(only=item.known)
            if item.known is not None and _digest(dumper) != item.digest:
                dumper = dump()  # from now on tokens stand where those values stood
        except VersionError:
            raise
        except Exception as error:
            raise self._named_error(error, item) from error
        self._alive += dumper.alive
        item.digest, item.refs = _digest(dumper), [*dumper.refs]
        item.known = {each.token for each in item.refs}
        item.needs = [*item.refs, *held, *dumper.before, *dumper.fresh]
        item.looked = self._looks
        return list(item.needs)

    def _hold_all(self, item: Any) -> list[Any]:
        """The entries of what an item holds, and the globals that it needs."""
        found = [self.hold(value, place, item.named) for value, place in pieces_of(item)]
        needs = needs_of(item)
        for slot in needs:
            if not isinstance(slot, str):
                slot.place = "global", slot.name, getattr(item.thing, "__qualname__", item.thing.__name__)
        return [entry for entry in found if entry is not None] + needs

    def _named_error(self, error: Exception, item: Any) -> DumpError:
        """What says which global, default, variable or attribute holds what cannot be dumped."""
        told = DumpError()
        told.where = "the {} {!r} of {}: ".format(*item.place) if item.place is not None else ""
        told.args = (f"{told.where}{way_to(self.names, item.thing)}{error}",)
        return told


def _values_first(order: list[Any]) -> list[Any]:
    """The same items, each behind the values that it holds: these cannot be made before they are filled."""
    done: dict[Any, None] = {}
    waiting: dict[Any, list[Any]] = {}
    for item in order:
        ready = [item]
        for each in ready:  # grows while it is walked
            values = (value for value in each.refs if value.kind == "value" and value not in done)
            if (value := next(values, None)) is not None:
                waiting.setdefault(value, []).append(each)
            else:
                done[each] = None
                ready += waiting.pop(each, ())
    return [*dict.fromkeys([*done, *order])]  # at the end, values that need each other


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


def dumped(names: Names, write: Callable[[Any], None], **options: Any) -> Any:
    """Dump by the fast way, or by the slow one; once more, if things got their tokens meanwhile.

    :param write: what dumps with a Dumper of these options.
    """
    dumper = _tried(names, write, options)
    if dumper.fresh and not dumper.is_final:
        dumper = _tried(names, write, {**options, "before": dumper.fresh})
    return dumper


def _tried(names: Names, write: Callable[[Any], None], options: dict[str, Any]) -> Any:
    try:
        dumper: Any = _Pickler(names, **options)
        write(dumper)
    except (RecursionError, DumpError):
        raise
    except Exception as error:
        try:
            dumper = dill_pickler()(names, **options)
            write(dumper)
        except Exception as second:
            raise second from error
    return dumper


def facts_of(functions: list[Any]) -> list[Any]:
    """All that functions refer to: if each is the very same later, nothing has changed that is no value by itself."""
    found: list[Any] = []
    for function in functions:
        code = function.__code__
        found += [code, function.__defaults__, function.__name__, function.__qualname__, function.__module__,
                  function.__doc__, *map(function.__globals__.get, global_names(code), repeat(MISSING))]
        for table in (function.__kwdefaults__, function.__dict__):
            found += [*table, *table.values()] if table else ()
        for cell in function.__closure__ or ():
            found += cell_content(cell)
    return found


def way_to(names: Names, value: Any) -> str:
    """Where in a value the thing is that cannot be dumped; nothing if it is the value itself."""
    way, owner = "", value
    for _ in range(DEEPEST):
        failing = (each for each in _children(value).items() if not _can_dump(names, each[1]))
        step, child = next(failing, ("", None))
        if not step:
            break
        way, owner, value = way + step, value, child
    return f"its {way}, held by an object of type {type(owner).__qualname__}: " if way else ""


def _can_dump(names: Names, value: Any) -> bool:
    try:
        dumped(names, methodcaller("dump", value), shares=False)
    except Exception:
        return False
    return True


def _children(value: Any) -> dict[str, Any]:
    """What a value holds, by the way to it."""
    if isinstance(value, MethodType):
        return {".__self__": value.__self__}
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {f"[{key!r:.40}]": child for key, child in islice(pairs, WIDEST)}
    return {f".{name}": child for name, child in getattr(value, "__dict__", {}).items()}


def _state(item: Any) -> Any:
    """The content of an item and of what it holds. A class does not count: it is changed in its place."""
    return item.digest, [each.version for each in item.refs if each.kind != "class"]


def _digest(dumper: Any) -> bytes:
    digest = hashlib.sha256(dumper.file.getbuffer())
    for view in dumper.views:
        digest.update(view)
    for entry in dumper.refs:
        digest.update(entry.token)
    return digest.digest()[:DIGEST_BYTES]


def _rank(item: Any) -> tuple[int, int]:
    """Where an item is made: behind what it is made of."""
    return ("space", "cell", "function", "class").index(item.kind), _depth(item.thing)


def _depth(thing: Any) -> int:
    if not is_class(thing) or thing is type or not travels_by_value(thing):
        return 0
    return 1 + max(map(_depth, (type(thing), *thing.__bases__)))
