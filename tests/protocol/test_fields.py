"""What a peer says in JSON is checked to its leaves, and no text of it is worse than another to look at."""

import json
import re
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from achilles.errors import ProtocolError
from achilles.protocol.kinds import HEX_FORM, Field, check_fields, read_object

NAME = Field(str, 1, 64)
INNER = {"name": NAME, "count": Field(int, 0, 9, False)}
FIELDS = {
    "number": Field((int, float), -1, 9, False), "flag": Field(bool, required=False),
    "digest": Field(str, 2, 2, False, form=HEX_FORM), "way": Field(str, 1, 64, False, form="up|down"),
    "one": Field(dict, required=False, inside=INNER), "many": Field(list, 0, 2, False, inside=INNER),
    "counts": Field(dict, 0, 2, False, form="[ax]{1,64}", entry=Field(int, 0, 9)),
}
# What a terminal or a log would act upon, or what nobody sees.
UNFIT = ["\0", "\x07", "\b", "\t", "\n", "\r", "\x1b", "\x1b[31m", "\x1b]0;title\x07", "\x7f", "\x80", "\x85", "\x9b2J",
         "\x9f", "\xa0", "\xad", "\u061c", "\u200b", "\u200e", "\u2028", "\u2029", "\u202a", "\u202e", "\u2066",
         "\u2069", "\u3000", "\ud800", "\udcff", "\ue000", "\ufeff", "\ufff9", "\U000e0041",
         "\\\n", '"\x01\\']
FIT = ["", " ", "3.11", "1.0.0+local", "J\xfcrg", "\u05d0\u05d1", "\u4e2d\u6587", "\N{GRINNING FACE}", "%s%n{0}",
       '"\\', "\\n", "\\u001b", '\\"\\\\', "\ufffd"]


def read(body):
    return read_object("it", json.dumps(body).encode(), FIELDS)


def places(text):
    """Objects that have this text: as a known value, an unknown one, a key, and deep inside of what nobody knows."""
    return [{"way": text}, {"new": text}, {text: 1}, {"new": [[], [1, text]]}, {"new": {"a": {text: None}}},
            {"one": {"name": text}}, {"one": {"name": "a", "new": text}}, {"many": [{"name": "a"}, {"name": text}]},
            {"counts": {text: 1}}]


@pytest.mark.parametrize("text", UNFIT, ids=ascii)
def test_a_text_that_is_not_fit_to_be_shown_is_refused_wherever_it_stands(text):
    for around in (text, f"a{text}", f"{text}b"):
        for body in places(around):
            for ascii_only in (True, False):  # a peer may send it as it is, too
                letter = json.dumps(body, ensure_ascii=ascii_only).encode(errors="surrogatepass")
                with pytest.raises(ProtocolError) as caught:
                    read_object("it", letter, FIELDS)
                assert str(caught.value).isprintable() and text not in str(caught.value)


@pytest.mark.parametrize("text", FIT, ids=ascii)
def test_any_other_text_may_be_said(text):
    for body in ({"new": text}, {text: 1}, {"new": {text: [text]}}):
        assert read(body) == body


def test_every_control_format_separator_and_surrogate_character_is_unfit():
    categories = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    unfit = [chr(n) for n in range(sys.maxunicode + 1) if unicodedata.category(chr(n)) in categories]
    assert len(unfit) > 2000  # surrogates are most of them
    for character in unfit:
        with pytest.raises(ProtocolError):
            read({"new": character})


GOOD = [
    {}, dict.fromkeys(FIELDS), {"number": -1}, {"number": 8.5}, {"flag": False}, {"digest": "0f"}, {"way": "down"},
    {"one": {"name": "a"}}, {"one": {"name": "a", "count": None}}, {"many": []},
    {"many": [{"name": "a", "count": 9}] * 2}, {"counts": {}}, {"counts": {"a": 0, "x" * 64: 9}},
    {"new": [1, {"a": None}]},
]
BAD = [
    {"number": -2}, {"number": 9.1}, {"number": "1"}, {"number": True}, {"number": [1]}, {"number": 10**400},
    {"flag": 0}, {"flag": "no"}, {"digest": "0F"}, {"digest": "0"}, {"digest": "0f0"}, {"digest": " f"}, {"digest": 10},
    {"digest": "\u0660f"}, {"way": ""}, {"way": "Up"}, {"way": "sideways"}, {"way": ["up"]}, {"way": "updown"},
    {"way": "up "},
    {"one": []}, {"one": {}}, {"one": {"name": None}}, {"one": {"name": ""}}, {"one": {"name": "a", "count": 10}},
    {"many": {}}, {"many": [1]}, {"many": [None]}, {"many": [[]]}, {"many": [{"name": "a"}, {}]},
    {"many": [{"name": "a"}] * 3}, {"many": "aa"},
    {"counts": []}, {"counts": {"a": 10}}, {"counts": {"a": None}}, {"counts": {"a": "1"}}, {"counts": {"": 1}},
    {"counts": {"x" * 65: 1}}, {"counts": {"a": 1, "b": 2, "c": 3}},
]


@pytest.mark.parametrize("body", GOOD, ids=repr)
def test_what_fits_passes_as_it_is(body):
    assert read(body) == body


@pytest.mark.parametrize("body", BAD, ids=lambda body: repr(body)[:40])
def test_what_does_not_fit_is_refused_by_the_name_of_its_field(body):
    with pytest.raises(ProtocolError, match="^it( one| many)? (has a bad or no field|is not an object)"):
        read(body)


def test_what_is_required_must_be_there():
    for body in ({}, {"name": None}):
        with pytest.raises(ProtocolError, match="'name'"):
            check_fields("it", body, {"name": NAME})


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"{} {}", b"\xef\xbb\xbf{}",
                                  b'{"a":NaN}', b'{"a":[-Infinity]}', b'{"a":1e999}', b'{"a":' * 100_000,
                                  b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}"], ids=lambda text: repr(text[:12]))
def test_what_is_not_a_json_object_is_refused(text):
    with pytest.raises(ProtocolError):
        read_object("it", text, {})


def test_nesting_costs_no_more_than_its_bytes():
    body = "x"
    for _ in range(200):
        body = [body, {"a": body}] if isinstance(body, str) else [body]
    assert read({"new": body}) == {"new": body}


KEYS = st.sampled_from(["name", "count", "a", "\n"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 99) | st.floats() | st.text(max_size=5), lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3)))


@given(st.dictionaries(st.sampled_from([*FIELDS, "new"]), JSON, max_size=3))
@settings(max_examples=200, deadline=None)
def test_whatever_passes_has_texts_that_can_be_shown(body):
    try:
        known = read(body)
    except ProtocolError:
        return
    assert re.fullmatch(r"[ -~]*", json.dumps(known)) and json.dumps(known, ensure_ascii=False).isprintable()
