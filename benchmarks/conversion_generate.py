"""python -m benchmarks.conversion_generate DIR: a converted model says four tokens.

Layer after layer, as `convert doctor` asks a model (convert/layerwise.py), so that a 7B
runs in little more than its own size on a CPU; the whole text is read for every token.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.layerwise import log_probs
from minigpt4_jax import checkpoint
from minigpt4_jax.data.prompts import find_template, training_prompt
from minigpt4_jax.data.tokens import lay_out, load_tokenizer
from minigpt4_jax.models.layers import DTypes

TOKENS = 4


def main(directory: str) -> None:
    """Load as stored, answer about a grey image, greedily."""
    start = time.perf_counter()
    model = checkpoint.load_model(directory, DTypes("file", "float32", "float32"))
    jax.block_until_ready(nnx.state(model))
    loaded = time.perf_counter()
    cfg = model.cfg
    tokenizer = load_tokenizer(directory, bos_id=cfg.bos_id, eos_ids=cfg.eos_ids)
    prompt = training_prompt(find_template(cfg.template), "What is this?")
    ids, slots = lay_out(prompt, tokenizer, cfg.num_slots)
    length, size = len(ids), cfg.vit.image_size
    # Room for the answer, behind what is read, so that all is compiled once.
    ids_BT = np.array([ids + [0] * TOKENS], np.int32)
    slots_BT = np.array([slots + [False] * TOKENS])
    pixels_BHWC = jnp.zeros((1, size, size, 3))
    for t in range(length, length + TOKENS):
        log_probs_V = np.asarray(log_probs(model, ids_BT, slots_BT, pixels_BHWC))[
            0, t - 1
        ]
        assert np.isfinite(log_probs_V).all()
        ids_BT[0, t] = log_probs_V.argmax()
    took = time.perf_counter() - loaded
    print(
        f"loaded in {loaded - start:.1f} s; said tokens {ids_BT[0, length:].tolist()} in "
        f"{took:.1f} s, {length} tokens of prompt"
    )


if __name__ == "__main__":
    main(sys.argv[1])
