"""What a training config must hold, checked before anything is loaded.

configs/stage1.py says what each knob means. ml_collections refuses a typo on the
command line; this refuses one in a config file, and numbers that cannot work together.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

from minigpt4_jax.errors import ConfigError, unknown

LOSSES = ("words", "captions", "dialogues", "descriptions")
CLEAN = ("", "blip")
CAPTIONS = ("all", "one")
SCHEDULES = ("cosine", "linear_warmup_cosine_lr", "linear_warmup_step_lr")
REMAT = ("none", "block")
DTYPES = ("", "float32", "bfloat16")
QUANTIZE = ("", "int8")
CACHES = ("", "float32", "float16", "bfloat16")

KNOBS = {
    "config": (
        "checkpoint init trainable loss data val text batch_size row cache optim dtype "
        "quantize remat loader keep guard watchdog mesh seed log_every save_every eval_every"
    ),
    "config.text": "clean limit captions words_least one_sentence",
    "config.row": "tokens answers packed",
    "config.cache": "dtype folder",
    "config.optim": (
        "schedule peak_lr end_lr warmup_lr warmup_steps epoch_steps total_steps "
        "decay_rate b1 b2 eps weight_decay clip_norm accumulate"
    ),
    "config.loader": "workers prefetch limit_s budget",
    "config.keep": "last every",
    "config.guard": "skipped",
    "config.watchdog": "limit_s other_s start_s",
    "config.mesh": "data fsdp tensor",
}
SOURCE = ("path", "weight")  # knobs of each named entry of config.data

# What may differ when a run is resumed: where and how fast it runs, what it keeps. A
# longer run stretches a cosine: it goes on, but is not the run that was that long.
MAY_CHANGE = {
    "optim.total_steps",
    "cache.folder",
    "loader.workers",
    "loader.prefetch",
    "loader.limit_s",
    "loader.budget",
    "keep.last",
    "keep.every",
    "guard.skipped",
    "watchdog.limit_s",
    "watchdog.other_s",
    "watchdog.start_s",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "log_every",
    "save_every",
    "eval_every",
}

# Knobs that a config.json of an older version lacks, as it was trained then.
BEFORE = {"quantize": ""}

_ADAMW = {
    "trainable": ["projector/.*"],
    "optim.schedule": "linear_warmup_cosine_lr",
    "optim.warmup_lr": 1e-6,
    "optim.b1": 0.9,
    "optim.b2": 0.999,
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.05,
    "optim.clip_norm": 0.0,
    "optim.accumulate": 1,
    "seed": 42,
}
# Source: train_configs/minigpt4_stage{1,2}_pretrain/finetune.yaml and the defaults of
# runner_base.py; batch_size over its four GPUs, and its one.
REFERENCE = {
    "captions": {
        **_ADAMW,
        "text.clean": "blip",
        "text.limit": 32,
        "text.captions": "one",
        "batch_size": 256,
        "optim.peak_lr": 1e-4,
        "optim.end_lr": 8e-5,
        "optim.warmup_steps": 5000,
        "optim.epoch_steps": 5000,
        "optim.total_steps": 20_000,
    },
    "descriptions": {
        **_ADAMW,
        "text.clean": "",
        "text.limit": 160,
        "text.captions": "one",
        "batch_size": 12,
        "optim.peak_lr": 3e-5,
        "optim.end_lr": 1e-5,
        "optim.warmup_steps": 200,
        "optim.epoch_steps": 200,
        "optim.total_steps": 1000,
    },
}
DEVIATIONS = (
    "the loss is the mean over all answer tokens of the global batch, not a mean of "
    "each device's mean",
    "each example draws its source, where a batch of the reference is of one source",
    "each example draws its question, where a batch of the reference shares one",
)


def check(cfg) -> None:
    """Raise ConfigError for knobs that are absent, unknown or impossible."""
    for group, names in KNOBS.items():
        part = cfg if group == "config" else cfg[group.removeprefix("config.")]
        _check_names(group, set(part), names.split())
    for name, value, known in (
        ("loss", cfg.loss, LOSSES),
        ("text.clean", cfg.text.clean, CLEAN),
        ("text.captions", cfg.text.captions, CAPTIONS),
        ("cache.dtype", cfg.cache.dtype, CACHES),
        ("optim.schedule", cfg.optim.schedule, SCHEDULES),
        ("dtype", cfg.dtype, DTYPES),
        ("quantize", cfg.quantize, QUANTIZE),
        ("remat", cfg.remat, REMAT),
    ):
        if value not in known:
            raise ConfigError(unknown(f"config.{name}", value, known))
    for holds, text in chain(_optim_holds(cfg.optim), _holds(cfg)):
        if not holds:
            raise ConfigError(f"config: got {text}")


def check_trainable(trained: Sequence[str], held: Collection[str], kind: str) -> None:
    """Raise ConfigError where a parameter that is trained would be in few bits.

    Args:
        trained: parameter paths.
        held: all paths of the model as it will be held, with scales of what is in `kind`.
    """
    few = [path for path in trained if f"{path}_scale" in held]
    if few:
        raise ConfigError(
            f"config.trainable: {few[0]} would be held in {kind}, and whole numbers "
            "cannot be trained; train what is not in few bits, or set quantize='' and a "
            "checkpoint of floats"
        )


def check_given(cfg) -> None:
    """Raise ConfigError for what a config file leaves open and a run needs."""
    for name, source in cfg.data.items():
        if not source.path:
            raise ConfigError(
                f"config.data.{name}.path is empty; want a data set: "
                f"--config.data.{name}.path=..."
            )
    if cfg.loss in ("dialogues", "descriptions") and not cfg.init:
        raise ConfigError(
            "config.init is empty; stage 2 goes on from stage 1: want its work "
            "directory, a converted model or a .pth of the reference"
        )


def differences(old: dict, new: dict) -> list[str]:
    """The knobs, as "optim.peak_lr: 0.1, now 0.2", that keep a run from resuming."""
    olds, news = BEFORE | flat(old), flat(new)
    return [
        f"{name}: {olds.get(name, 'absent')}, now {news.get(name, 'absent')}"
        for name in sorted(olds.keys() | news.keys())
        if olds.get(name) != news.get(name)
        and name not in MAY_CHANGE
        and not (name.startswith("data.") and name.endswith(".path"))
        and name != "val"  # what lies there is compared by content, not by its place
    ]


def reference_differences(cfg) -> list[str]:
    """In what a run differs from the reference's recipe for its stage, in words."""
    if cfg.loss not in REFERENCE:
        return [f"loss={cfg.loss}: the reference has no such stage"]
    ours = flat(cfg.to_dict())
    ours["trainable"] = list(cfg.trainable)
    return [
        *(
            f"{name}: {ours[name]}, the reference has {value}"
            for name, value in REFERENCE[cfg.loss].items()
            if ours[name] != value
        ),
        *DEVIATIONS,
    ]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested knobs as {"optim.peak_lr": 0.1}."""
    found = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _holds(cfg):
    """(whether it holds, what to say if not) for all knobs but the optimizer's."""
    yield (
        bool(cfg.trainable),
        f"trainable={cfg.trainable}; want at least one pattern, or nothing is trained",
    )
    yield (
        len(cfg.data) > 0,
        "data without a source; want cfg.data = dict(NAME=dict(...))",
    )
    for name, source in cfg.data.items():
        _check_names(f"config.data.{name}", set(source), list(SOURCE))
        yield (
            isinstance(source.weight, int) and source.weight >= 1,
            f"data.{name}.weight={source.weight}; want a whole number from 1: examples "
            "of this source beside those of the others",
        )
    yield cfg.batch_size >= 1, f"batch_size={cfg.batch_size}; want at least 1"
    yield (
        cfg.batch_size % cfg.optim.accumulate == 0,
        f"batch_size={cfg.batch_size}, optim.accumulate={cfg.optim.accumulate}; want "
        "parts of the same size",
    )
    yield cfg.text.limit >= 0, f"text.limit={cfg.text.limit}; want tokens, 0: no limit"
    yield (
        0 <= cfg.text.one_sentence <= 1,
        f"text.one_sentence={cfg.text.one_sentence}; want a share",
    )
    yield (
        cfg.row.packed == 0 or cfg.row.packed >= cfg.row.tokens,
        f"row.packed={cfg.row.packed}; want 0 (an example a row), or at least "
        f"row.tokens={cfg.row.tokens}, so that every example fits into a row",
    )
    yield (
        0 <= cfg.loader.budget <= 1,
        f"loader.budget={cfg.loader.budget}; want the share of examples that may be bad",
    )
    yield (
        cfg.loader.workers >= 0,
        f"loader.workers={cfg.loader.workers}; want 0 or more",
    )
    yield (
        cfg.watchdog.limit_s > cfg.loader.limit_s,
        f"watchdog.limit_s={cfg.watchdog.limit_s}, loader.limit_s={cfg.loader.limit_s}; "
        "a loader that is given up begins anew: want more for the step that waits for it",
    )
    for name in ("log_every", "save_every", "eval_every"):
        yield cfg[name] >= 1, f"{name}={cfg[name]}; want at least 1 step"
    yield (
        cfg.keep.every % cfg.save_every == 0,
        f"keep.every={cfg.keep.every}, save_every={cfg.save_every}; only what is saved "
        "can be kept: want a multiple, or 0",
    )
    for name, value, least in (
        ("loader.prefetch", cfg.loader.prefetch, 1),
        ("loader.limit_s", cfg.loader.limit_s, 1),
        ("keep.last", cfg.keep.last, 1),
        ("keep.every", cfg.keep.every, 0),
        ("guard.skipped", cfg.guard.skipped, 1),
        ("watchdog.other_s", cfg.watchdog.other_s, cfg.watchdog.limit_s),
        ("watchdog.start_s", cfg.watchdog.start_s, 1),
    ):
        yield value >= least, f"{name}={value}; want at least {least}"


def _optim_holds(optim):
    yield (
        0 <= optim.warmup_steps < optim.total_steps,
        f"optim.warmup_steps={optim.warmup_steps}, total_steps={optim.total_steps}; "
        "the warmup must end before the run",
    )
    yield (
        0 <= optim.end_lr <= optim.peak_lr and optim.peak_lr > 0,
        f"optim.peak_lr={optim.peak_lr}, end_lr={optim.end_lr}; the learning rate "
        "must fall from a peak above 0",
    )
    yield (
        0 <= optim.warmup_lr <= optim.peak_lr,
        f"optim.warmup_lr={optim.warmup_lr}; the warmup must rise to peak_lr="
        f"{optim.peak_lr}",
    )
    yield (
        optim.schedule == "cosine" or optim.epoch_steps >= 1,
        f"optim.epoch_steps={optim.epoch_steps}; {optim.schedule} counts its warmup "
        "within epochs: want their length in steps",
    )
    yield optim.accumulate >= 1, f"optim.accumulate={optim.accumulate}; want at least 1"


def _check_names(group: str, got: set[str], wanted: list[str]) -> None:
    for name in sorted(got - set(wanted)):
        raise ConfigError(unknown(f"knob in {group}", name, wanted))
    if absent := [name for name in wanted if name not in got]:
        raise ConfigError(
            f"{group}: {', '.join(absent)} absent; configs/stage1.py has all knobs"
        )
