"""Functions and classes taken apart, and classes made again, enums among them; no pickles.

Knows code objects and classes, and neither letters nor what travels. A function, class or cell by value is made in two
steps, so that they may refer to each other in any order::

    make     a function: globals, code, cells   a class: metaclass, name, bases, `__slots__`; functions and plain
                                                constants; members of an enum. From here on its instances can be made
                                                and compared
    fill     defaults, attributes               all other attributes: they may hold instances of this class and of
                                                others
             a cell: its content

No hook of a class runs again, neither `__init_subclass__` nor the metaclass's `__new__` or `__init__`: what they
once did is in the attributes.

A class that came by letter keeps its attributes as they came, under CODE_CAME and DATA_CAME. So an attribute that
running code has set is told from one that came, and what came ends with its class.
"""

from __future__ import annotations

import abc
import copyreg
import dis
import enum
import functools
import importlib.machinery
import marshal
import sys
import types
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, cast

from .names import ATOMS, MAINS, MISSING, Space

__all__ = ["CODE_CAME", "DATA_CAME", "NEW", "REDUCED", "REDUCES", "builtin_base", "content_of", "evaluated",
           "global_names", "has_own", "is_c_type", "make_class", "pieces_of", "update_class"]

HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, or by C code that allows the same
MARSHAL = 5 if sys.version_info >= (3, 14) else 2  # 2: the last without back references; 5: the first with slices
CODES_REMEMBERED = 1024  # code objects with their global names; looking at one takes about 50 us
CODE = (FunctionType, staticmethod, classmethod)
# Names under which a class keeps what came of it by letter. To `typing`, names in _abc_ are no part of a protocol.
CODE_CAME, DATA_CAME = "_abc_code_came", "_abc_data_came"
MADE_ANEW = {  # by type.__new__, by abc, by annotationlib, by pickling itself, and the members of an enum
    "__dict__", "__weakref__", "__module__", "__qualname__", "__slots__", "__slotnames__", "_abc_impl",
    "__annotations_cache__", CODE_CAME, DATA_CAME,
}
FILLED = ("__defaults__", "__kwdefaults__", "__type_params__", "__qualname__", "__module__", "__doc__")
REDUCES = ("__reduce__", "__reduce_ex__")
NEW: Any = copyreg.__newobj__  # type: ignore[attr-defined]
HOOK = "<stop>"  # the attribute that ends type.__new__ before any hook


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
    """The first class in the order of resolution that is written in C, or has a `__new__` that is."""
    return next(base for base in cls.__mro__
                if is_c_type(base) or isinstance(vars(base).get("__new__"), types.BuiltinFunctionType))


def arguments_of(member: Any) -> Any:
    """The arguments with which `__new__` of the built-in base makes a member of an enum."""
    base = builtin_base(type(member))
    maker, arguments, *_ = (NEW, ()) if base is object else base.__reduce_ex__(member, 2)
    return arguments[1:] if maker is NEW else arguments


def make_class(meta: Any, name: str, bases: tuple[type, ...], namespace: dict[str, Any],
               members: dict[str, Any]) -> type:
    """Make a class, without the hooks of its bases. Only a metaclass written in C runs code of its own."""
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
    if issubclass(meta, enum.EnumMeta):
        made = {name: builtin_base(cls).__new__(cls, *arguments) for name, arguments in members.items()}
        for name, member in made.items():
            member._name_ = name
        type.__setattr__(cls, "_member_map_", made)
    return cast(type, cls)


def update_class(cls: type, attributes: dict[str, Any], came: str) -> None:
    """Set attributes that came by letter, and drop those that come no more.

    An attribute that running code has set since the last ones came stays.

    :param came: the name under which the class keeps the attributes as they came last. So they live as long as it.
    """
    own = vars(cls)
    last = own.get(came, {})
    for name in last.keys() - attributes.keys():
        if own.get(name, MISSING) is last[name]:
            type.__delattr__(cls, name)
    for name, value in attributes.items():
        if not last or name not in own or own[name] is last.get(name, MISSING):
            type.__setattr__(cls, name, value)
    type.__setattr__(cls, came, attributes)


def _attributes(cls: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The functions and constants of a class, and all else that it has."""
    code: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for name, value in vars(cls).items():
        is_slot = isinstance(value, types.MemberDescriptorType) and value.__objclass__ is cls
        is_code = type(value) in CODE and isinstance(getattr(value, "__func__", value), FunctionType)
        if not is_slot and name not in MADE_ANEW:
            (code if is_code or type(value) in ATOMS else data)[name] = value
    return code, data


def pieces_of(entry: Any) -> list[tuple[Any, Any]]:
    """The values that a function, class, cell or global holds, and where; for what else an entry has, nothing."""
    thing, kind = entry.thing, entry.kind
    tables: dict[str, Any] = {}
    if kind in ("slot", "cell"):
        values = [thing] if kind == "slot" else content_of(thing, entry.place[1])
        return [(value, entry.place) for value in values]
    if kind == "function":
        code, defaults = thing.__code__, thing.__defaults__ or ()
        optional = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
        tables["default"] = {**dict(zip(optional, defaults)), **(thing.__kwdefaults__ or {})}
        tables["variable"] = dict(zip(code.co_freevars, thing.__closure__ or ()))
        tables["attribute"] = vars(thing)
        tables["global"] = slots_of(thing, entry.names)
    elif kind == "class" and not isinstance(thing, enum.EnumMeta):  # its tables need its members at once
        tables["attribute"] = _attributes(thing)[1]
    return [(value, (role, name, thing.__qualname__)) for role in tables for name, value in tables[role].items()]


def _space(space: Any, thing: dict[str, Any]) -> tuple[Any, ...]:
    names = () if space.is_imported else ("__package__", "__file__", "__doc__", "__spec__")
    attributes = {name: thing[name] for name in names if thing.get(name) is not None}
    if space.name in MAINS:  # a script has its arguments in a worker, too
        attributes["__argv__"] = list(sys.argv)
    if spec := attributes.get("__spec__"):
        attributes["__spec__"] = copied = importlib.machinery.ModuleSpec(spec.name, None, origin=spec.origin)
        copied.has_location = spec.has_location
    return "space", (space.name, attributes)


def _function(entry: Any, function: Any) -> tuple[Any, ...]:
    modules = [item.thing.__name__ for item in entry.refs if isinstance(item.thing, ModuleType)]
    code = marshal.dumps(function.__code__, MARSHAL)
    if MARSHAL > 2:  # the same bytes each time: references by count are gone after a load
        code = marshal.dumps(marshal.loads(code), MARSHAL)
    annotations = "__annotate__" if getattr(function, "__annotate__", None) else "__annotations__"  # unevaluated
    filled = {key: value for key in (*FILLED, annotations) if (value := getattr(function, key, None))}
    submodules = submodules_of(function.__code__, modules)
    arguments = function.__globals__, code, function.__name__, function.__closure__, submodules
    return "function", arguments, (dict(vars(function)), filled)


def _class(_: Any, cls: Any) -> tuple[Any, ...]:
    namespace = {name: vars(cls)[name] for name in ("__module__", "__slots__") if name in vars(cls)}
    namespace["__qualname__"] = cls.__qualname__
    code, data = _attributes(cls)
    table = cls._member_map_ if isinstance(cls, enum.EnumMeta) else {}
    members = {member._name_: member for member in table.values()}
    if isinstance(cls, enum.EnumMeta):  # flags that were combined are in it, too
        values = data["_value2member_map_"].items()
        data["_value2member_map_"] = {value: member for value, member in values if table.get(member._name_) is member}
    made = {name: arguments_of(member) for name, member in members.items()}
    states = {name: {key: value for key, value in vars(member).items() if key != "_inverted_"}
              for name, member in members.items()}
    references = abc._get_dump(cls)[0] if isinstance(cls, abc.ABCMeta) else ()  # type: ignore[attr-defined]
    registered = [ref() for ref in references if ref() is not None]
    arguments = type(cls), cls.__name__, cls.__bases__, namespace, code, made
    return "new_class", arguments, (data, states, registered), None, None, "fill_class"


def _cell(entry: Any, cell: CellType) -> tuple[Any, ...]:
    return "cell", (), *[(None, {"cell_contents": content}) for content in content_of(cell, entry.place[1])]


REDUCED: dict[str, Any] = {  # by the kind of an entry, what makes its thing and fills it, with the names of makers
    "space": _space,
    "function": _function,
    "class": _class,
    "cell": _cell,
    "slot": lambda slot, value: ("slot", (slot.space.thing, slot.name, value)),
}


def content_of(cell: CellType, name: str = "") -> list[Any]:
    """The content of a variable's cell, or nothing. In ``__classdict__`` annotations look up names (Python 3.14)."""
    try:
        content = cell.cell_contents
    except ValueError:  # empty
        return []
    if name == "__classdict__":
        content = {key: value for key, value in content.items()
                   if not (key in MADE_ANEW or key[0] == key[-1] == "_" or isinstance(value, (*CODE, property)))}
    return [content]


def has_own(cls: type, *names: str) -> bool:
    """Whether a class written in Python has one of these methods, and not only what it inherits from C."""
    return any(isinstance(getattr(cls, name, None), FunctionType) for name in names)


def evaluated(variable: Any, attribute: str) -> Any:
    """An attribute of a type variable or alias; None where its text names what is not there."""
    try:
        return getattr(variable, attribute, None)
    except Exception:
        return None


def slots_of(function: FunctionType, names: Any) -> dict[str, Any]:
    """The globals of a function, but for those that it finds in the module that an import gives.

    It does not find there the names that pytest writes into a module.
    """
    space = names.name(function.__globals__, kind=Space)
    found = [name for name in global_names(function.__code__)
             if name in space.thing and name not in ("__name__", "__builtins__")]
    return {name: space.slot(name) for name in found if not (space.is_imported and name.isidentifier())}


def submodules_of(code: CodeType, packages: list[str]) -> list[str]:
    """The names of the submodules that code reaches through packages."""
    lazy = " ".join(["", *getattr(sys, "lazy_modules", ())])  # Python 3.15
    attributes = sorted({name for each in codes_of(code) for name in each.co_names}) if packages else []
    for package in packages:  # grows while it is walked: a package's package
        names = (f"{package}.{each}" for each in attributes)
        packages += [name for name in names if name in sys.modules or f" {name}" in lazy]
    return [name for name in packages if "." in name]


def codes_of(code: CodeType) -> list[CodeType]:
    """A code object and those nested in it."""
    found = [code]
    for each in found:  # grows while it is walked
        found += [constant for constant in each.co_consts if isinstance(constant, CodeType)]
    return found


@functools.lru_cache(CODES_REMEMBERED)
def global_names(code: CodeType) -> tuple[str, ...]:
    """The names that a code object, or one nested in it, reads as globals."""
    names = [step.argval for each in codes_of(code) for step in dis.get_instructions(each)
             if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")]
    return tuple(dict.fromkeys(names))
