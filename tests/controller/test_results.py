"""What is answered and not taken, and the window: without a cluster, a thread or a pickle."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from fake_link import FakeLink, OpenCalls

from achilles.controller.results import WINDOW_BYTES, Results
from achilles.controller.run import Run
from achilles.dropin.base_pool import Singles
from achilles.errors import ProtocolError


def run(first, count=1, size=1, arguments=None, place=None, start=None, letter=b"x"):
    return Run(first, first * size if start is None else start, size, [letter] * count,
               size * count if arguments is None else arguments, place)


def answered(first, letters, letter=b"x", **more):
    """One answer a chunk: its letter is its name."""
    made = run(first, len(letters), letter=letter, **more)
    made.answers = [letter.encode() for letter in letters]
    return made


def names(found):
    return None if found is None else b"".join(found.answers).decode()


class Length:
    """A letter of which only the length counts."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length


@pytest.fixture(params=[True, False], ids=["ordered", "unordered"])
def ordered(request):
    return request.param


def flat(ordered, *, first=0):
    return told(Results(threading.Lock(), ordered, False, False, first))


def packets(ordered, by_argument=False):
    return told(Results(threading.Lock(), ordered, by_argument, True))


def told(made):
    made.changed = Told()
    return made


def take(buf):
    """The only piece of the next delivery."""
    found = buf.take()
    assert found is None or len(found) == 1
    return found and found[0]


class Told:
    """In a condition's place: nobody waits."""

    def __init__(self):
        self.count = 0

    def notify_all(self):
        self.count += 1


# Chunks by themselves.


def test_in_order_nothing_comes_before_the_next_one():
    buf = flat(True)
    buf.put(answered(1, "b"))
    assert take(buf) is None
    buf.put(answered(2, "cd"))
    buf.put(answered(0, "a"))
    assert [names(take(buf)) for _ in range(3)] == ["a", "b", "cd"]
    assert take(buf) is None and not buf.over
    buf.finish(4, None)
    assert buf.over


def test_out_of_order_it_comes_as_it_was_answered():
    buf = flat(False)
    buf.put(answered(3, "d"))
    buf.put(answered(0, "ab"))
    assert [names(take(buf)) for _ in range(3)] == ["d", "ab", None]
    buf.finish(4, None)
    assert not buf.over
    buf.put(answered(2, "c"))
    take(buf)
    assert buf.over


def test_a_call_begins_where_the_one_before_it_in_its_job_ended(ordered):
    buf = flat(ordered, first=100)
    buf.put(answered(100, "ab", start=0))
    assert take(buf).start == 0
    buf.finish(102, None)
    assert buf.over


def test_nothing_at_all_is_over_at_once(ordered):
    buf = flat(ordered)
    buf.finish(0, None)
    assert buf.over and take(buf) is None


def test_who_takes_is_told_when_the_next_one_is_there_and_of_the_end(ordered):
    told = []
    buf = flat(ordered)
    buf.ready = lambda: told.append(1)
    buf.put(answered(1, "b"))
    assert len(told) == (not ordered)
    buf.put(answered(0, "a"))
    assert len(told) == 1 + (not ordered)
    before = len(told)
    while buf.take():
        pass
    buf.finish(2, None)
    assert len(told) == before + 1


def test_the_first_failure_stays():
    buf = flat(True)
    first = ConnectionError("first")
    buf.fail(first)
    buf.fail(KeyError("second"))
    assert buf.error is first


# The window.


def test_the_window_counts_chunks_until_they_are_taken():
    buf = flat(True)
    assert buf.free(2) == 2
    buf.enter(run(0, 2))
    assert buf.free(2) == 0
    buf.put(answered(0, "a"))
    assert buf.free(2) == 0, "an answer is not taken yet"
    take(buf)
    assert buf.free(2) == 1
    buf.put(answered(1, "b"))
    take(buf)
    assert buf.free(2) == 2


def test_a_window_of_arguments_is_given_back_packet_by_packet(ordered):
    buf = packets(ordered, by_argument=True)
    buf.enter(run(0, 3, size=2, arguments=5))
    assert buf.free(5) == 0
    buf.give(0, 3, 1, 3)
    buf.put(answered(0, "abc", size=2, arguments=5))
    found = []
    while (taken := take(buf)) is not None:
        found.append((names(taken), taken.arguments, buf.free(5)))
    assert found == [("a", 2, 2), ("b", 2, 4), ("c", 1, 5)]


def test_no_more_enters_than_256_mib():
    buf = flat(True)
    buf.enter(run(0, letter=Length(WINDOW_BYTES)))
    assert buf.free(10) == 9
    buf.enter(run(1, letter=Length(1)))
    assert buf.free(10) == 0
    buf.put(answered(0, "a", letter=Length(WINDOW_BYTES)))
    take(buf)
    assert buf.free(10) == 9


def test_one_chunk_may_always_go_when_nothing_is_out():
    buf = flat(True)
    assert buf.free(2, 5) == 5
    buf.enter(run(0, letter=Length(2 * WINDOW_BYTES)))
    assert buf.free(2, 1) == 0


def test_a_list_counts_as_one_argument():
    buf = packets(True, by_argument=True)
    buf.enter(run(0, 3, size=4, place=0, start=0))
    assert buf.out == 1
    buf.put(answered(1, "bc", size=4, place=0, start=4))
    buf.put(answered(0, "a", size=4, place=0, start=0))
    assert len(buf.take()) == 2 and buf.out == 0


def test_the_feeder_is_woken_when_a_quarter_of_the_window_is_free():
    buf = flat(True)
    assert buf.free(8) == 8
    buf.enter(run(0, 8))
    buf.put(answered(0, "a"))
    buf.put(answered(1, "b"))
    before = buf.changed.count
    take(buf)
    assert buf.changed.count == before
    take(buf)
    assert buf.changed.count == before + 1


# Packets.


def lengths(buf):
    """The lengths of the packets that are there, in chunks."""
    found = []
    while (pieces := buf.take()) is not None:
        found.append(sum(len(piece.letters) for piece in pieces))
    return found


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_packets_of_nodes_of_two_and_six_workers_are_contiguous_and_as_long_as_their_node(order):
    buf = packets(False)
    buf.give(0, 3, 2, 100)  # packets of 2: chunks 0 and 1, 2 and 3
    buf.give(3, 1, 6, 100)  # chunk 3 belongs to the second packet
    buf.give(4, 4, 6, 100)  # 4 to 9
    buf.give(8, 1, 2, 100)
    buf.give(9, 5, 2, 100)  # 10 and 11, 12 and 13
    pieces = [answered(0, "abcdefg"), answered(7, "hijklmn")]
    for number in order:
        buf.put(pieces[number])
    found = [(pieces[0].first, b"".join(b"".join(piece.answers) for piece in pieces))
             for pieces in iter(buf.take, None)]
    assert sorted(found) == [(0, b"ab"), (2, b"cd"), (4, b"efghij"), (10, b"kl"), (12, b"mn")]


def test_a_packet_is_delivered_whole_and_in_order():
    buf = packets(True)
    buf.give(0, 4, 2, 4)
    for number in (3, 2, 1):
        buf.put(answered(number, "dcba"[3 - number]))
        assert buf.take() is None
    assert buf.changed.count == 0, "nobody is woken for nothing"
    buf.put(answered(0, "a"))
    assert lengths(buf) == [2, 2]
    buf.finish(4, None)
    assert buf.over


def test_out_of_order_a_packet_comes_when_it_is_complete():
    buf = packets(False)
    buf.give(0, 4, 2, 4)
    buf.put(answered(2, "cd"))
    assert buf.take()[0].first == 2
    buf.put(answered(0, "ab"))
    assert buf.take()[0].first == 0


def test_the_last_packet_ends_with_the_call():
    buf = packets(True)
    buf.give(0, 1, 8, 1)
    buf.put(answered(0, "a"))
    assert buf.take() is None
    buf.finish(1, None)
    assert lengths(buf) == [1] and buf.over


def test_a_packet_that_is_given_after_the_end_is_no_longer_than_what_is_left():
    buf = packets(True)
    buf.finish(3, None)
    assert not buf.over
    buf.give(0, 3, 2, 3)
    buf.put(answered(0, "abc"))
    assert lengths(buf) == [2, 1] and buf.over


def test_a_feeder_that_is_held_up_cuts_the_packet_that_has_begun():
    buf = packets(True)
    buf.cut(0)
    buf.give(0, 3, 8, 3)
    buf.put(answered(0, "abc"))
    assert buf.take() is None
    buf.cut(3)
    assert lengths(buf) == [3]
    buf.give(3, 2, 2, 5)
    buf.put(answered(3, "de"))
    assert lengths(buf) == [2], "the next one begins there"


def test_a_full_window_cuts_no_packet_while_another_one_will_make_room():
    buf = packets(True)
    buf.give(0, 5, 4, 5)
    buf.put(answered(0, "abc"))
    buf.put(answered(4, "e"))
    buf.cut(5, stuck=True)
    assert buf.take() is None
    buf.put(answered(3, "d"))
    assert lengths(buf) == [4]
    buf.cut(5, stuck=True)
    assert lengths(buf) == [1]


def test_what_was_not_given_is_not_cut():
    buf = packets(True)
    buf.cut(3)
    buf.give(0, 3, 2, 3)
    assert [(unit.first, unit.end) for unit in buf._units] == [(0, 2), (2, 4)]


@pytest.mark.parametrize("given", [(0, 2, 2), (3, 1, 2), (2, 0, 2), (2, 1, 0), (2, 9, 2)])
def test_giving_what_is_not_next_is_the_servers_fault(given):
    buf = packets(True)
    buf.give(0, 2, 2, 5)
    with pytest.raises(ProtocolError, match="given"):
        buf.give(*given, 5)


def test_each_list_is_a_packet_of_its_own():
    buf = packets(True)
    buf.enter(run(0, 2, place=0))
    buf.enter(run(2, 1, place=1))
    buf.put(answered(2, "c", place=1))
    assert buf.take() is None
    buf.put(answered(0, "ab", place=0))
    assert [pieces[0].place for pieces in iter(buf.take, None)] == [0, 1]
    buf.finish(3, None)
    assert buf.over
    with pytest.raises(ProtocolError):
        buf.give(3, 1, 1, 9)


# Single calls.


class Entry:
    def __init__(self):
        self.said = []

    def answer(self, answer):
        self.said.append(answer)


@pytest.fixture
def singles():
    """Singles of a job that there is not; `idle` has what the link is told to keep when no call waits any more."""
    link, idle = FakeLink(), []
    link.keep = lambda *kept: idle.append(kept)
    made = Singles(OpenCalls(link), SimpleNamespace(), "its key")
    made.idle = idle
    made._dispatcher.open["its key"] = made, None
    with link.lock:
        yield made


def test_each_entry_gets_its_answer_and_the_last_one_leaves_the_job_idle(singles):
    first, second = singles.entries[0], singles.entries[1] = Entry(), Entry()
    singles.put(answered(0, "a"))
    assert not singles.idle
    singles.put(answered(1, "b"))
    assert first.said == [(singles.job, 0, b"a")] and second.said == [(singles.job, 0, b"b")]
    assert singles.idle == [("its key", singles.job)] and not singles.entries and not singles._dispatcher.open
    singles.put(answered(0, "a"))
    assert len(singles.idle) == 1, "once"


def test_what_nobody_waits_for_any_more_is_dropped(singles):
    entry = singles.entries[0] = Entry()
    singles.leave(0)
    singles.put(answered(0, "a"))
    assert entry.said == []


def test_a_failed_job_fails_each_entry_once(singles):
    entries = [Entry(), Entry()]
    singles.entries.update(enumerate(entries))
    singles.fail(InterruptedError("mine"))
    singles.fail(InterruptedError("mine"))
    (*_, first), (*_, second) = entries[0].said + entries[1].said
    assert first is not second and first.args == second.args == ("mine",)
