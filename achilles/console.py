"""What the commands of this package share: options, exit statuses, signals, the log, and what is printed for people.

Knows nothing of the protocol. Imported by the modules that have a `main()`; used by nothing but those
and the functions that people call to run a role. No threads, no locks; `signal_handlers` does nothing
outside the main thread.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import config
from .errors import AchillesError, AuthenticationError, ConfigurationError, ProtocolError

__all__ = [
    "ExitStatus", "errors_to_exit_status", "parse", "parser", "read_secret", "say", "signal_handlers", "status_table",
]

LEVELS = ("debug", "info", "warning", "error")
NO_TERMINAL = (errno.ENXIO, errno.ENOENT, errno.ENODEV, errno.EIO)  # what opening /dev/tty fails with then
USAGE_STATUS, UNREACHABLE_STATUS, INTERRUPTED_STATUS = 2, 1, 130  # of a process: argparse's, any failure's, a shell's


class ExitStatus:
    """What a command will exit with."""

    code = 0


def say(text: str) -> None:
    """Print for people, at once: whoever waits for a line must not wait for a buffer. A closed stdout is no error.

    What stdout has no bytes for is escaped: a name that a peer chose must not hide the table that it stands in.
    """
    with contextlib.suppress(OSError, ValueError):
        try:
            print(text, flush=True)  # noqa: T201
        except UnicodeEncodeError:
            print(text.encode("ascii", "backslashreplace").decode(), flush=True)  # noqa: T201


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that all commands have. There is none for a secret: others can read a command line."""
    made = argparse.ArgumentParser(
        prog=f"python -m {__package__}.{command}", description=description,
        allow_abbrev=False,  # --secret-key must not pass for --secret-key-file, with the secret on the command line
    )
    made.add_argument("--host", help="name or address of the server")
    made.add_argument("--port", type=int, help="its port, 9999 where none is given")
    made.add_argument("--username", help="1 to 32 bytes")
    made.add_argument("--secret-key-file", metavar="FILE", help="a file whose first line is the secret")
    made.add_argument("--env-file", metavar="FILE", help="a configuration file; by default the package's own .env")
    made.add_argument("--log-level", choices=LEVELS, default="info", help="of the log on stderr")
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and let the log go to stderr, each line with its time (UTC)."""
    args = made.parse_args(argv)
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=args.log_level.upper(), stream=sys.stderr, format="%(asctime)sZ %(levelname)s %(name)s: %(message)s"
    )
    logging.raiseExceptions = False  # a closed stderr or a full disk must not end what works
    return args


def read_secret(path: str | None) -> config.Secret | None:
    """The secret in the first line of a file; ConfigurationError if it cannot be read, or others can."""
    return None if path is None else config.read_secret_file(path)


@contextlib.contextmanager
def errors_to_exit_status() -> Iterator[ExitStatus]:
    """Turn what a person can mend into a line on stderr and an exit status: 2 settings, 1 all else."""
    status = ExitStatus()
    try:
        yield status
    except (ConfigurationError, AuthenticationError, ProtocolError) as e:
        status.code = USAGE_STATUS
        _complain(e)
    except AchillesError as e:
        status.code = UNREACHABLE_STATUS
        _complain(e)
    except KeyboardInterrupt:
        status.code = INTERRUPTED_STATUS
    finally:
        _drop_broken_streams()


@contextlib.contextmanager
def signal_handlers(
    handler: Callable[[int, Any], None], read_again: Callable[[], None] | None = None
) -> Iterator[None]:
    """Handle SIGINT, SIGTERM and SIGHUP so for a while; in the main thread alone. What is ignored stays ignored.

    With `read_again`, SIGHUP calls that, as daemons have it, even where it was ignored: who says nohup does not want
    an end. Where the terminal in which this process was started has gone, SIGHUP says just that, and is `handler`'s.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: handler for number in numbers if signal.getsignal(number) is not signal.SIG_IGN}
    if read_again is not None and hasattr(signal, "SIGHUP"):
        ends_with_terminal = signal.SIGHUP in handlers and _has_terminal()
        handlers[signal.SIGHUP] = lambda number, frame: (
            handler(number, frame) if ends_with_terminal and not _has_terminal() else read_again())
    before = {number: signal.signal(number, each) for number, each in handlers.items()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def status_table(state: dict[str, Any]) -> str:
    """Nodes and jobs of a cluster's status as a table for people."""
    server = state["server"]
    lines = [f"server: version {server['version']}, up {server['uptime']:.0f} s"]
    for what, columns in (
        ("nodes", ("id", "address", "python", "version", "cpu_count", "busy", "done")),
        ("jobs", ("id", "user", "queued", "running", "done")),
    ):
        rows = [columns, *([str(row[name]) for name in columns] for row in state[what])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["", f"{what}: {len(state[what])}"]
        if state[what]:
            cells = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
            lines += ["  ".join(row).rstrip() for row in cells]
    return "\n".join(lines)


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal (POSIX): it has none any more once that was closed.

    Only what the system says of a terminal that is not there, or hung up (EIO), counts as none. With no descriptor
    left nothing is known, and a server that would end because of that would end just when it has most peers.
    """
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY))
    except OSError as e:
        return e.errno not in NO_TERMINAL
    return True


def _drop_broken_streams() -> None:
    """What a closed or full stdout or stderr did not take must not become the exit status (120) of a clean end."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except (OSError, ValueError, AttributeError):
            setattr(sys, name, None)


def _complain(error: Exception) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
