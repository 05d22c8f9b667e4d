"""The chat in a terminal, driven through a pseudo-terminal."""

import dataclasses
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
import pytest
import tiny

from minigpt4_jax import chat
from minigpt4_jax.request import Usage

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    """What one command of this file compiles, the next one need not."""
    name = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, "0")
        yield


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("chat")
    PIL.Image.fromarray(tiny.image(0)).save(folder / "a.png")
    PIL.Image.fromarray(tiny.image(1)).save(folder / "b.png")
    return [
        *(sys.executable, "-m", "minigpt4_jax.chat", "--config.max_tokens=8"),
        *(f"--checkpoint={tiny.save(folder / 'tiny')}", f"--image={folder / 'a.png'}"),
    ]


class Terminal:
    """A command at a terminal of its own."""

    def __init__(self, arguments):
        self.master, slave = pty.openpty()
        env = os.environ | {"TERM": "dumb"}
        self.process = subprocess.Popen(
            arguments, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env=env
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, pattern: str, seconds: float = 200) -> str:
        """What came up to and with the pattern, which is then forgotten."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            left = end - time.monotonic()
            assert left > 0, f"{pattern!r} did not come; {self.seen!r} did"
            if select.select([self.master], [], [], left)[0]:
                try:
                    data = os.read(self.master, 4096)
                except OSError:  # the other side is closed
                    data = b""
                assert data, f"{pattern!r} did not come before the end; {self.seen!r}"
                self.seen += data.decode(errors="replace")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def type(self, line: str) -> None:
        os.write(self.master, line.encode() + b"\n")


def test_a_terminal_gets_a_first_answer_and_then_a_conversation(arguments):
    terminal = Terminal(arguments)
    told = r"First token after [\d.]+ s, [\d.]+ tokens/s \(\d tokens\)\."
    try:
        assert "a.png" in terminal.wait_for(told)
        assert "/reset" in terminal.wait_for("> ")
        terminal.type("And what else?")
        terminal.wait_for(told)
        terminal.type("/image " + arguments[-1].partition("=")[2].replace("a.", "b."))
        terminal.wait_for("Shown with your next question")
        terminal.type("What is this?")
        terminal.wait_for(told)
        terminal.type("/image nowhere.jpg")
        terminal.wait_for("nowhere.jpg.*no such file")
        terminal.type("/reset")
        terminal.wait_for("Forgotten")
        terminal.type("/help")
        terminal.wait_for("/quit")
        terminal.type("/quit")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()


def test_a_prompt_gets_one_answer_with_the_words_alone_on_stdout(arguments):
    result = subprocess.run(
        [*arguments, "--prompt=Hm?"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "tokens/s" in result.stderr and "Hm?" not in result.stderr  # never logged
    assert "tokens/s" not in result.stdout and result.stdout.endswith("\n")


def test_an_image_that_is_not_there_is_one_sentence_and_exit_code_2(arguments):
    result = subprocess.run(
        [*arguments[:-1], "--image=~/gone.jpg"],
        cwd=ROOT,
        env=os.environ | {"HOME": "/of/the/user"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2
    assert "/of/the/user/gone.jpg" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("typed", ["~/b.png", "'~/b.png'"])
def test_a_tilde_in_a_chat_is_the_users_home(monkeypatch, tmp_path, typed):
    PIL.Image.fromarray(tiny.image(1)).save(tmp_path / "b.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    lines, shown = iter([f"/image {typed}", "Hm?", "/quit"]), []
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(chat, "say", lambda _, text, image: shown.append(image))
    chat.converse(None, None)
    assert (shown[0] == tiny.image(1)).all()


def test_speed_leaves_the_first_token_out_of_the_rate():
    usage = Usage(
        prompt_tokens=50, answer_tokens=21, seconds_to_first_token=0.5, seconds=1.5
    )
    assert chat.speed(usage) == "First token after 0.50 s, 20.0 tokens/s (21 tokens)."
    whole = dataclasses.replace(usage, seconds_to_first_token=1.5)
    assert chat.speed(whole) == "Answer after 1.50 s (21 tokens)."


def test_what_a_terminal_would_obey_is_not_printed():
    assert chat._printable("a\x1b[2Jb\n猫\x07") == "a[2Jb\n猫"


def test_the_bundled_photo_is_there():
    assert chat.PHOTO.is_file()
