"""What few bits cost: likelihood of human captions, and greedy answers, paired by photo.

    python -m benchmarks.quantised --data=DATA [--split=test] [--limit=100] [--only=int4]

DATA holds a folder of tar shards for each split (`DATA/test/*.tar`). Of each photo all
captions are scored as answers to the same question, by the float32 model and by each
quantised one; the table has the mean difference in nats a token, the share of greedy
answers that are not the same text, CIDEr-D's difference, each with 95 % over photos, and
the bytes a decoder's weight takes. The demo's decoder comes from a file of 4 bits in
groups of 32 (Q4_1), which int4 finds again; "int4, moved" rounds other groups, which says
more about a decoder that was never rounded, and "int4, wide" groups of 128, as wide models
have them (144 where the inputs are 576, of which 128 is no part). The last line is the loss of a training of
stage 2 (configs/demo_stage2.py) with an int8 decoder beside a float32 one, no step made.
"""

import dataclasses
from pathlib import Path

import jax
import jax.flatten_util
import numpy as np
from absl import flags
from flax import nnx

from configs.demo_stage2 import get_config
from minigpt4_jax import Generator, checkpoint, errors, sharding
from minigpt4_jax.data.demo_texts import ONE_SENTENCE
from minigpt4_jax.data.sources import open_data
from minigpt4_jax.data.tokens import load_tokenizer
from minigpt4_jax.errors import InputError
from minigpt4_jax.evaluation.captions import cider_d_per_image
from minigpt4_jax.models import quantised
from minigpt4_jax.models.quantised import Quantisation
from minigpt4_jax.request import GREEDY, Request, user
from minigpt4_jax.step import Trainables, answer_loss
from minigpt4_jax.task import make_task

MODELS = {
    "int8": Quantisation("int8"),
    "int8, kv": Quantisation("int8", kv="int8"),
    "int8, kv, vision": Quantisation("int8", vision="int8", kv="int8"),
    "int4": Quantisation("int4"),
    "int4, moved": Quantisation(),
    "int4, wide": Quantisation(),
}
WIDE = {576: 144}  # groups of inputs, else of 128
MOVED = 16  # inputs, half a group
DRAWS = 2000  # of the bootstrap
FEW = dataclasses.replace(GREEDY, max_tokens=32)


def main(argv: list[str]) -> None:
    args = flags.FLAGS
    if not args.data or len(argv) > 1:
        raise InputError("give --data=FOLDER, which has SPLIT/*.tar, and only flags")
    examples = open_data(Path(args.data) / args.split)
    count = min(len(examples), args.limit)
    photos = [examples[i] for i in range(count)]
    plain = Measured(load(args.checkpoint, Quantisation()), photos)
    print(f"{count} photos, {plain.tokens.sum()} tokens of captions")
    print(
        "| | bytes a weight | nats a token more | answers changed, % | CIDEr-D more |"
    )
    print("|---|---:|---:|---:|---:|")
    for name, how in MODELS.items():
        if args.only not in name:
            continue
        generator = load(args.checkpoint, how, other=name.removeprefix("int4, "))
        print(row(name, Measured(generator, photos), plain, photos), flush=True)
    if not args.only:
        print(training(args.checkpoint, Path(args.data)))


def training(name: str, data: Path) -> str:
    """Loss of stage 2 on photos of val, and gradients, by how the decoder is held."""
    cfg = get_config()
    cfg.cache.dtype = ""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    directory = checkpoint.resolve(name)
    val = open_data(data / "val")
    losses, gradients = [], []
    for kind in ("", "int8"):
        how = Quantisation(kind)
        model = checkpoint.load_model(directory, mesh=mesh, quantisation=how)
        trained = Trainables(model, cfg.trainable, mesh)
        tokenizer = load_tokenizer(
            checkpoint.base_directory(directory),
            bos_id=model.cfg.bos_id,
            eos_ids=model.cfg.eos_ids,
        )
        parts = list(trained.params), tokenizer, [val], val, mesh, directory
        batches = make_task(cfg, model, *parts).val_batches

        def loss(params, batch, trained=trained):
            return answer_loss(trained.model(params), batch)

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        found = [step(trained.params, batch) for batch in batches]
        counts = sum(float(count) for (_, count), _ in found)
        losses.append(sum(float(total) for (total, _), _ in found) / counts)
        summed = [jax.flatten_util.ravel_pytree(grads)[0] for _, grads in found]
        gradients.append(np.sum(summed, axis=0))
    plain, few = gradients
    cosine = plain @ few / np.linalg.norm(plain) / np.linalg.norm(few)
    return (
        f"training, {len(batches)} batches of {cfg.batch_size} photos: loss "
        f"{losses[0]:.4f} with a float32 decoder, {losses[1] - losses[0]:+.4f} with an "
        f"int8 one; cosine of the gradients {cosine:.5f}"
    )


def load(name: str, how: Quantisation, *, other: str = "") -> Generator:
    """Args: other: which kernels are rounded here: those of "moved" or of "wide" groups."""
    if other not in ROUNDED:
        return Generator.load(
            name, quantize=how.decoder, vision=how.vision, kv=how.kv, dtype="float32"
        )
    generator = Generator.load(name, dtype="float32")
    for path, param in nnx.to_flat_state(nnx.state(generator.model.llama, nnx.Param)):
        if path[-1] == "kernel":
            param.set_value(ROUNDED[other](param[...], 2 if "out" in path else 1))
    return Generator(generator.model, generator.tokenizer)


def moved(kernel, axes: int):
    """To int4 and back, in groups that begin half a group later."""
    ins = int(np.prod(kernel.shape[:axes]))
    shifted = np.roll(np.asarray(kernel).reshape(ins, -1), MOVED, axis=0)
    back = quantised.unpacked(*quantised.int4(shifted), np.float32)
    return np.roll(back, -MOVED, axis=0).reshape(kernel.shape)


def wide(kernel, axes: int):
    """To int4 and back, in groups as of wide models."""
    ins = int(np.prod(kernel.shape[:axes]))
    few = quantised.int4(kernel, axes=axes, group=WIDE.get(ins, 128))
    return quantised.unpacked(*few, np.float32).reshape(kernel.shape)


ROUNDED = {"moved": moved, "wide": wide}


class Measured:
    """Of each photo: nats and tokens of its captions, and the greedy answer."""

    def __init__(self, generator: Generator, photos):
        scores = [
            generator.score(photo.image, ONE_SENTENCE, photo.captions)
            for photo in photos
        ]
        self.nats = np.array([-sum(s.total for s in photo) for photo in scores])
        self.tokens = np.array([sum(len(s.ids) for s in photo) for photo in scores])
        self.answers = [""] * len(photos)
        for event in generator.submit(
            Request([user(ONE_SENTENCE, photo.image)], sampling=FEW, id=str(i))
            for i, photo in enumerate(photos)
        ):
            self.answers[int(event.request_id)] += event.piece
        state = nnx.to_flat_state(nnx.state(generator.model.llama, nnx.Param))
        weights = checkpoint.parameter_shapes(generator.model.cfg)
        total = sum(
            int(np.prod(s)) for n, s in weights.items() if n.startswith("llama/")
        )
        self.bytes = sum(param[...].nbytes for _, param in state) / total


def row(name: str, mine: Measured, plain: Measured, photos) -> str:
    worse = mine.nats - plain.nats
    changed = 100.0 * np.array([a != b for a, b in zip(mine.answers, plain.answers)])
    references = [list(photo.captions) for photo in photos]
    each = [np.array(cider_d_per_image(m.answers, references)) for m in (mine, plain)]
    gained = interval(each[0] - each[1], np.ones(len(photos)), 1)
    return (
        f"| {name} | {mine.bytes:.2f} | {interval(worse, plain.tokens, 4)} "
        f"| {interval(changed, np.ones(len(changed)), 0)} | {gained} |"
    )


def interval(sums: np.ndarray, counts: np.ndarray, digits: int) -> str:
    """Mean and 95 %, by drawing photos."""
    drawn = np.random.default_rng(0).integers(len(sums), size=(DRAWS, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    mean = sums.sum() / counts.sum()
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":  # flags here: tests import this file beside other commands
    flags.DEFINE_string("data", None, "Folder with a folder of tar shards per split.")
    flags.DEFINE_string("split", "test", "Split to measure on.")
    flags.DEFINE_string("checkpoint", "demo", "What Generator.load takes.")
    flags.DEFINE_string("only", "", "Lines whose names have this in them; all.")
    flags.DEFINE_integer("limit", 100, "The first photos only.", lower_bound=2)
    errors.run(main)
