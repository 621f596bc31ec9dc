"""Every object of checkpoints of every mode, and every type of values, as zarr-python, tensorstore and we read them."""

from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from moetrain.checkpoint.modes import MODES
from moetrain.store import encode as module
from moetrain.store.encode import STORED_AS, encode, stored_dtype
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import Job


def of_tensorstore(folder: Path) -> np.ndarray:
    """The values as tensorstore reads them. It finds an array by its zarr.json alone."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    return np.asarray(tensorstore.open(spec, read=True, open=True).result().read().result())


def assert_all_read_the_same(folder: CheckpointFolder, name: str, wanted: np.ndarray | None = None) -> None:
    reader = folder.open(name)
    ours = reader.read(0, reader.size)
    path = folder.object_folder(name)
    for theirs in (zarr.open_array(path, mode="r")[:], of_tensorstore(path)):
        assert isinstance(theirs, np.ndarray)
        assert (theirs.dtype, theirs.shape) == (ours.dtype, ours.shape)
        assert theirs.tobytes() == ours.tobytes()  # bit by bit: NaN is equal to itself
    assert wanted is None or ours.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("mode", MODES)
def test_every_object_of_every_mode(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(module, "CHUNK_BYTES", 64)
    job = Job(tmp_path, 2, 2, mode=mode, experts_per_save=1)
    for version in (1, 2, 3):
        job.save(version)
    folder = CheckpointFolder(tmp_path, Io())
    points = [point for point in folder.history() if isinstance(point, Manifest)]
    names = {name for point in points for name in point.objects}
    assert len(points) == 3
    for name in names:
        assert_all_read_the_same(folder, name)
    tables = [zarr.open_array(folder.object_folder(name), mode="r").attrs["tensors"] for name in names]
    assert all(isinstance(table, list) and table for table in tables)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", *STORED_AS])
@pytest.mark.parametrize("size", [0, 1, 16, 1003])
def test_every_type_of_values(tmp_path, monkeypatch, dtype, size):
    monkeypatch.setattr(module, "CHUNK_BYTES", 256)
    stored = stored_dtype(dtype)
    values = np.frombuffer(np.random.default_rng(size).bytes(size * stored.itemsize), stored)
    folder = CheckpointFolder(tmp_path, Io())
    share = folder.new_share(folder.claim(0.0), 0)
    folder.put_share(share, [(f"dense.{stored.name}", encode(values, {"step": 3}))])
    assert_all_read_the_same(folder, f"{share}/dense.{stored.name}", values)


def test_tensorstore_refuses_a_flipped_bit_as_we_do(tmp_path):
    folder = CheckpointFolder(tmp_path, Io())
    share = folder.new_share(folder.claim(0.0), 0)
    folder.put_share(share, [("dense.float32", encode(np.ones(100, np.float32), {}))])
    file = folder.object_folder(f"{share}/dense.float32") / "c.0"
    content = bytearray(file.read_bytes())
    content[17] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="Digest mismatch"):
        of_tensorstore(file.parent)
