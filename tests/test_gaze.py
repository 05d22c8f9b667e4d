"""Where the queries look."""

import dataclasses
import threading

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from minigpt4_jax.data.images import preprocess
from minigpt4_jax.errors import InputError
from minigpt4_jax.gaze import DIM, Gaze, light
from minigpt4_jax.models.layers import Capture
from minigpt4_jax.models.minigpt4 import MiniGPT4


@pytest.fixture(scope="module")
def gaze():
    return Gaze(tiny.model())


def test_maps_are_those_of_the_pass_that_encodes_the_image(gaze):
    pixels_BHWC = preprocess(tiny.image(), tiny.CONFIG.vit)[None]

    @jax.jit
    def encode(pixels_BHWC):
        capture = Capture("qformer/cross_attention")
        tiny.model().encode_image(pixels_BHWC, capture)
        return capture.values["qformer/cross_attention"]

    found_LBNQP = gaze.maps(pixels_BHWC)
    assert found_LBNQP.shape == (2, 1, 3, 3, 10)
    np.testing.assert_allclose(found_LBNQP, encode(pixels_BHWC), atol=1e-6)


def test_a_layers_map_and_the_class_tokens_share_make_one(gaze):
    grid_LYX, class_share_L = gaze.layers(tiny.image(1))
    assert grid_LYX.shape == (2, 3, 3)
    np.testing.assert_allclose(grid_LYX.sum((1, 2)) + class_share_L, 1, rtol=1e-5)


def test_the_picture_is_bright_where_the_grid_is_high_rows_first():
    grid_YX = np.zeros((4, 4), np.float32)
    grid_YX[0, 3] = 1  # above, on the right
    white_HWC = np.full((40, 80, 3), 255, np.uint8)
    lit_HWC = light(white_HWC, grid_YX + 1e-6, (80, 40))
    assert lit_HWC.shape == (40, 80, 3)
    assert lit_HWC[4, 72].min() > 240
    dark = round(255 * DIM)
    assert abs(int(lit_HWC[35, 8, 0]) - dark) < 3 and lit_HWC[35, 72, 0] < dark + 3


def test_a_picture_keeps_the_photos_shape(gaze):
    assert gaze.picture(tiny.image(), long_side=90).shape == (54, 90, 3)
    thin_HWC = np.zeros((1000, 1, 3), np.uint8)
    assert gaze.picture(thin_HWC, long_side=90).shape == (90, 1, 3)


def test_several_threads_see_their_own_photo(gaze):
    found = {}

    def look(seed):
        found[seed] = gaze.picture(tiny.image(seed))

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for seed in range(4):
        np.testing.assert_array_equal(found[seed], gaze.picture(tiny.image(seed)))


def test_a_model_without_queries_is_refused_in_words():
    cfg = dataclasses.replace(
        tiny.CONFIG, name="strips", qformer=None, patches_per_token=3
    )
    model = nnx.eval_shape(lambda: MiniGPT4(cfg, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match="'strips' has no queries"):
        Gaze(model)
