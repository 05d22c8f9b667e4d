"""Configs are checked before anything is loaded."""

import importlib

import pytest
from ml_collections import ConfigDict

from minigpt4_jax import run_config
from minigpt4_jax.errors import ConfigError
from tests.training import config


@pytest.mark.parametrize("name", ["demo_warmup", "demo_stage1", "demo_stage2"])
def test_the_configs_that_are_shipped_pass(name):
    run_config.check(importlib.import_module(f"configs.{name}").get_config())


@pytest.mark.parametrize(
    "knob, value, complaint",
    [
        (
            "batchsize",
            8,
            "unknown knob in config 'batchsize'; did you mean 'batch_size'",
        ),
        ("optim__peak_rl", 1.0, "config.optim 'peak_rl'; did you mean 'peak_lr'"),
        ("loss", "caption", "config.loss 'caption'; did you mean 'captions'"),
        ("trainable", (), "trainable=(); want at least one pattern"),
        ("batch_size", 0, "batch_size=0; want at least 1"),
        ("save_every", 0, "save_every=0"),
        ("optim__warmup_steps", 8, "total_steps=8; the warmup must end before"),
        ("optim__peak_lr", 0.0, "must fall from a peak above 0"),
        ("optim__end_lr", 2.0, "end_lr=2.0"),
        ("dialogues__one_sentence", 60, "one_sentence=60.0; want a share"),
    ],
)
def test_a_knob_that_is_unknown_or_impossible_is_refused(knob, value, complaint):
    with pytest.raises(ConfigError) as error:
        run_config.check(config("frozen", **{knob: value}))
    assert complaint in str(error.value)


def test_a_knob_that_is_absent_is_named():
    values = config("frozen").to_dict()
    del values["row"]["answers"]
    with pytest.raises(ConfigError, match="config.row: answers absent"):
        run_config.check(ConfigDict(values))
    del values["row"], values["seed"]
    with pytest.raises(ConfigError, match="config: row, seed absent"):
        run_config.check(ConfigDict(values))


def test_a_run_may_get_longer_and_log_otherwise_but_nothing_else():
    old = config("frozen").to_dict()
    may = config("frozen", optim__total_steps=99, log_every=3, eval_every=2)
    assert run_config.differences(old, may.to_dict()) == []
    other = config("frozen", optim__peak_lr=0.5, seed=7).to_dict()
    del other["init"]
    assert run_config.differences(old, other) == [
        "init: , now absent",
        "optim.peak_lr: 0.01, now 0.5",
        "seed: 3, now 7",
    ]
