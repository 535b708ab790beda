"""The hooks by which pickle takes apart what no import can find.

Knows pickle's hooks and the kinds of things that belong to functions. Knows names.py, parts.py and the makers of
loading.py. Knows no letters: what a letter brings, in which order, is definitions.py's.

A pickle says a number in place of each thing that its definitions bring: a function, class or cell by value, a value
that has to be one thing everywhere, and, but for arguments and results, each value that has a token. `refs` are these,
in the order of their numbers. A function or class is named by a maker, once: pickle's memo is quicker than a hook.

A value that gets its token now is a number in all pickles to come. So this pickle is made again, with its number.

Threads: one thread uses a Reducer. That thread has the context's lock, but for arguments and results.
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
from collections.abc import Callable, Sequence
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from .loading import MAKERS, PICKLE, PIDS, SENTINEL, take_large
from .names import MAINS, MISSING, STREAMS, Entry, Names, by_import, by_path, is_class, is_stream, travels_by_value
from .parts import REDUCES, apart, evaluated, fill_of, has_own, is_c_type, shell_of

__all__ = ["CACHE_TYPE", "Dumper"]

CACHE_TYPE = type(functools.lru_cache(lambda: None))
CONNECTIONS = ("multiprocessing.connection", "multiprocess.connection")
WEAK: dict[Any, Any] = {  # what each kind of weak things refers to
    weakref.ref: lambda reference: reference(), weakref.WeakSet: list, weakref.WeakValueDictionary: dict,
    weakref.WeakKeyDictionary: dict,
}
# Methods that pickle calls for a copy. A fork has the objects already, and calls none of them.
SPECIAL = (*REDUCES, "__new__", "__setstate__", "__setattr__", "__getattr__", "__iter__", "append", "extend", "items",
           "__setitem__")
STATES = (*REDUCES, "__getstate__", "__getnewargs__", "__getnewargs_ex__")
ALIAS: Any = getattr(typing, "TypeAliasType", typing.NewType)  # Python 3.12
VARIABLES = (typing.TypeVar, typing.ParamSpec, typing.TypeVarTuple, typing.NewType, ALIAS)
NO_DEFAULT = getattr(typing, "NoDefault", None)
OPTIONS = {"bound": "__bound__", "covariant": "__covariant__", "contravariant": "__contravariant__",
           "infer_variance": "__infer_variance__", "default": "__default__", "type_params": "__type_params__"}


class Dumper:
    """One attempt to dump by value; mixed in before C pickle's Pickler, and dill's.

    :ivar entry: the entry that is dumped now; None for arguments, results, and functions with their callbacks.
    :ivar shares: whether values with tokens are the same on the other side, not copies.
    :ivar only: the tokens of values that may stand in the content; all by default.
    :ivar is_final: whether the pickle says only what has a number already, and brings all else.
    :ivar fresh: the entries of values that had no number; `before`: those of the attempt before.
    """

    def __init__(self, names: Names, entry: Any = None, shares: bool = True, only: set[bytes] | None = None,
                 refs: dict[Any, int] | None = None, before: Sequence[Entry] = ()) -> None:
        self.names, self.entry, self.shares, self.only, self.before = names, entry, shares, only, before
        self.tokens, self.is_final = names.tokens, refs is not None
        self.refs: dict[Any, int] = {} if refs is None else refs
        self.numbers: dict[int, Any] = dict(PIDS)  # and names of makers, by the ids of things
        self.fresh: list[Entry] = []
        self.alive: list[Any] = []  # what has to live until the definitions are made
        self.plain: set[type] = set()  # classes by value: pickle takes their instances apart itself
        self.begun: dict[int, Any] = {}  # variables of types, of which aliases may name themselves
        self.file, self.views = io.BytesIO(), list[memoryview]()
        take = functools.partial(take_large, self.views)
        super().__init__(self.file, PICKLE, buffer_callback=take)  # type: ignore[call-arg]

    def persistent_id(self, thing: Any) -> Any:
        """The name of a maker, the number of what the definitions bring; None for what is dumped here."""
        key = id(thing)
        number = self.numbers.get(key)
        if number is None and key in self.tokens:
            entry = self.names.find(thing)
            if entry is not None and self._cuts(entry):
                number = self.numbers[key] = self.refs.setdefault(entry, len(self.refs))
        return number

    def _cuts(self, entry: Entry) -> bool:
        """Whether a number stands in place of a thing."""
        if self.is_final:
            return entry in self.refs and entry.kind in ("space", "value")
        if entry.kind == "space":
            return True
        if entry.kind != "value" or entry is self.entry or not (self.shares or entry.is_one):
            return False
        if self.only is not None:
            return entry.token in self.only
        return entry.named or self.entry is None or not self.entry.named

    def reducer_override(self, thing: Any) -> Any:
        """Take apart what pickle cannot, or would name by an import that fails elsewhere."""
        kind = type(thing)
        if kind in self.plain:
            return NotImplemented
        reduce = _REDUCE.get(kind)
        if reduce is not None:
            return reduce(self, thing)
        if is_class(thing):
            return self._definition(thing)
        if is_stream(thing):  # a notebook's is no file
            return self._stream(thing)
        if kind.__module__ in CONNECTIONS:
            raise TypeError(f"cannot pickle '{kind.__qualname__}' object, which belongs to this process")
        if kind.__module__ == "dataclasses":  # its marks are compared by identity
            marks = vars(sys.modules["dataclasses"])
            return next((name for name, mark in marks.items() if mark is thing), NotImplemented)
        by_value = not is_c_type(kind) and travels_by_value(kind)
        if isinstance(thing, BaseException):
            return self._exception(kind, thing, by_value)
        # pickle asks an empty instance for `__setstate__`: some `__getattr__` never come to an end then
        plainly = self.shares and has_own(kind, "__getattr__")
        return self._instance(kind, thing) if by_value or plainly else NotImplemented

    def _exception(self, cls: Any, error: BaseException, by_value: bool) -> Any:
        """An exception as its built-in base makes it, since its own `__init__` may take other arguments."""
        if has_own(cls, *REDUCES) or not (by_value or has_own(cls, "__init__")):
            return NotImplemented
        arguments, state = apart(error)  # the state has the file name of an OSError, for one
        names = copyreg._slotnames(cls)  # type: ignore[attr-defined]
        attributes = {**(state or {}), **{name: getattr(error, name) for name in names if hasattr(error, name)}}
        return MAKERS["plain"], (cls, *arguments), (None, attributes, [], {}), None, None, MAKERS["fill_plain"]

    def _instance(self, cls: Any, thing: Any) -> Any:
        """An instance of a class by value."""
        if isinstance(thing, enum.Enum):
            is_named = cls._member_map_.get(thing._name_) is thing
            return (MAKERS["member"], (cls, thing._name_)) if is_named else (cls, (thing._value_,))
        special = SPECIAL if self.shares else REDUCES
        if cls in copyreg.dispatch_table or not has_own(cls, *special):
            self.plain.add(cls)
            return NotImplemented
        reduced = thing.__reduce_ex__(PICKLE)
        if isinstance(reduced, str):
            return self._singleton(thing, reduced, MAKERS["plain"], cls)
        maker = copyreg.__newobj__  # type: ignore[attr-defined]
        if not self.shares or reduced[0] is not maker or has_own(cls, *STATES):
            return reduced
        # As a fork has it: the object itself, of which neither `__new__` nor `__setstate__` knows.
        state = reduced[2] if len(reduced) > 2 else None
        state, slots = state if isinstance(state, tuple) else (state, {})
        items = list.copy(thing) if issubclass(cls, list) else []
        pairs = dict.copy(thing) if issubclass(cls, dict) else {}
        return MAKERS["plain"], (cls, *reduced[1][1:]), (state, slots, items, pairs), None, None, MAKERS["fill_plain"]

    def _refer(self, thing: Any) -> Any:
        """A function, class or cell, which the definitions bring."""
        entry = self.names.name(thing)
        if self.is_final and entry not in self.refs:
            # A `__reduce__` makes it anew each time: the definitions cannot bring this very one.
            filled = fill_of(entry)
            content = (entry.kind, filled) if filled else None
            return MAKERS["inline"], (entry.kind, shell_of(entry)), content, None, None, MAKERS["fill_inline"]
        self.alive.append(thing)
        return MAKERS["thing"], (self.refs.setdefault(entry, len(self.refs)),)

    def _one(self, thing: Any, *reduced: Any) -> Any:
        """A value that has to be one thing everywhere; how pickle makes it, where it is dumped now."""
        entry = self.names.name(thing)
        if entry is self.entry or self.is_final or self.before:
            return reduced
        self.fresh.append(entry)
        return tuple, ()  # in a pickle that is made again

    def _singleton(self, thing: Any, name: str, maker: Any, *arguments: Any) -> Any:
        """A thing that pickle takes for a global of its module."""
        if thing.__module__ not in MAINS and by_path(sys.modules.get(thing.__module__), name) is thing:
            return name
        self.names.name(thing).is_one = True
        return self._one(thing, maker, arguments, getattr(thing, "__dict__", None))

    def _sentinel(self, thing: Any) -> Any:
        return self._singleton(thing, thing.__name__, MAKERS["sentinel"], thing.__name__, thing.__module__)

    def _definition(self, thing: Any) -> Any:
        """A function or class."""
        if not travels_by_value(thing):
            return thing.__qualname__
        return NotImplemented if is_class(thing) and is_c_type(thing) else self._refer(thing)  # such as type(None)

    def _cache(self, cache: Any) -> Any:
        if not travels_by_value(cache):
            return NotImplemented
        return MAKERS["cache"], (cache.__wrapped__, cache.cache_parameters()), dict(vars(cache))

    def _mark(self, mark: object) -> Any:
        """An `object()`, of which nothing but its identity counts."""
        return self._one(mark, object, ()) if self.shares else NotImplemented

    def _module(self, module: ModuleType) -> Any:
        if by_import(module):
            return importlib.import_module, (module.__name__,)
        space = self.names.space_of(vars(module))
        for name in vars(module) if not self.is_final else ():
            if not name.startswith("__"):
                self.refs.setdefault(space.slot(name), len(self.refs))
        return MAKERS["module"], (vars(module),)

    def _method(self, method: MethodType) -> Any:
        if getattr(method.__self__, method.__name__, None) == method:
            return getattr, (method.__self__, method.__name__)
        return MethodType, (method.__func__, method.__self__)

    def _variable(self, variable: Any) -> Any:
        """A type variable and the like, by its name where an import gives it."""
        module = variable.__module__ or ""
        if module not in MAINS and by_path(sys.modules.get(module), variable.__name__) is variable:
            return NotImplemented
        self.names.name(variable).is_one = True
        if (reference := self._one(variable)):
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
        state = None if "type_params" in options else (None, {"__module__": variable.__module__})
        kind: Any = type(variable)
        return functools.partial(kind, variable.__name__, *arguments, **options), (), state

    def _alias(self, alias: Any) -> Any:
        by_value = isinstance(alias.__origin__, type) and travels_by_value(alias.__origin__)
        return (type(alias), (alias.__origin__, alias.__args__)) if by_value else NotImplemented

    def _stream(self, stream: Any) -> Any:
        """A stream of the process goes by its name; in definitions, a file that is open for reading by its path."""
        places = [(sys, name) for name in STREAMS] + [(getattr(sys, name, None), "buffer") for name in STREAMS]
        for owner, name in places:
            if getattr(owner, name, MISSING) is stream:
                return getattr, (owner, name)
        mode, path = getattr(stream, "mode", None), getattr(stream, "name", None)
        if not self.shares or mode not in ("r", "rb") or not isinstance(path, str) or stream.closed:
            return NotImplemented
        options = {} if mode == "rb" else {"encoding": stream.encoding, "errors": stream.errors}
        status = os.fstat(stream.fileno())
        identity = status.st_dev, status.st_ino
        return MAKERS["file"], (os.path.abspath(path), identity, mode, stream.tell(), options)

    def _weak(self, weak: Any) -> Any:
        if not self.shares:  # it would arrive dead
            return NotImplemented
        content = WEAK[type(weak)](weak)
        return (MAKERS["dead"], ()) if content is None else (MAKERS["weak"], (type(weak), content))



_REDUCE: dict[Any, Callable[[Dumper, Any], Any]] = {
    object: Dumper._mark,
    FunctionType: Dumper._definition,
    CellType: Dumper._refer,
    CACHE_TYPE: Dumper._cache,
    ModuleType: Dumper._module,
    MethodType: Dumper._method,
    **dict.fromkeys(WEAK, Dumper._weak),
    **dict.fromkeys((io.TextIOWrapper, io.BufferedReader, io.BufferedWriter, io.FileIO), Dumper._stream),
    **dict.fromkeys(VARIABLES, Dumper._variable),
    type(typing.Generic[typing.TypeVar("T")]): Dumper._alias,  # type: ignore[index]
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
    _REDUCE[SENTINEL] = Dumper._sentinel
