"""Gives tokens to things, so that a thing is one thing in every letter of a context.

Knows identity, modules, and the names that code reads. Knows no pickles, letters or references between things.

An *entry* is a thing with a token: 16 bytes of the process that named the thing, and 8 of its number there. That
process resolves the token to its own thing. An entry's *version* is a number that changes with its content.

A *space* is the entry of a module's globals dict. All functions of a space share one dict on the other side. A *slot*
is a global in it.

Threads: the lock guards all entries, and the context's tables.

Limits: an entry of a thing with weak references lives with the thing, among the last OWNED_KEPT entries. The entry of a
list or cell holds it, and lives as long as the entries that refer to it. Spaces of scripts live for ever. The last KEPT
other spaces and things of functions or initializers stay without use.
"""

from __future__ import annotations

import dis
import functools
import itertools
import os
import sys
import threading
import weakref
from collections import OrderedDict, deque
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any

__all__ = ["ATOMS", "GLOBAL_LOADS", "KEPT", "MAINS", "MISSING", "REMEMBERED", "STREAMS", "UNFOUND", "Entry",
           "Module", "Names", "Slot", "Space", "builtin_base", "by_import", "by_path", "codes_of", "global_names",
           "importable", "is_class", "is_global", "is_stream", "resolved", "slots_of", "submodules_of",
           "travels_by_value"]

ATOMS = frozenset({int, float, complex, str, bytes, bool, type(None), type(...), type(NotImplemented)})
KINDS = {FunctionType: "function", CellType: "cell"}  # else a class or a value
MAINS = ("__main__", "__mp_main__")  # the second is the name in a child that multiprocessing spawned
MISSING: Any = object()  # no value, where None is a value
STREAMS = ("stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__")  # each process has its own
KEPT = 64  # in a table: spaces and things without use, letters of definitions, compared functions
OWNED_KEPT = 4096  # entries; beyond, the least lately used is dropped: a class's own list may hold the class
REMEMBERED = 1024  # modules, and code objects with their global names: each look takes about 50 us
GLOBAL_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")  # instructions (dis)
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class statement made the class, or similar C code
# Names in a pickle that are missing or different elsewhere. A connection's copy would close the original.
UNFOUND = {b"_main__", b"multiprocessing.connection", b"multiprocess.connection"}


class Entry:
    """A thing with a token.

    :ivar named: whether letters say the token. Functions that are no globals, and lists that only they hold, are not
        named: a lambda that is made again has the same letter.
    :ivar state: the content at the last dump: its digest with the tokens in it, and their versions.
    :ivar facts: the objects that a function referred to, just before the dump.
    :ivar refs: the entries in the content, and a function's globals: they live as long as this entry.
    :ivar place: of the thing, for errors: ("global", "log", "work") is the global log of function work.
    :ivar is_one: whether arguments, too, refer to the thing, and bring no copy.
    """

    def __init__(self, names: Names, token: bytes, thing: Any) -> None:
        self.names, self.token, self.key = names, token, id(thing)
        self.kind = "class" if is_class(thing) else KINDS.get(type(thing), "value")
        self.version, self.state, self.facts, self.is_one = 0, None, None, False
        self.refs: list[Entry] = []
        self.place: tuple[str, str, str] | None = None
        self.is_weak = bool(type(thing).__weakrefoffset__)
        self._ref: Any = (
            weakref.ref(thing, functools.partial(names.owned.pop, self.key)) if self.is_weak else (lambda: thing))
        self.named = self.is_weak and (self.kind != "function" or is_global(thing))

    @property
    def thing(self) -> Any:
        """The thing; None after its end."""
        return self._ref()


class Space(Entry):
    """The entry of a globals dict.

    :ivar module: the module of the dict, if loading gave it.
    :ivar is_imported: whether an import gives the module.
    """

    def __init__(self, names: Names, token: bytes, thing: dict[str, Any]) -> None:
        super().__init__(names, token, thing)
        self.kind, self.name = "space", str(thing.get("__name__") or MAINS[0])
        self.module: ModuleType | None = None
        self.slots: dict[str, Slot] = {}
        self.is_imported = (self.name not in MAINS and self.name in sys.modules and importable(self.name)
                            and vars(sys.modules[self.name]) is thing)
        self.named = not self.is_imported
        (names.scripts if self.name in MAINS else names.recent).append(self)

    def slot(self, name: str) -> Slot:
        """The entry of a global."""
        return self.slots.setdefault(name, Slot(self, name))


class Slot(Entry):
    """A global."""

    def __init__(self, space: Space, name: str) -> None:
        super().__init__(space.names, space.token, name)
        self.kind, self.named, self.space, self.name = "slot", space.named, space, name

    @property
    def thing(self) -> Any:
        """The value of the global."""
        return resolved(self.space.thing[self.name])


class Module(ModuleType):
    """A module that no import gives. `multiprocessing` starts children from its file, if the file is here."""

    __spec__ = property(lambda self: None)

    @property
    def __file__(self) -> Any:  # type: ignore[override]
        path = vars(self).get("__file__", "")
        return path if os.path.exists(path) else None


class Names:
    """The entries of a context.

    :ivar lock: the context's. Dumping arguments and results takes it only to give a token.
    :ivar ids: of things with entries; picklers look here for each object.
    :ivar owned: by the id of a thing: entries that live as long as their things.
    :ivar scripts: the spaces of scripts and notebooks, the oldest first; `recent`: the latest other spaces.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.process = os.urandom(16)
        self.values = 0  # with a token
        self.changes = 0  # of versions, after the first
        self.numbers = itertools.count(1)  # of tokens and versions alike
        self.owned: OrderedDict[int, Entry] = OrderedDict()
        self.scripts: list[Space] = []
        self.recent: deque[Any] = deque(maxlen=KEPT)
        self._entries: weakref.WeakValueDictionary[bytes, Entry] = weakref.WeakValueDictionary()
        self._by_id: weakref.WeakValueDictionary[int, Entry] = weakref.WeakValueDictionary()
        self.ids: dict[int, Any] = self._by_id.data  # type: ignore[attr-defined]

    def of_token(self, token: Any) -> tuple[Any, Any]:
        """The entry of a token, and its thing, which nobody else may hold; None for both if the thing is not here."""
        entry: Any = self._entries.get(token)
        thing = entry and entry.thing
        return (None, None) if thing is None else (self.own(entry), thing)

    def find(self, thing: Any) -> Any:
        """The entry of a thing; None if it has none."""
        entry = self._by_id.get(id(thing))
        return entry if entry is not None and entry.thing is thing else None

    def name(self, thing: Any, token: bytes = b"", kind: type[Entry] = Entry) -> Any:
        """The entry of a thing, made at need.

        :param token: of a thing that came by letter.  :param kind: Space for a globals dict.
        """
        with self.lock:
            entry = self.find(thing)
            if entry is None:
                entry = kind(self, token or self.process + next(self.numbers).to_bytes(8, "big"), thing)
                self._by_id[entry.key] = self._entries[entry.token] = self.own(entry)
                self.values += entry.kind == "value"
            return entry

    def own(self, entry: Entry) -> Entry:
        """Let an entry that letters name live with its thing."""
        if entry.named and entry.is_weak:
            self.owned.pop(entry.key, None)
            self.owned[entry.key] = entry
            if len(self.owned) > OWNED_KEPT:
                self.owned.popitem(last=False)  # at once: a thing may die, in any thread, between two steps
        return entry

    def hold(self, value: Any, place: tuple[str, str, str] | None, is_named: bool = True) -> Entry | None:
        """The entry of a value that a thing holds; None for a value that needs no name.

        :param is_named: whether letters say the holder's token.
        """
        if by_import(value) or is_stream(value):
            return None
        entry: Entry = value if isinstance(value, Slot) else self.name(value)
        entry.place = place or entry.place
        entry.named = entry.named or is_named
        return self.own(entry)


def resolved(value: Any) -> Any:
    """The value of a global. A lazy import (Python 3.15) happens now."""
    return value.resolve() if type(value).__name__ == "lazy_import" else value


def is_class(thing: Any) -> bool:
    """Whether this is a class, by its type, not its `__class__`."""
    return issubclass(type(thing), type)


@functools.lru_cache(REMEMBERED)
def importable(name: str) -> bool:
    """Whether an import gives a module of `sys.modules`: a file can be loaded under any name."""
    spec = getattr(sys.modules[name], "__spec__", None)
    is_file = "." not in name and spec is not None and spec.has_location
    is_found = not is_file or any(
        finder.find_spec(name, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    if not is_found:
        UNFOUND.add(name.encode())
    return is_found


def travels_by_value(thing: Any) -> bool:
    """Whether an import on another machine does not find this function, class or cache."""
    if is_class(thing) and is_c_type(thing):
        return False
    module = getattr(thing, "__module__", None)
    if module in MAINS or module not in sys.modules or not importable(module):
        return True
    name = getattr(thing, "__qualname__", "") or getattr(thing, "__name__", "")
    return by_path(sys.modules[module], name) is not thing


def by_import(value: Any) -> bool:
    """Whether a value is a constant, or an import gives it."""
    if isinstance(value, ModuleType):
        return sys.modules.get(value.__name__) is value and importable(value.__name__)
    if is_class(value) or type(value) in (FunctionType, BuiltinFunctionType):
        return not travels_by_value(value)
    return type(value) in ATOMS or (type(value) in (tuple, frozenset) and all(type(each) in ATOMS for each in value))


def is_stream(thing: Any) -> bool:
    """Whether this is a stream of the process, by identity."""
    return any(thing is getattr(sys, name, None) for name in STREAMS)


def is_global(function: FunctionType) -> bool:
    """Whether a function's module has it under its name."""
    first, _, rest = function.__qualname__.partition(".")
    found = function.__globals__.get(first, MISSING)
    return (by_path(found, rest) if rest else found) is function


def by_path(found: Any, path: str) -> Any:
    """The object at a dotted path; MISSING if there is none."""
    for name in path.split("."):
        found = getattr(found, name, MISSING)
    return found


def is_c_type(cls: type) -> bool:
    """Whether a class is static C, with a dict that nobody can fill."""
    return not cls.__flags__ & HEAP_TYPE


def builtin_base(cls: type) -> Any:
    """The first class in the order of resolution that is, or has a `__new__`, written in C."""
    return next(base for base in cls.__mro__
                if is_c_type(base) or isinstance(vars(base).get("__new__"), BuiltinFunctionType))


def slots_of(function: FunctionType, names: Any) -> dict[str, Any]:
    """The globals of a function that no import gives: pytest writes non-identifiers into an imported module."""
    space = names.name(function.__globals__, kind=Space)
    found = [name for name in global_names(function.__code__)
             if name in space.thing and name not in ("__name__", "__builtins__")]
    return {name: space.slot(name) for name in found if not (space.is_imported and name.isidentifier())}


def submodules_of(code: CodeType, packages: list[str]) -> list[str]:
    """The names of the submodules that code reaches through packages."""
    lazy = " ".join(["", *getattr(sys, "lazy_modules", ())])  # Python 3.15
    attributes = sorted({name for each in codes_of(code) for name in each.co_names}) if packages else []
    for package in packages:  # grows while it is walked
        names = (f"{package}.{each}" for each in attributes)
        packages += [name for name in names if name in sys.modules or f" {name}" in lazy]
    return [name for name in packages if "." in name]


def codes_of(code: CodeType) -> list[CodeType]:
    """A code object and its nested code objects."""
    found = [code]
    for each in found:  # grows while it is walked
        found += [constant for constant in each.co_consts if isinstance(constant, CodeType)]
    return found


@functools.lru_cache(REMEMBERED)
def global_names(code: CodeType) -> tuple[str, ...]:
    """The names that a code object, or its nested code objects, read as globals."""
    names = [step.argval for each in codes_of(code) for step in dis.get_instructions(each)
             if step.opname in GLOBAL_LOADS]
    return tuple(dict.fromkeys(names))
