"""AdamW with the reference's decay rule, linear warmup and cosine."""

import re

import jax
import jax.numpy as jnp
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
    """Which parameters decay: kernels. Source: the reference leaves out all that has
    fewer than two dimensions or "bias", "ln" or "bn" in its name."""
    return {path: path.endswith("/kernel") for path in params}


def select(paths, patterns) -> list[str]:
    """The paths that a pattern matches in full, in order.

    A pattern that matches nothing raises ConfigError: a typo would freeze in silence.
    """
    paths = list(paths)
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ConfigError(
                f"config.trainable: {pattern!r} matches no parameter; paths look like "
                f"{', '.join(paths[:3])}"
            )
    return [p for p in paths if any(re.fullmatch(pattern, p) for pattern in patterns)]


def norm(tree) -> jax.Array:
    """Euclidean norm over all leaves."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))
