"""config.py: where the settings come from, what is refused, and the lines of a file."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import traceback

import dill
import pytest

from achilles import config, configuring
from achilles.config import ConfigurationError, Secret

LONG = "a secret of many characters"
FOUR = config.NAMES[:4]
FULL = {"host": "10.0.0.1", "port": 1234, "username": "ann", "secret_key": LONG}
pytestmark = pytest.mark.usefixtures("nothing_configured")
posix_only = pytest.mark.skipif(os.name != "posix", reason="file modes and shells are POSIX's")


def write(path, text, mode=0o600):
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    os.chmod(path, mode)
    return path


# The secret


@pytest.mark.parametrize("show", [repr, str, "{}".format, "{!r:>40}".format, "%s".__mod__, "{:>9}".format])
def test_a_secret_is_never_shown(show):
    assert show(Secret(LONG)).strip() == "***"
    assert LONG not in repr(config.resolve(**FULL))


def test_a_secret_is_compared_by_its_text():
    assert Secret("a") == Secret("a") == Secret(Secret("a")) and hash(Secret("a")) == hash(Secret("a"))
    assert Secret("a") != Secret("b") and Secret("a") != "a"
    assert Secret("a").reveal() == "a"


@pytest.mark.parametrize("dump", [pickle.dumps, dill.dumps, copy.copy, copy.deepcopy])
def test_a_secret_cannot_be_pickled_or_copied(dump):
    with pytest.raises(TypeError, match="cannot be pickled"):
        dump(Secret(LONG))


@pytest.mark.parametrize("value", [b"bytes of some length", 12345, None])
def test_a_secret_is_text(value):
    with pytest.raises(ConfigurationError, match="must be text"):
        Secret(value)


# Which place wins


def test_each_setting_is_looked_up_by_itself(monkeypatch, own_file):
    write(own_file, f"HOST=file\nPORT=1\nUSERNAME=file\nSECRET_KEY='{LONG}'\n")
    monkeypatch.setenv("ACHILLES_PORT", "2")
    monkeypatch.setenv("ACHILLES_HOST", "environment")
    settings = config.resolve(host="argument")
    assert settings == config.Settings("argument", 2, "file", Secret(LONG), own_file)


@pytest.mark.parametrize("name", FOUR)
def test_argument_then_environment_then_file(monkeypatch, own_file, name):
    values = {n: {"PORT": {"file": "1", "environ": "2", "argument": 3}}.get(n, dict.fromkeys(
        ("file", "environ", "argument"))) for n in FOUR}
    for n in FOUR:
        for place in ("file", "environ", "argument"):
            values[n][place] = values[n][place] or f"{place}-of-enough-characters"
    write(own_file, "".join(f"{n}={values[n]['file']}\n" for n in FOUR))

    def found(**arguments):
        settings = config.resolve(**arguments)
        return settings.secret.reveal() if name == "SECRET_KEY" else getattr(settings, name.lower())

    assert str(found()) == values[name]["file"]
    monkeypatch.setenv(f"ACHILLES_{name}", values[name]["environ"])
    assert str(found()) == values[name]["environ"]
    assert found(**{name.lower(): values[name]["argument"]}) == values[name]["argument"]


@pytest.fixture
def encrypting(monkeypatch):
    """A Python that can encrypt, whatever this one can."""
    monkeypatch.setattr(configuring, "can_encrypt", lambda: True)


@pytest.mark.usefixtures("encrypting")
def test_encryption_is_off_unless_argument_environment_or_file_asks_for_it(monkeypatch, own_file):
    text = f"HOST=h\nUSERNAME=u\nSECRET_KEY='{LONG}'\n"
    write(own_file, text)
    assert config.resolve().encrypt is False
    write(own_file, f"{text}export ENCRYPT=\"yes\"  # hidden\n")
    assert config.resolve().encrypt is True
    monkeypatch.setenv("ACHILLES_ENCRYPT", "no")
    assert config.resolve().encrypt is False and config.resolve(encrypt=True).encrypt is True
    monkeypatch.setenv("ACHILLES_ENCRYPT", "yes")
    assert config.resolve().encrypt is True and config.resolve(encrypt=False).encrypt is False
    assert config.resolve(**FULL).encrypt is True
    assert config.read_again(config.resolve(encrypt=False), "node").encrypt is False


@pytest.mark.usefixtures("encrypting")
@pytest.mark.parametrize("value", ["", "on", "Yes", "true", "1"])
def test_encryption_is_yes_or_no_and_nothing_else(monkeypatch, own_file, value):
    """A mistyped word never means that all goes in the clear."""
    monkeypatch.setenv("ACHILLES_ENCRYPT", value)
    with pytest.raises(ConfigurationError, match="^ACHILLES_ENCRYPT must be True or False, and outside Python yes"):
        config.resolve(**FULL)
    monkeypatch.delenv("ACHILLES_ENCRYPT")
    with pytest.raises(ConfigurationError, match="^encrypt must be"):
        config.resolve(**FULL, encrypt=value)


@pytest.mark.parametrize("place", ["argument", "environment", "file"])
def test_a_python_that_cannot_encrypt_says_so_and_the_remedy(monkeypatch, own_file, place):
    monkeypatch.setattr(configuring, "can_encrypt", lambda: False)
    write(own_file, f"HOST=h\nUSERNAME=u\nSECRET_KEY='{LONG}'\nENCRYPT={'yes' if place == 'file' else 'no'}\n")
    if place == "environment":
        monkeypatch.setenv("ACHILLES_ENCRYPT", "yes")
    with pytest.raises(ConfigurationError, match=r"this Python cannot do it: it takes Python 3\.13 .* ENCRYPT=no on"):
        config.resolve(encrypt=True if place == "argument" else None)


def test_this_python_can_encrypt_since_3_13():
    assert configuring.can_encrypt() == (sys.version_info >= (3, 13))


def test_the_file_is_the_argument_then_the_environments_then_our_own(monkeypatch, tmp_path, own_file):
    configuring.write_config(**FULL)
    named = configuring.write_config(**{**FULL, "username": "named"}, env_file=tmp_path / "named.env")
    given_file = configuring.write_config(**{**FULL, "username": "given"}, env_file=tmp_path / "given.env")
    assert config.resolve().username == "ann" and config.resolve().env_file == own_file
    monkeypatch.setenv("ACHILLES_ENV_FILE", named)
    assert config.resolve().username == "named" and config.resolve().env_file == named
    assert config.resolve(env_file=given_file).username == "given"


def test_the_port_is_9999_where_nobody_says():
    assert config.resolve("h", None, "u", LONG).port == config.DEFAULT_PORT == 9999


def test_the_file_is_not_opened_when_nothing_is_missing(own_file):
    write(own_file, "HOST='unreadable", mode=0o644)
    assert config.resolve(**FULL, role="server").env_file is None


def test_env_file_is_set_only_where_the_secret_came_from_it(monkeypatch, own_file):
    configuring.write_config(**FULL)
    monkeypatch.setenv("ACHILLES_SECRET_KEY", LONG)
    assert config.resolve().env_file is None


def test_an_empty_value_is_not_passed_over(monkeypatch, own_file):
    configuring.write_config(**FULL)
    monkeypatch.setenv("ACHILLES_SECRET_KEY", "")
    with pytest.raises(ConfigurationError, match="ACHILLES_SECRET_KEY is empty"):
        config.resolve()


def test_nothing_is_read_from_the_environment_at_import(tmp_path):
    code = ("import os; seen = []; real = os.environ.__class__.__getitem__\n"
            "import getpass, ipaddress, secrets, shlex, tempfile, typing, achilles.errors\n"
            "os.environ.__class__.__getitem__ = lambda s, k: seen.append(k) or real(s, k)\n"
            "import achilles.config; print([k for k in seen if 'ACHILLES' in k])")
    env = {**os.environ, "ACHILLES_HOST": "x", "ACHILLES_PORT": "not a port"}
    folder = os.path.dirname(os.path.dirname(sys.modules["achilles"].__path__[0] + "/"))
    out = subprocess.run([sys.executable, "-c", code], env=env, cwd=folder, capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


# What is missing


@pytest.mark.parametrize("role", ["controller", "node", "server"])
def test_the_error_names_what_is_missing_and_every_way_to_give_it(role, own_file):
    with pytest.raises(ConfigurationError) as error:
        config.resolve(host="h", role=role)
    text = str(error.value)
    for way in ("no username, secret_key for this", "username=..., secret_key=...", "ACHILLES_USERNAME",
                "ACHILLES_SECRET_KEY", own_file, "does not exist", "ACHILLES_ENV_FILE", "--env-file",
                "a terminal", "python -m achilles.server --write-config"):
        assert way in text
    assert "ACHILLES_HOST" not in text and "PORT" not in text
    assert ("authenticate too" in text) is (role == "node")
    assert isinstance(error.value, ValueError)


def test_remedies_print_the_packages_own_name(monkeypatch):
    monkeypatch.setattr(configuring, "__package__", "host_a._vendor.ach")
    with pytest.raises(ConfigurationError, match=r"python -m host_a\._vendor\.ach\.server"):
        config.resolve()
    assert "python -m host_a._vendor.ach.node" in configuring.next_step("/x")


@pytest.mark.parametrize("stdin", [None, io.StringIO("h\n1\nu\n")])
def test_nobody_is_asked_without_a_terminal(monkeypatch, stdin):
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(ConfigurationError, match=r"(?s)no host, username.*python -m achilles\.local SCRIPT"):
        config.resolve()


def test_nobody_is_asked_when_that_is_not_wanted(terminal):
    terminal += ["h", "1", "u", LONG]
    with pytest.raises(ConfigurationError, match="no host, username, secret_key"):
        config.resolve(ask=False)
    assert len(terminal) == 4


# Each check


@pytest.mark.parametrize("value", ["9999", True, 1.0, -1, 65536, "x"])
def test_an_argument_port_is_an_int_in_range(value):
    with pytest.raises(ValueError, match=r"^port must be an int in 0\.\.65535"):
        config.resolve("h", value, "u", LONG)


@pytest.mark.parametrize("value", ["", "-1", "65536", "9999x", " 9999", "٣", "1e3", "9" * 5000])
def test_a_port_as_text_says_where_it_came_from(monkeypatch, other_file, value):
    monkeypatch.setenv("ACHILLES_PORT", value)
    with pytest.raises(ConfigurationError, match="^ACHILLES_PORT must be an int"):
        config.resolve("h", None, "u", LONG)
    monkeypatch.delenv("ACHILLES_PORT")
    write(other_file, f"PORT='{value}'\n")
    with pytest.raises(ConfigurationError, match="^PORT in .*other.env must be an int"):
        config.resolve("h", None, "u", LONG, env_file=other_file)


@pytest.mark.parametrize("value", [0, 9999, 65535])
def test_good_ports(value):
    assert config.check("PORT", value, "port") == config.check("PORT", str(value), "the answer") == value


@pytest.mark.parametrize("value", ["u", "u" * 32, "é" * 16, "name with space"])
def test_good_usernames(value):
    assert config.check("USERNAME", value, "username") == value


@pytest.mark.parametrize("value", ["", "u" * 33, "é" * 17, "nul\0", "\udc80", "a\nb", 7, b"u"])
def test_bad_usernames_are_refused_not_cut(value):
    with pytest.raises(ConfigurationError, match="^username must be 1 to 32 bytes"):
        config.check("USERNAME", value, "username")


@pytest.mark.parametrize("value", ["", "a b", "a\nb", "\udc80", 7, "a..b", "a" * 64])
def test_bad_hosts(value):
    with pytest.raises(ConfigurationError, match="^host must be"):
        config.check("HOST", value, "host")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST"])
def test_a_short_secret_will_do_on_loopback(host):
    assert config.check_secret(Secret("bar"), host) == Secret("bar")


@pytest.mark.parametrize("host", ["10.0.0.1", "0.0.0.0", "::", "128.0.0.1", "localhost.example", "127.1"])
def test_a_short_secret_is_refused_elsewhere(host):
    with pytest.raises(ConfigurationError, match="shorter than 16 characters.*token_urlsafe") as error:
        config.check_secret(Secret("x" * 15), host)
    assert "x" * 15 not in str(error.value)
    assert config.check_secret(Secret("x" * 16), host).reveal() == "x" * 16


@pytest.mark.parametrize("value", ["", "nul\0", "\udc80", "two\nlines", "end\r"])
def test_an_empty_or_broken_secret_is_refused_even_on_loopback(value):
    with pytest.raises(ConfigurationError, match="empty, or has.*token_urlsafe"):
        config.check_secret(Secret(value), "127.0.0.1")


# The file


@pytest.mark.parametrize("text, value", [
    ("HOST=a", "a"), ("HOST='a'", "a"), ('HOST="a"', "a"), ("export HOST=a", "a"), (" HOST = a ", "a"),
    ("HOST=a # note", "a"), ("HOST=a#b", "a#b"), ("HOST='a # b' # note", "a # b"), ("HOST=", ""),
    ("HOST= # note", ""), ("HOST=''", ""), (r'HOST="a\"b\\c\$d"', 'a"b\\c$d'), (r"HOST='a\b'", r"a\b"),
    ("HOST=a\\b", "a\\b"), ("HOST=O'Brien", "O'Brien"), ("HOST=é", "é"), ("\ufeffHOST=a", "a"),
    ("HOST=a\r\nPORT=1", "a"), ("HOST=b\nHOST=a", "a"), ("HOST=a=b", "a=b"), ("HOST='a\u2028b'", "a\u2028b"),
])
def test_lines_that_are_understood(other_file, text, value):
    assert config.read_file(write(other_file, text))["HOST"] == value


@pytest.mark.parametrize("line", ["SECRET_KEY='abc", 'SECRET_KEY="abc', "SECRET_KEY='a'bc", "SECRET_KEY=#abc",
                                  "SECRET_KEY= 'abc"])
def test_a_line_that_is_not_understood_is_named_but_not_shown(other_file, line):
    with pytest.raises(ConfigurationError, match="line 2: the value of SECRET_KEY") as error:
        config.read_file(write(other_file, f"HOST=a\n{line}\n"))
    assert "abc" not in str(error.value)


def test_comments_and_the_lines_of_others_are_passed_over(other_file):
    text = ("# HOST=no\n\nDATABASE_URL='x\nMY_HOST=no\nACHILLES_HOST=no\nhost=no\n"
            "USERNAME=u\nPREVIOUS_SECRET_KEY=p\n")
    assert config.read_file(write(other_file, text)) == {"USERNAME": "u", "PREVIOUS_SECRET_KEY": "p"}


@posix_only
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o602])
def test_a_file_that_is_open_to_others_is_refused(other_file, mode):
    write(other_file, "HOST=a\n", mode)
    with pytest.raises(ConfigurationError, match=f"chmod 600 {other_file}"):
        config.read_file(other_file)


def test_modes_mean_nothing_where_there_is_no_posix(monkeypatch, other_file):
    write(other_file, "HOST=a\n", 0o644)
    monkeypatch.setattr(config.os, "name", "nt")
    assert config.read_file(other_file) == {"HOST": "a"}


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be read"):
        config.read_file(tmp_path)


def test_a_secret_file_has_the_secret_in_its_first_line(tmp_path):
    path = tmp_path / "secret"
    path.write_text("correct horse battery\nanything else\n")
    path.chmod(0o600)
    assert config.read_secret_file(path).reveal() == "correct horse battery"
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        config.read_secret_file(path)


def test_a_short_secret_is_named_by_where_it_came_from(tmp_path, monkeypatch):
    file = write(tmp_path / "secret", "bar\n")
    with pytest.raises(ConfigurationError, match=f"^the first line of {file} is shorter than 16.*token_urlsafe"):
        config.resolve("10.0.0.1", 1, "u", config.read_secret_file(file))
    monkeypatch.setenv("ACHILLES_SECRET_KEY", "bar")
    monkeypatch.setenv("ACHILLES_PREVIOUS_SECRET_KEY", "old")
    with pytest.raises(ConfigurationError, match="^ACHILLES_SECRET_KEY is shorter .* not at 0.0.0.0"):
        config.resolve("127.0.0.1", 1, "u", role="server", bind="0.0.0.0")
    monkeypatch.setenv("ACHILLES_SECRET_KEY", LONG)
    with pytest.raises(ConfigurationError, match="^ACHILLES_PREVIOUS_SECRET_KEY is shorter .* not at 0.0.0.0"):
        config.resolve("127.0.0.1", 1, "u", role="server", bind="0.0.0.0")
    with pytest.raises(ConfigurationError, match="^bind must be"):
        config.resolve("127.0.0.1", 1, "u", role="server", bind="a b")


# The previous secret


def test_a_server_alone_has_the_files_previous_secret(other_file):
    write(other_file, f"HOST=h\nUSERNAME=u\nSECRET_KEY='{LONG}'\nPREVIOUS_SECRET_KEY='{LONG[::-1]}'\n")
    assert config.resolve(env_file=other_file, role="server").previous == Secret(LONG[::-1])
    assert config.resolve(env_file=other_file, role="node").previous is None
    assert config.resolve(env_file=other_file, secret_key=LONG, role="server").previous is None


def test_the_files_previous_secret_does_not_stand_beside_another_secret(monkeypatch, other_file):
    write(other_file, f"HOST=h\nUSERNAME=u\nSECRET_KEY='{LONG}'\nPREVIOUS_SECRET_KEY='{LONG[::-1]}'\n")
    monkeypatch.setenv("ACHILLES_SECRET_KEY", "of another cluster altogether")
    assert config.resolve(env_file=other_file, role="server").previous is None
    monkeypatch.setenv("ACHILLES_PREVIOUS_SECRET_KEY", "of another cluster, before")
    assert config.resolve(env_file=other_file, role="server").previous == Secret("of another cluster, before")


@pytest.mark.parametrize("value, previous", [("", None), ("'short'", ConfigurationError)])
def test_a_previous_secret_is_as_good_as_a_secret_or_none(other_file, value, previous):
    write(other_file, f"HOST=h\nUSERNAME=u\nSECRET_KEY='{LONG}'\nPREVIOUS_SECRET_KEY={value}\n")
    if previous is None:
        assert config.resolve(env_file=other_file, role="server").previous is None
    else:
        with pytest.raises(previous, match="PREVIOUS_SECRET_KEY in .* is shorter"):
            config.resolve(env_file=other_file, role="server")


def test_both_secrets_leave_the_environment(monkeypatch):
    for name in ("SECRET_KEY", "PREVIOUS_SECRET_KEY", "HOST"):
        monkeypatch.setenv(f"ACHILLES_{name}", LONG)
    config.remove_from_environment()
    config.remove_from_environment()
    assert [name for name in os.environ if name.startswith("ACHILLES_")] == ["ACHILLES_HOST"]


# Reading the secrets again


def test_only_the_secrets_are_read_again(monkeypatch, other_file):
    monkeypatch.setenv("ACHILLES_PORT", "7")
    configuring.write_config(**FULL, env_file=other_file)
    before = config.resolve(env_file=other_file, role="server")
    write(other_file, f"HOST=other\nPORT=1\nUSERNAME=other\nSECRET_KEY={LONG[::-1]!r}\nPREVIOUS_SECRET_KEY={LONG!r}\n")
    after = config.read_again(before, "server")
    assert after == config.Settings("10.0.0.1", 7, "ann", Secret(LONG[::-1]), other_file, Secret(LONG))
    assert config.read_again(before, "node").previous is None
    monkeypatch.setenv("ACHILLES_PREVIOUS_SECRET_KEY", "one that is in the server's environment")
    again = config.read_again(before, "server")
    assert (again.secret, again.previous) == (Secret(LONG[::-1]), Secret("one that is in the server's environment"))


@pytest.mark.parametrize("text, mode, why", [
    (f"SECRET_KEY={LONG!r}\n", 0o644, "chmod 600"), ("", 0o600, "has no SECRET_KEY"), (None, 0, "cannot be read"),
    ("SECRET_KEY=\n", 0o600, "is empty"), ("SECRET_KEY=short\n", 0o600, "is shorter"),
    (f"SECRET_KEY='{LONG}\n", 0o600, "line 1: the value of SECRET_KEY cannot be read"),
    (f"SECRET_KEY={LONG!r}\nPREVIOUS_SECRET_KEY=short\n", 0o600, "PREVIOUS_SECRET_KEY in .* is shorter"),
])
def test_a_file_that_is_no_good_when_it_is_read_again_says_why_in_one_line(other_file, text, mode, why):
    configuring.write_config(**FULL, env_file=other_file)
    before = config.resolve(env_file=other_file, role="server")
    os.remove(other_file)
    if text is not None:
        write(other_file, text, mode)
    with pytest.raises(ConfigurationError, match=why) as error:
        config.read_again(before, "server")
    assert "\n" not in str(error.value) and LONG not in str(error.value)


def test_a_secret_that_came_from_no_file_is_not_looked_for_in_one():
    with pytest.raises(ConfigurationError, match="did not come from a configuration file"):
        config.read_again(config.resolve(**FULL), "server")


# Tracebacks that show local variables


def shown(call, *args, **options):
    """The traceback of a call that fails, with the variables of our frames."""
    try:
        call(*args, **options)
    except Exception as error:
        found = traceback.TracebackException.from_exception(error, capture_locals=True)
        return "".join(line for frame in found.stack[1:] for line in traceback.StackSummary.from_list([frame]).format())
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("place", ["argument", "environment", "file"])
@pytest.mark.parametrize("wrong", ["host", "port", "nothing else", "unwritable"])
def test_no_local_variable_of_ours_shows_a_secret(monkeypatch, tmp_path, other_file, place, wrong):
    hidden = "abc-of-nine" if wrong == "nothing else" else "abc-of-more-than-sixteen"  # the former is too short
    lines = {"HOST": "10.0.0.1", "USERNAME": "ann", "SECRET_KEY": hidden, "PREVIOUS_SECRET_KEY": hidden}
    lines |= {"HOST": "a b"} if wrong == "host" else {"PORT": "x"} if wrong == "port" else {}
    if place != "file":
        del lines["SECRET_KEY"], lines["PREVIOUS_SECRET_KEY"]
    write(other_file, "".join(f"{name}='{value}'\n" for name, value in lines.items()))
    secret = Secret(hidden) if place == "argument" else None
    if place == "environment":
        monkeypatch.setenv("ACHILLES_SECRET_KEY", hidden)
    if wrong == "unwritable":
        monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left")))
        found = shown(configuring.update_config, secret_key=secret or Secret(hidden), env_file=other_file)
    else:
        found = shown(config.resolve, secret_key=secret, env_file=other_file, role="server")
    assert "***" in found and hidden not in found


def test_a_refused_files_text_is_in_no_local_variable(other_file):
    for text, mode in ((f"SECRET_KEY={LONG!r}\n", 0o644), (f"SECRET_KEY={LONG!r}\nPREVIOUS_SECRET_KEY='abc\n", 0o600)):
        assert LONG not in (found := shown(config.read_file, write(other_file, text, mode))) and "other.env" in found
    assert LONG not in shown(config.read_secret_file, write(other_file, LONG, 0o644))
