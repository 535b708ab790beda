"""The scheduler chooses the node and the time of each batch: events come in, frames go out.

The scheduler knows nodes, jobs, batches and their ranges. It must not know letters, sockets, threads or a clock. Some
events bring the time. A call of `tell` names each frame to send.

::

    add ─▶ waiting ──TASK──▶ held by a node, as one interval ──answer──▶ RESULT
              │                                  │
              └── cancel ──▶ GONE                └── returned, lose ───▶ GONE

1. The scheduler gives a batch once, whole, to one node. It keeps no letter of the batch. The controller sends again
   the chunks that come back.
2. A node has two places for each worker. A second place takes only a quick batch. Idle workers of all nodes are filled
   before any second place. The node that has waited longest is served first.
3. Jobs take turns, one batch each. A job goes to nodes of its Python alone.
4. An answer or a return counts for the part of its range that the node holds under that attempt. Without a part, it
   is ignored. Else an answer is passed on whole: the controller accepts each chunk once. The part is cut from the
   interval's front or end. Nodes answer in order: so the chunks in front of a part in the middle come back.
5. A batch that waited in a node's queue and was returned still takes a place of the node. The node has all places again
   after its next answer, or after a pause. A node that holds no batch always has a place.

The exchange's lock guards everything here. No method blocks. An event for one batch costs a constant, for any number
of nodes and jobs.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

from ..errors import ProtocolError
from ..protocol.frames import U64, Batch, Gone, Kind
from ..protocol.kinds import MAX_PYTHONS

__all__ = ["Scheduler"]

QUICK_US = 20_000  # a batch of at most this much work may wait in a second place
PAUSE_SECONDS = 1.0  # a taken place comes back after it, if no answer comes
MAX_PAUSE_SECONDS = 60.0  # the pause doubles up to this


class Scheduler:
    """All nodes and jobs of one server, by numbers that the server never gives again.

    :param tell: gets a frame's kind, its node (None for the controller of the batch's job), and the batch. A JOB has no
        letters here. A frame for the controller of an ended job is dropped.
    :ivar nodes, jobs: the present nodes and jobs, for STATUS.
    """

    def __init__(self, tell: Callable[[Kind, int | None, Batch], None]) -> None:
        self._tell = tell
        self.nodes: dict[int, ScheduledNode] = {}
        self.jobs: dict[int, ServerJob] = {}
        self._groups: defaultdict[str, Group] = defaultdict(Group)  # by their Python

    def join(self, number: int, python: str, cpu_count: int) -> None:
        """Add a node of `cpu_count` workers, at least 1."""
        group = self._groups[python]
        node = self.nodes[number] = ScheduledNode(number, group, cpu_count)
        group.sizes[cpu_count] += 1
        group.place(node)
        self._give(group)

    def drain(self, number: int) -> None:
        """Give no further batch to a node that has said BYE. Its answers count until it is lost."""
        node = self.nodes[number]
        node.group.sizes[node.cpu_count] -= not node.draining
        node.draining = True
        node.group.place(node)

    def lose(self, number: int) -> None:
        """Remove a node after its connection's end. Its first batches, as many as it has workers, may have run."""
        node = self.nodes[number]
        ran, others = (Gone.LEFT, Gone.LEFT) if node.draining else (Gone.LOST, Gone.RETURNED)
        self.drain(number)
        del self.nodes[number]
        for place, held in enumerate(list(node.held.values())):
            self._give_back(held, held.first, held.end, ran if place < node.cpu_count else others)

    def declare(self, number: int, python: str) -> None:
        """Add a job."""
        self.jobs[number] = ServerJob(number, self._groups[python])

    def add(self, batch: Batch) -> None:
        """Queue a batch of a declared job. ProtocolError if its attempt is out, or a chunk is beyond 2^63-2."""
        job = self.jobs[batch.job]
        if batch.attempt in job.waiting or batch.attempt in job.held or batch.end > U64 // 2:
            raise ProtocolError(f"attempt {batch.attempt} is out already, or chunk {batch.end - 1} is beyond 2^63-2")
        job.waiting[batch.attempt] = batch
        job.group.line_up(job)
        self._give(job.group)

    def hear(self, number: int, kind: Kind, batch: Batch, now: float) -> None:
        """Take a RESULT or RETURNED of a node; a RETURNED's flags are the reason. `now` is monotonic."""
        node = self.nodes[number]
        held = node.held.get((batch.job, batch.attempt))
        if held is None or batch.first >= held.end or batch.end <= held.first:
            return
        first, end = max(batch.first, held.first), min(batch.end, held.end)
        if held.first < first and end < held.end:
            self._give_back(held, held.first, first, Gone.RETURNED)
        if kind is Kind.RESULT:
            node.taken, node.pause_seconds = 0, PAUSE_SECONDS
            node.done += end - first
            held.job.done += end - first
            self._cut(held, first, end)
            self._tell(Kind.RESULT, None, batch)
        else:
            if batch.flags == Gone.WAITED:
                if not node.taken:
                    node.paused_until = now + node.pause_seconds
                    node.pause_seconds = min(2 * node.pause_seconds, MAX_PAUSE_SECONDS)
                node.taken += 1
            self._give_back(held, first, end, Gone.LEFT if batch.flags == Gone.LEFT else Gone.RETURNED)
        self._give(node.group)

    def cancel(self, number: int, first: int, end: int) -> None:
        """Give back a job's waiting batches that overlap the range. Tell the nodes that hold a part of it."""
        job = self.jobs[number]
        for batch in [each for each in job.waiting.values() if each.first < end and first < each.end]:
            del job.waiting[batch.attempt]
            self._tell(Kind.GONE, None, Batch(number, batch.first, batch.count, batch.attempt, flags=Gone.RETURNED))
        held = [each for each in job.held.values() if each.first < end and first < each.end]
        for node in dict.fromkeys(each.node.number for each in held):
            self._tell(Kind.CANCEL, node, Batch(number, first, end - first))
        job.group.line_up(job)
        self._give(job.group)  # the new first batch may be quick

    def end(self, number: int) -> None:
        """End a job. A node holds its part until it has answered or returned it."""
        job = self.jobs.pop(number)
        job.waiting.clear()
        job.group.line_up(job)
        for node in sorted(job.told & self.nodes.keys()):
            self._tell(Kind.END, node, Batch(number))

    def tick(self, now: float) -> None:
        """Give nodes back their places after the pause. `now` is monotonic."""
        for node in self.nodes.values():
            if node.taken and node.paused_until <= now:
                node.taken = 0
                node.group.place(node)
                self._give(node.group)

    def cluster(self, python: str) -> dict[str, Any]:
        """Return the body of a CLUSTER for controllers of this version. Nodes that drain do not count."""
        sizes = +self._groups[python].sizes
        pythons = +Counter({name: group.sizes.total() for name, group in self._groups.items()})
        return {
            "nodes": pythons.total(), "workers": sum(size * count for size, count in sizes.items()),
            "largest": max(sizes, default=0), "pythons": dict(pythons.most_common(MAX_PYTHONS)),
        }

    def _give(self, group: Group) -> None:
        """Fill the places of a group's nodes."""
        while group.turns:
            if group.idle:
                node, job = next(iter(group.idle)), next(iter(group.turns))
            elif group.spare and group.quick:
                node, job = next(iter(group.spare)), next(iter(group.quick))
            else:
                return
            _, batch = job.waiting.popitem(last=False)
            job.held[batch.attempt] = node.held[job.number, batch.attempt] = HeldBatch(node, job, batch)
            group.place(node, served=True)
            group.line_up(job, served=True)
            if node.number not in job.told:
                job.told.add(node.number)
                self._tell(Kind.JOB, node.number, Batch(job.number))
            self._tell(Kind.TASK, node.number, batch)

    def _give_back(self, held: HeldBatch, first: int, end: int, reason: int) -> None:
        """Tell the controller that a node no longer holds these chunks."""
        self._cut(held, first, end)
        self._tell(Kind.GONE, None, Batch(held.job.number, first, end - first, held.attempt, flags=reason))

    def _cut(self, held: HeldBatch, first: int, end: int) -> None:
        """Cut a range from a held batch's front or end."""
        if end < held.end:
            held.first = end
        else:
            held.end = first
        if held.first == held.end:
            del held.node.held[held.job.number, held.attempt], held.job.held[held.attempt]
        held.node.group.place(held.node)


class Line(OrderedDict[Any, None]):
    """An ordered set: the first member is served first."""

    def put(self, member: object, belongs: bool, served: bool) -> None:
        """Let in a member that belongs here, at the end if it is new or was `served`; else remove it."""
        if served or not belongs:
            self.pop(member, None)
        if belongs:
            self.setdefault(member)


class Group:
    """Nodes and jobs of one Python."""

    def __init__(self) -> None:
        self.sizes: Counter[int] = Counter()  # cpu_count -> nodes that do not drain
        self.idle, self.spare = Line(), Line()  # nodes with idle workers; other nodes with free second places
        self.turns, self.quick = Line(), Line()  # jobs with waiting batches; jobs with a quick batch next

    def place(self, node: ScheduledNode, served: bool = False) -> None:
        """Put a node into its line."""
        used = len(node.held) + node.taken
        idle = used < node.cpu_count or not node.held
        self.idle.put(node, idle and not node.draining, served)
        self.spare.put(node, not idle and used < 2 * node.cpu_count and not node.draining, served)

    def line_up(self, job: ServerJob, served: bool = False) -> None:
        """Put a job into its lines."""
        batch = next(iter(job.waiting.values()), None)
        self.turns.put(job, batch is not None, served)
        self.quick.put(job, batch is not None and 1 <= batch.number <= QUICK_US, served)


class ScheduledNode:
    """A node, and the batches that it holds."""

    def __init__(self, number: int, group: Group, cpu_count: int) -> None:
        self.number, self.group, self.cpu_count = number, group, cpu_count
        self.held: dict[tuple[int, int], HeldBatch] = {}  # (job, attempt) -> batch, in the order of giving
        self.draining = False
        self.done = self.taken = 0  # chunks; places taken away
        self.paused_until = 0.0  # then all places come back
        self.pause_seconds = PAUSE_SECONDS  # of the next pause


class ServerJob:
    """A job, and its batches that are out."""

    def __init__(self, number: int, group: Group) -> None:
        self.number, self.group = number, group
        self.waiting: OrderedDict[int, Batch] = OrderedDict()  # by their attempt, as they came
        self.held: dict[int, HeldBatch] = {}  # by their attempt
        self.told: set[int] = set()  # nodes that had a batch of the job, perhaps lost nodes
        self.done = 0  # chunks

    def counts(self) -> dict[str, int]:
        """Return the counts of chunks for a STATUS."""
        return {
            "queued": sum(batch.count for batch in self.waiting.values()),
            "running": sum(held.end - held.first for held in self.held.values()), "done": self.done,
        }


class HeldBatch:
    """The interval of a batch that a node has not answered or returned: `first` to before `end`."""

    def __init__(self, node: ScheduledNode, job: ServerJob, batch: Batch) -> None:
        self.node, self.job = node, job
        self.attempt, self.first, self.end = batch.attempt, batch.first, batch.end
