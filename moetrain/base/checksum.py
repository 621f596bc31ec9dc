"""The checksum of everything that is kept: CRC32C (Castagnoli), as Zarr's codec of that name computes it."""

from awscrt.checksums import crc32c

__all__ = ["crc32c"]  # crc32c(buffer, previous=0): as fast as the processor folds polynomials; others reach half of it
