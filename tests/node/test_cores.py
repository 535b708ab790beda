"""What a node asks of its system; cores and quotas themselves are tested with workers.py's tests."""

import subprocess
import sys
import threading

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
    cores.check_start_method("spawn")


def test_without_multiprocess_a_node_says_what_to_install():
    code = "import sys; sys.modules['multiprocess'] = None; import achilles.node.__main__"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert run.returncode == 1 and "VersionError: multiprocess is needed here: pip install" in run.stderr


@pytest.mark.parametrize(("platform", "methods", "alone", "beside_others"), [
    ("linux", ["fork", "spawn", "forkserver"], "fork", "forkserver"),
    ("linux", ["fork", "spawn"], "fork", "spawn"),
    ("linux", ["spawn"], "spawn", "spawn"),
    ("darwin", ["spawn", "fork", "forkserver"], "spawn", "spawn"),
])
def test_beside_other_threads_nothing_is_forked(monkeypatch, platform, methods, alone, beside_others):
    monkeypatch.setattr(multiprocess, "get_all_start_methods", lambda: methods)
    monkeypatch.setattr(sys, "platform", platform)
    assert [cores.default_start_method(threads) for threads in (1, 2, 9)] == [alone, beside_others, beside_others]
    assert cores.default_start_method() == alone


def test_a_thread_is_counted(tmp_path):
    before, end = cores.count_threads(), threading.Event()
    assert before >= threading.active_count()
    thread = threading.Thread(target=end.wait)
    thread.start()
    assert cores.count_threads() == before + 1
    end.set()
    thread.join()
    assert cores.count_threads(str(tmp_path)) == threading.active_count()  # where the system does not tell


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_of_c_libraries_are_counted():
    """A process whose only second thread is one that Python knows nothing of."""
    code = """if True:
        import ctypes, threading
        from achilles.node import cores
        assert (cores.count_threads(), threading.active_count()) == (1, 1)
        libc, thread = ctypes.CDLL(None), ctypes.c_ulong()
        assert libc.pthread_create(ctypes.byref(thread), None, libc.pause, None) == 0
        assert (cores.count_threads(), threading.active_count()) == (2, 1)"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=30)
