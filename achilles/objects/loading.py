"""How functions, classes and values are put together again: the makers that a by-value pickle calls.

Knows names.py and parts.py. A pickle names a maker by a persistent id, never by an import path: the package has another
name elsewhere. One thread uses a Loader. That thread has the context's lock while it loads definitions.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import importlib.machinery
import io
import marshal
import os
import pickle
import weakref
from collections.abc import Iterable
from types import CellType, FunctionType, MappingProxyType, MethodType
from typing import Any

from .names import Entry, Key, Names, Pid
from .parts import builtin_base, drop_attributes, is_c_type, make_class, make_members, remember, set_attributes

__all__ = ["MAKERS", "SENTINEL", "Buffer", "Loader", "PIDS"]

Buffer = bytes | bytearray | memoryview
SENTINEL: Any = getattr(builtins, "sentinel", None)  # Python 3.15


class Loader(pickle.Unpickler):
    """Loads one by-value pickle; its public methods but for `persistent_load` are makers.

    :param data: the pickle; only ever one whose digest or tag was checked.
    :param buffers: what travelled out of band.
    :param roots: what the letter's definitions made.
    """

    def __init__(self, names: Names, data: Buffer, buffers: Iterable[Any] = (), roots: Iterable[Any] = ()) -> None:
        super().__init__(io.BytesIO(data), buffers=buffers)
        self.names = names
        self.roots = list(roots)
        self.alive: list[Entry] = []  # until what holds them is filled
        self.met: list[Any] = []  # to be held by what is filled next
        self.code: dict[Entry, set[str]] = {}  # the names of functions and constants of each class
        self.kept: set[int] = set()  # ids of functions, classes and cells that were here in the same version

    def persistent_load(self, pid: Pid) -> Any:
        """Answer a maker's name with the maker, a token with its thing, a key with the globals of a script."""
        if isinstance(pid, str):
            return MAKERS.get(pid) or getattr(self, pid)
        return self.refer(pid) if isinstance(pid, bytes) else self.names.space(pid).names

    def refer(self, token: bytes) -> Any:
        """A thing with a token that is here already."""
        entry = self.names.of_token(token)
        if entry is None:
            raise pickle.UnpicklingError("a class or function is not known here any more; dump its instance again")
        self.met.append(entry)
        return entry.thing

    def root(self, index: int) -> Any:
        """A thing that the letter's definitions made."""
        return self.roots[index]

    def open_space(self, key: Key, attributes: dict[str, Any], spec: tuple[str, str | None] | None) -> None:
        """A module's dict, with what an import would have set."""
        names = self.names.space(key).names
        names.update({name: value for name, value in attributes.items() if names.get(name) is None})
        if spec is not None and names.get("__spec__") is None:
            names["__spec__"] = made = importlib.machinery.ModuleSpec(spec[0], None, origin=spec[1])
            made.has_location = spec[1] is not None

    def module(self, key: Key) -> Any:
        """A module that no import gives."""
        return self.names.space(key).module

    def bring(self, key: Any, name: str, version: int, value: Any) -> None:
        """Set a global."""
        if isinstance(key, str):
            vars(importlib.import_module(key)).setdefault(name, value)
        else:
            met = self._met()
            for each in met:
                if isinstance(each, Entry):
                    each.anchor()
            self.names.space(key).bring(name, version, value, met)

    def keep(self, token: bytes, version: int, value: Any) -> Any:
        """A value: the one of this token that is here in this version, or the one that came."""
        met = self._met()
        known = self._known(token, version)
        return self._named(value, token, version, met) if known is None else known

    def make_function(self, token: bytes, version: int, key: Any, code: bytes, titles: tuple[Any, ...],
                      cells: Any) -> Any:
        """A function in its shared globals, yet without attributes."""
        if (known := self._known(token, version)) is not None:
            return known
        space = None if isinstance(key, str) else self.names.space(key)
        names = vars(importlib.import_module(key)) if space is None else space.names
        function = FunctionType(marshal.loads(code), names, titles[0], None, cells)
        function.__qualname__, function.__module__, function.__doc__ = titles[1:]
        self._named(function, token, version, [space])
        return self._held(function, list(map(self.names.find, cells or ())))

    def fill_function(self, function: FunctionType, attributes: dict[str, Any], own: dict[str, Any]) -> None:
        """Give a function its attributes."""
        met = self._met()
        if id(function) not in self.kept:
            for name, value in attributes.items():
                setattr(function, name, value)
            function.__dict__.update(own)
            self._held(function, met)

    def make_cell(self, token: bytes, version: int) -> Any:
        """An empty cell of a closure."""
        return self._known(token, version) or self._named(CellType(), token, version, [])

    def fill_cell(self, cell: CellType, *contents: Any) -> None:
        """Put the content into a cell, if it has any."""
        met = self._met()
        if id(cell) not in self.kept and contents:
            cell.cell_contents = contents[0]
            entry = self.names.name(cell)
            entry.holds = met
            for each in met:
                if isinstance(each, Entry) and entry.owner is not None:
                    each.belong(entry.owner())

    def fill_now(self, thing: Any, fill: tuple[Any, ...]) -> None:
        """Fill a function or cell that no step fills."""
        (self.fill_cell if isinstance(thing, CellType) else self.fill_function)(thing, *fill)

    def make_class(self, token: bytes, version: int, meta: Any, name: str, bases: tuple[type, ...],
                   namespace: dict[str, Any], code: dict[str, Any]) -> Any:
        """A class with its functions and constants; the one that is here, if there is one."""
        if (known := self._known(token, version)) is not None:
            return known
        entry = self.names.of_token(token)
        if entry is None:
            cls = make_class(meta, name, bases, {**namespace, **code})
            entry = self.names.name(cls, token)
            entry.came = {name: remember(value) for name, value in vars(cls).items()}
        else:
            set_attributes(entry.thing, code, entry.came)
        entry.version = version
        self.code[entry] = set(code)
        return entry.thing

    def fill_class(self, cls: Any, data: dict[str, Any], registered: list[type]) -> None:
        """Give a class all else."""
        entry, met = self.names.name(cls), self._met()
        if id(cls) not in self.kept:
            set_attributes(cls, data, entry.came)
            brought = self.code[entry] | data.keys()
            drop_attributes(cls, entry.brought - brought, entry.came)
            entry.brought, entry.holds = brought, []
            self._held(cls, met)
            for each in registered:
                cls.register(each)

    def fill_members(self, cls: Any, members: dict[str, Any]) -> Any:
        """Give an enum its members, if it was made just now."""
        if "_member_map_" not in vars(cls):
            type.__setattr__(cls, "_member_map_", make_members(cls, members))

    def make_weak(self, kind: Any, content: Any) -> Any:
        """A weak reference, or a collection of them. What it refers to lives as long as what holds it."""
        self.met.append(content)
        return kind(content)

    def _met(self) -> list[Any]:
        met, self.met = self.met, []
        return met

    def _held(self, owner: Any, entries: list[Any]) -> Any:
        """Let entries live as long as the function or class that has their things."""
        self.names.name(owner).holds += entries
        for each in entries:
            if isinstance(each, Entry):
                each.belong(owner)
        return owner

    def _known(self, token: bytes, version: int) -> Any:
        """The thing that is here in this version. The process that made a thing always has the right version."""
        entry = self.names.of_token(token)
        if entry is None or (entry.version != version and token[:16] != self.names.process):
            return None
        self.alive.append(entry)
        self.kept.add(id(entry.thing))
        return entry.thing

    def _named(self, thing: Any, token: bytes, version: int, holds: list[Any]) -> Any:
        """A new thing, under its token if it has one."""
        if token or isinstance(thing, (FunctionType, CellType)):
            entry = self.names.name(thing, token)
            entry.version, entry.holds = version, holds
            self.alive.append(entry)
        return thing


def _make_cache(function: Any, parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _make_exception(cls: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """An exception as its built-in base makes it, since its own `__init__` may take other arguments."""
    base: Any = next(c for c in cls.__mro__ if is_c_type(c))
    error: BaseException = base.__new__(cls, *args)
    base.__init__(error, *args)
    return error


def _make_sentinel(name: str, module: str) -> Any:
    made = SENTINEL(name)
    made.__module__ = module
    return made


def _fill_plain(thing: Any, state: Any) -> None:
    """Give an instance its attributes and items, whatever methods its class has for that."""
    state, items, pairs = state
    attributes, slots = state if isinstance(state, tuple) else (state, {})
    if attributes:
        thing.__dict__.update(attributes)
    for name, value in slots.items():
        object.__setattr__(thing, name, value)
    if items:
        list.extend(thing, items)
    if pairs:
        dict.update(thing, pairs)


def _open_file(path: str, place: tuple[int, int], mode: str, position: int, options: dict[str, Any]) -> Any:
    """A file that was open for reading, at its place; the very same file, or none."""
    file = open(path, mode, **options)
    status = os.fstat(file.fileno())
    if (status.st_dev, status.st_ino) != place:
        file.close()
        raise FileNotFoundError(f"{path}, which a global of the script was reading, is another file here. "
                                "Open it in the function")
    file.seek(position)
    return file


class _Ended:
    """What a dead weak reference referred to."""


MAKERS: dict[str, Any] = {  # those that need no names
    "cache": _make_cache,
    "exception": _make_exception,
    "sentinel": _make_sentinel,
    "fill_plain": _fill_plain,
    "file": _open_file,
    "plain": lambda cls, *arguments: builtin_base(cls).__new__(cls, *arguments),  # whatever the class's `__new__` says
    "member": lambda cls, name: cls._member_map_[name],
    "partialmethod": lambda function, arguments, options: functools.partialmethod(function, *arguments, **options),
    "dead": lambda: weakref.ref(_Ended()),
    "method": MethodType,
    "proxy": MappingProxyType,
}
PIDS: dict[int, Pid] = {
    **{id(maker): name for name, maker in MAKERS.items()},
    **{id(maker): name for name, maker in vars(Loader).items() if isinstance(maker, FunctionType)},
}
