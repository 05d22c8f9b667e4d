"""Help pages: they fit a screen, tell what there is, and are true."""

import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest

from minigpt4_jax import errors, pages
from minigpt4_jax.pages import TOP, Page

ROOT = Path(__file__).parent.parent


def below(page: Page) -> list[Page]:
    return [page, *(inner for part in page.parts for inner in below(part))]


ALL = below(TOP)
COMMANDS = [page for page in ALL if page.target]
EVERY = pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
EACH = pytest.mark.parametrize("page", COMMANDS, ids=lambda page: page.name)


@EVERY
def test_a_page_fits_a_screen_and_says_what_for_and_how(page):
    lines = page.text().splitlines()
    assert len(lines) <= 28 and max(map(len, lines)) <= 80
    assert lines[0] == page.about and re.fullmatch(r"[A-Z].*\.", page.about)
    assert lines[2] == f"Usage: {page.name} {page.usage}"
    assert "Examples:" in lines and f"  {page.examples[0]}" in lines
    assert all(line == line.rstrip() for line in lines)
    for part in page.parts:
        assert re.search(rf"^  {part.name.split()[-1]} +[a-z]", page.text(), re.M)


@EACH
def test_a_command_is_where_its_page_says(page):
    module, name = page.target.split(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert not page.extra or page.extra in setup()["EXTRAS"]


@EVERY
def test_an_example_is_a_command_with_its_flags(page):
    lines = "\n".join(page.examples).replace("\\\n", " ").splitlines()
    for words in map(shlex.split, lines):
        named = max(
            (p for p in COMMANDS if p.name.split() == words[: len(p.name.split())]),
            key=lambda p: len(p.name),
        )
        assert page in (TOP, pages.DATA, named)
        given = {word[2:].partition("=")[0] for word in words if word[:2] == "--"}
        known = {flag.name for flag in named.takes}
        assert {name.partition(".")[0] for name in given} <= known


@pytest.mark.parametrize("page", [pages.CHAT, pages.GENERATE], ids=lambda p: p.name)
def test_the_knobs_of_a_page_are_in_its_config(page):
    config = runpy.run_path(str(ROOT / f"configs/{page.name.split()[-1]}.py"))
    found = re.findall(r"--config\.(\w+)", page.text())
    assert found and set(found) <= set(config["get_config"]())


def test_the_first_page_lists_the_exit_codes():
    listed = TOP.text().partition("Exit codes:")[2]
    codes = re.findall(r"^    (\d+) ", errors.__doc__, re.MULTILINE)
    assert re.findall(r"\b\d+\b", listed) == codes


def setup() -> dict:
    """The values of setup.py, without running it."""
    text = (ROOT / "setup.py").read_text().partition("\nsetup(")[0]
    names: dict = {"__file__": str(ROOT / "setup.py")}
    exec(text, names)
    return names
