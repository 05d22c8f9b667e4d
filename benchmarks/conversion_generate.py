"""python -m benchmarks.conversion_generate DIR: a converted model says four tokens.

On a CPU one program of all layers would hold a float32 copy of every 16-bit weight at
once; here one block is compiled and called layer after layer, so a 7B model runs in
little more than its own size.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minigpt4_jax import checkpoint
from minigpt4_jax.data.prompts import find_template, training_prompt
from minigpt4_jax.data.tokens import lay_out, load_tokenizer
from minigpt4_jax.models.layers import BRANCHES, DTypes, attention_mask, layer
from minigpt4_jax.models.llama import rotary_angles
from minigpt4_jax.models.minigpt4 import MiniGPT4

TOKENS, PLACES = 4, 128


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
    size = cfg.vit.image_size
    image_BQD = encode(model, jnp.zeros((1, size, size, 3)))
    said = generate(model, jnp.array([ids]), jnp.array([slots]), image_BQD)
    took = time.perf_counter() - loaded
    print(
        f"loaded in {loaded - start:.1f} s; said tokens {said} in {took:.1f} s, "
        f"{len(ids)} tokens of prompt"
    )


def encode(model: MiniGPT4, pixels_BHWC):
    """Image embeddings. By jax.jit: nnx.jit would return a copy of every weight."""
    graphdef, state = nnx.split(model)

    @jax.jit  # drops the decoder's weights, which it does not use
    def encoded(state, pixels_BHWC):
        return nnx.merge(graphdef, state).encode_image(pixels_BHWC)

    return encoded(state, pixels_BHWC)


def generate(model: MiniGPT4, ids_BT, slots_BT, image_BQD) -> list[int]:
    """Greedy tokens; each layer's cache is passed to its call and comes back."""
    llama = model.llama
    graphdef, state = nnx.split(llama.blocks)
    cache = llama.new_cache(1, PLACES)
    kv = [(cache.k[i], cache.v[i]) for i in range(llama.cfg.num_layers)]

    @jax.jit
    def block(state, i, x_BTD, angles_BTK, mask_BTS, kv, length_B):
        one = nnx.merge(graphdef, layer(state, i))
        return one(x_BTD, angles_BTK, mask_BTS, kv, length_B)

    x_BTD, length, said = model.embed_prompt(ids_BT, slots_BT, image_BQD), 0, []
    for _ in range(TOKENS):
        t = x_BTD.shape[1]
        positions_BT = length + jnp.arange(t)[None]
        places_BS = jnp.arange(PLACES)[None]
        used_BS = jnp.where(places_BS < length + t, BRANCHES, 0)
        mask_BTS = attention_mask(
            jnp.full((1, t), BRANCHES), positions_BT, used_BS, places_BS
        )
        angles_BTK = rotary_angles(positions_BT, llama.cfg)
        for i in range(llama.cfg.num_layers):
            x_BTD, kv[i] = block(
                state, i, x_BTD, angles_BTK, mask_BTS, kv[i], jnp.array([length])
            )
        logits_BV = llama.logits(llama.norm(x_BTD[:, -1]))
        assert np.isfinite(np.asarray(logits_BV)).all()
        said.append(int(logits_BV.argmax()))
        length += t
        x_BTD = llama.embed(jnp.array([[said[-1]]]))
    return said


if __name__ == "__main__":
    main(sys.argv[1])
