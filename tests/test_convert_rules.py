"""Rule tables: complete, exact, and one error for everything that does not fit."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from convert import llama, qformer, vit
from convert.rules import (
    FLAT,
    JOIN_HEADS,
    KEEP,
    PATCH,
    SPLIT_HEADS,
    TRANSPOSE,
    Drop,
    Rule,
    apply,
    batched,
    half_rotated,
    part,
    plan,
)
from minigpt4_jax.errors import CheckpointError
from minigpt4_jax.models.llama import LlamaConfig
from minigpt4_jax.models.minigpt4 import MiniGPT4, MiniGPT4Config
from minigpt4_jax.models.qformer import QFormerConfig
from minigpt4_jax.models.vit import ViTConfig

TINY = MiniGPT4Config(
    name="tiny",
    vit=ViTConfig(28, 14, 24, 3, 4, 37, eps=1e-6, ln_vision_eps=1e-5),
    qformer=QFormerConfig(5, 20, 5, 2, 33, encoder_width=24, cross_attention_freq=2),
    llama=LlamaConfig(19, 32, 2, 4, 2, 8, 45, eps=1e-5),
    template="chatml",
    bos_id=1,
    eos_ids=(2,),
)
RNG = np.random.default_rng(0)


def wanted(
    prefixes: tuple[str, ...], cfg: MiniGPT4Config = TINY
) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters under some prefixes."""
    model = nnx.eval_shape(lambda: MiniGPT4(cfg, rngs=nnx.Rngs(0)))
    leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
    shapes = {"/".join(map(str, path)): tuple(leaf.shape) for path, leaf in leaves}
    return {path: s for path, s in shapes.items() if path.startswith(prefixes)}


def eva_file(blocks: int = 3) -> dict[str, np.ndarray]:
    """State dict with the names and layouts of `eva_vit_g.pth`."""
    d, f = 24, 37
    file = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 5, d),
        "patch_embed.proj.weight": (d, 3, 14, 14),
        "patch_embed.proj.bias": (d,),
    }
    for i in range(blocks):
        one = {
            "norm1.weight": (d,),
            "norm1.bias": (d,),
            "attn.q_bias": (d,),
            "attn.v_bias": (d,),
            "attn.qkv.weight": (3 * d, d),
            "attn.proj.weight": (d, d),
            "attn.proj.bias": (d,),
            "norm2.weight": (d,),
            "norm2.bias": (d,),
            "mlp.fc1.weight": (f, d),
            "mlp.fc1.bias": (f,),
            "mlp.fc2.weight": (d, f),
            "mlp.fc2.bias": (d,),
        }
        file |= {f"blocks.{i}.{name}": shape for name, shape in one.items()}
    return {n: RNG.standard_normal(s).astype(np.float32) for n, s in file.items()}


def lavis_file() -> dict[str, np.ndarray]:
    """State dict with the names and layouts of a LAVIS BLIP-2 file."""
    d, e, f = 20, 24, 33
    file = {
        "query_tokens": (1, 5, d),
        "ln_vision.weight": (e,),
        "ln_vision.bias": (e,),
        "t5_proj.weight": (7, d),
        "t5_proj.bias": (7,),
        "Qformer.bert.embeddings.position_ids": (1, 9),
        "Qformer.bert.embeddings.LayerNorm.weight": (d,),
        "Qformer.bert.embeddings.LayerNorm.bias": (d,),
    }
    for i in range(5):
        layer = f"Qformer.bert.encoder.layer.{i}."
        kinds = (
            {"attention": d, "crossattention": e} if i % 2 == 0 else {"attention": d}
        )
        for kind, width in kinds.items():
            for name, size in (("query", d), ("key", width), ("value", width)):
                file[f"{layer}{kind}.self.{name}.weight"] = (d, size)
                file[f"{layer}{kind}.self.{name}.bias"] = (d,)
            file[f"{layer}{kind}.output.dense.weight"] = (d, d)
            for name in ("dense.bias", "LayerNorm.weight", "LayerNorm.bias"):
                file[f"{layer}{kind}.output.{name}"] = (d,)
        file[f"{layer}intermediate_query.dense.weight"] = (f, d)
        file[f"{layer}intermediate_query.dense.bias"] = (f,)
        file[f"{layer}output_query.dense.weight"] = (d, f)
        for name in ("dense.bias", "LayerNorm.weight", "LayerNorm.bias"):
            file[f"{layer}output_query.{name}"] = (d,)
    return {n: RNG.standard_normal(s).astype(np.float32) for n, s in file.items()}


def llama_file(names: str) -> dict[str, np.ndarray]:
    """State dict of the tiny decoder by Hugging Face's or llama.cpp's names."""
    d, f, v, kv = 32, 45, 19, 16
    hf = names == "hf"
    file = {
        "model.embed_tokens.weight" if hf else "token_embd.weight": (v, d),
        "model.norm.weight" if hf else "output_norm.weight": (d,),
        "lm_head.weight" if hf else "output.weight": (v, d),
    }
    for i in range(2):
        file |= {
            f"model.layers.{i}.{a}.weight" if hf else f"blk.{i}.{b}.weight": shape
            for a, b, shape in (
                ("input_layernorm", "attn_norm", (d,)),
                ("self_attn.q_proj", "attn_q", (d, d)),
                ("self_attn.k_proj", "attn_k", (kv, d)),
                ("self_attn.v_proj", "attn_v", (kv, d)),
                ("self_attn.o_proj", "attn_output", (d, d)),
                ("post_attention_layernorm", "ffn_norm", (d,)),
                ("mlp.gate_proj", "ffn_gate", (f, d)),
                ("mlp.up_proj", "ffn_up", (f, d)),
                ("mlp.down_proj", "ffn_down", (d, f)),
            )
        }
    return {n: RNG.standard_normal(s).astype(np.float32) for n, s in file.items()}


def test_every_table_fills_its_part_of_the_model_exactly():
    for table, file, prefixes in (
        (vit.EVA, eva_file(), ("vit/",)),
        (qformer.LAVIS, lavis_file(), ("qformer/", "ln_vision/")),
        (llama.HF, llama_file("hf"), ("llama/",)),
        (llama.GGUF, llama_file("gguf"), ("llama/",)),
    ):
        shapes = wanted(prefixes)
        arrays = apply(table, file, shapes)
        assert {path: array.shape for path, array in arrays.items()} == shapes


def test_a_fused_qkv_is_split_into_heads():
    file = eva_file()
    arrays = apply(vit.EVA, file, wanted(("vit/",)))
    x_D = RNG.standard_normal(24).astype(np.float32)
    fused = (file["blocks.1.attn.qkv.weight"] @ x_D).reshape(3, 4, 6)
    for index, name in enumerate("qkv"):
        kernel_DNK = arrays[f"vit/blocks/attn/{name}/kernel"][1]
        np.testing.assert_allclose(
            np.einsum("D,DNK->NK", x_D, kernel_DNK), fused[index], rtol=1e-5, atol=1e-5
        )


def test_an_output_layer_joins_heads_in_torch_order():
    file = llama_file("hf")
    arrays = apply(llama.HF, file, wanted(("llama/",)))
    x_NK = RNG.standard_normal((4, 8)).astype(np.float32)
    got = np.einsum("NK,NKD->D", x_NK, arrays["llama/blocks/attn/out/kernel"][0])
    want = file["model.layers.0.self_attn.o_proj.weight"] @ x_NK.reshape(-1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_interleaved_rotary_rows_become_halves():
    heads, size, width = 3, 8, 5
    halves = RNG.standard_normal((heads * size, width))
    # The row order of llama.cpp's converter, from its definition.
    paired = np.stack(
        [
            halves[h * size + j * size // 2 + i]
            for h in range(heads)
            for i in range(size // 2)
            for j in range(2)
        ]
    )
    want = (width, heads, size)
    got = half_rotated(SPLIT_HEADS).convert(paired, want)
    np.testing.assert_array_equal(got, SPLIT_HEADS.convert(halves, want))
    assert not np.array_equal(SPLIT_HEADS.convert(paired, want), got)


def test_layers_are_ordered_by_number_not_by_name():
    source = {f"layer.{i}": np.full(2, i) for i in (10, 2, 0, 1, *range(3, 10))}
    rules = (Rule(r"layer\.(\d+)", "w", KEEP),)
    arrays = apply(rules, source, {"w": (11, 2)})
    np.testing.assert_array_equal(arrays["w"][:, 0], np.arange(11))


def test_cross_attention_of_every_second_layer_is_stacked():
    file = lavis_file()
    arrays = apply(qformer.LAVIS, file, wanted(("qformer/", "ln_vision/")))
    name = "Qformer.bert.encoder.layer.4.crossattention.self.key.bias"
    got = arrays["qformer/cross/attn/k/bias"]
    np.testing.assert_array_equal(got[2].reshape(-1), file[name])


def test_one_error_lists_everything_that_is_wrong():
    file = eva_file()
    del file["pos_embed"]
    del file["blocks.1.norm1.bias"]
    file["blocks.0.mlp.fc1.weight"] = np.zeros((24, 37), np.float32)
    file["surprise"] = np.zeros(3)
    with pytest.raises(CheckpointError) as error:
        apply(vit.EVA, file, wanted(("vit/",)))
    text = str(error.value)
    assert "4 problems" in text
    assert "surprise [3]: no rule knows it" in text
    assert "vit/position_embedding [5, 24]: nothing in the source fills it" in text
    assert "vit/blocks/norm1/bias: the source has layers [0, 2], want 3" in text
    assert "blocks.0.mlp.fc1.weight: got [24, 37], want [37, 24]" in text


def test_nothing_is_read_before_names_and_shapes_are_right():
    class Unreadable:
        shape = (3, 3)

        def __array__(self, dtype=None, copy=None):
            raise AssertionError("read too early")

    with pytest.raises(CheckpointError, match="want"):
        apply((Rule("a", "w", KEEP),), {"a": Unreadable()}, {"w": (3, 4)})


def test_two_tensors_for_one_parameter_are_refused():
    rules = (Rule("a|b", "w", KEEP),)
    with pytest.raises(CheckpointError, match="both a and b fill it"):
        plan(rules, {"a": np.zeros(2), "b": np.zeros(2)}, {"w": (2,)})


def test_a_dropped_tensor_needs_no_parameter_and_fills_none():
    rules = (Drop("x", "a buffer"), Rule("[wx]", "w", KEEP))
    source = {"x": np.ones(3), "w": np.zeros(2)}
    np.testing.assert_array_equal(apply(rules, source, {"w": (2,)})["w"], [0, 0])


def test_the_fortieth_block_of_eva_is_dropped_and_a_fourth_of_three_is_not():
    file = eva_file()
    last = {n.replace("blocks.0", "blocks.39"): a for n, a in file.items()}
    assert apply(vit.EVA, {**last, **file}, wanted(("vit/",)))
    with pytest.raises(CheckpointError, match=r"layers \[0, 1, 2, 3\], want 3"):
        apply(vit.EVA, eva_file(blocks=4), wanted(("vit/",)))


def test_a_tied_head_may_repeat_the_embeddings_but_not_differ():
    file = llama_file("hf")
    tied = dataclasses.replace(TINY.llama, tie_embeddings=True)
    shapes = wanted(("llama/",), dataclasses.replace(TINY, llama=tied))
    with pytest.raises(CheckpointError, match="not equal to model.embed_tokens.weight"):
        apply(llama.HF, file, shapes)
    file["lm_head.weight"] = file["model.embed_tokens.weight"].copy()
    assert "llama/head/kernel" not in apply(llama.HF, file, shapes)


def test_a_key_bias_that_is_not_zero_is_never_lost():
    d = 24
    file = {f"encoder.layers.{i}.self_attn.qkv.bias": np.ones(3 * d) for i in range(3)}
    shapes = {f"vit/blocks/attn/{name}/bias": (3, 4, 6) for name in "qv"}
    with pytest.raises(CheckpointError, match="its values are not zero"):
        apply(vit.HF_BLIP2, file, shapes)
    for bias in file.values():
        bias[d : 2 * d] = 0
    arrays = apply(vit.HF_BLIP2, file, shapes)
    assert all(array.all() for array in arrays.values())


def test_dtypes_stay_as_in_the_file():
    rules = (Rule(r"a\.(\d)", "w", TRANSPOSE),)
    half = {f"a.{i}": np.zeros((2, 3), np.float16) for i in range(2)}
    assert apply(rules, half, {"w": (2, 3, 2)})["w"].dtype == np.float16
    half["a.1"] = half["a.1"].astype(np.float32)
    with pytest.raises(CheckpointError, match="mixes dtypes"):
        apply(rules, half, {"w": (2, 3, 2)})


def test_layouts_state_the_shape_they_read():
    for layout, want in (
        (KEEP, (3, 4)),
        (TRANSPOSE, (3, 4)),
        (SPLIT_HEADS, (5, 3, 4)),
        (JOIN_HEADS, (3, 4, 5)),
        (FLAT, (3, 4)),
        (PATCH, (2, 3, 4, 5)),
        (batched(2), (3,)),
        (part(1, 3, SPLIT_HEADS), (5, 3, 4)),
        (half_rotated(SPLIT_HEADS), (5, 3, 4)),
    ):
        shape = layout.source_shape(want)
        values = np.arange(np.prod(shape)).reshape(shape)
        got = layout.convert(values, want)
        assert got.shape == want, layout.name
        assert len(np.unique(got)) == got.size, layout.name


@pytest.mark.parametrize(
    "layout, want",
    [
        (KEEP, (3, 4)),
        (TRANSPOSE, (3, 4)),
        (SPLIT_HEADS, (5, 3, 4)),
        (JOIN_HEADS, (3, 4, 5)),
        (FLAT, (3, 4)),
        (PATCH, (2, 3, 4, 5)),
        (batched(2), (3,)),
        (half_rotated(SPLIT_HEADS), (5, 3, 8)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_inverse_of_a_layout_gives_its_source_back(layout, want):
    shape = layout.source_shape(want)
    source = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(layout.invert(layout.convert(source, want)), source)


def test_the_inverses_of_parts_are_joined_to_their_source():
    layouts = [part(index, 3, SPLIT_HEADS) for index in range(3)]
    source = RNG.standard_normal(layouts[0].source_shape((5, 3, 4)))
    parts = [layout.invert(layout.convert(source, (5, 3, 4))) for layout in layouts]
    np.testing.assert_array_equal(np.concatenate(parts), source)
    assert [layout.index for layout in layouts] == [0, 1, 2]


def test_a_patch_kernel_keeps_rows_columns_and_channels_apart():
    kernel_DCHW = RNG.standard_normal((7, 3, 4, 5))
    kernel_HWCD = PATCH.convert(kernel_DCHW, (4, 5, 3, 7))
    assert kernel_HWCD[1, 2, 0, 6] == kernel_DCHW[6, 0, 1, 2]


def test_resized_positions_match_torch():
    torch = pytest.importorskip("torch")
    positions_1PD = RNG.standard_normal((1, 17, 6)).astype(np.float32)
    got = vit.resized(positions_1PD, 7)
    grid = torch.tensor(positions_1PD[:, 1:]).reshape(1, 4, 4, 6).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(
        grid, size=(7, 7), mode="bicubic", align_corners=False
    )
    want = want.permute(0, 2, 3, 1).reshape(1, 49, 6).numpy()
    np.testing.assert_array_equal(got[:, :1], positions_1PD[:, :1])
    np.testing.assert_allclose(got[:, 1:], want, atol=2e-6)
