"""The canonical form of an object: a digest that is the same in each process, as long as the object is.

Knows pickle's hooks, functions and classes. Knows no letters, files or calls. A journal compares these digests. No code
loads a canonical form. `can_load` loads a journal's values, only as a check.

::

    a function of the user's   its code, defaults, variables and attributes, and the globals that the code names
    a class of the user's      its name, metaclass, bases and attributes
    a module of the user's     the attributes that the code of a function names; all of them where the module is passed
                               on: as an argument, a default, a variable, an item or an attribute
    an installed thing         its name alone: of the standard library, or in site-packages
    made by installed code     its name, and its own parts: a function with variables, a class in a function
    a set                      its items in the order of their digests
    any other object           as pickle takes it apart

A function, class or module is the user's if it is neither installed nor of this package. A module without a file is the
user's, unless Python or an installed package has it. Code counts by its instructions, constants and names, not by line
numbers and paths: a moved script or a new comment changes nothing. Equal texts are one text. A function or class is a
number in its place, and is written behind its holders.

Limits: modules that a function itself imports, the versions of installed packages and annotations do not count. In a
function, a value that pickle cannot take apart counts by its type: a lock, an open file. As an argument, it has no
digest. Another Python compiles other instructions.

Threads: one thread uses a Canonical. The user's code, such as a `__reduce__`, runs in the calling thread.
"""

from __future__ import annotations

import contextlib
import copyreg
import dis
import functools
import hashlib
import pickle
import sys
from collections.abc import Callable, Iterable
from types import CellType, CodeType, FunctionType, MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

from .byvalue import CACHE_TYPE, VARIABLES, VIEWS, WEAK, parts_of
from .definitions import MADE_ANEW, content_of
from .loading import PICKLE
from .names import GLOBAL_LOADS, MAINS, REMEMBERED, codes_of, is_global, resolved, travels_by_value
from .sources import PACKAGE, file_of, is_installed

__all__ = ["can_load", "digest_of", "digests_of", "dump_values"]

CODE_PARTS = ("co_code", "co_consts", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount",
              "co_posonlyargcount", "co_kwonlyargcount", "co_flags", "co_exceptiontable")
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR")
ANNOTATIONS = {"__annotations__", "__annotate__", "__annotate_func__", "__conditional_annotations__"}
UNORDERED = set, frozenset
OF_MODULES = {  # the interpreter's names in a module
    "__name__", "__file__", "__builtins__", "__spec__", "__doc__", "__loader__", "__package__", "__cached__",
    "__path__", "__warningregistry__", *ANNOTATIONS,
}
OF_CLASSES = {  # in a class: also line numbers, names in the order of a set
    *MADE_ANEW, *ANNOTATIONS, "__firstlineno__", "__static_attributes__"} - {"__slots__"}
PRIVATE, FIELDS = "__pydantic_", "__pydantic_fields__"  # a class's tables, which hold addresses; the fields do not


class Canonical(pickle.Pickler):
    """Writes a canonical form into a digest.

    :param of_thing: for an argument: digests of functions, classes and modules. By default they are written here, and
        values that pickle cannot take apart count by their types.
    :param met: the set's `_met`, for an item of a set.
    """

    def __init__(self, of_thing: Callable[[Any], str] | None, met: dict[int, tuple[int, Any]] | None = None) -> None:
        self.digest = hashlib.sha256()
        super().__init__(SimpleNamespace(write=self.digest.update), PICKLE)
        self._of_thing = of_thing
        self._met = dict(met or {})  # by id: numbers, with their functions, classes and modules
        self._open: list[Any] = []  # things to be written
        self._ones: dict[Any, Any] = {}  # the written texts and lists, by a key that equal values share
        self._lists: dict[int, tuple[Any, list[Any]]] = {}  # by id: tuples and sets, with their lists

    def digest_of(self, value: Any) -> str:
        """The digest of a value."""
        self._open.append(value)
        for each in self._open:  # grows while it is walked
            self.dump(each)
        return self.digest.hexdigest()

    def persistent_id(self, thing: Any) -> Any:
        """The object in place of a thing; None where pickle takes the thing apart."""
        kind = type(thing)
        if kind is str or kind is bytes:
            return self._ones.setdefault(thing, thing)
        if kind in UNORDERED or kind is tuple:
            return self._list_of(thing)
        if not issubclass(kind, (type, FunctionType, ModuleType)):
            return None
        if self._of_thing is not None:
            return self._of_thing(thing)
        if id(thing) not in self._met:
            self._met[id(thing)] = len(self._met), thing
            apart = next(THINGS[base] for base in type.mro(kind) if base in THINGS)
            self._open.append([kind.__name__, apart(thing)])
        return self._met[id(thing)][0]

    def _list_of(self, items: Any) -> list[Any]:
        """A list in place of a tuple or set. Equal items share a list, so that pickle writes it once."""
        kind = type(items)
        if id(items) not in self._lists:
            made = [*items]
            if kind in UNORDERED:
                made = [kind.__name__, *sorted(Canonical(self._of_thing, self._met).digest_of(each) for each in items)]
            key = kind, *[self._key(each) for each in made]
            self._lists[id(items)] = items, self._ones.setdefault(key, made)
        return self._lists[id(items)][1]

    def _key(self, item: Any) -> Any:
        """The key of an item: items with equal keys have the same canonical form."""
        kind = type(item)
        if kind in UNORDERED or kind is tuple:
            return kind, id(self._list_of(item))
        if kind is float or kind is complex:  # 0.0 == -0.0
            return kind, repr(item)
        return kind, item if kind in (str, bytes, int, bool) else id(item)

    def reducer_override(self, thing: Any) -> Any:
        """The parts of a thing, or pickle's reduction; else its type, and its name, if any."""
        kind = type(thing)
        apart = PARTS.get(kind) or (HELD.get(kind) if self._of_thing is None else None)
        if apart is not None:
            return str, (kind.__name__,), apart(thing)
        found: Any = ""
        module, state = "", None
        try:
            reduce = copyreg.dispatch_table.get(kind)
            found = thing.__reduce_ex__(PICKLE) if reduce is None else reduce(thing)
            if isinstance(found, str):
                module = pickle.whichmodule(thing, found)  # type: ignore[attr-defined]
                state = object.__getstate__(thing) if is_users(kind.__module__) or is_users(module) else None
        except Exception:
            if self._of_thing is not None:
                raise
        return (str, (kind, module, found), state) if isinstance(found, str) else found


def digest_of(value: Any, of_thing: Callable[[Any], str] | None = None) -> str:
    """The digest of a value's canonical form.

    :param of_thing: for an argument; see Canonical.
    :raises Exception: pickle's error, with `of_thing`, if pickle cannot take a value apart.
    """
    return Canonical(of_thing).digest_of(value)


def digests_of(function: Any) -> dict[str, str]:
    """The digests of a function by its parts' names: its code with the held values, and each global."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if type(function) is not FunctionType or not is_users(function.__module__):
        return {f"the function {name}": digest_of(function)}
    found = {f"the global {each}": digest_of(value) for each, value in _globals(function).items()}
    return {f"the code of {name}": digest_of(_code(function)), **found}


def dump_values(values: list[Any]) -> bytes | None:
    """Values as a plain letter; None if an import does not find a class.

    The same script loads the letter later: its classes are in `__main__` there, too.
    """
    with contextlib.suppress(Exception):
        return pickle.dumps(values, PICKLE)
    return None


def can_load(letter: bytes) -> bool:
    """Whether plain values can be loaded: some exceptions can only be dumped, and a class may be gone."""
    with contextlib.suppress(Exception):
        pickle.loads(letter)
        return True
    return False


@functools.lru_cache(REMEMBERED)
def is_users(module: Any) -> bool:
    """Whether a module is the user's, by its name: so is a name that is not in `sys.modules`."""
    name = str(module)
    if name.partition(".")[0] in sys.stdlib_module_names or f"{name}.".startswith(f"{PACKAGE}."):
        return False
    if module in MAINS or module not in sys.modules:
        return True
    package = name.rpartition(".")[0]
    path = file_of(sys.modules[module]) or next(iter(getattr(sys.modules[module], "__path__", ())), "")
    return not is_installed(path) if path else not package or is_users(package)


def is_users_module(thing: Any) -> bool:
    """Whether a value is a module that is not installed, or only has an installed module's name."""
    return issubclass(type(thing), ModuleType) and (  # `__class__` of a proxy may raise
        is_users(thing.__name__) or sys.modules.get(thing.__name__) is not thing)


@functools.lru_cache(REMEMBERED)
def _paths(code: CodeType) -> list[str]:
    """The globals that code names, each with the attributes that follow at once: ``helper.sub.deep``."""
    found = [""]
    for each in codes_of(code):
        for step in dis.get_instructions(each):
            if step.opname in ATTRIBUTES:
                found[-1] += f".{step.argval}"
            elif step.opname != "EXTENDED_ARG":
                found.append(step.argval if step.opname in GLOBAL_LOADS else "")
    return [path for path in found if path[:1] not in ("", ".")]


def _globals(function: FunctionType) -> dict[str, Any]:
    """The globals that a function names, and the attributes that it names of the user's modules."""
    return _values(function.__globals__, _paths(function.__code__))


def _values(space: dict[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """The objects at paths from a module, without failed lazy imports (Python 3.15)."""
    found = {}
    for path in paths:
        with contextlib.suppress(KeyError, ImportError):
            way, value = _value(space, path)
            found[way] = value
    return found


def _value(space: dict[str, Any], path: str) -> tuple[str, Any]:
    """The part of a path through the user's modules, and the object at its end."""
    name, _, rest = path.partition(".")
    if name in OF_MODULES:
        raise KeyError(name)
    value = resolved(space[name])
    if not (rest and is_users_module(value)):
        return name, value
    way, value = _value(vars(value), rest)
    return f"{name}.{way}", value


def _code(function: FunctionType) -> list[Any]:
    return [function.__code__, function.__defaults__, function.__kwdefaults__, function.__closure__, vars(function)]


def _function(function: FunctionType) -> Any:
    if is_users(function.__module__) or is_users(function.__globals__.get("__name__")):
        return _code(function), _globals(function)
    name = function.__module__, function.__qualname__
    return name if is_global(function) and not function.__closure__ else (name, _code(function))


def _class(cls: Any) -> Any:
    """The text that dataclasses made of the signature does not count: like private tables, it may hold addresses."""
    if not is_users(cls.__module__) and not travels_by_value(cls):
        return cls.__module__, cls.__qualname__
    own = {name: value for name, value in vars(cls).copy().items()
           if name not in OF_CLASSES and (name == FIELDS or not name.startswith(PRIVATE))}
    if "__dataclass_fields__" in own and str(own.get("__doc__")).startswith(f"{cls.__name__}("):
        del own["__doc__"]
    made = getattr(own.get("__hash__"), "__code__", None)
    if made is not None and made.co_filename.startswith("<attrs generated"):  # a constant in it has the hash of a text
        own["__hash__"] = "from the fields"
    return cls.__qualname__, type(cls), cls.__bases__, own


def _module(module: ModuleType) -> Any:
    if not is_users_module(module):
        return module.__name__
    return module.__name__, _values(vars(module), list(vars(module)))


def _variable(variable: Any) -> Any:
    name = variable.__module__, variable.__name__
    return (name, parts_of(variable)) if is_users(variable.__module__) else name


def _cache(cache: Any) -> Any:
    own = {name: value for name, value in vars(cache).copy().items() if not name.startswith("__")}
    return cache.__wrapped__, cache.cache_parameters(), own


# How things are taken apart. THINGS are written behind their holders, PARTS in their place.
THINGS: dict[Any, Callable[[Any], Any]] = {type: _class, FunctionType: _function, ModuleType: _module}
PARTS: dict[type, Callable[[Any], Any]] = {
    CodeType: lambda code: [getattr(code, part) for part in CODE_PARTS],
    CellType: content_of,
    MappingProxyType: dict,
    CACHE_TYPE: _cache,
    property: lambda made: [made.fget, made.fset, made.fdel],
    functools.partialmethod: lambda made: [made.func, made.args, made.keywords],
    **dict.fromkeys((staticmethod, classmethod), lambda made: [made.__func__]),
    **dict.fromkeys(VARIABLES, _variable),
}
# Only in a function: pickle refuses them in an argument.
HELD: dict[Any, Callable[[Any], Any]] = {**dict.fromkeys(VIEWS, list), **WEAK}
