"""Modules beside the script, on nodes that have no file of them: the script's folder is on no node's path."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from cluster import Cluster
from cluster import shown as shown
from conftest import wait_until

pytestmark = pytest.mark.usefixtures("unconfigured")
HELPER = """
    from tools import numbers
    VERSION = 1

    class Thing:
        def __init__(self, value):
            self.value = value

    def make(x):
        from tools.late import half
        return Thing((numbers.double(x), half(x), VERSION))

    def fail(x):
        raise ValueError("of the helper")  # this very line

    def set_up(*names):
        global VERSION
        VERSION = names
"""
FILES = {
    "helper.py": HELPER, "tools/__init__.py": "", "tools/late.py": "def half(x):\n    return x / 2\n",
    "tools/numbers.py": "from .inner import two\n\ndef double(x):\n    return two * x\n",
    "tools/inner.py": "two = 2\n",
}


@pytest.fixture
def folder(tmp_path):
    """The folder of scripts, with their modules."""
    made = tmp_path / "scripts"
    for name, text in FILES.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(textwrap.dedent(text))
    return made


@pytest.fixture
def cluster(tmp_path):
    with Cluster(tmp_path, 1) as made:
        yield made


def resident_of(pid):
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def write(folder, text, name="script.py"):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def run(cluster, folder, text, name="script.py"):
    """What a script printed."""
    script = cluster.start_script(write(folder, text, name))
    assert script.wait() == 0, script.err.read_text()
    return script.out.read_text()


def test_functions_classes_and_packages_come_from_memory_and_results_are_the_callers(cluster, folder):
    assert run(cluster, folder, """
        import traceback
        import helper, tools.late
        from achilles import Pool, map
        [[thing]] = map(helper.make, [3])
        print(type(thing) is helper.Thing, thing.value)
        [[thing]] = map(lambda x: helper.make(x), [4])
        print(type(thing) is helper.Thing, thing.value)
        try:
            map(helper.fail, [1])
        except ValueError as e:
            print("# this very line" in "".join(traceback.format_exception(e)))
        with Pool(initializer=helper.set_up, initargs=("a", "b")) as pool:
            print(pool.apply(helper.make, (5,)).value, pool.map(helper.make, [helper.Thing(1).value])[0].value)
    """) == "True (6, 1.5, 1)\nTrue (8, 2.0, 1)\nTrue\n(10, 2.5, ('a', 'b')) (2, 0.5, ('a', 'b'))\n"


def test_a_changed_file_is_changed_at_the_next_call_and_the_node_stays(cluster, folder):
    assert run(cluster, folder, """
        import pathlib, time
        import helper, tools.late
        from achilles import Pool, map
        path = pathlib.Path(helper.__file__)
        def change(old, new):
            path.write_text(path.read_text().replace(f"VERSION = {old}", f"VERSION = {new}"))
        print(map(helper.make, [1])[0][0].value[2])
        change(1, 22)
        print(map(helper.make, [1])[0][0].value[2])
        with Pool() as pool:
            print(pool.map(helper.make, [1])[0].value[2], pool.apply(helper.make, (1,)).value[2])
            change(22, 333)
            print(pool.map(helper.make, [1])[0].value[2], pool.apply(helper.make, (1,)).value[2])
            change(333, 4444)
            while pool.apply(helper.make, (1,)).value[2] != 4444:  # single calls look ten times a second
                time.sleep(0.01)
    """) == "1\n22\n22 22\n333 333\n"


def test_two_callers_with_modules_of_one_name_never_see_each_others(cluster, folder):
    script = """
        import time, os
        import mine
        from achilles import Pool
        with Pool() as pool:
            found = [pool.apply(mine.tell) for _ in range(5) if not time.sleep(0.05)]
            found += pool.map(mine.tell_of, range(200), 1)
        print(set(found))
    """
    scripts = []
    for name in ("first", "second"):
        write(folder, f"def tell():\n    return {name!r}\ndef tell_of(x):\n    return {name!r}\n", f"{name}/mine.py")
        scripts.append(cluster.start_script(write(folder, script, f"{name}/caller.py")))
    for process, name in zip(scripts, ("first", "second")):
        assert process.wait() == 0, process.err.read_text()
        assert process.out.read_text() == f"{{{name!r}}}\n"


def test_a_worker_is_kept_for_the_next_call_with_the_same_set(cluster, folder):
    out = run(cluster, folder, """
        import helper, tools.late, os
        from achilles import map
        def where(x):
            return helper.make(x).value and os.getpid()
        print(len({pid for _ in range(5) for packet in map(where, [1]) for pid in packet}))
    """)
    assert out == "1\n"
    [worker] = cluster.nodes[0].workers(1)
    assert run(cluster, folder, """
        import helper, tools.late, os
        from achilles import map
        print(map(lambda x: helper.make(x).value and os.getpid(), [1])[0][0])
    """, "other.py") == f"{worker}\n"


def test_a_module_is_imported_once_in_a_worker_however_often_its_set_comes(cluster, folder):
    write(folder, "import itertools\ncalls = itertools.count()\ndef count(x):\n    return next(calls)\n", "mine.py")
    assert run(cluster, folder, """
        import mine
        from achilles import map
        print([value for _ in range(4) for packet in map(mine.count, [1]) for value in packet])
    """) == "[0, 1, 2, 3]\n"


def test_a_caller_without_the_module_does_not_find_anothers(cluster, folder):
    run(cluster, folder, "import helper, tools.late\nfrom achilles import map\nmap(helper.make, [1])\n")
    out = run(cluster, folder, """
        from achilles import map
        def use(x):
            import helper
        try:
            map(use, [1])
        except ModuleNotFoundError as e:
            print(e, e.name)
    """, "elsewhere/script.py")
    assert out == ("No module named 'helper' on node 0: this process has not imported it, so that it does not travel: "
                   "import it here, too, or install it there helper\n")


def test_a_node_that_comes_later_gets_them_and_so_does_a_server_that_was_started_again(cluster, folder):
    script = cluster.start_script(write(folder, """
        import helper, tools.late, sys, time
        from achilles import imap
        def slow(x):
            time.sleep(0.02)
            return helper.make(x).value[0]
        total = 0
        for packet in imap(slow, range(300)):
            total += sum(packet["RESULT"])
            print(packet["ARGS_COUNTER"], flush=True)
        print("total", total)
    """))
    script.wait_for("\n20\n")
    cluster.nodes[0].kill()
    cluster.start_node(1)
    script.wait_for("\n100\n")
    cluster.server.kill()
    cluster.start_server()
    assert script.wait() == 0, script.err.read_text()
    assert f"total {2 * sum(range(300))}" in script.out.read_text()


def test_too_much_is_an_error_before_anything_is_sent(cluster, folder):
    write(folder, f"DATA = '{'x' * (9 << 20)}'\n", "large.py")
    assert "large.py with 9,437,19" in run(cluster, folder, """
        import large
        from achilles import DumpError, map
        try:
            map(abs, [1])
        except DumpError as e:
            print(e)
    """)
    assert cluster.status()["jobs"] == []


def test_under_dash_m_the_modules_of_the_working_directory_travel(cluster, folder):
    write(folder, """
        import helper, tools.late
        from achilles import map
        print(map(helper.make, [3])[0][0].value)
    """, "pack/main.py")
    script = cluster._run("main", "-m", "pack.main", cwd=folder)
    assert script.wait() == 0, script.err.read_text()
    assert script.out.read_text() == "(6, 1.5, 1)\n"


def test_a_worker_of_another_set_makes_way(cluster, folder):
    """One worker, and callers with different modules in turns: each call ends, within seconds."""
    for turn in range(3):
        write(folder, f"def tell(x):\n    return {turn}\n", "mine.py")
        assert run(cluster, folder, "import mine\nfrom achilles import map\nprint(map(mine.tell, [1]))\n") == (
            f"[[{turn}]]\n")
    wait_until(lambda: not cluster.status()["jobs"])


def test_after_an_edit_all_workers_work_at_once(tmp_path, folder):
    """Those of the old set are replaced as soon as the new one needs them: half a second, not a minute."""
    script = """
        import mine, os, time
        from achilles import Pool
        with Pool() as pool:
            pool.map(mine.slow, [0.01] * 8, 1)
            path = mine.__file__
            with open(path, "a") as file:
                file.write("# edited\\n")
            began = time.monotonic()
            print(len(set(pool.map(mine.slow, [0.3] * 12, 1))), time.monotonic() - began < 2.6)
    """
    write(folder, "import os, time\ndef slow(seconds):\n    time.sleep(seconds)\n    return os.getpid()\n", "mine.py")
    with Cluster(tmp_path, 4) as cluster:
        for _ in range(2):
            count, soon = run(cluster, folder, script).split()
            assert int(count) >= 4 and soon == "True"


def test_old_versions_are_kept_nowhere(cluster, folder):
    text = f"DATA = '{'x' * (4 << 20)}'\ndef tell(x):\n    return len(DATA)\n"
    write(folder, text, "mine.py")
    script = cluster.start_script(write(folder, """
        import mine
        from achilles import Pool
        with Pool() as pool:
            for number in range(24):
                with open(mine.__file__, "a") as file:
                    file.write(f"# {number}\\n")
                assert pool.map(mine.tell, [1]) == [4 << 20]
                print("edit", number, flush=True)
    """))

    def resident():
        return sum(map(resident_of, (cluster.server.pid, cluster.nodes[0].pid)))

    script.wait_for("edit 5\n")
    before = resident()
    assert script.wait() == 0, script.err.read_text()
    assert resident() - before < 40 << 20


def test_a_function_of_a_call_that_is_over_stays_in_no_worker(cluster, folder):
    """Whatever sets came before or after it, none keeps the globals of another call alive."""
    for number in range(3):
        run(cluster, folder, """
            from achilles import map
            def made_for_one_call(x):
                return x
            map(made_for_one_call, [1])
        """, f"script_{number}.py")
    assert run(cluster, folder, """
        from achilles import map
        def look(x):
            import gc, types
            gc.collect()
            return [each.__name__ for each in gc.get_objects()
                    if isinstance(each, types.FunctionType) and each.__name__ == "made_for_one_call"]
        print(map(look, [1]))
    """, "look.py") == "[[[]]]\n"


def test_logging_that_an_initializer_set_up_is_captured_by_a_later_call(cluster, folder):
    assert run(cluster, folder, """
        import logging
        from achilles import Pool
        def log(x):
            logging.getLogger().warning("of %d", x)
        lines = []
        def set_up():
            logging.basicConfig(force=True)  # the node's own handlers are there already
        with Pool(initializer=set_up) as pool:
            pool.map(log, range(2))
            pool.map(log, range(2), output=lambda *line: lines.append(line[:2]))
        print(sorted(lines))
    """) == "[('WARNING:root:of 0', 0), ('WARNING:root:of 1', 1)]\n"
