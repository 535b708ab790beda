"""Weak references: alive where what they refer to travels along, never silently dead."""

import enum
import sys
import weakref

sys.path.insert(0, sys.argv[-1])
from peer import expect, main, program, refused  # noqa: E402


class Thing:
    pass


thing, others = Thing(), [Thing()]
weak, proxy, dead_there = weakref.ref(thing), weakref.proxy(thing), weakref.ref(others[0])


def live(x):
    return weak() is thing, proxy.__class__ is Thing


class Node:
    def __init__(self, parent=None):
        self.parent = parent and weakref.ref(parent)
        self.children = []


TREE = Node()
TREE.children.append(Node(TREE))


def climb(x):
    return TREE.children[0].parent() is TREE


keyed = weakref.WeakKeyDictionary({thing: 1})
several = weakref.WeakSet([thing])
valued = weakref.WeakValueDictionary({"k": thing})


def counts(x):
    return len(keyed), len(several), thing in keyed, thing in several


def value(x):
    return valued["k"] is thing


def alone(x):
    return len(keyed), len(several)


@program("a weak reference of what travels along")
def weaks(peer):
    expect(peer.map(live, [1]), [(True, True)])
    expect(peer.map(climb, [1]), [True])


@program("weak containers of what travels along")
def weak_containers(peer):
    expect(peer.map(counts, [1]), [(1, 1, True, True)])
    expect(peer.map(value, [1]), [True])


@program("weak containers of what nothing else in the letter holds")
def weak_containers_alone(peer):
    expect(peer.map(alone, [1]), [(1, 1)])


def calls(x):
    return type(dead_there()).__name__ if x else None


class Holds:
    def __init__(self, inside):
        self.inside = inside


def work(x):
    return 1


@program("a weak reference of what nothing else holds: alive as a global, refused as an argument",
         fork="a fork inherits it")
def dead(peer):
    expect(peer.map(calls, [1]), ["Thing"])
    refused(peer, work, Holds(weakref.ref(others[0])), "Holds", "inside")


class Colour(enum.Enum):
    """Its attributes are its own, so that they bring what a weak set holds."""

    RED = 1


Colour.things = weakref.WeakSet([thing])


def colour(x):
    return Colour.RED if len(Colour.things) == 1 else None


@program("a member of an enum that has a weak set, as a result")
def members(peer):
    for _ in range(2):
        result, = peer.map(colour, [1])
        assert result is Colour.RED, result


def make():
    made = Thing()
    return lambda x, table={"weak": weakref.ref(made), "held": [made]}: table["weak"]() is table["held"][0]  # noqa: B006, B008


@program("a weak reference in a default of a function that no global has", fork="pickle does not find a lambda")
def in_default(peer):
    expect(peer.map(make(), [1]), [True])


main()
