"""Letters: users' objects as bytes, and back.

Used in the caller and in workers alone: the server never imports this folder, and a node does so only for the workers
that it forks. Knows the forms of a letter and which way of dumping is tried. Knows nothing of jobs, frames and peers.
How functions and classes travel is definitions.py's and byvalue.py's.

Three ways, each tried when the one before fails::

    1 plain     C pickle, where it neither fails nor names ``__main__``, which is another module elsewhere
    2 by value  C pickle with byvalue's hooks: functions, classes and what belongs to them
    3 dill      the same hooks on dill's Pickler, in Python: views, descriptors and other rarities. dill is imported at
                the first need; its import extends the table of pickle's Python Pickler (`dill.extend`), never C
                pickle's. Nothing else is changed

A letter::

    0 | pickle                                          plain and small: nothing else to find
    form 1, 2 or 3 | 3 zero | count u32 | length u64    big-endian; 1 plain, 2 by value, 3 by value with definitions
    count lengths u64 | pickle | count buffers          each buffer begins at a multiple of 16 bytes
    of a slice, in front: groups u16 | groups * 16 B    positions to skip, u32, the last ones padded
    of form 3: the first buffer is a letter of form 2, the definitions

Globals. All functions by value of one module and one context share one globals dict in a worker. A name that running
code has set there is kept. A global that came by letter is kept until a letter brings another version.

Classes. One class of the caller is one class in a worker, whatever changes in it. An attribute that the caller changes
is changed there. An attribute that running code has set there is kept. A letter to a worker carries definitions; a
letter to the caller names the caller's functions and classes alone.

Threads: feeders dump and takers load at once. A context's lock guards its tables, while definitions are dumped and
loaded, never while arguments and results are. User code may run under it, by the same thread, so it is reentrant.

Limits: 65,535 groups of positions; buffers under OUT_OF_BAND_BYTES travel inside the pickle. Buffers out of band are
views of the caller's memory: who writes there before the letter is answered changes it.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import sys
import threading
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from types import FunctionType
from typing import Any

from ..errors import DumpError, VersionError
from .byvalue import PICKLE
from .definitions import Definitions
from .loading import Buffer, Loader
from .looks import Buffers
from .names import UNFOUND, Names

__all__ = ["Buffer", "Context", "dump_slice", "letter_digest", "letter_length", "load_slice", "text_of", "with_skips"]

ATOMS = frozenset({int, float, str, bytes, bool, type(None)})  # cannot name a module, whatever they hold
FEW_ITEMS = 64  # above, searching the pickle (1.3 us for 1,000 ints) is cheaper than asking each type
JOINED_BYTES = 65_536  # a pickle up to this is copied behind its prefix, so that it is one part
ALIGNMENT_BYTES = 16  # what numpy's vector loops like
REPR_CHARACTERS = 500  # of a value that could not be dumped
DEFINITIONS_KEPT = 64  # letters of definitions of one job
ROOTS_KEPT = 1024  # functions and classes of arguments that live until their results come; nobody else may hold them
LETTERS_KEPT = 4  # of definitions, loaded once; more, while they have no more bytes than the next says
LETTER_BYTES_KEPT, ROOT_BYTES = 1 << 20, 1024  # a function or class that they bring is taken for so many

OWN_MAIN = sys.modules["__main__"]  # of this process

PLAIN, PLAIN_BUFFERS, BY_VALUE, DEFINED = range(4)  # the first byte of a letter
HEAD = struct.Struct(">BxxxIQ")
GROUPS = struct.Struct(">H")
NO_SKIPS = GROUPS.pack(0)
NO_POSITION = 0xFFFFFFFF  # pads the last group


class Context:
    """What shares state in a process: globals by module, classes by token. One a Pool, Executor or call.

    :param caller: True in the caller, whose letters carry definitions and globals; False in a worker, where what the
        caller made is only named, because the caller has it.
    :param node: of a worker, the id of its node, for its exceptions to name.
    :param own: whether the process is ours, so that its ``__main__`` may be the caller's script. Any thread may call
        any method.
    """

    def __init__(self, caller: bool, node: int | None = None, own: bool = False) -> None:
        self.lock = threading.RLock()  # guards all below
        self.node = node
        self._caller, self._own = caller, own
        self._names = Names()
        self._definitions = Definitions(self._names, lambda process: caller or process in (b"", self._names.process))
        self._dumped: dict[tuple[int, ...], tuple[Any, bytes]] = {}  # of this job: roots, and a letter, by their ids
        self._roots: deque[Any] = deque(maxlen=ROOTS_KEPT if caller else 0)  # those whose results may still come
        self._loaded: dict[bytes, tuple[Any, Any]] = {}  # by digest, the latest last
        self._sizes: dict[bytes, int] = {}  # of their letters

    def refresh(self) -> None:
        """Look anew at classes and globals: to be called when a job begins."""
        with self.lock:
            self._definitions.looks.refresh()
            self._dumped.clear()

    def become_main(self) -> None:
        """Make the caller's script this process's ``__main__``, as `pickle` in a user's function expects."""
        if self._own:
            modules = (space.module for space in self._names.scripts if space.module is not None)
            sys.modules["__main__"] = next(modules, OWN_MAIN)

    def dump(self, value: Any, what: str | None = None) -> list[Buffer]:
        """Turn an object into a letter: parts, to be sent end to end.

        Large contiguous buffers are parts of their own and not copied. In the caller, of a function or an initializer
        with its arguments: what a global, a default, a closure or a class holds is one object there, too.

        :param what: how to call the object in an error; made from its type by default.
        :raises DumpError: neither pickle nor dill can dump it.
        :raises VersionError: dill is needed, and missing or too old.
        """
        return self._dump(value, b"", what, shared=self._caller)

    def load(self, letter: Buffer, start: int = 0) -> Any:
        """Turn a letter into its object. Loading runs whatever code the letter names: only ever load
        what came under a checked tag, or has its checked digest.

        :param letter: in one piece; arrays out of a bytearray are writable views of it.
        :param start: where in it the object begins, in bytes.
        :raises ModuleNotFoundError: the letter names a module that is not here.
        """
        if letter[start] == PLAIN:
            return pickle.loads(letter[start + 1 :] if len(letter) < JOINED_BYTES else memoryview(letter)[start + 1 :])
        form, data, buffers = _opened(memoryview(letter), start)
        if form == PLAIN_BUFFERS:
            return pickle.loads(data, buffers=buffers)
        roots, kept = self._define(buffers.pop(0)) if form == DEFINED else ((), None)
        value = Loader(self._names, data, buffers, roots).load()
        del kept
        return value

    def _dump(
        self, value: Any, prefix: bytes, what: str | None, plain: bool = True, shared: bool = False
    ) -> list[Buffer]:
        if type(value) is list and len(value) <= FEW_ITEMS and set(map(type, value)) <= ATOMS:
            if len(value) == 1 and type(value[0]) is bytes and len(value[0]) > JOINED_BYTES:
                return [_dump_behind(prefix + b"\0", value)]
            return _letter(PLAIN, prefix, pickle.dumps(value, PICKLE), ())
        buffers = Buffers()
        try:
            if plain and not shared:
                data = pickle.dumps(value, PICKLE, buffer_callback=buffers)
                if not any(name in data for name in UNFOUND):
                    return _letter(PLAIN, prefix, data, buffers.views)
        except Exception:
            pass  # the next way tells what is wrong
        try:
            return self._dump_by_value(value, prefix, shared)
        except VersionError:
            raise
        except Exception as error:
            whither, remedy = ("to a node", "Send what it is made from and make it in the function")
            if not self._caller:
                whither, remedy = "back", "Return what it is made from"
            way, text = self._definitions.looks.way_to(value), text_of(error, str).rstrip(".")
            if shared:  # a function stands before its callback, an initializer before its arguments
                way = way.replace("its [0].", "its .", 1)
            told = DumpError(f"{what or _name_of(value)} cannot be sent {whither}: {way}{text}. {remedy}")
            told.where = getattr(error, "where", "") or (way if "." in way or "'" in way else "")
            raise told from (error.__cause__ if isinstance(error, DumpError) else error)

    def _dump_by_value(self, value: Any, prefix: bytes, shared: bool) -> list[Buffer]:
        if shared:
            with self.lock:
                self._definitions.share(value)
        dumper = self._definitions.looks.dump_value(value, shared)
        views = dumper.buffers.views
        if dumper.roots:
            with self.lock:
                views = [memoryview(self._defined(dumper.roots)), *views]
                if not shared:
                    self._roots.extend(root for root in dumper.roots if isinstance(root, (type, FunctionType)))
        return _letter(DEFINED if dumper.roots else BY_VALUE, prefix, dumper.file.getbuffer(), views)

    def _defined(self, roots: list[Any]) -> bytes:
        """The letter that brings what definitions need for these; of one job, always the same one."""
        key = tuple(map(id, roots))
        if key not in self._dumped:
            dumper = self._definitions.dump(roots)
            parts = _letter(BY_VALUE, b"", dumper.file.getbuffer(), dumper.buffers.views)
            if not self._caller:
                self._definitions.looks.refresh()
                if any(map(self._is_own, roots)):
                    return b"".join(parts)  # what is made here may change, and ends when nobody holds it
            if len(self._dumped) >= DEFINITIONS_KEPT:
                self._dumped.clear()
            self._dumped[key] = roots, b"".join(parts)
        return self._dumped[key][1]

    def _is_own(self, thing: Any) -> bool:
        """Whether this process has made a thing, and not only loaded it."""
        entry = self._names.find(thing)
        return entry is None or entry.token[:16] == self._names.process

    def _define(self, letter: memoryview) -> tuple[Any, Any]:
        """The roots of a letter of definitions; loaded once, as long as it is among the latest."""
        digest = letter_digest([letter])
        with self.lock:
            found = self._loaded.pop(digest, None)
            if found is None:
                _, data, buffers = _opened(letter, 0)
                found = self._definitions.load(data, buffers)
                self.become_main()
            if self._caller and not all(map(self._is_own, found[0])):
                return found  # what a worker made ends when nobody holds it
            self._loaded[digest] = found
            self._sizes[digest] = len(letter) + ROOT_BYTES * len(found[0])
            while len(self._loaded) > LETTERS_KEPT and sum(self._sizes.values()) > LETTER_BYTES_KEPT:
                oldest = next(iter(self._loaded))
                del self._loaded[oldest], self._sizes[oldest]
            return found


def dump_slice(context: Context, arguments: list[Any]) -> list[Buffer]:
    """Turn consecutive arguments into the letter of a slice, with no position to skip.

    :raises DumpError: the message names the type of the first argument that cannot be dumped.
    """
    try:
        return context._dump(arguments, NO_SKIPS, "a slice of arguments")
    except DumpError:
        for argument in arguments:
            context._dump(argument, b"", f"an argument of type {type(argument).__qualname__}")
        raise


def with_skips(parts: Sequence[Buffer], positions: Collection[int]) -> list[Buffer]:
    """The same slice, with these positions (0 to the number of its arguments - 1) to be left out.

    :param parts: a letter of `dump_slice`, or of this function, whose positions are replaced.
    """
    first = memoryview(parts[0])
    groups = -(-len(positions) // 4)
    padded = [*sorted(positions), *[NO_POSITION] * (4 * groups - len(positions))]
    skips = GROUPS.pack(groups) + struct.pack(f">{4 * groups}I", *padded)
    return [skips, first[_skips_end(first):], *parts[1:]]


def load_slice(context: Context, letter: Buffer) -> tuple[list[Any], frozenset[int]]:
    """The arguments of a slice and the positions among them to skip; as `Context.load` otherwise."""
    if letter[: GROUPS.size] == NO_SKIPS:
        return context.load(letter, GROUPS.size), frozenset()
    view = memoryview(letter)
    end = _skips_end(view)
    positions = struct.unpack_from(f">{(end - GROUPS.size) // 4}I", view, GROUPS.size)
    return context.load(letter, end), frozenset(positions) - {NO_POSITION}


def letter_digest(parts: Iterable[Buffer]) -> bytes:
    """SHA-256 of a letter, 32 bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def letter_length(parts: Iterable[Buffer]) -> int:
    """Bytes of a letter."""
    return sum(map(len, parts))


def _letter(form: int, prefix: bytes, data: Buffer, buffers: Sequence[memoryview]) -> list[Buffer]:
    start = len(prefix)
    if form == PLAIN and not buffers:
        prefix += b"\0"
    else:
        lengths = [view.nbytes for view in buffers]
        head = HEAD.pack(form or PLAIN_BUFFERS, len(buffers), len(data))
        prefix += head + struct.pack(f">{len(lengths)}Q", *lengths)
    parts: list[Buffer] = [prefix + data] if len(data) <= JOINED_BYTES else [prefix, data]
    at = start + HEAD.size + 8 * len(buffers) + len(data)
    for view in buffers:
        padding = _padding(at)
        parts += [bytes(padding), view] if padding else [view]
        at += padding + view.nbytes
    return parts


def _dump_behind(prefix: bytes, value: Any) -> Buffer:
    """A plain letter of large bytes: copied once, by the file that both are written to, and not once more to join."""
    file = io.BytesIO()
    file.write(prefix)
    pickle.Pickler(file, PICKLE).dump(value)
    return file.getvalue()


def _opened(letter: memoryview, start: int) -> tuple[int, memoryview, list[memoryview]]:
    """The form of a letter, its pickle and its buffers."""
    form, count, length = HEAD.unpack_from(letter, start)
    lengths = struct.unpack_from(f">{count}Q", letter, start + HEAD.size)
    at = start + HEAD.size + 8 * count
    data, buffers = letter[at:at + length], []
    at += length
    for length in lengths:
        at += _padding(at)
        buffers.append(letter[at:at + length])
        at += length
    return form, data, buffers


def _padding(at: int) -> int:
    return -at % ALIGNMENT_BYTES


def _skips_end(view: memoryview) -> int:
    groups: int = GROUPS.unpack_from(view)[0]
    return GROUPS.size + 16 * groups


def _name_of(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    return f"{type(value).__name__} {name}" if name else f"an object of type {type(value).__qualname__}"


def text_of(value: Any, text: Any = repr) -> str:
    """Its repr, short, whatever its class does."""
    try:
        made = str(text(value))
    except Exception:
        return f"<{type(value).__qualname__}>"
    return made if len(made) <= REPR_CHARACTERS else made[:REPR_CHARACTERS] + "..."
