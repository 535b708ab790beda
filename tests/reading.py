"""How long the code takes to read: `python tests/reading.py` prints the table of docs/tour.md.

Statements are those of the syntax tree without docstrings. Words are those of docstrings and comments, and of a page
in Markdown all of them. The rates are assumptions, which docs/tour.md names.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
STATEMENTS_A_MINUTE = 10  # to understand: a function of ten statements a minute
CHECKED_A_MINUTE = 5  # to check each statement, as an audit does
WORDS_A_MINUTE = 200
DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef


class Reading(NamedTuple):
    """How much there is to read."""

    statements: int
    words: int

    def minutes(self, statements_a_minute: int = STATEMENTS_A_MINUTE) -> float:
        """How long that takes."""
        return self.statements / statements_a_minute + self.words / WORDS_A_MINUTE


def in_words(minutes: float) -> str:
    """A time to the nearest five minutes."""
    hours, rest = divmod(5 * round(minutes / 5), 60)
    return f"{hours} h {rest} min" if hours and rest else f"{hours} h" if hours else f"{rest} min"


def reading_of(paths: list[Path]) -> Reading:
    """What these modules and pages have together."""
    statements = words = 0
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".md":
            words += len(text.split())
            continue
        tree = ast.parse(text)
        documented = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
        docstrings = list(filter(None, map(ast.get_docstring, documented)))
        comments = [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)
                    if token.type == tokenize.COMMENT]
        statements += sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) - len(docstrings)
        words += sum(len(said.split()) for said in docstrings + comments)
    return Reading(statements, words)


def steps(section: str) -> list[list[Path]]:
    """The modules and pages of each numbered step of a section, in order."""
    items = re.findall(r"^\d+\. (.*)$", section, re.MULTILINE)
    return [[(ROOT / "docs" / link).resolve() for link in re.findall(r"\]\(([^)#]+)\)", item)] for item in items]


def rows(section: str) -> list[tuple[str, Reading]]:
    """The rows of the table: the steps, the ring, the core, and all."""
    found = steps(section)
    everything = [path for step in found for path in step]
    package = ROOT / "achilles"

    def within(*places: str) -> Reading:
        return reading_of([path for path in everything if path.relative_to(package).as_posix().startswith(places)])

    ring = within("PROTOCOL.md", "errors.py", "protocol/", "server/listen.py")
    core = reading_of([path for path in everything if not path.relative_to(package).as_posix().startswith(
        ("dropin/", "local", "lineReceiver/", "launch/", "journal", "progress", "objects/canonical"))])
    named = [(str(number), reading_of(step)) for number, step in enumerate(found, 1)]
    return [*named, ("the ring", ring), ("the core", core), ("all", reading_of(everything))]


def main() -> int:
    """Print the table."""
    sys.path.insert(0, str(Path(__file__).parent))
    from pages import section

    for name, found in rows(section("docs/tour.md", "Reading the code")):
        print(f"| {name} | {found.statements:,} | {found.words:,} | {in_words(found.minutes())} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
