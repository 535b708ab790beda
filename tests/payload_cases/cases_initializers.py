"""What initializers and running code change is seen by all functions of the Pool, by whatever way they reach it."""

import collections
import functools
import queue
import random
import sys

sys.path.insert(0, sys.argv[-1])
from peer import ask, expect, main, program  # noqa: E402

MISSING = object()
SETTINGS = {}
SAME = SETTINGS
TREE = {"branch": {"leaf": SETTINGS}}


class Reader:
    settings = SETTINGS
    seen = collections.OrderedDict(settings=SETTINGS)

    def read(self, x):
        return self.settings.get("k"), self.seen["settings"].get("k")


def set_up():
    SETTINGS["k"] = 7


def fill(settings, value):
    settings["k"] = value


def read_same(x):
    return SAME.get("k"), TREE["branch"]["leaf"].get("k")


def read_default(x, settings=SETTINGS):
    return settings.get("k")


def read_closed():
    settings = SETTINGS

    def inner(x):
        return settings.get("k")
    return inner


read_closure = read_closed()
read_closure.__qualname__ = "read_closure"


@program("an initializer fills a dict that is read by other ways")
def initializer(peer):
    expect(peer.map(read_same, [1], [(set_up, ())]), [(7, 7)])
    expect(ask(peer, read_default, Reader().read, read_closure, read_same), [7, (7, 7), 7, (7, 7)])


def changed(function, right):
    """A program: what this first function sees of the initializer's change."""
    return lambda peer: expect(peer.map(function, [1], [(set_up, ())]), [right])


program("an initializer's change is seen by another global")(changed(read_same, (7, 7)))
program("an initializer's change is seen by a default")(changed(read_default, 7))
program("an initializer's change is seen by a class attribute")(changed(Reader().read, (7, 7)))
program("an initializer's change is seen by a closure")(changed(read_closure, 7))


@program("an initializer fills its own argument, which is a global")
def own_argument(peer):
    expect(peer.map(read_same, [1], [(fill, (SETTINGS, 9))]), [(9, 9)])
    expect(ask(peer, read_default), [9])


class State:
    def __init__(self):
        self.values, self.mark = {}, MISSING

    def load(self, value=3):
        self.values["v"] = value

    def get(self, x):
        return self.values.get("v"), self.mark is MISSING


STATE = State()


def read_state(x):
    return STATE.values.get("v"), STATE.mark is MISSING


@program("an initializer that is a method of a global")
def method(peer):
    expect(peer.map(read_state, [1], [(STATE.load, (5,))]), [(5, True)])


@program("an initializer that is a dict's method")
def dict_method(peer):
    expect(peer.map(read_same, [1], [(SETTINGS.update, ({"k": 2},))]), [(2, 2)])


class Counter:
    n = 0

    def up(self):
        self.n += 1
        return self.n


COUNTER = Counter()
RANDOM = random.Random(3)
QUEUE = queue.Queue()
QUEUE.put(1)


def up(x):
    return COUNTER.up(), RANDOM.random()


def up_too(x, counter=COUNTER, rng=RANDOM):
    return counter.up(), rng.random()


def remember(x):
    remember.cache[x] = len(remember.cache)
    return remember.cache[x]


remember.cache = {}


def forget(x):
    return len(remember.cache)


@functools.cache
def slow(x):
    COUNTER.up()
    return x


@program("a counter and a generator of random numbers, by name and by default")
def kept(peer):
    right = random.Random(3)
    expect(ask(peer, up, up_too, up), [(n, right.random()) for n in (1, 2, 3)])


@program("what a function keeps in its own attributes")
def kept_by_function(peer):
    expect(ask(peer, remember, forget, forget), [0, 1, 1])
    expect(peer.map(remember, [5]), [1])


@program("a cache of a function, by two functions")
def kept_by_cache(peer):
    expect(ask(peer, slow, slow, slow_too, count), [1, 1, 1, 1])


def slow_too(x):
    return slow(x)


def count(x):
    return COUNTER.n


def counting():
    count = 0

    def bump(x=None):
        nonlocal count
        count += 1
        return count

    def read(x=None):
        return count
    return bump, read


BUMP, READ = counting()


def bump(x):
    return BUMP()


def read(x):
    return READ()


@program("a cell of two closures, in calls of their own")
def cells(peer):
    expect(ask(peer, bump, bump, read, bump), [1, 2, 2, 3])


def put(x):
    QUEUE.put(x)
    return QUEUE.qsize()


def take(x, waiting=QUEUE):
    return waiting.get_nowait()


@program("a queue of threads")
def queues(peer):
    expect(ask(peer, put, take, take), [2, 1, 1])

main()
