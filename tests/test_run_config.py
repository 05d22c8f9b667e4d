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
        ("text__one_sentence", 60, "one_sentence=60.0; want a share"),
        ("text__clean", "blib", "config.text.clean 'blib'; did you mean 'blip'"),
        ("text__limit", -1, "text.limit=-1"),
        ("row__packed", 100, "row.packed=100; want 0 (an example a row), or at least"),
        ("optim__accumulate", 0, "optim.accumulate=0; want at least 1"),
        ("optim__accumulate", 3, "batch_size=2, optim.accumulate=3"),
        ("optim__warmup_lr", 2.0, "warmup_lr=2.0"),
        ("optim__schedule", "linear_warmup_cosine_lr", "optim.epoch_steps=0"),
        ("data__photos__weight", 0, "data.photos.weight=0; want a whole number"),
        ("data", {}, "data without a source"),
        ("cache__dtype", "float8", "config.cache.dtype 'float8'"),
        ("quantize", "int4", "unknown config.quantize 'int4'"),
        ("loader__budget", 2.0, "loader.budget=2.0"),
        (
            "keep__every",
            6,
            "keep.every=6, save_every=4; only what is saved can be kept",
        ),
        ("keep__last", 0, "keep.last=0; want at least 1"),
        ("watchdog__limit_s", 60, "watchdog.limit_s=60, loader.limit_s=60; a loader"),
        ("watchdog__other_s", 119, "watchdog.other_s=119; want at least 120"),
        ("watchdog__start_s", 0, "watchdog.start_s=0; want at least 1"),
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


def test_a_run_from_before_a_knob_goes_on_as_it_was():
    old, new = config("frozen").to_dict(), config("frozen", quantize="int8").to_dict()
    del old["quantize"]
    assert run_config.differences(old, config("frozen").to_dict()) == []
    assert run_config.differences(old, new) == ["quantize: , now int8"]


def test_data_may_move_and_a_run_may_go_on_elsewhere():
    old = config("frozen").to_dict()
    moved = config("frozen", val="/else", data__photos__path="/there", mesh__data=4)
    assert run_config.differences(old, moved.to_dict()) == []
    mixed = config("frozen", data__photos__weight=2).to_dict()
    assert run_config.differences(old, mixed) == ["data.photos.weight: 1, now 2"]


def test_what_differs_from_the_reference_is_said_in_words():
    cfg = config("frozen", batch_size=256, text__clean="blip")
    found = run_config.reference_differences(cfg)
    assert "optim.peak_lr: 0.01, the reference has 0.0001" in found
    assert not any(line.startswith(("batch_size", "text.clean")) for line in found)
    assert sum("reference" in line for line in found) >= 3
    assert set(run_config.DEVIATIONS) <= set(found)
    assert (
        "no such stage"
        in run_config.reference_differences(config("frozen", loss="words"))[0]
    )


def test_a_run_needs_data_and_stage_2_a_beginning():
    run_config.check_given(config("frozen"))
    with pytest.raises(ConfigError, match="config.data.photos.path is empty"):
        run_config.check_given(config("frozen", data__photos__path=""))
    for loss in ("dialogues", "descriptions"):
        with pytest.raises(ConfigError, match="config.init is empty; stage 2 goes on"):
            run_config.check_given(config("frozen", loss=loss))
        run_config.check_given(config("frozen", loss=loss, init="stage1"))
