"""Letters: users' objects as bytes, and back.

Used in the caller and in workers alone: the server never imports this folder, and a node does so only for the workers
that it forks. Knows which way of dumping is tried. Knows nothing of jobs, frames and peers. The form of a letter is
loading.py's. How functions and classes travel is definitions.py's and byvalue.py's.

Two ways::

    1 plain     C pickle, where it neither fails nor names ``__main__``, which is another module elsewhere; else
    2 by value  C pickle with byvalue's hooks: functions, classes, what belongs to them, and rarities

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
from itertools import starmap
from typing import Any

from ..errors import DumpError
from .byvalue import Dumper
from .definitions import Definitions, is_same, way_to
from .loading import NOTHING, PICKLE, SKIPPING, Buffer, Loader, define, letter_of, opened, take_large
from .names import ATOMS, KEPT, UNFOUND, Names

__all__ = ["PICKLE_START", "Buffer", "Context", "dump_chunk", "dump_chunks", "dump_function", "dump_plain", "joined",
           "load_chunk", "name_of", "text_of", "with_skips"]

PICKLE_START = 0x80  # the first byte of a bare pickle, which is a plain letter (PROTO, pickletools)
GLOBAL_OPCODE = b"\x93"  # without it, a pickle names no module (STACK_GLOBAL, pickletools)
CHUNK_BYTES = 65_536  # of a first chunk: larger ones may hold arrays, which travel beside the pickle
FEW_ITEMS = 64  # above, to search the pickle for names is quicker than to ask each item for its type
REPR_CHARACTERS = 500  # of a value that could not be dumped
ROOTS_KEPT = 1024  # functions and classes of arguments that live until their results come; nobody else may hold them
LETTERS_KEPT, LETTER_BYTES = 16, 1 << 17  # of definitions, loaded once; what a larger letter made ends by itself

OWN_MAIN, OWN_ARGV = sys.modules["__main__"], sys.argv  # of this process
NO_OFFSETS: frozenset[int] = frozenset()
REMEDIES = {  # by whether the caller dumps: where a value cannot be sent, and what to do
    True: ("to a node", "Send what it is made from and make it in the function"),
    False: ("back", "Return what it is made from"),
}
# What is known of a function and its callback: both, held so that their ids stay their own; the counts of changed
# versions and of modules, from before the letter was dumped; the facts of its functions then; the letter.
UNKNOWN: Any = (), None, (), b""


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
        self.node = node
        self.known: dict[tuple[int, ...], tuple[Any, ...]] = {}  # by the ids of a function and its callback
        self.definitions = Definitions(self.names, caller)
        self._caller, self._own = caller, own
        self._dumped = functools.lru_cache(KEPT)(self.definitions.dump)  # of this job
        self._roots: deque[Any] = deque(maxlen=ROOTS_KEPT if caller else 0)  # results may name them
        self._loaded = functools.lru_cache(LETTERS_KEPT)(functools.partial(define, self.names))

    def refresh(self) -> None:
        """Look anew at classes and globals: to be called when a job begins."""
        self._dumped.cache_clear()

    def become_main(self) -> None:
        """Make the caller's script this process's ``__main__``, as `pickle` in a user's function expects.

        `sys.argv` is the script's, too.
        """
        if self._own:
            main = next((space.module for space in self.names.scripts if space.module is not None), OWN_MAIN)
            sys.modules["__main__"], sys.argv = main, vars(main).get("__argv__", OWN_ARGV)

    def dump(self, value: Any, what: str | None = None, plain: bool = True, copied: bool = False) -> list[Buffer]:
        """Turn an object into a letter: parts, to be sent end to end.

        Large contiguous buffers are parts of their own and not copied. In the caller, of a function or an initializer
        with its arguments: what a global, a default, a closure or a class holds is one object there, too.

        :param what: how to call the object in an error; made from its type by default.
        :param plain: whether C pickle is tried alone first.
        :param copied: whether this is an argument, as a list is: a copy, whatever has a token.
        :raises DumpError: neither way can dump it.
        """
        shared = type(value) is not list and self._caller and not copied
        parts = dump_plain(value) if plain and not shared else None
        try:
            return parts or self._dump_by_value(value, shared)
        except Exception as error:
            whither, remedy = REMEDIES[self._caller]
            found = error.__dict__.pop("way", "")  # of the definitions
            way = way_to(self.names, value)
            if shared:  # a function stands before its callback, an initializer before its arguments
                way = way.replace("its [0].", "its .", 1)
            way = way or found
            name = name_of(value) if hasattr(value, "__qualname__") else f"an object of type {type(value).__qualname__}"
            text = text_of(error, str).rstrip(".")
            told = DumpError(f"{what or name} cannot be sent {whither}: {way}{text}. {remedy}")
            told.where = way if "." in way or "'" in way else ""
            raise told from error

    def load(self, letter: Buffer) -> Any:
        """Turn a letter into its object. Loading runs whatever code the letter names: only ever load
        what came under a checked tag, or has its checked digest.

        :param letter: in one piece; arrays out of a bytearray are writable views of it.
        :raises ModuleNotFoundError: the letter names a module that is not here.
        """
        if letter[0] == PICKLE_START:
            return pickle.loads(letter)
        data, definitions, *buffers = opened(memoryview(letter))
        is_kept = len(definitions) <= LETTER_BYTES
        with self.names.lock:
            made: Any = self._loaded if is_kept else self._loaded.__wrapped__
            roots = made(bytes(definitions) if is_kept else definitions) if definitions else []
            self.become_main()
        return Loader(self.names, data, buffers, roots, range(len(roots))).load()

    def _dump_by_value(self, value: Any, shared: bool) -> list[Buffer]:
        if shared:
            with self.names.lock:
                self.definitions.share(value)
        dumper = Dumper(self.names, value, shares=shared)
        roots = [*dumper.refs]
        with self.names.lock:
            is_fixed = self._caller or not any(map(self.definitions.carries, roots))  # else it may change
            dump = self._dumped if is_fixed else self.definitions.dump
            definitions = memoryview(dump(*roots))
            if not shared:
                self._roots.extend(root.thing for root in roots if root.kind in ("class", "function"))
        return letter_of([dumper.file.getvalue(), definitions, *dumper.views])


def dump_chunk(context: Context, arguments: list[Any]) -> list[Buffer]:
    """Turn consecutive arguments into the letter of a chunk, with no offset to skip.

    :raises DumpError: the message names the type of the first argument that cannot be dumped.
    """
    try:
        return dump_plain(arguments) or context.dump(arguments, "a chunk of arguments", plain=False)
    except DumpError:
        for argument in arguments:
            context.dump(argument, f"an argument of type {type(argument).__qualname__}", copied=True)
        raise


def dump_chunks(context: Context, arguments: list[Any], size: int) -> list[Buffer]:
    """Turn arguments into the letters of consecutive chunks, as quickly as pickle can.

    :param size: how many arguments a chunk has; the last chunk may be shorter.
    :returns: a letter in one piece for each chunk: a copy, which no later change of an array reaches.
    :raises DumpError: as `dump_chunk` does.
    """
    chunks = [arguments[at : at + size] for at in range(0, len(arguments), size)]
    with contextlib.suppress(Exception):  # dump_chunk tells what is wrong, or pickles by value
        if len(chunks) > 1 and len(pickle.dumps(chunks[0], PICKLE)) <= CHUNK_BYTES:
            letters: list[Buffer] = [pickle.dumps(chunk, PICKLE) for chunk in chunks]
            if is_plain(b"".join(letters)):
                return letters
    return [joined(dump_chunk(context, chunk)) for chunk in chunks]


def dump_plain(value: Any) -> list[Buffer] | None:
    """The letter of a value by C pickle alone; None if that fails, or names a module that another process has not."""
    if type(value) is list and len(value) <= FEW_ITEMS and (
            type(value[0]) in ATOMS if len(value) == 1 else ATOMS.issuperset(map(type, value))):
        return [pickle.dumps(value, PICKLE)]
    views: list[memoryview] = []
    try:
        data = pickle.dumps(value, PICKLE, buffer_callback=functools.partial(take_large, views))
    except Exception:
        return None
    parts: list[Buffer] = letter_of([data, NOTHING, *views]) if views else [data]
    return parts if is_plain(data) else None


def is_plain(data: bytes) -> bool:
    """Whether another process finds all modules that a pickle names, and no proxy of a manager is in it."""
    return not (GLOBAL_OPCODE in data and (b".managers" in data or any(name in data for name in UNFOUND)))


def joined(parts: Sequence[Buffer]) -> Buffer:
    """A letter in one piece, of the caller's own."""
    return parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else b"".join(parts)


def dump_function(context: Context, value: tuple[Any, ...], what: str | None = None) -> bytes:
    """Turn a function and its callback, or an initializer and its arguments, into a letter, in the caller.

    Looks anew at all that the function refers to, as `Context.refresh` does. The letter is the same if nothing has
    changed. From its second dump on, a function that needs constants, imports and other such functions alone is
    compared by identity instead. Any thread may call it, at every call.

    :param what: how to call the value in an error, by default as `name_of` calls the function.
    :raises DumpError: as `Context.dump` does.
    """
    context.refresh()
    key = tuple(map(id, value))
    _, known_counts, known_facts, letter = context.known.get(key, UNKNOWN)
    counts = context.names.changes, len(sys.modules)  # a submodule may be among the modules
    if known_counts == counts and all(starmap(is_same, known_facts)):
        return bytes(letter)
    with context.names.lock:
        letter = b"".join(context.dump(value, what or name_of(value[0])))
        facts = context.definitions.facts(value)
        if facts is not None:
            if len(context.known) >= KEPT:
                context.known.clear()
            context.known[key] = value, counts, facts, letter
    return letter


def name_of(function: Any) -> str:
    """How to call a function in an error."""
    return f"function {getattr(function, '__qualname__', type(function).__name__)}"


def with_skips(parts: Sequence[Buffer], offsets: Collection[int]) -> list[Buffer]:
    """The same chunk, with these offsets (0 to the number of its arguments - 1) to be left out.

    :param parts: a letter of `dump_chunk`, or of this function. Its offsets are replaced.
    """
    letter = memoryview(joined(parts))
    if letter[0] == SKIPPING:
        letter = opened(letter)[1]
    return letter_of([pickle.dumps(frozenset(offsets)), letter], SKIPPING)


def load_chunk(context: Context, letter: Buffer) -> tuple[list[Any], frozenset[int]]:
    """The arguments of a chunk and the offsets among them to skip; as `Context.load` otherwise."""
    if letter[0] == SKIPPING:
        offsets, whole = opened(memoryview(letter))
        return context.load(whole), pickle.loads(offsets)
    return pickle.loads(letter) if letter[0] == PICKLE_START else context.load(letter), NO_OFFSETS


def text_of(value: Any, text: Any = repr) -> str:
    """Its repr, short, whatever its class does."""
    try:
        made = str(text(value))
    except Exception:
        return f"<{type(value).__qualname__}>"
    return made if len(made) <= REPR_CHARACTERS else made[:REPR_CHARACTERS] + "..."
