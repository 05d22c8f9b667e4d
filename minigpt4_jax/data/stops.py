"""Stop strings as a table over tokens: state and token -> state, or FOUND.

What a text so far shares with the beginnings of the stop strings is one of few states
(Aho and Corasick, 1975), so that a compiled loop sees a stop string end, whatever the
tokens that spell it. S is a state, V a token, N a byte.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minigpt4_jax.data.tokens import SentencePieceTokenizer, Tokenizer

FOUND = -1  # instead of a state: a stop string has come


@dataclass(frozen=True)
class Stops:
    """The table of some stop strings.

    next_SV: int32, the state after a token.
    first: the state before the first token of an answer that starts, where a LLaMA
        tokenizer's dummy space is dropped. An answer that goes on from given words
        begins in state 0.
    """

    next_SV: np.ndarray
    first: int


def stops(strings: Sequence[str], pieces: Sequence[bytes], *, dummy: bool) -> Stops:
    """The table of `strings` over tokens that stand for `pieces`.

    Args:
        dummy: whether the first token loses a leading space.
    """
    byte_SN = _bytes([string.encode() for string in strings])
    next_SV = _over_tokens(byte_SN, pieces)
    if not dummy or not strings:
        return Stops(next_SV, first=0)
    stripped = [piece.removeprefix(b" ") for piece in pieces]
    first = len(next_SV)
    first_V = _over_tokens(byte_SN, stripped)[0]
    # What stands for nothing comes before the first token that counts.
    first_V = np.where([not piece for piece in pieces], first, first_V)
    return Stops(np.concatenate([next_SV, first_V[None]]), first)


def vocabulary(tokenizer: Tokenizer, size: int) -> tuple[list[bytes], bool]:
    """`pieces` and `dummy` of `stops`, for the ids below `size`."""
    pieces = [tokenizer.token_bytes(token) for token in range(size)]
    return pieces, isinstance(tokenizer, SentencePieceTokenizer)


def _bytes(strings: Sequence[bytes]) -> np.ndarray:
    """The same table over single bytes, [S N]; states are beginnings, "" the first."""
    states = sorted({s[:i] for s in strings for i in range(len(s))} | {b""}, key=len)
    number = {state: i for i, state in enumerate(states)}
    table = np.zeros((len(states), 256), np.int32)
    for state, row in zip(states, table):
        for byte in {byte for string in strings for byte in string}:
            text = state + bytes([byte])
            if text.endswith(tuple(strings)):
                row[byte] = FOUND
            else:
                ends = (text[i:] for i in range(len(text) + 1))
                row[byte] = number[next(end for end in ends if end in number)]
    return table


def _over_tokens(byte_SN: np.ndarray, pieces: Sequence[bytes]) -> np.ndarray:
    """The table over tokens, from that over bytes N."""
    lengths = np.array([len(piece) for piece in pieces])
    order = np.argsort(-lengths, kind="stable")
    longest = np.array([pieces[token] for token in order], dtype=bytes)
    byte_VL = longest.view(np.uint8).reshape(len(pieces), -1)
    state_SV = np.repeat(np.arange(len(byte_SN))[:, None], len(pieces), axis=1)
    for i in range(lengths.max(initial=0)):
        some = (lengths > i).sum()
        now_SV = state_SV[:, :some]
        state_SV[:, :some] = np.where(
            now_SV == FOUND, FOUND, byte_SN[now_SV, byte_VL[:some, i]]
        )
    next_SV = np.empty_like(state_SV)
    next_SV[:, order] = state_SV
    return next_SV.astype(np.int32)
