"""What must not travel is refused by an error that names it, and no file is touched."""

import asyncio
import contextvars
import dataclasses
import functools
import mmap
import multiprocessing.pool
import os
import re
import select
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import warnings
import weakref

sys.path.insert(0, sys.argv[-1])
from peer import MODE, expect, main, program, refused  # noqa: E402

warnings.simplefilter("ignore", ResourceWarning)  # of all that stays open until the end

INHERITED = "a fork inherits it"
folder = tempfile.TemporaryDirectory()


def path(name):
    return os.path.join(folder.name, name)


def content(name):
    with open(path(name)) as file:
        return file.read()


def opened(name, mode="w"):
    """A file that already holds a line."""
    with open(path(name), "w") as file:
        file.write("header\n")
    return open(path(name), mode if mode != "w" else "r+")


class Thing:
    pass


def frame():
    return sys._getframe()


def traceback_of():
    try:
        raise ValueError
    except ValueError as error:
        return error.__traceback__


async def nothing():
    pass


async def many():
    yield 1


waiting = nothing()
process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
process.wait()
held = [Thing()]
writing = open(path("writing"), "w")
writing.write("header\n")
writing.flush()
appending, reading, binary = opened("appending", "a"), opened("reading", "r+"), open(path("binary"), "wb", 0)
temporary = tempfile.NamedTemporaryFile("w", dir=folder.name)
unnamed = tempfile.TemporaryFile()
plug, database = socket.socket(), sqlite3.connect(":memory:")
cursor = database.cursor()
local, variable = threading.local(), contextvars.ContextVar("variable", default=7)
context = contextvars.copy_context()
token = variable.set(8)
weak = weakref.ref(held[0])
generator, agenerator = (i for i in range(3)), many()
match = re.match("a(b)", "ab")
framed, trace = frame(), traceback_of()
poller, mapped = select.epoll(), mmap.mmap(-1, 16)
sender, receiver = multiprocessing.Pipe()
fork = multiprocessing.get_context("fork")
mp_lock, mp_rlock, mp_event = fork.Lock(), fork.RLock(), fork.Event()
mp_value, mp_array, mp_queue, mp_simple = fork.Value("i", 0), fork.Array("i", 2), fork.Queue(), fork.SimpleQueue()
mp_semaphore, mp_condition = fork.Semaphore(), fork.Condition()

# Each function uses the global of its name without `f_`, and gives something that could travel.
SOURCE = """
def f_{0}(x):
    if x < 0:
        return {0}.nothing
    return x
"""
THINGS = ["writing", "appending", "reading", "binary", "temporary", "unnamed", "plug", "database", "cursor",
          "local", "variable", "context", "token", "generator", "agenerator", "match", "framed",
          "trace", "waiting", "poller", "mapped", "sender", "process", "mp_lock", "mp_rlock",
          "mp_event", "mp_value", "mp_array", "mp_queue", "mp_simple", "mp_semaphore", "mp_condition"]
for _name in THINGS:
    exec(SOURCE.format(_name))


def untouched():
    """Say whether a file was touched, and mend it for the case that follows."""
    found = [content(name) for name in ("writing", "appending", "reading")]
    there = os.path.exists(temporary.name)
    for name in ("writing", "appending", "reading"):
        with open(path(name), "w") as file:
            file.write("header\n")
    open(temporary.name, "a").close()
    expect((found, there), (["header\n"] * 3, True))


class Holds:
    """An argument with such an attribute."""

    def __init__(self, inside):
        self.inside, self.other = inside, 3

    def work(self, x):
        return x + self.other


@dataclasses.dataclass
class Deep:
    table: dict


def work(x):
    return 1


def each(names, try_one):
    """Try all, and say which did not end as they must."""
    failed = []
    for name in names:
        try:
            try_one(name, globals()[name])
            untouched()
        except AssertionError as error:
            failed.append(f"{name}: {error}")
    assert not failed, "; ".join(failed)


FILES, OTHERS = THINGS[:6], THINGS[6:]


@program("open files as globals name the global and the function", fork=INHERITED)
def files_of_a_function(peer):
    each(FILES, lambda name, thing: refused(peer, globals()[f"f_{name}"], 1, name, f"f_{name}"))


@program("handles of the process as globals name the global and the function", fork=INHERITED)
def handles_of_a_function(peer):
    each(OTHERS, lambda name, thing: refused(peer, globals()[f"f_{name}"], 1, name, f"f_{name}"))


def helper(x):
    return f_writing(x)  # noqa: F821


def uses_helper(x):
    return helper(x)


class Tool:
    log = writing

    def run(self, x):
        return x


class Journal:
    def run(self, x):
        return writing if x < 0 else x


@program("a global of a function that the function calls", fork=INHERITED)
def of_a_helper(peer):
    refused(peer, uses_helper, 1, "writing", "f_writing")
    refused(peer, functools.partial(uses_helper, 1), 1, "writing", "f_writing")
    refused(peer, [helper].pop(), 1, "writing", "f_writing")
    refused(peer, Journal().run, 1, "writing", "Journal.run")
    untouched()


@program("a class attribute names the class and the attribute", fork=INHERITED)
def of_a_class(peer):
    refused(peer, Tool().run, 1, "Tool", "log")
    refused(peer, lambda x: Tool, 1, "Tool", "log")
    refused(peer, work, Tool(), "Tool", "log")
    untouched()


def by_default(x, journal=writing):
    return x


def by_keyword(x, *, journal=database):
    return x


def close(inside):
    def closed(x):
        return inside if x < 0 else x
    return closed


@program("a default, a keyword's default, a closure name the function and the name", fork=INHERITED)
def of_a_default(peer):
    refused(peer, by_default, 1, "by_default", "journal")
    refused(peer, by_keyword, 1, "by_keyword", "journal")
    refused(peer, close(writing), 1, "closed", "inside")
    refused(peer, close([{"k": plug}]), 1, "closed", "inside")
    refused(peer, close(Holds(temporary)), 1, "closed", "inside")
    untouched()


held_table = {"deep": [Holds(writing)]}


def f_held_table(x):
    return held_table


@program("a table of the module that holds such a thing", fork=INHERITED)
def of_a_table(peer):
    refused(peer, f_held_table, 1, "held_table", "f_held_table")
    untouched()


# multiprocessing sends a socket and the ends of a Pipe by the descriptor, which ends at the machine.
SENT = {"plug", "sender"}
MAY = (TypeError, RuntimeError)  # multiprocessing's own say that they are shared through inheritance alone
FORK = MODE == "fork"


@program("arguments name their type")
def arguments(peer):
    if FORK:
        return each([n for n in THINGS if n not in SENT], lambda _, thing: refused(peer, work, thing, error=Exception))
    each(THINGS, lambda name, thing: refused(
        peer, work, thing, type(thing).__name__.lstrip("_"), error=MAY if name.startswith("mp_") else TypeError))


@program("arguments name the attribute that holds it")
def attributes(peer):
    if FORK:
        return refused(peer, work, Holds(writing), "TextIOWrapper")
    each(FILES, lambda _, thing: refused(peer, work, Holds(thing), "Holds", "inside"))
    each(OTHERS, lambda name, thing: refused(
        peer, work, Holds(thing), "Holds", "inside", error=MAY if name.startswith("mp_") else TypeError))


@program("arguments name the way to it", fork="its errors name the innermost thing alone")
def ways(peer):
    refused(peer, Holds(database).work, 1, "Holds", "inside")
    refused(peer, work, Deep({"journal": [1, writing]}), "Deep", "table")
    refused(peer, work, {"journal": (1, writing)}, "dict", "TextIOWrapper")
    refused(peer, work, [Holds(Holds(plug))], "list", "Holds", "inside", "socket")
    untouched()


@program("an initializer and its argument are refused as functions and arguments are", fork=INHERITED)
def initializers(peer):
    refused(peer, work, 1, "f_database", "database", initializers=[(f_database, (1,))])  # noqa: F821
    refused(peer, work, 1, "Connection", initializers=[(work, (database,))])
    for shared in (mp_lock, mp_value, mp_queue, mp_event):
        refused(peer, work, 1, "inheritance", initializers=[(work, (shared,))], error=MAY)
    untouched()

@program("after a refusal the peer goes on")
def goes_on(peer):
    refused(peer, work, Holds(generator))
    expect(peer.map(work, [1]), [1])


main()
waiting.close()
asyncio.run(agenerator.aclose())
