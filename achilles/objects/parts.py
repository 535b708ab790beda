"""Functions and classes taken apart, and classes made again, enums among them; no pickles.

Knows code objects and classes, and neither letters nor what travels. A function, class or cell by value is made in two
steps, so that they may refer to each other in any order::

    make     a function: code, cells        a class: metaclass, name, bases, `__slots__`; functions, properties and
                                            plain constants. From here on its instances can be made and compared
    fill     defaults, attributes           all other attributes, enum members first: they may hold instances of this
                                            class and of others
             a cell: its content

No hook of a class runs again, neither `__init_subclass__` nor the metaclass's `__new__` or `__init__`: what they
once did is in the attributes.
"""

from __future__ import annotations

import abc
import copyreg
import dis
import enum
import functools
import importlib.util
import marshal
import sys
import types
import weakref
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, cast

from .names import ATOMS, MISSING, Entry, Names, Slot, Space, by_path

__all__ = ["REDUCES", "Parts", "builtin_base", "drop_attributes", "evaluated", "exception_parts", "has_own",
           "is_c_type", "is_global", "make_class", "make_members", "needs_of", "parts_of", "remember", "set_attributes"]

HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, or by C code that allows the same
MARSHAL = 5 if sys.version_info >= (3, 14) else 2  # 2: the last without back references; 5: the first with slices
CODES_REMEMBERED = 1024  # code objects whose global names are kept; looking at one takes about 50 us
CODE = (FunctionType, staticmethod, classmethod, property)
MADE_ANEW = {  # by type.__new__, by abc, by annotationlib, by pickling itself, and the members of an enum
    "__dict__", "__weakref__", "__module__", "__qualname__", "__slots__", "__slotnames__", "_abc_impl",
    "__annotations_cache__", "_member_map_",
}
REDUCES = ("__reduce__", "__reduce_ex__")
HOOK = "<stop>"  # the attribute that ends type.__new__ before any hook

Parts = tuple[tuple[Any, ...], tuple[Any, ...]]  # what makes a function, class or cell, and what fills it
Member = tuple[tuple[Any, ...], dict[str, Any]]  # of an enum: arguments of `__new__`, attributes


class _Stop:
    """An attribute that ends `type.__new__` once the class is whole, before `__init_subclass__` is called."""

    owner: Any = None

    def __set_name__(self, owner: type, name: str) -> None:
        self.owner = owner
        raise InterruptedError


def is_c_type(cls: type) -> bool:
    """Whether a class is static C, without a dict that could be filled."""
    return not cls.__flags__ & HEAP_TYPE


def builtin_base(cls: type) -> Any:
    """The first class in the order of resolution whose `__new__` is written in C."""
    return next(base for base in cls.__mro__ if isinstance(vars(base).get("__new__"), types.BuiltinFunctionType))


def _class_parts(cls: Any) -> Parts:
    """What makes a class, and what fills it: the arguments of `make_class`; members, data and registered classes."""
    own = vars(cls)
    namespace = {name: own[name] for name in ("__module__", "__slots__") if name in own}
    namespace["__qualname__"] = cls.__qualname__
    attributes = {name: value for name, value in own.items() if not _is_made_anew(cls, name, value)}
    members = None
    if isinstance(cls, enum.EnumMeta):
        members = _members(cls)
        known = set(map(id, cls._member_map_.values()))
        table = attributes["_value2member_map_"].items()  # flags that were combined are in it, too
        attributes["_value2member_map_"] = {value: member for value, member in table if id(member) in known}
    code = {name: value for name, value in attributes.items() if type(value) in ATOMS or _is_code(value)}
    data = {name: value for name, value in attributes.items() if name not in code}
    references = abc._get_dump(cls)[0] if isinstance(cls, abc.ABCMeta) else ()  # type: ignore[attr-defined]
    registered = [ref() for ref in references if ref() is not None]
    return (type(cls), cls.__name__, cls.__bases__, namespace, code), (members, data, registered)


def make_class(meta: Any, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
    """Make a class with its functions and constants. Only a metaclass written in C runs code of its own."""
    maker = builtin_base(meta)
    if maker is not type:
        return cast(type, maker.__new__(meta, name, bases, namespace))
    stop = _Stop()
    try:
        type.__new__(meta, name, bases, {**namespace, HOOK: stop})
    except Exception:
        if stop.owner is None:
            raise
    cls, stop.owner = stop.owner, None
    type.__delattr__(cls, HOOK)
    if issubclass(meta, abc.ABCMeta):
        abc._abc_init(cls)  # type: ignore[attr-defined]
    return cast(type, cls)


def remember(value: Any) -> Any:
    """What tells later whether a class still has this value. It keeps nothing alive."""
    try:
        return weakref.ref(value)
    except TypeError:
        return (value,) if type(value) in ATOMS else id(value)


def _is_still(own: Any, name: str, came: dict[str, Any]) -> bool:
    """Whether an attribute is what came last."""
    now, then = remember(own[name]), came.get(name)
    if type(now) is tuple:
        return type(then) is tuple and now[0] is then[0]
    return now is then or (type(now) is int and now == then)


def set_attributes(cls: type, attributes: dict[str, Any], came: dict[str, Any]) -> None:
    """Set attributes that came by letter, but for those that running code has set since the last ones came.

    :param came: what is remembered of each attribute as it came last; kept up to date here.
    """
    own = vars(cls)
    for name, value in attributes.items():
        if name not in own or _is_still(own, name, came):
            type.__setattr__(cls, name, value)
        came[name] = remember(value)


def drop_attributes(cls: type, names: set[str], came: dict[str, Any]) -> None:
    """Take attributes away that came by letter and come no more, but for those that running code has set since."""
    for name in names:
        if name in vars(cls) and _is_still(vars(cls), name, came):
            type.__delattr__(cls, name)
        came.pop(name, None)


def make_members(cls: Any, members: dict[str, Member]) -> dict[str, Any]:
    """The members of an enum by name, each as its data type makes it; the enum's own `__new__` is not called."""
    made: dict[int, Any] = {}
    for member in members.values():
        if id(member) not in made:  # else its name is an alias
            arguments, state = member
            made[id(member)] = new = builtin_base(cls).__new__(cls, *arguments)
            new.__dict__.update(state)
    return {name: made[id(member)] for name, member in members.items()}


def _members(cls: Any) -> dict[str, Member]:
    apart: dict[int, Member] = {}
    for member in cls._member_map_.values():
        state = {name: value for name, value in vars(member).items() if name != "_inverted_"}
        apart[id(member)] = _arguments(member), state
    return {name: apart[id(member)] for name, member in cls._member_map_.items()}


def _arguments(member: Any) -> tuple[Any, ...]:
    """The arguments with which `__new__` of the built-in base makes a copy without attributes."""
    base = builtin_base(type(member))
    if base is object:
        return ()
    maker, arguments = base.__reduce_ex__(member, 2)[:2]
    return tuple(arguments[1:] if maker is copyreg.__newobj__ else arguments)  # type: ignore[attr-defined]


def _is_code(value: Any) -> bool:
    inner = [getattr(value, "__func__", value)]
    if isinstance(value, property):
        inner = [each for each in (value.fget, value.fset, value.fdel) if each is not None]
    return isinstance(value, CODE) and all(isinstance(each, FunctionType) for each in inner)


def _is_made_anew(cls: type, name: str, value: Any) -> bool:
    slot = isinstance(value, types.MemberDescriptorType) and value.__objclass__ is cls
    return slot or name in MADE_ANEW


def parts_of(names: Names, entry: Entry) -> Parts:
    """What makes the function, class or cell of an entry, and what fills it."""
    thing = entry.thing
    if isinstance(thing, CellType):
        return (), _cell_content(thing, entry.place[1] if entry.place is not None else "")
    if isinstance(thing, type):
        return _class_parts(thing)
    space = names.space_of(thing.__globals__)
    titles = thing.__name__, thing.__qualname__, thing.__module__, thing.__doc__
    code = marshal.dumps(thing.__code__, MARSHAL)
    if MARSHAL > 2:  # the same bytes each time: references by count are gone after a load
        code = marshal.dumps(marshal.loads(code), MARSHAL)
    keys = ["__defaults__", "__kwdefaults__", "__type_params__"]
    keys.append("__annotate__" if getattr(thing, "__annotate__", None) else "__annotations__")  # never evaluated here
    attributes = {key: value for key in keys if (value := getattr(thing, key, None))}
    key = space if isinstance(space, str) else space.key
    return (key, code, titles, thing.__closure__), (attributes, dict(vars(thing)))


def _cell_content(cell: CellType, name: str) -> tuple[Any, ...]:
    """The content of a variable's cell, or nothing. In ``__classdict__`` annotations look up names (Python 3.14)."""
    try:
        content = cell.cell_contents
    except ValueError:  # empty
        return ()
    if name == "__classdict__":
        content = {key: value for key, value in content.items()
                   if not (key in MADE_ANEW or key[0] == key[-1] == "_" or isinstance(value, CODE))}
    return (content,)


def is_global(function: FunctionType) -> bool:
    """Whether a function's module has it under its name."""
    first, _, rest = function.__qualname__.partition(".")
    found = function.__globals__.get(first, MISSING)
    return (by_path(found, rest) if rest else found) is function


def has_own(cls: type, *names: str) -> bool:
    """Whether a class written in Python has one of these methods, and not only what it inherits from C."""
    return any(isinstance(getattr(cls, name, None), FunctionType) for name in names)


def exception_parts(error: BaseException, by_value: bool) -> tuple[Any, Any] | None:
    """The class and arguments of an exception, and its attributes; None where pickle itself does as well."""
    cls = type(error)
    if has_own(cls, *REDUCES) or not (by_value or has_own(cls, "__init__")):
        return None
    base: Any = next(c for c in cls.__mro__ if is_c_type(c))
    _, arguments, *state = base.__reduce__(error)  # such as the file name of an OSError
    slots: list[str] = copyreg._slotnames(cls)  # type: ignore[attr-defined]
    attributes = {name: getattr(error, name) for name in slots if hasattr(error, name)}
    return (cls, arguments), {**(state[0] if state else {}), **attributes} or None


def evaluated(variable: Any, attribute: str) -> Any:
    """An attribute of a type variable or alias; None where its text names what is not there."""
    try:
        return getattr(variable, attribute, None)
    except Exception:
        return None



def needs_of(function: FunctionType, space: Space | str) -> list[Slot | str]:
    """The globals of a function, and the names of the submodules that it reaches through a package among them.

    A function of a module that is imported finds its globals there, all but those that pytest writes into it.
    """
    namespace = function.__globals__
    names = [name for name in _global_names(function.__code__)
             if name in namespace and name not in ("__name__", "__builtins__")]
    if isinstance(space, str):
        return [(Space((b"", space, 0), namespace), name) for name in names if not name.isidentifier()]
    needs: list[Slot | str] = [(space, name) for name in names]
    packages = [module.__name__ for name in names if isinstance(module := space.value(name), ModuleType)]
    attributes = sorted(_attribute_names(function.__code__)) if packages else []
    for package in packages:  # grows while it is walked: a package's package
        found = [f"{package}.{name}" for name in attributes if _is_module(f"{package}.{name}")]
        packages += [name for name in found if name not in packages]
        needs += found
    return needs


def _is_module(name: str) -> bool:
    """Whether a submodule was imported, or will be, lazily (Python 3.15)."""
    if name in sys.modules:
        return True
    if not any(f"{each}.".startswith(f"{name}.") for each in getattr(sys, "lazy_modules", ())):
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the name is no module's: from copy import copy
        return False


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
    """The names of attributes and globals in a code object and those nested in it."""
    nested = (_attribute_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*nested)

