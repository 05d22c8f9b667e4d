"""TPU chips and what connects them: memory, clock, bandwidths, published by Google.

Sizes of a slice are of its torus, as in `v5p:4x4x4`: chips, not cores.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies

from minigpt4_jax.errors import ConfigError, unknown
from minigpt4_jax.flops import PEAKS
from minigpt4_jax.hlo import Collective

GIB = 1 << 30
NOWHERE = {  # what libtpu would ask a cloud for, and complain of without an answer
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_HOST_BOUNDS": "1,1,1",
    "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is opened: plans may run side by side
}


@dataclass(frozen=True)
class Chip:
    """One generation of chips.

    kind: `device_kind` of its JAX devices, the key of flops.PEAKS.
    memory: bytes that a program may use, as the compiler says when it runs out.
    hertz: at which its peak is reached with the units it has.
    link: bytes a second of one link in one direction (jax-ml.github.io/scaling-book,
        as `network`, the share of one chip in the network between slices).
    hbm: bytes a second of its memory.
    dims: of the torus. wrap: sizes of an axis that are multiples of it are rings.
    options: of jax.experimental.topologies.
    """

    name: str
    kind: str
    memory: int
    hertz: float
    link: float
    network: float
    hbm: float
    dims: int
    wrap: int
    options: tuple[tuple[str, str], ...] = ()

    @property
    def peak(self) -> float:
        """FLOP/s in bfloat16."""
        return PEAKS[self.kind]


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            *("v4", "TPU v4", int(30.75 * GIB), 1.05e9, 45e9, 6.25e9, 1228e9),
            *(3, 4),
            # Else a device would be one of a chip's two cores.
            options=(("chip_config_name", "megacore"),),
        ),
        Chip(
            *("v5e", "TPU v5 lite", int(15.75 * GIB), 1.5e9, 45e9, 3.125e9, 819e9),
            *(2, 16),
        ),
        Chip(
            *("v5p", "TPU v5", int(95.74 * GIB), 1.75e9, 90e9, 6.25e9, 2765e9),
            *(3, 4),
        ),
        Chip(
            *("v6e", "TPU v6 lite", int(31.25 * GIB), 1.75e9, 90e9, 12.5e9, 1640e9),
            *(2, 16),
        ),
    )
}


@dataclass(frozen=True)
class Slice:
    """A torus of chips, or several of them over a slower network."""

    chip: Chip
    shape: tuple[int, ...]
    count: int = 1

    def __str__(self) -> str:
        times = f"{self.count}*" if self.count > 1 else ""
        return f"{times}{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.count

    def ring(self, axis: int) -> bool:
        """Whether the ends of an axis are joined."""
        if self.chip.dims == 3:  # built of cubes, whose faces are switched
            return all(size % self.chip.wrap == 0 for size in self.shape)
        return self.shape[axis] % self.chip.wrap == 0

    def devices(self) -> list[Any]:
        """JAX devices to compile for; no TPU has to be there, but libtpu.

        Raises ConfigError without it, or for a shape that does not exist.
        """
        for name, value in NOWHERE.items():
            os.environ.setdefault(name, value)
        shape = "x".join(map(str, self.shape))
        options: dict[str, Any] = dict(self.chip.options)
        if self.count > 1:
            options["num_slices"] = self.count
        try:
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{self.chip.name}:{shape}", **options
            )
        except Exception as error:  # of many types, as its plugins have them
            reason = str(error).splitlines()[0][:200]
            raise ConfigError(
                f"no topology {self}: {reason}; is libtpu installed "
                "(pip install -e '.[tpu]')? Shapes are as in v5e:4x4 or v5p:4x4x4"
            ) from error
        return list(found.devices)

    def seconds(self, collective: Collective, devices: Sequence[Any]) -> float:
        """Time of a collective by itself, from the bandwidth of the links it can use.

        Args:
            devices: of the program, in the order of its ids.
        """
        group = [devices[i] for i in collective.groups[0]]
        n = len(group)
        slices = {getattr(device, "slice_index", 0) for device in group}
        if len(slices) > 1:
            rate = self.chip.network * n / len(slices)
        else:
            rate = self.links([device.coords for device in group])
        if collective.kind == "collective-permute":
            return collective.bytes / self.chip.link
        # Each byte crosses a ring once; to be reduced and given back, twice.
        times = {"all-reduce": 2.0, "all-to-all": 0.25}.get(collective.kind, 1.0)
        return times * collective.bytes * (n - 1) / n / rate

    def links(self, coords: Sequence[Sequence[int]]) -> float:
        """Bytes a second into the chip of a group that has the fewest links."""
        rate = 0.0
        for axis in range(self.chip.dims):
            size = len({c[axis] for c in coords})
            if size > 1:
                whole = size == self.shape[axis] and self.ring(axis) and size > 2
                rate += self.chip.link * (2 if whole else 1)
        return rate or math.inf


def parse(topology: str) -> Slice:
    """ "v5e:16x16", "v5p:4x4x4", or several slices "2*v5e:16x16".

    Raises ConfigError; also for names like v5p-64, which count cores.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(v\d\w*):(\d+(?:x\d+)*)", topology)
    if not found:
        raise ConfigError(
            f"topology {topology!r}: want chips as a torus, like v5e:16x16 or v5p:4x4x4 "
            "(names like v5p-64 count cores; 2*v5e:16x16 are two slices)"
        )
    count, name, sizes = found.groups()
    if name not in CHIPS:
        raise ConfigError(unknown("chip", name, CHIPS))
    shape = tuple(int(size) for size in sizes.split("x"))
    chip = CHIPS[name]
    if len(shape) != chip.dims or 0 in shape:
        raise ConfigError(
            f"topology {topology!r}: {name} has a torus of {chip.dims} axes"
        )
    return Slice(chip, shape, int(count or 1))


def slices(chip: Chip, chips: int) -> Slice:
    """The slice of so many chips that is nearest to a cube, or to a square."""
    return Slice(chip, SHAPES[chip.dims][chips])


SHAPES = {
    2: {
        4: (2, 2),
        8: (2, 4),
        16: (4, 4),
        32: (4, 8),
        64: (8, 8),
        128: (8, 16),
        256: (16, 16),
    },
    3: {
        4: (2, 2, 1),
        8: (2, 2, 2),
        16: (2, 2, 4),
        32: (2, 4, 4),
        64: (4, 4, 4),
        128: (4, 4, 8),
        256: (4, 8, 8),
    },
}
