"""What a run looks at now and then, on examples that are not trained on."""

import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from minigpt4_jax import sharding
from minigpt4_jax.diagnosis import Diagnosis
from minigpt4_jax.progress import keep_photos
from minigpt4_jax.step import Trainables, make_evaluate
from minigpt4_jax.task import Task, sample

logger = logging.getLogger(__name__)

IMAGES = ("pixels_BHWC", "patches_BPE", "queries_BQD", "ok_B")  # ok_B: readable


class Looks:
    """Loss on held-out batches, with their own images and exchanged; sample answers."""

    def __init__(
        self, trainables: Trainables, task: Task, tokenizer, mesh, young: int = 0
    ):
        """Args: young: steps in which a run need not have learned yet."""
        self.trainables, self.task, self.tokenizer = trainables, task, tokenizer
        self.batches = [sharding.place_batch(b, mesh) for b in task.val_batches]
        several = all(len(b["ok_B"]) > 1 for b in task.val_batches)
        self.exchanged = [
            sharding.place_batch(exchange(b), mesh)
            for b in task.val_batches
            if several  # one image has none to be exchanged with
        ]
        self.evaluate = make_evaluate(trainables, task.loss_fn)
        self.diagnosis = Diagnosis(task.vocabulary_size, after=max(200, young))

    def losses(self, params: dict) -> dict[str, float]:
        """val_loss over always the same batches; val_loss_exchanged with their images
        exchanged, where a batch has several; {} without val."""
        if not self.batches:
            return {}
        found = {"val_loss": self._mean(params, self.batches)}
        if self.exchanged:
            found["val_loss_exchanged"] = self._mean(params, self.exchanged)
        return found

    def samples(self, params: dict, folder: Path) -> list[dict]:
        """What the model says about a few photos, which are kept in `folder`; [] while
        the decoder is not used, and with several processes, of which the engine knows
        nothing."""
        if self.task.prompt is None or not self.task.photos or jax.process_count() > 1:
            return []
        said = sample(self.trainables.model(params), self.tokenizer, self.task)
        files = keep_photos(folder, self.task.photos)
        return [
            {
                "photo": photo.key,
                "says": says,
                "captions": list(photo.captions),
                "file": files[photo.key],
            }
            for photo, says in zip(self.task.photos, said, strict=True)
        ]

    def say(self, step: int, record: dict) -> None:
        """Warn of what the numbers say is wrong, each thing once."""
        names = ("loss", "val_loss", "val_loss_exchanged")
        measured = {name: record[name] for name in names if name in record}
        for sentence in self.diagnosis.look(step, **measured):
            logger.warning("%s", sentence)

    def _mean(self, params: dict, batches: Sequence[dict]) -> float:
        frozen = self.trainables.frozen
        found = [self.evaluate(params, frozen, batch) for batch in batches]
        sums, counts = zip(*jax.device_get(found), strict=True)
        return float(np.sum(sums, dtype=np.float64) / max(np.sum(counts), 1))


def exchange(batch: dict) -> dict:
    """The batch with each example's image replaced by that of the one before."""
    return {
        name: np.roll(value, 1, axis=0) if name in IMAGES else value
        for name, value in batch.items()
    }
