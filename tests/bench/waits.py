"""Rows in which calls sleep, or wait for each other: how long until the others are done.

A peer that lets a call wait for ever has "hang" in the place of seconds.
"""

from __future__ import annotations

import heapq
import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .peers import Peer
from .rows import check, row
from .timing import Meter, Sample
from .work import Scene, nap

__all__ = ["ideal_seconds"]

WARM, CALLS = 3_000, 2_000  # instant calls before, and calls of the map that is timed
FIRST, LATER = 700, 1_400  # of these calls, two that do something
SUM = 10**8  # some seconds in C code that holds the interpreter
LIMIT_SECONDS = 0.5  # a quarter of a second is promised; the rest is for the map itself
Deeds = Mapping[int, tuple[str, Any]]


@row("uneven", "uneven sleeps, over the ideal", "× ideal", per="s", limit=1.05)
def uneven(meter: Meter, peer: Peer) -> None:
    """Sleeps of 1 to 80 ms in random order; ideal is who is free takes the next, at no cost."""
    rng = random.Random(5)
    compare_to_ideal(meter, peer, [rng.uniform(0.001, 0.08) for _ in range(4 if meter.small else 100)])


@row("mixed", "9,900 instant calls and 100 of 0.1 s, 8 workers, over the ideal", "× ideal", per="s", limit=1.25,
     workers=8)
def mixed(meter: Meter, peer: Peer) -> None:
    """In random order, chunksize 1."""
    naps = [0.0] * (99 if meter.small else 9_900) + [0.1] * (1 if meter.small else 100)
    random.Random(5).shuffle(naps)
    peer.map(nap, [0.0] * 100, 1)
    compare_to_ideal(meter, peer, naps)


def compare_to_ideal(meter: Meter, peer: Peer, naps: Sequence[float]) -> None:
    """Time a map of sleeps."""
    for _ in meter.stretches():
        with meter.timed(ideal_seconds(naps, peer.workers)):
            found = peer.map(nap, naps, 1)
        check(sorted(found) == sorted(naps), "naps", found)


def ideal_seconds(naps: Sequence[float], workers: int) -> float:
    """When the last of them ends, where whoever is free takes the next."""
    free = [0.0] * workers
    for seconds in naps:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def slow(meter: Meter, peer: Peer, deed: tuple[str, Any]) -> None:
    """One call among instant ones does something long; seconds until all others are there."""
    act(meter, peer, lambda folder: {FIRST: deed}, set(range(CALLS)) - {FIRST})


@row("slow", "2,000 calls of which one takes 4 s: until the others are there", "s", limit=LIMIT_SECONDS,
     needs="unordered")
def slow_nap(meter: Meter, peer: Peer) -> None:
    """The slow one sleeps."""
    slow(meter, peer, ("nap", 0.5 if meter.small else 4.0))


@row("slow-c", "the same, and the slow one is sum(range(10**8))", "s", limit=LIMIT_SECONDS, needs="unordered")
def slow_sum(meter: Meter, peer: Peer) -> None:
    """The slow one holds the interpreter."""
    slow(meter, peer, ("sum", SUM // 100 if meter.small else SUM))


@row("wait", "a call that waits for a later one of its map", "s", limit=LIMIT_SECONDS, needs="unordered")
def wait(meter: Meter, peer: Peer) -> None:
    """The later call is far behind the other; seconds of the whole map."""
    act(meter, peer, lambda folder: {FIRST: ("wait", f"{folder}/a"), LATER: ("say", f"{folder}/a")}, set(range(CALLS)))


@row("wait-next", "a call that waits for the next one", "s", limit=LIMIT_SECONDS, needs="unordered")
def wait_next(meter: Meter, peer: Peer) -> None:
    """The two are in one batch, however small it is."""
    act(meter, peer, lambda folder: {FIRST: ("wait", f"{folder}/a"), FIRST + 1: ("say", f"{folder}/a")},
        set(range(CALLS)))


@row("wait-both", "calls that wait for a later and for an earlier one", "s", limit=LIMIT_SECONDS, needs="unordered")
def wait_both(meter: Meter, peer: Peer) -> None:
    """As many waiting calls as workers. All end where a call begins only after all calls before it have begun."""
    act(meter, peer, lambda folder: {
        FIRST: ("wait", f"{folder}/b"), FIRST + 1: ("say", f"{folder}/a"),
        LATER: ("wait", f"{folder}/a"), LATER + 1: ("say", f"{folder}/b"),
    }, set(range(CALLS)))


@row("wait-c", "a call that waits for the one behind sum(range(10**8)), 3 workers", "s", limit=LIMIT_SECONDS,
     needs="unordered", workers=3)
def wait_sum(meter: Meter, peer: Peer) -> None:
    """Seconds until the waiting call is done. The third worker is for what the first gives back."""
    act(meter, peer, lambda folder: {
        FIRST: ("sum", SUM // 100 if meter.small else SUM), FIRST + 1: ("say", f"{folder}/a"),
        LATER: ("wait", f"{folder}/a"),
    }, {LATER})


def act(meter: Meter, peer: Peer, make_deeds: Callable[[str], Deeds], wanted: set[int]) -> None:
    """Time from the start of a map of CALLS until the results of all `wanted` calls are there."""
    for _ in meter.stretches():
        with tempfile.TemporaryDirectory(prefix="achilles-bench-") as folder:
            scene = Scene(make_deeds(folder))
            check(len(list(peer.unordered(scene, range(CALLS, CALLS + WARM)))) == WARM, "a map before", "")
            came: dict[int, float] = {}
            well = True
            began = time.perf_counter()
            for number, good in peer.unordered(scene, range(CALLS)):
                came[number] = time.perf_counter() - began
                well &= good
            check(sorted(came) == list(range(CALLS)), f"{CALLS} results", len(came))
            seconds = max(came[number] for number in wanted)
            said = [Path(value) for deed, value in scene.deeds.values() if deed == "say"]
            check(all(map(Path.exists, said)), "calls that make files", said)
            meter.samples.append(Sample(1, seconds if well else math.inf, {}))
