"""The script's own module: what its globals have, and `pickle` inside a worker."""

import copy
import enum
import inspect
import os
import pickle
import sys
import typing

sys.path.insert(0, sys.argv[-1])
from peer import case, expect, gives, main, program  # noqa: E402

RUNNER = "a worker's `__main__` is its context's while a batch runs, which is the runner's work"


def facts(_):
    found = []
    try:
        found += [os.path.basename(__file__)]
        found += [__package__, __spec__, __doc__]
    except NameError as error:  # a notebook has no __file__
        found.append(error.name)
    return __name__, found


gives("__file__, __package__, __spec__ and __doc__", 1, facts(1))(facts)


@gives("sys.argv", 1, sys.argv, payload=RUNNER)
def arguments(_):
    return sys.argv


class Record:
    def __init__(self, v):
        self.v = v

    def __eq__(self, other):
        return type(other) is Record and other.v == self.v


class Colour(enum.Enum):
    RED = 1


class Pair(typing.NamedTuple):
    a: int
    b: Record


def step(x):
    return x + 1


@gives("pickle.dumps of a script's instance", 1, ("Record", True, True), payload=RUNNER)
def picks(x):
    there = pickle.loads(pickle.dumps(Record(x)))
    return type(there).__name__, type(there) is Record, there == Record(x)


@gives("pickle.dumps of its functions, classes, enums and named tuples", 1, (True, True, True, True), payload=RUNNER)
def picks_more(x):
    function, cls, colour, pair = pickle.loads(pickle.dumps((step, Record, Colour.RED, Pair(1, Record(x)))))
    return function is step, cls is Record, colour is Colour.RED, pair == Pair(1, Record(x))


@case("bytes that a worker pickled are loaded in the caller", [1], lambda r: pickle.loads(r) == Record(1),
      payload=RUNNER)
def pickled(x):
    return pickle.dumps(Record(x))


@gives("bytes that the caller pickled are loaded in a worker", pickle.dumps((Record(3), step)) if "Record" in vars(
    sys.modules["__main__"]) else b"", (True, True), payload=RUNNER)
def loads(data):
    record, function = pickle.loads(data)
    return record == Record(3), function is step


class Saves:
    """Its method pickles itself, as caches do."""

    def __init__(self, x):
        self.x, self.copy = x, None

    def save(self):
        self.copy = pickle.dumps(self)
        return type(pickle.loads(self.copy)) is Saves, copy.deepcopy(self).x


gives("a method that pickles its own instance", Saves(4), (True, 4), payload=RUNNER)(Saves.save)


@gives("copies in a worker", 1, (1, 1, True))
def copies(x):
    return copy.copy(Record(x)).v, copy.deepcopy([Record(x)])[0].v, copy.deepcopy(Colour.RED) is Colour.RED


def source(_):
    try:
        return inspect.getsource(step)
    except OSError as error:  # a notebook's cell is no file
        return type(error).__name__


gives("the source of a function", 1, source(1))(source)


def made_global(_):
    return pickle.loads(pickle.dumps(Later(5))).x  # noqa: F821


def define(_):
    class Later:
        def __init__(self, x):
            self.x = x
    Later.__qualname__ = "Later"
    globals()["Later"] = Later
    return pickle.loads(pickle.dumps(Later(6))).x


@program("pickle.dumps of what the worker has defined", payload=RUNNER)
def later(peer):
    expect(peer.map(define, [1]), [6])
    expect(peer.map(made_global, [1]), [5])


@program("pickle.dumps in an initializer, and in the Pools that follow", payload=RUNNER)
def initializer(peer):
    expect(peer.map(kept, [1], [(keep, (2,))]), [True])
    peer.open("the next")
    expect(peer.map(picks, [1]), [("Record", True, True)])
    peer.open("one more")
    expect(peer.map(kept, [1], [(keep, (2,))]), [True])


def keep(x):
    global record
    record = pickle.loads(pickle.dumps(Record(x)))


def kept(_):
    return record == Record(2)


main()
