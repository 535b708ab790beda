"""How arguments become chunks: what is read, what is cut, and what cannot be sent."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
from conftest import SECONDS, wait_until
from fake_link import MOMENT_SECONDS, FakeLink, begin, begin_fixture, make_job, take_all, values  # noqa: F401

from achilles.controller import call as module
from achilles.controller.call import PAUSE_SECONDS, Call, NotYet
from achilles.controller.results import Results
from achilles.errors import DumpError, LetterTooLarge
from achilles.protocol.frames import Kind

pytestmark = pytest.mark.usefixtures("no_leftovers")
start = begin_fixture


def fed(call):
    """The arguments of each chunk, in order, when all is fed and sent. Every batch is answered."""
    answer_until(call, lambda: call.ended)
    answer_all(call)
    return [arguments for batch in sorted(call.link.batches(), key=lambda batch: batch.first)
            for arguments in call.link.arguments(batch)]


def answer_all(call):
    call.link.finish()


def answer_until(call, happened, workers=8):
    """Answer whatever is sent, as a node of so many workers, until `happened()`."""
    done, until = 0, time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < until, call.link.posts
        for batch in call.link.batches()[done:]:
            done += 1
            call.link.square(batch)
        call.link.wait_for_more(done)


def numbers():
    yield from range(5)


class Walked(list):
    """A list by name."""

    def __iter__(self):
        return numbers()


# Cutting.


@pytest.mark.parametrize("args", [
    [0, 1, 2, 3, 4], (0, 1, 2, 3, 4), range(5), numbers, numbers(), iter(range(5)), {n: n for n in range(5)},
    Walked([7, 8])])
def test_args_of_all_kinds_are_cut_into_chunks_of_chunksize(start, args):
    call = start(args, chunksize=2, flat=True)
    assert fed(call) == [[0, 1], [2, 3], [4]]
    assert take_all(call) == [(0, [0, 1], {}), (2, [4, 9], {}), (4, [16], {})]


@pytest.mark.parametrize("args", [range(1000), lambda: iter(range(1000))])
@pytest.mark.parametrize("size", [1, 7])
def test_however_chunks_travel_each_argument_goes_once(start, args, size):
    call = start(args, chunksize=size, flat=True, us=10, workers=2)
    found = []
    thread = threading.Thread(target=lambda: found.extend(values(call)))
    thread.start()
    answer_until(call, lambda: not thread.is_alive())
    assert found == [n * n for n in range(1000)]


def test_a_file_is_cut_into_lines(start, tmp_path):
    (tmp_path / "lines").write_text("a\nb\nc\n")
    with open(tmp_path / "lines") as file:
        call = start(file, flat=True)
        assert call.link.chunks(3) == [["a\n"], ["b\n"], ["c\n"]]


@pytest.mark.parametrize("args", [[], (), iter([]), lambda: []])
@pytest.mark.parametrize("flat", [True, False])
def test_nothing_is_over_at_once(start, args, flat):
    call = start(args, flat=flat, workers=0)
    assert call.take(SECONDS) is None and call.link.posts == []


def test_a_short_sequence_is_fed_without_a_thread(start, monkeypatch):
    monkeypatch.setattr("achilles.controller.call.STEP_SECONDS", SECONDS)  # a busy machine may pause for longer
    call = start(list(range(64)), flat=True, buffersize=64, workers=64)
    assert call.ended and call._thread is None
    assert call.link.chunks() == [[n] for n in range(64)]


class Slow:
    def __reduce__(self):
        threading.Event().wait(0.02)
        return int, ("1",)


def test_a_caller_is_not_kept_long_by_what_it_feeds(start):
    call = start([Slow() for _ in range(10)], flat=True)
    assert not call.ended, "the thread goes on where the caller stopped"
    assert fed(call) == [[1]] * 10


@pytest.mark.parametrize(("us", "size"), [(10, 100), (0.1, 3000), (10**6, 1)])
@pytest.mark.parametrize("args", [range(10_000), lambda: iter(range(10_000))])
def test_a_call_may_find_its_chunksize_itself(us, size, args):
    """1 ms of work in a chunk, once the pace is known."""
    call = begin(FakeLink(8), args, flat=True, us=us, largest=3000)
    assert len(call.link.chunks(1)[0]) == size
    call.close(None, InterruptedError())


# The window.


def test_the_window_stops_an_endless_generator_until_results_are_taken(start):
    pulled = itertools.count()
    call = start(pulled, workers=2, flat=True)
    sent = call.link.batches(2 * 2 + 2)
    feeder_stands_still(call, 64 + 2 * 2)
    for batch in sent:
        call.link.answer(batch, [[0]])
    feeder_stands_still(call, 64 + 2 * 2)
    for _ in range(6):
        call.take(SECONDS)
    assert next(pulled) == 64 + 2 * 2


def feeder_stands_still(call, count):
    until = time.monotonic() + SECONDS
    while call.job.next < count and time.monotonic() < until:
        threading.Event().wait(0.005)
    threading.Event().wait(MOMENT_SECONDS)
    assert call.job.next == count


def test_the_window_grows_with_the_cluster(start):
    call = start(iter(range(500)), workers=0, flat=True)
    feeder_stands_still(call, 64)
    call.link.set_workers(5)
    feeder_stands_still(call, 64 + 10)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("chunksize", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_buffersize_is_never_passed_by_one_argument(start, flat, chunksize, size):
    """It counts chunks where each is delivered by itself (Pool, Executor), and arguments in the original calls."""
    allowed = size * chunksize if flat else size
    pulled, taken, most = [], 0, 0

    def args():
        for n in range(25):
            pulled.append(n)
            yield n

    call = start(args, flat=flat, chunksize=chunksize, buffersize=size, workers=2, largest=2)
    play(call)
    found = []
    while (some := call.take(SECONDS)) is not None:
        most = max(most, len(pulled) - taken)
        found += some[1]
        taken += len(some[1])
        assert len(pulled) <= taken + allowed
    assert found == [n * n for n in range(25)]
    assert most == min(allowed, 25), "as much as was allowed"


@pytest.mark.parametrize("args", [range(500), lambda: iter(range(500))])
@pytest.mark.parametrize(("chunksize", "largest", "size"), [(3, None, 5), (4, None, 10), (1, 12, 4)])
def test_buffersize_is_never_passed_by_one_chunk(args, chunksize, largest, size, monkeypatch):
    """Of a sequence, too, and where the call finds its chunksize itself."""
    out, enter = [], Results.enter
    monkeypatch.setattr(Results, "enter", lambda self, run: (enter(self, run), out.append(self.out)))
    call = begin(
        FakeLink(2), args, flat=True, chunksize=chunksize, largest=largest, buffersize=size, us=0.1)
    play(call)
    assert values(call) == [n * n for n in range(500)] and max(out) == size
    call.close(None, InterruptedError())


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("inline", [True, False])
def test_a_full_window_of_a_sequence_hangs_nobody(size, inline):
    call = begin(FakeLink(8), range(20), buffersize=size, inline=inline)
    play(call)
    assert values(call) == [n * n for n in range(20)]
    call.close(None, InterruptedError())


def play(call, workers=8):
    """A server and a node that answer in a thread, until the call is over."""
    def run():
        done = 0
        while not call.results.over and call.results.error is None:
            for batch in call.link.batches()[done:]:
                done += 1
                if batch.flags & 2:
                    call.link.give(batch, workers)
                call.link.square(batch)
            call.link.wait_for_more(done)

    threading.Thread(target=run, name="a node in a test").start()


def test_a_list_of_more_than_the_window_takes_goes_at_once(start):
    """Its chunks leave the window together, so they must enter it together."""
    call = start([list(range(100)), [1]], buffersize=2, workers=200)
    assert len(call.link.chunks(101)) == 101
    answer_all(call)
    assert [place for place, _, _ in take_all(call)] == [0, 1]


# Held up.


def test_a_generator_may_wait_for_results_of_its_own_call(start):
    results = threading.Semaphore(0)

    def waiting():
        for n in range(6):
            yield n
            assert results.acquire(timeout=SECONDS)

    call = start(waiting, chunksize=4, workers=2)
    play(call, workers=2)
    found = []
    while (taken := call.take(SECONDS)) is not None:
        found += taken[1]
        for _ in taken[1]:
            results.release()
    assert found == [n * n for n in range(6)]


def test_however_short_each_look_is_a_generator_that_waits_is_helped(start):
    results = threading.Semaphore(0)

    def waiting():
        yield 3
        assert results.acquire(timeout=SECONDS)

    call = start(waiting, chunksize=4)
    play(call)
    until, taken = time.monotonic() + SECONDS, None
    while taken is None and time.monotonic() < until:
        try:
            taken = call.take(0)
        except NotYet:
            pass
    results.release()
    assert taken == (0, [9], {})
    assert call.take(SECONDS) is None


def test_nobody_who_looks_no_chunk_is_cut_short(start):
    go = threading.Event()

    def pausing():
        yield from (1, 2, 3)
        go.wait(SECONDS)
        yield 4

    call = start(pausing, chunksize=2, flat=True)
    assert call.link.chunks(1) == [[1, 2]]
    threading.Event().wait(0.1)
    assert call.link.chunks() == [[1, 2]]
    go.set()
    assert call.link.chunks(2) == [[1, 2], [3, 4]]


def test_what_a_nudge_sends_while_the_iterator_runs_is_sent_once_and_kept_no_longer():
    """It may look at any moment between two arguments; a slow stream leaves nothing behind."""
    link = FakeLink(64)
    call = Call(link, make_job(link), lambda: stream(), chunksize=10, flat=True)

    def stream():
        for n in range(60):
            call._pulling = 1.0  # since long ago
            if n % 7:
                call._nudge()
            yield n

    call.start()
    wait_until(lambda: call.ended)
    assert [x for arguments in link.chunks() for x in arguments] == [*range(60)]
    assert not call._open
    call.close(None, InterruptedError())


def test_a_sequence_whose_feeder_has_no_processor_is_no_pause(start, monkeypatch):
    """Else a busy machine would cut packets short."""
    monkeypatch.setattr(module, "islice", lambda *given: time.sleep(2 * PAUSE_SECONDS) or itertools.islice(*given))
    call = start(range(8))
    call.link.give(call.link.batches(1)[0], 8)
    with pytest.raises(NotYet):
        call.take(6 * PAUSE_SECONDS)
    wait_until(lambda: call.ended)
    for batch in call.link.batches(8)[1:]:
        call.link.give(batch, 8)
    answer_all(call)
    assert take_all(call) == [(0, [n * n for n in range(8)], {})]


def test_a_nudge_that_waits_while_the_feeder_cuts_sends_nothing_more(start):
    """Else it would cut a chunk short that the feeder has just begun."""
    go = threading.Event()

    def pausing():
        yield 1
        go.wait(SECONDS)

    call = start(pausing, chunksize=2, flat=True)
    wait_until(lambda: call._open == [1])
    with call._cutting:
        call._pulling = 1.0  # since long ago
        nudger = threading.Thread(target=call._nudge)
        nudger.start()
        threading.Event().wait(0.05)
        call._pulling = 0.0
    nudger.join(SECONDS)
    assert call._open == [1] and call.link.posts == []
    go.set()
    assert call.link.chunks(1) == [[1]]


def test_stop_ends_a_feeder_that_waits_for_room(start):
    call = start(itertools.count())
    feeder_stands_still(call, 64 + 16)
    began = time.monotonic()
    call.close(None, InterruptedError())
    assert time.monotonic() - began < 5
    call._thread.join(SECONDS)
    assert not call._thread.is_alive()


def test_an_iterator_is_not_read_on_after_the_end(start):
    pulled = []

    def stream():
        for n in itertools.count():
            pulled.append(n)
            threading.Event().wait(0.005)
            yield n

    call = start(stream, chunksize=50, flat=True)
    assert call.link.chunks(1)
    call.close(None, InterruptedError())
    before = len(pulled)
    call._thread.join(SECONDS)
    assert not call._thread.is_alive() and len(pulled) <= before + 50


def test_nothing_is_posted_after_the_end(start):
    """TASK after END would be against the protocol."""
    call = start(itertools.count(), workers=1)
    link, sent = call.link, call.link.batches(4)
    call.close(None, InterruptedError())
    posted = len(link.posts)
    for batch in sent:
        link.square(batch)
        link.gone_back(batch)
    link.set_workers(9)
    assert len(link.posts) == posted and link.posts[-1][0] is Kind.END


# Lists.


@pytest.mark.parametrize("wrap", [lambda args: args, iter, lambda args: lambda: iter(args)])
def test_each_list_is_a_packet_cut_evenly_over_the_largest_node(start, wrap):
    call = start(wrap([[1, 2, 3, 4, 5], [], [6]]), workers=7, largest=3, chunksize=100)
    assert sorted(call.link.chunks(4)) == [[1, 2], [3, 4], [5], [6]]
    answer_all(call)
    assert take_all(call) == [(0, [1, 4, 9, 16, 25], {}), (1, [], {}), (2, [36], {})]


def test_a_list_waits_for_a_node_to_be_cut_for(start):
    call = start([[1, 2, 3, 4]], workers=0)
    assert not call.link.wait(lambda: call.link.of(Kind.TASK), MOMENT_SECONDS)
    call.link.set_workers(2)
    assert call.link.chunks(2) == [[1, 2], [3, 4]]


def test_empty_lists_need_no_node(start):
    assert take_all(start([[], []], workers=0)) == [(0, [], {}), (1, [], {})]


@pytest.mark.parametrize("wrap", [list, iter])
def test_a_later_argument_that_is_no_list_is_a_type_error_with_its_index(start, wrap):
    call = start(wrap([[1], [2], 3]))
    call.link.chunks(2)
    answer_all(call)
    assert [call.take(SECONDS)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(TypeError, match=r"args\[2\] is of type int") as caught:
        call.take(SECONDS)
    assert caught.value.index == 2


def test_in_a_pool_a_list_is_an_argument_like_any_other(start):
    call = start([[1], 2], flat=True)
    assert call.link.chunks(2) == [[[1]], [2]]


# What cannot be sent.


UNFIT = (n for n in ())  # a generator cannot be dumped


@pytest.mark.parametrize(("args", "index", "text"), [
    ([1, 2, UNFIT], 2, r"argument 2 \(of type generator\)"),
    (iter([1, UNFIT, 3]), 1, r"argument 1 \(of type generator\)"),
    ([[1], [2, UNFIT]], 1, r"argument 1 of the list args\[1\] \(of type generator\)"),
])
def test_an_argument_that_cannot_be_dumped_is_named(start, args, index, text):
    call = start(args, chunksize=2, eager=True, workers=1)
    with pytest.raises(DumpError, match=text) as caught:
        call.take(SECONDS)
    assert caught.value.index == index and caught.value.__cause__ is not None


def test_an_argument_that_cannot_be_dumped_is_the_error_of_its_place_alone_where_chunks_come_by_themselves(start):
    call = start([1, 2, UNFIT, 4], chunksize=4, flat=True)
    assert fed(call) == [[1, 2], [4]]
    found = take_all(call)
    assert [value for _, some, _ in found for value in some] == [1, 4, None, 16]
    (error,) = [error for _, _, errors in found for error in errors.values()]
    assert isinstance(error, DumpError) and error.index == 2 and isinstance(error.__cause__, TypeError)


@pytest.mark.parametrize("bad", [0, 1, 5, 9])
@pytest.mark.parametrize("wrap", [list, iter])
@pytest.mark.parametrize("size", [1, 3, 10])
def test_the_others_are_in_their_places_wherever_the_unfit_one_is(start, bad, wrap, size):
    args = [UNFIT if n == bad else n for n in range(10)]
    call = start(wrap(args), chunksize=size, flat=True, workers=20)
    fed(call)
    assert values(call) == [None if n == bad else n * n for n in range(10)]


@pytest.fixture
def low_limit(monkeypatch):
    monkeypatch.setattr("achilles.protocol.frames.LETTER_LIMIT_BYTES", 1400)


def test_a_chunk_over_the_limit_is_cut_again(start, low_limit):
    call = start([b"a" * 600, b"b" * 600, b"c" * 600], chunksize=3, flat=True)
    chunks = call.link.chunks(2)
    assert [each for chunk in chunks for each in chunk] == [b"a" * 600, b"b" * 600, b"c" * 600]
    for batch in call.link.batches():
        call.link.answer(batch, [[x[:1] for x in arguments] for arguments in call.link.arguments(batch)])
    assert values(call) == [b"a", b"b", b"c"]


def test_one_argument_over_the_limit_is_letter_too_large(start, low_limit):
    call = start([1, b"b" * 2000], chunksize=2, flat=True)
    assert fed(call) == [[1]]
    assert call.take(SECONDS)[1] == [1]
    place, _, errors = call.take(SECONDS)
    assert place == 1 and isinstance(errors[0], LetterTooLarge) and errors[0].index == 1
    assert str(errors[0]).startswith("argument 1 has 2,") and call.take(SECONDS) is None


class Interrupting:
    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit("asked to end")])
def test_what_ends_the_caller_while_it_feeds_is_raised_there(start, error):
    with pytest.raises(type(error)):
        start([Interrupting(error), 2, 3], flat=True)


# The iterable's own errors.


def breaking():
    yield from (1, 2, 3)
    raise OSError("the disk")


def test_the_iterables_error_comes_behind_all_that_was_before_it(start):
    call = start(breaking, chunksize=2, flat=True)
    assert fed(call) == [[1, 2], [3]]
    assert [call.take(SECONDS)[1] for _ in range(2)] == [[1, 4], [9]]
    with pytest.raises(OSError, match="the disk"):
        call.take(SECONDS)


def test_or_at_once_where_the_call_is_eager(start):
    with pytest.raises(OSError, match="the disk"):
        start(breaking, eager=True).take(SECONDS)


def test_a_generator_function_that_raises_when_called(start):
    with pytest.raises(ZeroDivisionError):
        start(lambda: 1 / 0).take(SECONDS)
