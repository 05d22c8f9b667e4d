"""docs/slices.md is complete, and what the script prints."""

from pathlib import Path

import pytest

from benchmarks import plan_table
from minigpt4_jax import chips
from minigpt4_jax.errors import ConfigError

PAGE = Path(__file__).parents[1] / "docs" / "slices.md"
SIZES = (4, 8, 16, 32, 64, 128, 256)


@pytest.fixture(scope="module")
def rows():
    known = plan_table.read()
    return list(plan_table.table(["7b", "13b"], list(chips.CHIPS), SIZES, known))


def test_the_page_in_the_docs_is_what_the_script_prints(rows):
    printed = "\n".join(plan_table.page(rows, plan_table.read())) + "\n"
    assert PAGE.read_text() == printed, (
        "python -m benchmarks.plan_table > docs/slices.md"
    )


def test_every_slice_has_a_row_of_each_model_and_no_more_than_two(rows):
    found: dict = {}
    for row in rows:
        found.setdefault((row.stage, row.model, row.on), []).append(row)
    stages = [(1, size) for size in SIZES] + [(2, 4)]
    for stage, size in stages:
        for chip in chips.CHIPS.values():
            for model in ("7b", "13b"):
                some = found.pop((stage, model, chips.slices(chip, size)))
                assert 1 <= len(some) <= 2
                own = plan_table.STAGES[stage].get_config(model).batch_size
                batches = [row.found.batch for row in some]
                assert own in batches or not plan_table.best(
                    stage, model, some[0].on, own
                )
                assert len(set(batches)) == len(batches)
    assert not found


def test_the_second_row_is_the_smallest_batch_that_passes_or_comes_near(rows):
    for row in rows:
        own = plan_table.STAGES[row.stage].get_config(row.model).batch_size
        if row.found.batch == own or row.on.chips > 16:
            continue
        smaller = [
            found.found.mfu
            for each in plan_table.EACH
            if (batch := each * row.on.chips) < row.found.batch
            and (found := plan_table.best(row.stage, row.model, row.on, batch))
        ]
        assert max(smaller, default=0) < min(row.found.mfu, plan_table.HALF)


def test_what_was_compiled_stands_beside_its_row_only():
    (row,) = [
        row
        for row in plan_table.table(["13b"], ["v5e"], [8])
        if row.stage == 1 and row.found.batch == 256
    ]
    entry = plan_table.Compiled(*row.key, 2 * row.found.seconds, 2**30, "c0ffee", "")
    shown = plan_table.line(row, entry).split(" | ")
    assert float(shown[-1].rstrip(" |")) == pytest.approx(50 * row.found.mfu, abs=0.06)
    assert plan_table.line(row, None).endswith("|  |  |")
    none = plan_table.Compiled(*row.key, 0.0, 0, "c0ffee", "")
    assert "no room" in plan_table.line(row, none)


def test_a_split_that_was_compiled_comes_before_one_that_is_hardly_better():
    on = chips.parse("v5e:2x4")
    free = plan_table.best(1, "13b", on, 256)
    keys = {entry.key for entry in plan_table.read()}
    assert free.key not in keys
    kept = plan_table.best(1, "13b", on, 256, keys)
    assert kept.key in keys and kept.found.seconds < 1.05 * free.found.seconds
    worse = (1, "13b", "v5e:2x4", 256, (1, 2, 4), "none")
    assert plan_table.best(1, "13b", on, 256, {worse}).key == free.key


def test_a_fit_finds_the_constants_that_made_the_times():
    wanted = plan_table.Constants(touched=25.0, exposed=0.2, waits2=2.0)
    made = [
        plan_table.dataclasses.replace(
            entry, seconds=plan_table.again(entry, wanted).seconds
        )
        for entry in plan_table.read()
        if entry.seconds
    ]
    found = plan_table.fit(made)
    assert found.touched == pytest.approx(25, rel=0.02)
    assert found.exposed == pytest.approx(0.2, abs=0.03)
    assert found.waits2 == pytest.approx(2, rel=0.05)


def test_rows_that_were_never_compiled_are_and_what_is_found_is_kept(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(plan_table, "COMPILED", tmp_path / "compiled.json")
    monkeypatch.setattr(plan_table, "commit", lambda: "c0ffee")
    monkeypatch.setattr(plan_table, "versions", lambda: "jax 1")
    rows = [r for r in plan_table.table(["13b"], ["v5e"], [4, 8]) if r.stage == 1]
    asked = []

    def compiled_step(cfg, preset, on, mesh, lengths):
        asked.append((str(on), cfg.batch_size, cfg.remat, tuple(mesh.values())))
        if len(asked) == 2:
            raise ConfigError("does not fit")
        return rows[0].found

    monkeypatch.setattr(plan_table.plan, "compiled_step", compiled_step)
    known = [plan_table.Compiled(*rows[0].key, 1.0, 2**30, "c0ffee", "jax 1")]
    plan_table.add(rows, known, 2)
    assert asked == [
        (str(r.on), r.found.batch, r.remat, tuple(r.found.mesh.values()))
        for r in rows[1:3]
    ]
    kept = plan_table.read()
    assert [entry.key for entry in kept] == [row.key for row in rows[:3]]
    assert kept[1].seconds == round(rows[0].found.seconds, 4) and kept[2].seconds == 0
    assert "no room" in plan_table.beside(kept[2])
