"""Training rows: (prompt, answers) of a photo -> fixed-length arrays, and their order.

What stands in row r of step s follows from the seed and the index alone: the order of an
epoch is a permutation drawn from (seed, epoch), and all choices about an example are
drawn from (seed, epoch, example).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from minigpt4_jax.data import demo_texts
from minigpt4_jax.data.prompts import (
    Template,
    caption_answer,
    caption_prompt,
    training_answer,
    training_prompt,
)
from minigpt4_jax.data.tokens import Tokenizer, lay_out
from minigpt4_jax.errors import ConfigError, DataError

BRANCHES = 256  # as in models/layers.py; a test holds them equal
Turn = tuple[list[int], list[bool], list[int]]  # ids and slots of a prompt, answer ids
Texts = Callable[[Sequence[str], np.random.Generator], list[Turn]]


def caption_texts(tokenizer: Tokenizer, num_slots: int) -> Texts:
    """Stage 1: no prompt at all, each caption is an answer."""

    def texts(captions, rng):
        ids, slots = lay_out(caption_prompt(), tokenizer, num_slots)
        answers = [
            lay_out(caption_answer(caption), tokenizer, num_slots, bos=False)[0]
            for caption in captions
        ]
        return [(ids, slots, answers[i]) for i in rng.permutation(len(answers))]

    return texts


def dialogue_texts(
    tokenizer: Tokenizer,
    num_slots: int,
    template: Template,
    one_sentence_share: float,
) -> Texts:
    """Stage 2: questions and answers derived from the captions (demo_texts.py).

    `one_sentence_share` of the rows answer one question with every caption of the
    photo; the others mix a detailed description and short questions.
    """

    def encode(question, answer) -> Turn:
        ids, slots = lay_out(training_prompt(template, question), tokenizer, num_slots)
        answer = training_answer(template, answer)
        return ids, slots, lay_out(answer, tokenizer, num_slots, bos=False)[0]

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
        return [encode(*turns[i]) for i in rng.permutation(len(turns))]

    return texts


def pack(turns: Sequence[Turn], length: int, answer_length: int) -> dict:
    """One row in which the turns about one photo share what their prompts share.

    The longest common beginning of the prompts, which must hold all slots, is read
    once; each turn goes on from it as a branch that sees no other (attention_mask in
    models/layers.py). A turn that no longer fits is left out, the first one is cut.

    Returns:
        ids_T, slots_T, segments_T, positions_T; answer_ids_A: tokens to be predicted;
        answer_from_A: the places whose output predicts them; loss_mask_A.
    """
    assert 0 < len(turns) < BRANCHES
    prompts = [list(zip(ids, slots, strict=True)) for ids, slots, _ in turns]
    shared = _common(prompts)
    if any(slot for prompt in prompts for _, slot in prompt[shared:]):
        raise DataError("turns of a row differ before the image ends; cannot share it")
    row = {
        "ids_T": np.zeros(length, np.int32),
        "slots_T": np.zeros(length, bool),
        "segments_T": np.zeros(length, np.int32),
        "positions_T": np.zeros(length, np.int32),
        "answer_ids_A": np.zeros(answer_length, np.int32),
        "answer_from_A": np.zeros(answer_length, np.int32),
        "loss_mask_A": np.zeros(answer_length, np.float32),
    }
    row["ids_T"][:shared] = [token for token, _ in prompts[0][:shared]]
    row["slots_T"][:shared] = [slot for _, slot in prompts[0][:shared]]
    row["segments_T"][:shared] = BRANCHES
    row["positions_T"][:shared] = np.arange(shared)
    first = len(prompts[0])
    if first >= length:
        raise DataError(
            f"a prompt of {first} tokens leaves no room for an answer in a row of "
            f"{length}; raise config.row.tokens"
        )
    at, answered = shared, 0
    for branch, (ids, _, answer) in enumerate(turns, start=1):
        own = ids[shared:]
        if branch > 1 and (
            at + len(own) + len(answer) - 1 > length
            or answered + len(answer) > answer_length
        ):
            continue
        answer = answer[: min(answer_length, length - at - len(own) + 1)]
        tokens = [*own, *answer[:-1]]  # the last answer token is predicted, not read
        places = np.arange(at, at + len(tokens))
        row["ids_T"][places] = tokens
        row["segments_T"][places] = BRANCHES + branch
        row["positions_T"][places] = shared + np.arange(len(tokens))
        read = np.concatenate([[shared - 1], places])[len(own) :]
        span = slice(answered, answered + len(answer))
        row["answer_ids_A"][span] = answer
        row["answer_from_A"][span] = read
        row["loss_mask_A"][span] = 1
        at, answered = at + len(tokens), answered + len(answer)
    return row


def order(seed: int, num_examples: int, batch_size: int, step: int) -> list:
    """(epoch, example) of each row of a step; epochs follow each other without a gap."""
    rows = range(step * batch_size, (step + 1) * batch_size)
    permutations = {
        epoch: np.random.default_rng([seed, epoch]).permutation(num_examples)
        for epoch in {row // num_examples for row in rows}
    }
    return [
        (
            row // num_examples,
            int(permutations[row // num_examples][row % num_examples]),
        )
        for row in rows
    ]


def caption_batches(
    captions: Sequence[Sequence[str]],
    patches,
    texts: Texts,
    *,
    seed: int,
    batch_size: int,
    row,
    start: int = 0,
) -> Iterator[dict]:
    """Batches from step `start` on: rows of `pack` stacked, and patches_BPE.

    Args:
        captions: of each example.
        patches: [examples P E], array or memory map.
        row: has `tokens` and `answers`, the lengths T and A.
    """
    step = start
    while True:
        picks = order(seed, len(captions), batch_size, step)
        rows = []
        for epoch, i in picks:
            rng = np.random.default_rng([seed, epoch, i + 1])  # 0 would be order's own
            rows.append(pack(texts(captions[i], rng), row.tokens, row.answers))
        batch = {
            name[:-1] + "B" + name[-1]: np.stack([r[name] for r in rows])
            for name in rows[0]
        }
        images = [i for _, i in picks]
        batch["patches_BPE"] = np.asarray(patches[images], np.float32)
        yield batch
        step += 1


def vocabulary(
    captions: Sequence[Sequence[str]], tokenizer: Tokenizer, least: int
) -> tuple[np.ndarray, np.ndarray]:
    """words_V, the tokens found in at least `least` captions, and share_V, the share of
    captions that each is in."""
    counts: Counter[int] = Counter()
    total = 0
    for texts in captions:
        total += len(texts)
        for text in texts:
            counts.update(set(tokenizer.encode(text)))
    words = sorted(token for token, n in counts.items() if n >= least)
    if not words:
        raise ConfigError(f"no token is in {least} captions; lower config.words.least")
    # A word of every caption would have an infinite logit.
    share = [min(counts[word], total - 0.5) / total for word in words]
    return np.array(words, np.int32), np.array(share, np.float32)


def word_batches(
    captions: Sequence[Sequence[str]],
    patches,
    tokenizer: Tokenizer,
    words_V,
    share_V,
    *,
    seed: int,
    batch_size: int,
    start: int = 0,
) -> Iterator[dict]:
    """Batches for the warm start: patches_BPE; target_BV, the share of a photo's captions
    that hold each word; and `vocabulary`'s words_V and share_V."""
    column = {int(word): i for i, word in enumerate(words_V)}
    targets = np.zeros((len(captions), len(words_V)), np.float16)
    for i, texts in enumerate(captions):
        for text in texts:
            found = [column[t] for t in set(tokenizer.encode(text)) if t in column]
            targets[i, found] += 1 / len(texts)
    step = start
    while True:
        images = [i for _, i in order(seed, len(captions), batch_size, step)]
        yield {
            "patches_BPE": np.asarray(patches[images], np.float32),
            "target_BV": targets[images].astype(np.float32),
            "words_V": words_V,
            "share_V": share_V,
        }
        step += 1


def _common(prompts: Sequence[list]) -> int:
    """Length of the longest beginning that all lists share."""
    length = 0
    for entries in zip(*prompts, strict=False):
        if any(entry != entries[0] for entry in entries):
            break
        length += 1
    return length
