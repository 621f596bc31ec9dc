"""Large files past the page cache: the disk takes them from memory, so that training keeps its core and its cached files.

The same bytes through the cache cost several times the processor time and wait for whoever flushes it (`docs/checkpoint.md`).
"""

import errno
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Callable

import numpy as np

ALIGNMENT = 4096  # of memory, offset and length: a multiple of every disk's block
STAGING_BYTES = 4 << 20


class DirectWriter:
    """Writes the front of a file in whole blocks. Thread-safe; keeps a staging buffer for each thread that ever wrote at a time."""

    def __init__(self) -> None:
        self._spare: deque[mmap.mmap] = deque()

    def write(self, descriptor: int, views: list[memoryview], before_write: Callable[[], None]) -> int:
        """Writes as many whole blocks of `views` (bytes, flat) as it can from the start of an empty file; returns the number of bytes.

        What is left is for the caller: the last part of a block; everything, on a file system without direct writes. Raises OSError.
        """
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        except OSError:
            return 0
        staging = self._spare.pop() if self._spare else mmap.mmap(-1, STAGING_BYTES)
        try:
            return _write_blocks(descriptor, views, staging, before_write)
        finally:
            self._spare.append(staging)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)


def _write_blocks(descriptor: int, views: list[memoryview], staging: mmap.mmap, before_write: Callable[[], None]) -> int:
    left = sum(len(view) for view in views) // ALIGNMENT * ALIGNMENT
    source, total = _Source(views), 0
    with memoryview(staging) as buffer:
        while left:
            size = min(left, len(buffer))
            source.read_into(buffer[:size])
            done = 0
            while done < size:
                before_write()
                try:
                    written = os.write(descriptor, buffer[done:size])
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    return total + done  # accepted when it was opened, refused when it is used, or for this length
                done += written
                if written % ALIGNMENT:  # a quota or a signal cut it short
                    return total + done
            total, left = total + size, left - size
    return total


class _Source:
    """The bytes of many views, one after the other."""

    def __init__(self, views: list[memoryview]) -> None:
        self._left = deque(view for view in views if len(view))

    def read_into(self, target: memoryview) -> None:
        """Fills `target`; copying lets other threads run."""
        whole, position = np.frombuffer(target, np.uint8), 0
        while position < len(whole):
            part = self._left.popleft()
            size = min(len(part), len(whole) - position)
            whole[position : position + size] = np.frombuffer(part, np.uint8, size)
            if size < len(part):
                self._left.appendleft(part[size:])
            position += size
