"""What one update computes: its loss, and gradients for the trainables alone."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax import optim
from minigpt4_jax.data import pipeline
from minigpt4_jax.step import (
    Trainables,
    answer_loss,
    make_evaluate,
    make_step,
    word_loss,
)
from tests import tiny
from tests.training import TRAINABLE, captions, config, random_patches

TOKENIZER = tiny.tokenizer()


def stack(rows, patches_BPE) -> dict:
    batch = {
        name[:-1] + "B" + name[-1]: np.stack([row[name] for row in rows])
        for name in rows[0]
    }
    return batch | {"patches_BPE": patches_BPE}


def turns(i: int):
    texts = pipeline.caption_texts(TOKENIZER, tiny.CONFIG.num_slots)
    return texts(captions(i), np.random.default_rng(i))


def batch_of_two() -> dict:
    rows = [pipeline.pack(turns(i), length=110, answer_length=105) for i in (0, 1)]
    return stack(rows, random_patches(2))


@pytest.fixture(scope="module")
def evaluate():
    """Loss of a batch under the tiny model."""
    trainables = Trainables(tiny.model(), TRAINABLE)
    compiled = make_evaluate(trainables, answer_loss)
    return lambda batch: float(compiled(trainables.params, trainables.frozen, batch))


def test_padding_does_not_change_the_loss(evaluate):
    short = stack([pipeline.pack(turns(0), 110, 105)], random_patches(1))
    padded = stack([pipeline.pack(turns(0), 131, 117)], random_patches(1))
    assert padded["loss_mask_BA"].sum() == short["loss_mask_BA"].sum() > 90
    assert evaluate(padded) == pytest.approx(evaluate(short), rel=1e-6)


def test_captions_that_share_an_image_have_the_loss_of_rows_of_their_own(evaluate):
    patches_BPE = random_patches(1)
    together = stack([pipeline.pack(turns(0), 110, 105)], patches_BPE)
    apart = stack(
        [pipeline.pack([turn], 110, 105) for turn in turns(0)],
        np.repeat(patches_BPE, 5, axis=0),
    )
    # A mean over all answer tokens: captions of other lengths weigh otherwise.
    lengths = apart["loss_mask_BA"].sum(axis=1)
    assert len(set(lengths)) > 1 and lengths.sum() == together["loss_mask_BA"].sum()
    assert evaluate(apart) == pytest.approx(evaluate(together), rel=1e-6)


# A step.


@pytest.fixture(scope="module")
def stepped():
    """A model before and after two steps (the first has learning rate 0)."""
    trainables = Trainables(tiny.model(), TRAINABLE)
    before = {name: np.asarray(value) for name, value in trainables.params.items()}
    frozen = {p: np.array(v[...]) for p, v in trainables.frozen.items()}
    optimizer = optim.make_optimizer(config("unused").optim)
    params = trainables.params
    state = {"params": params, "opt_state": optimizer.init(params)}
    step = make_step(trainables, answer_loss, optimizer)
    jaxpr = jax.make_jaxpr(step)(state, trainables.frozen, batch_of_two())
    before = jax.tree.map(np.array, before)  # the step takes the buffers
    for _ in range(2):
        state, metrics = step(state, trainables.frozen, batch_of_two())
    return SimpleNamespace(
        trainables=trainables,
        before=before,
        frozen=frozen,
        state=state,
        metrics=metrics,
        jaxpr=jaxpr,
    )


def test_a_step_changes_only_the_trainables(stepped):
    assert set(stepped.before) == set(stepped.state["params"])
    assert {name.split("/")[0] for name in stepped.before} == {"qformer", "projector"}
    for name, value in stepped.state["params"].items():
        if name.endswith("/k/bias"):  # softmax does not see a shift of all keys
            continue
        assert (np.asarray(value) != stepped.before[name]).any(), name
    for path, value in stepped.trainables.frozen.items():
        np.testing.assert_array_equal(value[...], stepped.frozen[path], err_msg=path)
    assert np.isfinite(stepped.metrics["loss"]) and stepped.metrics["grad_norm"] > 0


def test_moments_are_kept_for_the_trainables_alone(stepped):
    sizes = [x.size for x in jax.tree.leaves(stepped.state["opt_state"])]
    trained = sum(value.size for value in stepped.before.values())
    assert sum(size for size in sizes if size > 1) == 2 * trained


def test_no_product_of_the_step_has_the_shape_of_a_frozen_weight(stepped):
    frozen = {path: value.shape for path, value in stepped.frozen.items()}
    kernels = {
        # L is the scan's: a gradient inside it has the shape of one layer.
        shape(value[1:] if "blocks" in path else value)
        for path, value in frozen.items()
        if path[0] == "llama" and path[-1] in ("kernel", "embedding")
    }
    assert len(kernels) == 4  # q, k, MLP, embedding; the others are like one of them
    assert not kernels & set(products(stepped.jaxpr.jaxpr))
    # The same look finds them when the decoder trains.
    trainables = Trainables(tiny.model(), ["llama/.*"])
    jaxpr = jax.make_jaxpr(
        jax.grad(lambda p: answer_loss(trainables.model(p), batch_of_two()))
    )(trainables.params)
    embedding = shape(frozen[("llama", "embed", "embedding")])
    assert kernels - {embedding} <= set(products(jaxpr.jaxpr))


def shape(dimensions) -> tuple[int, ...]:
    """Dimensions in any order: a gradient may come out transposed."""
    return tuple(sorted(d for d in dimensions if d > 1))


def products(jaxpr):
    """Shapes of all dot products, those of inner programs included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield shape(eqn.outvars[0].aval.shape)
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def test_frozen_weights_are_arguments_of_the_program_not_constants(stepped):
    inner = [eqn.params["jaxpr"] for eqn in stepped.jaxpr.jaxpr.eqns]
    consts = [*stepped.jaxpr.consts, *(c for j in inner for c in j.consts)]
    assert all(np.size(const) < 100 for const in consts)


def test_trainables_are_float32_however_the_model_is_stored():
    from minigpt4_jax.models.layers import DTypes

    half = DTypes(param="bfloat16", compute="bfloat16", output="bfloat16")
    trainables = Trainables(tiny.model(dtypes=half), TRAINABLE)
    assert {v.dtype for v in trainables.params.values()} == {jnp.dtype("float32")}
    llama = [v for path, v in trainables.frozen.items() if path[0] == "llama"]
    assert {v.dtype for v in llama} == {jnp.dtype("bfloat16")}


# The warm start's loss.


def fake_model(image_BQD, table_VD):
    """Only what word_loss reads: patches are the embeddings themselves."""
    embed = SimpleNamespace(embedding=jnp.asarray(table_VD))
    return SimpleNamespace(
        project=lambda patches_BPE: jnp.asarray(image_BQD),
        llama=SimpleNamespace(embed=embed),
    )


E0, E1, E2, E3 = 2 * np.eye(4, dtype=np.float32)
WORDS_VD = np.stack([E0, -E0, E2, -E2])  # their mean is 0
NAMES_THE_FIRST = {
    "patches_BPE": np.zeros((1, 1, 1)),
    "target_BV": np.array([[1, 0, 0, 0]], np.float32),
    "share_V": np.array([0.2, 0.5, 0.5, 0.5], np.float32),
    "words_V": np.arange(4),
}


def loss_of(queries_QD, table_VD=WORDS_VD) -> float:
    image_BQD = np.stack(queries_QD)[None]
    return float(word_loss(fake_model(image_BQD, table_VD), NAMES_THE_FIRST))


def test_a_photo_that_says_nothing_gets_each_word_at_its_share():
    # As long as the table's rows, and at right angles to all of them.
    want = -math.log(0.2) - 3 * math.log(0.5)
    assert loss_of([E3, E3, E1]) == pytest.approx(want, rel=1e-5)
    # A direction that all words share names none of them.
    shared = 3 * E1
    assert loss_of([E3 + shared] * 3, WORDS_VD + shared) == pytest.approx(
        want, rel=1e-5
    )


def test_looking_like_a_word_says_it_and_length_is_held_at_the_tables():
    silent, wrong = loss_of([E3, E3, E3]), loss_of([E3, E2, E3])
    right = loss_of([E3, E0, E3])
    # The first word is certain, its opposite a little less likely than at its share.
    assert right == pytest.approx(-math.log(1 - 0.4) - 2 * math.log(0.5), abs=1e-3)
    assert right < silent < wrong
    # Half as long: the cosine is the same.
    assert loss_of([E3, 0.5 * E0, E3]) == pytest.approx(right + 0.25 / 3, abs=1e-4)
