"""`python -m achilles.node`: the command. `loop.py` serves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from .. import console
from .loop import run_node

__all__ = ["main"]

OPTIONS: dict[str, dict[str, Any]] = console.OPTIONS | {
    "--cpu-count": {"type": int, "metavar": "N", "help": "workers; by default the cores it may really use"},
    "--start-method": {"metavar": "METHOD", "help": "of its workers: fork, forkserver or spawn"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m achilles.node`: exit status 0 after a clean end, 2 refused or wrong settings, 130 for Ctrl-C."""
    args = console.parse(console.parser(
        "node", "Lends this machine's cores to a cluster until it is killed. SIGTERM drains it.", OPTIONS), argv)
    with console.errors_to_exit_status() as status:
        run_node(
            args.host, args.port, args.username, console.read_secret(args.secret_key_file),
            cpu_count=args.cpu_count, start_method=args.start_method, env_file=args.env_file,
            encrypt=args.encrypt,
        )
    return status.code


if __name__ == "__main__":
    sys.exit(main())
