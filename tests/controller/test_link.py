"""Which batches are out, which jobs stay open, and what a lost connection means. No cluster."""

from __future__ import annotations

import gc
import itertools
import json
import threading

import pytest
from conftest import SECONDS, in_a_child, wait_until
from fake_link import FakeLink, begin, begin_fed, begin_fixture, make_job, values  # noqa: F401

from achilles.controller import link as link_module
from achilles.controller.call import Call
from achilles.controller.job import Job
from achilles.controller.link import KEPT_BYTES, KEPT_JOBS, Link
from achilles.errors import ProtocolError, WorkerLost
from achilles.objects import letters
from achilles.objects.sources import Sources
from achilles.protocol.frames import TELL, Batch, Gone, Kind, letter_of

pytestmark = pytest.mark.usefixtures("no_leftovers")
start = begin_fixture


def out(link):
    """Batches that were sent and are not answered, as the link counts."""
    return sum(len(job.out) for job in link.jobs.values())


# How many batches are out.


def test_two_batches_a_worker_are_out_and_two_more(start):
    link = start(range(1000), flat=True, workers=3).link
    assert len(link.batches()) == out(link) == 2 * 3 + 2


def test_an_answer_makes_room_for_the_next_batch(start):
    link = start(range(1000), flat=True, workers=3).link
    link.square(link.batches()[0], us=1_000_000)
    assert len(link.batches()) == 9 and out(link) == 8


def test_a_batch_is_out_until_its_last_chunk_is_answered():
    link = begin_fed(FakeLink(1), range(1000), us=1000, buffersize=1000).link
    batch, *others = link.batches(4)
    assert batch.count > 2 and out(link) == 4 and len(others) == 3
    link.answer(batch, [[0]])
    assert out(link) == len(link.batches()) == 4
    link.answer(batch, [[0]] * (batch.count - 1), first=1)
    assert out(link) == 4 and len(link.batches()) == 5


@pytest.mark.parametrize("processes", [1, 3])
def test_with_processes_never_more_batches_are_out(processes):
    """Whatever happens to them, of all jobs together."""
    link = FakeLink(8, processes=processes)
    calls = [begin(link, range(60), flat=True) for _ in range(2)]
    most, said, done = 0, itertools.cycle(["answer", "gone", "lost", "die", "part"]), set()
    while left := [batch for batch in link.batches() if (batch.job, batch.attempt) not in done]:
        most = max(most, len(left), out(link))
        batch, event = left[0], next(said)
        done.add((batch.job, batch.attempt))
        if event == "part" and batch.count > 1:
            link.answer(batch, [[0]])
            link.gone_back(batch, first=batch.first + 1)
        elif event == "gone":
            link.gone_back(batch)
        elif event == "lost":
            link.gone_back(batch, Gone.LOST)
        elif event == "die" and batch.count == 1:
            link.die(batch, 0)
        else:
            link.answer(batch, [[0]] * batch.count, us=100 * batch.count)
    assert most == processes
    for call in calls:
        assert len(values(call)) == 60


def test_jobs_take_turns():
    link = FakeLink(2)
    calls = [begin(link, range(100), flat=True) for _ in range(3)]
    finish_after = len(link.batches())
    for batch in link.batches()[:6]:
        link.square(batch, us=1_000_000)
    sent = [batch.job for batch in link.batches()[finish_after:]]
    assert {sent.count(job) for job in sent} == {2} and len(set(sent)) == 3
    for call in calls:
        call.close(None, InterruptedError())


def test_a_small_call_is_not_behind_a_large_one():
    link = FakeLink(1)
    large = begin(link, range(60), flat=True)
    small = begin(link, [1], flat=True)
    for batch in link.batches()[:2]:
        link.square(batch, us=1_000_000)
    assert small.job.number in [batch.job for batch in link.batches()]
    large.close(None, InterruptedError())


def test_without_a_node_two_batches_are_on_their_way_and_the_others_follow_it(start):
    link = start(range(10), flat=True, workers=0).link
    assert len(link.batches()) == 2
    link.set_workers(2)
    assert len(link.batches()) == 6


def test_quick_chunks_travel_together_and_slow_ones_apart():
    quick = begin_fed(FakeLink(2), range(80), us=50).link
    slow = begin_fed(FakeLink(2), range(80), us=60_000_000).link
    assert quick.batches(1)[0].count == 40 and {batch.count for batch in slow.batches(6)} == {1}


def test_a_little_waits_for_more_while_every_worker_has_a_batch():
    link = begin_fed(FakeLink(2), range(200), us=50).link
    first, *others = link.batches(2)
    more = begin(link, [1], flat=True, us=10)
    assert len(link.batches()) == 1 + len(others)
    for batch in [first, *others]:
        link.square(batch)
    assert more.job.number in [batch.job for batch in link.batches()]


# Declarations.


def test_a_job_is_declared_just_before_its_first_batch_and_once():
    link = FakeLink(1)
    idle = make_job(link)
    call = begin(link, range(9), flat=True)
    link.finish()
    kinds = [kind for kind, _ in link.posts]
    assert kinds[:2] == [Kind.JOB, Kind.TASK] and kinds.count(Kind.JOB) == 1
    assert link.of(Kind.JOB)[0].job == call.job.number != idle.number
    assert link.of(Kind.JOB)[0].letters()[1] == b"a function"
    with link.lock:
        link.end(idle)
        link.end(idle)
    assert not link.of(Kind.END), "a job that nobody was told of needs no end"


def test_an_initializer_travels_once_a_context_and_connection():
    link = FakeLink(1)

    def run(context):
        Call(link, make_job(link, context, initializer=b"an initializer"), [1], flat=True).start()
        link.finish()

    for context in (1, 1, 2):
        run(context)
    def brought():
        return [[bool(length) for length in batch.lengths[2:]] for batch in link.of(Kind.JOB)]

    assert brought() == [[True, False], [False, False], [True, False]]
    assert all(json.loads(batch.letters()[0])["initializer"] for batch in link.of(Kind.JOB))
    with link.lock:
        link.forget_connection()
    run(1)
    assert brought()[-1] == [True, False]


def test_the_last_job_of_a_set_closes_it_and_the_next_one_brings_it_again():
    """As the server has it: a file was edited, and the edit taken back."""
    link = FakeLink(1)
    for name in ("a", "b", "a"):
        job = make_job(link, sources=Sources(name * 32, b"modules"))
        call = Call(link, job, [1], flat=True)
        call.start()
        link.finish()
        assert values(call) == [1]
        call.close(name, None)
    assert [batch.letters()[3] for batch in link.of(Kind.JOB)] == [b"modules"] * 3
    assert len(link.of(Kind.END)) == 2, "a kept job of another set is ended when a new one begins"


def test_sources_travel_once_a_connection_whatever_the_context():
    link = FakeLink(1)
    for context, name in ((1, "a"), (2, "a"), (3, "b"), (4, "a")):
        sources = Sources(name * 32, b"modules")
        Call(link, make_job(link, context, sources=sources), [1], flat=True).start()
        link.finish()
    jobs = link.of(Kind.JOB)
    assert [batch.letters()[3] for batch in jobs] == [b"modules", b"", b"modules", b""]
    assert [json.loads(batch.letters()[0])["sources"][0] for batch in jobs] == ["a", "a", "b", "a"]


# Jobs that stay open.


def call_once(link, key, size=10):
    """A call of a job that is kept, from beginning to end; the job's number."""
    with link.lock:
        job = link.take(key, lambda: Job(letters.Context(caller=True), bytes(16), letter_of(b"f" * size)))
    call = Call(link, job, [1, 2, 3], flat=True)
    call.start()
    finish_job(link, job)
    assert values(call) == [1, 4, 9]
    call.close(key, None)
    return job.number


def finish_job(link, job):
    for batch in link.batches():
        if batch.job == job.number and batch.end > job.next - 3:
            link.square(batch)


def test_the_next_call_of_the_same_thing_goes_on_in_its_job():
    link = FakeLink(8)
    assert [call_once(link, "f") for _ in range(5)] == [1] * 5
    assert len(link.of(Kind.JOB)) == 1 and not link.of(Kind.END)
    assert [batch.first for batch in link.batches()] == list(range(15)), "chunks are numbered on and on"


def test_sixteen_jobs_stay_open_the_latest_ones():
    link = FakeLink(8)
    for n in range(KEPT_JOBS):
        call_once(link, n)
    assert not link.of(Kind.END)
    call_once(link, 0)
    call_once(link, "another")
    assert [batch.job for batch in link.of(Kind.END)] == [2], "the one that was unused for the longest time"
    assert KEPT_JOBS == 16


def test_and_256_mib_of_their_functions(monkeypatch):
    assert KEPT_BYTES == 256 << 20
    monkeypatch.setattr(link_module, "KEPT_BYTES", 1000)
    link = FakeLink(8)
    call_once(link, "small")
    call_once(link, "large", 995)
    assert [batch.job for batch in link.of(Kind.END)] == [1]
    call_once(link, "larger", 2000)
    assert [batch.job for batch in link.of(Kind.END)] == [1, 2], "the last one is kept, whatever its size"
    assert call_once(link, "larger", 2000) == 3


def test_of_two_jobs_of_the_same_thing_one_is_kept():
    """Two threads call the same function at once."""
    link = FakeLink(1)
    with link.lock:
        first, second = (link.take("f", lambda: Job(letters.Context(caller=True), bytes(16), b"f")) for _ in range(2))
        link.keep("f", first)
        link.keep("f", second)
        assert [*link.jobs.values()] == [first] and second.spent
        assert link.take("f", Job) is first


def test_a_job_that_owes_something_is_not_kept(start):
    call = start(range(3), flat=True)
    call.close("f", None)
    assert call.link.of(Kind.END) and not call.link.jobs


def test_a_call_that_an_error_ended_ends_its_job():
    link = FakeLink(8)
    call = begin(link, [1], flat=True)
    link.finish()
    call.close("f", KeyError())
    assert link.of(Kind.END) and not link._kept


def test_a_job_that_kills_workers_is_declared_anew():
    link = FakeLink(8)
    number = call_once(link, "f")
    with link.lock:
        job = link.take("f", lambda: pytest.fail("it was kept"))
    assert job.number == number
    call = Call(link, job, [1], flat=True)
    call.start()
    for _ in range(3):
        link.die(link.batches()[-1], phase="function")
    with pytest.raises(WorkerLost):
        call.take(SECONDS)
    call.close("f", None)
    assert call_once(link, "f") != number


# The end of a job.


def test_the_end_drops_what_waits_and_frees_what_was_out():
    link = FakeLink(2)
    first = begin(link, range(100), flat=True)
    second = begin(link, range(4), flat=True)
    assert not [batch for batch in link.batches() if batch.job == second.job.number]
    first.close(None, InterruptedError())
    assert [batch.job for batch in link.of(Kind.END)] == [first.job.number]
    assert len([batch for batch in link.batches() if batch.job == second.job.number]) == 4
    before = len(link.posts)
    for batch in [batch for batch in link.batches() if batch.job == first.job.number]:
        link.square(batch)
        link.gone_back(batch)
        link.die(batch, 0)
    assert len(link.posts) == before and out(link) == 4, "what comes late is of no job"
    link.finish()
    assert values(second) == [0, 1, 4, 9]


def test_a_chunk_that_is_out_can_be_cancelled(start):
    call = start(range(20), flat=True, workers=1)
    link = call.link
    with link.lock:
        link.cancel(call.job, 0)
    assert [(batch.first, batch.count) for batch in link.of(Kind.CANCEL)] == [(0, 1)]


# A lost connection.


def test_everything_without_an_answer_is_sent_again_and_nothing_else(start):
    call = start(range(8), flat=True, workers=3)
    link = call.link
    batches = link.batches(8)
    for number in (0, 3):
        link.square(batches[number])
    with link.lock:
        link.forget_connection()
        link.fill()
    again = link.batches()[8:]
    assert [batch.first for batch in again] == [1, 2, 4, 5, 6, 7]
    assert len(link.of(Kind.JOB)) == 2, "the job is declared again"
    for batch in batches:
        link.answer(batch, [["of the old connection"]])
    link.finish()
    assert values(call) == [n * n for n in range(8)]


def test_deaths_are_counted_over_a_lost_connection(start):
    call = start([1], flat=True)
    link = call.link
    for _ in range(2):
        link.die(link.batches()[-1], 0)
    with link.lock:
        link.forget_connection()
        link.fill()
    link.die(link.batches()[-1], 0)
    assert type(call.take(SECONDS)[2][0]) is WorkerLost


def test_a_lost_connection_charges_nobody(start):
    call = start([1], flat=True)
    for _ in range(30):
        with call.link.lock:
            call.link.forget_connection()
            call.link.fill()
    call.link.finish()
    assert values(call) == [1]


def test_packets_stay_what_they_are_over_a_lost_connection():
    link = FakeLink(3)
    call = begin(link, range(5))
    batches = link.batches(5)
    link.give(batches[0], 2)
    link.give(batches[1], 2)
    link.square(batches[1])
    with link.lock:
        link.forget_connection()
        link.fill()
    for batch in link.batches()[5:]:
        if batch.first > 1:
            link.give(batch, 3)
        link.square(batch)
    assert [call.take(SECONDS)[1] for _ in range(2)] == [[0, 1], [4, 9, 16]]


def test_answers_of_unknown_jobs_are_ignored():
    link = FakeLink(1)
    for kind in (Kind.RESULT, Kind.GONE, Kind.GIVEN):
        link.handle_batch(kind, Batch.pack(9, 0, [b"x"], statuses=b"\0") if kind is Kind.RESULT else Batch(9, 0, 1))


def test_what_is_sent_again_takes_no_chunk_along_that_was_not_given(start):
    """A batch of both could not ask for GIVEN, and chunks without it belong to no packet."""
    link = FakeLink(1)
    call = begin(link, iter(range(200)), buffersize=1, us=1)
    batch, = link.batches(1)
    link.give(batch, 1)
    link.set_workers(0)
    link.connected = False
    link.gone_back(batch, Gone.LOST)
    call._buffersize = 1 << 20
    wait_until(lambda: call.ended)
    link.connected = True
    link.set_workers(1)
    done = 1
    while done < len(link.batches()):
        batch = link.batches()[done]
        done += 1
        if batch.flags & TELL:
            link.give(batch, 1)
        link.square(batch)
    assert values(call) == [n * n for n in range(200)]


@pytest.mark.parametrize(("kind", "is_posted"), [(Kind.JOB, True), (Kind.TASK, False), (Kind.TASK, True)])
def test_ctrl_c_in_a_fill_loses_no_chunk_of_another_call(kind, is_posted, monkeypatch):
    """The thread that is interrupted may make the batches of any call."""
    link = FakeLink(2)
    link.connected = False
    call = begin(link, range(5), flat=True)
    wait_until(lambda: call.ended)
    link.connected = True
    post = FakeLink.post

    def interrupted(self, said, body):
        if said is not kind or is_posted:
            post(self, said, body)
        if said is kind:
            raise KeyboardInterrupt

    monkeypatch.setattr(FakeLink, "post", interrupted)
    with link.lock, pytest.raises(KeyboardInterrupt):
        link.fill()
    monkeypatch.undo()
    with link.lock:
        link.fill()
    link.finish()
    assert values(call) == [n * n for n in range(5)] and not call.job.owes
    assert len(link.of(Kind.JOB)) == 1, "a server takes no second one"
    call.close(None, InterruptedError())


def test_a_part_of_a_batch_that_is_given_ends_the_connection_and_not_every_one_after_it():
    """A chunk of it could be answered on no later connection: a part of its batch would be given, the rest never."""
    link = FakeLink(1)
    link.connected = False
    call = begin(link, range(6), us=1)
    wait_until(lambda: call.ended)
    link.connected = True
    with link.lock:
        link.fill()
    batch, = link.batches(1)
    with pytest.raises(ProtocolError, match="given"):
        link.handle_batch(Kind.GIVEN, Batch(batch.job, batch.first, batch.count - 1, batch.attempt, 8))
    with link.lock:
        link.forget_connection()
        link.fill()
    batch = link.batches(2)[-1]
    link.give(batch, 8)
    link.square(batch)
    assert values(call) == [n * n for n in range(6)]
    call.close(None, InterruptedError())


def test_a_wait_that_ctrl_c_ends_releases_the_lock_of_no_other_thread():
    """Between the release and the wait, or before it has the lock again, nobody can catch it: `with` releases, too."""
    link, held, done = FakeLink(), threading.Event(), threading.Event()

    def hold():
        with link.lock:
            held.set()
            done.wait(SECONDS)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(SECONDS)
    with pytest.raises(RuntimeError):
        link.lock.release()
    done.set()
    thread.join()


def collect_and_leave(link):
    gc.collect()
    Link.leave_to_parent(link)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_leaves_every_link_also_where_others_are_collected_meanwhile(monkeypatch):
    monkeypatch.setattr(FakeLink, "leave_to_parent", collect_and_leave)
    links, dropped = [FakeLink() for _ in range(5)], FakeLink()
    dropped.itself = dropped  # so that only the collector finds it
    gc.collect()
    gc.disable()
    try:
        del dropped
        assert in_a_child(lambda: [link.forked for link in links]) == str([True] * 5)
    finally:
        gc.enable()
