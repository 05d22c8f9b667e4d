"""That our step is the reference's: against a PyTorch step from transformers' modules.

The PyTorch side follows section 5.2 of the fact sheet (MiniGPTBase.forward) literally:
ragged prompts and answers joined, padded right, targets of -100, a mean over tokens; then
torch's AdamW in the reference's two groups, at its rates.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tokenizers
import torch

from convert import llama, qformer, rules, vit
from minigpt4_jax import optim
from minigpt4_jax.data import pipeline
from minigpt4_jax.data.plan import Plan
from minigpt4_jax.data.prompts import (
    caption_answer,
    caption_prompt,
    find_template,
    training_answer,
    training_prompt,
)
from minigpt4_jax.data.tokens import ByteLevelTokenizer, lay_out
from minigpt4_jax.models.minigpt4 import MiniGPT4Config
from minigpt4_jax.step import Trainables, answer_loss, make_step, new_state
from tests import batches, parity, tiny
from tests.test_convert_rules import eva_file, lavis_file, llama_file, wanted
from tests.test_minigpt4 import NO_QFORMER, TINY
from tests.training import config

# Byte level, so that nothing has to be trained, with the special tokens of LLaMA.
NAMES = zip(tiny.SPECIALS, ("<unk>", "<s>", "</s>"))
JSON = functools.reduce(lambda s, n: s.replace(*n), NAMES, tiny.tokenizer_json())
OURS = ByteLevelTokenizer(JSON, bos_id=1, eos_ids=(2,))
PAD = 0  # of the reference's side; no text has it

CAPTIONS = (
    "a dog runs",
    "two men on the beach at night, and a dog that is not theirs",  # is cut in stage 1
    "a cat",
    "the red bus is late again",
    "rain",
    "a girl in a park eats an apple",
    "nothing but sand",
)
QUESTIONS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage by the reference's strings, and by what ours makes of them."""

    cfg: MiniGPT4Config
    wrap: str  # around a question and its image; "" where there is no prompt
    end: str
    limit: int  # max_txt_len

    def prompt(self, question: str) -> str:
        return self.wrap.format(f"<Img><ImageHere></Img> {question}")


def sized(cfg: MiniGPT4Config, template: str) -> MiniGPT4Config:
    sizes = dataclasses.replace(
        cfg.llama, vocab_size=tiny.VOCABULARY, max_positions=300
    )
    return dataclasses.replace(cfg, llama=sizes, template=template)


STAGES = {
    "stage 1": Stage(sized(TINY, "vicuna_v0"), "", "\n", 32),
    "stage 2 vicuna": Stage(
        sized(TINY, "vicuna_v0"), "###Human: {} ###Assistant: ", "###", 160
    ),
    "stage 2 llama2": Stage(
        sized(NO_QFORMER, "llama2"), "[INST] {} [/INST] ", "</s>", 160
    ),
}


class Reference:
    """Loss of a batch, as the reference computes it on one device."""

    def __init__(self, parts: parity.Whole, stage: Stage):
        self.parts, self.stage = parts, stage
        self.tokenizer = tokenizers.Tokenizer.from_str(JSON)

    def loss(self, pixels_BHWC, answers, prompts: Sequence[str] = ()) -> torch.Tensor:
        """Mean over the answer tokens of the batch; no prompts: only the images."""
        image_BQD = self.parts.encode_image(pixels_BHWC)
        parts = (prompts and [self._around(p) for p in prompts]) or [[[], []]] * len(
            image_BQD
        )
        wrapped = [
            torch.cat([self._embed(before), image_QD, self._embed(after)])
            for (before, after), image_QD in zip(parts, image_BQD)
        ]
        texts = [self._ids(a + self.stage.end)[: self.stage.limit] for a in answers]
        longest = max(map(len, texts))
        longest_prompt = max(map(len, wrapped))
        rows, masks, targets = [], [], []
        for prompt_TD, text in zip(wrapped, texts):
            pad, pad_after = longest - len(text), longest_prompt - len(prompt_TD)
            padded = text + [PAD] * pad
            # The answer's padding stands before the prompt's.
            ends = self._embed(padded + [PAD] * pad_after)
            rows.append(torch.cat([self._embed([1]), prompt_TD, ends]))
            read = [1] * (1 + len(prompt_TD) + len(text))
            masks.append(read + [0] * (pad + pad_after))
            before = [-100] * (1 + len(prompt_TD))
            targets.append(before + text + [-100] * (pad + pad_after))
        logits_BTV = self.parts.decoder(
            inputs_embeds=torch.stack(rows), attention_mask=torch.tensor(masks)
        ).logits
        shifted = torch.tensor(targets)[:, 1:]
        return torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].reshape(-1, logits_BTV.shape[-1]), shifted.reshape(-1)
        )

    def _around(self, prompt: str) -> list[list[int]]:
        return [self._ids(part) for part in prompt.split("<ImageHere>")]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _embed(self, ids: list[int]) -> torch.Tensor:
        table = self.parts.decoder.get_input_embeddings()
        return table(torch.tensor(ids, dtype=torch.long))


# Both sides of a stage, with the same weights and pixels.


def sides(name: str) -> SimpleNamespace:
    stage = STAGES[name]
    ours, theirs = parity.minigpt4(stage.cfg)
    theirs.requires_grad_(False)
    theirs.llama_proj.requires_grad_(True)
    return SimpleNamespace(
        stage=stage, ours=ours, theirs=theirs, reference=Reference(theirs, stage)
    )


def photos(cfg: MiniGPT4Config, count: int) -> np.ndarray:
    size = cfg.vit.image_size
    rng = np.random.default_rng(5)
    return rng.integers(0, 256, (count, size, size, 3), np.uint8)


def normalised(photos_BHWC, cfg: MiniGPT4Config) -> np.ndarray:
    mean, std = np.float32(cfg.vit.mean), np.float32(cfg.vit.std)
    return (photos_BHWC.astype(np.float32) / np.float32(255) - mean) / std


def turn(stage: Stage, question: str, answer: str) -> batches.Turn:
    """A question and its answer by our templates and tokenizer."""
    template = find_template(stage.cfg.template)
    prompt, said = caption_prompt(), caption_answer(answer)
    if stage.wrap:
        prompt = training_prompt(template, question)
        said = training_answer(template, answer)
    ids, slots = lay_out(prompt, OURS, stage.cfg.num_slots)
    return ids, slots, lay_out(said, OURS, 0, bos=False)[0][: stage.limit]


def gradients(trainables: Trainables) -> Callable:
    """batch -> (mean loss, gradients)."""

    @jax.jit
    def mean(params, frozen, batch):
        total, count = answer_loss(trainables.model(params, frozen), batch)
        return total / count

    differentiate = jax.jit(jax.value_and_grad(mean))
    return lambda batch: differentiate(trainables.params, trainables.frozen, batch)


@pytest.mark.parametrize("name", STAGES)
def test_loss_and_gradients_are_the_references(name):
    both = sides(name)
    stage, count = both.stage, 4
    answers, questions = CAPTIONS[:count], QUESTIONS[:count]  # each of another length
    prompts = [stage.prompt(q) for q in questions] if stage.wrap else []
    pixels_BHWC = normalised(photos(stage.cfg, count), stage.cfg)
    expected = both.reference.loss(pixels_BHWC, answers, prompts)
    expected.backward()

    examples = [[turn(stage, q, a)] for q, a in zip(questions, answers)]
    longest = max(len(ids) + len(answer) for ((ids, _, answer),) in examples)
    # Apart, and packed: the same program, two rows of two then.
    differentiate = gradients(Trainables(both.ours, (r"projector/.*",)))
    for rows in (None, [0, 0, 2, 2]):
        batch = batches.lay_out(examples, 2 * longest, 130, rows, num_rows=count)
        batch["pixels_BHWC"] = photos(stage.cfg, count)
        loss, grads = differentiate(batch)
        assert abs(float(loss) - expected.item()) < 2e-5
        weight, bias = both.theirs.llama_proj.weight, both.theirs.llama_proj.bias
        parity.assert_close(grads["projector/kernel"], weight.grad.T, 1e-5)
        parity.assert_close(grads["projector/bias"], bias.grad, 1e-5)


def test_a_long_answer_loses_its_end_as_the_references_does():
    stage = STAGES["stage 1"]
    lengths = [len(turn(stage, "", caption)[2]) for caption in CAPTIONS]
    assert max(lengths) == stage.limit < len(OURS.encode(CAPTIONS[1]))
    assert turn(stage, "", CAPTIONS[1])[2][-1] != OURS.encode("\n")[0]
    assert turn(stage, "", CAPTIONS[0])[2][-1] == OURS.encode("\n")[0]


def test_the_q_formers_gradients_are_the_references_where_it_trains():
    both = sides("stage 1")
    both.theirs.queries.requires_grad_(True)
    pixels_BHWC = normalised(photos(both.stage.cfg, 2), both.stage.cfg)
    both.reference.loss(pixels_BHWC, CAPTIONS[:2]).backward()

    trainables = Trainables(both.ours, (r"qformer/.*",))
    examples = [[turn(both.stage, "", caption)] for caption in CAPTIONS[:2]]
    batch = batches.lay_out(examples, 45, 32)
    batch["pixels_BHWC"] = photos(both.stage.cfg, 2)
    _, grads = gradients(trainables)(batch)
    source = {
        name: p.grad if p.grad is not None else torch.zeros_like(p)
        for name, p in both.theirs.queries.named_parameters()
    }
    shapes = {path: value.shape for path, value in grads.items()}
    expected = rules.apply(qformer.HF, source, shapes)
    for path, gradient in grads.items():
        if path.endswith("/k/bias"):  # 0 but for rounding: softmax sees no shift
            assert np.abs(gradient).max() < 1e-6
        else:
            parity.assert_close(gradient, expected[path], 1e-5)


# Five updates of AdamW, from data by our plan: one source, one prompt.


@dataclasses.dataclass
class Captioned:
    """A data set of which only the captions are read."""

    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)

    def captions(self, index: int) -> Sequence[str]:
        return (self.texts[index],)


STEPS, BATCH = 5, 3
RATES = {  # peak and end, warmup: of three steps, and from the last to the first decay
    "lr 1e-3": (1e-3, 8e-4, 1e-5, 1e-5),
    "stage 2": (3e-5, 1e-5, 1e-6, 5e-7),
}


@pytest.mark.parametrize(
    "name, rates",
    [*((name, "lr 1e-3") for name in STAGES), ("stage 2 vicuna", "stage 2")],
)
def test_five_updates_are_the_references(name, rates, monkeypatch):
    monkeypatch.setattr(pipeline, "ALIGNMENT_QUESTIONS", QUESTIONS[1:2])
    both = sides(name)
    stage, cfg = both.stage, both.stage.cfg
    peak, end, warmup, tolerance = RATES[rates]
    knobs = config(
        "unused",
        optim__schedule="linear_warmup_cosine_lr",
        optim__peak_lr=peak,
        optim__end_lr=end,
        optim__warmup_lr=warmup,
        optim__warmup_steps=3,
        optim__epoch_steps=2,  # shorter than the warmup, which begins anew
        optim__total_steps=STEPS,
        optim__b2=0.999,
        optim__clip_norm=0.0,
    ).optim
    plan = Plan([len(CAPTIONS)], [1], seed=1, batch_size=BATCH)
    texts = (
        pipeline.description_texts(
            OURS, cfg.num_slots, find_template(cfg.template), limit=stage.limit
        )
        if stage.wrap
        else pipeline.caption_texts(OURS, cfg.num_slots, limit=stage.limit)
    )
    arrays = pipeline.AnswerArrays(
        [Captioned(CAPTIONS)],
        texts,
        seed=1,
        num_slots=cfg.num_slots,
        tokens=200,
        answers=80,
    )

    trainables = Trainables(both.ours, (r"projector/.*",))
    optimizer = optim.make_optimizer(knobs)
    step = make_step(trainables, answer_loss, optimizer, optim.schedule(knobs))
    state = new_state(trainables.params, optimizer)
    torch_optimizer = torch.optim.AdamW(
        [
            {"params": group, "weight_decay": decay}
            for group, decay in zip(two_groups(both.theirs), (knobs.weight_decay, 0.0))
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    pictures = photos(cfg, len(CAPTIONS))
    for i in range(STEPS):
        picks = plan.picks(i)
        examples = picks[:, 2]
        batch = arrays(i, picks)
        batch["pixels_BHWC"] = pictures[examples]
        batch["ok_B"] = np.ones(BATCH, np.float32)
        state, metrics = step(state, trainables.frozen, (batch,))

        for group in torch_optimizer.param_groups:
            group["lr"] = reference_rate(i, peak, end, warmup)
        prompts = [stage.prompt(QUESTIONS[1])] * BATCH if stage.wrap else []
        answers = [CAPTIONS[example] for example in examples]
        loss = both.reference.loss(
            normalised(pictures[examples], cfg), answers, prompts
        )
        torch_optimizer.zero_grad()
        loss.backward()
        torch_optimizer.step()
        assert abs(float(metrics["loss"]) - loss.item()) < 2e-5
    weight, bias = both.theirs.llama_proj.weight, both.theirs.llama_proj.bias
    for path, expected in (("kernel", weight.T), ("bias", bias)):
        found = np.asarray(state["params"][f"projector/{path}"])
        difference = np.abs(found - expected.detach().numpy()).max()
        assert difference < tolerance


def reference_rate(step: int, peak: float, end: float, start: float) -> float:
    """The sheet's section 6.2: a warmup of 3 steps in epochs of 2, then a cosine."""
    if step < 3:
        return min(peak, start + (peak - start) * (step % 2) / 3)
    return end + (peak - end) / 2 * (1 + math.cos(math.pi * step / STEPS))


def no_decay(name: str, shape: Sequence[int]) -> bool:
    """The reference's rule (runner_base.py)."""
    return len(shape) < 2 or any(part in name for part in ("bias", "ln", "bn"))


def two_groups(module: torch.nn.Module) -> tuple[list, list]:
    """What decays and what does not, of what trains."""
    groups: tuple[list, list] = ([], [])
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[no_decay(name, parameter.shape)].append(parameter)
    return groups


def test_every_parameter_decays_that_does_in_the_reference():
    files = (
        (vit.EVA, "visual_encoder.", eva_file(), ("vit/",)),
        (qformer.LAVIS, "", lavis_file(), ("qformer/", "ln_vision/")),
        (llama.HF, "", llama_file("hf"), ("llama/",)),
    )
    for table, prefix, file, prefixes in files:
        flags = {
            prefix + name: np.full(
                array.shape, not no_decay(prefix + name, array.shape)
            )
            for name, array in file.items()
        }
        arrays = rules.apply(table, flags, wanted(prefixes))
        for path, decays in optim.decays(arrays).items():
            assert decays == arrays[path].all() == arrays[path].any(), path


# Where ours is another on purpose.


def test_a_mean_of_devices_means_is_not_the_mean_that_we_and_one_device_take():
    both = sides("stage 1")
    answers = CAPTIONS[:4]
    pixels_BHWC = normalised(photos(both.stage.cfg, 4), both.stage.cfg)
    with torch.no_grad():
        whole = both.reference.loss(pixels_BHWC, answers).item()
        halves = [
            both.reference.loss(pixels_BHWC[part], answers[part]).item()
            for part in (slice(0, 2), slice(2, 4))
        ]
        lengths = [len(turn(both.stage, "", a)[2]) for a in answers]
    first, second = sum(lengths[:2]), sum(lengths[2:])
    assert first != second
    assert whole == pytest.approx(
        (halves[0] * first + halves[1] * second) / (first + second), rel=1e-6
    )
    assert abs(whole - sum(halves) / 2) > 1e-3
