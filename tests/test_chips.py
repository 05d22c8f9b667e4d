"""Slices of TPU chips: what their names mean, and how fast they exchange."""

from types import SimpleNamespace

import pytest

from minigpt4_jax import chips
from minigpt4_jax.chips import CHIPS, Slice
from minigpt4_jax.errors import ConfigError
from minigpt4_jax.hlo import Collective


def test_a_topology_names_chips_as_a_torus():
    found = chips.parse("v5p:4x4x8")
    assert (found.chip.name, found.shape, found.chips) == ("v5p", (4, 4, 8), 128)
    assert chips.parse("2*v5e:16x16").chips == 512
    assert str(chips.parse("2*v5e:16x16")) == "2*v5e:16x16"


@pytest.mark.parametrize(
    "name, said",
    [
        ("v5p-64", "names like v5p-64 count cores"),
        ("v5f:4x4", "'v5f'.*v5e"),
        ("v5p:4x4", "a torus of 3 axes"),
        ("v5e:4x0", "a torus of 2 axes"),
    ],
)
def test_a_wrong_topology_is_refused_with_a_hint(name, said):
    with pytest.raises(ConfigError, match=said):
        chips.parse(name)


def test_the_table_of_slices_has_shapes_of_their_size():
    for chip in CHIPS.values():
        for count in chips.SHAPES[chip.dims]:
            assert chips.slices(chip, count).chips == count


def grid(*shape: int):
    """Devices of a torus, row by row."""
    places = [()]
    for size in shape:
        places = [(*p, i) for p in places for i in range(size)]
    return [SimpleNamespace(coords=p, slice_index=0) for p in places]


def gather(group, kind="all-gather", size=1600):
    return Collective(kind, (size,), size, (tuple(group),))


def test_rings_need_an_axis_of_their_size_and_cubes_for_three():
    v5e, v5p = CHIPS["v5e"], CHIPS["v5p"]
    assert Slice(v5e, (8, 16)).ring(1) and not Slice(v5e, (8, 16)).ring(0)
    assert Slice(v5p, (4, 4, 8)).ring(2) and not Slice(v5p, (2, 4, 4)).ring(1)


def test_a_gather_takes_its_bytes_over_the_links_of_its_group():
    whole = Slice(CHIPS["v5e"], (16, 16))
    link = whole.chip.link
    devices = grid(16, 16)
    everyone, row = gather(range(256)), gather(range(16))
    assert whole.seconds(everyone, devices) == pytest.approx(
        1600 * 255 / 256 / link / 4
    )
    assert whole.seconds(row, devices) == pytest.approx(1600 * 15 / 16 / link / 2)
    # Without rings a corner has half of the links.
    small = Slice(CHIPS["v5e"], (4, 4))
    assert small.seconds(gather(range(16)), grid(4, 4)) == pytest.approx(
        1600 * 15 / 16 / link / 2
    )
    # Half of a ring is none.
    assert whole.seconds(gather(range(8)), devices) == pytest.approx(
        1600 * 7 / 8 / link
    )


def test_a_sum_crosses_twice_and_a_permutation_one_link():
    on = Slice(CHIPS["v5e"], (16, 16))
    devices, row = grid(16, 16), range(16)
    once = on.seconds(gather(row), devices)
    assert on.seconds(gather(row, "all-reduce"), devices) == pytest.approx(2 * once)
    sent = on.seconds(gather((0, 1), "collective-permute"), devices)
    assert sent == pytest.approx(1600 / on.chip.link)


def test_between_slices_the_network_counts():
    on = Slice(CHIPS["v5e"], (2, 2), count=2)
    devices = grid(2, 2) + grid(2, 2)
    for device in devices[4:]:
        device.slice_index = 1
    across = on.seconds(gather((0, 4)), devices)
    assert across == pytest.approx(1600 / 2 / on.chip.network)
    assert across > 5 * on.seconds(gather((0, 1)), devices)
