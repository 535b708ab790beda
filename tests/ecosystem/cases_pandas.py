"""Frames of pandas, and subclasses of them that a script defines."""

import sys

import numpy
import pandas

sys.path.insert(0, sys.argv[-1])
from peer import case, expect, gives, main, program  # noqa: E402

FRAME = pandas.DataFrame({"key": list("abab"), "n": [1, 2, 3, 4], "x": [0.5, 1.5, numpy.nan, 2.5],
                          "day": pandas.date_range("2024-01-01", periods=4),
                          "kind": pandas.Categorical(["u", "v", "u", "u"])})
SCALE = pandas.Series({"a": 10, "b": 100})


class Measured(pandas.DataFrame):
    """The recipe of pandas' documentation."""

    _metadata = ["unit"]

    @property
    def _constructor(self):
        return Measured

    @property
    def _constructor_sliced(self):
        return Column

    def total(self):
        return self["n"].sum() * SCALE["a"]


class Column(pandas.Series):
    @property
    def _constructor(self):
        return Column

    @property
    def _constructor_expanddim(self):
        return Measured

    def twice(self):
        return self * 2


@pandas.api.extensions.register_dataframe_accessor("cases")
class Accessor:
    def __init__(self, frame):
        self.frame = frame

    def count(self):
        return len(self.frame)


def measured(n=1):
    frame = Measured({"n": [n, n + 1]})
    frame.unit = "kg"
    return frame


@case("a frame there and back", [FRAME], lambda r: r.equals(FRAME.assign(n=FRAME["n"] * 2)))
def doubled(frame):
    assert frame.equals(FRAME)
    return frame.assign(n=frame["n"] * 2)


@case("a frame of 8 MB, which is writable there", [pandas.DataFrame({"n": numpy.arange(1_000_000)})],
      lambda r: r["n"].iloc[0] == -1 and len(r) == 1_000_000)
def large(frame):
    frame.loc[0, "n"] = -1
    return frame


@program("a function over the groups of a frame")
def groups(peer):
    found = peer.map(summed, [group for _, group in FRAME.groupby("key")])
    expect(found, [("a", 4, 40, 0.5), ("b", 6, 600, 4.0)])


def summed(group):
    key = group["key"].iloc[0]
    return key, int(group["n"].sum()), int(group["n"].sum() * SCALE[key]), float(group["x"].sum())


@gives("rows, as apply would give them", FRAME.iloc[1], ("b", 2, 1.5, "2024-01-02", "v"))
def row(r):
    return r["key"], int(r["n"]), float(r["x"]), r["day"].date().isoformat(), r["kind"]


@case("subclasses of a frame and of a series", [measured()],
      lambda r: type(r) is Measured and r.unit == "kg" and type(r["n"]) is Column and list(r["n"]) == [2, 4])
def subclasses(frame):
    assert type(frame) is Measured and type(frame["n"]) is Column and frame.unit == "kg"
    twice = frame["n"].twice()
    assert type(twice) is Column and type(frame.iloc[:1]) is Measured
    made = Measured({"n": list(twice)})
    made.unit = frame.unit
    return made


gives("a method of a subclass", measured(3), 70)(Measured.total)
gives("an aggregation with the script's function", FRAME, [4.0, 6.0])(
    lambda frame: [float(v) for v in frame.groupby("key")["n"].agg(lambda s: total(s))])


def total(series):
    return series.sum()


@gives("an accessor's class", 1, 4)
def accessor(_):
    return Accessor(FRAME).count()


@case("an index of many levels, a period, an interval", [pandas.MultiIndex.from_product([["a"], [1, 2]])],
      lambda r: list(r) == [("a", 1), ("a", 2)])
def index(levels):
    assert pandas.Period("2024-01").year == 2024 and 1 in pandas.Interval(0, 2)
    return levels


@program("subclasses in several calls")
def calls(peer):
    for n in (1, 2):
        expect(peer.map(keep, [measured(n)]), [(True, 1)])
    result, = peer.map(subclasses, [measured()])
    expect(peer.map(keep, [result]), [(True, 1)])


kept = []


def keep(frame):
    kept.append(frame)
    return all(isinstance(each, Measured) for each in kept), len({type(each) for each in kept})


main()
