"""The original interface: map, imap and imap_unordered, each with a connection of its own.

::

    map             -> [[…], […]]                                     when all is done
    imap            -> {'ARGS_COUNTER': 0, 'RESULT': […]}, {…}, …     in order, each as soon as it is next
    imap_unordered  -> the same                                       as they arrive

A RESULT has the results of one packet: `cpu_count * chunksize` arguments of the node that it was first
given to, or one list, where `args` has lists; with a journal, those of one chunk. The options after
`secret_key` are keyword-only; `map`'s docstring is the table of them for all three.

Threads: results are loaded, and `callback_error` runs, in the thread that takes; the arguments are
iterated in the job's feeder. Any number of calls may run at once, in any threads.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import threading
from _thread import start_new_thread
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

from . import config
from .config import SecretKey, Settings
from .controller.call import Call, NotYet
from .controller.connection import RECONNECT_SECONDS, Controller, tell
from .controller.job import Job, Taken
from .errors import ConfigurationError
from .objects import letters
from .objects.outcomes import mark
from .objects.sources import own_sources
from .options import JournalPath, Output, Show, checked, keeping, shower, watching
from .protocol.frames import letter_of

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["Packets", "cluster_status", "connect", "imap", "imap_unordered", "kill_cluster", "map"]

NOWHERE = None, None, None, None, None  # no host, port, username, secret and encryption given

Args = Iterable[Any] | Callable[[], Iterable[Any]]
Packet = dict[str, Any]


class Packets(Iterator[Packet], contextlib.AbstractContextManager["Packets"]):
    """The iterator of imap and imap_unordered. It cancels its call when it is closed or dropped."""

    def __init__(
        self, controller: Controller, call: Call, callback_error: Callable[[Any], Any] | None
    ) -> None:
        self._controller, self._call = controller, call
        self._closed = threading.Event()
        self._packets: Any = _packets(controller, call, self._closed, callback_error)
        self._taking = threading.RLock()  # several threads may take from one iterator, each packet once

    def __next__(self) -> Packet:
        with self._taking:
            if self._packets.gi_running:
                raise RuntimeError("this iterator is being read: by its own arguments, or by callback_error")
            try:
                return next(self._packets)
            except BaseException:  # the end, too
                self.close()
                raise

    def close(self) -> None:
        """Cancel the rest of the call and close the connection. Idempotent."""
        if not self._closed.is_set():
            self._closed.set()
            _cancel(self._call, self._controller)

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the interpreter's end half of it may be gone
            if not self._closed.is_set():  # collected in any thread, which may hold any lock and must not be kept
                closer = threading.Thread(
                    target=_cancel, args=(self._call, self._controller), name="achilles-closer", daemon=True)
                start_new_thread(closer.start, ())  # `threading` must know a thread that joins others


def _packets(
    controller: Controller, call: Call, closed: threading.Event, callback_error: Callable[[Any], Any] | None
) -> Iterator[Packet]:
    """Yield the packets of a call. It ends early where it is closed. It does not know the Packets: it may be dropped.

    A StopIteration of the user's code is raised as a RuntimeError, as in any generator (PEP 479), and names its place.
    """
    while (taken := _take(controller, call, closed)) is not None:
        start, values, errors = taken
        for place, error in sorted(errors.items()):
            if callback_error is None and isinstance(error, StopIteration):
                told = RuntimeError(f"argument {getattr(error, 'index', '?')} raised StopIteration")
                raise mark(told, index=getattr(error, "index", None), node=getattr(error, "node", None)) from error
            if callback_error is None:
                raise error
            values[place] = callback_error(error)
        yield {"ARGS_COUNTER": start, "RESULT": values}


def _take(controller: Controller, call: Call, closed: threading.Event) -> Taken | None:
    """Return the call's next values, or None behind the last ones. Look meanwhile whether there are nodes."""
    while True:
        with contextlib.suppress(NotYet):
            try:
                return call.take(controller.look_seconds)
            except Exception:
                if not closed.is_set():  # by this thread, or by another one meanwhile
                    raise
                return None
        controller.look()


def map(
    func: Callable[[Any], Any], args: Args, callback: Callable[[Any], Any] | None = None, chunksize: int = 1,
    host: str | None = None, port: int | None = None, username: str | None = None, secret_key: SecretKey = None, *,
    callback_error: Callable[[Any], Any] | None = None, buffersize: int | None = None,
    wait_for_nodes: float | None = None, reconnect_seconds: float = RECONNECT_SECONDS, timeout: float | None = None,
    executor: Executor | None = None, output: Output = None, progress: Show = None, journal: JournalPath = None,
    encrypt: bool | None = None,
) -> list[list[Any]]:
    """Call `func` with each argument, on all nodes; return the results as an ordered list of lists.

    :param func: called with one argument, in a worker. Lambdas, closures and functions of `__main__` will do.
    :param args: a list, a list of lists, a generator function, or any iterable. Where the first argument is a
        list, all must be lists: then `func` is called with their elements, and each list is one packet.
    :param callback: applied to each result, in the worker, right after `func`.
    :param chunksize: arguments that are dumped together, at least 1; unused where `args` has lists.
    :param host: name or address of the server, or "local" for a cluster of this process on this machine.
    :param port: 0..65535. Settings that are None are looked for in ACHILLES_HOST, ACHILLES_PORT, ACHILLES_USERNAME and
        ACHILLES_SECRET_KEY, then in the configuration file, then asked for on a terminal.
    :param username: 1 to 32 bytes of UTF-8.
    :param secret_key: the cluster's secret.
    :param callback_error: called in this thread with the exception of each argument that failed. The exception has
        `.index` (of the argument in `args`), `.node` (the node's id) and the remote traceback as `__cause__`.
        The callback's result takes that place. Without it, the first error is raised and the job is cancelled.
    :param buffersize: how many arguments may be out and not taken yet, at least 1. By default, two chunks
        for each worker of the cluster and 64, up to 65,536 more while they are quick, and 256 MiB.
    :param wait_for_nodes: seconds to wait for a node; by default without end.
    :param reconnect_seconds: how long to try to reach a lost server again.
    :param timeout: seconds that the call for one argument may take; then its worker is replaced, and there
        is a TaskTimeout at its index.
    :param output: True writes each line that `func` prints to this process's stderr, as "node 1: text". A function is
        called with the line, the index of the argument in `args` and the node's id, in this thread. Lines come before
        the result of their argument; see docs/running.md.
    :param progress: True draws a line on stderr: the arguments done, the workers, the rate, the time left. A function
        is called with `done` and `total` after each delivery, in this thread; `total` is None where nobody knows it.
    :param journal: path of a file that keeps the results. The same call with the same journal, in another process,
        takes the results from the file and runs the rest; see journal.py. A packet is one chunk then.
    :param encrypt: whether the connection is encrypted by TLS; looked for as the host is, and False if nobody says.
        The server must do the same. Takes Python 3.13 or later.
    :param executor: any `concurrent.futures.Executor` to run on, in the place of a cluster; it stays open.
    :returns: a list for each packet, in the order of `args`; not flattened. [] for no arguments.
    :raises AchillesError: one of `errors.py`; `func`'s own exceptions come as themselves.

    Blocks until all is done; Ctrl-C cancels the job. Every argument runs at least once. Prints an ALERT on
    stderr once connected.
    """
    with _start(False, True, True, **locals()) as packets:
        found = [(packet["ARGS_COUNTER"], packet["RESULT"]) for packet in packets]
    return [results for _, results in sorted(found, key=lambda pair: pair[0])]


def imap(
    func: Callable[[Any], Any], args: Args, callback: Callable[[Any], Any] | None = None, chunksize: int = 1,
    host: str | None = None, port: int | None = None, username: str | None = None, secret_key: SecretKey = None, *,
    callback_error: Callable[[Any], Any] | None = None, buffersize: int | None = None,
    wait_for_nodes: float | None = None, reconnect_seconds: float = RECONNECT_SECONDS, timeout: float | None = None,
    executor: Executor | None = None, output: Output = None, progress: Show = None, journal: JournalPath = None,
    encrypt: bool | None = None,
) -> Packets:
    """As `map`, but yield `{'ARGS_COUNTER': index of the first argument, 'RESULT': [...]}` for each packet, in order.

    The work begins with the call; `args` may be endless, and is read ahead as far as `buffersize` says.
    Closing or dropping the iterator cancels the job.
    """
    return _start(True, False, False, **locals())


def imap_unordered(
    func: Callable[[Any], Any], args: Args, callback: Callable[[Any], Any] | None = None, chunksize: int = 1,
    host: str | None = None, port: int | None = None, username: str | None = None, secret_key: SecretKey = None, *,
    callback_error: Callable[[Any], Any] | None = None, buffersize: int | None = None,
    wait_for_nodes: float | None = None, reconnect_seconds: float = RECONNECT_SECONDS, timeout: float | None = None,
    executor: Executor | None = None, output: Output = None, progress: Show = None, journal: JournalPath = None,
    encrypt: bool | None = None,
) -> Packets:
    """As `imap`, but each packet as it arrives: the fastest way to consume results, and the least memory."""
    return _start(False, False, False, **locals())


def kill_cluster(
    command_verified: bool = False, host: str | None = None, port: int | None = None, username: str | None = None,
    secret_key: SecretKey = None, *, encrypt: bool | None = None,
) -> bool:
    """End every node and the server; callers with running jobs raise ClusterKilled.

    Unless `command_verified`, asks for YES on the terminal; any other answer leaves all running and returns
    False. Returns True when the server has confirmed; blocks for some seconds.

    :raises ValueError: not verified, and there is no terminal to ask at.
    """
    if not command_verified:
        if not (sys.stdin and sys.stdin.isatty()):
            raise ValueError("kill_cluster ends a whole cluster: pass command_verified=True where nobody can be asked")
        tell("This ends every node and the server, and all jobs that run. Type YES to go on:")
        if sys.stdin.readline().strip() != "YES":
            return False
    with contextlib.closing(_controller(host, port, username, secret_key, encrypt)) as controller:
        controller.kill()
    return True


def cluster_status(
    host: str | None = None, port: int | None = None, username: str | None = None, secret_key: SecretKey = None, *,
    encrypt: bool | None = None,
) -> dict[str, Any]:
    """The cluster as plain dicts; blocks for a round trip.

    `nodes`: a list of id, address, python, version, cpu_count, busy (workers), done (chunks), since (UTC, in
    seconds since 1970). `jobs`: id, user, queued, running, done (chunks), longest (seconds that the job's
    longest-running chunk has run, 0 below a second), node and pid (of that chunk, or None). `server`: version,
    uptime (s), memory (resident bytes, None where the system does not tell).
    """
    with contextlib.closing(_controller(host, port, username, secret_key, encrypt)) as controller:
        return controller.status()


def _start(
    ordered: bool, eager: bool, inline: bool, *, func: Callable[[Any], Any], args: Args,
    callback: Callable[[Any], Any] | None,
    chunksize: int, host: str | None, port: int | None, username: str | None, secret_key: SecretKey,
    callback_error: Callable[[Any], Any] | None, buffersize: int | None, wait_for_nodes: float | None,
    reconnect_seconds: float, timeout: float | None, executor: Executor | None, output: Output, progress: Show,
    journal: JournalPath, encrypt: bool | None,
) -> Packets:
    """Check, dump the function, connect, and begin."""
    checked(func=func, callback=callback, callback_error=callback_error, progress=progress, journal=journal)
    chunksize, buffersize, timeout = checked(chunksize=chunksize, buffersize=buffersize, timeout=timeout)
    show = shower(output, executor is not None)
    if not callable(args):
        iter(args)  # a TypeError here, in the caller's thread, if args cannot be iterated
    context = letters.Context(caller=True)
    function = letter_of(letters.dump_function(context, (func, callback)), letters.name_of(func))
    watchers, recall = keeping(journal, func, callback, min(chunksize, buffersize or chunksize))
    with contextlib.ExitStack() as undo:  # where it fails
        for watcher in watchers:
            undo.callback(watcher.close)
        controller = connect(
            host, port, username, secret_key, encrypt, reconnect_seconds, executor, wait_for_nodes=wait_for_nodes)
        undo.callback(controller.close)
        if (settings := controller.settings) is not None:
            tell(f"ALERT: Connection to achilles_server at {settings.host}:{settings.port} "
                 "and authentication successful.\n")
        sources = own_sources() if settings is not None else None
        watchers += watching(progress, args, controller, lists=True)
        with controller.lock:
            options = {"timeout": timeout, "output": show and True}
            job = controller.start(Job(context, secrets.token_bytes(16), function, options=options, sources=sources))
            call = Call(
                controller, job, args, chunksize=chunksize, ordered=ordered, eager=eager, buffersize=buffersize,
                show=show, watchers=watchers, recall=recall)
        call.start(inline)
        undo.pop_all()
    return Packets(controller, call, callback_error)


def connect(
    host: str | None, port: int | None, username: str | None, secret_key: SecretKey, encrypt: bool | None,
    reconnect_seconds: float = RECONNECT_SECONDS, executor: Executor | None = None, processes: int | None = None,
    wait_for_nodes: float | None = None,
) -> Controller:
    """A controller of the cluster that these name, or that the settings name; or an Engine.

    It is an Engine on `executor`, or in a worker that is not told of any cluster: if all workers waited for others,
    none would be left.
    """
    place = host, port, username, secret_key, encrypt
    wait_for_nodes, reconnect_seconds = checked(wait_for_nodes=wait_for_nodes, reconnect_seconds=reconnect_seconds)
    if executor is not None or (config.in_worker and place == NOWHERE):
        from .dropin.engine import Engine  # with all that workers need

        if place != NOWHERE:
            raise ValueError("a call runs on a cluster or on an executor: give host and the like, or executor")
        return cast(Controller, Engine(executor, processes))
    return _controller(
        *place, reconnect_seconds=reconnect_seconds, wait_for_nodes=wait_for_nodes, processes=processes)


def _controller(
    host: str | None, port: int | None, username: str | None, secret_key: SecretKey, encrypt: bool | None,
    **options: Any
) -> Controller:
    controller = Controller(lambda: _resolve(host, port, username, secret_key, encrypt), **options)
    controller.open()
    return controller


def _resolve(
    host: str | None, port: int | None, username: str | None, secret_key: SecretKey, encrypt: bool | None
) -> Settings:
    if host == "local":  # a LocalCluster of this process
        if encrypt:
            raise ConfigurationError('host="local" is this machine, and does not encrypt: leave encrypt out')
        from .local import embedded

        return embedded().settings
    # A reconnection runs in a thread of ours, where nobody can be asked.
    return config.resolve(
        host, port, username, secret_key, encrypt=encrypt,
        ask=threading.current_thread() is threading.main_thread())


def _cancel(call: Call, controller: Controller) -> None:
    with contextlib.closing(controller):  # also where a journal's end, or Ctrl-C, ends the next line
        call.close(None, InterruptedError("the job was cancelled"))
