"""What few bits cost: likelihood of human captions, and greedy answers, paired by photo.

    python -m benchmarks.quantised --data=DATA [--split=test] [--limit=100]

DATA holds a folder of tar shards for each split (`DATA/test/*.tar`). Of each photo all
captions are scored as answers to the same question, by the float32 model and by each
quantised one; the table has the mean difference in nats a token, the share of greedy
answers that are not the same text, CIDEr-D's difference, each with 95 % over photos, and
the bytes a decoder's weight takes. The demo's decoder comes from a file of 4 bits in
groups of 32 (Q4_1), which int4 finds again; "int4, moved" rounds other groups, which says
more about a decoder that was never rounded. "frozen int8" is the training loss of stage 2
with an int8 decoder beside that with a float one.
"""

import dataclasses
from pathlib import Path

import numpy as np
from absl import flags
from flax import nnx

from minigpt4_jax import Generator, checkpoint, errors
from minigpt4_jax.data.demo_texts import ONE_SENTENCE
from minigpt4_jax.data.sources import open_data
from minigpt4_jax.errors import InputError
from minigpt4_jax.evaluation.captions import report
from minigpt4_jax.models import quantised
from minigpt4_jax.models.quantised import Quantisation
from minigpt4_jax.request import GREEDY, Request, user

MODELS = {
    "int8": Quantisation("int8"),
    "int8, kv": Quantisation("int8", kv="int8"),
    "int8, kv, vision": Quantisation("int8", vision="int8", kv="int8"),
    "int4": Quantisation("int4"),
    "int4, moved": Quantisation(),
}
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
        generator = load(args.checkpoint, how, moved="moved" in name)
        print(row(name, Measured(generator, photos), plain, photos), flush=True)


def load(name: str, how: Quantisation, *, moved: bool = False) -> Generator:
    if not moved:
        return Generator.load(
            name, quantize=how.decoder, vision=how.vision, kv=how.kv, dtype="float32"
        )
    generator = Generator.load(name, dtype="float32")
    for path, param in nnx.to_flat_state(nnx.state(generator.model.llama, nnx.Param)):
        if path[-1] == "kernel":
            param.set_value(rounded(param[...], 2 if "out" in path else 1))
    return Generator(generator.model, generator.tokenizer)


def rounded(kernel, axes: int):
    """To int4 and back, in groups that begin half a group later."""
    ins = int(np.prod(kernel.shape[:axes]))
    shifted = np.roll(np.asarray(kernel).reshape(ins, -1), MOVED, axis=0)
    back = quantised.unpacked(*quantised.int4(shifted), np.float32)
    return np.roll(back, -MOVED, axis=0).reshape(kernel.shape)


class Measured:
    """Of each photo: nats and tokens of its captions, and the greedy answer."""

    def __init__(self, generator: Generator, photos):
        scores = [
            generator.score(ONE_SENTENCE, photo.captions, image=photo.image)
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
    scores = [report(m.answers, references) for m in (mine, plain)]
    gained = scores[0]["cider_d"] - scores[1]["cider_d"]
    return (
        f"| {name} | {mine.bytes:.2f} | {interval(worse, plain.tokens, 4)} "
        f"| {interval(changed, np.ones(len(changed)), 0)} | {gained:+.1f} |"
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
    flags.DEFINE_integer("limit", 100, "The first photos only.", lower_bound=2)
    errors.run(main)
