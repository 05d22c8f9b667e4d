"""What a terminal can show is told by its environment, and a pipe shows nothing."""

import io

import pytest

from minigpt4_jax import terminal
from minigpt4_jax.terminal import ITERM, KITTY, PALETTE, TRUE_COLOUR

XTERM = {"TERM": "xterm-256color"}
TRUE = XTERM | {"COLORTERM": "truecolor"}


class Stream(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def __init__(self, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding)

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "env, kind",
    [
        ({}, None),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, None),
        ({"TERM": "xterm"}, None),
        (XTERM, PALETTE),
        (TRUE, TRUE_COLOUR),
        ({"TERM": "xterm-kitty", "COLORTERM": "truecolor"}, KITTY),
        ({"TERM": "xterm-ghostty"}, KITTY),
        (XTERM | {"KITTY_WINDOW_ID": "1"}, KITTY),
        (TRUE | {"TERM_PROGRAM": "iTerm.app"}, ITERM),
        (TRUE | {"TERM_PROGRAM": "WezTerm"}, ITERM),
        (XTERM | {"LC_TERMINAL": "iTerm2"}, ITERM),
        (TRUE | {"TERM_PROGRAM": "vscode"}, TRUE_COLOUR),
        # tmux runs in kitty, and draws by itself.
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, PALETTE),
        (TRUE | {"KITTY_WINDOW_ID": "1", "TMUX": "/tmp/x,1,0"}, TRUE_COLOUR),
    ],
)
def test_the_best_picture_that_a_terminal_shows_is_chosen(env, kind):
    assert terminal.pictures(Stream(), env) == kind
    assert terminal.pictures(Stream(), env | {"NO_COLOR": "1"}) is None
    assert terminal.pictures(io.StringIO(), env) is None  # a file, a pipe


def test_half_blocks_need_their_letter():
    assert terminal.pictures(Stream("latin-1"), TRUE) is None
    assert terminal.pictures(Stream("latin-1"), {"TERM": "xterm-kitty"}) == KITTY


def test_a_note_is_dim_on_a_terminal_alone(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal.dim("note", Stream()) == "\x1b[2mnote\x1b[0m"
    assert terminal.dim("note", io.StringIO()) == "note"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.dim("note", Stream()) == "note"
    monkeypatch.setenv("NO_COLOR", "")  # empty is as good as absent: no-color.org
    monkeypatch.setenv("TERM", "dumb")
    assert terminal.dim("note", Stream()) == "note"


def test_what_a_terminal_would_obey_is_not_printed():
    assert terminal.printable("a\x1b[2Jb\n猫\x07") == "a[2Jb\n猫"
