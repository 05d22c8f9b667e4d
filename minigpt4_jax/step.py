"""One optimizer update: loss, gradients of the trainables alone, AdamW."""

import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from minigpt4_jax import optim, sharding
from minigpt4_jax.models.layers import DTypes
from minigpt4_jax.models.minigpt4 import MiniGPT4, MiniGPT4Config
from minigpt4_jax.models.quantised import Quantisation
from minigpt4_jax.models.vit import normalise

logger = logging.getLogger(__name__)

SHARPNESS = 10.0  # of word_loss: a cosine of 0.5 lifts a word from 1 % to likely


class Trainables:
    """A model split into what is trained (a dict path -> array) and what is frozen.

    Args:
        mesh: where the model lies; None: on one device.
    """

    def __init__(self, model: MiniGPT4, patterns, mesh: Mesh | None = None):
        self.mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
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

    @functools.cached_property
    def parts(self) -> sharding.Parts:
        """What of them a device of the mesh holds."""
        shapes = {name: tuple(value.shape) for name, value in self.params.items()}
        for path, param in self.frozen.items():
            shapes["/".join(map(str, path))] = tuple(param.shape)
        return sharding.Parts(shapes, self.mesh)

    def log(self) -> None:
        """Show the trainable set: a pattern that hits too much is seen here."""
        size = sum(value.size for value in self.params.values())
        logger.info("trainable: %d parameters\n  %s", size, "\n  ".join(self.params))

    def model(self, params: dict, frozen=None) -> MiniGPT4:
        """The whole model with these values of the trainables."""
        return nnx.merge(self.graphdef, nnx.from_flat_state(self._flat(params, frozen)))

    def gathered(self, params: dict, frozen: dict) -> MiniGPT4:
        """The same from the parts that a device holds, inside of `shard_map`.

        Blocks of the stacks are gathered one by one, as they are computed.
        """
        flat = []
        for path, param in self._flat(params, frozen):
            name = "/".join(map(str, path))
            if "/blocks/" not in name:
                param = param.replace(self.parts.gather(name, param[...]))
            flat.append((path, param))
        model = nnx.merge(self.graphdef, nnx.from_flat_state(flat))
        model.set_gather(self.parts.gather_block)
        return model

    def places(self) -> dict:
        """Shardings of `frozen`."""
        return {
            path: sharding.parameter_sharding(
                "/".join(map(str, path)), tuple(param.shape), self.mesh
            )
            for path, param in self.frozen.items()
        }

    def _flat(self, params: dict, frozen: dict | None) -> list[tuple]:
        flat = dict(self.frozen if frozen is None else frozen)
        flat |= {self.paths[name]: nnx.Param(value) for name, value in params.items()}
        return list(flat.items())


def without_values(
    cfg: MiniGPT4Config,
    patterns,
    mesh: Mesh,
    dtypes: DTypes,
    *,
    remat: bool = False,
    quantisation: Quantisation = Quantisation(),
) -> Trainables:
    """Trainables of a model that is not made: shapes and places, to compile for."""
    made = []

    def split():
        model = MiniGPT4(cfg, dtypes=dtypes, rngs=nnx.Rngs(0))
        model.quantise(quantisation)
        model.set_remat(remat)
        made.append(Trainables(model, patterns, mesh))
        return made[0].params, made[0].frozen

    params, frozen = jax.eval_shape(split)
    found = made[0]

    def placed(path: str, shape, dtype) -> jax.ShapeDtypeStruct:
        where = sharding.parameter_sharding(path, shape, mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    found.params = {path: placed(path, x.shape, x.dtype) for path, x in params.items()}
    found.frozen = {}
    for path, param in frozen.items():
        name, x = "/".join(map(str, path)), param.get_value()
        shape = sharding.held(name, x.shape, mesh)
        found.frozen[path] = param.replace(placed(name, shape, x.dtype))
    return found


def image_embeddings(model: MiniGPT4, batch: dict):
    """image_BQD of a batch, from as far as what is frozen was computed before.

    Args:
        batch: queries_BQD, patches_BPE, or pixels_BHWC, uint8 as a photo has them.
    """
    if "queries_BQD" in batch:
        return model.projector(batch["queries_BQD"])
    if "patches_BPE" in batch:
        return model.project(batch["patches_BPE"])
    return model.encode_image(normalise(batch["pixels_BHWC"], model.cfg.vit))


def answer_loss(model: MiniGPT4, batch: dict):
    """Sum of the cross-entropies of all answer tokens and their number (MiniGPT4.loss)."""
    return model.loss(batch, image_embeddings(model, batch))


def word_loss(model: MiniGPT4, batch: dict):
    """How well image embeddings name the words of a photo's captions; no decoder.

    Each word's logit is the soft maximum over queries of the cosine between an image
    embedding and the word's row of the decoder's table, sharpened, from a prior at
    which a photo without information predicts each word at its share; binary
    cross-entropy summed over words. A second term holds the embeddings' length at
    that of the table's rows, so that the decoder later meets what it knows.

    Args:
        batch: patches_BPE; words_V, token ids; target_BV, share of the photo's captions
            that have the word; share_V, share of all captions, in (0, 1); ok_B, 1 for
            a photo that counts, else 0.

    Returns:
        The sum over the photos that count, and their number.
    """
    image_BQD = image_embeddings(model, batch)
    table_VD = model.llama.embed(batch["words_V"]).astype(jnp.float32)
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
    named_BV = optax.sigmoid_binary_cross_entropy(logits_BV, batch["target_BV"])
    length_B = jnp.square(lengths_BQ / lengths_V.mean() - 1).mean(-1)
    losses_B = named_BV.sum(-1) + length_B
    return (losses_B * batch["ok_B"]).sum(), batch["ok_B"].sum()


def unit(x_D):
    """Vectors of length 1, over the last dimension."""
    return x_D / (jnp.linalg.norm(x_D, axis=-1, keepdims=True) + 1e-6)


def make_step(
    trainables: Trainables,
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulate: int = 1,
):
    """(state, frozen, batches) -> (state, metrics), compiled; one optimizer update.

    `state` is `new_state`'s and updated in place. Frozen weights are an argument, so that
    they are neither constants of the program nor differentiated.

    A step whose loss or gradient is not finite, or that has nothing to learn from (no
    answer token), leaves weights and moments as they are, to the bit, and is counted; the
    learning rate goes on, as the reference's does.

    Args:
        loss_fn: (model, batch) -> (sum of losses, their number).
        optimizer: makes the direction of a step, which the learning rate scales.
        schedule: step -> learning rate.
        accumulate: length of the tuple `batches`, which are of one shape. Their losses
            have one mean, as if they were one batch.
    """

    def gradients(params, frozen, batch):
        def loss_of(params):
            return loss_fn(trainables.gathered(params, frozen), batch)

        (total, count), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return total, count, grads

    def sums(params, frozen, *batches):
        """Totals over the batches, of which one at a time is in memory as activations."""
        if accumulate == 1:
            total, count, grads = gradients(params, frozen, batches[0])
        else:

            def add(sums, batch):
                found = gradients(params, frozen, batch)
                return jax.tree.map(jnp.add, sums, found), None

            zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
            stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *batches)
            total, count, grads = jax.lax.scan(add, zero, stacked)[0]
        total, count = trainables.parts.sum((total, count))
        return total, count, trainables.parts.sum_gradients(grads)

    shapes = {
        name: jax.ShapeDtypeStruct(p.shape, p.dtype)
        for name, p in trainables.params.items()
    }
    shapes = jax.eval_shape(functools.partial(new_state, optimizer=optimizer), shapes)
    state_places = sharding.places(shapes, trainables.mesh)
    everywhere = NamedSharding(trainables.mesh, P())

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        in_shardings=(state_places, trainables.places(), None),  # place_batch places
        out_shardings=(state_places, everywhere),
    )
    def step(state, frozen, batches):
        assert len(batches) == accumulate, (len(batches), accumulate)
        params, opt_state = state["params"], state["opt_state"]
        outs = P(), P(), {name: trainables.parts.spec(name) for name in params}
        total, count, grads = over_devices(trainables, sums, outs)(
            params, frozen, *batches
        )
        loss, grads = total / count, jax.tree.map(lambda g: g / count, grads)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        rate = schedule(state["step"])
        direction, new_opt_state = optimizer.update(grads, opt_state, params)
        new_params = jax.tree.map(lambda p, d: p - rate * d, params, direction)

        def kept_if_not_finite(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        state = {
            "params": kept_if_not_finite(new_params, params),
            "opt_state": kept_if_not_finite(new_opt_state, opt_state),
            "step": state["step"] + 1,
            "skipped": state["skipped"] + ~finite,
        }
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "answer_tokens": count,
            "finite": finite,
            "lr": rate,
        }
        return state, metrics

    return step


def new_state(params: dict, optimizer: optax.GradientTransformation) -> dict:
    """The state of a run before its first step."""
    return {
        "params": params,
        "opt_state": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),  # steps done, the skipped ones included
        "skipped": jnp.zeros((), jnp.int32),
    }


def make_evaluate(trainables: Trainables, loss_fn):
    """(params, frozen, batch) -> (sum of losses, their number), compiled."""

    def sums(params, frozen, batch):
        found = loss_fn(trainables.gathered(params, frozen), batch)
        return trainables.parts.sum(found)

    return jax.jit(over_devices(trainables, sums, (P(), P())))


def over_devices(trainables: Trainables, function: Callable, outs):
    """(params, frozen, *batches) -> what `function` returns, run on every device.

    There it gets the parts that the device holds. By hand, so that what goes over the
    network is what is written here: left to itself, XLA splits the products of a tower
    over `fsdp` and sums their outputs, which are larger than the weights.

    Args:
        outs: PartitionSpecs of what it returns.
    """
    parts = trainables.parts

    def run(params, frozen, *batches):
        if sharding.batch_parts(trainables.mesh) == 1:
            # XLA refuses sums by hand over axes of one device beside a split `tensor`.
            return function(params, frozen, *batches)
        specs = (
            {name: parts.spec(name) for name in params},
            {path: parts.spec("/".join(map(str, path))) for path in frozen},
            *({name: sharding.batch_spec(name) for name in batch} for batch in batches),
        )

        def own(params, frozen, *batches):
            first = jax.lax.axis_index(parts.OVER) * len(batches[0]["ok_B"])
            own = (batch | {"first_example": first} for batch in batches)
            return function(params, frozen, *own)

        over = jax.shard_map(
            own,
            mesh=trainables.mesh,
            in_specs=specs,
            out_specs=outs,
            axis_names=set(parts.OVER),
            check_vma=False,
        )
        return over(params, frozen, *batches)

    return run
