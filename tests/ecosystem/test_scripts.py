"""What people define in a script with pydantic, attrs, pandas and scikit-learn: the tables of this folder.

They run as those of tests/payload_cases do; a package that is not installed is skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tables import MODES, check, outcomes

FOLDER = Path(__file__).parent
NEEDS = {"pydantic": "pydantic", "attrs": "attrs", "pandas": "pandas", "estimators": "sklearn"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stem", NEEDS)
def test_table(stem: str, mode: str) -> None:
    pytest.importorskip(NEEDS[stem])
    file = FOLDER / f"cases_{stem}.py"
    check(file, outcomes(file, mode, warnings="default"))  # what other packages warn of is theirs
