"""The board: memory that a worker and its node share. It says where the worker is, and holds answers.

The module knows chunks, phases, and answers as bytes, and no process or socket. The status array is five signed 64-bit
integers. The worker writes four of them. The unsent answers stand behind the array::

    chunk    the number of the chunk that runs, or of the chunk that must not begin
    offset   the argument in that chunk, in the phases call and dump; -1 if the worker does not name it
    phase    idle, function, load, call or dump
    limit    the node's, read before each chunk: the first chunk that must not begin
    first    the number of the first chunk that has an answer here
    answers  from `first` to before `chunk`: a length, a status and a letter each

So a death or a time limit is charged to one chunk. The node can take back the chunks behind the chunk that runs, and
pass on the answers before it: also while C code holds the interpreter, or after the worker's death.

There is no lock. The worker writes an answer before the next `chunk`, and writes over sent answers only after it. So
the node's copy of the answers is right if `chunk` is still the same.

Limits: 4,096 answers, and 512 KiB of letters. A letter of more than 256 KiB, or of several parts, is not on it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from ..protocol import kinds
from ..protocol.frames import SHORT_LETTER_BYTES, Batch, LongLetter, letter_of

__all__ = [
    "CALL", "CHUNK", "DUMP", "FIRST", "FUNCTION", "IDLE", "LETTER_BYTES", "LIMIT", "LOAD", "MOST_ANSWERS",
    "MOST_BYTES", "NO_LIMIT", "OFFSET", "PHASE", "PHASES", "UNNAMED", "WORDS", "Board",
]

CHUNK, OFFSET, PHASE, LIMIT, FIRST = range(5)  # places in the status array
PHASES = ("idle", *kinds.PHASES)
IDLE, FUNCTION, LOAD, CALL, DUMP = range(5)
NO_LIMIT = 2**63 - 1  # every chunk may begin
UNNAMED = -1  # an offset: any argument of the chunk
MOST_ANSWERS = 4096  # the quickest chunks of 5 ms
MOST_BYTES = 512 << 10  # of letters, before the last letter: a node of 100 workers has 80 MiB of boards
LETTER_BYTES = 256 << 10  # a larger letter is sent at once: a copy would cost more than a frame
LETTERS_AT = 8 * (5 + MOST_ANSWERS)  # the place of the letters, behind the status array and the lengths
WORDS = (LETTERS_AT + MOST_BYTES + LETTER_BYTES + MOST_ANSWERS) // 8  # 64-bit integers of a board


class Board:
    """One worker's board, seen from either side.

    :param shared: WORDS 64-bit integers.
    """

    def __init__(self, shared: Any) -> None:
        memory = memoryview(shared).cast("B")  # views are written at half the cost of a ctypes array
        self.status: Any = memory[:40].cast("q")
        self.lengths = memory[40:LETTERS_AT].cast("Q")
        self.letters = memory[LETTERS_AT:-MOST_ANSWERS]  # end to end
        self.statuses = memory[-MOST_ANSWERS:]

    def answers(self, batch: Batch, count: int, us: int = 0, large: Sequence[LongLetter] = ()) -> Batch:
        """Return a copy of the first `count` answers as a RESULT.

        :param batch: the answers' batch.
        :param large: the last answer's letter, if it is not on the board.
        """
        first, lengths, statuses = self.status[FIRST], self.lengths[:count].tolist(), bytes(self.statuses[:count])
        if max(lengths) <= SHORT_LETTER_BYTES:  # `Batch.pack` without a step for each letter
            packed = struct.pack(f">{len(lengths)}Q", *lengths) + self.letters[: sum(lengths)]
            return Batch(batch.job, first, count, batch.attempt, us, statuses=statuses, packed=packed)
        letters = [letter_of(bytes(self.letters[at:end]))
                   for at, end in pairwise(accumulate(lengths[: count - len(large)], initial=0))]
        return Batch.pack(batch.job, first, [*letters, *large], attempt=batch.attempt, number=us, statuses=statuses)
