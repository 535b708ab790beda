"""A small form of `python -m tests.bench`: each row and section runs and has right results. No time is looked at."""

from __future__ import annotations

import argparse
import sys

import pytest
from bench import chunks, floors, links, memory, run, simulate, swarm, table
from bench.peers import PEERS, absent
from bench.rows import ROWS, Row
from bench.sections import SECTIONS
from bench.timing import Meter, Sample, enough
from bench.waits import ideal_seconds
from bench.work import Scene

from achilles.configuring import can_encrypt

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SMALL = argparse.Namespace(small=True, long=False, workers=2, seconds=0.001, times=1, repeats=1, peers="", only="")


@pytest.fixture(autouse=True)
def without_address(monkeypatch):
    for variable in ("ACHILLES_HOST", "ACHILLES_PORT"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("peer, some", [
    ("achilles", []), ("achilles.imap_unordered", ["tiny-64", "imap", "anew", "main"]), ("multiprocessing", []),
    ("concurrent.futures", ["tiny-64", "submit"]),
    pytest.param("achilles.encrypted", ["tiny-64", "submit", "in-out"], marks=pytest.mark.skipif(
        not can_encrypt(), reason="this Python cannot encrypt")),
])
def test_every_row(peer, some):
    """In one driver; the command starts one for each row."""
    rows = [row for row in ROWS.values() if row.started and not row.refuses(PEERS[peer])]
    rows = [row for row in rows if not some or row.name in some]
    if not _has_numpy():
        rows = [row for row in rows if not row.modules]
    found = run.drive(peer, [row.name for row in rows if not row.workers], SMALL)
    for row in rows:
        if row.workers:
            found |= run.drive(peer, [row.name], SMALL, row.workers)
    assert "error" not in found, found["error"]
    for row in rows:
        for sample in (Sample(*sample) for sample in found[row.name]["samples"]):
            assert sample.amount > 0 and sample.seconds > 0 and row.value(sample) > 0
    if peer == "achilles":
        assert set(found["tiny-1"]["samples"][0][2]) == {"caller", "server", "node", "workers"}
        assert list(found["start"]["notes"]) == ["server listens", "node has joined", "caller is connected"]


def _has_numpy():
    try:
        import numpy  # noqa: F401
    except ImportError:
        return False
    return True


def test_a_peer_that_answers_wrongly_has_no_figure():
    class Wrong(PEERS["multiprocessing"]):  # type: ignore[name-defined]
        def map(self, function, args, chunksize):
            return [0 for _ in args]

    for name in ("tiny-1", "again", "in", "uneven"):
        with pytest.raises(AssertionError, match="wrong results"):
            ROWS[name].run(Meter(0.001, 1, dict, small=True), Wrong(2))


def test_imports_are_timed():
    meter = Meter(0.001, 1, dict)
    ROWS["import"].run(meter, PEERS["achilles"](2))
    assert len(meter.samples) == 1


def test_peers_that_are_not_there_are_named(capsys):
    assert absent("achilles") == absent("multiprocessing") == ""
    assert absent("nothing") == "not known"
    assert run.main(["--only", "nothing"]) == 2
    assert run.main(["--list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(ROWS) + len(SECTIONS)


def test_the_ideal_of_uneven_sleeps():
    assert ideal_seconds([1, 1, 1], 2) == 2
    assert ideal_seconds([3, 1, 1, 1], 2) == 3


def test_enough_grows_until_it_is():
    asked = []
    assert enough(asked.append, 1.0, least=4, most=1000) == 1000
    assert asked[:2] == [4, 4] and asked == sorted(asked)


def sample(seconds, **used):
    return Sample(100, seconds, used)


def test_tables():
    """Twice as fast in a rate and in a time is 2; a figure that is missed says so."""
    tiny = {"achilles": [[sample(1, caller=0.5)], [sample(2)]], "multiprocessing": [[sample(2)], [sample(4)]]}
    found = {"tiny-1": tiny,
             "uneven": {"achilles": [[sample(110)]], "multiprocessing": [[sample(220)]]}}
    for line in table.ratios(found, ROWS, ["achilles", "multiprocessing"]).splitlines()[2:]:
        assert line.endswith("2 (2–2)         |")
    rates, sleeps = table.asked(found, ROWS).splitlines()[2:]
    assert "| 8 " in rates and "| 2 (2–2) " in rates and "NO" in rates
    assert "at most 1.05 × ideal" in sleeps and "NO" in sleeps
    assert "75 (50–100)" in table.figures(found, ROWS, ["achilles"])
    assert "5,000" in table.times(found, ROWS, "achilles")  # 0.5 s of the caller's for 100 tasks, where both tell
    assert table.number(1234567) == "1,230,000" and table.number(0.01234) == "0.0123"


def test_a_hang_is_shown_and_has_no_ratio():
    found = {"wait": {"achilles": [[sample(float("inf"))]], "multiprocessing": [[sample(1)]]}}
    assert "hang (hang–hang)" in table.figures(found, ROWS, ["achilles"])
    assert "inf" not in table.ratios(found, ROWS, ["multiprocessing"])
    assert "NO" in table.asked(found, ROWS)


def test_a_call_that_waits_in_vain_hangs(monkeypatch):
    class Lonely(PEERS["multiprocessing"]):  # type: ignore[name-defined]
        """One worker that never lets a later call go first."""

        def unordered(self, function, args):
            return map(function, args)

    monkeypatch.setattr("bench.work.WAIT_SECONDS", 0.01)
    meter = Meter(0.001, 1, dict, small=True)
    ROWS["wait"].run(meter, Lonely(2))
    assert [each.seconds for each in meter.samples] == [float("inf")]


def test_deeds(tmp_path):
    there = str(tmp_path / "there")
    scene = Scene({1: ("say", there), 2: ("wait", there), 3: ("nap", 0.0), 4: ("sum", 10)})
    assert list(map(scene, range(6))) == [(number, True) for number in range(6)]


def test_rows_leave_peers_out():
    assert ROWS["submit"].refuses(PEERS["multiprocessing"]) == "has no submit"
    assert ROWS["main"].refuses(PEERS["multiprocessing"]) == "cannot send it"
    assert not ROWS["submit"].refuses(PEERS["concurrent.futures"])


def test_rows_say_whether_more_is_better():
    row: Row = ROWS["one"]
    assert row.better(1.0, 2.0) == 2.0 and ROWS["in"].better(1.0, 2.0) == 0.5


def test_chunksizes():
    peer = PEERS["multiprocessing"](2)
    peer.start()
    try:
        assert set(chunks.rates(peer, 1, 0.001, 1, sizes=(1, 16))) >= {None, 1}
    finally:
        peer.end()


@pytest.mark.parametrize("what", [what for what in floors.FLOORS if "scrypt" not in what])
def test_floors(what):
    if "dill: dump a lambda" in what and sys.version_info >= (3, 15):
        pytest.skip("dill 0.4.1 cannot dump code of 3.15")
    floors.FLOORS[what]()


@pytest.mark.parametrize("echo", [floors.echo_socket, floors.echo_pipe, floors.stream])
def test_echoes(echo):
    echo(3)


def test_a_closure_crosses_each_link_once(no_leftovers):
    found = links.crossings(100_000, maps=2)
    assert [each.frames for each in found.values()] == [1, 1, 2]
    assert all(each.bytes >= 100_000 * each.frames for each in found.values())


@pytest.mark.parametrize("what", memory.INPUTS)
def test_memory_is_looked_at(what, no_leftovers):
    count = 10 if what.startswith("pieces") else 20_000 if what.endswith("1024") else 2_000
    found = memory.weigh(what, count)
    assert all(len(weights) >= memory.FIRST and min(weights) > 1 for weights in found.values())


@pytest.mark.parametrize("nodes, churn, returns", [(10, 100, 0), (10, 0, 5), (100, 100, 5)])
def test_simulated_nodes_lose_nothing(nodes, churn, returns):
    found = simulate.simulate(nodes, 2_000, churn=churn, returns=returns)
    assert found.batches >= 2_000 and found.seconds > 0


def test_a_simulation_sees_a_chunk_that_is_lost(monkeypatch):
    original = simulate.Scheduler.add

    def lose_one(self, batch):
        count = batch.count - (batch.first == 0)
        original(self, simulate.Batch(batch.job, batch.first, count, batch.attempt, batch.number))

    monkeypatch.setattr(simulate.Scheduler, "add", lose_one)
    with pytest.raises(AssertionError, match="never answered"):
        simulate.simulate(10, 500)


def test_a_swarm_answers_everything(no_leftovers):
    with swarm.serving() as (cluster, crowd):
        crowd.join(5)
        for load in swarm.LOADS:
            found = crowd.carry(load._replace(batches=load.batches // 500), cluster.server.pid)
            assert found.frames > 0 and found.seconds > 0
        assert len(cluster.status()["nodes"]) == 5
