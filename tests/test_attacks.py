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
from conftest import ENCRYPT

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
    declaration = b'{"context":"00112233445566778899aabbccddeeff","initializer":false,"timeout":2.5}'
    letters = [raw.Chunk(0, letter=declaration), raw.Chunk(1, letter=b"a function")]
    chunks = [raw.Chunk(0, 1, letter=b"hello"), raw.Chunk(1, 1, letter=bytes(range(256)) * 5)]
    answers = [raw.Chunk(0, 1, 0, b"HELLO"), raw.Chunk(1, 1, 1, b"no")]
    job, task, given, result, end, bye = (
        raw.encode("JOB", chunks=letters, job=1), raw.encode("TASK", chunks=chunks, job=1, number=5000, flags=raw.TELL),
        raw.encode("GIVEN", chunks=chunks, job=1, number=8), raw.encode("RESULT", chunks=answers, job=1, number=4200),
        raw.encode("END", job=1), raw.encode("BYE", {"reason": "leaving"}))
    for way, sequence, frame, mac in (
        (raw.UP, 1, job, "3567352f4f2959fb54b07f5c9e9ee7c5cb47a27664a3d716c26788dddf8e1932"),
        (raw.UP, 2, task, "5e166117aa2b97367e2a88e1d65de8c473f5034454ace59b3dcc751f28f56a9f"),
        (raw.DOWN, 2, given, "a2c72808b8d5be4f05ae98858688889f70b27db0e4cd3d4a0a2c8aa42d980222"),
        (raw.DOWN, 3, result, "2713102223441d2cd6a429ee011af6132c5ee71d6ff8ac4507da7b3348c89911"),
        (raw.UP, 3, end, "ee19b627b128217822bc92ca18f2318d517dff5e3c586ff103c81fc7449adab6"),
        (raw.UP, 4, bye, "ac5077641061321015d5362d39c6c86bbe8fe6458c9ef5bef09a86fc8e3604a4"),
    ):
        assert raw.tag(keys.data[way], sequence, frame).tag.hex() == mac, frame.kind
    assert [chunk[:4] for chunk in job.chunks] == [chunk[:4] for chunk in letters]
    assert [chunk[:4] for chunk in task.chunks] == [chunk[:4] for chunk in chunks]
    assert result.chunks == answers and given.span == (1, 0, 2, 1, 8) and task.flags == raw.TELL
    assert [chunk.number for chunk in given.chunks] == [0, 1] and end.chunks == []


@pytest.mark.skipif(ENCRYPT, reason="nobody on the path can read a frame")
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
