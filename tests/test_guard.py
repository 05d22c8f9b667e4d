"""Skipped steps are told, kept for inspection, and end the run when they go on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from minigpt4_jax import guard, sharding
from minigpt4_jax.errors import DataError


def metrics(finite: bool) -> dict:
    loss = 1.5 if finite else np.nan
    return {"finite": jnp.array(finite), "loss": jnp.float32(loss)}


def batches(i: int) -> list[dict]:
    return [{"ids_RT": jnp.full((2, 3), i)}, {"ids_RT": jnp.full((2, 3), 10 * i)}]


def test_the_batches_of_a_skipped_step_are_kept(tmp_path, caplog):
    watched = guard.Guard(tmp_path / "skipped", limit=2)
    for step, finite in enumerate((True, False, True)):
        watched.look(step, metrics(finite), batches(step))
    watched.check()
    (kept,) = (tmp_path / "skipped").iterdir()
    assert kept.name == "step-0000002-of-process-0.npz"
    arrays = np.load(kept)
    assert sorted(arrays) == ["0/ids_RT", "1/ids_RT"]
    np.testing.assert_array_equal(arrays["1/ids_RT"], np.full((2, 3), 10))
    assert "step 2 was skipped" in caplog.text and "step-0000002" in caplog.text


def test_so_many_in_a_row_end_the_run_and_a_good_one_between_does_not(tmp_path):
    watched = guard.Guard(tmp_path, limit=2)
    for step, finite in enumerate((False, True, False, True)):
        watched.look(step, metrics(finite), batches(step))
    watched.look(4, metrics(False), batches(4))
    watched.look(5, metrics(False), batches(5))
    with pytest.raises(DataError, match="2 steps in a row up to step 6 .*peak_lr"):
        watched.check()


def test_only_so_many_batches_are_kept_and_a_full_disk_does_not_stop_it(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(guard, "KEEP", 1)
    watched = guard.Guard(tmp_path, limit=9)
    for step in range(3):
        watched.look(step, metrics(False), batches(step))
    assert len(list(tmp_path.iterdir())) == 1

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(guard.np, "savez", full)
    other = guard.Guard(tmp_path / "other", limit=9)
    other.look(0, metrics(False), batches(0))
    other.check()
    assert "cannot be kept: [Errno 28]" in caplog.text


@pytest.mark.parametrize("axes", [P(("data",)), P()])
def test_replicas_of_a_batch_are_kept_once(tmp_path, axes):
    mesh = sharding.make_mesh(data=4, tensor=2)
    ids_RT = np.arange(24).reshape(8, 3)
    features = jax.device_put(ids_RT.astype(jnp.bfloat16), NamedSharding(mesh, axes))
    batch = {"ids_RT": jax.device_put(ids_RT, NamedSharding(mesh, axes))}
    watched = guard.Guard(tmp_path, limit=9)
    watched.look(0, metrics(False), [batch | {"patches_BPE": features}])
    watched.check()
    (kept,) = tmp_path.iterdir()
    for name in ("0/ids_RT", "0/patches_BPE"):
        np.testing.assert_array_equal(np.load(kept)[name], ids_RT)
