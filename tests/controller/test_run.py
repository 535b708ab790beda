"""A Run: how it is cut, how its arguments are called, and who is charged."""

from __future__ import annotations

import pytest

from achilles.controller.run import ALTERED, ATTEMPTS, LOSSES, LOST, Run
from achilles.errors import LetterAltered, TaskTimeout, WorkerLost

DEATH = {"offset": -1, "phase": "call", "node": 4, "pid": 77, "exitcode": -9}


def run(first=10, start=30, size=3, chunks=4, arguments=11, place=None):
    return Run(first, start, size, [*"abcdefgh"[:chunks]], arguments, place)


def test_a_run_is_cut_with_its_arguments():
    whole = run()
    assert (whole.end, whole.cut(1, 3).first, whole.cut(1, 3).start) == (14, 11, 33)
    assert [whole.cut(at, at + 1).arguments for at in range(4)] == [3, 3, 3, 2], "the last chunk may be short"
    assert (whole.cut(2).letters, whole.cut(2).arguments) == (["c", "d"], 5)
    assert (whole.cut(0).arguments, whole.cut(4).letters, whole.cut(4).arguments) == (11, [], 0)


def test_a_run_is_cut_with_its_answers():
    whole = run()
    assert whole.cut(1, 3).answers == (), "there are none yet"
    whole.status, whole.answers = 1, [*"ABCD"]
    assert (whole.cut(1, 3).answers, whole.cut(3).answers, whole.cut(3).status) == (["B", "C"], ["D"], 1)


def test_an_argument_is_named_by_its_index_or_by_its_place_in_a_list():
    assert run(start=12).name(2) == "argument 14"
    listed = run(start=5, place=7)
    assert listed.name(1) == "argument 6 of the list args[7]"
    assert (run(start=12).index(2), listed.index(1)) == (14, 7)


def test_pieces_of_a_run_have_what_was_charged_to_it_and_not_what_is_charged_to_one_of_them():
    whole = run()
    whole.charge(LOST)
    pieces = [whole.cut(at, at + 1) for at in range(4)]
    for _ in range(2):
        pieces[0].charge(LOST)
    pieces[1].die(DEATH, "")
    assert [piece.counts[LOST] for piece in pieces] == [3, 1, 1, 1]
    assert [piece.is_doubtful for piece in pieces] == [True, True, False, False]
    assert [piece.has_died for piece in pieces] == [False, True, False, False]
    assert not whole.is_doubtful and not run().counts, "another run has its own"


@pytest.mark.parametrize(("what", "most", "error"), [(LOST, LOSSES, WorkerLost), (ALTERED, ATTEMPTS, LetterAltered)])
def test_a_chunk_is_given_up_with_all_its_arguments(what, most, error):
    chunk = run(chunks=1, arguments=3)
    for _ in range(most - 1):
        chunk.charge(what)
    assert not chunk.lost
    chunk.charge(what)
    assert [(type(each), each.index) for each in chunk.lost.values()] == [(error, 30), (error, 31), (error, 32)]


def test_the_reason_that_came_first_stays():
    chunk = run(chunks=1, arguments=3)
    chunk.die(DEATH | {"offset": 1}, "timeout=2 s")
    assert [*chunk.lost] == [1] and type(chunk.lost[1]) is TaskTimeout
    assert str(chunk.lost[1]) == "argument 31 ran longer than timeout=2 s"
    for _ in range(3):
        chunk.die(DEATH, "")
    assert {offset: type(each) for offset, each in chunk.lost.items()} == {
        0: WorkerLost, 1: TaskTimeout, 2: WorkerLost}


def test_deaths_before_one_that_names_an_argument_count_for_that_argument():
    chunk = run(chunks=1, arguments=3)
    for offset in (-1, -1, 2):
        chunk.die(DEATH | {"offset": offset}, "")
    assert [*chunk.lost] == [2] and chunk.counts == {2: 3}
    for _ in range(2):
        chunk.die(DEATH | {"offset": 0}, "")
    assert [*chunk.lost] == [2], "nobody else is charged for them"
