"""joblib's own tests of Parallel, with the backend "achilles" in the place of joblib's backends of processes."""

from __future__ import annotations

import atexit
import contextlib
import warnings

import pytest
import suite

pytest.importorskip("joblib")

WORKERS = 4  # as many as these tests ask for at a time

ONE_BY_ONE = "A worker is one core: nested calls run there one by one, not in threads."
NO_WARNING = "Our backend has nothing to warn of where calls are nested."
NO_MAPS = "Arguments travel over the network: none is a map of a file on this machine."
NOT_OURS = {
    "test_effective_n_jobs_None negative-int-*": "It takes the cores of this machine for those of the cluster.",
    "test_nested_parallel_warnings *-True": NO_WARNING,
    "test_parallel_pickling": "The error is a DumpError, and names the argument.",
    "test_error_capture *": "It looks at the pool of joblib's own backends.",
    "test_nested_backend_context_manager *-[lbm]*": ONE_BY_ONE,
    "test_nested_parallelism_limit *-loky": ONE_BY_ONE,
    "test_nested_backend_in_sequential *": "Without n_jobs, a call has the whole cluster, as with Dask.",
    "test_parallel_with_interactively_defined_bound_method_loky": "It looks for the log of loky's processes.",
    "test_auto_memmap_on_arrays_from_generator *": NO_MAPS,
    "test_memmapping_leaks *": NO_MAPS,
    "test_multiple_generator_call_separated_gc *-loky-True": "Calls share no executor: the second one does not fail.",
    "test_globals_update_at_each_parallel_call": "A function of an installed module sees it as the node imports it.",
    "test_threadpool_limitation_in_child_override *": "The environment of this machine is not that of the workers.",
    "test_initializer_reused *": "Each call with an initializer begins with workers of its own.",
}

stack = contextlib.ExitStack()
atexit.register(stack.close)
patch = stack.enter_context(suite.cluster(WORKERS))  # the module that is imported now asks how many workers there are
patch.setenv("JOBLIB_ON_ACHILLES", "1")  # for scripts that tests run
patch.setenv("LOKY_MAX_CPU_COUNT", "2")  # of the caller; joblib divides them, and a worker of ours has one in any case
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of marks that joblib's own configuration declares
    import joblib_on_achilles
    from joblib.test import test_parallel
    from joblib.test.test_parallel import *  # noqa: F403
test_parallel.MultiprocessingBackend = joblib_on_achilles.ours  # only here: joblib's own class refers to itself

pytestmark = pytest.mark.filterwarnings("default")  # what is left open by tests that fail is warned of
not_ours = suite.exceptions(NOT_OURS)


def test_all_exceptions_are_tests(request):
    suite.check_table(request, NOT_OURS)
