"""The compiled half of generation: encode images, read prompts, decode in chunks.

Arrays of static shape in and out, nothing of text or requests. A is a token generated
so far, E an end token, U one of the likeliest tokens, and "place" is a position of the
cache. Rows are independent: each has its own prompt length, rules, key, end tokens and
limit, and ends by itself.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt4_jax import sampling
from minigpt4_jax.models.layers import BRANCHES
from minigpt4_jax.models.llama import Cache
from minigpt4_jax.request import TOP_LOGPROBS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """B prompts to be read, padded behind to T; a row of length 0 is a spare one.

    slots_BT: which of ids_BT are places for image embeddings, in order.
    end_ids_BE: tokens that end the row, padded with -1.
    limit_B: tokens to generate at most, at least 1.
    """

    ids_BT: jax.Array
    slots_BT: jax.Array
    length_B: jax.Array
    end_ids_BE: jax.Array
    limit_B: jax.Array
    controls: sampling.Controls


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Rows being decoded. The last of a row's count_B tokens is not in the cache yet.

    ids_BA: below 0 (request.FAILURES) where a row could not go on, which ended it.
    top_ids_BAU, top_logprobs_BAU: of the likeliest tokens, where a row asks for them.
    """

    cache: Cache
    controls: sampling.Controls
    end_ids_BE: jax.Array
    limit_B: jax.Array
    ids_BA: jax.Array
    logprobs_BA: jax.Array
    top_ids_BAU: jax.Array
    top_logprobs_BAU: jax.Array
    count_B: jax.Array
    done_B: jax.Array


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of one model; `weights` is `nnx.state(model)` in each.

    encode(weights, pixels_BHWC) -> image_BQD
    new_cache(weights, batch=, places=) -> Cache
    read(weights, cache, ids_BT, slots_BT, used_B, image_BQD) -> Cache
    prefill(weights, prompts, image_BQD, places=, budget=) -> Decoding, one token a row
    decode(weights, decoding, done_B, steps=) -> Decoding, at most `steps` tokens more;
        stops early when all rows are done; donates its argument
    insert(decoding, new, row_B) -> Decoding with the rows of `new` put at `row_B`, where
        an index past the end drops the row; donates its first argument
    """

    encode: Callable
    new_cache: Callable
    read: Callable
    prefill: Callable
    decode: Callable
    insert: Callable


@functools.lru_cache(maxsize=8)
def programs(graphdef: nnx.GraphDef) -> Programs:
    """Programs for all models of this structure, jitted; compiled once for each shape."""

    def bind(function):
        return lambda weights, *args, **kw: function(
            nnx.merge(graphdef, weights), *args, **kw
        )

    return Programs(
        encode=jax.jit(bind(encode)),
        new_cache=jax.jit(
            bind(lambda model, *, batch, places: model.llama.new_cache(batch, places)),
            static_argnames=("batch", "places"),
        ),
        read=jax.jit(bind(read)),
        prefill=jax.jit(bind(prefill), static_argnames=("places", "budget")),
        decode=jax.jit(bind(decode), static_argnames="steps", donate_argnums=1),
        insert=jax.jit(insert, donate_argnums=0),
    )


def encode(model, pixels_BHWC):
    """Pixels -> float32 image embeddings."""
    return model.encode_image(pixels_BHWC).astype(jnp.float32)


def read(model, cache: Cache, ids_BT, slots_BT, used_B, image_BQD) -> Cache:
    """Append a piece of each row's prompt to its cache.

    Args:
        ids_BT, slots_BT: the pieces, padded behind to T; T places must be free.
        used_B: their lengths.
        image_BQD: what goes into the slots, in order; None where there are none.
    """
    T = ids_BT.shape[1]
    positions_BT = cache.length_B[:, None] + jnp.arange(T)
    segments_BT = jnp.where(jnp.arange(T) < used_B[:, None], BRANCHES, 0)
    x_BTD = model.embed_prompt(ids_BT, slots_BT, image_BQD)
    _, cache = model.llama(x_BTD, segments_BT, positions_BT, cache)
    return cache


def spread(cache: Cache, row_R, places: int) -> Cache:
    """The rows `row_R` of a cache with more places, of which the next ones are the first.

    What comes next so begins at the same place in all rows, however long they are.
    """

    def take(x, axis):
        more = [(0, 0)] * x.ndim
        more[axis + 1] = (0, places)
        return jnp.pad(jnp.take(x, row_R, axis=axis), more)

    k, v = jax.tree.map(lambda x: take(x, x.ndim - 4), (cache.k, cache.v))
    full = cache.segments_BS.shape[1]
    return Cache(
        k=k,
        v=v,
        segments_BS=take(cache.segments_BS, 0),
        positions_BS=take(cache.positions_BS, 0),
        length_B=jnp.full(len(row_R), full, jnp.int32),
    )


def prefill(model, prompts: Prompts, image_BQD, *, places: int, budget: int):
    """Read prompts and choose the first token of each row.

    Args:
        image_BQD: a row's image embeddings in order, zeros behind them; None when no row
            has an image.
        places: size of the cache, at least T and a row's length + limit - 1.
        budget: A, at least the largest limit.
    """
    B, T = prompts.ids_BT.shape
    cache = model.llama.new_cache(B, places)
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    segments_BT = jnp.where(positions_BT < prompts.length_B[:, None], BRANCHES, 0)
    x_BTD = model.embed_prompt(prompts.ids_BT, prompts.slots_BT, image_BQD)
    hidden_BTD, cache = model.llama(x_BTD, segments_BT, positions_BT, cache)
    last_B = jnp.maximum(prompts.length_B - 1, 0)
    last_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    U = TOP_LOGPROBS
    empty = Decoding(
        cache=cache,
        controls=prompts.controls,
        end_ids_BE=prompts.end_ids_BE,
        limit_B=prompts.limit_B,
        ids_BA=jnp.zeros((B, budget), jnp.int32),
        logprobs_BA=jnp.zeros((B, budget), jnp.float32),
        top_ids_BAU=jnp.zeros((B, budget, U), jnp.int32),
        top_logprobs_BAU=jnp.zeros((B, budget, U), jnp.float32),
        count_B=jnp.zeros(B, jnp.int32),
        done_B=prompts.length_B == 0,
    )
    return _extend(empty, model.llama.logits(last_BD))


def decode(model, decoding: Decoding, done_B, *, steps: int):
    """Up to `steps` tokens for each row that is not done.

    Args:
        done_B: rows that the caller ends (a stop string, a cancelled request).
    """
    decoding = dataclasses.replace(decoding, done_B=decoding.done_B | done_B)

    def unfinished(carry):
        step, decoding = carry
        return (step < steps) & ~decoding.done_B.all()

    def advance(carry):
        step, decoding = carry
        last_B1 = jnp.maximum(decoding.count_B - 1, 0)[:, None]
        token_B1 = jnp.take_along_axis(decoding.ids_BA, last_B1, axis=1)
        # A row that is done is padding: it is masked, and its cache length stands still.
        segments_B1 = jnp.where(decoding.done_B, 0, BRANCHES)[:, None]
        hidden_B1D, cache = model.llama(
            model.llama.embed(token_B1),
            segments_B1,
            decoding.cache.length_B[:, None],
            decoding.cache,
        )
        decoding = dataclasses.replace(decoding, cache=cache)
        return step + 1, _extend(decoding, model.llama.logits(hidden_B1D[:, 0]))

    return jax.lax.while_loop(unfinished, advance, (0, decoding))[1]


def _extend(decoding: Decoding, logits_BV):
    """Choose a token for each row that is not done, and see which rows it ends."""
    token_B, logprob_B = sampling.choose(
        logits_BV,
        decoding.controls,
        decoding.ids_BA,
        decoding.count_B,
        decoding.end_ids_BE,
    )
    top_ids_BU, top_logprobs_BU = sampling.likeliest(logits_BV, decoding.controls)
    B, A = decoding.ids_BA.shape
    place_B = jnp.where(decoding.done_B, A, decoding.count_B)
    put = functools.partial(_put, row_B=jnp.arange(B), place_B=place_B)
    count_B = jnp.where(decoding.done_B, decoding.count_B, decoding.count_B + 1)
    ended_B = (token_B[:, None] == decoding.end_ids_BE).any(axis=1) | (token_B < 0)
    return dataclasses.replace(
        decoding,
        ids_BA=put(decoding.ids_BA, token_B),
        logprobs_BA=put(decoding.logprobs_BA, logprob_B),
        top_ids_BAU=put(decoding.top_ids_BAU, top_ids_BU),
        top_logprobs_BAU=put(decoding.top_logprobs_BAU, top_logprobs_BU),
        count_B=count_B,
        done_B=decoding.done_B | ended_B | (count_B >= decoding.limit_B),
    )


def _put(old, new, *, row_B, place_B):
    return old.at[row_B, place_B].set(new, mode="drop")


def insert(decoding: Decoding, new: Decoding, row_B):
    """Put the rows of `new`, whose cache and budget are as large, at `row_B`."""

    def put(old, new, axis=0):
        rows = (slice(None),) * axis + (row_B,)
        return old.at[rows].set(new, mode="drop")

    def put_kv(old, new):
        if isinstance(old, tuple):
            return tuple(map(put, old, new))
        return put(old, new, axis=1)

    fields = {f.name for f in dataclasses.fields(Cache)} - {"k", "v"}
    cache = Cache(
        k=put_kv(decoding.cache.k, new.cache.k),
        v=put_kv(decoding.cache.v, new.cache.v),
        **{f: put(getattr(decoding.cache, f), getattr(new.cache, f)) for f in fields},
    )
    rest = {f.name for f in dataclasses.fields(Decoding)} - {"cache", "controls"}
    return Decoding(
        cache=cache,
        controls=jax.tree.map(put, decoding.controls, new.controls),
        **{f: put(getattr(decoding, f), getattr(new, f)) for f in rest},
    )
