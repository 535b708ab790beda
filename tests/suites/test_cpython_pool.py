"""CPython's own tests of Pool, with `achilles.Pool` in the place of `multiprocessing.Pool`."""

from __future__ import annotations

import multiprocessing
import unittest

import pytest
import suite

from achilles import Pool

tests = pytest.importorskip("test._test_multiprocessing", reason="this Python came without its tests")

WORKERS = 4  # as many as these tests ask for at a time

NOT_OURS = {
    "TestPool.test_imap_handle_iterable_exception":
        "What an iterable gave before it raised is called in any case, also in the chunk that is not full.",
    "TestPool.test_make_pool": "It counts the processes that a Pool has on this machine.",
    "TestPoolWorkerLifetime.test_pool_worker_lifetime": "It looks at the processes that a Pool has on this machine.",
    "TestPoolWorkerErrors.test_unpickleable_result": "A lambda can be returned.",
}


class AchillesMixin(tests.BaseMixin):
    """As those of the other kinds of pools; some tests are for pools of processes alone."""

    TYPE = "processes"
    Pool = Pool


class TestPool(tests._TestPool, AchillesMixin, unittest.TestCase):
    pass


class TestPoolWorkerErrors(tests._TestPoolWorkerErrors, AchillesMixin, unittest.TestCase):
    pass


class TestPoolWorkerLifetime(tests._TestPoolWorkerLifetime, AchillesMixin, unittest.TestCase):
    pass


pytestmark = pytest.mark.filterwarnings("default")  # what is left open by tests that fail is warned of
not_ours = suite.exceptions(NOT_OURS)


@pytest.fixture(scope="module", autouse=True)
def replaced():
    """Tests that name `multiprocessing.Pool` have ours, and so have scripts that they run."""
    with suite.cluster(WORKERS) as patch:
        patch.setattr(multiprocessing, "Pool", Pool)
        patch.setattr("test.support.script_helper.assert_python_ok", suite.script_runner("multiprocessing", "Pool"))
        yield


def test_all_exceptions_are_tests(request):
    suite.check_table(request, NOT_OURS)
