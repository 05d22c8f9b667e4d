"""What a training config must hold, checked before anything is loaded.

configs/demo_stage1.py says what each knob means. ml_collections refuses a typo on the
command line; this refuses one in a config file, and numbers that cannot work together.
"""

from minigpt4_jax.errors import ConfigError, unknown

LOSSES = ("words", "captions", "dialogues")

KNOBS = {
    "config": (
        "checkpoint init trainable loss batch_size row words dialogues optim mesh seed "
        "log_every save_every eval_every"
    ),
    "config.row": "tokens answers",
    "config.words": "least",
    "config.dialogues": "one_sentence",
    "config.optim": (
        "peak_lr end_lr warmup_steps total_steps b1 b2 weight_decay clip_norm"
    ),
    "config.mesh": "data fsdp tensor",
}

# What may differ when a run is resumed. A longer run stretches the learning rate's
# cosine: it goes on, but is not the run that was that long from the start.
MAY_CHANGE = {
    "optim.total_steps",
    "log_every",
    "save_every",
    "eval_every",
}


def check(cfg) -> None:
    """Raise ConfigError for knobs that are absent, unknown or impossible."""
    for group, names in KNOBS.items():
        part = cfg if group == "config" else cfg[group.removeprefix("config.")]
        _check_names(group, set(part), names.split())
    if cfg.loss not in LOSSES:
        raise ConfigError(unknown("config.loss", cfg.loss, LOSSES))
    optim = cfg.optim
    for holds, text in (
        (
            bool(cfg.trainable),
            f"trainable={cfg.trainable}; want at least one pattern, or nothing is trained",
        ),
        (cfg.batch_size >= 1, f"batch_size={cfg.batch_size}; want at least 1"),
        (
            0 <= optim.warmup_steps < optim.total_steps,
            f"optim.warmup_steps={optim.warmup_steps}, total_steps={optim.total_steps}; "
            "the warmup must end before the run",
        ),
        (
            0 <= optim.end_lr <= optim.peak_lr and optim.peak_lr > 0,
            f"optim.peak_lr={optim.peak_lr}, end_lr={optim.end_lr}; the learning rate "
            "must fall from a peak above 0",
        ),
        (
            0 <= cfg.dialogues.one_sentence <= 1,
            f"dialogues.one_sentence={cfg.dialogues.one_sentence}; want a share",
        ),
        *(
            (cfg[name] >= 1, f"{name}={cfg[name]}; want at least 1 step")
            for name in ("log_every", "save_every", "eval_every")
        ),
    ):
        if not holds:
            raise ConfigError(f"config: got {text}")


def differences(old: dict, new: dict) -> list[str]:
    """The knobs, as "optim.peak_lr: 0.1, now 0.2", that keep a run from resuming."""
    olds, news = _flat(old), _flat(new)
    return [
        f"{name}: {olds.get(name, 'absent')}, now {news.get(name, 'absent')}"
        for name in sorted(olds.keys() | news.keys())
        if olds.get(name) != news.get(name) and name not in MAY_CHANGE
    ]


def _check_names(group: str, got: set[str], wanted: list[str]) -> None:
    for name in sorted(got - set(wanted)):
        raise ConfigError(unknown(f"knob in {group}", name, wanted))
    if absent := [name for name in wanted if name not in got]:
        raise ConfigError(
            f"{group}: {', '.join(absent)} absent; configs/demo_stage1.py has all knobs"
        )


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
