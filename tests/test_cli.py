"""The one entry point: what it imports, what it says of a wrong word, how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_pages import ALL

from minigpt4_jax import cli, pages
from minigpt4_jax.errors import InputError

ROOT = Path(__file__).parent.parent
HEAVY = {
    "jax",
    "flax",
    "numpy",
    "PIL",
    "ml_collections",
    "tqdm",
    "gradio",
    "tokenizers",
}

IMPORTS = """
import json, sys
from minigpt4_jax import cli
for argv in json.loads(sys.argv[1]):
    try:
        cli.main(argv)
    except SystemExit:
        pass
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def typed(value: object) -> str:
    """A case's name: the words after the command's."""
    return " ".join(value) if isinstance(value, list) else ""


def command(*argv: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "minigpt4_jax", *argv],
        cwd=ROOT,
        env=os.environ | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def imported_by(*commands: list[str]) -> tuple[set[str], str]:
    """Packages that are imported once the commands have ended, and what they printed."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORTS, json.dumps(commands)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    *printed, modules = result.stdout.splitlines()
    return set(json.loads(modules)), "\n".join(printed)


def test_help_imports_nothing_that_takes_long():
    modules, printed = imported_by(
        *([*page.name.split()[1:], "--help"] for page in ALL), ["--version"], ["chta"]
    )
    assert printed.startswith("\n".join(page.text() for page in ALL))
    assert HEAVY.isdisjoint(modules)


@pytest.mark.parametrize(
    "argv, does_without",
    [
        (["data", "check", "/absent"], {"jax", "flax", "tensorflow_datasets"}),
        (["report", "/absent"], {"jax", "flax", "numpy", "tokenizers"}),
    ],
    ids=typed,
)
def test_a_command_imports_only_what_it_needs(argv, does_without):
    modules, _ = imported_by(argv)
    assert does_without.isdisjoint(modules)


@pytest.mark.parametrize(
    "argv, page",
    [
        ([], pages.TOP),
        (["help"], pages.TOP),
        (["-h"], pages.TOP),
        (["help", "chat"], pages.CHAT),
        (["--help", "data", "check"], pages.DATA_CHECK),
        (["data"], pages.DATA),
        (["data", "help", "urls"], pages.DATA_URLS),
        (["plan", "--config=x", "-h"], pages.PLAN),
    ],
    ids=typed,
)
def test_there_are_many_ways_to_ask_for_help(argv, page, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 0
    assert capsys.readouterr().out == page.text() + "\n"


@pytest.mark.parametrize(
    "page", [pages.CHAT, pages.DATA_CHECK, pages.REPORT], ids=lambda page: page.name
)
def test_the_older_form_of_a_command_has_the_same_help(page):
    module = page.name.removeprefix("minigpt4-jax ").split()
    result = subprocess.run(
        [sys.executable, "-m", f"minigpt4_jax.{module[0]}", *module[1:], "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (result.returncode, result.stdout) == (0, page.text() + "\n")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["chta"], "did you mean 'chat'?"),
        (["data", "chek", "x"], "did you mean 'check'?"),
        (["convert", "model"], "python -m convert"),
        (
            ["--image=x", "chat"],
            "--image=x before a command; want minigpt4-jax COMMAND",
        ),
    ],
    ids=typed,
)
def test_a_wrong_command_is_one_sentence_that_helps(argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert err.startswith("InputError: ") and err.count("\n") == 1 and words in err
    with pytest.raises(SystemExit):
        cli.main([*argv, "--debug"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["chat", "--imgae=x"], "unknown flag '--imgae'; did you mean '--image'?"),
        (
            ["generate", "--confg.top_k=3"],
            "unknown flag '--confg'; did you mean '--con",
        ),
        (["plan", "--prompt-tokens=3"], "did you mean '--prompt_tokens'?"),
        (["plan", "--mode=generat"], "generat"),
        (["plan", "--compile=many"], "many"),
        (["chat", "setup.py"], "did you mean --image 'setup.py'?"),
        (["generate", "--images=."], "generate needs --images and --out"),
        (["data", "check"], "data check takes one path, got 0"),
        (["report", "a", "b"], "report takes one work directory, got 2"),
    ],
    ids=typed,
)
def test_a_wrong_word_is_one_sentence_that_helps(argv, words):
    result = command(*argv)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("InputError: ") and result.stderr.count("\n") == 1
    assert words in result.stderr


def test_a_flag_is_compared_with_those_of_its_command_alone():
    said = command("chat", "--imgae=x").stderr
    assert "known: --checkpoint, --config, --debug, --image, --prompt (" in said


def test_each_exit_code_of_wrong_material_is_met(tmp_path):
    (tmp_path / "folder").mkdir()
    for run, text in {"damaged": "{", "run": '{"format": 1, "config": {}}'}.items():
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.json").write_text(text)
    out = f"--out={tmp_path / 'out.jsonl'}"
    found = {
        code: command(*argv)
        for code, argv in {
            0: ["--version"],
            1: ["report", str(tmp_path / "run"), "--out=/absent/page.html"],
            2: ["data", "check", "/absent", "--sheet=sheet.txt"],
            3: ["generate", "--images=.", out, "--config.temprature=1"],
            4: ["report", str(tmp_path / "damaged")],
            5: ["data", "check", str(tmp_path / "folder")],
        }.items()
    }
    said = {code: result.stderr for code, result in found.items()}
    assert {code: result.returncode for code, result in found.items()} == {
        code: code for code in found
    }, said
    assert all("Traceback" not in text for text in said.values())
    assert said[3].count('Did you mean "temperature"') == 1


def test_debug_adds_the_traceback():
    assert "Traceback" in command("report", "/absent", "--debug").stderr
    assert "Traceback" not in command("report", "/absent").stderr


def test_a_package_that_is_missing_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    for name in [n for n in sys.modules if n.startswith("minigpt4_jax.")]:
        if name.endswith((".stream", ".train", ".loader", ".read_ahead")):
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InputError, match=r"package grain; the extra train .*\[train\]"):
        cli.load(pages.TRAIN)


def test_a_module_of_ours_that_is_missing_is_a_bug():
    page = pages.Page("x", "X.", "", "minigpt4_jax.absent:main", extra="train")
    with pytest.raises(ModuleNotFoundError):
        cli.load(page)
