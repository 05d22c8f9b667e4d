"""One optimizer update: loss, gradients of the trainables alone, AdamW."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from minigpt4_jax import optim
from minigpt4_jax.models.minigpt4 import MiniGPT4

logger = logging.getLogger(__name__)

SHARPNESS = 10.0  # of word_loss: a cosine of 0.5 lifts a word from 1 % to likely


class Trainables:
    """A model split into what is trained (a dict path -> array) and what is frozen."""

    def __init__(self, model: MiniGPT4, patterns):
        self.graphdef, state = nnx.split(model)
        flat = dict(nnx.to_flat_state(state))
        by_name = {"/".join(map(str, path)): path for path in flat}
        self.paths = {name: by_name[name] for name in optim.select(by_name, patterns)}
        trained = set(self.paths.values())
        # Trainables are float32 however the frozen weights are stored.
        self.params = {
            name: flat[path][...].astype(jnp.float32)
            for name, path in self.paths.items()
        }
        self.frozen = {path: v for path, v in flat.items() if path not in trained}

    def log(self) -> None:
        """Show the trainable set: a pattern that hits too much is seen here."""
        size = sum(value.size for value in self.params.values())
        logger.info("trainable: %d parameters\n  %s", size, "\n  ".join(self.params))

    def model(self, params: dict, frozen=None) -> MiniGPT4:
        """The whole model with these values of the trainables."""
        flat = dict(self.frozen if frozen is None else frozen)
        flat |= {self.paths[name]: nnx.Param(value) for name, value in params.items()}
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat.items()))


def image_embeddings(model: MiniGPT4, batch: dict):
    """image_BQD from cached patches, or from pixels when there is no cache."""
    if "patches_BPE" in batch:
        return model.project(batch["patches_BPE"])
    return model.encode_image(batch["pixels_BHWC"])


def answer_loss(model: MiniGPT4, batch: dict):
    """Mean cross-entropy of all answer tokens of the batch (MiniGPT4.loss)."""
    return model.loss(batch, image_embeddings(model, batch))[0]


def word_loss(model: MiniGPT4, batch: dict):
    """How well image embeddings name the words of a photo's captions; no decoder.

    Each word's logit is the soft maximum over queries of the cosine between an image
    embedding and the word's row of the decoder's table, sharpened, from a prior at
    which a photo without information predicts each word at its share; binary
    cross-entropy summed over words. A second term holds the embeddings' length at
    that of the table's rows, so that the decoder later meets what it knows.

    Args:
        batch: patches_BPE; words_V, token ids; target_BV, share of the photo's captions
            that have the word; share_V, share of all captions, in (0, 1).
    """
    image_BQD = image_embeddings(model, batch)
    table_VD = model.llama.embed.embedding[...][batch["words_V"]].astype(jnp.float32)
    mean_D = table_VD.mean(0)
    lengths_V = jnp.linalg.norm(table_VD, axis=-1)
    lengths_BQ = jnp.linalg.norm(image_BQD, axis=-1)
    # Rows share a direction, against which every word would seem named. With it left in,
    # trial runs ended with queries all alike (seen, not ablated apart from other causes).
    cosine_BQV = jnp.einsum(
        "BQD,VD->BQV", unit(image_BQD - mean_D), unit(table_VD - mean_D)
    )
    prior_V = jnp.log(batch["share_V"]) - jnp.log1p(-batch["share_V"])
    heard_BV = jax.nn.logsumexp(SHARPNESS * cosine_BQV, axis=1)
    logits_BV = heard_BV - math.log(image_BQD.shape[1]) + prior_V
    named = optax.sigmoid_binary_cross_entropy(logits_BV, batch["target_BV"])
    length = jnp.square(lengths_BQ / lengths_V.mean() - 1).mean()
    return named.sum(-1).mean() + length


def unit(x_D):
    """Vectors of length 1, over the last dimension."""
    return x_D / (jnp.linalg.norm(x_D, axis=-1, keepdims=True) + 1e-6)


def make_step(trainables: Trainables, loss_fn, optimizer):
    """(state, frozen, batch) -> (state, metrics), compiled.

    `state` is {"params", "opt_state"} and updated in place. Frozen weights are an
    argument, so that they are neither constants of the program nor differentiated.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, frozen, batch):
        params, opt_state = state["params"], state["opt_state"]

        def loss_of(params):
            return loss_fn(trainables.model(params, frozen), batch)

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        state = {"params": optax.apply_updates(params, updates), "opt_state": opt_state}
        return state, {"loss": loss, "grad_norm": optax.global_norm(grads)}

    return step


def make_evaluate(trainables: Trainables, loss_fn):
    """(params, frozen, batch) -> loss, compiled."""

    @jax.jit
    def evaluate(params, frozen, batch):
        return loss_fn(trainables.model(params, frozen), batch)

    return evaluate
