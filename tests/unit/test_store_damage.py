"""Descriptions, manifests and receipts with any bytes in them: what cannot be read is damage, never another error."""

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moetrain.base.checksum import crc32c
from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.choose import check_object, glance
from moetrain.checkpoint.generation import Generation
from moetrain.checkpoint.recover import agreed_choice, together
from moetrain.store.encode import METADATA, ArrayReader, describe, encode
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest, ObjectRecord, Piece, SaveId, Tensor, by_key, seal, unseal
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import Job, LocalNode, assert_equal, expected, manifests, objects_of

SAVE = SaveId(1, 1)
NASTY = [b"1e345", b"-1", b"NaN", b"null", b"{}", b"[]", b"\xff", b"9" * 5000, b"[" * 100_000, b'"', b"\x00", b"1e18", b"e", b",", b""]
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), st.sampled_from(NASTY) | st.binary(max_size=4)), min_size=1, max_size=3)


def edited(data: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    """`changes`: where (a part of the length), how many bytes go, what comes in their place."""
    for where, length, new in changes:
        start = int(where * len(data))
        data = data[:start] + new + data[start + length :]
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> CheckpointFolder:
    """One object, with its manifest and its receipt."""
    folder = CheckpointFolder(tmp_path_factory.mktemp("damage"), Io())
    folder.claim(0.0)
    values = np.arange(12345, dtype=np.float32)
    encoded = encode(values, {"step": 1})
    folder.put_share(f"{SAVE}/00000-abcdef12", [("dense.float32", encoded)])
    name = f"{SAVE}/00000-abcdef12/dense.float32"
    record = ObjectRecord(name, 1, values.nbytes, crc32c(encoded.metadata))
    tensor = Tensor("w", "master", None, None, "float32", (12345,), (Piece((0,), (12345,), name, crc=crc32c(values)),))
    folder.put_receipt(SAVE, 1, {"rank": 1})
    folder.commit(Manifest(SAVE, None, 0, 1, 0.0, "full", True, 1, 1, 1, {"step": 1}, {name: record}, by_key([tensor])))
    return folder


def content_of(folder: CheckpointFolder) -> tuple[Manifest, ObjectRecord, list[Piece]]:
    point = folder.manifest(SAVE)
    (record,), (tensor,) = point.objects.values(), point.tensors.values()
    return point, record, list(tensor.pieces)


@given(changes=edits)
@example(changes=[(0.0, 0, b"[" * 100_000)])
def test_any_edit_of_a_description_is_damage_of_its_object(folder, changes):
    _, record, pieces = content_of(folder)
    path = folder.object_folder(record.name) / METADATA
    good = path.read_bytes()
    try:
        path.write_bytes(edited(good, changes))
        is_changed = path.read_bytes() != good
        assert bool(glance(folder, record, pieces)) == bool(check_object(folder, record, pieces)) == is_changed
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize(
    "shape", ["1e345", "1" * 400, "9" * 5000, "-12345", "NaN", "null", "{}", '"a"', "[" * 100_000], ids=lambda text: text[:6]
)
def test_a_damaged_shape_is_damage_of_its_object(folder, shape):
    _, record, pieces = content_of(folder)
    path = folder.object_folder(record.name) / METADATA
    good = path.read_bytes()
    try:
        path.write_bytes(good.replace(b'"shape": [12345]', f'"shape": [{shape}]'.encode()))
        assert str(path) in glance(folder, record, pieces)
    finally:
        path.write_bytes(good)


def test_a_shape_beyond_all_memory_is_refused_by_the_length_of_the_data(tmp_path):
    encoded = encode(np.zeros(4, np.float32), {})
    Io().write_new(tmp_path / "c.0", encoded.data)
    (tmp_path / METADATA).write_text(json.dumps(describe(10**18, np.dtype("<f4"), 1_048_576, {})))
    with pytest.raises(CheckpointError, match=r"bytes instead of \d{19}"):
        ArrayReader(tmp_path, Io())


@given(changes=edits)
def test_any_edit_of_a_manifest_is_damage_of_it(folder, changes):
    good = content_of(folder)[0].to_bytes()
    bad = edited(good, changes)
    if bad != good:
        with pytest.raises(CheckpointError, match="the manifest"):
            Manifest.from_bytes(bad, "the manifest")


@given(changes=edits)
@example(changes=[(0.0, 1 << 20, b"")])
@example(changes=[(0.0, 1 << 20, b"[]")])
@example(changes=[(0.0, 0, b"[" * 100_000)])
def test_a_manifest_that_fits_its_checksum_and_is_none_is_damage_too(folder, changes):
    bad = seal(edited(content_of(folder)[0].to_bytes().rpartition(b"\n")[0].rpartition(b"\n")[0], changes))
    for parse in (unseal, Manifest.from_bytes, Generation.from_bytes):
        try:
            parse(bad, "the manifest")
        except CheckpointError as error:
            assert "the manifest" in error.message


@given(changes=edits)
def test_any_edit_of_a_receipt_is_damage_of_it(folder, changes):
    path = folder.path / "receipts" / str(SAVE) / "00001.json"
    good = path.read_bytes()
    try:
        path.write_bytes(edited(good, changes))
        if path.read_bytes() != good:
            with pytest.raises(CheckpointError, match="damaged"):
                folder.receipt(SAVE, 1)
    finally:
        path.write_bytes(good)


def test_a_damaged_shape_means_the_previous_checkpoint(tmp_path):
    job = Job(tmp_path, 1, 1)
    job.save(1, full=True)
    job.save(2, full=True)
    (path,) = objects_of(tmp_path, manifests(tmp_path)[0], "dense.")
    text = (path / METADATA).read_text()
    (path / METADATA).write_text(text.replace('"shape": [', '"shape": [1e345, ', 1))
    choice = agreed_choice(tmp_path, "auto")
    assert choice is not None
    assert choice.manifest.step == 1
    assert_equal(Job(tmp_path, 1, 1, nodes=[LocalNode()]).load()[1], expected(1))


def test_an_error_that_nobody_foresaw_is_heard_by_all_ranks():
    def fail() -> object:
        raise MemoryError("no room")

    said: list[object] = []

    def gather(value: object) -> list[object]:
        said.append(value)
        return [value, [1, None, ""]]

    with pytest.raises(CheckpointError, match="MemoryError: no room"):
        together(fail, gather)
    assert said[-1] is not None


def test_a_lack_of_memory_while_a_manifest_is_parsed_is_no_damage(folder, monkeypatch):
    def full(text: bytes) -> object:
        raise MemoryError

    data = content_of(folder)[0].to_bytes()
    monkeypatch.setattr(json, "loads", full)
    with pytest.raises(MemoryError):
        Manifest.from_bytes(data, "the manifest")
