"""Hash all files of a folder on a cluster, with a progress bar.

On a cluster of its own, which lives as long as the script does::

    python -m achilles.local examples/file_hashes.py FOLDER > SHA256SUMS

On one that runs already, with its configuration on this machine::

    python examples/file_hashes.py FOLDER > SHA256SUMS

This process needs tqdm (`pip install tqdm`), the nodes do not. The script prints a line for each file, in the order of
their names and in the manner of `sha256sum`. A progress bar on stderr counts the files::

    cd00e292c5970d3c5e2f0ffa5171e555bc46bfc4faddfb4a418b6840b86e79a3  /data/hundred_zeros
    100%|██████████| 1/1 [00:00<00:00, 92.62file/s]

Later, `sha256sum --check SHA256SUMS` tells which files have changed.

The nodes open the files themselves, since it takes longer to send a file than to hash it. So each node must have the
same folder, as on one machine or on a shared file system. `word_count.py` sends the contents instead.
"""

import argparse
import hashlib
from pathlib import Path

from tqdm import tqdm

from achilles import Pool

FILES_A_CHUNK = 16  # a small file is hashed in less than a millisecond; several together are worth the journey


def hash_file(path):
    """Runs in a worker: the SHA-256 of one file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main():
    """Hash, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    folder = parser.parse_args().folder.resolve()
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with Pool() as pool:
        hashes = tqdm(pool.imap(hash_file, paths, FILES_A_CHUNK), total=len(paths), unit="file")
        for digest, path in zip(hashes, paths):
            print(f"{digest}  {path}")


if __name__ == "__main__":
    main()
