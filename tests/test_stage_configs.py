"""The configs of both stages carry the reference's numbers, and fit their models."""

import importlib
import math
from pathlib import Path

import pytest

from minigpt4_jax import optim, run_config
from minigpt4_jax.data.prompts import ALIGNMENT_QUESTIONS, find_template
from minigpt4_jax.models.minigpt4 import PRESETS

ROOT = Path(__file__).parent.parent
MODELS = {"": "vicuna_7b", "_13b": "vicuna_13b", "_llama2": "llama2_7b"}
# Tokens of the longest question of stage 2 by LLaMA's tokenizer, with the template
# around it and without the image (test_tokens.py has the pieces).
AROUND = {"vicuna_v0": 7 + 20, "llama2": 6 + 20}

# train_configs/minigpt4{,_llama2}_stage{1_pretrain,2_finetune}.yaml, identical for all.
STAGES = {
    "stage1": dict(
        batch_size=4 * 64,
        peak_lr=1e-4,
        end_lr=8e-5,
        warmup_steps=5000,
        epoch_steps=5000,
        total_steps=4 * 5000,
        limit=32,
        weights={"laion": 115, "cc_sbu": 14},
        loss="captions",
        clean="blip",
    ),
    "stage2": dict(
        batch_size=12,
        peak_lr=3e-5,
        end_lr=1e-5,
        warmup_steps=200,
        epoch_steps=200,
        total_steps=5 * 200,
        limit=160,
        weights={"cc_sbu_align": 1},
        loss="descriptions",
        clean="",
    ),
}


def load(name: str):
    return importlib.import_module(f"configs.{name}").get_config()


def names() -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", [n for n in names() if n not in ("chat", "generate")])
def test_every_config_of_a_run_is_one_the_trainer_takes(name):
    run_config.check(load(name))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_the_references_numbers(stage, model):
    cfg, want = load(stage + model), STAGES[stage]
    for name in ("peak_lr", "end_lr", "warmup_steps", "epoch_steps", "total_steps"):
        assert cfg.optim[name] == want[name], name
    assert cfg.optim.schedule == "linear_warmup_cosine_lr"
    assert cfg.optim.warmup_lr == 1e-6
    assert (cfg.optim.b1, cfg.optim.b2, cfg.optim.eps) == (0.9, 0.999, 1e-8)
    assert (cfg.optim.weight_decay, cfg.optim.clip_norm) == (0.05, 0.0)
    assert cfg.optim.accumulate == 1 and cfg.seed == 42
    assert cfg.batch_size == want["batch_size"]
    assert cfg.loss == want["loss"] and cfg.trainable == ("projector/.*",)
    assert (cfg.text.limit, cfg.text.clean) == (want["limit"], want["clean"])
    assert {name: s.weight for name, s in cfg.data.items()} == want["weights"]
    # Nothing but the three deviations that are named is left to differ.
    assert run_config.reference_differences(cfg) == list(run_config.DEVIATIONS)


@pytest.mark.parametrize(
    "stage, rates",
    [
        ("stage1", {0: 1e-6, 4999: 9.99802e-5, 5000: 9.707107e-5, 10_000: 9e-5}),
        ("stage2", {0: 1e-6, 199: 2.98550e-5, 200: 2.809017e-5, 999: 1.000005e-5}),
    ],
)
def test_the_learning_rate_is_the_references_at_every_turn(stage, rates):
    rate = optim.schedule(load(stage).optim)
    for step, want in rates.items():
        assert math.isclose(float(rate(step)), want, rel_tol=2e-6), step


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_row_holds_the_longest_example_of_its_stage(stage, model):
    preset = PRESETS[f"minigpt4_{MODELS[model]}"]
    cfg = load(stage + model)
    around = AROUND[preset.template] if stage == "stage2" else 0
    # BOS, prompt, slots and an answer, of which the last token is predicted, not read.
    assert cfg.row.tokens == 1 + preset.num_slots + around + cfg.text.limit - 1
    assert cfg.row.answers == cfg.text.limit
    assert cfg.row.packed >= cfg.row.tokens


def test_the_longest_question_is_the_one_that_was_counted():
    assert max(ALIGNMENT_QUESTIONS, key=len) == ALIGNMENT_QUESTIONS[1]
    assert {find_template(name).name for name in AROUND} == set(AROUND)


@pytest.mark.parametrize("stage", STAGES)
def test_models_differ_only_in_what_the_model_needs(stage):
    base = run_config.flat(load(stage).to_dict())
    for model in MODELS:
        other = run_config.flat(load(stage + model).to_dict())
        differing = {name for name in base if base[name] != other[name]}
        assert differing <= {"checkpoint", "row.tokens", "remat"}, differing
