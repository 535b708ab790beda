"""The count of a node's workers, and their start method.

The module knows affinity, cgroups, threads, start methods, and multiprocess's version. Some systems lack some of these.
The module has no state and no threads.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigurationError, VersionError

try:
    import multiprocess
except ModuleNotFoundError as e:
    raise VersionError("multiprocess is needed here: pip install 'multiprocess>=0.70.19'") from e

__all__ = ["check_start_method", "count_threads", "default_start_method", "usable_cores"]

MULTIPROCESS_OLDEST = (0, 70, 19)  # the first version that knows Python 3.13's start methods
CGROUP = re.compile(r"^\d+:((?:.*,)?cpu(?:,.*)?|):/(.*)$", re.MULTILINE)  # version 2's line, or version 1's for cpu


def check_start_method(method: str) -> None:
    """ConfigurationError if this system lacks the start method; VersionError if multiprocess is too old.

    For a vendored copy of this package, pip does not check the version.
    """
    if tuple(map(int, re.findall(r"\d+", multiprocess.__version__)[:3])) < MULTIPROCESS_OLDEST:
        raise VersionError(f"multiprocess {multiprocess.__version__} is too old: pip install 'multiprocess>=0.70.19'")
    if method not in (methods := multiprocess.get_all_start_methods()):
        raise ConfigurationError(f"start_method must be one of {', '.join(methods)}, not {method!r}")


def default_start_method(threads: int = 1) -> str:
    """Return fork if the system has it and it is safe, else forkserver or spawn. Forks take milliseconds, not tenths.

    :param threads: of the process that starts workers. A forked worker has a copy of every lock, but only the
        thread that forked: a lock that another thread held is never released. So beside other threads
        the method is forkserver: its workers are forks of a process with one thread.
    """
    wanted = "fork" if threads == 1 else "forkserver"
    return wanted if sys.platform != "darwin" and wanted in multiprocess.get_all_start_methods() else "spawn"


def count_threads(root: str = "/") -> int:
    """Count the threads of this process; on Linux also the threads of C libraries.

    Libraries such as OpenBLAS start threads at import, and these hold locks. Python's warning counts them, too.

    :param root: where /proc is.
    """
    try:
        return len(os.listdir(Path(root, "proc/self/task")))
    except OSError:
        return threading.active_count()


def usable_cores(root: str = "/") -> int:
    """Count the cores that this process may use by its affinity and its cgroup's quota, at least 1.

    :param root: where /proc and /sys are.
    """
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([own, *_quotas(Path(root))]))


def _quotas(root: Path) -> Iterator[int]:
    """Each quota of our cgroup and its parents, in cores, rounded up; cgroup versions 1 and 2."""
    for controllers, path in CGROUP.findall(_text(root / "proc/self/cgroup")):
        own = root / "sys/fs/cgroup" / ("cpu" if controllers else "") / path
        for folder in (own, *own.parents):
            quota = _text(folder / "cpu.max") or " ".join(
                _text(folder / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
            if found := re.fullmatch(r"(\d+) ([1-9]\d*)", quota):
                yield -(-int(found[1]) // int(found[2]))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
