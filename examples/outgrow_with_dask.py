"""The same map on a cluster of achilles, and on Dask, for whoever outgrows the first.

    python -m achilles.local examples/outgrow_with_dask.py             # on achilles
    python examples/outgrow_with_dask.py --dask                        # on two processes of Dask on this machine
    python examples/outgrow_with_dask.py --dask tcp://scheduler:8786   # on a Dask cluster (Slurm's, Kubernetes', ...)

Estimates pi with the same random numbers wherever it runs: each call has a generator of its own, since the
threads of Dask in the same process draw from the one of the module `random`. Dask is installed with
`pip install distributed`.
"""

import argparse
import random

from achilles import Pool

DARTS = 20_000  # a call


def throw(call):
    """How many of so many darts hit the quarter of a circle."""
    dice = random.Random(call)
    return sum(dice.random() ** 2 + dice.random() ** 2 < 1 for _ in range(DARTS))


def estimate(pool, calls):
    """Pi, from the hits of all calls."""
    hits = sum(pool.imap_unordered(throw, range(calls), chunksize=None))
    return 4 * hits / (calls * DARTS)


def main():
    """Estimate where the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dask", nargs="?", const="", metavar="ADDRESS", help="use Dask, or the scheduler there")
    parser.add_argument("--calls", type=int, default=100)
    args = parser.parse_args()
    if args.dask is None:
        with Pool() as pool:
            print(f"achilles: {estimate(pool, args.calls):.6f}")
        return
    from distributed import Client, LocalCluster

    with Client(args.dask or LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)) as client:
        with Pool(executor=client.get_executor()) as pool:
            print(f"dask: {estimate(pool, args.calls):.6f}")


if __name__ == "__main__":
    main()
