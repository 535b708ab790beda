"""What the suites of others share: their cluster, and the table of their tests that are not ours to pass."""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import importlib
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from achilles import LocalCluster

SECONDS = 10.0  # for a thread that has lost its connection
SITE = Path(__file__).parent / "site"  # every process of a suite begins with its sitecustomize


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[pytest.MonkeyPatch]:
    """A cluster, which the environment names. What is patched with the value ends with it."""
    threads = set(threading.enumerate())
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SITE)
        patch.setenv("PYTHONPATH", os.pathsep.join(os.path.abspath(folder) for folder in sys.path))
        importlib.import_module("suite_site")
        with LocalCluster(nodes=1, cpu_count=workers) as made:
            patch.setenv("ACHILLES_HOST", made.host)
            patch.setenv("ACHILLES_PORT", str(made.port))
            patch.setenv("ACHILLES_USERNAME", made.username)
            patch.setenv("ACHILLES_SECRET_KEY", made.secret_key.reveal())
            yield patch
            gc.collect()  # what failed tests have left open
        for thread in set(threading.enumerate()) - threads:  # of connections that a test has broken
            thread.join(SECONDS)


def reasons(item: pytest.Item, table: dict[str, str]) -> dict[str, str]:
    """The patterns of the table that the test's name has: `Class.test_name`, or `test_name parameters`."""
    name = item.name.replace("[", " ").rstrip("]")  # brackets mean something in patterns
    cls = getattr(item, "cls", None)
    name = f"{cls.__name__}.{name}" if cls else name
    return {pattern: reason for pattern, reason in table.items() if fnmatch.fnmatchcase(name, pattern)}


def exceptions(table: dict[str, str], not_run: Collection[str] = ()) -> Callable[..., Any]:
    """A fixture of a module: the tests in this table are run, and must fail.

    :param not_run: of the patterns, those of tests that would wait for ever, or leave something that others trip over.
    """

    @pytest.fixture(autouse=True)
    def not_ours(request: pytest.FixtureRequest) -> None:
        for pattern, reason in reasons(request.node, table).items():
            request.applymarker(pytest.mark.xfail(run=pattern not in not_run, strict=True, reason=reason))

    return not_ours


def check_table(request: pytest.FixtureRequest, table: dict[str, str]) -> None:
    """Each pattern is that of a test of this module."""
    items = [item for item in request.session.items if item.path == request.path]
    unused = table.keys() - {pattern for item in items for pattern in reasons(item, table)}
    assert not unused, unused


def script_runner(module: str, name: str) -> Callable[..., Any]:
    """As `assert_python_ok`, with scripts that import this name of a module from achilles."""
    from test.support.script_helper import assert_python_ok

    def run(option: str, script: str) -> Any:
        script = script.replace(f"from {module} import {name}", f"from achilles import {name}")
        return assert_python_ok(option, script, PYTHONPATH=os.environ["PYTHONPATH"])

    return run
