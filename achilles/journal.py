"""A journal: a file that keeps a call's results, so that the caller's death costs only the chunks under way.

Knows arguments, results and a file, no connection: `controller/call.py` asks for kept results and reports taken
results. Only a call with a journal imports this module.

::

    first line   {"achilles journal": 1, "the code of work": digest, "the global table": digest, …}
    other lines  index digest base64(SHA-256 of all else in the line, then the results)

    feeder ─ recall(index, arguments) ─▶ the results, if this index has a line with the digest of these arguments
    the thread that takes ─ taken(index, results) ─▶ one more line, and only then the user has the results

A journal's promises:

1. A delivered chunk, or a delivered list of a list of lists, is in the file. The next start with the file delivers it
   from there. A chunk under way runs again.
2. A chunk's digest is of its arguments' canonical form (objects/canonical.py). A chunk with other arguments, or at
   another index, runs. An argument without a canonical form runs each time.
3. The first line names the function, the callback and the chunksize. A ValueError names the file and the difference.
   The cluster, `timeout`, `buffersize` and the order of results may change.
4. A chunk with a failed argument is not kept, and runs again. So does a chunk with a result that C pickle cannot dump
   or load: a RuntimeWarning says so once.
5. A line has a checksum and ends at a newline. So a torn or altered line loses only its own results, which run again. A
   full disk is an OSError that names the file, and ends the call.
6. The file belongs to its owner alone (0600). Pickle loads its results, so its writers can run code here. A file that
   others may write to is a ValueError. So is a file that is no journal, or is in use.
7. A module beside the script (objects/sources.py) counts by the imported parts that the function names. So a comment or
   a change elsewhere in it is no other function. But nodes run the file. So a change of the file since its import is a
   ValueError. The remedy is a new process, which loses nothing.

A packet is one chunk, or one list: so the packets of all runs are the same. A chunk goes when it is complete: an input
that waits for results of its own call needs chunksize=1.

Limits: lines without a sync are lost with the machine, not with the process. Lines are never removed. The index of the
file is in memory: some 200 bytes a line. flock keeps two calls from one journal; some network file systems lack it.

The time of a module's import is unknown. So two signs tell a change between its import and the first journal: the file
is younger than the process, and Python's cached bytecode is of another version. A change goes unnoticed without /proc,
in a child that was forked after it, or where another process has cached the new file. Without cached bytecode, a module
that this process has written and then imported counts as changed.

Threads: the feeder reads, and the thread that takes writes, each by its own file object. `_lock` guards the end.
"""

from __future__ import annotations

import binascii
import contextlib
import functools
import hashlib
import json
import os
import shlex
import stat
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable
from importlib.util import MAGIC_NUMBER
from typing import Any

from .objects.canonical import can_load, digest_of, digests_of, dump_values
from .objects.sources import own_files, root, stamp_of

__all__ = ["Journal"]

NAME, VERSION = "achilles journal", 1
CHECKSUM_BYTES = 32  # SHA-256
HEADER_BYTES = 1 << 20  # far more than a first line has: another file may have no newline
LOCK_SECONDS, LOOK_SECONDS = 2.0, 0.02  # for the lock, while an iterator closes; between attempts
CLOCK_SECONDS = 0.02  # the lag of the clocks of files and processes; no process imports a module so soon
CACHE_HEAD = struct.Struct("<4s3I")  # of cached bytecode: magic number, flags, the source's time and size
M32, NANOSECONDS = 0xFFFFFFFF, 1e9
THINGS_KEPT = 256  # digests of classes and functions in arguments

_seen: dict[str, tuple[Any, Any]] = {}  # by the name of a module beside the script: its last import's spec, its stamp


class Journal:
    """One open journal.

    :param path: of the file; a missing file is made.
    :raises ValueError: the file is of another call, is no journal, is in use, or others can write to it.
    :raises OSError: the file cannot be opened.
    """

    def __init__(
        self, path: str | os.PathLike[str], func: Callable[..., Any], callback: Callable[..., Any] | None,
        chunksize: int,
    ) -> None:
        self.path = os.fspath(path)
        self._digest = functools.partial(digest_of, of_thing=functools.lru_cache(THINGS_KEPT)(digest_of))
        self._at: dict[bytes, int] = {}  # where lines begin, by index and digest
        self._out: dict[int, bytes] = {}  # the index and digest of running chunks, by index
        self._warned = False
        self._lock = threading.RLock()  # a signal handler may close the call
        check_modules(self.path)
        of_callback = {} if callback is None else digests_of(callback)
        facts = {NAME: VERSION, **digests_of(func), "callback": of_callback, "chunksize": chunksize}
        with contextlib.ExitStack() as files:
            self._writer = files.enter_context(open(self.path, "ab", buffering=0, opener=opened))
            self._reader = files.enter_context(open(self.path, "rb", opener=opened))
            self._check_file()
            self._read(facts)
            self._files = files.pop_all()

    def close(self) -> None:
        """As Watcher says."""
        with self._lock:
            self._files.close()

    # The feeder.

    def recall(self, index: int, arguments: list[Any]) -> bytes | None:
        """The letter of these arguments' results; None if the arguments must run."""
        self._out.pop(index, None)
        try:
            key = b"%d %s" % (index, self._digest(arguments).encode())
        except Exception:  # pickle cannot take an argument apart
            return None
        letter = self._letter(key)
        if letter is not None and not can_load(letter):
            self._warn(f"from argument {index} on cannot be loaded from the journal {self.path}: they run again")
            letter = None
        if letter is None:
            self._out[index] = key
        return letter

    def _letter(self, key: bytes) -> bytes | None:
        """The results of a line; None if the line is missing or altered."""
        if key in self._at:
            self._reader.seek(self._at[key])
            line = self._reader.readline()
            with contextlib.suppress(binascii.Error):
                letter = binascii.a2b_base64(line[len(key) + 1 :])[CHECKSUM_BYTES:]
                return letter if line == line_of(key, letter) else None
        return None

    # The thread that takes.

    def taken(self, start: int, values: list[Any], errors: dict[int, BaseException]) -> None:
        """As Watcher says: keep a chunk's results."""
        key = self._out.pop(start, None)
        if key is None or errors:
            return
        letter = dump_values(values)
        if letter is not None:
            self._write(line_of(key, letter))
        else:
            self._warn(f"from argument {start} on cannot be pickled: they are not kept in the journal {self.path}")

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"results {text}", RuntimeWarning, stacklevel=3)

    def _write(self, line: bytes) -> None:
        left = memoryview(line)
        try:
            with self._lock:
                while left:
                    left = left[self._writer.write(left) :]
        except OSError as error:
            error.filename = self.path
            raise

    # The beginning.

    def _check_file(self) -> None:
        """Check that the opened file is a regular file, ours alone, and lock it."""
        state = os.fstat(self._reader.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise ValueError(f"{self.path} is no journal: it is no regular file")
        if os.name != "posix":
            return
        if state.st_mode & 0o022 or state.st_uid != os.geteuid():
            raise ValueError(f"others can write to the journal {self.path}, which this process would load: make it "
                             f"yours alone, with chmod 600 {shlex.quote(self.path)}, if you have written it")
        with contextlib.suppress(OSError):  # a file system without locks
            self._lock_file()

    def _lock_file(self) -> None:
        """Lock the file. A dropped iterator soon gives its lock back, in another thread."""
        import fcntl

        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return fcntl.flock(self._writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(f"the journal {self.path} is in use by another call: close the iterator that an "
                                     "earlier call has given") from None
            threading.Event().wait(LOOK_SECONDS)

    def _read(self, facts: dict[str, Any]) -> None:
        """Compare the first line, and find the others."""
        header = json.dumps(facts).encode() + b"\n"
        line = self._reader.readline(HEADER_BYTES)
        if line != header and header.startswith(line):  # empty, or torn
            self._writer.truncate(0)
            self._write(header)
            return
        if line != header:
            raise ValueError(self._difference(line, facts))
        at = len(header)
        for line in self._reader:
            self._at[line.rpartition(b" ")[0]] = at
            at += len(line)
        if not line.endswith(b"\n"):  # torn
            self._write(b"\n")

    def _difference(self, line: bytes, facts: dict[str, Any]) -> str:
        """Why a first line is not of this call."""
        found = None
        with contextlib.suppress(ValueError):
            found = json.loads(line)
        if type(found) is not dict or found.get(NAME) != VERSION:
            return f"{self.path} is no journal of this version of achilles: give another path"
        names = [name for name in {**found, **facts} if found.get(name) != facts.get(name)]
        return (f"the journal {self.path} is of another call, which differs in {', '.join(names)}. "
                "Give another path, or remove the file to run everything again")


def opened(path: str, flags: int) -> int:
    """Open a file, without a wait for a pipe's other end."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), mode=0o600)


def check_modules(path: str) -> None:
    """Check that no module beside the script has changed since its import: nodes run the file."""
    for name, file in own_files(root()).items():
        spec, stamp = getattr(sys.modules.get(name), "__spec__", None), stamp_of(file)
        if name not in _seen or _seen[name][0] is not spec:  # imported, perhaps again
            _seen[name] = spec, None if is_edited(spec, stamp) else stamp
        if _seen[name][1] != stamp:
            raise ValueError(f"{file} has changed since this process imported it, so that the journal {path} would "
                             "hold results of other code: start the script again, or reload the module")


def is_edited(spec: Any, stamp: tuple[int, ...]) -> bool:
    """Whether a file is younger than this process, and Python's cached bytecode is of another version."""
    if not stamp or stamp[0] <= (began() + CLOCK_SECONDS) * NANOSECONDS:
        return False
    try:
        with open(getattr(spec, "cached", None) or os.devnull, "rb") as file:
            head = CACHE_HEAD.unpack(file.read(CACHE_HEAD.size))
            is_older = os.fstat(file.fileno()).st_mtime_ns < stamp[0]
        return is_older or head != (MAGIC_NUMBER, 0, int(stamp[0] / NANOSECONDS) & M32, stamp[1] & M32)
    except (OSError, struct.error):
        return True


@functools.cache
def began() -> float:
    """The time of this process's start, by the clock of files; infinity if it is unknown."""
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return float("inf")


def line_of(key: bytes, letter: bytes) -> bytes:
    """The line of a key and its results."""
    return key + b" " + binascii.b2a_base64(hashlib.sha256(key + b" " + letter).digest() + letter)
