"""Singles: the calls of a job in which each chunk is a call of its own (apply, submit).

Knows chunks by number and one entry for each; knows no answer's content. The connection's lock guards it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from ..objects.outcomes import mark
from ..protocol.frames import Letter
from .results import Answered

__all__ = ["Single", "Singles"]


class Single(Protocol):
    """The one result of an apply or a submit. Its methods are called under the connection's lock and must not block."""

    def put(self, status: int, letter: Letter) -> None:
        """The answer."""

    def fail(self, error: BaseException) -> None:
        """The call was given up, or its job has failed."""


class Singles:
    """The entries of a job in which each chunk is a call of its own. `idle` is called when there is none any more."""

    tells = False

    def __init__(self, idle: Callable[[], object]) -> None:
        self.entries: dict[int, Single] = {}  # by chunk
        self._idle = idle

    def put(self, answered: Answered) -> None:
        """As Sink says."""
        for number, status, letter in zip(range(answered.run.first, answered.run.end), *answered[1:]):
            entry = self.entries.pop(number, None)
            if entry is not None and letter is not None:
                entry.put(status, letter)
        if not self.entries:
            self._idle()

    def give_up(self, number: int, error: BaseException) -> None:
        """A chunk has no result, for this reason."""
        entry = self.entries.pop(number, None)
        if entry is not None:
            entry.fail(mark(error, index=0))
        if not self.entries:
            self._idle()

    def leave(self, number: int) -> None:
        """Nobody waits for this chunk any more."""
        del self.entries[number]
        if not self.entries:
            self._idle()

    def fail(self, error: BaseException) -> None:
        """As Sink says; each entry."""
        entries, self.entries = self.entries, {}
        for entry in entries.values():
            entry.fail(error)
        self._idle()

    def abandon(self, error: BaseException, lock: threading.Lock) -> None:
        """As Sink says."""
        self.entries = {}
