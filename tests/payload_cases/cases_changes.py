"""Classes over several calls: the caller changes them, the worker changes them, and tables behind it are bounded."""

import gc
import sys
import weakref

sys.path.insert(0, sys.argv[-1])
from peer import ask, expect, main, program  # noqa: E402

LATER = "what the caller does after the fork is not seen"
MADE = "a class that is made at run time has no name by which pickle finds it"


class Model:
    weights = None
    scale = 1

    def __init__(self, n=1):
        self.n = n

    def use(self):
        return self.weights, self.scale


def init():
    Model.weights = [1, 2, 3]


def init_method():
    Model.use = lambda self: "replaced"


def use(model):
    return model.weights


def use_by_name(_):
    return Model.weights, Model().weights


@program("an initializer sets a class attribute, and instances travel later")
def initialized(peer):
    expect(peer.map(use, [Model()], [(init, ())]), [[1, 2, 3]])
    expect([peer.map(use, [Model(n)])[0] for n in range(3)], [[1, 2, 3]] * 3)
    expect(ask(peer, use_by_name), [([1, 2, 3], [1, 2, 3])])
    expect(peer.map(call_use, [Model()]), [([1, 2, 3], 1)])


def call_use(model):
    return model.use()


@program("an initializer replaces a method")
def patched(peer):
    expect(peer.map(call_use, [Model()], [(init_method, ())]), ["replaced"])
    expect(peer.map(call_use, [Model(), Model()]), ["replaced"] * 2)


class Cache:
    seen = {}
    calls = 0

    def __init__(self, n):
        self.n = n

    def work(self, x):
        self.seen[x] = self.n
        Cache.calls += 1
        return len(self.seen), Cache.calls

    @classmethod
    def count(cls, x):
        cls.calls += 1
        return cls.calls


@program("a cache and a counter of a class")
def caches(peer):
    expect([peer.map(Cache(n).work, [n])[0] for n in range(4)], [(n, n) for n in range(1, 5)])
    expect([peer.map(Cache.count, [0])[0] for _ in range(2)], [5, 6])


class Lazy:
    handle = None
    loads = 0

    def get(self, x):
        if Lazy.handle is None:
            Lazy.handle = object()
            Lazy.loads += 1
        return Lazy.loads


@program("a handle that a class opens once")
def lazy(peer):
    expect([peer.map(Lazy().get, [n])[0] for n in range(4)], [1] * 4)


kept = []


def keep(thing):
    kept.append(thing)
    return isinstance(kept[0], type(thing)), isinstance(thing, type(kept[0])), len({type(each) for each in kept})


def keep_model(model):
    kept.append(model)
    return isinstance(kept[0], Model), len({type(each) for each in kept}), kept[0].scale


@program("kept instances are still instances")
def instances(peer):
    expect([peer.map(keep_model, [Model()])[0] for _ in range(3)], [(True, 1, 1)] * 3)


@program("kept instances are still instances after an initializer changed the class")
def instances_of_changed(peer):
    expect(peer.map(keep, [Model()], [(init, ())]), [(True, True, 1)])
    expect([peer.map(keep, [Model(n)])[0] for n in range(3)], [(True, True, 1)] * 3)


def changed(name, cls, *values):
    """Set a class attribute in the caller to one value after the other, and to the first one at the end."""
    try:
        for value in values:
            setattr(cls, name, value)
            yield value
    finally:
        setattr(cls, name, values[0])


@program("a class attribute that the caller changes is changed in the worker", fork=LATER)
def caller_changes(peer):
    expect([peer.map(scale_of, [Model()])[0] for value in changed("scale", Model, 1, 2, 3)], [1, 2, 3])
    expect([peer.map(scale_by_name, [0])[0] for value in changed("scale", Model, 1, 5)], [1, 5])


def scale_of(model):
    return model.scale


def scale_by_name(_):
    return Model.scale


@program("what the worker kept of the class sees the change, and stays its instance", fork=LATER)
def kept_changes(peer):
    expect([peer.map(keep_model, [Model()])[0] for value in changed("scale", Model, 1, 2, 3)],
           [(True, 1, 1), (True, 1, 2), (True, 1, 3)])


@program("an attribute that is new in the caller, and one that is gone", fork=LATER)
def comes_and_goes(peer):
    expect(peer.map(has_extra, [Model()]), [False])
    Model.extra = 7
    expect(peer.map(has_extra, [Model()]), [7])
    expect(peer.map(keep_model, [Model()])[0][:2], (True, 1))
    del Model.extra
    expect(peer.map(has_extra, [Model()]), [False])


def has_extra(model):
    return getattr(model, "extra", False)


class Holder:
    table = {"n": 1}
    inner = [table]

    def read(self, x):
        return self.table["n"], self.inner[0]["n"], self.inner[0] is self.table


BASE = {"n": 1}
ALIASES = {"base": BASE, "list": [BASE]}


def by_default(x, table=BASE):
    return table["n"], BASE["n"], ALIASES["base"]["n"], ALIASES["base"] is BASE, ALIASES["list"][0]["n"]


FUNCTIONS = [by_default]


def through(x):
    return FUNCTIONS[0](x)


@program("what the caller changes in place is seen by whatever holds it", fork=LATER)
def in_place(peer):
    for n in (1, 2, 3):
        Holder.table["n"] = BASE["n"] = n
        expect(peer.map(Holder().read, [0]), [(n, n, True)])
        expect(peer.map(by_default, [0]), [(n, n, n, True, n)])
        expect(peer.map(through, [0]), [(n, n, n, True, n)])


@program("a method that the caller replaces, with kept instances", fork=LATER)
def method_changes(peer):
    old = Model.use
    expect(peer.map(keep_use, [Model()]), [[(None, 1)]])
    try:
        Model.use = lambda self: "new"
        expect(peer.map(keep_use, [Model()]), [["new", "new"]])
    finally:
        Model.use = old


def keep_use(model):
    kept.append(model)
    return [each.use() for each in kept]


def worker_scales(value):
    Model.scale = value


@program("both sides change the attribute: the worker's stays", fork=LATER)
def both_change(peer):
    expect(peer.map(scale_of, [Model()], [(worker_scales, (50,))]), [50])
    for _ in changed("scale", Model, 1, 2):
        expect(peer.map(scale_of, [Model()]), [50])
        expect(peer.map(keep_model, [Model()])[0][::2], (True, 50))


@program("the worker changes one attribute, the caller another", fork=LATER)
def each_changes(peer):
    expect(peer.map(call_use, [Model()], [(init, ())]), [([1, 2, 3], 1)])
    for value in changed("scale", Model, 1, 2):
        expect(peer.map(call_use, [Model()]), [([1, 2, 3], value)])


class Base:
    factor = 2


class Derived(Base):
    def times(self, x):
        return self.factor * x


@program("an attribute of the base changes", fork=LATER)
def base_changes(peer):
    for value in changed("factor", Base, 2, 3):
        expect(peer.map(Derived().times, [5]), [value * 5])
    Base.factor = 2
    expect(peer.map(keep, [Derived()]), [(True, True, 1)])
    Base.factor = 4
    expect(peer.map(keep, [Derived()]), [(True, True, 1)])


def made_there(n):
    return Model(n), type(Model(n))


@program("results are instances of the caller's class, whatever either side changed")
def results(peer):
    for _ in range(2):
        (result, cls), = peer.map(made_there, [4], [] if _ else [(init, ())])
        assert type(result) is Model and cls is Model and result.n == 4 and Model.weights is None


def redefined(body):
    space = {"__name__": __name__}
    exec(f"class Redefined:\n    {body}", space)
    return space["Redefined"]


@program("a class statement that runs again makes another class", fork=MADE)
def again(peer):
    for body in ("n = 1", "n = 2"):
        cls = redefined(body)
        result, = peer.map(lambda x: (x, x.n, cls.n), [cls()])  # noqa: B023
        assert type(result[0]) is cls and result[1:] == (cls.n, cls.n), result


MANY, MOST = 4800, 4500
PILES = {"fork": MADE, "payload": "a Pool shows it, and it takes seconds"}


class Made:
    pass


def batch(count):
    return [type("Made", (Made,), {"__module__": __name__, "go": lambda self: 1})() for _ in range(count)]


def call_all(things):
    return sum(thing.go() for thing in things)


def made_alive(_=None):
    gc.collect()
    return sum(isinstance(each, type) and each.__name__ == "Made" for each in gc.get_objects()) - 1


def largest_dict(_=None):
    gc.collect()
    return max(((len(each), [*each][:1]) for each in gc.get_objects()
                if type(each) is dict and '__subclasses__' not in each), key=lambda pair: pair[0])


@program("thousands of classes made in functions do not pile up", **PILES)
def piles(peer):
    for _ in range(12):
        expect(peer.map(call_all, [batch(MANY // 12)]), [MANY // 12])
    assert made_alive() < MOST, made_alive()
    there, = peer.map(made_alive, [1])
    assert there < MOST, there
    assert largest_dict()[0] < MOST, largest_dict()
    assert peer.map(largest_dict, [1])[0][0] < MOST
    peer.open("the next")
    expect(peer.map(call_all, [batch(1)]), [1])
    assert made_alive() <= 1, made_alive()
    expect(peer.map(made_alive, [1])[0] <= 1, True)


@program("thousands of functions and sentinels do not pile up", **PILES)
def functions_pile(peer):
    def marked():
        mark = Made()
        return lambda d=mark: d is mark
    for _ in range(12):
        expect(peer.map(count_true, [[marked() for _ in range(MANY // 12)]]), [MANY // 12])
    assert largest_dict()[0] < MOST, largest_dict()
    assert peer.map(largest_dict, [1])[0][0] < MOST


def count_true(functions):
    return sum(function() for function in functions)


@program("what ended with its context is gone in the caller", fork=MADE)
def ends(peer):
    things = batch(3)
    peer.map(call_all, [things])
    gone = [weakref.ref(type(each)) for each in things]
    del things
    peer.open("the next")
    gc.collect()
    expect([ref() for ref in gone], [None] * 3)


main()
