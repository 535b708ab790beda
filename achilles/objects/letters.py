"""Letters: users' objects as bytes, and back.

Only the caller and the workers use letters; a node imports this module for its workers. It chooses the way of dumping,
and knows no job, frame or peer. loading.py has the form of a letter.

Two ways::

    1 plain     C pickle, if it neither fails nor names ``__main__``, which differs elsewhere; else
    2 by value  C pickle with byvalue's hooks: functions, classes, things that belong to them, and rare types

A letter of form 2 is a chunk with arguments to skip: a pickle of their offsets, then the chunk's letter.

Globals: in a worker, all functions by value of one module and context share one globals dict. A name that running code
has set there stays. A global that a letter brought stays until a letter brings another version.

Classes: one class of the caller is one class in a worker, also after the caller's changes. An attribute that running
code has set there stays. A letter to the caller only names the caller's functions and classes.

Threads: feeders dump and takers load at once. A context's lock guards its tables while definitions are dumped and
loaded, not while arguments and results are. The lock is reentrant: user code may run under it.

Limits: a large buffer is a view of the caller's memory: nobody may write there before the letter is answered.
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
CHUNK_BYTES = 65_536  # of a first chunk: a larger chunk may hold arrays, which travel beside the pickle
FEW_ITEMS = 64  # of a longer list, the pickle is searched for names: quicker than a look at each type
REPR_CHARACTERS = 500  # of a value that could not be dumped
ROOTS_KEPT = 1024  # functions and classes of arguments, held for their results: nobody else may hold them
HELD_BYTES = 256 << 20  # of the letters of these, and of the compared functions: as many as may be out
LETTERS_KEPT, LETTER_BYTES = 16, 1 << 17  # of definitions, loaded once; the things of a larger letter are not held

OWN_MAIN, OWN_ARGV = sys.modules["__main__"], sys.argv  # of this process
NO_OFFSETS: frozenset[int] = frozenset()
REMEDIES = {  # by whether the caller dumps: the direction, and the remedy
    True: ("to a node", "Send the data it is made from and make it in the function"),
    False: ("back", "Return the data it is made from"),
}
# Of a function and its callback: both, held so that no other object gets their ids; the counts of changed versions and
# of modules before the dump; the facts of the functions then; the letter.
UNKNOWN: Any = (), None, (), b""


class Context:
    """The state of one Pool, Executor or call in a process: globals by module, classes by token.

    Any thread may call any method.

    :ivar refresh: looks again at classes and globals, at the beginning of a job.
    :param caller: whether this is the caller. A worker's letters only name the things that the caller has.
    :param node: the id of a worker's node, for its exceptions.
    :param own: whether the process is ours: its ``__main__`` may become the caller's script.
    """

    def __init__(self, caller: bool, node: int | None = None, own: bool = False) -> None:
        self.names = Names()
        self.node = node
        self.known: dict[tuple[int, ...], tuple[Any, ...]] = {}  # by the ids of a function and its callback
        self.definitions = Definitions(self.names, caller)
        self._caller, self._own = caller, own
        self._dumped = functools.lru_cache(KEPT)(self.definitions.dump)  # of this job
        self.refresh = self._dumped.cache_clear
        self._roots: deque[tuple[int, Any]] = deque()  # results may name them; each with its part of a letter's bytes
        self._root_bytes = 0
        self._loaded = functools.lru_cache(LETTERS_KEPT)(functools.partial(define, self.names))

    def become_main(self) -> None:
        """Make the caller's script ``__main__``, with its `sys.argv`, as `pickle` in a user's function expects."""
        if self._own:
            main = next((space.module for space in self.names.scripts if space.module is not None), OWN_MAIN)
            sys.modules["__main__"], sys.argv = main, vars(main).get("__argv__", OWN_ARGV)

    def dump(self, value: Any, what: str | None = None, plain: bool = True, copied: bool = False) -> list[Buffer]:
        """Turn an object into the parts of a letter, to be sent end to end.

        A large contiguous buffer is a part of its own, without a copy. A function or initializer of the caller shares
        the objects in its globals, defaults, closure and classes.

        :param what: the object's name in an error; by default its own name or its type.
        :param plain: whether C pickle alone is tried first.
        :param copied: whether this is an argument: a copy, even with a token. A list always is.
        :raises DumpError: neither way can dump the object.
        """
        shared = type(value) is not list and self._caller and not copied
        parts = dump_plain(value) if plain and not shared else None
        try:
            return parts or self._dump_by_value(value, shared)
        except Exception as error:
            whither, remedy = REMEDIES[self._caller]
            found = error.__dict__.pop("way", "")  # of the definitions
            way = way_to(self.names, value)
            if shared:  # index 0 is the function or the initializer
                way = way.replace("its [0].", "its .", 1)
            way = way or found
            name = text_of(value, name_of) if callable(value) else f"an object of type {type(value).__qualname__}"
            text = text_of(error, str).rstrip(".")
            told = DumpError(f"{what or name} cannot be sent {whither}: {way}{text}. {remedy}")
            told.where = way if "." in way or "'" in way else ""
            raise told from error

    def load(self, letter: Buffer) -> Any:
        """Turn a letter into its object.

        Loading runs the code that the letter names: only load a letter with a checked tag or digest.

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
            is_fixed = self._caller or not any(map(self.definitions.carries, roots))  # a worker's own things may change
            is_known = is_fixed and all(root.version or root.kind == "class" for root in roots)  # no new closure
            definitions = memoryview((self._dumped if is_known else self.definitions.dump)(*roots))
            if self._caller and not shared:
                self._hold([root.thing for root in roots if root.kind in ("class", "function")], len(definitions))
        return letter_of([dumper.file.getvalue(), definitions, *dumper.views])

    def _hold(self, roots: list[Any], size: int) -> None:
        """Hold the functions and classes of arguments, and let the oldest go; `size` is their definitions'."""
        for root in roots:
            self._roots.append((size // len(roots), root))
            self._root_bytes += size // len(roots)
        while len(self._roots) > ROOTS_KEPT or self._root_bytes > max(HELD_BYTES, size):
            self._root_bytes -= self._roots.popleft()[0]


def dump_chunk(context: Context, arguments: list[Any]) -> list[Buffer]:
    """Turn consecutive arguments into the letter of a chunk.

    :raises DumpError: names the type of the first argument that cannot be dumped.
    """
    try:
        return dump_plain(arguments) or context.dump(arguments, "a chunk of arguments", plain=False)
    except DumpError:
        for argument in arguments:
            context.dump(argument, f"an argument of type {type(argument).__qualname__}", copied=True)
        raise


def dump_chunks(context: Context, arguments: list[Any], size: int) -> list[Buffer]:
    """Turn arguments into the letters of consecutive chunks, quickly.

    :param size: arguments in a chunk; the last chunk may be shorter.
    :returns: a letter in one piece for each chunk: a copy, which no later change of an array reaches.
    :raises DumpError: as `dump_chunk` does.
    """
    chunks = [arguments[at : at + size] for at in range(0, len(arguments), size)]
    with contextlib.suppress(Exception):  # dump_chunk raises the error, or dumps by value
        if len(chunks) > 1 and len(pickle.dumps(chunks[0], PICKLE)) <= CHUNK_BYTES:
            letters: list[Buffer] = [pickle.dumps(chunk, PICKLE) for chunk in chunks]
            if is_plain(b"".join(letters)):
                return letters
    return [joined(dump_chunk(context, chunk)) for chunk in chunks]


def dump_plain(value: Any) -> list[Buffer] | None:
    """The letter of a value by C pickle alone; None if pickle fails or other processes lack a module."""
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
    """Whether a pickle names only modules that other processes find, and no manager's proxy."""
    return not (GLOBAL_OPCODE in data and (b".managers" in data or any(name in data for name in [*UNFOUND])))


def joined(parts: Sequence[Buffer]) -> Buffer:
    """A letter in one piece, which nobody can change."""
    return parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else b"".join(parts)


def dump_function(context: Context, value: tuple[Any, ...], what: str | None = None) -> bytes:
    """Turn a function and its callback, or an initializer and its arguments, into a letter.

    Each dump refreshes the context. The letter is the same if nothing has changed. A function that needs only
    constants, imports and such functions is compared by identity from its second dump on. Any thread may call this.

    :param what: the value's name in an error; by default the function's.
    :raises DumpError: as `Context.dump` does.
    """
    key = tuple(map(id, value))
    with context.names.lock:  # no other dump comes between, with definitions of its own
        context.refresh()
        _, known_counts, known_facts, letter = context.known.get(key, UNKNOWN)
        counts = context.names.changes, len(sys.modules)  # a new module may be a needed submodule
        if known_counts == counts and all(starmap(is_same, known_facts)):
            return bytes(letter)
        letter = b"".join(context.dump(value, what or name_of(value[0])))
        facts = context.definitions.facts(value)
        if facts is not None:
            if len(context.known) >= KEPT or sum(len(known[-1]) for known in context.known.values()) > HELD_BYTES:
                context.known.clear()
            context.known[key] = value, counts, facts, letter
    return letter


def name_of(function: Any) -> str:
    """The name of a function in an error."""
    return f"function {getattr(function, '__qualname__', type(function).__name__)}"


def with_skips(parts: Sequence[Buffer], offsets: Collection[int]) -> list[Buffer]:
    """The letter of a chunk with these offsets to skip, instead of earlier offsets.

    :param offsets: each from 0 to the count of arguments - 1.
    """
    letter = memoryview(joined(parts))
    if letter[0] == SKIPPING:
        letter = opened(letter)[1]
    return letter_of([pickle.dumps(frozenset(offsets)), letter], SKIPPING)


def load_chunk(context: Context, letter: Buffer) -> tuple[list[Any], frozenset[int]]:
    """The arguments of a chunk, and the offsets to skip; loads as `Context.load` does."""
    if letter[0] == SKIPPING:
        offsets, whole = opened(memoryview(letter))
        return context.load(whole), pickle.loads(offsets)
    return pickle.loads(letter) if letter[0] == PICKLE_START else context.load(letter), NO_OFFSETS


def text_of(value: Any, text: Any = repr) -> str:
    """A value's repr, at most REPR_CHARACTERS of it; the name of its type where its repr raises."""
    with contextlib.suppress(Exception):
        made = str(text(value))
        return made if len(made) <= REPR_CHARACTERS else made[:REPR_CHARACTERS] + "..."
    return f"<{type(value).__qualname__}>"
