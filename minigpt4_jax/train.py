"""Train the connector: python -m minigpt4_jax.train --config FILE --data DIR --workdir DIR.

The work directory gets config.json, metrics.jsonl, checkpoints/ (Orbax: trainables and
optimizer), trainables.safetensors (the newest trainables, what Generator.load reads).
Run the same command again to resume.
"""

import functools
import itertools
import json
import logging
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from ml_collections import config_flags

from minigpt4_jax import checkpoint, errors, features, optim, sharding
from minigpt4_jax.data import pipeline
from minigpt4_jax.data.prompts import find_template
from minigpt4_jax.data.sources import TarShards
from minigpt4_jax.data.tokens import load_tokenizer
from minigpt4_jax.step import (
    Trainables,
    answer_loss,
    make_evaluate,
    make_step,
    word_loss,
)

logger = logging.getLogger(__name__)

CONFIG = config_flags.DEFINE_config_file("config", help_string="a file of configs/")
DATA = flags.DEFINE_string("data", None, "folder with train/*.tar and val/*.tar")
WORKDIR = flags.DEFINE_string("workdir", None, "where checkpoints and logs go")
FEATURES = flags.DEFINE_string(
    "features", None, "where frozen features are kept (default: in the work directory)"
)


def main(argv: list[str]) -> None:
    """Read the flags and train."""
    if argv[1:]:
        raise errors.InputError(f"train takes flags only, got {argv[1]!r}")
    cfg = CONFIG.value
    if cfg is None or not DATA.value or not WORKDIR.value:
        raise errors.InputError("train needs --config, --data and --workdir")
    train(cfg, Path(DATA.value), Path(WORKDIR.value), FEATURES.value)


def train(cfg, data: Path, workdir: Path, features_dir=None) -> None:
    """Train until `cfg.optim.total_steps`; resumes what stands in `workdir`."""
    mesh = sharding.make_mesh(**cfg.mesh)
    directory = checkpoint.resolve(cfg.checkpoint)
    write_config(cfg, directory, workdir)

    # Data and model.
    photos = {split: TarShards(data / split) for split in ("train", "val")}
    captions = {s: [p[i].captions for i in range(len(p))] for s, p in photos.items()}
    model = checkpoint.load_model(directory, absent=tuple(cfg.trainable), mesh=mesh)
    if cfg.init:
        checkpoint.load_trainables(model, checkpoint.resolve(cfg.init))
    folder = Path(features_dir) if features_dir else workdir / "features"
    patches = {s: features.patches(model, p, folder) for s, p in photos.items()}
    tokenizer = load_tokenizer(
        directory, bos_id=model.cfg.bos_id, eos_ids=model.cfg.eos_ids
    )
    loss_fn, batches = make_task(cfg, model.cfg, tokenizer, captions, patches)

    # Optimizer.
    trainables = Trainables(model, cfg.trainable)
    size = sum(p.size for p in trainables.params.values())
    logger.info("trainable: %d parameters\n  %s", size, "\n  ".join(trainables.paths))
    optimizer = optim.make_optimizer(cfg.optim)
    params, frozen = trainables.params, trainables.frozen
    opt_state = optimizer.init(params)

    # Restore.
    manager = ocp.CheckpointManager(
        (workdir / "checkpoints").absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=2),
    )
    start = manager.latest_step() or 0
    if start:
        state = {"params": params, "opt_state": opt_state}
        state = manager.restore(start, args=ocp.args.StandardRestore(state))
        params, opt_state = state["params"], state["opt_state"]
        logger.info("resumed at step %d", start)

    # Loop.
    step_fn = make_step(trainables, loss_fn, optimizer)
    evaluate = make_evaluate(trainables, loss_fn)
    rate = optim.schedule(cfg.optim)
    total = cfg.optim.total_steps
    held_out = [
        sharding.place_batch(batch, mesh)
        for batch in itertools.islice(batches("val", 0), max(1, 64 // cfg.batch_size))
    ]
    began, photos_seen = time.monotonic(), 0
    train_batches = batches("train", start)
    for step in range(start, total):
        batch = sharding.place_batch(next(train_batches), mesh)
        params, opt_state, metrics = step_fn(params, opt_state, frozen, batch)
        photos_seen += cfg.batch_size
        done = step + 1
        record = {}
        if done % cfg.log_every == 0 or done == total:
            record = {name: float(value) for name, value in metrics.items()}
            record["lr"] = float(rate(step))
            record["photos_per_s"] = photos_seen / (time.monotonic() - began)
        if done % cfg.eval_every == 0 or done == total:
            losses = [float(evaluate(params, frozen, batch)) for batch in held_out]
            record["val_loss"] = float(np.mean(losses))
        if record:
            log(workdir, {"step": done, **record})
        if done % cfg.save_every == 0 or done == total:
            state = {"params": params, "opt_state": opt_state}
            manager.save(done, args=ocp.args.StandardSave(state), force=True)
            manager.wait_until_finished()  # the next step reuses these buffers
            checkpoint.save_trainables(workdir, params)
    manager.wait_until_finished()
    manager.close()


def make_task(cfg, model_cfg, tokenizer, captions, patches):
    """The loss, and batches(split, start step), that `cfg.loss` names."""
    if cfg.loss == "words":
        words_V, share_V = pipeline.vocabulary(
            captions["train"], tokenizer, cfg.words.least
        )
        loss_fn = functools.partial(word_loss, words_V=words_V, share_V=share_V)

        def batches(split, start):
            return pipeline.word_batches(
                captions[split],
                patches[split],
                tokenizer,
                words_V,
                seed=cfg.seed,
                batch_size=cfg.batch_size,
                start=start,
            )

        return loss_fn, batches
    tasks = {
        "captions": lambda: pipeline.caption_texts(tokenizer, model_cfg.num_slots),
        "dialogues": lambda: pipeline.dialogue_texts(
            tokenizer,
            model_cfg.num_slots,
            find_template(model_cfg.template),
            cfg.dialogues.one_sentence,
        ),
    }
    if cfg.loss not in tasks:
        raise errors.ConfigError(
            errors.unknown("config.loss", cfg.loss, ["words", *tasks])
        )
    texts = tasks[cfg.loss]()

    def batches(split, start):
        return pipeline.caption_batches(
            captions[split],
            patches[split],
            texts,
            seed=cfg.seed,
            batch_size=cfg.batch_size,
            row=cfg.row,
            start=start,
        )

    return answer_loss, batches


def write_config(cfg, directory: Path, workdir: Path) -> None:
    """config.json: the resolved config and which frozen weights it belongs to.

    A work directory that was made with another config than the length of the run
    raises ConfigError: resuming would mix two runs.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    new = {"format": 1, "checkpoint": str(directory), "config": cfg.to_dict()}
    new = json.loads(json.dumps(new))
    if path.exists():
        old = json.loads(path.read_text())
        if old != new:
            raise errors.ConfigError(
                f"{path}: got a run with another config; want the same to resume, or "
                "a new --workdir"
            )
        return
    path.write_text(json.dumps(new, indent=1) + "\n")


def log(workdir: Path, record: dict) -> None:
    """One line in metrics.jsonl and in the log."""
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    logger.info("%s", " ".join(f"{k} {v:.5g}" for k, v in record.items()))


if __name__ == "__main__":
    errors.run(main)
