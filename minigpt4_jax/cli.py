"""minigpt4-jax COMMAND ...: the one entry point; a command is imported when it runs.

`python -m minigpt4_jax COMMAND` is the same, and so is `python -m minigpt4_jax.COMMAND`.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import minigpt4_jax
from minigpt4_jax import errors
from minigpt4_jax.errors import InputError
from minigpt4_jax.pages import TOP, Page

HELP = ("help", "--help", "-h", "-help")
CONVERT = "convert is no command of minigpt4-jax; in a clone, `python -m convert` is"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command that the arguments name, or show a page; default `sys.argv`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv == ["--version"]:
        print(f"minigpt4-jax {minigpt4_jax.__version__}")
        sys.exit(0)
    try:
        page, rest = find(TOP, argv)
    except InputError as error:
        sys.exit(errors.say(error, argv))
    page.run(lambda positional: load(page)(positional), [page.name, *rest])


def find(page: Page, argv: Sequence[str]) -> tuple[Page, list[str]]:
    """The page that the first words name, and the words behind them.

    Raises InputError for a command that is not there.
    """
    asked, rest = False, list(argv)
    while page.parts and rest:
        name = rest.pop(0)
        if name in HELP:
            asked = True
            continue
        named = {part.name.split()[-1]: part for part in page.parts}
        if name.startswith("-"):
            raise InputError(
                f"{name} before a command; want {page.name} {page.usage}, and the "
                f"command one of {', '.join(named)}"
            )
        if name not in named:
            raise InputError(
                CONVERT if name == "convert" else errors.unknown("command", name, named)
            )
        page = named[name]
    return page, ["--help", *rest] if asked or page.parts else rest


def load(page: Page) -> Callable[[list[str]], int | None]:
    """The function of a command; InputError where a package of its extra is missing."""
    module, _, name = page.target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not page.extra or package in ("", "minigpt4_jax"):
            raise
        raise InputError(
            f"{page.name} needs the package {package}; the extra {page.extra} brings it: "
            f"pip install 'minigpt4-jax[{page.extra}]', or '.[{page.extra}]' in a clone"
        ) from error
