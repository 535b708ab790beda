"""A Call: what it takes and when, how it fails, and who else may take."""

from __future__ import annotations

import threading
import time

import pytest
from conftest import SECONDS, wait_until
from fake_link import FakeLink, begin, begin_fed, begin_fixture, make_job, take_all, values  # noqa: F401

from achilles.controller.call import Call, NotYet
from achilles.errors import ServerUnreachable
from achilles.protocol.frames import Kind

pytestmark = pytest.mark.usefixtures("no_leftovers")
start = begin_fixture


def test_packets_of_nodes_of_two_and_six_workers(start):
    call = start(range(11), workers=8, largest=6)
    batches = call.link.batches(11)
    given = {0: 2, 2: 6, 8: 2}  # what begins a packet: the node's workers; the others are asked and count for nothing
    for batch in batches:
        call.link.give(batch, given.get(batch.first, 6 if batch.first % 2 else 2))
    for batch in reversed(batches):
        call.link.square(batch)
    assert take_all(call) == [
        (0, [0, 1], {}), (2, [4, 9, 16, 25, 36, 49], {}), (8, [64, 81], {}), (10, [100], {})]


def test_ten_arguments_on_a_node_of_eight_are_eight_and_two(start):
    call = start(range(10))
    for batch in call.link.batches(10):
        call.link.give(batch, 8)
        call.link.square(batch)
    assert [len(some) for _, some, _ in take_all(call)] == [8, 2]


def test_unordered_packets_come_as_they_are_complete(start):
    call = start(range(4), ordered=False)
    batches = call.link.batches(4)
    for batch in batches:
        call.link.give(batch, 2)
    found = []
    for batch in reversed(batches):
        call.link.square(batch)
        if batch.first in (0, 2):
            found.append(call.take(SECONDS)[0])
    assert found == [2, 0] and call.take(SECONDS) is None


def test_flat_chunks_come_in_order_or_as_they_are_answered(start):
    for ordered, expected in ((True, [0, 1, 2]), (False, [2, 1, 0])):
        call = start(range(3), flat=True, ordered=ordered)
        for batch in reversed(call.link.batches(3)):
            call.link.square(batch)
        assert [place for place, _, _ in take_all(call)] == expected


def test_nothing_in_time_is_an_error_of_its_own(start):
    call = start(range(3), flat=True)
    for seconds in (0, 0.05):
        began = time.monotonic()
        with pytest.raises(NotYet):
            call.take(seconds)
        assert seconds <= time.monotonic() - began < 5
    with pytest.raises(TimeoutError):
        call.take(0)


def test_behind_the_last_it_stays_over(start):
    call = start([3], flat=True)
    call.link.square(call.link.batches(1)[0])
    assert call.take(SECONDS) == (0, [9], {})
    assert [call.take(SECONDS), call.take(0)] == [None, None]


def test_take_is_woken_by_an_answer_and_by_a_failure(start):
    call = start(range(2), flat=True)
    threading.Timer(0.05, lambda: call.link.square(call.link.batches(1)[0])).start()
    assert call.take(SECONDS) == (0, [0], {})
    threading.Timer(0.05, call.close, (None, InterruptedError())).start()
    with pytest.raises(InterruptedError):
        call.take(SECONDS)


def test_each_caller_gets_an_exception_object_of_its_own():
    """Threads that raise one object would share its traceback."""
    link, error = FakeLink(8), ServerUnreachable("gone")
    calls = [begin(link, [n], flat=True) for n in range(3)]
    with link.lock:
        link.fail_jobs(error)
    caught = []
    for call in calls:
        for _ in range(2):
            with pytest.raises(ServerUnreachable, match="gone") as raised:
                call.take(0)
            caught.append(raised.value)
    assert len(set(map(id, [*caught, error]))) == 7


def test_a_blocking_map_feeds_in_the_thread_that_takes():
    link = FakeLink(1)
    call = begin(link, range(200), flat=True, inline=True)
    assert call._thread is None and not call.ended
    node = threading.Thread(target=lambda: answer(link, call, 200))
    node.start()
    assert values(call) == [n * n for n in range(200)]
    node.join(SECONDS)


def answer(link, call, count):
    done = 0
    while sum(batch.count for batch in link.batches()[:done]) < count:
        for batch in link.batches(done + 1)[done:]:
            done += 1
            link.square(batch)


def test_who_takes_elsewhere_is_told(start):
    told = []
    call = start(range(3), flat=True, ordered=False)
    call.results.ready = lambda: told.append(1)
    before = len(told)
    for batch in call.link.batches(3):
        call.link.square(batch)
    assert len(told) == before + 3
    assert len(values(call)) == 3


def test_a_call_goes_on_where_the_one_before_it_in_its_job_ended():
    link = FakeLink(8)
    job = make_job(link)
    for _ in range(3):
        call = Call(link, job, [1, 2], flat=True)
        call.start()
        link.finish()
        assert take_all(call) == [(0, [1], {}), (1, [4], {})]
    assert [batch.first for batch in link.batches()] == [*range(6)] and len(link.of(Kind.JOB)) == 1


def test_a_result_that_cannot_be_loaded_ends_the_call(start):
    call = start([1], flat=True)
    call.link.say(call.link.batches(1)[0], 0, letter=b"\x80\x05cno_such_module\nthing\n.")
    with pytest.raises(ModuleNotFoundError):
        call.take(SECONDS)


@pytest.mark.parametrize("args", [[1], iter([1])])
def test_a_call_that_failed_as_it_began_has_an_exception_of_its_own(args):
    """Between the making of a call and its start its job may be ended."""
    link, error = FakeLink(), ServerUnreachable("gone")
    calls = [Call(link, make_job(link), args, flat=True) for _ in range(2)]
    with link.lock:
        link.fail_jobs(error)
    caught = []
    for call in calls:
        call.start()
        with pytest.raises(ServerUnreachable, match="gone") as raised:
            call.take(0)
        caught.append(raised.value)
    assert len({id(each) for each in [*caught, error]}) == 3, "an exception that is raised anew keeps every traceback"
    assert link.posts == []


# Output.


@pytest.fixture
def shown():
    return []


@pytest.fixture
def printing(shown):
    """A call of chunks of two arguments each, in one batch, and that batch."""
    call = begin_fed(FakeLink(1), [*range(6)], chunksize=2, us=1.0, show=lambda *line: shown.append(line))
    [batch] = call.link.batches(1)
    yield call, batch
    call.close(None, InterruptedError())


def test_a_line_is_shown_before_the_result_of_its_chunk_with_the_index_of_its_argument(printing, shown):
    call, batch = printing
    call.link.print(batch, "hello", 1, number=batch.first + 1)
    call.link.square(batch)
    assert shown == []
    assert call.take(SECONDS) == (0, [0, 1, 4, 9, 16, 25], {})
    assert shown == [("hello", 3, 5)]


def test_a_line_wakes_the_thread_that_takes_long_before_there_is_a_result(printing, shown):
    call, batch = printing
    call.link.print(batch, "hello")
    began = time.monotonic()
    with pytest.raises(NotYet):
        call.take(0.0)
    assert shown == [("hello", 0, 5)]
    thread = threading.Thread(target=lambda: call.take(SECONDS))
    thread.start()
    call.link.print(batch, "again")
    wait_until(lambda: len(shown) == 2)
    assert time.monotonic() - began < SECONDS / 2
    call.link.square(batch)
    thread.join(SECONDS)


def test_lines_come_before_the_error_that_ends_the_call(printing, shown):
    call, batch = printing
    call.link.print(batch, "the reason")
    with call.link.lock:
        call.results.fail(ValueError("over"))
    with pytest.raises(ValueError, match="over"):
        call.take(SECONDS)
    assert shown == [("the reason", 0, 5)]


def test_lines_left_out_are_counted_before_the_next_line_of_their_node_and_at_the_end(printing, shown):
    call, batch = printing
    call.link.leave_out(batch, 1000)
    call.link.leave_out(batch, 203)
    call.link.print(batch, "of another node", node=6)
    call.link.print(batch, "of this node")
    call.link.leave_out(batch, 7)
    call.link.square(batch)
    call.take(SECONDS)
    assert shown == [("of another node", 0, 6), ("1,203 lines more", None, 5), ("of this node", 0, 5),
                     ("7 lines more", None, 5)]


def test_lines_that_nobody_takes_are_bounded_and_counted(printing, shown):
    call, batch = printing
    for number in range(3000):
        call.link.print(batch, f"line {number}")
    call.link.square(batch)
    call.take(SECONDS)
    assert shown[1023:] == [("line 1023", 0, 5), ("1,976 lines more", None, 5)]


def test_a_line_of_a_chunk_that_is_not_out_has_no_index(printing, shown):
    call, batch = printing
    call.link.print(batch, "late", number=1_000)
    call.link.square(batch)
    call.take(SECONDS)
    assert shown == [("late", None, 5)]


def test_lines_that_nobody_asked_for_keep_nobody_busy(start):
    call = start([1], flat=True)
    [batch] = call.link.batches(1)
    call.link.print(batch, "unasked")
    before = time.thread_time()
    with pytest.raises(NotYet):
        call.take(0.3)
    assert time.thread_time() - before < 0.1
    call.link.square(batch)
    assert values(call) == [1]


def test_what_show_raises_is_raised_where_results_are_taken(start):
    def show(*line):
        raise ValueError("cannot show")

    call = start([1], flat=True, show=show)
    call.link.print(call.link.batches(1)[0], "hello")
    with pytest.raises(ValueError, match="cannot show"):
        call.take(SECONDS)
