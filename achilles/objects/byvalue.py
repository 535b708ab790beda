"""Functions and classes that no import can find, taken apart here and put together in another process.

Knows pickle's hooks, code objects and classes. Knows neither letters nor jobs: what must outlive one
letter (names, versions, classes already made) it asks of a `Registry`, which letters.py's Context is.

::

    taking apart: Reducer, mixed into C pickle's Pickler       putting together: Loader, a C Unpickler
    function -> (code, name, cells) + attributes + globals  -> make_function, fill_function
    class    -> (token, definitions) + globals              -> make_class, bring
    cell, property, cache, TypeVar, exception, ...          -> make_cell, ...

*By value* goes what lives in ``__main__``, or what ``sys.modules`` does not give back by its module and
qualified name. Each thing is made empty first, remembered by the pickler, and filled after, so that
whatever refers to itself ends. The makers are named by a persistent id, never by an import path.

A definition is one class as two pickles in one stream: the *head* (metaclass, bases, slots, enum members)
makes the class, the *rest* fills it. In it other such classes are named by key alone, and the globals of
its methods are left out, so that neither changes its digest; both travel beside it. No hook of the class
(`__init_subclass__`, a metaclass's `__new__`) runs again: what it once did is in the attributes.

Threads: a Reducer and a Loader belong to one thread. Making classes holds the registry's lock.
"""

from __future__ import annotations

import abc
import builtins
import dis
import enum
import functools
import importlib
import io
import marshal
import pickle
import sys
import threading
import typing
from collections.abc import Callable, Iterable
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, Protocol

__all__ = ["DEFINITION", "LETTER", "VERSION", "Buffer", "Definitions", "Key", "Loader", "MAINS", "Need",
           "Reducer", "Registry", "class_head", "class_rest", "new_namespace", "travels_by_value"]

Buffer = bytes | bytearray | memoryview
Key = str | tuple[bytes, str, int]  # of a globals dict: its module, or (process, `__name__`, number)
Need = tuple[Any, str]  # a global name that travels with a function: (Key, name); (None, a submodule)
Brought = tuple[Any, str, bytes, Any]  # ... with the version and the value
Definitions = tuple[tuple[bytes, bytes], ...]  # (token, definition) of classes

LETTER, VERSION, DEFINITION = range(3)  # what a Reducer dumps: a letter, a value to be hashed, one class
MAINS = ("__main__", "__mp_main__")  # the second is what multiprocessing calls it in a spawned child
KEY_BYTES = 20  # of a class's token: 16 of the process and 4 of the class's number; its digest follows
MARSHAL_VERSION = 2  # the last without back references, which differ from one dump to the next
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, not by C
CODES_REMEMBERED = 1024  # code objects whose global names are kept; looking at one takes about 50 us
CACHE_TYPE = type(functools.lru_cache(lambda: None))
ENUM_USER_NAMES = ("_missing_", "_generate_next_value_")  # all others of this form are EnumMeta's own


class Registry(Protocol):
    """What outlives one letter; letters.Context says what each does."""

    lock: Any

    def key_of(self, namespace: dict[str, Any]) -> Key:
        """Name a globals dict."""
        ...

    def namespace(self, key: Key) -> dict[str, Any]:
        """The globals dict of a name."""
        ...

    def bring(self, key: Key, name: str, version: bytes, value: Any) -> None:
        """Set a global that came by letter."""
        ...

    def needed(self, need: Need) -> Brought:
        """A global as it travels."""
        ...

    def carries(self, owner: bytes) -> bool:
        """Whether letters bring what this process made."""
        ...

    def class_key(self, cls: type) -> bytes:
        """Name a class."""
        ...

    def definitions(self, cls: type) -> tuple[bytes, Definitions, list[Need]]:
        """A class's token, definitions, needs."""
        ...

    def class_of(self, token: bytes) -> type | None:
        """The class of a token or key."""
        ...

    def class_added(self, token: bytes, cls: type) -> None:
        """A class was made."""
        ...

    def class_dropped(self, token: bytes) -> None:
        """A class could not be filled."""
        ...


def travels_by_value(thing: Any) -> bool:
    """Whether an import on another machine would not find this function, class or cache."""
    module_name, path = getattr(thing, "__module__", None), thing.__qualname__
    if module_name is None or module_name in MAINS:
        return True
    found = sys.modules.get(module_name)
    for name in path.split("."):
        found = getattr(found, name, None)
    return found is not thing


class Loader(pickle.Unpickler):
    """Loads one by-value pickle; each maker below is called by the stream, by its name.

    :param data: the pickle; only ever one whose digest or tag was checked.
    :param buffers: what travelled out of band.
    :param parent: the loader of the letter that holds this definition.
    """

    def __init__(self, registry: Registry, data: Buffer, buffers: Iterable[Any] = (),
                 parent: Loader | None = None) -> None:
        super().__init__(io.BytesIO(data), buffers=buffers)
        self.registry = registry
        self.tokens: dict[bytes, bytes] = parent.tokens if parent else {}  # of each class named so far
        self.unmade: dict[bytes, Loader] = parent.unmade if parent else {}  # definitions not begun yet

    def persistent_load(self, pid: str) -> Any:
        """Answer a maker's name with the maker."""
        return getattr(self, pid)

    def bring(self, _: object, brought: Iterable[Brought]) -> None:
        """Set globals that travelled; an entry without a key was a submodule, imported by now."""
        for key, name, version, value in brought:
            if key is not None:
                self.registry.bring(key, name, version, value)

    def make_function(self, key: Key, code: bytes, name: str, cells: Any) -> FunctionType:
        """A function in its shared globals, yet without attributes."""
        return FunctionType(marshal.loads(code), self.registry.namespace(key), name, None, cells)

    def fill_function(self, function: FunctionType, state: tuple[dict[str, Any], Any, Any]) -> None:
        """Give a function its attributes, and its module the globals that it needs."""
        attributes, own, brought = state
        for name, value in attributes.items():
            setattr(function, name, value)
        function.__dict__.update(own)
        self.bring(function, brought)

    def make_cell(self) -> CellType:
        """An empty cell of a closure."""
        return CellType()

    def fill_cell(self, cell: CellType, contents: tuple[Any]) -> None:
        """Put the contents into a cell."""
        cell.cell_contents = contents[0]

    def make_cache(self, function: Any, parameters: dict[str, Any]) -> Any:
        """An empty `functools.lru_cache` around a function."""
        return functools.lru_cache(**parameters)(function)

    def make_method(self, function: Any, owner: Any) -> MethodType:
        """A bound method that its owner does not give by its name."""
        return MethodType(function, owner)

    def make_proxy(self, mapping: dict[Any, Any]) -> MappingProxyType[Any, Any]:
        """A read-only view of a mapping."""
        return MappingProxyType(mapping)

    def make_typevar(self, name: str, constraints: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """A `typing.TypeVar`."""
        return typing.TypeVar(name, *constraints, **options)

    def make_exception(self, cls: type[BaseException], args: tuple[Any, ...]) -> BaseException:
        """An exception as its built-in base makes it, since its own `__init__` may take other arguments."""
        base: Any = next(c for c in cls.__mro__ if not c.__flags__ & HEAP_TYPE)
        error: BaseException = base.__new__(cls, *args)
        base.__init__(error, *args)
        return error

    def refer_class(self, key: bytes) -> type:
        """A class that was defined in this letter or an earlier one, perhaps still without attributes."""
        token = self.tokens.get(key, key)
        return self.registry.class_of(token) or self._make_class(token)

    def make_class(self, token: bytes, definitions: Definitions) -> type:
        """The class of this token: the known one, or a new one."""
        with self.registry.lock:
            self.tokens.update((each[:KEY_BYTES], each) for each, _ in definitions)
            known = self.registry.class_of(token)
            if known is not None:
                return known
            fresh = {each: Loader(self.registry, data, parent=self) for each, data in definitions
                     if self.registry.class_of(each) is None}
            self.unmade.update(fresh)
            try:
                made = {each: self.refer_class(each[:KEY_BYTES]) for each in fresh}
                for each, loader in fresh.items():
                    _fill_class(made[each], *loader.load())
            except BaseException:
                for each in fresh:
                    self.registry.class_dropped(each)
                raise
            return made[token]

    def _make_class(self, token: bytes) -> type:
        if token not in self.unmade:
            raise pickle.UnpicklingError("a class is not known here any more; dump its instance again")
        cls = _new_class(*self.unmade.pop(token).load())
        self.registry.class_added(token, cls)
        return cls


_NAMES: dict[Any, str] = {maker: name for name, maker in vars(Loader).items()
                          if isinstance(maker, FunctionType)}


class Reducer:
    """The hooks of a pickler that takes functions and classes apart; mix it in before a Pickler.

    :ivar registry: what outlives the letter.
    :ivar mode: LETTER, VERSION (no globals, classes by token) or DEFINITION (no globals, classes by key).
    :ivar needs: the globals met so far, in order; in a letter those that it brings already.
    :ivar classes: the keys of the classes met so far, in order.
    """

    registry: Registry
    mode: int
    needs: dict[Need, None]
    classes: dict[bytes, None]

    def persistent_id(self, thing: Any) -> Any:
        """The name of a maker; None for everything else."""
        return _NAMES.get(thing) if type(thing) is FunctionType else None

    def reducer_override(self, thing: Any) -> Any:
        """Take apart what pickle cannot, or would name by an import that fails elsewhere."""
        reduce = _REDUCE.get(type(thing))
        if reduce is not None:
            return reduce(self, thing)
        if isinstance(thing, type):
            return self._class(thing)
        if isinstance(thing, BaseException):
            return _exception(thing)
        if type(thing).__module__ == "dataclasses":  # its marks are compared by identity
            marks = vars(sys.modules["dataclasses"])
            return next((name for name, mark in marks.items() if mark is thing), NotImplemented)
        return NotImplemented

    def _function(self, function: FunctionType) -> Any:
        if not travels_by_value(function):
            return function.__qualname__
        key = self.registry.key_of(function.__globals__)
        brought = self._bring(_needs(key, function)) if not isinstance(key, str) else ()
        names = ("__defaults__", "__kwdefaults__", "__doc__", "__qualname__", "__module__",
                 "__annotations__", "__type_params__")
        attributes = {name: getattr(function, name, None) for name in names}
        attributes = {name: value for name, value in attributes.items() if value or name == "__module__"}
        state = attributes, function.__dict__, brought
        code = marshal.dumps(function.__code__, MARSHAL_VERSION)
        made = (key, code, function.__name__, function.__closure__)
        return Loader.make_function, made, state, None, None, Loader.fill_function

    def _bring(self, needs: Iterable[Need]) -> tuple[Brought, ...]:
        new = [need for need in needs if need not in self.needs
               and (need[0] is None or self.registry.carries(need[0][0]))]
        self.needs.update(dict.fromkeys(new))
        return tuple(map(self.registry.needed, new)) if self.mode == LETTER else ()

    def _class(self, cls: type) -> Any:
        if cls is type(None):
            return type, (None,)
        if not travels_by_value(cls):
            return cls.__qualname__
        if not cls.__flags__ & HEAP_TYPE:
            return NotImplemented  # a type of C without a name, such as a function's: dill knows them
        key = self.registry.class_key(cls)
        self.classes[key] = None
        if self.mode == DEFINITION or not self.registry.carries(key[:16]):
            return Loader.refer_class, (key,)
        token, definitions, needs = self.registry.definitions(cls)
        if self.mode == VERSION:
            return Loader.make_class, (token, ())
        return Loader.make_class, (token, definitions), self._bring(needs), None, None, Loader.bring

    def _cell(self, cell: CellType) -> Any:
        try:
            contents = (cell.cell_contents,)
        except ValueError:  # empty
            return Loader.make_cell, ()
        return Loader.make_cell, (), contents, None, None, Loader.fill_cell

    def _cache(self, cache: Any) -> Any:
        if not travels_by_value(cache):
            return NotImplemented
        return Loader.make_cache, (cache.__wrapped__, cache.cache_parameters()), dict(vars(cache))

    def _module(self, module: ModuleType) -> Any:
        known = sys.modules.get(module.__name__) is module
        return (importlib.import_module, (module.__name__,)) if known else NotImplemented

    def _method(self, method: MethodType) -> Any:
        if getattr(method.__self__, method.__name__, None) == method:
            return getattr, (method.__self__, method.__name__)
        return Loader.make_method, (method.__func__, method.__self__)

    def _typevar(self, variable: Any) -> Any:
        if getattr(sys.modules.get(variable.__module__), variable.__name__, None) is variable \
                and variable.__module__ not in MAINS:
            return NotImplemented
        options = {"bound": variable.__bound__, "covariant": variable.__covariant__,
                   "contravariant": variable.__contravariant__}
        return Loader.make_typevar, (variable.__name__, variable.__constraints__, options)


_REDUCE: dict[type, Callable[[Reducer, Any], Any]] = {
    FunctionType: Reducer._function,
    CellType: Reducer._cell,
    CACHE_TYPE: Reducer._cache,
    ModuleType: Reducer._module,
    MethodType: Reducer._method,
    typing.TypeVar: Reducer._typevar,
    property: lambda _, thing: (property, (thing.fget, thing.fset, thing.fdel, thing.__doc__)),
    staticmethod: lambda _, thing: (staticmethod, (thing.__func__,)),
    classmethod: lambda _, thing: (classmethod, (thing.__func__,)),
    MappingProxyType: lambda _, thing: (Loader.make_proxy, (dict(thing),)),
    # A lock arrives as a new one: an RLock that dill loads is held for ever, by nobody.
    type(threading.Lock()): lambda _, thing: (threading.Lock, ()),
    type(threading.RLock()): lambda _, thing: (threading.RLock, ()),
}


def _exception(error: BaseException) -> Any:
    cls = type(error)
    usual = cls.__reduce__ is BaseException.__reduce__ and cls.__reduce_ex__ is object.__reduce_ex__
    if usual and isinstance(cls.__init__, FunctionType):
        return Loader.make_exception, (cls, error.args), error.__dict__ or None
    return NotImplemented


@functools.lru_cache(CODES_REMEMBERED)
def _global_names(code: CodeType) -> tuple[str, ...]:
    """The names that a code object, or one nested in it, reads as globals."""
    names = dict.fromkeys(step.argval for step in dis.get_instructions(code)
                          if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(dict.fromkeys(_global_names(constant)))
    return tuple(names)


def _attribute_names(code: CodeType) -> set[str]:
    nested = (_attribute_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*nested)


def _needs(key: Key, function: FunctionType) -> list[Need]:
    """The globals of a function, and the submodules it reaches through a package among them."""
    namespace = function.__globals__
    names = [name for name in _global_names(function.__code__)
             if name in namespace and name not in ("__name__", "__builtins__")]
    needs: list[Need] = [(key, name) for name in names]
    packages = [namespace[n].__name__ for n in names if isinstance(namespace[n], ModuleType)]
    attributes = sorted(_attribute_names(function.__code__)) if packages else []
    for package in packages:  # grows while it is walked: a package's package
        found = [f"{package}.{name}" for name in attributes if f"{package}.{name}" in sys.modules]
        packages += [name for name in found if name not in packages]
        needs += [(None, name) for name in found]
    return needs


def class_head(cls: type) -> tuple[Any, ...]:
    """What makes it: (metaclass, name, bases, namespace, enum members or None, a flag's boundary)."""
    own = vars(cls)
    namespace = {name: own[name] for name in ("__module__", "__slots__") if name in own}
    namespace["__qualname__"] = cls.__qualname__
    members = None
    if isinstance(cls, enum.EnumMeta):
        members = {name: member._value_ for name, member in _members(cls).items()}
    return type(cls), cls.__name__, cls.__bases__, namespace, members, getattr(cls, "_boundary_", None)


def class_rest(cls: type) -> tuple[Any, ...]:
    """What fills it: (attributes, those of each enum member, classes registered with an abstract one)."""
    attributes = {name: value for name, value in vars(cls).items() if _is_users(cls, name, value)}
    members: dict[str, dict[str, Any]] = {}
    if isinstance(cls, enum.EnumMeta):
        members = {name: {n: v for n, v in vars(member).items() if not (n[0] == "_" == n[-1])}
                   for name, member in _members(cls).items()}
    registered = abc._get_dump(cls)[0] if isinstance(cls, abc.ABCMeta) else ()  # type: ignore[attr-defined]
    return attributes, members, [ref() for ref in registered if ref() is not None]


def _members(cls: Any) -> dict[str, Any]:
    return dict(cls.__members__)


def _is_users(cls: type, name: str, value: Any) -> bool:
    if isinstance(value, (GetSetDescriptorType, MemberDescriptorType)) and value.__objclass__ is cls:
        return False  # of a slot, `__dict__` or `__weakref__`: the class makes them
    if not isinstance(cls, enum.EnumMeta):
        return name not in ("_abc_impl", "__module__", "__slots__")
    made = name in cls.__members__ or name in ("__new__", "__new_member__", "__module__")
    sunder = name[0] == "_" == name[-1] and name[1] != "_"
    return not made and (not sunder or name in ENUM_USER_NAMES)


class _Quiet:
    """Stands in front of the bases while a class is made, so that no `__init_subclass__` runs again."""

    __slots__ = ()

    def __init_subclass__(cls, **_: Any) -> None:
        pass


def _new_class(meta: Any, name: str, bases: tuple[Any, ...], namespace: dict[str, Any],
               members: dict[str, Any] | None, boundary: Any) -> type:
    maker = next(m for m in meta.__mro__ if m in (abc.ABCMeta, enum.EnumMeta)
                 or isinstance(vars(m).get("__new__"), BuiltinFunctionType)).__new__
    if members is not None:
        prepared = enum.EnumMeta.__prepare__(name, bases)
        for key, value in (*namespace.items(), *members.items()):
            prepared[key] = value
        options = {} if boundary is None else {"boundary": boundary}
        return typing.cast(type, maker(meta, name, bases, prepared, **options))
    hooked = any("__init_subclass__" in vars(c) for base in bases for c in base.__mro__ if c is not object)
    cls: type = maker(meta, name, (_Quiet, *bases) if hooked else bases, namespace)
    if hooked:
        type.__setattr__(cls, "__bases__", bases)
    return cls


def _fill_class(cls: type, attributes: dict[str, Any], members: dict[str, dict[str, Any]],
                registered: list[type]) -> None:
    for name, value in attributes.items():
        type.__setattr__(cls, name, value)
    for name, state in members.items():
        vars(_members(cls)[name]).update(state)
    for each in registered:
        typing.cast(Any, cls).register(each)


def new_namespace(name: str) -> dict[str, Any]:
    """Globals for functions whose module is not here."""
    return {"__name__": name, "__builtins__": builtins}
