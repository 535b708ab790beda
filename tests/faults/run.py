"""The command: runs cases, prints the table of all and a short one for docs/promises.md, or soaks."""

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
from typing import Any, NamedTuple

from .bench import CASES, Bench, Case, Skipped
from .soak import soak

__all__ = ["GROUPS", "MODULES", "group_of", "load", "main", "run_once"]

MODULES = (
    "worker", "poison", "node", "server", "network", "cuts", "caller", "exceptions", "windows", "drain", "load",
    "callbacks",
)
HEAD = ("fault", "runs", "to detect", "to recover", "repeated", "")
# The rows of the short table: what it says, and the cases that are in it. What is in none of them has no fault to
# detect or to recover from, but a rule that holds or does not.
GROUPS = {
    "a worker is killed in a task": ("worker_in_a_task", "worker_among_busy_ones", "worker_with_a_child"),
    "a worker is killed elsewhere": ("worker_idle", "worker_idle_with_a_child", "worker_receiving"),
    "an argument kills three workers": ("poison_",),
    "a node is killed": ("node_killed",),
    "a random node is killed each second for a minute": ("nodes_each_second",),
    "a node is stopped for 25 s": ("node_stopped",),
    "the server is killed, back after 3 s": ("server_killed", "server_and_node_killed"),
    "the server is stopped": ("server_stopped", "server_stopped_for_long"),
    "the caller is stopped for 30 s": ("controller_asleep",),
    "the network swallows everything": ("black_hole_idle", "black_hole_busy", "black_hole_caller"),
    "the network swallows one direction": ("black_hole_down_", "black_hole_up_", "held"),
    "the network swallows everything for 5 s": ("black_hole_short",),
    "the network swallows everything, 3 s out of 6": ("black_hole_flapping",),
    "a connection is cut, after each byte of a session": ("cut_",),
    "a bit is turned on the way": ("altered", "altered_always", "altered_function", "altered_length"),
    "the caller is killed": ("caller_killed", "forked_caller_killed"),
    "Ctrl-C in the caller": ("interrupted_",),
    "SIGTERM to a node": ("node_drained", "node_drained_tiny"),
    "SIGTERM to the server, which comes back": ("server_restarts",),
    "the last node leaves, another joins": ("node_relieved",),
}


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
    if not cases:
        parser.error(f"no case is meant by --only {' '.join(args.only)}; --list names them")
    if args.list:
        for case in cases:
            print(f"{case.point:2}  {case.name:40} {case.what}")
        return 0
    print(f"seed {seed}", flush=True)
    began = time.monotonic()
    tallies = [_run_case(case, args.runs or (1 if args.short else case.runs), seed, args.short) for case in cases]
    print("\n" + "\n".join(_table([HEAD, *(_row(f"{t.case.point:2} {t.case.what}", [t]) for t in tallies)])))
    print("\nIn short, median / worst:\n\n" + "\n".join(_table(_short(tallies))))
    print(f"\n{sum(t.runs for t in tallies)} runs of {len(cases)} cases in {(time.monotonic() - began) / 60:.0f} min, "
          f"{sum(t.failed for t in tallies)} failed; seed {seed}")
    return int(any(t.failed for t in tallies))


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


class _Tally(NamedTuple):
    """What came of the runs of a case."""

    case: Case
    runs: int
    failed: int
    benches: list[Bench]  # of the runs that held
    skipped: str  # why


def _run_case(case: Case, runs: int, seed: int, short: bool) -> _Tally:
    """Run a case so often."""
    benches: list[Bench] = []
    failed, skipped = 0, ""
    began = time.monotonic()
    for number in range(runs):
        try:
            benches.append(run_once(case, f"{seed}:{number}", short=short))
        except Skipped as e:
            runs, skipped = 0, f"skipped: {e}"
            break
        except KeyboardInterrupt:
            raise
        except BaseException as e:
            failed += 1
            traceback.print_exc(file=sys.stdout)
            print(f"{case.name}, run {number}: FAILED: {e}", flush=True)
    tally = _Tally(case, runs, failed, benches, skipped)
    if not short and not _keeps_limit(tally):
        print(f"{case.name}: FAILED: {_remark(tally)}", flush=True)
        tally = tally._replace(failed=failed + 1)
    print(f"{case.name}: {' | '.join(filter(None, _row('', [tally])))} ({time.monotonic() - began:.0f} s)", flush=True)
    return tally


def _keeps_limit(tally: _Tally) -> bool:
    """Whether nine in ten of the runs that held are within what is promised; of fewer than ten runs, all."""
    if tally.case.limit is None:
        return True
    name, seconds = tally.case.limit
    values = [value for bench in tally.benches for value in getattr(bench, name)]
    if name == "ratio":  # of what took place to what is ideal: a busy machine can only make it worse
        return not values or min(values) <= seconds
    return sum(value <= seconds for value in values) >= 0.9 * len(values)


def _row(what: str, tallies: Sequence[_Tally]) -> tuple[str, ...]:
    """A row of the table, of one case or of several."""
    benches = [bench for tally in tallies for bench in tally.benches]
    detect, recover, repeated = (
        [value for bench in benches for value in getattr(bench, name)] for name in ("detect", "recover", "repeated"))
    failed = sum(tally.failed for tally in tallies)
    return (what, str(sum(tally.runs for tally in tallies)), _times(detect), _times(recover),
            f"{statistics.mean(repeated):.1f}, at most {max(repeated)}" if repeated else "",
            "; ".join([*([f"{failed} FAILED"] if failed else []), *filter(None, map(_remark, tallies))]))


def _remark(tally: _Tally) -> str:
    """What there is to say beside the figures: how many kept the limit, and what the runs themselves said."""
    if tally.skipped:
        return tally.skipped
    said = [", ".join(dict.fromkeys(remark for bench in tally.benches for remark in bench.remarks[-1:]))]
    if tally.case.limit is not None:
        name, seconds = tally.case.limit
        values = [value for bench in tally.benches for value in getattr(bench, name)]
        if name == "ratio":
            said.insert(0, f"{min(values, default=0):.3f} at best, at most {seconds:.2f} is promised")
        else:
            said.insert(0, f"{sum(value <= seconds for value in values)} of {len(values)} within {_time(seconds)}")
    return ", ".join(filter(None, said))


def group_of(name: str) -> str | None:
    """The row of the short table that a case belongs to; a name in GROUPS that ends with _ stands for many."""
    return next((what for what, names in GROUPS.items()
                 if any(name == each or (each.endswith("_") and name.startswith(each)) for each in names)), None)


def _short(tallies: Sequence[_Tally]) -> list[tuple[str, ...]]:
    """The short table: a row for each group, without remarks."""
    rows = [HEAD[:-1]]
    for what in GROUPS:
        of_it = [tally for tally in tallies if group_of(tally.case.name) == what and not tally.skipped]
        if of_it:
            rows.append(_row(what, of_it)[:-1])
    return rows


def _times(values: list[float]) -> str:
    """Median and worst."""
    if not values:
        return ""
    return " / ".join(_time(value) for value in ((statistics.median(values), max(values))))


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s" if seconds % 1 else f"{seconds:.0f} s"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """For people, and for docs/promises.md."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
