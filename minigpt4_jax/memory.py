"""What a model needs to answer: weights, keys and values, images, activations, in bytes.

By formula, before anything is loaded; tests hold it against what XLA:CPU compiles.
"""

import contextlib
import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from minigpt4_jax import checkpoint, reading
from minigpt4_jax.errors import ConfigError
from minigpt4_jax.models.layers import DTypes
from minigpt4_jax.models.minigpt4 import MiniGPT4Config
from minigpt4_jax.models.quantised import Quantisation
from minigpt4_jax.reading import IMAGES_AT_ONCE, PIECES

GB = 1e9
TOKENS = 1024  # of a row, where nothing else is said


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes on one device. `images` and `activations` are not needed at the same time."""

    weights: Mapping[str, int]  # by dtype
    kv: int
    prefixes: int
    images: int
    activations: int
    batch: int
    tokens: int
    quantisation: Quantisation

    @property
    def total(self) -> int:
        working = max(self.images, self.activations)
        return sum(self.weights.values()) + self.kv + self.prefixes + working

    def __str__(self) -> str:
        weights = ", ".join(
            f"{name} {size / GB:.2f}" for name, size in sorted(self.weights.items())
        )
        there = device_memory()
        room = (
            f"the device has {there / GB:.1f} GB" if there else "the device's unknown"
        )
        return (
            f"{self.total / GB:.2f} GB for {self.batch} rows of {self.tokens} tokens "
            f"(weights {weights}; keys and values {self.kv / GB:.2f}, "
            f"kept prefixes {self.prefixes / GB:.2f}; images "
            f"{self.images / GB:.2f} or text {self.activations / GB:.2f}); {room}"
        )

    @property
    def advice(self) -> str:
        """Which option to change."""
        how = self.quantisation
        options = [
            ('quantize="int8"', not how.decoder),
            ('quantize="int4"', how.decoder != "int4"),
            ('vision="int8"', not how.vision),
            ('kv="int8"', not how.kv),
            ("prefix_bytes=0", self.prefixes > 0),
            ("a smaller batch_size", self.batch > 1),
            ("shorter prompts, a smaller max_tokens", True),
        ]
        return ", or ".join(name for name, open_ in options if open_)


def needs(
    config: MiniGPT4Config,
    dtypes: DTypes,
    quantisation: Quantisation = Quantisation(),
    *,
    batch: int = 1,
    tokens: int = TOKENS,
    prefix_bytes: int | None = None,
) -> Needs:
    """What rows of so many tokens, prompt and answer, need, each with one image.

    Args:
        dtypes: `param` must be a dtype.
        prefix_bytes: as of Generator; counted as if it were full.
    """
    _, params = checkpoint.structure(config, dtypes, quantisation)
    weights: Counter[str] = Counter()
    for _, param in params.values():
        weights[str(param.dtype)] += math.prod(param.shape) * param.dtype.itemsize
    # XLA copies the Q-Former's stacks to go through them in groups.
    qformer = sum(
        math.prod(param.shape) * param.dtype.itemsize
        for name, (_, param) in params.items()
        if name.startswith("qformer/")
    )
    size = jnp.dtype(dtypes.compute).itemsize
    llama = config.llama
    entry = llama.head_size + 4 if quantisation.kv else llama.head_size * size
    place = 2 * llama.num_layers * llama.num_kv_heads * entry
    row = tokens * place
    if prefix_bytes is None:
        prefix_bytes = reading.prefix_bytes(place, batch)
    return Needs(
        weights=dict(weights),
        kv=(batch + 1) * row,  # one more is being read
        prefixes=prefix_bytes,
        images=_images(config, size, quantisation, min(batch, IMAGES_AT_ONCE))
        + qformer,
        activations=_text(config, size, quantisation, batch, tokens),
        batch=batch,
        tokens=tokens,
        quantisation=quantisation,
    )


def _images(config: MiniGPT4Config, size: int, how: Quantisation, images: int) -> int:
    """A block of the ViT: residuals and scores in float32, and one kernel in floats."""
    vit = config.vit
    places = images * vit.num_patches
    scores = 2 * 4 * vit.num_heads * places * vit.num_patches
    block = places * (2 * 4 * vit.width + size * (4 * vit.width + 2 * vit.mlp_width))
    kernel = size * vit.width * vit.mlp_width if how.vision else 0
    return scores + block + kernel


def _text(
    config: MiniGPT4Config, size: int, how: Quantisation, batch: int, tokens: int
) -> int:
    """A block that reads a piece of a prompt or a token of each row; the last logits."""
    llama = config.llama
    heads, places = llama.num_heads, max(min(PIECES[-1], tokens), batch)
    scores = 2 * 4 * heads * places * tokens
    inner = 2 * llama.width + 3 * heads * llama.head_size + 3 * llama.mlp_width
    # As floats, where whole numbers are not multiplied.
    widest = max(llama.mlp_width, llama.vocab_size)
    kernel = size * llama.width * widest if how.decoder else 0
    logits = 4 * 4 * batch * llama.vocab_size  # with what sampling makes of them
    keys = 2 * size * batch * tokens * llama.num_kv_heads * llama.head_size
    return scores + places * size * inner + kernel + logits + (keys if how.kv else 0)


def device_memory() -> int | None:
    """Bytes of the first device, of the whole machine on a CPU; None where not told."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (device.memory_stats() or {}).get("bytes_limit")


@contextlib.contextmanager
def told(need: Needs | None) -> Iterator[None]:
    """Out of memory inside becomes a ConfigError: what was needed, is there, helps."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
        if need is None or not full:
            raise
        raise ConfigError(f"out of memory: {need}; try {need.advice}") from error
