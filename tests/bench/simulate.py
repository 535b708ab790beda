"""The real scheduler with many nodes that are none: what a slice costs, and what a node and a job weigh.

::

    Feed  keeps each job's window full: add(64 rows) ────────────▶ ┌───────────┐ ─▶ actions: Give, Recall, …
    Nodes answer what they hold, in turns: answer(rows) ─────────▶ │ Scheduler │
    some die, others join: lose(), join() ───────────────────────▶ └───────────┘

Processor time is counted, inside the scheduler alone. Every event has as many slices with 10 nodes as with 10,000.
What more nodes cost has two parts, which the line *same memory* tells apart: it drives so many schedulers of 10
nodes, in turns, that they hold as much as the large one. What it costs more than one of them alone is the
processor's caches and the garbage collector; what the large one costs beyond that would be the scheduler's way.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from achilles.errors import ProtocolError
from achilles.protocol.frames import ROW, Rows
from achilles.server.scheduler import Action, Cancel, Dead, End, Give, Recall, Scheduler

from .sections import section
from .table import markdown, number
from .timing import spread

__all__ = ["Cluster", "Found", "ProtocolError", "simulate"]

PYTHON = "3.11"
CPU_COUNT = 16
JOBS, MANY_JOBS = 32, 1_000
LETTER_BYTES = 24  # of a slice: a small argument
FRAME_ROWS = 64  # of one TASK
SLICES = 1_000_000
NODES = (10, 100, 1_000, 10_000)
DEATHS = 2_000  # slices for each death and each joining
PACE_US = 10_000  # of a slice: none travels with others for being quick, so every grant is as large as an answer


class Found(NamedTuple):
    """What one simulation found."""

    seconds: float  # inside the scheduler
    slices: int  # that were answered
    events: int
    worst: float  # seconds of the longest event

    @property
    def us(self) -> float:
        """Microseconds a slice."""
        return self.seconds / self.slices * 1e6


class Cluster:
    """Nodes that answer, jobs that are fed, and one scheduler between them.

    :param nodes: how many.
    :param rows: slices of one RESULT.
    :param churn: slices after which one node dies and another joins; 0: never.
    """

    def __init__(self, nodes: int, rows: int, churn: int = 0, jobs: int = JOBS, seed: int = 1) -> None:
        self.scheduler = Scheduler()
        self.seconds, self.worst, self.events, self.answered = 0.0, 0.0, 0, 0
        self.done: Counter[int] = Counter()  # job to answered slices
        self._rng = random.Random(seed)
        self._rows, self._churn = rows, churn
        self._held: dict[int, dict[int, dict[int, int]]] = {}  # node to job to slice to attempt
        self._turns: deque[int] = deque()  # nodes that hold something, whose turn it is first
        self._in_line: set[int] = set()
        self._recalls: deque[Recall] = deque()  # under way
        self._alive: list[int] = []
        self._added: Counter[int] = Counter()
        self._jobs = list(range(jobs))
        self._next_node = 0
        self._window = 3 * nodes * CPU_COUNT // jobs + 2 * FRAME_ROWS  # something always waits
        self.warm = 2 * nodes * CPU_COUNT  # slices until each node has answered all that it was given first
        for _ in range(nodes):
            self._join()
        for job in self._jobs:
            self._call(lambda job=job: self.scheduler.declare(job, object(), PYTHON) or [])
        self._until_death = churn

    def run(self, slices: int) -> None:
        """Answer so many slices, feeding all the time."""
        goal = self.answered + slices
        for job in self._jobs:
            self._feed(job)
        while self.answered < goal:
            self._answer()
            if self._churn and self._until_death <= 0:
                self._until_death += self._churn
                self._die()
                self._join()

    def finish(self) -> None:
        """Answer all that is out, feeding no more, and end the jobs. AssertionError if a slice was lost."""
        for job in self._jobs:
            self._call(lambda job=job: self.scheduler.flush(job, self._added[job]))
        while self._turns or self._recalls:
            self._answer(feed=False)
        lost = {job: self._added[job] - self.done[job] for job in self._jobs if self._added[job] != self.done[job]}
        assert not lost, f"slices that were never answered: {lost}"
        for job in self._jobs:
            self._call(lambda job=job: self.scheduler.end(job))
        assert self.scheduler.job_states() == []

    def weigh(self) -> tuple[float, float]:
        """Bytes a node and a job, when both hold nothing."""
        def growth(make: Callable[[int], object], count: int = 1_000) -> float:
            gc.collect()
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            for each in range(count):
                make(each + 1_000_000)
            grown = tracemalloc.get_traced_memory()[0] - before
            tracemalloc.stop()
            return grown / count

        node = growth(lambda number: self.scheduler.join(number, "other", CPU_COUNT))
        job = growth(lambda number: self.scheduler.declare(number, None, "other"))
        return node, job

    # Events.

    def _call(self, event: Callable[[], Any]) -> Any:
        began = time.thread_time()
        found = event()
        took = time.thread_time() - began
        self.seconds += took
        self.worst = max(self.worst, took)
        self.events += 1
        accepted, actions = found if isinstance(found, tuple) else (None, found)
        self._carry_out(actions)
        return accepted

    def _join(self) -> None:
        number, self._next_node = self._next_node, self._next_node + 1
        self._alive.append(number)
        self._held[number] = {}
        self._call(lambda: self.scheduler.join(number, PYTHON, CPU_COUNT))

    def _die(self) -> None:
        place = self._rng.randrange(len(self._alive))
        self._alive[place], self._alive[-1] = self._alive[-1], self._alive[place]
        number = self._alive.pop()
        del self._held[number]
        self._call(lambda: self.scheduler.lose(number))

    def _feed(self, job: int) -> None:
        while self._added[job] - self.done[job] <= self._window - FRAME_ROWS:
            first = self._added[job]
            self._added[job] += FRAME_ROWS
            rows = _rows(job, [(slice_, 0) for slice_ in range(first, first + FRAME_ROWS)], LETTER_BYTES)
            self._call(lambda rows=rows: self.scheduler.add(job, rows))

    def _answer(self, feed: bool = True) -> None:
        """The next node answers up to `rows` slices of the job it was given first; a recall comes before it."""
        if self._recalls:
            self._give_back(self._recalls.popleft())
        if not self._turns:
            return
        node = self._turns.popleft()
        self._in_line.discard(node)
        held = self._held.get(node)
        if not held:
            return
        job, slices = next(iter(held.items()))
        answered = [(slice_, slices.pop(slice_)) for slice_ in list(slices)[: self._rows]]
        if not slices:
            del held[job]
        self._line_up(node)
        rows = _rows(job, answered, 0, PACE_US)
        accepted = self._call(lambda: self.scheduler.answer(node, job, rows))
        assert accepted is rows, "an answer that did not count"
        self.done[job] += len(answered)
        self.answered += len(answered)
        self._until_death -= len(answered)
        if feed:
            self._feed(job)

    def _line_up(self, node: int) -> None:
        if self._held[node] and node not in self._in_line:
            self._turns.append(node)
            self._in_line.add(node)

    def _carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, Give):
                held = self._held[action.node].setdefault(action.job, {})
                for rows in action.rows:
                    held.update(zip(rows.slices, rows.attempts))
                self._line_up(action.node)
            elif isinstance(action, Recall):
                self._recalls.append(action)
            elif isinstance(action, Cancel | End):
                self._held[action.node].pop(action.job, None)
            elif isinstance(action, Dead):
                self.done[action.job] += 1

    def _give_back(self, recall: Recall) -> None:
        """What was given last, of what no worker has."""
        if recall.node not in self._held:
            return
        held = self._held[recall.node].get(recall.job, {})
        back = list(held)[CPU_COUNT:][-recall.number :]
        for slice_ in back:
            del held[slice_]
        self._call(lambda: self.scheduler.returned(recall.node, recall.job, back))


def simulate(nodes: int, rows: int, slices: int, churn: int = 0, jobs: int = JOBS) -> Found:
    """One cluster, warm; AssertionError if any slice was lost."""
    return together([Cluster(nodes, rows, churn, jobs)], slices)


def together(clusters: list[Cluster], slices: int) -> Found:
    """Several, in turns of one RESULT each."""
    for cluster in clusters:
        cluster.run(cluster.warm)
        cluster.seconds = cluster.worst = 0.0
        cluster.events = 0
    before = sum(cluster.answered for cluster in clusters)
    while sum(cluster.answered for cluster in clusters) - before < slices:
        for cluster in clusters:
            cluster.run(1 if len(clusters) > 1 else slices)
    found = Found(sum(c.seconds for c in clusters), sum(c.answered for c in clusters) - before,
                  sum(c.events for c in clusters), max(c.worst for c in clusters))
    for cluster in clusters:
        cluster.finish()
    return found


def _rows(job: int, slices: list[tuple[int, int]], letter_bytes: int, pace: int = 0) -> Rows:
    """A TASK's or a RESULT's: (slice, attempt) each, all letters alike."""
    table = b"".join([ROW.pack(slice_, attempt, 0, letter_bytes) for slice_, attempt in slices])
    return Rows(job, table, b"", bytes(letter_bytes * len(slices)), (), pace)


@section("simulate", "Scale: the real scheduler with false nodes of 16 workers")
def scale(args: argparse.Namespace) -> str:
    """All sizes, in turns."""
    slices = SLICES // 100 if args.small else SLICES * 10 if args.long else SLICES
    sizes = NODES[:2] if args.small else NODES
    repeats = 1 if args.small or args.long else min(args.repeats, 3)
    kinds: dict[str, Callable[[int], Found]] = {
        "16 slices an answer": lambda nodes: simulate(nodes, 16, slices),
        "16, and nodes die and join": lambda nodes: simulate(nodes, 16, slices, DEATHS),
        "16, of 1,000 jobs": lambda nodes: simulate(nodes, 16, slices, jobs=MANY_JOBS),
        "1 slice an answer": lambda nodes: simulate(nodes, 1, slices // 4),
        "same memory, 16 an answer": lambda nodes: together(
            [Cluster(10, 16, jobs=4) for _ in range(nodes // 10)], slices),
    }
    lines = [["µs a slice", *(f"{nodes:,} nodes" for nodes in sizes), f"{sizes[-1]:,} over {sizes[0]}"]]
    for name, run in kinds.items():
        found: dict[int, list[float]] = {nodes: [] for nodes in sizes}
        for _ in range(repeats):
            for nodes in sizes:
                gc.collect()
                found[nodes].append(run(nodes).us)
        ratio = spread([large / small for small, large in zip(found[sizes[0]], found[sizes[-1]])])
        lines.append([name, *(number(spread(values).median) for values in found.values()),
                      f"{number(ratio.median)} ({number(ratio.low)}–{number(ratio.high)})"])
    node, job = Cluster(1, 16).weigh()
    return f"{markdown(lines)}\n\nA node without work weighs {node:,.0f} bytes, a job {job:,.0f}."
