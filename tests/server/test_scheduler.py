"""The scheduler: its rules one by one, then all of them against a model that knows only what was said."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from achilles.errors import ProtocolError
from achilles.protocol.frames import Batch, Gone, Kind
from achilles.server.scheduler import MAX_PAUSE_SECONDS, PAUSE_SECONDS, QUICK_US, Scheduler

QUICK, SLOW = 1_000, 0
JOB, OTHER = 100, 101


class Cluster:
    """A scheduler, and all that it has told: to nodes, and to the controllers of jobs."""

    def __init__(self, *cpu_counts: int, jobs: int = 1) -> None:
        self.said: list[tuple[Kind, int | None, Batch]] = []
        self.scheduler = Scheduler(lambda *frame: self.said.append(frame))
        self.attempts = itertools.count(1)
        for node, cpu_count in enumerate(cpu_counts):
            self.scheduler.join(node, "3.11", cpu_count)
        for job in range(JOB, JOB + jobs):
            self.scheduler.declare(job, "3.11")

    def add(self, *counts: int, job: int = JOB, number: int = SLOW, first: int = 0) -> list[Batch]:
        """Batches of so many chunks, one behind the other."""
        batches = []
        for count in counts:
            batches.append(Batch(job, first, count, next(self.attempts), number))
            first += count
        for batch in batches:
            self.scheduler.add(batch)
        return batches

    def take(self, *kinds: Kind) -> list[tuple[int | None, Batch]]:
        """What was said of these kinds since this was asked last."""
        said, self.said = self.said, []
        return [(node, batch) for kind, node, batch in said if kind in kinds]

    def given(self) -> list[tuple[int | None, int]]:
        """Node and first chunk of each batch that was given."""
        return [(node, batch.first) for node, batch in self.take(Kind.TASK)]

    def gone(self) -> list[tuple[int, int, Gone]]:
        """First chunk, end and reason of each GONE."""
        return [(batch.first, batch.end, Gone(batch.flags)) for _, batch in self.take(Kind.GONE)]

    def answer(self, node: int, batch: Batch, first: int | None = None, end: int | None = None) -> None:
        self.scheduler.hear(node, Kind.RESULT, part(batch, first, end), 0.0)

    def give_back(
        self, node: int, batch: Batch, first: int | None = None, end: int | None = None, *,
        reason: Gone = Gone.RETURNED, now: float = 0.0,
    ) -> None:
        self.scheduler.hear(node, Kind.RETURNED, part(batch, first, end, reason), now)


def part(batch: Batch, first: int | None = None, end: int | None = None, flags: int = 0) -> Batch:
    first = batch.first if first is None else first
    end = batch.end if end is None else end
    return Batch(batch.job, first, end - first, batch.attempt, flags=flags)


# Who gets what.


def test_each_worker_gets_a_batch_and_the_rest_waits() -> None:
    cluster = Cluster(2)
    batches = cluster.add(3, 3, 3)
    assert [(kind, node) for kind, node, _ in cluster.said] == [(Kind.JOB, 0), (Kind.TASK, 0), (Kind.TASK, 0)]
    assert [batch for _, batch in cluster.take(Kind.TASK)] == batches[:2]
    cluster.answer(0, batches[0])
    assert cluster.given() == [(0, 6)]


@pytest.mark.parametrize(("number", "second"), [(0, 0), (1, 2), (QUICK_US, 2), (QUICK_US + 1, 0)])
def test_second_places_take_quick_batches_alone(number: int, second: int) -> None:
    cluster = Cluster(2)
    cluster.add(*[1] * 6, number=number)
    assert len(cluster.given()) == 2 + second


def test_idle_workers_are_filled_before_any_second_place() -> None:
    cluster = Cluster(1, 3)
    cluster.add(*[1] * 10, number=QUICK)
    nodes = [node for node, _ in cluster.given()]
    assert sorted(nodes[:4]) == [0, 1, 1, 1] and sorted(nodes[4:]) == [0, 1, 1, 1]


def test_a_second_place_waits_while_another_node_has_an_idle_worker() -> None:
    cluster = Cluster(1, 1)
    first, second = cluster.add(1, 1)
    cluster.take()
    cluster.answer(0, first)
    assert cluster.given() == []
    cluster.add(1, 1, number=QUICK, first=2)
    assert cluster.given() == [(0, 2), (1, 3)]


def test_the_node_that_waited_longest_is_served_first() -> None:
    cluster = Cluster(1, 1, 1)
    batches = cluster.add(1, 1, 1)
    assert cluster.given() == [(0, 0), (1, 1), (2, 2)]
    for node in (1, 2, 0):
        cluster.answer(node, batches[node])
    cluster.add(1, 1, 1, first=3)
    assert cluster.given() == [(1, 3), (2, 4), (0, 5)]


def test_nodes_take_turns() -> None:
    cluster = Cluster(2, 2)
    cluster.add(*[1] * 4)
    assert [node for node, _ in cluster.given()] == [0, 1, 0, 1]


def test_jobs_take_turns() -> None:
    cluster = Cluster(jobs=2)
    cluster.add(*[1] * 3)
    cluster.add(*[1] * 2, job=OTHER)
    cluster.scheduler.join(0, "3.11", 5)
    assert [batch.job for _, batch in cluster.take(Kind.TASK)] == [JOB, OTHER, JOB, OTHER, JOB]


def test_a_quick_job_passes_a_slow_one_where_a_second_place_is_free() -> None:
    cluster = Cluster(1, jobs=2)
    cluster.add(1, 1)
    assert cluster.given() == [(0, 0)]
    cluster.add(1, job=OTHER, number=QUICK)
    assert [batch.job for _, batch in cluster.take(Kind.TASK)] == [OTHER]


def test_only_the_first_waiting_batch_of_a_job_counts_as_quick() -> None:
    cluster = Cluster(1)
    slow, waits = cluster.add(1, 1)
    cluster.add(1, number=QUICK, first=2)
    assert cluster.given() == [(0, 0)]
    cluster.scheduler.cancel(JOB, waits.first, waits.end)
    assert cluster.given() == [(0, 2)]


def test_a_job_goes_to_nodes_of_its_python_alone() -> None:
    cluster = Cluster(2)
    cluster.scheduler.declare(OTHER, "3.14t")
    cluster.add(1, 1, job=OTHER)
    assert cluster.given() == []
    cluster.scheduler.join(1, "3.14", 2)
    cluster.scheduler.join(2, "3.14t", 2)
    assert cluster.given() == [(2, 0), (2, 1)]


def test_a_node_is_told_of_a_job_once_and_of_its_end() -> None:
    cluster = Cluster(1, 1, 1)
    batches = cluster.add(1, 1)
    cluster.answer(0, batches[0])
    cluster.answer(1, batches[1])
    cluster.add(1, 1, 1, first=2)
    assert sorted(node for node, _ in cluster.take(Kind.JOB)) == [0, 1, 2]
    cluster.scheduler.lose(1)
    cluster.scheduler.end(JOB)
    assert cluster.take(Kind.END) and cluster.scheduler.jobs == {}


def test_an_attempt_is_out_once() -> None:
    cluster = Cluster(1)
    held, waiting = cluster.add(2, 2)
    for batch in (held, waiting):
        with pytest.raises(ProtocolError, match="out already"):
            cluster.scheduler.add(part(batch))
    cluster.answer(0, held, 0, 1)
    with pytest.raises(ProtocolError, match="out already"):
        cluster.scheduler.add(part(held))
    cluster.answer(0, held, 1, 2)
    cluster.scheduler.add(part(held))


# Answers and returns.


def test_answers_cut_the_front_and_the_last_frees_the_place() -> None:
    cluster = Cluster(1)
    batch, _ = cluster.add(4, 1)
    cluster.take()
    for first, end in [(0, 1), (1, 3)]:
        cluster.answer(0, batch, first, end)
        (_, told), = cluster.take(Kind.RESULT, Kind.TASK)
        assert (told.first, told.end) == (first, end)
    cluster.answer(0, batch, 3, 4)
    assert [kind for kind, _, _ in cluster.said] == [Kind.RESULT, Kind.TASK]


def test_what_comes_back_is_told_and_frees_the_place() -> None:
    cluster = Cluster(1)
    batch, _ = cluster.add(4, 1)
    cluster.answer(0, batch, 0, 1)
    cluster.give_back(0, batch, 2, 4)
    assert cluster.gone() == [(2, 4, Gone.RETURNED)]
    cluster.give_back(0, batch, 1, 2, reason=Gone.LEFT)
    assert [kind for kind, _, _ in cluster.said] == [Kind.GONE, Kind.TASK]
    assert cluster.gone() == [(1, 2, Gone.LEFT)]


def test_waited_is_told_as_returned() -> None:
    cluster = Cluster(2)
    batch, _ = cluster.add(4, 1)
    cluster.give_back(0, batch, reason=Gone.WAITED)
    assert cluster.gone() == [(0, 4, Gone.RETURNED)]


@pytest.mark.parametrize("kind", [Kind.RESULT, Kind.RETURNED])
def test_what_is_not_held_is_ignored(kind: Kind) -> None:
    cluster = Cluster(1, 1)
    batch, = cluster.add(4)
    cluster.answer(0, batch, 0, 2)
    cluster.take()
    for node, said in [
        (1, part(batch)),  # not with that node
        (0, part(batch, 0, 2)),  # answered
        (0, Batch(JOB, 2, 2, batch.attempt + 1)),  # no such attempt
        (0, Batch(JOB, 4, 9, batch.attempt)),  # behind
        (0, Batch(JOB, 2, 0, batch.attempt)),  # nothing
        (0, Batch(99, 2, 2, batch.attempt)),  # no such job
    ]:
        cluster.scheduler.hear(node, kind, said, 0.0)
        assert cluster.said == []
    cluster.answer(0, batch, 2, 4)
    assert cluster.take(Kind.RESULT)


def test_a_range_that_is_held_in_part_counts_for_that_part() -> None:
    cluster = Cluster(1)
    batch, _ = cluster.add(6, 1)
    cluster.take()
    cluster.answer(0, batch, 0, 2)
    cluster.give_back(0, batch, 1, 3)
    cluster.give_back(0, batch, 5, 9)
    assert cluster.gone() == [(2, 3, Gone.RETURNED), (5, 6, Gone.RETURNED)]
    cluster.answer(0, batch, 0, 6)  # all of it is passed on
    assert [(kind, told.count) for kind, _, told in cluster.said] == [(Kind.RESULT, 6), (Kind.TASK, 1)]
    assert cluster.scheduler.jobs[JOB].done == 4


@pytest.mark.parametrize("kind", [Kind.RESULT, Kind.RETURNED])
def test_the_front_of_a_range_in_the_middle_comes_back(kind: Kind) -> None:
    """Nodes answer in order. A worker that died may have left chunks in front of the one it is charged with."""
    cluster = Cluster(1)
    batch, = cluster.add(6)
    cluster.take()
    cluster.scheduler.hear(0, kind, part(batch, 2, 3), 0.0)
    assert cluster.said[0][0] is Kind.GONE and (cluster.said[0][2].first, cluster.said[0][2].end) == (0, 2)
    assert cluster.said[1][0] is (kind if kind is Kind.RESULT else Kind.GONE)
    cluster.take()
    cluster.give_back(0, batch, 0, 2)
    assert cluster.gone() == []
    cluster.give_back(0, batch, 3, 6)
    assert cluster.gone() == [(3, 6, Gone.RETURNED)] and not cluster.scheduler.nodes[0].held


# Nodes that go.


def test_the_first_batches_of_a_lost_node_are_lost_and_the_others_returned() -> None:
    cluster = Cluster(2)
    batches = cluster.add(3, 3, 3, 3, number=QUICK)
    cluster.answer(0, batches[0])
    cluster.answer(0, batches[1], 3, 4)
    cluster.take()
    cluster.scheduler.lose(0)
    assert cluster.gone() == [(4, 6, Gone.LOST), (6, 9, Gone.LOST), (9, 12, Gone.RETURNED)]


def test_all_of_a_node_that_said_bye_has_left() -> None:
    cluster = Cluster(1)
    cluster.add(1, 1, number=QUICK)
    cluster.scheduler.drain(0)
    cluster.scheduler.drain(0)
    cluster.scheduler.lose(0)
    assert cluster.gone() == [(0, 1, Gone.LEFT), (1, 2, Gone.LEFT)]


def test_a_draining_node_gets_nothing_and_its_answers_count() -> None:
    cluster = Cluster(1)
    batch, = cluster.add(1)
    cluster.scheduler.drain(0)
    cluster.add(1, first=1)
    cluster.take()
    cluster.answer(0, batch)
    assert [kind for kind, _, _ in cluster.said] == [Kind.RESULT]
    cluster.scheduler.tick(1e9)
    assert cluster.given() == []


def test_batches_wait_for_a_node() -> None:
    cluster = Cluster()
    cluster.add(1, 1)
    assert cluster.said == []
    cluster.scheduler.join(0, "3.11", 1)
    assert cluster.given() == [(0, 0)]


# Places that are taken away.


def test_a_batch_that_waited_takes_a_place_until_the_next_answer() -> None:
    cluster = Cluster(2)
    batches = cluster.add(*[1] * 6, number=QUICK)
    cluster.take()
    cluster.give_back(0, batches[3], reason=Gone.WAITED)
    cluster.give_back(0, batches[2], reason=Gone.WAITED)
    assert cluster.given() == []
    cluster.answer(0, batches[0])
    assert cluster.given() == [(0, 4), (0, 5)]


def test_a_batch_that_was_late_takes_no_place() -> None:
    cluster = Cluster(1)
    batches = cluster.add(1, 1, 1, number=QUICK)
    cluster.take()
    cluster.give_back(0, batches[1], reason=Gone.RETURNED)
    assert cluster.given() == [(0, 2)]


def test_a_place_comes_back_after_a_pause_that_doubles_until_an_answer() -> None:
    cluster = Cluster(1)
    batches = cluster.add(*[1] * 30, number=QUICK)
    now, pause = 0.0, PAUSE_SECONDS
    for batch in batches[1:10]:
        cluster.take()
        cluster.give_back(0, batch, reason=Gone.WAITED, now=now)
        cluster.scheduler.tick(now + 0.99 * pause)
        assert cluster.given() == []
        now += pause
        cluster.scheduler.tick(now)
        assert len(cluster.given()) == 1
        pause = min(2 * pause, MAX_PAUSE_SECONDS)
    assert pause == MAX_PAUSE_SECONDS
    cluster.answer(0, batches[0])
    cluster.take()
    cluster.give_back(0, batches[11], reason=Gone.WAITED, now=now)
    cluster.scheduler.tick(now + PAUSE_SECONDS)
    assert cluster.given() == [(0, 12)]


def test_a_node_that_holds_nothing_has_a_place() -> None:
    cluster = Cluster(1)
    for batch in cluster.add(1, 1, 1, 1):
        assert cluster.given() == [(0, batch.first)]
        cluster.give_back(0, batch, reason=Gone.WAITED)


# Cancel and end.


def test_cancel_gives_waiting_batches_back_and_tells_nodes() -> None:
    cluster = Cluster(1, 1, 1)
    batches = cluster.add(*[2] * 6)
    cluster.take()
    cluster.scheduler.cancel(JOB, 1, 9)
    assert [(kind, node, told.first, told.end) for kind, node, told in cluster.said] == [
        (Kind.GONE, None, 6, 8), (Kind.GONE, None, 8, 10),
        (Kind.CANCEL, 0, 1, 9), (Kind.CANCEL, 1, 1, 9), (Kind.CANCEL, 2, 1, 9)]
    cluster.take()
    cluster.give_back(1, batches[1])
    assert cluster.gone() == [(2, 4, Gone.RETURNED)]
    cluster.answer(0, batches[0])
    assert cluster.given() == []  # node 1 has the last one
    assert cluster.scheduler.jobs[JOB].counts() == {"queued": 0, "running": 4, "done": 2}


def test_a_node_hears_once_of_a_range_and_only_if_it_holds_some() -> None:
    cluster = Cluster(2, 1)
    batches = cluster.add(2, 2, 2)
    cluster.take()
    held = [node for node in (0, 1) for attempt in cluster.scheduler.nodes[node].held]
    assert held == [0, 0, 1]
    cluster.answer(0, batches[0], 0, 1)
    cluster.take()
    cluster.scheduler.cancel(JOB, 0, 1)
    assert cluster.said == []
    cluster.scheduler.cancel(JOB, 0, 6)
    assert [node for node, _ in cluster.take(Kind.CANCEL)] == [0, 1]


def test_the_end_of_a_job_drops_its_queue_and_keeps_the_places_of_what_runs() -> None:
    cluster = Cluster(1, jobs=2)
    batch, _ = cluster.add(2, 2)
    cluster.add(1, job=OTHER)
    cluster.take()
    cluster.scheduler.end(JOB)
    assert [(kind, node, told.job) for kind, node, told in cluster.said] == [(Kind.END, 0, JOB)]
    cluster.take()
    cluster.answer(0, batch, 0, 1)
    assert cluster.given() == []
    cluster.give_back(0, batch, 1, 2)
    assert [told.job for _, told in cluster.take(Kind.TASK)] == [OTHER]


def test_the_cluster_in_numbers() -> None:
    cluster = Cluster(2, 8)
    cluster.scheduler.join(2, "3.12", 4)
    cluster.scheduler.join(3, "3.11", 16)
    cluster.scheduler.drain(3)
    assert cluster.scheduler.cluster("3.11") == {
        "nodes": 3, "workers": 10, "largest": 8, "pythons": {"3.11": 2, "3.12": 1}}
    assert cluster.scheduler.cluster("3.13") == {
        "nodes": 3, "workers": 0, "largest": 0, "pythons": {"3.11": 2, "3.12": 1}}


# Everything at once.


@dataclass
class ModelNode:
    python: str
    cpu_count: int
    draining: bool = False
    held: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # (job, attempt) -> first, end
    taken: int = 0
    until: float = 0.0
    told: set[int] = field(default_factory=set)


@dataclass
class ModelJob:
    python: str
    sent: int = 0
    waiting: list[Batch] = field(default_factory=list)
    told: dict[int, set[int]] = field(default_factory=dict)  # attempt -> chunks answered or gone
    ended: bool = False


class Machine(RuleBasedStateMachine):
    """Random events; each frame is checked against what the model says may happen."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(self.tell)
        self.numbers = itertools.count()
        self.attempts = itertools.count(1)
        self.now = 0.0
        self.nodes: dict[int, ModelNode] = {}
        self.jobs: dict[int, ModelJob] = {}
        self.batches: dict[tuple[int, int], Batch] = {}
        self.late: list[tuple[int, Batch]] = []

    def used(self, node: ModelNode) -> int:
        return len(node.held) + node.taken

    def idle(self, node: ModelNode) -> bool:
        return not node.draining and (not node.held or self.used(node) < node.cpu_count)

    # Frames.

    def tell(self, kind: Kind, node: int | None, batch: Batch) -> None:
        getattr(self, "on_" + kind.name.lower())(node, batch)

    def on_job(self, number: int, batch: Batch) -> None:
        assert batch.job not in self.nodes[number].told
        self.nodes[number].told.add(batch.job)

    def on_task(self, number: int, batch: Batch) -> None:
        node, job = self.nodes[number], self.jobs[batch.job]
        assert batch.job in node.told and node.python == job.python and not node.draining and not job.ended
        assert job.waiting.pop(0) is batch
        if not self.idle(node):
            assert 1 <= batch.number <= QUICK_US and self.used(node) < 2 * node.cpu_count
            assert not any(self.idle(other) for other in self.nodes.values() if other.python == job.python)
        node.held[batch.job, batch.attempt] = [batch.first, batch.end]

    def on_result(self, _: None, batch: Batch) -> None:
        self.note(batch)

    def on_gone(self, _: None, batch: Batch) -> None:
        assert not self.jobs[batch.job].told.get(batch.attempt, set()) & set(range(batch.first, batch.end)) or (
            self.jobs[batch.job].ended)
        waiting = [each for each in self.jobs[batch.job].waiting if each.attempt == batch.attempt]
        if waiting:
            assert (batch.first, batch.end) == (waiting[0].first, waiting[0].end)
            self.jobs[batch.job].waiting.remove(waiting[0])
        self.note(batch)

    def note(self, batch: Batch) -> None:
        self.jobs[batch.job].told.setdefault(batch.attempt, set()).update(range(batch.first, batch.end))
        for node in self.nodes.values():
            held = node.held.get((batch.job, batch.attempt))
            if held is not None:
                if batch.end < held[1]:
                    held[0] = max(held[0], batch.end)
                else:
                    held[1] = batch.first
                if held[0] >= held[1]:
                    del node.held[batch.job, batch.attempt]

    def on_cancel(self, number: int, batch: Batch) -> None:
        assert any(job == batch.job and first < batch.end and batch.first < end
                   for (job, _), (first, end) in self.nodes[number].held.items())

    def on_end(self, number: int, batch: Batch) -> None:
        assert batch.job in self.nodes[number].told
        self.nodes[number].told.remove(batch.job)

    # Events.

    @initialize()
    def begin(self) -> None:
        self.join("3.11", 2)
        self.declare("3.11")

    @precondition(lambda self: len(self.nodes) < 6)
    @rule(python=st.sampled_from(["3.12", "3.11", "3.11"]), cpu_count=st.sampled_from([1, 2, 3, 8]))
    def join(self, python: str, cpu_count: int) -> None:
        number = next(self.numbers)
        self.nodes[number] = ModelNode(python, cpu_count)
        self.scheduler.join(number, python, cpu_count)

    @precondition(lambda self: len(self.open()) < 4)
    @rule(python=st.sampled_from(["3.12", "3.11", "3.11"]))
    def declare(self, python: str) -> None:
        number = next(self.numbers)
        self.jobs[number] = ModelJob(python)
        self.scheduler.declare(number, python)

    def open(self) -> list[int]:
        return [number for number, job in self.jobs.items() if not job.ended]

    @precondition(lambda self: self.open())
    @rule(data=st.data(), batches=st.integers(1, 12), count=st.integers(1, 5), number=st.sampled_from([0, 100, 10**6]))
    def add(self, data: st.DataObject, batches: int, count: int, number: int) -> None:
        job_number = data.draw(st.sampled_from(self.open()))
        job = self.jobs[job_number]
        for _ in range(batches):
            batch = Batch(job_number, job.sent, count, next(self.attempts), number)
            job.sent += count
            job.waiting.append(batch)
            self.batches[job_number, batch.attempt] = batch
            self.scheduler.add(batch)

    def holders(self) -> list[int]:
        return [number for number, node in self.nodes.items() if node.held]

    def say(self, number: int, kind: Kind, batch: Batch) -> None:
        """Tell the scheduler; the model cuts for itself only what nobody is told of."""
        node = self.nodes[number]
        held = node.held.get((batch.job, batch.attempt))
        if held and kind is Kind.RESULT:
            node.taken = 0
        elif held and batch.flags == Gone.WAITED:
            node.until = node.until if node.taken else self.now  # the length of the pause is tested above
            node.taken += 1
        self.late.append((number, batch))
        self.scheduler.hear(number, kind, batch, self.now)

    @precondition(lambda self: self.holders())
    @rule(data=st.data(), front=st.booleans(), reason=st.sampled_from([None, None, None, *Gone]))
    def hear(self, data: st.DataObject, front: bool, reason: Gone | None) -> None:
        """A node answers, from the front, or gives back, from the front or the end."""
        number = data.draw(st.sampled_from(self.holders()))
        (job, attempt), (first, end) = data.draw(st.sampled_from(list(self.nodes[number].held.items())))
        count = data.draw(st.integers(1, end - first))
        start = first if front or reason is None else end - count
        kind = Kind.RESULT if reason is None else Kind.RETURNED
        self.say(number, kind, Batch(job, start, count, attempt, flags=reason or 0))

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def hear_late(self, data: st.DataObject) -> None:
        """An answer comes again: its chunks are not held any more."""
        number, batch = data.draw(st.sampled_from(self.late))
        if number in self.nodes:
            before = {key: list(held) for key, held in self.nodes[number].held.items()}
            self.scheduler.hear(number, Kind.RESULT, batch, self.now)
            assert before == self.nodes[number].held

    @rule(seconds=st.sampled_from([0.2, 1.0, 100.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        if seconds == 100.0:  # every pause is over
            for node in self.nodes.values():
                node.taken = 0
        else:
            for number, node in self.nodes.items():
                if self.scheduler.nodes[number].paused_until <= self.now:
                    node.taken = 0
        self.scheduler.tick(self.now)

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.nodes)))
        self.nodes[number].draining = True
        self.scheduler.drain(number)

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.nodes)))
        self.nodes[number].draining = True
        self.scheduler.lose(number)
        assert not self.nodes.pop(number).held

    @precondition(lambda self: self.open())
    @rule(data=st.data(), count=st.integers(1, 30))
    def cancel(self, data: st.DataObject, count: int) -> None:
        number = data.draw(st.sampled_from(self.open()))
        first = data.draw(st.integers(0, self.jobs[number].sent))
        self.scheduler.cancel(number, first, first + count)
        assert not any(b.first < first + count and first < b.end for b in self.jobs[number].waiting)

    @precondition(lambda self: len(self.open()) > 1)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.open()))
        self.jobs[number].ended = True
        self.jobs[number].waiting.clear()
        self.scheduler.end(number)
        assert not any(number in node.told for node in self.nodes.values())

    # What always holds.

    @invariant()
    def each_chunk_is_in_one_place(self) -> None:
        places: dict[tuple[int, int], list[int]] = {key: [] for key in self.batches}
        for node in self.nodes.values():
            for key, (first, end) in node.held.items():
                places[key] += range(first, end)
        for number, job in self.jobs.items():
            for batch in job.waiting:
                places[number, batch.attempt] += range(batch.first, batch.end)
            for attempt, chunks in job.told.items():
                places[number, attempt] += chunks
        for key, batch in self.batches.items():
            if not self.jobs[key[0]].ended:
                assert sorted(places[key]) == list(range(batch.first, batch.end))

    @invariant()
    def no_node_is_over_its_places(self) -> None:
        for node in self.nodes.values():
            assert len(node.held) <= 2 * node.cpu_count

    @invariant()
    def nothing_waits_that_may_run(self) -> None:
        for job in self.jobs.values():
            for node in self.nodes.values():
                if job.waiting and node.python == job.python and not node.draining:
                    assert not self.idle(node)
                    quick = 1 <= job.waiting[0].number <= QUICK_US
                    assert not quick or self.used(node) >= 2 * node.cpu_count

    @invariant()
    def the_scheduler_knows_the_same(self) -> None:
        assert self.scheduler.nodes.keys() == self.nodes.keys()
        for number, node in self.scheduler.nodes.items():
            assert {key: [held.first, held.end] for key, held in node.held.items()} == self.nodes[number].held
            assert node.taken == self.nodes[number].taken
        for number, job in self.scheduler.jobs.items():
            held = sum(end - first for node in self.nodes.values()
                       for (each, _), (first, end) in node.held.items() if each == number)
            queued = sum(batch.count for batch in self.jobs[number].waiting)
            assert (job.counts()["running"], job.counts()["queued"]) == (held, queued)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, print_blob=True)
