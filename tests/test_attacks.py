"""The short form of `python -m tests.attacks`: every attack once; the command; and the attacker's own client."""

from __future__ import annotations

import random
import socket
import sys
import tempfile
import threading

import pytest
from attacks import raw, run
from attacks.bench import WHO, Bench, Skipped
from attacks.frames import altered
from attacks.victims import first_difference

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ATTACKS = run.load()


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in ("HOST", "PORT", "USERNAME", "SECRET_KEY", "PREVIOUS_SECRET_KEY", "ENV_FILE"):
        monkeypatch.delenv(f"ACHILLES_{name}", raising=False)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # shown where it fails
    try:
        run.run_once(ATTACKS[name], seed, short=True)
    except Skipped as e:
        pytest.skip(str(e))


# What judges must be judged.


def test_every_attacker_has_attacks_and_they_say_what_they_do():
    assert {attack.who for attack in ATTACKS.values()} == set(WHO)
    assert all(len(attack.run.__doc__) > 60 for attack in ATTACKS.values())


def test_an_attack_that_succeeds_is_told_by_the_exit_status(monkeypatch, capsys, tmp_path):
    def let_in(bench):
        bench.each(lambda case: None, range(2))
        raise AssertionError("it was let in")

    good, bad = (run.Attack(name, "port", f"what {name} does", work) for name, work in (
        ("good", lambda bench: bench.count(3)), ("bad", let_in)))
    monkeypatch.setattr(run, "load", lambda: {"good": good, "bad": bad})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # what it leaves to look at
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    assert run.main(["--only", "good"]) == 0
    assert "| reaches the port | what good does | 3     | 3" in capsys.readouterr().out
    assert run.main([]) == 1
    assert "SUCCEEDED" in capsys.readouterr().out


def test_an_attack_that_tries_nothing_is_none():
    with pytest.raises(AssertionError, match="0 tries"):
        run.run_once(run.Attack("idle", "port", "nothing", lambda bench: None), 1)


def test_a_try_that_is_not_refused_ends_the_attack_and_is_counted():
    def refuse(case):
        assert case != 3, "let in"

    with Bench(random.Random(1)) as bench:
        with pytest.raises(AssertionError, match="3: AssertionError: let in"):
            bench.each(refuse, range(5), threads=1)
        assert bench.tries > bench.refused


def test_the_short_form_takes_some_of_every_kind():
    with Bench(random.Random(1), short=True) as bench:
        some = bench.some(range(1000), 100)
        assert len(set(some)) == 100 and {n % 5 for n in some} == set(range(5))
        assert list(bench.some(range(5), 10)) == list(range(5))


def test_bytes_are_altered_as_they_say():
    assert altered(b"abc", 1, "flipped", 0) == b"acc"
    assert altered(b"abc", 1, "duplicated", 0) == b"abbc"
    assert altered(b"abc", 1, "dropped", 0) == b"ac"
    assert altered(b"abc", 1, "swapped", 0) == b"acb"
    assert altered(b"abc", 1, "sent in the other direction", ord("x")) == b"axbc"
    assert first_difference(b"abc", b"abd") == 2 and first_difference(b"abc", b"abcd") == 3


# Of the page's session in hex, section 10: another implementation has made it.

KEY = "1ee2baf8a91bf056562ebab4eeb240e00949096351f0f1dbf755c63ebf77bc6c"
M1 = raw.greeting(bytes(range(32)))
SIGNED = raw.signed_auth(b"C", b"ann", bytes(range(32, 64)))


def test_the_raw_client_makes_the_handshake_of_the_page():
    key = raw.derive(b"ann", "correct horse battery staple")
    keys = raw.session(key, M1, SIGNED)
    assert key.hex() == KEY
    assert keys.client_proof.hex() == "088b433cfedd8f5ec2afd80fe1dae6951369dec986cc357aadfb01c2882705c0"
    assert keys.server_proof.hex() == "08bc5bf71b8a5fbf270c1856626687d6f686f8d5502dd217aae9bbef3b181874"


def test_the_raw_client_makes_the_frames_of_the_page():
    keys = raw.session(bytes.fromhex(KEY), M1, SIGNED)
    rows = [raw.Row(0, letter=b"hello"), raw.Row(1, letter=bytes(range(256)) * 5)]
    task = raw.tag(keys.data[raw.UP], 3, raw.encode("TASK", rows=rows, job=1))
    assert task.tag.hex() == "7369095963e66f5e4c119351901d6fbf95ec54bfe4c0598789dec9c05ed09dab"
    assert [row.letter for row in task.rows] == [row.letter for row in rows]
    bye = raw.tag(keys.data[raw.UP], 6, raw.encode("BYE", {"reason": "leaving"}))
    assert bye.tag.hex() == "30d21438b63938eaa0267c6eabdf5c7ddb53a59f800660e734bc074aab98973c"


def test_the_middle_passes_on_what_it_does_not_alter_and_signs_what_it_does():
    key = raw.derive(b"ann", "secret")
    with raw.listener() as listening:
        links = []
        server = threading.Thread(target=lambda: links.append(raw.accept(listening, key)))
        server.start()

        def tamper(pair, way, number, frame):
            return raw.encode("PING") if way == raw.UP and number == 1 else frame.raw

        with raw.Middle(listening.getsockname()[1], tamper, key) as middle:
            with raw.join(middle.port, b"C", b"ann", key) as client:
                server.join()
                with links[0] as link:
                    client.send("STATUS")
                    client.send("KILL")
                    client.send("STATUS")
                    assert [link.read().kind for _ in range(3)] == ["STATUS", "PING", "STATUS"]
                    link.send("BYE", {"reason": "restart"})
                    assert client.read().body == {"reason": "restart"}
                    client.sock.shutdown(socket.SHUT_WR)
                    assert not link.rest()
