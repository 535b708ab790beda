"""The shared parts of the package's commands: options, exit statuses, signals, the log, and texts for people.

Each module with a `main()` imports this module. So do the functions that run a server or a node for people. This
module knows nothing of the protocol. It starts no thread and has no lock. `signal_handlers` does nothing outside the
main thread.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .config import read_secret_file as read_secret
from .errors import AchillesError, AuthenticationError, ConfigurationError, ProtocolError

__all__ = [
    "ExitStatus", "errors_to_exit_status", "keep_freed_memory", "parse", "parser", "read_secret", "redraw",
    "resident_bytes", "say", "signal_handlers", "status_table",
]

OPTIONS: dict[str, dict[str, Any]] = {  # of server and node; a secret has none, because others can read a command line
    "--host": {"help": "name or address of the server"},
    "--port": {"type": int, "help": "its port, 9999 by default"},
    "--username": {"help": "1 to 32 bytes"},
    "--secret-key-file": {"metavar": "FILE", "help": "a file with the secret in its first line"},
    "--encrypt": {
        "action": argparse.BooleanOptionalAction, "help": "by TLS 1.3, as all of this cluster (Python 3.13 or later)"},
    "--env-file": {
        "metavar": "FILE", "help": "a configuration file; by default ACHILLES_ENV_FILE, or else the package's .env"},
    "--log-level": {
        "choices": ("debug", "info", "warning", "error"), "default": "info", "help": "of the log on stderr (info)"},
}
TABLES = {  # of a status; the columns of each
    "nodes": ("id", "address", "python", "version", "cpu_count", "busy", "done"),
    "jobs": ("id", "user", "queued", "running", "done", "longest", "node", "pid"),
}
CLEAR = "\033[H\033[J"  # of a terminal: to the first place, and nothing behind it (ECMA-48: CUP, ED)
NO_TERMINAL = (errno.ENXIO, errno.ENOENT, errno.ENODEV, errno.EIO)  # from opening a /dev/tty that is gone
USAGE_ERRORS = (ConfigurationError, AuthenticationError, ProtocolError)  # only other settings mend them
KEPT_BYTES = 32 << 20  # of freed memory that a process keeps; glibc takes no more (HEAP_MAX_SIZE / 2, malloc.c)
USAGE_STATUS, UNREACHABLE_STATUS, INTERRUPTED_STATUS = 2, 1, 130  # of a process: argparse's, any failure's, a shell's


class ExitStatus:
    """The status that a command will exit with."""

    code = 0


def say(text: str) -> bool:
    """Print for people, and flush: a reader that waits for a line must not wait for a buffer. Whether that went well.

    A closed stdout is no error. Characters that stdout cannot encode are escaped: a peer's odd name must not hide
    the table around it.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)  # noqa: T201
        return True
    return False


def redraw(text: str) -> bool:
    """As `say`. On a terminal the lines replace the text that is there, as far as they have room."""
    if os.isatty(1):
        lines = text.splitlines()[: os.get_terminal_size(1).lines - 1]
        text = CLEAR + "\n".join(lines)
    return say(text)


def parser(
    command: str, description: str, options: dict[str, dict[str, Any]] = OPTIONS
) -> argparse.ArgumentParser:
    """Return a command's parser; by default with the options of all commands that connect."""
    made = argparse.ArgumentParser(
        prog=f"python -m {__package__}.{command}", description=description,
        allow_abbrev=False,  # --secret-key must not pass for --secret-key-file, with the secret on the command line
    )
    for option, about in options.items():
        made.add_argument(option, **about)
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, and send the log to stderr, each line with its time (UTC)."""
    args = made.parse_args(argv)
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=args.log_level.upper(), stream=sys.stderr, format="%(asctime)sZ %(levelname)s %(name)s: %(message)s"
    )
    logging.raiseExceptions = False  # a closed stderr or a full disk must not end a good process
    return args


@contextlib.contextmanager
def errors_to_exit_status() -> Iterator[ExitStatus]:
    """Turn an error that a person can mend into a line on stderr and an exit status: 2 settings, 1 other errors."""
    status = ExitStatus()
    try:
        yield status
    except KeyboardInterrupt:
        status.code = INTERRUPTED_STATUS
    except AchillesError as e:
        status.code = USAGE_STATUS if isinstance(e, USAGE_ERRORS) else UNREACHABLE_STATUS
        with contextlib.suppress(OSError, ValueError):
            print(f"error: {e}", file=sys.stderr, flush=True)  # noqa: T201
    finally:
        _drop_broken_streams()


@contextlib.contextmanager
def signal_handlers(
    handler: Callable[[int, Any], None], read_again: Callable[[], None] | None = None
) -> Iterator[None]:
    """Handle SIGINT, SIGTERM and SIGHUP inside the block, in the main thread alone. An ignored signal stays ignored.

    SIGCHLD has its default inside the block. A parent may hand an ignored SIGCHLD down: then a node would never learn
    that a worker has ended.

    With `read_again`, SIGHUP calls `read_again`, as in other daemons. That holds under nohup too: nohup wants no end.
    Where the terminal in which this process was started has gone, SIGHUP says so, and goes to `handler`.
    """
    handlers: dict[int, Any] = {
        each: handler for each in signal.Signals
        if each.name in ("SIGINT", "SIGTERM", "SIGHUP") and signal.getsignal(each) is not signal.SIG_IGN
    } | {each: signal.SIG_DFL for each in signal.Signals if each.name == "SIGCHLD"}
    if read_again is not None and hasattr(signal, "SIGHUP"):
        ends_with_terminal = signal.SIGHUP in handlers and _has_terminal()
        handlers[signal.SIGHUP] = lambda number, frame: (
            handler(number, frame) if ends_with_terminal and not _has_terminal() else read_again())
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number, each in handlers.items():
                stack.callback(signal.signal, number, signal.signal(number, each))
        yield


def status_table(state: dict[str, Any]) -> str:
    """Return the nodes and jobs of a cluster's status as a table for people."""
    lines = [f"server: version {state['server']['version']}, up {state['server']['uptime']:.0f} s"]
    for name, columns in TABLES.items():
        rows = [columns, *([_cell(row.get(column)) for column in columns] for row in state[name])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["", f"{name}: {len(state[name])}",
                  *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows if state[name])]
    return "\n".join(lines)


def _cell(value: object) -> str:
    """Return a value of a status as a table has it."""
    return "-" if value is None else str(value)


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal (POSIX): a process loses it when the terminal is closed.

    The terminal counts as gone only when the system says so: it is not there, or it hung up (EIO). Without a free
    descriptor nothing is known. The server must not end then, because it is short of descriptors when it has most
    peers.
    """
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY))
    except OSError as e:
        return e.errno not in NO_TERMINAL
    return True


def _drop_broken_streams() -> None:
    """Drop a closed or full stdout or stderr: else Python flushes it at exit, and turns a clean end into status 120."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except (OSError, ValueError, AttributeError):
            setattr(sys, name, None)


def keep_freed_memory() -> None:
    """Let malloc keep the memory of long letters for the next ones: a third of their cost is new pages. glibc alone.

    For processes of ours, not for a caller's. Before the first thread.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        for option in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
            ctypes.CDLL(None).mallopt(option, KEPT_BYTES)


def resident_bytes() -> int | None:
    """Return the resident bytes of this process, where the system tells."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None
