"""The handshake and the tag against vectors that were made by another implementation."""

import hashlib
import os
import traceback

import pytest

from achilles.errors import AuthenticationError, ProtocolError
from achilles.protocol import auth

NONCE_S, NONCE_C = bytes(range(32)), bytes(range(32, 64))
KEY = bytes.fromhex("1ee2baf8a91bf056562ebab4eeb240e00949096351f0f1dbf755c63ebf77bc6c")
KEYS = auth.Keys(
    bytes.fromhex("088b433cfedd8f5ec2afd80fe1dae6951369dec986cc357aadfb01c2882705c0"),
    bytes.fromhex("08bc5bf71b8a5fbf270c1856626687d6f686f8d5502dd217aae9bbef3b181874"),
    bytes.fromhex("015c5d67a669983e6dd5cecf12e65e6fc1202a4e4371e2542204a1906ee60525"),
    bytes.fromhex("b3e72cbf51001a8241d92feb70f9ccb0ff29c00fcea7b619f5742c25343b4cf3"),
)
FRAMES = [  # seq, head, envelope, tag, client to server
    ("0200000000000014", b'{"reason":"leaving"}', "e407df6340276bc9981133399fcb84a32dc64902904cffb2a5559fbb2cdeaa77"),
    (
        "090000020000004d",
        bytes.fromhex(
            "00000007000000000000000000000028000000000000000500000000000000290001000000000500"
            "d414b085826eb06778483ba35564dc849e643359f69ed9747878ba6e54985bed68656c6c6f"
        ),
        "c7423e5980c3845eb6ea60ba8b788a344f6986caa9be3974ae5a7a8b56f25b58",
    ),
]


def m1():
    return auth.PLAIN + NONCE_S


def signed():
    return auth.claim(auth.CONTROLLER, "ann", NONCE_C)


def test_lengths_on_the_wire():
    assert (len(m1()), len(signed()), auth.AUTH_BYTES) == (40, 72, 104)


def test_the_secret_becomes_the_key_of_the_vectors():
    assert auth.derive_key("ann", "correct horse battery staple") == KEY


def test_transcript_and_session_keys_of_the_vectors():
    transcript = hashlib.sha256(bytes(32) + m1() + signed()).hexdigest()
    assert transcript == "56e3e9b4d005221f20d94c5dc07cb5096f9b3674099f7078506fea566a7e2a8e"
    assert auth.session_keys(KEY, m1(), signed()) == KEYS


def test_session_keys_of_the_vectors_inside_tls():
    """The binding of the TLS connection is in them."""
    assert [key.hex() for key in auth.session_keys(KEY, m1(), signed(), bytes(range(64, 96)))] == [
        "242108377df92eccaedb44ecbe949b922f321b77eac01209b7e32d199ebfdfb0",
        "892e48951b67a1df97c46c7adfb748b7c619f12e3c8dfdaa0269f80a3ba63aa1",
        "4d7636ed2f3813b5879dea5eb3aaa34f70c2ba13042ae8590cdc46a4aac3804d",
        "0a1e8f3d642e1eb280bf91bb376c4737cc92b64caa8933217cba9012a939eeb1",
    ]


def test_tags_of_the_vectors_are_made_and_checked():
    tagger, checker = auth.Tagger(KEYS.client_data), auth.Tagger(KEYS.client_data)
    for head, envelope, tag in FRAMES:
        assert tagger.tag(bytes.fromhex(head) + envelope).hex() == tag
        checker.check(bytes.fromhex(head) + envelope, bytes.fromhex(tag))


def test_a_replayed_frame_has_a_wrong_tag():
    checker = auth.Tagger(KEYS.client_data)
    head, envelope, tag = FRAMES[0]
    checker.check(bytes.fromhex(head) + envelope, bytes.fromhex(tag))
    with pytest.raises(AuthenticationError):
        checker.check(bytes.fromhex(head) + envelope, bytes.fromhex(tag))


def test_the_other_directions_key_does_not_do():
    head, envelope, tag = FRAMES[0]
    with pytest.raises(AuthenticationError):
        auth.Tagger(KEYS.server_data).check(bytes.fromhex(head) + envelope, bytes.fromhex(tag))


@pytest.mark.parametrize("keys", [[KEY], [KEY, os.urandom(32)], [os.urandom(32), KEY]], ids=["one", "first", "second"])
def test_a_claim_with_either_secret_is_accepted(keys):
    assert auth.accept_claim(keys, m1(), signed() + KEYS.client_proof) == KEYS


@pytest.mark.parametrize(
    ("keys", "proof"),
    [([os.urandom(32)], KEYS.client_proof), ([KEY], KEYS.server_proof), ([KEY], auth.REFUSAL), ([KEY], os.urandom(32))],
    ids=["another secret", "reflected", "zeros", "random"],
)
def test_a_claim_without_the_secret_is_not(keys, proof):
    assert auth.accept_claim(keys, m1(), signed() + proof) is None


def test_every_altered_byte_of_the_ladder_breaks_the_proof():
    for i in range(72):
        altered = bytearray(signed())
        altered[i] ^= 1
        assert auth.session_keys(KEY, m1(), bytes(altered)).client_proof != KEYS.client_proof
    for i in range(40):
        altered = bytearray(m1())
        altered[i] ^= 1
        assert auth.session_keys(KEY, bytes(altered), signed()).client_proof != KEYS.client_proof


def test_only_the_servers_own_proof_is_one():
    auth.check_answer(KEYS, KEYS.server_proof)
    with pytest.raises(AuthenticationError, match="refused the username or the secret"):
        auth.check_answer(KEYS, auth.REFUSAL)
    for answer in (KEYS.client_proof, os.urandom(32), KEYS.server_proof[:-1], KEYS.server_proof + b"x", b""):
        with pytest.raises(AuthenticationError, match="does not know the secret"):
            auth.check_answer(KEYS, answer)


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, b"HTTP"), (4, b"\0\2"), (6, b"S"), (7, b"\1"), (40, bytes(32)), (40, b"a\0b" + bytes(29))],
)
def test_a_malformed_claim_is_a_protocol_error(at, value):
    message = bytearray(signed() + KEYS.client_proof)
    message[at : at + len(value)] = value
    with pytest.raises(ProtocolError):
        auth.read_claim(bytes(message))


@pytest.mark.parametrize(("opening", "mode", "why"), [
    (auth.PLAIN, auth.TLS, "the other side does not encrypt, and this side does: set ENCRYPT=yes there"),
    (auth.TLS, auth.PLAIN, "the other side encrypts, and this side does not: set ENCRYPT=yes here"),
    (b"ACHS\0\2\0\0", auth.TLS, "version 2"), (b"ACHL\0\2\0\0", auth.PLAIN, "version 2"),
    (b"ACHL\0\2\0\0", auth.TLS, "not an achilles server"), (b"ACHS\0\1\0\1", auth.TLS, "not an achilles server"),
    (b"\x15\x03\x03\0\2\2\x28\0", auth.TLS, "not an achilles server"),
])
def test_the_first_8_bytes_of_a_server_tell_whether_it_encrypts(opening, mode, why):
    """The remedy is never to encrypt less: these bytes are signed by nobody."""
    with pytest.raises(ProtocolError, match=why):
        auth.check_opening(opening, mode)
    auth.check_opening(mode, mode)


@pytest.mark.parametrize(("at", "value"), [(0, b"SSH-"), (4, b"\0\2"), (6, b"\1")])
def test_a_malformed_greeting_is_a_protocol_error(at, value):
    message = bytearray(auth.PLAIN)
    message[at : at + len(value)] = value
    with pytest.raises(ProtocolError):
        auth.check_opening(bytes(message), auth.PLAIN)


@pytest.mark.parametrize("cut", [slice(0), slice(-1), slice(7)])
def test_an_opening_of_another_length_is_a_protocol_error(cut):
    for opening in (auth.PLAIN[cut], auth.PLAIN + bytes(1)):
        with pytest.raises(ProtocolError, match="not an achilles server"):
            auth.check_opening(opening, auth.PLAIN)


@pytest.mark.parametrize("name", ["", "a\0b", "é" * 17, "x" * 33])
def test_a_username_is_refused_not_cut(name):
    with pytest.raises(ValueError, match="username"):
        auth.check_user(name)


def test_nothing_of_a_key_is_printed():
    keys = auth.session_keys(KEY, m1(), signed())
    for thing in (keys, auth.Tagger(keys.client_data)):
        for text in (repr(thing), str(thing)):
            assert not [key for key in (KEY, *KEYS) if repr(bytes(key))[2:-1] in text or key.hex() in text]
    assert repr(keys).count("Key(***)") == 4


def test_no_local_variable_shows_a_key_or_what_it_is_made_from():
    """A traceback of one who connects may show the variables of ours."""
    key = auth.derive_key("ann", "correct horse battery staple")
    assert key == KEY and str(key) == repr(key) == "Key(***)" and "***" in repr(tuple(auth.session_keys(key, b"", b"")))
    with pytest.raises(ValueError, match="username") as caught:
        auth.derive_key("x" * 33, "correct horse battery staple")
    found = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "Key(***)" in found and "'correct horse" not in found


# The cache of derived keys.


@pytest.fixture
def derived(monkeypatch):
    """How often scrypt ran."""
    auth._place.cache_clear()
    runs, scrypt = [], hashlib.scrypt
    monkeypatch.setattr(hashlib, "scrypt", lambda *args, **options: runs.append(1) or scrypt(*args, **options))
    return runs


def test_a_secret_is_derived_once_a_process_and_each_user_has_another_key(derived):
    keys = [auth.derive_key(user, "correct horse battery staple") for user in ("ann", "ann", "bob", "ann")]
    assert keys[0] == keys[1] == keys[3] == KEY != keys[2] and len(derived) == 2
    assert auth.derive_key("a", "nn" + "x" * 20) != auth.derive_key("an", "n" + "x" * 20)


def test_the_cache_of_derived_keys_holds_no_secret_and_eight_keys_at_most(derived, monkeypatch):
    names = []
    place = auth._place
    monkeypatch.setattr(auth, "_place", lambda name: names.append(name) or place(name))
    for number in range(10):
        auth.derive_key("ann", f"secret number {number}")
    assert place.cache_info().currsize == place.cache_info().maxsize == 8
    assert {len(name) for name in names} == {32} and not any(b"secret" in name for name in names)
    auth.derive_key("ann", "secret number 0")
    assert len(derived) == 11


def test_a_key_that_another_process_has_derived_is_not_derived_again(derived):
    auth.derive_key("ann", "correct horse battery staple", bytes(KEY))
    found = auth.derive_key("ann", "correct horse battery staple")
    assert found == KEY and str(found) == "Key(***)" and not derived
