"""Zarr v3 arrays, written and read by ourselves: one dimension, one shard, CRC32C on every chunk and on the index.

Any Zarr v3 reader opens what is written here. Our reader is stricter than most: a missing chunk is an error, not fill values.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from moetrain.base.checksum import crc32c
from moetrain.base.errors import CheckpointError
from moetrain.store.crc import combine
from moetrain.store.io import Buffer
from moetrain.store.parsing import parsing

CHUNK_BYTES = 4 << 20  # the unit that is read and checked alone
INDEX_BYTES = 16  # for each chunk, in the shard's index
METADATA, DATA = "zarr.json", "c.0"
STORED_AS = {"bfloat16": "uint16", "bool": "uint8", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}  # Zarr's core has no such types

Json = dict[str, object]


def stored_dtype(dtype: str) -> np.dtype:
    """The numpy type in which a tensor type is stored, little-endian: itself, or an integer of the same width."""
    return np.dtype(STORED_AS.get(dtype, dtype)).newbyteorder("<")


@dataclass(frozen=True)
class Encoded:
    """The two files of an array. `data` are views where possible: the values must not change until they are written."""

    metadata: bytes
    data: list[Buffer]


@dataclass(frozen=True)
class Sums:
    """CRC32C of every chunk of an array, padding included, and of every piece that was asked for."""

    chunks: list[int]
    pieces: list[int]


def checksums(values: np.ndarray, pieces: Sequence[tuple[int, int]] = ()) -> Sums:
    """Takes the checksums of the flat, contiguous, little-endian `values` in one pass. `pieces`: (first value, number of values)."""
    chunk = chunk_length(values.size, values.itemsize)
    starts = range(0, num_chunks(values.size, chunk) * chunk, chunk)
    inside = {edge for start, count in pieces for edge in (start, start + count)}
    edges = sorted({*starts, values.size, *inside})
    parts = {start: (stop, crc32c(bytes_of(values[start:stop]))) for start, stop in pairwise(edges)}

    def joined(start: int, count: int) -> int:
        return join(parts, start, start + count, values.itemsize)

    chunks = [joined(start, min(chunk, values.size - start)) for start in starts]
    if padding := len(starts) * chunk - values.size:
        chunks[-1] = crc32c(bytes_of(np.full(padding, fill_value(values.dtype), values.dtype)), chunks[-1])
    return Sums(chunks, [joined(start, count) for start, count in pieces])


def join(parts: dict[int, tuple[int, int]], start: int, stop: int, itemsize: int) -> int:
    """CRC32C of [start, stop) from parts without gaps: where one begins -> where it ends, and its CRC32C."""
    crc, position = 0, start
    while position < stop:
        end, part = parts[position]
        crc = part if position == start else combine(crc, part, (end - position) * itemsize)
        position = end
    return crc


def encode(values: np.ndarray, attributes: Json, chunk_crcs: Sequence[int] | None = None) -> Encoded:
    """A Zarr array of the flat, contiguous `values`. An empty one has no data file. `chunk_crcs`: from `checksums`, if they are known."""
    values = values.astype(values.dtype.newbyteorder("<"), copy=False)
    chunk = chunk_length(values.size, values.itemsize)
    metadata = json.dumps(describe(values.size, values.dtype, chunk, attributes)).encode()
    if not values.size:
        return Encoded(metadata, [])
    if chunk_crcs is None:
        chunk_crcs = checksums(values).chunks
    data: list[Buffer] = []
    for start, crc in zip(range(0, values.size, chunk), chunk_crcs, strict=True):
        part = values[start : start + chunk]
        if part.size < chunk:
            part = np.concatenate([part, np.full(chunk - part.size, fill_value(values.dtype), values.dtype)])
        data += [bytes_of(part), crc.to_bytes(4, "little")]
    index = shard_index(len(data) // 2, chunk * values.itemsize)
    return Encoded(metadata, [*data, index, checksum(index)])


def describe(size: int, dtype: np.dtype, chunk: int, attributes: Json) -> Json:
    """The content of `zarr.json`."""
    little = {"name": "bytes"} | ({"configuration": {"endian": "little"}} if dtype.itemsize > 1 else {})
    index_codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [chunk], "codecs": [little, {"name": "crc32c"}], "index_codecs": index_codecs, "index_location": "end"}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [size],
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [num_chunks(size, chunk) * chunk or chunk]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if dtype.kind == "f" else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": attributes,
    }


def chunk_length(size: int, itemsize: int) -> int:
    """Values per chunk: about CHUNK_BYTES, equal chunks with less than one value of padding for each."""
    return max(1, math.ceil(size / max(1, math.ceil(size * itemsize / CHUNK_BYTES))))


def num_chunks(size: int, chunk: int) -> int:
    return math.ceil(size / chunk)


def fill_value(dtype: np.dtype) -> float | int:
    """NaN for floats, so that a leak of padding is loud."""
    return math.nan if dtype.kind == "f" else 0


def bytes_of(values: np.ndarray) -> memoryview:
    """The memory of a flat, contiguous array that is not empty."""
    return values.data.cast("B")


def checksum(data: Buffer) -> bytes:
    """CRC32C as the four little-endian bytes of Zarr's codec."""
    return crc32c(data).to_bytes(4, "little")


def shard_index(count: int, chunk_bytes: int) -> bytes:
    """Offset and length of every chunk, in order and without gaps."""
    stride = chunk_bytes + 4
    return np.array([(i * stride, stride) for i in range(count)], dtype="<u8").tobytes()


class Reads(Protocol):
    """Where an array's files are read: `Io` or a `Backend`. `block_bytes`: how much is best read at once."""

    @property
    def block_bytes(self) -> int: ...

    def read(self, path: Path) -> bytes: ...

    def read_into(self, path: Path, offset: int, views: Sequence[memoryview]) -> int: ...

    def size(self, path: Path) -> int: ...


class ArrayReader:
    """Ranges of one array, every byte checked. Raises CheckpointError that names the file and what is wrong with it."""

    def __init__(self, folder: Path, source: Reads) -> None:
        self.folder = folder
        self._data = folder / DATA
        self._source = source
        try:
            self.metadata = source.read(folder / METADATA)
        except FileNotFoundError:
            raise CheckpointError(f"{folder / METADATA} is missing.") from None
        except OSError as error:
            raise CheckpointError(f"{folder / METADATA} cannot be read: {error.strerror}.") from error
        with parsing(str(folder / METADATA)):
            found = json.loads(self.metadata)
            self.size, self.attributes = int(found["shape"][0]), found["attributes"]
            self.dtype = np.dtype(found["data_type"]).newbyteorder("<")
            self._chunk = chunk_length(self.size, self.dtype.itemsize)
            usual = describe(self.size, self.dtype, self._chunk, self.attributes)
        if found != usual:
            raise CheckpointError(f"{folder / METADATA} describes another layout than this format's.")
        self._last: tuple[int, np.ndarray] | None = None
        if self.size:
            self._check_index()

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` values from `start`, in the machine's byte order; reads only the chunks they lie in and checks each by its own
        checksum, as any Zarr reader does."""
        self._check_range(start, count)
        result = np.empty(count, self.dtype.newbyteorder("="))
        position = start
        while position < start + count:
            number, inside = divmod(position, self._chunk)
            part = self._chunk_values(number)[inside : inside + start + count - position]
            result[position - start : position - start + part.size] = part
            position += part.size
        return result

    def read_checked(self, start: int, count: int, crc: int, out: np.ndarray | None = None) -> np.ndarray:
        """As `read`, checked by the CRC32C of just these values, known from elsewhere. One pass, no copy, no other byte.

        `out`: flat, contiguous, little-endian memory of `count` values to read into; it holds anything after an error.
        """
        self._check_range(start, count)
        result = np.empty(count, self.dtype) if out is None else out
        assert (result.size, result.dtype) == (count, self.dtype)
        if not count:
            return result
        stride, first = self._chunk * self.dtype.itemsize, start * self.dtype.itemsize
        memory, block, found, position = bytes_of(result), self._source.block_bytes, 0, 0
        while position < len(memory):
            begin, views = first + position, list[memoryview]()
            stop = min(position + block, len(memory))
            while position < stop:  # between two chunks of values stands a checksum
                size = min(stride - (first + position) % stride, stop - position)
                views += [memory[position : position + size], memoryview(bytearray(4))]
                position += size
            self._fill(begin + begin // stride * 4, views[:-1])
            for view in views[:-1:2]:  # while it is still in the processor's cache
                found = crc32c(view, found)
        if found != crc:
            raise CheckpointError(f"{self._data} is damaged: its values are not the ones in the manifest.")
        return result.astype(self.dtype.newbyteorder("="), copy=False)

    def verify(self, pieces: Sequence[tuple[int, int, int]]) -> None:
        """Reads every byte once and keeps none: chunks by their own checksums, pieces (first value, number of values, CRC32C) by theirs."""
        count, item = num_chunks(self.size, self._chunk), self.dtype.itemsize
        edges = sorted({edge for start, size, _ in pieces for edge in (start, start + size)} | {i * self._chunk for i in range(count + 1)})
        buffer, parts = bytes_of(np.empty(self._source.block_bytes + 4, np.uint8)), dict[int, tuple[int, int]]()
        for start, stop in ((number * self._chunk, (number + 1) * self._chunk) for number in range(count)):
            inside = edges[bisect_right(edges, start) : bisect_right(edges, stop)]
            stored = self._verify_chunk(start, inside, buffer, parts)
            if join(parts, start, stop, item).to_bytes(4, "little") != stored:
                raise CheckpointError(f"{self._data} is damaged: the checksum of chunk {start // self._chunk} does not match.")
        for start, size, crc in pieces:
            self._check_range(start, size)
            if size and join(parts, start, start + size, item) != crc:
                raise CheckpointError(f"{self._data} is damaged: its values are not the ones in the manifest.")

    def _verify_chunk(self, start: int, edges: Sequence[int], buffer: memoryview, parts: dict[int, tuple[int, int]]) -> bytes:
        """Adds the parts of the chunk that begins at value `start`, one up to each edge; returns the checksum that is stored behind it."""
        item = self.dtype.itemsize
        stride, position, crc, done = self._chunk * item, 0, 0, start
        ends, size = [(edge - start) * item for edge in edges], 0
        while position < stride:
            size = min(len(buffer) - 4, stride - position)
            with_checksum = size + 4 if position + size == stride else size
            self._fill(start * item + start // self._chunk * 4 + position, [buffer[:with_checksum]])
            at = 0
            while ends and ends[0] <= position + size:
                end = ends.pop(0)
                crc = crc32c(buffer[at : end - position], crc)
                parts[done] = (start + end // item, crc)
                at, crc, done = end - position, 0, start + end // item
            crc = crc32c(buffer[at:size], crc)
            position += size
        return bytes(buffer[size : size + 4])

    def _check_range(self, start: int, count: int) -> None:
        if not 0 <= start <= start + count <= self.size:
            raise CheckpointError(f"{self.folder} holds {self.size} values, not {start + count}.")

    def _chunk_values(self, number: int) -> np.ndarray:
        if self._last is None or self._last[0] != number:
            values, stored = np.empty(self._chunk, self.dtype), bytearray(4)
            self._fill(number * (values.nbytes + 4), [bytes_of(values), memoryview(stored)])
            if checksum(bytes_of(values)) != stored:
                raise CheckpointError(f"{self._data} is damaged: the checksum of chunk {number} does not match.")
            self._last = number, values
        return self._last[1]

    def _check_index(self) -> None:
        path, chunk_bytes = self._data, self._chunk * self.dtype.itemsize
        count = num_chunks(self.size, self._chunk)
        expected = count * (chunk_bytes + 4 + INDEX_BYTES) + 4
        try:
            actual = self._source.size(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing.") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        if actual != expected:
            raise CheckpointError(f"{path} is damaged: it has {actual} bytes instead of {expected}.")
        index = shard_index(count, chunk_bytes)  # not before the length is right: a damaged shape may ask for more than all memory
        found = bytearray(len(index) + 4)
        self._fill(count * (chunk_bytes + 4), [memoryview(found)])
        if found != index + checksum(index):
            raise CheckpointError(f"{path} is damaged: its chunk index is wrong or names a missing chunk.")

    def _fill(self, offset: int, views: Sequence[memoryview]) -> None:
        path = self._data
        try:
            count = self._source.read_into(path, offset, views)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing.") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        if count != sum(view.nbytes for view in views):
            raise CheckpointError(f"{path} is damaged: it ends early.")
