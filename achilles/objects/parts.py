"""Functions and classes taken apart, and classes made again, enums among them; no pickles.

Knows code objects and classes, and neither letters nor what travels. A function, class or cell by value is made in two
steps, so that they may refer to each other in any order::

    make     a function: globals, code, cells   a class: metaclass, name, bases, `__slots__`; functions, properties and
                                                plain constants; members of an enum. From here on its instances can be
                                                made and compared
    fill     defaults, attributes               all other attributes: they may hold instances of this class and of
                                                others
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
import marshal
import sys
import types
import weakref
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, cast

from .names import ATOMS, MISSING, by_path

__all__ = ["REDUCES", "apart", "builtin_base", "cell_content", "drop_attributes", "evaluated", "fill_of", "has_own",
           "is_c_type", "is_global", "make_class", "needs_of", "pieces_of", "remember", "set_attributes", "shell_of",
           "global_names"]

HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, or by C code that allows the same
MARSHAL = 5 if sys.version_info >= (3, 14) else 2  # 2: the last without back references; 5: the first with slices
CODES_REMEMBERED = 1024  # code objects with their global names; looking at one takes about 50 us
CODE = (FunctionType, staticmethod, classmethod, property)
MADE_ANEW = {  # by type.__new__, by abc, by annotationlib, by pickling itself, and the members of an enum
    "__dict__", "__weakref__", "__module__", "__qualname__", "__slots__", "__slotnames__", "_abc_impl",
    "__annotations_cache__", "_member_map_",
}
REDUCES = ("__reduce__", "__reduce_ex__")
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


def apart(thing: Any) -> tuple[Any, ...]:
    """The arguments with which `__new__` of the built-in base makes a copy, and what its reduction says beside."""
    base = builtin_base(type(thing))
    if base is object:
        return (), None
    reduced = base.__reduce__(thing) if isinstance(thing, BaseException) else base.__reduce_ex__(thing, 2)
    is_plain = reduced[0] is copyreg.__newobj__  # type: ignore[attr-defined]
    return tuple(reduced[1][1:] if is_plain else reduced[1]), reduced[2] if len(reduced) > 2 else None


def make_class(meta: Any, name: str, bases: tuple[type, ...], namespace: dict[str, Any], members: dict[str, Any],
               aliases: dict[str, str]) -> type:
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
    if issubclass(meta, enum.EnumMeta):
        made = {name: builtin_base(cls).__new__(cls, *arguments) for name, arguments in members.items()}
        for name, member in made.items():
            member._name_ = name
        type.__setattr__(cls, "_member_map_", {name: made[member] for name, member in aliases.items()})
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


def _is_code(value: Any) -> bool:
    inner = [getattr(value, "__func__", value)]
    if isinstance(value, property):
        inner = [each for each in (value.fget, value.fset, value.fdel) if each is not None]
    return isinstance(value, CODE) and all(isinstance(each, FunctionType) for each in inner)


def _attributes(cls: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The functions and constants of a class, and all else that it has."""
    code: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for name, value in vars(cls).items():
        is_slot = isinstance(value, types.MemberDescriptorType) and value.__objclass__ is cls
        if not is_slot and name not in MADE_ANEW:
            (code if type(value) in ATOMS or _is_code(value) else data)[name] = value
    return code, data


def pieces_of(entry: Any) -> list[tuple[Any, Any]]:
    """The values that a function, class or cell holds, and where; for what else an entry has, nothing."""
    thing, kind = entry.thing, entry.kind
    if kind in ("cell", "slot"):
        return [(value, entry.place) for value in fill_of(entry)[-1:]]
    found: list[tuple[str, str, Any]] = []
    if kind == "function":
        code, defaults = thing.__code__, thing.__defaults__ or ()
        optional = code.co_varnames[code.co_argcount - len(defaults) :]
        found += [("default", *each) for each in zip(optional, defaults)]
        found += [("default", *each) for each in (thing.__kwdefaults__ or {}).items()]
        found += [("variable", *each) for each in zip(code.co_freevars, thing.__closure__ or ())]
        found += [("attribute", *each) for each in vars(thing).items()]
    elif kind == "class" and not isinstance(thing, enum.EnumMeta):  # its tables need its members at once
        found += [("attribute", *each) for each in _attributes(thing)[1].items()]
    return [(value, (kind, name, thing.__qualname__)) for kind, name, value in found]


def shell_of(entry: Any) -> tuple[Any, ...]:
    """What makes the thing of an entry; nothing for a value."""
    thing = entry.thing
    if entry.kind == "space":
        if entry.is_imported:
            return entry.name, {}, None
        attributes = {name: thing[name] for name in ("__package__", "__file__", "__doc__") if name in thing}
        spec = thing.get("__spec__")
        return entry.name, attributes, None if spec is None else (spec.name, spec.origin)
    if entry.kind == "class":
        namespace = {name: vars(thing)[name] for name in ("__module__", "__slots__") if name in vars(thing)}
        namespace["__qualname__"] = thing.__qualname__
        table = thing._member_map_ if isinstance(thing, enum.EnumMeta) else {}
        members = {member._name_: apart(member)[0] for member in table.values()}
        aliases = {name: member._name_ for name, member in table.items()}
        return type(thing), thing.__name__, thing.__bases__, namespace, _attributes(thing)[0], members, aliases
    if entry.kind != "function":
        return ()
    code = marshal.dumps(thing.__code__, MARSHAL)
    if MARSHAL > 2:  # the same bytes each time: references by count are gone after a load
        code = marshal.dumps(marshal.loads(code), MARSHAL)
    titles = thing.__name__, thing.__qualname__, thing.__module__, thing.__doc__
    return thing.__globals__, code, titles, thing.__closure__


def fill_of(item: Any) -> tuple[Any, ...]:
    """What fills the thing of an entry once it is made, or a value or global itself; nothing if there is nothing."""
    thing, kind = item.thing, item.kind
    if kind == "slot":
        return item.space.thing, item.name, thing
    if kind == "cell":
        return cell_content(thing, item.place[1] if item.place is not None else "")
    if kind == "class":
        return _class_fill(thing)
    if kind == "function":
        keys = ["__defaults__", "__kwdefaults__", "__type_params__"]
        keys.append("__annotate__" if getattr(thing, "__annotate__", None) else "__annotations__")  # unevaluated
        filled = {key: value for key in keys if (value := getattr(thing, key, None))}, dict(vars(thing))
        return filled if any(filled) else ()
    return (thing,) if kind == "value" else ()


def _class_fill(cls: Any) -> tuple[Any, ...]:
    """Attributes, states of an enum's members, registered classes."""
    data, states = _attributes(cls)[1], {}
    if isinstance(cls, enum.EnumMeta):
        members = {member._name_: member for member in cls._member_map_.values()}
        states = {name: {key: value for key, value in vars(member).items() if key != "_inverted_"}
                  for name, member in members.items()}
        known = set(map(id, members.values()))
        table = data["_value2member_map_"].items()  # flags that were combined are in it, too
        data["_value2member_map_"] = {value: member for value, member in table if id(member) in known}
    references = abc._get_dump(cls)[0] if isinstance(cls, abc.ABCMeta) else ()  # type: ignore[attr-defined]
    return data, states, [ref() for ref in references if ref() is not None]


def cell_content(cell: CellType, name: str = "") -> tuple[Any, ...]:
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


def evaluated(variable: Any, attribute: str) -> Any:
    """An attribute of a type variable or alias; None where its text names what is not there."""
    try:
        return getattr(variable, attribute, None)
    except Exception:
        return None


def needs_of(entry: Any) -> list[Any]:
    """The globals of a function, and the names of the submodules that a function reaches through a package.

    A function of a module that is imported finds its globals there, all but those that pytest writes into it.
    """
    if entry.kind != "function":
        return []
    code, space = entry.thing.__code__, entry.names.space_of(entry.thing.__globals__)
    found = [name for name in global_names(code) if name in space.thing and name not in ("__name__", "__builtins__")]
    needs: list[Any] = [space.slot(name) for name in found if not (space.is_imported and name.isidentifier())]
    packages = [slot.thing.__name__ for slot in needs if isinstance(slot.thing, ModuleType)]
    attributes = sorted(_attribute_names(code)) if packages else []
    for package in packages:  # grows while it is walked: a package's package
        packages += [name for each in attributes if _is_module(name := f"{package}.{each}") and name not in packages]
    return needs + [name for name in packages if "." in name]


def _is_module(name: str) -> bool:
    """Whether a submodule was imported, or may be, lazily (Python 3.15)."""
    lazy = getattr(sys, "lazy_modules", ())
    return name in sys.modules or any(f"{each}.".startswith(f"{name}.") for each in lazy)


@functools.lru_cache(CODES_REMEMBERED)
def global_names(code: CodeType) -> tuple[str, ...]:
    """The names that a code object, or one nested in it, reads as globals."""
    names = dict.fromkeys(step.argval for step in dis.get_instructions(code)
                          if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(dict.fromkeys(global_names(constant)))
    return tuple(names)


def _attribute_names(code: CodeType) -> set[str]:
    """The names of attributes and globals in a code object and those nested in it."""
    nested = (_attribute_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*nested)
