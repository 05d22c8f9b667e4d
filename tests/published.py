"""Tiny files in the formats that people have, written by torch from known weights.

Sizes all differ, so that a transpose cannot pass; the peers compute what a converted
model has to (parity.Whole).
"""

import dataclasses
import json
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file

from minigpt4_jax.models.llama import LlamaConfig
from minigpt4_jax.models.minigpt4 import MiniGPT4Config
from minigpt4_jax.models.qformer import QFormerConfig
from minigpt4_jax.models.vit import ViTConfig
from tests import parity

V0 = 32_001  # rows of Vicuna v0, by which it is known

VICUNA = MiniGPT4Config(
    name="tiny_vicuna",
    vit=ViTConfig(
        image_size=42,
        patch_size=14,
        width=24,
        num_layers=3,
        num_heads=4,
        mlp_width=37,
        eps=1e-6,
        ln_vision_eps=1e-5,
    ),
    qformer=QFormerConfig(
        num_queries=8,
        width=20,
        num_layers=4,
        num_heads=5,
        mlp_width=33,
        encoder_width=24,
    ),
    llama=LlamaConfig(
        vocab_size=V0,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_size=8,
        mlp_width=45,
        eps=1e-6,
    ),
    template="vicuna_v0",
    bos_id=1,
    eos_ids=(2,),
)
ODD = (
    dataclasses.replace(  # other patches, queries and layers, grouped keys, no pad row
        VICUNA,
        name="tiny_odd",
        vit=dataclasses.replace(
            VICUNA.vit,
            image_size=36,
            patch_size=12,
            width=30,
            num_heads=3,
            mlp_width=41,
        ),
        qformer=dataclasses.replace(
            VICUNA.qformer,
            num_queries=11,
            width=28,
            num_layers=5,
            num_heads=2,
            encoder_width=30,
        ),
        llama=dataclasses.replace(VICUNA.llama, vocab_size=311, num_kv_heads=2),
    )
)
STRIPS = dataclasses.replace(  # no Q-Former: 16 patches, 4 of them a slot
    VICUNA,
    name="tiny_strips",
    vit=dataclasses.replace(VICUNA.vit, image_size=56),
    qformer=None,
    llama=dataclasses.replace(VICUNA.llama, vocab_size=307, eps=1e-5),
    template="llama2",
)

EVA_NAMES = (  # transformers' name of a tower's tensor -> the reference's
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("encoder.layers", "blocks"),
    ("layer_norm", "norm"),
    ("self_attn.qkv", "attn.qkv"),
    ("self_attn.projection", "attn.proj"),
)


def eva(theirs: parity.Whole, dtype=torch.float16) -> dict[str, torch.Tensor]:
    """`eva_vit_g.pth`: 16-bit, with a 40th block, a norm and a head that nobody uses."""
    state = {}
    for name, tensor in theirs.vision.state_dict().items():
        if name.startswith("post_layernorm"):
            continue
        for old, new in EVA_NAMES:
            name = name.replace(old, new)
        if name.endswith("attn.qkv.bias"):
            q, _, v = tensor.chunk(3)
            state[name.replace("qkv.bias", "q_bias")] = q
            state[name.replace("qkv.bias", "v_bias")] = v
        else:
            state[name] = tensor
    last = {k.replace("blocks.0", "blocks.39"): v for k, v in state.items()}
    width = state["cls_token"].shape[-1]
    state |= {k: v for k, v in last.items() if "blocks.39" in k}
    state |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    state |= {"head.weight": torch.ones(7, width), "head.bias": torch.zeros(7)}
    return {k: v.to(dtype).clone() for k, v in state.items()}


def blip2(theirs: parity.Whole, decoder: str = "t5") -> dict:
    """A LAVIS file: {"model": ...} with the text branch's leftovers and T5's projector."""
    state = {}
    for name, tensor in theirs.queries.state_dict().items():
        name = name.replace("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm")
        name = name.replace("qformer.", "Qformer.bert.")
        state[name.replace("attention.attention.", "attention.self.")] = tensor
    norm = theirs.vision.post_layernorm
    state |= {"ln_vision.weight": norm.weight, "ln_vision.bias": norm.bias}
    width = state["query_tokens"].shape[-1]
    state[f"{decoder}_proj.weight"] = torch.ones(13, width)
    state[f"{decoder}_proj.bias"] = torch.ones(13)
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(9)[None]
    state["Qformer.cls.predictions.bias"] = torch.ones(9)
    state["Qformer.bert.embeddings.word_embeddings.weight"] = torch.ones(9, width)
    state["Qformer.bert.encoder.layer.0.intermediate.dense.weight"] = torch.ones(3, 2)
    return {"model": {k: v.clone() for k, v in state.items()}}


def checkpoint(theirs: parity.Whole, **more: torch.Tensor) -> dict:
    """A MiniGPT-4 checkpoint with its optimizer, config and buffers."""
    weights = {f"llama_proj.{k}": v for k, v in theirs.llama_proj.state_dict().items()}
    moments = {
        i: {"step": torch.tensor(5.0), "exp_avg": v, "exp_avg_sq": v}
        for i, v in enumerate(weights.values())
    }
    buffers = {
        "Qformer.bert.embeddings.position_ids": torch.arange(9)[None],
        "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    return {
        "model": {**weights, **buffers, **more},
        "optimizer": {"state": moments, "param_groups": [{"lr": 3e-5, "params": [0]}]},
        "config": {"run": {"init_lr": 3e-5, "amp": True}},
        "scaler": {"scale": 65536.0},
        "epoch": 4,
    }


def llama_config(cfg: LlamaConfig) -> dict:
    return {
        "model_type": "llama",
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "intermediate_size": cfg.mlp_width,
        "rms_norm_eps": cfg.eps,
        "max_position_embeddings": cfg.max_positions,
        "vocab_size": cfg.vocab_size,
        # FastChat's Vicuna says so; its tokenizer says otherwise.
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def hugging_face(
    folder: Path,
    cfg: LlamaConfig,
    state: dict[str, torch.Tensor],
    *,
    kind: str = "bin",
    shards: int = 2,
    dtype=torch.float16,
) -> Path:
    """A Hugging Face folder: shards by an index, old buffers, a tokenizer."""
    folder.mkdir(parents=True)
    state = {k: v.to(dtype).clone() for k, v in state.items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(state)
    stem, suffix = ("pytorch_model", "bin") if kind == "bin" else ("model", kind)
    write = torch.save if kind == "bin" else save_file
    weight_map = {}
    for i in range(shards):
        # FastChat's low-memory names: not padded, as an index may have them.
        file = f"{stem}-{i + 1}.{suffix}" if shards > 1 else f"{stem}.{suffix}"
        part = names[i::shards]
        write({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(llama_config(cfg)))
    tokenizer(folder)
    return folder


def meta(folder: Path, cfg: LlamaConfig, state: dict, shards: int = 1) -> Path:
    """Meta's folder: interleaved rotary rows, matrices split over model-parallel shards."""
    folder.mkdir(parents=True)
    files: list[dict] = [{} for _ in range(shards)]
    names = (
        ("model.embed_tokens", "tok_embeddings", 1),
        ("self_attn.q_proj", "attention.wq", 0),
        ("self_attn.k_proj", "attention.wk", 0),
        ("self_attn.v_proj", "attention.wv", 0),
        ("self_attn.o_proj", "attention.wo", 1),
        ("mlp.gate_proj", "feed_forward.w1", 0),
        ("mlp.up_proj", "feed_forward.w3", 0),
        ("mlp.down_proj", "feed_forward.w2", 1),
        ("post_attention_layernorm", "ffn_norm", None),
        ("input_layernorm", "attention_norm", None),
        ("model.norm", "norm", None),
        ("lm_head", "output", 0),
    )
    for name, tensor in state.items():
        old, new, axis = next(row for row in names if row[0] in name)
        heads = {
            "self_attn.q_proj": cfg.num_heads,
            "self_attn.k_proj": cfg.num_kv_heads,
        }
        if old in heads:  # halves -> pairs
            rows = tensor.reshape(heads[old], 2, cfg.head_size // 2, -1)
            tensor = rows.transpose(1, 2).reshape(tensor.shape)
        name = name.replace(old, new).removeprefix("model.")
        parts = [tensor] * shards if axis is None else tensor.chunk(shards, axis)
        for file, part in zip(files, parts):
            file[name] = part.half().clone()
    for i, file in enumerate(files):
        file["rope.freqs"] = torch.ones(4)
        torch.save(file, folder / f"consolidated.{i:02d}.pth")
    params = {
        "dim": cfg.width,
        "n_heads": cfg.num_heads,
        "n_kv_heads": cfg.num_kv_heads,
        "n_layers": cfg.num_layers,
        "norm_eps": cfg.eps,
        "vocab_size": -1,
    }
    (folder / "params.json").write_text(json.dumps(params))
    tokenizer(folder.parent)  # where Meta's download has it
    return folder


def tokenizer(folder: Path) -> None:
    """A small sentencepiece model with LLaMA's special pieces and byte fallback."""
    if (folder / "tokenizer.model").exists():
        return
    if not _TOKENIZER:
        _TOKENIZER.append(_trained())
    (folder / "tokenizer.model").write_bytes(_TOKENIZER[0])


_TOKENIZER: list[bytes] = []


def _trained() -> bytes:
    import io

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            ["a dog runs on grass", "Human Assistant ### image"] * 9
        ),
        model_writer=out,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


def parts(folder: Path, cfg: MiniGPT4Config, theirs: parity.Whole, **llm) -> dict:
    """All the files of one model in a folder, by the names of variants.PARTS."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(eva(theirs), folder / "eva_vit_g.pth")
    torch.save(checkpoint(theirs), folder / "projector.pth")
    made = {
        "vit": folder / "eva_vit_g.pth",
        "llama": hugging_face(
            folder / "llm", cfg.llama, theirs.decoder.state_dict(), **llm
        ),
        "projector": folder / "projector.pth",
    }
    if cfg.qformer is not None:
        torch.save(blip2(theirs), folder / "blip2.pth")
        made["qformer"] = folder / "blip2.pth"
    return made


def preset(folder: Path, cfg: MiniGPT4Config) -> str:
    """The config as a JSON file that `--preset` takes."""
    path = folder / f"{cfg.name}.json"
    path.write_text(json.dumps({"format": 1, **cfg.to_dict()}))
    return str(path)


def blip2_folder(folder: Path, theirs: parity.Whole, instruct: bool = False) -> Path:
    """A Hugging Face BLIP-2 or InstructBLIP: tower, Q-Former and a decoder of its own."""
    folder.mkdir(parents=True)
    state = {f"vision_model.{k}": v for k, v in theirs.vision.state_dict().items()}
    state |= theirs.queries.state_dict()
    width = state["query_tokens"].shape[-1]
    state["language_projection.weight"] = torch.ones(13, width)
    state["language_projection.bias"] = torch.ones(13)
    state["language_model.lm_head.weight"] = torch.ones(5, 13)
    if instruct:
        for name in ("weight", "bias"):
            norm = state.pop(f"qformer.layernorm.{name}")
            state[f"qformer.embeddings.layernorm.{name}"] = norm
        state["qformer.embeddings.word_embeddings.weight"] = torch.ones(9, width)
        state["qformer.embeddings.position_embeddings.weight"] = torch.ones(9, width)
        state["qformer.encoder.layer.0.intermediate.dense.weight"] = torch.ones(3, 2)
        state["qformer.encoder.layer.0.output.LayerNorm.bias"] = torch.ones(width)
    save_file({k: v.clone() for k, v in state.items()}, folder / "model.safetensors")
    kind = ("instructblip", "llama") if instruct else ("blip-2", "t5")
    config = {"model_type": kind[0], "text_config": {"model_type": kind[1]}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
