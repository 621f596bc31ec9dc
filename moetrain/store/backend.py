"""What a checkpoint folder needs of the place it lies in: a file system (here) or an object store (`s3.py`)."""

import errno
import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from moetrain.store.io import Buffer, Io

Item = tuple[str, Sequence[tuple[str, Sequence[Buffer]]]]
"""One member of a group: its name, and the names and contents of its files."""

S3_SCHEME = "s3:"
FULL = (errno.ENOSPC, errno.EDQUOT)
WRITERS = 8  # threads: what an object loses by waiting for its syncs, another one writes meanwhile


class NoAnswer(OSError):
    """Nobody knows whether it was done, or will be."""


class Backend(Protocol):
    """Small files that appear whole, groups that appear whole, reads. Paths are full ones. Raises OSError, always with a `strerror`."""

    @property
    def block_bytes(self) -> int:
        """How much is best read at once."""
        ...

    @property
    def bytes_read(self) -> int:
        """Of contents, so far."""
        ...

    def prepare(self, folders: Sequence[Path]) -> None:
        """Makes durable places to write into; existing ones are fine."""
        ...

    def create(self, path: Path, data: bytes) -> None:
        """A small file that is whole and durable from its first moment. FileExistsError when the name is taken by anyone else, NoAnswer
        when the file may be there, or appear yet. On a file system its folder is made, but not the one above."""
        ...

    def put_group(self, group: Path, items: Iterable[Item]) -> None:
        """Writes `<group>/<item>/<file>`, all durable when it returns. `group` is a name that nobody used before and nobody
        reads before he is told of it. The buffers must not change until then. As `create`, makes no folder above the group's."""
        ...

    def read(self, path: Path) -> bytes: ...

    def read_into(self, path: Path, offset: int, views: Sequence[memoryview]) -> int:
        """Fills the views, one after the other, from `offset`. Returns the number of bytes, fewer at the end of the file."""
        ...

    def size(self, path: Path) -> int: ...

    def exists(self, path: Path) -> bool:
        """Of a file. Never behind the truth, unlike a list may be."""
        ...

    def is_folder(self, path: Path) -> bool: ...

    def list(self, path: Path) -> list[str]:
        """Names in a folder, sorted; an absent folder is an empty one. May miss what was made a moment ago."""
        ...

    def remove(self, path: Path) -> None:
        """A file; an absent one is fine."""
        ...

    def remove_tree(self, path: Path) -> None:
        """A folder and what is in it; an absent one is fine."""
        ...

    def settle(self, path: Path) -> None:
        """When it returns, what was removed from this folder stays removed, whatever happens."""
        ...


def open_backend(path: Path, io: "Io | Backend | None" = None) -> Backend:
    """The place that `path` lies in, `s3://bucket/prefix` or a folder, behind the file operations of `io`. A backend is taken as it is.

    Raises MissingExtraError when the package for object stores is not installed.
    """
    if io is not None and not isinstance(io, Io):
        return io
    if is_s3(path):
        from moetrain.store.s3 import S3Backend

        return S3Backend.of_environment(path)
    return FolderBackend(io or Io())


def is_s3(path: Path) -> bool:
    """Whether it means an object store. A Path has lost one of the slashes of `s3://`."""
    return path.parts[:1] == (S3_SCHEME,)


def absolute(path: Path) -> Path:
    """A path that means the same from any working folder."""
    return path if is_s3(path) else path.absolute()


class FolderBackend:
    """A file system with atomic rename, hard links and fsync. Nothing is ever written in place."""

    def __init__(self, io: Io) -> None:
        self.io = io
        self.block_bytes = io.block_bytes
        self.read, self.read_into, self.size, self.exists = io.read, io.read_into, io.size, io.exists
        self.is_folder, self.list, self.remove, self.remove_tree = io.is_folder, io.list, io.unlink, io.remove_tree
        self.settle = io.fsync_folder

    @property
    def bytes_read(self) -> int:
        return self.io.bytes_read

    def prepare(self, folders: Sequence[Path]) -> None:
        missing = {parent for folder in folders for parent in (folder, *folder.parents) if not self.io.exists(parent)}
        for folder in sorted(missing.union(folders)):
            self.io.mkdir(folder)
        for parent in sorted({folder.parent for folder in missing} | {folder.parent for folder in folders}, reverse=True):
            self.io.fsync_folder(parent)  # a name that was made is lost with the power until its folder is synced

    def create(self, path: Path, data: bytes) -> None:
        if not self.io.is_folder(path.parent):
            self.io.mkdir(path.parent)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            self.io.write_new(temporary, [data])
            self._link(temporary, path)
        finally:
            with suppress(OSError):  # a sweep takes it; what became of the link is the news
                self.io.unlink(temporary)
        try:
            self.io.fsync_folder(path.parent)
        except OSError as error:  # the name is there; whether it stays nobody knows
            raise NoAnswer(error.errno, error.strerror, str(path)) from error

    def _link(self, source: Path, target: Path) -> None:
        try:
            try:
                self.io.link(source, target)
            except FileExistsError:
                if self.io.num_links(source) != 2:  # a network file system may do it, lose the answer, and be asked again
                    raise
        except OSError as error:
            if error.errno in (errno.EEXIST, *FULL):  # of anything else a file system may say after it did it
                raise
            raise NoAnswer(error.errno, error.strerror, str(target)) from error

    def put_group(self, group: Path, items: Iterable[Item]) -> None:
        part = group.with_name(f"{group.name}.part")
        self.io.mkdir(group.parent)
        self.io.mkdir(part)
        self.io.fsync_folder(group.parent.parent)
        folders: list[Path] = []
        with ThreadPoolExecutor(WRITERS, "checkpoint-write") as pool:
            running: deque[Future[None]] = deque()
            try:
                for name, files in items:  # the caller takes checksums while threads write
                    folders.append(part / name)
                    running.append(pool.submit(self._put_item, part / name, files))
                    if len(running) > 2 * WRITERS:
                        running.popleft().result()
                while running:
                    running.popleft().result()
            finally:
                for future in running:
                    future.cancel()
            list(pool.map(self.io.fsync_folder, folders))
        self.io.fsync_folder(part)
        self.io.rename(part, group)
        self.io.fsync_folder(group.parent)

    def _put_item(self, folder: Path, files: Sequence[tuple[str, Sequence[Buffer]]]) -> None:
        self.io.mkdir(folder)
        for name, buffers in files:
            self.io.write_new(folder / name, buffers)


def not_found(path: Path) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
