"""A decoder out of a GGUF file: sizes from its metadata, values as `gguf` dequantises."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

from convert import model, sources, variants
from minigpt4_jax.errors import CheckpointError
from tests import parity, published

# Quantised rows are whole blocks: 32 values in Q8_0 and Q4_1, 256 in K-quants.
CFG = dataclasses.replace(
    published.ODD,
    name="tiny_gguf",
    llama=dataclasses.replace(
        published.ODD.llama, width=64, head_size=16, mlp_width=256, eps=1e-5
    ),
)
Q8, Q4 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1
KINDS = {  # F16 where nothing is said
    "attn_k": Q8,
    "attn_output": Q8,
    "ffn_gate": Q4,
    "ffn_down": gguf.GGMLQuantizationType.Q4_K,
    "ffn_up": Q8,
}
NAMES = (
    ("model.embed_tokens", "token_embd"),
    ("model.layers", "blk"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
)


def k_quant_blocks(rows: int, columns: int) -> np.ndarray:
    """Random Q4_K blocks with small scales: gguf has no quantiser for them."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (rows, columns // 256, 144), np.uint8)
    scales = rng.uniform(0.001, 0.01, (rows, columns // 256, 2)).astype(np.float16)
    blocks[..., :4] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def write(
    path, cfg, state: dict[str, torch.Tensor], architecture="llama", more=True
) -> dict:
    """The file; returns the values it holds by Hugging Face's names.

    more: with the metadata that early files lack.
    """
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_embedding_length(cfg.width)
    writer.add_block_count(cfg.num_layers)
    writer.add_feed_forward_length(cfg.mlp_width)
    writer.add_head_count(cfg.num_heads)
    writer.add_layer_norm_rms_eps(cfg.eps)
    if more:
        writer.add_head_count_kv(cfg.num_kv_heads)
        writer.add_rope_freq_base(cfg.rope_theta)
        writer.add_rope_dimension_count(cfg.head_size)
    writer.add_context_length(cfg.max_positions)
    held = {}
    for name, tensor in state.items():
        values = tensor.numpy()
        theirs = name
        for old, new in NAMES:
            theirs = theirs.replace(old, new)
        heads = {"attn_q": cfg.num_heads, "attn_k": cfg.num_kv_heads}
        part = theirs.split(".")[-2]
        if part in heads:  # halves -> pairs, as llama.cpp's converter
            rows = values.reshape(heads[part], 2, cfg.head_size // 2, -1)
            values = rows.swapaxes(1, 2).reshape(values.shape)
        kind = KINDS.get(part)
        if kind is None:
            stored = values.astype(np.float32 if values.ndim == 1 else np.float16)
            writer.add_tensor(theirs, stored)
            dense = stored.astype(np.float32)
        else:
            is_k = kind == gguf.GGMLQuantizationType.Q4_K
            blocks = k_quant_blocks(*values.shape) if is_k else quantize(values, kind)
            writer.add_tensor(theirs, blocks, raw_dtype=kind)
            dense = dequantize(blocks, kind).reshape(values.shape)
        if part in heads:
            pairs = dense.reshape(heads[part], cfg.head_size // 2, 2, -1)
            dense = pairs.swapaxes(1, 2).reshape(dense.shape)
        held[name] = torch.from_numpy(dense.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def test_a_gguf_decoder_becomes_part_of_a_model(tmp_path):
    theirs = parity.Whole(CFG, seed=11)
    files = published.parts(tmp_path, CFG, theirs)
    held = write(tmp_path / "llm.gguf", CFG.llama, theirs.decoder.state_dict())
    published.tokenizer(tmp_path)
    given = files | {"llama": tmp_path / "llm.gguf"}
    preset = published.preset(tmp_path, CFG)
    out = model.prepare(preset, given).write(tmp_path / "out")
    arrays = {}
    for shard in out.glob("*.safetensors"):
        arrays |= load_file(shard)
    for path, name in (
        ("llama/blocks/mlp/down/kernel", "model.layers.1.mlp.down_proj.weight"),
        ("llama/blocks/mlp/gate/kernel", "model.layers.1.mlp.gate_proj.weight"),
    ):
        np.testing.assert_array_equal(arrays[path][1], held[name].numpy().T)
    k_DGK = arrays["llama/blocks/attn/k/kernel"][0]
    k_proj = held["model.layers.0.self_attn.k_proj.weight"].numpy()
    np.testing.assert_array_equal(k_DGK.reshape(64, -1), k_proj.T)
    assert arrays["llama/head/kernel"].shape == (64, 311)


def test_what_is_16_bit_stays_so(tmp_path):
    theirs = parity.Whole(CFG, seed=11)
    path = tmp_path / "llm.gguf"
    held = write(path, CFG.llama, theirs.decoder.state_dict())
    source = sources.read(path)
    assert source["token_embd.weight"].dtype == np.float16
    got = np.asarray(source["token_embd.weight"])
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, held["model.embed_tokens.weight"].numpy())
    assert source["blk.0.ffn_up.weight"].dtype == np.float32  # Q8_0
    assert source["blk.0.attn_norm.weight"].dtype == np.float32


def test_early_files_have_less_metadata(tmp_path):
    cfg = dataclasses.replace(CFG.llama, num_kv_heads=CFG.llama.num_heads)
    theirs = parity.Whole(dataclasses.replace(CFG, llama=cfg), seed=11)
    path = tmp_path / "llm.gguf"
    write(path, cfg, theirs.decoder.state_dict(), more=False)
    sizes = variants.llama_sizes(sources.read(path))
    assert sizes == dataclasses.asdict(cfg)


def test_scaled_rotary_angles_are_refused(tmp_path):
    state = parity.Whole(CFG, seed=11).decoder.state_dict()
    path = tmp_path / "llm.gguf"
    write(path, CFG.llama, state | {"rope_freqs.weight": torch.ones(8)})
    with pytest.raises(CheckpointError, match="scaled rotary"):
        variants.llama_sizes(sources.read(path))


def test_another_architecture_in_a_gguf_file_is_refused(tmp_path):
    theirs = parity.Whole(CFG, seed=11)
    files = published.parts(tmp_path, CFG, theirs)
    path = tmp_path / "llm.gguf"
    write(path, CFG.llama, theirs.decoder.state_dict(), architecture="falcon")
    preset = published.preset(tmp_path, CFG)
    with pytest.raises(CheckpointError, match="'falcon'"):
        model.prepare(preset, files | {"llama": path})


def test_a_truncated_gguf_file_is_refused(tmp_path):
    theirs = parity.Whole(CFG, seed=11)
    path = tmp_path / "llm.gguf"
    write(path, CFG.llama, theirs.decoder.state_dict())
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(CheckpointError, match="llm.gguf"):
        model.prepare("minigpt4_vicuna_7b", {"llama": path})
