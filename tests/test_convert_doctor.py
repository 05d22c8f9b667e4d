"""`python -m convert doctor`: what files are, and every mismatch, each from a crafted pair.

Published files are sources of shapes here: no test needs their values.
"""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from convert import doctor, fit, model, sources, variants
from convert.sources import Source
from convert.tensors import Tensor
from minigpt4_jax import storage
from minigpt4_jax.errors import CheckpointError
from minigpt4_jax.models.minigpt4 import PRESETS
from tests import parity, published, tiny

ROOT = Path(__file__).parent.parent
HALF = np.dtype(np.float16)


def lazy(*shape: int, value: float = 0.0) -> Tensor:
    return Tensor(shape, HALF, lambda: np.full(shape, value, HALF))


def source(name: str, tensors: dict, config: dict | None = None) -> Source:
    return Source(Path(name), tensors, [], config or {})


def eva(pixels: int) -> Source:
    tensors = {
        "cls_token": lazy(1, 1, 1408),
        "pos_embed": lazy(1, (pixels // 14) ** 2 + 1, 1408),
        "patch_embed.proj.weight": lazy(1408, 3, 14, 14),
        "blocks.0.mlp.fc1.weight": lazy(6144, 1408),
    }
    tensors |= {f"blocks.{i}.norm1.weight": lazy(1408) for i in range(40)}
    return source(f"eva_{pixels}", tensors)


def qformer(projector: str, width: int) -> Source:
    layer = "Qformer.bert.encoder.layer"
    tensors = {
        "query_tokens": lazy(1, 32, 768),
        f"{layer}.0.attention.self.query.weight": lazy(768, 768),
        f"{projector}.weight": lazy(width, 768),
    }
    for i in range(12):
        tensors[f"{layer}.{i}.intermediate_query.dense.weight"] = lazy(3072, 768)
    for i in range(0, 12, 2):
        tensors[f"{layer}.{i}.crossattention.self.query.weight"] = lazy(768, 768)
        tensors[f"{layer}.{i}.crossattention.self.key.weight"] = lazy(768, 1408)
    return source(f"blip2_{projector}_{width}", tensors)


SIZES = {4096: (32, 32, 11_008), 5120: (40, 40, 13_824)}


def llama(
    name: str, rows: int, *, width=4096, norm=1.0, positions=2048, eps=1e-6
) -> Source:
    layers, heads, mlp = SIZES[width]
    config = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "rms_norm_eps": eps,
        "max_position_embeddings": positions,
    }
    tensors = {
        "model.embed_tokens.weight": lazy(rows, width),
        "lm_head.weight": lazy(rows, width),
        "model.norm.weight": lazy(width, value=norm),
    }
    return source(name, tensors, config)


def projector(name: str, out: int, into: int, lora: bool = False) -> Source:
    tensors = {"llama_proj.weight": lazy(out, into), "llama_proj.bias": lazy(out)}
    if lora:
        start = "llama_model.base_model.model.model.layers.0.self_attn.q_proj"
        tensors |= {f"{start}.lora_A.weight": lazy(64, 4096)}
        tensors |= {f"{start}.lora_B.weight": lazy(4096, 64)}
    return source(name, tensors)


FILES = {
    made.path.name: made
    for made in (
        eva(224),
        eva(448),
        qformer("t5_proj", 4096),
        qformer("t5_proj", 2048),
        qformer("opt_proj", 2560),
        llama("llama_7b", 32_000),
        llama("llama_13b", 32_000, width=5120),
        llama("vicuna_7b", 32_001),
        llama("vicuna_13b", 32_001, width=5120),
        llama("delta_7b", 32_001, norm=0.01),
        llama("delta_v11", 32_000, norm=0.01),
        llama("llama2_7b", 32_000, positions=4096, eps=1e-5),
        projector("p_7b", 4096, 768),
        projector("p_13b", 5120, 768),
        projector("p_llama2", 4096, 5632),
        projector("p_v2", 4096, 5632, lora=True),
        source("nothing", {"a.weight": lazy(3, 2)}),
    )
}
T5, T5_XL, OPT = "blip2_t5_proj_4096", "blip2_t5_proj_2048", "blip2_opt_proj_2560"


@pytest.fixture
def examine(monkeypatch, capsys):
    """(problems, what was printed) of files in FILES, by their names."""
    monkeypatch.setattr(sources, "read", lambda path: FILES[path.name])

    def look(*names: str, preset: str | None = None) -> tuple[list[str], str]:
        found = doctor.examine(map(Path, names), preset)
        return found.problems, capsys.readouterr().out

    return look


@pytest.mark.parametrize(
    "name, words",
    {
        "eva_224": "EVA ViT-g/14 at 224 px",
        "eva_448": "EVA ViT-g/14 at 448 px",
        T5: "a Q-Former of 12 layers and 32 queries out of BLIP-2 for FlanT5-XXL",
        OPT: "out of BLIP-2 for OPT (width 2560)",
        "llama_7b": "LLaMA 7B, or Vicuna 7B v1.1, which has the same shapes",
        "llama2_7b": "Llama-2 7B (base, chat and Vicuna v1.5 have the same shapes)",
        "vicuna_7b": "Vicuna 7B v0",
        "vicuna_13b": "Vicuna 13B v0",
        "delta_7b": "a Vicuna 7B v0 delta",
        "delta_v11": "a Vicuna 7B delta of v1.1 or later (32000 rows)",
        "p_7b": "a projector 768 -> 4096 of minigpt4_vicuna_7b",
        "p_13b": "a projector 768 -> 5120 of minigpt4_vicuna_13b",
        "p_llama2": "a projector 5632 -> 4096 of minigpt4_llama2_7b",
        "p_v2": "a checkpoint of MiniGPT-v2: LoRA weights and a projector 5632 -> 4096",
        "nothing": "nothing that a preset is made of",
    }.items(),
)
def test_a_file_is_told_by_its_shapes(name, words, examine):
    _, said = examine(name)
    assert said.splitlines()[0].startswith(f"{name}: ") and words in said


@pytest.mark.parametrize(
    "preset, names",
    {
        "minigpt4_vicuna_7b": ("eva_224", T5, "vicuna_7b", "p_7b"),
        "minigpt4_vicuna_13b": ("p_13b", "vicuna_13b", T5, "eva_224"),
        "minigpt4_llama2_7b": ("eva_224", "llama2_7b", "p_llama2"),
    }.items(),
)
def test_files_that_make_a_preset_are_told_with_the_command(preset, names, examine):
    problems, said = examine(*names)
    assert problems == []
    assert f"complete: python -m convert model --preset {preset}" in said
    assert all(f" {name} " in said.splitlines()[-1] for name in names)


def test_a_base_and_its_delta_are_added(examine):
    problems, said = examine("eva_224", T5, "llama_7b", "delta_7b", "p_7b")
    assert problems == []
    assert "llama_7b + delta_7b: Vicuna 7B v0" in said
    assert "--llm llama_7b --delta delta_7b" in said


def test_what_is_absent_is_named(examine):
    problems, said = examine("vicuna_13b", "p_13b")
    assert problems == []
    assert "as minigpt4_vicuna_13b:" in said
    assert "fits; --vit, --qformer would complete it" in said


MISMATCHES = {
    "a projector of 7B with a decoder of 13B": (
        ("eva_224", T5, "vicuna_13b", "p_7b"),
        "minigpt4_vicuna_7b, under minigpt4_vicuna_13b.*called pretrained_minigpt4.pth",
    ),
    "a projector of Llama-2 with Vicuna": (
        ("eva_224", T5, "vicuna_7b", "p_llama2"),
        r"minigpt4_llama2_7b, under minigpt4_vicuna_7b.*prerained_minigpt4_7b",
    ),
    "v1.1 or base LLaMA under the template of v0": (
        ("eva_224", T5, "llama_7b", "p_7b"),
        r"32000 rows, want the 32001 of Vicuna v0.*v0 delta \(--delta\)",
    ),
    "base LLaMA 13B in place of Vicuna": (
        ("eva_224", T5, "llama_13b", "p_13b"),
        r"LLaMA 13B.*32000 rows, want the 32001 of Vicuna v0",
    ),
    "a delta that is not applied": (
        ("eva_224", T5, "delta_7b", "p_7b"),
        r"a Vicuna 7B v0 delta, which is a difference.*as --llm, and this as --delta",
    ),
    "a delta of v1.1 added": (
        ("eva_224", T5, "llama_7b", "delta_v11", "p_7b"),
        r"32000 rows, want the 32001 of Vicuna v0",
    ),
    "a delta of another size": (
        ("llama_13b", "delta_7b"),
        r"32001 rows|the base has|are they of one size",
    ),
    "the tower of 448 px under 224": (
        ("eva_448", T5, "vicuna_7b", "p_7b"),
        r"448 px, under a preset of 224 px: that tower belongs to MiniGPT-v2",
    ),
    "a Q-Former of OPT": (
        ("eva_224", OPT, "vicuna_7b", "p_7b"),
        r"OPT \(width 2560\).*give blip2_pretrained_flant5xxl\.pth",
    ),
    "a Q-Former of FlanT5-XL": (
        ("eva_224", T5_XL, "vicuna_7b", "p_7b"),
        r"FlanT5-XL \(width 2048\).*give blip2_pretrained_flant5xxl\.pth",
    ),
    "a Q-Former where the preset has none": (
        ("eva_224", T5, "llama2_7b", "p_llama2"),
        r"minigpt4_llama2_7b has none; leave --qformer out",
    ),
    "a checkpoint of MiniGPT-v2": (
        ("eva_224", "llama2_7b", "p_v2"),
        r"MiniGPT-v2 is another model.*pretrained_minigpt4_llama2_7b\.pth",
    ),
    "Vicuna in place of Llama-2": (
        ("eva_224", "vicuna_7b", "p_llama2"),
        r"Vicuna 7B v0: 32001 rows, want 32000|under minigpt4_vicuna_7b",
    ),
    "two towers": (("eva_224", "eva_448"), r"two of --vit: .* give one"),
    "no weights of ours": (("nothing",), r"tensors like a\.weight; is it the right"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_mismatch_is_named_with_what_to_do(name, examine):
    names, words = MISMATCHES[name]
    problems, said = examine(*names)
    assert len(problems) == 1, problems
    assert re.search(words, problems[0]), problems[0]
    assert f"  wrong: {problems[0]}" in said and "complete:" not in said


def test_what_no_shape_tells_is_said_to_be_uncertain(examine):
    parts = ("eva_224", "p_llama2")
    problems, said = examine(*parts, "llama2_7b")
    assert problems == [] and "uncertain: Llama-2 7B" in said
    assert "want the chat model" in said
    problems, said = examine(*parts, "llama_7b")
    assert problems == [] and "speak for LLaMA 1 or Vicuna v1.1" in said


def test_a_named_preset_is_what_files_are_held_against(examine):
    problems, said = examine("eva_224", "p_7b", preset="minigpt4_vicuna_13b")
    assert len(problems) == 1 and "under minigpt4_vicuna_13b" in said


def test_v1_1_under_the_template_of_v0_is_refused_whatever_the_preset_says():
    """A preset of one's own with 32,000 rows would fit by shape."""
    config = PRESETS["minigpt4_vicuna_7b"]
    rows = dataclasses.replace(config.llama, vocab_size=32_000)
    config = dataclasses.replace(config, llama=rows)
    parts = {"llama": variants.find(FILES["llama_7b"], "llama")}
    assert "32000 rows, want the 32001" in fit.mismatches(config, parts)[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(paths by part, preset) of a tiny model in published formats."""
    folder = tmp_path_factory.mktemp("files")
    theirs = parity.Whole(published.VICUNA, seed=3)
    paths = published.parts(folder, published.VICUNA, theirs)
    return paths, published.preset(folder, published.VICUNA)


def test_a_file_given_as_the_wrong_part_says_which_flag_takes_it(files):
    paths, preset = files
    for wrong, given, words in (
        ("vit", "qformer", "want a vit, found a Q-Former .* which --qformer takes"),
        (
            "qformer",
            "projector",
            "want a qformer, found a projector .*--projector take",
        ),
        ("projector", "llama", "want a projector, found Vicuna .* which --llm takes"),
        ("llama", "vit", "want a llama, found a ViT of width 24 .* which --vit takes"),
    ):
        with pytest.raises(CheckpointError, match=words):
            model.prepare(preset, paths | {wrong: paths[given]})


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "convert", "doctor", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_looks_at_real_files_and_exits_with_what_it_found(files, tmp_path):
    paths, preset = files
    good = run("--preset", preset, *paths.values())
    assert good.returncode == 0, good.stdout + good.stderr
    assert "complete: python -m convert model --preset tiny_vicuna" in good.stdout
    torch.save({"a": print}, tmp_path / "bad.pth")
    bad = run(tmp_path / "bad.pth")
    assert bad.returncode == CheckpointError.exit_code
    assert "bad.pth: cannot be used" in bad.stdout and "1 wrong" in bad.stdout


# Converted directories.


def test_the_demo_passes_its_self_test(demo_directory, capsys):
    assert doctor.examine([demo_directory]).problems == []
    said = capsys.readouterr().out
    assert "a converted directory, preset demo as published" in said
    assert said.count("  passed: ") == 4


def test_a_directory_that_lacks_a_file_is_named(tmp_path, capsys):
    path = tiny.save(tmp_path / "tiny")
    next(path.glob("*.safetensors")).write_bytes(b"")
    (problem,) = doctor.examine([path]).problems
    assert "damaged" in problem and "convert again" in problem
    (path / "preset.json").write_text("{")
    assert "preset.json is damaged" in doctor.examine([path]).problems[0]


def test_a_training_is_tested_with_what_it_trained(tmp_path, capsys):
    base, workdir = tiny.save(tmp_path / "tiny"), tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(
        json.dumps({"format": 1, "checkpoint": str(base)})
    )
    width = tiny.CONFIG.llama.width
    blind = {
        "projector/kernel": np.zeros((tiny.CONFIG.projector_width, width), np.float32)
    }
    storage.save_trainables(workdir, blind)
    problems = doctor.examine([workdir]).problems
    assert any(problem.startswith("image: ") for problem in problems)
    assert f"{workdir}: a training of {base}, preset tiny" in capsys.readouterr().out
