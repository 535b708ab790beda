"""configuring.py: the file is written whole and private, and a person is asked for what is missing."""

from __future__ import annotations

import getpass
import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_config import FULL, LONG, posix_only, write

from achilles import config, configuring
from achilles.config import ConfigurationError, Secret

pytestmark = pytest.mark.usefixtures("nothing_configured")


# Writing it


@given(username=st.text(min_size=1, max_size=8), secret=st.text(min_size=1))
def test_what_is_written_is_read_back(tmp_path_factory, username, secret):
    path = str(tmp_path_factory.mktemp("env") / "file")
    try:
        configuring.write_config("127.0.0.1", 1, username, secret, env_file=path)
    except ConfigurationError:
        assert set(username + secret) & set("\r\n\0")
    else:
        assert config.read_file(path) == {"HOST": "127.0.0.1", "PORT": "1", "USERNAME": username,
                                          "SECRET_KEY": secret}


@posix_only
@pytest.mark.parametrize("secret", ["it's #1 \"$HOME\" `id` \\ !", "plain $HOME `id` \\n \" # !", "'" * 3])
def test_a_shell_reads_the_file_the_same_way(other_file, secret):
    configuring.write_config("127.0.0.1", 1, "u", secret, env_file=other_file)
    script = '. "$0"; printf %s "$SECRET_KEY"'
    assert subprocess.run(["sh", "-c", script, other_file], capture_output=True, text=True).stdout == secret


@posix_only
def test_a_written_file_is_its_owners_alone_from_the_first_byte(monkeypatch, other_file):
    write(other_file, "HOST=old\n", 0o666)
    moves = []
    replace = os.replace

    def move(fresh, path):
        moves.append((os.stat(fresh).st_mode & 0o777, os.path.dirname(os.path.dirname(fresh)) == os.path.dirname(path)))
        replace(fresh, path)

    monkeypatch.setattr(os, "replace", move)
    mask = os.umask(0)
    try:
        assert configuring.write_config(**FULL, env_file=other_file) == other_file
    finally:
        os.umask(mask)
    assert moves == [(0o600, True)] and os.stat(other_file).st_mode & 0o777 == 0o600


def test_a_failed_write_leaves_the_old_file_and_nothing_else(monkeypatch, tmp_path, other_file):
    configuring.write_config(**FULL, env_file=other_file)
    before = os.listdir(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(ConfigurationError, match="other.env cannot be written .No space.*ACHILLES_ENV_FILE"):
        configuring.write_config("127.0.0.1", env_file=other_file)
    assert config.read_file(other_file)["HOST"] == "10.0.0.1" and os.listdir(tmp_path) == before


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be written"):
        configuring.write_config(**FULL, env_file=tmp_path / "none" / ".env")


@pytest.mark.parametrize("name, value", [("username", "a\nb"), ("secret_key", LONG + "\r"), ("port", "1"),
                                         ("host", ""), ("secret_key", "short"), ("username", "")])
def test_nothing_unfit_is_written(other_file, name, value):
    with pytest.raises(ConfigurationError):
        configuring.write_config(**{**FULL, name: value}, env_file=other_file)
    assert not os.path.exists(other_file)


def test_a_file_written_without_values_is_complete():
    configuring.write_config()
    settings = config.resolve()
    assert (settings.host, settings.port) == ("127.0.0.1", 9999)
    assert settings.username and len(settings.secret.reveal()) >= 32


def test_write_overwrites_settings_and_keeps_the_lines_of_others(other_file):
    write(other_file, "# mine\nDATABASE=x\nexport HOST=old\nPREVIOUS_SECRET_KEY=old\n")
    configuring.write_config(**FULL, env_file=other_file)
    with open(other_file) as file:
        assert file.read() == (f"# mine\nDATABASE=x\nHOST='10.0.0.1'\nPORT='1234'\nUSERNAME='ann'\n"
                               f"SECRET_KEY='{LONG}'\n")


def test_update_keeps_what_the_file_holds(other_file):
    write(other_file, f"HOST=old\nUSERNAME=ann\nSECRET_KEY='{LONG}'\nPREVIOUS_SECRET_KEY='{LONG[::-1]}'\n")
    configuring.update_config("10.0.0.2", 7, env_file=other_file)
    assert config.read_file(other_file) == {"HOST": "10.0.0.2", "PORT": "7", "USERNAME": "ann",
                                            "SECRET_KEY": LONG, "PREVIOUS_SECRET_KEY": LONG[::-1]}


def test_update_needs_no_file(own_file):
    assert configuring.update_config("10.0.0.2", 7) == own_file
    assert config.read_file(own_file) == {"HOST": "10.0.0.2", "PORT": "7"}


def test_update_does_not_move_a_short_secret_off_loopback(other_file):
    configuring.write_config("127.0.0.1", 1, "foo", "bar", env_file=other_file)
    with pytest.raises(ConfigurationError, match="shorter than 16"):
        configuring.update_config("10.0.0.2", env_file=other_file)
    assert config.read_file(other_file)["HOST"] == "127.0.0.1"


def test_a_made_secret_is_long_enough_and_new_each_time():
    assert len(configuring.make_secret()) == 43 and configuring.make_secret() != configuring.make_secret()


# The dialogue


def test_a_server_is_asked_for_all_four_with_defaults(terminal, own_file, capsys):
    terminal += ["", "", "ann", ""]
    settings = config.resolve(role="server")
    assert (settings.host, settings.port, settings.username) == ("127.0.0.1", 9999, "ann")
    assert len(settings.secret.reveal()) == 43 and settings.env_file == own_file and not terminal
    assert config.read_file(own_file)["SECRET_KEY"] == settings.secret.reveal()
    out, err = capsys.readouterr()
    assert out == "" and settings.secret.reveal() not in err
    for text in ("host [127.0.0.1]: ", "port [9999]: ", "username: ", f"Saved in {own_file}", "scp -p",
                 "python -m achilles.node --env-file FILE"):
        assert text in err


def test_a_node_is_asked_for_what_is_missing_and_cannot_make_a_secret(terminal, other_file, capsys):
    terminal += ["ann", "", LONG]
    settings = config.resolve("10.0.0.1", 7, env_file=other_file, role="node")
    assert settings == config.Settings("10.0.0.1", 7, "ann", Secret(LONG), other_file) and not terminal
    assert config.resolve(env_file=other_file) == settings
    assert "empty" in capsys.readouterr().err


def test_an_answer_that_will_not_do_is_asked_for_again(terminal, other_file, capsys):
    terminal += ["a host", " 10.0.0.1 ", "many", "80", "", "u" * 33, "ann", "short", LONG]
    path = configuring.ask_config(env_file=other_file)
    assert path == other_file and not terminal
    assert config.read_file(path) == {"HOST": "10.0.0.1", "PORT": "80", "USERNAME": "ann", "SECRET_KEY": LONG}
    err = capsys.readouterr().err
    assert err.count("port [9999]: ") == 2 and "shorter than 16" in err and "short:" not in err


def test_the_secret_is_asked_for_without_echo(monkeypatch, terminal, other_file):
    monkeypatch.setattr(getpass, "getpass", lambda prompt: LONG)
    configuring.ask_config("127.0.0.1", 1, "ann", env_file=other_file)
    assert config.read_file(other_file)["SECRET_KEY"] == LONG


def test_input_that_ends_saves_nothing(terminal, other_file):
    terminal += ["127.0.0.1"]
    with pytest.raises(ConfigurationError, match="input ended"):
        config.resolve(env_file=other_file)
    assert not os.path.exists(other_file)


def test_the_dialogue_keeps_what_the_file_holds(terminal, other_file):
    write(other_file, f"HOST=10.0.0.1\nPORT=7\nSECRET_KEY='{LONG}'\nOTHER=1\n")
    terminal += ["ann"]
    assert config.resolve(env_file=other_file).secret == Secret(LONG)
    with open(other_file) as file:
        assert file.readline() == "OTHER=1\n"
    assert config.read_file(other_file)["PORT"] == "7" and not terminal


def test_gen_config_without_anybody_to_ask_names_every_way(own_file):
    with pytest.raises(ConfigurationError, match="input ended at .*host.*nothing is saved") as error:
        configuring.ask_config(username="ann")
    for way in ("no host, secret_key", "host=..., secret_key=...", "ACHILLES_SECRET_KEY", own_file, "--write-config"):
        assert way in str(error.value)
    with pytest.raises(ConfigurationError, match="no port"):
        configuring.ask_config("h", None, "ann", LONG)
    assert not os.path.exists(own_file)
