"""The examples that need other packages, each on clusters of their own, as their headers say.

Run by `tox -e ecosystem`; an example is skipped where its package is not installed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
DEADLINE_SECONDS = 100  # below the test's own, so that what hangs is ended and its output shown


def run(script, *arguments, nodes):
    """Run an example on a cluster of its own; return what it printed, on stdout and on stderr."""
    command = [sys.executable, "-m", "achilles.local", "--nodes", str(nodes), "--cpu-count", "1",
               str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=DEADLINE_SECONDS, cwd=EXAMPLES)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def header(script):
    return (EXAMPLES / script).read_text(encoding="utf-8")


@pytest.mark.parametrize("nodes", [1, 3])
def test_hyper_parameters_prints_the_same_on_any_number_of_nodes(nodes):
    pytest.importorskip("sklearn")
    pytest.importorskip("joblib")
    out, _ = run("hyper_parameters.py", nodes=nodes)
    assert "".join(f"    {line}\n" for line in out.splitlines()) in header("hyper_parameters.py")


@pytest.mark.parametrize("nodes", [1, 3])
def test_file_hashes_prints_those_of_all_files_and_a_bar(tmp_path, nodes):
    pytest.importorskip("tqdm")
    contents = {f"{number:03}.txt": b"%d\n" % number * number for number in range(50)}
    contents |= {"deeper/a b": bytes(3_000_000), "hundred_zeros": bytes(100)}
    for name, content in contents.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    out, err = run("file_hashes.py", tmp_path, nodes=nodes)
    assert out.splitlines() == [
        f"{hashlib.sha256(contents[name]).hexdigest()}  {tmp_path / name}" for name in sorted(contents)]
    assert f"{hashlib.sha256(bytes(100)).hexdigest()}  /data/hundred_zeros" in header("file_hashes.py")
    assert f"{len(contents)}/{len(contents)} [" in err and "100%" in err


def test_file_hashes_of_an_empty_folder_is_nothing(tmp_path):
    pytest.importorskip("tqdm")
    assert run("file_hashes.py", tmp_path, nodes=1)[0] == ""
