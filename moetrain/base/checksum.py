"""The checksum of everything that is kept: CRC32C (Castagnoli), as Zarr's codec of that name computes it."""

import numpy as np
from awscrt import checksums


def crc32c(data: bytes | bytearray | memoryview | np.ndarray, previous: int = 0) -> int:
    """Of contiguous memory; `previous`: the checksum of what stands before it."""
    return checksums.crc32c(data, previous)  # type: ignore[arg-type] - any buffer will do
