"""README and the pages beside it: links, recipes and commands that exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import layerfold
from layerfold.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.yaml"))
LAYERFOLD: Any = typer.main.get_command(app)
ROOT_CONTEXT = LAYERFOLD.make_context("layerfold", ["doctor"])
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # click's, or, in newer typers, its copy in typer
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`]+)`")
OF_SCRIPTS = {
    "--lr": "scripts/train_pocket.py",
    "--quick": "benchmarks/shape.py",
    "--recover": "benchmarks/quality.py",
    "--recover-kept": "benchmarks/quality.py",
    "--folder": "benchmarks/quality.py",
}
"""Options that a page mentions without a command in front of them, and the script that takes them."""


def named(pages: list[Path]) -> Any:
    return pytest.mark.parametrize("page", pages, ids=[str(page.relative_to(ROOT)) for page in pages])


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: str, folder: Path) -> list[str]:
    """The relative links of a page that lead nowhere: to no file, or to no heading of one."""
    broken = []
    for link in LINK.findall(FENCED.sub("", page)):
        path, _, anchor = link.partition("#")
        target = folder / path
        if "://" in link:
            continue
        there = target.exists() and (not anchor or anchor in anchors(target.read_text() if path else page))
        if not there:
            broken.append(link)
    return broken


def shown(page: str) -> Iterator[str]:
    """The command lines in the code blocks of a page, continued lines joined."""
    for _, code in FENCED.findall(page):
        yield from re.findall(r"^\$ (.*)$", code.replace("\\\n", " "), re.MULTILINE)


def mentioned(page: str) -> Iterator[str]:
    """The code in the sentences and tables of a page."""
    for span in SPAN.findall(FENCED.sub("", page)):
        yield " ".join(span.split())


def resolved(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words begin with, and the rest of them."""
    command = LAYERFOLD
    while words and (known := getattr(command, "commands", {})):
        if words[0] not in known:
            raise ValueError(f"no command {words[0]!r}")
        command, words = known[words[0]], words[1:]
    return command, words


def options(command: Any) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts} | {"--help"}


def fault_of_a_line(line: str) -> str:
    """Say why a whole `layerfold` command line would be refused, or nothing."""
    try:
        command, words = resolved(shlex.split(line, comments=True)[1:])
        command.make_context(command.name, words, parent=ROOT_CONTEXT)
    except (ValueError, USAGE_ERROR) as error:
        return str(error)
    return ""


def fault_of_a_mention(code: str) -> str:
    """Say which word of a `layerfold` command, perhaps a part of one, does not exist, or nothing."""
    try:
        command, words = resolved(code.split()[1:])
    except ValueError as error:
        return str(error)
    unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - options(command)
    return f"no option {sorted(unknown)}" if unknown else ""


def every_option(command: Any = LAYERFOLD) -> set[str]:
    return options(command).union(*(every_option(each) for each in getattr(command, "commands", {}).values()))


def test_readme_has_at_most_200_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@named(PAGES)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert broken_links(page.read_text(), page.parent) == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text()
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= set(LINK.findall(index))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_table_of_recipes_names_every_recipe(recipe: str) -> None:
    rows = [line for line in (ROOT / "docs/study.md").read_text().splitlines() if line.startswith("|")]
    assert any(f"`recipes/{recipe}`" in row for row in rows)


@named(PAGES)
def test_every_recipe_and_script_that_a_page_names_exists(page: Path) -> None:
    files = re.findall(r"\b(?:recipes|benchmarks|scripts|tests)/[\w/]+\.\w+", page.read_text())
    assert [name for name in files if not (ROOT / name).exists()] == []


@named(PAGES)
def test_every_command_line_that_a_page_shows_is_accepted(page: Path) -> None:
    lines = [line for line in shown(page.read_text()) if line.split()[0] == "layerfold"]
    assert {line: fault for line in lines if (fault := fault_of_a_line(line))} == {}


@named(PAGES)
def test_every_command_that_a_page_mentions_exists_with_its_options(page: Path) -> None:
    codes = [code for code in mentioned(page.read_text()) if code.startswith("layerfold ")]
    assert {code: fault for code in codes if (fault := fault_of_a_mention(code))} == {}


@named(PAGES)
def test_every_option_that_a_page_mentions_is_one_of_some_command(page: Path) -> None:
    words = {code.split()[0] for code in mentioned(page.read_text()) if code.startswith("--")}
    assert words - every_option() - OF_SCRIPTS.keys() == set()


@pytest.mark.parametrize("option", OF_SCRIPTS)
def test_an_option_of_a_script_is_in_that_script(option: str) -> None:
    assert f'"{option}"' in (ROOT / OF_SCRIPTS[option]).read_text()


@named(PAGES)
def test_python_on_a_page_is_python_and_names_what_is_public(page: Path) -> None:
    blocks = [code for language, code in FENCED.findall(page.read_text()) if language == "python"]
    code = [*blocks, *(span for span in mentioned(page.read_text()) if re.match(r"layerfold\.\w+\(", span))]
    used = [node for block in code for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Attribute)]
    names = {node.attr for node in used if isinstance(node.value, ast.Name) and node.value.id == "layerfold"}
    assert names <= set(layerfold.__all__)


def test_the_pages_show_commands_for_these_checks_to_read() -> None:
    pages = [page.read_text() for page in PAGES]
    assert sum(line.startswith("layerfold ") for page in pages for line in shown(page)) > 50
    assert sum(code.startswith("layerfold ") for page in pages for code in mentioned(page)) > 20


@pytest.mark.parametrize(
    ("page", "broken"),
    [
        ("[a](missing.md)", ["missing.md"]),
        ("[a](docs/drop.md#no-such-heading)", ["docs/drop.md#no-such-heading"]),
        ("# Here\n[a](#there)", ["#there"]),
        ("# Here, `x`\n[a](#here-x) [b](docs/drop.md) ![c](docs/pocket.md) [d](https://a.b/c)", []),
        ("```\n[a](missing.md)\n```\n", []),
    ],
)
def test_a_broken_link_is_found(page: str, broken: list[str]) -> None:
    assert broken_links(page, ROOT) == broken


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("layerfold compress mrge --output-dir a", "no command 'mrge'"),
        ("layerfold compress merge --tei --output-dir a", "--tei"),
        ("layerfold compress merge --n 4", "output"),
        ("layerfold compress merge --n four --output-dir a", "integer"),
        ("layerfold compress prune --criterion size --output-dir a", "size"),
        ("layerfold eval pocket twice", "twice"),
    ],
)
def test_a_command_line_that_would_be_refused_is_found(line: str, fault: str) -> None:
    assert fault in fault_of_a_line(line)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("layerfold compres merge", "no command 'compres'"),
        ("layerfold search drop --keep 2", "no option ['--keep']"),
        ("layerfold compress drop --every N", ""),
        ("layerfold recover", ""),
    ],
)
def test_a_mention_of_what_does_not_exist_is_found(code: str, fault: str) -> None:
    assert fault_of_a_mention(code) == fault


def test_command_lines_are_read_from_code_blocks_whole() -> None:
    page = "```console\n$ layerfold eval \\\n    pocket\nout\n$ make demo\n```\nand `layerfold\ndoctor`.\n"
    assert [line.split() for line in shown(page)] == [["layerfold", "eval", "pocket"], ["make", "demo"]]
    assert list(mentioned(page)) == ["layerfold doctor"]
