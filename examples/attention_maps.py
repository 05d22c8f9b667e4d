"""Where the Q-Former's queries look in a photo: one heat map for each layer.

    python -m examples.attention_maps photo.jpg maps.png [checkpoint]

`gaze.py` keeps the maps with a `Capture`, which keeps any intermediate value that it
names, also out of stacked blocks, and nothing where there is none.
"""

import sys

import numpy as np
from PIL import Image

from minigpt4_jax import Generator
from minigpt4_jax.data.images import read_image
from minigpt4_jax.gaze import Gaze, light

SIZE = (224, 224)


def main(argv: list[str]) -> None:
    photo, out, *checkpoint = argv
    image_HWC = read_image(photo)
    grid_LYX, class_share_L = Gaze(Generator.load(*checkpoint).model).layers(image_HWC)
    for layer, share in enumerate(class_share_L):
        print(f"cross-attention {layer}: {share:.0%} on the class token")
    seen_HWC = np.asarray(Image.fromarray(image_HWC).resize(SIZE))
    lit = [light(image_HWC, grid_YX, SIZE) for grid_YX in grid_LYX]
    Image.fromarray(np.concatenate([seen_HWC, *lit], axis=1)).save(out)


if __name__ == "__main__":
    main(sys.argv[1:])
