"""A Job on a link that records: what is sent again, who is charged, and what is given up."""

from __future__ import annotations

import pytest
from conftest import SECONDS
from fake_link import FakeLink, OpenCalls, begin_fed, begin_fixture, make_job, take_all, values  # noqa: F401

from achilles.controller.call import NotYet
from achilles.controller.results import NOBODY
from achilles.dropin.base_pool import Singles
from achilles.errors import LetterAltered, ProtocolError, TaskTimeout, WorkerLost
from achilles.objects import letters
from achilles.objects.outcomes import mark
from achilles.protocol.frames import CAREFUL, SHORT_LETTER_BYTES, TELL, Batch, Gone, Kind, LongLetter, Status, letter_of

pytestmark = pytest.mark.usefixtures("no_leftovers")
start = begin_fixture  # calls whose chunks come by themselves, or in packets


@pytest.fixture
def chunk(start):
    """A call of one chunk of these arguments, which is sent."""
    return lambda args, **options: start(args, flat=True, chunksize=len(args), **options)


def whole_batch(count, us=1):
    """A call of so many chunks, which are out in one batch; both."""
    call = begin_fed(FakeLink(1), range(count), us=us)
    batch, = call.link.batches(1)
    assert (batch.first, batch.count) == (0, count)
    return call, batch


def last(call):
    """The batch that was sent last, and its arguments."""
    batch = call.link.batches()[-1]
    return batch, call.link.arguments(batch)


# Deaths.


def test_three_deaths_lose_the_argument_and_no_other(chunk):
    call = chunk([10, 11, 12])
    for attempt in range(3):
        batch, arguments = last(call)
        assert arguments == [[10, 11, 12]]
        assert bool(batch.flags & CAREFUL) == (attempt > 0), "the worker names its arguments from the first death on"
        call.link.die(batch, 1 if attempt else -1)
    batch, arguments = last(call)
    assert arguments == [[10, None, 12]]
    call.link.answer(batch, [[100, None, 144]])
    (start_, results, errors), = take_all(call)
    error = errors[1]
    assert (start_, results[0], results[2], list(errors)) == (0, 100, 144, [1])
    assert type(error) is WorkerLost and (error.index, error.node, error.pid, error.exitcode) == (1, 4, 77, -9)
    assert "argument 1: 3 workers died under it (phase call)" in str(error)
    assert "pid 77" in str(error) and "signal 9" in str(error)


def test_the_first_death_counts_for_the_argument_that_is_named_then(chunk):
    call = chunk([0, 1, 2, 3])
    for offset in (-1, 2, 2):
        assert last(call)[1] == [[0, 1, 2, 3]]
        call.link.die(last(call)[0], offset)
    assert last(call)[1] == [[0, 1, None, 3]]
    for _ in range(2):  # nobody else is charged for the one that was not named
        call.link.die(last(call)[0], 1)
    assert last(call)[1] == [[0, 1, None, 3]]


def test_deaths_of_different_arguments_do_not_add_up(chunk):
    call = chunk([0, 1, 2])
    for offset in (0, 1, 2, 0, 1, 2):
        call.link.die(last(call)[0], offset)
    assert last(call)[1] == [[0, 1, 2]]


def test_when_all_are_lost_nothing_is_sent_again(chunk):
    call = chunk([5])
    for _ in range(3):
        call.link.die(last(call)[0], 0)
    assert len(call.link.batches()) == 3
    assert type(call.take(SECONDS)[2][0]) is WorkerLost
    assert call.take(SECONDS) is None


def test_what_is_lost_stays_lost_while_the_others_die(chunk):
    call = chunk([0, 1])
    for offset in (0, 0, 0, 1, 1):
        call.link.die(last(call)[0], offset)
    assert last(call)[1] == [[None, 1]]
    call.link.die(last(call)[0], 1)
    _, _, errors = call.take(SECONDS)
    assert [type(errors[at]) for at in (0, 1)] == [WorkerLost] * 2 and errors[1].index == 1


def test_a_death_charges_one_chunk_of_a_batch_and_that_one_goes_alone():
    call, batch = whole_batch(10)
    link = call.link
    link.answer(batch, [[0], [1]])
    link.die(batch, number=2)
    link.gone_back(batch, first=3)
    link.square(link.batches()[1])
    again = link.batches()[1:]
    assert sorted((each.first, each.count, each.flags & CAREFUL) for each in again) == [(2, 1, CAREFUL), (3, 7, 0)]
    link.square(again[1])
    assert values(call) == [n * n for n in range(10)]


def test_a_timeout_loses_the_argument_at_once(chunk):
    call = chunk([7, 8], options={"timeout": 1.5})
    call.link.die(last(call)[0], 0, status=Status.TIMEOUT)
    batch, arguments = last(call)
    assert arguments == [[None, 8]]
    call.link.answer(batch, [[None, 64]])
    error = call.take(SECONDS)[2][0]
    assert type(error) is TaskTimeout and (error.index, error.node) == (0, 4) and "timeout=1.5 s" in str(error)


def test_a_death_in_loading_charges_all_of_the_chunk(chunk):
    call = chunk([1, 2])
    for _ in range(3):
        call.link.die(last(call)[0], phase="load")
    _, _, errors = call.take(SECONDS)
    assert [type(errors[at]) for at in (0, 1)] == [WorkerLost] * 2 and errors[1].index == 1


def test_values_that_kill_only_together_lose_the_chunk(chunk):
    call = chunk([0, 1])
    for _ in range(3):
        call.link.die(last(call)[0], -1, "dump")
    _, _, errors = call.take(SECONDS)
    assert [type(errors[at]) for at in (0, 1)] == [WorkerLost] * 2 and "phase dump" in str(errors[1])


def test_a_chunk_of_more_arguments_than_can_be_skipped_is_given_up(start):
    """A letter says of 262,140 arguments at most that they are skipped."""
    call = start([0] * 300_000, flat=True, chunksize=300_000)
    for _ in range(3):
        call.link.die(last(call)[0], phase="load")
    [(_, _, errors)] = take_all(call)
    assert len(errors) == 300_000


def test_deaths_in_loading_the_function_fail_the_call_and_end_the_job(start):
    call = start(range(3), flat=True)
    for batch in call.link.batches(3):
        call.link.die(batch, phase="function")
    with pytest.raises(WorkerLost, match="loaded the function"):
        call.take(SECONDS)
    assert call.job.spent, "the next call declares it anew"


def test_an_answer_between_deaths_in_loading_the_function_begins_the_count_anew(start):
    call = start(range(4), flat=True)
    first, second, third, fourth = call.link.batches(4)
    call.link.die(first, phase="function")
    call.link.die(second, phase="function")
    call.link.square(third)
    call.link.die(fourth, phase="function")
    again = call.link.batches()[4:]
    assert sorted(batch.first for batch in again) == [0, 1, 3]
    assert not any(batch.flags & CAREFUL for batch in again), "no argument is charged"
    for batch in again:
        call.link.square(batch)
    assert sorted(values(call)) == [0, 1, 4, 9]


def test_the_argument_of_a_list_is_named_by_both_places(start):
    call = start([[1], [2, 3, 4]], workers=1)
    first, second = call.link.chunks(2) and call.link.batches()
    call.link.square(first)
    for _ in range(3):
        call.link.die(last(call)[0], 2)
    call.link.answer(last(call)[0], [[4, 9, None]])
    (_, _, errors) = take_all(call)[1]
    assert second.first == 1 and errors[2].index == 1 and "argument 2 of the list args[1]" in str(errors[2])


@pytest.mark.parametrize("letter", [
    b"", b"{}", b"[1]", b"\xff", b'{"offset": "0", "phase": "call"}', b'{"offset": 0, "phase": "node"}',
    b'{"offset": 0, "phase": "a\\nb"}', b'{"offset": 0, "phase": "call", "pid": 1, "exitcode": "\\u009b2J"}'])
def test_a_note_that_cannot_be_read_is_a_breach(chunk, letter):
    call = chunk([1])
    with pytest.raises(ProtocolError):
        call.link.say(last(call)[0], Status.DIED, letter=letter)


# Losses.


def test_from_its_third_loss_on_a_chunk_goes_alone_and_the_tenth_gives_it_up():
    call, batch = whole_batch(4)
    link = call.link
    for losses in range(10):
        while not (sent := [each for each in link.batches() if each.first <= 1 < each.end])[losses:]:
            link.square(link.batches()[-1])  # the others are done before it
        assert (sent[-1].count == 1) == (losses >= 3) and not sent[-1].flags & CAREFUL, losses
        link.gone_back(sent[-1], Gone.LOST)
    link.finish()
    (_, first, _), (start_, _, errors), *others = take_all(call)
    assert (first, start_, [some for _, some, _ in others]) == ([0], 1, [[4], [9]])
    assert type(errors[0]) is WorkerLost and errors[0].index == 1
    assert "argument 1: 10 nodes were lost while they had it" in str(errors[0])


@pytest.mark.parametrize("reason", [Gone.RETURNED, Gone.LEFT])
def test_what_was_given_back_is_charged_to_nobody(chunk, reason):
    call = chunk([1, 2])
    for _ in range(30):
        call.link.gone_back(last(call)[0], reason)
    batch, arguments = last(call)
    assert arguments == [[1, 2]] and not batch.flags & CAREFUL
    call.link.square(batch)
    assert values(call) == [1, 4]


# Answers of ranges.


def test_an_answer_counts_for_its_part_of_the_batch():
    call, batch = whole_batch(8)
    link = call.link
    link.answer(batch, [[0], [1]])
    link.gone_back(batch, first=6)
    link.answer(batch, [[n * n] for n in range(2, 6)], first=2)
    _, again = link.batches()
    assert (again.first, again.count) == (6, 2)
    link.square(again)
    assert values(call) == [n * n for n in range(8)]


def test_what_is_sent_again_goes_in_front(start):
    call = start(range(100), flat=True, workers=1)
    first = call.link.batches(4)[0]
    call.link.gone_back(first)
    assert call.link.batches()[-1].first == 0


def test_the_first_answer_counts_and_another_attempt_is_ignored(start):
    call = start(range(2), flat=True)
    link = call.link
    first, second = link.batches(2)
    link.gone_back(first)
    again = link.batches()[2]
    assert again.attempt not in (first.attempt, second.attempt) and again.first == 0
    link.answer(first, [["late"]])
    link.die(first, 0)
    link.gone_back(first)
    assert len(link.batches()) == 3
    link.answer(again, [["good"]])
    link.answer(again, [["twice"]])
    link.answer(second, [["last"]])
    link.answer(Batch(second.job, 17, 1, second.attempt), [["never asked for"]])
    assert values(call) == ["good", "last"]


def test_an_answer_that_is_wider_than_what_is_still_out_counts_where_it_overlaps():
    call, batch = whole_batch(8)
    link = call.link
    link.gone_back(batch, first=2)
    link.square(batch)
    _, again = link.batches()
    assert (again.first, again.count) == (2, 6)
    link.square(again)
    assert values(call) == [n * n for n in range(8)]


def test_an_answer_in_the_middle_of_what_is_out_is_a_breach():
    call, batch = whole_batch(8)
    with pytest.raises(ProtocolError, match="before those in front"):
        call.link.answer(batch, [[1]], first=1)


def test_what_a_breach_has_spoiled_is_sent_again_on_the_next_connection(start):
    """Of a server that answers before it gives, in the middle, or with a note that cannot be read."""
    call, batch = whole_batch(8)
    link = call.link
    with pytest.raises(ProtocolError):
        link.answer(batch, [[1]], first=1)
    link.answer(batch, [[0], [1]])
    with pytest.raises(ProtocolError):
        link.say(batch, Status.DIED, 2, b"no note")
    with link.lock:
        link.forget_connection()
        link.fill()
    link.finish()
    assert values(call) == [n * n for n in range(8)]
    call = start(range(3))
    first, second, third = call.link.batches(3)
    call.link.give(first, 2)
    for batch in (second, third):
        with pytest.raises(ProtocolError, match="before it was given"):
            call.link.square(batch)
    with call.link.lock:
        call.link.forget_connection()
        call.link.fill()
    for batch in call.link.batches()[3:]:
        if batch.first:
            call.link.give(batch, 2)
        call.link.square(batch)
    assert values(call) == [0, 1, 4]


def test_an_exception_comes_at_its_index_and_does_not_end_the_call(start):
    call = start(range(4), chunksize=2, flat=True)
    first, second = call.link.batches(2)
    call.link.square(first)
    call.link.answer(second, [[None, 3]], errors={0: ValueError("bad")})
    _, (start_, results, errors) = take_all(call)
    assert start_ == 2 and results[1] == 3 and type(errors[0]) is ValueError and errors[0].index == 2


def test_an_exception_in_a_list_has_the_lists_index(start):
    call = start([[1], [2, 3]], workers=1)
    first, second = call.link.chunks(2) and call.link.batches()
    call.link.square(first)
    call.link.answer(second, [[4, None]], errors={1: ValueError("bad")})
    assert take_all(call)[1][2][1].index == 1


def test_a_function_that_cannot_be_loaded_fails_the_call(start):
    call = start(range(2), flat=True)
    call.link.answer(call.link.batches(2)[0], [[None]], status=Status.FAILED,
                     errors={0: mark(ModuleNotFoundError("No module named 'gone'", name="gone"), node=3)})
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'gone' on node 3: this process has not"):
        call.take(SECONDS)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("results", [[1], [1, 2, 3]])
def test_an_answer_with_too_few_or_too_many_results_ends_the_call(start, flat, results):
    call = start([1, 2], chunksize=2, flat=flat)
    batch, = call.link.batches(1)
    if not flat:
        call.link.give(batch, 1)
    call.link.answer(batch, [results])
    with pytest.raises(ProtocolError, match=f"{len(results)} results of 2 arguments"):
        call.take(SECONDS)


# Altered letters.


def test_a_chunk_that_is_altered_three_times_is_given_up(chunk):
    call = chunk([5, 6])
    for _ in range(3):
        batch, arguments = last(call)
        assert arguments == [[5, 6]]
        call.link.say(batch, Status.ALTERED)
    _, _, errors = call.take(SECONDS)
    assert [type(errors[at]) for at in (0, 1)] == [LetterAltered] * 2 and errors[1].index == 1
    assert len(call.link.batches()) == 3


def test_a_result_with_a_wrong_digest_is_not_loaded_but_sent_anew(chunk, monkeypatch):
    call = chunk([3])
    loaded = []
    monkeypatch.setattr(letters.Context, "load", lambda self, letter: loaded.append(bytes(letter)) or [0])
    false = b"x" * (SHORT_LETTER_BYTES + 1)
    for _ in range(2):
        batch, _ = last(call)
        call.link.handle_batch(Kind.RESULT, Batch.pack(
            batch.job, batch.first, [LongLetter((false,), bytes(32), len(false))], attempt=batch.attempt,
            statuses=bytes([Status.VALUES])))
        with pytest.raises(NotYet):
            call.take(0)
    assert not loaded
    monkeypatch.undo()
    call.link.square(last(call)[0])
    assert values(call) == [9]


# Batches.


def test_a_batch_says_how_long_it_is_thought_to_take_once_that_is_known(start):
    assert start([1], flat=True).link.batches(1)[0].number == 0
    assert whole_batch(8, us=40)[1].number == 320


def test_packets_ask_for_given_once_a_chunk_and_others_never(start):
    assert not any(batch.flags & TELL for batch in start(range(3), flat=True).link.batches(3))
    assert not any(batch.flags & TELL for batch in start([[1], [2]]).link.batches(2))
    call = start(range(3))
    first = call.link.batches(3)[0]
    assert all(batch.flags & TELL for batch in call.link.batches())
    call.link.give(first, 8)
    call.link.gone_back(first)
    assert not last(call)[0].flags & TELL, "its packet stays what it is"


def test_a_batch_has_at_most_maxtasksperchild_chunks():
    call = begin_fed(FakeLink(1), range(50), us=50, options={"maxtasksperchild": 3})
    assert {batch.count for batch in call.link.batches(4)} == {3}


def test_short_letters_of_a_batch_are_at_most_a_mebibyte():
    call = begin_fed(FakeLink(1), ["x" * 800] * 4000, us=0.1, buffersize=4000)
    batches = call.link.batches(1)
    assert max(batch.count for batch in batches) > 500
    assert all(sum(batch.lengths) <= 1 << 20 for batch in batches)


# Singles: apply and submit.


class Entry:
    def __init__(self):
        self.answers = []

    def answer(self, answer):
        self.answers.append(answer)

    @property
    def error(self):
        _, _, error = self.answers[0]
        return error


def submit(link, job, argument):
    entry = Entry()
    with link.lock:
        if job.sink is NOBODY:
            Singles(OpenCalls(link), job, None)
        found, = letters.dump_chunks(job.context, [argument], 1)
        job.sink.enter(entry, letter_of(found))
        link.fill()
    return entry


def test_single_calls_of_one_job_are_answered_each_by_itself():
    link = FakeLink(2)
    job = make_job(link)
    entries = [submit(link, job, n) for n in range(4)]
    for batch in link.batches(4):
        link.square(batch)
    assert [entry.answers[0][0].load(*entry.answers[0][1:3]) for entry in entries] == [
        ([n * n], {}) for n in range(4)]
    assert not job.owes


def test_a_single_call_is_given_up_like_any_other():
    link = FakeLink(2)
    job = make_job(link)
    entry = submit(link, job, 3)
    for _ in range(3):
        link.die(link.batches()[-1], 0)
    assert type(entry.error) is WorkerLost and entry.error.index == 0 and not job.owes


def test_a_single_call_that_waits_can_be_withdrawn():
    link = FakeLink(0)
    job = make_job(link)
    for n in range(5):
        submit(link, job, n)
    assert link.chunks() == [[0], [1]], "two are on their way to a server without nodes"
    with link.lock:
        assert [job.withdraw(number) for number in (3, 0, 3)] == [True, False, False]
    link.set_workers(4)
    assert [arguments for arguments in link.chunks()] == [[0], [1], [2], [4]]


@pytest.mark.parametrize("kept", [True, False])
def test_what_no_single_call_waits_for_is_dropped(kept):
    link = FakeLink(2)
    job = make_job(link)
    entry = submit(link, job, 3)
    batch, = link.batches(1)
    with link.lock:
        job.sink.leave(0)
        if not kept:
            link.end(job)
    link.square(batch)
    assert entry.answers == [] and not job.owes


def test_a_single_call_that_was_left_is_not_sent_again_and_the_others_are():
    link = FakeLink(1)
    job = make_job(link)
    job.pace.us = 1.0
    link.connected = False
    entries = [submit(link, job, n) for n in range(4)]
    link.connected = True
    with link.lock:
        link.fill()
        job.sink.leave(1)
    batch, = link.batches(1)
    link.gone_back(batch)
    assert sorted(argument for each in link.batches()[1:] for argument, in link.arguments(each))[:1] == [0]
    link.finish()
    assert [len(entry.answers) == 1 for entry in entries] == [True, False, True, True] and not job.owes
