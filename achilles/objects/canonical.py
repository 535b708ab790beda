"""The canonical form of an object: a digest that is the same in each process, as long as the object is.

Knows pickle's hooks, and how functions and classes are taken apart. Knows no letters, files or calls. A journal
compares these digests. Nothing is ever loaded from a canonical form.

::

    a function of the user's   its code, defaults, variables and attributes, and the globals that the code names
    a class of the user's      its name, bases, functions and plain attributes
    a module of the user's     the attributes that the code of a function names
    what is installed          its name alone: the standard library, and what lies in site-packages
    a set                      its items in the order of their digests
    all else                   as pickle takes it apart

A function, class or module is the user's where it is not installed, and is not of this package. The code says its
instructions, constants and names. It says no line numbers and no paths, so that a moved script and a new comment change
nothing. Equal texts are one text, whatever their identity is.

Limits: a module that a function imports itself is not looked at, and neither are the versions of what is installed.
In a function, a value that pickle cannot take apart counts by its type: a lock, an open file. As an argument, such a
value has no digest. Another Python compiles other instructions.

Threads: one thread uses a Canonical. Code of the user's, such as a `__reduce__`, runs in the calling thread.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import pickle
import sys
from collections.abc import Callable
from types import CellType, CodeType, FunctionType, MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

from .byvalue import CACHE_TYPE
from .definitions import CODE, MADE_ANEW, content_of
from .loading import PICKLE
from .names import MAINS, REMEMBERED, codes_of, global_names, is_class
from .sources import PACKAGE, file_of, is_installed

__all__ = ["digest_of", "digests_of", "dump_values"]

CODE_PARTS = ("co_code", "co_consts", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount",
              "co_posonlyargcount", "co_kwonlyargcount", "co_flags", "co_exceptiontable")
FIELDS = "__dataclass_fields__", "__attrs_attrs__", "__pydantic_fields__"  # of a class; they have the defaults
UNSEEN = {*MADE_ANEW, "__annotate__", "__annotate_func__"}  # of a class; the last two know its first line


class Canonical(pickle.Pickler):
    """Writes one canonical form into a digest.

    :param of_thing: gives the digests of functions and classes, of an argument. Without it they are written here, and
        what cannot be taken apart counts by its type.
    """

    def __init__(self, of_thing: Callable[[Any], str] | None) -> None:
        self.digest = hashlib.sha256()
        super().__init__(SimpleNamespace(write=self.digest.update), PICKLE)
        self._of_thing = of_thing
        self._texts: dict[Any, Any] = {}
        self._met: dict[int, tuple[int, Any]] = {}  # a number, and what has it, by the ids of what was taken apart

    def persistent_id(self, thing: Any) -> Any:
        """What is written in place of a thing; None where pickle takes it apart."""
        kind = type(thing)
        if kind is str or kind is bytes:
            return self._texts.setdefault(thing, thing)
        if kind is tuple:
            return [*thing]
        if kind is set or kind is frozenset:
            return [kind.__name__, sorted(digest_of(each, self._of_thing) for each in thing)]
        apart = _class if is_class(thing) else APART.get(kind)
        if apart is None:
            return None
        if self._of_thing is not None and apart in (_class, _function):
            return self._of_thing(thing)
        if id(thing) in self._met:
            return self._met[id(thing)][0]
        self._met[id(thing)] = len(self._met), thing
        return [kind.__name__, apart(thing)]

    def reducer_override(self, thing: Any) -> Any:
        """As pickle takes a thing apart; its type, and its name if it has one, where pickle cannot."""
        kind = type(thing)
        reduce = copyreg.dispatch_table.get(kind)
        try:
            found: Any = thing.__reduce_ex__(PICKLE) if reduce is None else reduce(thing)
        except Exception:
            if self._of_thing is not None:
                raise
            found = ""
        return (str, (kind.__module__, kind.__qualname__, found)) if isinstance(found, str) else found


def digest_of(value: Any, of_thing: Callable[[Any], str] | None = None) -> str:
    """The digest of a value's canonical form.

    :param of_thing: of an argument; see Canonical.
    :raises Exception: with `of_thing`: what pickle says of a value that it cannot take apart.
    """
    written = Canonical(of_thing)
    written.dump(value)
    return written.digest.hexdigest()


def digests_of(function: Any) -> dict[str, str]:
    """The digests of a function, by the names of its parts: its code with what it holds, and each of its globals."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if type(function) is not FunctionType or not is_users(function.__module__):
        return {f"the function {name}": digest_of(function)}
    found = {f"the global {each}": digest_of(value) for each, value in _globals(function).items()}
    return {f"the code of {name}": digest_of(_code(function)), **found}


def dump_values(values: list[Any]) -> bytes | None:
    """Values as a plain letter, which names their classes; None where one of them has none that an import finds.

    The same script loads it in another process: there its own classes are in `__main__`, too.
    """
    try:
        return pickle.dumps(values, PICKLE)
    except Exception:
        return None


@functools.lru_cache(REMEMBERED)
def is_users(module: Any) -> bool:
    """Whether a module, by its name, is none that is installed. One that is not there was made by the user's code."""
    found = sys.modules.get(module)
    if module in MAINS or found is None:
        return True
    path = file_of(found) or next(iter(getattr(found, "__path__", ())), "")
    return bool(path) and not is_installed(path) and not f"{module}.".startswith(f"{PACKAGE}.")


def _globals(function: FunctionType) -> dict[str, Any]:
    """The globals that code names, and what it names of the user's modules among them."""
    attributes = dict.fromkeys(name for code in codes_of(function.__code__) for name in code.co_names)
    names = [name for name in global_names(function.__code__) if not name.startswith("__")]
    found = [(name, function.__globals__[name]) for name in names if name in function.__globals__]
    modules = set()
    for at, (way, value) in enumerate(found):  # grows while it is walked
        if type(value).__name__ == "lazy_import":  # Python 3.15
            value = value.resolve()
            found[at] = way, value
        if type(value) is ModuleType and is_users(value.__name__) and value.__name__ not in modules:
            modules.add(value.__name__)
            found += [(f"{way}.{name}", vars(value)[name]) for name in attributes if name in vars(value)]
    return dict(found)


def _code(function: FunctionType) -> list[Any]:
    return [function.__code__, function.__defaults__, function.__kwdefaults__, function.__closure__, vars(function)]


def _function(function: FunctionType) -> Any:
    if not is_users(function.__module__):
        return function.__module__, function.__qualname__
    return _code(function), _globals(function)


def _class(cls: Any) -> Any:
    """Without private tables, such as a validator that pydantic made: they may hold addresses."""
    if not is_users(cls.__module__):
        return cls.__module__, cls.__qualname__
    own = {name: value for name, value in vars(cls).items()
           if name in FIELDS or (name not in UNSEEN and (not name.startswith("__") or isinstance(value, CODE)))}
    return cls.__qualname__, cls.__bases__, own


APART: dict[type, Callable[[Any], Any]] = {
    FunctionType: _function,
    CodeType: lambda code: [getattr(code, part) for part in CODE_PARTS],
    CellType: content_of,
    ModuleType: lambda module: module.__name__,
    MappingProxyType: dict,
    CACHE_TYPE: lambda cache: [cache.__wrapped__, cache.cache_parameters()],
    property: lambda made: [made.fget, made.fset, made.fdel],
    functools.partialmethod: lambda made: [made.func, made.args, made.keywords],
    **dict.fromkeys((staticmethod, classmethod), lambda made: made.__func__),
}
