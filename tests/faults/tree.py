"""What a process and those below it use: memory, descriptors, threads, time. Of /proc, so of Linux alone."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from cluster import alive, descendants


def family(pid: int) -> set[int]:
    """This process and all that it started, and they."""
    return {pid, *descendants(pid)}


def parent(pid: int) -> int:
    """The process that started it, or that took it over; 0 if it is gone."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def memory(pid: int) -> int:
    """Resident bytes of its own: what it shares with others is not counted."""
    with contextlib.suppress(OSError, IndexError):
        pages = Path(f"/proc/{pid}/statm").read_text().split()
        return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")
    return 0


def descriptors(pid: int) -> int:
    """How many are open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def threads(pid: int) -> int:
    """How many run."""
    return len(os.listdir(f"/proc/{pid}/task"))


def seconds_used(pid: int) -> float:
    """Of a processor."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal to a process that may be gone; whether it was there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def left(pids: set[int]) -> set[int]:
    """Those of them that still run."""
    return {pid for pid in pids if alive(pid)}


def orphans(command: str) -> list[int]:
    """Processes with exactly this command line whose parent is not Python any more: what a dead worker left."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            line = (folder / "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
            if line == command and not _is_python(parent(int(folder.name))):
                found.append(int(folder.name))
    return found


def _is_python(pid: int) -> bool:
    """Whether this is a Python process."""
    with contextlib.suppress(OSError):
        return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
