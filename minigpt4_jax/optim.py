"""AdamW with the reference's decay rule, learning rates, and which weights train."""

import difflib
import re

import jax.numpy as jnp
import optax

from minigpt4_jax.errors import ConfigError


def schedule(cfg) -> optax.Schedule:
    """Learning rate of a step, counted from 0, by the name `cfg.schedule`.

    cosine: linear from 0 to `peak_lr` in `warmup_steps`, then a cosine to `end_lr` at
        `total_steps`.
    linear_warmup_cosine_lr: the reference's. Linear from `warmup_lr`, then a cosine that
        began at step 0 of the run, so that the rate falls at once by what it had
        already lost.
    linear_warmup_step_lr: the reference's. One epoch that begins with the warmup, then
        `peak_lr` times `decay_rate` to the power of the epoch, at least `end_lr`.

    The reference's are told an epoch (of `epoch_steps`) and a step inside it. Its warmup
    counts the latter: one that is longer than an epoch begins anew with the next.
    Source: minigpt4/common/optims.py.
    """
    peak, end, total = cfg.peak_lr, cfg.end_lr, cfg.total_steps
    if cfg.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=cfg.warmup_steps,
            decay_steps=total,
            end_value=end,
        )
    start = cfg.warmup_lr

    def warmup(step):
        share = step % cfg.epoch_steps / max(cfg.warmup_steps, 1)
        return jnp.minimum(peak, start + (peak - start) * share)

    def cosine(step):
        falling = end + (peak - end) / 2 * (1 + jnp.cos(jnp.pi * step / total))
        return jnp.where(step < cfg.warmup_steps, warmup(step), falling)

    def stairs(step):
        epoch = step // cfg.epoch_steps
        lower = jnp.maximum(end, peak * jnp.float32(cfg.decay_rate) ** epoch)
        return jnp.where(epoch == 0, warmup(step), lower)

    return {"linear_warmup_cosine_lr": cosine, "linear_warmup_step_lr": stairs}[
        cfg.schedule
    ]


def make_optimizer(cfg) -> optax.GradientTransformation:
    """AdamW over a dict path -> array, up to the learning rate.

    An update is the direction to be scaled by the rate and subtracted (step.py), so that
    a step that is left out advances the rate and nothing here.

    Args:
        cfg: b1, b2, eps, weight_decay, and clip_norm (largest global norm of a gradient;
            0 is off, as in the reference).
    """
    clip = [optax.clip_by_global_norm(cfg.clip_norm)] if cfg.clip_norm else []
    return optax.chain(
        *clip,
        optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay, mask=decays),
    )


DECAYS = "kernel embedding query_tokens class_token position_embedding".split()


def decays(params: dict) -> dict:
    """Which parameters decay: kernels and tables, not biases, norms and LayerScale.

    Source: the reference (runner_base.py) leaves out all that has fewer than two
    dimensions or "bias", "ln" or "bn" in its name, which says the same of its names.
    """
    return {path: path.rpartition("/")[2] in DECAYS for path in params}


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
