"""Functions of a test module, whose asserts pytest rewrites: by name, and by value."""

from __future__ import annotations

import pickle

import pytest

from achilles import LocalCluster, Pool


@pytest.fixture(scope="module")
def pool():
    with LocalCluster(nodes=1, cpu_count=1) as made:
        with Pool(host=made.host, port=made.port, username=made.username, secret_key=made.secret_key) as pool:
            yield pool


def check(x):
    assert x == [1], "not so"
    return x


class Checks:
    def check(self, x):
        assert x == [1], "not so"
        return x


def make(extra):
    def inner(x):
        assert x == [1], "not so"
        return x
    return inner if extra else lambda x: check(x)


@pytest.mark.parametrize("function", [check, Checks().check, make(True), make(False)])
def test_an_assert_holds_and_fails(pool, function):
    assert pool.map(function, [[1]]) == [[1]]
    with pytest.raises(AssertionError, match="not so"):
        pool.map(function, [[2]])


def test_a_class_of_the_test_function(pool):
    class Local:
        def __init__(self, x):
            assert x, "not so"
            self.x = x

    assert pool.map(lambda x: Local(x).x, [3]) == [3]
    assert type(pool.map(Local, [3])[0]) is Local
    with pytest.raises(AssertionError, match="not so"):
        pool.map(Local, [0])


def test_a_class_of_the_test_module_is_pickled_in_the_worker(pool):
    assert type(pickle.loads(pool.map(lambda _: pickle.dumps(Checks()), [1])[0])) is Checks
