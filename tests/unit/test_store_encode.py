"""Our Zarr v3 arrays: what we write zarr-python reads, and what was damaged we refuse."""

import json
import os
from itertools import pairwise

import numpy as np
import pytest
import zarr
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from moetrain.base.errors import CheckpointError
from moetrain.store import encode as module
from moetrain.store.crc import combine
from moetrain.store.encode import DATA, METADATA, ArrayReader, checksums, encode, stored_dtype
from moetrain.store.io import Io


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 64)


def write(folder, values, **attributes):
    encoded = encode(values, dict(attributes))
    folder.mkdir()
    Io().write_new(folder / METADATA, [encoded.metadata])
    if encoded.data:
        Io().write_new(folder / DATA, encoded.data)
    return folder


def numbers(dtype, size):
    return (np.random.default_rng(size).random(size) * 100).astype(stored_dtype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64", "uint8", "bool"])
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1000])
def test_zarr_python_and_we_read_the_same_values(tmp_path, small_chunks, dtype, size):
    values = numbers(dtype, size)
    folder = write(tmp_path / "blocks.0.moe.experts.3.float32", values, step=7)
    array = zarr.open_array(folder, mode="r")
    assert np.array_equal(array[:], values)
    assert array.attrs["step"] == 7
    reader = ArrayReader(folder, Io())
    assert np.array_equal(reader.read(0, size), values)
    assert reader.attributes == {"step": 7}
    assert array.dtype == reader.dtype


def test_chunks_of_the_usual_size_are_read_by_both(tmp_path):
    values = numbers("float32", (9 << 20) // 4)
    folder = write(tmp_path / "a", values)
    array = zarr.open_array(folder, mode="r")
    assert np.array_equal(array[:], values)
    assert np.array_equal(ArrayReader(folder, Io()).read(5, values.size - 5), values[5:])
    assert array.chunks[0] * 4 <= module.CHUNK_BYTES


@given(size=st.integers(1, 300), data=st.data())
def test_any_range_is_what_was_written(tmp_path_factory, size, data):
    start = data.draw(st.integers(0, size))
    count = data.draw(st.integers(0, size - start))
    values = numbers("float32", size)
    original, module.CHUNK_BYTES = module.CHUNK_BYTES, 64
    try:
        folder = write(tmp_path_factory.mktemp("range") / "a", values)
        assert np.array_equal(ArrayReader(folder, Io()).read(start, count), values[start : start + count])
    finally:
        module.CHUNK_BYTES = original


def test_padding_and_fill_value_of_floats_are_nan(tmp_path, small_chunks):
    folder = write(tmp_path / "a", np.zeros(17, np.float32))
    assert json.loads((folder / METADATA).read_bytes())["fill_value"] == "NaN"
    stored = np.frombuffer((folder / DATA).read_bytes()[40:76], np.float32)  # the second chunk: 8 values and one of padding
    assert np.isnan(stored).tolist() == [False] * 8 + [True]
    array = zarr.open_array(folder, mode="r")
    assert np.isnan(array.fill_value)
    (folder / DATA).unlink()
    assert np.isnan(array[:]).all()  # another reader's lost chunk is loud


def test_every_flipped_bit_is_an_error(tmp_path, small_chunks):
    folder = write(tmp_path / "a", numbers("float32", 40), step=1)
    good = (folder / DATA).read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        (folder / DATA).write_bytes(bytes(bad))
        with pytest.raises(CheckpointError, match="damaged"):
            ArrayReader(folder, Io()).read(0, 40)


@pytest.mark.parametrize("length", [0, 1, 63, 100])
def test_short_and_empty_files_are_errors(tmp_path, small_chunks, length):
    folder = write(tmp_path / "a", numbers("float32", 40))
    os.truncate(folder / DATA, length)
    with pytest.raises(CheckpointError, match=f"it has {length} bytes"):
        ArrayReader(folder, Io())


def test_a_chunk_the_index_calls_missing_is_an_error(tmp_path, small_chunks):
    values = numbers("float32", 40)
    folder = write(tmp_path / "a", values)
    data = (folder / DATA).read_bytes()
    index = np.full((3, 2), 2**64 - 1, "<u8").tobytes()
    (folder / DATA).write_bytes(data[: -len(index) - 4] + index + module.checksum(index))
    assert np.isnan(zarr.open_array(folder, mode="r")[:]).all()
    with pytest.raises(CheckpointError, match="missing chunk"):
        ArrayReader(folder, Io())


@pytest.mark.parametrize("file", [DATA, METADATA])
def test_a_missing_file_is_named(tmp_path, file):
    folder = write(tmp_path / "a", numbers("float32", 4))
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file} is missing"):
        ArrayReader(folder, Io())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"shape": [4]}', '{"shape": [4], "data_type": "nonsense", "attributes": {}}'])
def test_damaged_descriptions_are_errors(tmp_path, text):
    folder = write(tmp_path / "a", numbers("float32", 4))
    (folder / METADATA).write_text(text)
    with pytest.raises(CheckpointError, match=r"zarr\.json"):
        ArrayReader(folder, Io())


def test_only_the_chunks_of_a_range_are_read(tmp_path, small_chunks):
    values = numbers("float32", 160)
    folder = write(tmp_path / "a", values)
    data = bytearray((folder / DATA).read_bytes())
    data[-200] ^= 1  # in the last chunk
    (folder / DATA).write_bytes(bytes(data))
    assert np.array_equal(ArrayReader(folder, Io()).read(0, 16), values[:16])
    with pytest.raises(CheckpointError, match="chunk 9"):
        ArrayReader(folder, Io()).read(150, 10)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, views: real(fd, [views[0][:3]]))
    Io().write_new(tmp_path / "a", [b"hello", b"", b"world"])
    assert (tmp_path / "a").read_bytes() == b"helloworld"


@given(size=st.integers(1, 200), data=st.data())
def test_checksums_of_chunks_and_pieces_come_from_one_pass(size, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, size), max_size=6)))
    pieces = [(start, stop - start) for start, stop in pairwise(cuts)] + [(start, 0) for start in cuts[:1]]
    values = numbers("float32", size)
    original, module.CHUNK_BYTES = module.CHUNK_BYTES, 64
    try:
        sums = checksums(values, pieces)
        assert encode(values, {}, sums.chunks).data == encode(values, {}).data
        assert [crc32c(chunk) for chunk in encode(values, {}).data[:-2:2]] == sums.chunks
    finally:
        module.CHUNK_BYTES = original
    assert sums.pieces == [crc32c(values[start : start + count].tobytes()) for start, count in pieces]


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_checksums_combine(first, second):
    assert combine(crc32c(first), crc32c(second), len(second)) == crc32c(first + second)


def test_every_byte_is_read_once_for_both_checksums(monkeypatch):
    seen = []
    real = module.crc32c
    monkeypatch.setattr(module, "crc32c", lambda data, crc=0: seen.append(len(data)) or real(data, crc))
    values = numbers("float32", (10 << 20) // 4)
    encode(values, {}, checksums(values, [(0, 1000), (1000, values.size - 1000)]).chunks)
    assert values.nbytes <= sum(seen) < values.nbytes + 200


@pytest.mark.parametrize(("start", "count"), [(0, 40), (0, 0), (3, 1), (15, 2), (16, 16), (39, 1), (7, 30)])
def test_values_are_read_by_their_own_checksum_into_memory_of_the_caller(tmp_path, small_chunks, start, count):
    values = numbers("float32", 40)
    reader = ArrayReader(write(tmp_path / "a", values), Io())
    crc, out = crc32c(values[start : start + count].tobytes()), np.empty(count, np.float32)
    assert reader.read_checked(start, count, crc, out) is not None
    assert np.array_equal(out, values[start : start + count])
    assert np.array_equal(reader.read_checked(start, count, crc), out)
    if count:
        with pytest.raises(CheckpointError, match="not the ones in the manifest"):
            reader.read_checked(start, count, crc ^ 1)


@given(size=st.integers(1, 120), block=st.sampled_from([4, 12, 40, 64, 1 << 20]), data=st.data())
def test_verify_reads_every_byte_and_checks_every_piece(tmp_path_factory, size, block, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, size), max_size=5)))
    values = numbers("float32", size)
    pieces = [(start, stop - start, crc32c(values[start:stop].tobytes())) for start, stop in pairwise(cuts)]
    original, module.CHUNK_BYTES = module.CHUNK_BYTES, 64
    try:
        folder = write(tmp_path_factory.mktemp("verify") / "a", values)
        io = Io()
        io.block_bytes = block
        ArrayReader(folder, io).verify(pieces)
        content = bytearray((folder / DATA).read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1
        (folder / DATA).write_bytes(bytes(content))
        with pytest.raises(CheckpointError, match="damaged"):
            ArrayReader(folder, io).verify(pieces)
    finally:
        module.CHUNK_BYTES = original


def test_verify_notices_pieces_that_changed_places(tmp_path, small_chunks):
    values = numbers("float32", 40)
    first, second = (crc32c(part.tobytes()) for part in (values[:20], values[20:]))
    reader = ArrayReader(write(tmp_path / "a", values), Io())
    reader.verify([(0, 20, first), (20, 20, second)])
    with pytest.raises(CheckpointError, match="not the ones in the manifest"):
        reader.verify([(0, 20, second), (20, 20, first)])
