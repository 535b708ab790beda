"""The hooks by which pickle takes apart the things that no import finds.

Knows names.py and the makers of loading.py. Knows no letters: definitions.py chooses their things and the order.

A pickle has a number in place of each thing that its definitions bring: functions, classes and cells by value, and
values that must be one thing everywhere. Outside arguments and results, all values with tokens have numbers. `refs` has
the entries in the order of the numbers. A maker names a function or class once: pickle's memo is quicker than a hook.

An entry's thing is dumped in two halves, as in pickle's reductions: a maker with its arguments, then the rest. So
things may need each other: all are made before any is filled.

Threads: one thread uses a Dumper. For definitions, that thread has the context's lock.
"""

from __future__ import annotations

import builtins
import collections
import copyreg
import enum
import functools
import gc
import hashlib
import importlib.machinery
import io
import marshal
import os
import pickle
import struct
import sys
import threading
import types
import typing
import weakref
from collections.abc import Callable
from typing import Any

from .loading import EXTEND, MAKERS, PICKLE, PIDS, take_large
from .names import (
    MAINS,
    MISSING,
    STREAMS,
    Entry,
    Module,
    Names,
    Slot,
    Space,
    builtin_base,
    by_import,
    by_path,
    is_class,
    is_stream,
    travels_by_value,
)

__all__ = ["CACHE_TYPE", "VARIABLES", "VIEWS", "WEAK", "Dumper", "arguments_of", "parts_of"]

CACHE_TYPE = type(functools.lru_cache(lambda: None))
VIEWS: Any = {  # by the type of a view: its maker, and an empty dict for it
    type(make(kind())): (make, kind())
    for kind in (dict, collections.OrderedDict) for make in (kind.keys, kind.values, kind.items)}
NAMELESS: Any = {  # by id: classes of C that are not under the name that they give
    **{id(cls): (getattr, (types, name)) for name, cls in vars(types).items() if is_class(cls)},
    **{id(kind): (type, (make(made),)) for kind, (make, made) in VIEWS.items()},
}
WEAK: dict[Any, Any] = {  # by the kind of a weak thing: its content
    weakref.ref: lambda reference: reference(), weakref.WeakSet: set, weakref.WeakKeyDictionary: dict,
    weakref.WeakValueDictionary: lambda table: dict(table.items()),  # `dict` asks for each value again: it may be dead
}
NEW: Any = copyreg.__newobj__  # type: ignore[attr-defined]
REDUCES = ("__reduce__", "__reduce_ex__")
# Methods that pickle calls for a copy. A fork calls none of them.
SPECIAL = (*REDUCES, "__new__", "__setstate__", "__setattr__", "__getattr__", "__iter__", "append", "extend", "items",
           "__setitem__")
OWN = -1  # the number of the dumped thing itself
STANDS_FOR: Any = {  # a name, where the attribute cannot be evaluated; the first is of Python 3.12
    getattr(typing, "TypeAliasType", typing.NewType): "__value__", typing.NewType: "__supertype__",
}
MARSHAL = 5 if sys.version_info >= (3, 14) else 2  # 2: the last without back references; 5: the first with slices
VARIABLES = typing.TypeVar, typing.ParamSpec, typing.TypeVarTuple, *STANDS_FOR
NO_DEFAULT = getattr(typing, "NoDefault", None)
OPTIONS = {"bound": "__bound__", "covariant": "__covariant__", "contravariant": "__contravariant__",
           "infer_variance": "__infer_variance__", "default": "__default__", "type_params": "__type_params__"}


class Dumper(pickle.Pickler):
    """An attempt to dump by value.

    :ivar entry: the dumped entry; None for arguments, results, and functions with their callbacks.
    :param reduced: the reduction of the entry's thing; by default made here.
    :ivar shares: whether values with tokens stay shared; else they are copied.
    :ivar only: the tokens of values that may stand in the content; all by default.
    :ivar refs: the numbers of the entries that the definitions bring.
    :ivar content: the digest of an entry's pickle, and the tokens in it: they differ after a change.
    """

    def __init__(self, names: Names, value: Any, entry: Any = None, reduced: Any = None, shares: bool = True,
                 only: list[bytes] | None = None) -> None:
        self.names, self.entry, self.shares, self.only, self.ids = names, entry, shares, only, names.ids
        self.refs: dict[Any, int] = {}
        self.numbers: dict[int, Any] = dict(PIDS)  # by id: numbers of things, names of makers
        self.plain: set[type] = set()  # classes by value with instances that pickle takes apart
        self.rest: Any = None  # the second half of the entry's reduction
        self.file, self.views = io.BytesIO(), list[memoryview]()
        super().__init__(self.file, PICKLE, buffer_callback=functools.partial(take_large, self.views))
        if entry is None:
            self.dump(value)
            return
        maker, arguments, *self.rest = reduced or self._apart(value)
        self.dump((maker, arguments))
        self.numbers[id(value)] = OWN
        self.dump(entry)
        self.content = (hashlib.sha256(b"".join([self.file.getvalue(), *self.views])).digest(),
                        [each.token for each in self.refs])

    def _apart(self, value: Any) -> Any:
        """The reduction of a value in two halves, so that values may need each other."""
        kind, found = type(value), self.reducer_override(value)
        is_empty_first = kind in (list, dict) or (hasattr(value, "__dict__") and kind not in copyreg.dispatch_table)
        if found is NotImplemented and is_empty_first:
            found = value.__reduce_ex__(PICKLE)
        return found if type(found) is tuple else (MAKERS["itself"], (value,))

    def persistent_id(self, thing: Any) -> Any:
        """The name of a maker, or the number of a thing that the definitions bring; None for any other thing."""
        key = id(thing)
        number = self.numbers.get(key)
        if number is None and key in self.ids:
            entry = self.names.find(thing)
            kind = "" if entry is None or entry is self.entry or entry.is_one else entry.kind
            is_shared = kind == "value" and self.shares and (self.only is None or entry.token in self.only)
            if is_shared or kind == "space":
                number = self.numbers[key] = self.refs.setdefault(entry, len(self.refs))
        return number

    def reducer_override(self, thing: Any) -> Any:
        """Take apart a thing that pickle cannot, or names by an import that fails elsewhere."""
        kind = type(thing)
        if kind in self.plain:
            return NotImplemented
        reduce = _REDUCE.get(kind, _REDUCE.get(kind.__module__))
        if reduce is not None:
            return reduce(self, thing)
        if is_class(thing):
            return self._refer(thing) if travels_by_value(thing) else NAMELESS.get(id(thing), NotImplemented)
        if is_stream(thing):  # a notebook's stream is no file
            return self._stream(thing)
        # An exception's `__init__` may take other arguments than its base. Pickle asks an empty instance for
        # `__setstate__`: some `__getattr__` then never end.
        special = "__init__" if isinstance(thing, BaseException) else "__getattr__"
        return self._instance(kind, thing) if travels_by_value(kind) or has_own(kind, special) else NotImplemented

    def _instance(self, cls: Any, thing: Any) -> Any:
        """An instance of a class by value; a shared instance is as in a fork."""
        if isinstance(thing, enum.Enum):  # combined flags are no members
            is_member = cls._member_map_.get(thing._name_) is thing
            return (MAKERS["member"], (cls, thing._name_)) if is_member else (cls, (thing._value_,))
        is_error = isinstance(thing, BaseException)
        special = SPECIAL if self.shares else REDUCES
        if cls in copyreg.dispatch_table or not (is_error or has_own(cls, *special)):
            self.plain.add(cls)
            return NotImplemented
        found = thing.__reduce_ex__(PICKLE)
        if isinstance(found, str):
            return self._singleton(thing, found, MAKERS["plain"], (cls,), getattr(thing, "__dict__", None))
        maker, arguments, state = [*found, None][:3]
        has_state = has_own(cls, "__getstate__", "__getnewargs__", "__getnewargs_ex__")
        if has_own(cls, *REDUCES) or not (is_error or (self.shares and maker is NEW and not has_state)):
            return found
        # The built-in base makes the instance, without the class's `__new__`, `__init__` and `__setstate__`.
        if is_error:  # the state has an ImportError's name
            names = copyreg._slotnames(cls)  # type: ignore[attr-defined]
            state = None, {**(state or {}), **{name: getattr(thing, name) for name in names if hasattr(thing, name)}}
        items = next((base.copy(thing) for base in EXTEND if isinstance(thing, base)), None)
        arguments = (cls, *arguments) if is_error else arguments
        return MAKERS["plain"], arguments, (state, items), None, None, MAKERS["fill_plain"]

    def _refer(self, thing: Any) -> Any:
        """The number of a function, class or cell, or of a value that must be one thing everywhere."""
        return MAKERS["thing"], (self.refs.setdefault(self.names.name(thing), len(self.refs)),)

    def _one(self, thing: Any, *reduced: Any) -> Any:
        """A value that must be one thing everywhere: its number, or its reduction if it is dumped here."""
        entry = self.names.name(thing)
        entry.is_one = True
        return reduced if entry is self.entry else self._refer(thing)

    def _singleton(self, thing: Any, name: str, *reduced: Any) -> Any:
        """A thing that pickle takes for a global of its module."""
        if thing.__module__ not in MAINS and by_path(sys.modules.get(thing.__module__), name) is thing:
            return name
        return self._one(thing, *reduced)

    def _module(self, module: types.ModuleType) -> Any:
        """A module that no import gives, with all its globals."""
        space = self.names.name(vars(module), kind=Space)
        for name in [*vars(module)]:  # another thread may set globals
            if not name.startswith("__"):
                self.refs.setdefault(space.slot(name), len(self.refs))
        return MAKERS["module"], (vars(module),)

    def _variable(self, variable: Any) -> Any:
        if reference := self._one(variable):
            return reference
        if self.rest is not None:
            raise TypeError(f"cannot pickle the type alias {variable.__name__}, which refers to itself")
        arguments, options = parts_of(variable)
        state = None if "type_params" in options else (None, {"__module__": variable.__module__})
        return functools.partial(*arguments, **options), (), state

    def _stream(self, stream: Any) -> Any:
        """A stream of the process by its name; in definitions, a file that is open for reading by its path."""
        places = [(sys, name) for name in STREAMS] + [(getattr(sys, name, None), "buffer") for name in STREAMS]
        if found := [(owner, name) for owner, name in places if getattr(owner, name, MISSING) is stream]:
            return getattr, found[0]
        mode, path = getattr(stream, "mode", None), getattr(stream, "name", None)
        if not self.shares or mode not in ("r", "rb") or not isinstance(path, str) or stream.closed:
            return NotImplemented
        options = {} if mode == "rb" else {"encoding": stream.encoding, "errors": stream.errors}
        return MAKERS["file"], (os.path.abspath(path), os.fstat(stream.fileno())[1:3], mode, stream.tell(), options)


def dump_code(code: types.CodeType) -> bytes:
    """Code as bytes, the same each time: marshal writes reference counts, and a load resets them."""
    return marshal.dumps(marshal.loads(marshal.dumps(code, MARSHAL)), MARSHAL)


def has_own(cls: type, *names: str) -> bool:
    """Whether a class has any of these methods in Python, not in C."""
    return any(isinstance(getattr(cls, name, None), types.FunctionType) for name in names)


def arguments_of(member: Any) -> Any:
    """The arguments with which `__new__` of the built-in base makes a member of an enum."""
    base = builtin_base(type(member))
    maker, arguments, *_ = (NEW, ()) if base is object else base.__reduce_ex__(member, 2)
    return arguments[1:] if maker is NEW else arguments


def parts_of(variable: Any) -> tuple[Any, dict[str, Any]]:
    """The type of a type variable or alias with its arguments, then its keyword arguments."""
    name, kind = variable.__name__, type(variable)
    options = {option: value for option, attribute in OPTIONS.items()
               if (value := evaluated(variable, attribute)) is not None and value is not NO_DEFAULT}
    if kind not in STANDS_FOR:
        return (kind, name, *getattr(variable, "__constraints__", ())), options
    value = evaluated(variable, STANDS_FOR[kind])
    return (kind, name, typing.ForwardRef(name) if value is None else value), options


def evaluated(variable: Any, attribute: str) -> Any:
    """An attribute of a type variable or alias; None where its evaluation raises."""
    try:
        return getattr(variable, attribute, None)
    except Exception:
        return None


def _refuse(_: Dumper, thing: Any) -> Any:
    raise TypeError(f"cannot pickle '{type(thing).__qualname__}' object, which belongs to this process")


def _proxy(thing: Any) -> Any:
    """A manager's proxy. As in a fork, it has the manager's key, if only this machine reaches the manager."""
    rebuild, (kind, token, serializer, options) = thing.__reduce__()
    if isinstance(token.address, str):
        options["authkey"] = bytes(thing._authkey)
    return rebuild, (kind, token, serializer, options)


def _by_value(reduce: Callable[[Dumper, Any], Any]) -> Callable[[Dumper, Any], Any]:
    """Take a thing apart only where no import gives it."""
    return lambda dumper, thing: reduce(dumper, thing) if travels_by_value(thing) else NotImplemented


_REDUCE: dict[Any, Callable[[Dumper, Any], Any]] = {  # by a thing's type or its type's module
    **dict.fromkeys(("multiprocessing.connection", "multiprocess.connection"), _refuse),
    **dict.fromkeys(("multiprocessing.managers", "multiprocess.managers"), lambda _, thing: (
        _proxy(thing) if hasattr(thing, "_authkey") else NotImplemented)),
    "dataclasses": lambda _, thing: next(  # dataclasses compares its marks by identity
        (name for name, mark in vars(sys.modules["dataclasses"]).items() if mark is thing), NotImplemented),
    **dict.fromkeys((Entry, Space, Slot), lambda dumper, item: (MAKERS["itself"], (item.thing,), *dumper.rest)),
    # Python 3.15; before, the row of `object` replaces this row.
    getattr(builtins, "sentinel", object): lambda dumper, mark: dumper._singleton(
        mark, mark.__name__, type(mark), (mark.__name__,), (None, {"__module__": mark.__module__})),
    object: lambda dumper, mark: dumper._one(mark, object, ()) if dumper.shares else NotImplemented,
    types.FunctionType: _by_value(Dumper._refer),
    types.CellType: Dumper._refer,
    CACHE_TYPE: _by_value(lambda _, cache: (
        MAKERS["cache"], (cache.__wrapped__, cache.cache_parameters()), dict(vars(cache)))),
    **dict.fromkeys((types.ModuleType, Module), lambda dumper, module: (
        (importlib.import_module, (module.__name__,)) if by_import(module) else dumper._module(module))),
    types.MethodType: lambda _, method: (
        (getattr, (method.__self__, method.__name__)) if getattr(method.__self__, method.__name__, None) == method
        else (types.MethodType, (method.__func__, method.__self__))),
    **dict.fromkeys(WEAK, lambda dumper, weak: (  # an argument would arrive dead
        MAKERS["weak"], (type(weak), WEAK[type(weak)](weak))) if dumper.shares else NotImplemented),
    **dict.fromkeys((io.TextIOWrapper, io.BufferedReader, io.BufferedWriter, io.FileIO), Dumper._stream),
    **dict.fromkeys(VARIABLES, _by_value(Dumper._variable)),
    type(typing.Generic[typing.TypeVar("T")]): lambda _, alias: (  # type: ignore[index]
        type(alias), (alias.__origin__, alias.__args__)) if travels_by_value(alias.__origin__) else NotImplemented,
    importlib.machinery.ModuleSpec: lambda _, spec: (importlib.machinery.ModuleSpec, (spec.name, None), {
        "origin": spec.origin, "_set_fileattr": spec.has_location}),
    typing.ForwardRef: lambda _, thing: (typing.ForwardRef, (thing.__forward_arg__,)),
    functools.partialmethod: lambda _, thing: (MAKERS["partialmethod"], (thing.func, thing.args, thing.keywords)),
    struct.Struct: lambda _, thing: (struct.Struct, (thing.format,)),
    property: lambda _, thing: (property, (thing.fget, thing.fset, thing.fdel, thing.__doc__)),
    staticmethod: lambda _, thing: (staticmethod, (thing.__func__,)),
    classmethod: lambda _, thing: (classmethod, (thing.__func__,)),
    types.MappingProxyType: lambda _, thing: (types.MappingProxyType, (dict(thing),)),
    types.CodeType: lambda _, code: (MAKERS["code"], (dump_code(code),)),
    **dict.fromkeys(VIEWS, lambda _, view: (VIEWS[type(view)][0], tuple(gc.get_referents(view)))),
    **dict.fromkeys((types.GetSetDescriptorType, types.MemberDescriptorType, types.ClassMethodDescriptorType),
                    lambda _, made: (MAKERS["descriptor"], (made.__objclass__, made.__name__))),
    super: lambda _, made: (super, (made.__thisclass__, made.__self__)),
    # The worker gets a new lock.
    type(threading.Lock()): lambda _, thing: (threading.Lock, ()),
    type(threading.RLock()): lambda _, thing: (threading.RLock, ()),
}


