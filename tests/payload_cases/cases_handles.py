"""Things of a process that arrive as the worker's own, or as new ones: its streams, loggers, locks, queues."""

import collections
import concurrent.futures
import contextlib
import copy
import datetime
import decimal
import functools
import importlib
import io
import itertools
import logging
import logging.handlers
import multiprocessing
import queue
import random
import re
import sqlite3
import sys
import tempfile
import threading
import types

sys.path.insert(0, sys.argv[-1])
from peer import MODE, ask, case, expect, gives, main, program, refused  # noqa: E402

out, err = sys.stdout, sys.stderr
first_out, write = sys.__stdout__, sys.stderr.write
raw = sys.stderr.buffer
say = functools.partial(print, file=sys.stderr, flush=True)


@gives("sys.stdout and sys.stderr as globals", 1, (True, True, True))
def streams(_):
    return out is sys.stdout, err is sys.stderr, first_out is sys.__stdout__


@gives("streams as defaults", 1, (True, True))
def stream_defaults(_, file=sys.stdout, *, also=sys.stderr):
    return file is sys.stdout, also is sys.stderr


def close():
    file = sys.stderr

    def inner(_):
        return file is sys.stderr
    return inner


gives("a stream in a closure", 1, True)(close())


class Console:
    file = sys.stderr

    def __init__(self):
        self.out, self.lines = sys.stdout, [sys.stderr]

    def own(self, _):
        return self.out is sys.stdout, self.lines[0] is sys.stderr, self.file is sys.stderr


CONSOLE = Console()


@gives("streams in attributes of classes and of global instances", 1, (True, True, True))
def console(x):
    return CONSOLE.own(x)


@gives("a bound method of a stream, its buffer, a partial of print", 1, (True, True, True))
def bound(_):
    return write.__self__ is sys.stderr, raw is sys.stderr.buffer, say.keywords["file"] is sys.stderr


@program("a stream as an argument", fork="pickle refuses it")
def stream_argument(peer):
    expect(peer.map(is_stream, [sys.stdout, {"file": [sys.stderr]}, CONSOLE]), [True] * 3)


def is_stream(x):
    return x is sys.stdout or (x["file"][0] is sys.stderr if isinstance(x, dict) else x.own(1)[0])


def gives_stream(_):
    return {"file": sys.stdout}


@program("a stream as a result is the caller's own", fork="pickle refuses it")
def stream_result(peer):
    result, = peer.map(gives_stream, [1])
    assert result["file"] is sys.stdout, result


log = logging.getLogger("cases.log")
log.setLevel(logging.DEBUG)
log.addHandler(logging.StreamHandler(sys.stderr))
adapter = logging.LoggerAdapter(log, {"a": 1})
handler = logging.StreamHandler(sys.stderr)
handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
handler.setLevel(logging.ERROR)


class Logs:
    log = logging.getLogger("cases.class")

    def __init__(self):
        self.log_too = logging.getLogger("cases.instance")


@gives("loggers are found by their names", log, ("cases.log", True, True, True, True))
def loggers(argument):
    return (argument.name, argument is logging.getLogger("cases.log"), log is argument, adapter.logger is log,
            Logs.log is logging.getLogger("cases.class"))


@gives("a logger in an instance, and the root", [Logs(), logging.getLogger()], (True, True))
def more_loggers(two):
    return two[0].log_too is logging.getLogger("cases.instance"), two[1] is logging.getLogger()


@gives("a handler of a stream is one of the worker's", 1, (True, "ERROR x", logging.ERROR, True))
def handlers(_):
    record = logging.makeLogRecord({"levelname": "ERROR", "msg": "x", "levelno": 40})
    return handler.stream is sys.stderr, handler.format(record), handler.level, log.isEnabledFor(logging.ERROR)


queued = logging.handlers.MemoryHandler(10, target=handler)


@gives("a handler that holds a handler", 1, (True, "ERROR x"))
def memory(_):
    record = logging.makeLogRecord({"levelname": "ERROR", "msg": "x", "levelno": 40})
    return queued.target.stream is sys.stderr, queued.target.format(record)


with tempfile.NamedTemporaryFile("w") as _file:
    opened = logging.FileHandler(_file.name, "w")
opened.emit(logging.makeLogRecord({"msg": "header"}))


def logs_to_file(x):
    return opened if x < 0 else x


@program("a handler of an open file names the global and the function", fork="a fork inherits it")
def file_handler(peer):
    refused(peer, logs_to_file, 1, "opened", "logs_to_file")


lines = tempfile.NamedTemporaryFile("w")
lines.write("one\ntwo\nthree\n")
lines.flush()
reading, reading_bytes = open(lines.name), open(lines.name, "rb")
reading.readline()
reading_bytes.read(8)


@gives("files that are open for reading, at their places", 1, ("two\n", b"three\n", True))
def read_lines(_):
    return reading.readline(), reading_bytes.read(), reading_bytes.name == reading.name


exact = decimal.Context(prec=5, rounding=decimal.ROUND_UP)


class Sums:
    context = decimal.Context(prec=3)


@gives("a decimal.Context", exact, (decimal.Decimal("0.33334"), decimal.Decimal("0.667"), "ROUND_UP", True, 5))
def sums(context):
    third = exact.divide(decimal.Decimal(1), decimal.Decimal(3))
    return (third, Sums.context.divide(decimal.Decimal(2), decimal.Decimal(3)), context.rounding,
            bool(context.flags[decimal.Inexact]) or context.traps[decimal.DivisionByZero], copy.copy(context).prec)


lock, rlock, condition = threading.Lock(), threading.RLock(), threading.Condition()
event, semaphore, barrier = threading.Event(), threading.Semaphore(2), threading.Barrier(1)
event.set()


class Guarded:
    def __init__(self):
        self.lock, self.condition, self.done = threading.Lock(), threading.Condition(), threading.Event()


GUARDED = Guarded()


@gives("locks, conditions, events, semaphores of threads", 1, (True, True, 0, True))
def locks(_):
    with lock, rlock, condition, semaphore, GUARDED.lock, GUARDED.condition:
        condition.notify_all()
        return event.is_set(), semaphore.acquire(blocking=False), barrier.wait(), not GUARDED.done.is_set()


waiting, stack = queue.Queue(), queue.LifoQueue(3)
waiting.put("a")
stack.put("b")


@gives("queues of threads", 1, ("a", "b", 3))
def queues(_):
    return waiting.get_nowait(), stack.get_nowait(), stack.maxsize


text, data = io.StringIO("abc"), io.BytesIO(b"abcd")
text.read(1)
data.seek(2)


@gives("StringIO and BytesIO keep their place", 1, ("abc", "bc", b"cd"))
def memory_files(_):
    return text.getvalue(), text.read(), data.read()


rng, entropy = random.Random(3), random.SystemRandom()


@gives("a generator of random numbers", rng, (True, True))
def randoms(argument):
    return argument.getstate() == rng.getstate(), rng.random() == argument.random()


def from_system(_):
    return 0 <= entropy.random() < 1


@program("the system's generator of random numbers is refused and named", fork="a fork inherits it")
def system_random(peer):
    refused(peer, from_system, 1, "entropy", "from_system")


pattern = re.compile("a(b)", re.IGNORECASE)
space, ordered = types.SimpleNamespace(a=1), collections.OrderedDict(a=1)
default, chain = collections.defaultdict(lambda: 5), collections.ChainMap({"a": 1}, {"b": 2})
view, recent = types.MappingProxyType({1: space}), collections.deque([1, 2], maxlen=2)


@gives("patterns and collections", pattern, (True, 1, 1, 5, 2, 1, 2))
def collected(argument):
    return argument == pattern, space.a, ordered["a"], default["z"], chain["b"], view[1].a, recent.maxlen


@gives("the time, and errors of C", 1, (decimal.Decimal("1.5"), datetime.timezone.utc, "no such table", 1))  # noqa: UP017
def others(_):
    return (decimal.Decimal("1.5"), datetime.timezone.utc, str(sqlite3.OperationalError("no such table")),  # noqa: UP017
            re.error("bad", "p", 1).pos)


@case("errors of C as results", [1], lambda r: type(r[0]) is sqlite3.OperationalError and type(r[1]) is re.error)
def errors(_):
    return sqlite3.OperationalError("no such table"), re.error("bad", "p", 1)


class ParseError(Exception):
    def __init__(self, text, index, node):
        super().__init__(text, index, node)
        self.index, self.node = index, node


class Slotted(Exception):
    __slots__ = ("node",)
    index = property(lambda self: "own")


@case("exceptions keep their own index and node", [1, 2], lambda a, b: (a.index, a.node, b.index, b.node)
      == (77, "if-statement", "own", "mine"), fork="without state of its own pickle gives it no slot")
def raises(n):
    if n == 2:
        error = Slotted("why")
        error.node = "mine"
        raise error
    raise ParseError("bad", 77, "if-statement")


class Declared(Exception):
    node = "of the class"


def raises_declared(_):
    raise Declared


@program("exceptions keep them through an Executor and a Pool", payload="letters know neither")
def executors(peer):
    if MODE == "fork":
        executor = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork"))
    else:
        executor = importlib.import_module("achilles").Executor(1)
    with executor:
        error, declared = (executor.submit(f, 1).exception(20) for f in (raises, raises_declared))
    expect((error.index, error.node, declared.node), (77, "if-statement", "of the class"))
    error, = peer.map(raises_declared, [1])
    expect(error.node, "of the class")


@program("what a redirected stream was when the function was sent", fork="a fork inherits the other one")
def redirected(peer):
    with contextlib.redirect_stderr(io.StringIO()):
        expect(ask(peer, streams), [(True,) * 3])


@gives("constants of C", [..., NotImplemented, slice(1, 2), range(3)], (True, True, slice(1, 2), range(3)))
def constants(x):
    return x[0] is ..., x[1] is NotImplemented, x[2], x[3]


class Rank(int):
    pass


@gives("iterators that pickle knows", 1, ([1, 2], 5, "ab"))
def iterators(_):
    return [*itertools.islice(numbers, 2)], Rank(5), "".join(letters)


numbers, letters = iter(range(1, 9)), iter("ab")

main()
for each in (opened, reading, reading_bytes, lines):
    each.close()
