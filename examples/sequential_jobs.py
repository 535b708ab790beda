"""Run several jobs on one cluster, one after the other, each fed with the results of the one before.

On a cluster of its own, which lives as long as the script does::

    python -m achilles.local examples/sequential_jobs.py

On one whose server and nodes run already, and whose configuration this machine has::

    python examples/sequential_jobs.py

The cluster stays up between the jobs. Each call connects, sends its function once to each node, and
disconnects when its results are there. The three jobs show the three kinds of arguments:

1. a list: search blocks of numbers for primes;
2. a generator function, whose arguments are made one by one while the results already come back:
   keep the primes that have a twin, two below or two above;
3. a list of lists, each of which is answered by one list: sum the digits of the twins, by their last digit.
"""

from itertools import chain
from math import isqrt

from achilles import imap, map

LIMIT = 20_000
BLOCK = 1_000  # numbers an argument: large enough that a call takes longer than its journey


def is_prime(number):
    """Whether no number from 2 to the square root divides `number`."""
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))


def primes_from(start):
    """The primes of one block. It calls `is_prime` and reads `BLOCK`, which travel with it."""
    return [number for number in range(start, start + BLOCK) if is_prime(number)]


def twin(prime):
    """`prime` itself where it has a twin, else None."""
    return prime if is_prime(prime - 2) or is_prime(prime + 2) else None


def digit_sum(number):
    """The sum of the decimal digits."""
    return sum(int(digit) for digit in str(number))


def find_primes():
    """First job. ``map`` returns a list of packets, each a list of results; here each result is a list."""
    packets = map(primes_from, list(range(0, LIMIT, BLOCK)))
    return list(chain.from_iterable(chain.from_iterable(packets)))


def find_twins(primes):
    """Second job. ``chunksize`` sends a hundred small arguments to a core at once."""

    def candidates():
        yield from primes

    found = []
    for packet in imap(twin, candidates, chunksize=100):
        found += [prime for prime in packet["RESULT"] if prime is not None]
    return found


def sum_digits(twins):
    """Third job. The lists go to the nodes as they are; so do their results come back."""
    groups = [[prime for prime in twins if prime % 10 == last] for last in (1, 3, 7, 9)]
    return [sum(sums) for sums in map(digit_sum, groups)]


if __name__ == "__main__":
    primes = find_primes()
    print(f"{len(primes):,} primes below {LIMIT:,}, the largest {primes[-1]:,}")
    twins = find_twins(primes)
    print(f"{len(twins):,} of them have a twin, the largest {twins[-1]:,}")
    for last, total in zip((1, 3, 7, 9), sum_digits(twins), strict=True):
        print(f"the digits of those that end in {last} sum up to {total:,}")
