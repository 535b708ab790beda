"""What a check can hold of plain words: `python tests/plain_words.py [FOLDER]`, a part of the lint step.

In comments and docstrings: no comment that the next one continues, no sentence of more than 28 words, no "who", "whom",
"whoever" or "whose". Prints each place, and exits with status 1 if there is one.
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
PICTURE = re.compile(r"::\n.*", re.S)  # what follows in a docstring is drawn, or a table
SENTENCE_END = re.compile(r"(?<=[.:;])\s")


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
        if found := PRONOUN.search(text):
            yield line, f"{found[0]!r}: name the thing"
        for sentence in SENTENCE_END.split(re.sub(r"\s+", " ", PICTURE.sub("", text))):
            count = len(sentence.split())
            if count > LONGEST_SENTENCE:
                yield line, f"a sentence of {count} words: {sentence[:60]!r}"


def main(folder: str = "achilles") -> int:
    """Print every finding; the exit status."""
    places = [f"{path}:{line}: {what}" for path in sorted(Path(folder).rglob("*.py"))
              for line, what in findings(path.read_text(encoding="utf-8"))]
    print("\n".join(places) or f"plain words in {folder}/")
    return 1 if places else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
