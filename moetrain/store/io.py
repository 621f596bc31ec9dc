"""Every file operation of a checkpoint on a file system, each behind a hook: tests kill or fail the process at any one of them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock

from moetrain.store.direct import DirectWriter

Buffer = bytes | memoryview
Hook = Callable[[str, Path], None]

_MOST_BUFFERS = 512  # below IOV_MAX of every system


def no_hook(operation: str, path: Path) -> None:
    """The hook of a real run."""


class Io:
    """The operating system's calls, one hook point each. The hook runs *before* the call and may raise OSError.

    Operations: mkdir open write fsync rename link unlink rmdir fsync_folder read list. Looking at a name (`exists`, `is_folder`,
    `size`, `num_links`) has none.
    """

    block_bytes = 1 << 20  # what was read is still in the processor's cache when its checksum is taken
    direct_bytes = 1 << 20  # from this size on a file is written past the page cache

    def __init__(self, hook: Hook = no_hook) -> None:
        self.bytes_read = 0  # from the disk or its cache, so far
        self._hook = hook
        self._direct = DirectWriter()
        self._counting = Lock()

    def mkdir(self, path: Path) -> None:
        """Makes the folder; an existing one is fine. FileNotFoundError without its parent: a folder that was moved away stays away."""
        self._hook("mkdir", path)
        path.mkdir(exist_ok=True)

    def write_new(self, path: Path, buffers: Sequence[Buffer]) -> int:
        """Creates the file, which must not exist, writes the buffers and syncs it. Returns the number of bytes."""
        self._hook("open", path)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            num_bytes = self._write(descriptor, path, [memoryview(buffer).cast("B") for buffer in buffers])
            self._hook("fsync", path)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return num_bytes

    def _write(self, descriptor: int, path: Path, views: list[memoryview]) -> int:
        total = 0
        if sum(len(view) for view in views) >= self.direct_bytes:
            total = self._direct.write(descriptor, views, lambda: self._hook("write", path))
            _advance(views, total)
        while views:
            self._hook("write", path)
            written = os.writev(descriptor, views[:_MOST_BUFFERS])
            total += written
            _advance(views, written)
        return total

    def rename(self, source: Path, target: Path) -> None:
        self._hook("rename", target)
        source.rename(target)

    def link(self, source: Path, target: Path) -> None:
        """A second name for a file; FileExistsError if the name is taken: the one atomic 'create if absent' every local and
        cluster file system has."""
        self._hook("link", target)
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        self._hook("unlink", path)
        path.unlink(missing_ok=True)

    def rmdir(self, path: Path) -> None:
        self._hook("rmdir", path)
        path.rmdir()

    def remove_tree(self, path: Path) -> None:
        """Removes a folder and what is in it; an absent one is fine."""
        for name in self.list(path):
            child = path / name
            if self.is_folder(child):
                self.remove_tree(child)
            else:
                self.unlink(child)
        if self.is_folder(path):
            self.rmdir(path)

    def fsync_folder(self, path: Path) -> None:
        """Makes names created, renamed or removed in this folder durable."""
        self._hook("fsync_folder", path)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def list(self, path: Path) -> list[str]:
        """Names in a folder, sorted; an absent folder is an empty one."""
        self._hook("list", path)
        return sorted(os.listdir(path)) if path.is_dir() else []

    def read(self, path: Path) -> bytes:
        self._hook("read", path)
        found = path.read_bytes()
        self._count(len(found))
        return found

    def read_into(self, path: Path, offset: int, views: Sequence[memoryview]) -> int:
        """Fills the views, one after the other, from `offset`. Returns the number of bytes, fewer at the end of the file."""
        self._hook("read", path)
        left, total = [view.cast("B") for view in views if view.nbytes], 0
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while left and (count := os.preadv(descriptor, left[:_MOST_BUFFERS], offset + total)):
                total += count
                _advance(left, count)
        finally:
            os.close(descriptor)
        self._count(total)
        return total

    def _count(self, num_bytes: int) -> None:
        with self._counting:
            self.bytes_read += num_bytes

    def exists(self, path: Path) -> bool:
        return path.exists()

    def is_folder(self, path: Path) -> bool:
        return path.is_dir()

    def size(self, path: Path) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        return path.stat().st_size

    def num_links(self, path: Path) -> int:
        return path.stat().st_nlink


def _advance(views: list[memoryview], num_bytes: int) -> None:
    """Drops the first `num_bytes`, and with them the empty views behind them."""
    done = 0
    while done < len(views) and num_bytes >= len(views[done]):
        num_bytes -= len(views[done])
        done += 1
    del views[:done]
    if num_bytes:
        views[0] = views[0][num_bytes:]
