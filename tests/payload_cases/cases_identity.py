"""One object stays one: in all functions of a Pool, and in whatever they reach."""

import functools
import sys
import threading

sys.path.insert(0, sys.argv[-1])
from peer import ask, expect, main, program  # noqa: E402

INHERITED = "what is made after the fork is not inherited"


MISSING = object()


class Unset:
    pass


UNSET = Unset()
CONFIG = {"mark": MISSING, "deep": [(UNSET,)]}


def first(x, default=MISSING):
    return default is MISSING


def second(x, default=MISSING):
    return default is MISSING


def third(x, *, d=UNSET):
    return d is UNSET


def fourth(x, *, d=UNSET):
    return d is UNSET


def in_table(x):
    return CONFIG["mark"] is MISSING and CONFIG["deep"][0][0] is UNSET


def close():
    mark, unset = MISSING, UNSET

    def inner(x, default=UNSET):
        return mark is MISSING and unset is UNSET and default is unset
    return inner


closed = close()
closed.__qualname__ = "closed"  # so that multiprocessing finds it


def wrapping(function):
    @functools.wraps(function)
    def inner(x):
        return function(x)
    return inner


@wrapping
def decorated(x, d=MISSING):
    return d is MISSING


class Option:
    NONE = object()
    also = {"mark": MISSING, "unset": UNSET}

    def method(self, x, d=NONE):
        return d is Option.NONE and self.NONE is d and self.also["mark"] is MISSING

    def other(self, x, d=MISSING):
        return d is MISSING and self.also["unset"] is UNSET

    @classmethod
    def made(cls, x, d=NONE):
        return d is cls.NONE

    @staticmethod
    def plain(x, d=UNSET):
        return d is UNSET


@program("a sentinel as the default of several functions")
def sentinels(peer):
    expect(ask(peer, first, second, first, third, fourth, second), [True] * 6)


@program("a sentinel in tables, closures and under decorators")
def more_sentinels(peer):
    expect(ask(peer, first, in_table, closed, decorated, in_table, third), [True] * 6)


@program("a sentinel in a closure first, a default next")
def closure_first(peer):
    expect(ask(peer, closed, second, fourth, decorated), [True] * 4)


@program("a sentinel of a class and of its methods")
def options(peer):
    expect(ask(peer, first, Option().method, Option().other, Option.made, Option.plain, third), [True] * 6)


@program("a sentinel in each of several lambdas", fork=INHERITED)
def lambdas(peer):
    def make(i):
        return lambda x, d=MISSING: (d is MISSING, i)
    assert [ask(peer, make(i)) for i in range(3)] == [[(True, i)] for i in range(3)]
    expect(ask(peer, lambda x: make(x)(x), second, closed), [(True, 1), True, True])


ITEMS = [1, 2]
ALIAS = ITEMS


class Holder:
    items = ITEMS
    lock = threading.RLock()


LOCK = Holder.lock
holder = Holder()
holder.own = {"items": ITEMS}


def alias(x):
    return ALIAS is ITEMS


def append(x):
    ALIAS.append(x)
    return len(ITEMS)


def by_default(x, items=ITEMS):
    items.append(x)
    return len(items)


def by_class(x):
    Holder.items.append(x)
    return len(holder.own["items"])


def look(x):
    return len(ITEMS), len(ALIAS), len(Holder.items), len(holder.own["items"])


def close_items():
    items = ITEMS

    def inner(x):
        items.append(x)
        return len(items)
    return inner


by_closure = close_items()
by_closure.__qualname__ = "by_closure"


@program("a list by two names, a default, a class and a closure")
def aliases(peer):
    expect(ask(peer, alias, append, by_default, by_class, by_closure, look), [True, 3, 4, 5, 6, (6, 6, 6, 6)])


@program("a list that the default of the first function brings")
def aliases_backwards(peer):
    expect(ask(peer, by_default, by_closure, append, look), [3, 4, 5, (5, 5, 5, 5)])


def lock_one(x):
    return LOCK is Holder.lock and LOCK.acquire(blocking=False)


def lock_two(x, lock=LOCK):
    return lock is Holder.lock


@program("a lock by two names")
def locks(peer):
    expect(ask(peer, lock_one, lock_two), [True, True])


class Missing:
    def __reduce__(self):
        return "NAMED"

    def __repr__(self):
        return "NAMED"


NAMED = Missing()


class Kinds:
    NAMED = Missing()


def is_named(x, default=NAMED):
    return x is NAMED, default is NAMED


def give_named(x):
    return [NAMED, x]


@program("a singleton whose __reduce__ gives its name")
def named(peer):
    expect(peer.map(is_named, [1, NAMED]), [(False, True), (True, True)])
    result, = peer.map(give_named, [NAMED])
    assert result[0] is NAMED and result[1] is NAMED
    expect(peer.map(is_named, result), [(True, True)] * 2)


def grow(items):
    items.append(9)
    return len(items), len(ITEMS)


def grow_own(x):
    ITEMS.append(x)
    return ITEMS


def fill_state(state):
    state.items.append(1)
    return len(state.items)


class State:
    def __init__(self):
        self.items = [1]


STATE = State()


@program("arguments are copies, also of what is a global")
def arguments(peer):
    expect([peer.map(grow, [ITEMS])[0] for _ in range(3)], [(3, 2)] * 3)
    expect(ask(peer, append), [3])
    expect([peer.map(grow, [ITEMS])[0] for _ in range(2)], [(3, 3)] * 2)
    expect([peer.map(fill_state, [STATE])[0] for _ in range(3)], [2] * 3)
    STATE.items.append(5)
    expect(peer.map(fill_state, [STATE]), [3])
    STATE.items.pop()


@program("results are copies, also of what is a global")
def results(peer):
    expect(peer.map(grow_own, [5]), [[1, 2, 5]])
    second, = peer.map(grow_own, [6])
    expect((second, ITEMS), ([1, 2, 5, 6], [1, 2]))
    second.append(7)
    expect(peer.map(look, [1]), [(4, 4, 4, 4)])


def same_twice(pair):
    return pair[0] is pair[1], pair[0] is MISSING or type(pair[0]) is object


@program("one object twice in an argument; an argument may be a copy")
def argument(peer):
    assert peer.map(same_twice, [[MISSING, MISSING], [UNSET, UNSET]])[0] == (True, True)


main()
