"""Each kind of error ends a command with its code and one sentence."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4_jax import errors
from minigpt4_jax.errors import (
    CheckpointError,
    ClusterError,
    ConfigError,
    DataError,
    InputError,
    MiniGPT4Error,
)

COMMAND = """
import logging, sys
from absl import flags
from minigpt4_jax import errors

flags.DEFINE_integer("count", 1, "How many.")

def main(argv):
    logging.getLogger("minigpt4_jax.part").info("a log line")
    logging.getLogger("another").info("noise")
    print("result", flags.FLAGS.count, *argv[1:])
    {body}

errors.run(main)
"""


def command(*argv, body="pass"):
    """Run a small command in a process of its own: absl's flags are global."""
    return subprocess.run(
        [sys.executable, "-c", COMMAND.format(body=body), *argv],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "kind, builtin, code",
    [
        (InputError, ValueError, 2),
        (ConfigError, ValueError, 3),
        (CheckpointError, RuntimeError, 4),
        (DataError, RuntimeError, 5),
        (ClusterError, RuntimeError, 75),
    ],
)
def test_each_kind_has_its_base_and_its_exit_code(kind, builtin, code, capsys):
    assert issubclass(kind, MiniGPT4Error) and issubclass(kind, builtin)

    done = command(body=f"raise errors.{kind.__name__}('photo.jpg: no such file')")
    assert done.returncode == code == kind.exit_code
    assert done.stderr.splitlines()[1:] == [f"{kind.__name__}: photo.jpg: no such file"]


def test_the_readme_lists_the_exit_codes_of_the_docstring():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    table = readme.partition("## Exit codes")[2].partition("##")[0]
    listed = re.findall(r"^\| (\d+) \|", table, re.MULTILINE)
    assert listed == re.findall(r"^    (\d+) ", errors.__doc__, re.MULTILINE)
    assert {"143", *map(str, range(6))} <= set(listed)


def test_debug_adds_the_traceback():
    body = "raise errors.InputError('photo.jpg: no such file')"
    done = command("--debug", body=body)
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "in main" in done.stderr
    assert "Traceback" not in command(body=body).stderr


def test_results_go_to_stdout_and_logs_of_this_project_to_stderr():
    done = command("--count=3", "a", "b")
    assert done.returncode == 0
    assert done.stdout == "result 3 a b\n"
    assert done.stderr == "a log line\n"


def test_a_code_returned_by_main_is_the_exit_code():
    assert command(body="return 7").returncode == 7


def test_a_wrong_flag_is_an_input_error_that_names_it():
    done = command("--cuont=3")
    assert done.returncode == 2
    assert "cuont" in done.stderr and "Traceback" not in done.stderr
    done = command("--count=three")
    assert done.returncode == 2
    assert "three" in done.stderr and "Traceback" not in done.stderr


def test_a_refusal_of_the_system_is_one_sentence():
    done = command(body="open('/absent/answers.jsonl', 'w')")
    assert done.returncode == 1
    assert "/absent/answers.jsonl" in done.stderr and "Traceback" not in done.stderr


def test_an_interrupt_is_no_traceback():
    done = command(body="raise KeyboardInterrupt")
    assert done.returncode == 130
    assert done.stderr.splitlines()[1:] == ["interrupted"]


def test_a_reader_that_stops_early_is_no_error():
    body = "[print(i) for i in range(200_000)]"
    writer = subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert writer.stdout.readline() == b"result 1\n"
    writer.stdout.close()
    assert writer.stderr.read() == b"a log line\n"
    assert writer.wait(timeout=60) == 0


def test_a_bug_keeps_its_traceback():
    done = command(body="1 / 0")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


CONFIGURED = """
from absl import flags
from ml_collections import config_flags
from minigpt4_jax import errors

config = config_flags.DEFINE_config_file("config")
errors.run(lambda argv: print(config.value.temperature), {argv})
"""


def configured(tmp_path, *argv, inside=False):
    """Run a command with a config file, arguments from outside or given to `run`."""
    (tmp_path / "card.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict(dict(temperature=1.0)).lock()\n"
    )
    argv = [word.replace("CARD", str(tmp_path / "card.py")) for word in argv]
    code = CONFIGURED.format(argv=["command", *argv] if inside else None)
    outside = [] if inside else argv
    return subprocess.run(
        [sys.executable, "-c", code, *outside],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("inside", [False, True])
def test_a_knob_of_the_config_is_set_from_the_command_line(tmp_path, inside):
    argv = ("--config=CARD", "--config.temperature=0.7")
    done = configured(tmp_path, *argv, inside=inside)
    assert (done.stdout, done.stderr, done.returncode) == ("0.7\n", "", 0)


@pytest.mark.parametrize(
    "argv, words",
    [
        (("--config=CARD", "--config.temprature=0.7"), 'Did you mean "temperature"'),
        (("--config=CARD", "--config.temperature=warm"), "'warm'"),
        (("--config=/absent/card.py",), "/absent/card.py"),
    ],
)
def test_a_wrong_knob_or_card_is_one_sentence(tmp_path, argv, words):
    done = configured(tmp_path, *argv)
    assert done.returncode in (2, 3)
    assert words in done.stderr and done.stderr.count("\n") == 1


def test_an_unknown_name_gets_the_nearest_one_and_the_list():
    sentence = errors.unknown("preset", "vicuna_7", ["vicuna_7b", "eva_g", "demo"])
    assert sentence == (
        "unknown preset 'vicuna_7'; did you mean 'vicuna_7b'? "
        "known: demo, eva_g, vicuna_7b"
    )


def test_a_name_like_none_other_gets_only_the_list():
    sentence = errors.unknown("preset", "zzz", {"eva_g": 1, "demo": 2})
    assert sentence == "unknown preset 'zzz'; known: demo, eva_g"
    assert errors.unknown("preset", 3, []) == "unknown preset 3; known: none"
