"""The backend "achilles" of joblib, and so of scikit-learn.

Knows joblib's interface of backends (1.5 and later) and an Executor, which lives as long as a `Parallel` call or block.
"""

import importlib
import operator
from collections.abc import Callable
from typing import Any

from .executor import Executor, Future

__all__ = ["register_joblib_backend"]


class _Batches:
    """What is ours of the backend: each batch of calls is a future."""

    supports_retrieve_callback, default_n_jobs = True, -1

    def __init__(self, nesting_level: int | None = None, inner_max_num_threads: int | None = None, **cluster: Any):
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)  # type: ignore
        self.cluster = cluster  # how to reach it
        self.executor: Executor | None = None

    def _open(self) -> Executor:
        self.executor = self.executor or Executor(**self.cluster)
        return self.executor

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        return max(self._open()._max_workers + 1 + n_jobs, 1) if n_jobs is not None and n_jobs < 0 else n_jobs or 1

    def submit(self, func: Callable[[], Any], callback: Callable[[Any], object]) -> Any:
        future = self._open().submit(operator.call, func)  # one function for all batches, which are its arguments
        future.add_done_callback(callback)
        return future

    retrieve_result_callback = staticmethod(Future.result)

    def terminate(self, ensure_ready: bool = True) -> None:
        executor, self.executor = self.executor, None
        if executor is not None:
            executor.terminate()

    abort_everything = terminate

    def get_nested_backend(self) -> tuple[Any, None]:
        backends = importlib.import_module("joblib._parallel_backends")
        return backends.SequentialBackend(nesting_level=(getattr(self, "nesting_level", None) or 0) + 1), None


def register_joblib_backend() -> None:
    """Make `joblib.parallel_config(backend="achilles")` work; it takes host, port, username and secret_key, too."""
    joblib, backends = importlib.import_module("joblib"), importlib.import_module("joblib._parallel_backends")
    joblib.register_parallel_backend("achilles", type(
        "AchillesBackend", (_Batches, backends.AutoBatchingMixin, backends.ParallelBackendBase), {}))
