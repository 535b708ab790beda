"""A journal: what is there is not run again, whatever happened to the caller, the file or the function."""

from __future__ import annotations

import contextlib
import errno
import importlib
import itertools
import os
import pickle
import random
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster import Cluster, Oracle, shown  # noqa: F401
from conftest import in_a_child, wait_until
from fakes import Node, address, serving

import achilles
from achilles.errors import DumpError
from achilles.journal import Journal

pytestmark = pytest.mark.usefixtures("no_leftovers", "unconfigured")
CALLS = [achilles.map, achilles.imap, achilles.imap_unordered]
FACTOR = 2


def double(x):
    return x * FACTOR


def triple(x):
    return x * 3


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.journal"


@pytest.fixture
def executor():
    with ThreadPoolExecutor(3) as made:
        yield made


# The file, without a call.


def run(path, chunks, func=double, callback=None, chunksize=2):
    """What a call does with its journal: the indices that ran, and all results."""
    journal, ran, results = Journal(path, func, callback, chunksize), [], []
    with contextlib.closing(journal):
        for index, chunk in enumerate(chunks):
            letter = journal.recall(index, chunk)
            results.append([func(each) for each in chunk] if letter is None else pickle.loads(letter))
            if letter is None:
                ran.append(index)
                journal.taken(index, results[-1], {})
    return ran, results


CHUNKS = [[1, 2], [3, 4], ["a text", 5], [6]]
RESULTS = [[2, 4], [6, 8], ["a texta text", 10], [12]]


@pytest.fixture
def written(path):
    """The lines of a journal of four chunks."""
    assert run(path, CHUNKS) == ([0, 1, 2, 3], RESULTS)
    return path.read_bytes().splitlines(keepends=True)


def test_what_is_there_is_not_run(path, written):
    assert len(written) == 5
    assert run(path, CHUNKS) == ([], RESULTS)
    assert path.read_bytes() == b"".join(written)


def test_more_arguments_run_and_come_to_the_end(path, written):
    assert run(path, [*CHUNKS, [7, 8]]) == ([4], [*RESULTS, [14, 16]])
    assert run(path, [*CHUNKS, [7, 8]]) == ([], [*RESULTS, [14, 16]])


def test_what_differs_in_its_arguments_runs_and_both_are_kept(path, written):
    others = [[1, 2], [3, 5], ["a text", 5], [6]]
    assert run(path, others) == ([1], [[2, 4], [6, 10], *RESULTS[2:]])
    assert run(path, others)[0] == run(path, CHUNKS)[0] == []


def test_the_same_arguments_at_another_index_run(path, written):
    assert run(path, CHUNKS[1:])[0] == [0, 1, 2]


@pytest.fixture
def unchanged(monkeypatch):
    """No module is looked at again: that is most of the time of a short journal."""
    monkeypatch.setattr("achilles.journal.check_modules", lambda path: None)


@pytest.mark.usefixtures("unchanged")
def test_a_file_torn_at_any_byte_loses_the_last_line_alone(path, written):
    whole = b"".join(written)
    ends = list(itertools.accumulate(map(len, written)))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        lost = [index for index, end in enumerate(ends[1:]) if length < end - 1]  # a newline may be missing
        assert run(path, CHUNKS) == (lost, RESULTS), length
        assert run(path, CHUNKS) == ([], RESULTS), length


@pytest.mark.usefixtures("unchanged")
def test_an_altered_byte_loses_its_line_or_two(path, written):
    whole, chance = b"".join(written), random.Random(3)
    for at in range(len(written[0]), len(whole)):
        altered = bytearray(whole)
        altered[at] ^= chance.randrange(1, 256)
        path.write_bytes(altered)
        ran, results = run(path, CHUNKS)
        assert results == RESULTS and len(ran) <= 2, at
        assert run(path, CHUNKS) == ([], RESULTS), at


def test_an_altered_first_line_is_refused_and_left(path, written):
    whole = b"".join(written)
    for at in range(len(written[0]) - 1):
        altered = bytearray(whole)
        altered[at] ^= 4
        path.write_bytes(altered)
        with pytest.raises(ValueError, match=str(path)):
            run(path, CHUNKS)
        assert path.read_bytes() == altered


def test_lines_that_others_put_in_are_passed_over(path, written):
    chance = random.Random(5)
    for _ in range(50):
        lines = [*written[1:], *[chance.randbytes(chance.randrange(200)) for _ in range(5)]]
        chance.shuffle(lines)
        path.write_bytes(written[0] + b"\n".join(lines))
        ran, results = run(path, CHUNKS)
        assert results == RESULTS
        assert run(path, CHUNKS) == ([], RESULTS)


def test_a_results_line_under_another_key_is_not_believed(path, written):
    """Its checksum is over the index and the digest of the arguments, too."""
    one, other = written[1].split(b" "), written[2].split(b" ")
    path.write_bytes(written[0] + b" ".join([*one[:2], other[2]]))
    assert run(path, CHUNKS) == ([0, 1, 2, 3], RESULTS)


def with_default(x, more=1):
    return x


def with_other_default(x, more=2):
    return x


@pytest.mark.parametrize(("options", "named"), [
    ({"func": triple}, "the code of double, the global FACTOR, the code of triple"),
    ({"callback": triple}, "callback"),
    ({"chunksize": 3}, "chunksize"),
])
def test_another_call_is_an_error_that_names_the_file_and_what_differs(path, written, options, named):
    with pytest.raises(ValueError, match=f"the journal {path} is of another call, which differs in {named}"):
        run(path, CHUNKS, **options)
    assert path.read_bytes() == b"".join(written)


def test_a_changed_global_is_another_call(path, written, monkeypatch):
    monkeypatch.setattr(f"{__name__}.FACTOR", 3)
    with pytest.raises(ValueError, match="of another call, which differs in the global FACTOR"):
        run(path, CHUNKS)


def test_a_changed_default_is_another_call(path):
    with_other_default.__qualname__ = "with_default"
    run(path, [[1]], with_default)
    with pytest.raises(ValueError, match="of another call, which differs in the code of with_default"):
        run(path, [[1]], with_other_default)


@pytest.mark.parametrize("content", [
    b"name,value\n1,2\n", b"{}\n", b"[1]\n", b'{"achilles journal": 2}\n', b"\xff\x00", b"\n", b'{"achilles'])
def test_a_file_of_somebody_elses_is_refused_and_left(path, content):
    path.write_bytes(content)
    if content == b'{"achilles':  # a first line that was torn
        assert run(path, CHUNKS)[0] == [0, 1, 2, 3]
        return
    with pytest.raises(ValueError, match=f"{path} is no journal"):
        run(path, CHUNKS)
    assert path.read_bytes() == content


def test_it_is_its_owners_alone(path):
    mask = os.umask(0)
    try:
        run(path, CHUNKS)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_to_is_refused(path, written, mode):
    path.chmod(mode)
    with pytest.raises(ValueError, match=f"others can write to the journal {path}.*chmod 600"):
        run(path, CHUNKS)


def test_a_file_of_another_user_is_refused(path, written, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1_234_567)
    with pytest.raises(ValueError, match=f"others can write to the journal {path}"):
        run(path, CHUNKS)


def test_two_calls_at_one_journal(path, written):
    with contextlib.closing(Journal(path, double, None, 2)):
        with pytest.raises(ValueError, match=f"the journal {path} is in use"):
            run(path, CHUNKS)
        child = in_a_child(lambda: pytest.raises(ValueError, run, path, CHUNKS).value)
        assert "is in use by another call" in child
    assert run(path, CHUNKS)[0] == []


def test_a_file_system_without_locks(path, written, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    assert run(path, CHUNKS)[0] == []


def test_a_large_file_of_one_line_is_not_read_whole(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="is no journal"):
        run(path, CHUNKS)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(tmp_path / "nowhere" / "run.journal", CHUNKS)


def test_a_full_disk_is_an_error_that_names_the_file_and_costs_one_line(path, written):
    size = path.stat().st_size

    def fill():  # a limit on files is a disk that is full after 30 bytes of the line
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, size + 30))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        return pytest.raises(OSError, run, path, [*CHUNKS, [7, 8]]).value

    assert str(path) in in_a_child(fill)
    assert path.stat().st_size == size + 30
    assert run(path, [*CHUNKS, [7, 8]]) == ([4], [*RESULTS, [14, 16]])
    assert run(path, [*CHUNKS, [7, 8]])[0] == []


def test_results_that_pickle_cannot_dump_are_not_kept_and_that_is_said_once(path):
    def make(x):
        return lambda: x

    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=f"from argument 0 on cannot be pickled.*{path}") as told:
            assert run(path, CHUNKS, make)[0] == [0, 1, 2, 3]
        assert len(told) == 1


class Halting(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def test_results_that_pickle_cannot_load_run_again_and_that_is_said_once(path):
    def make(x):
        return Halting(x, x)

    run(path, [[1], [2]], make)
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=f"from argument 0 on cannot be loaded from the journal {path}") as told:
            assert run(path, [[1], [2]], make)[0] == [0, 1]
        assert len(told) == 1


def test_a_pipe_is_no_journal(path):
    os.mkfifo(path)
    with pytest.raises(OSError, match=str(path)):
        run(path, CHUNKS)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(ValueError, match=f"{path} is no journal: it is no regular file"):
            run(path, CHUNKS)
    finally:
        os.close(reader)


def test_arguments_without_a_digest_run_each_time(path):
    for _ in range(2):
        assert run(path, [[threading.Lock()], [1]], str)[0] in ([0, 1], [0])


def test_the_lines_are_as_the_header_of_the_module_says(written):
    index, digest, packed = written[1].split(b" ")
    assert index == b"0" and len(digest) == 64 and packed.endswith(b"\n")
    assert written[0].startswith(b'{"achilles journal": 1, "the code of double": "')


# The calls, on threads in the place of workers.


ran: list[object] = []
fails: set[object] = set()


def recorded(x):
    """Its globals travel by import: this module is there on the other side, since that is this process."""
    note(x)
    return [x, x]


def note(x):
    from test_journal import fails, ran

    ran.append(x)
    if x in fails:
        raise ValueError(f"no {x}")


@pytest.fixture(autouse=True)
def forgotten():
    ran.clear()
    fails.clear()


def packets(call, *arguments, **options):
    """Results as packets, in order, of whichever call."""
    found = call(recorded, *arguments, **options)
    if call is achilles.map:
        return found
    return [packet["RESULT"] for packet in sorted(found, key=lambda packet: packet["ARGS_COUNTER"])]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("args", [
    range(10), list(range(10)), lambda: iter(range(10)), [[1, 2, 3], [], [4]]],
    ids=["range", "list", "function", "lists"])
def test_a_call_that_is_started_again_gives_the_same_packets_and_runs_nothing(path, executor, call, args):
    first = packets(call, args, chunksize=3, executor=executor, journal=path)
    lists = isinstance(args, list) and isinstance(args[0], list)
    expected = args if lists else [range(10)[at : at + 3] for at in range(0, 10, 3)]
    assert first == [[[x, x] for x in chunk] for chunk in expected]
    assert sorted(ran) == sorted(itertools.chain.from_iterable(expected))
    ran.clear()
    assert packets(call, args, chunksize=3, executor=executor, journal=path) == first and ran == []
    others = CALLS[:]
    others.remove(call)
    for other in others:
        assert packets(other, args, chunksize=3, executor=executor, journal=str(path)) == first and ran == []


@pytest.mark.parametrize("call", CALLS)
def test_what_is_missing_runs_in_its_place(path, executor, call):
    packets(call, range(40), executor=executor, journal=path)
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines[1:] if int(line.split(b" ")[0]) % 3]
    path.write_bytes(lines[0] + b"".join(kept))
    ran.clear()
    assert packets(call, range(40), executor=executor, journal=path) == [[[x, x]] for x in range(40)]
    assert sorted(ran) == list(range(0, 40, 3))


def test_imap_gives_what_is_there_at_once_and_in_order(path, executor):
    packets(achilles.imap, range(6), executor=executor, journal=path)
    with achilles.imap(recorded, itertools.count, executor=executor, journal=path, buffersize=2) as found:
        assert [next(found)["ARGS_COUNTER"] for _ in range(20)] == list(range(20))


def test_errors_are_not_kept_and_their_chunks_run_again(path, executor):
    fails.update([4])
    found = achilles.map(recorded, range(9), chunksize=3, executor=executor, journal=path, callback_error=repr)
    assert found[1] == [[3, 3], "ValueError('no 4')", [5, 5]]
    fails.clear()
    ran.clear()
    found = achilles.map(recorded, range(9), chunksize=3, executor=executor, journal=path)
    assert found == [[[x, x] for x in range(at, at + 3)] for at in (0, 3, 6)]
    assert sorted(ran) == [3, 4, 5]


def test_an_error_of_a_run_that_goes_on_has_its_index_in_args(path, executor):
    packets(achilles.map, range(8), chunksize=2, executor=executor, journal=path)
    fails.update([11])
    with pytest.raises(ValueError, match="no 11") as caught:
        packets(achilles.map, range(12), chunksize=2, executor=executor, journal=path)
    assert caught.value.index == 11
    with pytest.raises(DumpError, match="argument 9 .of type generator"):
        packets(achilles.map, [*range(9), (each for each in ())], chunksize=2, executor=executor, journal=path)


def test_a_call_that_is_closed_keeps_what_was_delivered_and_the_journal_is_free(path, executor):
    found = achilles.imap(recorded, itertools.count, executor=executor, journal=path)
    delivered = [next(found)["ARGS_COUNTER"] for _ in range(5)]
    found.close()
    lines = path.read_bytes().splitlines()[1:]
    assert [int(line.split(b" ")[0]) for line in lines] == delivered == [0, 1, 2, 3, 4]
    ran.clear()
    with achilles.imap(recorded, range(7), executor=executor, journal=path) as found:  # found is not dropped yet
        assert len(list(found)) == 7
    assert sorted(ran) == [5, 6]


@pytest.mark.parametrize("drop", [True, False])
def test_a_call_that_is_dropped_or_that_fails_leaves_the_journal_free(path, executor, drop):
    if drop:
        found = achilles.imap(recorded, itertools.count, executor=executor, journal=path)
        next(found)
        del found
    else:
        with pytest.raises(ZeroDivisionError):
            achilles.map(recorded, (1 // 0 for _ in range(2)), executor=executor, journal=path)

    def free():
        with contextlib.suppress(ValueError):
            return packets(achilles.map, range(3), executor=executor, journal=path)

    assert wait_until(free, "a free journal") == [[[x, x]] for x in range(3)]


def test_a_signal_handler_may_close_the_iterator_that_it_interrupts(path, executor):
    """Also while a line is written."""
    class Interrupted:
        def __init__(self, file):
            self.file = file

        def write(self, line):
            count = self.file.write(line)
            if bytes(line[:2]) == b"3 ":
                signal.raise_signal(signal.SIGUSR1)
            return count

    found = achilles.imap(recorded, itertools.count, executor=executor, journal=path)
    [journal] = found._call._watchers
    journal._writer = Interrupted(journal._writer)
    before = signal.signal(signal.SIGUSR1, lambda *_: found.close())
    try:
        assert [packet["ARGS_COUNTER"] for packet in found] == [0, 1, 2, 3]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_iterator_that_was_left_gives_its_journal_to_the_next_call(path, executor):
    for _ in range(3):
        for packet in achilles.imap(recorded, range(9), executor=executor, journal=path):
            assert packet["ARGS_COUNTER"] == 0
            break


def test_an_input_that_pauses_is_cut_into_the_same_chunks(path, executor):
    def slow():
        for x in range(9):
            time.sleep(0.03)  # longer than a pause, after which others are sent what there is
            yield x

    assert packets(achilles.imap, slow, chunksize=4, executor=executor, journal=path) == [
        [[x, x] for x in chunk] for chunk in (range(4), range(4, 8), range(8, 9))]
    ran.clear()
    assert len(packets(achilles.imap, range(9), chunksize=4, executor=executor, journal=path)) == 3 and ran == []


def test_a_buffersize_that_is_less_than_a_chunk_makes_the_chunks(path, executor):
    assert len(packets(achilles.map, range(6), chunksize=4, buffersize=2, executor=executor, journal=path)) == 3
    with pytest.raises(ValueError, match="differs in chunksize"):
        packets(achilles.map, range(6), chunksize=4, executor=executor, journal=path)


def test_progress_counts_what_is_there(path, executor):
    packets(achilles.map, range(6), executor=executor, journal=path)
    seen = []
    packets(achilles.imap, range(9), executor=executor, journal=path, progress=lambda *counts: seen.append(counts))
    assert seen == [(n, 9) for n in range(1, 10)] and sorted(ran) == sorted([*range(6), 6, 7, 8])


def test_a_progress_that_raises_loses_no_line(path, executor):
    def raising(done, total):
        if done == 3:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        packets(achilles.imap, range(9), executor=executor, journal=path, progress=raising)
    assert len(path.read_bytes().splitlines()) == 4


@pytest.mark.parametrize(("window_bytes", "most"), [(256 << 20, 150), (200, 20)])
def test_the_memory_of_what_is_there_is_bounded_by_the_window(path, executor, window_bytes, most, monkeypatch):
    """Results that wait to be taken count with their bytes, as arguments do."""
    packets(achilles.map, range(400), executor=executor, journal=path)
    monkeypatch.setattr("achilles.controller.results.WINDOW_BYTES", window_bytes)
    read = []
    with achilles.imap(recorded, (read.append(x) or x for x in range(400)), executor=executor, journal=path) as found:
        next(found)
        time.sleep(0.2)
        assert len(read) < most
        assert len(list(found)) == 399


class Made:
    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return self.x == other.x


def test_results_of_classes_of_the_script_come_back_as_them(path, executor):
    def make(x):
        return Made(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = achilles.map(make, [1, 2], executor=executor, journal=path)
        again = achilles.map(make, [1, 2], executor=executor, journal=path)
    assert first == again == [[Made(1)], [Made(2)]] and type(again[0][0]) is Made


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", [1, b"bytes", True, ["a"]])
def test_what_is_no_path_is_refused_before_anything_is_connected(call, value):
    with pytest.raises(TypeError, match="journal must be a path, not"):
        call(recorded, [1], journal=value, **address(1))


def test_a_journal_that_will_not_do_is_refused_before_anything_is_connected(path):
    path.write_bytes(b"mine\n")
    with pytest.raises(ValueError, match="is no journal"):
        achilles.map(recorded, [1], journal=path, **address(1))


def test_a_server_that_is_not_there_leaves_the_journal_free(path):
    for _ in range(2):
        with pytest.raises(ConnectionError):
            achilles.map(recorded, [1], journal=path, **address(1))


def test_what_is_there_needs_no_node(path, executor):
    packets(achilles.map, range(5), executor=executor, journal=path)
    with serving() as server:
        where = address(server.address[1])
        assert packets(achilles.imap, range(5), journal=path, **where) == [[[x, x]] for x in range(5)]
        with Node(where["port"]):
            assert packets(achilles.map, range(8), journal=path, **where) == [[[x, x]] for x in range(8)]


# Modules beside the script: their files travel to the nodes.

WITH_HELPER = '''
import os, pathlib, sys
import achilles, helper, report

def work(x):
    return helper.scale(x)

def run():
    try:
        return [packet["RESULT"] for packet in achilles.imap(work, range(4), chunksize=2, journal=sys.argv[1])]
    except ValueError as e:
        return e

print(run())
for old, new in [pair.split("/") for pair in sys.argv[2:]]:
    path = pathlib.Path(helper.__file__)
    path.write_text(path.read_text().replace(old, new) + "#")
    print(run())
'''
HELPER = """
import uuid
def scale(x):
    return x * 2, uuid.uuid4().hex
def other():
    return 1
"""


def test_a_module_beside_the_script_counts_by_what_the_function_names_of_it(tmp_path, path):
    """Each result has a number of its own: it is the same again only where nothing ran."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    script, helper, report = (folder / f"{name}.py" for name in ("script", "helper", "report"))
    script.write_text(WITH_HELPER)
    helper.write_text(HELPER)
    report.write_text("")
    with Cluster(tmp_path, 1) as cluster:

        def run(*changes):
            caller = cluster.start_script(script, str(path), *changes)
            assert caller.wait() == 0, caller.err.read_text()
            return caller.out.read_text().splitlines()

        [first] = run()
        assert first.startswith("[[(0, ")
        helper.write_text("# a comment\n" + HELPER.replace("return 1", "return 2"))
        report.write_text("changed = True")
        assert run() == [first], "nothing ran"
        was, changed = run("x * 2/x * 3")
        assert was == first
        assert changed.startswith(f"{helper} has changed since this process imported it")
        [other] = run()
        assert other.startswith(f"the journal {path} is of another call, which differs in the global helper.scale")
        helper.write_text(HELPER)
        assert run() == [first], "what it was again"


def test_a_module_that_is_reloaded_after_a_change_is_looked_at_anew(path, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # it tells when the module was imported
    helper = tmp_path / "changed_helper.py"
    helper.write_text("def scale(x): return x\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("changed_helper")
    assert run(path, [[1]], module.scale) == ([0], [[1]])
    helper.write_text("def scale(x): return x + 10\n")
    with pytest.raises(ValueError, match=f"{helper} has changed since this process imported it"):
        run(path, [[1]], module.scale)
    importlib.reload(module)
    with pytest.raises(ValueError, match="differs in the code of scale"):
        run(path, [[1]], module.scale)
    del sys.modules["changed_helper"]


EDITED = """
import os, pathlib, sys, time
import edited
from achilles.journal import Journal
if __name__ == "__main__":
    file, old = pathlib.Path(edited.__file__), time.time() - float(sys.argv[2])
    time.sleep(0.1)
    if sys.argv[3:]:
        file.write_text(sys.argv[3])
        if float(sys.argv[2]):
            os.utime(file, (old, old))
    try:
        Journal(sys.argv[1], edited.scale, None, 1).close()
        print("taken")
    except ValueError as e:
        print(e)
"""


@pytest.mark.parametrize("caches", [True, False])
@pytest.mark.parametrize(("age", "arguments", "said"), [
    (0, [], "taken"), (0, ["def scale(x): return x * 3"], "edited.py has changed since this process imported it"),
    (100, ["def scale(x): return x * 3"], "taken")])  # a file that is older than the process
def test_a_module_that_was_edited_before_the_first_journal(path, tmp_path, age, arguments, said, caches):
    """The file is written just before the process starts."""
    (tmp_path / "script.py").write_text(EDITED)
    (tmp_path / "edited.py").write_text("def scale(x): return x * 2")
    flags = [] if caches else ["-B"]
    command = [sys.executable, *flags, tmp_path / "script.py", path, str(age), *arguments]
    package = str(Path(achilles.__file__).parent.parent)
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True,
                              env={**os.environ, "PYTHONPATH": package, "PYTHONDONTWRITEBYTECODE": ""})
        assert said in done.stdout
        (tmp_path / "edited.py").write_text("def scale(x): return x * 2")


# The caller's own death.

SCRIPT = '''
import sys
import achilles

path, journal, count = sys.argv[1], sys.argv[2], int(sys.argv[3])

class Result:
    def __init__(self, x):
        self.value = x * x

def work(x):
    import tasks
    tasks.record(path, x)
    tasks.never.wait(0.02)
    return Result(x)

if __name__ == "__main__":
    total = 0
    for packet in achilles.CALL(work, range(count), chunksize=2, journal=journal):
        total += sum(result.value for result in packet["RESULT"])
        print(packet["ARGS_COUNTER"], flush=True)
    print("total", total, flush=True)
'''
COUNT = 300


@pytest.mark.parametrize("call", ["imap", "imap_unordered"])
def test_a_killed_caller_that_is_started_again_runs_only_what_was_under_way(tmp_path, path, call):
    oracle = Oracle(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("CALL", call))
    arguments = oracle.path, str(path), str(COUNT)
    with Cluster(tmp_path, 2, 1) as cluster:
        for kills in range(1, 4):
            caller = cluster.start_script(script, *arguments)
            wait_until(lambda least=kills * 20: path.exists() and len(path.read_bytes().splitlines()) > least / 2)
            caller.kill()
            kept = {int(line.split(b" ")[0]) for line in path.read_bytes().splitlines()[1:] if line.endswith(b"\n")}
            kept |= {index + 1 for index in kept}
            cluster.wait_idle()
            before = oracle.counts()
            delivered = {int(line) for line in caller.out.read_text().split()}
            assert delivered <= {int(line.split(b" ")[0]) for line in path.read_bytes().splitlines()[1:]}
            assert len(before) < COUNT
        last = cluster.start_script(script, *arguments)
        assert last.wait() == 0, last.err.read_text()
        assert f"total {sum(x * x for x in range(COUNT))}\n" in last.out.read_text()
        after = oracle.counts()
        assert after.keys() == set(range(COUNT))
        assert all(after[index] == before[index] for index in kept), "what was kept ran again"
        assert after.total() < COUNT * 2.5
        assert Path(path).read_bytes().count(b"\n") >= COUNT // 2 + 1
