"""A converted directory -> whether it behaves as a model of its preset should.

One forward pass answers all: a text whose perplexity is known, finished answers after
which the template's end must be likely, and one question about two images.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convert.casting import finite
from minigpt4_jax import checkpoint, locate
from minigpt4_jax.data.images import preprocess
from minigpt4_jax.data.prompts import find_template, render
from minigpt4_jax.data.tokens import lay_out, load_tokenizer
from minigpt4_jax.errors import CheckpointError
from minigpt4_jax.models.layers import DTypes
from minigpt4_jax.request import Message, user

PASSED, UNCERTAIN, FAILED = "passed", "uncertain", "failed"

TEXT = (
    "The river runs past the old mill and under the stone bridge before it reaches the "
    "sea. In spring the snow melts in the hills, and the water rises until it covers the "
    "fields on both sides. The people of the village know this well. They keep their "
    "boats near the houses, and they do not plant anything close to the bank until the "
    "flood has gone. When the summer comes, children swim where the water is deep and "
    "slow, and their parents sit in the shade of the trees and talk about the harvest."
)
# Measured on SmolLM2-135M, the weakest decoder there is a preset for: 31; with q and k
# rows in the order of the other rotary layout 98, heads reversed 8,200, words shuffled
# 890, random weights 60,000 (about its vocabulary). A larger decoder is below 31. Nobody
# has seen the text before, so below 2 a model sees the words that it should predict.
LOWEST, HIGHEST = 2.0, 55.0
ANSWERS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("What colour is the sky on a clear day?", "On a clear day the sky is blue."),
)
# After these SmolLM2 puts its own template's end first each time. A model that does not
# know the template copies its marks from the prompt: SmolLM2 puts v0's ### at 2, 3, 3;
# inside an answer an end is beyond 1,000.
LIKELY = 50
# The demo's log-probabilities differ by 0.4 (root of the mean square) between the two
# images; float32 rounding makes 1e-5.
LEAST_CHANGE = 1e-3
PIECE_BYTES = 1 << 26


@dataclass(frozen=True)
class Result:
    """One test: `state` is PASSED, UNCERTAIN or FAILED."""

    name: str
    state: str
    says: str


def run(path: Path) -> Iterator[Result]:
    """The results, as they come; what cannot be loaded ends them."""
    try:
        yield stored(path)
        test = Forward(path)
        yield test.perplexity()
        yield test.ends()
        yield test.images()
    except CheckpointError as error:
        yield Result("loading", FAILED, str(error))


def stored(path: Path) -> Result:
    """Whether everything is there as the manifest says, and every value is a number."""
    base = checkpoint.base_directory(path)
    manifest = locate.read_json(base / "manifest.json")
    name = "stored values"
    with ExitStack() as files:
        tensors = checkpoint.open_all(path, files)
        shapes = checkpoint.parameter_shapes(checkpoint.read_config(path))
        checkpoint.check(path, tensors, shapes, ())
        count = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
        if count != (want := manifest.get("parameters", count)):
            says = f"{count:,} parameters, and {want:,} in the manifest; convert again"
            return Result(name, FAILED, says)
        broken = [key for key, tensor in tensors.items() if not _finite(tensor)]
    if broken:
        says = f"NaN or infinite values in {', '.join(sorted(broken))}; convert again"
        return Result(name, FAILED, says)
    return Result(name, PASSED, f"{count:,} parameters as in the manifest, all finite")


def _finite(tensor) -> bool:
    """Read in pieces along the first axis: a stack of layers has gigabytes."""
    rows = tensor.get_shape()[0]
    row = np.asarray(tensor[:1])
    step = max(1, PIECE_BYTES // row.nbytes)
    return all(
        finite(np.ascontiguousarray(tensor[i : min(i + step, rows)]))
        for i in range(0, rows, step)
    )


class Forward:
    """A loaded model, and its logits for all the tests' rows at once.

    Weights stay as they are stored; products are in float32.
    """

    def __init__(self, path: Path):
        self.model = checkpoint.load_model(path, DTypes(param="file"))
        self.cfg = self.model.cfg
        self.template = find_template(self.cfg.template)
        self.tokenizer = load_tokenizer(
            checkpoint.base_directory(path),
            bos_id=self.cfg.bos_id,
            eos_ids=self.cfg.eos_ids,
        )

    @cached_property
    def rows(self) -> list[tuple[list[int], list[bool]]]:
        """Ids and slots: the text, an open answer each, one question for each image."""
        question = [user("Describe this image.", picture(0))]
        answers = [[user(q), Message("assistant", a)] for q, a in ANSWERS]
        prompts = [render(self.template, m) for m in (*answers, question, question)]
        return [self._lay_out(segments) for segments in ([TEXT], *prompts)]

    def _lay_out(self, segments) -> tuple[list[int], list[bool]]:
        return lay_out(segments, self.tokenizer, self.cfg.num_slots)

    @cached_property
    def log_probs_BTV(self) -> np.ndarray:
        """Of every row, the shorter ones padded behind, which nothing before sees."""
        batch, length = len(self.rows), max(len(ids) for ids, _ in self.rows)
        ids_BT = np.zeros((batch, length), np.int32)
        slots_BT = np.zeros((batch, length), bool)
        for b, (ids, slots) in enumerate(self.rows):
            ids_BT[b, : len(ids)], slots_BT[b, : len(ids)] = ids, slots
        pixels_BHWC = np.stack([preprocess(picture(i), self.cfg.vit) for i in (0, 1)])
        log_probs = _log_probs(self.model, ids_BT, slots_BT, jnp.asarray(pixels_BHWC))
        return np.asarray(log_probs)

    def perplexity(self) -> Result:
        """Whether the decoder reads English as one of its kind does."""
        ids = self.rows[0][0]
        picked = self.log_probs_BTV[0][np.arange(len(ids) - 1), ids[1:]]
        value = float(np.exp(-picked.mean()))
        says = f"{value:.1f} on a known text"
        if LOWEST <= value <= HIGHEST:
            return Result("perplexity", PASSED, says)
        says += f", want {LOWEST:g} to {HIGHEST:g}: "
        if value < LOWEST:
            says += "it sees what it should predict"
        elif value > self.cfg.llama.vocab_size / 8:
            says += "no better than random weights; is it a delta that was not added?"
        else:
            says += "weights in a wrong order, or a tokenizer of another model?"
        return Result("perplexity", FAILED, says)

    def ends(self) -> Result:
        """Whether finished answers are followed by what ends them in the template."""
        stop, eos = self.template.stop, self.cfg.eos_ids
        places, own = [], []
        for b, (question, answer) in enumerate(ANSWERS, start=1):
            open_ids = self.rows[b][0]
            turns = [user(question), Message("assistant", answer), user("Thank you.")]
            closed, _ = self._lay_out(render(self.template, turns))
            # A tokenizer may join the answer's last letters with the end.
            n = next(i for i, x in enumerate(closed) if [x] != open_ids[i : i + 1])
            log_probs_V = self.log_probs_BTV[b, n - 1]
            places.append(_rank(log_probs_V, [closed[n]] if stop else eos))
            own.append(_rank(log_probs_V, eos))
        middle = sorted(places)[len(places) // 2]
        end = repr(stop[0]) if stop else "its end token"
        says = (
            f"{end} is at {', '.join(map(str, places))} among continuations of answers"
        )
        if middle == 1:
            return Result("stop string", PASSED, says)
        if sorted(own)[len(own) // 2] == 1:
            says += "; its end token is first, as in Vicuna v1.1 and chat models"
        says += f"; does the decoder know the template {self.template.name}? "
        says += "A base model does not, nor does Vicuna of another version"
        return Result("stop string", UNCERTAIN if middle <= LIKELY else FAILED, says)

    def images(self) -> Result:
        """Whether what is shown changes what is said."""
        last = len(self.rows[-1][0]) - 1
        one_V, two_V = self.log_probs_BTV[-2:, last]
        change = float(np.sqrt(np.mean((one_V - two_V) ** 2)))
        says = f"log-probabilities differ by {change:.2g} between two images"
        if change > LEAST_CHANGE:
            return Result("image", PASSED, says)
        says += "; is the projector trained, and of this decoder?"
        return Result("image", FAILED, says)


@jax.jit
def _log_probs(model, ids_BT, slots_BT, pixels_BHWC):
    """Of rows of which the last are about one image each."""
    image_BQD = model.encode_image(pixels_BHWC)
    without = ids_BT.shape[0] - image_BQD.shape[0]
    image_BQD = jnp.pad(image_BQD, [(without, 0), (0, 0), (0, 0)])
    return jax.nn.log_softmax(model(ids_BT, slots_BT, image_BQD))


def _rank(log_probs_V: np.ndarray, ids) -> int:
    """Place of the likeliest of some tokens among all; 1 is first."""
    return 1 + int((log_probs_V > max(log_probs_V[i] for i in ids)).sum())


def picture(index: int) -> np.ndarray:
    """One of two images that have nothing in common: colours that run, a chessboard."""
    y, x = np.mgrid[0:64, 0:64]
    if index == 0:
        return np.stack([x * 4, y * 4, (x + y) * 2], -1).astype(np.uint8)
    light = ((x // 8 + y // 8) % 2 == 1)[..., None]
    return np.where(light, [250, 240, 230], [20, 10, 60]).astype(np.uint8)
