"""Losses of a run -> sentences that say what is wrong with it, and the likely cause."""

import math
from collections import deque
from statistics import median

NEAR = 0.05  # of ln(vocabulary): no trained decoder comes so close on text it can read
# Of the validation loss: exchanged images that add less are not looked at. On 32 photos
# they add 8 % with the demo's connector and 4 % after the stage of words alone.
SHARE = 0.01
AFTER = 200  # steps that any run may take to begin
LOSSES = 5  # that are taken together, so that one odd batch says nothing


class Diagnosis:
    """`diagnose` over a run: losses smoothed, each sentence said once."""

    def __init__(self, vocabulary_size: int | None, *, after: int = AFTER):
        """Nothing is said before step `after`.

        Args:
            vocabulary_size: of the decoder; None where the loss is not over it.
        """
        self._vocabulary_size, self._after = vocabulary_size, after
        self._losses: deque[float] = deque(maxlen=LOSSES)
        self._said: set[str] = set()

    def look(
        self,
        step: int,
        *,
        loss: float | None = None,
        val_loss: float | None = None,
        val_loss_exchanged: float | None = None,
    ) -> list[str]:
        """New sentences, given what was measured after `step`."""
        if loss is not None and math.isfinite(loss):
            self._losses.append(loss)
        if step < self._after:
            return []
        found = diagnose(
            step,
            loss=median(self._losses) if len(self._losses) == LOSSES else None,
            vocabulary_size=self._vocabulary_size,
            val_loss=val_loss,
            val_loss_exchanged=val_loss_exchanged,
        )
        new = [text for name, text in found.items() if name not in self._said]
        self._said |= set(found)
        return new


def diagnose(
    step: int,
    *,
    loss: float | None = None,
    vocabulary_size: int | None = None,
    val_loss: float | None = None,
    val_loss_exchanged: float | None = None,
) -> dict[str, str]:
    """What is wrong, by kind; what was not measured is None and says nothing.

    Args:
        loss: mean over answer tokens, in nats.
        val_loss_exchanged: `val_loss` with the images of each batch exchanged.
    """
    found = {}
    if loss is not None and vocabulary_size is not None:
        chance = math.log(vocabulary_size)
        if loss > (1 - NEAR) * chance:
            found["chance"] = (
                f"step {step}: the loss is {loss:.2f}, and guessing evenly among the "
                f"{vocabulary_size} tokens gives {chance:.2f}. Likely causes: the decoder's "
                "weights are not the trained ones (python -m convert doctor CHECKPOINT), "
                "the tokenizer belongs to another model, answers are shuffled or shifted "
                "against their prompts, or the learning rate is 0 (lr in metrics.jsonl)"
            )
    if val_loss and val_loss_exchanged is not None:
        share = (val_loss_exchanged - val_loss) / val_loss
        if share < SHARE:
            found["blind"] = (
                f"step {step}: the answers do not depend on the image: the validation "
                f"loss is {val_loss:.4f}, and {val_loss_exchanged:.4f} ({share:+.1%}) "
                "with images exchanged. Likely causes: captions stand beside the wrong "
                "images (minigpt4-jax data check shows pairs), config.trainable "
                "lacks the projector, the learning rate is too small or the run too "
                "young to have moved it, or the captions could be of any image"
            )
    return found
