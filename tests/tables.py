"""Runs a whole table of cases (payload_cases/peer.py), and checks its outcome."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "payload_cases"
MODES = ("fork", "script", "notebook", "pool")
# As a notebook does: in __main__, of no file.
NOTEBOOK = "import pathlib; exec(compile(pathlib.Path({path!r}).read_text(), '<cell>', 'exec'))"
# The parent of a fork has threads; those are multiprocessing's own.
FORK_WARNING = ("-W", "ignore:This process:DeprecationWarning")
SECONDS = 110  # below a test's own limit, so that what hangs is named


def names_of(file: Path) -> list[str]:
    """The names of a table's cases, without running it."""
    return re.findall(r'^ *@?(?:case|gives|program)\(\s*"([^"]+)"', file.read_text(), re.MULTILINE)


def outcomes(file: Path, mode: str, module: str | None = None, warnings: str = "error") -> dict[str, str]:
    """Case -> "", or "skipped: " and why, or what went wrong.

    :param module: how `python -m` finds the table in the folder of the cases; a script otherwise.
    """
    number = re.search(r"_3(\d\d)$", file.stem)
    if number and sys.version_info < (3, int(number[1])):
        return dict.fromkeys(names_of(file), "skipped: a newer Python's syntax")
    if module and mode == "notebook":
        return dict.fromkeys(names_of(file), "skipped: a module is no notebook")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(FOLDER / "folder", folder, dirs_exist_ok=True)
        # A letter names the file of its code, and must not name the package: the checkout may have its name.
        table = ["-m", module] if module else [str(shutil.copy(file, folder / "table.py"))]
        if mode == "pool":
            command = ["-m", "achilles.local", "--nodes", "1", "--cpu-count", "1", "launch.py", warnings, *table, mode]
        elif mode == "fork":
            command = [*FORK_WARNING, *table, mode]
        else:
            shutil.copytree(ROOT / "achilles", folder / "ventured")
            start = ["-c", NOTEBOOK.format(path=table[0])] if mode == "notebook" else table
            command = [*start, "payload", str(ROOT), name, "ventured", warnings]
        run = subprocess.run([sys.executable, "-W", warnings, *command, str(FOLDER)], stdout=subprocess.PIPE,
                             stdin=subprocess.DEVNULL, timeout=SECONDS, cwd=folder)
    assert run.returncode == 0, run.stdout.decode()[-2000:]
    return dict(json.loads(run.stdout.splitlines()[-1]))


def check(file: Path, found: dict[str, str]) -> None:
    """No case of the table failed, and the names are those that the source shows. Skipped where all cases are."""
    wrong = [f"{name}\n{text}" for name, text in found.items() if text and not text.startswith("skipped: ")]
    assert not wrong, "\n\n".join(wrong)
    assert sorted(found) == sorted(names_of(file))
    if all(found.values()):
        pytest.skip("; ".join({text.removeprefix("skipped: ") for text in found.values()}))
