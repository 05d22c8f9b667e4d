"""A converted directory -> whether it behaves as a model of its preset should.

One forward pass answers all: a text whose perplexity is known, finished answers after
which the template's end must be likely, and one question about two images.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from statistics import median

import numpy as np

from convert.casting import finite
from convert.layerwise import log_probs
from minigpt4_jax import checkpoint, locate
from minigpt4_jax.data.images import preprocess
from minigpt4_jax.data.prompts import Template, find_template, render
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
# After these SmolLM2 puts its own template's end token first each time; inside an answer
# it is beyond 1,000.
LIKELY = 50
# A mark stands in the prompt, whence a model that was not taught it copies it. So marks
# that no model was taught are asked beside it. SmolLM2 ends answers of v0 with ### at
# 0.14 (median) and with one of these at 0.07, odds 2.2 times as high; after 60 steps on
# 23 questions in the format of Vicuna v0's training it is 0.96 and 0.41, 34 times.
INVENTED = ("%%%", "===", "$$$")
TAUGHT, TIMES_AS_HIGH = 0.5, 8.0
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
        how = checkpoint.stored_quantisation(path)
        shapes = checkpoint.parameter_shapes(checkpoint.read_config(path), how)
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
    if tensor.get_dtype() in ("I8", "U8"):
        return True  # whole numbers are; their scales are looked at
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
    def templates(self) -> list[Template]:
        """The model's own, and where a mark ends answers, the same with other marks."""
        if not self.template.stop:
            return [self.template]
        return [self.template, *(_marked(self.template, mark) for mark in INVENTED)]

    @cached_property
    def rows(self) -> list[tuple[list[int], list[bool]]]:
        """Ids and slots: the text, open answers (a newline behind), two images' question."""
        question = [user("Describe this image.", picture(0))]
        rows = [self._lay_out([TEXT])]
        for template in self.templates:
            for q, a in ANSWERS:
                said = render(template, [user(q), Message("assistant", a)])
                ids, slots = self._lay_out(said)
                rows.append(([*ids, self.newline], [*slots, False]))
        return rows + 2 * [self._lay_out(render(self.template, question))]

    @cached_property
    def newline(self) -> int:
        return self.tokenizer.encode("\n")[-1]

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
        return np.asarray(log_probs(self.model, ids_BT, slots_BT, pixels_BHWC))

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
        last = [len(ids) - 2 for ids, _ in self.rows[1 : 1 + len(ANSWERS)]]
        own = [
            _rank(self.log_probs_BTV[b, t], self.cfg.eos_ids)
            for b, t in enumerate(last, start=1)
        ]
        first = median(own) == 1
        if self.template.stop:
            places, known, says = self._mark()
        else:
            places, known = own, first
            says = f"its end token is at {_listed(own)} among continuations of answers"
        if known:
            return Result("stop string", PASSED, says)
        if self.template.stop and first:
            says += "; its end token is first, as in Vicuna v1.1 and chat models"
        says += f"; does the decoder know the template {self.template.name}? "
        says += "A base model does not, nor does Vicuna of another version"
        state = UNCERTAIN if median(places) <= LIKELY else FAILED
        return Result("stop string", state, says)

    def _mark(self) -> tuple[list[int], bool, str]:
        """Places of the template's mark, whether it was taught, and that in words."""
        count = len(ANSWERS)
        groups = [
            [self._ending(1 + i * count + k, template, k) for k in range(count)]
            for i, template in enumerate(self.templates)
        ]
        mine, *others = (median(chance for _, chance in group) for group in groups)
        copied = max(others)
        places = [place for place, _ in groups[0]]
        says = (
            f"{self.template.stop[0]!r} is at {_listed(places)} among continuations of "
            f"answers, its probability {mine:.2f}, of marks never taught {copied:.2f}"
        )
        known = mine >= TAUGHT and _odds(mine) >= TIMES_AS_HIGH * _odds(copied)
        return places, known, says

    def _ending(self, b: int, template: Template, answer: int) -> tuple[int, float]:
        """Place and probability of the mark behind an answer, or on the line below it.

        Vicuna v0 learned a newline before ###; the reference's template has none.
        """
        (question, said), ids = ANSWERS[answer], self.rows[b][0]
        turns = [user(question), Message("assistant", said), user("Thank you.")]
        closed, _ = self._lay_out(render(template, turns))
        # A tokenizer may join the answer's last letters with the mark.
        n = next(i for i, x in enumerate(closed) if [x] != ids[i : i + 1])
        behind_V, over_V, below_V = self.log_probs_BTV[
            b, [n - 1, len(ids) - 2, len(ids) - 1]
        ]
        mark = closed[n]
        behind, below = behind_V[mark], over_V[self.newline] + below_V[mark]
        place = _rank(behind_V if behind > below else below_V, [mark])
        return place, float(np.exp(behind) + np.exp(below))

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


def _marked(template: Template, mark: str) -> Template:
    """The template with another mark for its stop string."""
    old = template.stop[0]
    texts = {f.name: getattr(template, f.name) for f in fields(template)}
    changed = {k: v.replace(old, mark) for k, v in texts.items() if isinstance(v, str)}
    return replace(template, **changed, stop=(mark,), fragile=(mark,))


def _odds(chance: float) -> float:
    return chance / max(1.0 - chance, 1e-6)


def _listed(places: list[int]) -> str:
    return ", ".join(map(str, places))


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
