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
import numpy as np
from flax import nnx

from minigpt4_jax import sampling
from minigpt4_jax.models.layers import BRANCHES
from minigpt4_jax.models.llama import Cache
from minigpt4_jax.request import TOP_LOGPROBS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Rows being decoded, each in S places; room for as many answer tokens (A = S).

    tokens_BS: prompt and answer, -1 at image slots. What row b reads next, and is not in
        the cache yet, is its token number cache.length_B[b].
    end_ids_BE: tokens that end the row.
    limit_B: tokens to generate at most; 0: a spare row.
    slot_BD: the image embedding to be read next in a row where that is at a slot.
    ids_BA, logprobs_BA: the count_B[b] tokens of the answer; below 0
        (request.FAILURES) where a row could not go on, which ended it.
    top_ids_BAU, top_logprobs_BAU: of the likeliest tokens, where a row asks for them.
    done_B: rows that grow no more; a spare row is done.
    """

    cache: Cache
    controls: sampling.Controls
    end_ids_BE: jax.Array
    limit_B: jax.Array
    tokens_BS: jax.Array
    slot_BD: jax.Array
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
    decode(weights, decoding, done_B, steps, drafts=) -> Decoding; donates `decoding`
    insert(decoding, row, b) -> Decoding with the one row at b; donates `decoding`
    extract(decoding, b) -> Decoding of that row alone
    resize(decoding, places=) -> the same rows in more places, or in fewer
    """

    encode: Callable
    new_cache: Callable
    read: Callable
    decode: Callable
    insert: Callable
    extract: Callable
    resize: Callable


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
        decode=jax.jit(bind(decode), static_argnames="drafts", donate_argnums=1),
        insert=jax.jit(insert, donate_argnums=0),
        extract=jax.jit(extract),
        resize=jax.jit(resize, static_argnames="places"),
    )


def encode(model, pixels_BHWC):
    """Pixels -> float32 image embeddings."""
    return model.encode_image(pixels_BHWC).astype(jnp.float32)


def read(model, cache: Cache, ids_BT, slots_BT, used_B, image_BQD) -> Cache:
    """Append a piece of each row's prompt to its cache.

    Args:
        cache: left as it is, so that it can be kept for another question.
        ids_BT, slots_BT: the pieces, padded behind to T; T places must be free.
        used_B: their lengths.
        image_BQD: what goes into the slots, in order.
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


def start(
    cache: Cache,
    tokens_BS: np.ndarray,
    slot_BD: np.ndarray,
    end_ids_BE: np.ndarray,
    limit_B: np.ndarray,
    controls: sampling.Controls,
) -> Decoding:
    """Rows whose prompts are in the cache but for what is next; limit 0: a spare row."""
    B, S = tokens_BS.shape
    return Decoding(
        cache=cache,
        controls=controls,
        end_ids_BE=end_ids_BE,
        limit_B=limit_B,
        tokens_BS=tokens_BS,
        slot_BD=slot_BD,
        ids_BA=np.zeros((B, S), np.int32),
        logprobs_BA=np.zeros((B, S), np.float32),
        top_ids_BAU=np.zeros((B, S, TOP_LOGPROBS), np.int32),
        top_logprobs_BAU=np.zeros((B, S, TOP_LOGPROBS), np.float32),
        count_B=np.zeros(B, np.int32),
        done_B=limit_B == 0,
    )


def decode(model, decoding: Decoding, done_B, steps, *, drafts: int = 0) -> Decoding:
    """Up to `steps` forward passes for the rows that are not done.

    Args:
        done_B: rows that the caller ends (a stop string, a cancelled request).
        drafts: tokens guessed from earlier text and checked in the same pass. A pass
            adds 1 to 1 + drafts tokens to a row, the same as without, and needs
            1 + drafts free places.
    """
    decoding = dataclasses.replace(decoding, done_B=decoding.done_B | done_B)

    def unfinished(carry):
        step, decoding = carry
        return (step < steps) & ~decoding.done_B.all()

    def advance(carry):
        step, decoding = carry
        draft_BT = look_up(decoding.tokens_BS, decoding.cache.length_B, drafts)
        if not drafts:
            return step + 1, _advance(model, decoding, draft_BT)
        # A pass without a guess is a third shorter on a CPU, where products count.
        decoding = jax.lax.cond(
            ((draft_BT >= 0) & ~decoding.done_B[:, None]).any(),
            lambda: _advance(model, decoding, draft_BT),
            lambda: _advance(model, decoding, draft_BT[:, :0]),
        )
        return step + 1, decoding

    return jax.lax.while_loop(unfinished, advance, (0, decoding))[1]


def _advance(model, decoding: Decoding, draft_BT) -> Decoding:
    """One forward pass over each row's next token and its drafts (-1: none)."""
    drafts = draft_BT.shape[1]
    length_B, before_B = decoding.cache.length_B, decoding.count_B
    next_B1 = jnp.take_along_axis(decoding.tokens_BS, length_B[:, None], axis=1)
    ids_BT = jnp.concatenate([next_B1, draft_BT], axis=1)
    x_BTD = model.llama.embed(jnp.maximum(ids_BT, 0))
    first_BD = jnp.where(next_B1 < 0, decoding.slot_BD.astype(x_BTD.dtype), x_BTD[:, 0])
    # A row that is done is padding: it is masked, and its cache length stands still.
    read_BT = jnp.where(decoding.done_B[:, None], False, ids_BT >= 0)
    read_BT = read_BT.at[:, 0].set(~decoding.done_B)
    hidden_BTD, cache = model.llama(
        x_BTD.at[:, 0].set(first_BD),
        jnp.where(read_BT, BRANCHES, 0),
        length_B[:, None] + jnp.arange(1 + drafts),
        decoding.cache,
    )
    logits_BTV = model.llama.logits(hidden_BTD)
    grows_B = ~decoding.done_B
    for t in range(1 + drafts):
        place_B = length_B + 1 + t
        decoding, token_B = _extend(decoding, logits_BTV[:, t], grows_B, place_B)
        if t < drafts:
            grows_B &= ~decoding.done_B & (token_B == draft_BT[:, t])
    # Places behind a wrong draft hold later positions: masked until written again.
    length_B += decoding.count_B - before_B
    cache = dataclasses.replace(cache, length_B=length_B)
    return dataclasses.replace(decoding, cache=cache)


def look_up(tokens_BS, length_B, drafts: int):
    """What followed the last tokens of each row when they stood there before.

    The latest of the places that share the last three tokens, else of those that share
    the last two. -1 where nothing is known.
    """
    B, S = tokens_BS.shape
    places_S = jnp.arange(S)
    shared_BS = jnp.zeros((B, S), jnp.int32)
    same_BS = places_S < length_B[:, None]
    for back in range(3):
        last_B1 = jnp.take_along_axis(
            tokens_BS, jnp.maximum(length_B - back, 0)[:, None], axis=1
        )
        same_BS &= (jnp.roll(tokens_BS, back, axis=1) == last_B1) & (places_S >= back)
        shared_BS += same_BS
    best_B1 = jnp.argmax(shared_BS * S + places_S, axis=1)[:, None]
    found_B1 = jnp.take_along_axis(shared_BS, best_B1, axis=1) >= 2
    from_BT = best_B1 + 1 + jnp.arange(drafts)
    draft_BT = jnp.take_along_axis(tokens_BS, jnp.minimum(from_BT, S - 1), axis=1)
    return jnp.where(found_B1 & (from_BT <= length_B[:, None]), draft_BT, -1)


def _extend(decoding: Decoding, logits_BV, grows_B, place_B):
    """Choose a token for each row that grows, and see which rows it ends.

    Returns:
        the rows with these tokens at place_B, and token_B.
    """
    # Rows that are done, spare slots among them, ask for no rule that costs the others.
    controls = sampling.without(decoding.controls, decoding.done_B)
    token_B, logprob_B = sampling.choose(
        logits_BV, controls, decoding.ids_BA, decoding.count_B, decoding.end_ids_BE
    )
    top_ids_BU, top_logprobs_BU = sampling.likeliest(logits_BV, controls)
    B, A = decoding.ids_BA.shape

    def put(old, new, at_B):
        return old.at[jnp.arange(B), at_B].set(new, mode="drop")

    count_B = decoding.count_B
    at_B = jnp.where(grows_B, count_B, A)
    ended_B = (token_B[:, None] == decoding.end_ids_BE).any(axis=1)
    ended_B |= (token_B < 0) | (count_B + 1 >= decoding.limit_B)
    decoding = dataclasses.replace(
        decoding,
        tokens_BS=put(decoding.tokens_BS, token_B, jnp.where(grows_B, place_B, A)),
        ids_BA=put(decoding.ids_BA, token_B, at_B),
        logprobs_BA=put(decoding.logprobs_BA, logprob_B, at_B),
        top_ids_BAU=put(decoding.top_ids_BAU, top_ids_BU, at_B),
        top_logprobs_BAU=put(decoding.top_logprobs_BAU, top_logprobs_BU, at_B),
        count_B=count_B + grows_B,
        done_B=decoding.done_B | (grows_B & ended_B),
    )
    return decoding, token_B


def insert(decoding: Decoding, row: Decoding, b) -> Decoding:
    """Put a single row, of as many places, at index b."""

    def put(axis, old, new):
        return jax.lax.dynamic_update_slice_in_dim(old, new, b, axis)

    return jax.tree.map(put, _row_axes(decoding), decoding, row)


def extract(decoding: Decoding, b) -> Decoding:
    """Row b alone."""

    def take(axis, x):
        return jax.lax.dynamic_slice_in_dim(x, b, 1, axis)

    return jax.tree.map(take, _row_axes(decoding), decoding)


def resize(decoding: Decoding, *, places: int) -> Decoding:
    """The same rows in so many places; those that are cut off must be unused."""
    S = decoding.tokens_BS.shape[1]
    axes = _row_axes(decoding)
    cache = dataclasses.replace(decoding.cache, length_B=None)

    def fit(axis, x):
        if places <= S:
            return jax.lax.slice_in_dim(x, 0, places, axis=axis + 1)
        empty = [(0, 0)] * x.ndim
        empty[axis + 1] = (0, places - S)
        return jnp.pad(x, empty)

    cache = jax.tree.map(fit, dataclasses.replace(axes.cache, length_B=None), cache)
    names = ("tokens_BS", "ids_BA", "logprobs_BA", "top_ids_BAU", "top_logprobs_BAU")
    sized = {name: fit(0, getattr(decoding, name)) for name in names}
    return dataclasses.replace(
        decoding,
        cache=dataclasses.replace(cache, length_B=decoding.cache.length_B),
        **sized,
    )


def _row_axes(decoding: Decoding) -> Decoding:
    """Which axis of each array counts rows: 1 where layers are stacked before them."""
    axes = jax.tree.map(lambda _: 0, decoding)
    if isinstance(decoding.cache.k, tuple):
        return axes
    k, v = jax.tree.map(lambda _: 1, (decoding.cache.k, decoding.cache.v))
    return dataclasses.replace(axes, cache=dataclasses.replace(axes.cache, k=k, v=v))
