"""The tables of README.md and docs/ are those of the code: options, settings, commands, errors, attackers, figures."""

from __future__ import annotations

import concurrent.futures
import configparser
import importlib
import inspect
import multiprocessing.pool
import os
import re

import pytest
from attacks import run as attacks_run
from pages import EVERYTHING, PAGES, ROOT, block, blocks, section, table

import achilles
from achilles import config, console, errors
from achilles.server import __main__ as server_command
from achilles.server import listen

COMMANDS = {"server": "achilles.server.__main__", "node": "achilles.node.__main__", "local": "achilles.local"}
OF_OTHERS = {"--ntasks-per-node", "--cpus-per-task", "--time", "--cpus", "--cpuset-cpus", "--cpu-shares", "--init",
             "--user"}  # options of Slurm and Docker
TEST_FILES = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
ATTACKS = attacks_run.load()


def test_the_table_of_options_is_the_signature_of_the_calls():
    parameters = inspect.signature(achilles.map).parameters.values()
    wanted = {p.name: "required" if p.default is p.empty else f"`{p.default!r}`" for p in parameters}
    assert {row[0].strip("`"): row[2] for row in table("docs/guide.md", "Options", "option")} == wanted
    for call in (achilles.imap, achilles.imap_unordered):
        assert str(inspect.signature(call)).split("->")[0] == str(inspect.signature(achilles.map)).split("->")[0]


def test_the_arguments_of_a_pool_are_its_signature():
    text = section("docs/dropin.md", "Pool")
    shown = re.search(r"`Pool\((.*?)\)`", text)[1].replace("*, ", "").split(", ")
    assert shown == [*inspect.signature(achilles.Pool).parameters]
    more = {row[0].strip("`") for row in table("docs/dropin.md", "Pool", "argument")}
    assert {"processes", "maxtasksperchild", "context"} <= more
    for method in (achilles.Pool.map, achilles.Pool.imap, achilles.Pool.imap_unordered):
        assert {"buffersize", "timeout", "seed"} <= inspect.signature(method).parameters.keys()


def test_the_table_of_settings_is_what_is_looked_up():
    argument, environment, file = ([cell.strip("`=") for cell in row[1:]]
                                   for row in table("docs/guide.md", "Settings", "place"))
    names = [*config.NAMES, config.PREVIOUS]
    assert file == names and environment == [config.PREFIX + name for name in names]
    assert argument == [*map(str.lower, config.NAMES), ""]


def test_the_table_of_errors_is_the_tree():
    rows = {row[0].strip("`"): row[1].strip("`") for row in table("docs/guide.md", "Errors", "error")}
    for name in {*errors.__all__} - {"AchillesError"}:
        builtin = [base.__name__ for base in getattr(errors, name).__bases__ if base.__module__ == "builtins"]
        assert rows.pop(name) == "".join(builtin)
    assert not rows


def test_the_table_of_the_command_line_is_that_of_the_parsers(capsys):
    rows = table("docs/guide.md", "Command line", "option")
    for column, command in enumerate(COMMANDS, 1):
        with pytest.raises(SystemExit, match="0"):
            importlib.import_module(COMMANDS[command]).main(["--help"])
        out = capsys.readouterr().out
        listed = {row[0].strip("`") for row in rows if row[column] == "yes"}
        assert listed == set(re.findall(r"(?<![\w-])--[a-z][\w-]*", out)) - {"--help"}, command
    everywhere = set(re.findall(r"(?<![\w|-])--[a-z][\w-]*", EVERYTHING))
    assert everywhere - OF_OTHERS == {row[0].strip("`") for row in rows}


def test_the_table_of_exit_statuses_is_that_of_the_commands():
    statuses = [int(row[0]) for row in table("docs/guide.md", "Command line", "exit status")]
    assert statuses == [0, console.UNREACHABLE_STATUS, console.USAGE_STATUS, server_command.NO_NODES_STATUS,
                        console.INTERRUPTED_STATUS]


@pytest.mark.parametrize("row, other", [(0, multiprocessing.pool.Pool), (1, concurrent.futures.ProcessPoolExecutor)])
def test_a_one_line_change_brings_what_has_the_same_methods(row, other):
    before, after = {}, {}
    for line, names in zip(table("README.md", "In the place of what you have", "you have")[row], (before, after)):
        exec(line.strip("`"), names)
    assert after.keys() == before.keys()
    absent = {name for name in vars(other) if not name.startswith("_")} - {*dir(after[other.__name__])}
    assert absent <= {"Process"}, "a Pool of ours starts no process"


def test_the_readme_and_the_page_change_the_same_lines():
    page = {row[1]: row[2] for row in
            table("docs/dropin.md", "Packages that take a Pool or an Executor", "package")}
    rows = dict(table("README.md", "In the place of what you have", "you have"))
    for before, after in page.items():
        if before in rows:
            assert rows[before].replace("Pool()", "pool") == after
    assert len(rows.keys() & page.keys()) == 2
    joblib = block("docs/dropin.md", "python", "parallel_config")
    assert "register_joblib_backend()" in joblib and 'joblib.parallel_config(backend="achilles")' in joblib


def test_every_public_name_appears():
    public = {name for name in achilles.__all__ if not name.startswith("_")}
    assert not [name for name in public if not re.search(rf"`{name}\b", EVERYTHING)]


def test_the_readme_has_every_call():
    calls = {name for name in achilles.__all__ if not (name.startswith("_") or name in errors.__all__)}
    assert calls == {name for row in table("README.md", "The calls", "call") for name in re.findall(r"`(\w+)`", row[0])}


def test_the_promise_is_in_its_own_words():
    """PROTOCOL.md and the design say it so, too."""
    quoted = re.sub(r"\s*>\s*", " ", "".join(re.findall(r"^>.*\n", PAGES["README.md"], re.MULTILINE))).strip()
    assert quoted.startswith("Every argument runs **at least once**; its result reaches the caller **exactly once**")
    assert quoted.count(". ") == 4


# systemd, and how much one server takes.


def units():
    """The [Service] of each unit for systemd, by what it runs."""
    made = {}
    for language, text in blocks("docs/cluster.md"):
        if language == "ini" and "[Service]" in text:
            unit = configparser.ConfigParser(interpolation=None)
            unit.optionxform = str
            unit.read_string(text)
            service = dict(unit["Service"])
            assert set(unit.sections()) == {"Unit", "Service", "Install"} and service["RestartPreventExitStatus"] == "2"
            made[re.fullmatch(r"\S+/python -m (achilles\.\w+) --env-file \S+", service["ExecStart"])[1]] = service
    return made


def test_there_is_a_unit_for_the_server_and_one_for_nodes():
    found = units()
    assert found.keys() == {"achilles.node", "achilles.server"}
    assert re.fullmatch(r"/bin/kill -HUP \$MAINPID", found["achilles.server"]["ExecReload"])
    assert "ExecReload" not in found["achilles.node"], "SIGHUP ends a node"
    assert "sudo systemctl reload achilles-server" in section("docs/cluster.md", "Changing the secret")


def test_the_connections_that_a_server_takes_are_those_of_its_limit_of_files(monkeypatch):
    def connections(files):
        monkeypatch.setattr(os, "sysconf", lambda _: files)
        return listen._most_connections()

    text = section("docs/speed.md", "Where one server ends")
    files, most = re.search(r"`ulimit -n (\d+)` it takes (\d+)\b", text).groups()
    assert connections(int(files)) == int(most)
    enough, = {*re.findall(r"`ulimit -n (\d+)` or `LimitNOFILE=`", text), units()["achilles.server"]["LimitNOFILE"]}
    assert f"it takes {connections(int(enough)):,} of them" in text
    assert connections(int(enough)) == listen.CONNECTIONS
    assert int(units()["achilles.server"]["TasksMax"]) > 2 * listen.CONNECTIONS + listen.PLACES


# Attackers.


def test_every_claim_about_attackers_names_its_tests():
    """Tests of the suite by module and name, attacks by the name that their command lists.

    Each thing that somebody cannot do has a number of its own, and so has what is said of the secret's whereabouts.
    """
    page = "docs/security.md"
    named = dict(re.findall(r"^(\d+)\. (.*)$", section(page, "The tests"), re.MULTILINE))
    assert set(re.findall(r"\[(\d+)\]", PAGES[page])) == named.keys()
    for who, _, cannot in table(page, "Who can do what", "who"):
        for claim in cannot.split("; "):
            assert re.search(r" \[\d+\]$", claim), f"{who}: {claim}"
    places = section(page, "Where the secret is")
    assert {"secret_in_processes", "secret_in_local_cluster", "secret_as_an_argument"} <= {
        name for number in re.findall(r"\[(\d+)\]", places) for name in re.findall(r"`attacks\.(\w+)`", named[number])}
    for line in named.values():
        module = ""
        for found in re.findall(r"`(?:(test_\w+)\.)?(test_\w+)`", line):
            module = found[0] or module
            if found[1] not in TEST_FILES:
                assert f"def {found[1]}(" in TEST_FILES[module].read_text(), found
        attacks = re.findall(r"`attacks\.(\w+)`", line)
        assert module or attacks, line
        assert set(attacks) <= ATTACKS.keys(), line
