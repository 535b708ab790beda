"""The real scheduler with many nodes that are none: the cost of a batch, and the weight of a node and a job.

::

    controllers  keep each job's window full, and send again what is GONE: add() ─▶ ┌───────────┐ ─▶ TASK, RESULT,
    nodes        answer in turns, or return a part: hear() ───────────────────────▶ │ Scheduler │    GONE, …
    some nodes die, others join: lose(), join() ──────────────────────────────────▶ └───────────┘

Processor time is counted, inside the scheduler alone. Every event has as many chunks with 10 nodes as with 10,000.
More nodes cost more for two reasons, which the line *same memory* tells apart. It drives so many schedulers of 10
nodes, in turns, that they hold as much as the large one. They cost more than one of them alone through the
processor's caches and the garbage collector. If the large one costs more still, the scheduler's way is the reason.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

from achilles.protocol.frames import Batch, Gone, Kind
from achilles.server.scheduler import Scheduler

from .sections import section
from .table import markdown, number
from .timing import spread

__all__ = ["Cluster", "Found", "simulate"]

PYTHON = "3.11"
CPU_COUNT = 16
JOBS, MANY_JOBS = 32, 1_000
CHUNKS = 8  # of a batch
BATCHES = 200_000
NODES = (10, 100, 1_000, 10_000)
DEATHS = 500  # batches for each death and each joining
RETURNS = 20  # batches for each one that comes back in part
TICKS = 2_000  # batches for each tick: 0.2 s at 10,000 batches a second
BATCH_US = 5_000  # so long a batch is thought to take: second places are used, too


class Found(NamedTuple):
    """The result of one simulation."""

    seconds: float  # inside the scheduler
    batches: int  # that were answered
    worst: float  # seconds of the longest event

    @property
    def us(self) -> float:
        """Microseconds a batch."""
        return self.seconds / self.batches * 1e6


class Cluster:
    """Nodes that answer, jobs that are fed, and one scheduler between them.

    :param nodes: how many.
    :param chunks: of each batch.
    :param churn: batches after which one node dies and another joins; 0: never.
    :param returns: batches after which a node returns all but the first chunk of one; 0: never.
    """

    def __init__(self, nodes: int, chunks: int = CHUNKS, churn: int = 0, returns: int = 0, jobs: int = JOBS) -> None:
        self._said: deque[tuple[Kind, int | None, Batch]] = deque()
        self.scheduler = Scheduler(lambda kind, node, batch: self._said.append((kind, node, batch)))
        self.seconds, self.worst, self.answered = 0.0, 0.0, 0
        self._rng = random.Random(1)
        self._chunks, self._churn, self._returns = chunks, churn, returns
        self._held: dict[int, deque[Batch]] = {}  # node -> batches, the first is answered next
        self._turns: deque[int] = deque()  # nodes, one entry for each batch
        self._alive: list[int] = []
        self._jobs = list(range(jobs))
        self._sent, self._done, self._attempts = Counter[int](), Counter[int](), Counter[int]()
        self._out: Counter[int] = Counter()  # chunks of a job that are neither answered nor GONE
        self._again: deque[Batch] = deque()  # GONE
        self._next_node = 0
        self._window = chunks * (3 * nodes * CPU_COUNT // jobs + 2)  # something always waits
        self.warm = 3 * nodes * CPU_COUNT  # batches until each node has answered all that it was given first
        for _ in range(nodes):
            self._join()
        for job in self._jobs:
            self._call(lambda job=job: self.scheduler.declare(job, PYTHON))

    def run(self, batches: int) -> None:
        """Answer so many batches, feeding all the time."""
        goal = self.answered + batches
        for job in self._jobs:
            self._feed(job)
        while self.answered < goal:
            if not self._answer():
                continue
            if self._churn and self.answered % self._churn == 0:
                self._die()
                self._join()
            if self.answered % TICKS == 0:
                self._call(lambda: self.scheduler.tick(0.2 * self.answered / TICKS))

    def finish(self) -> None:
        """Answer all that is out, feeding no more, and end the jobs. AssertionError if a chunk was lost."""
        self._returns = 0
        while self._turns:
            self._answer(feed=False)
        lost = {job: self._sent[job] - self._done[job] for job in self._jobs if self._sent[job] != self._done[job]}
        assert not lost, f"chunks that were never answered: {lost}"
        for job in self._jobs:
            self._call(lambda job=job: self.scheduler.end(job))
        assert not self.scheduler.jobs

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
        job = growth(lambda number: self.scheduler.declare(number, "other"))
        return node, job

    # Events.

    def _call(self, event: Callable[[], object]) -> None:
        began = time.thread_time()
        event()
        took = time.thread_time() - began
        self.seconds += took
        self.worst = max(self.worst, took)
        while self._said:
            self._carry_out(*self._said.popleft())
        while self._again:
            gone = self._again.popleft()
            self._send(gone.job, gone.first, gone.count)

    def _carry_out(self, kind: Kind, node: int | None, batch: Batch) -> None:
        if kind is Kind.TASK and node is not None:
            self._held[node].append(batch)
            self._turns.append(node)
        elif kind is Kind.RESULT:
            self._done[batch.job] += batch.count
            self._out[batch.job] -= batch.count
        elif kind is Kind.GONE:
            self._out[batch.job] -= batch.count
            self._again.append(batch)

    def _join(self) -> None:
        number, self._next_node = self._next_node, self._next_node + 1
        self._alive.append(number)
        self._held[number] = deque()
        self._call(lambda: self.scheduler.join(number, PYTHON, CPU_COUNT))

    def _die(self) -> None:
        place = self._rng.randrange(len(self._alive))
        self._alive[place], self._alive[-1] = self._alive[-1], self._alive[place]
        number = self._alive.pop()
        del self._held[number]
        self._call(lambda: self.scheduler.lose(number))

    def _feed(self, job: int) -> None:
        while self._out[job] <= self._window - self._chunks:
            self._sent[job] += self._chunks
            self._send(job, self._sent[job] - self._chunks, self._chunks)

    def _send(self, job: int, first: int, count: int) -> None:
        self._attempts[job] += 1
        self._out[job] += count
        batch = Batch(job, first, count, self._attempts[job], BATCH_US)
        self._call(lambda: self.scheduler.add(batch))

    def _answer(self, feed: bool = True) -> bool:
        """The next node answers the batch that it was given first, or its first chunk, and returns the others.

        False if that node has died.
        """
        node = self._turns.popleft()
        if node not in self._held:
            return False
        batch = self._held[node].popleft()
        returned = bool(self._returns) and self.answered % self._returns == 0 and batch.count > 1
        answer = Batch(batch.job, batch.first, 1 if returned else batch.count, batch.attempt)
        self.answered += 1
        self._call(lambda: self.scheduler.hear(node, Kind.RESULT, answer, 0.0))
        if returned:
            late = Batch(batch.job, batch.first + 1, batch.count - 1, batch.attempt, flags=Gone.RETURNED)
            self._call(lambda: self.scheduler.hear(node, Kind.RETURNED, late, 0.0))
        if feed:
            self._feed(batch.job)
        return True


def simulate(
    nodes: int, batches: int, chunks: int = CHUNKS, churn: int = 0, returns: int = 0, jobs: int = JOBS
) -> Found:
    """One cluster, warm; AssertionError if any chunk was lost."""
    return together([Cluster(nodes, chunks, churn, returns, jobs)], batches)


def together(clusters: list[Cluster], batches: int) -> Found:
    """Several, in turns of one batch each."""
    for cluster in clusters:
        cluster.run(cluster.warm)
        cluster.seconds = cluster.worst = 0.0
    before = sum(cluster.answered for cluster in clusters)
    while sum(cluster.answered for cluster in clusters) - before < batches:
        for cluster in clusters:
            cluster.run(1 if len(clusters) > 1 else batches)
    answered = sum(cluster.answered for cluster in clusters) - before
    found = Found(sum(c.seconds for c in clusters), answered, max(c.worst for c in clusters))
    for cluster in clusters:
        cluster.finish()
    return found


@section("simulate", "Scale: the real scheduler with false nodes of 16 workers")
def scale(args: argparse.Namespace) -> str:
    """All sizes, in turns."""
    batches = BATCHES // 100 if args.small else BATCHES * 10 if args.long else BATCHES
    sizes = NODES[:2] if args.small else NODES
    repeats = 1 if args.small or args.long else min(args.repeats, 3)
    kinds: dict[str, Callable[[int], Found]] = {
        f"batches of {CHUNKS} chunks": lambda nodes: simulate(nodes, batches),
        "the same, and nodes die and join": lambda nodes: simulate(nodes, batches, churn=DEATHS),
        "the same, and a twentieth comes back": lambda nodes: simulate(nodes, batches, returns=RETURNS),
        "the same, of 1,000 jobs": lambda nodes: simulate(nodes, batches, jobs=MANY_JOBS),
        "same memory": lambda nodes: together([Cluster(10, jobs=4) for _ in range(nodes // 10)], batches),
    }
    lines = [["µs a batch", *(f"{nodes:,} nodes" for nodes in sizes), f"{sizes[-1]:,} over {sizes[0]}"]]
    for name, run in kinds.items():
        found: dict[int, list[float]] = {nodes: [] for nodes in sizes}
        for _ in range(repeats):
            for nodes in sizes:
                gc.collect()
                found[nodes].append(run(nodes).us)
        ratio = spread([large / small for small, large in zip(found[sizes[0]], found[sizes[-1]])])
        lines.append([name, *(number(spread(values).median) for values in found.values()),
                      f"{number(ratio.median)} ({number(ratio.low)}–{number(ratio.high)})"])
    node, job = Cluster(1).weigh()
    return f"{markdown(lines)}\n\nA node without work weighs {node:,.0f} bytes, a job {job:,.0f}."
