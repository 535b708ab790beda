"""Gives tokens to things, so that a thing is one thing in every letter of a context.

Knows identity and modules. Knows neither pickles nor letters: what refers to what is definitions.py's.

An *entry* is a thing with a token: 16 bytes of the process that named it, and 8 of its number there. That process
resolves the token to its own thing. The *version* of an entry is a number that changes when its content does.

A *space* is the globals dict of a module that no import gives: ``__main__``, or a module loaded by its path. All
functions of one space share one dict on the other side.

Threads: the context's lock guards all of this. Limits: an entry holds its thing by a weak reference, where the type
allows one. A list or cell is looked up in the function or class that has it; a list that a global has is held by its
entry. Spaces of scripts are kept for ever. Of the other unused spaces the last SPACES_KEPT are kept.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import itertools
import os
import sys
import weakref
from collections import deque
from types import CellType, FunctionType, ModuleType
from typing import Any

__all__ = ["ATOMS", "MAINS", "MISSING", "STREAMS", "UNFOUND", "Entry", "Key", "Names", "Pid", "Place", "Slot", "Space",
           "by_path", "importable", "is_class", "is_stream", "travels_by_value"]

Key = tuple[bytes, str, int]  # of a space: its process, the name of its module, its number
Pid = str | bytes | Key  # what a pickle says in place of a maker, a thing with a token, the globals of a script
Slot = tuple["Space", str]  # a global
Place = tuple[str, str, str]  # what holds a value: ("global", "log", "work") is the global log of the function work

ATOMS = frozenset({int, float, complex, str, bytes, bool, type(None), type(...), type(NotImplemented)})
MAINS = ("__main__", "__mp_main__")  # the second is what multiprocessing calls it in a spawned child
MISSING = object()  # no value, where None is one
GLOBAL = object()  # the owner of what a global has
STREAMS = ("stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__")  # each process has its own
SPACES_KEPT = 64
MODULES_REMEMBERED = 1024
# Names in a pickle that are not there, or something else, elsewhere. A copy of a connection would close the original.
UNFOUND = {b"_main__", b"multiprocessing.connection", b"multiprocess.connection"}


class Entry:
    """One thing with a token.

    :ivar is_value: whether it is no class, function or cell.
    :ivar named: whether letters say the token. Letters do not say the token of a function that is no global, nor those
        of lists that it alone holds. So a lambda that is made again and again has the same letter each time.
    :ivar version: of the content here; `digest`: of the content as it was dumped last; `state`: that of all
        that the content holds, too.
    :ivar known: tokens that stood in the content when the digest was taken.
    :ivar holds: what must live as long as this entry.
    :ivar came: the attributes of a class as they came by letter; `brought`: the names of those that came last.
    :ivar place: where the thing was found, for errors.
    """

    def __init__(self, names: Names, token: bytes, thing: Any) -> None:
        self.names, self.token = names, token
        self.key = id(thing)
        self.is_value = not (is_class(thing) or type(thing) in (FunctionType, CellType))
        try:
            self._ref: Any = weakref.ref(thing, functools.partial(names.owned.pop, self.key))
        except TypeError:
            self._ref = lambda: thing
        self.is_weak = isinstance(self._ref, weakref.ref)
        self.named = self.is_weak and type(thing) is not FunctionType
        self.version, self.digest = 0, b""
        self.known: set[bytes] = set()
        self.owner: Any = None
        self.owners: list[weakref.ref[Any]] = []
        self.state: Any = None
        self.holds: list[Any] = []
        self.came: dict[str, Any] = {}
        self.brought: set[str] = set()
        self.place: Place | None = None

    @property
    def thing(self) -> Any:
        """The thing; None if it has ended."""
        return self._ref()

    @property
    def label(self) -> tuple[bytes, int]:
        """The token and the version that a letter says."""
        return (self.token, self.version) if self.named else (b"", 0)

    def belong(self, owner: Any) -> None:
        """Hold a list, a cell or the like only as long as the function or class that has it does: it may refer back."""
        if self.is_weak or owner is None or self.owner is GLOBAL:
            return
        one = weakref.ref(owner)
        if _search(one, self.key) is not None:  # else it is deeper inside
            self.owner = one
            self.owners = [each for each in self.owners if each() is not None and each() is not owner] + [one]
            self._ref = functools.partial(_search_all, self.owners, self.key)

    def anchor(self) -> None:
        """Hold the thing, since a global has it, too."""
        if not self.is_weak:
            thing, self.owner = self.thing, GLOBAL
            self._ref = lambda: thing

    def __del__(self) -> None:
        if self.names.pids.get(self.key) == self.token:  # else another thing is at this address
            del self.names.pids[self.key]


class Space:
    """One globals dict.

    :ivar module: what has the dict, if it was made here.
    :ivar came: the version of each global that came by letter, and what must live as long as the global.
    :ivar sent: each global as it was dumped last: its value or entry, the version of the entry, and its own version.
    """

    def __init__(self, key: Key, names: dict[str, Any] | None = None) -> None:
        self.key = key
        self.module: ModuleType | None = None
        if names is None:
            self.module = _Main(key[1]) if key[1] in MAINS else ModuleType(key[1])
            names = vars(self.module)
            names["__builtins__"] = builtins
        self.names = names
        self.came: dict[str, tuple[int, Any]] = {}
        self.sent: dict[str, tuple[Any, int, int]] = {}

    def value(self, name: str) -> Any:
        """The value of a global. A lazy import (Python 3.15) happens now."""
        value = self.names[name]
        return value.resolve() if type(value).__name__ == "lazy_import" else value

    def bring(self, name: str, version: int, value: Any, holds: Any) -> None:
        """Set a global, unless it came in this version before or running code has set it."""
        known, _ = self.came.get(name, (version, None))
        if name not in self.names or known != version:
            self.names[name] = value
        self.came[name] = version, holds


class _Main(ModuleType):
    """``__main__`` in a worker. `multiprocessing` starts children from its file, if that is on this machine."""

    __spec__ = property(lambda self: None)

    @property
    def __file__(self) -> str:  # type: ignore[override]
        path = str(vars(self)["__file__"])
        if not os.path.exists(path):
            raise AttributeError("the file of the caller's script is not on this machine")
        return path


class Names:
    """The entries and spaces of one context.

    :ivar pids: the token of each entry by the id of its thing, where picklers look for each object.
    :ivar owned: entries that live as long as their things, by the ids of these.
    :ivar scripts: the spaces of scripts and notebooks, the first one first.
    """

    def __init__(self) -> None:
        self.process = os.urandom(16)
        self.numbers = itertools.count(1)  # of tokens, spaces and versions alike
        self.pids: dict[int, Pid] = {}
        self.owned: dict[int, Entry] = {}
        self.scripts: list[Space] = []
        self._entries: weakref.WeakValueDictionary[Any, Entry] = weakref.WeakValueDictionary()
        self._spaces: weakref.WeakValueDictionary[Any, Space] = weakref.WeakValueDictionary()  # by key, and by id
        self._recent: deque[Space] = deque(maxlen=SPACES_KEPT)

    def of_token(self, token: Any) -> Entry | None:
        """The entry of a token, if its thing is here."""
        entry = self._entries.get(token)
        return None if entry is None or entry.thing is None else entry

    def find(self, thing: Any) -> Entry | None:
        """The entry of a thing, if it has one."""
        entry = self._entries.get(self.pids.get(id(thing)))
        return entry if entry is not None and entry.thing is thing else None

    def name(self, thing: Any, token: bytes = b"") -> Entry:
        """The entry of a thing, made at need.

        :param token: under which the thing came by letter.
        """
        entry = self.find(thing)
        if entry is None:
            entry = Entry(self, token or self.process + next(self.numbers).to_bytes(8, "big"), thing)
            self.pids[entry.key], self._entries[entry.token] = entry.token, entry
            if entry.is_weak:
                self.owned[entry.key] = entry
        return entry

    def space_of(self, names: dict[str, Any]) -> Space | str:
        """The space of a globals dict; the name of its module, where an import gives it."""
        space = self._spaces.get(id(names))
        if space is None or space.names is not names:
            name = str(names.get("__name__") or MAINS[0])
            if name not in MAINS and importable(name) and getattr(sys.modules[name], "__dict__", None) is names:
                return name
            space = self._add(Space((self.process, name, next(self.numbers)), names))
        return space

    def space(self, key: Key) -> Space:
        """The space of a key, made at need."""
        return self._spaces.get(key) or self._add(Space(key))

    def _add(self, space: Space) -> Space:
        self._spaces[space.key] = self._spaces[id(space.names)] = space
        if space.key[1] in MAINS:
            self.scripts.append(space)
            self.pids[id(space.names)] = space.key
        else:
            self._recent.append(space)
        return space


def is_class(thing: Any) -> bool:
    """Whether this is a class, whatever its `__class__` says."""
    return issubclass(type(thing), type)


def _search_all(owners: list[weakref.ref[Any]], key: int) -> Any:
    found = (_search(owner, key) for owner in owners)
    return next((thing for thing in found if thing is not None), None)


def _search(owner: weakref.ref[Any], key: int) -> Any:
    """Of what a function or class has, the thing with this id; None if it has it no more."""
    held: Any = owner()
    if type(held) is not FunctionType:
        values = [] if held is None else vars(held).values()
        return next((value for value in values if id(value) == key), None)
    found = [*(held.__defaults__ or ()), *(held.__kwdefaults__ or {}).values(), *vars(held).values()]
    for cell in held.__closure__ or ():
        found.append(cell)
        with contextlib.suppress(ValueError):  # an empty one
            found.append(cell.cell_contents)
    return next((value for value in found if id(value) == key), None)


def importable(name: str) -> bool:
    """Whether an import gives this module, and not only `sys.modules`, where a file can be put under any name."""
    return name in sys.modules and _found(name)


@functools.lru_cache(MODULES_REMEMBERED)
def _found(name: str) -> bool:
    spec = getattr(sys.modules[name], "__spec__", None)
    if "." in name or spec is None or not spec.has_location:
        return True
    finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
    if any(find and find(name, None) for find in finders):
        return True
    UNFOUND.add(name.encode())
    return False


def travels_by_value(thing: Any) -> bool:
    """Whether an import on another machine would not find this function, class or cache."""
    module = getattr(thing, "__module__", None)
    if module is None or module in MAINS or not importable(module):
        return True
    return by_path(sys.modules[module], getattr(thing, "__qualname__", "")) is not thing


def is_stream(thing: Any) -> bool:
    """Whether this is a stream of the process, by identity."""
    return any(thing is getattr(sys, name, None) for name in STREAMS)


def by_path(found: Any, path: str) -> Any:
    """What a dotted path leads to; MISSING where it leads nowhere."""
    for name in path.split("."):
        found = getattr(found, name, MISSING)
    return found
