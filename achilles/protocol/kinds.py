"""The vocabulary of a link: kinds, directions, statuses, flags, limits of ranges, and the fields of every JSON.

These are the tables of PROTOCOL.md, sections 4 to 6, and nothing else. `frames.py` applies them.
"""

from __future__ import annotations

import enum

from .fields import HEX_FORM, NAME_CHARS, TEXT_CHARS, U16, U32, U64, Field

__all__ = [
    "CALLS", "CAREFUL", "DECLARATION", "DIRECTIONS", "FIELDS", "FLAGS", "LETTERS", "LINKS", "LINK_FIELDS",
    "MAX_CHUNKS", "MAX_PYTHONS", "NOTE", "PHASES", "RANGES", "RANGE_FIELDS", "TELL", "Gone", "Kind", "Status",
]

MAX_CHUNKS = 1 << 16  # in a batch: 50 ms of the quickest chunks
MAX_PYTHONS = 64  # versions in a CLUSTER: people have two or three, and the list ends in an error message
CAREFUL = 0x01  # flag of a TASK: the worker names each argument that it calls, since one may kill it
TELL = 0x02  # flag of a TASK: the server says GIVEN when it gives the batch to a node


# A frame's kind, and how a chunk was answered: one byte in a head, one byte a chunk in a RESULT.
Kind = enum.IntEnum("Kind", {
    "HELLO": 1, "BYE": 2, "PING": 3, "ERROR": 4, "CLUSTER": 5, "JOB": 6, "TASK": 7, "GIVEN": 8,
    "RESULT": 9, "RETURNED": 10, "GONE": 11, "CANCEL": 12, "END": 13, "CLOSE": 14, "STATUS": 15, "KILL": 16,
})
Status = enum.IntEnum("Status", {"VALUES": 0, "RAISED": 1, "DIED": 2, "TIMEOUT": 3, "ALTERED": 4, "FAILED": 5})


class Gone(enum.IntEnum):
    """Why chunks have left a node without an answer: the flags of RETURNED and GONE."""

    RETURNED = 0  # their worker was late, or died of another chunk, or they were cancelled
    LEFT = 1  # the node drains
    LOST = 2  # the node's connection was lost when they may have run
    WAITED = 3  # they waited in the node's queue for too long


# The links on which a kind may travel. "CS" is a controller that speaks to its server, "WN" a worker to its node.
LINKS = ("CS", "NS", "SC", "SN", "NW", "WN")
_TCP, _DOWN = ("CS", "NS", "SC", "SN"), ("CS", "SN", "NW")
DIRECTIONS: dict[Kind, tuple[str, ...]] = {
    Kind.HELLO: _TCP, Kind.BYE: _TCP, Kind.PING: _TCP, Kind.ERROR: _TCP, Kind.CLUSTER: ("SC",),
    Kind.JOB: _DOWN, Kind.TASK: _DOWN, Kind.GIVEN: ("SC",), Kind.RESULT: ("WN", "NS", "SC"), Kind.RETURNED: ("NS",),
    Kind.GONE: ("SC",), Kind.CANCEL: ("CS", "SN"), Kind.END: _DOWN, Kind.CLOSE: ("SN", "NW"),
    Kind.STATUS: ("CS", "SC"), Kind.KILL: ("CS",),
}
# Kinds with a Batch for their body: the least and the greatest value of each field of its range but the job.
RANGE_FIELDS = ("first", "count", "attempt", "number")
_ZERO, _ANY_U32, _CHUNKS, _CHUNK_NUMBER = (0, 0), (0, U32), (1, MAX_CHUNKS), (0, U64)
RANGES: dict[Kind, tuple[tuple[int, int], ...]] = {
    Kind.JOB: (_ZERO, (2, 3), _ZERO, _ZERO),
    Kind.TASK: (_CHUNK_NUMBER, _CHUNKS, _ANY_U32, _ANY_U32),
    Kind.GIVEN: (_CHUNK_NUMBER, _CHUNKS, _ANY_U32, (1, U16)),
    Kind.RESULT: (_CHUNK_NUMBER, _CHUNKS, _ANY_U32, _ANY_U32),
    Kind.RETURNED: (_CHUNK_NUMBER, _CHUNKS, _ANY_U32, _ZERO),
    Kind.GONE: (_CHUNK_NUMBER, _CHUNKS, _ANY_U32, _ZERO),
    Kind.CANCEL: (_CHUNK_NUMBER, (1, U32), _ZERO, _ZERO),
    Kind.END: (_ZERO, _ZERO, _ZERO, _ZERO),
}
LETTERS = frozenset({Kind.JOB, Kind.TASK, Kind.RESULT})  # their Batch has letters; the others are bare ranges
# Flags that a kind may have; every other kind has none.
FLAGS: dict[Kind, tuple[int, ...]] = {
    Kind.TASK: (0, CAREFUL, TELL, CAREFUL | TELL), Kind.RETURNED: (Gone.RETURNED, Gone.LEFT, Gone.WAITED),
    Kind.GONE: (Gone.RETURNED, Gone.LEFT, Gone.LOST),
}

_NAME, _TEXT = Field(str, 1, NAME_CHARS), Field(str, 0, TEXT_CHARS)
REASONS = ("leaving", "restart", "killed")  # of a BYE
PYTHON_FORM = r"[0-9]+\.[0-9]+t?"  # "3.14"; "3.14t" is a free-threaded build
_PYTHON = _NAME._replace(form=PYTHON_FORM)
_U32, _U64, _SECONDS = Field(int), Field(int, 0, U64), Field((int, float), 0, U64)
CALLS = ("one", "star", "apply")  # how a worker calls a job's function
# The first letter of a JOB.
_CONTEXT = Field(str, 32, 32, form=HEX_FORM)
DECLARATION: dict[str, Field] = {
    "context": _CONTEXT, "initializer": Field(bool),
    "timeout": Field((int, float), 1e-9, float(U32), False), "maxtasksperchild": Field(int, 1, U32, False),
    "seed": Field(str, 64, 64, False, form=HEX_FORM), "call": _NAME._replace(required=False, form="|".join(CALLS)),
}
# The parts of a STATUS: each node, each job, and the server.
NODE_STATE: dict[str, Field] = {
    "id": _U32, "address": _NAME, "python": _PYTHON, "version": _NAME, "cpu_count": Field(int, 0, U16),
    "busy": Field(int, 0, U16), "done": _U64, "since": _SECONDS,
}
JOB_STATE: dict[str, Field] = {"id": _U32, "user": _TEXT, "queued": _U64, "running": _U64, "done": _U64}
SERVER_STATE: dict[str, Field] = {"version": _NAME, "uptime": _SECONDS, "memory": _U64._replace(required=False)}
PHASES = ("function", "load", "call", "dump")  # at which a worker may die
# The letter of a chunk with the status DIED or TIMEOUT.
NOTE: dict[str, Field] = {
    "offset": Field(int, -1, U32), "phase": _NAME._replace(form="|".join(PHASES)),
    "node": Field(int, required=False), "pid": Field(int, required=False), "exitcode": Field(int, -U32, U32, False),
}
FIELDS: dict[Kind, dict[str, Field]] = {
    Kind.HELLO: {"python": _PYTHON, "version": _NAME},  # LINK_FIELDS has the others
    Kind.BYE: {"reason": _NAME._replace(form="|".join(REASONS))},
    Kind.PING: {},
    Kind.ERROR: {"code": _NAME, "message": _TEXT},
    Kind.CLUSTER: {
        "nodes": _U32, "workers": _U32, "largest": Field(int, 0, U16),
        "pythons": Field(dict, 0, MAX_PYTHONS, form=PYTHON_FORM, entry=_U32),
    },
    Kind.CLOSE: {"context": _CONTEXT},
    Kind.STATUS: {
        "nodes": Field(list, required=False, inside=NODE_STATE), "jobs": Field(list, required=False, inside=JOB_STATE),
        "server": Field(dict, required=False, inside=SERVER_STATE),
    },
    Kind.KILL: {},
}
# Further fields that a kind must have on one link alone. An answer to STATUS has all its fields, the question has none.
_CLIENT, _SERVER = {"cpu_count": Field(int, 0, U16), "pid": _U32}, {"client_id": _U32, "connections": _U32}
LINK_FIELDS: dict[tuple[str, Kind], dict[str, Field]] = {
    ("CS", Kind.HELLO): _CLIENT, ("NS", Kind.HELLO): _CLIENT, ("SC", Kind.HELLO): _SERVER, ("SN", Kind.HELLO): _SERVER,
    ("SC", Kind.STATUS): {"nodes": Field(list), "jobs": Field(list), "server": Field(dict)},
}
