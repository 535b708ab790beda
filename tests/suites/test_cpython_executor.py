"""CPython's own tests of executors, with `achilles.Executor` in the place of ProcessPoolExecutor."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import sys

import pytest
import suite

from achilles import Executor

pytest.importorskip("test.test_concurrent_futures.executor", reason="this Python came without its tests")
test_as_completed, test_init, test_process_pool, test_shutdown, test_wait, util = (
    importlib.import_module(f"test.test_concurrent_futures.{name}")
    for name in ("test_as_completed", "test_init", "test_process_pool", "test_shutdown", "test_wait", "util"))

WORKERS = 5  # as many as these tests ask for at a time

LOCAL = "It looks at the processes, threads or queues that a ProcessPoolExecutor has on this machine."
NOT_BROKEN = "A worker that dies is replaced, and what it did is done again: no executor is broken."
OWN_WORDS = "The error is of the same class, with a message of our own."

NOT_OURS = {
    "*.test_context_manager_shutdown": LOCAL,
    "*.test_del_shutdown": LOCAL,
    "*.test_idle_process_reuse_*": LOCAL,
    "*.test_max_tasks_per_child": LOCAL,
    "*.test_processes_terminate": LOCAL,
    "*.test_saturation": LOCAL,
    "*.test_shutdown_no_wait": LOCAL,
    "*.test_killed_child": NOT_BROKEN,
    "*FailingInitializerTest.test_initializer": "What an initializer raises is raised by each call.",
    "*.test_python_finalization_error": "It breaks the start of a thread that ProcessPoolExecutor has.",
    "*.test_max_tasks_per_child_defaults_to_spawn_context": "How workers are started is their node's choice.",
    "*.test_traceback": "The cause of an error is the RemoteTraceback of Pool, not the one of ProcessPoolExecutor.",
    "*.test_interpreter_shutdown": "What a worker prints appears at its node.",
    "*.test_hang_gh83386": "Its script uses a module that it does not import; a ProcessPoolExecutor skips it.",
}
SINCE_3_14 = {
    "*.test_force_shutdown_workers": LOCAL,
    "*.test_force_shutdown_workers_invalid_op": LOCAL,
    "*.test_force_shutdown_workers_stops_pool": LOCAL,
    "*.test_kill_workers": LOCAL,
    "*.test_shutdown_gh_132969_case_*": LOCAL,
    "*.test_terminate_workers": LOCAL,
    "*.test_force_shutdown_workers_dead_workers": NOT_BROKEN,
    "*.test_map_buffersize_*_validation": OWN_WORDS,
}
# Of the latest releases of 3.13 to 3.15, not of the first ones.
LATEST = {
    "test_failed_worker_replacement_breaks_pool": LOCAL,
    "test_force_shutdown_during_max_tasks_worker_exit": LOCAL,
    "test_gc_during_max_tasks_worker_exit_gh152967": LOCAL,
    "test_shutdown_no_wait_max_tasks_gh119592": LOCAL,
    "test_broken_process_pool_traceback": NOT_BROKEN,
    "test_traceback_when_child_process_terminates_abruptly": NOT_BROKEN,
}
# The first two would wait for ever behind their look at a process, the last one leaves half a connection.
NOT_RUN = {"*.test_force_shutdown_workers", "*.test_broken_process_pool_traceback", "*.test_python_finalization_error"}

if sys.version_info >= (3, 14):
    NOT_OURS |= SINCE_3_14
NOT_OURS |= {f"*.{name}": reason for name, reason in LATEST.items()
             if hasattr(test_process_pool.ProcessPoolExecutorTest, name)}


class AchillesMixin(util.ProcessPoolSpawnMixin):
    """As those of the other executors. The context is that of the managers that tests make."""

    executor_type = Executor

    def subTest(self, *_, **__):
        """What fails in a part of a test fails the test."""
        return contextlib.nullcontext()


for tests in (test_process_pool.ProcessPoolExecutorTest, test_as_completed.AsCompletedTests, test_wait.WaitTests,
              test_shutdown.ProcessPoolShutdownTest, test_init.InitializerMixin, test_init.FailingInitializerMixin):
    util.create_executor_tests(globals(), tests, executor_mixins=(AchillesMixin,))

pytestmark = pytest.mark.filterwarnings("default")  # what is left open by tests that fail is warned of
not_ours = suite.exceptions(NOT_OURS, NOT_RUN)


@pytest.fixture(scope="module", autouse=True)
def replaced():
    """Tests that name ProcessPoolExecutor have ours, and so have scripts that they run."""
    with suite.cluster(WORKERS) as patch:
        patch.setattr("test.support.SHORT_TIMEOUT", 10.0)  # seconds; a test that is not ours waits for so long
        patch.setattr(concurrent.futures, "ProcessPoolExecutor", type("ProcessPoolExecutor", (Executor,), {}))
        patch.setattr(test_shutdown, "assert_python_ok", suite.script_runner("concurrent.futures", "Executor"))
        yield


def test_all_exceptions_are_tests(request):
    suite.check_table(request, NOT_OURS)
