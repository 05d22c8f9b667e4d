"""python -m convert connector: a work directory's trainables as the files that ship.

bfloat16, in files under 16 MB: connector-00001-of-00002.safetensors and so on.
"""

from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags

from minigpt4_jax import checkpoint, locate, storage
from minigpt4_jax.errors import InputError
from minigpt4_jax.models.minigpt4 import DEMO

FILE_BYTES = 15_000_000


def define_flags() -> None:
    """The flags of `convert connector`."""
    flags.DEFINE_string("workdir", None, "Where training saved its trainables.")
    flags.DEFINE_string("out", None, "Folder for the files (assets/demo to ship them).")


def main(argv: list[str]) -> None:
    """Read the flags and write."""
    args = flags.FLAGS
    if argv[1:] or not args.workdir or not args.out:
        raise InputError("convert connector needs --workdir and --out, and no more")
    for path in write(Path(args.workdir), Path(args.out)):
        print(path)


def write(workdir: Path, out: Path) -> list[Path]:
    """Rounds the demo's trainables to bfloat16; older connector files in `out` go."""
    shapes = checkpoint.parameter_shapes(DEMO)
    wanted = {
        k: s for k, s in shapes.items() if k.startswith(("qformer/", "projector/"))
    }
    arrays = {
        name: np.asarray(array, ml_dtypes.bfloat16)
        for name, array in checkpoint.read_arrays(workdir, wanted).items()
    }
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("connector*.safetensors"):
        old.unlink()
    storage.write_shards(out, arrays, "connector", FILE_BYTES)
    return locate.trainable_files(out)
