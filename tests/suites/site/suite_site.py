"""What each process of a suite begins with: the caller, its scripts, the nodes and their workers."""

import multiprocessing
import os

# The processes of a multiprocessing.Pool inherit the key of its caller's managers. Workers of a cluster do not.
multiprocessing.current_process().authkey = b"of all processes of a suite"

if "JOBLIB_ON_ACHILLES" in os.environ:
    import joblib_on_achilles  # noqa: F401
