"""Text of an answer: whole characters, stop strings wherever tokens are cut."""

import pytest
import tiny

from minigpt4_jax.answer import Answer
from minigpt4_jax.request import FAILURES

TOKENIZER = tiny.tokenizer()
END = TOKENIZER.eos_ids


def streamed(text: str, *, chunk: int = 1, limit: int = 99, end=True, **kw):
    """(pieces, answer) of a text that is pushed `chunk` tokens at a time."""
    ids = TOKENIZER.encode(text) + ([END[0]] if end else [])
    answer = Answer(TOKENIZER, **kw)
    pieces = []
    for i in range(0, len(ids), chunk):
        answer.push(ids[i : i + chunk], END, limit)
        pieces.append(answer.piece())
        if answer.finish_reason:
            break
    return pieces, answer


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("a cat sat.", [], "a cat sat."),
        ("a cat ###Human: hi", ["###"], "a cat"),
        ("a cat####", ["###"], "a cat"),
        ("a # b ## c", ["###"], "a # b ## c"),
        ("one two three", ["two t"], "one"),
        ("the thin cat.", ["cat", "thin c"], "the"),
        ("\n  a cat \n", [], "a cat"),
        ("###", ["###"], ""),
        ("a cat##", ["###"], "a cat##"),
    ],
)
def test_an_answer_ends_before_the_first_stop_string(text, stop, wanted, chunk):
    pieces, answer = streamed(text, chunk=chunk, stop=stop)
    assert "".join(pieces) == wanted
    assert answer.finish_reason == "stop"


def test_no_piece_is_the_start_of_a_stop_string_or_trailing_space():
    pieces, _ = streamed("a # cat ## and### more", stop=["###"])
    so_far = ""
    for piece in pieces:
        so_far += piece
        assert "a # cat ## and".startswith(so_far)
        assert so_far == so_far.rstrip()
    assert so_far == "a # cat ## and"


def test_pieces_are_whole_characters():
    text = "naïve 🐈 猫 👩‍👩‍👧"
    ids = TOKENIZER.encode(text)
    assert len(ids) > len(text)
    pieces, answer = streamed(text)
    assert "".join(pieces) == answer.text == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_marked():
    ids = TOKENIZER.encode("🐈")[:-1]
    answer = Answer(TOKENIZER)
    answer.push(ids, END, 99)
    assert answer.piece() == ""
    answer.push([END[0]], END, 99)
    assert set(answer.piece()) == {"\ufffd"}


def test_tokens_behind_the_end_are_not_taken():
    ids = [*TOKENIZER.encode("ab"), END[0], *TOKENIZER.encode("cd")]
    answer = Answer(TOKENIZER)
    assert answer.push(ids, END, 99) == answer.count == 3
    assert (answer.piece(), answer.finish_reason) == ("ab", "stop")


def test_an_answer_that_reaches_its_limit_ends_with_length():
    pieces, answer = streamed("bcdefg", limit=4)
    assert ("".join(pieces), answer.finish_reason) == ("bcde", "length")


def test_a_stop_string_in_the_last_token_allowed_wins_over_length():
    _, answer = streamed("bcd", limit=3, stop=["d"])
    assert (answer.text, answer.finish_reason) == ("bc", "stop")


def test_a_continued_answer_keeps_its_first_space():
    pieces, _ = streamed(" cat", starts=False)
    assert "".join(pieces) == " cat"


def test_a_sequence_of_ids_ends_an_answer_where_another_spelling_goes_on():
    merged = TOKENIZER.encode("###")
    assert len(merged) == 2
    stops = [tuple(merged), (999,)]
    alike = TOKENIZER.encode("a") + TOKENIZER.encode("#") + TOKENIZER.encode("##")
    for ids, reason in ((alike, None), (TOKENIZER.encode("a") + merged, "stop")):
        answer = Answer(TOKENIZER, sequences=stops)
        for token in ids:
            answer.push([token], END, 99)
        assert (answer.text, answer.finish_reason) == ("a###", reason)


def test_a_whole_answer_is_sent_at_its_end():
    pieces, answer = streamed(" a cat", limit=9, whole=lambda text: text.upper() + "!")
    assert set(pieces[:-1]) == {""}
    assert pieces[-1] == "A CAT!"


@pytest.mark.parametrize("failure", FAILURES)
def test_a_row_that_cannot_go_on_ends_with_the_reason(failure):
    answer = Answer(TOKENIZER)
    assert answer.push([*TOKENIZER.encode("ab"), failure, 99], END, 99) == 2
    assert (answer.piece(), answer.finish_reason) == ("ab", "error")
    assert (answer.error, answer.count) == (FAILURES[failure], 2)
    assert answer.error.count(". ") == 0
