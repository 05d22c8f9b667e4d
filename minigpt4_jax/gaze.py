"""Where the Q-Former's queries look in a photo: an image -> heat maps, and a picture.

gaze = Gaze(Generator.load("demo").model)
picture_HWC = gaze.picture("photo.jpg")
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from PIL import Image

from minigpt4_jax.data.images import ImageSource, preprocess, read_image
from minigpt4_jax.errors import InputError
from minigpt4_jax.models.layers import Capture
from minigpt4_jax.models.minigpt4 import MiniGPT4

MAPS = "qformer/cross_attention"
DIM = 0.2  # what is left of the light where no query looks
# The brightest patches of a map. A ViT's outliers, which hold no part of the photo, would
# else leave the rest dark.
BRIGHT = 97  # percent of patches below full light


class Gaze:
    """The cross-attention of one model; compiled with the first photo, for any thread.

    Args:
        model: one without a Q-Former (MiniGPT-4 for Llama-2) raises InputError.
    """

    def __init__(self, model: MiniGPT4):
        if model.qformer is None:
            raise InputError(
                f"the model {model.cfg.name!r} has no queries: its image goes to the "
                "decoder in strips of patches; want a model with a Q-Former"
            )
        self.cfg = model.cfg
        seeing = (
            model.vit,
            model.ln_vision,
            model.qformer,
        )  # the decoder is not needed
        graphdef, self._weights = nnx.split(seeing)
        self._look = _program(graphdef)

    def maps(self, pixels_BHWC) -> np.ndarray:
        """Probabilities maps_LBNQP; L counts the layers that look at the image."""
        return np.asarray(self._look(self._weights, pixels_BHWC), np.float32)

    def layers(self, image: ImageSource) -> tuple[np.ndarray, np.ndarray]:
        """Mean over heads and queries: (grid_LYX, class_share_L), each layer's sum is 1.

        class_share_L: what is spent on the class token, which lies nowhere in the photo.
        """
        pixels_BHWC = preprocess(read_image(image), self.cfg.vit)[None]
        mean_LP = self.maps(pixels_BHWC)[:, 0].mean((1, 2))
        side = round((mean_LP.shape[1] - 1) ** 0.5)
        return mean_LP[:, 1:].reshape(-1, side, side), mean_LP[:, 0]

    def picture(self, image: ImageSource, long_side: int = 512) -> np.ndarray:
        """The photo, uint8 [H W C], lit where the queries look, mean over the layers."""
        image_HWC = read_image(image)
        grid_LYX, _ = self.layers(image_HWC)
        return light(image_HWC, grid_LYX.mean(0), _fitted(image_HWC, long_side))


@functools.lru_cache(maxsize=8)
def _program(graphdef: nnx.GraphDef) -> Callable:
    """(weights, pixels_BHWC) -> maps_LBNQP, for all models of this structure."""

    @jax.jit
    def look(weights, pixels_BHWC):
        vit, ln_vision, qformer = nnx.merge(graphdef, weights)
        capture = Capture(MAPS)
        qformer(ln_vision(vit(pixels_BHWC)), capture)
        return capture.values[MAPS]

    return look


def light(image_HWC, grid_YX, size: tuple[int, int]) -> np.ndarray:
    """The photo resized to (width, height), darkened where the grid is low."""
    photo_HWC = np.asarray(Image.fromarray(image_HWC).resize(size))
    share = Image.fromarray(np.float32(grid_YX / np.percentile(grid_YX, BRIGHT)))
    light_HW = np.asarray(share.resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    lit_HWC = photo_HWC * (DIM + (1 - DIM) * light_HW)[..., None]
    return lit_HWC.astype(np.uint8)


def _fitted(image_HWC, long_side: int) -> tuple[int, int]:
    """(width, height) of the photo when its longer side is `long_side`."""
    height, width = image_HWC.shape[:2]
    scale = long_side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))
