"""The oracle: what was run, where and when, and whether the answer is right.

Each task appends `index begin|end pid nanoseconds` to one file, in one write (`work.note`). Which attempt that was
a task is not told: it is counted where the file is read. All processes of a machine share the monotonic clock, so
times of workers, and of whoever does them harm, can be compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from conftest import wait_until


class Event(NamedTuple):
    """A line of the file."""

    index: int
    word: str
    pid: int
    at: float  # monotonic, in seconds
    attempt: int  # of this index, from 1; an end has the latest one that this process began


class Again(NamedTuple):
    """What became of the chunks that a fault has hit."""

    indexes: list[int]
    detect: float  # seconds from the fault to the first that was begun again
    recover: float  # ... to the last that was then done


def square(index: int) -> int:
    """What `work.Work` answers."""
    return index * index


class Oracle:
    """Reads what the tasks wrote, and judges."""

    def __init__(self, folder: Path, name: str = "oracle") -> None:
        self.path = str(folder / name)
        Path(self.path).touch()

    def events(self) -> list[Event]:
        """Everything that happened, in its order."""
        begun: Counter[int] = Counter()
        attempts: dict[tuple[int, int], int] = {}
        events = []
        for line in Path(self.path).read_text().splitlines():
            word, (index, pid, at) = line.split()[1], map(int, line.split()[::2] + line.split()[3:])
            if word == "begin":
                begun[index] += 1
                attempts[index, pid] = begun[index]
            events.append(Event(index, word, pid, at / 1e9, attempts.get((index, pid), 0)))
        return events

    def counts(self, word: str = "begin") -> Counter[int]:
        """index -> how often it was begun, or ended."""
        return Counter(event.index for event in self.events() if event.word == word)

    def running(self) -> dict[int, int]:
        """pid -> the index that it is at, for the processes that have begun one and not ended it."""
        at: dict[int, int] = {}
        for event in self.events():
            if event.word == "begin":
                at[event.pid] = event.index
            else:
                at.pop(event.pid, None)
        return at

    def wait_for(self, number: int, word: str = "begin", seconds: float = 30.0) -> None:
        """Until so many executions have begun, or ended."""
        wait_until(lambda: sum(self.counts(word).values()) >= number, f"{number} calls that {word}", seconds)

    def repeated(self) -> int:
        """How many executions were more than one each."""
        return sum(count - 1 for count in self.counts().values())

    def hit(self, since: float, pids: set[int] | None = None) -> Again:
        """The chunks that had begun, and not ended, at `since`, in these processes, and were run again."""
        before: dict[tuple[int, int], float] = {}
        events = self.events()
        for event in events:
            if event.at < since and (pids is None or event.pid in pids):
                if event.word == "begin":
                    before[event.index, event.pid] = event.at
                else:
                    before.pop((event.index, event.pid), None)
        begun: dict[int, float] = {}
        done: dict[int, float] = {}
        indexes = {index for index, _ in before}
        for event in events:
            if event.at >= since and event.index in indexes:
                (begun if event.word == "begin" else done).setdefault(event.index, event.at - since)
        detect = min(begun.values(), default=0.0)
        return Again(sorted(begun), detect, max((done.get(index, 0.0) for index in begun), default=0.0))

    def check(
        self, found: Mapping[int, Any], count: int, *, repeats: int, lost: Mapping[int, object] | None = None,
        value: Callable[[int], Any] = square,
    ) -> None:
        """Every index has its value, each was run, and no more than `repeats` executions were too many.

        :param found: index -> value; that none came twice is seen where they are collected.
        :param lost: indexes that have an error instead.
        """
        wrong = {n: found.get(n, "nothing") for n in range(count) if n not in (lost or {}) and found.get(n) != value(n)}
        assert not wrong, f"{len(wrong)} wrong results: {str(wrong)[:300]}"
        assert set(found) == set(range(count)), f"indexes that were not asked for: {set(found) - set(range(count))}"
        counts = self.counts()
        assert counts.keys() >= set(range(count)), "results of calls that were never made"
        assert self.repeated() <= repeats, f"{self.repeated()} repeated executions, {repeats} allowed"
