"""What people define in a script with pydantic, attrs, pandas and scikit-learn: the tables of this folder.

They run as those of tests/payload_cases do; a package that is not installed is skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tables import check, check_fork, names_of, outcomes

FOLDER = Path(__file__).parent
NEEDS = {"pydantic": "pydantic", "attrs": "attrs", "pandas": "pandas", "estimators": "sklearn"}
CASES = [(stem, name) for stem in NEEDS for name in names_of(FOLDER / f"cases_{stem}.py")]


def found(stem: str, mode: str) -> dict[str, str]:
    pytest.importorskip(NEEDS[stem])
    return outcomes(FOLDER / f"cases_{stem}.py", mode, warnings="default")  # what other packages warn of is theirs


@pytest.mark.parametrize("stem", NEEDS)
def test_multiprocessing_agrees(stem: str) -> None:
    check_fork(FOLDER / f"cases_{stem}.py", found(stem, "fork"))


@pytest.mark.parametrize("mode", ["script", "notebook", "pool"])
@pytest.mark.parametrize(("stem", "name"), CASES)
def test_case(stem: str, name: str, mode: str) -> None:
    check(found(stem, mode)[name])
