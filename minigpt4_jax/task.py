"""What a config trains: a loss, the batches it is of, and what is looked at."""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from minigpt4_jax import features, sharding
from minigpt4_jax.data import demo_texts, pipeline
from minigpt4_jax.data.feature_files import FeatureFiles
from minigpt4_jax.data.images import preprocess, read_image
from minigpt4_jax.data.loader import Loader, ReadPixels
from minigpt4_jax.data.plan import Plan
from minigpt4_jax.data.prompts import (
    ALIGNMENT_QUESTIONS,
    CAPTION_END,
    caption_prompt,
    find_template,
    training_prompt,
)
from minigpt4_jax.data.sources import Example, Examples
from minigpt4_jax.data.texts import CLEAN, WITH_END
from minigpt4_jax.data.tokens import Tokenizer, lay_out
from minigpt4_jax.errors import ConfigError, InputError
from minigpt4_jax.generator import Generator
from minigpt4_jax.models.minigpt4 import MiniGPT4
from minigpt4_jax.models.vit import ViTConfig
from minigpt4_jax.reading import Prepared
from minigpt4_jax.request import GREEDY, Request, user
from minigpt4_jax.step import answer_loss, word_loss

logger = logging.getLogger(__name__)

HELD_OUT = 64  # examples of val whose loss is logged, at most
SAMPLES = 4  # photos that the model describes
ARRAYS = {"patches": "patches_BPE", "queries": "queries_BQD"}


@dataclasses.dataclass(frozen=True)
class Task:
    """What a run trains.

    loss_fn: (model, batch) -> (sum of losses, their number).
    loader: a new loader of the run's batches, `optim.accumulate` a step.
    val_batches: always the same ones, as numpy arrays; [] without val.
    photos: what samples are asked about, of val if there is one.
    part: what a batch has of its images (features.frozen_part).
    prompt: segments that samples are asked with; None while the decoder is not used.
    stop: strings that end such an answer.
    vocabulary_size: of what the loss chooses from; None: the loss is another one.
    """

    loss_fn: Callable
    loader: Callable[[], Loader]
    val_batches: list[dict]
    photos: list[Example]
    part: str
    prompt: list | None
    stop: tuple[str, ...] = ()
    vocabulary_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Texts:
    """What `config.loss` says about an image, and how a sample is asked for."""

    texts: pipeline.Texts
    prompt: list
    stop: tuple[str, ...]


def make_task(
    cfg,
    model: MiniGPT4,
    trainable: Sequence[str],
    tokenizer: Tokenizer,
    sources: Sequence[Examples],
    val: Examples | None,
    mesh,
    workdir: Path,
) -> Task:
    """The task of a config.

    Args:
        trainable: parameter paths.
        sources: in the order of config.data.
        workdir: where features are kept unless config.cache.folder says else.
    """
    part = features.frozen_part(model.cfg, trainable)
    folder = Path(cfg.cache.folder).expanduser() if cfg.cache.folder else None
    folder = folder or workdir / "features"
    images = _images(cfg.cache.dtype, model, part, folder, mesh)
    size, host = cfg.batch_size // cfg.optim.accumulate, sharding.host_part(mesh)
    weights = [source.weight for source in cfg.data.values()]
    plan = Plan([len(found) for found in sources], weights, cfg.seed, size)
    make, held_out, texts = _arrays(cfg, model.cfg, tokenizer, sources, val)
    if cfg.row.packed and isinstance(make, pipeline.AnswerArrays):
        batches = range(cfg.optim.total_steps * cfg.optim.accumulate)
        make.fit(plan, batches, cfg.row.packed, sharding.batch_parts(mesh))
        logger.info("packed: %s", make.sizes)
    of_images = images(sources)

    def loader() -> Loader:
        return Loader(
            sources,
            plan,
            make,
            stop=cfg.optim.total_steps * cfg.optim.accumulate,
            part=host,
            **of_images,
            **cfg.loader,
        )

    val_batches: list[dict] = []
    if val is not None:
        count = max(1, min(HELD_OUT, len(val)) // size)  # none of them twice
        few = Plan([len(val)], [1], cfg.seed, size)
        if isinstance(held_out, pipeline.AnswerArrays):
            held_out.fit(few, range(count))  # rows as long as these examples
        knobs = dict(stop=count, part=host, workers=0, prefetch=1, budget=1.0)
        held_out_loader = Loader([val], few, held_out, **images([val]), **knobs)
        val_batches = list(itertools.islice(held_out_loader, count))
    return Task(
        answer_loss if texts else word_loss,
        loader,
        val_batches,
        _readable(sources[0] if val is None else val) if texts else [],
        part,
        texts.prompt if texts else None,
        texts.stop if texts else (),
        model.cfg.llama.vocab_size if texts else None,
    )


def _readable(examples: Examples) -> list[Example]:
    """The first photos that can be decoded."""
    found: list[Example] = []
    for example in itertools.islice(examples, 10 * SAMPLES):
        with contextlib.suppress(InputError):
            read_image(example.image)
            found.append(example)
        if len(found) == SAMPLES:
            break
    return found


def _arrays(cfg, model_cfg, tokenizer, sources, val):
    """What makes a step's arrays, the same for val (None without), and the texts."""
    held_out = [] if val is None else [val]
    if cfg.loss == "words":
        words = pipeline.vocabulary(sources, tokenizer, cfg.text.words_least)
        both = (pipeline.WordArrays(s, tokenizer, *words) for s in (sources, held_out))
        return (*both, None)
    texts = make_texts(cfg, model_cfg, tokenizer)
    knobs = dict(
        seed=cfg.seed,
        num_slots=model_cfg.num_slots,
        tokens=cfg.row.tokens,
        answers=cfg.row.answers,
        limit=cfg.text.limit,
    )
    counts = None
    if cfg.loss == "captions" and cfg.row.packed:
        clean = WITH_END[cfg.text.clean]
        counts = [found.token_counts(tokenizer, clean) for found in sources]
    make = pipeline.AnswerArrays(sources, texts.texts, counts=counts, **knobs)
    return make, pipeline.AnswerArrays(held_out, texts.texts, **knobs), texts


def make_texts(cfg, model_cfg, tokenizer: Tokenizer) -> Texts:
    """The texts of config.loss, unless that is the warm start."""
    slots, template = model_cfg.num_slots, find_template(model_cfg.template)
    text = cfg.text
    knobs = dict(clean=CLEAN[text.clean], limit=text.limit, one=text.captions == "one")
    if cfg.loss == "captions":
        texts = pipeline.caption_texts(tokenizer, slots, **knobs)
        return Texts(texts, caption_prompt(), (CAPTION_END,))
    if cfg.loss == "descriptions":
        texts = pipeline.description_texts(tokenizer, slots, template, **knobs)
        question = ALIGNMENT_QUESTIONS[0]
    else:
        texts = pipeline.dialogue_texts(
            tokenizer, slots, template, text.one_sentence, limit=text.limit
        )
        question = demo_texts.ONE_SENTENCE
    return Texts(texts, training_prompt(template, question), template.stop)


def _images(
    dtype: str, model: MiniGPT4, part: str, folder: Path, mesh
) -> Callable[[Sequence[Examples]], dict]:
    """sources -> how a Loader gets their images: from the photos, or from what is kept."""
    if not dtype:
        return partial(_photos, model.cfg.vit)
    if part == "pixels":
        raise ConfigError(
            f"config.cache.dtype={dtype!r}: the ViT is trained, so that nothing it makes "
            "can be kept; set cache.dtype=''"
        )
    towers = features.towers_digest(model, part)

    def kept(sources: Sequence[Examples]) -> dict:
        files = [
            features.make(model, part, dtype, towers, examples, folder, mesh)
            for examples in sources
        ]
        read = FeatureFiles(files, np.dtype(getattr(jnp, dtype)))
        return dict(read=read, image=ARRAYS[part], blank=read.blank)

    return kept


def _photos(rules: ViTConfig, sources: Sequence[Examples]) -> dict:
    read = ReadPixels(sources, rules)
    return dict(read=read, image="pixels_BHWC", blank=read.blank)


def sample(model: MiniGPT4, tokenizer: Tokenizer, task: Task) -> list[str]:
    """The greedy answers about the task's photos, asked as it trains.

    The model's decoder may be rearranged in place (engine.py): pass one of your own.
    """
    model.set_remat(False)  # nothing is differentiated
    generator = Generator(model, tokenizer, batch_size=len(task.photos))
    ids, slots = lay_out(task.prompt, tokenizer, model.cfg.num_slots)
    asked = [
        Prepared(
            request=Request(
                [user("")],
                sampling=dataclasses.replace(GREEDY, max_tokens=32),
                stop=task.stop,
                id=str(i),
            ),
            ids=np.array(ids, np.int32),
            slots=np.array(slots),
            pixels=(preprocess(read_image(photo.image), model.cfg.vit),),
        )
        for i, photo in enumerate(task.photos)
    ]
    answers = [""] * len(asked)
    for event in generator.submit(asked):
        answers[int(event.request_id)] += event.error or event.piece
    return answers
