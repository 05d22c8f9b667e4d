"""Stop strings as a table: it finds what a search in the text finds."""

import random

import pytest
import tiny

from minigpt4_jax.data.stops import FOUND, Stops, stops, vocabulary
from minigpt4_jax.data.tokens import SentencePieceTokenizer, TextStream

LETTERS = ["a", "b", "aa", "ab", "ba", "aab", "", "bbab"]
STRINGS = [["aab"], ["ab", "bb"], ["aaaa", "ba"], ["abab", "bab"]]


def walk(table: Stops, ids, state: int) -> int | None:
    """How many tokens it takes until a stop string has come."""
    for count, token in enumerate(ids, 1):
        state = table.next_SV[state, token]
        if state == FOUND:
            return count
    return None


def searched(strings, texts) -> int | None:
    text = ""
    for count, piece in enumerate(texts, 1):
        text += piece
        if any(string in text for string in strings):
            return count
    return None


@pytest.mark.parametrize("strings", STRINGS, ids=str)
def test_a_stop_string_is_found_with_the_token_that_completes_it(strings):
    table = stops(strings, [piece.encode() for piece in LETTERS], dummy=False)
    rng = random.Random(0)
    found = set()
    for _ in range(300):
        ids = rng.choices(range(len(LETTERS)), k=rng.randint(1, 9))
        wanted = searched(strings, [LETTERS[token] for token in ids])
        assert walk(table, ids, table.first) == wanted
        found.add(wanted)
    assert len(found) > 4 and None in found


def test_without_strings_nothing_is_found():
    table = stops([], [b"a", b"bc"], dummy=False)
    assert table.next_SV.tolist() == [[0, 0]] and table.first == 0


def test_both_encodings_of_the_vicuna_stop_are_found():
    tokenizer = tiny.tokenizer()
    pieces, dummy = vocabulary(tokenizer, tokenizer.size)
    table = stops(["###"], pieces, dummy=dummy)
    hash_, double, other = (tokenizer.encode(text)[0] for text in ("#", "##", "x"))
    assert hash_ != double
    for ids in ([hash_] * 3, [double, hash_], [hash_, double], [other, double, hash_]):
        assert walk(table, ids, table.first) == len(ids)
    assert walk(table, [double, other, hash_], table.first) is None


class Spaced(SentencePieceTokenizer):
    """A LLaMA tokenizer of given pieces."""

    def __init__(self, pieces):
        self.pieces = pieces

    def token_bytes(self, token):
        return self.pieces[token]


def test_a_dummy_space_is_no_part_of_a_stop_string():
    pieces = [b"", b" ", b" x", b"x", b"y x"]
    tokenizer = Spaced(pieces)
    made = vocabulary(tokenizer, len(pieces))
    assert made == (pieces, True)
    table = stops([" x"], pieces, dummy=True)
    rng = random.Random(1)
    for _ in range(200):
        ids = rng.choices(range(len(pieces)), k=4)
        for starts in (True, False):
            stream = TextStream(tokenizer, starts)
            wanted = searched([" x"], [stream.push([token]) for token in ids])
            assert walk(table, ids, table.first if starts else 0) == wanted
