"""The form of a letter, and how functions, classes and values are put together again.

A letter::

    pickle, which begins with 0x80                      plain, without large buffers
    form 1, 2 or 3 | 3 zero | count u32 | length u64    big-endian; 1 plain, 2 by value, 3 by value with definitions
    count lengths u64 | pickle | count buffers          each buffer begins at a multiple of 16 bytes
    of form 3: the first buffer is a letter of form 2, the definitions

Definitions are pickles, one behind the other: a head, what makes each item, and what fills each item.

Knows names.py and parts.py. A pickle names a maker by a persistent id, never by an import path: the package has another
name elsewhere. One thread uses a Loader. That thread has the context's lock while it loads definitions.

Limits: buffers under OUT_OF_BAND_BYTES travel inside the pickle.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import importlib.machinery
import io
import marshal
import os
import pickle
import struct
import weakref
from collections.abc import Iterable, Sequence
from types import CellType, FunctionType, MappingProxyType, MethodType
from typing import Any

from .names import ATOMS, UNFOUND, Names
from .parts import builtin_base, drop_attributes, make_class, remember, set_attributes

__all__ = ["BY_VALUE", "DEFINED", "JOINED_BYTES", "MAKERS", "PICKLE", "PICKLE_START", "PIDS",
           "PLAIN_BUFFERS", "SENTINEL", "Buffer", "Loader", "dump_plain", "is_plain", "letter_of", "opened",
           "take_large"]

Buffer = bytes | bytearray | memoryview
PLAIN_BUFFERS, BY_VALUE, DEFINED = 1, 2, 3  # the first byte of a letter that is not a bare pickle
PICKLE_START = 0x80  # the first byte of a bare pickle, which is a plain letter (PROTO, pickletools)
HEAD = struct.Struct(">BxxxIQ")
PICKLE = 5  # the protocol: the first with buffers out of band
OUT_OF_BAND_BYTES = 16_384  # below, a copy costs less than the parts and a letter kept alive by it
GLOBAL_OPCODE = b"\x93"  # without it, a pickle names no module (STACK_GLOBAL, pickletools)
FEW_ITEMS = 64  # above, to search the pickle for names is quicker than to ask each item for its type
JOINED_BYTES = 65_536  # a pickle up to this is copied behind its prefix, so that it is one part
ALIGNMENT_BYTES = 16  # what numpy's vector loops like
SENTINEL: Any = getattr(builtins, "sentinel", None)  # Python 3.15


def dump_plain(prefix: bytes, value: Any) -> list[Buffer] | None:
    """The letter of a value by C pickle alone; None if that fails, or names a module that another process has not."""
    if type(value) is list and len(value) <= FEW_ITEMS and ATOMS.issuperset(map(type, value)):
        return [pickle.dumps(value, PICKLE)]
    buffers: list[pickle.PickleBuffer] = []
    try:
        data = pickle.dumps(value, PICKLE, buffer_callback=buffers.append)
    except Exception:
        return None
    if GLOBAL_OPCODE in data and not is_plain(data):
        return None
    if not buffers:
        return [data]
    views: list[memoryview] = []
    if any(take_large(views, buffer) for buffer in buffers):  # a small one, which is to stay in the pickle
        views.clear()
        data = pickle.dumps(value, PICKLE, buffer_callback=lambda buffer: take_large(views, buffer))
    return letter_of(PLAIN_BUFFERS, prefix, data, views) if views else [data]


def is_plain(data: bytes) -> bool:
    """Whether another process finds all modules that a pickle names."""
    return not (GLOBAL_OPCODE in data and any(name in data for name in UNFOUND))


def take_large(views: list[memoryview], buffer: pickle.PickleBuffer) -> bool:
    """Take a large buffer out of the band of a pickle, or leave it there (true)."""
    view = buffer.raw()
    large = view.nbytes >= OUT_OF_BAND_BYTES
    if large:
        views.append(view)
    return not large


def letter_of(form: int, prefix: bytes, data: Buffer, buffers: Sequence[memoryview]) -> list[Buffer]:
    """The parts of a letter, behind a prefix."""
    head = HEAD.pack(form, len(buffers), len(data))
    prefix += head + struct.pack(f">{len(buffers)}Q", *[view.nbytes for view in buffers])
    parts: list[Buffer] = [prefix + data] if len(data) <= JOINED_BYTES else [prefix, data]
    at = len(prefix) + len(data)
    for view in buffers:
        padding = -at % ALIGNMENT_BYTES
        parts += [bytes(padding), view] if padding else [view]
        at += padding + view.nbytes
    return parts


def opened(letter: memoryview, start: int) -> tuple[int, memoryview, list[memoryview]]:
    """The form of a letter, its pickle and its buffers."""
    form, count, length = HEAD.unpack_from(letter, start)
    at = start + HEAD.size + 8 * count
    pieces: list[memoryview] = []
    for size in (length, *struct.unpack_from(f">{count}Q", letter, start + HEAD.size)):
        at += -at % ALIGNMENT_BYTES if pieces else 0
        pieces.append(letter[at : at + size])
        at += size
    return form, pieces[0], pieces[1:]


class Loader(pickle.Unpickler):
    """Loads one by-value pickle, or the pickles of definitions.

    :param data: the pickle. Its digest or tag must have been checked.
    :param buffers: what travelled out of band.
    :param things: what the numbers in the pickle stand for.
    """

    def __init__(self, names: Names, data: Buffer, buffers: Iterable[Any] = (), things: Iterable[Any] = ()) -> None:
        super().__init__(io.BytesIO(data), buffers=buffers)
        self.names = names
        self.things = [*things]
        self.entries: list[Any] = [None] * len(self.things)
        self.labels = [(b"", 0)] * len(self.things)
        self.made: set[int] = set()  # of which the versions here are right already, and their things not filled
        self.met: list[Any] = []  # to be held by what is filled next

    def persistent_load(self, pid: Any) -> Any:
        """Answer a number with its thing, a maker's name with the maker."""
        if type(pid) is str:
            return getattr(self, pid, None) or MAKERS[pid]
        return self.thing(pid)

    def thing(self, number: int) -> Any:
        """What a number stands for."""
        self.met.append(self.entries[number])
        return self.things[number]

    def define(self) -> list[Any]:
        """Make and fill what a letter of definitions brings, and return its roots."""
        heads, makes, fills, roots, modules = pickle.loads(self.load())
        for name in modules:
            with contextlib.suppress(ModuleNotFoundError):  # a name that may be no module's: from copy import copy
                importlib.import_module(name)
        for kind, (token, version) in heads:
            entry = self.names.of_token(token) if kind != "slot" else None
            if not kind and entry is None:
                raise pickle.UnpicklingError("a class or function is not known here any more; dump its instance again")
            self.labels.append((token, version))
            self.entries.append(entry)
            self.things.append(entry and entry.thing)
        for step, indices in (("make_", makes), ("fill_", fills)):
            for index in indices:
                self._do(step + heads[index][0], index)
        return [self.things[index] for index in roots]

    def _do(self, step: str, index: int) -> None:
        """Make or fill a thing, unless it is here in this version: its own process always has the right one."""
        self.met = []
        arguments, entry, (token, version) = self.load(), self.entries[index], self.labels[index]
        if index in self.made or entry is None or (entry.version != version and token[:16] != self.names.process):
            self.made.add(index)
            getattr(self, step)(index, *arguments)

    def _made(self, index: int, thing: Any) -> Any:
        """A new thing, under its token if it has one."""
        token, version = self.labels[index]
        self.entries[index] = entry = self.names.name(thing, token)
        self.things[index], entry.version = thing, version
        return entry

    def make_space(self, index: int, name: str, attributes: dict[str, Any], spec: tuple[str, Any] | None) -> None:
        """A module's dict, with what an import would have set."""
        self.entries[index] = space = self.names.space(self.labels[index][0], name)
        self.things[index] = names = space.thing
        names.update({name: value for name, value in attributes.items() if names.get(name) is None})
        if spec is not None and names.get("__spec__") is None:
            names["__spec__"] = made = importlib.machinery.ModuleSpec(spec[0], None, origin=spec[1])
            made.has_location = spec[1] is not None

    def make_cell(self, index: int) -> None:
        """An empty cell of a closure."""
        self._made(index, CellType())

    def make_function(self, index: int, names: dict[str, Any], code: bytes, titles: tuple[Any, ...],
                      cells: Any) -> None:
        """A function in its shared globals, yet without attributes."""
        function = FunctionType(marshal.loads(code), names, titles[0], None, cells)
        function.__qualname__, function.__module__, function.__doc__ = titles[1:]
        self._made(index, function).needs += self.met

    def make_class(self, index: int, meta: Any, name: str, bases: tuple[type, ...], namespace: dict[str, Any],
                   code: dict[str, Any], members: dict[str, Any], aliases: dict[str, str]) -> None:
        """A class with its functions and constants; the one that is here, if there is one."""
        entry = self.entries[index]
        if entry is None:
            entry = self._made(index, make_class(meta, name, bases, {**namespace, **code}, members, aliases))
            entry.came = {name: remember(value) for name, value in vars(entry.thing).items()}
        else:
            set_attributes(entry.thing, code, entry.came)
        entry.version, entry.needs = self.labels[index][1], self.met
        entry.coming = set(code)

    def fill_slot(self, index: int, names: dict[str, Any], name: str, value: Any) -> None:
        """Set a global."""
        self.names.find(names).bring(name, self.labels[index][1], value, self.met)

    def fill_value(self, index: int, value: Any) -> None:
        """A value that has come."""
        self._made(index, value).needs = self.met

    def fill_function(self, index: int, attributes: dict[str, Any], own: dict[str, Any]) -> None:
        """Give a function its attributes."""
        function = self.things[index]
        for name, value in attributes.items():
            setattr(function, name, value)
        function.__dict__.update(own)
        self.entries[index].needs += self.met

    def fill_cell(self, index: int, content: Any) -> None:
        """Put the content into a cell."""
        self.things[index].cell_contents = content
        self.entries[index].needs = self.met

    def fill_class(self, index: int, data: dict[str, Any], states: dict[str, Any], registered: list[type]) -> None:
        """Give a class all else."""
        cls, entry = self.things[index], self.entries[index]
        for name, state in states.items():
            cls._member_map_[name].__dict__.update(state)
        set_attributes(cls, data, entry.came)
        brought = entry.coming | data.keys()
        drop_attributes(cls, entry.brought - brought, entry.came)
        entry.brought = brought
        entry.needs += self.met
        for each in registered:
            cls.register(each)

    def inline(self, kind: str, shell: tuple[Any, ...]) -> Any:
        """A function, cell or class that a `__reduce__` makes anew each time."""
        self.things, self.entries = [*self.things, None], [*self.entries, None]
        self.labels.append((b"", 0))
        getattr(self, f"make_{kind}")(len(self.things) - 1, *shell)
        return self.things[-1]

    def fill_inline(self, thing: Any, content: tuple[str, tuple[Any, ...]]) -> None:
        """Fill it."""
        index = next(index for index, each in enumerate(self.things) if each is thing)
        getattr(self, f"fill_{content[0]}")(index, *content[1])

    def module(self, names: dict[str, Any]) -> Any:
        """A module that no import gives."""
        return self.names.find(names).module

    def weak(self, kind: Any, content: Any) -> Any:
        """A weak reference, or a collection of them. What it refers to lives as long as what holds it."""
        self.met.append(content)
        return kind(content)


def _make_plain(cls: Any, *arguments: Any) -> Any:
    """An instance as its built-in base makes it, whatever the class's own `__new__` and `__init__` say."""
    base = builtin_base(cls)
    made = base.__new__(cls, *arguments)
    if isinstance(made, BaseException):
        base.__init__(made, *arguments)
    return made


def _make_sentinel(name: str, module: str) -> Any:
    made = SENTINEL(name)
    made.__module__ = module
    return made


def _fill_plain(thing: Any, state: tuple[Any, dict[str, Any], list[Any], dict[Any, Any]]) -> None:
    """Give an instance its attributes and items, whatever methods its class has for that."""
    attributes, slots, items, pairs = state
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


MAKERS: dict[str, Any] = {
    "cache": lambda function, parameters: functools.lru_cache(**parameters)(function),
    "plain": _make_plain,
    "sentinel": _make_sentinel,
    "fill_plain": _fill_plain,
    "file": _open_file,
    "member": lambda cls, name: cls._member_map_[name],
    "partialmethod": lambda function, arguments, options: functools.partialmethod(function, *arguments, **options),
    "dead": lambda: weakref.ref(set()),  # which ends at once
    "inline": Loader.inline,
    "fill_inline": Loader.fill_inline,
    "module": Loader.module,
    "thing": Loader.thing,
    "weak": Loader.weak,
    "method": MethodType,
    "proxy": MappingProxyType,
}
PIDS = {id(maker): name for name, maker in MAKERS.items()}
