"""Square ten numbers on a cluster, with each of the three calls.

On a cluster of its own, which lives as long as the script does::

    python -m achilles.local examples/square_numbers.py

On one whose server and nodes run already, and whose configuration this machine has::

    python examples/square_numbers.py

Results come in packets: as many as the node that computed them has cores, times ``chunksize``. So the
brackets fall differently on other machines; the numbers, and in the first two calls their order, do not.
"""

from achilles import imap, imap_unordered, map

NUMBERS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def achilles_function(arg):
    """Runs in a worker, once for each number."""
    return arg ** 2


def achilles_callback(result):
    """Runs in the same worker, on each result."""
    return result ** 2


if __name__ == "__main__":
    print("map: all results at once, in the order of the arguments")
    print(map(achilles_function, NUMBERS, achilles_callback, chunksize=1))

    print("imap: each packet as soon as it is its turn")
    for packet in imap(achilles_function, NUMBERS, achilles_callback, chunksize=1):
        print(packet)

    print("imap_unordered: each packet as soon as it is there; ARGS_COUNTER says where it belongs")
    for packet in imap_unordered(achilles_function, NUMBERS, achilles_callback, chunksize=1):
        print(packet)
