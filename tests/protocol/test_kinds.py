"""The numbers on the wire, and tables that fit each other."""

from wire import LINKS

from achilles.protocol import auth, frames, kinds
from achilles.protocol.frames import HEAD, RANGE, Gone, Kind, Status


def test_every_number_on_the_wire_is_pinned():
    """A peer of another release reads these numbers: one that changes needs a new version in the handshake."""
    assert [(kind.name, kind.value) for kind in Kind] == list(zip(
        ("HELLO BYE PING ERROR CLUSTER JOB TASK GIVEN RESULT RETURNED GONE CANCEL END CLOSE STATUS KILL "
         "OUTPUT IDLE").split(),
        range(1, 19)))
    assert [(status.name, status.value) for status in Status] == list(zip(
        "VALUES RAISED DIED TIMEOUT ALTERED FAILED".split(), range(6)))
    assert [(gone.name, gone.value) for gone in Gone] == list(zip("RETURNED LEFT LOST WAITED".split(), range(4)))
    assert (kinds.CAREFUL, kinds.TELL, kinds.MORE) == (1, 2, 1)
    assert (frames.SHORT_LETTER_BYTES, frames.TAG_BYTES, frames.DIGEST_BYTES, frames.LENGTH_BYTES) == (1024, 32, 32, 8)
    assert (HEAD.format, HEAD.size) == (">BBHI", 8)
    assert (RANGE.format, RANGE.size) == (">IQIII", 24)
    assert (auth.VERSION, auth.MAGIC, auth.CONTROLLER, auth.NODE) == (1, b"ACHL", b"C", b"N")


def test_the_texts_that_are_few_are_pinned():
    assert kinds.FIELDS[Kind.BYE]["reason"].form == "leaving|restart|killed"
    assert kinds.CALLS == ("one", "star", "apply")
    assert kinds.PHASES == ("function", "load", "call", "dump")


def test_every_kind_has_a_direction_and_one_layout():
    assert kinds.DIRECTIONS.keys() == set(Kind)
    assert {link for links in kinds.DIRECTIONS.values() for link in links} == set(LINKS)
    assert kinds.FIELDS.keys() | kinds.RANGES.keys() == set(Kind)
    assert not kinds.FIELDS.keys() & kinds.RANGES.keys()
    assert kinds.LETTERS < kinds.RANGES.keys()
    assert kinds.FLAGS.keys() < kinds.RANGES.keys()


def test_every_limit_of_a_range_can_be_written():
    for limits in kinds.RANGES.values():
        assert len(limits) == len(kinds.RANGE_FIELDS)
        for end in zip(*limits):
            RANGE.pack(0, *end)


def test_a_server_says_the_same_kinds():
    assert kinds.SERVER_FIELDS.keys() == kinds.FIELDS.keys()
    for kind, fields in kinds.SERVER_FIELDS.items():
        assert fields is kinds.FIELDS[kind] or {"CS", "SC"} <= set(kinds.DIRECTIONS[kind])
