"""A server that tells, as it ends, what it has imported: `python watched.py FILE [options of achilles.server]`."""

from __future__ import annotations

import sys

path = sys.argv.pop(1)
sys.path[0] = sys.path[-1]  # not this folder: what is in it has names of its own
import runpy  # noqa: E402

try:
    runpy.run_module("achilles.server", run_name="__main__", alter_sys=True)
finally:
    with open(path, "w") as file:
        file.write("\n".join(sys.modules))
