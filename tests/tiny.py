"""The smallest whole model, of sizes that all differ, and its byte-level tokenizer."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from minigpt4_jax import checkpoint
from minigpt4_jax.data.tokens import ByteLevelTokenizer
from minigpt4_jax.models.layers import DTypes
from minigpt4_jax.models.llama import LlamaConfig
from minigpt4_jax.models.minigpt4 import MiniGPT4, MiniGPT4Config
from minigpt4_jax.models.qformer import QFormerConfig
from minigpt4_jax.models.vit import ViTConfig

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
MERGED = ("th", "in", "Ġa", "ca", "t.", "##")  # so that a stop string spans tokens
VOCABULARY = len(SPECIALS) + 256 + len(MERGED)

CONFIG = MiniGPT4Config(
    name="tiny",
    vit=ViTConfig(
        image_size=12,
        patch_size=4,
        width=20,
        num_layers=2,
        num_heads=5,
        mlp_width=28,
        eps=1e-6,
        ln_vision_eps=1e-5,
    ),
    qformer=QFormerConfig(
        num_queries=3,
        width=18,
        num_layers=2,
        num_heads=3,
        mlp_width=22,
        encoder_width=20,
        cross_attention_freq=1,
        eps=1e-12,
    ),
    llama=LlamaConfig(
        vocab_size=VOCABULARY,
        width=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_size=10,
        mlp_width=34,
        eps=1e-5,
        max_positions=512,
    ),
    template="chatml",
    bos_id=1,
    eos_ids=(2,),
)


def model(seed: int = 0, dtypes: DTypes = DTypes()) -> MiniGPT4:
    """Random weights, large enough that logits differ by whole numbers.

    Drawn by numpy: drawing by JAX compiles a program for every shape.
    """
    made = nnx.eval_shape(lambda: MiniGPT4(CONFIG, dtypes=dtypes, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    for path, param in nnx.to_flat_state(nnx.state(made, nnx.Param)):
        values = rng.standard_normal(param.shape, np.float32)
        if path[-1] == "scale":
            values = 1 + 0.1 * values
        elif path[-1] != "embedding":
            values = values / CONFIG.llama.width**0.5
        param.set_value(jnp.asarray(values, param.dtype))
    return made


def tokenizer_json() -> str:
    """A byte-level `tokenizer.json`: special tokens, 256 bytes, a few merged pairs."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIALS, *alphabet, *MERGED]
    merges = [(pair[0], pair[1]) for pair in MERGED]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, merges)
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(SPECIALS))
    assert json.loads(made.to_str())["added_tokens"][2]["id"] == 2
    return made.to_str()


def tokenizer() -> ByteLevelTokenizer:
    return ByteLevelTokenizer(
        tokenizer_json(), bos_id=CONFIG.bos_id, eos_ids=CONFIG.eos_ids
    )


def save(path: Path) -> Path:
    """The model as a converted directory."""
    params = nnx.to_flat_state(nnx.state(model(), nnx.Param))
    arrays = {"/".join(map(str, p)): np.asarray(param[...]) for p, param in params}
    files = {"tokenizer.json": tokenizer_json().encode()}
    checkpoint.save_directory(path, arrays, CONFIG, files, {})
    return path


def image(seed: int = 0) -> np.ndarray:
    """A random photo, uint8 [H W C]."""
    return np.random.default_rng(seed).integers(0, 256, (9, 15, 3), np.uint8)
