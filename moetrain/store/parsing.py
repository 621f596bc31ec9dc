"""Bytes that were read back may be anything. Whatever goes wrong while they are parsed means one thing: they are damaged."""

from collections.abc import Iterator
from contextlib import contextmanager

from moetrain.base.errors import CheckpointError


@contextmanager
def parsing(what: str) -> Iterator[None]:
    """Around parsing alone, never around reading. Raises CheckpointError, naming `what`, for every error in it (JSON, numbers too large,
    nesting too deep, missing keys, other types) but a lack of memory, which says nothing about the bytes."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{what} is damaged.") from error
