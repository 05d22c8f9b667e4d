"""What a model needs: the published sizes by formula, and the formula against XLA."""

import dataclasses

import jax
import pytest
import tiny
from flax import nnx

from minigpt4_jax import decoding, memory, reading
from minigpt4_jax.errors import ConfigError
from minigpt4_jax.generator import Generator
from minigpt4_jax.models.layers import DTypes
from minigpt4_jax.models.minigpt4 import (
    MINIGPT4_VICUNA_7B,
    MINIGPT4_VICUNA_13B,
    MiniGPT4,
)
from minigpt4_jax.models.quantised import Quantisation

HALF = DTypes("bfloat16", "bfloat16", "bfloat16")


@pytest.mark.parametrize(
    "config, kind, most",
    [
        (MINIGPT4_VICUNA_7B, "int8", 9),
        (MINIGPT4_VICUNA_13B, "int8", 16),
        (MINIGPT4_VICUNA_13B, "int4", 10),
    ],
)
def test_a_row_of_1024_tokens_with_an_image_fits(config, kind, most):
    small = Quantisation(kind, vision="int8", kv="int8")
    need = memory.needs(config, HALF, small)
    assert 0.8 * most < need.total / memory.GB < most
    assert memory.needs(config, HALF).total > 2 * need.total - 4 * memory.GB


def test_the_prefixes_kept_by_default_are_counted_as_the_engine_keeps_them():
    for batch in (1, 8):
        gen = Generator(tiny.model(), tiny.tokenizer(), batch_size=batch)
        need = memory.needs(tiny.CONFIG, DTypes(), batch=batch)
        assert gen.engine.reader.prefixes.max_bytes == need.prefixes
    # Of a large model an image for each answer and one more, 128 places each.
    llama = MINIGPT4_VICUNA_7B.llama
    row = memory.needs(MINIGPT4_VICUNA_7B, HALF, tokens=128, batch=8).kv // 9
    assert row == 2 * 128 * llama.num_layers * llama.width * 2
    assert memory.needs(MINIGPT4_VICUNA_7B, HALF, batch=8).prefixes == 9 * row
    assert memory.needs(MINIGPT4_VICUNA_7B, HALF, prefix_bytes=0).prefixes == 0


def test_weights_are_counted_as_they_are_held():
    for how in (Quantisation(), Quantisation("int4", "int8", "int8")):
        model = tiny.model()
        model.quantise(how)
        held = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
        cache = model.llama.new_cache(2, 40)
        need = memory.needs(tiny.CONFIG, DTypes(), how, batch=2, tokens=40)
        assert sum(need.weights.values()) == held
        both = sum(x.nbytes for x in jax.tree.leaves((cache.k, cache.v)))
        assert need.kv == 1.5 * both  # of a third row a prompt is being read


def test_out_of_memory_says_what_was_needed_and_what_to_change():
    need = memory.needs(tiny.CONFIG, DTypes(), Quantisation("int8"), batch=2)
    for error in (MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x")):
        with pytest.raises(ConfigError) as said, memory.told(need):
            raise error
        text = str(said.value)
        assert "2 rows of 1024 tokens" in text and "the device has" in text
        assert 'quantize="int4"' in text and 'quantize="int8"' not in text
    with pytest.raises(jax.errors.JaxRuntimeError), memory.told(need):
        raise jax.errors.JaxRuntimeError("INTERNAL: another")


def test_the_formula_holds_for_what_is_compiled():
    # Large enough that arrays outweigh what is left out, small enough to compile.
    llama = dataclasses.replace(
        tiny.CONFIG.llama, width=96, mlp_width=384, num_heads=8, head_size=12
    )
    config = dataclasses.replace(tiny.CONFIG, llama=llama)
    for how in (Quantisation(), Quantisation("int8", kv="int8")):
        need = memory.needs(config, DTypes(), how, tokens=512)
        read, seen = _temporaries(config, how, tokens=512)
        assert 0.5 * need.activations < read < need.activations
        assert 0.3 * need.images < seen < need.images


def _temporaries(config, how: Quantisation, tokens: int) -> tuple[int, int]:
    """Bytes that XLA gives the programs that read a piece of a prompt, and an image."""

    def make():
        model = MiniGPT4(config, rngs=nnx.Rngs(0))
        model.quantise(how)
        return model

    model = nnx.eval_shape(make)
    graphdef, weights = nnx.split(model)
    cache = jax.eval_shape(lambda: make().llama.new_cache(1, tokens))
    T = reading.PIECES[-1]
    of = jax.ShapeDtypeStruct
    piece = of((1, T), "int32"), of((1, T), "bool"), of((1,), "int32")
    image_BQD = of((1, config.num_slots, config.llama.width), "float32")
    pixels_BHWC = of((1, config.vit.image_size, config.vit.image_size, 3), "float32")
    programs = decoding.programs(graphdef)
    read = programs.read.lower(weights, cache, *piece, image_BQD).compile()
    encode = programs.encode.lower(weights, pixels_BHWC).compile()
    read, encode = (x.memory_analysis().temp_size_in_bytes for x in (read, encode))
    return read, encode
