"""The only place that turns users' objects into letters and letters into objects.

Used in the caller and in workers alone: the server never imports it, and a node does so only for those
that it forks. It knows what may be dumped, in which way, and what a context shares. It knows nothing of
jobs, frames and peers. How one function or class is taken apart, and put together, is byvalue.py's.

Three ways, each tried when the one before fails::

    1 plain     C pickle, where it neither fails nor names ``__main__``, which is another module elsewhere
    2 by value  C pickle with byvalue's hooks: functions, classes and what belongs to them
    3 dill      the same hooks on dill's Pickler, in Python: files, weak references, views and other
                rarities. dill is imported at the first need; its import extends the table of
                pickle's Python Pickler (`dill.extend`), never C pickle's. Nothing else is changed

A letter::

    0 | pickle                                          plain and small: nothing else to find
    form 1 or 2 | 3 zero | count u32 | length u64       big-endian; 1 plain, 2 by value
    count lengths u64 | pickle | count buffers          each buffer begins at a multiple of 16 bytes
    of a slice, in front: groups u16 | groups * 16 B    positions to skip, u32, the last ones padded

Globals. All functions by value of one module and one context share one globals dict in a worker. A name
that running code has set there is kept; what came by letter is kept too while later letters bring the
same version of it, and replaced by another version. A version is the digest of the value's dump (of a
function without its globals, which have versions of their own), taken once a job, or when the caller has
bound the name to another object.

Classes. A token is 16 bytes of the process, 4 of the class's number and 16 of the digest of the class
with all those that its definition refers to. Whoever made a class resolves its token to its own class. A
letter to a worker carries the definitions; a letter to the caller names the caller's classes alone.

Threads: feeders dump and takers load at once. A context's lock guards its tables, while names are given,
definitions dumped and classes made, never a whole dump or load. User code may run under it, by the same
thread, so it is reentrant.

Limits: 65,535 groups of positions; buffers under OUT_OF_BAND_BYTES travel inside the pickle. Buffers out
of band are views of the caller's memory: who writes there before the letter is answered changes it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import os
import pickle
import re
import struct
import sys
import threading
import traceback
import weakref
from collections.abc import Collection, Iterable, MutableMapping, Sequence
from typing import Any, NamedTuple

from ..errors import DumpError, RemoteError, VersionError
from .byvalue import (
    DEFINITION,
    KEY_BYTES,
    LETTER,
    MAINS,
    VERSION,
    Buffer,
    Definitions,
    Key,
    Loader,
    Need,
    Reducer,
    class_head,
    class_rest,
    new_namespace,
)

__all__ = ["Buffer", "Context", "dump_outcomes", "dump_slice", "encoding_error", "letter_digest",
           "letter_length", "load_outcomes", "load_slice", "own_error", "with_skips"]

PROTOCOL = 5  # the first with buffers out of band, and what 3.10 to 3.13 all have
ATOMS = frozenset({int, float, str, bytes, bool, type(None)})  # cannot name a module, whatever they hold
FEW_ITEMS = 64  # above, searching the pickle (1.3 us for 1,000 ints) is cheaper than asking each type
MAIN_NAME = b"_main__"  # in each of MAINS
OUT_OF_BAND_BYTES = 16_384  # below, a copy costs less than the parts and a letter kept alive by it
JOINED_BYTES = 65_536  # a pickle up to this is copied behind its prefix, so that it is one part
ALIGNMENT_BYTES = 16  # what numpy's vector loops like
DIGEST_BYTES = 16  # of a definition or a version: 2**64 of them before two are likely to be equal
DILL_OLDEST = (0, 4, 1)  # the first that knows Python 3.13's code and threads
REPR_CHARACTERS = 500  # of a value that could not be dumped
ENTRIES_KEPT = 4096  # definitions and versions of one job; classes made in functions would add up

PLAIN, PLAIN_BUFFERS, BY_VALUE = range(3)  # the first byte of a letter
HEAD = struct.Struct(">BxxxIQ")
GROUPS = struct.Struct(">H")
NO_SKIPS = GROUPS.pack(0)
NO_POSITION = 0xFFFFFFFF  # pads the last group


class _Definition(NamedTuple):
    """One class of this process as bytes."""

    data: bytes  # its head and its rest
    classes: tuple[bytes, ...]  # the keys of the classes it refers to
    needs: tuple[Need, ...]  # the globals its methods need


class Context:
    """What shares state in a process: globals by module, classes by token. One a Pool, Executor or call.

    :param caller: True in the caller, whose letters carry definitions and globals; False in a worker,
        where what the caller made is only named, because the caller has it.
    Any thread may call any method.
    """

    def __init__(self, caller: bool, node: int | None = None) -> None:
        self.lock = threading.RLock()  # guards all below
        self.node = node  # a worker's: where its exceptions say that they were raised
        self._caller = caller
        self._process = os.urandom(16)  # names this side of the context
        self._namespaces: dict[Key, dict[str, Any]] = {}  # kept alive, so that an id below stays theirs
        self._keys: dict[int, Key] = {}  # by the id of a namespace
        self._versions: dict[tuple[Key, str], bytes] = {}  # of each global that came by letter
        self._seen: dict[Need, tuple[Any, bytes]] = {}  # each global dumped in this job, and its version
        self._class_keys: weakref.WeakKeyDictionary[type, bytes] = weakref.WeakKeyDictionary()
        self._numbers = 0  # of classes named by this process
        # Classes by key, and by token where they came from elsewhere. What the caller made stays while
        # the context does; what a worker made, perhaps one a call, goes when nobody holds it.
        strong: dict[bytes, type] = {}
        weak: weakref.WeakValueDictionary[bytes, type] = weakref.WeakValueDictionary()
        self._own: MutableMapping[bytes, type] = strong if caller else weak
        self._foreign: MutableMapping[bytes, type] = weak if caller else strong
        # The latest foreign class of each key.
        self._latest: weakref.WeakValueDictionary[bytes, type] = weakref.WeakValueDictionary()
        self._defined: dict[bytes, _Definition] = {}  # by key, of this job

    def refresh(self) -> None:
        """Look anew at classes and globals: to be called when a job begins."""
        with self.lock:
            self._defined.clear()
            self._seen.clear()

    def dump(self, value: Any, what: str | None = None) -> list[Buffer]:
        """Turn an object into a letter: parts, to be sent end to end.

        Large contiguous buffers are parts of their own and not copied.

        :param what: how to call the object in an error; made from its type by default.
        :raises DumpError: neither pickle nor dill can dump it.
        :raises VersionError: dill is needed, and missing or too old.
        """
        return self._dump(value, b"", what)

    def load(self, letter: Buffer, start: int = 0) -> Any:
        """Turn a letter into its object. Loading runs whatever code the letter names: only ever load
        what came under a checked tag, or has its checked digest.

        :param letter: in one piece; arrays out of a bytearray are writable views of it.
        :param start: where in it the object begins, in bytes.
        :raises ModuleNotFoundError: the letter names a module that is not here.
        """
        if letter[start] == PLAIN:
            return pickle.loads(letter[start + 1 :] if len(letter) < JOINED_BYTES else memoryview(letter)[start + 1 :])
        return self._load(memoryview(letter), start)

    def _dump(self, value: Any, prefix: bytes, what: str | None, plain: bool = True) -> list[Buffer]:
        if type(value) is list and len(value) <= FEW_ITEMS and set(map(type, value)) <= ATOMS:
            if len(value) == 1 and type(value[0]) is bytes and len(value[0]) > JOINED_BYTES:
                return [_dump_behind(prefix + b"\0", value)]
            return _letter(PLAIN, prefix, pickle.dumps(value, PROTOCOL), ())
        buffers = _Buffers()
        try:
            if plain:
                data = pickle.dumps(value, PROTOCOL, buffer_callback=buffers)
                if MAIN_NAME not in data:
                    return _letter(PLAIN, prefix, data, buffers.views)
        except Exception:
            pass  # the next way tells what is wrong
        try:
            dumper = _dumped(self, LETTER, value)
            return _letter(BY_VALUE, prefix, dumper.file.getbuffer(), dumper.buffers.views)
        except VersionError:
            raise
        except Exception as error:
            whither, remedy = ("to a node", "Send what it is made from and make it in the function")
            if not self._caller:
                whither, remedy = "back", "Return what it is made from"
            message = f"{what or _name_of(value)} cannot be sent {whither}: {_text_of(error)}"
            raise DumpError(f"{message}. {remedy}") from error

    def _load(self, letter: memoryview, start: int) -> Any:
        form, count, length = HEAD.unpack_from(letter, start)
        lengths = struct.unpack_from(f">{count}Q", letter, start + HEAD.size)
        at = start + HEAD.size + 8 * count
        data, buffers = letter[at:at + length], []
        at += length
        for length in lengths:
            at += _padding(at)
            buffers.append(letter[at:at + length])
            at += length
        if form == BY_VALUE:
            return Loader(self, data, buffers).load()
        return pickle.loads(data, buffers=buffers)

    # What byvalue.Registry asks for.

    def carries(self, owner: bytes) -> bool:
        """Whether a letter of ours brings what this process made: not back to the caller, who has it."""
        return self._caller or owner == self._process

    def key_of(self, namespace: dict[str, Any]) -> Key:
        """The name of a globals dict: its module's, if an import gives it, or one of this context."""
        with self.lock:
            key = self._keys.get(id(namespace))
            if key is None:
                name = namespace.get("__name__") or MAINS[0]
                if name not in MAINS and getattr(sys.modules.get(name), "__dict__", None) is namespace:
                    return str(name)
                key = (self._process, name, len(self._keys))
                self._keys[id(namespace)], self._namespaces[key] = key, namespace
            return key

    def namespace(self, key: Key) -> dict[str, Any]:
        """The globals dict of this name, imported or made if need be."""
        if isinstance(key, str):
            return vars(importlib.import_module(key))
        with self.lock:
            if key not in self._namespaces:
                self._namespaces[key] = namespace = new_namespace(key[1])
                self._keys[id(namespace)] = key
            return self._namespaces[key]

    def bring(self, key: Key, name: str, version: bytes, value: Any) -> None:
        """Set a global that came by letter, unless it came before or running code has set it."""
        with self.lock:
            namespace, known = self.namespace(key), self._versions.get((key, name))
            self._versions[key, name] = version
            if name not in namespace or known not in (None, version):
                namespace[name] = value

    def needed(self, need: Need) -> tuple[Any, str, bytes, Any]:
        """A global as it travels: its key, its name, its version, its value."""
        key, name = need
        if key is None:
            return None, name, b"", sys.modules[name]
        value = self.namespace(key)[name]
        with self.lock:
            known, version = self._seen.get(need, (None, b""))
        if known is not value or not version:
            version = _version(self, value)
            self._remember(self._seen, need, (value, version))
        return key, name, version, value

    def class_key(self, cls: type) -> bytes:
        """The first KEY_BYTES of the class's token: who made it, and its number there."""
        with self.lock:
            key = self._class_keys.get(cls)
            if key is None:
                self._numbers += 1
                key = self._process + self._numbers.to_bytes(KEY_BYTES - 16, "big")
                self._class_keys[cls], self._own[key] = key, cls
            return key

    def definitions(self, cls: type) -> tuple[bytes, Definitions, list[Need]]:
        """A class's token; it and all classes that it refers to; the globals that all of them need."""
        with self.lock:
            found = self._reach(self.class_key(cls))
            tokens = tuple((self._token(key), each.data) for key, each in found.items())
            return tokens[0][0], tokens, [need for each in found.values() for need in each.needs]

    def class_of(self, token: bytes) -> type | None:
        """The class of a token, or the latest of a key, if it is here."""
        key = token[:KEY_BYTES]
        with self.lock:
            if key[:16] == self._process:
                return self._own.get(key)
            return self._foreign.get(token) if token != key else self._latest.get(key)

    def class_added(self, token: bytes, cls: type) -> None:
        """A class was made by its definition."""
        key = token[:KEY_BYTES]
        with self.lock:
            self._class_keys[cls] = key
            if key[:16] == self._process:
                self._own[key] = cls
            else:
                self._foreign[token] = self._latest[key] = cls

    def class_dropped(self, token: bytes) -> None:
        """Filling the class failed: nobody may find it half made."""
        with self.lock:
            self._foreign.pop(token, None)
            self._latest.pop(token[:KEY_BYTES], None)

    def _remember(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        with self.lock:
            if len(table) >= ENTRIES_KEPT:
                table.clear()
            table[key] = value

    def _reach(self, first: bytes) -> dict[bytes, _Definition]:
        """The definitions of a class and of those it refers to, however far away."""
        found: dict[bytes, _Definition] = {}
        pending = [first]
        while pending:
            key = pending.pop()
            if key not in found and self.carries(key[:16]):
                found[key] = self._define(key)
                pending.extend(found[key].classes)
        return found

    def _define(self, key: bytes) -> _Definition:
        known = self._defined.get(key)
        if known is None:
            cls = self.class_of(key)
            if cls is None:
                raise pickle.PicklingError("a class that it refers to is gone")
            dumper = _dumped(self, DEFINITION, class_head(cls), class_rest(cls))
            known = _Definition(dumper.file.getvalue(), tuple(dumper.classes), tuple(dumper.needs))
            self._remember(self._defined, key, known)
        return known

    def _token(self, key: bytes) -> bytes:
        data = (each.data for _, each in sorted(self._reach(key).items()))
        return key + letter_digest(map(_digest, data))[:DIGEST_BYTES]


def dump_slice(context: Context, arguments: list[Any]) -> list[Buffer]:
    """Turn consecutive arguments into the letter of a slice, with no position to skip.

    :raises DumpError: the message names the type of the first argument that cannot be dumped.
    """
    try:
        return context._dump(arguments, NO_SKIPS, "a slice of arguments")
    except DumpError:
        for argument in arguments:
            context.dump(argument, f"an argument of type {type(argument).__qualname__}")
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


def dump_outcomes(context: Context, values: list[Any],
                  errors: dict[int, BaseException]) -> tuple[bool, list[Buffer]]:
    """Turn what a slice gave into a letter, in the worker; never raises for what the user returned.

    :param values: one a position; what stands where there is an error is ignored.
    :param errors: exceptions by position. One that cannot be rebuilt travels as text.
    :returns: whether there is any error, and the letter. A value that cannot be dumped becomes a
        `multiprocessing.pool.MaybeEncodingError` at its position.
    """
    if not errors:
        try:
            return False, context.dump(values)
        except (DumpError, VersionError):
            pass
    entries = {position: _error_entry(context, error) for position, error in errors.items()}
    kept: list[Any] = []
    for position, value in enumerate(values):
        try:
            kept.append(None if position in entries else b"".join(context.dump(value)))
        except (DumpError, VersionError) as error:
            letter, text, _ = _error_entry(context, encoding_error(own_error(error), value))
            entries[position] = letter, text, ""  # of no code of the user's
            kept.append(None)
    return True, context.dump([kept, entries, context.node])


def load_outcomes(context: Context, letter: Buffer,
                  raised: bool) -> tuple[list[Any], dict[int, BaseException]]:
    """The values of a slice and its exceptions by position, in the caller.

    Each exception has the remote traceback, a `multiprocessing.pool.RemoteTraceback`, as `__cause__`, and
    the node's id as `node`; one that cannot be rebuilt here is a `RemoteError` with its text.
    """
    loaded = context.load(letter)
    if not raised:
        return loaded, {}
    kept, entries, node = loaded
    values = [None if each is None else context.load(bytearray(each)) for each in kept]
    return values, {position: _error_of(context, node, *entry) for position, entry in entries.items()}


def encoding_error(error: BaseException, value: Any) -> BaseException:
    """`multiprocessing.pool.MaybeEncodingError` of a value that cannot travel, with a short repr."""
    made: BaseException = importlib.import_module("multiprocessing.pool").MaybeEncodingError(error, None)
    made.value = text = _text_of(value)  # type: ignore[attr-defined]
    made.args = (repr(error), text)
    return made


def own_error(error: Any) -> Any:
    """What the user knows of: of something that cannot be dumped, the dumper's own error."""
    if not isinstance(error, DumpError) or error.__cause__ is None:
        return error
    return error.__cause__.__cause__ or error.__cause__  # the first is that of C pickle, before dill tried


def letter_digest(parts: Iterable[Buffer]) -> bytes:
    """SHA-256 of a letter, 32 bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def letter_length(parts: Iterable[Buffer]) -> int:
    """Bytes of a letter."""
    return sum(map(len, parts))


class _Buffers:
    """Takes the large buffers of a pickle out of its band."""

    def __init__(self) -> None:
        self.views: list[memoryview] = []  # flat, in their order

    def __call__(self, buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        large = view.nbytes >= OUT_OF_BAND_BYTES
        if large:
            self.views.append(view)
        return not large


class _Dumper(Reducer):
    """One attempt to dump by value; mixed in before C pickle's Pickler, and dill's."""

    def __init__(self, registry: Context, mode: int) -> None:
        self.registry, self.mode, self.needs, self.classes = registry, mode, {}, {}
        self.file, self.buffers = io.BytesIO(), _Buffers()
        callback = None if mode == DEFINITION else self.buffers
        super().__init__(self.file, PROTOCOL, buffer_callback=callback)  # type: ignore[call-arg]

    def dump(self, value: Any) -> None:
        """Append one pickle; each refers to what those before it hold."""
        super().dump(value)  # type: ignore[misc]


class _Pickler(_Dumper, pickle.Pickler):
    """Way 2."""


@functools.lru_cache(None)
def _dill_pickler() -> type[_Dumper]:
    """Way 3: dill's table of types, without its own ways for dicts, functions and numpy."""
    try:
        dill = importlib.import_module("dill")
    except ModuleNotFoundError:
        raise VersionError("dill is needed here: pip install 'dill>=0.4.1'") from None
    if tuple(map(int, re.findall(r"\d+", dill.__version__)[:3])) < DILL_OLDEST:
        raise VersionError(f"dill {dill.__version__} is too old: pip install 'dill>=0.4.1'")
    stock: Any = pickle._Pickler
    table = {**dill.Pickler.dispatch, dict: stock.save_dict}
    return type("_DillPickler", (_Dumper, dill.Pickler), {"dispatch": table, "save": stock.save})


def _dumped(context: Context, mode: int, *values: Any) -> _Dumper:
    """Dump values into one stream by way 2, or by way 3."""
    try:
        return _filled(_Pickler(context, mode), values)
    except RecursionError:
        raise
    except Exception as error:
        try:
            return _filled(_dill_pickler()(context, mode), values)
        except Exception as second:
            raise second from error


def _filled(dumper: _Dumper, values: Iterable[Any]) -> _Dumper:
    for value in values:
        dumper.dump(value)
    return dumper


def _version(context: Context, value: Any) -> bytes:
    try:
        dumper = _dumped(context, VERSION, value)
    except Exception:  # the letter itself will say so
        return os.urandom(DIGEST_BYTES)
    return letter_digest([dumper.file.getbuffer(), *dumper.buffers.views])[:DIGEST_BYTES]


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


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
    pickle.Pickler(file, PROTOCOL).dump(value)
    return file.getvalue()


def _padding(at: int) -> int:
    return -at % ALIGNMENT_BYTES


def _skips_end(view: memoryview) -> int:
    groups: int = GROUPS.unpack_from(view)[0]
    return GROUPS.size + 16 * groups


def _error_entry(context: Context, error: BaseException) -> tuple[bytes | None, str, str]:
    """An exception as it travels: its letter, if that gives an exception again, its text, its traceback."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    letter: bytes | None = None
    try:
        letter = b"".join(context._dump(error, b"", None, plain=False))
        if not isinstance(context.load(letter), BaseException):
            letter = None
    except Exception:
        letter = None
    return letter, f"{type(error).__qualname__}: {_text_of(error, str)}", text


def _error_of(
    context: Context, node: int | None, letter: bytes | None, text: str, remote_traceback: str
) -> BaseException:
    error: BaseException = RemoteError(text)
    try:
        loaded = context.load(letter) if letter is not None else None
        error = loaded if isinstance(loaded, BaseException) else error
    except Exception:
        pass  # a module or class that only the node has: the text stands
    if remote_traceback:
        error.__cause__ = importlib.import_module("multiprocessing.pool").RemoteTraceback(remote_traceback)
    with contextlib.suppress(AttributeError, TypeError):  # a class that has no room for it
        error.node = node  # type: ignore[attr-defined]
    return error


def _name_of(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    return f"{type(value).__name__} {name}" if name else f"an object of type {type(value).__qualname__}"


def _text_of(value: Any, text: Any = repr) -> str:
    """Its repr, short, whatever its class does."""
    try:
        made = str(text(value))
    except Exception:
        return f"<{type(value).__qualname__}>"
    return made if len(made) <= REPR_CHARACTERS else made[:REPR_CHARACTERS] + "..."
