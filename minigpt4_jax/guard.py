"""Steps that were skipped because they were not finite: counted, kept, and too many."""

import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from minigpt4_jax.errors import DataError

logger = logging.getLogger(__name__)

KEEP = 20  # batches on disk; each may have 100 MB of pixels


class Guard:
    """Looks at each step when the next one is under way, so that no device waits."""

    def __init__(self, folder: Path, limit: int):
        """Args: folder for the batches of skipped steps; how many in a row end the run."""
        self.folder, self.limit = folder, limit
        self._before: tuple | None = None
        self._in_a_row = 0

    def look(self, step: int, metrics: dict, batches: Sequence[dict]) -> None:
        """Note what step (counted from 0) is doing; check the one before.

        Raises:
            DataError: `limit` steps in a row were skipped.
        """
        self.check()
        self._before = step, metrics["finite"], metrics["loss"], batches

    def check(self) -> None:
        """Wait for the last noted step and judge it."""
        if self._before is None:
            return
        step, finite, loss, batches = self._before
        self._before = None
        if bool(finite):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        kept = self._keep(step, batches)
        logger.warning(
            "step %d was skipped: loss %s or its gradient is not finite; weights are as "
            "they were%s",
            step + 1,
            float(loss),
            f", the batch is in {kept}" if kept else "",
        )
        if self._in_a_row >= self.limit:
            raise DataError(
                f"{self._in_a_row} steps in a row up to step {step + 1} were not finite "
                f"(config.guard.skipped={self.limit}); their batches are in "
                f"{self.folder}. Lower config.optim.peak_lr, compute in float32, or look "
                "for values that are not finite in the weights"
            )

    def _keep(self, step: int, batches: Sequence[dict]) -> Path | None:
        """This process's part of the step's batches, as arrays by name and micro-batch."""
        process = jax.process_index()
        path = self.folder / f"step-{step + 1:07d}-of-process-{process}.npz"
        if len(list(self.folder.glob(f"*-{process}.npz"))) >= KEEP:
            return None
        arrays = {
            f"{i}/{name}": _own_part(value)
            for i, batch in enumerate(batches)
            for name, value in batch.items()
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            np.savez(path, **arrays)
        except OSError as error:  # a full disk is no reason to stop here
            logger.warning("the batch of step %d cannot be kept: %s", step + 1, error)
            return None
        return path


def _own_part(x: jax.Array) -> np.ndarray:
    """What this process gave of an array that is whole, or split along its first axis.

    float32 for bfloat16, which numpy cannot store.
    """
    parts = {
        s.index[0].start or 0 if s.index else 0: s.data for s in x.addressable_shards
    }
    rows = [
        np.asarray(parts[start]) for start in sorted(parts)
    ]  # replicas fall together
    own = np.concatenate(rows) if x.ndim else rows[0]
    return own.astype(np.float32) if own.dtype.kind == "V" else own
