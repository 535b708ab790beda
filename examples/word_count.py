"""Count the words of many files on a cluster, and print the commonest.

On a cluster of its own, which lives as long as the script does::

    python -m achilles.local examples/word_count.py [--top N] [--check] [PATH...]

On one whose server and nodes run already, and whose configuration this machine has::

    python examples/word_count.py [--top N] [--check] [PATH...]

A PATH is a file, or a folder whose ``.py`` and ``.txt`` files are counted; without any it is Python's own
standard library. Installed packages (``site-packages``, ``dist-packages``) are left out of folders.

The nodes need none of the files: this process reads them, one by one as the cluster has room, and sends
their *contents*. A worker turns a text into a ``Counter`` of its words, and this process adds those up in
whatever order they come. So neither side ever holds more than a few files, however many there are.

A word is a run of letters, whatever their case.
"""

import argparse
import re
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

from achilles import imap_unordered

SUFFIXES = {".py", ".txt"}
LEFT_OUT = {"site-packages", "dist-packages"}
FILES_A_CHUNK = 8  # a source file is counted in milliseconds; several together are worth the journey
WORD = re.compile(r"[^\W\d_]+")


def count_words(text):
    """Runs in a worker: how often each word occurs in one text."""
    return Counter(WORD.findall(text.lower()))


def find_files(paths):
    """The files that `paths` name, those of folders in the order of their names."""
    for path in paths:
        if path.is_dir():
            below = (file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES and file.is_file())
            yield from (file for file in below if LEFT_OUT.isdisjoint(file.relative_to(path).parts))
        else:
            yield path


def read(file):
    """The text of a file; bytes that are not UTF-8 become U+FFFD."""
    return file.read_text(encoding="utf-8", errors="replace")


def count_on_cluster(files):
    """The words of all files, counted by the nodes."""

    def texts():  # given to the call as it is, not called: its arguments are made while the cluster works
        for file in files:
            yield read(file)

    words = Counter()
    for packet in imap_unordered(count_words, texts, chunksize=FILES_A_CHUNK):
        for counter in packet["RESULT"]:
            words.update(counter)
    return words


def count_here(files):
    """The same, in this one process."""
    words = Counter()
    for file in files:
        words.update(count_words(read(file)))
    return words


def commonest(words, top):
    """The `top` commonest words with their counts; equally common ones in alphabetical order."""
    return sorted(words.items(), key=lambda item: (-item[1], item[0]))[:top]


def parse_arguments(argv):
    """The command line, with the standard library in place of no PATH."""
    parser = argparse.ArgumentParser(description="Count the words of many files on a cluster.")
    parser.add_argument("paths", metavar="PATH", nargs="*", type=Path,
                        help="file, or folder of .py and .txt files (default: Python's standard library)")
    parser.add_argument("--top", metavar="N", type=int, default=20, help="words to print (default: 20)")
    parser.add_argument("--check", action="store_true",
                        help="count in one process too, and exit with status 1 if the counts differ")
    options = parser.parse_args(argv)
    options.paths = options.paths or [Path(sysconfig.get_path("stdlib"))]
    for path in options.paths:
        if not path.exists():
            parser.error(f"{path} does not exist")
    return options


def main(argv=None):
    """Count, print, and return the status to exit with."""
    options = parse_arguments(argv)
    files = list(find_files(options.paths))
    size = sum(file.stat().st_size for file in files)

    start = time.perf_counter()
    words = count_on_cluster(files)
    seconds = time.perf_counter() - start

    for word, count in commonest(words, options.top):
        print(f"{count:>12,}  {word}")
    print(f"{len(files):,} files, {size:,} bytes in {seconds:.2f} s: {size / 1e6 / seconds:.1f} MB/s")

    if options.check:
        same = words == count_here(files)
        print("check: one process counts the same" if same else "check: one process counts DIFFERENTLY")
        return 0 if same else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
