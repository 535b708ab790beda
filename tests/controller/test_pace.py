"""How much travels together: plain arithmetic."""

from __future__ import annotations

import pytest

from achilles.controller import pace
from achilles.controller.pace import Pace, worth_of

ENDLESS = float("inf")


def paced(us):
    made = Pace()
    made.us = us
    return made


def test_until_an_answer_has_come_each_chunk_travels_alone():
    assert Pace().chunks(1, 50_000, ENDLESS, 8) == 1
    assert Pace().chunks(1000, 50_000, 3, 1) == 1


def test_the_pace_is_that_of_the_last_answer_for_each_argument():
    made = Pace()
    made.learn(3000, 3)
    assert made.us == 1000
    made.learn(8_000_000, 4)
    assert made.us == 2_000_000, "slower is believed at once"


def test_the_pace_gets_at_most_eight_times_quicker():
    made = paced(8000)
    made.learn(1, 1)
    assert made.us == 1000
    made.learn(1, 1)
    assert made.us == 125
    made.learn(500, 1)
    assert made.us == 500


@pytest.mark.parametrize(("us", "arguments"), [(0, 1), (0, 0), (5, 0)])
def test_an_answer_that_says_no_time_says_nothing(us, arguments):
    made = paced(70)
    made.learn(us, arguments)
    assert made.us == 70


def test_the_quickest_pace_is_not_zero():
    made = Pace()
    made.learn(1, 10**9)
    assert made.us == pace.TINY_US


def test_a_batch_is_worth_so_many_microseconds():
    assert paced(100).chunks(1, 5000, ENDLESS, 8) == 50
    assert paced(100).chunks(10, 5000, ENDLESS, 8) == 5
    assert paced(100).chunks(1000, 5000, ENDLESS, 8) == 1, "a chunk is never cut"
    assert paced(0.05).chunks(1, 50_000, ENDLESS, 8) == pace.MAX_CHUNKS


def test_a_batch_is_no_more_than_its_share_for_two_batches_a_worker():
    assert paced(1000).chunks(1, 50_000, 100, 5) == 10
    assert paced(100).chunks(1, 5_000, 10_000, 5) == 50


def test_a_call_without_work_for_two_batches_a_worker_is_one_batch_a_worker():
    assert paced(200).chunks(4, 5_000, 8, 2) == 4, "32 calls of 0.2 ms, 4 in a chunk"
    assert paced(1000).chunks(1, 5_000, 20, 8) == 2, "a batch for each worker, and no second one for a few of them"


def test_two_milliseconds_are_one_batch_whatever_the_share():
    assert paced(1).chunks(1, 5000, 100, 8) == 100, "a map of 100 instant calls is one batch"
    assert paced(100).chunks(1, 5000, 20, 8) == 20
    assert paced(100).chunks(1, 5000, 20, 0) == 20, "no worker is there yet"


def test_the_window_follows_the_pace():
    small = 2 * 8 + pace.WINDOW_CHUNKS
    assert Pace().window(1, 8) == small
    assert paced(1_000_000).window(1, 8) == small + 2 * (2 * 8 + 2), "two rounds of batches of one chunk"
    assert paced(1000).window(1, 8) == small + 2 * (2 * 8 + 2) * 50
    assert paced(0.05).window(1, 8) == small + pace.MAX_CHUNKS


def test_the_worth_of_a_batch_grows_while_the_controller_is_late_and_falls_slowly():
    us, found = worth_of(0.0, late=True, few=False), []
    assert us == worth_of(0.0, late=False, few=False) == 5_000
    for _ in range(5):
        us = worth_of(us, late=True, few=False)
        found.append(us)
    assert found == [10_000, 20_000, 40_000, 50_000, 50_000]
    us = worth_of(us, late=False, few=False)
    assert 40_000 < us < 50_000
    for _ in range(1000):
        us = worth_of(us, late=False, few=False)
    assert us == 5_000


def test_where_few_batches_may_be_out_each_is_worth_more():
    assert worth_of(0.0, late=False, few=True) == worth_of(20_000, late=False, few=True) == 20_000
    assert worth_of(20_000, late=True, few=True) == 40_000
