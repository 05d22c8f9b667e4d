"""Torch files that are damaged, hostile or hold more than weights: refused, by name."""

import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from convert import model, parts, rules, sources, torch_files
from minigpt4_jax.errors import CheckpointError
from tests import parity, published

ODD = published.ODD
CHANGED = Path()  # where code of a pickle would leave its mark; one for each test


@pytest.fixture(autouse=True)
def mark(tmp_path_factory, monkeypatch):
    path = tmp_path_factory.mktemp("mark") / "ran"
    monkeypatch.setattr(sys.modules[__name__], "CHANGED", path)


class System:
    """Unpickled, it runs a shell command."""

    def __reduce__(self):
        return os.system, (f"touch '{CHANGED}'",)


class Eval:
    """Unpickled, it evaluates Python."""

    def __reduce__(self):
        return eval, (f"open({str(CHANGED)!r}, 'w').close()",)


class Custom:
    """Unpickled, it runs a method of its own."""

    def __setstate__(self, state):
        CHANGED.touch()

    def __getstate__(self):
        return {"a": 1}


def hostile(kind: type, nested: bool) -> object:
    if not nested:
        return kind()
    return {"model": {"llama_proj.weight": torch.ones(3, 2), "inner": {"x": kind()}}}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "bare"])
@pytest.mark.parametrize("kind", [System, Eval, Custom])
def test_a_pickle_that_wants_to_run_code_is_refused_and_runs_nothing(
    kind, nested, zipped, tmp_path
):
    path = tmp_path / "weights.pth"
    made = hostile(kind, nested)
    torch.save(made, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"nothing in it was run.*GLOBAL"):
        sources.read(path)
    assert not CHANGED.exists()


def test_a_hostile_pickle_would_have_run(tmp_path):
    """Else the tests above would show nothing."""
    torch.save(hostile(System, True), tmp_path / "weights.pth")
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert CHANGED.exists()


def test_a_pickle_that_torch_did_not_write_is_refused_and_runs_nothing(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(pickle.dumps({"a": System()}))
    with pytest.raises(CheckpointError, match=r"weights\.bin"):
        sources.read(path)
    assert not CHANGED.exists()


def saved(path: Path, zipped: bool = True) -> Path:
    state = {"a.weight": torch.ones(40, 30), "b.weight": torch.ones(7, 5)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("left", [0.02, 0.3, 0.6, 0.95, 0.999])
def test_a_truncated_torch_file_is_named(left, zipped, tmp_path):
    path = saved(tmp_path / "weights.pth", zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * left)])
    with pytest.raises(CheckpointError, match=r"weights\.pth .*(damaged|truncated)"):
        sources.read(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_damaged_pickle_never_ends_in_another_error(zipped, tmp_path):
    """Each byte of the names and structure changed in turn."""
    path = saved(tmp_path / "weights.pth", zipped)
    data = path.read_bytes()
    refused = 0
    for at in range(0, 700):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            sources.read(path)
        except CheckpointError as error:
            refused += str(path) in str(error)
    assert refused > 100


def test_an_empty_file_is_named(tmp_path):
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(CheckpointError, match=r"empty; fetch it again"):
            sources.read(tmp_path / name)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """(files, preset) of a tiny model whose sizes are all odd."""
    folder = tmp_path_factory.mktemp("odd")
    theirs = parity.Whole(ODD, seed=4)
    return published.parts(folder, ODD, theirs), published.preset(folder, ODD)


def flipped(path: Path, record: str, out: Path) -> Path:
    """A copy with one bit of a zip record's data changed; sizes stay."""
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith(record))
    data = bytearray(path.read_bytes())
    name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
    data[info.header_offset + 30 + name + extra + info.file_size // 2] ^= 1
    out.write_bytes(data)
    return out


@pytest.mark.parametrize("part,record", [("vit", "data/5"), ("projector", "data/0")])
def test_a_wrong_checksum_is_found_and_nothing_stays(odd, part, record, tmp_path):
    files, preset = odd
    bad = flipped(files[part], record, tmp_path / "bad.pth")
    made = model.prepare(preset, files | {part: bad})
    with pytest.raises(CheckpointError, match=r"bad\.pth: .*checksum .*fetch it again"):
        made.write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


def test_old_files_are_read_without_mapping_up_to_a_size(tmp_path, monkeypatch):
    path = saved(tmp_path / "old.pth", zipped=False)
    assert not zipfile.is_zipfile(path)
    asked = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: asked.append(k) or load(*a, **k))
    assert np.asarray(sources.read(path)["b.weight"]).shape == (7, 5)
    sources.read(saved(tmp_path / "new.pth"))
    assert [k["mmap"] for k in asked] == [False, True]
    assert all(k["weights_only"] for k in asked)
    monkeypatch.setattr(torch_files, "LARGEST_UNMAPPED", path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"old\.pth: .* old format"):
        sources.read(path)
    sources.read(tmp_path / "new.pth")  # a zip file is mapped, whatever its size
    assert len(asked) == 3


@pytest.mark.parametrize("version", ["2.5.1+cu124", "1.13.0", "2.0.0a0"])
def test_an_older_torch_is_refused_before_it_reads(version, tmp_path, monkeypatch):
    path = saved(tmp_path / "weights.pth")
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(CheckpointError, match=r"less safely than 2\.6; `pip install"):
        sources.read(path)


@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_a_state_dict_may_be_wrapped(key, tmp_path):
    state = {"llama_proj.weight": torch.ones(3, 2), "llama_proj.bias": torch.ones(3)}
    torch.save(state if key is None else {key: state}, tmp_path / "weights.pth")
    assert set(sources.read(tmp_path / "weights.pth")) == set(state)


def test_what_stands_beside_the_weights_must_be_known(tmp_path):
    state = {"llama_proj.weight": torch.ones(3, 2), "llama_proj.bias": torch.ones(3)}
    beside = {"optimizer": {"lr": 1.0}, "epoch": 3, "surprise": 1, "ema": {"a": 2}}
    torch.save({"model": state, **beside}, tmp_path / "weights.pth")
    source = sources.read(tmp_path / "weights.pth")
    wanted = {"projector/kernel": (2, 3), "projector/bias": (3,)}
    with pytest.raises(CheckpointError, match="2 problems") as error:
        rules.plan(parts.tables("projector", source), source, wanted)
    assert "beside:surprise" in str(error.value) and "beside:ema" in str(error.value)
    assert "optimizer" not in str(error.value)


@pytest.mark.parametrize("value", [[1, 2], {"epoch": 3}, {"model": {"a": 1}}])
def test_a_torch_file_without_weights_says_so(value, tmp_path):
    torch.save(value, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"want a state dict|no tensors in it"):
        sources.read(tmp_path / "weights.pth")


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    """Nested dicts are joined by dots, and numbers become text."""
    for state in (
        {"a": {"b": torch.ones(2)}, "a.b": torch.zeros(2)},
        {1: torch.ones(2), "1": torch.zeros(2)},
        {"a": torch.ones(2), "x": 3, "beside:x": torch.zeros(2)},
    ):
        torch.save(state, tmp_path / "weights.pth")
        with pytest.raises(CheckpointError, match=r"weights\.pth: .* is in it twice"):
            sources.read(tmp_path / "weights.pth")


def test_a_compressed_zip_file_is_refused(tmp_path):
    """torch maps what is packed in it as weights, and says nothing."""
    path, packed = saved(tmp_path / "weights.pth"), tmp_path / "packed.pth"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w") as new:
        for info in old.infolist():
            first = info.filename.endswith("data/0")
            kind = zipfile.ZIP_DEFLATED if first else zipfile.ZIP_STORED
            new.writestr(info.filename, old.read(info), compress_type=kind)
        new.writestr("weights/data/9", bytes(10_000))  # so that the mapping is long
    mapped = torch.load(packed, weights_only=True, mmap=True)["a.weight"]
    assert not torch.equal(mapped, torch.ones(40, 30))
    with pytest.raises(CheckpointError, match=r"packed\.pth: a compressed zip file"):
        sources.read(packed)


def test_tensors_without_values_are_named(tmp_path):
    torch.save({"a": torch.empty(3, device="meta")}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="a is torch.float32 .without values"):
        sources.read(tmp_path / "weights.pth")


def test_a_second_state_dict_beside_the_first_must_be_known(tmp_path):
    state = {"llama_proj.weight": torch.ones(3, 2), "llama_proj.bias": torch.ones(3)}
    torch.save({"model": state, "state_dict": state}, tmp_path / "weights.pth")
    source = sources.read(tmp_path / "weights.pth")
    wanted = {"projector/kernel": (2, 3), "projector/bias": (3,)}
    with pytest.raises(CheckpointError, match="beside:state_dict"):
        rules.plan(parts.tables("projector", source), source, wanted)


def test_sparse_and_quantised_tensors_are_named(tmp_path):
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "sparse.pth")
    torch.save({"a": torch.ones(3, dtype=torch.complex64)}, tmp_path / "complex.pth")
    for name in ("sparse", "complex"):
        with pytest.raises(CheckpointError, match=rf"{name}\.pth: a is .*dense floats"):
            sources.read(tmp_path / f"{name}.pth")
