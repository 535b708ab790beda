"""`python -m tests.bench`: the modules here import each other, and the tests' cluster, as from the tests' folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS.parent), os.environ.get("PYTHONPATH")]))

if __name__ == "__main__":
    from bench.run import main

    sys.exit(main())
