import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from minigpt4_jax.checkpoint import parameter_shapes
from minigpt4_jax.errors import ConfigError
from minigpt4_jax.models import llama as llama_lib
from minigpt4_jax.models import qformer as qformer_lib
from minigpt4_jax.models import vit as vit_lib
from minigpt4_jax.models.layers import BRANCHES, Capture, DTypes
from minigpt4_jax.models.minigpt4 import (
    PRESETS,
    MiniGPT4,
    MiniGPT4Config,
    cross_entropy,
    fill_slots,
    preset,
    splice,
    strips,
)
from tests import parity
from tests.parameters import write
from tests.test_llama import TINY as TINY_LLAMA
from tests.test_qformer import TINY as TINY_QFORMER
from tests.test_vit import DINO, EVA

TINY = MiniGPT4Config(
    name="tiny",
    vit=EVA,
    qformer=dataclasses.replace(TINY_QFORMER, encoder_width=EVA.width),
    llama=TINY_LLAMA,
    template="vicuna_v0",
    bos_id=1,
    eos_ids=(2,),
)
# 25 patches make five strips of five.
NO_QFORMER = dataclasses.replace(TINY, qformer=None, patches_per_token=5)
DINO_TIED = dataclasses.replace(
    TINY,
    vit=DINO,
    qformer=dataclasses.replace(TINY_QFORMER, encoder_width=DINO.width, num_queries=3),
    llama=dataclasses.replace(TINY_LLAMA, tie_embeddings=True),
)
BEFORE, AFTER = [1, 17, 5, 40], [33, 8, 21, 9, 60]


def pixels(cfg, batch=2):
    return parity.normal(9, batch, cfg.vit.image_size, cfg.vit.image_size, 3)


def prompt(cfg, batch=2):
    """(ids_BT, slots_BT): text, an image's slots, text."""
    row = BEFORE + [0] * cfg.num_slots + AFTER
    slots = [False] * len(BEFORE) + [True] * cfg.num_slots + [False] * len(AFTER)
    return np.tile(row, (batch, 1)), np.tile(slots, (batch, 1))


@nnx.jit
def encode(model, pixels_BHWC):
    return model.encode_image(pixels_BHWC)


# The whole model


@pytest.mark.parametrize(
    "cfg", [TINY, NO_QFORMER, DINO_TIED], ids=["vicuna", "llama2", "demo"]
)
def test_the_whole_agrees_with_its_torch_parts(cfg):
    ours, theirs = parity.minigpt4(cfg)
    image_BQD = encode(ours, pixels(cfg))
    expected_BQD = theirs.encode_image(pixels(cfg))
    parity.assert_close(image_BQD, expected_BQD)
    logits_BTV = parity.call(ours, *prompt(cfg), image_BQD)
    for i in range(2):
        expected_TV = theirs(BEFORE, expected_BQD[i], AFTER)
        parity.assert_close(logits_BTV[i], expected_TV)


def test_the_projectors_gradient_agrees_with_torch():
    ours, theirs = parity.minigpt4(TINY)
    theirs.llama_proj.requires_grad_(True)
    image_QD = theirs.encode_image(pixels(TINY, batch=1))[0]
    logits_TV = theirs(BEFORE, image_QD, AFTER)
    # The last token before the answer predicts its first, as in the reference's shift.
    start = len(BEFORE) + TINY.num_slots
    loss = torch.nn.functional.cross_entropy(
        logits_TV[start - 1 : -1], torch.tensor(AFTER)
    )
    loss.backward()

    ids_BT, slots_BT = prompt(TINY, batch=1)
    batch = dict(
        ids_RT=ids_BT,
        slots_RT=np.where(slots_BT, slots_BT.cumsum(axis=1) - 1, -1),
        segments_RT=np.full(ids_BT.shape, BRANCHES),
        positions_RT=np.arange(ids_BT.shape[1])[None],
        answer_ids_RA=np.array([AFTER + [0, 0]]),
        answer_from_RA=np.array([[*range(start - 1, ids_BT.shape[1] - 1), 0, 0]]),
        loss_mask_RA=np.array([[1.0] * len(AFTER) + [0.0, 0.0]]),
        example_RA=np.zeros((1, len(AFTER) + 2), int),
        ok_B=np.ones(1),
    )

    def loss_of(model):
        image_BQD = model.encode_image(pixels(TINY, batch=1))
        total, count = model.loss(batch, image_BQD)
        return total / count

    trainable = nnx.All(nnx.Param, nnx.PathContains("projector"))
    differentiate = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, trainable))
    ours_loss, gradients = nnx.jit(differentiate)(ours)
    parity.assert_close(ours_loss[None], loss[None])
    parity.assert_close(
        gradients["projector"]["kernel"][...], theirs.llama_proj.weight.grad.T
    )
    parity.assert_close(
        gradients["projector"]["bias"][...], theirs.llama_proj.bias.grad
    )


def test_only_the_trainable_part_gets_gradients():
    model = MiniGPT4(TINY, rngs=nnx.Rngs(0))

    def loss_of(model):
        image_BQD = model.encode_image(pixels(TINY))
        return model(*prompt(TINY), image_BQD)[:, -1].var()

    names = nnx.Any(nnx.PathContains("projector"), nnx.PathContains("qformer"))
    trainable = nnx.All(nnx.Param, names)
    differentiate = nnx.grad(loss_of, argnums=nnx.DiffState(0, trainable))
    gradients = nnx.jit(differentiate)(model)
    flat = nnx.to_flat_state(gradients)
    assert {path[0] for path, _ in flat} == {"projector", "qformer"}
    for path, gradient in flat:
        # Softmax does not change when every key moves alike.
        if path[-2:] != ("k", "bias"):
            assert np.any(gradient[...] != 0), path


def test_other_rows_and_the_place_in_the_batch_change_nothing():
    ours, _ = parity.minigpt4(TINY)
    together = parity.call(ours, *prompt(TINY, 3), encode(ours, pixels(TINY, 3)))
    for i in range(3):
        image_1QD = encode(ours, pixels(TINY, 3)[i : i + 1])
        alone = parity.call(ours, *prompt(TINY, 1), image_1QD)
        parity.assert_close(alone[0], together[i], 2e-6)


def test_cached_decoding_of_an_image_prompt_equals_full_forward():
    ours, _ = parity.minigpt4(TINY)
    image_BQD = encode(ours, pixels(TINY))
    ids_BT, slots_BT = prompt(TINY)
    expected = parity.call(ours, ids_BT, slots_BT, image_BQD)
    cut = ids_BT.shape[1] - 2
    cache = ours.llama.new_cache(batch=2, places=ids_BT.shape[1] + 3)
    logits, cache = parity.call(
        ours, ids_BT[:, :cut], slots_BT[:, :cut], image_BQD, cache=cache
    )
    parity.assert_close(logits, expected[:, :cut], 2e-6)
    for t in range(cut, ids_BT.shape[1]):
        at_B1 = np.full((2, 1), t)
        logits, cache = parity.call(
            ours, ids_BT[:, t : t + 1], positions_BT=at_B1, cache=cache
        )
        parity.assert_close(logits[:, 0], expected[:, t], 2e-6)


def test_a_caption_beside_others_of_its_image_has_the_logits_it_has_alone():
    ours, _ = parity.minigpt4(TINY)
    image_1QD = encode(ours, pixels(TINY, batch=1))
    shared = [1] + [0] * TINY.num_slots
    captions = [[17, 5, 40], [33, 8, 21, 9], [60]]
    ids, segments, positions = list(shared), [BRANCHES] * 8, list(range(8))
    for branch, caption in enumerate(captions, start=1):
        ids += caption
        segments += [BRANCHES + branch] * len(caption)
        positions += range(8, 8 + len(caption))
    slots_1T = np.zeros((1, len(ids) + 2), bool)
    slots_1T[:, 1:8] = True
    padded = [np.array([row + [0, 0]]) for row in (ids, segments, positions)]
    packed_1TV = parity.call(
        ours,
        padded[0],
        slots_1T,
        image_1QD,
        segments_BT=padded[1],
        positions_BT=padded[2],
    )
    start = len(shared)
    for caption in captions:
        alone_ids = np.array([shared + caption])
        alone_1TV = parity.call(
            ours, alone_ids, slots_1T[:, : alone_ids.shape[1]], image_1QD
        )
        end = start + len(caption)
        parity.assert_close(packed_1TV[:, start:end], alone_1TV[:, 8:], 2e-6)
        parity.assert_close(packed_1TV[:, :8], alone_1TV[:, :8], 2e-6)
        start = end


# Splice and strips


def test_image_embeddings_fill_the_slots_in_order_and_text_stays():
    text_BTD, image_BQD = parity.normal(0, 2, 9, 4), parity.normal(1, 2, 3, 4)
    slots_BT = np.zeros((2, 9), bool)
    slots_BT[0, [1, 2, 3]] = slots_BT[1, [0, 4, 8]] = True
    expected = text_BTD.copy()
    for row in range(2):
        expected[row, slots_BT[row]] = image_BQD[row]
    np.testing.assert_array_equal(splice(text_BTD, image_BQD, slots_BT), expected)


def test_a_row_without_slots_keeps_its_text():
    text_BTD, image_BQD = parity.normal(0, 2, 9, 4), parity.normal(1, 2, 3, 4)
    no_slots = np.zeros((2, 9), bool)
    np.testing.assert_array_equal(splice(text_BTD, image_BQD, no_slots), text_BTD)


def test_a_row_may_hold_the_embeddings_of_any_image_of_the_batch():
    text_RTD, image_BQD = parity.normal(0, 2, 9, 4), parity.normal(1, 3, 2, 4)
    slots_RT = np.full((2, 9), -1)
    slots_RT[0, [1, 2, 6, 7]] = 4, 5, 0, 1  # the images 2 and 0; image 1 is in no row
    expected = text_RTD.copy()
    expected[0, [1, 2]], expected[0, [6, 7]] = image_BQD[2], image_BQD[0]
    np.testing.assert_array_equal(fill_slots(text_RTD, image_BQD, slots_RT), expected)

    def weighted(image_BQD):
        return (fill_slots(text_RTD, image_BQD, slots_RT) * text_RTD).sum()

    gradient_BQD = jax.grad(weighted)(image_BQD)
    np.testing.assert_array_equal(gradient_BQD[2], text_RTD[0, [1, 2]])
    np.testing.assert_array_equal(gradient_BQD[0], text_RTD[0, [6, 7]])
    np.testing.assert_array_equal(gradient_BQD[1], 0)


def test_cross_entropy_is_torchs():
    logits_RAV, ids_RA = (
        9 * parity.normal(0, 2, 3, 11),
        np.array([[0, 10, 4], [7, 7, 1]]),
    )
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits_RAV).reshape(6, 11),
        torch.tensor(ids_RA).reshape(6),
        reduction="none",
    )
    parity.assert_close(cross_entropy(logits_RAV, ids_RA).reshape(6), expected, 1e-6)


def test_values_at_slots_are_ignored():
    model = MiniGPT4(TINY, rngs=nnx.Rngs(0))
    image_BQD = parity.normal(1, 2, TINY.num_slots, TINY.llama.width)
    ids_BT, slots_BT = prompt(TINY)
    other_BT = np.where(slots_BT, 44, ids_BT)
    np.testing.assert_array_equal(
        model.embed_prompt(ids_BT, slots_BT, image_BQD),
        model.embed_prompt(other_BT, slots_BT, image_BQD),
    )


def test_strips_are_one_by_four_and_drop_the_class_token():
    # Patch (y, x) of an 8 x 8 grid holds the two values y and x.
    y_P, x_P = np.divmod(np.arange(64), 8)
    patches_1PE = np.concatenate([[[-1, -1]], np.stack([y_P, x_P], 1)])[None]
    strips_1QE = np.asarray(strips(patches_1PE, 4))
    assert strips_1QE.shape == (1, 16, 8)
    assert strips_1QE[0, 0].tolist() == [0, 0, 0, 1, 0, 2, 0, 3]
    assert strips_1QE[0, 3].tolist() == [1, 4, 1, 5, 1, 6, 1, 7]


# Parts replaced, captured, in other number formats


class Pooled(nnx.Module):
    """A tower that is no ViT: mean colour, one patch."""

    def __init__(self, width, rngs):
        self.linear = nnx.Linear(3, width, rngs=rngs)

    def __call__(self, pixels_BHWC, capture=None):
        return self.linear(pixels_BHWC.mean((1, 2)))[:, None]


def test_another_module_takes_the_place_of_a_tower():
    rngs = nnx.Rngs(0)
    model = MiniGPT4(TINY, rngs=rngs, vit=Pooled(TINY.vit.width, rngs))
    image_BQD = model.encode_image(np.ones((2, 31, 17, 3), np.float32))
    assert image_BQD.shape == (2, TINY.num_slots, TINY.llama.width)
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert {p for p in paths if p[0] == "vit"} == {
        ("vit", "linear", "kernel"),
        ("vit", "linear", "bias"),
    }


def test_one_capture_sees_through_all_towers_under_jit():
    graphdef, state = nnx.split(MiniGPT4(TINY, rngs=nnx.Rngs(0)))

    @jax.jit
    def run(state, pixels_BHWC):
        model, capture = nnx.merge(graphdef, state), Capture(*Capture.NAMES)
        image_BQD = model.encode_image(pixels_BHWC, capture)
        model(*prompt(TINY), image_BQD, capture=capture)
        return capture.values

    values = run(state, pixels(TINY))
    length = prompt(TINY)[0].shape[1]
    assert {name: value.shape for name, value in values.items()} == {
        "vit/hidden": (3, 2, 26, 30),
        "qformer/hidden": (5, 2, 7, 20),
        "qformer/cross_attention": (3, 2, 4, 7, 26),
        "llama/hidden": (3, 2, length, 36),
    }


def test_a_bfloat16_model_is_near_its_float32_self():
    ours, _ = parity.minigpt4(TINY)
    half = MiniGPT4(
        TINY, dtypes=DTypes("bfloat16", "bfloat16", "bfloat16"), rngs=nnx.Rngs(0)
    )
    state = nnx.state(ours, nnx.Param)
    nnx.update(half, jax.tree.map(lambda w: w.astype(jnp.bfloat16), state))
    expected = parity.call(ours, *prompt(TINY), encode(ours, pixels(TINY)))
    found = parity.call(half, *prompt(TINY), encode(half, pixels(TINY)))
    assert found.dtype == jnp.float32
    # Eight bits a factor, some twenty layers deep.
    assert 1e-4 < parity.error(found, expected) < 0.1


# Depth and compile time (benchmarks/compile_time.py measures it)


@pytest.mark.parametrize("kind", ["training", "prefill"])
def test_deeper_towers_are_not_longer_programs(kind):
    def length(layers):
        cfg = dataclasses.replace(
            TINY,
            vit=dataclasses.replace(EVA, num_layers=layers),
            qformer=dataclasses.replace(TINY.qformer, num_layers=layers),
            llama=dataclasses.replace(TINY_LLAMA, num_layers=layers),
        )
        graphdef, state = nnx.split(MiniGPT4(cfg, rngs=nnx.Rngs(0)))

        def forward(state, pixels_BHWC):
            model = nnx.merge(graphdef, state)
            image_BQD = model.encode_image(pixels_BHWC)
            if kind == "training":
                return model(*prompt(cfg), image_BQD).sum()
            cache = model.llama.new_cache(batch=2, places=30)
            return model(*prompt(cfg), image_BQD, cache=cache)

        function = jax.grad(forward) if kind == "training" else forward
        return len(parity.equations(function, state, pixels(cfg)))

    assert length(2) == length(8)


# Presets

COUNTS = {  # the spec's numbers
    ("minigpt4_vicuna_7b", "vit"): 985_894_528,
    ("minigpt4_vicuna_7b", "qformer"): 105_137_664 + 24_576,
    ("minigpt4_vicuna_7b", "ln_vision"): 2_816,
    ("minigpt4_vicuna_7b", "projector"): 3_149_824,
    ("minigpt4_vicuna_7b", "llama"): 6_738_423_808,
    ("minigpt4_vicuna_13b", "projector"): 3_937_280,
    ("minigpt4_vicuna_13b", "llama"): 13_015_874_560,
    ("minigpt4_llama2_7b", "projector"): 23_072_768,
    ("minigpt4_llama2_7b", "llama"): 6_738_415_616,
    ("minigpt4_llama2_7b", "qformer"): 0,
    # DINOv2 ViT-S/14 of 22,056,576 at 518 px: 1,113 positions, the mask token and the
    # final norm fewer. SmolLM2-135M counts its tied embeddings once.
    ("demo", "vit"): 22_056_576 - 1_113 * 384 - 384 - 768,
    ("demo", "llama"): 134_515_008,
}


@pytest.mark.parametrize("name, part", COUNTS)
def test_presets_have_the_published_number_of_parameters(name, part):
    shapes = parameter_shapes(PRESETS[name])
    own = [math.prod(s) for path, s in shapes.items() if path.split("/")[0] == part]
    assert sum(own) == COUNTS[name, part]


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_paths_and_shapes_are_the_committed_ones(name):
    committed = json.loads((write.FOLDER / f"{name}.json").read_text())
    found = {k: list(shape) for k, shape in parameter_shapes(PRESETS[name]).items()}
    assert found == committed, "see tests/parameters/write.py"


def test_preset_tables_name_every_tower():
    assert set(vit_lib.PRESETS) == {"eva_g", "dinov2_s"}
    assert {"blip2"} < set(qformer_lib.PRESETS)
    assert set(llama_lib.PRESETS) == {
        "vicuna_7b",
        "vicuna_13b",
        "llama2_7b_chat",
        "smollm2_135m",
    }
    assert [PRESETS[n].num_slots for n in ("minigpt4_vicuna_7b", "demo")] == [32, 32]
    assert PRESETS["minigpt4_llama2_7b"].num_slots == 64


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    text = json.dumps(PRESETS[name].to_dict())
    assert MiniGPT4Config.from_dict(json.loads(text)) == PRESETS[name]


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'minigpt4_vicuna_7b'"):
        preset("minigpt4_vicuna7b")


def test_unknown_and_absent_keys_of_a_preset_are_named():
    values = PRESETS["demo"].to_dict()
    values["vit"]["pach_size"] = values["vit"].pop("patch_size")
    with pytest.raises(ConfigError, match="pach_size.*patch_size"):
        MiniGPT4Config.from_dict(values)
    del values["vit"]["pach_size"]
    with pytest.raises(ConfigError, match="preset.vit: patch_size absent"):
        MiniGPT4Config.from_dict(values)
