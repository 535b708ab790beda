"""A Job against a link that only records what is posted: no cluster, no sockets."""

from __future__ import annotations

import itertools
import json
import threading
import time

import pytest
from conftest import SECONDS

from achilles.controller import job as job_module
from achilles.controller.job import Function, Job
from achilles.controller.results import NotYet
from achilles.errors import DumpError, LetterAltered, LetterTooLarge, ProtocolError, TaskTimeout, WorkerLost
from achilles.objects import letters, outcomes
from achilles.protocol.frames import MORE, PACKED, Kind, Rows, Status

MOMENT_SECONDS = 0.25  # for what must not happen
pytestmark = pytest.mark.usefixtures("no_leftovers")


class Link:
    """Takes the Controller's place: records posts, and plays server and worker where the test says so."""

    def __init__(self, workers=(8, 8), letter_limit=1 << 30):
        self.lock = threading.Lock()
        self.letter_limit = letter_limit
        self.cluster = workers
        self.posts = []
        self.context = letters.Context(caller=False)
        self.changed = threading.Condition()

    def push(self):
        pass

    def post(self, kind, body):
        assert self.lock.locked()
        with self.changed:
            self.posts.append((kind, body))
            self.changed.notify_all()

    def check_size(self, what, size):
        if size > self.letter_limit:
            raise LetterTooLarge(f"{what} has {size} bytes")

    def workers(self):
        return self.cluster

    def wait_for_workers(self, timeout):
        with self.changed:
            self.changed.wait(timeout)

    def set_workers(self, *workers):
        with self.changed:
            self.cluster = workers
            self.changed.notify_all()

    def wait(self, happened, seconds=SECONDS):
        with self.changed:
            return self.changed.wait_for(happened, seconds)

    def rows(self):
        """Each slice that was posted, as rows of its own."""
        return [body.cut(n, n + 1) for kind, body in self.posts if kind is Kind.TASK for n in range(len(body))]

    def flushes(self):
        return [body["upto"] for kind, body in self.posts if kind is Kind.FLUSH]

    def arguments(self, rows):
        """What a worker would call the function with, None where a position is to be skipped."""
        (digest, letter), = rows.letters()
        whole = b"".join(letter)
        assert not digest or letters.letter_digest([whole]) == digest
        arguments, skipped = letters.load_slice(self.context, whole)
        return [None if p in skipped else argument for p, argument in enumerate(arguments)]

    def slices(self):
        return [self.arguments(rows) for rows in self.rows()]

    def wait_slices(self, count):
        assert self.wait(lambda: len(self.rows()) >= count), self.posts
        return self.slices()

    def wait_fed(self, job):
        assert job.fed.wait(SECONDS)
        return self.slices()


def make(link, args, **options):
    context = letters.Context(caller=True)
    return Job(link, 1, context, bytes(16), Function([b"f"]), args, **options)


@pytest.fixture
def start():
    """Start a job; its link is in `.link`. It is stopped in the end."""
    made = []

    def run(args, workers=(8, 8), letter_limit=1 << 30, **options):
        made.append(make(Link(workers, letter_limit), args, **options))
        made[-1].start()
        return made[-1]

    yield run
    for job in made:
        job.stop()


def values(job, number, results, attempt=0, status=Status.VALUES, errors=None):
    """Answer a slice with these results, as a worker would."""
    _, parts = outcomes.dump_outcomes(job.link.context, results, errors or {})
    letter = b"".join(parts)
    job.answer(number, attempt, Status.RAISED if errors else status, letters.letter_digest([letter]), letter)


def died(job, number, position=-1, phase="call", status=Status.DIED, **more):
    note = {"position": position, "phase": phase, "node": 4, "pid": 77, "exitcode": -9} | more
    job.answer(number, 0, status, b"", json.dumps(note).encode())


def squares(job):
    """Answer every slice with squares, and take all there is."""
    for number, arguments in enumerate(job.link.wait_fed(job)):
        values(job, number, [x * x for x in arguments])
    return take_all(job)


def take_all(job):
    out = []
    while (taken := job.take(SECONDS)) is not None:
        out.append(taken)
    return out


def numbers():
    yield from range(5)


# Cutting.


@pytest.mark.parametrize("args", [
    [0, 1, 2, 3, 4], (0, 1, 2, 3, 4), range(5), numbers, numbers(), iter(range(5)), {n: n for n in range(5)}])
def test_args_of_all_kinds_are_cut_into_slices_of_chunksize(start, args):
    job = start(args, chunksize=2, flat=True)
    assert job.link.wait_fed(job) == [[0, 1], [2, 3], [4]]
    assert squares(job) == [(0, [0, 1], {}), (2, [4, 9], {}), (4, [16], {})]


def test_a_file_is_cut_into_lines(start, tmp_path):
    (tmp_path / "lines").write_text("a\nb\nc\n")
    with open(tmp_path / "lines") as file:
        job = start(file, flat=True)
        assert job.link.wait_fed(job) == [["a\n"], ["b\n"], ["c\n"]]


def test_nothing_is_over_at_once(start):
    job = start([])
    assert job.take(SECONDS) is None and job.link.posts == []


# Units.


def test_packets_are_delivered_whole_and_in_order(start):
    job = start(range(5))
    job.link.wait_fed(job)
    assert job.link.flushes() == [5] and all(not rows.statuses[0] for rows in job.link.rows())
    job.packet(0, 3)
    job.packet(3, 2)
    for number in (4, 3, 2, 0):
        values(job, number, [number * 10])
    with pytest.raises(TimeoutError):
        job.take(0)
    values(job, 1, [10])
    assert take_all(job) == [(0, [0, 10, 20], {}), (3, [30, 40], {})]


def test_unordered_packets_come_as_they_are_complete(start):
    job = start(range(4), ordered=False)
    job.link.wait_fed(job)
    job.packet(0, 2)
    job.packet(2, 2)
    for number in (3, 2, 1, 0):
        values(job, number, [number])
    assert [start for start, _, _ in take_all(job)] == [2, 0]


@pytest.mark.parametrize("packet", [(0, 9), (5, 1), (1, 2), (0, 0)])
def test_a_packet_of_slices_that_are_not_free_is_the_servers_fault(start, packet):
    job = start(range(5))
    job.link.wait_fed(job)
    job.packet(0, 2)
    with pytest.raises(ProtocolError, match="packet"):
        job.packet(*packet)


def test_flat_slices_are_units_and_packed(start):
    job = start(range(3), flat=True)
    job.link.wait_fed(job)
    assert {rows.statuses[0] for rows in job.link.rows()} == {PACKED} and job.link.flushes() == []


@pytest.mark.parametrize("wrap", [lambda args: args, iter, lambda args: lambda: iter(args)])
def test_each_list_is_a_packet_cut_evenly_over_the_largest_node(start, wrap):
    job = start(wrap([[1, 2, 3, 4, 5], [], [6]]), workers=(7, 3), chunksize=100)
    assert job.link.wait_fed(job) == [[1], [2, 3], [4, 5], [6]]
    assert {rows.statuses[0] for rows in job.link.rows()} == {PACKED}
    assert squares(job) == [(0, [1, 4, 9, 16, 25], {}), (1, [], {}), (2, [36], {})]


def test_a_list_waits_for_a_node_to_be_cut_for(start):
    job = start([[1, 2, 3, 4]], workers=(0, 0))
    assert not job.link.wait(job.link.rows, MOMENT_SECONDS)
    job.link.set_workers(2, 2)
    assert job.link.wait_fed(job) == [[1, 2], [3, 4]]


def test_empty_lists_need_no_node(start):
    assert take_all(start([[], []], workers=(0, 0))) == [(0, [], {}), (1, [], {})]


@pytest.mark.parametrize("wrap", [list, iter])
def test_a_later_argument_that_is_no_list_is_a_type_error_with_its_index(start, wrap):
    job = start(wrap([[1], [2], 3]))
    for number in range(2):
        assert job.link.wait_fed(job)
        values(job, number, [number])
    assert [job.take(SECONDS)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(TypeError, match=r"args\[2\] is of type int") as caught:
        job.take(SECONDS)
    assert caught.value.index == 2


def test_a_list_of_more_than_the_window_takes_goes_at_once(start):
    """Its slices leave the window together, so they must enter it together."""
    job = start([list(range(100)), [1]], buffersize=2, workers=(8, 8))
    job.link.wait_fed(job)
    assert [start for start, _, _ in squares(job)] == [0, 1]


def test_in_a_pool_a_list_is_an_argument_like_any_other(start):
    job = start([[1], 2], flat=True)
    assert job.link.wait_fed(job) == [[[1]], [2]]


# FLUSH.


def test_a_pause_of_the_iterator_closes_the_open_slice_and_flushes(start):
    go = threading.Event()

    def pausing():
        yield from (1, 2, 3)
        go.wait(SECONDS)
        yield 4

    job = start(pausing, chunksize=2)
    assert job.link.wait(lambda: job.link.flushes() == [2]), job.link.posts
    assert job.link.slices() == [[1, 2], [3]]
    assert not job.link.wait(lambda: len(job.link.posts) > 3, MOMENT_SECONDS), "once a pause is enough"
    go.set()
    assert job.link.wait_fed(job) == [[1, 2], [3], [4]] and job.link.flushes() == [2, 3]


def test_no_pause_no_flush(start, monkeypatch):
    """Waiting for room is no pause of the iterator."""
    job = start(itertools.count(), workers=(1, 1), buffersize=2)
    job.link.wait_slices(2)
    job.packet(0, 1)
    assert not job.link.wait(job.link.flushes, MOMENT_SECONDS)


def test_a_full_window_that_makes_no_packet_is_flushed(start):
    job = start(range(100), buffersize=3, workers=(8, 8))
    assert job.link.wait(lambda: job.link.flushes() == [3]), job.link.posts
    job.packet(0, 3)
    assert len(job.link.rows()) == 3


def test_a_full_window_that_makes_full_packets_is_not_flushed(start):
    """Else the last packet of each window would be cut short."""
    job = start(itertools.count(), workers=(3, 3))
    job.link.wait_slices(64 + 2 * 3)
    assert not job.link.wait(job.link.flushes, MOMENT_SECONDS)


def test_a_buffersize_below_the_chunksize_closes_slices_short(start):
    job = start(range(5), chunksize=4, buffersize=2, workers=(1, 1))
    assert job.link.wait_slices(1) == [[0, 1]]
    job.packet(0, 1)
    values(job, 0, [0, 1])
    assert job.take(SECONDS) == (0, [0, 1], {})
    assert job.link.wait_slices(2)[1] == [2, 3]


# The window.


def test_the_window_stops_an_endless_generator_until_results_are_taken(start):
    pulled = itertools.count()
    job = start(pulled, workers=(2, 2), flat=True)
    job.link.wait_slices(68)
    assert not job.link.wait(lambda: len(job.link.rows()) > 68, MOMENT_SECONDS)
    values(job, 0, [0])
    assert not job.link.wait(lambda: len(job.link.rows()) > 68, MOMENT_SECONDS), "an answer is not taken yet"
    job.take(SECONDS)
    job.link.wait_slices(69)
    assert not job.link.wait(lambda: len(job.link.rows()) > 69, MOMENT_SECONDS)
    assert next(pulled) == 70, "one more was pulled and waits for room"


def test_the_window_grows_with_the_cluster_and_can_be_lifted(start):
    job = start(itertools.count(), workers=(0, 0), flat=True)
    job.link.wait_slices(64)
    job.link.set_workers(5, 5)
    job.resize()
    job.link.wait_slices(74)
    job.lift_window()
    job.link.wait_slices(500)


def test_stop_ends_a_feeder_that_waits_for_room(start):
    job = start(itertools.count())
    job.link.wait_slices(64 + 16)
    job.ended = True
    began = time.monotonic()
    job.stop()
    assert time.monotonic() - began < 5 and not any(thread.is_alive() for thread in job._feeder._threads)


def test_nothing_is_posted_after_the_end(start):
    """TASK or FLUSH after END would be against the protocol."""
    job = start(itertools.count(), workers=(1, 1))
    job.link.wait_slices(66)
    with job.link.lock:
        job.ended = True
        posted = len(job.link.posts)
    died(job, 0, 0)
    job.stop()
    job.packet(900, 3)
    assert len(job.link.posts) == posted


def test_stop_wakes_who_takes(start):
    job = start(itertools.count())
    threading.Timer(0.05, job.stop).start()
    with pytest.raises(InterruptedError):
        job.take(SECONDS)


# Deaths.


def test_three_deaths_lose_the_argument_and_no_other(start):
    job = start(range(10, 13), chunksize=3, flat=True)
    job.link.wait_fed(job)
    for attempt in (1, 2):
        died(job, 0, 1)
        assert job.link.rows()[-1].attempts == (attempt,) and job.link.slices()[-1] == [10, 11, 12]
    died(job, 0, 1)
    assert job.link.slices()[-1] == [10, None, 12]
    values(job, 0, [100, None, 144], attempt=3)
    (start_, results, errors), = take_all(job)
    error = errors[1]
    assert (start_, results[0], results[2], list(errors)) == (0, 100, 144, [1])
    assert type(error) is WorkerLost and (error.index, error.node, error.pid, error.exitcode) == (1, 4, 77, -9)
    assert "argument 1" in str(error) and "pid 77" in str(error) and "signal 9" in str(error)


def test_deaths_of_different_arguments_do_not_add_up(start):
    job = start(range(3), chunksize=3, flat=True)
    job.link.wait_fed(job)
    for position in (0, 1, 2, 0, 1, 2, -1):
        died(job, 0, position)
    assert job.link.slices()[-1] == [0, 1, 2]


def test_a_timeout_loses_the_argument_at_once(start):
    job = start([7, 8], chunksize=2, flat=True, options={"timeout": 1.5})
    job.link.wait_fed(job)
    died(job, 0, 0, status=Status.TIMEOUT)
    assert job.link.slices()[-1] == [None, 8]
    values(job, 0, [None, 64], attempt=1)
    error = job.take(SECONDS)[2][0]
    assert type(error) is TaskTimeout and (error.index, error.node) == (0, 4) and "timeout=1.5 s" in str(error)


def test_a_death_in_loading_charges_all_of_the_slice(start):
    job = start([1, 2], chunksize=2, flat=True)
    job.link.wait_fed(job)
    for _ in range(3):
        died(job, 0, phase="load")
    _, _, errors = job.take(SECONDS)
    assert [type(errors[n]) for n in (0, 1)] == [WorkerLost] * 2 and errors[1].index == 1


def test_a_death_in_dumping_counts_for_whom_the_next_one_names(start):
    job = start(range(4), chunksize=4, flat=True)
    job.link.wait_fed(job)
    for position in (-1, 2, 2):  # together at first, then one by one: three attempts in all
        assert job.link.slices()[-1] == [0, 1, 2, 3]
        died(job, 0, position, phase="dump")
    assert job.link.slices()[-1] == [0, 1, None, 3]
    for _ in range(2):  # the first one was told already: nobody else is charged for it
        died(job, 0, 1, phase="dump")
    assert job.link.slices()[-1] == [0, 1, None, 3]


def test_values_that_kill_only_together_lose_the_slice(start):
    job = start(range(2), chunksize=2, flat=True)
    job.link.wait_fed(job)
    for _ in range(3):
        died(job, 0, -1, phase="dump")
    errors = job.take(SECONDS)[2]
    assert [type(errors[n]) for n in (0, 1)] == [WorkerLost] * 2 and "phase dump" in str(errors[1])


def test_a_death_in_loading_the_function_charges_the_job(start):
    job = start(range(3), flat=True)
    job.link.wait_fed(job)
    for number in range(3):
        died(job, number, phase="function")
    with pytest.raises(WorkerLost, match="loaded the function"):
        job.take(SECONDS)


def test_ten_lost_nodes_lose_the_slice(start):
    job = start(range(2), chunksize=2, flat=True)
    job.link.wait_fed(job)
    died(job, 0, phase="node", lost=10, node=None, pid=None, exitcode=None)
    errors = job.take(SECONDS)[2]
    assert {type(error) for error in errors.values()} == {WorkerLost} and "10 nodes" in str(errors[0])


def test_the_argument_of_a_list_is_named_by_both_places(start):
    job = start([[1], [2, 3, 4]], workers=(2, 2))
    job.link.wait_fed(job)
    values(job, 0, [1])
    values(job, 1, [4])
    for _ in range(3):
        died(job, 2, 1)
    values(job, 2, [9, None], attempt=3)
    (_, _, errors) = take_all(job)[1]
    assert errors[2].index == 1 and r"argument 2 of the list args[1]" in str(errors[2])


def test_a_note_that_cannot_be_read_is_a_breach(start):
    job = start([1], flat=True)
    job.link.wait_fed(job)
    for letter in (b"", b"{}", b"[1]", b"\xff", b'{"position": "0", "phase": "call"}',
                   b'{"position": -1, "phase": "node", "lost": "\\u001b[2J"}', b'{"position": 0, "phase": "a\\nb"}',
                   b'{"position": 0, "phase": "call", "pid": 1, "exitcode": "\\u009b2J"}'):
        with pytest.raises(ProtocolError):
            job.answer(0, 0, Status.DIED, b"", letter)


# Altered letters.


def test_a_slice_that_is_altered_three_times_is_given_up(start):
    job = start([5, 6], chunksize=2, flat=True)
    job.link.wait_fed(job)
    for _ in range(3):
        job.answer(0, 0, Status.ALTERED, b"", b"")
    assert [rows.attempts[0] for rows in job.link.rows()] == [0, 1, 2]
    errors = job.take(SECONDS)[2]
    assert [type(errors[n]) for n in (0, 1)] == [LetterAltered] * 2 and errors[1].index == 1


def test_a_result_with_a_wrong_digest_is_not_loaded_but_sent_anew(start, monkeypatch):
    job = start(range(2), flat=False)
    job.link.wait_fed(job)
    job.packet(0, 2)
    values(job, 1, [1])
    loaded = []
    monkeypatch.setattr(letters.Context, "load", lambda self, letter: loaded.append(bytes(letter)) or [0])
    job.answer(0, 0, Status.VALUES, bytes(32), b"x" * 2000)
    with pytest.raises(TimeoutError):
        job.take(0)
    assert not loaded and job.link.rows()[-1].slices == (0,) and job.link.rows()[-1].statuses == (PACKED,)
    monkeypatch.undo()
    values(job, 0, [0], attempt=1)
    assert take_all(job) == [(0, [0, 1], {})]


def test_a_result_that_is_wrong_three_times_is_given_up(start):
    job = start([1], flat=True)
    job.link.wait_fed(job)
    for attempt in range(3):
        job.answer(0, attempt, Status.VALUES, bytes(32), b"x" * 2000)
        if attempt < 2:
            with pytest.raises(TimeoutError):
                job.take(0)
    assert type(job.take(SECONDS)[2][0]) is LetterAltered


# Answers in parts, late and twice.


def test_parts_are_joined(start):
    job = start(range(4), chunksize=4, flat=True)
    job.link.wait_fed(job)
    values(job, 0, [0, 1], status=Status.VALUES | MORE)
    values(job, 0, [4, 9])
    assert take_all(job) == [(0, [0, 1, 4, 9], {})]


def test_parts_are_joined_though_each_comes_in_a_frame_of_its_own(start):
    job = start(range(4), chunksize=4, flat=True)
    job.link.wait_fed(job)
    for status, results in ((Status.VALUES | MORE, [0, 1]), (Status.VALUES, [4, 9])):
        letter = b"".join(outcomes.dump_outcomes(job.link.context, results, {})[1])
        job.answers(Rows.single(1, 0, 0, status, [letter], pace=1))
    assert take_all(job) == [(0, [0, 1, 4, 9], {})]


def test_an_error_in_a_later_part_has_its_place(start):
    job = start(range(4), chunksize=4, flat=True)
    job.link.wait_fed(job)
    values(job, 0, [0, 1], status=Status.VALUES | MORE)
    values(job, 0, [4, None], errors={1: KeyError("x")})
    _, _, errors = job.take(SECONDS)
    assert list(errors) == [3] and errors[3].index == 3 and type(errors[3]) is KeyError


@pytest.mark.parametrize("whole", [True, False])
def test_parts_of_an_attempt_that_broke_off_are_dropped(start, whole):
    job = start(range(2), chunksize=2, flat=True)
    job.link.wait_fed(job)
    values(job, 0, ["old"], attempt=0, status=Status.VALUES | MORE)
    if whole:
        values(job, 0, [0, 1], attempt=1)
    else:
        values(job, 0, [0], attempt=1, status=Status.VALUES | MORE)
        values(job, 0, [1], attempt=1)
    assert take_all(job) == [(0, [0, 1], {})]


def test_parts_from_a_lost_connection_are_dropped_even_of_the_same_attempt(start):
    job = start(range(2), chunksize=2, flat=True)
    job.link.wait_fed(job)
    values(job, 0, ["old"], status=Status.VALUES | MORE)
    with job.link.lock:
        assert len(job.outstanding()) == 1
    values(job, 0, [0], status=Status.VALUES | MORE)
    values(job, 0, [1])
    assert take_all(job) == [(0, [0, 1], {})]


def test_a_death_that_comes_while_another_thread_stops_the_job_is_ignored(start):
    job = start([0], flat=True)
    job.link.wait_fed(job)
    note = json.dumps({"position": 0, "phase": "call"}).encode()
    job.ended = True
    job.slices.clear()  # as far as `stop` has come
    job.answers(Rows.single(1, 0, 0, Status.DIED, [note]))


def test_late_and_second_answers_are_ignored(start):
    job = start(range(2), flat=True)
    job.link.wait_fed(job)
    values(job, 0, ["first"])
    values(job, 0, ["second"])
    died(job, 0, 0)
    assert job.take(SECONDS) == (0, ["first"], {})
    values(job, 0, ["third"])
    values(job, 17, ["never asked for"])
    assert len(job.link.rows()) == 2
    values(job, 1, ["last"])
    assert take_all(job) == [(1, ["last"], {})]


def test_an_exception_comes_at_its_index_and_does_not_end_the_job(start):
    job = start(range(4), chunksize=2, flat=True)
    job.link.wait_fed(job)
    values(job, 0, [0, 1])
    values(job, 1, [None, 3], errors={0: ValueError("bad")})
    _, (start_, results, errors) = take_all(job)
    assert start_ == 2 and results[1] == 3 and type(errors[0]) is ValueError and errors[0].index == 2


def test_an_exception_in_a_list_has_the_lists_index(start):
    job = start([[1], [2, 3]], workers=(1, 1))
    job.link.wait_fed(job)
    values(job, 0, [1])
    values(job, 1, [4, None], errors={1: ValueError("bad")})
    assert take_all(job)[1][2][1].index == 1


def test_a_function_that_cannot_be_loaded_fails_the_job(start):
    job = start(range(2), flat=True)
    job.link.wait_fed(job)
    _, parts = outcomes.dump_outcomes(job.link.context, [None], {0: ModuleNotFoundError("No module named 'gone'")})
    job.answer(0, 0, Status.FAILED, b"", b"".join(parts))
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'gone' on node .*: install it there"):
        job.take(SECONDS)


# What cannot be sent.


UNFIT = (n for n in ())  # a generator cannot be dumped


@pytest.mark.parametrize(("args", "index", "text"), [
    ([1, 2, UNFIT], 2, r"argument 2 \(of type generator\)"),
    (iter([1, UNFIT, 3]), 1, r"argument 1 \(of type generator\)"),
    ([[1], [2, UNFIT]], 1, r"argument 1 of the list args\[1\] \(of type generator\)"),
])
def test_an_argument_that_cannot_be_dumped_is_named(start, args, index, text):
    job = start(args, chunksize=2, eager=True, workers=(1, 1))
    with pytest.raises(DumpError, match=text) as caught:
        job.take(SECONDS)
    assert caught.value.index == index and caught.value.__cause__ is not None


def test_a_slice_over_the_limit_is_cut_again(start):
    job = start([b"a" * 600, b"b" * 600, b"c" * 600], chunksize=3, letter_limit=1400, flat=True)
    assert job.link.wait_fed(job) == [[b"a" * 600], [b"b" * 600, b"c" * 600]]
    values(job, 0, ["a"])
    values(job, 1, ["b", "c"])
    assert take_all(job) == [(0, ["a"], {}), (1, ["b", "c"], {})]


def test_a_list_over_the_limit_is_cut_again_and_stays_one_packet(start):
    job = start([[b"a" * 600, b"b" * 600, b"c" * 600]], letter_limit=1400, workers=(1, 1))
    assert job.link.wait_fed(job) == [[b"a" * 600], [b"b" * 600, b"c" * 600]]
    values(job, 0, ["a"])
    values(job, 1, ["b", "c"])
    assert take_all(job) == [(0, ["a", "b", "c"], {})]


def test_one_argument_over_the_limit_is_letter_too_large(start):
    job = start([b"a", b"b" * 2000], chunksize=2, letter_limit=1400, flat=True)
    assert job.link.wait_fed(job) == [[b"a"]]
    values(job, 0, ["a"])
    assert job.take(SECONDS)[1] == ["a"]
    start, _, errors = job.take(SECONDS)
    assert start == 1 and isinstance(errors[0], LetterTooLarge) and errors[0].index == 1
    assert str(errors[0]).startswith("argument 1 has 20") and job.take(SECONDS) is None


def test_an_argument_that_cannot_be_dumped_is_the_error_of_its_place_alone_in_a_flat_job(start):
    job = start([1, 2, (n for n in ()), 4], chunksize=4, flat=True)
    assert job.link.wait_fed(job) == [[1, 2], [4]]
    values(job, 0, [1, 4])
    values(job, 2, [16])
    (_, first, _), (place, _, errors), (_, last, _) = take_all(job)
    assert (first, place, last) == ([1, 4], 2, [16])
    assert isinstance(errors[0], DumpError) and errors[0].index == 2 and isinstance(errors[0].__cause__, TypeError)


def test_a_short_sequence_is_fed_without_a_thread(start):
    job = start(list(range(64)), flat=True, buffersize=64)
    assert job.fed.is_set() and not job._feeder._threads
    assert job.link.slices() == [[n] for n in range(64)]
    longer = start(list(range(64)), flat=True, buffersize=3)
    assert longer.link.wait_slices(3) == [[0], [1], [2]] and not longer.fed.is_set()
    for n in range(61):  # what had no room is fed by the thread, each once
        longer.link.wait_slices(n + 1)
        values(longer, n, [n])
        assert longer.take(SECONDS)[1] == [n]
    assert longer.link.wait_fed(longer) == [[n] for n in range(64)]


def test_ready_is_called_without_locks_when_there_is_something_to_take_and_at_the_end(start):
    told = []

    def ready():
        assert not job.link.lock.locked()
        try:
            told.append(job.take(0))
        except (NotYet, InterruptedError):  # the second when it is stopped
            pass

    job = start([1, 2], flat=True, ordered=False)
    job.ready = ready
    values(job, 1, [4])
    values(job, 0, [1])
    assert told == [(1, [4], {}), (0, [1], {})]
    assert job.take(SECONDS) is None


def test_slices_grow_to_fifty_milliseconds_and_shrink_at_once(start):
    job = start(iter(range(10**6)), flat=True, largest=3000)
    job.link.wait_slices(64)
    sizes = []
    for pace in (10, 10, 1_000_000, 100):
        answer = job.link.rows()[0].renumbered(1, pace)
        job._adapt(answer, 3000)
        sizes.append(job._feeder.size)
    assert sizes == [16, 256, 1, 16]
    job._feeder.size = 1000
    job._adapt(job.link.rows()[0].renumbered(1, 1), 3000)
    assert job._feeder.size == 3000


# The iterable's own errors.


def breaking():
    yield from (1, 2, 3)
    raise OSError("the disk")


def test_the_iterables_error_comes_behind_all_that_was_before_it(start):
    job = start(breaking, chunksize=2, flat=True)
    assert job.link.wait_fed(job) == [[1, 2], [3]]
    values(job, 0, [1, 4])
    values(job, 1, [9])
    assert [job.take(SECONDS)[1] for _ in range(2)] == [[1, 4], [9]]
    with pytest.raises(OSError, match="the disk"):
        job.take(SECONDS)


def test_or_at_once_where_the_job_is_eager(start):
    with pytest.raises(OSError, match="the disk"):
        start(breaking, eager=True).take(SECONDS)


def test_a_generator_function_that_raises_when_called(start):
    with pytest.raises(ZeroDivisionError):
        start(lambda: 1 / 0).take(SECONDS)


# Reconnection.


def test_only_what_is_unanswered_is_sent_again_packed_where_it_is(start):
    job = start(range(6))
    job.link.wait_fed(job)
    job.packet(0, 2)
    job.packet(2, 2)
    for number in (0, 1, 2):
        values(job, number, [number])
    assert job.take(SECONDS) == (0, [0, 1], {})
    died(job, 3, 0)
    with job.link.lock:
        again, flushed = job.outstanding(), job.flushed()
    assert [(rows.slices, rows.statuses, rows.attempts) for rows in again] == [
        ((3,), (PACKED,), (1,)), ((4,), (0,), (0,)), ((5,), (0,), (0,))]
    assert flushed == 6


def test_a_flush_that_came_of_a_pause_is_remembered_for_a_new_connection(start):
    go = threading.Event()

    def pausing():
        yield 1
        go.wait(SECONDS)

    job = start(pausing)
    assert job.flushed() == 0 or job.link.flushes()
    assert job.link.wait(job.link.flushes)
    with job.link.lock:
        assert not job.fed.is_set() and job.flushed() == 1
    go.set()
    job.link.wait_fed(job)


@pytest.mark.parametrize("options", [{"flat": True}, {}])
@pytest.mark.parametrize("results", [[1], [1, 2, 3]])
def test_an_answer_with_too_few_or_too_many_results_ends_the_job(start, options, results):
    job = start([1, 2], chunksize=2, **options)
    job.link.wait_fed(job)
    if not options:
        job.packet(0, 1)
    values(job, 0, results)
    with pytest.raises(ProtocolError, match=f"{len(results)} results of 2 arguments"):
        job.take(SECONDS)


def test_deaths_are_counted_over_a_reconnection(start):
    job = start([1], flat=True)
    job.link.wait_fed(job)
    died(job, 0, 0)
    died(job, 0, 0)
    with job.link.lock:
        job.outstanding()
    died(job, 0, 0)
    assert type(job.take(SECONDS)[2][0]) is WorkerLost


def test_attempts_is_what_the_design_says():
    assert job_module.ATTEMPTS == 3


def test_what_the_pacer_sends_while_the_iterator_runs_is_sent_once_and_kept_no_longer(start):
    """It may look at any moment between two arguments; a slow stream leaves nothing behind."""
    job, kept = None, []

    def stream():
        for n in range(60):
            if n % 7:
                job._feeder._let_go()
            kept.append(len(job._feeder._open))
            yield n

    job = make(Link((8, 8), 1 << 30), stream, chunksize=10, flat=True)
    job.start()
    sent = job.link.wait_fed(job)
    job.stop()
    assert [x for arguments in sent for x in arguments] == [*range(60)]
    assert max(kept) <= 10


def test_a_slow_iterator_is_not_pulled_on_after_the_end(start):
    pulled = []

    def stream():
        for n in itertools.count():
            pulled.append(n)
            threading.Event().wait(0.005)
            yield n

    job = start(stream, chunksize=50, flat=True)
    assert job.link.wait_slices(1)
    assert len(pulled) < 90, "what is cut goes before the next slice is full"
    job.stop()
    before = len(pulled)
    job._feeder._threads[0].join(SECONDS)
    assert not job._feeder._threads[0].is_alive()
    assert len(pulled) <= before + 1


class Interrupting:
    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit("asked to end")])
def test_what_ends_the_caller_while_it_feeds_is_raised_there(start, error):
    with pytest.raises(type(error)):
        start([1, Interrupting(error), 3], flat=True)


class Slow:
    def __reduce__(self):
        threading.Event().wait(0.02)
        return int, ("1",)


def test_a_caller_is_not_kept_long_by_what_it_feeds(start):
    job = start([Slow() for _ in range(10)], flat=True)
    assert not job.fed.is_set()
    assert job.link.wait_fed(job) == [[1]] * 10
