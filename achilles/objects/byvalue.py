"""The hooks by which pickle takes apart what no import can find.

Knows pickle's hooks and the kinds of things that belong to functions. Knows names.py, parts.py and the makers of
loading.py. Knows no letters: what a letter brings, in which order, is definitions.py's.

A Reducer dumps in one of three modes. VALUE dumps arguments, results, or a function with its callback. LOOK dumps the
content of one entry, for its digest. DEFINE dumps the definitions of a letter. In the pickle stands::

    for a function, class, cell     VALUE   its place among the letter's roots
                                    LOOK    its token; the entry is noted
                                    DEFINE  a call of its maker the first time, then pickle's memo
    for a value with a token        its token, but in its own content
    for a Step                      a call of a maker
    for a cache, a variable, ...    a call of a maker, where no import gives it

Threads: one thread uses a Reducer. That thread has the context's lock, but in the mode VALUE.
"""

from __future__ import annotations

import copyreg
import enum
import functools
import importlib
import io
import os
import struct
import sys
import threading
import types
import typing
import weakref
from collections.abc import Callable
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from .loading import MAKERS, SENTINEL, Loader
from .names import (
    MAINS,
    MISSING,
    STREAMS,
    Entry,
    Names,
    Pid,
    Slot,
    by_path,
    importable,
    is_class,
    is_stream,
    travels_by_value,
)
from .parts import REDUCES, evaluated, exception_parts, has_own, is_c_type, parts_of

__all__ = ["CACHE_TYPE", "DEFINE", "LOOK", "PICKLE", "VALUE", "Reducer", "Step"]

VALUE, LOOK, DEFINE = range(3)  # what a Reducer dumps
PICKLE = 5  # the protocol: the first with buffers out of band
CACHE_TYPE = type(functools.lru_cache(lambda: None))
CONNECTIONS = ("multiprocessing.connection", "multiprocess.connection")
WEAK = (weakref.WeakValueDictionary, weakref.WeakKeyDictionary, weakref.WeakSet)
# Methods that pickle calls for a copy. A fork, whose objects are there already, does not.
SPECIAL = (*REDUCES, "__new__", "__setstate__", "__setattr__", "__getattr__", "__iter__", "append", "extend", "items",
           "__setitem__")
STATES = (*REDUCES, "__getstate__", "__getnewargs__", "__getnewargs_ex__")
ALIAS: Any = getattr(typing, "TypeAliasType", typing.NewType)  # Python 3.12
VARIABLES = (typing.TypeVar, typing.ParamSpec, typing.TypeVarTuple, typing.NewType, ALIAS)
NO_DEFAULT = getattr(typing, "NoDefault", None)
OPTIONS = {"bound": "__bound__", "covariant": "__covariant__", "contravariant": "__contravariant__",
           "infer_variance": "__infer_variance__", "default": "__default__"}


class Step(NamedTuple):
    """A call of a maker, when its turn comes.

    :ivar entry: of the value that it makes, if it makes one.
    """

    maker: Any
    arguments: tuple[Any, ...]
    entry: Entry | None = None


class Reducer:
    """The hooks of a pickler that takes functions and classes apart; mix it in before a Pickler.

    :ivar mode: VALUE, LOOK or DEFINE.
    :ivar pids: the persistent id of each object that has one, by the object's id.
    :ivar entry: the entry whose content is dumped now.
    :ivar roots: in VALUE, what the letter's definitions must bring; `indices`, where each is, by its id.
    :ivar refs: in LOOK, the entries and globals that the content refers to; `fresh` if a value got its token just now.
    :ivar carries: whether a letter brings what a process has made.
    """

    names: Names
    mode: int
    pids: dict[int, Pid]
    entry: Entry | None
    roots: list[Any]
    indices: dict[int, int]
    refs: list[Entry | Slot]
    fresh: bool
    plain: set[type]  # classes by value whose instances pickle takes apart itself
    begun: dict[int, Any]  # variables of types, of which aliases may name themselves
    carries: Callable[[bytes], bool]

    def persistent_id(self, thing: Any) -> Pid | None:
        """The name of a maker, the token of a value, the key of a script's globals; None for what is dumped here."""
        pid = self.pids.get(id(thing))
        if type(pid) is not bytes or self.mode == DEFINE:
            return pid
        entry = self.names.find(thing)
        if entry is None or entry is self.entry or not (entry.named and entry.is_value):
            return None
        if self.mode == VALUE:
            self._root(thing)
        else:
            self.refs.append(entry)
        return entry.token

    def reducer_override(self, thing: Any) -> Any:
        """Take apart what pickle cannot, or would name by an import that fails elsewhere."""
        kind = type(thing)
        if kind in self.plain:
            return NotImplemented
        reduce = _REDUCE.get(kind)
        if reduce is not None:
            return reduce(self, thing)
        if is_class(thing):
            return self._class(thing)
        if is_stream(thing):  # a notebook's is no file
            return self._stream(thing)
        if kind.__module__ in CONNECTIONS:
            raise TypeError(f"cannot pickle '{kind.__qualname__}' object, which belongs to this process")
        if kind.__module__ == "dataclasses":  # its marks are compared by identity
            marks = vars(sys.modules["dataclasses"])
            return next((name for name, mark in marks.items() if mark is thing), NotImplemented)
        by_value = not is_c_type(kind) and travels_by_value(kind)
        if isinstance(thing, BaseException):
            parts = exception_parts(thing, by_value)
            return NotImplemented if parts is None else (MAKERS["exception"], *parts)
        # pickle asks an empty instance for `__setstate__`: some `__getattr__` never come to an end then
        plainly = self.mode != VALUE and has_own(kind, "__getattr__")
        return self._instance(kind, thing) if by_value or plainly else NotImplemented

    def _instance(self, cls: Any, thing: Any) -> Any:
        """An instance of a class by value."""
        if isinstance(thing, enum.Enum):
            is_named = cls._member_map_.get(thing._name_) is thing
            return (MAKERS["member"], (cls, thing._name_)) if is_named else (cls, (thing._value_,))
        special = REDUCES if self.mode == VALUE else SPECIAL
        if cls in copyreg.dispatch_table or not has_own(cls, *special):
            self.plain.add(cls)
            return NotImplemented
        reduced = thing.__reduce_ex__(PICKLE)
        if isinstance(reduced, str):
            return self._singleton(thing, reduced, MAKERS["plain"], type(thing))
        maker = copyreg.__newobj__  # type: ignore[attr-defined]
        if self.mode == VALUE or reduced[0] is not maker or has_own(cls, *STATES):
            return reduced
        # As a fork has it: the object itself, of which neither `__new__` nor `__setstate__` knows.
        items = list.copy(thing) if issubclass(cls, list) else []
        pairs = dict.copy(thing) if issubclass(cls, dict) else {}
        content = reduced[2] if len(reduced) > 2 else None, items, pairs
        return MAKERS["plain"], (cls, *reduced[1][1:]), content, None, None, MAKERS["fill_plain"]

    def _singleton(self, thing: Any, name: str, maker: Any, *arguments: Any) -> Any:
        """A thing that pickle takes for a global of its module."""
        if thing.__module__ not in MAINS and by_path(sys.modules.get(thing.__module__), name) is thing:
            return name
        return self._elsewhere(thing) or (maker, arguments, getattr(thing, "__dict__", None))

    def _sentinel(self, thing: Any) -> Any:
        return self._singleton(thing, thing.__name__, MAKERS["sentinel"], thing.__name__, thing.__module__)

    def _step(self, step: Step) -> Any:
        if self.entry is not None and self.entry.named:  # the value of the step before is made by now
            self.pids[self.entry.key] = self.entry.token
        self.entry = step.entry
        return step.maker, step.arguments

    def _root(self, thing: Any) -> Any:
        index = self.indices.setdefault(id(thing), len(self.roots))
        if index == len(self.roots):
            self.roots.append(thing)
        return Loader.root, (index,)

    def _elsewhere(self, thing: Any) -> Any:
        """A reference to a thing that is dumped by itself; None where that is now."""
        if self.mode == VALUE:
            return self._root(thing)
        entry = self.names.name(thing)
        entry.named = entry.named or entry.is_value
        if self.mode == LOOK and not (entry is self.entry and entry.is_value):
            self.refs.append(entry)
            self.fresh = self.fresh or entry.is_value
            return Loader.refer, (entry.token,)
        return None if self.carries(entry.token[:16]) else (Loader.refer, (entry.token,))

    def _defined(self, thing: Any) -> Any:
        """A function, class or cell by value."""
        if (reference := self._elsewhere(thing)) is not None:
            return reference
        entry = self.names.name(thing)
        maker = _MAKE.get(type(thing), Loader.make_class)
        make, fill = parts_of(self.names, entry)
        if entry.digest or maker is Loader.make_class:
            return maker, (*entry.label, *make)
        # Nobody has looked at it, since a `__reduce__` makes it anew each time: it is filled here.
        return maker, (b"", 0, *make), fill, None, None, Loader.fill_now

    def _function(self, function: FunctionType) -> Any:
        return self._defined(function) if travels_by_value(function) else function.__qualname__

    def _class(self, cls: type) -> Any:
        if cls is type(None):
            return type, (None,)
        if not travels_by_value(cls):
            return cls.__qualname__
        return NotImplemented if is_c_type(cls) else self._defined(cls)  # dill knows types without a name

    def _cache(self, cache: Any) -> Any:
        if not travels_by_value(cache):
            return NotImplemented
        return MAKERS["cache"], (cache.__wrapped__, cache.cache_parameters()), dict(vars(cache))

    def _mark(self, mark: object) -> Any:
        """An `object()`, of which nothing but its identity counts."""
        return NotImplemented if self.mode == VALUE else self._elsewhere(mark) or (object, ())

    def _module(self, module: ModuleType) -> Any:
        if sys.modules.get(module.__name__) is module and importable(module.__name__):
            return importlib.import_module, (module.__name__,)
        if self.mode == VALUE:
            return self._root(module)
        space = self.names.space_of(vars(module))
        if isinstance(space, str):
            return NotImplemented
        self.refs += [(space, name) for name in space.names if not name.startswith("__")]
        return Loader.module, (space.key,)

    def _method(self, method: MethodType) -> Any:
        if getattr(method.__self__, method.__name__, None) == method:
            return getattr, (method.__self__, method.__name__)
        return MethodType, (method.__func__, method.__self__)

    def _variable(self, variable: Any) -> Any:
        """A type variable and the like, by its name where an import gives it."""
        module = variable.__module__ or ""
        if module not in MAINS and by_path(sys.modules.get(module), variable.__name__) is variable:
            return NotImplemented
        if (reference := self._elsewhere(variable)) is not None:
            return reference
        if id(variable) in self.begun:
            raise TypeError(f"cannot pickle the type alias {variable.__name__}, which refers to itself")
        self.begun[id(variable)] = variable
        options = {name: evaluated(variable, attribute) for name, attribute in OPTIONS.items()}
        options = {name: value for name, value in options.items() if value is not None and value is not NO_DEFAULT}
        arguments = getattr(variable, "__constraints__", ())
        if isinstance(variable, typing.NewType):
            arguments = (variable.__supertype__,)
        elif type(variable) is ALIAS:
            value = evaluated(variable, "__value__")  # its name stands for a value that cannot be evaluated
            arguments = (typing.ForwardRef(variable.__name__) if value is None else value,)
            options = {"type_params": variable.__type_params__}
        state = None if "type_params" in options else (None, {"__module__": variable.__module__})
        kind: Any = type(variable)
        return functools.partial(kind, variable.__name__, *arguments, **options), (), state

    def _alias(self, alias: Any) -> Any:
        by_value = isinstance(alias.__origin__, type) and travels_by_value(alias.__origin__)
        return (type(alias), (alias.__origin__, alias.__args__)) if by_value else NotImplemented

    def _stream(self, stream: Any) -> Any:
        """A stream of the process goes by its name; in definitions, a file that is open for reading by its path."""
        for name in STREAMS:
            known = getattr(sys, name, None)
            if stream is known:
                return getattr, (sys, name)
            if stream is getattr(known, "buffer", MISSING):
                return getattr, (known, "buffer")
        mode, path = getattr(stream, "mode", None), getattr(stream, "name", None)
        if self.mode == VALUE or mode not in ("r", "rb") or not isinstance(path, str) or stream.closed:
            return NotImplemented
        options = {} if mode == "rb" else {"encoding": stream.encoding, "errors": stream.errors}
        status = os.fstat(stream.fileno())
        place = status.st_dev, status.st_ino
        return MAKERS["file"], (os.path.abspath(path), place, mode, stream.tell(), options)

    def _weak(self, reference: Any) -> Any:
        if self.mode == VALUE:  # it would arrive dead
            return NotImplemented
        target = reference()
        return (MAKERS["dead"], ()) if target is None else (Loader.make_weak, (weakref.ref, target))

    def _weak_collection(self, collection: Any) -> Any:
        if self.mode == VALUE:
            return NotImplemented
        content = list(collection) if isinstance(collection, weakref.WeakSet) else dict(collection)
        return Loader.make_weak, (type(collection), content)


_MAKE: dict[type, Any] = {FunctionType: Loader.make_function, CellType: Loader.make_cell}
_REDUCE: dict[Any, Callable[[Reducer, Any], Any]] = {
    Step: Reducer._step,
    object: Reducer._mark,
    FunctionType: Reducer._function,
    CellType: Reducer._defined,
    CACHE_TYPE: Reducer._cache,
    ModuleType: Reducer._module,
    MethodType: Reducer._method,
    weakref.ref: Reducer._weak,
    **dict.fromkeys(WEAK, Reducer._weak_collection),
    **dict.fromkeys((io.TextIOWrapper, io.BufferedReader, io.BufferedWriter, io.FileIO), Reducer._stream),
    **dict.fromkeys(VARIABLES, Reducer._variable),
    type(typing.Generic[typing.TypeVar("T")]): Reducer._alias,  # type: ignore[index]
    typing.ForwardRef: lambda _, thing: (typing.ForwardRef, (thing.__forward_arg__,)),
    functools.partialmethod: lambda _, thing: (MAKERS["partialmethod"], (thing.func, thing.args, thing.keywords)),
    struct.Struct: lambda _, thing: (struct.Struct, (thing.format,)),
    property: lambda _, thing: (property, (thing.fget, thing.fset, thing.fdel, thing.__doc__)),
    staticmethod: lambda _, thing: (staticmethod, (thing.__func__,)),
    classmethod: lambda _, thing: (classmethod, (thing.__func__,)),
    types.MappingProxyType: lambda _, thing: (types.MappingProxyType, (dict(thing),)),
    # A lock arrives as a new one: an RLock that dill loads is held for ever, by nobody.
    type(threading.Lock()): lambda _, thing: (threading.Lock, ()),
    type(threading.RLock()): lambda _, thing: (threading.RLock, ()),
}
if SENTINEL is not None:  # dill takes each for a mark of dataclasses
    _REDUCE[SENTINEL] = Reducer._sentinel
