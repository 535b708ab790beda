"""chunksize=None, which chooses by time, against fixed ones: from a microsecond to ten milliseconds a task."""

from __future__ import annotations

import argparse
import time

from .peers import PEERS, Peer
from .sections import section
from .table import markdown, number, shown
from .timing import enough, spread
from .work import SPINS

__all__ = ["FIXED", "rates"]

FIXED = (1, 4, 16, 64, 256, 1024, 4096)
ASKED = 0.85  # of the best fixed one


def rates(
    peer: Peer, task_us: int, seconds: float, times: int, sizes: tuple[int, ...] = FIXED
) -> dict[int | None, float]:
    """chunksize to tasks/s, the median of several in turns; AssertionError if a result is wrong."""
    function = SPINS[task_us]

    def run(chunksize: int | None, count: int) -> float:
        began = time.perf_counter()
        found = peer.map(function, range(count), chunksize)
        took = time.perf_counter() - began
        if sorted(found) != list(range(1, count + 1)):
            raise AssertionError(f"wrong results with chunksize {chunksize}")
        return count / took

    count = enough(lambda n: run(None, n), seconds, least=2 * peer.workers)
    worth = [size for size in sizes if size * peer.workers <= count] or [1]  # a larger one leaves workers idle
    found: dict[int | None, list[float]] = {size: [] for size in (None, *worth)}
    for turn in range(times):
        order = list(found)
        for size in order[turn % len(order):] + order[: turn % len(order)]:
            found[size].append(run(size, count))
    return {size: spread(values).median for size, values in found.items()}


@section("chunksize", "chunksize=None against the best fixed one")
def report(args: argparse.Namespace) -> str:
    """Each length of a task, a line."""
    lines = [["µs a task", "None, tasks/s", "best fixed", "its tasks/s", "None over best", "held (0.85)",
              *(f"{size}" for size in FIXED)]]
    peer = PEERS["achilles"](args.workers)
    peer.start()
    try:
        for task_us in list(SPINS)[: 1 if args.small else None]:
            rounds = [rates(peer, task_us, args.seconds * 2, 1 if args.small else args.times)
                      for _ in range(1 if args.small else args.repeats)]
            sizes = [size for size in rounds[0] if all(size in each for each in rounds)]
            found = {size: spread([each[size] for each in rounds]).median for size in sizes}
            best = max((size for size in sizes if size is not None), key=found.__getitem__)
            ratio = spread([each[None] / each[best] for each in rounds])
            lines.append([f"{task_us:,}", number(found[None]), f"{best}", number(found[best]), shown(ratio),
                          "yes" if ratio.median >= ASKED else "NO",
                          *(number(found[size]) if size in found else "–" for size in FIXED)])
    finally:
        peer.end()
    return markdown(lines)
