"""Attacks on who reads: names that break out of their line in a log. Each is one line, escaped."""

from __future__ import annotations

import re

from achilles.errors import AchillesError

from . import raw
from .bench import HELLO, USER_BYTES, WRONG, Bench, attack, eventually
from .victims import NodeVictim, attack_controller

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}Z (DEBUG|INFO|WARNING|ERROR) [\w.]+: ")
FORGED = "2026-01-01 00:00:00,000Z INFO achilles.server.exchange: node 7 at 10.0.0.1 joined"
NAMES = (
    f"a\n{FORGED}"[:32], "a\r\nb", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b2J", "\u202eevil", "a\u2028b",
    "a\u0085b", "\b\b\b\bname", "%s%n%(name)s{0}", "\x7f", "\u200bhidden",
)
BROKEN = (b"\xff\xfe\n\x1b[2J", b"\xc3(", b"\xed\xa0\x80\n")


def check_log(text: str) -> list[str]:
    """Every line is one of the log's own, and can be shown on a terminal; returns the lines."""
    lines = text.rstrip("\n").split("\n") if text.strip() else []
    for line in lines:
        assert LINE.match(line), f"no line of the log: {line!r}"
        assert line.isprintable(), f"not fit for a terminal: {line!r}"
    return lines


@attack("port", "newlines and escapes in a user name")
def names_before_authentication(bench: Bench) -> None:
    """Whoever reaches the port writes one line a try into the server's log, escaped, and no other."""
    cluster = bench.cluster()
    users = [name.encode() for name in NAMES] + list(BROKEN)
    for _ in range(1 if bench.short else 5):
        bench.each(lambda user: raw.claim(cluster.port, raw.proving(b"C", user, WRONG)), users, threads=40)
    eventually(lambda: cluster.log().count("refused 127.0.0.1 as user") >= bench.tries, "a line a try")
    lines = [line for line in check_log(cluster.log()) if "refused" in line]
    assert len(lines) == bench.tries, lines


@attack("secret", "newlines and escapes in what a peer says of itself")
def names_after_authentication(bench: Bench) -> None:
    """Versions, reasons, messages, in HELLO, BYE, ERROR: refused, or one escaped line in the server's log."""
    cluster = bench.cluster()

    def hello(case: tuple[str, str]) -> None:
        field, text = case
        with raw.join(cluster.port, b"C", USER_BYTES, raw.derive(USER_BYTES, cluster.address["secret_key"])) as link:
            link.send("HELLO", HELLO | {field: text})
            link.send("STATUS")
            frames = [frame.kind for frame in link.rest()]
            assert "STATUS" not in frames and "ERROR" in frames, frames

    bad = [name for name in NAMES if not name.isprintable()]
    bench.each(hello, [(field, text) for field in ("python", "version") for text in bad])

    def last_word(case: tuple[str, dict[str, str]]) -> None:
        kind, body = case
        with cluster.join() as link:
            link.send(kind, body)
            link.sock.shutdown(1)
            link.rest()

    bench.each(last_word, [("BYE", {"reason": text}) for text in bad]
               + [("ERROR", {"code": "protocol", "message": text}) for text in NAMES]
               + [("ERROR", {"code": text, "message": "m"}) for text in bad])
    cluster.check_alive()
    check_log(cluster.log())


@attack("server", "newlines and escapes in what a server says, to a node's log and to a caller")
def names_from_a_server(bench: Bench) -> None:
    """Even who plays the server writes no line of its own into a node's log, nor escapes into a caller's errors."""
    cluster = bench.cluster()
    texts = NAMES[:2] if bench.short else NAMES
    with NodeVictim(cluster, bench._folder("node")) as victim:
        victim.check_honest()
        for text in texts:
            for body in ({"code": "protocol", "message": text}, {"code": text, "message": "m"}):
                def change(messages: list[bytes], body: dict[str, str] = body) -> list[bytes]:
                    if len(messages) == 1:
                        return messages
                    forged = raw.tag(victim.keys.data[raw.DOWN], 2, raw.encode("ERROR", body))
                    return [*messages[:4], forged.raw]

                victim.attack(change)
                bench.count()
        victim.check_honest()
        check_log(victim.process.err.read_text())
    sessions: list[raw.Keys] = []
    for text in texts:
        def say(messages: list[bytes], text: str = text) -> list[bytes]:
            if len(messages) == 1:
                return messages
            body = {"code": "protocol", "message": text}
            forged = raw.tag(sessions[-1].data[raw.DOWN], 2, raw.encode("ERROR", body))
            return [*messages[:4], forged.raw]

        called = attack_controller(say, sessions=sessions)
        assert isinstance(called.error, AchillesError), called
        assert str(called.error).isprintable(), str(called.error)
        bench.count()
