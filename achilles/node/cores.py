"""How many workers a node should have, and how it starts them.

Knows the operating system: affinity, cgroups, start methods, and the version of multiprocess. Everything
that not every system has is asked for first. No state, no threads.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ..errors import VersionError

try:
    import multiprocess
except ModuleNotFoundError as e:
    raise VersionError("multiprocess is needed here: pip install 'multiprocess>=0.70.19'") from e

__all__ = ["check_multiprocess", "default_start_method", "start_methods", "usable_cores"]

MULTIPROCESS_OLDEST = (0, 70, 19)  # the first that knows Python 3.13's start methods


def check_multiprocess() -> None:
    """VersionError if multiprocess is too old: a vendored copy of this package has no pip to see to that."""
    version = str(multiprocess.__version__)
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < MULTIPROCESS_OLDEST:
        raise VersionError(f"multiprocess {version} is too old: pip install 'multiprocess>=0.70.19'")


def start_methods() -> list[str]:
    """Those that this system has."""
    return list(multiprocess.get_all_start_methods())


def default_start_method() -> str:
    """fork where it is to be had and safe, else spawn. A worker is there in milliseconds so, not in tenths."""
    safe = "fork" in multiprocess.get_all_start_methods() and sys.platform != "darwin"
    return "fork" if safe else "spawn"


def usable_cores(root: str = "/") -> int:
    """How many cores this process may really use: its affinity and its cgroup's quota, at least 1.

    :param root: where /proc and /sys are.
    """
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([own, *_quotas(Path(root))]))


def _quotas(root: Path) -> Iterator[int]:
    """Each quota of our cgroup and of those above it, in cores, rounded up; versions 1 and 2."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        folders = [mount.joinpath(*Path(path).parts[1:end]) for end in range(1, len(Path(path).parts) + 1)]
        for folder in folders:
            text = _text(folder / "cpu.max") or " ".join(
                _text(folder / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
            quota, _, period = text.partition(" ")
            if quota.isdigit() and period.strip().isdigit() and int(period):
                yield -(-int(quota) // int(period))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
