"""What the command prints beside the rows: each section is a function of the command's arguments, and has a name."""

from __future__ import annotations

import argparse
from collections.abc import Callable

__all__ = ["SECTIONS", "section"]

Section = Callable[[argparse.Namespace], str]
SECTIONS: dict[str, tuple[str, Section]] = {}


def section(name: str, title: str) -> Callable[[Section], Section]:
    """Register a section."""
    def register(run: Section) -> Section:
        SECTIONS[name] = title, run
        return run

    return register
