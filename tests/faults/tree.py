"""What a process and those below it use: memory, descriptors, threads, time. Of /proc, so of Linux alone."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import Counter
from pathlib import Path

from cluster import alive, descendants


def family(pid: int) -> set[int]:
    """This process and all that it started, and they."""
    return {pid, *descendants(pid)}


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


def own_threads() -> Counter[str]:
    """Names of this process's threads."""
    return Counter(thread.name.partition(" ")[0] for thread in threading.enumerate())


def left(pids: set[int]) -> set[int]:
    """Those of them that still run."""
    return {pid for pid in pids if alive(pid)}
