"""What training tests share: a frozen model, photos in tar shards, a config, all tiny."""

import io
import json
import tarfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

from minigpt4_jax import checkpoint, sharding
from minigpt4_jax.models.minigpt4 import MiniGPT4
from tests import tiny

TRAINABLE = (r"qformer/.*", r"projector/.*")
SUBJECTS = ("dog", "man", "cat", "girl", "bird", "boy")


def arrays(model: MiniGPT4) -> dict[str, np.ndarray]:
    """Every parameter by path."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(value[...]) for path, value in flat}


def write_frozen(path: Path, seed: int = 0) -> Path:
    """A converted directory that lacks what TRAINABLE names."""
    frozen = {
        name: value
        for name, value in arrays(tiny.model(seed)).items()
        if not name.startswith(("qformer/", "projector/"))
    }
    tokenizer = {"tokenizer.json": tiny.tokenizer_json().encode()}
    checkpoint.save_directory(path, frozen, tiny.CONFIG, tokenizer, {})
    return path


def jpeg(seed: int) -> bytes:
    """A photo of two colours, so that photos differ in more than noise."""
    rng = np.random.default_rng(seed)
    image_HWC = np.repeat(rng.integers(0, 256, (2, 1, 3), np.uint8), 8, axis=0)
    file = io.BytesIO()
    Image.fromarray(np.repeat(image_HWC, 14, axis=1)).save(file, "jpeg")
    return file.getvalue()


def captions(i: int) -> list[str]:
    """Five captions of photo i, two of them alike in no word but the subject."""
    who = SUBJECTS[i % len(SUBJECTS)]
    return [
        f"A {who} runs on grass.",
        f"The {who} is running.",
        f"A {who} in a park.",
        f"One {who} outside.",
        f"A happy {who} plays.",
    ]


def write_shard(path: Path, numbers, seed: int = 0) -> Path:
    """Photos with these numbers; the seed changes their pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in numbers:
            fields = json.dumps({"captions": captions(i)}).encode()
            members = ((".jpg", jpeg(100 * seed + i)), (".json", fields))
            for suffix, content in members:
                info = tarfile.TarInfo(f"{i:05d}{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def write_photos(folder: Path, train: int = 6, val: int = 2) -> Path:
    """DIR/train and DIR/val with so many photos."""
    write_shard(folder / "train" / "0.tar", range(train))
    write_shard(folder / "val" / "0.tar", range(train, train + val))
    return folder


def config(frozen: Path | str, **changes) -> ConfigDict:
    """A run of 8 steps, saved after step 4; `optim__peak_lr=1` changes cfg.optim.

    Its photos are looked for beside the frozen model, as `write_photos` puts them.
    """
    frozen = Path(frozen)
    cfg = ConfigDict(
        dict(
            checkpoint=str(frozen),
            init="",
            trainable=TRAINABLE,
            loss="captions",
            data=dict(photos=dict(path=str(frozen.parent / "data/train"), weight=1)),
            val=str(frozen.parent / "data/val"),
            text=dict(
                clean="", limit=0, captions="all", words_least=2, one_sentence=0.5
            ),
            batch_size=2,
            row=dict(tokens=150, answers=120, packed=0),
            cache=dict(dtype="float32", folder=str(frozen.parent / "features")),
            optim=dict(
                schedule="cosine",
                peak_lr=1e-2,
                end_lr=1e-3,
                warmup_lr=0.0,
                warmup_steps=2,
                epoch_steps=0,
                total_steps=8,
                decay_rate=1.0,
                b1=0.9,
                b2=0.98,
                eps=1e-8,
                weight_decay=0.05,
                clip_norm=1.0,
                accumulate=1,
            ),
            dtype="",
            quantize="",
            remat="none",
            loader=dict(workers=0, prefetch=2, limit_s=60, budget=0.01),
            keep=dict(last=2, every=0),
            guard=dict(skipped=10),
            watchdog=dict(limit_s=120, other_s=600, start_s=60),
            mesh=dict(data=0, fsdp=1, tensor=1),
            seed=3,
            log_every=1,
            save_every=4,
            eval_every=8,
        )
    )
    for name, value in changes.items():
        *groups, knob = name.split("__")
        part = cfg
        for group in groups:
            part = part[group]
        part[knob] = value
    return cfg


def one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh(devices=jax.devices()[:1])


def random_patches(count: int, seed: int = 0) -> np.ndarray:
    """patches_BPE as the tiny ViT shapes them."""
    shape = (count, tiny.CONFIG.vit.num_patches, tiny.CONFIG.vit.width)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
