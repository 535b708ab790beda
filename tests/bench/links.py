"""How often a large function crosses each link: counted in what the roles log of their frames."""

from __future__ import annotations

import argparse
import logging
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cluster import Cluster

from achilles import Pool

from .sections import section
from .table import markdown

__all__ = ["LINKS", "Crossed", "crossings"]

SIZE = 20_000_000
MAPS, ITEMS = 100, 8
SENT = re.compile(r"> JOB job \d+, (\d+) bytes")
LINKS = ("caller to server", "server to node", "node to workers")


class Crossed(NamedTuple):
    """What one link carried of JOBs, which bring the functions."""

    frames: int
    bytes: int


class _Lines(logging.Handler):
    """Keeps what is logged, and leaves the root logger as it was."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def crossings(size: int, maps: int, workers: int = 2) -> dict[str, Crossed]:
    """Link to what it carried, for so many maps of a closure of `size` bytes on one Pool."""
    data = bytes(size)

    def look(place: int) -> int:
        return len(data) + place

    said, log = _Lines(), logging.getLogger("achilles")
    level, propagates = log.level, log.propagate
    log.addHandler(said)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    try:
        with tempfile.TemporaryDirectory(prefix="achilles-bench-") as folder, Cluster(Path(folder)) as cluster:
            cluster.server.kill()
            server = cluster.start_server("--log-level", "debug")
            node = cluster.start_node(workers, "--log-level", "debug")
            with Pool(**cluster.address) as pool:
                for _ in range(maps):
                    found = pool.map(look, range(ITEMS), 1)
                    if found != [size + n for n in range(ITEMS)]:
                        raise AssertionError(f"wrong results: {found}")
            logs = said.lines, server.err.read_text().splitlines(), node.err.read_text().splitlines()
            return dict(zip(LINKS, map(_count, logs)))
    finally:
        log.removeHandler(said)
        log.setLevel(level)
        log.propagate = propagates


def _count(lines: Iterable[str]) -> Crossed:
    sizes = [int(match[1]) for line in lines if (match := SENT.search(line))]
    return Crossed(len(sizes), sum(sizes))


@section("links", f"A closure of 20 MB, {MAPS} maps of {ITEMS} items on one Pool: what crosses each link")
def report(args: argparse.Namespace) -> str:
    """A line a link; each worker has a link of its own."""
    found: dict[str, Any] = crossings(SIZE, 3 if args.small else MAPS, args.workers)
    links = {"caller to server": 1, "server to node": 1, "node to workers": args.workers}
    return markdown([["link", "JOB frames", "bytes", "links", "once each"], *(
        [link, str(crossed.frames), f"{crossed.bytes:,}", str(links[link]),
         "yes" if crossed.frames == links[link] else "NO"] for link, crossed in found.items())])
