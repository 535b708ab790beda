"""The vocabulary of a link: kinds, directions, statuses, flags, ranges, and the fields of every JSON with their check.

PROTOCOL.md, sections 4 to 6, has the same tables. `frames.py` applies them. Every JSON of a peer passes `read_object`:
the envelopes of the JSON kinds, the declaration of a JOB (`frames.py`), and the notes on lost chunks
(`controller/job.py`). A text that has passed may go to a terminal, a log or an exception as it is.

::

    bytes ─▶ JSON ─▶ each text, keys too, at any depth, known or not: printable; each number: finite
                 ─▶ each field of the table: type, range or length, form; the same for the fields inside

The check refuses control characters (C0, DEL, C1), direction marks and other invisible characters, line separators,
surrogates, NaN and infinities. The ProtocolError names fields of the tables, and has no text of the peer. The module
knows no frame and no socket. Any thread may call the functions.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import ProtocolError

__all__ = [
    "CALLS", "CAREFUL", "DECLARATION", "DIRECTIONS", "FIELDS", "FLAGS", "HEX_FORM", "LETTERS", "MAX_CHUNKS",
    "MAX_PYTHONS", "MORE", "NAME_CHARS", "NOTE", "PHASES", "RANGES", "RANGE_FIELDS", "SERVER_FIELDS", "TELL",
    "TEXT_CHARS", "U16", "U32", "U64", "Field", "Gone", "Kind", "Status", "check_fields", "read_object",
]

TEXT_CHARS = 4096  # the longest text in a field: two screens
NAME_CHARS = 64  # versions, codes, reasons, addresses
HEX_FORM = "[0-9a-f]*"  # lower case alone: equal digests are equal texts
U16, U32, U64 = 2**16 - 1, 2**32 - 1, 2**64 - 1
MAX_CHUNKS = 1 << 16  # in a batch: the quickest chunks of 50 ms
MAX_PYTHONS = 64  # versions in a CLUSTER; an error message lists them
# Flags of a TASK. CAREFUL: the worker names each argument, since an argument may kill it. TELL: the server says GIVEN
# when it gives the batch to a node.
CAREFUL, TELL = 0x01, 0x02
MORE = 0x01  # flag of an OUTPUT: it counts lines that were left out
# A frame's kind is a byte in the head. A chunk's status is a byte in a RESULT.
Kind = enum.IntEnum("Kind", {
    "HELLO": 1, "BYE": 2, "PING": 3, "ERROR": 4, "CLUSTER": 5, "JOB": 6, "TASK": 7, "GIVEN": 8,
    "RESULT": 9, "RETURNED": 10, "GONE": 11, "CANCEL": 12, "END": 13, "CLOSE": 14, "STATUS": 15, "KILL": 16,
    "OUTPUT": 17, "IDLE": 18,
})
Status = enum.IntEnum("Status", {"VALUES": 0, "RAISED": 1, "DIED": 2, "TIMEOUT": 3, "ALTERED": 4, "FAILED": 5})

# The reasons why chunks leave a node without an answer: the flags of RETURNED and GONE.
Gone = enum.IntEnum("Gone", {
    "RETURNED": 0,  # their worker was late, or died of another chunk, or they were cancelled
    "LEFT": 1,  # the node drains
    "LOST": 2,  # the node's connection was lost when they may have run
    "WAITED": 3,  # they waited in the node's queue for too long
})
# The links on which a kind may travel. "CS" is a controller that speaks to its server, "WN" a worker to its node.
_TCP, _DOWN = ("CS", "NS", "SC", "SN"), ("CS", "SN", "NW")
DIRECTIONS: dict[Kind, tuple[str, ...]] = {
    Kind.HELLO: _TCP, Kind.BYE: _TCP, Kind.PING: _TCP, Kind.ERROR: _TCP, Kind.CLUSTER: ("SC",),
    Kind.JOB: _DOWN, Kind.TASK: _DOWN, Kind.GIVEN: ("SC",), Kind.RESULT: ("WN", "NS", "SC"), Kind.RETURNED: ("NS",),
    Kind.GONE: ("SC",), Kind.CANCEL: ("CS", "SN"), Kind.END: _DOWN, Kind.CLOSE: ("SN", "NW"),
    Kind.STATUS: ("CS", "SC"), Kind.KILL: ("CS",), Kind.OUTPUT: ("WN", "NS", "SC"),
    Kind.IDLE: ("WN",),
}
# The kinds with a Batch: the least and the greatest value of each field of its range but the job.
RANGE_FIELDS = ("first", "count", "attempt", "number")
_ZERO, _ANY_U32, _CHUNKS, _CHUNK_NUMBER = (0, 0), (0, U32), (1, MAX_CHUNKS), (0, U64)
RANGES: dict[Kind, tuple[tuple[int, int], ...]] = {
    Kind.JOB: (_ZERO, (2, 4), _ZERO, _ZERO),
    Kind.TASK: (_CHUNK_NUMBER, _CHUNKS, _ANY_U32, _ANY_U32),
    Kind.GIVEN: (_CHUNK_NUMBER, _CHUNKS, _ANY_U32, (1, U16)),
    Kind.RESULT: (_CHUNK_NUMBER, _CHUNKS, _ANY_U32, _ANY_U32),
    Kind.RETURNED: (_CHUNK_NUMBER, _CHUNKS, _ANY_U32, _ZERO),
    Kind.GONE: (_CHUNK_NUMBER, _CHUNKS, _ANY_U32, _ZERO),
    Kind.CANCEL: (_CHUNK_NUMBER, (1, U32), _ZERO, _ZERO),
    Kind.END: (_ZERO, _ZERO, _ZERO, _ZERO),
    Kind.OUTPUT: (_CHUNK_NUMBER, (1, 1), _ANY_U32, _ANY_U32), Kind.IDLE: (_ZERO, _ZERO, _ZERO, _ZERO),
}
LETTERS = frozenset({Kind.JOB, Kind.TASK, Kind.RESULT, Kind.OUTPUT})  # the others are bare ranges
# The flags of kinds; every other kind has none.
FLAGS: dict[Kind, tuple[int, ...]] = {
    Kind.TASK: (0, CAREFUL, TELL, CAREFUL | TELL), Kind.RETURNED: (Gone.RETURNED, Gone.LEFT, Gone.WAITED),
    Kind.GONE: (Gone.RETURNED, Gone.LEFT, Gone.LOST), Kind.OUTPUT: (0, MORE),
}


class Field(NamedTuple):
    """The limits of a field.

    :ivar type: a bool fits the type bool alone.
    :ivar low, high: the range of a number, of a text's length, or of the count of entries.
    :ivar required: whether the field must be there; else it may be absent or null.
    :ivar form: a regular expression that matches a whole text, or each key of an object.
    :ivar inside: the fields of an object, or of each object in a list.
    :ivar entry: each value of an object with keys that the peer chooses; `form` bounds the keys.
    """

    type: type[Any] | tuple[type[Any], ...]
    low: float = 0
    high: float = U32
    required: bool = True
    form: str = ""
    inside: Mapping[str, Field] | None = None
    entry: Field | None = None


PYTHON_FORM = r"[0-9]{1,31}\.[0-9]{1,31}t?"  # "3.14"; "3.14t" is a free-threaded build; NAME_CHARS at most
CALLS = ("one", "star", "apply")  # the ways to call a job's function
PHASES = ("function", "load", "call", "dump")  # of a worker
_U16, _U32, _U64, _SECONDS = Field(int, 0, U16), Field(int), Field(int, 0, U64), Field((int, float), 0, U64)
_NAME, _PYTHON = Field(str, 1, NAME_CHARS), Field(str, 1, NAME_CHARS, form=PYTHON_FORM)
_TEXT, _CONTEXT = Field(str, 0, TEXT_CHARS), Field(str, 32, 32, form=HEX_FORM)
# The first letter of a JOB.
DECLARATION: dict[str, Field] = {
    "context": _CONTEXT, "initializer": Field(bool), "sources": _CONTEXT._replace(required=False),
    "timeout": Field((int, float), 1e-9, float(U32), False), "maxtasksperchild": Field(int, 1, U32, False),
    "seed": Field(str, 64, 64, False, form=HEX_FORM), "call": _NAME._replace(required=False, form="|".join(CALLS)),
    "output": Field(bool, required=False),
}
# The letter of a chunk with the status DIED or TIMEOUT.
NOTE: dict[str, Field] = {
    "offset": Field(int, -1, U32), "phase": _NAME._replace(form="|".join(PHASES)),
    "node": Field(int, required=False), "pid": Field(int, required=False), "exitcode": Field(int, -U32, U32, False),
}
# The JSON kinds of clients. Fields that are not here are ignored.
FIELDS: dict[Kind, dict[str, Field]] = {
    Kind.HELLO: {"python": _PYTHON, "version": _NAME, "cpu_count": _U16, "pid": _U32},
    Kind.BYE: {"reason": _NAME._replace(form="leaving|restart|killed")},
    # A node's long-running chunks. A server adds to the seconds, and the sum must fit into a STATUS.
    Kind.PING: {
        "chunks": Field(list, 0, U16, False, inside={"job": _U32, "seconds": Field((int, float)), "pid": _U32}),
    },
    Kind.ERROR: {"code": _NAME, "message": _TEXT},
    Kind.CLUSTER: {
        "nodes": _U32, "workers": _U32, "largest": _U16,
        "pythons": Field(dict, 0, MAX_PYTHONS, form=PYTHON_FORM, entry=_U32),
    },
    Kind.CLOSE: {"context": _CONTEXT},
    Kind.STATUS: {},
    Kind.KILL: {},
}
# The JSON kinds of servers.
SERVER_FIELDS: dict[Kind, dict[str, Field]] = FIELDS | {
    Kind.HELLO: {"python": _PYTHON, "version": _NAME, "client_id": _U32, "connections": _U32},
    Kind.STATUS: {
        "nodes": Field(list, inside={
            "id": _U32, "address": _NAME, "python": _PYTHON, "version": _NAME, "cpu_count": _U16,
            "busy": _U16, "done": _U64, "since": _SECONDS,
        }),
        "jobs": Field(list, inside={
            "id": _U32, "user": _TEXT, "queued": _U64, "running": _U64, "done": _U64,
            "longest": _SECONDS._replace(required=False), "node": _U32._replace(required=False),
            "pid": _U32._replace(required=False),
        }),
        "server": Field(dict, inside={
            "version": _NAME, "uptime": _SECONDS, "memory": _U64._replace(required=False),
        }),
    },
}

_SHOW = json.JSONEncoder(ensure_ascii=False, allow_nan=False)  # Python reads NaN and 1e999, but they are no JSON


def read_object(what: str, text: bytes, fields: Mapping[str, Field]) -> dict[str, Any]:
    """Return the JSON object of a text, with unknown keys.

    :param what: the name of the object in error messages.
    :raises ProtocolError: `text` is no JSON object, or has an unprintable text, or a known field that does not fit.
    """
    try:
        body = json.loads(text.decode())
        shown = _SHOW.encode(body)
    except (ValueError, RecursionError) as e:
        raise ProtocolError(f"{what} is not JSON: {type(e).__name__}") from None
    # `shown` escapes control characters, the quote and the backslash.
    if not shown.isprintable() or "\\" in shown.replace(r"\\", "").replace(r'\"', ""):
        raise ProtocolError(f"{what} has a text that is not printable")
    check_fields(what, body, fields)
    return body  # type: ignore[no-any-return]


def check_fields(what: str, body: object, fields: Mapping[str, Field]) -> None:
    """ProtocolError unless `body` is an object and its known fields fit, with the fields inside them."""
    if not isinstance(body, dict):
        raise ProtocolError(f"{what} is not an object")
    for name, field in fields.items():
        value = body.get(name)
        if value is None and not field.required:
            continue
        if not _fits(value, field):
            raise ProtocolError(f"{what} has a bad or no field {name!r}")
        if field.inside is not None:
            for each in value if isinstance(value, list) else [value]:
                check_fields(f"{what} {name}", each, field.inside)


def _fits(value: Any, field: Field) -> bool:
    """Whether a value has its field's type, range or length, form and entries. `check_fields` checks the inside."""
    if not isinstance(value, field.type) or isinstance(value, bool) is not (field.type is bool):
        return False
    measure = value if isinstance(value, (int, float)) else len(value)
    texts = [value] if isinstance(value, str) else value
    return (
        field.low <= measure <= field.high
        and (not field.form or all(re.fullmatch(field.form, text) for text in texts))
        and (field.entry is None or all(_fits(each, field.entry) for each in value.values()))
    )
