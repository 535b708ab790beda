"""`python -m relative`."""

import os
import sys

sys.path.insert(0, sys.argv[-1])
from peer import gives, main  # noqa: E402


@gives("a relative import in a function of a package's __main__", 1, 11)
def lazy(x):
    from .helper import help
    return help(x)


@gives("the names of a package's __main__", 1, ("relative", "__main__", "relative.__main__", "__main__.py"))
def names(_):
    return __package__, __name__, __spec__.name, os.path.basename(__file__)


main()
