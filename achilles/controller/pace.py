"""How much travels together: the pace of a job, and the work in a batch.

Every choice of a batch's size is made here, from one figure: µs that an argument took in the last answer. Plain
arithmetic, without a clock, a lock or a thread; the connection's lock guards each Pace.
"""

from __future__ import annotations

from ..protocol.frames import MAX_CHUNKS

__all__ = ["LITTLE_US", "Pace", "worth_of"]

LEAST_US, MOST_US = 5_000, 50_000  # of work in a batch: far over the cost of a frame, far under a pause to notice
FEW_US = 20_000  # where few batches may be out, each must last until the next one is there
LITTLE_US = 2_000  # of work, at the least: a batch costs caller, server and node a millisecond together
QUICKER = 8  # times at most: one answer may be quick by chance
TINY_US = 0.05  # the quickest argument that is believed: a function in C over a range
EASE = 0.98  # by how much the worth of a batch falls where enough batches are out
WINDOW_CHUNKS = 64  # that may be out beyond two for each worker


class Pace:
    """µs that an argument of one job takes; 0 while no answer has come."""

    def __init__(self) -> None:
        self.us = 0.0

    def learn(self, us: int, arguments: int) -> None:
        """An answer of so many arguments took `us`; 0 says nothing."""
        if us and arguments:
            now = max(us / arguments, TINY_US)
            self.us = max(now, self.us / QUICKER) if self.us else now

    def chunks(self, size: int, us: float, left: float, workers: int) -> int:
        """How many chunks of `size` arguments make a batch that is worth `us`.

        :param left: chunks that the call still has to send, infinity where that is not known. They make two batches a
            worker, or one a worker, or fewer: so many that each has enough work.
        """
        if not self.us:
            return 1
        chunk_us = self.us * size
        batches = int(min(left * chunk_us / LITTLE_US, 2 * workers))
        if batches > workers:
            batches -= batches % workers
        return max(1, int(min(us / chunk_us, left / (batches or 1), MAX_CHUNKS)))

    def window(self, size: int, workers: int) -> int:
        """How many chunks may be out of the caller's hands: so many that quick batches never wait for room."""
        quick = 2 * (2 * workers + 2) * self.chunks(size, MOST_US, float("inf"), workers) if self.us else 0
        return 2 * workers + WINDOW_CHUNKS + min(quick, MAX_CHUNKS)


def worth_of(last_us: float, late: bool, few: bool) -> float:
    """µs of work in the next batch of a connection.

    :param last_us: that of the batch before it; 0 of none.
    :param late: whether fewer batches are out than there are workers: then it is twice as much.
    :param few: whether few batches may be out.
    """
    least = FEW_US if few else LEAST_US
    return max(least, min(2 * last_us, MOST_US) if late else EASE * last_us)
