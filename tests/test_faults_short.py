"""The short form of `python -m tests.faults`: some cases of each kind, once, a short soak, and the tools themselves."""

from __future__ import annotations

import random
import signal
import socket
import sys
import time
from collections import Counter

import pytest
from conftest import wait_until
from faults import run
from faults.bench import Bench, Skipped
from faults.oracle import Oracle
from faults.proxy import Proxy
from faults.soak import Round
from faults.work import note
from pages import PAGES, section, table

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL"),
]
CASES = run.load()


@pytest.mark.parametrize("name", [case.name for case in CASES.values() if case.short])
def test_fault(name, monkeypatch):
    for variable in ("ACHILLES_HOST", "ACHILLES_PORT"):
        monkeypatch.delenv(variable, raising=False)
    try:
        run.run_once(CASES[name], 1, short=True)
    except Skipped as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_round_of_the_soak(seed):
    rng = random.Random(seed)
    with Bench(rng) as bench:
        this = Round(bench, rng, jobs=2, long=False)
        this.run()
    assert this.calls == 2


def test_the_short_table_names_cases_that_are_there():
    for names in run.GROUPS.values():
        for name in names:
            assert [case for case in CASES if case == name or (name.endswith("_") and case.startswith(name))], name


def test_the_page_on_promises_quotes_the_short_table():
    """Its figures are those of some machine on some day; its rows and runs are those that the command has."""
    heading = "How that was tried"
    assert "| " + " | ".join(run.HEAD[:-1]) + " |" in section("docs/promises.md", heading)
    rows = table("docs/promises.md", heading, "fault")
    runs = Counter({run.group_of(case.name): 0 for case in CASES.values()})
    for case in CASES.values():
        runs[run.group_of(case.name)] += case.runs
    assert [(row[0], int(row[1])) for row in rows] == [(what, runs[what]) for what in run.GROUPS]
    assert f"That was {runs.total()} runs of {len(CASES)} cases" in PAGES["docs/promises.md"]


@pytest.mark.parametrize("limit, values, kept", [
    (("detect", 0.1), [0.05] * 18 + [0.2] * 2, True), (("detect", 0.1), [0.05] * 17 + [0.2] * 3, False),
    (("detect", 1.0), [0.5, 0.5, 1.5], False), (("detect", 1.0), [0.5, 0.5, 0.5], True), (None, [9.0], True),
    (("ratio", 1.1), [1.05, 1.3], True), (("ratio", 1.1), [1.15, 1.2], False),
])
def test_a_case_that_does_not_keep_its_limit_fails_but_in_the_short_form(limit, values, kept, capsys):
    left = [*values]
    case = run.Case("some", 1, "what", lambda bench: getattr(bench, limit[0] if limit else "detect").append(left.pop()),
                    len(values), False, limit)
    tally = run._run_case(case, len(values), 1, False)
    assert (tally.failed == 0) is kept and ("FAILED" in capsys.readouterr().out) is not kept
    left = [*values]
    assert run._run_case(case, len(values), 1, True).failed == 0


# What judges must be judged.


@pytest.fixture
def oracle(tmp_path):
    judge = Oracle(tmp_path)
    for index in range(4):
        for word in ("begin", "end"):
            note(judge.path, index, word)
    return judge


def test_the_oracle_accepts_what_is_right(oracle):
    oracle.check({n: n * n for n in range(4)}, 4, repeats=0)
    assert oracle.running() == {}


@pytest.mark.parametrize("found", [
    {0: 0, 1: 1, 2: 4}, {0: 0, 1: 1, 2: 4, 3: 8}, {0: 0, 1: 1, 2: 4, 3: 9, 4: 16}, {},
], ids=["missing", "wrong", "unasked", "nothing"])
def test_the_oracle_refuses_what_is_wrong(oracle, found):
    with pytest.raises(AssertionError):
        oracle.check(found, 4, repeats=0)


def test_the_oracle_counts_what_was_repeated(oracle):
    note(oracle.path, 2, "begin")
    assert list(oracle.running().values()) == [2]
    oracle.check({n: n * n for n in range(4)}, 4, repeats=1)
    with pytest.raises(AssertionError, match="1 repeated"):
        oracle.check({n: n * n for n in range(4)}, 4, repeats=0)


def test_the_oracle_knows_what_a_fault_has_hit(oracle):
    note(oracle.path, 3, "begin")
    at = time.monotonic()
    assert oracle.hit(at).indexes == []
    note(oracle.path, 3, "begin")
    note(oracle.path, 3, "end")
    again = oracle.hit(at)
    assert again.indexes == [3]
    assert 0 < again.detect <= again.recover < 5


@pytest.fixture
def ends(no_leftovers):
    """A proxy, its client's end and its server's."""
    with socket.create_server(("127.0.0.1", 0)) as listener, Proxy(listener.getsockname()[1]) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
            server, _ = listener.accept()
            server.settimeout(10)
            with server:
                yield proxy, client, server


def receive(sock, count):
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        assert piece, "end of file"
        data += piece
    return data


def test_the_proxy_forwards_both_ways(ends):
    _, client, server = ends
    client.sendall(b"hello")
    assert receive(server, 5) == b"hello"
    server.sendall(b"world")
    assert receive(client, 5) == b"world"
    client.shutdown(socket.SHUT_WR)
    assert server.recv(1) == b""
    server.sendall(b"late")
    assert receive(client, 4) == b"late"


def test_the_proxy_cuts_after_so_many_bytes(ends):
    proxy, client, server = ends
    proxy.up.cut_after = 7
    client.sendall(b"0123456789")
    assert receive(server, 7) == b"0123456"
    assert server.recv(1) == b""
    wait_until(lambda: not proxy.open, "the end of the connection")
    assert proxy.passed == [7, 0]


def test_the_proxy_holds_one_direction(ends):
    proxy, client, server = ends
    proxy.hold(down=False)
    client.sendall(b"up")
    server.sendall(b"down")
    assert receive(client, 4) == b"down"
    server.settimeout(0.1)
    with pytest.raises(TimeoutError):
        server.recv(1)
    proxy.heal()
    server.settimeout(10)
    assert receive(server, 2) == b"up"


@pytest.mark.parametrize("rule", [{"delay": 0.2}, {"rate": 50_000.0}, {"piece": 1}])
def test_the_proxy_is_slow(ends, rule):
    proxy, client, server = ends
    client.sendall(bytes(1_000_000))  # quickly: what went before a rule counts for nothing
    assert receive(server, 1_000_000) == bytes(1_000_000)
    for name, value in rule.items():
        setattr(proxy.up, name, value)
    at = time.monotonic()
    client.sendall(bytes(10_000))
    assert receive(server, 10_000) == bytes(10_000)
    assert "piece" in rule or time.monotonic() - at > 0.15
