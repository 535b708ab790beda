"""The examples: word_count's own functions, and each script on a cluster of its own, as its header says.

Those that need other packages are in ecosystem/test_example_scripts.py, tiny.py in test_tiny.py.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from ast import literal_eval
from collections import Counter
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
DEADLINE_SECONDS = 100  # below the test's own, so that what hangs is ended and its output shown
SQUARES = [number ** 4 for number in range(1, 11)]  # squared by the function, and by the callback


@pytest.fixture(scope="module")
def word_count():
    spec = importlib.util.spec_from_file_location("word_count", EXAMPLES / "word_count.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    """Three files to count, and four to pass over."""
    for name in ("b.txt", "a.py", "deeper/c.py", "f", "a.pyc", "site-packages/d.py", "x/dist-packages/e.py"):
        file = tmp_path / "site-packages" / name  # a folder that is asked for by name is not left out
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(f"The {file.stem} the_THE don't 3x \xff".encode("latin-1"))
    return tmp_path / "site-packages"


def run(script, *arguments, nodes=2):
    """Run an example on a cluster of its own; return its status and what it printed."""
    options = "--nodes", str(nodes)
    command = [sys.executable, "-m", "achilles.local", *options, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=DEADLINE_SECONDS, cwd=EXAMPLES)
    return done.returncode, done.stdout, done.stderr


def test_words_are_runs_of_letters_whatever_their_case(word_count):
    assert word_count.count_words("The the_THE don't 3x Übung ü\ufffd") == {
        "the": 3, "don": 1, "t": 1, "x": 1, "übung": 1, "ü": 1}


def test_files_of_a_folder_are_found_in_order_without_installed_packages(word_count, folder):
    found = [file.relative_to(folder).as_posix() for file in word_count.find_files([folder])]
    assert found == ["a.py", "b.txt", "deeper/c.py"]
    assert list(word_count.find_files([folder / "f", folder / "a.pyc"])) == [folder / "f", folder / "a.pyc"]


def test_bytes_that_are_not_utf8_are_replaced(word_count, folder):
    assert word_count.read(folder / "a.py").endswith(" \ufffd")


def test_equally_common_words_are_in_alphabetical_order(word_count):
    assert word_count.commonest(Counter("bca") + Counter("c"), 2) == [("c", 2), ("a", 1)]


def test_the_standard_library_is_the_default(word_count):
    files = list(word_count.find_files(word_count.parse_arguments([]).paths))
    assert any(file.name == "argparse.py" for file in files)
    assert not any("site-packages" in file.parts for file in files)


def test_a_path_that_does_not_exist_is_an_error(word_count, capsys):
    with pytest.raises(SystemExit, match="2"):
        word_count.parse_arguments(["/no/such/path"])
    assert "does not exist" in capsys.readouterr().err


def test_check_compares_with_one_process(word_count, folder, monkeypatch, capsys):
    def fake(func, args, chunksize):
        yield {"ARGS_COUNTER": 0, "RESULT": [func(text) for text in args()]}

    monkeypatch.setattr(word_count, "imap_unordered", fake)
    assert word_count.main(["--check", str(folder)]) == 0
    assert "one process counts the same" in capsys.readouterr().out
    monkeypatch.setattr(word_count, "count_on_cluster", lambda files: Counter())
    assert word_count.main(["--check", str(folder)]) == 1


def test_word_count_runs(folder):
    status, out, err = run("word_count.py", "--check", "--top", 2, folder)
    assert status == 0, err
    lines = out.splitlines()
    assert [line.split() for line in lines[:2]] == [["9", "the"], ["3", "don"]]
    assert lines[2].startswith("3 files, ") and lines[2].endswith(" MB/s")
    assert lines[3] == "check: one process counts the same"


def test_square_numbers_runs():
    status, out, err = run("square_numbers.py")
    assert status == 0, err
    printed = [literal_eval(line) for line in out.splitlines() if line[0] in "[{"]
    assert sum(printed[0], []) == SQUARES
    half = len(printed) // 2 + 1
    for packets, ordered in ((printed[1:half], True), (printed[half:], False)):
        if not ordered:
            packets = sorted(packets, key=lambda packet: packet["ARGS_COUNTER"])
        assert sum((packet["RESULT"] for packet in packets), []) == SQUARES


def test_sequential_jobs_runs():
    status, out, err = run("sequential_jobs.py")
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == "2,262 primes below 20,000, the largest 19,997"
    assert lines[1].endswith("of them have a twin, the largest 19,993") and len(lines) == 6


def test_monte_carlo_prints_the_same_digits_on_any_number_of_nodes():
    header = (EXAMPLES / "monte_carlo.py").read_text(encoding="utf-8")
    for nodes in (1, 3):
        status, out, err = run("monte_carlo.py", nodes=nodes)
        assert status == 0, err
        assert out.startswith("100,000 paths, seed 1: ") and f"    {out}" in header


def test_monte_carlo_takes_a_seed():
    printed = [run("monte_carlo.py", "--seed", seed, "--paths", 2500)[1] for seed in (7, 7, 8)]
    assert printed[0].startswith("2,000 paths, seed 7: ")
    assert printed[0] == printed[1]
    assert printed[0].split()[4:] != printed[2].split()[4:]
