"""Tables for people and for README.md beside it: figures side by side, ratios, and where the time goes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from .rows import Row
from .timing import Sample, Spread, spread

__all__ = ["Rounds", "asked", "figures", "markdown", "number", "ratios", "times"]

Rounds = dict[str, list[list[Sample]]]  # peer to the samples of each round


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The first of them is the head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def number(value: float) -> str:
    """Three digits that count."""
    if not math.isfinite(value):
        return "hang" if value > 0 else "–"
    if abs(value) >= 100:
        digits = len(str(int(abs(value))))
        return f"{round(value, 3 - digits):,.0f}"
    return f"{value:.3g}"


def shown(values: Spread) -> str:
    """The median, and in brackets the least and the greatest."""
    return f"{number(values.median)} ({number(values.low)}–{number(values.high)})"


def figures(found: Mapping[str, Rounds], rows: Mapping[str, Row], peers: Iterable[str]) -> str:
    """A line a row, a column a peer."""
    peers = list(peers)
    table = [["", "", *peers]]
    for name, rounds in found.items():
        row = rows[name]
        cells = [shown(spread(values)) if (values := _values(row, rounds.get(peer, []))) else "–" for peer in peers]
        table.append([row.what, row.unit, *cells])
    return markdown(table)


def asked(found: Mapping[str, Rounds], rows: Mapping[str, Row]) -> str:
    """A line for each figure that is asked for: how many times better ours is, or the figure itself."""
    table = [["", "against", "must be", "is", "held"]]
    for name, rounds in found.items():
        row = rows[name]
        for peer, least in row.goals.items():
            if ratio := _ratio(row, rounds.get(row.ours, []), rounds.get(peer, [])):
                table.append([row.what, peer, f"{least:g}", shown(ratio), "yes" if ratio.median >= least else "NO"])
        own = _values(row, rounds.get(row.ours, []))
        if row.limit is not None and own:
            figure = spread(own)
            table.append([row.what, "", f"at most {row.limit:g} {row.unit}", shown(figure),
                          "yes" if figure.median <= row.limit else "NO"])
    return markdown(table)


def ratios(found: Mapping[str, Rounds], rows: Mapping[str, Row], peers: Iterable[str]) -> str:
    """How many times better we are than each, round by round."""
    peers = list(peers)
    table = [["", *peers]]
    for name, rounds in found.items():
        row = rows[name]
        each = [None if peer == row.ours else _ratio(row, rounds.get(row.ours, []), rounds.get(peer, []))
                for peer in peers]
        table.append([row.what, *(shown(ratio) if ratio else "–" for ratio in each)])
    return markdown(table)


def times(found: Mapping[str, Rounds], rows: Mapping[str, Row], peer: str) -> str:
    """Where the time goes: µs of a processor by role for one of what the row counts, and by the clock."""
    roles = ["caller", "server", "node", "workers"]
    table = [["", "µs a", *roles, "all", "by the clock"]]
    for name, rounds in found.items():
        samples = [sample for each in rounds.get(peer, []) for sample in each if sample.used]
        amount = sum(sample.amount for sample in samples)
        if not amount:
            continue
        used = [sum(sample.used.get(role, 0.0) for sample in samples) / amount * 1e6 for role in roles]
        clock = sum(sample.seconds for sample in samples) / amount * 1e6
        table.append([rows[name].what, rows[name].per, *map(number, [*used, sum(used), clock])])
    return markdown(table) if len(table) > 1 else ""


def _values(row: Row, rounds: Sequence[Sequence[Sample]]) -> list[float]:
    return [row.value(sample) for samples in rounds for sample in samples]


def _ratio(row: Row, ours: Sequence[Sequence[Sample]], theirs: Sequence[Sequence[Sample]]) -> Spread | None:
    """Of the medians of each round."""
    pairs = [(spread(_values(row, [mine])).median, spread(_values(row, [other])).median)
             for mine, other in zip(ours, theirs) if mine and other]
    found = [row.better(*pair) for pair in pairs if math.inf not in pair]  # a hang is no time
    return spread(found) if found else None
