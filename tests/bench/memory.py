"""Memory that stays flat, however long the input is: the resident bytes of each role while it goes through."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from cluster import descendants
from faults import tree

from achilles import LocalCluster, imap_unordered

from .sections import section
from .table import markdown, number
from .work import ends_of, successor

__all__ = ["INPUTS", "Weights", "weigh"]

MIB = 1 << 20
LOOKS = 40  # at the memory, evenly over the input
FIRST = 4  # of them, after which nothing should grow: a tenth
Weights = dict[str, list[float]]  # role to MiB at each look


def numbers() -> Iterator[int]:
    """Without an end."""
    return itertools.count()


def pieces() -> Iterator[bytes]:
    """Of 1 MiB, each its own, without an end."""
    return (bytes([n % 256]) * MIB for n in itertools.count())


# What: the input, the function, the chunksize, how many arguments, and the same with --long.
INPUTS: dict[str, tuple[Callable[[], Iterable[Any]], Callable[[Any], Any], int, int, int]] = {
    "small arguments, chunksize 1": (numbers, successor, 1, 1_000_000, 10_000_000),
    "small arguments, chunksize 1024": (numbers, successor, 1024, 1_000_000, 10_000_000),
    "pieces of 1 MiB": (pieces, ends_of, 1, 1_000, 10_000),
}


def weigh(what: str, count: int, workers: int = 2) -> Weights:
    """Take so many results of an endless input, and look at everybody's memory."""
    make, function, chunksize, *_ = INPUTS[what]
    found: Weights = {"caller": [], "server": [], "node": [], "workers": []}
    with LocalCluster(nodes=1, cpu_count=workers) as cluster:
        server = [cluster.server.pid] if cluster.server else []
        node = [process.pid for process in cluster.nodes]
        where = {"host": cluster.host, "port": cluster.port, "username": cluster.username,
                 "secret_key": cluster.secret_key}
        taken = 0
        with imap_unordered(function, make, chunksize=chunksize, **where) as packets:
            for packet in packets:
                _check(what, packet)
                taken += len(packet["RESULT"])
                if taken >= count * (len(found["caller"]) + 1) / LOOKS:
                    roles = {"caller": [os.getpid()], "server": server, "node": node,
                             "workers": [pid for each in node for pid in descendants(each)]}
                    for role, pids in roles.items():
                        found[role].append(sum(map(tree.memory, pids)) / MIB)
                if taken >= count:
                    break
    return found


def _check(what: str, packet: dict[str, Any]) -> None:
    start, values = packet["ARGS_COUNTER"], packet["RESULT"]
    places = range(start, start + len(values))
    if values != [(MIB, n % 256, n % 256) if INPUTS[what][0] is pieces else n + 1 for n in places]:
        raise AssertionError(f"wrong results at {start}: {str(values)[:200]}")


@section("memory", "Memory, MiB of each role's own, while an endless input goes through")
def report(args: argparse.Namespace) -> str:
    """Each input."""
    lines = [["input", "arguments", "role", "at a tenth", "at the end", "most", "growth, %"]]
    for what, (_, _, _, count, long) in INPUTS.items():
        count = count // 100 if args.small else long if args.long else count
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:  # a caller that did nothing before
            found = fresh.submit(weigh, what, count, args.workers).result()
        for role, weights in found.items():
            first, last = weights[FIRST - 1], weights[-1]
            lines.append([what, f"{count:,}", role, *map(number, [first, last, max(weights)]),
                          f"{(last / first - 1) * 100 if first else 0:+.0f}"])
    return markdown(lines)
