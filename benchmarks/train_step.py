"""Our training step beside the same frozen-decoder step in PyTorch, demo size.

    python -m benchmarks.train_step --data=DATA [--rounds=5]

Stage 1 on photos of DATA/train (tar shards): a Q-Former and a projector are trained
through SmolLM2-135M, frozen; patches of the photos are made before. The peer is made of
transformers' own modules with the same weights; both sides run AdamW on what is trained.

Same batch: every caption a row of its own with its image, padded to the longest, logits at
all places, float32. At its best: all captions of so many photos, once. Ours shares a
photo's image among its captions, packs rows, and makes logits only where a label is. Theirs
runs the Q-Former once a photo, in float32 and bfloat16, with logits everywhere and only
where a label is. Losses are compared, rounds take turns, medians are printed. MFU is our
useful work by formula (minigpt4_jax/flops.py, what the plan counts too) against the
device's peak, or where no data sheet is known against a large product measured here. Last
comes what `plan --topology local` says of this step, beside the measured time.
"""

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import torch
from absl import flags

from benchmarks import contenders
from minigpt4_jax import (
    Generator,
    checkpoint,
    errors,
    flops,
    hlo,
    locate,
    optim,
    roofline,
)
from minigpt4_jax.data import pipeline
from minigpt4_jax.data.images import read_image, squash
from minigpt4_jax.data.plan import Plan
from minigpt4_jax.data.sources import open_data
from minigpt4_jax.errors import InputError
from minigpt4_jax.models.vit import normalise
from minigpt4_jax.step import Trainables, answer_loss, make_step, new_state
from tests import parity

SAME = 8  # captions of the same batch, each of another photo
PHOTOS = 8  # of a step at its best, with all their captions
TRAINED = ("qformer/.*", "projector/.*")
OPTIM = dict(
    peak_lr=1e-4, end_lr=1e-4, warmup_steps=1, total_steps=100, b1=0.9, b2=0.999
)
OPTIM |= dict(schedule="cosine", eps=1e-8, weight_decay=0.05, clip_norm=0.0)


def main(argv: list[str]) -> None:
    args = flags.FLAGS
    if not args.data or len(argv) > 1:
        raise InputError("give --data=FOLDER, which has train/*.tar, and only flags")
    torch.set_num_threads(2)
    setup = Setup(open_data(Path(args.data) / "train"), roofline.measure("float32"))
    print(f"{'same batch, all logits':40}{'s a step':>9}{'ratio':>7}{'loss':>9}")
    compare(setup.same_batch(), args.rounds, SAME)
    print(f"{'at its best':40}{'s a step':>9}{'ratio':>7}{'loss':>9}{'captions/s':>12}")
    medians = compare(setup.at_its_best(), args.rounds, len(setup.captions))
    print(setup.utilisation(medians["ours, float32"]))
    print(setup.beside_the_plan(medians["ours, float32"]))


def compare(
    contestants: dict[str, Callable[[], float]], rounds: int, captions: int
) -> dict[str, float]:
    """Print and return each one's median time; ratio: to the fastest peer."""
    losses = {name: step() for name, step in contestants.items()}  # compiles, warms up
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, step in contestants.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    peer = min(s for name, s in medians.items() if not name.startswith("ours"))
    for name, median in medians.items():
        print(
            f"{name:40}{median:9.3f}{peer / median:7.2f}{losses[name]:9.4f}"
            f"{captions / median:12.1f}"
        )
    return medians


class Setup:
    """Both models with the same weights, and the same photos and captions."""

    def __init__(self, examples, rates: roofline.Rates):
        self.rates = rates
        directory = locate.resolve(locate.FROZEN)
        self.model = checkpoint.load_model(directory, absent=TRAINED)
        cfg = self.cfg = self.model.cfg
        self.model.qformer, self.queries = parity.queries(cfg.qformer, seed=0)
        kernel, bias = (
            torch.tensor(np.asarray(x[...]))
            for x in (self.model.projector.kernel, self.model.projector.bias)
        )
        self.projector = torch.nn.Linear(*kernel.shape)
        self.projector.load_state_dict({"weight": kernel.T.contiguous(), "bias": bias})
        trained = torch.nn.ModuleList([self.queries, self.projector])
        self.weights = {k: v.clone() for k, v in trained.state_dict().items()}
        # Its decoder's blocks lie apart, as the peer's weights are made from them.
        self.generator = Generator.load("demo", batch_size=1)
        self.tokenizer = self.generator.tokenizer
        self.source = examples
        self.examples = [examples[i] for i in range(PHOTOS)]
        pixels = np.stack([squash(read_image(e.image), cfg.vit) for e in self.examples])
        encode = jax.jit(lambda x: self.model.encode_patches(normalise(x, cfg.vit)))
        self.patches_BPE = np.asarray(encode(pixels))
        self.captions = [
            (b, caption) for b, e in enumerate(self.examples) for caption in e.captions
        ]

    # Ours.

    def ours(self, loss_fn, batch) -> Callable[[], float]:
        trainables = Trainables(self.model, TRAINED)
        cfg = ml_collections.ConfigDict(OPTIM)
        optimizer, rate = optim.make_optimizer(cfg), optim.schedule(cfg)
        state = new_state(jax.tree.map(jnp.copy, trainables.params), optimizer)
        step_fn = make_step(trainables, loss_fn, optimizer, rate)
        batch = jax.device_put(batch)
        self.compiled = step_fn.lower(state, trainables.frozen, (batch,)).compile()

        def step() -> float:
            nonlocal state
            state, metrics = step_fn(state, trainables.frozen, (batch,))
            return float(jax.block_until_ready(metrics)["loss"])

        return step

    def packed(self) -> dict:
        """All captions of all photos, as stage 1 lays them out."""
        texts = pipeline.caption_texts(self.tokenizer, self.cfg.num_slots)
        made = pipeline.AnswerArrays(
            [self.source],
            texts,
            seed=0,
            num_slots=self.cfg.num_slots,
            tokens=200,
            answers=160,
        )
        plan = Plan([PHOTOS], [1], 0, PHOTOS)
        made.fit(plan, range(1), packed=256)
        picks = plan.picks(0)
        batch = made(0, picks)
        batch["patches_BPE"] = self.patches_BPE[picks[:, 2]]
        batch["ok_B"] = np.ones(PHOTOS, np.float32)
        return batch

    def useful(self) -> int:
        """FLOPs of a packed step, by formula."""
        paths = [p for p in checkpoint.parameter_shapes(self.cfg) if trained(p)]
        return flops.costs(self.cfg, paths, "patches")(flops.Work.of(self.packed()))

    def utilisation(self, seconds: float) -> str:
        """A line on the packed step that took so long."""
        useful = self.useful()
        peak, source = flops.peak(jax.devices()), "data sheet, bfloat16"
        if peak is None:
            peak, source = self.rates.products, "a float32 product of 4096, measured"
        return (
            f"useful work of ours at its best {useful / 1e9:.1f} GFLOP a step, "
            f"{useful / seconds / 1e9:.1f} GFLOP/s; peak {peak / 1e9:.0f} GFLOP/s "
            f"({source}): MFU {100 * useful / seconds / peak:.1f} %"
        )

    def beside_the_plan(self, seconds: float) -> str:
        """What the plan says of the packed step that took so long."""
        program = hlo.Program(self.compiled.as_text())
        found = roofline.project(program, self.rates, self.useful())
        return (
            f"the plan of it: {found}; measured {1e3 * seconds:.0f} ms, "
            f"{found.seconds / seconds:.2f} of it projected"
        )

    def rows(self, captions):
        """Ids, slots, labels (-100: none) and photo of each caption, one a row."""
        slots = self.cfg.num_slots
        answers = [self.tokenizer.encode(text + "\n") for _, text in captions]
        length = 1 + slots + max(map(len, answers))
        ids_BT = np.zeros((len(captions), length), np.int32)
        labels_BT = np.full((len(captions), length), -100, np.int64)
        for b, answer in enumerate(answers):
            ids_BT[b, 0] = self.cfg.bos_id
            ids_BT[b, 1 + slots : 1 + slots + len(answer)] = answer
            labels_BT[b, 1 + slots : 1 + slots + len(answer)] = answer
        slots_BT = np.zeros(ids_BT.shape, bool)
        slots_BT[:, 1 : 1 + slots] = True
        return ids_BT, slots_BT, labels_BT, np.array([photo for photo, _ in captions])

    # Theirs.

    def theirs(self, captions, dtype: torch.dtype, labels_only: bool):
        decoder = contenders.theirs(self.generator).to(dtype)
        decoder.requires_grad_(False)
        trained = torch.nn.ModuleList([self.queries, self.projector])
        optimizer = None
        ids_BT, _, labels_BT, photos_B = self.rows(captions)
        ids, labels = torch.tensor(ids_BT).long(), torch.tensor(labels_BT)
        patches = torch.tensor(self.patches_BPE)
        own = sorted(set(photos_B.tolist()))
        where = torch.tensor([own.index(photo) for photo in photos_B.tolist()])
        before, slots = 1, self.cfg.num_slots
        state = {"fresh": True}

        def step() -> float:
            nonlocal optimizer
            if state.pop("fresh", False):
                trained.load_state_dict(self.weights)
                kernels = [p for p in trained.parameters() if p.ndim >= 2]
                others = [p for p in trained.parameters() if p.ndim < 2]
                groups = [
                    {"params": kernels, "weight_decay": 0.05},
                    {"params": others, "weight_decay": 0.0},
                ]
                optimizer = torch.optim.AdamW(groups, lr=1e-4)
                optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
                queries = self.queries(patches[own]).last_hidden_state
                images = self.projector(queries)[where]
                x = decoder.model.embed_tokens(ids)
                parts = [x[:, :before], images.to(x.dtype), x[:, before + slots :]]
                hidden = decoder.model(inputs_embeds=torch.cat(parts, 1))[0]
                chosen = labels[:, 1:] != -100
                if labels_only:
                    logits = decoder.lm_head(hidden[:, :-1][chosen])
                    loss = torch.nn.functional.cross_entropy(
                        logits.float(), labels[:, 1:][chosen]
                    )
                else:
                    logits = decoder.lm_head(hidden)[:, :-1].float()
                    loss = torch.nn.functional.cross_entropy(
                        logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
                    )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

        return step

    # What is compared.

    def same_batch(self) -> dict[str, Callable[[], float]]:
        captions = [(b, self.examples[b].captions[0]) for b in range(SAME)]
        ids_BT, slots_BT, labels_BT, photos_B = self.rows(captions)
        batch = {
            "ids_BT": ids_BT,
            "slots_BT": slots_BT,
            "labels_BT": labels_BT.astype(np.int32),
            "patches_BPE": self.patches_BPE[photos_B],
        }
        return {
            "transformers, float32": self.theirs(captions, torch.float32, False),
            "ours, float32": self.ours(all_logits, batch),
        }

    def at_its_best(self) -> dict[str, Callable[[], float]]:
        found = {
            f"transformers, {name}{', labelled logits' if only else ''}": self.theirs(
                self.captions, dtype, only
            )
            for name, dtype in (
                ("float32", torch.float32),
                ("bfloat16", torch.bfloat16),
            )
            for only in (False, True)
        }
        return found | {"ours, float32": self.ours(answer_loss, self.packed())}


def trained(path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in TRAINED)


def all_logits(model, batch):
    """Cross-entropy as a plain step has it: logits at every place, labels with -100."""
    image_BQD = model.project(batch["patches_BPE"])
    logits_BTV = model(batch["ids_BT"], batch["slots_BT"], image_BQD)[:, :-1]
    labels_BT = batch["labels_BT"][:, 1:]
    log_probs_BTV = jax.nn.log_softmax(logits_BTV)
    chosen_BT = labels_BT >= 0
    index_BT1 = jnp.where(chosen_BT, labels_BT, 0)[..., None]
    picked_BT = jnp.take_along_axis(log_probs_BTV, index_BT1, -1)[..., 0]
    return -(picked_BT * chosen_BT).sum(), chosen_BT.sum().astype(jnp.float32)


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "Folder with train/*.tar.")
    flags.DEFINE_integer("rounds", 5, "Steps of each contestant.", lower_bound=1)
    errors.run(main)
