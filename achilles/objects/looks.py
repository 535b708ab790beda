"""What things refer to, and whether they have changed: each is pickled by itself, cut at what else has a token.

Knows names, parts and the hooks of byvalue.py. Knows neither letters nor the order of what they bring.

Content is pickled only to be looked at: its hash is the digest of the entry, and every entry or global that the pickler
meets in it is noted. Two pickles of unchanged content are the same bytes, for the same tokens stand in them.

Threads: all callers have the context's lock, but for `dump_value`.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib
import io
import pickle
import re
from collections.abc import Callable
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

from ..errors import DumpError, VersionError
from .byvalue import DEFINE, LOOK, PICKLE, VALUE, Reducer
from .loading import PIDS
from .names import ATOMS, Entry, Names, Place, Slot, is_class, is_stream, travels_by_value
from .parts import is_global, needs_of, parts_of

__all__ = ["Buffers", "Item", "Looks", "is_atomic"]

OUT_OF_BAND_BYTES = 16_384  # below, a copy costs less than the parts and a letter kept alive by it
DIGEST_BYTES = 16  # 2**64 contents before two are likely to be equal
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

    def __init__(
        self, looks: Looks, mode: int, entry: Entry | None, shared: bool, only: set[bytes] | None
    ) -> None:
        self.names, self.carries = looks.names, looks.carries
        self.mode, self.entry = mode, entry
        self.pids = self.names.pids if mode == LOOK or shared else dict(PIDS)
        if only is not None:
            self.pids = {key: pid for key, pid in self.pids.copy().items() if type(pid) is not bytes or pid in only}
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


class Looks:
    """What the things of one context refer to.

    :param carries: whether letters bring what a process (16 bytes) has made, or only name it.
    """

    def __init__(self, names: Names, carries: Callable[[bytes], bool]) -> None:
        self.names, self.carries = names, carries
        names.pids.update(PIDS)
        self._items: dict[Entry, list[Item]] = {}  # of this job

    def __len__(self) -> int:
        return len(self._items)

    def refresh(self) -> None:
        """Look anew at all content."""
        self._items.clear()

    def dump_value(self, value: Any, shared: bool) -> Any:
        """Pickle a value; `roots` of the result are the things that definitions must bring.

        :param shared: whether things with tokens are the same on the other side, not copies.
        """
        return self.dumped(VALUE, value, shared=shared)

    def way_to(self, value: Any) -> str:
        """Where in a value the thing is that cannot be dumped; nothing if it is the value itself."""
        way, owner = "", value
        for _ in range(DEEPEST):
            found = next(((step, child) for step, child in _children(value) if not self._can_dump(child)), None)
            if found is None:
                break
            way, owner, value = way + found[0], value, found[1]
        return f"its {way}, held by an object of type {type(owner).__qualname__}: " if way else ""

    def settle(self, entries: list[Entry]) -> None:
        """Give entries other versions, if their content or that of what they hold has changed."""
        held = {entry: self._held_by(entry) for entry in entries}
        holders: dict[Entry, list[Entry]] = {}
        for entry in entries:
            for each in held[entry]:
                holders.setdefault(each, []).append(entry)
        pending = [entry for entry in entries if entry.state != _state(entry, held[entry])]
        changed: set[Entry] = set()
        while pending:
            entry = pending.pop()
            if entry not in changed:
                changed.add(entry)
                entry.version = next(self.names.numbers)
                pending += holders.get(entry, ())
        for entry in entries:
            entry.state = _state(entry, held[entry])

    def _held_by(self, entry: Entry) -> list[Entry]:
        """The entries whose content counts as that of this one. A class does not: it is changed in its place."""
        return [each for each in self._items.get(entry, ()) if isinstance(each, Entry) and not is_class(each.thing)
                and (each.token in entry.known or not each.is_value)]

    def hold(self, value: Any, place: Place | None, is_named: bool = True) -> Entry | None:
        """The entry of a value that something holds; None for what needs no name.

        :param is_named: whether letters say the token of the holder.
        """
        if is_class(value) or type(value) is FunctionType:
            if not travels_by_value(value):
                return None
        elif isinstance(value, (ModuleType, BuiltinFunctionType, enum.Enum)) or is_atomic(value) or is_stream(value):
            return None
        elif type(self.names.pids.get(id(value))) is tuple:  # the globals of a script
            return None
        entry = self.names.name(value)
        entry.place = place or entry.place
        entry.named = entry.named or is_named
        return entry

    def look(self, entry: Entry) -> list[Item]:
        """What an entry needs; its digest is right then."""
        if entry not in self._items:
            thing = entry.thing
            is_function = type(thing) is FunctionType
            entry.named = entry.named or (is_function and is_global(thing))
            content = thing if entry.is_value else parts_of(self.names, entry)
            needs = needs_of(thing, self.names.space_of(thing.__globals__)) if is_function else []
            held = self._held(entry, content)
            kept = self._hold_all(entry, held, needs)
            try:
                dumper = self.dumped(LOOK, content, entry)
                if dumper.fresh:  # from now on a token stands where that value stood
                    dumper = self.dumped(LOOK, content, entry)
                self._take_digest(entry, content, dumper)
            except VersionError:
                raise
            except Exception as error:
                raise self._named_error(error, entry, held) from error
            entry.holds = [*dumper.refs, *kept]
            self._items[entry] = [*dumper.refs, *needs]
        return self._items[entry]

    def _take_digest(self, entry: Entry, content: Any, dumper: Any) -> None:
        """The digest of content; the old one, if parts have tokens now that had none, and nothing else has changed."""
        tokens = {ref.token for ref in dumper.refs if isinstance(ref, Entry) and ref.is_value}
        digest = _digest(dumper)
        if entry.digest and digest != entry.digest and not tokens <= entry.known:
            if _digest(self.dumped(LOOK, content, entry, only=entry.known)) == entry.digest:
                return
        entry.digest, entry.known = digest, tokens

    def _hold_all(self, entry: Entry, held: list[Held], needs: list[Any]) -> list[Any]:
        """The entries of what a function, class or cell holds, and of the globals that it needs."""
        owner = entry.owner and entry.owner() if type(entry.thing) is CellType else entry.thing
        found = [self.hold(value, place, entry.named) for value, place in held]
        for each in found:
            if each is not None:
                each.belong(owner)
        for need in needs:
            if isinstance(need, tuple):
                found.append(self.hold(need[0].value(need[1]), ("global", need[1], owner.__qualname__)))
                if found[-1] is not None:
                    found[-1].anchor()
        return found

    def _held(self, entry: Entry, content: Any) -> list[Held]:
        """The values that a function, class or cell holds, and where."""
        thing = entry.thing
        if entry.is_value:
            return []
        if type(thing) is CellType:
            return [(value, entry.place) for value in content[1]]
        found: list[tuple[str, str, Any]] = []
        if type(thing) is FunctionType:
            code, (attributes, own) = thing.__code__, content[1]
            defaults = attributes.get("__defaults__", ())
            optional = code.co_varnames[code.co_argcount - len(defaults) :]
            found += [("default", *each) for each in zip(optional, defaults)]
            found += [("default", *each) for each in attributes.get("__kwdefaults__", {}).items()]
            found += [("variable", *each) for each in zip(code.co_freevars, thing.__closure__ or ())]
            found += [("attribute", *each) for each in own.items()]
        elif not isinstance(thing, enum.EnumMeta):  # whose tables need its members at once
            found += [("attribute", *each) for each in content[1][1].items()]
        return [(value, (kind, each, thing.__qualname__)) for kind, each, value in found]

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

    def dumped(
        self, mode: int, value: Any, entry: Entry | None = None, shared: bool = False, only: set[bytes] | None = None
    ) -> Any:
        """Dump by the fast way, or by the slow one.

        :param only: the tokens that may stand in content; all by default.
        """
        try:
            dumper: Any = _Pickler(self, mode, entry, shared, only)
            dumper.dump(value)
        except (RecursionError, DumpError):
            raise
        except Exception as error:
            try:
                dumper = _dill_pickler()(self, mode, entry, shared, only)
                dumper.dump(value)
            except Exception as second:
                raise second from error
        return dumper


def _state(entry: Entry, held: list[Entry]) -> Any:
    return entry.digest, {each.token: each.version for each in held}


def _digest(dumper: Any) -> bytes:
    digest = hashlib.sha256(dumper.file.getbuffer())
    for view in dumper.buffers.views:
        digest.update(view)
    return digest.digest()[:DIGEST_BYTES]


def _children(value: Any) -> list[tuple[str, Any]]:
    """What a value holds, and how it is reached."""
    if isinstance(value, dict):
        return [(f"[{key!r:.40}]", child) for key, child in list(value.items())[:WIDEST]]
    if isinstance(value, (list, tuple)):
        return [(f"[{index}]", child) for index, child in enumerate(value[:WIDEST])]
    if isinstance(value, MethodType):
        return [(".__self__", value.__self__)]
    try:
        return [(f".{name}", child) for name, child in vars(value).items()]
    except Exception:  # of no dict, or by a `__getattr__` of its own
        return []


def is_atomic(value: Any) -> bool:
    """Whether a value is a constant, or a tuple of constants."""
    kind = type(value)
    return kind in ATOMS or (kind in (tuple, frozenset) and all(type(each) in ATOMS for each in value))
