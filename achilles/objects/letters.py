"""Letters: users' objects as bytes, and back.

Used in the caller and in workers alone: the server never imports this folder, and a node does so only for the workers
that it forks. Knows which way of dumping is tried. Knows nothing of jobs, frames and peers. The form of a letter is
loading.py's. How functions and classes travel is definitions.py's and byvalue.py's.

Three ways, each tried when the one before fails::

    1 plain     C pickle, where it neither fails nor names ``__main__``, which is another module elsewhere
    2 by value  C pickle with byvalue's hooks: functions, classes and what belongs to them
    3 dill      the same hooks on dill's Pickler, in Python: views, descriptors and other rarities. dill is imported at
                the first need. Its import extends the table of pickle's Python Pickler (`dill.extend`), never C
                pickle's. Nothing else is changed

A chunk of which arguments are to be skipped is a letter of form 2: the pickle is the set of their offsets, the one
buffer is the letter of the chunk.

Globals. All functions by value of one module and one context share one globals dict in a worker. A name that running
code has set there is kept. A global that came by letter is kept until a letter brings another version.

Classes. One class of the caller is one class in a worker, whatever changes in it. An attribute that the caller changes
is changed there. An attribute that running code has set there is kept. A letter to a worker carries definitions. A
letter to the caller names the caller's functions and classes alone.

Threads: feeders dump and takers load at once. A context's lock guards its tables, while definitions are dumped and
loaded, never while arguments and results are. User code may run under it, by the same thread, so it is reentrant.

Limits: large buffers are views of the caller's memory: nobody may write there before the
letter is answered.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import sys
from collections import deque
from collections.abc import Collection, Sequence
from operator import is_
from typing import Any

from ..errors import DumpError, VersionError
from . import loading
from .definitions import Definitions, dumped, facts_of, way_to
from .loading import PICKLE_START, Buffer, Loader
from .names import Names

__all__ = ["Buffer", "Context", "dump_chunk", "dump_chunks", "dump_function", "joined", "load_chunk",
           "name_of", "text_of", "with_skips"]

REPR_CHARACTERS = 500  # of a value that could not be dumped
DEFINITIONS_KEPT = 64  # letters of definitions of one job
ROOTS_KEPT = 1024  # functions and classes of arguments that live until their results come; nobody else may hold them
LETTERS_KEPT, LETTER_BYTES = 16, 1 << 17  # of definitions, loaded once; what a larger letter made ends by itself
FUNCTIONS_KEPT = 64  # letters of functions that are compared before they are dumped again

OWN_MAIN, OWN_ARGV = sys.modules["__main__"], sys.argv  # of this process
NO_OFFSETS: frozenset[int] = frozenset()
TO_A_NODE = "to a node", "Send what it is made from and make it in the function"
BACK = "back", "Return what it is made from"
# What is known of a function and its callback: the pair, held so that its ids stay its own; the functions it needs,
# and itself, or None if it needs what may change in its place; what they refer to, from before the letter was dumped;
# the counts of changed versions and of modules then, or None if that says too little; the letter.
UNKNOWN: tuple[Any, ...] = (), None, (), None, b""


class Context:
    """What shares state in a process: globals by module, classes by token. One a Pool, Executor or call.

    :param caller: True in the caller: its letters carry definitions and globals. False in a worker: its letters only
        name the things that the caller made and has.
    :param node: of a worker, the id of its node, for its exceptions to name.
    :param own: whether the process is ours, so that its ``__main__`` may be the caller's script. Any thread may call
        any method.
    """

    def __init__(self, caller: bool, node: int | None = None, own: bool = False) -> None:
        self.names = Names()
        self.lock = self.names.lock  # guards all here
        self.node = node
        self.known: dict[tuple[int, ...], tuple[Any, ...]] = {}  # by the ids of a function and its callback
        self.definitions = Definitions(self.names, caller)
        self._caller, self._own = caller, own
        self._dumped = functools.lru_cache(DEFINITIONS_KEPT)(self.definitions.dump)  # of this job
        self._roots: deque[Any] = deque(maxlen=ROOTS_KEPT if caller else 0)  # results may name them
        self._loaded = functools.lru_cache(LETTERS_KEPT)(functools.partial(loading.define, self.names))

    def refresh(self) -> None:
        """Look anew at classes and globals: to be called when a job begins."""
        self._dumped.cache_clear()

    def become_main(self) -> None:
        """Make the caller's script this process's ``__main__``, as `pickle` in a user's function expects.

        `sys.argv` is the script's, too.
        """
        if self._own:
            modules = (space.module for space in self.names.scripts if space.module is not None)
            main = next(modules, OWN_MAIN)
            sys.modules["__main__"], sys.argv = main, vars(main).get("__argv__", OWN_ARGV)

    def dump(self, value: Any, what: str | None = None) -> list[Buffer]:
        """Turn an object into a letter: parts, to be sent end to end.

        Large contiguous buffers are parts of their own and not copied. In the caller, of a function or an initializer
        with its arguments: what a global, a default, a closure or a class holds is one object there, too.

        :param what: how to call the object in an error; made from its type by default.
        :raises DumpError: neither pickle nor dill can dump it.
        :raises VersionError: dill is needed, and missing or too old.
        """
        shared = self._caller and type(value) is not list
        return self.dump_with(value, what, plain=not shared, shared=shared)

    def load(self, letter: Buffer) -> Any:
        """Turn a letter into its object. Loading runs whatever code the letter names: only ever load
        what came under a checked tag, or has its checked digest.

        :param letter: in one piece; arrays out of a bytearray are writable views of it.
        :raises ModuleNotFoundError: the letter names a module that is not here.
        """
        if letter[0] == PICKLE_START:
            return pickle.loads(letter)
        data, definitions, *buffers = loading.opened(memoryview(letter))
        is_kept = len(definitions) <= LETTER_BYTES
        with self.lock:
            define: Any = self._loaded if is_kept else self._loaded.__wrapped__
            roots = define(bytes(definitions) if is_kept else definitions) if definitions else []
            self.become_main()
        return Loader(self.names, data, buffers, roots, range(len(roots))).load()

    def dump_with(self, value: Any, what: str | None, plain: bool = True, shared: bool = False) -> list[Buffer]:
        """As `dump`.

        :param plain: whether C pickle is tried alone first.
        :param shared: whether what has a token is the same on the other side, not a copy.
        """
        parts = loading.dump_plain(value) if plain else None
        try:
            return parts or self._dump_by_value(value, shared)
        except VersionError:
            raise
        except Exception as error:
            whither, remedy = TO_A_NODE if self._caller else BACK
            item = error.__dict__.pop("item", None)  # of the definitions
            way = way_to(self.names, value)
            if shared:  # a function stands before its callback, an initializer before its arguments
                way = way.replace("its [0].", "its .", 1)
            if not way and item is not None:
                where = "the {} {!r} of {}: ".format(*item.place) if item.place is not None else ""
                way = where + way_to(self.names, item.thing)
            name = getattr(value, "__qualname__", None)
            name = f"{type(value).__name__} {name}" if name else f"an object of type {type(value).__qualname__}"
            text = text_of(error, str).rstrip(".")
            told = DumpError(f"{what or name} cannot be sent {whither}: {way}{text}. {remedy}")
            told.where = way if "." in way or "'" in way else ""
            raise told from error

    def _dump_by_value(self, value: Any, shared: bool) -> list[Buffer]:
        if shared:
            with self.lock:
                self.definitions.share(value)
        dumper = dumped(self.names, value, shares=shared)
        roots = [*dumper.refs]
        with self.lock:
            is_fixed = self._caller or not any(map(self.definitions.carries, roots))  # else it may change
            dump = self._dumped if is_fixed else self.definitions.dump
            definitions = memoryview(dump(*roots)) if roots else loading.NOTHING
            if not shared:
                self._roots.extend(root.thing for root in roots if root.kind in ("class", "function"))
        return loading.letter_of(dumper.file.getbuffer(), [definitions, *dumper.views])


def dump_chunk(context: Context, arguments: list[Any]) -> list[Buffer]:
    """Turn consecutive arguments into the letter of a chunk, with no offset to skip.

    :raises DumpError: the message names the type of the first argument that cannot be dumped.
    """
    try:
        return context.dump_with(arguments, "a chunk of arguments")
    except DumpError:
        for argument in arguments:
            context.dump_with(argument, f"an argument of type {type(argument).__qualname__}")
        raise


def dump_chunks(context: Context, arguments: list[Any], size: int) -> list[Buffer]:
    """Turn arguments into the letters of consecutive chunks, as quickly as pickle can.

    :param size: how many arguments a chunk has; the last chunk may be shorter.
    :returns: a letter in one piece for each chunk: a copy, which no later change of an array reaches.
    :raises DumpError: as `dump_chunk` does.
    """
    chunks = [arguments[at : at + size] for at in range(0, len(arguments), size)]
    with contextlib.suppress(Exception):  # dump_chunk tells what is wrong, or pickles by value
        if len(chunks) > 1 and len(pickle.dumps(chunks[0], loading.PICKLE)) <= loading.JOINED_BYTES:
            letters: list[Buffer] = [pickle.dumps(chunk, loading.PICKLE) for chunk in chunks]
            if loading.is_plain(b"".join(letters)):
                return letters
    return [joined(dump_chunk(context, chunk)) for chunk in chunks]


def joined(parts: Sequence[Buffer]) -> Buffer:
    """A letter in one piece, of the caller's own."""
    return parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else b"".join(parts)


def dump_function(context: Context, value: tuple[Any, ...], what: str | None = None) -> bytes:
    """Turn a function and its callback, or an initializer and its arguments, into a letter, in the caller.

    Looks anew at all that the function refers to, as `Context.refresh` does. The letter is the same if nothing has
    changed. From its third dump on, a function that needs constants, imports and other such functions alone is
    compared by identity instead. Any thread may call it, at every call.

    :param what: how to call the value in an error, by default as `name_of` calls the function.
    :raises DumpError: as `Context.dump` does.
    """
    context.refresh()
    key = tuple(map(id, value))
    _, known, known_facts, known_counts, known_letter = context.known.get(key, UNKNOWN)
    facts = facts_of(known or [])
    counts = context.names.changes, len(sys.modules)  # a submodule may be among the modules
    if known_counts == counts and len(facts) == len(known_facts) and all(map(is_, facts, known_facts)):
        return bytes(known_letter)
    with context.lock:
        context.definitions.order = []
        letter = b"".join(context.dump(value, what or name_of(value[0])))
        functions = context.definitions.functions(value)
        if len(context.known) >= FUNCTIONS_KEPT:
            context.known.clear()
        letter = known_letter if letter == known_letter else letter
        is_same = functions is not None and functions == known
        context.known[key] = value, functions, facts, counts if is_same else None, letter
    return letter


def name_of(function: Any) -> str:
    """How to call a function in an error."""
    return f"function {getattr(function, '__qualname__', type(function).__name__)}"


def with_skips(parts: Sequence[Buffer], offsets: Collection[int]) -> list[Buffer]:
    """The same chunk, with these offsets (0 to the number of its arguments - 1) to be left out.

    :param parts: a letter of `dump_chunk`, or of this function. Its offsets are replaced.
    """
    letter = memoryview(joined(parts))
    if letter[0] == loading.SKIPPING:
        letter = loading.opened(letter)[1]
    return loading.letter_of(pickle.dumps(frozenset(offsets)), [letter], loading.SKIPPING)


def load_chunk(context: Context, letter: Buffer) -> tuple[list[Any], frozenset[int]]:
    """The arguments of a chunk and the offsets among them to skip; as `Context.load` otherwise."""
    if letter[0] == PICKLE_START:
        return pickle.loads(letter), NO_OFFSETS
    if letter[0] != loading.SKIPPING:
        return context.load(letter), NO_OFFSETS
    offsets, whole = loading.opened(memoryview(letter))
    return context.load(whole), pickle.loads(offsets)


def text_of(value: Any, text: Any = repr) -> str:
    """Its repr, short, whatever its class does."""
    try:
        made = str(text(value))
    except Exception:
        return f"<{type(value).__qualname__}>"
    return made if len(made) <= REPR_CHARACTERS else made[:REPR_CHARACTERS] + "..."
