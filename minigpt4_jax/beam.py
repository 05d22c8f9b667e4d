"""Beam search: the J likeliest beginnings of an answer grow together, on the device.

The rules are those of Hugging Face's generate (transformers 5): of the likeliest
candidates, those that end become hypotheses if they are among the first J, scored by
sum of log-probabilities / tokens ** length_penalty, of which the best J are kept; the
others are the next beams. A search is the same alone and beside others,
but for the last bit of its scores. `Rules.reference` asks for those of transformers 4.28
and 4.30, which the original has (compat.py).

J is a beam or hypothesis, X a pair of a beam and a token, C one of the pairs that are
looked at, R = B * J a row of the cache, A a token of the answer, E an end token, U one of
the likeliest tokens, S a place of the cache or a state of data/stops.py, M a sequence of
N tokens that ends a search.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt4_jax import sampling
from minigpt4_jax.data.stops import FOUND
from minigpt4_jax.decoding import spread
from minigpt4_jax.hypotheses import (
    DEAD,
    Rules,
    Texts,
    along,
    can_improve,
    collect,
    end_in,
    first,
    take,
)
from minigpt4_jax.models.layers import BRANCHES
from minigpt4_jax.models.llama import Cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
    """B searches under way.

    cache: of R rows; the answer's tokens begin at the same place in all of them.
    controls: of R rows.
    last_R, prompt_R: the last token of the prompt, and how many it has.
    beams, found: what grows, and what has ended (a count of 0: none yet).
    failed_B: whether it met logits that are not finite.
    open_B: whether the search goes on.
    """

    cache: Cache
    rules: Rules
    controls: sampling.Controls
    last_R: jax.Array
    prompt_R: jax.Array
    beams: Texts
    found: Texts
    failed_B: jax.Array
    open_B: jax.Array


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of one model; `weights` is `nnx.state(model)`.

    begin(cache, last_B, rules, beams=, budget=, tops=) -> Search
    grow(weights, search, steps) -> Search, by at most so many tokens; donates `search`
    """

    begin: Callable
    grow: Callable


@functools.lru_cache(maxsize=8)
def programs(graphdef: nnx.GraphDef) -> Programs:
    """Programs for all models of this structure, jitted; compiled once for each shape."""

    def bound(weights, *args):
        return grow(nnx.merge(graphdef, weights), *args)

    return Programs(
        begin=jax.jit(begin, static_argnames=("beams", "budget", "tops")),
        grow=jax.jit(bound, donate_argnums=1),
    )


def begin(
    cache: Cache, last_B, rules: Rules, *, beams: int, budget: int, tops: int = 0
) -> Search:
    """Searches before their first token.

    Args:
        cache: of B rows, the prompts but for their last token.
        last_B: those last tokens.
        budget: A, at least the largest limit. As many places are needed behind the
            prompts: for their last token, and for an answer's without its own last.
        tops: U.
    """
    B = len(last_B)
    row_R = jnp.repeat(jnp.arange(B), beams)
    nothing = Texts(
        ids_BJA=jnp.zeros((B, beams, budget), jnp.int32),
        logprobs_BJA=jnp.zeros((B, beams, budget), jnp.float32),
        count_BJ=jnp.zeros((B, beams), jnp.int32),
        score_BJ=jnp.full((B, beams), DEAD, jnp.float32),
        state_BJ=jnp.broadcast_to(rules.state_B[:, None], (B, beams)),
        top_ids_BJAU=jnp.zeros((B, beams, budget, tops), jnp.int32),
        top_logprobs_BJAU=jnp.zeros((B, beams, budget, tops), jnp.float32),
    )
    # One beam alone: all of them are the same yet. The original draws from all.
    first_BJ = nothing.score_BJ.at[:, 0].set(0)
    if rules.reference:
        drawn_B1 = rules.controls.temperature_B[:, None] > 0
        first_BJ = jnp.where(drawn_B1, 0, first_BJ)
    return Search(
        cache=spread(cache, row_R, budget),
        rules=rules,
        controls=jax.tree.map(lambda x_B: x_B[row_R], rules.controls),
        last_R=last_B[row_R],
        prompt_R=cache.length_B[row_R] + 1,
        beams=dataclasses.replace(nothing, score_BJ=first_BJ),
        found=dataclasses.replace(
            nothing, score_BJ=jnp.full_like(first_BJ, 2 * rules.least)
        ),
        failed_B=jnp.zeros(B, bool),
        open_B=rules.limit_B > 0,
    )


def grow(model, search: Search, steps) -> Search:
    """Up to `steps` tokens more for all beams of the searches that are open."""
    R = len(search.prompt_R)

    def unfinished(carry):
        step, search = carry
        return (step < steps) & search.open_B.any()

    def advance(carry):
        step, search = carry
        count_R = search.beams.count_BJ.reshape(R)
        ids_RA = search.beams.ids_BJA.reshape(R, -1)
        before_R1 = jnp.maximum(count_R - 1, 0)[:, None]
        last_R = jnp.take_along_axis(ids_RA, before_R1, axis=1)[:, 0]
        last_R = jnp.where(count_R == 0, search.last_R, last_R)
        hidden_R1D, cache = model.llama(
            model.llama.embed(last_R[:, None]),
            jnp.full((R, 1), BRANCHES),
            (search.prompt_R + count_R - 1)[:, None],
            search.cache,
        )
        search = dataclasses.replace(search, cache=cache)
        extend = _extend_as_the_reference if search.rules.reference else _extend
        return step + 1, extend(search, model.llama.logits(hidden_R1D[:, 0]))

    return jax.lax.while_loop(unfinished, advance, (0, search))[1]


def _extend(search: Search, logits_RV) -> Search:
    """All beams one token longer."""
    rules, open_B1 = search.rules, search.open_B[:, None]
    B, J, A = search.beams.ids_BJA.shape
    parent_BC, candidates = _candidates(search, logits_RV)
    last = candidates.count_BJ.max() - 1  # the same in all
    token_BC = candidates.ids_BJA[:, :, last]
    ended_BC = (token_BC[..., None] == rules.end_ids_BE[:, None]).any(-1)
    ended_BC |= candidates.state_BJ == FOUND
    ended_BC |= candidates.count_BJ >= rules.limit_B[:, None]
    kept_BJ = jax.lax.top_k(candidates.score_BJ + ended_BC * DEAD, J)[1]
    beams = take(candidates, kept_BJ)
    beams = dataclasses.replace(
        beams, score_BJ=beams.score_BJ + along(ended_BC, kept_BJ) * DEAD
    )
    found = collect(rules, search.found, candidates, first(ended_BC, J) & open_B1)
    failed_B = _failed(logits_RV, B)
    going_B = can_improve(rules, beams, found) & ~ended_BC.all(1) & ~failed_B
    return dataclasses.replace(
        search,
        cache=_reorder(search.cache, along(parent_BC, kept_BJ), places=A),
        beams=beams,
        found=found,
        failed_B=search.failed_B | (failed_B & search.open_B),
        open_B=search.open_B & going_B,
    )


def _extend_as_the_reference(search: Search, logits_RV) -> Search:
    """The same by the rules of transformers 4.28 and 4.30.

    A dummy first id counts in lengths: of what ends by an end token as that token, of
    what is cut off besides. Beams end at the limit, or when all of them end in one
    sequence; the likeliest candidate, ended or not, judges whether one can improve.
    """
    rules, open_B1 = search.rules, search.open_B[:, None]
    B, J, A = search.beams.ids_BJA.shape
    parent_BC, candidates = _candidates(search, logits_RV)
    count = candidates.count_BJ.max()  # the same in all
    token_BC = candidates.ids_BJA[:, :, count - 1]
    ended_BC = (token_BC[..., None] == rules.end_ids_BE[:, None]).any(-1)
    going_BC = jnp.where(ended_BC, -jnp.inf, candidates.score_BJ)
    kept_BJ = jax.lax.top_k(going_BC, J)[1]
    beams = dataclasses.replace(
        take(candidates, kept_BJ), score_BJ=along(going_BC, kept_BJ)
    )
    found = collect(rules, search.found, candidates, first(ended_BC, J) & open_B1)
    failed_B = _failed(logits_RV, B)
    done_B = ~can_improve(rules, candidates, found, dummy=1)
    cut_B = count >= rules.limit_B
    for sequence_N in rules.sequences_MN:
        cut_B |= end_in(beams.ids_BJA, count, sequence_N).all(1)
    over_BJ = (cut_B & ~done_B)[:, None] & open_B1 & jnp.ones((B, J), bool)
    found = collect(rules, found, beams, over_BJ, dummy=1)
    return dataclasses.replace(
        search,
        cache=_reorder(search.cache, along(parent_BC, kept_BJ), places=A),
        beams=beams,
        found=found,
        failed_B=search.failed_B | (failed_B & search.open_B),
        open_B=search.open_B & ~done_B & ~cut_B & ~failed_B,
    )


def _failed(logits_RV, B: int):
    """Requests of which a beam's logits are not finite."""
    return ~jnp.isfinite(jax.nn.logsumexp(logits_RV, axis=-1)).reshape(B, -1).all(1)


def _candidates(search: Search, logits_RV) -> tuple[jax.Array, Texts]:
    """The likeliest C pairs of a beam and a next token, and which beam: parent_BC.

    C leaves J candidates even when the likeliest token of every beam and all end tokens
    are among them. With a temperature they are drawn without replacement, in the order
    of the draws: adding Gumbel noise to log-probabilities does that. The original divides
    the beams' scores by the temperature too, each time, and goes by scores.
    """
    rules, controls, beams = search.rules, search.controls, search.beams
    B, J, A = beams.ids_BJA.shape
    V = logits_RV.shape[-1]
    ends = rules.end_ids_BE.shape[1]
    ids_RA, count_R = beams.ids_BJA.reshape(B * J, A), beams.count_BJ.reshape(B * J)
    end_ids_RE = jnp.repeat(rules.end_ids_BE, J, axis=0)
    logprobs_RV = jax.nn.log_softmax(logits_RV)
    ruled_RV = jax.lax.cond(
        jnp.any(controls.ruled_B),
        lambda: sampling.rule(logprobs_RV, controls, ids_RA, count_R, end_ids_RE)[0],
        lambda: logprobs_RV,
    )

    def add(step_RV):
        return (step_RV.reshape(B, J, V) + beams.score_BJ[..., None]).reshape(B, J * V)

    def drawn():
        sampled_B1 = rules.controls.temperature_B[:, None] > 0
        cut_RV = _cut(ruled_RV, controls, least=ends + 1)
        score_BX = add(jnp.where(controls.temperature_B[:, None] > 0, cut_RV, ruled_RV))
        if rules.reference:
            heat_B1 = rules.controls.temperature_B[:, None]
            heat_B1 = jnp.where(heat_B1 > 0, heat_B1, 1)
            before_BJ1 = (beams.score_BJ * (1 / heat_B1 - 1))[..., None]
            score_BX = (score_BX.reshape(B, J, V) + before_BJ1).reshape(B, J * V)
        noise_BX = gumbel(rules.controls.key_B, count_R[0], J * V)
        return score_BX, score_BX + jnp.where(sampled_B1, noise_BX, 0)

    def likeliest():
        score_BX = add(ruled_RV)
        return score_BX, score_BX

    score_BX, order_BX = jax.lax.cond(
        jnp.any(controls.temperature_B > 0), drawn, likeliest
    )
    chosen_BC = jax.lax.top_k(order_BX, (1 + ends) * J)[1]
    if rules.reference:
        sorted_BC = jax.lax.top_k(along(score_BX, chosen_BC), chosen_BC.shape[1])[1]
        chosen_BC = along(chosen_BC, sorted_BC)
    parent_BC, token_BC = chosen_BC // V, chosen_BC % V
    longer = take(beams, parent_BC)
    # All beams are as long.
    at = count_R[0]
    new_BC = along(logprobs_RV.reshape(B, J * V), chosen_BC)
    return parent_BC, Texts(
        ids_BJA=longer.ids_BJA.at[:, :, at].set(token_BC),
        logprobs_BJA=longer.logprobs_BJA.at[:, :, at].set(new_BC),
        count_BJ=longer.count_BJ + 1,
        score_BJ=along(score_BX, chosen_BC),
        state_BJ=rules.next_SV[longer.state_BJ, token_BC],
        **_tops(longer, logprobs_RV, parent_BC, at),
    )


def _tops(longer: Texts, logprobs_RV, parent_BC, at) -> dict[str, jax.Array]:
    """The likeliest tokens at place `at`, written into texts that are one token longer."""
    U = longer.top_ids_BJAU.shape[-1]
    old = {
        name: getattr(longer, name) for name in ("top_ids_BJAU", "top_logprobs_BJAU")
    }
    if not U:
        return old
    B = len(parent_BC)
    logprobs_RU, ids_RU = jax.lax.top_k(logprobs_RV, U)
    new = zip(old.items(), (ids_RU, logprobs_RU))
    return {
        name: x.at[:, :, at].set(
            jnp.take_along_axis(top_RU.reshape(B, -1, U), parent_BC[..., None], axis=1)
        )
        for (name, x), top_RU in new
    }


def gumbel(key_B, count, size: int):
    """The noise of token number `count`: [B size]."""

    def row(key):
        return jax.random.gumbel(jax.random.fold_in(key, count), (size,))

    return jax.vmap(row)(key_B)


def _cut(ruled_RV, controls: sampling.Controls, *, least: int):
    """Log-probabilities over temperature; -inf where top-k, top-p or min-p cut.

    `least` tokens are always left, so that end tokens alone never are.
    """
    least_R1 = jax.lax.top_k(ruled_RV, least)[0][:, -1:]
    kept_RV = (sampling.weights(ruled_RV, controls) > 0) | (ruled_RV >= least_R1)
    temperature_R = jnp.where(controls.temperature_B > 0, controls.temperature_B, 1)
    return jnp.where(kept_RV, ruled_RV / temperature_R[:, None], -jnp.inf)


def _reorder(cache: Cache, parent_BJ, *, places: int) -> Cache:
    """The cache with each row's answer, in the last `places`, that of its new beam."""
    B, J = parent_BJ.shape
    row_R = (parent_BJ + J * jnp.arange(B)[:, None]).reshape(B * J)

    def move(x):
        begin = x.shape[-3] - places
        answers = jax.lax.slice_in_dim(x, begin, begin + places, axis=x.ndim - 3)
        answers = jnp.take(answers, row_R, axis=x.ndim - 4)
        return jax.lax.dynamic_update_slice_in_dim(x, answers, begin, x.ndim - 3)

    k, v = jax.tree.map(move, (cache.k, cache.v))
    return dataclasses.replace(cache, k=k, v=v)
