"""The tables of cases: what multiprocessing's Pool gives under fork is what comes out of letters, and of a Pool.

Each file of tests/payload_cases named `cases_*.py` is run as a whole: as a script and as a notebook would, against
a worker process that loads and dumps letters; as a script that has a Pool on a cluster; and against
multiprocessing's own Pool, which must agree wherever a case does not say why not. A number in a file's name is
the oldest Python that can compile it.
"""

from __future__ import annotations

import pytest
from tables import FOLDER, check, check_fork, names_of, outcomes

FILES = {file.stem: (file, None) for file in sorted(FOLDER.glob("cases_*.py"))}
MODULES = {"relative": "__main__.py", "relative.mod": "mod.py"}  # run by `python -m`
FILES |= {name: (FOLDER / "folder/relative" / file, name) for name, file in MODULES.items()}
CASES = [(stem, name) for stem, (file, _) in FILES.items() for name in names_of(file)]


@pytest.mark.parametrize("stem", FILES)
def test_multiprocessing_agrees(stem: str) -> None:
    file, module = FILES[stem]
    check_fork(file, outcomes(file, "fork", module))


@pytest.mark.parametrize("mode", ["script", "notebook", "pool"])
@pytest.mark.parametrize(("stem", "name"), CASES)
def test_case(stem: str, name: str, mode: str) -> None:
    file, module = FILES[stem]
    check(outcomes(file, mode, module)[name])
