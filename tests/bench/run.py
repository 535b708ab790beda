"""The command: measures in turns, and prints the tables."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import table
from .peers import PEERS, absent
from .rows import ROWS, Row
from .sections import SECTIONS
from .timing import Meter, Sample

__all__ = ["drive", "main"]

OURS = ("achilles", "achilles.imap_unordered")
USUAL = "multiprocessing,concurrent.futures,multiprocess,dask,ray,joblib,loky,mpi4py,scoop"
DRIVE_SECONDS = 180.0  # for one peer and one row: tells a hang from a wait
PATHS = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]  # of the tests, and of the package
for _name in ("waits", "floors", "chunks", "links", "memory", "simulate", "swarm"):
    importlib.import_module(f".{_name}", __package__)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m tests.bench`: 0 if every result was right."""
    warnings.simplefilter("error")
    args = _parser().parse_args(argv)
    wanted = args.only.split(",") if args.only else [*ROWS, *SECTIONS]
    unknown = set(wanted) - {*ROWS, *SECTIONS}
    if unknown:
        print(f"no such row: {', '.join(sorted(unknown))}; --list names them", file=sys.stderr)
        return 2
    if args.list:
        for name in wanted:
            print(f"{name:12} {ROWS[name].what if name in ROWS else SECTIONS[name][0]}")
        return 0
    print(f"{platform.python_implementation()} {platform.python_version()}, {platform.system()}, "
          f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores, "
          f"load {os.getloadavg()[0]:.1f} before\n", flush=True)
    rows = [ROWS[name] for name in wanted if name in ROWS]
    failures = _compare(rows, args) if rows else 0
    for name in wanted:
        if name in SECTIONS:
            title, section = SECTIONS[name]
            print(f"\n## {title}\n\n{section(args)}", flush=True)
    return int(bool(failures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", metavar="ROW,…", help="these rows alone")
    parser.add_argument("--peers", default=USUAL, metavar="PEER,…", help=f"beside achilles ({USUAL})")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, in which the peers take turns (5)")
    parser.add_argument("--seconds", type=float, default=0.5, help="that a stretch should take (0.5)")
    parser.add_argument("--times", type=int, default=3, help="stretches of each peer in a round (3)")
    parser.add_argument("--workers", type=int, default=2, help="of each peer (2)")
    parser.add_argument("--long", action="store_true", help="ten times the length, where memory or scale is looked at")
    parser.add_argument("--small", action="store_true", help="the least of everything: whether it works")
    parser.add_argument("--list", action="store_true", help="name the rows, and exit")
    return parser


def _compare(rows: Sequence[Row], args: argparse.Namespace) -> int:
    """All rows with all peers, and the tables; how many measurements failed."""
    named = list(filter(None, args.peers.split(",")))
    missing = {name: why for name in named if (why := absent(name))}
    for name, why in missing.items():
        print(f"absent: {name} ({why})")
    peers = [*OURS, *(name for name in named if name not in missing and name not in OURS)]
    found: dict[str, table.Rounds] = {}
    notes: dict[str, dict[str, list[float]]] = {}
    failures = 0
    for row in rows:
        lacking = [module for module in row.modules if importlib.util.find_spec(module) is None]
        if lacking:
            print(f"{row.name}: left out, without {', '.join(lacking)}")
            continue
        found[row.name] = {}
        good = [name for name in peers if _takes_part(row, name)]
        for turn in range(args.repeats):
            for name in good[turn % len(good):] + good[: turn % len(good)]:  # nobody is always the first
                samples, said, error = _one(row, name, args)
                found[row.name].setdefault(name, []).append(samples)
                if name == row.ours:
                    for key, value in said.items():
                        notes.setdefault(row.name, {}).setdefault(key, []).append(value)
                if error:
                    failures += 1
                    print(f"{row.name}, {name}: FAILED: {error.strip().splitlines()[-1]}", flush=True)
        print(f"{row.name}: " + ", ".join(
            f"{name} {table.number(table.spread([row.value(s) for each in rounds for s in each]).median)}"
            for name, rounds in found[row.name].items() if any(rounds)) + f" {row.unit}")
        for line in table.asked({row.name: found[row.name]}, ROWS).splitlines()[2:]:
            print(f"    {line}", flush=True)
    print(f"\n## Figures: the median, and the least and the greatest\n\n{table.figures(found, ROWS, peers)}")
    print(f"\n## Ratios: how many times better achilles is\n\n{table.ratios(found, ROWS, peers)}")
    print(f"\n## Asked for\n\n{table.asked(found, ROWS)}")
    for name in OURS:
        print(f"\n## Where the time of {name} goes: µs of a processor\n\n{table.times(found, ROWS, name)}")
    for row_name, said in notes.items():
        print(f"\n{row_name}: " + ", ".join(f"{key} {table.number(table.spread(values).median)}"
                                            for key, values in said.items()))
    return failures


def _takes_part(row: Row, name: str) -> bool:
    """Whether a row is measured with a peer."""
    if row.refuses(PEERS[name]) or not (row.started or name != OURS[1]):
        return False
    return row.ours == OURS[0] or name in OURS  # a row about the original calls is ours alone


def _one(row: Row, name: str, args: argparse.Namespace) -> tuple[list[Sample], dict[str, float], str]:
    """One row with one peer once: samples, notes, or an error."""
    if row.started:
        found = drive(name, [row.name], args, row.workers)
        about = found.get(row.name, {"samples": [], "notes": {}})
        return [Sample(*sample) for sample in about["samples"]], about["notes"], found.get("error", "")
    meter = Meter(args.seconds, 1, dict)
    row.run(meter, PEERS[name](args.workers))
    return meter.samples, meter.notes, ""


def drive(name: str, rows: Sequence[str], args: argparse.Namespace, workers: int | None = None) -> dict[str, Any]:
    """What a driver of that peer, in a process of its own, finds of these rows."""
    workers = workers or args.workers
    with tempfile.TemporaryDirectory(prefix="achilles-bench-") as folder:
        out = Path(folder) / "out"
        asked = {"peer": name, "rows": list(rows), "workers": workers, "seconds": args.seconds,
                 "times": args.times, "small": args.small, "out": str(out), "began": time.monotonic()}
        with open(Path(folder) / "said", "w+") as said:
            command = [*PEERS[name].command(workers), json.dumps(asked)]
            process = subprocess.Popen(command, stdout=said, stderr=said, stdin=subprocess.DEVNULL,
                                       start_new_session=True, env=_environment(name))
            try:
                process.wait(DRIVE_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                return {"error": f"not within {DRIVE_SECONDS:g} s"}
            if not out.exists():
                said.seek(0)
                return {"error": f"exit status {process.returncode}: {said.read()[-500:]}"}
        return dict(json.loads(out.read_text()))


def _environment(name: str) -> dict[str, str]:
    """Warnings are errors in what is ours; what others warn of is theirs."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("ACHILLES_")}
    path = os.pathsep.join([*PATHS, *filter(None, [own.get("PYTHONPATH")])])
    return own | {"PYTHONPATH": path, "PYTHONWARNINGS": "error" if name in OURS else "ignore"}
