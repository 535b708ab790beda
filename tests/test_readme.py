"""The README: its examples print what it says, its tables are those of the code, its commands and links work."""

from __future__ import annotations

import configparser
import contextlib
import importlib
import inspect
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from attacks import run as attacks_run
from ports import free_port
from test_imports import needed_at_import

import achilles
from achilles import errors
from achilles.server import listen

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SCRIPT_SECONDS = 30  # below the test's own limit, so that what hangs is shown
PYTHON = [sys.executable, "-W", "error"]
COMMANDS = {"server": "achilles.server.__main__", "node": "achilles.node.__main__", "local": "achilles.local"}
TEST_FILES = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
ATTACKS = attacks_run.load()


def blocks():
    """(language, text) of each fenced block, in order, without the indentation of the list it stands in."""
    for indent, language, text in BLOCK.findall(README):
        yield language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)


def examples():
    """(script, how to compare, what it prints) of each Python block whose output is shown."""
    script = ""
    for language, text in blocks():
        if language == "python":
            script = text
        elif language in ("out", "out unordered"):
            yield script, language, text


def section(heading):
    """The text below a heading, up to the next one of its level or above."""
    level = re.search(rf"^(#+) {re.escape(heading)}$", README, re.MULTILINE)
    rest = README[level.end():]
    prose = re.sub(r"```.*?```", lambda block: " " * len(block[0]), rest, flags=re.DOTALL)  # "#" begins comments there
    end = re.search(rf"^#{{1,{len(level[1])}}} ", prose, re.MULTILINE)
    return rest[:end.start()] if end else rest


def table(heading, first):
    """The rows of the table in a section whose first column is called `first`."""
    lines = section(heading).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


class Cluster:
    """A server and a node of eight workers, as the README starts them, at `port` instead of 9999."""

    def __init__(self, folder):
        self.folder = folder
        self.port = free_port()
        env_file = str(folder / "cluster.env")
        clean = {name: value for name, value in os.environ.items() if not name.startswith("ACHILLES_")}
        paths = [str(Path(achilles.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        self.environment = clean | {"ACHILLES_ENV_FILE": env_file, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.run("-m", "achilles.server", "--write-config", "--port", str(self.port), "--env-file", env_file)
        self.server, self.server_says = self.start("server", lines=2)
        self.node, self.node_says = self.start("node", "--cpu-count", "8", lines=4)
        self.killed = False

    def start(self, role, *options, lines):
        """The process, and its first lines."""
        with open(self.folder / f"{role}.log", "wb") as log:
            process = subprocess.Popen(
                [*PYTHON, "-m", f"achilles.{role}", "--log-level", "debug", *options], stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=log, text=True, env=self.environment, cwd=self.folder)
        return process, "".join(process.stdout.readline() for _ in range(lines))

    def run(self, *arguments):
        """What a script or command printed: (stdout, stderr); it must end with status 0."""
        done = subprocess.run([*PYTHON, *map(str, arguments)], env=self.environment, cwd=self.folder, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=SCRIPT_SECONDS)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    def run_script(self, text):
        path = self.folder / "script.py"
        path.write_text(text)
        return self.run(path)

    def stop(self):
        if not self.killed:
            self.node.terminate()
        assert self.node.wait(SCRIPT_SECONDS) == 0
        self.server.send_signal(signal.SIGKILL if self.killed else signal.SIGTERM)  # it would stay for ten seconds
        self.server.wait(SCRIPT_SECONDS)
        for process in (self.server, self.node):
            process.stdout.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        made = Cluster(tmp_path_factory.mktemp("readme"))
        stack.callback(made.stop)
        yield made


RUN = [each for each in examples() if "kill_cluster" not in each[0]]


def test_all_examples_are_found():
    assert len(RUN) == 13
    assert len([language for language, _ in blocks() if language.startswith("out")]) == len(RUN) + 3


@pytest.mark.parametrize("script, how, expected", RUN, ids=[str(n) for n in range(len(RUN))])
def test_an_example_prints_what_the_readme_says(cluster, script, how, expected):
    out, _ = cluster.run_script(script)
    if "unordered" in how:
        out, expected = sorted(out.splitlines()), sorted(expected.splitlines())
    assert out == expected


def test_server_and_node_print_what_the_readme_says(cluster):
    out = dict(blocks())
    assert cluster.server_says == out["out server"].replace("9999", str(cluster.port))
    assert cluster.node_says == out["out node"].replace("9999", str(cluster.port))


def test_status_has_the_columns_that_the_readme_shows(cluster):
    out, _ = cluster.run("-m", "achilles.server", "--status")
    shown = next(text for language, text in blocks() if language == "text")
    heads = [[line.split() for line in text.splitlines() if line.startswith("id ")] for text in (out, shown)]
    assert heads[0] == heads[1] != []


def normal(line):
    """A line of a log without what is another one in each run."""
    return re.sub(r"\d+", "N", re.sub(r"\b[0-9a-f]{16}\b", "H", line))


def logged(log):
    """The normalised lines of a log, without time, level and logger."""
    return {normal(re.sub(r"^.*?(DEBUG|INFO)[: ]achilles\.[\w.]+: ?", "", line)) for line in log.splitlines()}


def test_the_map_that_is_followed_logs_these_lines(cluster):
    text = section("One map, followed")
    lines = "".join(re.findall(r"```log\n(.*?)```", text, re.DOTALL)).splitlines()
    assert len(lines) > 20
    missing = [line.split(None, 1) for line in lines]
    _, log = cluster.run_script(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    deadline = time.monotonic() + SCRIPT_SECONDS
    while missing and time.monotonic() < deadline:
        cluster.run("-m", "achilles.server", "--status")  # meanwhile server and node write the end of their logs
        kept = {"caller": logged(log)}
        kept |= {role: logged((cluster.folder / f"{role}.log").read_text()) for role in ("server", "node")}
        missing = [(role, line) for role, line in missing if normal(line) not in kept[role]]
    assert not missing


def test_the_other_python_blocks_are_python():
    for language, text in blocks():
        if language == "python":
            compile(text, "README.md", "exec")


def test_the_two_commands_are_those_of_ci():
    commands = [text.strip() for language, text in blocks() if language == "sh"]
    ci = (ROOT / ".ci/run").read_text()
    assert commands[:2] == [
        "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/python -m achilles.local examples/word_count.py",
        "pip install tox && tox"]
    for pattern in (r"-m venv ", r"pip\" install (--quiet )?\.$", r"-m achilles\.local .*examples/\$example\.py",
                    r"for example in .*word_count", r"^pip install (--quiet )?tox$", r"^tox$"):
        assert re.search(pattern, ci, re.MULTILINE), pattern
    assert "commands = pytest -n 3 {posargs}" in (ROOT / "tox.ini").read_text()


def units():
    """The [Service] of each unit for systemd, by what it runs."""
    made = {}
    for language, text in blocks():
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
    assert "sudo systemctl reload achilles-server" in section("Changing the secret")


def test_the_connections_that_a_server_takes_are_those_of_its_limit_of_files(monkeypatch):
    def connections(files):
        monkeypatch.setattr(os, "sysconf", lambda _: files)
        return listen._most_connections()

    text = section("How fast, and how far")
    files, most = re.search(r"`ulimit -n (\d+)` it takes (\d+)\b", text).groups()
    assert connections(int(files)) == int(most)
    enough, = {*re.findall(r"`ulimit -n (\d+)` or `LimitNOFILE=`", text), units()["achilles.server"]["LimitNOFILE"]}
    assert f"it takes {connections(int(enough)):,} of them" in text
    assert connections(int(enough)) == listen.CONNECTIONS
    assert int(units()["achilles.server"]["TasksMax"]) > 2 * listen.CONNECTIONS + listen.PLACES


def test_the_table_of_options_is_the_signature_of_the_calls():
    parameters = inspect.signature(achilles.map).parameters.values()
    wanted = {p.name: "required" if p.default is p.empty else f"`{p.default!r}`" for p in parameters}
    assert {row[0].strip("`"): row[2] for row in table("Options", "option")} == wanted
    for call in (achilles.imap, achilles.imap_unordered):
        assert str(inspect.signature(call)).split("->")[0] == str(inspect.signature(achilles.map)).split("->")[0]


def test_every_public_name_appears():
    missing = [name for name in achilles.__all__ if not name.startswith("_") and not re.search(rf"`{name}\b", README)]
    assert not missing


def test_the_table_of_errors_is_the_tree():
    rows = {row[0].strip("`"): row[1].strip("`") for row in table("Errors", "error")}
    for name in {*errors.__all__} - {"AchillesError"}:
        builtin = [base.__name__ for base in getattr(errors, name).__bases__ if base.__module__ == "builtins"]
        assert rows.pop(name) == "".join(builtin)
    assert not rows


def test_the_table_of_the_command_line_is_that_of_the_parsers(capsys):
    rows = table("Command line", "option")
    for column, command in enumerate(COMMANDS, 1):
        with pytest.raises(SystemExit, match="0"):
            importlib.import_module(COMMANDS[command]).main(["--help"])
        out = capsys.readouterr().out
        listed = {row[0].strip("`") for row in rows if row[column] == "yes"}
        assert listed == set(re.findall(r"(?<![\w-])--[a-z][\w-]*", out)) - {"--help"}, command
    everywhere = set(re.findall(r"(?<![\w|-])--[a-z][\w-]*", README))
    assert everywhere == {row[0].strip("`") for row in rows}


def test_every_claim_about_attackers_names_its_tests():
    """Tests of the suite by module and name, attacks by the name that their command lists.

    Each thing that somebody cannot do has a number of its own, and so has what is said of the secret's whereabouts.
    """
    text = section("Who can do what")
    named = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    prose = section("Trust").partition("\n### Hiding what travels")[0]
    assert set(re.findall(r"\[(\d+)\]", prose)) == named.keys()
    for who, _, cannot in table("Who can do what", "who"):
        for claim in cannot.split("; "):
            assert re.search(r" \[\d+\]$", claim), f"{who}: {claim}"
    place, = re.findall(r"^The secret is in a file .*$", text, re.MULTILINE)
    assert {"secret_in_processes", "secret_in_local_cluster", "secret_as_an_argument"} <= {
        name for number in re.findall(r"\[(\d+)\]", place) for name in re.findall(r"`attacks\.(\w+)`", named[number])}
    for line in named.values():
        module = ""
        for found in re.findall(r"`(?:(test_\w+)\.)?(test_\w+)`", line):
            module = found[0] or module
            if found[1] not in TEST_FILES:
                assert f"def {found[1]}(" in TEST_FILES[module].read_text(), found
        attacks = re.findall(r"`attacks\.(\w+)`", line)
        assert module or attacks, line
        assert set(attacks) <= ATTACKS.keys(), line


def slug(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_within_the_project_resolve():
    prose = re.sub(r"^ *```.*?^ *```$", "", README, flags=re.MULTILINE | re.DOTALL)
    anchors = [slug(heading) for heading in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)]
    assert len(anchors) == len(set(anchors))
    links = [link for link in re.findall(r"\]\(([^)]+)\)", prose) if not link.startswith("https://")]
    assert len(links) > 30
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists() if path else anchor in anchors, link
    contents = set(re.findall(r"\]\(#([^)]+)\)", section("Contents")))
    assert contents == set(anchors) - {"achilles", "contents"}


def test_the_reading_order_has_every_module():
    listed = re.findall(r"\]\(achilles/([\w/]+)\.py\)", section("Reading the code"))
    names = [path.replace("/", ".") for path in listed]
    for number, name in enumerate(names):
        assert needed_at_import(name) <= set(names[:number]), name
    package = ROOT / "achilles"
    there = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"}
    there = {path for path in there if not path.startswith("lineReceiver/")} | {"lineReceiver/achilles_main.py"}
    assert sorted(f"{path}.py" for path in listed) == sorted(there)


def test_kill_cluster_prints_what_the_readme_says(cluster):
    (script, _, expected), = [each for each in examples() if "kill_cluster" in each[0]]
    cluster.killed = True
    out, _ = cluster.run_script(script)
    assert out == expected
    assert cluster.node.wait(SCRIPT_SECONDS) == 0
