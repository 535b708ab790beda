"""docs/tour.md and docs/first_version.md: what they name is there, what they count is so, and their exercises' answers.

The answer to exercise N is `test_exercise_N` with the rest of its name, in the order of the pages.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import math
import os
import re
import socket
import threading
import time
from pathlib import Path

import pytest
import reading
import tasks
import test_tiny
from cluster import PYTHON, Cluster, Oracle, Process, environment
from conftest import wait_until
from controller.fake_link import FakeLink, begin_fed, values
from faults import run as faults
from pages import PAGES, ROOT, headings, section, table
from server import test_scheduler
from test_imports import TREES, outside_imports, own_imports
from test_tiny import SECONDS, SECRET, STUCK_SECONDS, TinyCluster, tiny

import achilles
from achilles.controller.pace import Pace, worth_of
from achilles.controller.results import Results
from achilles.controller.run import Run
from achilles.errors import ServerUnreachable, WorkerLost
from achilles.objects import letters, outcomes
from achilles.protocol import auth, channel, connect
from achilles.protocol.frames import Gone, Kind
from achilles.server import scheduler

TOUR, FIRST = "docs/tour.md", "docs/first_version.md"
NAMED = re.compile(r"`([\w/.-]+\.py): ([\w.]+)`")
PARTS = ("**In tiny.py**", "**What breaks.**", "**Here**", "**Shown by**", "**Exercise ")
NO_CHAPTERS = ("Contents", "How to read this page")
WEAKNESSES = re.findall(r"^- ([\w ]+): ", tiny.__doc__, re.MULTILINE)
NUMBERS = "none one two three four five six seven eight nine ten eleven twelve".split()
ALLOWED = 0.1  # by which a figure of the page may be off, before the table is made anew
MOMENT_SECONDS = 2.0  # twice what is limited to a second
pytestmark = [
    pytest.mark.usefixtures("no_leftovers"),
    pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes in /proc"),
]


# What the pages name.


def trees():
    """The syntax tree of each file that the pages name."""
    files = {file for page in (TOUR, FIRST) for file, _ in NAMED.findall(PAGES[page])}
    return {file: ast.parse(path_of(file).read_text(encoding="utf-8")) for file in files}


def path_of(file):
    return ROOT / file if file.startswith(("examples/", "tests/")) else ROOT / "achilles" / file


def find(tree, name):
    """The definition of a function, a class or a method; None if there is none."""
    for part in name.split("."):
        definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        found = [node for node in tree.body if isinstance(node, definitions) and node.name == part]
        if not found:
            return None
        tree = found[0]
    return tree


def test_every_function_that_the_pages_name_is_in_its_file():
    known = trees()
    named = {pair for page in (TOUR, FIRST) for pair in NAMED.findall(PAGES[page])}
    assert len(named) > 100
    assert [f"{file}: {name}" for file, name in sorted(named) if find(known[file], name) is None] == []
    assert find(known["server/scheduler.py"], "Scheduler.nothing") is None
    written = len(re.findall(r"\.py: ", PAGES[TOUR] + PAGES[FIRST]))
    assert written == sum(len(NAMED.findall(PAGES[page])) for page in (TOUR, FIRST)), "in the form that is looked up"


def test_every_test_that_the_pages_name_is_run():
    cases = faults.load()
    for page in (TOUR, FIRST):
        for file, name in NAMED.findall(PAGES[page]):
            if file.startswith("tests/faults/"):
                assert cases[name].run.__module__ == file.removeprefix("tests/")[:-3].replace("/", "."), name
            elif file.startswith("tests/test_") or "/test_" in file:
                assert name.startswith("test_"), name


def test_each_chapter_is_a_weakness_that_tiny_names_and_has_all_its_parts():
    chapters = [heading for heading in headings(FIRST)[1:] if heading not in NO_CHAPTERS]
    assert chapters == [*WEAKNESSES, "The fault table, row by row"]
    for chapter in WEAKNESSES:
        text = section(FIRST, chapter)
        places = [text.index(part) for part in PARTS]
        assert places == sorted(places), chapter
        pieces = [text[start:end] for start, end in itertools.pairwise(places)]
        files = [[file for file, _ in NAMED.findall(piece)] for piece in pieces]
        assert {*files[0]} <= {"examples/tiny.py"}, chapter
        assert len(files[2]) > 1 and not [file for file in files[2] if file.startswith(("examples/", "tests/"))]
        assert files[3] and all(file.startswith("tests/") for file in files[3]), chapter


def test_the_fault_table_has_each_row_of_the_page_on_promises_and_a_case_of_it():
    rows = table(FIRST, "The fault table, row by row", "fault")
    for (name, _, lines, shown), fault in zip(rows, faults.GROUPS, strict=True):
        assert fault.startswith(name), "or its beginning"
        assert NAMED.search(lines), fault
        (_, case), = NAMED.findall(shown)
        assert faults.group_of(case) == fault


def test_each_chapter_has_one_exercise_and_each_exercise_an_answer():
    chapters = [section(page, heading) for page in (TOUR, FIRST) for heading in headings(page)[1:]
                if heading not in NO_CHAPTERS]
    numbers = [re.findall(r"^\*\*Exercise (\d+)\.\*\*", text, re.MULTILINE) for text in chapters]
    assert numbers == [[str(number)] for number in range(1, len(chapters) + 1)]
    answers = [re.match(r"test_exercise_(\d+)_", name) for name in globals()]
    assert [answer[1] for answer in answers if answer] == [number for number, in numbers]


# What the tour counts.


def test_the_times_of_reading_are_counted():
    """`python tests/reading.py` prints the table anew."""
    text = section(TOUR, "Reading the code")
    assert f"{reading.STATEMENTS_A_MINUTE} statements and {reading.WORDS_A_MINUTE} words" in text
    assert f"At {reading.CHECKED_A_MINUTE} statements a minute" in text
    shown = {row[0]: row[1:] for row in table(TOUR, "Reading the code", "step")}
    counted = dict(reading.rows(text))
    assert [*shown] == [*counted]
    for name, (statements, words, minutes) in shown.items():
        found = counted[name]
        said = reading.Reading(*(int(each.replace(",", "")) for each in (statements, words)))
        assert minutes == reading.in_words(said.minutes())
        for one, other in zip(said, found):
            assert abs(one - other) <= ALLOWED * other + 5, f"{name}: {one}, not {other}; run python tests/reading.py"
    said = {
        r"It is read in ([a-z ]+) hours": counted["the ring"].minutes(),
        r"it is audited in ([a-z ]+): a morning": counted["the ring"].minutes(reading.CHECKED_A_MINUTE),
        r"It takes ([a-z ]+) hours: a long day": counted["the core"].minutes(),
    }
    for pattern, minutes in said.items():
        word, half, _ = re.search(pattern, text)[1].partition(" and a half")
        hours = NUMBERS.index(word) + bool(half) / 2
        assert abs(hours - minutes / 60) < 0.1 * hours + 0.2, f"{pattern}: {minutes / 60:.1f}"


def test_statements_are_counted_as_the_budgets_count_them():
    from test_imports import SOURCES, is_in, statements_of

    ring = dict(reading.rows(section(TOUR, "Reading the code")))["the ring"]
    counted = sum(statements_of(name) for name in SOURCES if is_in("ring", name) and not name.endswith("__init__"))
    assert abs(ring.statements - counted) < 10


def test_tiny_is_read_in_a_quarter_of_an_hour():
    found = reading.reading_of([ROOT / "examples/tiny.py"])
    assert 12 < found.minutes() < 22


# The map that is followed.

TRACED = '''
import os, runpy, sys, threading
seen, file = set(), os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def profile(frame, event, argument):
    code = frame.f_code
    if event == "call" and code not in seen:
        seen.add(code)
        _, inside, path = code.co_filename.replace(os.sep, "/").rpartition("/achilles/")
        if inside:
            os.write(file, f"{os.getpid()} {path}: {code.co_qualname}\\n".encode())
what, sys.argv = sys.argv[2], sys.argv[2:]
threading.setprofile(profile)
sys.setprofile(profile)
if what.endswith(".py"):
    runpy.run_path(what, run_name="__main__")
else:
    runpy.run_module(what, run_name="__main__", alter_sys=True)
'''


class TracedCluster(Cluster):
    """A cluster of which each process writes down the functions of the package that it calls."""

    def _run(self, name, *command, **popen):
        file = self.folder / "traced.py"
        file.write_text(TRACED)
        module = [each for each in command if each != "-m"]
        return super()._run(name, str(file), str(self.folder / f"{name}.calls"), *module, **popen)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the workers are forked, with what watches them")
def test_each_function_of_the_map_that_is_followed_is_called_in_its_process(tmp_path):
    text = section(TOUR, "One map, followed")
    steps = re.findall(r"^- (caller|server|node|worker): (.*)$", text, re.MULTILINE)
    wanted = {(role, f"{file}: {name}") for role, step in steps for file, name in NAMED.findall(step)}
    assert len(wanted) > 35
    script = tmp_path / "script.py"
    script.write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    with TracedCluster(tmp_path, 8, start_method="fork") as cluster:
        caller = cluster.start_script(script)
        assert caller.wait() == 0, caller.err.read_text()
        node = str(cluster.nodes[0].pid)

        def called():
            found = set()
            for name, role in (("script", "caller"), ("server", "server"), ("node", "node")):
                for line in (tmp_path / f"{name}.calls").read_text().splitlines():
                    pid, _, function = line.partition(" ")
                    found.add(("worker" if role == "node" and pid != node else role, function))
            return found

        wait_until(lambda: wanted <= called(), lambda: f"calls of {sorted(wanted - called())}")


def test_below_each_log_stand_functions_of_each_process_in_it():
    text = section(TOUR, "One map, followed")
    pieces = re.split(r"```log\n(.*?)```", text, flags=re.DOTALL)
    for log, below in zip(pieces[1::2], pieces[2::2]):
        roles = {line.split()[0] for line in log.splitlines()}
        roles |= {"worker"} if " < TASK" in log and "worker" in log else set()
        assert roles - {role for role, _ in re.findall(r"^- (\w+): (.*)$", below, re.MULTILINE)} == set()


# The answers. Some change tiny.py as text, and run it.


class ChangedCluster(TinyCluster):
    """A cluster of a changed tiny.py. Its maps are those of the changed file, or with `old_caller` of the old one."""

    def __init__(self, folder, *changes, old_caller=False):
        self.file = folder / "tiny.py"
        self.file.write_text(changed(*changes))
        self.module = tiny if old_caller else load(self.file)
        super().__init__(folder)

    def _start(self, role, port):
        command = [*PYTHON, str(self.file), role, "127.0.0.1", port]
        return Process(self._folder, f"{role}-{len(self.nodes)}", command, environment(TINY_SECRET=SECRET))

    def imap(self, function, arguments):
        return self.module.imap(function, arguments, self.address, SECRET)


def changed(*changes):
    """The text of tiny.py with these pieces of it replaced, each of which is there once."""
    source = test_tiny.FILE.read_text(encoding="utf-8")
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def load(file):
    spec = importlib.util.spec_from_file_location("changed_tiny", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start(tmp_path):
    """`start(*changes)`: a changed cluster with one node, which is closed at the end."""
    made = []

    def make(*changes, node=True, **more):
        made.append(ChangedCluster(tmp_path, *changes, **more))
        if node:
            made[-1].start_node()
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


@pytest.fixture
def oracle(tmp_path):
    return Oracle(tmp_path)


def squares(count):
    return [number**2 for number in range(count)]


def test_exercise_1_what_a_task_costs_on_its_way():
    """48 bytes a journey: head, number and tag; 192 on all four."""
    one, other = tcp_pair()
    with one, other:
        link = tiny.Link(one, b"k" * 32, b"k" * 32)
        link.send(tiny.TASK, 7, b"the pickle of a task")
        one.shutdown(socket.SHUT_WR)
        sent = b"".join(iter(lambda: other.recv(1000), b""))
    assert len(sent) - len(b"the pickle of a task") == 8 + 8 + 32 == 48


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]


def test_exercise_2_a_server_without_pickle_runs_a_map(tmp_path):
    class Pickleless(Cluster):
        def _run(self, name, *command, **popen):
            if name == "server":
                code = ("import runpy, sys; sys.modules['pickle'] = sys.modules['_pickle'] = None; "
                        "runpy.run_module('achilles.server', run_name='__main__', alter_sys=True)")
                command = ("-c", code)
            return super()._run(name, *command, **popen)

    with Pickleless(tmp_path, 2) as cluster:
        offset = 5
        assert achilles.map(lambda number: number + offset, [1, 2], **cluster.address) == [[6, 7]]


def test_exercise_3_the_modules_that_unpickle_and_none_of_them_is_reached_by_the_server():
    pickles = {name for name in TREES if {"pickle", "marshal", "dill"} & set(outside_imports(name))}
    assert pickles == {name for name in pickles if name.startswith("objects.")} != set()
    reached, found = set(), {"server.__main__"}
    while found - reached:
        name = (found - reached).pop()
        reached.add(name)
        found |= {each for each in own_imports(name) if each in TREES}
    assert "server.exchange" in reached and not pickles & reached


def test_exercise_4_the_first_two_packets_are_three_chunks_and_five():
    cluster = test_scheduler.Cluster(3, 5)
    cluster.add(*[1] * 10)
    workers = {0: 3, 1: 5}
    results = Results(threading.Lock(), ordered=True, by_argument=False, packets=True)
    with results.changed:
        results.enter(Run(0, 0, 1, [b"letter"] * 10, 10))
        for node, chunk in cluster.given():
            results.give(chunk, 1, workers[node], 10)
        results.put(Run(0, 0, 1, [b"letter"] * 8, 8, answers=[b"answer"] * 8))
        packets = [sum(len(run.letters) for run in results.take()) for _ in range(2)]
    assert packets == [3, 5]


def test_exercise_5_idle_workers_come_first_and_the_second_places_are_for_quick_batches():
    slow = test_scheduler.Cluster(1, 2)
    slow.add(*[1] * 5)
    assert slow.given() == [(0, 0), (1, 1), (1, 2)], "nodes take turns; batches 3 and 4 wait"
    quick = test_scheduler.Cluster(1, 2)
    quick.add(*[1] * 5, number=1_000)
    assert quick.given() == [(0, 0), (1, 1), (1, 2), (0, 3), (1, 4)], "none waits"


def test_exercise_6_the_first_batches_of_a_dead_node_are_lost_and_the_others_returned():
    cluster = test_scheduler.Cluster(2)
    first, *_ = cluster.add(10, 10, 10, 10, number=1_000)
    cluster.answer(0, first, 0, 4)
    cluster.take()
    cluster.scheduler.lose(0)
    assert cluster.gone() == [
        (4, 10, Gone.LOST), (10, 20, Gone.LOST), (20, 30, Gone.RETURNED), (30, 40, Gone.RETURNED)]
    link = FakeLink(1)
    call = begin_fed(link, range(10), us=1)
    batch, = link.batches(1)
    link.gone_back(batch, Gone.LOST)
    assert sum(run.counts.total() for run in call.job.out.values()) == 1, "the loss is counted once"
    link.gone_back(link.batches()[-1], Gone.RETURNED)
    assert sum(run.counts.total() for run in call.job.out.values()) == 1, "what was returned is not"
    link.finish()
    assert values(call) == squares(10)


def test_exercise_7_without_second_places_tests_of_them_fail_and_each_batch_is_answered_all_the_same(monkeypatch):
    monkeypatch.setattr(scheduler, "QUICK_US", 0)
    for name in ("idle_workers_are_filled_before_any_second_place", "a_second_place_waits_while_another_node_has_an_"
                 "idle_worker", "a_quick_job_passes_a_slow_one_where_a_second_place_is_free"):
        with pytest.raises(AssertionError):
            vars(test_scheduler)[f"test_{name}"]()
    cluster = test_scheduler.Cluster(1, 2)
    batches = {batch.first: batch for batch in cluster.add(*[1] * 20, number=1_000)}
    answered = []
    while given := cluster.given():
        for node, first in given:
            cluster.answer(node, batches[first])
            answered.append(first)
    assert sorted(answered) == [*range(20)]


REMEMBER = [
    ("self.given[self.count] = controller, index\n", "self.given[self.count] = controller, index, task, node\n"),
    ("controller, index = self.given.pop(number)", "controller, index, *_ = self.given.pop(number)"),
    ("            self.idle = deque(node for node in self.idle if node.sock is not sock)\n",
     """\
            self.idle = deque(node for node in self.idle if node.sock is not sock)
            for number in [number for number, (*_, node) in self.given.items() if node.sock is sock]:
                self.waiting.appendleft(self.given.pop(number)[:3])
        self.handle(None, None, None, None)  # what waits may have an idle worker
"""),
]


def test_exercise_8_tasks_of_a_killed_node_go_to_the_next(start, oracle):
    """The server keeps the task itself, and the node that has it."""
    cluster = start(*REMEMBER)
    caller = cluster.call(test_tiny.partial(tasks.recorded_square, oracle.path, 0.2), range(8))
    oracle.wait_for(4)
    cluster.nodes[0].kill()
    cluster.start_node()
    assert caller.join() == squares(8)
    assert sum(oracle.counts().values()) > 8, "some ran twice: at least once is the promise"


def test_exercise_9_a_time_limit_needs_heartbeats(start, monkeypatch):
    """The node is idle, not dead. A Channel says PING meanwhile, and is ended if the other side does not."""
    limit = ("        self.sock = sock\n", "        self.sock = sock\n        sock.settimeout(0.5)\n")
    cluster = start(limit, node=False)
    node = cluster.start_node()
    node.wait()
    monkeypatch.setattr(channel, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(channel, "SILENCE_SECONDS", 1.0)
    ends = [channel.Channel(sock, link) for sock, link in zip(socket.socketpair(), ("SN", "NS"))]
    try:
        for end in ends:
            end.socket.setblocking(False)
        talk(ends, MOMENT_SECONDS)
        with pytest.raises(ServerUnreachable, match="no byte came"):
            talk(ends[:1], MOMENT_SECONDS)
    finally:
        for end in ends:
            end.close()


def talk(ends, seconds):
    """What a node's loop does, so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for end in ends:
            end.receive()
            end.tick()
            end.flush()
        threading.Event().wait(0.01)


def test_exercise_10_over_the_next_connection_goes_what_has_no_answer():
    link = FakeLink(2)
    call = begin_fed(link, range(6))
    batches = link.batches(6)
    for number in (0, 3):
        link.square(batches[number])
    with link.lock:
        link.forget_connection()
        link.fill()
    again = link.batches()[6:]
    assert [batch.first for batch in again] == [1, 2, 4, 5]
    assert not {batch.attempt for batch in batches} & {batch.attempt for batch in again}
    link.answer(batches[1], [["of the old connection"]])  # it is ignored
    link.finish()
    assert values(call) == squares(6)


BOUNDED = [
    ("""\
    tasks = [pickle.dumps((function, argument)) for argument in arguments]
    link = connect(address, b"C", secret)
    threading.Thread(target=feed, args=[link, tasks]).start()
    answers = {}  # those that have come before their turn
    with link.sock:
        for index in range(len(tasks)):
""", """\
    arguments, sent = iter(arguments), 0
    link = connect(address, b"C", secret)
    answers = {}  # those that have come before their turn
    with link.sock:
        for index in itertools.count():
            for argument in itertools.islice(arguments, index + 8 - sent):
                link.send(TASK, sent, pickle.dumps((function, argument)))
                sent += 1
            if index == sent:
                return
"""),
    ("import hmac\n", "import hmac\nimport itertools\n"),
]


def test_exercise_11_with_a_window_an_endless_generator_starts(start):
    """The thread that feeds is not needed: so few tasks never fill a connection, as long as they are short."""
    cluster = start(*BOUNDED)
    pulled = []

    def endless():
        for number in itertools.count():
            pulled.append(number)
            yield number

    results = cluster.imap(tasks.square, endless())
    assert list(itertools.islice(results, 20)) == squares(20)
    assert len(pulled) <= 28
    results.close()
    assert list(cluster.imap(tasks.square, range(30))) == squares(30)
    assert list(cluster.imap(tasks.square, [])) == []


QUEUED = [
    ("        self.sent, self.received = 0, 0  # frames\n", """\
        self.sent, self.received = 0, 0  # frames
        self.outbox = queue.SimpleQueue()
        threading.Thread(target=self.write, daemon=True).start()
"""),
    ("            self.sock.sendall(signed + tag)\n\n", """\
            self.outbox.put(signed + tag)

    def write(self):
        with suppress(OSError):
            while True:
                self.sock.sendall(self.outbox.get())

"""),
    ("import pickle\n", "import pickle\nimport queue\n"),
]


def test_exercise_12_with_writers_a_caller_that_does_not_read_stops_nobody(start):
    """The queue has no bound: all 64 MiB lie in the server, and more would. The window of a caller would bound it."""
    cluster = start(*QUEUED, old_caller=True)
    unread = cluster.imap(bytes, [1 << 20] * 64)
    assert next(unread) == bytes(1 << 20)
    threading.Event().wait(STUCK_SECONDS)
    assert list(cluster.imap(tasks.square, range(3))) == squares(3)
    statm = Path(f"/proc/{cluster.server.pid}/statm")
    wait_until(lambda: int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > 40 << 20, "a large server")
    assert sum(1 for _ in unread) == 63


def test_exercise_13_one_chunk_then_500_and_250_near_the_end():
    pace, worth_us = Pace(), worth_of(0, late=False, few=False)
    assert worth_us == 5_000
    assert pace.chunks(1, worth_us, math.inf, 2) == 1
    pace.learn(10, 1)
    assert pace.chunks(1, worth_us, math.inf, 2) == 500
    assert pace.chunks(1, worth_us, 1_000, 2) == 250, "two batches for each of two workers"


UNORDERED = ("""\
            while index not in answers:
                _, answered, answer = link.recv()
                answers[answered] = answer
            good, result = pickle.loads(answers.pop(index))
""", """\
            good, result = pickle.loads(link.recv()[2])
""")


def test_exercise_14_results_as_they_come_are_four_lines_less_and_one_more(start):
    cluster = start(UNORDERED)
    caller = cluster.call(test_tiny.partial(tasks.hang_at, 0), range(20))
    caller.wait(19)
    assert sorted(caller.results) == squares(20)[1:]


def test_exercise_15_the_other_jobs_batch_comes_third_and_then_they_take_turns():
    """The first job was alone in the line when its first batch was given. So it stood in front when the other came."""
    cluster = test_scheduler.Cluster(1, jobs=2)
    cluster.add(*[1] * 10)
    cluster.add(1, job=test_scheduler.OTHER)
    order = []
    for _ in range(4):
        (_, batch), = cluster.take(Kind.TASK)
        order.append(batch.job)
        cluster.answer(0, batch)
    first, other = test_scheduler.JOB, test_scheduler.OTHER
    assert order == [first, first, other, first]


FORGOTTEN = ("            self.idle = deque(node for node in self.idle if node.sock is not sock)\n", """\
            self.idle = deque(node for node in self.idle if node.sock is not sock)
            self.waiting = deque(entry for entry in self.waiting if entry[0].sock is not sock)
""")


def test_exercise_16_what_waits_is_dropped_and_what_a_worker_has_runs(start, oracle):
    cluster = start(FORGOTTEN)
    results = cluster.imap(test_tiny.partial(tasks.recorded_square, oracle.path, 0.1), range(100))
    assert next(results) == 0
    test_tiny.wait_sent()
    results.close()
    assert list(cluster.imap(tasks.square, [4])) == [16]
    runs = len(oracle.runs())
    threading.Event().wait(STUCK_SECONDS)
    assert len(oracle.runs()) <= runs + tiny.WORKERS < 50


def test_exercise_17_in_a_context_two_functions_have_one_list_and_behind_dill_two(start):
    script = {"__name__": "a_script"}
    exec("shared = []\ndef add(): shared.append(1)\ndef count(): return len(shared)", script)
    functions = script["add"], script["count"]
    here, there = letters.Context(caller=True), letters.Context(caller=False)
    add, count = (there.load(letters.dump_function(here, (function, None)))[0] for function in functions)
    add()
    assert count() == 1 and script["shared"] == []
    cluster = start(("import pickle\n", "import dill as pickle\n"))
    dill = load(cluster.file).pickle
    try:
        add, count = (dill.loads(dill.dumps(function)) for function in functions)
    except AttributeError as error:
        assert "co_lnotab" in str(error)
        pytest.skip("this dill cannot dump the code objects of this Python")
    add()
    assert count() == 0
    assert list(cluster.imap(lambda number: number + 1, [1, 2])) == [2, 3]


RAISED = [("return pickle.dumps((False, repr(error)))", "return pickle.dumps((False, error))"),
          ("raise RuntimeError(result)", "raise result")]


def test_exercise_18_an_exception_that_cannot_be_rebuilt_breaks_tiny_and_not_ours(start):
    cluster = start(*RAISED)
    with pytest.raises(ValueError, match="no 2"):
        list(cluster.imap(test_tiny.partial(tasks.fail_at, (2,)), range(5)))
    with pytest.raises(TypeError, match="reason"):  # of OddError.__init__, in the caller
        list(cluster.imap(tasks.raise_odd, range(5)))
    with pytest.raises(tasks.OddError) as raised:
        tasks.raise_odd(2)
    there, here = letters.Context(caller=False, node=3), letters.Context(caller=True)
    raised.value.generator = (each for each in ())
    _, parts = outcomes.dump_outcomes(there, [None], {0: raised.value})
    _, errors = outcomes.load_outcomes(here, letters.joined(parts), True)
    assert type(errors[0]) is achilles.RemoteError and "OddError: 2 is odd" in str(errors[0])
    del raised.value.generator
    _, parts = outcomes.dump_outcomes(there, [None], {0: raised.value})
    _, errors = outcomes.load_outcomes(here, letters.joined(parts), True)
    assert type(errors[0]) is tasks.OddError and errors[0].number == 2
    assert errors[0].node == 3 and "raise_odd" in str(errors[0].__cause__)


def test_exercise_19_a_limit_for_each_recv_is_none_for_the_handshake(start):
    """tiny.py waits for all 104 bytes: 21 seconds at this rate. A deadline ends both."""
    cluster = start(("    greeting = struct.pack(\">4sH2x32s\"", "    sock.settimeout(1)\n"
                     "    greeting = struct.pack(\">4sH2x32s\""), node=False)
    with socket.create_connection(cluster.address, SECONDS) as stranger:
        drip(stranger, MOMENT_SECONDS)
        stranger.settimeout(0.1)
        assert len(stranger.recv(100)) == len(auth.PLAIN) + auth.NONCE_BYTES
        with pytest.raises(TimeoutError):
            stranger.recv(1)  # it is open still
    one, other = socket.socketpair()
    with one, other:
        dripping = threading.Thread(target=drip, args=[one, MOMENT_SECONDS])
        dripping.start()
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            connect.receive_exactly(other, auth.AUTH_BYTES, began + 1)
        assert time.monotonic() - began < MOMENT_SECONDS
        dripping.join(SECONDS)


def drip(sock, seconds):
    """Send a byte each fifth of a second."""
    for _ in range(int(seconds * 5)):
        sock.sendall(b"A")
        threading.Event().wait(0.2)


@pytest.mark.parametrize("third, given_up", [(1, {1}), (2, set())])
def test_exercise_20_the_deaths_before_the_first_that_names_an_argument_are_its_own(third, given_up):
    run = Run(0, 0, 3, [b"letter"], 3)
    for offset in (-1, 1, third):
        run.die({"offset": offset, "phase": "call"}, "")
    assert {*run.lost} == given_up
    assert all(isinstance(error, WorkerLost) for error in run.lost.values())
