"""The tables of cases: what multiprocessing's Pool gives under fork is what comes out of letters, and of a Pool.

Each file of tests/payload_cases named `cases_*.py` is run as a whole: as a script and as a notebook would, against
a worker process that loads and dumps letters; as a script that has a Pool on a cluster; and against
multiprocessing's own Pool, which must agree wherever a case does not say why not. A number in a file's name is
the oldest Python that can compile it.
"""

from __future__ import annotations

import pytest
from tables import FOLDER, MODES, check, outcomes

FILES = {file.stem: (file, None) for file in sorted(FOLDER.glob("cases_*.py"))}
MODULES = {"relative": "__main__.py", "relative.mod": "mod.py"}  # run by `python -m`
FILES |= {name: (FOLDER / "folder/relative" / file, name) for name, file in MODULES.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stem", FILES)
def test_table(stem: str, mode: str) -> None:
    file, module = FILES[stem]
    check(file, outcomes(file, mode, module))
