"""PROTOCOL.md held against the code: its tables, its limits, and the session that it shows in hex."""

import hmac
import json
import re
import struct
from pathlib import Path

import pytest
from wire import ABOUT, CLUSTER, LINKS, LONG, SERVER_HELLO, batch, encode, job, plain, read

import achilles
from achilles.protocol import auth, channel, frames, kinds, reader
from achilles.protocol.frames import TELL, Batch, Gone, Kind, Status
from achilles.protocol.kinds import FIELDS, LETTERS, RANGE_FIELDS, RANGES
from achilles.protocol.reader import FrameReader

PROTOCOL = (Path(achilles.__file__).parent / "PROTOCOL.md").read_text(encoding="utf-8")


def section(number):
    (found,) = re.findall(rf"^## {number}\. .*?\n(.*?)(?=^## |\Z)", PROTOCOL, re.M | re.S)
    return found


def table(number, which=0):
    """A table of a section: its rows, without the heading, as lists of cells."""
    tables = re.findall(r"(?:^\|.*\n)+", section(number), re.M)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[which].splitlines()[2:]]


def number_of(text):
    """An integer as the page writes it: 65,536 or 2^32-1."""
    base, _, rest = text.replace(",", "").partition("^")
    return int(base) ** int(rest.partition("-")[0]) - int(rest.partition("-")[2] or 0) if rest else int(base)


def test_the_page_has_its_sections_once_and_in_order():
    assert re.findall(r"^## (\d+)\.", PROTOCOL, re.M) == [str(n) for n in range(1, 11)]
    titles = re.findall(r"^## (\d+\. .*)$", PROTOCOL, re.M)
    (listed,) = re.findall(r"^1\. .* · .*$", PROTOCOL, re.M)
    assert listed.split(" · ") == titles


def test_a_role_that_the_page_does_not_name_is_malformed_and_not_refused():
    roles = [role.encode() for role in re.findall("`(.)`", dict((name, value) for name, _, value in table(2))["role"])]
    for byte in range(256):
        message = auth.claim(bytes([byte]), "ann", bytes(32)) + bytes(auth.PROOF_BYTES)
        if bytes([byte]) in roles:
            assert auth.read_claim(message)[0] in (auth.CONTROLLER, auth.NODE)
        else:
            with pytest.raises(auth.ProtocolError):
                auth.read_claim(message)
    (refused,), (malformed,) = (re.findall(pattern, section(2)) for pattern in (
        r"([^.]*) get the same 32 zero bytes", r"Anything malformed is closed without an answer([^.]*)"))
    assert "role" not in refused and "role byte" in malformed


def test_the_fields_of_a_range_are_the_codes():
    assert [name for name, _ in table(4)] == ["job", *RANGE_FIELDS]
    assert f'"{frames.RANGE.format}", {frames.RANGE.size} B' in section(4)
    documented = {}
    for names, *limits in table(4, 1):
        for name in names.split(", "):
            documented[Kind[name]] = limits
    assert documented.keys() == RANGES.keys()
    for kind, limits in documented.items():
        for name, text, (low, high) in zip(RANGE_FIELDS, limits, RANGES[kind]):
            whole = (0, kinds.U64 if name == "first" else kinds.U32)
            ends = [number_of(end) for end in text.split(" to ")] if text != "any" else whole
            assert (ends[0], ends[-1]) == (low, high), (kind, name)


def test_the_flags_of_the_page_are_the_codes():
    assert "bit 0, *careful*" in section(4) and "Bit 1, *tell*" in section(4)
    (reasons,) = re.findall(r"Flags of RETURNED and GONE.*", section(4))
    named = re.findall(r"(\d) `(\w+)` \((GONE alone|RETURNED alone)?", reasons)
    assert sorted((int(number), name.upper()) for number, name, _ in named) == [(g.value, g.name) for g in Gone]
    alone = {name.upper(): kind for _, name, kind in named if kind}
    for kind in (Kind.RETURNED, Kind.GONE):
        expected = [gone for gone in Gone if alone.get(gone.name, f"{kind.name} alone") == f"{kind.name} alone"]
        assert sorted(kinds.FLAGS[kind]) == expected, kind


def test_the_table_of_kinds_is_the_codes():
    rows = table(5)
    assert [(int(number), name) for number, name, *_ in rows] == [(kind.value, kind.name) for kind in Kind]
    for _, name, body, links, _ in rows:
        kind = Kind[name]
        sent = tuple(link.replace("→", "") for link in links.split())
        assert sorted(sent) == sorted(kinds.DIRECTIONS[kind]), name
        assert body == ("JSON" if kind in FIELDS else "letters" if kind in LETTERS else "range"), name
    drawn = re.findall(r"^ (\w+) ──.* (\w+) ──.* (\w+) ──.* (\w+)$", section(1), re.M)
    assert drawn == [("controller", "server", "node", "worker")]
    assert {letter for link in LINKS for letter in link} == {"C", "S", "N", "W"}


def test_the_table_of_statuses_is_the_codes():
    assert [(int(n), name.upper()) for n, name, _ in table(4, 2)] == [(s.value, s.name) for s in Status]


def test_the_note_of_the_page_is_the_codes():
    text = dict((name, letter) for _, name, letter in table(4, 2))["died"]
    assert set(re.findall(r"`(\w+)`", text)) == {*frames.NOTE, *kinds.PHASES}


def test_what_the_page_says_of_encryption_is_the_codes():
    text = section(2).partition("**Encryption.**")[2]
    assert auth.TLS == b"ACHS" + auth.PLAIN[4:] and '">4sH2x"   "ACHS" version' in text
    assert auth.PLAIN == bytes.fromhex("4143484c00010000") and len(auth.TLS) == struct.calcsize(">4sH2x")
    labels = re.findall(r'Y\("([^"]+)"\)', text)
    assert labels == ["psk", "psk id"]
    prk = hmac.digest(bytes(32), b"K" * 32, "sha256")
    psk, name = (hmac.digest(prk, b"achilles/1 " + label.encode() + b"\1", "sha256") for label in labels)
    assert auth.tls_key("ann", b"K" * 32) == (f"ann:{name[:4].hex()}", psk)
    assert f"{tls_source('HANDSHAKE_BYTES')} KiB of TLS" in dict(table(9))["before authentication"]


def tls_source(name):
    """A constant of tls.py in KiB: a Python before 3.13 can import that module, too."""
    from achilles.protocol import tls

    return getattr(tls, name) >> 10


def test_the_table_of_limits_is_the_codes():
    limits = dict(table(9))
    assert limits["envelope"] == f"{frames.MAX_ENVELOPE_BYTES >> 20} MiB"
    assert limits["declaration of a JOB"] == f"{frames.SHORT_LETTER_BYTES:,} B"
    assert limits["chunks of a batch"] == f"{kinds.MAX_CHUNKS:,}"
    assert limits["short letters of a frame"] == f"{frames.MAX_SHORT_BYTES >> 20} MiB"
    assert limits["long letters of a frame"].startswith(f"{frames.MAX_LONG_BYTES >> 20} MiB together")
    assert limits["letter"].startswith("2^40 B") and frames.LETTER_LIMIT_BYTES == 2**40
    assert limits["before authentication"].startswith(f"{auth.AUTH_BYTES} bytes")
    assert f"at most {frames.SHORT_LETTER_BYTES:,} B is **short**" in section(4)
    assert f"at most {kinds.TEXT_CHARS:,} characters, names and versions {kinds.NAME_CHARS}" in section(6)
    assert f"`pythons`: version → nodes, at most {kinds.MAX_PYTHONS}" in section(6)
    memory = re.findall(r"ours takes (\d+) KiB, after (\d+) KiB of a letter (\d+) MiB", section(9))
    assert memory == [(str(reader.BUFFER_BYTES >> 10), str(reader.DIRECT_BYTES >> 10),
                       str(reader.LETTER_STEP_BYTES >> 20))]


def test_the_heartbeats_of_the_page_are_the_codes():
    silence = dict(table(9))["silence"]
    assert silence.startswith(f"PING after {channel.HEARTBEAT_SECONDS:.0f} s")
    assert f"no byte for {channel.SILENCE_SECONDS:.0f} s" in silence
    assert f"less than {channel.TRICKLE_BYTES:,} B in that time" in silence
    (goodbye,) = re.findall(r"reads until end of file or (\w+) seconds", section(7))
    assert (goodbye, channel.GOODBYE_SECONDS) == ("two", 2.0)


def test_the_table_of_fields_is_the_codes():
    documented = {}
    for name, text in table(6):
        pattern = r"`(reason|code|message)`()" if name in ("BYE", "ERROR") else r"`(\w+)`(\?)?"
        documented[name] = dict(re.findall(pattern, text))
    expected = {kind.name: {name: "" if field.required else "?" for name, field in FIELDS[kind].items()}
                for kind in FIELDS}
    expected["HELLO, client"] = expected.pop("HELLO")
    expected["HELLO, server"] = dict.fromkeys(kinds.SERVER_FIELDS[Kind.HELLO], "")
    assert not expected.pop("STATUS")
    expected["STATUS, answer"] = dict.fromkeys(kinds.SERVER_FIELDS[Kind.STATUS], "")
    declared = documented.pop("declaration of a JOB")
    assert documented == expected
    options = dict(re.findall(r"`(\w+)`(\?)?", section(6).rpartition("The options of a job:")[2]))
    fields_of_a_job = {name: "" if field.required else "?" for name, field in kinds.DECLARATION.items()}
    assert declared | options == fields_of_a_job
    status = dict(re.findall(r"^- (?:each|the) (\w+): (.*)$", section(6), re.M))
    answer = kinds.SERVER_FIELDS[Kind.STATUS]
    for name, state in (("node", answer["nodes"]), ("job", answer["jobs"]), ("server", answer["server"]),
                        ("chunk", FIELDS[Kind.PING]["chunks"])):
        marks = {name: "" if field.required else "?" for name, field in state.inside.items()}
        assert dict(re.findall(r"`(\w+)`(\??)", status[name])) == marks


def test_the_few_texts_of_the_page_are_the_codes():
    cells = dict(table(6))
    assert "|".join(re.findall(r"`(\w+)`", cells["BYE"])[1:]) == FIELDS[Kind.BYE]["reason"].form
    ways = section(6).rpartition("`call`?")[2].partition("`seed`")[0]
    assert tuple(re.findall(r'"(\w+)"', ways)) == kinds.CALLS


def pieces_of_the_session():
    """Section 10: the title of each message and its bytes, a frame's as head, envelope, tag and letters."""
    example = re.findall(r"```\n(.*?)```", section(10), re.S)[1]
    for title, body in re.findall(r"^(\S.*)\n((?:  .*\n)+)", example, re.M):
        parts = re.split(r"^  (?:head|envelope|tag|letters) +", body, flags=re.M)
        yield title, [b"".join(map(bytes_of, part.splitlines())) for part in parts if part.strip()]


def bytes_of(line):
    if line.strip().startswith("{"):
        return line.strip().encode()
    return LONG if line.strip() == "00..ff x 5" else bytes.fromhex("".join(line.split()))


def test_the_session_of_section_10_is_one():
    (_, (m1,)), (_, (m2,)), (_, (m3,)), *messages = pieces_of_the_session()
    assert m1[:8] == auth.PLAIN
    assert auth.read_claim(m2) == (auth.CONTROLLER, b"ann")
    shown = dict(re.findall(r"^(K|key \S+) +([0-9a-f]{64})$", section(10), re.M))
    assert auth.derive_key("ann", "correct horse battery staple").hex() == shown["K"]
    keys = auth.accept_claim([bytes.fromhex(shown["K"])], m1, m2)
    assert keys is not None
    auth.check_answer(keys, m3)
    assert (keys.client_data.hex(), keys.server_data.hex()) == (shown["key client→server"], shown["key server→client"])

    readers = {"C→S": FrameReader("CS", auth.Tagger(keys.client_data).check),
               "S→C": FrameReader("SC", auth.Tagger(keys.server_data).check)}
    said, numbers = [], {"C→S": 0, "S→C": 0}
    for title, parts in messages:
        way, name, number = re.match(r"(C→S|S→C) (\w+) seq (\d+)", title).groups()
        (frame,) = read(readers[way], [b"".join(parts)])
        assert (frame.kind.name, numbers[way]) == (name, int(number))
        assert encode(*frame)[:2] == (parts[0], parts[1])
        numbers[way] += 1
        said.append((way, frame.kind, frame.body))

    declaration = {"context": "00112233445566778899aabbccddeeff", "initializer": False, "timeout": 2.5}
    expected = [
        ("C→S", Kind.HELLO, ABOUT | {"cpu_count": 0, "pid": 4711}),
        ("S→C", Kind.HELLO, SERVER_HELLO),
        ("S→C", Kind.CLUSTER, CLUSTER),
        ("C→S", Kind.JOB, job(1, json.dumps(declaration, separators=(",", ":")).encode(), b"a function")),
        ("C→S", Kind.TASK, batch(0, b"hello", LONG, job=1, attempt=1, number=5000, flags=TELL)),
        ("S→C", Kind.GIVEN, Batch(1, 0, 2, 1, 8)),
        ("S→C", Kind.RESULT, batch(0, b"HELLO", b"no", job=1, attempt=1, number=4200,
                                   statuses=bytes([Status.VALUES, Status.RAISED]))),
        ("C→S", Kind.END, Batch(1)),
        ("C→S", Kind.BYE, {"reason": "leaving"}),
    ]
    assert [(way, *plain(kind, body)) for way, kind, body in said] == [
        (way, *plain(kind, body)) for way, kind, body in expected
    ]
