"""The command: runs attacks, and prints the table."""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import time
import traceback
import warnings
from collections.abc import Sequence

from faults.run import _table, _WithoutAlerts

from . import raw
from .bench import ATTACKS, WHO, Attack, Bench, Skipped

__all__ = ["MODULES", "load", "main", "run_once"]

MODULES = ("handshake", "flood", "names", "frames", "roles", "letters", "secrecy", "encryption")
HEAD = ("who", "attack", "tries", "refused", "time", "memory", "")


def load() -> dict[str, Attack]:
    """Every attack, in the order of the table of attackers in docs/security.md."""
    for name in MODULES:
        importlib.import_module(f".{name}", __package__)
    order = list(WHO)
    return dict(sorted(ATTACKS.items(), key=lambda item: order.index(item[1].who)))


def run_once(attack: Attack, seed: object, *, short: bool = False) -> Bench:
    """One run; raises AssertionError if the attack succeeds."""
    with Bench(random.Random(f"{seed}:{attack.name}"), short=short) as bench:
        try:
            attack.run(bench)
        except raw.Unreadable as e:
            raise Skipped(str(e)) from e
    assert bench.tries and bench.tries == bench.refused, f"{bench.tries} tries, {bench.refused} refused"
    return bench


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m tests.attacks`: 0 if all were refused, 1 if one succeeded."""
    warnings.simplefilter("error")
    sys.stderr = _WithoutAlerts(sys.stderr)  # type: ignore[assignment]
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="an attack, part of its name, or an attacker")
    parser.add_argument("--short", action="store_true", help="the short form of each, as under pytest")
    parser.add_argument("--seed", type=int, help="of all that is random; printed")
    parser.add_argument("--list", action="store_true", help="name the attacks, and exit")
    args = parser.parse_args(argv)
    attacks = [a for a in load().values() if not args.only or any(_means(only, a) for only in args.only)]
    if not attacks:
        parser.error("no attack of that name")
    if args.list:
        for attack in attacks:
            print(f"{attack.who:8} {attack.name:34} {attack.what}")
        return 0
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    rows, succeeded = [HEAD], 0
    for attack in attacks:
        row, good = _row(attack, seed, args.short)
        rows.append(row)
        succeeded += not good
    print("\n" + "\n".join(_table(rows)))
    return int(bool(succeeded))


def _means(only: str, attack: Attack) -> bool:
    return only == attack.who if only in WHO else only in attack.name


def _row(attack: Attack, seed: int, short: bool) -> tuple[tuple[str, ...], bool]:
    """Try it; its row of the table, and whether it was refused."""
    began = time.monotonic()
    tries = refused = memory = remark = ""
    good = True
    try:
        bench = run_once(attack, seed, short=short)
        tries, refused = f"{bench.tries:,}", f"{bench.refused:,}"
        memory = f"{bench.memory / 2**20:+.1f} MiB" if bench.memory is not None else ""
        remark = bench.remarks[-1] if bench.remarks else ""
    except Skipped as e:
        remark = f"skipped: {e}"
    except Exception as e:
        good, remark = False, "SUCCEEDED"
        traceback.print_exc(file=sys.stdout)
        print(f"{attack.name}: SUCCEEDED, or could not be tried: {e}", flush=True)
    seconds = f"{time.monotonic() - began:.1f} s"
    print(f"{attack.name}: {' | '.join(filter(None, (tries, refused, seconds, memory, remark)))}", flush=True)
    return (WHO[attack.who], attack.what, tries, refused, seconds, memory, remark), good
