"""JSON that a peer sent: read, and checked to its leaves before any other code sees it.

PROTOCOL.md, section 6, is the rule. Every JSON of a peer comes through `read_object`: the envelopes of the JSON
kinds, the declaration of a JOB (`frames.py`), and the notes on lost chunks (`controller/job.py`). A text that has
passed may be written to a terminal, a log or an exception as it is.

::

    bytes ─▶ JSON ─▶ each text, keys too, at any depth, known or not: printable
                 ─▶ each field of the table: type, range or length, form; the same for the fields inside

Refused are control characters (C0, DEL, C1), direction marks and other invisible ones, line separators, surrogates,
NaN and infinities. The refusal is a ProtocolError. Its text has names from the tables of achilles, and no text of the
peer's.

The module knows no kind, frame or socket. The tables are those of `kinds.py`. Any thread may call the functions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import ProtocolError

__all__ = ["HEX_FORM", "NAME_CHARS", "TEXT_CHARS", "U16", "U32", "U64", "Field", "check_fields", "read_object"]

TEXT_CHARS = 4096  # the longest text in a field: a screen or two
NAME_CHARS = 64  # versions, codes, reasons, addresses
HEX_FORM = "[0-9a-f]*"  # lower case alone, so that equal digests are equal texts
U16, U32, U64 = 2**16 - 1, 2**32 - 1, 2**64 - 1


class Field(NamedTuple):
    """The limits of one field of an object.

    :ivar type: bool fits no other type than bool.
    :ivar low, high: the range of a number; else of the length of a text, or of the count of entries.
    :ivar required: whether the field must be there; else it may be absent or null.
    :ivar form: a regular expression that matches a whole text, or each key of an object.
    :ivar inside: the fields of an object, or of each object in a list.
    :ivar entry: each value of an object, where the peer chooses the keys.
    """

    type: type[Any] | tuple[type[Any], ...]
    low: float = 0
    high: float = U32
    required: bool = True
    form: str = ""
    inside: Mapping[str, Field] | None = None
    entry: Field | None = None


def read_object(what: str, text: bytes, fields: Mapping[str, Field]) -> dict[str, Any]:
    """Return the JSON object that `text` is, unknown keys included.

    :param what: the name of the object in error messages.
    :raises ProtocolError: it is no JSON object, has a text that is not printable, or a known field that does not fit.
    """
    try:
        body = json.loads(text.decode(), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as e:
        raise ProtocolError(f"{what} is not JSON: {type(e).__name__}") from None
    _check_texts(what, body)
    check_fields(what, body, fields)
    return body  # type: ignore[no-any-return]


def check_fields(what: str, body: object, fields: Mapping[str, Field]) -> None:
    """ProtocolError unless `body` is an object, and its known fields fit, with the fields inside of them."""
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


def _check_texts(what: str, body: object) -> None:
    """ProtocolError if any text in `body` is not printable: keys and values, known or not, at any depth."""
    left = [body]
    while left:
        value = left.pop()
        if isinstance(value, str):
            if not value.isprintable():
                raise ProtocolError(f"{what} has a text that is not printable")
        elif isinstance(value, dict):
            left += value
            left += value.values()
        elif isinstance(value, list):
            left += value


def _fits(value: Any, field: Field) -> bool:
    """Return whether a value has its field's type, range or length, form and entries, whatever is inside."""
    if not isinstance(value, field.type) or isinstance(value, bool) is not (field.type is bool):
        return False
    measure = value if isinstance(value, (int, float)) else len(value)
    if not field.low <= measure <= field.high:
        return False
    texts = [value] if isinstance(value, str) else value
    if field.form and not all(re.fullmatch(field.form, text) for text in texts):
        return False
    if field.entry is None:
        return True
    return all(1 <= len(key) <= NAME_CHARS and _fits(each, field.entry) for key, each in value.items())


def _finite(text: str) -> float:
    """Return the number; ValueError for NaN, Infinity and 1e999, which Python reads though they are no JSON."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number
