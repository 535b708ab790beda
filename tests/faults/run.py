"""The command: runs cases, prints the table, or soaks."""

from __future__ import annotations

import argparse
import importlib
import random
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from .bench import CASES, Bench, Case, Skipped
from .soak import soak

__all__ = ["MODULES", "load", "main", "run_once"]

MODULES = (
    "worker", "poison", "node", "server", "network", "cuts", "caller", "exceptions", "windows", "drain", "load",
    "callbacks",
)
HEAD = ("fault", "runs", "to detect", "to recover", "repeated", "")


def load() -> dict[str, Case]:
    """Every case, in the order of the points."""
    for name in MODULES:
        importlib.import_module(f".{name}", __package__)
    return dict(sorted(CASES.items(), key=lambda item: item[1].point))


def run_once(case: Case, seed: object, *, short: bool = False) -> Bench:
    """One run; raises what it finds."""
    with Bench(random.Random(f"{seed}:{case.name}"), short=short) as bench:
        case.run(bench)
    return bench


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m tests.faults`: 0 if all held."""
    warnings.simplefilter("error")
    sys.stderr = _WithoutAlerts(sys.stderr)  # type: ignore[assignment]
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="a case, part of its name, or a point's number")
    parser.add_argument("--runs", type=int, help="of each case")
    parser.add_argument("--seed", type=int, help="of all that is random; printed")
    parser.add_argument("--short", action="store_true", help="the short form of each case, as under pytest")
    parser.add_argument("--list", action="store_true", help="name the cases, and exit")
    parser.add_argument("--hours", type=float, help="soak: random faults against random jobs")
    parser.add_argument("--round", type=int, help="replay this round of a soak")
    args = parser.parse_args(argv)
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 32)
    if args.hours is not None or args.round is not None:
        return int(bool(soak(args.hours or 0, seed, only=args.round)))
    cases = [case for case in load().values() if not args.only or any(_means(only, case) for only in args.only)]
    if args.list:
        for case in cases:
            print(f"{case.point:2}  {case.name:40} {case.what}")
        return 0
    print(f"seed {seed}", flush=True)
    rows, failed = [HEAD], 0
    for case in cases:
        row, good = _row(case, args.runs or (1 if args.short else case.runs), seed, args.short)
        rows.append(row)
        failed += not good
    print("\n" + "\n".join(_table(rows)))
    return int(bool(failed))


class _WithoutAlerts:
    """stderr, without what each of a thousand calls says when it is connected."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return len(text) if text.startswith("ALERT: ") else self._stream.write(text)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _means(only: str, case: Case) -> bool:
    return only == str(case.point) or (not only.isdigit() and only in case.name)


def _row(case: Case, runs: int, seed: int, short: bool) -> tuple[tuple[str, ...], bool]:
    """Run a case so often; its row of the table, and whether it held."""
    benches: list[Bench] = []
    failures = 0
    began = time.monotonic()
    for number in range(runs):
        try:
            benches.append(run_once(case, f"{seed}:{number}", short=short))
        except Skipped as e:
            print(f"{case.name}: skipped: {e}", flush=True)
            return (f"{case.point:2} {case.what}", "0", "", "", "", f"skipped: {e}"), True
        except KeyboardInterrupt:
            raise
        except BaseException as e:
            failures += 1
            traceback.print_exc(file=sys.stdout)
            print(f"{case.name}, run {number}: FAILED: {e}", flush=True)
    detect = [value for bench in benches for value in bench.detect]
    recover = [value for bench in benches for value in bench.recover]
    repeated = [value for bench in benches for value in bench.repeated]
    remarks = [remark for bench in benches for remark in bench.remarks]
    row = (f"{case.point:2} {case.what}", str(runs), _times(detect), _times(recover),
           f"{statistics.mean(repeated):.1f}, at most {max(repeated)}" if repeated else "",
           f"{failures} FAILED" if failures else remarks[-1] if remarks else "")
    print(f"{case.name}: {' | '.join(filter(None, row[1:]))} ({time.monotonic() - began:.0f} s)", flush=True)
    return row, not failures


def _times(values: list[float]) -> str:
    """Median and worst."""
    if not values:
        return ""
    return " / ".join(_time(value) for value in ((statistics.median(values), max(values))))


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """For people, and for the README."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
