"""Where the Q-Former's queries look in a photo: one heat map for each layer.

    python -m examples.attention_maps photo.jpg maps.png [checkpoint]

A forward pass keeps any intermediate value that a `Capture` names, also out of stacked
blocks, and nothing when there is none.
"""

import sys

import jax
import numpy as np
from PIL import Image

from minigpt4_jax import Capture, Generator, MiniGPT4
from minigpt4_jax.data.images import preprocess, read_image


def main(argv: list[str]) -> None:
    photo, out, *checkpoint = argv
    model = Generator.load(*checkpoint).model
    image_HWC = read_image(photo)
    pixels_BHWC = preprocess(image_HWC, model.cfg.vit)[None]
    grid_LYX, class_share_L = layer_maps(cross_attention(model, pixels_BHWC))
    for layer, share in enumerate(class_share_L):
        print(f"cross-attention {layer}: {share:.0%} on the class token")
    save(image_HWC, grid_LYX, out)


def cross_attention(model: MiniGPT4, pixels_BHWC):
    """Probabilities maps_LBNQP; L counts the layers that look at the image."""

    @jax.jit
    def run(pixels_BHWC):
        capture = Capture("qformer/cross_attention")
        model.encode_image(pixels_BHWC, capture)
        return capture.values["qformer/cross_attention"]

    return np.asarray(run(pixels_BHWC))


def layer_maps(maps_LBNQP):
    """The first image's maps, mean over heads and queries: (grid_LYX, class_share_L)."""
    mean_LP = maps_LBNQP[:, 0].mean((1, 2))
    side = round((mean_LP.shape[1] - 1) ** 0.5)
    return mean_LP[:, 1:].reshape(-1, side, side), mean_LP[:, 0]


def save(image_HWC, grid_LYX, out: str, size: int = 224) -> None:
    """The photo, then each layer's map over it: brighter is looked at more."""
    photo = Image.fromarray(image_HWC).resize((size, size))
    strip = Image.new("RGB", (size * (1 + len(grid_LYX)), size))
    strip.paste(photo, (0, 0))
    for layer, grid_YX in enumerate(grid_LYX):
        share = Image.fromarray(np.float32(grid_YX / grid_YX.max()))
        light_HW = np.asarray(share.resize((size, size), Image.Resampling.BICUBIC))
        lit_HWC = np.asarray(photo) * np.clip(0.15 + 0.85 * light_HW, 0, 1)[..., None]
        strip.paste(Image.fromarray(lit_HWC.astype(np.uint8)), (size * (1 + layer), 0))
    strip.save(out)


if __name__ == "__main__":
    main(sys.argv[1:])
