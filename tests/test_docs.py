"""README.md and docs/ as pages: their length, links, contents, language, and that nothing is said twice."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections import Counter

import pytest
from pages import PAGES, ROOT, block, blocks, headings, prose, section, slug
from plain_words import page_findings
from test_imports import needed_at_import

README_LINES, PAGE_LINES, SHORT_LINES = 200, 300, 60
WORDS_ALIKE = 9  # in a row, on two pages: a sentence that is said twice
WANTED = {"README.md", *(f"docs/{name}.md" for name in (
    "guide", "cluster", "dropin", "promises", "security", "speed", "tour"))}
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_all_pages_are_there():
    assert PAGES.keys() == WANTED


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_short(page):
    assert len(PAGES[page].splitlines()) <= (README_LINES if page == "README.md" else PAGE_LINES)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_a_long_page_has_its_contents(page):
    if len(PAGES[page].splitlines()) <= SHORT_LINES:
        return
    listed = re.findall(r"\]\(#([^)]+)\)", section(page, "Contents"))
    assert listed == [slug(heading) for heading in headings(page)[2:]]


def test_the_readme_begins_with_its_contents():
    listed = re.search(r"^\[Install.*$", PAGES["README.md"], re.MULTILINE)[0]
    assert re.findall(r"\]\(#([^)]+)\)", listed) == [slug(heading) for heading in headings("README.md")[1:]]


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_project_resolve(page):
    anchors = {name: [slug(heading) for heading in headings(name)] for name in PAGES}
    assert len(anchors[page]) == len(set(anchors[page]))
    folder = (ROOT / page).parent
    for link in LINK.findall(prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else ROOT / page
        assert target.exists(), link
        if anchor:
            name = target.relative_to(ROOT.resolve()).as_posix()
            text = target.read_text(encoding="utf-8")
            assert anchor in anchors.get(name, map(slug, re.findall(r"^#+ (.*)$", text, re.MULTILINE))), link


def test_every_page_is_one_link_away_from_the_readme():
    links = {link.partition("#")[0] for link in LINK.findall(PAGES["README.md"])}
    assert links >= WANTED - {"README.md"}
    assert links >= {"examples", "achilles/PROTOCOL.md", "CHANGELOG.md", "tests/bench/README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_are_python(page):
    for language, text in blocks(page):
        if language == "python":
            compile(text, page, "exec")


def test_the_parsers_take_every_command_of_ours_that_a_block_shows(monkeypatch):
    class Taken(BaseException):
        pass

    def parse_args(parser, words):
        parse(parser, words)  # it exits, if it does not know an option
        raise Taken

    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "path", [*sys.path])
    shown = [found for page in PAGES for language, text in blocks(page) if language == "sh"
             for found in re.findall(r"python -m achilles\.(\w+) ([^\n#;&]*)", text)]
    assert len(shown) > 12
    for role, options in shown:
        main = importlib.import_module(f"achilles.{role}" if role == "local" else f"achilles.{role}.__main__").main
        with pytest.raises(Taken):
            main(re.sub(r"\$\(\(.*?\)\)", "9999", options).split())


def test_the_reading_order_has_every_module():
    listed = re.findall(r"\]\(\.\./achilles/([\w/]+)\.py\)", section("docs/tour.md", "Reading the code"))
    names = [path.replace("/", ".") for path in listed]
    for number, name in enumerate(names):
        assert needed_at_import(name) <= set(names[:number]), name
    package = ROOT / "achilles"
    there = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"}
    there = {path for path in there if not path.startswith("lineReceiver/")} | {"lineReceiver/achilles_main.py"}
    assert sorted(f"{path}.py" for path in listed) == sorted(there)


def sentences(page):
    """The words of each sentence, without blocks, links' targets and marks."""
    text = re.sub(r"\]\([^)]*\)", "]", prose(page))
    for piece in re.split(r"(?<=[.:;?!|])\s|\n", text):
        yield re.findall(r"[\w`'.-]+", piece.lower())


def test_nothing_is_said_twice():
    said = Counter()
    for page in PAGES:
        runs = {tuple(words[at:at + WORDS_ALIKE]) for words in sentences(page) for at in range(len(words))}
        said.update(run for run in runs if len(run) == WORDS_ALIKE)
    assert [" ".join(run) for run, count in said.items() if count > 1] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_in_plain_words(page):
    assert [*page_findings(PAGES[page])] == []


def test_the_words_that_pages_explain_are_those_of_the_glossary():
    protocol = (ROOT / "achilles/PROTOCOL.md").read_text(encoding="utf-8").partition("## 2. ")[0]
    words = re.findall(r"^\| (\w+) \|", protocol, re.MULTILINE)[1:]
    assert set(words) == {"argument", "chunk", "batch", "packet", "job", "call", "context", "worker", "window", "pace",
                          "attempt"}
    explained = {word for page in PAGES for word in re.findall(r"(?:The|a|as a|are) \*\*([a-z]+?)s?\*\*", prose(page))}
    assert explained == {"packet", "chunk", "batch", "window"} <= set(words)


def test_a_source_distribution_has_the_pages():
    manifest = (ROOT / "MANIFEST.in").read_text()
    assert "recursive-include docs *.md" in manifest and "README.md" in manifest


@pytest.mark.parametrize("page, heading", [("README.md", "How fast"), ("docs/speed.md", "Figures")])
def test_speeds_are_those_of_the_page_of_figures(page, heading):
    """To the digit, and in the row of that name. Where the rows have units, so is the unit."""
    figures = (ROOT / "tests/bench/README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in row.split("|")]
            for row in re.findall(r"^\| (.+[\d–]) \|$", section(page, heading), re.MULTILINE)]
    assert len(rows) > 10
    for name, *cells in rows:
        found = [line for line in figures.splitlines() if line.startswith(f"| {name} |".replace("\\", ""))]
        medians = {cell.partition(" (")[0].strip() for line in found for cell in line.split("|")}
        assert {*cells} <= medians, name


def test_the_joblib_lines_are_those_that_the_ecosystem_tests_run():
    assert "GridSearchCV" in block("docs/dropin.md", "python", "parallel_config")
