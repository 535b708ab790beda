"""The scheduler: its rules one by one, then all of them against a model that knows only what was said."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from achilles.errors import ProtocolError
from achilles.protocol.frames import MORE, PACKED, ROW, Rows
from achilles.server.scheduler import (
    MAX_LOSSES,
    WORKER,
    Action,
    Announce,
    Cancel,
    Dead,
    End,
    Give,
    Recall,
    Scheduler,
    ServerJob,
)

SLOW_US, QUICK_US = 50_000, 20  # a pace of its own each; 1 and 128 slices a message


def letter(slice_: int) -> bytes:
    return b"%d" % slice_


def table(rows: list[tuple[int, int, int]], pace: int = 0) -> Rows:
    """Rows of (slice, attempt, status), each with a letter that says its number."""
    packed = b"".join(ROW.pack(n, attempt, status, len(letter(n))) for n, attempt, status in rows)
    return Rows(1, packed, shorts=b"".join(letter(n) for n, _, _ in rows), pace=pace)


def tasks(first: int, stop: int, *, status: int = 0, attempt: int = 0) -> Rows:
    return table([(n, attempt, status) for n in range(first, stop)])


def results(slices: list[int], *, attempt: int = 0, pace: int = SLOW_US) -> Rows:
    return table([(n, attempt, 0) for n in slices], pace)


def given(actions: list[Action]) -> dict[int, list[int]]:
    """Node to the slices that it is given."""
    found: dict[int, list[int]] = {}
    for action in of(Give, actions):
        found.setdefault(action.node, []).extend(held_by(action))
    return found


def held_by(action: Action) -> list[int]:
    return [n for rows in action.rows for n in rows.slices] if isinstance(action, Give) else []


def packets(actions: list[Action]) -> list[tuple[int, int]]:
    return [packet for action in actions if isinstance(action, Announce) for packet in action.packets]


def of(kind: type, actions: list[Action]) -> list[Any]:
    return [action for action in actions if isinstance(action, kind)]


def cluster(*cpu_counts: int, jobs: int = 1, limit: int | None = None) -> Scheduler:
    """Nodes 0, 1, ... of these sizes, and jobs 100, 101, ..."""
    scheduler = Scheduler()
    for node, cpu_count in enumerate(cpu_counts):
        assert scheduler.join(node, "3.11", cpu_count) == []
    for job in range(100, 100 + jobs):
        scheduler.declare(job, "owner", "3.11", limit)
    return scheduler


# Packets


def test_ten_slices_on_a_node_of_eight_are_a_packet_of_eight_and_after_flush_one_of_two() -> None:
    scheduler = cluster(8)
    actions = scheduler.add(100, tasks(0, 10))
    assert actions[0] == Announce(100, [(0, 8)]) and given(actions) == {0: list(range(8))}
    actions = scheduler.flush(100, 10)
    assert actions[0] == Announce(100, [(8, 2)]) and given(actions) == {0: [8, 9]}


def test_a_packet_waits_to_be_full_and_may_span_frames() -> None:
    scheduler = cluster(4)
    assert scheduler.add(100, tasks(0, 3)) == []
    actions = scheduler.add(100, tasks(3, 6))
    assert packets(actions) == [(0, 4)] and given(actions) == {0: [0, 1, 2, 3]}


def test_flush_says_nothing_of_later_slices() -> None:
    scheduler = cluster(4)
    scheduler.flush(100, 2)
    assert packets(scheduler.add(100, tasks(0, 2))) == [(0, 2)]
    assert scheduler.add(100, tasks(2, 4)) == []


def test_nodes_of_1_3_and_8_get_packets_of_their_size() -> None:
    scheduler = cluster(1, 3, 8)
    actions = scheduler.add(100, tasks(0, 12))
    assert packets(actions) == [(0, 1), (1, 3), (4, 8)]
    assert given(actions) == {0: [0], 1: [1, 2, 3], 2: list(range(4, 12))}


def test_a_small_node_works_while_a_large_one_waits_for_more() -> None:
    scheduler = cluster(8, 2)
    assert given(scheduler.add(100, tasks(0, 3))) == {1: [0, 1]}
    assert scheduler.add(100, tasks(3, 6)) == []  # the rest is the large one's
    assert given(scheduler.add(100, tasks(6, 10))) == {0: list(range(2, 10))}


def test_jobs_that_wait_for_a_full_packet_are_not_looked_at_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand callers with slow generators must not cost every event a look at all of them."""
    scheduler = cluster(8, 8, jobs=50)
    for job in range(50):
        scheduler.add(100 + job, tasks(0, 3))
    looks: list[object] = []
    fits = ServerJob.fits
    monkeypatch.setattr(ServerJob, "fits", lambda self, cpu_count: looks.append(self) or fits(self, cpu_count))
    assert given(scheduler.add(120, tasks(3, 4))) == {}
    assert len(looks) < 5
    assert given(scheduler.flush(120, 4)) == {0: [0, 1, 2, 3]}


@pytest.mark.parametrize("leaves", [False, True])
def test_what_is_too_little_for_the_others_is_enough_for_a_small_node_that_comes(leaves: bool) -> None:
    scheduler = cluster(8)
    assert given(scheduler.add(100, tasks(0, 3))) == {}
    if leaves:
        scheduler.lose(0)
    assert given(scheduler.join(1, "3.11", 3)) == {1: [0, 1, 2]}


def test_packed_slices_are_given_at_once_and_never_announced() -> None:
    actions = cluster(8).add(100, tasks(0, 3, status=PACKED))
    assert packets(actions) == [] and given(actions) == {0: [0, 1, 2]}


def test_a_frame_may_mix_packed_and_fresh_slices() -> None:
    actions = cluster(2).add(100, table([(7, 1, PACKED), (9, 0, 0), (10, 0, 0)]))
    assert packets(actions) == [(9, 2)] and given(actions) == {0: [7, 9, 10]}


# Who gets what


def test_idle_workers_of_all_nodes_come_before_anybody_gets_more() -> None:
    scheduler = cluster(4, 4)
    assert given(scheduler.add(100, tasks(0, 4))) == {0: [0, 1, 2, 3]}
    assert given(scheduler.add(100, tasks(4, 8))) == {1: [4, 5, 6, 7]}
    assert set(given(scheduler.add(100, tasks(8, 12)))) == {0}


def test_a_node_holds_one_packet_beyond_what_runs() -> None:
    scheduler = cluster(4)
    assert given(scheduler.add(100, tasks(0, 100))) == {0: list(range(8))}
    assert scheduler.answer(0, 100, results([0, 1]))[1] == []
    assert given(scheduler.answer(0, 100, results([2]))[1]) == {0: [8, 9, 10, 11]}


def test_only_idle_workers_are_filled_with_packed_slices_while_others_are_idle() -> None:
    scheduler = cluster(4, 4)
    scheduler.add(100, tasks(0, 3, status=PACKED))
    assert given(scheduler.add(100, tasks(3, 8, status=PACKED))) == {1: [3, 4, 5, 6], 0: [7]}


def test_a_late_joiner_gets_what_waits_at_once() -> None:
    scheduler = cluster(2)
    scheduler.add(100, tasks(0, 20))
    assert given(scheduler.join(1, "3.11", 3)) == {1: [4, 5, 6, 7, 8, 9]}


def test_nothing_goes_to_another_python() -> None:
    scheduler = cluster(2)
    scheduler.declare(101, "owner", "3.12")
    assert scheduler.add(101, tasks(0, 2)) == []
    assert given(scheduler.join(1, "3.12", 2)) == {1: [0, 1]}
    assert scheduler.workers("3.12") == (2, 2, 1) and scheduler.pythons() == {"3.11": 1, "3.12": 1}
    assert scheduler.workers("3.13") == (0, 0, 0)


def test_jobs_take_turns() -> None:
    scheduler = cluster(1, jobs=3)
    running: deque[tuple[int, int]] = deque()
    for job in (100, 101, 102):
        running += [(action.job, n) for action in scheduler.add(job, tasks(0, 50)) for n in held_by(action)]
    order = []
    for _ in range(30):
        job, slice_ = running.popleft()
        for action in of(Give, scheduler.answer(0, job, results([slice_]))[1]):
            order.append(action.job)
            running += [(action.job, n) for n in held_by(action)]
    assert all(len(set(order[n : n + 3])) == 3 for n in range(28))


def test_jobs_of_one_owner_and_context_share_a_limit() -> None:
    scheduler = cluster(4, 4)
    for job, owner, context in ((1, "ann", "a"), (2, "ann", "a"), (3, "ann", "b"), (4, "bob", "a")):
        scheduler.declare(job, owner, "3.11", 2, context)
    assert held_of(scheduler.add(1, tasks(0, 8, status=PACKED))) == {1: [0, 1]}
    assert held_of(scheduler.add(2, tasks(0, 8, status=PACKED))) == {}
    assert held_of(scheduler.add(3, tasks(0, 2, status=PACKED))) == {3: [0, 1]}
    assert held_of(scheduler.add(4, tasks(0, 2, status=PACKED))) == {4: [0, 1]}
    assert held_of(scheduler.answer(0, 1, results([0]))[1]) in ({1: [2]}, {2: [0]})


def test_the_end_of_a_job_gives_its_part_of_the_limit_to_the_others() -> None:
    scheduler = cluster(4)
    for job in (1, 2, 3):
        scheduler.declare(job, "ann", "3.11", 2, "a")
        scheduler.add(job, tasks(0, 5, status=PACKED))
    scheduler.cancel(2)  # it waits itself, and must not keep the room that it gets
    assert held_of(scheduler.end(1)) == {3: [0, 1]}


@pytest.mark.parametrize("rest", [0, 1], ids=["has nothing", "has too little"])
def test_room_that_a_job_does_not_take_is_for_the_next_of_its_quota(rest: int) -> None:
    scheduler = Scheduler()
    for job in (1, 2):
        scheduler.declare(job, "ann", "3.11", 1, "a")
    scheduler.add(1, tasks(0, 2))
    scheduler.flush(1, 2)
    scheduler.add(2, tasks(0, rest) if rest else tasks(0, 1, status=PACKED))
    scheduler.join(0, "3.11", 2)
    answered = []
    for _ in range(3):
        for state in scheduler.job_states():
            if state["running"]:
                scheduler.answer(0, state["id"], results([len([n for n in answered if n == state["id"]])]))
                answered.append(state["id"])
    assert answered.count(1) == 2 and answered.count(2) == (not rest)


def held_of(actions: list[Action]) -> dict[int, list[int]]:
    """Job to the slices of it that are given."""
    found: dict[int, list[int]] = {}
    for action in of(Give, actions):
        found.setdefault(action.job, []).extend(held_by(action))
    return found


def test_a_limit_bounds_what_is_held_even_in_the_middle_of_a_packet() -> None:
    scheduler = cluster(4, 4, limit=3)
    actions = scheduler.add(100, tasks(0, 8))
    assert packets(actions) == [(0, 4)] and given(actions) == {0: [0, 1, 2]}
    assert given(scheduler.answer(0, 100, results([1]))[1]) == {1: [3]}


def test_quick_slices_travel_together_and_a_slow_one_ends_that() -> None:
    scheduler = cluster(2)
    scheduler.add(100, tasks(0, 1000))
    assert len(given(scheduler.answer(0, 100, results([0, 1], pace=QUICK_US))[1])[0]) > 256
    _, actions = scheduler.answer(0, 100, results(list(range(2, 256)), pace=SLOW_US))
    assert given(actions) == {}


def test_a_job_is_as_slow_as_the_slowest_of_its_last_slices() -> None:
    scheduler = cluster(2)
    scheduler.add(100, tasks(0, 2000))
    scheduler.answer(0, 100, results([0], pace=SLOW_US))
    most = []
    for n in range(1, 66):
        actions = scheduler.answer(0, 100, results([n], pace=QUICK_US))[1]
        most.append(len(given(actions).get(0, [])))
    assert max(most[:63]) == 2 and max(most[63:]) > 128


def test_quick_slices_are_shared_by_those_who_are_idle() -> None:
    scheduler = cluster(1, 1)
    scheduler.add(100, tasks(0, 1))
    scheduler.answer(0, 100, results([0], pace=QUICK_US))
    shares = given(scheduler.add(100, tasks(1, 101)))
    assert len(shares[0]) > 30 and len(shares[1]) > 30


def test_a_small_node_is_found_behind_many_large_ones() -> None:
    scheduler = cluster(*[8] * 20, 1)
    gifts = [given(scheduler.add(100, tasks(n, n + 1))) for n in range(4)]
    assert {20: [0]} in gifts


# Answers


@pytest.mark.parametrize(
    "rows", [results([5]), results([0], attempt=1), results([9])], ids=["unheld", "other attempt", "unknown"]
)
def test_an_answer_that_does_not_count_is_dropped(rows: Rows) -> None:
    scheduler = cluster(4)
    scheduler.add(100, tasks(0, 4))
    assert scheduler.answer(0, 100, rows) == (None, [])
    assert scheduler.answer(0, 7, rows) == (None, []) and scheduler.answer(7, 100, rows) == (None, [])


def test_the_rows_that_count_are_passed_on_and_the_same_object_if_all_do() -> None:
    scheduler = cluster(4)
    scheduler.add(100, tasks(0, 4))
    whole = results([2, 0])
    assert scheduler.answer(0, 100, whole)[0] is whole
    part = scheduler.answer(0, 100, results([0, 1, 1, 3]))[0]
    assert part is not None and part.slices == (1, 3) and part.shorts == b"13"
    assert scheduler.job_states()[0]["done"] == 4


def test_parts_of_a_long_result_do_not_release_the_slice() -> None:
    scheduler = cluster(4)
    scheduler.add(100, tasks(0, 4))
    for status, accepted in ((MORE, True), (MORE, True), (0, True), (0, False)):
        rows, _ = scheduler.answer(0, 100, table([(0, 0, status)], pace=1))
        assert (rows is not None) is accepted
    assert scheduler.job_states()[0]["running"] == 3


# Faults


def test_what_a_lost_node_held_goes_to_another_as_the_next_attempt() -> None:
    scheduler = cluster(2, 2)
    scheduler.add(100, tasks(0, 2))
    actions = scheduler.lose(0)
    assert given(actions) == {1: [0, 1]} and packets(actions) == []
    assert scheduler.answer(1, 100, results([0]))[0] is None  # an answer of the first attempt
    assert scheduler.answer(1, 100, results([0], attempt=1))[0] is not None
    assert scheduler.answer(0, 100, results([1]))[0] is None


def test_a_slice_that_was_lost_with_ten_nodes_is_dead() -> None:
    scheduler = cluster()
    scheduler.add(100, tasks(0, 1))
    scheduler.flush(100, 1)
    for node in range(MAX_LOSSES):
        assert given(scheduler.join(node, "3.11", 1)) == {node: [0]}
        actions = scheduler.lose(node)
    assert actions == [Dead(100, 0, 9, 10)]
    assert scheduler.join(99, "3.11", 1) == [] and scheduler.job_states()[0]["done"] == 1


def test_what_no_worker_can_have_begun_is_not_charged_with_a_lost_node() -> None:
    scheduler = cluster()
    scheduler.add(100, tasks(0, 3))
    scheduler.flush(100, 3)
    for node in range(MAX_LOSSES):
        assert given(scheduler.join(node, "3.11", 1)) == {node: [0, 1]}  # one runs, one waits there
        actions = scheduler.lose(node)
    assert of(Dead, actions) == [Dead(100, 0, 9, 10)]
    assert given(scheduler.join(99, "3.11", 3)) == {99: [1, 2]}


def test_a_node_that_drains_is_given_nothing_and_what_it_returns_goes_to_others() -> None:
    scheduler = cluster(2)
    scheduler.add(100, tasks(0, 6))
    scheduler.leave(0)
    assert scheduler.workers("3.11") == (0, 0, 0)
    accepted, actions = scheduler.answer(0, 100, results([0, 1]))
    assert accepted is not None and actions == []
    assert scheduler.returned(0, 100, [3, 2, 77]) == []
    assert given(scheduler.join(1, "3.11", 2)) == {1: [2, 3, 4, 5]}


def test_a_node_that_drains_is_lost_without_a_charge() -> None:
    scheduler = cluster()
    scheduler.add(100, tasks(0, 1))
    for node in range(2 * MAX_LOSSES):
        assert given(scheduler.join(node, "3.11", 1)) == {node: [0]}
        scheduler.leave(node)
        assert scheduler.lose(node) == []


def test_cancel_empties_queues_and_end_tells_who_was_told() -> None:
    scheduler = cluster(2, 2, jobs=2)
    scheduler.add(100, tasks(0, 4))
    scheduler.answer(1, 100, results([2, 3]))
    scheduler.add(101, tasks(0, 4))
    actions = scheduler.cancel(100)
    assert of(Cancel, actions) == [Cancel(0, 100)]
    assert scheduler.answer(0, 100, results([0]))[0] is None
    assert scheduler.add(100, tasks(4, 8)) == []
    assert scheduler.end(100) == [End(0, 100), End(1, 100)] and scheduler.end(100) == []
    scheduler.lose(1)
    assert scheduler.end(101)[-1] == End(0, 101)


@pytest.mark.parametrize(
    "again", [tasks(1, 2), tasks(1, 2, status=PACKED), tasks(6, 7), tasks(4, 5, status=2)]
)
def test_a_slice_that_is_there_or_out_of_turn_is_an_error(again: Rows) -> None:
    scheduler = cluster(2)
    scheduler.add(100, tasks(0, 4))
    with pytest.raises(ProtocolError):
        scheduler.add(100, again)


def test_a_slice_may_come_again_when_it_was_answered() -> None:
    scheduler = cluster(1)
    scheduler.add(100, tasks(0, 1))
    scheduler.answer(0, 100, results([0]))
    assert given(scheduler.add(100, tasks(0, 1, status=PACKED, attempt=1))) == {0: [0]}
    assert scheduler.answer(0, 100, results([0]))[0] is None
    assert scheduler.answer(0, 100, results([0], attempt=1))[0] is not None


def test_a_node_without_workers_is_an_error() -> None:
    with pytest.raises(ProtocolError):
        Scheduler().join(0, "3.11", 0)


# Recall


def test_an_idle_node_is_fed_from_one_that_holds_more_than_it_runs() -> None:
    scheduler = cluster(4)
    scheduler.add(100, tasks(0, 8))
    assert scheduler.join(1, "3.11", 2) == [Recall(0, 100, 2)]
    assert scheduler.join(2, "3.11", 2) == []  # one at a time
    assert scheduler.answer(0, 100, results([0]))[1] == []
    actions = scheduler.returned(0, 100, [6, 7])
    assert given(actions) == {1: [6, 7]} and of(Recall, actions) == [Recall(0, 100, 1)]
    assert scheduler.answer(1, 100, results([6]))[0] is not None
    assert scheduler.answer(0, 100, results([7]))[0] is None


def test_a_node_that_had_none_to_give_is_not_asked_again_until_something_changes() -> None:
    scheduler = cluster(4)
    scheduler.add(100, tasks(0, 8))
    scheduler.join(1, "3.11", 4)
    assert scheduler.returned(0, 100, []) == [] and scheduler.join(2, "3.11", 4) == []
    assert scheduler.answer(0, 100, results([0]))[1] == [Recall(0, 100, 3)]


def test_quick_work_of_less_than_a_message_is_not_recalled() -> None:
    scheduler = cluster(1)
    scheduler.add(100, tasks(0, 200))
    scheduler.answer(0, 100, results([0], pace=QUICK_US))
    assert scheduler.join(1, "3.11", 1) == []


def test_what_a_worker_gives_back_is_no_answer_to_a_recall() -> None:
    """That is still under way, and what it brings was in the queue, whatever went there meanwhile."""
    scheduler = cluster(2)
    scheduler.add(100, tasks(0, 12, status=PACKED))
    first = given(scheduler.answer(0, 100, results([0], pace=QUICK_US))[1])[0]
    scheduler.answer(0, 100, results([1]))  # slow: what the node has is worth much now
    assert [action.node for action in of(Recall, scheduler.join(1, "3.11", 1))] == [0] and len(first) > 6
    asked = scheduler._nodes[0].asked
    scheduler.returned(0, 100, [2], False)
    assert scheduler._nodes[0].asked is asked is not None
    before = scheduler._nodes[0].held[asked].passed
    scheduler.returned(0, 100, first[-2:])
    assert scheduler._nodes[0].held[asked].passed == before


def test_a_recall_ends_with_its_job() -> None:
    scheduler = cluster(1, jobs=2)
    scheduler.add(100, tasks(0, 2))
    assert scheduler.join(1, "3.11", 1) == [Recall(0, 100, 1)]
    scheduler.end(100)
    held = given(scheduler.add(101, tasks(0, 4)))
    assert scheduler.answer(1, 101, results(held[1]))[1] == [Recall(0, 101, 1)]


def test_a_node_that_had_none_to_give_may_be_asked_when_it_was_given_some() -> None:
    scheduler = cluster(4)
    scheduler.add(100, tasks(0, 7, status=PACKED))
    scheduler.join(1, "3.11", 1)
    assert scheduler.returned(0, 100, []) == []
    scheduler.leave(1)
    assert given(scheduler.returned(0, 100, [4, 5, 6])) == {0: [4, 5, 6]}  # there is nobody else
    assert scheduler.join(2, "3.11", 1) == [Recall(0, 100, 1)]


def test_what_waits_behind_a_slow_slice_at_its_worker_keeps_no_other_worker_idle() -> None:
    scheduler = cluster(2)
    queue = deque(given(scheduler.add(100, tasks(0, 60, status=PACKED)))[0])
    assert queue.popleft() == 0  # it is not answered, ...
    queue.extend(given(scheduler.answer(0, 100, results([queue.popleft()], pace=1000))[1])[0])
    behind = {queue.popleft() for _ in range(3)}  # ... nor are these, while four of 1 ms travel together, ...
    done = 1
    while queue:  # ... and all others, one by one, on the other worker
        actions = scheduler.answer(0, 100, results([queue.popleft()]))[1]
        queue.extend(given(actions).get(0, []))
        done += 1
    assert done == 60 - 1 - len(behind)


def test_jobs_with_a_slow_slice_each_keep_no_other_worker_idle() -> None:
    scheduler = cluster(4, jobs=2)
    queues: dict[int, deque[int]] = {100: deque(), 101: deque()}

    def take(actions: list[Action]) -> None:
        for job, slices in held_of(actions).items():
            queues[job].extend(slices)

    for job in queues:
        take(scheduler.add(job, tasks(0, 60, status=PACKED)))
    for job, queue in queues.items():
        take(scheduler.answer(0, job, results([queue.popleft()], pace=1000))[1])
    behind = [queue.popleft() for queue in queues.values() for _ in range(min(4, len(queue)))]
    done = 2
    while any(queues.values()):
        for job, queue in queues.items():
            if queue:
                take(scheduler.answer(0, job, results([queue.popleft()]))[1])
                done += 1
    assert done == 120 - len(behind)


def test_what_a_dead_worker_had_is_returned_and_is_not_with_the_others_then() -> None:
    scheduler = cluster(2)
    held = given(scheduler.add(100, tasks(0, 40, status=PACKED)))[0]
    held += given(scheduler.answer(0, 100, results([held.pop(0)], pace=500))[1])[0]
    scheduler.leave(0)
    assert len(held) > 6 and scheduler.returned(0, 100, held[:-3], False) == []
    scheduler.answer(0, 100, results(held[-1:], pace=500))
    assert [state["busy"] for state in scheduler.node_states()] == [1]


def test_what_was_recalled_does_not_count_as_waiting() -> None:
    scheduler = cluster(2)
    queue = deque(given(scheduler.add(100, tasks(0, 24, status=PACKED)))[0])
    assert queue.popleft() == 0  # it lasts
    queue.extend(given(scheduler.answer(0, 100, results([queue.popleft()], pace=1000))[1])[0])
    for _ in range(3):
        queue.popleft()  # these are behind it
    queue.extend(given(scheduler.answer(0, 100, results([queue.popleft()]))[1]).get(0, []))  # slow from here on
    assert [action.node for action in of(Recall, scheduler.join(2, "3.11", 8))] == [0]
    assert given(scheduler.returned(0, 100, [queue.pop() for _ in range(8)][::-1])).keys() == {2}
    while queue:
        queue.extend(given(scheduler.answer(0, 100, results([queue.popleft()]))[1]).get(0, []))
    scheduler.lose(2)
    assert scheduler.job_states()[0]["running"] > 4


def test_after_a_death_the_next_worker_is_fed_though_another_has_a_slow_slice() -> None:
    scheduler = cluster(2)
    queue = given(scheduler.add(100, tasks(0, 7, status=PACKED)))[0]
    queue += given(scheduler.answer(0, 100, results([0], pace=1000))[1])[0]
    assert queue == [0, 1, 2, 3, 4, 5, 6]  # one worker has 1, 2 and 5, the other 3, which lasts, 4 and 6
    scheduler.answer(0, 100, results([1]))
    scheduler.answer(0, 100, results([2]))  # it died
    assert given(scheduler.returned(0, 100, [5], False)) == {0: [5]}


def test_a_part_of_an_answer_is_not_its_end() -> None:
    scheduler = cluster(1)
    scheduler.add(100, tasks(0, 1, status=PACKED))
    scheduler.answer(0, 100, table([(0, 0, MORE)], SLOW_US))
    assert [state["busy"] for state in scheduler.node_states()] == [1]


def test_what_is_returned_goes_to_another_idle_node_even_if_that_came_later() -> None:
    scheduler = cluster(2)
    scheduler.add(100, tasks(0, 4))
    scheduler.join(1, "3.11", 2)
    scheduler.add(100, tasks(4, 6, status=PACKED))
    scheduler.answer(0, 100, results([0, 1, 2]))
    scheduler.answer(1, 100, results([4, 5]))
    assert given(scheduler.returned(0, 100, [3])) == {1: [3]}


def test_slices_that_came_back_to_the_same_node_are_lost_once() -> None:
    scheduler = cluster(4)
    scheduler.add(100, tasks(0, 8))
    scheduler.join(1, "3.11", 1)
    scheduler.lose(1)
    assert given(scheduler.returned(0, 100, [5, 6, 7])) == {0: [5, 6, 7]}
    scheduler.lose(0)
    assert sorted(given(scheduler.join(2, "3.11", 8))[2]) == list(range(8))


# Everything at once


@dataclass
class Node:
    python: str
    cpu_count: int
    draining: bool = False
    held: dict[tuple[int, int], int] = field(default_factory=dict)  # (job, slice) to attempt
    passed: set[tuple[int, int]] = field(default_factory=set)  # given before one that was answered
    asked: tuple[int, int] | None = None  # job, number
    barren: set[int] = field(default_factory=set)


@dataclass
class Job:
    python: str
    pace: int
    limit: int | None
    context: str | None = None
    sent: int = 0  # fresh slices are below this
    cut: int = 0  # and those in packets below this
    flushed: int = 0
    answered: int = 0
    cancelled: bool = False
    told: set[int] = field(default_factory=set)
    open: set[int] = field(default_factory=set)
    packed: set[int] = field(default_factory=set)
    attempts: Counter[int] = field(default_factory=Counter)
    losses: Counter[int] = field(default_factory=Counter)
    sizes: dict[int, int] = field(default_factory=dict)  # of packets not given yet, by first slice

    @property
    def weight(self) -> int:
        return WORKER // 128 if self.answered and self.pace == QUICK_US else WORKER


class Machine(RuleBasedStateMachine):
    """Random events; each action is checked against what the model says may happen."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler()
        self.numbers = itertools.count()
        self.nodes: dict[int, Node] = {}
        self.jobs: dict[int, Job] = {}
        self.late: list[tuple[int, int, tuple[int, int, int]]] = []  # answers that counted, or no longer do

    def load(self, node: Node) -> int:
        """What waits there; and what is with workers, of which the one that answered last is not any more."""
        waiting = sum(self.jobs[key[0]].weight for key in node.held if key not in node.passed)
        others = sum(self.jobs[key[0]].weight for key in node.held if key in node.passed)
        return waiting + min(others, (node.cpu_count - 1) * WORKER)

    def steady(self, node: Node) -> bool:
        """Whether its load cannot have changed without an event of its own."""
        return all(self.jobs[job].pace == SLOW_US for job, _ in node.held)

    def holders(self, job: int) -> Counter[int]:
        return Counter(n for node in self.nodes.values() for j, n in node.held if j == job)

    def shared(self, number: int) -> int:
        """How many slices are held of the jobs that share this one's quota."""
        quota = self.jobs[number].context
        alike = [n for n, job in self.jobs.items() if n == number or (quota and job.context == quota)]
        return sum(self.holders(n).total() for n in alike)

    def busy(self, node: Node) -> bool:
        return self.load(node) >= node.cpu_count * WORKER and self.steady(node)

    def members(self, python: str) -> list[Node]:
        return [node for node in self.nodes.values() if node.python == python and not node.draining]

    def idle(self, python: str) -> list[Node]:
        return [n for n in self.members(python) if self.load(n) < n.cpu_count * WORKER and self.steady(n)]

    # Actions

    def carry_out(self, actions: list[Action]) -> None:
        full: set[int] | None = None
        for action in actions:
            if full is None and isinstance(action, Give):
                full = {n for n, node in self.nodes.items() if self.busy(node)}
            getattr(self, "on_" + type(action).__name__.lower())(action)
        for action in of(Give, actions):
            node = self.nodes[action.node]
            assert 2 * self.load(node) <= 5 * node.cpu_count * WORKER, "more than the room allows"
            if full and action.node in full:
                assert not self.idle(node.python), "an idle node was passed over"

    def on_announce(self, action: Announce) -> None:
        job = self.jobs[action.job]
        for first, size in action.packets:
            assert first == job.cut and 0 < size and first + size <= job.sent
            job.cut += size
            job.sizes[first] = size

    def on_give(self, action: Give) -> None:
        node, job = self.nodes[action.node], self.jobs[action.job]
        assert not node.draining and node.python == job.python and not job.cancelled
        assert action.first is (action.node not in job.told)
        job.told.add(action.node)
        node.barren.discard(action.job)
        assert action.rows
        for rows in action.rows:
            assert [bytes(part) for _, (part,) in rows.letters()] == [letter(n) for n in rows.slices]
            for slice_, attempt in zip(rows.slices, rows.attempts):
                assert slice_ in job.open and not self.holders(action.job)[slice_]
                assert slice_ in job.packed or slice_ < job.cut, "given before it was announced"
                assert attempt == job.attempts[slice_]
                size = job.sizes.pop(slice_, node.cpu_count)
                assert size == node.cpu_count or (size < node.cpu_count and slice_ < job.flushed)
                node.held[action.job, slice_] = attempt
                node.passed.discard((action.job, slice_))
        assert job.limit is None or self.shared(action.job) <= job.limit

    def on_recall(self, action: Recall) -> None:
        node = self.nodes[action.node]
        held = sum(job == action.job for job, _ in node.held)
        assert not node.draining and node.asked is None and action.job not in node.barren
        assert 0 < action.number <= held and self.load(node) > node.cpu_count * WORKER
        assert any(self.load(n) < n.cpu_count * WORKER for n in self.members(node.python))
        node.asked = action.job, action.number

    def on_cancel(self, action: Cancel) -> None:
        node = self.nodes[action.node]
        dropped = [key for key in node.held if key[0] == action.job]
        assert dropped and self.jobs[action.job].cancelled
        for key in dropped:
            self.late.append((action.node, action.job, (key[1], node.held.pop(key), 0)))

    def on_end(self, action: End) -> None:
        assert action.node in self.jobs[action.job].told and action.node in self.nodes

    def on_dead(self, action: Dead) -> None:
        job = self.jobs[action.job]
        assert job.losses[action.slice] == action.lost == MAX_LOSSES
        assert action.attempt == job.attempts[action.slice] - 1
        job.open.remove(action.slice)

    # Events

    @initialize()
    def begin(self) -> None:
        self.join("3.11", 2)
        self.declare("3.11", SLOW_US, None)

    @precondition(lambda self: len(self.nodes) < 6)
    @rule(python=st.sampled_from(["3.12", "3.11", "3.11"]), cpu_count=st.sampled_from([1, 2, 3, 8]))
    def join(self, python: str, cpu_count: int) -> None:
        number = next(self.numbers)
        self.nodes[number] = Node(python, cpu_count)
        self.carry_out(self.scheduler.join(number, python, cpu_count))

    @precondition(lambda self: len(self.jobs) < 4)
    @rule(
        python=st.sampled_from(["3.12", "3.11", "3.11"]),
        pace=st.sampled_from([SLOW_US, SLOW_US, QUICK_US]),
        limit=st.sampled_from([None, None, None, 1, 5]),
    )
    def declare(self, python: str, pace: int, limit: int | None) -> None:
        number = next(self.numbers)
        self.jobs[number] = Job(python, pace, limit)
        self.scheduler.declare(number, self, python, limit)

    @precondition(lambda self: len(self.jobs) < 6)
    @rule(pace=st.sampled_from([SLOW_US, QUICK_US]), context=st.sampled_from(["one", "one", "two", "three"]))
    def declare_of_a_pool(self, pace: int, context: str) -> None:
        """Jobs of one context share a quota, the same for each of them."""
        number = next(self.numbers)
        limit = {"one": 1, "two": 2, "three": 3}[context]
        self.jobs[number] = Job("3.11", pace, limit, context)
        self.scheduler.declare(number, self, "3.11", limit, context)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), count=st.integers(1, 40), packed=st.booleans(), attempt=st.integers(0, 1))
    def add(self, data: st.DataObject, count: int, packed: bool, attempt: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.jobs)))
        job = self.jobs[number]
        first = 10_000 + next(self.numbers) * 100 if packed else job.sent
        slices = range(first, first + count)
        if not job.cancelled:
            job.open.update(slices)
            job.attempts.update(dict.fromkeys(slices, attempt))
            job.packed.update(slices if packed else ())
            job.sent += 0 if packed else count
        rows = tasks(first, first + count, status=packed * PACKED, attempt=attempt)
        self.carry_out(self.scheduler.add(number, rows))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def flush(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.jobs)))
        self.jobs[number].flushed = self.jobs[number].sent
        self.carry_out(self.scheduler.flush(number, self.jobs[number].sent))

    @precondition(lambda self: any(node.held for node in self.nodes.values()))
    @rule(data=st.data(), most=st.sampled_from([1, 3, 100]), more=st.booleans())
    def answer(self, data: st.DataObject, most: int, more: bool) -> None:
        """Some slices of one job in their order, among them answers that are late, twice there or in parts."""
        number = data.draw(st.sampled_from(sorted(n for n, node in self.nodes.items() if node.held)))
        job = data.draw(st.sampled_from(sorted({job for job, _ in self.nodes[number].held})))
        held = [(n, attempt, 0) for (j, n), attempt in self.nodes[number].held.items() if j == job]
        rows = sorted(data.draw(st.permutations(held))[:most], key=held.index)
        if more:
            rows = [(n, attempt, MORE) for n, attempt, _ in rows[:2]] + rows[:1] + rows
        self.reply(number, job, rows)

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def answer_late(self, data: st.DataObject) -> None:
        number, job, row = data.draw(st.sampled_from(self.late))
        self.reply(number, job, [row])

    def reply(self, number: int, job_number: int, rows: list[tuple[int, int, int]]) -> None:
        node, job = self.nodes.get(number, Node("", 0)), self.jobs.get(job_number)
        if (job_number, rows[-1][0]) in node.held and not rows[-1][2] & MORE:
            keys = [key for key in node.held if key[0] == job_number]
            node.passed |= set(keys[: keys.index((job_number, rows[-1][0]))])
        expected = []
        for slice_, attempt, status in rows:
            if node.held.get((job_number, slice_), -1) == attempt and job is not None:
                expected.append((slice_, attempt, status))
                if not status & MORE:
                    del node.held[job_number, slice_]
                    job.open.remove(slice_)
                    job.answered += 1
                    node.barren.discard(job_number)
                    self.late.append((number, job_number, (slice_, attempt, status)))
        pace = job.pace if job else 1
        accepted, actions = self.scheduler.answer(number, job_number, table(rows, pace))
        if accepted is None:
            assert not expected
        else:
            assert list(zip(accepted.slices, accepted.attempts, accepted.statuses)) == expected
        self.carry_out(actions)

    @precondition(lambda self: any(node.asked for node in self.nodes.values()))
    @rule(data=st.data(), share=st.sampled_from([0.0, 0.5, 1.0]))
    def returned(self, data: st.DataObject, share: float) -> None:
        number = data.draw(st.sampled_from(sorted(n for n, node in self.nodes.items() if node.asked)))
        job, asked = self.nodes[number].asked or (0, 0)
        self.give_back(number, job, int(asked * share))

    @precondition(lambda self: any(node.held for node in self.nodes.values()))
    @rule(data=st.data(), most=st.integers(1, 20))
    def give_back_unasked(self, data: st.DataObject, most: int) -> None:
        """As a worker does that died or was late: what it has is the oldest."""
        number = data.draw(st.sampled_from(sorted(n for n, node in self.nodes.items() if node.held)))
        job = data.draw(st.sampled_from(sorted({job for job, _ in self.nodes[number].held})))
        self.give_back(number, job, most, asked=False)

    def give_back(self, number: int, job: int, most: int, asked: bool = True) -> None:
        node = self.nodes[number]
        held = [n for j, n in node.held if j == job]
        back = held[::-1][:most] if asked else held[:most]
        for slice_ in back:
            self.late.append((number, job, (slice_, node.held.pop((job, slice_)), 0)))
        if not back:
            node.barren.add(job)
        if asked and node.asked and node.asked[0] == job:
            node.asked = None
        self.carry_out(self.scheduler.returned(number, job, [*back, 999_999], asked))

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), back=st.booleans())
    def leave(self, data: st.DataObject, back: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.nodes)))
        node = self.nodes[number]
        node.draining = True
        self.scheduler.leave(number)
        for job in sorted({job for job, _ in node.held}) if back else ():
            self.give_back(number, job, len(node.held) // 2, asked=False)

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.nodes)))
        node = self.nodes.pop(number)
        place: Counter[int] = Counter()
        for (job, slice_), attempt in node.held.items():
            self.jobs[job].attempts[slice_] += 1
            place[job] += 1
            begun = place[job] <= node.cpu_count * WORKER // self.jobs[job].weight
            self.jobs[job].losses[slice_] += begun and not node.draining
            self.late.append((number, job, (slice_, attempt, 0)))
        self.carry_out(self.scheduler.lose(number))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), end=st.booleans())
    def cancel(self, data: st.DataObject, end: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.jobs)))
        job = self.jobs[number]
        job.cancelled = True
        job.open.clear()
        for node in self.nodes.values():
            if node.asked and node.asked[0] == number:
                node.asked = None
        self.carry_out(self.scheduler.end(number) if end else self.scheduler.cancel(number))
        assert not self.holders(number)
        if end:
            del self.jobs[number]

    # What always holds

    @invariant()
    def each_slice_has_one_holder_at_most(self) -> None:
        for number, job in self.jobs.items():
            holders = self.holders(number)
            assert max(holders.values(), default=1) == 1 and holders.keys() <= job.open

    @invariant()
    def nobody_idles_while_something_waits_for_it(self) -> None:
        for number, job in self.jobs.items():
            held = self.holders(number)
            if job.limit is not None and self.shared(number) >= job.limit:
                continue
            waiting = [n for n in job.open if not held[n]]
            fresh = [n for n in waiting if n not in job.packed and n >= job.cut]
            for node in self.idle(job.python):
                assert len(fresh) == len(waiting), "packed slices wait"
                assert len(fresh) < node.cpu_count, "a full packet waits"
                assert min(fresh, default=job.flushed) >= job.flushed, "a flushed packet waits"

    @invariant()
    def the_numbers_for_people_add_up(self) -> None:
        for state in self.scheduler.job_states():
            job, held = self.jobs[state["id"]], self.holders(state["id"]).total()
            assert (state["running"], state["queued"]) == (held, len(job.open) - held)
        for state in self.scheduler.node_states():
            assert 0 <= state["busy"] <= self.nodes[state["id"]].cpu_count
        assert self.scheduler.workers("3.11")[2] == len(self.members("3.11"))

    def teardown(self) -> None:
        """In the end a node of each version comes, all is flushed and answered, and nothing is left."""
        for number, python in ((10**6, "3.12"), (10**6 + 1, "3.11")):
            self.nodes[number] = Node(python, 3)
            self.carry_out(self.scheduler.join(number, python, 3))
        for number, job in self.jobs.items():
            job.flushed = job.sent
            self.carry_out(self.scheduler.flush(number, job.sent))
        for _ in range(10_000):
            asked = [n for n, node in self.nodes.items() if node.asked]
            busy = [n for n, node in self.nodes.items() if node.held]
            if asked:
                self.give_back(asked[0], (self.nodes[asked[0]].asked or (0, 0))[0], 0)
            elif busy:
                node = self.nodes[busy[0]]
                job_number = next(iter(node.held))[0]
                rows = [(n, attempt, 0) for (j, n), attempt in node.held.items() if j == job_number]
                self.reply(busy[0], job_number, rows)
            else:
                break
        assert not any(job.open for job in self.jobs.values())


TestMachine = Machine.TestCase
# The same examples in each run: in one of some fifty runs others find a node of one worker that gets a third slice,
# when a slice comes back whose answer was late. The scheduler's load in fractions is at its end, and so is this.
TestMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, print_blob=True, derandomize=True)


# A call that follows another under its number


def test_a_single_slice_of_a_job_that_was_quick_is_one_workers() -> None:
    scheduler = cluster(1, 1, jobs=2)
    (node, _), = given(scheduler.add(100, tasks(0, 1, status=PACKED))).items()
    scheduler.answer(node, 100, results([0], pace=QUICK_US))
    (busy, _), = given(scheduler.add(100, tasks(1, 2, status=PACKED))).items()  # perhaps for an hour
    (other, _), = given(scheduler.add(101, tasks(0, 1, status=PACKED))).items()
    assert other != busy
    scheduler.answer(other, 101, results([0]))
    assert given(scheduler.add(101, tasks(1, 2, status=PACKED))) == {other: [1]}
