r"""Full-size conversion: speed, memory and disk, beside transformers on the same files.

    python -m benchmarks.conversion --work=DIR [--size=7b|13b] [--layers=N]

Makes random weights in the published files' formats, names and sizes (ViT-g in float16,
Q-Former, LLaMA in .bin shards, a MiniGPT-4 checkpoint), converts them as a user would,
lets transformers load the same LLaMA files, and has the 7B result say four tokens, layer
by layer. Needs about 32 GB of disk under DIR for 7b, 57 GB for 13b; removes what it made.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from absl import flags

from minigpt4_jax import errors
from minigpt4_jax.errors import InputError
from minigpt4_jax.models.minigpt4 import MiniGPT4Config, preset
from tests import published

PRESETS = {"7b": "minigpt4_vicuna_7b", "13b": "minigpt4_vicuna_13b"}
PROJECTORS = {4096: "prerained_minigpt4_7b.pth", 5120: "pretrained_minigpt4.pth"}
SHARDS = {"7b": 2, "13b": 3}  # as published
GENERATE = "benchmarks.conversion_generate"
PEER = """
import sys, time, torch, transformers
start = time.perf_counter()
model = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float16)
# A value of every page, since mapped files are read when they are touched.
total = sum(float(p.detach().view(-1)[::1024].float().sum()) for p in model.parameters())
print(time.perf_counter() - start)
"""


def main(argv: list[str]) -> None:
    """Make, convert, load, say; then remove."""
    args = flags.FLAGS
    if argv[1:] or not args.work:
        raise InputError("give --work=DIR, on the disk to be measured, and only flags")
    work = Path(args.work) / "conversion-benchmark"
    if work.exists():
        raise InputError(f"--work: {work} exists; an interrupted run? remove it")
    config = preset(PRESETS[args.size])
    try:
        work.mkdir(parents=True)
        rehearse(config, work, SHARDS[args.size], args.layers)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def rehearse(config: MiniGPT4Config, work: Path, shards: int, layers: int | None):
    """Print a table of what each step took."""
    files = make(config, work, shards, layers)
    # Random norms near 1 say "not a delta"; a Vicuna without eight layers is no preset,
    # so a smaller rehearsal names its sizes.
    name = config.name
    if layers:
        values = {"format": 1, **config.to_dict()}
        values["llama"]["num_layers"] = layers
        name = str(work / "smaller.json")
        Path(name).write_text(json.dumps(values))
    source = sum(size(path) for path in files.values())
    largest = 2 * config.llama.vocab_size * config.llama.width
    print(f"| step | GB | s | GB/s | peak anonymous memory, GiB |\n|{'---|' * 5}")

    seconds = write_speed(work)
    row("this disk: 2 GiB written and synced", 2 * 2**30, seconds, None)
    out = work / "converted"
    command = [sys.executable, "-m", "convert", "model", "--preset", name]
    command += [f"--{flag}={path}" for flag, path in files.items()] + [f"--out={out}"]
    seconds, peak, _ = watched(command)
    row("convert model", source, seconds, peak)
    print(
        f"|   above its largest tensor | {largest / 1e9:.2f} |  |  | "
        f"{(peak - largest) / 2**30:.2f} |"
    )
    print(f"|   written | {size(out) / 1e9:.2f} | | | |")
    llm = files["llm"]
    seconds, peak, _ = watched([sys.executable, "-c", PEER, str(llm)])
    row("transformers loads the LLaMA files", size(llm), seconds, peak)
    for path in files.values():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if size(out) < 20e9:
        command = [sys.executable, "-m", GENERATE, str(out)]
        seconds, peak, said = watched(command)
        row("load it and say four tokens", size(out), seconds, peak)
        print(said.strip())


def row(name: str, count: int, seconds: float, peak: int | None) -> None:
    memory = "" if peak is None else f"{peak / 2**30:.2f}"
    print(
        f"| {name} | {count / 1e9:.2f} | {seconds:.1f} | {count / 1e9 / seconds:.2f} | "
        f"{memory} |",
        flush=True,
    )


def watched(command: list[str]) -> tuple[float, int, str]:
    """(seconds, peak anonymous bytes, stdout); pages of mapped files do not count."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.02)
    said = process.stdout.read()
    if process.returncode:
        raise InputError(f"{' '.join(command[:5])} ... ended with {process.returncode}")
    return time.perf_counter() - start, peak, said


def anonymous(pid: int) -> int:
    """Bytes of memory that belong to no file."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in text.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def write_speed(work: Path) -> float:
    """Seconds to write and sync 2 GiB."""
    block, start = os.urandom(1 << 26), time.perf_counter()
    with open(work / "probe", "wb") as file:
        for _ in range(32):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    (work / "probe").unlink()
    return seconds


def size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def make(
    config: MiniGPT4Config, work: Path, shards: int, layers: int | None
) -> dict[str, Path]:
    """Random files by the flag of `convert model` that takes them."""
    noise = Noise()
    files = {
        "vit": work / "eva_vit_g.pth",
        "qformer": work / "blip2_pretrained_flant5xxl.pth",
        "llm": work / "llm",
        "projector": work / PROJECTORS[config.llama.width],
    }
    torch.save(noise.like(eva_shapes(config), torch.float16), files["vit"])
    torch.save({"model": noise.like(blip2_shapes(config))}, files["qformer"])
    projector = noise.like(projector_shapes(config))
    moments = {
        i: {"exp_avg": v, "exp_avg_sq": v} for i, v in enumerate(projector.values())
    }
    torch.save(
        {"model": projector, "optimizer": {"state": moments}}, files["projector"]
    )
    llama = config.llama
    llm = files["llm"]
    llm.mkdir()
    names = llama_shapes(config, layers or llama.num_layers)
    weight_map = {}
    total = sum(torch.Size(shape).numel() for shape in names.values())
    left = list(names)
    for i in range(shards):
        part, held = {}, 0
        while left and (held < total / shards or i == shards - 1):
            name = left.pop(0)
            part[name] = names[name]
            held += torch.Size(names[name]).numel()
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        torch.save(noise.like(part, torch.float16), llm / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (llm / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    values = published.llama_config(llama)
    values["num_hidden_layers"] = layers or llama.num_layers
    (llm / "config.json").write_text(json.dumps(values))
    published.tokenizer(llm)
    return files


class Noise:
    """Tensors cut out of one random block: drawing 7 billion numbers takes minutes."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        block = 0.02 * torch.randn(1 << 26, generator=generator)
        self.blocks = {torch.float32: block, torch.float16: block.half()}
        self.start = 0

    def like(self, shapes: dict[str, tuple], dtype=torch.float32) -> dict:
        """A tensor of its own for each shape; norms' weights are near 1."""
        return {name: self.tensor(name, shape, dtype) for name, shape in shapes.items()}

    def tensor(self, name: str, shape: tuple, dtype) -> torch.Tensor:
        count, block = torch.Size(shape).numel(), self.blocks[dtype]
        self.start = (self.start + 104_729) % (len(block) // 2)
        piece = block[self.start :]
        values = piece.repeat(-(-count // len(piece)))[:count].clone().reshape(shape)
        is_norm = name.endswith("weight") and len(shape) == 1
        return values + 1 if is_norm else values


def eva_shapes(config: MiniGPT4Config) -> dict[str, tuple]:
    cfg = config.vit
    d, f = cfg.width, cfg.mlp_width
    shapes: dict[str, tuple] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, cfg.num_patches, d),
        "patch_embed.proj.weight": (d, 3, cfg.patch_size, cfg.patch_size),
        "patch_embed.proj.bias": (d,),
        "norm.weight": (d,),
        "norm.bias": (d,),
        "head.weight": (1024, d),
        "head.bias": (1024,),
    }
    block = {
        **dict.fromkeys(("norm1.weight", "norm1.bias"), (d,)),
        **dict.fromkeys(("norm2.weight", "norm2.bias"), (d,)),
        **dict.fromkeys(("attn.q_bias", "attn.v_bias", "attn.proj.bias"), (d,)),
        "attn.qkv.weight": (3 * d, d),
        "attn.proj.weight": (d, d),
        "mlp.fc1.weight": (f, d),
        "mlp.fc1.bias": (f,),
        "mlp.fc2.weight": (d, f),
        "mlp.fc2.bias": (d,),
    }
    for i in range(cfg.num_layers + 1):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def blip2_shapes(config: MiniGPT4Config) -> dict[str, tuple]:
    cfg = config.qformer
    d, e, f = cfg.width, cfg.encoder_width, cfg.mlp_width
    bert = "Qformer.bert."
    shapes: dict[str, tuple] = {
        "query_tokens": (1, cfg.num_queries, d),
        "ln_vision.weight": (e,),
        "ln_vision.bias": (e,),
        "t5_proj.weight": (4096, d),
        "t5_proj.bias": (4096,),
        f"{bert}embeddings.LayerNorm.weight": (d,),
        f"{bert}embeddings.LayerNorm.bias": (d,),
    }
    for i in range(cfg.num_layers):
        layer = f"{bert}encoder.layer.{i}."
        for kind, width in attentions(cfg, i, d, e):
            for name, into in (("query", d), ("key", width), ("value", width)):
                shapes[f"{layer}{kind}.self.{name}.weight"] = (d, into)
                shapes[f"{layer}{kind}.self.{name}.bias"] = (d,)
            shapes[f"{layer}{kind}.output.dense.weight"] = (d, d)
            for name in ("dense.bias", "LayerNorm.weight", "LayerNorm.bias"):
                shapes[f"{layer}{kind}.output.{name}"] = (d,)
        shapes[f"{layer}intermediate_query.dense.weight"] = (f, d)
        shapes[f"{layer}intermediate_query.dense.bias"] = (f,)
        shapes[f"{layer}output_query.dense.weight"] = (d, f)
        for name in ("dense.bias", "LayerNorm.weight", "LayerNorm.bias"):
            shapes[f"{layer}output_query.{name}"] = (d,)
    return shapes


def attentions(cfg, i: int, d: int, e: int) -> Iterator[tuple[str, int]]:
    yield "attention", d
    if i % cfg.cross_attention_freq == 0:
        yield "crossattention", e


def projector_shapes(config: MiniGPT4Config) -> dict[str, tuple]:
    out, into = config.llama.width, config.projector_width
    return {"llama_proj.weight": (out, into), "llama_proj.bias": (out,)}


def llama_shapes(config: MiniGPT4Config, layers: int) -> dict[str, tuple]:
    cfg = config.llama
    d, f = cfg.width, cfg.mlp_width
    shapes: dict[str, tuple] = {"model.embed_tokens.weight": (cfg.vocab_size, d)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (d, d) for n in "qkvo"}
        shapes |= {f"{layer}mlp.{n}_proj.weight": (f, d) for n in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (d, f)
        shapes[f"{layer}input_layernorm.weight"] = (d,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (d,)
    shapes |= {"model.norm.weight": (d,), "lm_head.weight": (cfg.vocab_size, d)}
    return shapes


if __name__ == "__main__":
    flags.DEFINE_string("work", None, "Folder for all files, on the disk to measure.")
    flags.DEFINE_enum("size", "7b", tuple(PRESETS), "Of the decoder.")
    flags.DEFINE_integer("layers", None, "Of the decoder, for a smaller rehearsal.")
    errors.run(main)
