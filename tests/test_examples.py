import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from examples import attention_maps, replace_tower
from minigpt4_jax.models.minigpt4 import MiniGPT4
from tests.test_minigpt4 import TINY, prompt


class Loaded:
    """What the example needs of a Generator."""

    def __init__(self):
        self.model = MiniGPT4(TINY, rngs=nnx.Rngs(0))

    @classmethod
    def load(cls):
        return cls()


def test_attention_maps_are_drawn_beside_the_photo(tmp_path, monkeypatch, capsys):
    photo, out = tmp_path / "photo.png", tmp_path / "maps.png"
    Image.new("RGB", (31, 17), "teal").save(photo)
    monkeypatch.setattr(attention_maps, "Generator", Loaded)
    attention_maps.main([str(photo), str(out)])
    # Three of the five layers look at the image.
    assert Image.open(out).size == (4 * 224, 224)
    assert capsys.readouterr().out.count("on the class token") == 3


@pytest.mark.slow
def test_a_convolutional_tower_is_seen_by_the_decoder_and_trains():
    model = replace_tower.build(TINY, rngs=nnx.Rngs(0))

    def loss_of(model):
        image_BQD = model.encode_image(np.ones((2, 64, 64, 3), np.float32))
        return model(*prompt(TINY), image_BQD)[:, -1].var()

    gradients = nnx.jit(nnx.grad(loss_of))(model)["vit"]
    assert all(np.any(g != 0) for g in jax.tree.leaves(gradients))


@pytest.mark.slow
def test_replace_tower_prints_the_parts(capsys):
    replace_tower.main()
    assert "one image becomes 32 embeddings of 576" in capsys.readouterr().out
