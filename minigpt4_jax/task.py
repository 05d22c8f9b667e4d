"""What `config.loss` means: a loss, the batches it is of, and a prompt to look at."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from minigpt4_jax.data import demo_texts, pipeline
from minigpt4_jax.data.images import preprocess, read_image
from minigpt4_jax.data.prompts import (
    CAPTION_END,
    caption_prompt,
    find_template,
    training_prompt,
)
from minigpt4_jax.data.sources import Example
from minigpt4_jax.data.tokens import Tokenizer, lay_out
from minigpt4_jax.engine import Prepared
from minigpt4_jax.generator import Generator
from minigpt4_jax.models.minigpt4 import MiniGPT4, MiniGPT4Config
from minigpt4_jax.request import GREEDY, Request, user
from minigpt4_jax.step import answer_loss, word_loss


@dataclasses.dataclass(frozen=True)
class Task:
    """What a stage trains.

    loss_fn: (model, batch) -> loss.
    batches: (split, step) -> batches from that step on, as numpy arrays.
    prompt: segments that samples are asked with; None while the decoder is not used.
    stop: strings that end such an answer.
    """

    loss_fn: Callable
    batches: Callable[[str, int], Iterator[dict]]
    prompt: list | None
    stop: tuple[str, ...] = ()


def make_task(
    cfg,
    model_cfg: MiniGPT4Config,
    tokenizer: Tokenizer,
    captions: dict[str, Sequence[Sequence[str]]],
    patches: dict[str, np.ndarray],
) -> Task:
    """The task that `cfg.loss` names; captions and patches of each split."""
    order = dict(seed=cfg.seed, batch_size=cfg.batch_size)
    if cfg.loss == "words":
        words = pipeline.vocabulary(captions["train"], tokenizer, cfg.words.least)

        def word_batches(split, step):
            return pipeline.word_batches(
                captions[split], patches[split], tokenizer, *words, **order, start=step
            )

        return Task(word_loss, word_batches, prompt=None)

    num_slots = model_cfg.num_slots
    if cfg.loss == "captions":
        texts = pipeline.caption_texts(tokenizer, num_slots)
        prompt, stop = caption_prompt(), (CAPTION_END,)
    else:
        template = find_template(model_cfg.template)
        share = cfg.dialogues.one_sentence
        texts = pipeline.dialogue_texts(tokenizer, num_slots, template, share)
        prompt = training_prompt(template, demo_texts.ONE_SENTENCE)
        stop = template.stop

    def caption_batches(split, step):
        return pipeline.caption_batches(
            captions[split], patches[split], texts, row=cfg.row, **order, start=step
        )

    return Task(answer_loss, caption_batches, prompt, stop)


def sample(
    model: MiniGPT4, tokenizer: Tokenizer, task: Task, photos: Sequence[Example]
) -> dict[str, str]:
    """The greedy answer about each photo by its key, asked as the task trains.

    The model's decoder may be rearranged in place (engine.py): pass one of your own.
    """
    generator = Generator(model, tokenizer, batch_size=len(photos))
    ids, slots = lay_out(task.prompt, tokenizer, model.cfg.num_slots)
    asked = [
        Prepared(
            request=Request(
                [user("")],
                sampling=dataclasses.replace(GREEDY, max_tokens=32),
                stop=task.stop,
                id=photo.key,
            ),
            ids=np.array(ids, np.int32),
            slots=np.array(slots),
            pixels=(preprocess(read_image(photo.image), model.cfg.vit),),
        )
        for photo in photos
    ]
    answers = {photo.key: "" for photo in photos}
    for event in generator.submit(asked):
        answers[event.request_id] += event.piece
    return answers
