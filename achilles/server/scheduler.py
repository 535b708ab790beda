"""Which node runs which slice, and when: events in, actions out.

A plain state machine. It knows nodes, jobs and numbered slices, and moves their
letters without a look at them. No sockets, no threads, no pickle and no clock: what
it knows of time is the pace that RESULT frames bring. The server calls it under one
lock, and carries out the actions of each call in their order.

::

               cut into packets                give
    add ─▶ fresh ────────────▶ packed ────────────▶ held by a node ──▶ answered
                                  ▲    returned, node lost   │
                                  └──────────────────────────┘

1. A packet is as many slices as the node has workers; fewer only if its first slice
   was flushed. It is announced when the first of it is given, and given whole, but
   where a limit forbids that. A slice that comes back is given by itself.
2. Load is counted in workers: a slice is one worker's, or 1/n of one where n of its
   job are worth a message of 5 ms. But what a node was given before a slice that it has
   answered is with its other workers, however much that is: some of it may wait there
   behind a slow one. Work goes to nodes with idle workers, the longest waiting first, and
   to others only while none is idle. Those hold about one packet beyond what runs: they
   are topped up when half of that is gone.
3. Jobs take turns, one grant each. A grant is what the node's free workers need, and
   of quick slices more, up to this node's part of all that waits.
4. An idle node for which nothing waits is fed from one that holds more than it runs
   (RECALL), if that is worth 5 ms. Each idle node may wait for one recall, each other
   one is asked one at a time, and not for a job of which it just had none to give.
5. A limit is a quota of all jobs of one owner and context. Who finds it used up waits there, and gets
   in line again when slices come back.
6. An answer counts while that node holds that slice under that attempt. Losing a node
   raises the attempt; a slice that ten nodes may have begun before they were lost is dead.

A frame costs a constant, whatever the number of nodes. A slice costs a few operations
in C, and no object of its own as long as there are no faults.
"""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice, repeat, starmap
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

from ..errors import ProtocolError
from ..protocol.frames import MESSAGE_US, MORE, PACE_SLICES, PACKED, Rows
from .slices import Given, Held, Queue, drop, pick

__all__ = ["Action", "Announce", "Cancel", "Dead", "End", "Give", "Recall", "Scheduler"]

MAX_QUICK = 512  # slices in one worker's message; a power of two, so that loads are whole numbers
WORKER = MAX_QUICK  # the load of one worker
MAX_LOSSES = 10  # nodes that went down with a slice before it is taken for the cause
SCAN_NODES = 8  # looked at for a good one: all of a small cluster, a constant number of a large one

Packets: TypeAlias = "list[tuple[int, int]]"  # each: its first slice, and how many


class Announce(NamedTuple):
    """Tell the owner of `job` its new packets; comes before their slices are given."""

    job: int
    packets: Packets


class Give(NamedTuple):
    """Send slices to `node`; `first` if it was never given any of this job, so that it needs the JOB."""

    node: int
    job: int
    rows: list[Rows]
    first: bool


class Recall(NamedTuple):
    """Ask `node` for up to `number` slices of `job` that no worker has; it answers with `returned`."""

    node: int
    job: int
    number: int


class Cancel(NamedTuple):
    """Tell `node`, which holds slices of `job`, to drop them."""

    node: int
    job: int


class End(NamedTuple):
    """Tell `node`, which was once given slices of `job`, to forget it."""

    node: int
    job: int


class Dead(NamedTuple):
    """Answer this slice to the owner of `job`: died, phase `node`, with the last of `lost` nodes."""

    job: int
    slice: int
    attempt: int
    lost: int


Action: TypeAlias = "Announce | Give | Recall | Cancel | End | Dead"


class Scheduler:
    """All nodes and jobs of one server. No method blocks; the server's one lock guards them all.

    Nodes and jobs are named by numbers that the server gives and never reuses; `owner` is
    whatever tells controllers apart. Events of nodes and jobs that are not known any more
    are ignored: they were under way when their subject went.
    """

    def __init__(self) -> None:
        self._nodes: dict[int, _Node] = {}
        self._jobs: dict[int, ServerJob] = {}
        self._groups: dict[str, _Group] = {}
        self._quotas: weakref.WeakValueDictionary[tuple[object, object], _Quota] = weakref.WeakValueDictionary()

    def join(self, node: int, python: str, cpu_count: int) -> list[Action]:
        """A node of `cpu_count` workers is there. Raises ProtocolError if it has none."""
        if cpu_count < 1:
            raise ProtocolError("a node without workers")
        group = self._group(python)
        if group.resize(cpu_count, 1):
            for job in self._jobs.values():  # a packet for the others' sizes may have been too much to wait for
                if job.group is group and job.pending():
                    group.waiting.setdefault(job)
        self._nodes[node] = new = _Node(node, group, cpu_count)
        group.place(new)
        return group.assign()

    def leave(self, node: int) -> None:
        """The node drains (BYE): it is given nothing more; its answers count until it is lost."""
        leaver = self._nodes.get(node)
        if leaver is not None and not leaver.draining:
            leaver.draining = True
            leaver.group.resize(leaver.cpu_count, -1)
            leaver.group.place(leaver)

    def lose(self, node: int) -> list[Action]:
        """The connection ended: what the node held goes to others, as a loss unless the node was draining."""
        if node not in self._nodes:
            return []
        counted = not self._nodes[node].draining
        self.leave(node)
        lost = self._nodes.pop(node)
        lost.settle_recall(lost.asked)
        dead: list[Action] = []
        for job, held in lost.held.items():
            job.let_go(len(held))
            dead += job.count_loss(held, lost.cpu_count) if counted else []
            job.requeue(held, steps=1)
        return dead + lost.group.assign()

    def declare(
        self, job: int, owner: object, python: str, limit: int | None = None, context: object = None
    ) -> None:
        """A job begins; at most `limit` (1 or more) of its slices are with nodes at a time.

        Jobs of one owner and one `context` share the last limit that was given; None is a context of its own.
        """
        quota = None
        if limit is not None:
            key = (owner, job if context is None else context)
            quota = self._quotas.setdefault(key, _Quota(limit))
            quota.limit = limit
        self._jobs[job] = ServerJob(job, owner, self._group(python), quota)

    def add(self, job: int, rows: Rows) -> list[Action]:
        """Slices of a job. Raises ProtocolError for one that is there already, or out of turn."""
        known = self._jobs.get(job)
        if known is None or known.cancelled:
            return []
        known.add(rows)
        return known.group.assign()

    def flush(self, job: int, upto: int) -> list[Action]:
        """Packets whose first slice is below `upto` need not be full."""
        known = self._jobs.get(job)
        if known is None:
            return []
        known.flushed = max(known.flushed, upto)
        known.group.waiting.setdefault(known)
        return known.group.assign()

    def answer(self, node: int, job: int, rows: Rows) -> tuple[Rows | None, list[Action]]:
        """A RESULT: what its owner shall have of it, `rows` itself if all counts, None if nothing does."""
        giver, known = self._nodes.get(node), self._jobs.get(job)
        if giver is None or known is None or known not in giver.held:
            return None, []
        held = giver.held[known]
        if (last := rows.slices[-1]) in held and not rows.statuses[-1] & MORE:
            held.went(last)
        accepted, released = known.accept(held, rows)
        if not released:
            return accepted, []
        known.measure(len(released), rows.pace)
        giver.done += len(released)
        giver.barren.discard(known)
        if not held:
            del giver.held[known]
        giver.group.place(giver)
        return accepted, giver.group.assign()

    def returned(self, node: int, job: int, slices: Iterable[int], asked: bool = True) -> list[Action]:
        """The node gave these slices back, `asked` by a recall or of itself; others get them, uncharged."""
        giver, known = self._nodes.get(node), self._jobs.get(job)
        if giver is None or known is None:
            return []
        held, asked = giver.held.get(known, Held()), asked and giver.asked is known
        back = held.take_back(slices, asked=asked)
        if not held:
            giver.held.pop(known, None)
        if not back:
            giver.barren.add(known)
        if asked:
            giver.settle_recall(known)
        known.let_go(len(back))
        known.requeue(back, steps=0)
        giver.group.place(giver, last=True)
        return giver.group.assign()

    def cancel(self, job: int) -> list[Action]:
        """Nothing more of this job is given or accepted. Its number stays known until `end`."""
        known = self._jobs.get(job)
        if known is None:
            return []
        known.reset(cancelled=True)
        actions: list[Action] = []
        for node in self._told(known):
            if node.held.pop(known, None):
                actions.append(Cancel(node.number, job))
            node.barren.discard(known)
            node.settle_recall(known)
            node.group.place(node)
        return actions + known.group.assign()

    def end(self, job: int) -> list[Action]:
        """The job is over: what is left of it is cancelled, and all is forgotten."""
        actions = self.cancel(job)
        known = self._jobs.pop(job, None)
        return actions + [End(node.number, job) for node in self._told(known)] if known else []

    def workers(self, python: str) -> tuple[int, int, int]:
        """Of the nodes of this version that do not drain: workers, the greatest cpu_count, nodes."""
        sizes = +self._groups[python].sizes if python in self._groups else Counter[int]()
        return sum(size * number for size, number in sizes.items()), max(sizes, default=0), sizes.total()

    def pythons(self) -> dict[str, int]:
        """Version to nodes that do not drain, where there are any."""
        return {python: nodes for python, group in self._groups.items() if (nodes := group.sizes.total())}

    def node_states(self) -> list[dict[str, Any]]:
        """For each node its id, python, cpu_count, busy (workers), done (slices)."""
        return [
            {"id": n.number, "python": n.group.python, "cpu_count": n.cpu_count,
             "done": n.done, "busy": n.busy()}
            for n in self._nodes.values()
        ]

    def job_states(self) -> list[dict[str, Any]]:
        """For each job its id, owner, and how many of its slices are queued, running (with nodes), done."""
        return [
            {"id": j.number, "owner": j.owner, "queued": j.pending(), "running": j.held, "done": j.done}
            for j in self._jobs.values()
        ]

    def _group(self, python: str) -> _Group:
        return self._groups.setdefault(python, _Group(python))

    def _told(self, job: ServerJob) -> list[_Node]:
        return [self._nodes[number] for number in sorted(job.told) if number in self._nodes]


class _Quota:
    """How many slices of some jobs, together, may be with nodes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.starved: OrderedDict[ServerJob, None] = OrderedDict()  # jobs whose turn came when there was no room

    def room(self) -> int:
        """How many slices more may be given."""
        return self.limit - self.held

    def wake(self) -> None:
        """There may be room: as many jobs as it could serve get in line again."""
        for job in list(islice(self.starved, max(self.room(), 0))):
            del self.starved[job]
            job.group.waiting.setdefault(job)


class ServerJob:
    """One job: what waits of it, what is known of each slice that is not answered, how quick it is."""

    def __init__(self, number: int, owner: object, group: _Group, quota: _Quota | None) -> None:
        self.number, self.owner, self.group, self.quota = number, owner, group, quota
        self.held = 0  # slices with nodes
        self.told: set[int] = set()  # nodes that were ever given slices of it
        self.done = 0
        self.flushed = 0  # packets that begin below this slice need not be full
        self._paces: deque[int] = deque(maxlen=PACE_SLICES)  # µs, one for each of the last slices
        self._forget_pace()
        self._next: int | None = None  # the fresh slice that must come next; None before the first
        self.reset()

    def reset(self, *, cancelled: bool = False) -> None:
        """Forget every slice; what is with nodes is let go."""
        self.cancelled = cancelled
        self.fresh = Queue()  # contiguous, in no packet yet
        self.packed = Queue()  # of a packet, or in need of none
        self.let_go(self.held)
        self.open: set[int] = set()  # slices not answered
        self.attempts: dict[int, int] = {}  # of open slices, where it is not 0
        self.losses: Counter[int] = Counter()  # of open slices: nodes that went down with it
        self.group.waiting.pop(self, None)
        if self.quota is not None:
            self.quota.starved.pop(self, None)
            self.quota.wake()

    def pending(self) -> int:
        return self.fresh.count + self.packed.count

    def room(self) -> int:
        """How many slices could be given now, if there were nodes."""
        return self.pending() if self.quota is None else min(self.pending(), self.quota.room())

    def hold(self, number: int) -> None:
        """So many of its slices go to a node."""
        self.held += number
        if self.quota is not None:
            self.quota.held += number

    def let_go(self, number: int) -> None:
        """So many are with none any more; who waited for them to go is woken."""
        self.held -= number
        if self.quota is not None:
            self.quota.held -= number
            self.quota.wake()

    def fits(self, cpu_count: int) -> bool:
        """Whether there is something for a node of this size, given that something is pending."""
        return bool(self.packed.count) or self.fresh.count >= cpu_count or self._first_fresh() < self.flushed

    def add(self, rows: Rows) -> None:
        """Slices that came; ProtocolError for one that is there already, or out of turn."""
        slices = set(rows.slices)
        if len(slices) < len(rows) or not slices.isdisjoint(self.open):
            raise ProtocolError(f"a slice of job {self.number} came twice")
        if max(rows.statuses) > PACKED:
            raise ProtocolError(f"a slice of job {self.number} with a status that no task has")
        packed = pick(rows, [status == PACKED for status in rows.statuses])
        fresh = pick(rows, [status != PACKED for status in rows.statuses])
        if fresh is not None:
            start = fresh.slices[0] if self._next is None else self._next
            if fresh.slices != tuple(range(start, start + len(fresh))):
                raise ProtocolError(f"slices of job {self.number} came out of turn")
            self._next = start + len(fresh)
            self.fresh.put(fresh)
        if packed is not None:
            self.packed.put(packed)
        if not self.open and len(rows) == 1:  # a call that follows another under its number, and may be slower
            self._forget_pace()
        self.open |= slices
        self._note_attempts(rows)
        self.group.waiting.setdefault(self)

    def take(self, number: int, cpu_count: int) -> tuple[Packets, list[Rows]]:
        """About so many slices for a node of this size, and the packets that were cut for it."""
        packets: Packets = []
        number = min(number, self.room())
        if not self.packed.count:
            size, first = min(cpu_count, self.fresh.count), self._first_fresh()
            number = size * min(-(-number // size), self.fresh.count // size)
            packets = [(first + n, size) for n in range(0, number, size)]
            for rows in self.fresh.take(number):
                self.packed.put(rows)
        taken = self.packed.take(min(number, self.room()))
        self.hold(sum(map(len, taken)))
        return packets, taken

    def accept(self, held: Held, rows: Rows) -> tuple[Rows | None, Collection[int]]:
        """The rows that count, and the slices whose last row they bring, which are held no more."""
        slices = set(rows.slices)
        attempts = tuple(map(self.attempts.get, rows.slices, repeat(0)))
        alike = attempts == rows.attempts and len(slices) == len(attempts)
        if alike and held.keys() >= slices and max(rows.statuses) < MORE:
            drop(held, slices)
            self._settle(slices)
            return rows, rows.slices
        good, released = [], []
        for slice_, attempt, status in zip(rows.slices, rows.attempts, rows.statuses):
            good.append(slice_ in held and attempt == self.attempts.get(slice_, 0))
            if good[-1] and not status & MORE:
                del held[slice_]
                released.append(slice_)
        self._settle(released)
        return pick(rows, good), released

    def measure(self, number: int, pace_us: int) -> None:
        """So many slices were answered: judge by the slowest of the last how many are worth a message."""
        self.let_go(number)
        self._paces.extend([max(1, pace_us)] * min(number, PACE_SLICES))
        self.pace_us = max(self._paces)
        worth = min(max(1, MESSAGE_US // self.pace_us), MAX_QUICK)
        self.quick = 1 << worth.bit_length() - 1

    def _forget_pace(self) -> None:
        self._paces.clear()
        self.pace_us = MESSAGE_US  # until the first answer, so that nothing travels together
        self.quick = 1  # slices that are worth a message

    def count_loss(self, held: Held, workers: int) -> list[Dead]:
        """A node went down with `held`, in this order: take out those that it was one too many for.

        What waited there behind a message for each worker had not begun, and is not to blame.
        """
        begun = list(islice(held, workers * self.quick))
        self.losses.update(begun)
        slices = [slice_ for slice_ in begun if self.losses[slice_] >= MAX_LOSSES]
        dead = [Dead(self.number, n, self.attempts.get(n, 0), self.losses[n]) for n in slices]
        drop(held, slices)
        self._settle(slices)
        return dead

    def requeue(self, held: Mapping[int, Given], steps: int) -> None:
        """Slices that a node held go in front of all others, so many attempts later."""
        for given in reversed(dict.fromkeys(held.values())):
            back = pick(given[0], [held.get(slice_) is given for slice_ in given[0].slices])
            if back is not None:
                back = back.again(steps)
                self._note_attempts(back)
                self.packed.put(back, front=True)
        self.group.waiting.setdefault(self)

    def _first_fresh(self) -> int:
        return (self._next or 0) - self.fresh.count

    def _note_attempts(self, rows: Rows) -> None:
        if any(rows.attempts):
            self.attempts.update(pair for pair in zip(rows.slices, rows.attempts) if pair[1])

    def _settle(self, slices: Collection[int]) -> None:
        """These slices need nothing more."""
        before = len(self.open)
        self.open.difference_update(slices)
        self.done += before - len(self.open)
        if self.attempts or self.losses:
            drop(self.attempts, slices)
            drop(self.losses, slices)


class _Node:
    """One node: what it holds, and what it was asked for."""

    __slots__ = ("asked", "barren", "cpu_count", "done", "draining", "group", "held", "number")

    def __init__(self, number: int, group: _Group, cpu_count: int) -> None:
        self.number, self.group, self.cpu_count = number, group, cpu_count
        self.held: dict[ServerJob, Held] = {}  # never empty
        self.done = 0  # slices it answered
        self.draining = False
        self.asked: ServerJob | None = None  # by the recall that is under way
        self.barren: set[ServerJob] = set()  # had none to give back, and no give or answer since

    def load(self) -> int:
        """In 1/512 of a worker, by what is known of the jobs now."""
        waiting = others = 0
        for job, held in self.held.items():
            number, each = held.waiting(), WORKER // job.quick
            waiting += number * each
            others += (len(held) - number) * each
        return waiting + min(others, (self.cpu_count - 1) * WORKER)

    def busy(self) -> int:
        """How many of its workers have something to run."""
        return min(self.cpu_count, -(-self.load() // WORKER))

    def spare(self) -> tuple[int, int, ServerJob]:
        """What it could best give back because no worker needs it: µs of work, slices, of which job."""
        over = self.load() - self.cpu_count * WORKER
        spare = [
            (0 if job in self.barren else min(held.waiting(), over * job.quick // WORKER), job)
            for job, held in self.held.items()
        ]
        return max([(number * job.pace_us, number, job) for number, job in spare], key=itemgetter(0))

    def settle_recall(self, job: ServerJob | None) -> None:
        """The recall for this job, if it is under way, is over."""
        if job is not None and self.asked is job:
            self.asked = None
            self.group.recalls -= 1


class _Group:
    """The nodes and the waiting jobs of one Python version: code does not travel between versions."""

    def __init__(self, python: str) -> None:
        self.python = python
        self.sizes: Counter[int] = Counter()  # cpu_count to nodes that do not drain
        self.smallest = 0  # of those sizes
        self.waiting: OrderedDict[ServerJob, None] = OrderedDict()  # jobs with work for a node, whose turn it is first
        self.idle: OrderedDict[_Node, int] = OrderedDict()  # to its idle workers; the longest waiting first
        self.roomy: OrderedDict[_Node, int] = OrderedDict()  # to the workers for whom it could hold more
        self.surplus: OrderedDict[_Node, int] = OrderedDict()  # to 0: who could be asked to give back
        self.recalls = 0  # under way

    def resize(self, cpu_count: int, nodes: int) -> bool:
        """So many nodes of this size more, or less; whether the others are all larger, or none is there."""
        before = self.smallest
        self.sizes[cpu_count] += nodes
        self.smallest = min(+self.sizes, default=0)
        return not before or self.smallest < before

    def place(self, node: _Node, *, last: bool = False) -> None:
        """Put a node in the lines that its load says, behind all others if it is `last` or was not there."""
        load, full = node.load(), node.cpu_count * WORKER
        free = -(-((full if load < full else 2 * full) - load) // WORKER)
        if last:
            self.idle.pop(node, None)
            self.roomy.pop(node, None)
        for line, belongs in (
            (self.idle, load < full),
            (self.roomy, 2 * full <= 2 * load < 3 * full),
            (self.surplus, load > full and node.asked is None),
        ):
            if belongs and not node.draining:
                line[node] = free
            else:
                line.pop(node, None)

    def assign(self) -> list[Action]:
        """Give what waits to whoever has room, in turns; then recall for those who are idle still."""
        packets: dict[int, Packets] = {}
        gives: dict[tuple[_Node, ServerJob], Give] = {}
        misses = 0
        while misses < len(self.waiting) and (line := self.idle or self.roomy):
            job, _ = self.waiting.popitem(last=False)
            fits = bool(job.pending()) and job.fits(self.smallest)
            if fits and job.quota is not None and job.room() <= 0:
                job.quota.starved[job] = None
                continue
            if fits:  # or else until more of it comes: who passes by must not look at it each time
                self.waiting[job] = None
            node = self._choose(line, job) if fits else None
            if node is None:
                misses += fits
                if job.quota is not None:  # the room it was woken for is for others
                    job.quota.wake()
                continue
            misses = 0
            first = node.number not in job.told
            cut, rows = self._grant(node, job, line)
            gives.setdefault((node, job), Give(node.number, job.number, [], first)).rows.extend(rows)
            if cut:
                packets.setdefault(job.number, []).extend(cut)
        return [*starmap(Announce, packets.items()), *gives.values(), *self._recall()]

    def _choose(self, line: OrderedDict[_Node, int], job: ServerJob) -> _Node | None:
        """The node that waits longest, of those that the job has something for."""
        for node in list(islice(line, SCAN_NODES)):
            if job.fits(node.cpu_count):
                return node
            line.move_to_end(node)
        return None

    def _grant(self, node: _Node, job: ServerJob, line: OrderedDict[_Node, int]) -> tuple[Packets, list[Rows]]:
        """Let the node hold what its free workers need of the job; the packets cut for it, and the slices."""
        free = line[node]
        number = max(free, min(free * job.quick, job.pending() // len(line)))
        packets, taken = job.take(number, node.cpu_count)
        held = node.held.setdefault(job, Held())
        for rows in taken:
            held.add(rows)
        job.told.add(node.number)
        node.barren.discard(job)
        self.place(node, last=True)
        return packets, taken

    def _recall(self) -> Iterator[Recall]:
        """For each idle node that waits for none yet, one from the best of a few that hold too much."""
        while self.surplus and self.recalls < len(self.idle):
            nodes = list(islice(self.surplus, SCAN_NODES))
            for node in nodes:
                self.surplus.move_to_end(node)
            node = max(nodes, key=lambda node: node.spare()[0])
            work_us, number, job = node.spare()
            if work_us < MESSAGE_US:
                return
            node.asked = job
            self.recalls += 1
            del self.surplus[node]
            yield Recall(node.number, job.number, min(number, job.quick * next(iter(self.idle.values()))))
