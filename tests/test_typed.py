"""What is typed at a prompt, in a real terminal: editing, history, several lines."""

import stat
import sys

import pytest
from terminals import CTRL_D, TAB, UP, Terminal

from minigpt4_jax import typed

PROGRAM = """
import sys
from pathlib import Path
from minigpt4_jax.typed import Typed

turns = Typed(Path(sys.argv[1]))
while True:
    try:
        print("got", repr(turns.turn()))
    except KeyboardInterrupt:
        print("interrupted")
"""


def at_a_terminal(history) -> Terminal:
    return Terminal([sys.executable, "-c", PROGRAM, str(history)], TERM="xterm")


def turn(monkeypatch, tmp_path, *lines: str) -> str:
    """What one turn gives for these lines, without a terminal."""
    left = iter(lines)
    monkeypatch.setattr("builtins.input", lambda _: next(left))
    text = typed.Typed(tmp_path / "history").turn()
    assert list(left) == []
    return text


@pytest.mark.parametrize(
    "lines, text",
    [
        (["  What is this?  "], "What is this?"),
        ([""], ""),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (["one \\ two"], "one \\ two"),
        (['"""', "one", "", "  two", '"""'], "one\n\n  two"),
        (['"""one', 'two"""  '], "one\ntwo"),
        (['"""one"""'], "one"),
        (['"""', "ends in \\", '"""'], "ends in \\"),
        (['he said """no"""'], 'he said """no"""'),
    ],
)
def test_a_turn_has_one_line_or_several(monkeypatch, tmp_path, lines, text):
    assert turn(monkeypatch, tmp_path, *lines) == text


def test_what_was_typed_comes_back_also_the_next_time(tmp_path):
    history = tmp_path / "cache" / "history"
    with at_a_terminal(history) as terminal:
        terminal.wait_for("> ")
        for line in ("first", "second", "second", " secret", "last\\", "line"):
            terminal.type(line)
            terminal.wait_for("got|[.] ")
        terminal.press(3 * UP + "\n")
        terminal.wait_for("got 'second'")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    kept = ["first", "second", "last\\", "line", "second"]
    assert history.read_text().splitlines() == kept
    with at_a_terminal(history) as terminal:
        terminal.wait_for("> ")
        terminal.press(5 * UP + "!\n")
        terminal.wait_for("got 'first!'")


def test_two_terminals_keep_each_others_lines(tmp_path):
    history = tmp_path / "history"
    with at_a_terminal(history) as one, at_a_terminal(history) as other:
        for terminal in (one, other):
            terminal.wait_for("> ")
        one.type("from one")
        one.wait_for("got")
        other.type("from the other")
        other.wait_for("got")
    assert history.read_text().splitlines() == ["from one", "from the other"]


def test_a_history_is_cut_to_its_newest_lines(tmp_path):
    history = tmp_path / "history"
    history.write_text("".join(f"{i}\n" for i in range(typed.LONGEST)))
    with at_a_terminal(history) as terminal:
        terminal.wait_for("> ")
        terminal.type("new")
        terminal.wait_for("got")
    lines = history.read_text().splitlines()
    assert len(lines) == typed.LONGEST
    assert (lines[0], lines[-1]) == ("1", "new")


def test_ctrl_c_throws_away_what_was_begun_and_ctrl_d_ends(tmp_path):
    with at_a_terminal(tmp_path / "history") as terminal:
        terminal.wait_for("> ")
        terminal.type('"""begun')
        terminal.wait_for("[.] ")
        terminal.press("more")
        terminal.interrupt("interrupted\r\n.*> ")
        terminal.type("anew")
        terminal.wait_for("got 'anew'")
        terminal.press(CTRL_D)
        terminal.wait_for("EOFError")


def test_tab_completes_the_name_of_a_file(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with at_a_terminal(tmp_path / "history") as terminal:
        terminal.wait_for("> ")
        terminal.press(f"/image {tmp_path}/holi" + TAB + "\n")
        terminal.wait_for(r"got '/image .*/holiday\.jpg'")


def test_lines_that_were_pasted_together_are_one_turn(tmp_path):
    with at_a_terminal(tmp_path / "history") as terminal:
        terminal.wait_for("> ")
        terminal.press("\x1b[200~one\ntwo\x1b[201~\n")
        terminal.wait_for(r"got 'one\\ntwo'")


def test_a_history_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "history").mkdir()
    assert turn(monkeypatch, tmp_path, "Hm?") == "Hm?"


def test_a_prompt_is_not_among_the_answers_of_a_pipe(monkeypatch, tmp_path, capsys):
    shown = []
    monkeypatch.setattr("builtins.input", lambda prompt: shown.append(prompt) or "Hm?")
    typed.Typed(tmp_path / "history").turn()
    assert (shown, *capsys.readouterr()) == ([""], "", "> ")
