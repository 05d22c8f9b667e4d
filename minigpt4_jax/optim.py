"""AdamW with the reference's decay rule, linear warmup and cosine."""

import difflib
import re

import optax

from minigpt4_jax.errors import ConfigError


def schedule(cfg) -> optax.Schedule:
    """Learning rate of a step: linear from 0 to `peak_lr` in `warmup_steps`, then a
    cosine to `end_lr` at `total_steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=cfg.peak_lr,
        warmup_steps=cfg.warmup_steps,
        decay_steps=cfg.total_steps,
        end_value=cfg.end_lr,
    )


def make_optimizer(cfg) -> optax.GradientTransformation:
    """AdamW over a dict path -> array.

    Args:
        cfg: peak_lr, end_lr, warmup_steps, total_steps, b1, b2, weight_decay, and
            clip_norm (largest global norm of a gradient; 0 is off, as in the reference).
    """
    adamw = optax.adamw(
        schedule(cfg),
        b1=cfg.b1,
        b2=cfg.b2,
        weight_decay=cfg.weight_decay,
        mask=decays,
    )
    if not cfg.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), adamw)


def decays(params: dict) -> dict:
    """Which parameters decay: kernels.

    Source: the reference leaves out all that has fewer than two dimensions or "bias",
    "ln" or "bn" in its name. By that rule query tokens would decay; it never trains them.
    """
    return {path: path.endswith("/kernel") for path in params}


def select(paths, patterns) -> list[str]:
    """The paths that a pattern matches in full, in order.

    A pattern that matches nothing raises ConfigError: a typo would freeze in silence.
    """
    paths = list(paths)
    for pattern in patterns:
        try:
            hits = any(re.fullmatch(pattern, path) for path in paths)
        except re.error as error:
            raise ConfigError(
                f"config.trainable: {pattern!r} is no regular expression ({error})"
            ) from error
        if not hits:
            raise ConfigError(
                f"config.trainable: {pattern!r} matches no parameter; "
                f"{_nearest(pattern, paths)}"
            )
    return [p for p in paths if any(re.fullmatch(pattern, p) for pattern in patterns)]


def _nearest(pattern: str, paths: list[str]) -> str:
    """The path, or everything below one, that a mistyped pattern may have meant."""
    parts = {path[:i] for path in paths for i, c in enumerate(path) if c == "/"}
    known = [*paths, *(f"{part}/.*" for part in sorted(parts))]
    near = difflib.get_close_matches(pattern, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"paths look like {paths[0]!r}"
