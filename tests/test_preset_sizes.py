"""Presets of sizes that cannot be built are refused, with the numbers."""

import math

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
    "vit.eps: got '1e-6', want a number": dict(vit=dict(eps="1e-6")),
    "vit.eps: got inf, want a number": dict(vit=dict(eps=math.inf)),
    "llama.rope_theta: got -1, want a number above 0": dict(llama=dict(rope_theta=-1)),
    "qformer.eps: got True, want a number": dict(qformer=dict(eps=True)),
    "vit.k_bias: got 'no', want true or false": dict(vit=dict(k_bias="no")),
    "vit.resize: got None, want a string": dict(vit=dict(resize=None)),
    r"vit.mean: got \(0.5,\), want a list of 3, each a number": dict(
        vit=dict(mean=[0.5])
    ),
    "vit.mean: got 0.5, want a list of 3": dict(vit=dict(mean=0.5)),
    r"vit.mean: got \(0, 0, '0'\), want a list of 3": dict(vit=dict(mean=[0, 0, "0"])),
    r"vit: std=\(1, 0, 1\); want numbers above 0": dict(vit=dict(std=[1, 0, 1])),
    "preset.vit: got None, want an object": dict(vit=None),
    "preset.llama: got 7, want an object": dict(llama=7),
    "preset.qformer: got False, want an object": dict(qformer=False),
    "preset.eos_ids: got 2, want a list, each a whole number": dict(eos_ids=2),
    "preset.bos_id: got None, want a whole number": dict(bos_id=None),
    "preset.patches_per_token: got '4', want": dict(patches_per_token="4"),
    r"eos_ids=\(\); want at least one end": dict(eos_ids=[]),
    r"eos_ids=\(265,\); want .* ids below 265": dict(eos_ids=[tiny.VOCABULARY]),
}


@pytest.mark.parametrize("sentence", IMPOSSIBLE)
def test_sizes_that_cannot_be_are_refused_with_their_numbers(sentence):
    values = tiny.CONFIG.to_dict()
    for part, change in IMPOSSIBLE[sentence].items():
        values[part] = values[part] | change if isinstance(change, dict) else change
    with pytest.raises(ConfigError, match=sentence):
        MiniGPT4Config.from_dict(values)
