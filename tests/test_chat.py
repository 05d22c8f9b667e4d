"""The chat in a terminal, driven through a pseudo-terminal."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import tiny
from terminals import CTRL_C, UP, Terminal

from minigpt4_jax import chat
from minigpt4_jax.request import Event, Usage
from minigpt4_jax.typed import Typed

ROOT = Path(__file__).parent.parent
TOLD = r"First token after [\d.]+ s, [\d.]+ tokens/s \(\d tokens\)\."


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("chat")
    PIL.Image.fromarray(tiny.image(0)).save(folder / "a.png")
    PIL.Image.fromarray(tiny.image(1)).save(folder / "b.png")
    preset = tiny.save(folder / "tiny") / "preset.json"
    values = json.loads(preset.read_text())
    values["llama"]["max_positions"] = 100_000  # so that an answer can be stopped
    preset.write_text(json.dumps(values))
    return [
        *(sys.executable, "-m", "minigpt4_jax", "chat", "--config.max_tokens=8"),
        "--config.banned_ids=(2,)",  # the end
        *(f"--checkpoint={folder / 'tiny'}", f"--image={folder / 'a.png'}"),
    ]


def test_a_terminal_gets_a_first_answer_and_then_a_conversation(arguments):
    with Terminal(arguments) as terminal:
        first = terminal.wait_for(TOLD)
        assert "a.png" in first and "\x1b" not in first  # a dumb terminal
        assert "/reset" in terminal.wait_for("> ")
        terminal.type("And what else?")
        terminal.wait_for(TOLD)
        terminal.type("/image " + arguments[-1].partition("=")[2].replace("a.", "b."))
        terminal.wait_for("Shown with your next question")
        terminal.type("What is this?")
        terminal.wait_for(TOLD)
        terminal.type("/image nowhere.jpg")
        terminal.wait_for("nowhere.jpg.*no such file")
        terminal.type("/image")
        terminal.wait_for("which file")
        terminal.type("/imgae a.png")
        terminal.wait_for("did you mean '/image'")
        terminal.type("/reset")
        terminal.wait_for("Forgotten")
        terminal.type("/help")
        terminal.wait_for("chat_history")
        terminal.type("/quit")
        assert terminal.ended() == 0


def test_ctrl_c_stops_the_answer_and_twice_at_the_prompt_the_chat(arguments):
    endless = [*arguments, "--config.max_tokens=50_000"]
    env = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "NO_COLOR": ""}
    with Terminal(endless, **env) as terminal:
        assert "▀" in terminal.wait_for("About .*a.png:")  # the photo
        terminal.wait_for("(?s).{60}")
        terminal.press(CTRL_C)
        assert "\x1b[2mStopped." in terminal.wait_for(r"Stopped\.[^>]*> ")
        terminal.type('"""What is\nhere?"""')
        terminal.wait_for(r"(?s)here.{60}")
        terminal.press(CTRL_C)
        terminal.wait_for(r"Stopped\.[^>]*> ")
        terminal.interrupt("Ctrl-C again[^>]*> ")
        terminal.type("/reset")  # so that it is no second one in a row
        terminal.wait_for("Forgotten[^>]*> ")
        terminal.press(3 * UP + "\n")
        terminal.wait_for(r"(?s)What is\n?.*\. ")
        terminal.interrupt("Ctrl-C again[^>]*> ")  # in the middle of a text
        assert terminal.interrupted() == 0


def test_ctrl_c_ends_a_single_answer_with_exit_code_130(arguments):
    alone = [*arguments, "--config.max_tokens=50_000", "--prompt=Hm?"]
    with Terminal(alone) as terminal:
        terminal.wait_for("(?s)About .*a.png:.{60}")
        terminal.press(CTRL_C)
        terminal.wait_for("Stopped[^>]*interrupted")
        assert terminal.ended() == 130


class Talk:
    """A chat whose answers go on until they are stopped."""

    def __init__(self, then=()):
        self.messages = []
        self.stops = 0
        self.then = then  # what happens behind each piece

    def events(self, text, image):
        for happens in self.then:
            yield Event("x", piece="word ")
            happens()
            if self.stops:
                yield Event("x", finish_reason="cancelled")
                return
        yield Event("x", piece="end", finish_reason="stop")

    def stop(self):
        self.stops += 1


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def test_an_answer_that_ctrl_c_cuts_short_is_no_whole_one(capsys):
    assert chat.say(Talk([ctrl_c, list]), "Hm?") is False
    assert capsys.readouterr().out == "word \n"
    assert chat.say(Talk([list, list]), "Hm?") is True
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_ends_a_program_whose_answer_does_not_stop():
    talk = Talk([list, ctrl_c, ctrl_c])
    talk.stop = list
    with pytest.raises(KeyboardInterrupt):
        chat.say(talk, "Hm?")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_the_request_is_under_way_stops_it_later():
    talk = Talk([list, list, list])
    talk.generation = talk.events

    def events(text, image):
        ctrl_c()
        talk.stops = 0  # lost: nothing was there to be stopped
        return (yield from talk.generation(text, image))

    talk.events = events
    assert chat.say(talk, "Hm?") is False and talk.stops > 0


def test_a_prompt_gets_one_answer_with_the_words_alone_on_stdout(arguments):
    result = subprocess.run(
        [*arguments, "--prompt=Hm?"],
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm-kitty"},  # but stdout is a pipe
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "tokens/s" in result.stderr and "Hm?" not in result.stderr  # never logged
    assert "tokens/s" not in result.stdout and result.stdout.endswith("\n")
    assert "\x1b" not in result.stdout + result.stderr


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
    chat.converse(Talk(), None, Typed(tmp_path / "history"))
    assert (shown[0] == tiny.image(1)).all()


def test_speed_leaves_the_first_token_out_of_the_rate():
    usage = Usage(
        prompt_tokens=50, answer_tokens=21, seconds_to_first_token=0.5, seconds=1.5
    )
    assert chat.speed(usage) == "First token after 0.50 s, 20.0 tokens/s (21 tokens)."
    whole = dataclasses.replace(usage, seconds_to_first_token=1.5)
    assert chat.speed(whole) == "Answer after 1.50 s (21 tokens)."


def test_the_bundled_photo_is_there():
    assert chat.PHOTO.is_file()
