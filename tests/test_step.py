"""What one update computes: its loss, and gradients for the trainables alone."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minigpt4_jax import optim
from minigpt4_jax.data import rows
from minigpt4_jax.data.images import preprocess, squash
from minigpt4_jax.models.layers import BRANCHES, DTypes
from minigpt4_jax.models.vit import normalise
from minigpt4_jax.step import (
    Trainables,
    answer_loss,
    make_step,
    new_state,
    word_loss,
)
from tests import batches, parity, tiny
from tests.training import TRAINABLE, config, random_patches

PROJECTOR = (r"projector/.*",)
BFLOAT16 = DTypes(param="bfloat16", compute="bfloat16", output="bfloat16")
# Three images, with answers of 3 + 6, 5, and 2 + 4 + 1 tokens.
EXAMPLES = [
    batches.random_turns(0, (3, 6)),
    batches.random_turns(1, (5,)),
    batches.random_turns(2, (2, 4, 1)),
]


def queries(count: int, seed: int = 0) -> np.ndarray:
    """queries_BQD, as the tiny Q-Former shapes them."""
    cfg = tiny.CONFIG.qformer
    return parity.normal(seed, count, cfg.num_queries, cfg.width)


def batch_of(examples=EXAMPLES, tokens=44, answers=22, at=None, num_rows=3) -> dict:
    laid_out = batches.lay_out(examples, tokens, answers, at, num_rows)
    return laid_out | {"queries_BQD": queries(len(examples))}


def gradients_of(trainables: Trainables):
    """batch -> (mean loss, number of tokens, gradients of the mean), compiled."""

    @jax.jit
    def mean(params, frozen, batch):
        total, count = answer_loss(trainables.model(params, frozen), batch)
        return total / count, count

    differentiate = jax.jit(jax.value_and_grad(mean, has_aux=True))

    def gradients(batch):
        (loss, count), grads = differentiate(
            trainables.params, trainables.frozen, batch
        )
        return float(loss), float(count), jax.tree.map(np.asarray, grads)

    return gradients


@pytest.fixture(scope="module")
def connector() -> Trainables:
    """Only the projector trains: the smallest program with a gradient."""
    return Trainables(tiny.model(), PROJECTOR)


@pytest.fixture(scope="module")
def gradients(connector):
    return gradients_of(connector)


def assert_same(found, wanted, rtol: float = 1e-6):
    """The same loss and tokens, and gradients within float32 sums in another order."""
    assert found[0] == pytest.approx(wanted[0], rel=rtol)
    assert found[1] == wanted[1]
    for name, gradient in wanted[2].items():
        parity.assert_close(found[2][name], gradient, 10 * rtol)


# Rows: what stands where does not matter.


def test_data_lays_rows_out_as_these_tests_do():
    plain = batches.lay_out(EXAMPLES, 44, 22)
    pieces = [rows.encode(turns, 44, 22) for turns in EXAMPLES]
    sizes = rows.RowSizes(rows=3, tokens=44, answers=22, padding=0.0)
    fast = rows.lay_out(pieces, sizes, tiny.CONFIG.num_slots, np.arange(3))
    del plain["ok_B"]  # the loader's
    assert fast.keys() == plain.keys()
    for name, array in fast.items():
        np.testing.assert_array_equal(array, plain[name], err_msg=name)


def test_padding_changes_neither_loss_nor_gradient(gradients):
    short = gradients(batch_of())
    assert short[1] == 3 + 6 + 5 + 2 + 4 + 1
    # Longer rows, and two that are nothing but padding.
    assert_same(gradients(batch_of(tokens=51, answers=25, num_rows=5)), short)


def test_examples_packed_in_a_row_have_the_loss_and_gradient_of_rows_of_their_own(
    gradients,
):
    apart = gradients(batch_of())
    for at in ([0, 0, 1], [1, 0, 0], [2, 2, 2]):  # the rest is padding
        packed = batch_of(at=at)
        assert packed["segments_RT"].max() // BRANCHES == max(map(at.count, at))
        assert_same(gradients(packed), apart)


def test_attention_stays_inside_an_example(gradients):
    packed = batch_of(at=[0, 0, 1])
    second = packed["segments_RT"] // BRANCHES == 2
    text = second & (packed["slots_RT"] < 0)
    other = packed | {"ids_RT": np.where(text, 9, packed["ids_RT"])}
    other["loss_mask_RA"] = packed["loss_mask_RA"] * (packed["example_RA"] != 1)
    alone = packed | {"loss_mask_RA": other["loss_mask_RA"]}
    assert text.sum() > 4
    assert_same(gradients(other), gradients(alone))


def test_captions_that_share_an_image_have_the_loss_of_examples_of_their_own(gradients):
    together = gradients(batch_of([EXAMPLES[2]]))
    apart = batch_of([[turn] for turn in EXAMPLES[2]])
    apart["queries_BQD"] = np.repeat(queries(1), 3, axis=0)
    # A mean over all answer tokens: captions of other lengths weigh otherwise.
    assert_same(gradients(apart), together)


def test_an_example_that_could_not_be_read_has_no_part_in_loss_or_gradient(gradients):
    batch = batch_of(at=[0, 0, 1])
    batch["ok_B"] = np.array([1, 0, 1], np.float32)
    wanted = gradients(
        batch | {"loss_mask_RA": batch["loss_mask_RA"] * (batch["example_RA"] != 1)}
    )
    batch["queries_BQD"][1] = 0  # what a loader puts there
    found = gradients(batch)
    assert found[1] == 16
    assert_same(found, wanted)


# Images: from wherever what is frozen was computed before.


def test_pixels_are_normalised_on_the_device_exactly_as_preprocess_does():
    image_HWC, cfg = tiny.image(), tiny.CONFIG.vit
    found_BHWC = jax.jit(lambda x: normalise(x, cfg))(squash(image_HWC, cfg)[None])
    assert found_BHWC.dtype == jnp.float32
    np.testing.assert_array_equal(found_BHWC[0], preprocess(image_HWC, cfg))


def test_pixels_patches_and_queries_give_the_same_loss(connector):
    size = tiny.CONFIG.vit.image_size
    shape = (3, size, size, 3)
    pixels_BHWC = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    batch = batch_of()
    del batch["queries_BQD"]

    @jax.jit
    def cached(frozen, pixels_BHWC):
        model = connector.model(connector.params, frozen)
        patches_BPE = model.encode_patches(normalise(pixels_BHWC, model.cfg.vit))
        return patches_BPE, model.encode_queries(patches_BPE)

    @jax.jit
    def losses(frozen, images):
        model = connector.model(connector.params, frozen)
        return [answer_loss(model, batch | image)[0] for image in images]

    patches_BPE, queries_BQD = cached(connector.frozen, pixels_BHWC)
    images = (
        {"pixels_BHWC": pixels_BHWC},
        {"patches_BPE": patches_BPE},
        {"queries_BQD": queries_BQD},
    )
    found = losses(connector.frozen, images)
    assert found[0] > 1
    np.testing.assert_allclose(found, found[0], rtol=2e-6)


# A step.


@pytest.fixture(scope="module")
def stepped():
    """A model before and after two steps (the first has learning rate 0)."""
    trainables = Trainables(tiny.model(), TRAINABLE)
    before = {name: np.array(value) for name, value in trainables.params.items()}
    frozen = {p: np.array(v[...]) for p, v in trainables.frozen.items()}
    knobs = config("unused").optim
    optimizer = optim.make_optimizer(knobs)
    state = new_state(trainables.params, optimizer)
    step = make_step(trainables, answer_loss, optimizer, optim.schedule(knobs))
    batch = batch_of()
    del batch["queries_BQD"]
    batch["patches_BPE"] = random_patches(3)
    traced = step.trace(state, trainables.frozen, (batch,))
    for _ in range(2):
        state, metrics = step(state, trainables.frozen, (batch,))
    return SimpleNamespace(
        trainables=trainables,
        before=before,
        frozen=frozen,
        state=state,
        metrics=metrics,
        jaxpr=traced.jaxpr,
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


def test_a_step_says_what_it_did(stepped):
    metrics = {name: np.asarray(value) for name, value in stepped.metrics.items()}
    assert metrics.keys() == {"loss", "grad_norm", "answer_tokens", "finite", "lr"}
    assert metrics["loss"] > 1 and metrics["grad_norm"] > 0 and metrics["finite"]
    assert metrics["answer_tokens"] == 21
    assert metrics["lr"] == pytest.approx(1e-2 / 2)  # the second of two that warm up
    assert int(stepped.state["step"]) == 2 and int(stepped.state["skipped"]) == 0


def test_moments_are_kept_for_the_trainables_alone(stepped):
    sizes = [x.size for x in jax.tree.leaves(stepped.state["opt_state"])]
    trained = sum(value.size for value in stepped.before.values())
    assert sum(size for size in sizes if size > 1) == 2 * trained


def test_frozen_weights_are_arguments_of_the_program_not_constants(stepped):
    values = [v for eqn in stepped.jaxpr.jaxpr.eqns for v in eqn.params.values()]
    consts = [c for v in (stepped.jaxpr, *values) for c in getattr(v, "consts", ())]
    assert all(np.size(const) < 100 for const in consts)


def test_trainables_are_float32_however_the_model_is_stored():
    trainables = Trainables(tiny.model(dtypes=BFLOAT16), TRAINABLE)
    assert {v.dtype for v in trainables.params.values()} == {jnp.dtype("float32")}
    llama = [v for path, v in trainables.frozen.items() if path[0] == "llama"]
    assert {v.dtype for v in llama} == {jnp.dtype("bfloat16")}


def test_micro_batches_have_the_loss_and_gradient_of_one_batch(connector, gradients):
    # Of 7, 1 and 13 answer tokens: a mean of their means would be another.
    examples = [batches.random_turns(i, (n,)) for i, n in enumerate((5, 2, 1, 3, 10))]
    whole = batch_of(examples, num_rows=5)
    parts = [examples[:2], examples[2:3], examples[3:]]
    micro = [batch_of(part, num_rows=2) for part in parts]
    given = iter(whole["queries_BQD"])
    for batch, part in zip(micro, parts):
        batch["queries_BQD"] = np.stack([next(given) for _ in part])
        if len(part) == 1:  # one shape: an image that no row shows
            batch["queries_BQD"] = np.repeat(batch["queries_BQD"], 2, axis=0)
            batch["ok_B"] = np.ones(2, np.float32)
    optimizer = optax.identity()
    step = make_step(connector, answer_loss, optimizer, lambda _: 1.0, accumulate=3)
    state = new_state(jax.tree.map(jnp.array, connector.params), optimizer)
    state, metrics = step(state, connector.frozen, tuple(micro))
    moved = jax.tree.map(
        lambda old, new: np.asarray(old) - np.asarray(new),
        connector.params,
        state["params"],
    )
    found = float(metrics["loss"]), float(metrics["answer_tokens"]), moved
    loss, count, grads = gradients(whole)
    assert count == 21
    # The gradients come out of a difference to weights of their size.
    assert found[:2] == (pytest.approx(loss, rel=1e-6), count)
    for name, gradient in grads.items():
        np.testing.assert_allclose(moved[name], gradient, atol=3e-7)


# Guards.


def small_loss(model, batch):
    """A loss of the projector alone: a small program.

    Its gradient alone is not finite where `root` is 0 and only there.
    """
    image_BQD = model.projector(batch["queries_BQD"])
    root = jnp.sqrt(batch["root"] + 0 * image_BQD.sum())
    return (image_BQD**2).sum() + root, batch["count"]


GOOD = {
    "queries_BQD": queries(1),
    "ok_B": np.ones(1, np.float32),
    "root": np.float32(1),
    "count": np.float32(7),
}
NAN = {"queries_BQD": np.full_like(queries(1), np.nan)}


@pytest.fixture(scope="module")
def guarded(connector):
    knobs = config("unused").optim
    optimizer = optim.make_optimizer(knobs)
    step = make_step(connector, small_loss, optimizer, optim.schedule(knobs))
    start = new_state(connector.params, optimizer)

    def run(*batches):
        state = jax.tree.map(jnp.array, start)
        for batch in batches:
            state, metrics = step(state, connector.frozen, (GOOD | batch,))
        return jax.tree.map(np.asarray, (state, metrics))

    return run


@pytest.mark.parametrize(
    "bad",
    [NAN, {"root": np.float32(0)}, {"count": np.float32(0)}],
    ids=["loss", "gradient", "nothing to learn from"],
)
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(guarded, bad):
    good, _ = guarded({}, {})
    state, metrics = guarded({}, {}, bad)
    assert not metrics["finite"]
    assert math.isfinite(metrics["loss"]) == ("root" in bad)
    for part in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, state[part], good[part])
    assert (state["step"], state["skipped"]) == (3, 1)


def test_the_learning_rate_goes_on_over_a_step_that_is_left_out(guarded):
    _, metrics = guarded({}, {}, NAN)
    _, unbroken = guarded({}, {}, {})
    assert metrics["lr"] == unbroken["lr"] == pytest.approx(1e-2)
    state, metrics = guarded({}, NAN, {})
    assert metrics["finite"] and (state["step"], state["skipped"]) == (3, 1)
    assert metrics["lr"] == unbroken["lr"]
    (adam,) = [part for part in state["opt_state"] if hasattr(part, "mu")]
    assert adam.count == 2


# Number formats and memory: other means, the same values.


@pytest.fixture(scope="module")
def whole():
    """(batch, its loss, tokens and gradients where the Q-Former trains too)."""
    batch = batch_of()
    del batch["queries_BQD"]
    batch["patches_BPE"] = random_patches(3)
    return batch, gradients_of(Trainables(tiny.model(), TRAINABLE))(batch)


def mean_loss(trainables: Trainables, batch: dict):
    """params -> mean loss."""

    def mean(params):
        total, count = answer_loss(trainables.model(params), batch)
        return total / count

    return mean


def test_remat_changes_no_values(whole):
    batch, wanted = whole
    model = tiny.model()
    model.set_remat(True)
    trainables = Trainables(model, TRAINABLE)
    found = gradients_of(trainables)(batch)
    for name in wanted[2]:
        if name.endswith("/k/bias"):  # 0 but for rounding
            wanted[2][name] = found[2][name]
    assert_same(found, wanted)


def test_bfloat16_computes_products_and_keeps_norms_softmax_and_loss_in_float32(whole):
    batch, (wanted, _, wanted_grads) = whole
    trainables = Trainables(tiny.model(dtypes=BFLOAT16), TRAINABLE)
    mean = mean_loss(trainables, batch)

    equations = parity.equations(mean, trainables.params)

    def inputs(name):
        """Number formats that a primitive is given."""
        found = [e for e in equations if e.primitive.name == name]
        return {str(v.aval.dtype) for e in found for v in e.invars}

    assert inputs("dot_general") == {"bfloat16"}
    for name in ("rsqrt", "exp", "log", "cos", "reduce_max"):  # cos: rotary angles
        assert inputs(name) == {"float32"}, name
    loss, grads = jax.jit(jax.value_and_grad(mean))(trainables.params)
    assert {str(g.dtype) for g in grads.values()} == {str(loss.dtype)} == {"float32"}
    # Eight bits a factor.
    assert float(loss) == pytest.approx(wanted, rel=0.02)
    name = "projector/kernel"
    assert 1e-4 < parity.error(grads[name], wanted_grads[name]) < 0.1


# The warm start's loss.


def fake_model(image_BQD, table_VD):
    """Only what word_loss reads: patches are the embeddings themselves."""
    return SimpleNamespace(
        project=lambda patches_BPE: jnp.asarray(image_BQD),
        llama=SimpleNamespace(embed=lambda ids_V: jnp.asarray(table_VD)[ids_V]),
    )


E0, E1, E2, E3 = 2 * np.eye(4, dtype=np.float32)
WORDS_VD = np.stack([E0, -E0, E2, -E2])  # their mean is 0
NAMES_THE_FIRST = {
    "patches_BPE": np.zeros((1, 1, 1)),
    "target_BV": np.array([[1, 0, 0, 0]], np.float32),
    "share_V": np.array([0.2, 0.5, 0.5, 0.5], np.float32),
    "words_V": np.arange(4),
    "ok_B": np.ones(1, np.float32),
}


def loss_of(queries_QD, table_VD=WORDS_VD) -> float:
    image_BQD = np.stack(queries_QD)[None]
    total, count = word_loss(fake_model(image_BQD, table_VD), NAMES_THE_FIRST)
    assert count == 1
    return float(total)


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


def test_a_photo_that_could_not_be_read_names_no_words():
    image_BQD = np.stack([[E3, E0], [E2, E1]])
    two = {name: np.concatenate([NAMES_THE_FIRST[name]] * 2) for name in WITH_BATCH}
    two |= {name: NAMES_THE_FIRST[name] for name in ("share_V", "words_V")}
    two["ok_B"] = np.array([1.0, 0.0], np.float32)
    total, count = word_loss(fake_model(image_BQD, WORDS_VD), two)
    assert count == 1 and float(total) == pytest.approx(loss_of([E3, E0]))


WITH_BATCH = ("patches_BPE", "target_BV")
