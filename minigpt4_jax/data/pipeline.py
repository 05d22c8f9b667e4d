"""What a step learns from: captions of its examples -> texts -> arrays.

All choices about an example are drawn from (seed, source, epoch, example), so that what
stands in a batch follows from the plan alone.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from tqdm import tqdm

from minigpt4_jax import alive
from minigpt4_jax.data import demo_texts
from minigpt4_jax.data.plan import Plan
from minigpt4_jax.data.prompts import (
    ALIGNMENT_QUESTIONS,
    Template,
    caption_answer,
    caption_prompt,
    training_answer,
    training_prompt,
)
from minigpt4_jax.data.rows import (
    Piece,
    RowSizes,
    Turn,
    encode,
    lay_out,
    lengths,
    row_sizes,
    share_out,
)
from minigpt4_jax.data.texts import Clean, as_written
from minigpt4_jax.data.tokens import Tokenizer
from minigpt4_jax.data.tokens import lay_out as lay_out_prompt
from minigpt4_jax.errors import ConfigError

Texts = Callable[[Sequence[str], np.random.Generator], list[Turn]]


class Captioned(Protocol):
    """What is read of a data set here (data/sources.py: Examples)."""

    def __len__(self) -> int: ...
    def captions(self, index: int) -> Sequence[str]: ...


# Texts.


def caption_texts(
    tokenizer: Tokenizer,
    num_slots: int,
    *,
    clean: Clean = as_written,
    limit: int = 0,
    one: bool = False,
) -> Texts:
    """Stage 1: no prompt at all, each caption is an answer.

    Args:
        limit: tokens that an answer keeps, its end included; 0: all (the reference's
            max_txt_len, which costs a long answer its end).
        one: a caption drawn of each image instead of all, in an order drawn.
    """
    prompt = lay_out_prompt(caption_prompt(), tokenizer, num_slots)

    def texts(captions, rng):
        return [
            (*prompt, _answer(caption_answer(clean(caption)), tokenizer, limit))
            for caption in _drawn(captions, rng, one)
        ]

    return texts


def description_texts(
    tokenizer: Tokenizer,
    num_slots: int,
    template: Template,
    *,
    clean: Clean = as_written,
    limit: int = 0,
    one: bool = False,
) -> Texts:
    """Stage 2 of the reference: a request drawn for each example, a caption answers it."""
    prompts = [
        lay_out_prompt(training_prompt(template, question), tokenizer, num_slots)
        for question in ALIGNMENT_QUESTIONS
    ]

    def texts(captions, rng):
        prompt = prompts[rng.integers(len(prompts))]
        return [
            (*prompt, _answer(training_answer(template, clean(c)), tokenizer, limit))
            for c in _drawn(captions, rng, one)
        ]

    return texts


def dialogue_texts(
    tokenizer: Tokenizer,
    num_slots: int,
    template: Template,
    one_sentence_share: float,
    *,
    limit: int = 0,
) -> Texts:
    """Stage 2 of the demo: questions and answers derived from captions (demo_texts.py).

    `one_sentence_share` of the examples answer one question with every caption of the
    photo; the others mix a detailed description and short questions.
    """

    def turn(question: str, answer: str) -> Turn:
        prompt = training_prompt(template, question)
        ids, slots = lay_out_prompt(prompt, tokenizer, num_slots)
        return ids, slots, _answer(training_answer(template, answer), tokenizer, limit)

    def texts(captions, rng):
        one_sentence = demo_texts.one_sentence(captions, rng)
        others = []
        if rng.random() >= one_sentence_share:  # deriving them takes a while
            others = demo_texts.in_detail(captions, rng)
            others += demo_texts.short_questions(captions, rng)
        if others:
            turns = [one_sentence[rng.integers(len(one_sentence))], *others]
        else:
            question = one_sentence[0][0]
            turns = [(question, answer) for _, answer in one_sentence]
        return [turn(*turns[i]) for i in rng.permutation(len(turns))]

    return texts


def _answer(segments, tokenizer: Tokenizer, limit: int) -> list[int]:
    ids = lay_out_prompt(segments, tokenizer, 0, bos=False)[0]
    return ids[:limit] if limit else ids


def _drawn(captions: Sequence[str], rng: np.random.Generator, one: bool) -> list[str]:
    if one:
        return [captions[rng.integers(len(captions))]]
    return [captions[i] for i in rng.permutation(len(captions))]


# Arrays of a step.


class AnswerArrays:
    """(step, picks) -> the arrays of data/rows.py, for losses of answer tokens.

    Args:
        sources: the data sets, in the order of the plan.
        tokens, answers: most that one example may have of each.
        counts: of each source, its Examples.token_counts with texts.WITH_END, where
            `texts` are caption_texts: then most lengths are known without making them.
        limit: of `texts`.

    Attributes:
        sizes: shape of the arrays; None: a row of `tokens` for each example.
        packed: whether several examples share a row, which takes `sizes`.
    """

    def __init__(
        self,
        sources: Sequence[Captioned],
        texts: Texts,
        *,
        seed: int,
        num_slots: int,
        tokens: int,
        answers: int,
        counts: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
        limit: int = 0,
    ):
        self.sources, self.texts = list(sources), texts
        self.seed, self.num_slots = seed, num_slots
        self.tokens, self.answers = tokens, answers
        self.counts, self.limit = counts, limit
        self.sizes: RowSizes | None = None
        self.packed = False

    def __getstate__(self) -> dict:
        return self.__dict__ | {"counts": None}  # large, and no worker needs them

    def __call__(self, step: int, picks: np.ndarray) -> dict[str, np.ndarray]:
        pieces = [self.piece(*pick) for pick in picks.tolist()]
        sizes = self.sizes
        if sizes is None:
            assert not self.packed, "packed rows need the sizes that row_sizes finds"
            sizes = RowSizes(len(pieces), self.tokens, self.answers, padding=0.0)
        if not self.packed:
            return lay_out(pieces, sizes, self.num_slots, np.arange(len(pieces)))
        rows = share_out(lengths(pieces)[None], sizes.rows, sizes.parts)[0]
        # Each part with its own images: not in the order of the plan.
        order = np.argsort(rows // (sizes.rows // sizes.parts), kind="stable")
        pieces = [pieces[b] for b in order]
        return lay_out(pieces, sizes, self.num_slots, rows[order]) | {"order_B": order}

    def piece(self, source: int, epoch: int, example: int) -> Piece:
        """One example of the plan."""
        # example + 1: [seed, source, epoch] is the key of the plan's own draws.
        rng = np.random.default_rng([self.seed, source, epoch, example + 1])
        turns = self.texts(self.sources[source].captions(example), rng)
        return encode(turns, self.tokens, self.answers)

    def fit(self, plan: Plan, steps: range, packed: int = 0, multiple: int = 1) -> None:
        """Set `sizes` to the smallest that hold these steps of the plan (row_sizes)."""
        shown = tqdm(steps, "lengths", disable=None)
        found = []
        for step in shown:
            found.append(self.lengths(plan.picks(step)))
            alive.sign()
        tokens_SB, answers_SB = (np.array(part) for part in zip(*found, strict=True))
        self.sizes = row_sizes(tokens_SB, answers_SB, packed=packed, multiple=multiple)
        self.packed = packed > 0

    def lengths(self, picks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and answer tokens of each example."""
        tokens_B = np.zeros(len(picks), np.int32)
        answers_B = np.zeros(len(picks), np.int32)
        if self.counts is not None:
            self._count(picks, tokens_B, answers_B)
        for b in np.flatnonzero(answers_B < 1):
            piece = self.piece(*picks[b].tolist())
            tokens_B[b] = piece.tokens_4T.shape[1]
            answers_B[b] = piece.answers_2A.shape[1]
        return tokens_B, answers_B

    def _count(self, picks: np.ndarray, tokens_B, answers_B) -> None:
        """Fill in the lengths of examples with one caption, on which nothing is drawn."""
        assert self.counts is not None
        shared = 1 + self.num_slots  # BOS and the image
        for source, (starts, counts) in enumerate(self.counts):
            own = np.flatnonzero(picks[:, 0] == source)
            first = starts[picks[own, 2]]
            single = starts[picks[own, 2] + 1] - first == 1
            own, first = own[single], first[single]
            most = min(
                self.limit or self.answers, self.answers, self.tokens - shared + 1
            )
            answers_B[own] = np.minimum(counts[first], most)
            tokens_B[own] = shared + answers_B[own] - 1


class WordArrays:
    """(step, picks) -> target_BV, the share of a photo's captions that hold each word,
    and `vocabulary`'s words_V and share_V; for the warm start."""

    def __init__(self, sources: Sequence[Captioned], tokenizer, words_V, share_V):
        self.sources, self.tokenizer = list(sources), tokenizer
        self.words_V, self.share_V = words_V, share_V
        self.column = {int(word): i for i, word in enumerate(words_V)}

    def __call__(self, step: int, picks: np.ndarray) -> dict[str, np.ndarray]:
        target_BV = np.zeros((len(picks), len(self.words_V)), np.float32)
        for target_V, (source, _, example) in zip(target_BV, picks.tolist()):
            captions = self.sources[source].captions(example)
            for text in captions:
                words = set(self.tokenizer.encode(text))
                found = [self.column[word] for word in words if word in self.column]
                target_V[found] += 1 / len(captions)
        return {
            "target_BV": target_BV,
            "words_V": self.words_V,
            "share_V": self.share_V,
        }


def vocabulary(
    sources: Sequence[Captioned], tokenizer: Tokenizer, least: int
) -> tuple[np.ndarray, np.ndarray]:
    """words_V, the tokens found in at least `least` captions, and share_V, the share of
    captions that each is in."""
    counts: Counter[int] = Counter()
    total = 0
    for source in sources:
        for i in range(len(source)):
            texts = source.captions(i)
            total += len(texts)
            for text in texts:
                counts.update(set(tokenizer.encode(text)))
    words = sorted(token for token, n in counts.items() if n >= least)
    if not words:
        raise ConfigError(
            f"no token is in {least} captions; lower config.text.words_least"
        )
    # A word of every caption would have an infinite logit.
    share = [min(counts[word], total - 0.5) / total for word in words]
    return np.array(words, np.int32), np.array(share, np.float32)
