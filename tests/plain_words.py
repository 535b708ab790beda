"""The rules of plain words that a check can hold: `python tests/plain_words.py [FOLDER]`, a part of the lint step.

In comments and docstrings: no comment that the next one continues, no sentence of more than 28 words, no "who", "whom",
"whoever" or "whose", and no "what" in the place of a noun. Prints each place, and exits with status 1 if there is one.
`tests/test_docs.py` holds the pages for people by the same rules, but for "what": all of them but their blocks, tables
and headings.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

LONGEST_SENTENCE = 28  # words; the aim is 20
PRONOUN = re.compile(r"\b(who|whom|whoever|whose)\b", re.I)
NO_NOUN = re.compile(r"(?<!:param )\bwhat\b", re.I)  # but a parameter may have that name
PICTURE = re.compile(r"::\n.*", re.S)  # what follows in a docstring is drawn, or a table
SENTENCE_END = re.compile(r"(?<=[.:;])\s")
BLOCK = re.compile(r"^( *)```.*?^\1```$", re.M | re.S)  # of a page
NOT_PROSE = re.compile(r"#|\||.*· \[")  # a heading, a row of a table, or links to sections, on a page
MARK = re.compile(r"^\s*(?:[-*>]|\d+\.)\s+")  # of an item or a quotation
TARGET = re.compile(r"\]\([^)]*\)")  # of a link
SECTION = re.compile(r"\[[^]]*\]\(#[^)]*\)")  # a link to a section
PAGE_SENTENCE_END = re.compile(r"(?<=[.:;?])[*_]*\s")


def prose_of(source: str) -> Iterator[tuple[int, str]]:
    """Each docstring and comment, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                yield node.body[0].lineno, text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")


def findings(source: str) -> Iterator[tuple[int, str]]:
    """Each line with what is wrong there."""
    for line, text in prose_of(source):
        if text.startswith("...") or text.rstrip().endswith("..."):
            yield line, "a comment that another one continues"
        if found := PRONOUN.search(text) or NO_NOUN.search(text):
            yield line, f"{found[0]!r}: name the thing"
        for sentence in SENTENCE_END.split(re.sub(r"\s+", " ", PICTURE.sub("", text))):
            yield from too_long(line, sentence)


def too_long(line: int, sentence: str) -> Iterator[tuple[int, str]]:
    """That a sentence is, if it is."""
    count = len(sentence.split())
    if count > LONGEST_SENTENCE:
        yield line, f"a sentence of {count} words: {sentence[:60]!r}"


def page_findings(page: str) -> Iterator[tuple[int, str]]:
    """Each line of a page in Markdown with what is wrong there. A paragraph is a line of its own."""
    prose = BLOCK.sub(lambda block: "\n" * block[0].count("\n"), page)
    for number, line in enumerate(prose.splitlines(), 1):
        text = TARGET.sub("]", SECTION.sub("it", MARK.sub("", line)))
        if NOT_PROSE.match(line):
            continue
        if found := PRONOUN.search(text):
            yield number, f"{found[0]!r}: name the thing"
        for sentence in PAGE_SENTENCE_END.split(text):
            yield from too_long(number, sentence)


def main(folder: str = "achilles") -> int:
    """Print every finding; the exit status."""
    places = [f"{path}:{line}: {what}" for path in sorted(Path(folder).rglob("*.py"))
              for line, what in findings(path.read_text(encoding="utf-8"))]
    print("\n".join(places) or f"plain words in {folder}/")
    return 1 if places else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
