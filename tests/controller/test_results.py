"""The result buffer and the window, without a cluster."""

import threading

import pytest

from achilles.controller.results import WINDOW_BYTES, SliceBuffer, Unit, UnitBuffer, Window


def buffer(ordered, *sizes):
    """A buffer with units of so many slices of one argument each."""
    buf, start = UnitBuffer(ordered), 0
    for size in sizes:
        buf.add(Unit(start, size, range(start, start + size)))
        start += size
    buf.finish(start)
    return buf


def taken(buf):
    out = []
    while units := buf.take(0):
        out += [(unit.start, [unit.answers[n] for n in unit.slices]) for unit in units]
    return out


def test_ordered_waits_for_the_next_one():
    buf = buffer(True, 2, 1)
    buf.put([2], ["c"])
    with pytest.raises(TimeoutError):
        buf.take(0)
    buf.put([1], ["b"])
    buf.put([0], ["a"])
    assert taken(buf) == [(0, ["a", "b"]), (2, ["c"])]


def test_unordered_gives_what_is_complete():
    buf = buffer(False, 2, 1)
    buf.put([2], ["c"])
    assert [unit.start for unit in buf.take(0)] == [2]
    buf.put([0], ["a"])
    with pytest.raises(TimeoutError):
        buf.take(0)
    buf.put([1], ["b"])
    assert taken(buf) == [(0, ["a", "b"])]


def test_a_second_answer_is_ignored():
    buf = buffer(True, 2)
    buf.put([0], ["first"])
    buf.put([0], ["second"])
    buf.put([1], ["b"])
    buf.put([1], ["late"])
    assert taken(buf) == [(0, ["first", "b"])]


def test_an_answer_that_was_no_good_is_waited_for_again():
    buf = buffer(True, 1, 1)
    buf.put([0], ["bad"])
    buf.put([1], ["b"])
    buf.put_back(buf.take(0), 0)
    with pytest.raises(TimeoutError):
        buf.take(0)
    buf.put([0], ["good"])
    assert taken(buf) == [(0, ["good"]), (1, ["b"])]


def test_a_unit_without_slices_keeps_its_place():
    buf = UnitBuffer(True)
    buf.add(Unit(0, 1, range(0, 1)))
    buf.add(Unit(1, 1, range(0)))
    buf.finish(2)
    with pytest.raises(TimeoutError):
        buf.take(0)
    buf.put([0], ["a"])
    assert taken(buf) == [(0, ["a"]), (1, [])]


def test_nothing_at_all_ends_at_once():
    assert taken(buffer(True)) == []


def test_the_iterables_own_error_comes_in_its_place():
    buf = UnitBuffer(True)
    buf.add(Unit(0, 1, range(1)))
    buf.finish(1, KeyError("mine"))
    buf.put([0], ["a"])
    assert [unit.answers for unit in buf.take(0)] == [{0: "a"}]
    with pytest.raises(KeyError):
        buf.take(0)


def test_a_failure_comes_at_once_and_the_first_stays():
    buf = buffer(True, 1)
    buf.put([0], ["a"])
    buf.fail(ConnectionError("first"))
    buf.fail(KeyError("second"))
    with pytest.raises(ConnectionError):
        buf.take(0)


def test_take_is_woken():
    buf = buffer(True, 1)
    threading.Timer(0.02, buf.put, ([0], ["a"])).start()
    assert [unit.answers for unit in buf.take(30)] == [{0: "a"}]


def entered(window, weight, size, timeout=0.0):
    """Whether there was room for so much, which is taken then."""
    room = window.room(weight, size, timeout) >= weight
    if room:
        window.enter(weight, size)
    return room


def test_slices_come_in_their_order_as_many_as_there_are():
    buf = SliceBuffer(True)
    buf.put([1, 2, 4], "bce")
    with pytest.raises(TimeoutError):
        buf.take(0)
    buf.put([0], "a")
    assert buf.take(0) == [(0, "a"), (1, "b"), (2, "c")]
    buf.put([3], "d")
    buf.finish(5, KeyError("behind the last"))
    assert buf.take(0) == [(3, "d"), (4, "e")]
    with pytest.raises(KeyError):
        buf.take(0)


def test_slices_come_as_they_are_answered():
    buf = SliceBuffer(False)
    buf.put([2], "c")
    assert buf.take(0) == [(2, "c")]
    buf.put([1, 0], "ba")
    buf.finish(3)
    assert buf.take(0) == [(1, "b"), (0, "a")]
    assert buf.take(0) == []


@pytest.mark.parametrize("ordered", [True, False])
def test_slices_that_were_not_delivered_come_again_but_for_the_bad_one(ordered):
    buf = SliceBuffer(ordered)
    buf.put([0, 1], ["bad", "b"])
    buf.put_back(buf.take(0))
    buf.put([0], ["good"])
    buf.finish(2)
    assert sorted(buf.take(0)) == [(0, "good"), (1, "b")]
    assert buf.take(0) == []


def test_the_window_counts_weight_and_bytes():
    window = Window(2)
    assert window.room(1, 0) == 2
    assert entered(window, 1, 0) and entered(window, 1, 0) and not entered(window, 1, 0)
    window.leave(1, 0)
    assert entered(window, 1, WINDOW_BYTES)
    window.leave(1, 0)
    assert not entered(window, 1, 1)


def test_one_may_always_go_when_nothing_is_out():
    window = Window(2)
    assert window.room(5, 2 * WINDOW_BYTES) == 5
    window.enter(5, 2 * WINDOW_BYTES)
    assert not entered(window, 1, 0)


def test_a_lifted_window_has_no_end():
    window = Window(1)
    assert entered(window, 1, 0) and not entered(window, 1, 0)
    window.resize(float("inf"))
    assert all(entered(window, 1, 0) for _ in range(1000))


def test_whoever_waits_is_woken_by_leave_and_by_close():
    window = Window(1)
    window.enter(1, 0)
    threading.Timer(0.02, window.leave, (1, 0)).start()
    assert entered(window, 1, 0, 30)
    threading.Timer(0.02, window.close).start()
    assert not entered(window, 1, 0, 30) and window.closed
