"""The pages for people: README.md and docs/, their sections, blocks and tables, for the tests that hold them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
EVERYTHING = "\n".join(PAGES.values())
FENCED = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block of a page, in order, without the indentation of the list it stands in."""
    return [(language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE))
            for indent, language, text in FENCED.findall(PAGES[page])]


def block(page: str, language: str, contains: str = "") -> str:
    """The one block of a language on a page that contains a text."""
    found, = [text for each, text in blocks(page) if each == language and contains in text]
    return found


def examples() -> Iterator[tuple[str, str, str, str]]:
    """(page, script, how to compare, what it prints) of each Python block with its output."""
    for page in PAGES:
        script = ""
        for language, text in blocks(page):
            if language == "python":
                script = text
            elif language in ("out", "out unordered"):
                yield page, script, language, text


def prose(page: str) -> str:
    """A page without its blocks."""
    return FENCED.sub("", PAGES[page])


def headings(page: str) -> list[str]:
    """All headings of a page, in order, without their level."""
    return re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next one of its level or above."""
    text = PAGES[page]
    level = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    assert level is not None, f"{page} has no {heading!r}"
    rest = text[level.end():]
    hidden = FENCED.sub(lambda found: " " * len(found[0]), rest)  # "#" begins comments there
    end = re.search(rf"^#{{1,{len(level[1])}}} ", hidden, re.MULTILINE)
    return rest[:end.start()] if end else rest


def table(page: str, heading: str, first: str) -> list[list[str]]:
    """The rows of the table in a section with the first column `first`."""
    lines = section(page, heading).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows
