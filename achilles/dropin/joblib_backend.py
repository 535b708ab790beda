"""The backend "achilles" of joblib, and so of scikit-learn.

The module knows joblib's interface of backends (1.5 and later), and an Executor for each `Parallel` call or block.
"""

import importlib
import operator
import types
from collections.abc import Callable
from typing import Any

from .executor import Executor, Future

__all__ = ["register_joblib_backend"]

_Joblibs: Any = object  # Any, because `register_joblib_backend` adds joblib's classes
JOBLIBS_OWN = {"max_nbytes", "temp_folder", "mmap_mode", "prefer", "require", "verbose", "context"}  # joblib's pools


class _Batches(_Joblibs):  # type: ignore[misc]
    """Our part of the backend: each batch of calls is a future. `backend_kwargs`, which joblib keeps, go to Executor.
    """

    supports_retrieve_callback = supports_inner_max_num_threads = True
    default_n_jobs = -1
    executor: Executor | None = None
    bound: int | None = None  # how many batches may run at a time; None is the whole cluster

    def configure(self, n_jobs: int = 1, parallel: Any = None, **more: Any) -> int:
        self.backend_kwargs |= {name: value for name, value in more.items() if name not in JOBLIBS_OWN}
        self.parallel = parallel
        if n_jobs == 1:
            raise self.backends.FallbackToBackend(self.backends.SequentialBackend(nesting_level=self.nesting_level))
        count = self._count(n_jobs)
        if n_jobs != -1:
            self.terminate()
            self.bound = count
        return max(count, 2)

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return 1 for `n_jobs=1` alone, not for a cluster of one worker: with 1, joblib runs all in the caller."""
        return 1 if n_jobs in (1, None) else max(self._count(n_jobs), 2)

    def _count(self, n_jobs: int) -> int:
        """How many batches may run at a time. If the count of workers decides, wait for a node."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        return max(self._open().wait_for_workers() + 1 + n_jobs, 1) if n_jobs < 0 else n_jobs

    def _open(self) -> Executor:
        if self.executor is None:
            options = {"max_workers": self.bound, **self.backend_kwargs}
            if self.inner_max_num_threads is not None:
                begin = types.FunctionType(_begin_worker.__code__, {"__name__": "__main__"})  # by value
                options |= {"initializer": begin, "initargs": (
                    self.inner_max_num_threads, self.MAX_NUM_THREADS_VARS,
                    options.get("initializer"), options.get("initargs", ()))}
            self.executor = Executor(**options)
        return self.executor

    def submit(self, func: Callable[[], Any], callback: Callable[[Any], object]) -> Any:
        future = self._open().submit(operator.call, func)  # one function for all batches
        future.add_done_callback(callback)
        return future

    retrieve_result_callback = staticmethod(Future.result)

    def terminate(self, ensure_ready: bool = True) -> None:
        self.reset_batch_stats()
        executor, self.executor = self.executor, None
        if executor is not None:
            executor.terminate()

    abort_everything = terminate

    def get_nested_backend(self) -> tuple[Any, None]:
        return self.backends.SequentialBackend(nesting_level=(getattr(self, "nesting_level", None) or 0) + 1), None


def _begin_worker(threads: int, names: list[str], initializer: Callable[..., Any] | None, initargs: Any) -> None:
    """Initialize a worker: limit the threads of its libraries."""
    import importlib.util
    import os

    os.environ.update(dict.fromkeys(names, str(threads)))
    if importlib.util.find_spec("threadpoolctl"):  # for libraries that are loaded already
        importlib.import_module("threadpoolctl").threadpool_limits(threads)
    if initializer is not None:
        initializer(*initargs)


def register_joblib_backend() -> None:
    """Make `joblib.parallel_config(backend="achilles")` work. It takes the arguments of Executor, too."""
    joblib, backends = importlib.import_module("joblib"), importlib.import_module("joblib._parallel_backends")
    joblib.register_parallel_backend("achilles", type(
        "AchillesBackend", (_Batches, backends.AutoBatchingMixin, backends.ParallelBackendBase),
        {"backends": backends}))
