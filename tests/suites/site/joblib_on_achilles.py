"""Puts achilles in the place of joblib's backends of processes: "loky", which is the default, and "multiprocessing"."""

from joblib import _parallel_backends, parallel

from achilles import register_joblib_backend

register_joblib_backend()
ours = parallel.BACKENDS.pop("achilles")
parallel.BACKENDS |= {"loky": ours, "multiprocessing": ours}
_parallel_backends.LokyBackend = ours  # a test has a subclass of it
