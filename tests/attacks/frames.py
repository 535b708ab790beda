"""Attacks on what travels: bytes, frames, ends, lengths.

Each backs the page's "alter, replay, reorder, reflect or insert a frame" of who sits on the path, which nobody
can who does not know the secret.
"""

from __future__ import annotations

import os
import queue
import socket
from collections.abc import Sequence
from typing import Any

from conftest import ENCRYPT, wait_until
from faults.work import Work

from achilles.errors import AchillesError

from . import raw
from .bench import Bench, attack
from .raw import Chunk
from .victims import FUNCTION, LONG, NodeVictim, attack_controller, attack_server, first_difference, job

WAYS = ("flipped", "duplicated", "dropped", "swapped", "sent in the other direction")
Case = tuple[int, str, int]  # a place, what is done there, and with what


def altered(stream: bytes, place: int, what: str, extra: int) -> bytes:
    """The stream with one byte so treated."""
    before, byte, after = stream[:place], stream[place : place + 1], stream[place + 1 :]
    if what == "flipped":
        return before + bytes([byte[0] ^ 1 << extra % 8]) + after
    if what == "duplicated":
        return before + byte + byte + after
    if what == "dropped":
        return before + after
    if what == "swapped":
        return before + after[:1] + byte + after[1:]
    return before + bytes([extra]) + byte + after  # a byte of the other direction comes in its place


def cases(bench: Bench, size: int, number: int) -> Sequence[Case]:
    """Each way at each place; or about `number` of them."""
    every = [(place, what, bench.rng.randrange(256)) for place in range(size) for what in WAYS]
    return bench.some(every, number)


@attack("path", "each byte to the server flipped, duplicated, dropped, swapped, sent the other way")
def bytes_to_server(bench: Bench) -> None:
    """A controller's session, one byte altered: what it touches and what follows is neither done nor answered.

    The connection ends without a word; an ERROR comes only for a head that claims what is over the limit, which is
    said before its tag can be. Of a long letter the server says nothing: who opens it looks (`letters.py`).
    """
    cluster = bench.cluster()
    honest = attack_server(cluster.port, lambda messages, _: b"".join(messages), patience=2.0)
    assert honest is not None and honest[0][:2] == (True, 4) and not honest[0].errors, honest
    lengths: list[int] = []
    attack_server(cluster.port, lambda messages, _: lengths.extend(map(len, messages)))  # type: ignore[func-returns-value]
    letter_end = sum(lengths[:6])
    letter = range(letter_end - len(LONG), letter_end)
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]

    def work(case: Case) -> bool:
        place, what, extra = case

        def change(messages: list[bytes], heard: list[bytes]) -> bytes | None:
            stream = b"".join(messages)
            sent = altered(stream, place, what, heard[0][8 + extra % 32] if "other" in what else extra)
            at = first_difference(stream, sent)
            in_letter = at in letter and len(sent) == len(stream)
            return None if at == len(stream) or sent == stream or in_letter else sent

        told = attack_server(cluster.port, change)
        if told is None:
            return False
        heard, asked, at = told
        assert heard.statuses <= asked, f"{heard.statuses} answers to {asked} honest questions"
        assert heard.welcomed or not heard.statuses
        if at < ends[0]:
            assert not heard.welcomed and heard.rest in (0, raw.PROOF_BYTES), heard
        elif what in ("flipped", "swapped"):
            start = max(end for end in ends if end <= at)
            assert not heard.errors or at < start + 8, f"an answer to what has no good tag: {heard.errors}"
        return True

    bench.each(work, cases(bench, sum(lengths), 150), threads=40)
    cluster.check_alive()


@attack("path", "each byte to a caller flipped, duplicated, dropped, swapped, sent the other way")
def bytes_to_controller(bench: Bench) -> None:
    """A server's session with `map`, one byte altered: the call raises, and never returns, right or wrong."""
    lengths: list[int] = []

    def keep(messages: list[bytes]) -> list[bytes]:
        lengths[:] = map(len, messages)
        return messages

    honest = attack_controller(keep)
    assert honest.value == [[1, 2, 3]] and honest.error is None, honest
    size = sum(lengths)

    def work(case: Case) -> bool:
        place, what, extra = case
        skipped = False

        def change(messages: list[bytes]) -> list[bytes]:
            nonlocal skipped
            at = 0
            arriving = list(messages)
            for number, message in enumerate(messages):
                if at <= place < at + len(message):
                    arriving[number] = altered(message, place - at, what, extra)
                    later = messages[number + 1 :] + [b"\0"]
                    same = first_difference(message + b"".join(later), arriving[number] + b"".join(later))
                    skipped = len(messages) > 1 and at + same >= size
                at += len(message)
            if len(messages) > 1 and arriving == messages:
                skipped = True
            return arriving

        called = attack_controller(change)
        assert skipped or called.error is not None, f"the call returned {called.value}"
        assert skipped or isinstance(called.error, AchillesError), repr(called.error)
        return not skipped

    bench.each(work, cases(bench, size, 100), threads=6)


@attack("path", "each byte to a node flipped, duplicated, dropped, swapped, sent the other way")
def bytes_to_node(bench: Bench) -> None:
    """A server's session with a real node, one byte altered: nothing is run, nothing is answered, and it comes back.

    Each byte once, in one of the five ways, since a node takes its time to come back. The code that reads is the
    caller's, to which all five are done at each byte (`bytes_to_controller`).
    """
    cluster = bench.cluster()
    victims: queue.SimpleQueue[NodeVictim] = queue.SimpleQueue()
    sizes: list[int] = []
    threads = 1 if bench.short else 4
    for _ in range(threads):
        victim = bench.enter(NodeVictim(cluster, bench._folder("node")))
        victim.check_honest()
        victim.attack(lambda messages: sizes.append(sum(map(len, messages))) or messages)  # type: ignore[func-returns-value]
        victim.runs += 1
        victims.put(victim)

    def work(case: Case) -> bool:
        victim = victims.get()
        tried = attack_node(victim, case)
        victims.put(victim)
        return tried

    def attack_node(victim: NodeVictim, case: Case) -> bool:
        place, what, extra = case
        early, changed = False, True
        letter = range(0)

        def change(messages: list[bytes]) -> list[bytes]:
            nonlocal early, changed
            nonlocal letter
            at, arriving = 0, list(messages)
            for number, message in enumerate(messages):
                if at <= place < at + len(message):
                    arriving[number] = altered(message, place - at, what, extra)
                    early = number < 5
                at += len(message)
                letter = range(at - len(LONG), at) if number == 4 else letter
            whole, sent = b"".join(messages), b"".join(arriving)
            differs = first_difference(whole, sent)
            in_letter = differs in letter and len(whole) == len(sent)  # which is altered anyway
            changed = len(messages) == 1 or (differs < len(whole) and not in_letter)
            return arriving if changed else messages

        said = victim.attack(change)
        if not changed:
            victim.runs = sum(victim.oracle.counts().values())
            return False
        assert {frame.kind for frame in said} <= {"HELLO", "ERROR", "PING", "RETURNED"}, [frame.kind for frame in said]
        victim.check_idle()
        if early:  # it waits longer and longer for a server that does not greet it
            victim.check_honest()
        return True

    turns = [(place, bench.rng.choice(WAYS), bench.rng.randrange(256)) for place in range(max(sizes))]
    bench.each(work, bench.some(turns, 10), threads=threads)
    for _ in range(threads):
        victims.get().check_honest()


@attack("path", "a frame of the server's sent back to it")
def reflected_frames(bench: Bench) -> None:
    """Each direction has a key of its own: what one end said is no frame that it accepts.

    The frame stands where its number is right, so that nothing but the key can tell.
    """
    cluster = bench.cluster()

    def work(way: int) -> None:
        with cluster.join() as link:
            own = link.sequence[raw.UP]
            link.send("STATUS")
            sent = [link.wait_for("STATUS")]
            # The server's frame of the number that the server expects next, as it would be if keys were shared.
            body = sent[0].envelope if way else b"{}"
            forged = raw.encode("STATUS", body)
            link.sock.sendall(raw.tag(link.keys.data[raw.DOWN], own + 1, forged).raw)
            after = link.rest()
            assert not [frame for frame in after if frame.kind in ("STATUS", "ERROR")], after

    bench.each(work, [0, 1] * (2 if bench.short else 10))

    def victim(place: int) -> None:
        sessions: list[raw.Keys] = []

        def reflect(messages: list[bytes]) -> list[bytes]:
            if len(messages) == 1:
                return messages
            head, envelope = messages[place][:8], messages[place][8:-raw.TAG_BYTES]
            forged = raw.Frame("", head, envelope, b"", b"")
            return [*messages[:place], raw.tag(sessions[0].data[raw.UP], place - 2, forged).raw, *messages[place + 1 :]]

        called = attack_controller(reflect, sessions=sessions)
        assert isinstance(called.error, AchillesError), called

    bench.each(victim, range(2, 6))
    cluster.check_alive()


@attack("path", "a frame replayed, at once or later")
def replayed_frames(bench: Bench) -> None:
    """A frame has one number, its tag holds for it alone: repeated, it ends the connection, and is not carried out."""
    cluster = bench.cluster()

    def to_server(case: tuple[int, int]) -> None:
        place, again = case

        def change(messages: list[bytes], _: list[bytes]) -> bytes:
            return b"".join([*messages[:place], messages[again], *messages[place:]])

        told = attack_server(cluster.port, change)
        assert told is not None and told[0].statuses <= told[1] and not told[0].errors, told

    every = [(place, again) for place in range(2, 10) for again in range(1, place)]
    bench.each(to_server, bench.some(every, 12), threads=12)

    def to_caller(case: tuple[int, int]) -> None:
        place, again = case
        called = attack_controller(
            lambda m: m if len(m) == 1 else [*m[:place], m[again] + m[place], *m[place + 1 :]])
        assert isinstance(called.error, AchillesError), called

    bench.each(to_caller, [(place, again) for place in range(3, 6) for again in range(2, place)])
    cluster.check_alive()


@attack("path", "frames exchanged, left out")
def reordered_frames(bench: Bench) -> None:
    """Two neighbours change places, or one is missing: from there on nothing is carried out."""
    cluster = bench.cluster()

    def work(case: tuple[int, bool]) -> None:
        place, left_out = case

        def change(messages: list[bytes], _: list[bytes]) -> bytes:
            changed = list(messages)
            if left_out:
                del changed[place]
            else:
                changed[place : place + 2] = changed[place : place + 2][::-1]
            return b"".join(changed)

        told = attack_server(cluster.port, change)
        assert told is not None and told[0].statuses <= told[1] and not told[0].errors, told

    bench.each(work, [(place, left_out) for place in range(1, 8) for left_out in (False, True)])

    def victim(case: tuple[int, bool]) -> None:
        place, left_out = case

        def change(m: list[bytes]) -> list[bytes]:
            if len(m) == 1:
                return m
            return [*m[:place], *((b"",) if left_out else (m[place + 1], m[place])), *m[place + (2 - left_out) :]]

        assert isinstance(attack_controller(change).error, AchillesError)

    bench.each(victim, [(2, False), (3, False), (4, False), (2, True), (3, True), (4, True)])
    cluster.check_alive()


@attack("path", "a session relayed, then a frame injected")
def relay_then_inject(bench: Bench) -> None:
    """Who passes the handshake on may watch, but has no key: what it inserts ends the connection, with no effect.

    A caller and a node are relayed; each call still has the right result, over its next connection.
    """
    cluster = bench.cluster(1)
    forged = [raw.encode("KILL"), raw.encode("STATUS"), raw.encode("BYE", {"reason": "killed"}),
              raw.encode("CANCEL", job=1, count=6), raw.encode("END", job=1)]
    places = [(way, place, n) for way in (raw.UP, raw.DOWN) for place in range(3) for n in range(len(forged))]
    for way, place, number in bench.some(places, 6):
        def tamper(pair: raw.Pair, at: int, count: int, frame: raw.Frame, inject: tuple[int, int, int] = (
                way, place, number)) -> bytes:
            if pair.number or (at, count) != inject[:2]:
                return frame.raw
            mac = (bytes(32), os.urandom(32), frame.tag)[count % 3]
            return forged[inject[2]]._replace(tag=mac).raw + frame.raw

        oracle = bench.oracle()
        middle = bench.middle(cluster.port, tamper)
        call = bench.call(cluster, "map", Work(oracle.path), range(6), port=middle.port)
        try:
            oracle.check(call.result(30), 6, repeats=6)
            assert len(middle.pairs) >= 2, "the connection went on"
        except AchillesError as e:  # that is told at once where the server has not said its first word yet
            assert "ended the connection at once" in str(e), e
        bench.count()
    cluster.check_alive()


@attack("path", "end of file exactly between two frames, with and without BYE")
def end_at_a_boundary(bench: Bench) -> None:
    """A cut that breaks no frame is an error all the same: never a result that is short.

    `map` raises; `imap` and `imap_unordered` give the whole packet that came, and then raise.
    """
    session: dict[str, Any] = {"answers": ((1,), (2,), (3,)), "workers": 2}
    first = 7  # of the messages: with these the first packet, of two answers, is there
    for way in ("map", "imap", "imap_unordered"):
        for goodbye in (None, "leaving", "restart"):
            honest = attack_controller(lambda m: m, way, goodbye=goodbye, **session)
            assert honest.error is None and len(honest.value) == 2, honest

            def work(place: int, way: str = way, goodbye: str | None = goodbye) -> None:
                def change(messages: list[bytes]) -> list[bytes]:
                    if len(messages) == 1:
                        return messages if place else [b""]
                    return messages[:place] + [b""] * (len(messages) - place - bool(goodbye)) + (
                        messages[-1:] if goodbye and place > 1 else [])

                whole = [{"ARGS_COUNTER": 0, "RESULT": [1, 2]}] if way != "map" and place >= first else []
                called = attack_controller(change, way, goodbye=goodbye, taken=len(whole), **session)
                assert isinstance(called.error, AchillesError), called
                assert called.value == whole, called

            bench.each(work, range(0 if goodbye is None else 2, 8), threads=4)


@attack("node", "a node ends its connection exactly between two frames")
def node_ends_at_a_boundary(bench: Bench) -> None:
    """Its unanswered chunks are told to their caller as gone, which sends them again: one answer of each."""
    cluster = bench.cluster()
    for answered in range(3):
        with cluster.join(b"N", 3) as leaver, cluster.join() as caller:
            caller.send("JOB", chunks=job(FUNCTION), job=1)
            caller.send("TASK", chunks=[Chunk(n, letter=b"s%d" % n) for n in range(3)], job=1)
            frame = leaver.wait_for("TASK")
            for chunk in frame.chunks[:answered]:
                leaver.send("RESULT", chunks=[chunk._replace(letter=b"one" + chunk.letter)], job=frame.job)
            leaver.close()
            results: dict[int, bytes] = {}
            gone: list[int] = []
            while len(results) + len(gone) < 3:
                told = caller.wait_for("RESULT", "GONE")
                gone += [chunk.number for chunk in told.chunks if told.kind == "GONE"]
                results |= {chunk.number: chunk.letter for chunk in told.chunks if told.kind == "RESULT"}
            assert gone == list(range(answered, 3)) and len(results) == answered, (gone, results)
            with cluster.join(b"N", 3) as heir:
                caller.send("TASK", chunks=[Chunk(n, 1, letter=b"s%d" % n) for n in gone], job=1)
                frame = heir.wait_for("TASK")
                chunks = [chunk._replace(letter=b"two" + chunk.letter) for chunk in frame.chunks]
                heir.send("RESULT", chunks=chunks, job=frame.job)
                results |= {chunk.number: chunk.letter for chunk in caller.wait_for("RESULT").chunks}
        assert results == {n: (b"one" if n < answered else b"two") + b"s%d" % n for n in range(3)}, results
        bench.count()


@attack("path", "length fields of 2^32-1 and 2^64-1")
def lengths(bench: Bench) -> None:
    """In the head of a frame, without the key; in a batch, with it: refused before memory is taken (under 10 MiB).

    An envelope or a letter that is within its limit takes memory as its bytes arrive alone.
    """
    cluster = bench.cluster()
    for _ in range(3):  # what the first connections take belongs to no attack
        cluster.check_alive()
    grown = bench.growth(cluster.server.pid)
    number = 8 if bench.short else 40
    most = (14 if ENCRYPT else 10) << 20  # TLS has buffers of its own

    def work(n: int) -> None:
        with cluster.join(b"NC"[n % 2 : n % 2 + 1], 1) as link:
            kind = bytes([raw.KINDS["RESULT" if n % 2 == 0 else "TASK"]])
            if n % 4 < 2:  # no key needed
                link.sock.sendall(kind + b"\0\0\0" + b"\xff" * 4 + os.urandom(100))
            else:
                frame = raw.encode("RESULT" if n % 2 == 0 else "TASK", chunks=[Chunk(0)], job=1)
                envelope = frame.envelope[:-8] + b"\xff" * 8 + bytes(32)
                if n % 8 >= 4:  # so many chunks, none of which are there
                    envelope = frame.envelope[:12] + b"\xff" * 4 + frame.envelope[16:]
                frame = frame._replace(head=frame.head[:4] + len(envelope).to_bytes(4, "big"), envelope=envelope)
                link.sock.sendall(raw.tag(link.keys.data[raw.UP], link.sequence[raw.UP], frame).raw + bytes(100))
            after = link.rest()
            assert [f.kind for f in after if f.kind not in ("CLUSTER", "PING")] == ["ERROR"], after
        assert grown() < most, f"{grown():,} bytes more"

    bench.each(work, range(number), threads=4)
    links = [cluster.join(b"C") for _ in range(8)]
    try:
        for link in links[:4]:  # 4 MiB are announced, few come
            link.sock.sendall(bytes([raw.KINDS["TASK"]]) + b"\0\0\0" + (4 << 20).to_bytes(4, "big") + bytes(1000))
        for n, link in enumerate(links[4:]):  # a letter of 512 MiB or a TiB, in an envelope that is as it must be
            frame = raw.encode("JOB", chunks=job(b""), job=1)
            at = raw.RANGE_BYTES + 8  # of the function's length
            length = (512 << 20, 1 << 40)[n % 2].to_bytes(8, "big")
            envelope = frame.envelope[:at] + length + bytes(32) + frame.envelope[at + 8 :]
            frame = frame._replace(head=frame.head[:4] + len(envelope).to_bytes(4, "big"), envelope=envelope)
            link.sock.sendall(raw.tag(link.keys.data[raw.UP], link.sequence[raw.UP], frame).raw + bytes(1000))
        cluster.check_alive()
        wait_until(lambda: grown() < most, lambda: f"little memory, but {grown():,} bytes")
        for link in links:  # it was waiting for the rest of each
            link.sock.shutdown(socket.SHUT_WR)
            assert "ERROR" not in {frame.kind for frame in link.rest()}
    finally:
        for link in links:
            link.close()
    bench.count(len(links))
