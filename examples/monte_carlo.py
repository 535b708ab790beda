"""Price an Asian option by simulation, with the same digits on any number of nodes.

On a cluster of its own, which lives as long as the script does::

    python -m achilles.local examples/monte_carlo.py [--seed N] [--paths N]

On one that runs already, with its configuration on this machine::

    python examples/monte_carlo.py [--seed N] [--paths N]

The option pays the amount by which the average price of a stock is above a limit. The script simulates many paths
of that price. It prints the mean of what the option pays, and the standard error of the mean::

    100,000 paths, seed 1: 6.1719684635 +- 0.0270025551

Each call simulates a thousand paths with the generator of the module `random`. `seed=` seeds this generator before
each call, from the seed and from the call's index. So it does not matter which worker makes a call, how many workers
there are, and which calls were made again since a worker had died.
"""

import argparse
import math
import random

from achilles import Pool

START, LIMIT, RATE, VOLATILITY = 100.0, 100.0, 0.05, 0.2  # rate and volatility are those of a year
MONTHS = 12  # over which the price is averaged
PATHS_A_CALL = 1_000  # some 10 ms


def payment():
    """What the option pays on one random path of the price, in money of today."""
    price, total = START, 0.0
    for _ in range(MONTHS):
        drift = (RATE - VOLATILITY**2 / 2) / 12
        price *= math.exp(drift + VOLATILITY * math.sqrt(1 / 12) * random.gauss(0, 1))
        total += price
    return math.exp(-RATE) * max(total / MONTHS - LIMIT, 0)


def simulate(count):
    """Runs in a worker: the sum of so many payments, and the sum of their squares."""
    payments = [payment() for _ in range(count)]
    return sum(payments), sum(each**2 for each in payments)


def main():
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--paths", type=int, default=100_000, help="at least 1,000 (default: 100,000)")
    options = parser.parse_args()
    calls = options.paths // PATHS_A_CALL
    with Pool() as pool:
        sums = pool.map(simulate, [PATHS_A_CALL] * calls, seed=options.seed)
    count = calls * PATHS_A_CALL
    mean = sum(total for total, _ in sums) / count  # summed in the order of the calls: it is rounded alike, too
    variance = sum(squares for _, squares in sums) / count - mean**2
    print(f"{count:,} paths, seed {options.seed}: {mean:.10f} +- {math.sqrt(variance / count):.10f}")


if __name__ == "__main__":
    main()
