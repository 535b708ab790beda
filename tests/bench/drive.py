"""The driver: a process of its own in which one peer is started, measured and ended. It stands for a user's script.

`bench.drive JSON`: which peer and rows, how long, and the file to write to. Started by run.py, for MPI and SCOOP
through their launchers.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = str(Path(__file__).resolve().parents[1])
sys.path[:] = [TESTS, *(entry for entry in sys.path if entry not in (TESTS, os.path.dirname(__file__)))]


@dataclass(frozen=True)
class Point:
    """A class of __main__."""

    x: int
    y: int


shifted = lambda point: Point(point.x + 1, point.y)  # noqa: E731


def main() -> None:
    """Measure, and write what came of it: a dict of row to samples and notes, or to an error."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    found: dict[str, Any] = {}
    try:
        _measure(asked, found)
    except Exception:
        found["error"] = traceback.format_exc()
    Path(asked["out"]).write_text(json.dumps(found))


def _measure(asked: dict[str, Any], found: dict[str, Any]) -> None:
    import bench.waits  # noqa: F401  # registers its rows
    from bench.peers import PEERS
    from bench.rows import ROWS
    from bench.timing import Meter
    from bench.work import successor

    peer = PEERS[asked["peer"]](asked["workers"])
    launched = len(peer.command(2)) > 3
    began = asked["began"] if launched else time.monotonic()
    peer.start()
    try:
        first = peer.map(successor, [1], 1)
        took = time.monotonic() - began
        if first != [2]:
            raise AssertionError(f"the first result is {first}")
        for name in asked["rows"]:
            meter = Meter(asked["seconds"], asked["times"], peer.roles, small=asked["small"], first_result=took)
            ROWS[name].run(meter, peer)
            found[name] = {"samples": meter.samples, "notes": meter.notes}
    finally:
        peer.end()


if __name__ == "__main__":
    main()
