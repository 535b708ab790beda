"""What a node asks of its system; cores and quotas themselves are tested with workers.py's tests."""

import subprocess
import sys

import multiprocess
import pytest

from achilles.config import Secret, Settings
from achilles.errors import VersionError
from achilles.node import cores
from achilles.node.loop import Node


@pytest.mark.parametrize("version", ["0.70.18", "0.70.11.1", "0.69"])
def test_a_multiprocess_that_is_too_old_is_an_error_of_every_node(monkeypatch, version):
    monkeypatch.setattr(multiprocess, "__version__", version)
    with pytest.raises(VersionError, match="is too old: pip install"):
        Node(Settings("127.0.0.1", 1, "ann", Secret("correct horse battery")), 1, "spawn")


@pytest.mark.parametrize("version", ["0.70.19", "0.70.20", "0.71", "1.0"])
def test_a_newer_one_will_do(monkeypatch, version):
    monkeypatch.setattr(multiprocess, "__version__", version)
    cores.check_multiprocess()


def test_without_multiprocess_a_node_says_what_to_install():
    code = "import sys; sys.modules['multiprocess'] = None; import achilles.node.__main__"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert run.returncode == 1 and "VersionError: multiprocess is needed here: pip install" in run.stderr
