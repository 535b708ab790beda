"""The form of a letter, and the loading of functions, classes and values by value.

A letter::

    pickle, which begins with 0x80                            plain, without large buffers; else
    1 | 3 zero | count u32 | count lengths u64 | the pieces   big-endian; each piece begins at a multiple of 16 bytes

The pieces are the pickle, the definitions (a letter, or nothing) and the buffers. Form 2 in place of 1 is a chunk with
offsets to skip: see letters.py.

The pickle of definitions is a list of items, each with its own pickle: the first half makes the thing, the second
fills it. No hook of a class, such as `__init_subclass__` or a metaclass's `__new__`, runs again: the attributes have
its result. CAME of a class has the attributes that came by letter, to tell them from attributes that running code has
set.

Knows names.py. A pickle names a maker by a persistent id, never by an import path: the package may have another name
elsewhere. One thread uses a Loader, with the context's lock while it loads definitions.

Limits: buffers under OUT_OF_BAND_BYTES travel inside the pickle.
"""

from __future__ import annotations

import abc
import builtins
import contextlib
import functools
import importlib
import io
import marshal
import os
import pickle
import struct
from collections.abc import Generator, Iterable, Sequence
from itertools import islice
from types import CellType, CodeType, FunctionType
from typing import Any

from .names import MISSING, Module, Names, Space, builtin_base

__all__ = ["CAME", "MAKERS", "NOTHING", "PICKLE", "PIDS", "SKIPPING", "Buffer", "Loader",
           "define", "letter_of", "opened", "take_large"]

Buffer = bytes | bytearray | memoryview
FORM, SKIPPING = 1, 2  # the first byte of a letter that is no bare pickle; of a chunk with offsets to skip
NOTHING = memoryview(b"")  # no definitions
HEAD = struct.Struct(">BxxxI")
PICKLE = 5  # the protocol: the first with buffers out of band
OUT_OF_BAND_BYTES = 16_384  # below, a copy costs less than more parts and a letter that stays alive
ALIGNMENT_BYTES = 16  # for numpy's vector loops
EXTEND: Any = {list: list.extend, dict: dict.update}
HOOK = "<stop>"  # the attribute that ends type.__new__ before hooks
# Where a class keeps its attributes that came by letter. To `typing`, _abc_ names are no part of a protocol.
CAME = "_abc_came"


def take_large(views: list[memoryview], buffer: pickle.PickleBuffer) -> bool:
    """Take a large buffer out of a pickle's band, or leave it there (true)."""
    view = buffer.raw()
    if view.nbytes >= OUT_OF_BAND_BYTES:
        views.append(view)
    return view.nbytes < OUT_OF_BAND_BYTES


def letter_of(pieces: Sequence[Buffer], form: int = FORM) -> list[Buffer]:
    """The parts of a letter."""
    lengths = [len(piece) for piece in pieces]
    parts: list[Buffer] = [HEAD.pack(form, len(pieces)) + struct.pack(f">{len(pieces)}Q", *lengths)]
    at = len(parts[0])
    for piece, length in zip(pieces, lengths):
        parts += [bytes(-at % ALIGNMENT_BYTES), piece]
        at += -at % ALIGNMENT_BYTES + length
    return [part for part in parts if part]


def opened(letter: memoryview) -> list[memoryview]:
    """The pieces of a letter."""
    _, count = HEAD.unpack_from(letter)
    at = HEAD.size + 8 * count
    pieces: list[memoryview] = []
    for size in struct.unpack_from(f">{count}Q", letter, HEAD.size):
        at += -at % ALIGNMENT_BYTES
        pieces.append(letter[at : at + size])
        at += size
    return pieces


class Loader(pickle.Unpickler):
    """Loads a pickle by value.

    :param data: the pickle. Its digest or tag must have been checked.
    :param buffers: out of band.
    :param parts: of a letter of definitions.  :param refs: the index in `parts` of each number in the pickle.
    """

    def __init__(self, names: Names, data: Buffer, buffers: Iterable[Any], parts: list[Part],
                 refs: Sequence[int]) -> None:
        super().__init__(io.BytesIO(data), buffers=buffers)
        self.names, self.parts, self.refs = names, parts, refs
        self.met: list[Any] = []  # entries and contents that live as long as the loaded thing

    def persistent_load(self, pid: Any) -> Any:
        """The thing of a number, or the maker of a name."""
        return self.thing(pid) if type(pid) is int else getattr(self, pid, None) or MAKERS[pid]

    def thing(self, number: int) -> Any:
        """The thing of a number."""
        return self.parts[self.refs[number]].made(self.met)

    def module(self, names: dict[str, Any]) -> Any:
        """A module that no import gives."""
        return self.names.find(names).module

    def weak(self, kind: Any, content: Any) -> Any:
        """A weak reference or collection; dead without content. The content lives as long as its holder."""
        self.met.append(content)
        return kind(set() if content is None else content)


class Part(Loader):
    """An item of a letter of definitions. It is made when another part needs it, and filled in its turn.

    :ivar value: the thing; `entry` is its entry.
    :ivar steps: a generator: makes the thing, stops, and then fills it.
    """

    def __init__(self, names: Names, parts: list[Part], record: Any, buffers: Iterable[Any]) -> None:
        self.kind, self.token, self.version, refs, data, count = record
        super().__init__(names, data, list(islice(buffers, count)), parts, [*refs, len(parts)])
        self.entry: Any = None
        self.value: Any = MISSING
        self.steps: Any = self._made_and_filled()

    def made(self, met: list[Any]) -> Any:
        """The thing, made at need; a value is filled, too.

        :param met: gets the entry.
        """
        if self.value is MISSING:
            if self.steps.gi_running:
                raise pickle.UnpicklingError("two values need each other before either of them can be made")
            next(self.steps, None)
        met.append(self.entry)
        return self.value

    def _made_and_filled(self) -> Generator[None]:
        self.entry, thing = self.names.of_token(self.token) if self.kind != "slot" else (None, None)
        if not self.kind and thing is None:
            raise pickle.UnpicklingError("a class or function is not known here any more; dump its instance again")
        is_own = not self.kind or self.token[:16] == self.names.process  # never out of date
        if thing is not None and (is_own or self.entry.version == self.version):
            self.value = thing
            return
        maker, arguments = self.load()
        self.value = maker(*arguments)
        if self.entry is None or self.entry.thing is not self.value:
            self.entry = self.names.name(self.value, self.token)
        self.entry.refs = self.met
        if self.kind != "value":
            yield
        self.load()
        self.entry.version = self.version

    def space(self, name: str, attributes: dict[str, Any]) -> Any:
        """A module's dict, with the attributes that an import sets."""
        if self.entry is None:
            module = Module(name) if self.token else importlib.import_module(name)
            self.entry = self.names.name(vars(module), self.token, Space)
            self.entry.module = module
        names, attributes = self.entry.thing, {"__builtins__": builtins, **attributes}
        names.update({name: value for name, value in attributes.items() if names.get(name) is None})
        return names

    def slot(self, names: dict[str, Any], name: str, value: Any) -> Any:
        """Set a global, unless this version came before or running code has set it."""
        self.entry = slot = self.names.find(names).slot(name)
        is_kept = slot.space.is_imported or slot.version in (0, self.version)
        if name not in names or not is_kept:
            names[name] = value
        return slot.thing

    def new_class(self, meta: Any, name: str, bases: tuple[type, ...], namespace: dict[str, Any],
                  code: dict[str, Any], members: dict[str, Any]) -> Any:
        """A class with its functions and constants; the class that is here already, if any."""
        cls = _make_class(meta, name, bases, {**namespace, **code}, members) if self.entry is None else self.entry.thing
        if CAME in vars(cls):
            _update_class(cls, {**vars(cls)[CAME], **code})
        return cls

    def fill_class(self, cls: Any, content: tuple[dict[str, Any], dict[str, Any], list[type]]) -> None:
        """Fill a class's attributes and members, and register classes with it."""
        attributes, states, registered = content
        for name, state in states.items():
            cls._member_map_[name].__dict__.update(state)
        _update_class(cls, attributes)
        for each in registered:
            cls.register(each)


def define(names: Names, letter: bytes | memoryview) -> list[Part]:
    """Make and fill the things of a letter of definitions, and return its roots."""
    pieces = iter(opened(letter if isinstance(letter, memoryview) else memoryview(bytearray(letter))))
    records, roots = pickle.loads(next(pieces))
    parts: list[Part] = []
    for record in records:
        parts.append(Part(names, parts, record, pieces))
    for part in parts:
        list(part.steps)
    found = [parts[index] for index in roots]
    parts.clear()
    return found


class _Stop:
    """An attribute that ends `type.__new__` when the class is complete, before `__init_subclass__`."""

    owner: Any = None

    def __set_name__(self, owner: type, name: str) -> None:
        self.owner = owner
        raise InterruptedError


def _make_class(meta: Any, name: str, bases: tuple[type, ...], namespace: dict[str, Any],
                members: dict[str, Any]) -> Any:
    """Make a class without its bases' hooks. Only a metaclass in C runs its own code."""
    stop = _Stop()
    try:
        builtin_base(meta).__new__(meta, name, bases, {**namespace, HOOK: stop})
    except Exception:
        if stop.owner is None:
            raise
    cls, stop.owner = stop.owner, None
    type.__delattr__(cls, HOOK)
    if issubclass(meta, abc.ABCMeta):
        abc._abc_init(cls)  # type: ignore[attr-defined]
    if members:
        made = {name: _make_plain(cls, *arguments) for name, arguments in members.items()}
        for name, member in made.items():
            member._name_ = name
        type.__setattr__(cls, "_member_map_", made)
    return cls


def _update_class(cls: type, attributes: dict[str, Any]) -> None:
    """Set attributes that came by letter, and drop attributes that come no more.

    An attribute that running code has set since the last letter stays.
    """
    own, last = vars(cls).copy(), vars(cls).get(CAME, {})
    kept = {name for name in own if last and own[name] is not last.get(name, MISSING)}
    for name in (last.keys() & own.keys()) - attributes.keys() - kept:
        type.__delattr__(cls, name)
    for name, value in attributes.items():
        if name not in kept:
            type.__setattr__(cls, name, value)
    type.__setattr__(cls, CAME, attributes)


def _make_function(names: dict[str, Any], code: CodeType, name: str, cells: Any, submodules: list[str]) -> Any:
    for module in submodules:
        with contextlib.suppress(ModuleNotFoundError):  # may be no module: from copy import copy
            importlib.import_module(module)
    return FunctionType(code, names, name, None, cells)


def _make_plain(cls: Any, *arguments: Any) -> Any:
    """An instance that the built-in base makes, without the class's own `__new__` and `__init__`."""
    base = builtin_base(cls)
    made = base.__new__(cls, *arguments)
    if isinstance(made, BaseException):
        base.__init__(made, *arguments)
    return made


def _fill_plain(thing: Any, content: tuple[Any, Any]) -> None:
    """Give an instance its attributes and items, without its class's methods for that."""
    state, items = content
    attributes, slots = state if isinstance(state, tuple) else (state, {})
    if attributes:
        thing.__dict__.update(attributes)
    for name, value in slots.items():
        object.__setattr__(thing, name, value)
    if items:
        EXTEND[type(items)](thing, items)


def _open_file(path: str, place: Sequence[int], mode: str, position: int, options: dict[str, Any]) -> Any:
    """A file that was open for reading, at its position. It must be the same file, by inode and device."""
    file = open(path, mode, **options)
    if os.fstat(file.fileno())[1:3] != place:
        file.close()
        raise FileNotFoundError(f"{path}, which a global of the script was reading, is another file here. "
                                "Open it in the function")
    file.seek(position)
    return file


MAKERS: dict[str, Any] = {
    "cache": lambda function, parameters: functools.lru_cache(**parameters)(function),
    "plain": _make_plain,
    "fill_plain": _fill_plain,
    "file": _open_file,
    "member": lambda cls, name: cls._member_map_[name],
    "partialmethod": lambda function, arguments, options: functools.partialmethod(function, *arguments, **options),
    "cell": CellType,
    "code": marshal.loads,
    "descriptor": lambda cls, name: vars(cls)[name],
    "function": _make_function,
    "new_class": Part.new_class,
    "fill_class": Part.fill_class,
    "space": Part.space,
    "slot": Part.slot,
    "module": Loader.module,
    "thing": Loader.thing,
    "weak": Loader.weak,
    "itself": lambda thing: thing,
}
PIDS = {id(maker): name for name, maker in MAKERS.items()}
