"""The package works under any name, in any place, without its texts, and without the parts that nobody uses."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import dill
import multiprocess
import pytest
from cluster import PACKAGE, SECONDS, SECRET, USER, Process
from conftest import NODE_OPTIONS

TEXTS = ("PROTOCOL.md", "LICENSE", "py.typed", ".env")
PYTHON = (sys.executable, "-S", "-W", "error")  # no site-packages: nothing but PYTHONPATH and the standard library


@pytest.fixture(autouse=True)
def clean(no_leftovers):
    """Nothing is left of any test."""


@pytest.fixture
def libraries(tmp_path):
    """A folder with the two dependencies, and nothing else."""
    folder = tmp_path / "libraries"
    folder.mkdir()
    for module in (dill, multiprocess):
        source = Path(module.__file__).parent
        (folder / source.name).symlink_to(source, target_is_directory=True)
    for extra in Path(multiprocess.__file__).parent.parent.glob("_multiprocess*"):
        if not extra.name.endswith("-info"):
            (folder / extra.name).symlink_to(extra)
    return folder


def vendor(host, path):
    """A copy of the package, without its texts, as `path` of a project's folder."""
    target = host / path
    target.parent.mkdir(parents=True)
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__", *TEXTS))
    for folder in target.relative_to(host).parents[:-1]:
        (host / folder / "__init__.py").touch()
    return host


def environment(host, libraries, port=0):
    return {
        "PATH": "/usr/bin:/bin", "PYTHONPATH": f"{host}:{libraries}", "PYTHONDONTWRITEBYTECODE": "1",
        "ACHILLES_HOST": "127.0.0.1", "ACHILLES_PORT": str(port), "ACHILLES_USERNAME": USER,
        "ACHILLES_SECRET_KEY": SECRET, "HOME": str(host),
    }


def run(host, libraries, port, source):
    """A script of the project's; what it prints."""
    script = host / "project.py"
    script.write_text(textwrap.dedent(source))
    done = subprocess.run([*PYTHON, str(script)], env=environment(host, libraries, port), cwd=host,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=2 * SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


class Running:
    """A server of one project and a node of another."""

    def __init__(self, folder, libraries, server, node):
        (host, name), (other, other_name) = server, node
        self.node = None
        self.server = Process(folder, "server", [*PYTHON, "-m", f"{name}.server"], environment(host, libraries))
        try:
            self.port = int(self.server.wait_for(r"initiated at 127\.0\.0\.1:(\d+)")[1])
            node = [*PYTHON, "-m", f"{other_name}.node", "--cpu-count", "2", *NODE_OPTIONS]
            self.node = Process(folder, "node", node, environment(other, libraries, self.port))
            self.node.wait_for("CLIENT_ID: 0")
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in filter(None, (self.node, self.server)):
            process.show()
            process.kill()
            process.check_family_gone()


MAP = """
    import sys, enum
    try:
        import achilles
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("achilles can be imported here: the test proves nothing")
    from lib.achilles2 import LocalCluster, WorkerLost, cluster_status, imap, map

    class Color(enum.Enum):
        RED = 1

    def work(n):
        return Color.RED, n ** 2

    if __name__ == "__main__":
        found = sum(map(work, range(20)), [])
        assert found == [(Color.RED, n ** 2) for n in range(20)]
        print([packet["ARGS_COUNTER"] for packet in imap(work, range(4))])
        with LocalCluster(nodes=1, cpu_count=2) as cluster:
            where = dict(host=cluster.host, port=cluster.port, username=cluster.username, secret_key=cluster.secret_key)
            print(map(work, [[3]], **where)[0][0][1])
        print(len(cluster_status()["nodes"]))
        assert not any(name == "achilles" or name.startswith("achilles.") for name in sys.modules)
"""


def test_three_projects_under_three_names(tmp_path, libraries):
    a = vendor(tmp_path / "host_a", "_vendor/ach")
    b = vendor(tmp_path / "host_b", "_x")
    c = vendor(tmp_path / "host_c", "lib/achilles2")
    with Running(tmp_path, libraries, (a, "_vendor.ach"), (b, "_x")) as running:
        out, _ = run(c, libraries, running.port, MAP)
        assert out == ["[0, 2]", "9", "1"]
        running.node.signal(signal.SIGTERM)
        assert running.node.wait(SECONDS) == 0


def test_what_is_not_used_may_be_deleted(tmp_path, libraries):
    """Then what would use it raises an ImportError that names it."""
    host = vendor(tmp_path / "host", "only_this")
    for folder in ("lineReceiver", "dropin"):
        shutil.rmtree(host / "only_this" / folder)
    (host / "only_this" / "local.py").unlink()
    with Running(tmp_path, libraries, (host, "only_this"), (host, "only_this")) as running:
        out, _ = run(host, libraries, running.port, """
            import concurrent.futures
            import only_this
            print(only_this.map(lambda n: 2 * n, [1, 2, 3]))

            def tell_what_is_missing(use):
                try:
                    use()
                except ImportError as e:
                    print(e.name)

            with concurrent.futures.ThreadPoolExecutor(1) as executor:
                tell_what_is_missing(lambda: only_this.map(abs, [1], executor=executor))
            tell_what_is_missing(lambda: only_this.map(abs, [1], host="local"))
            for name in ("Pool", "Executor", "LocalCluster", "register_joblib_backend"):
                tell_what_is_missing(lambda: getattr(only_this, name))
            """)
        assert out == ["[[2, 4], [6]]", "only_this.dropin", "only_this.local", *2 * ["only_this.dropin"],
                       "only_this.local", "only_this.dropin"]


def test_remedies_name_the_copy(tmp_path, libraries):
    host = vendor(tmp_path / "host", "deep/er/name")
    out, _ = run(host, libraries, 1, """
        from deep.er.name import errors, map
        import os
        try:
            map(len, [""])
        except errors.ServerUnreachable as e:
            print(type(e).__module__)
        del os.environ["ACHILLES_HOST"]
        try:
            map(len, [""])
        except errors.ConfigurationError as e:
            print("python -m deep.er.name.server" in str(e) or "deep.er.name" in str(e) or "ACHILLES_HOST" in str(e))
        """)
    assert out == ["deep.er.name.errors", "True"]


def test_nothing_happens_at_import(tmp_path, libraries):
    host = vendor(tmp_path / "host", "ach")
    files = [file.relative_to(PACKAGE).with_suffix("") for file in PACKAGE.rglob("*.py") if file.stem != "__init__"]
    names = sorted(".".join(file.parts) for file in files)
    out, err = run(host, libraries, 0, f"""
        import os, signal, sys, threading, importlib
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), dict(os.environ)
        for name in {names!r}:
            importlib.import_module("ach." + name)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), dict(os.environ)) == before
        print(threading.active_count(), "__main__" in sys.modules)
        """)
    assert (out, err) == (["1 True"], "")
