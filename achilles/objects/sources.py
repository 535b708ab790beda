"""The caller's own modules: their sources travel with its functions, and a worker imports them from memory.

Knows modules and files. Knows no letter, job or worker.

The caller has imported an *own* module from a file ``….py`` in the *root* or below. No environment, no standard library
and not this package has it. The root is the script's folder, or else the working directory: in a notebook, in a shell,
under ``python -m``, and for an installed ``__main__``, such as pytest's.

::

    caller: sys.modules ─▶ own files ─▶ collect ─▶ Sources, one letter ···▶ worker: install ─▶ sys.meta_path

A module keeps its name, its file's path and its package. So tracebacks show its lines, and its classes come back as the
caller's. Data files and compiled modules do not travel.

Any thread may call any function here. Two threads that look at the files at once find the same.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import sys
import sysconfig
import time
from collections.abc import Iterable
from importlib import machinery, util
from typing import Any, NamedTuple

from ..errors import DumpError
from .names import MAINS, REMEMBERED, importable

__all__ = ["Sources", "install", "own_files", "own_sources", "reason", "root", "stamp_of"]

MAX_BYTES = 8 << 20  # of all sources: a larger set has data or a whole library in it
LOOK_SECONDS = 0.1  # between two looks of single calls at the files
PACKAGE = __package__.rpartition(".")[0]  # ours, under any name

Module = tuple[str, bytes]  # path and source; both are empty for a namespace package
Stamp = tuple[str, str, Any]  # name, path, and a value that changes with the file or the module


class Sources(NamedTuple):
    """The caller's own modules.

    :ivar name: of the set, 32 hex digits.  :ivar letter: a pickle of each `Module`, by its name.
    """

    name: str
    letter: bytes


class Look(NamedTuple):
    """The result of a look at the files: the modules `found`, until single calls look again at a time.

    :ivar seen: the count of all modules, the root, and the stamps of the own modules.
    """

    seen: tuple[int, str, tuple[Stamp, ...]] = (-1, "", ())
    again_at: float = 0.0  # monotonic
    found: Sources | None = None


_look = Look()


def own_sources(at_once: bool = True) -> Sources | None:
    """The caller's own modules as their files are now, if there are any.

    :param at_once: look at the files now; else up to LOOK_SECONDS later.
    :raises DumpError: the modules are too large.
    """
    global _look
    (last_count, last_folder, last_stamps), again_at, found = _look
    count = len(sys.modules)
    if not at_once and count == last_count and time.monotonic() < again_at:
        return found
    folder, stamps = root(), _stamps(each[:2] for each in last_stamps)
    if (count, folder, stamps) != (last_count, last_folder, last_stamps):
        stamps = _stamps(own_files(folder).items())
    if stamps != last_stamps:
        found = collect(stamps)
    _look = Look((count, folder, stamps), time.monotonic() + LOOK_SECONDS, found)
    return found


def own_files(folder: str) -> dict[str, str]:
    """The paths of the own modules, by name; "" for a namespace package, which has no file."""
    files = {name: file_of(module) for name, module in sorted(sys.modules.copy().items())}
    found = {name: path for name, path in files.items() if not why_not(name, path, folder)}
    for name in list(found):
        while name := name.rpartition(".")[0]:
            if name not in found and not files.get(name):
                found[name] = ""
    return found


def root() -> str:
    """The script's folder; the working directory without a script."""
    main = sys.modules["__main__"]
    path = file_of(main)
    if path and getattr(main, "__spec__", None) is None and not is_installed(path):
        return os.path.dirname(os.path.realpath(path))
    with contextlib.suppress(OSError):  # it was removed
        return os.getcwd()
    return os.devnull


def file_of(module: Any) -> str:
    """The path of a module's file, or ""; never loads a lazy module."""
    with contextlib.suppress(AttributeError):
        path = object.__getattribute__(module, "__dict__").get("__file__")
        return path if isinstance(path, str) else ""
    return ""


def why_not(name: str, path: str, folder: str) -> str:
    """The rule that keeps a module from travelling, or ""."""
    if name in MAINS or name == PACKAGE or name.startswith(f"{PACKAGE}."):
        return "it is achilles or the script itself"
    if not (path.endswith(".py") and os.path.isfile(path)):
        return "it has no Python source file here: install it on the node"
    if is_installed(path):
        return "it is installed here, and installed modules never travel: install it on the node, too"
    if name.partition(".")[0] in sys.stdlib_module_names:
        return f"a module of the standard library has its name: give {path} another one"
    if not os.path.realpath(path).startswith(os.path.join(folder, "")):
        return f"its file {path} is not below {folder}: put it there, or install it on the node"
    return "" if importable(name) else "an import does not find it by its name"


@functools.lru_cache(REMEMBERED)
def is_installed(path: str) -> bool:
    """Whether a file is of an environment or the standard library, or is an environment's command."""
    parts = os.path.abspath(path).split(os.sep)
    return "site-packages" in parts or "dist-packages" in parts or os.path.realpath(path).startswith(_library_folders())


@functools.cache
def _library_folders() -> tuple[str, ...]:
    folders = [*map(sysconfig.get_path, ("stdlib", "platstdlib", "scripts")),
               *(os.path.join(prefix, "bin") for prefix in (sys.prefix, sys.base_prefix))]
    return tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)


def collect(stamps: Iterable[Stamp]) -> Sources | None:
    """Read the files of these modules, if there are any. DumpError if they are too large."""
    modules: dict[str, Module] = {}
    for name, path, _ in stamps:  # a namespace package has no source; where a file is gone, the next look sees that
        with contextlib.suppress(OSError), open(path or os.devnull, "rb") as file:
            modules[name] = path, file.read()
    size = sum(len(source) for _, source in modules.values())
    if size > MAX_BYTES:
        path, source = max(modules.values(), key=lambda module: len(module[1]))
        raise DumpError(
            f"the modules beside the script have {size:,} bytes, and at most {MAX_BYTES:,} travel with a function. The "
            f"largest is {path} with {len(source):,}. Install them on the nodes, or keep data in files of another kind")
    letter = pickle.dumps(modules, 5)
    return Sources(hashlib.sha256(letter).hexdigest()[:32], letter) if modules else None


def _stamps(files: Iterable[tuple[str, str]]) -> tuple[Stamp, ...]:
    return tuple((name, path, (file_of(sys.modules.get(name)), stamp_of(path))) for name, path in files)


def stamp_of(path: str) -> tuple[int, ...]:
    """A stamp that changes with a file."""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_mtime_ns, found.st_size, found.st_ino
    return ()


def reason(name: str) -> str:
    """Why a worker did not find a module of this name: the rule and the remedy, for the caller."""
    if name not in sys.modules:
        return "this process has not imported it, so that it does not travel: import it here, too, or install it there"
    return why_not(name, file_of(sys.modules[name]), root()) or (
        "it was imported here only after the call began: import it before")


class OwnLoader(machinery.SourceFileLoader):
    """Loads a module from memory, as `importlib` loads it from its file."""

    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self._source = source

    def get_data(self, path: str) -> bytes:
        """The source. Data files do not travel, but workers on the caller's machine find them."""
        return self._source if path == self.path else super().get_data(path)

    def path_stats(self, path: str) -> Any:
        """There is no cached bytecode."""
        raise OSError


class Finder:
    """Finds a set of modules before files of the same names."""

    def __init__(self, modules: dict[str, Module]) -> None:
        self._modules = modules

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> machinery.ModuleSpec | None:
        """As `importlib` says."""
        if name not in self._modules:
            return None
        file, source = self._modules[name]
        places = None
        if not file or file.endswith(("/__init__.py", "\\__init__.py")):  # a path of the caller's system
            here = machinery.PathFinder.find_spec(name, path)  # the machines may have other modules of the package
            if not file:
                return here or machinery.ModuleSpec(name, None, is_package=True)
            places = [os.path.dirname(file), *((here and here.submodule_search_locations) or ())]
        return util.spec_from_file_location(
            name, file, loader=OwnLoader(name, file, source), submodule_search_locations=places)


def install(modules: dict[str, Module]) -> None:
    """In a worker: imports find these modules first from now on, also in place of loaded modules."""
    for name in modules:
        if not f"{PACKAGE}.".startswith(f"{name}."):
            sys.modules.pop(name, None)
    sys.meta_path.insert(0, Finder(modules))
