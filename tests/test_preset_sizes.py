"""Presets of sizes that cannot be built are refused, with the numbers."""

import pytest

from minigpt4_jax.errors import ConfigError
from minigpt4_jax.models.minigpt4 import MiniGPT4Config
from tests import tiny


def test_the_sizes_of_each_preset_and_of_odd_models_pass():
    assert MiniGPT4Config.from_dict(tiny.CONFIG.to_dict()) == tiny.CONFIG


IMPOSSIBLE = {
    "vit: num_heads=7 does not divide width=20": dict(vit=dict(num_heads=7)),
    "vit: image_size=3 is smaller .* patch_size=4": dict(vit=dict(image_size=3)),
    "vit.num_layers: got 0, want a whole number": dict(vit=dict(num_layers=0)),
    "vit.width: got '20', want a whole number": dict(vit=dict(width="20")),
    "qformer: num_heads=4 does not divide width=18": dict(qformer=dict(num_heads=4)),
    "encoder_width=21 is not vit.width=20": dict(qformer=dict(encoder_width=21)),
    "llama: num_kv_heads=3 does not divide num_heads=4": dict(
        llama=dict(num_kv_heads=3)
    ),
    "llama: head_size=9 is odd": dict(llama=dict(head_size=9)),
    "patches_per_token=4 do not divide the 9 patches": dict(qformer=None),
}


@pytest.mark.parametrize("sentence", IMPOSSIBLE)
def test_sizes_that_cannot_be_are_refused_with_their_numbers(sentence):
    values = tiny.CONFIG.to_dict()
    for part, change in IMPOSSIBLE[sentence].items():
        values[part] = change and {**values[part], **change}
    with pytest.raises(ConfigError, match=sentence):
        MiniGPT4Config.from_dict(values)
