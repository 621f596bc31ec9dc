"""A piece of node memory that the trainer fills and its writer process reads: an unlinked file, so nothing is left when both are gone."""

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from moetrain.base.errors import CheckpointError


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written there; 0 when there is no such folder."""
    if not folder.is_dir():
        return 0
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def usual_folders() -> tuple[Path, ...]:
    """Shared memory first, then the folder for temporary files."""
    return Path("/dev/shm"), Path(tempfile.gettempdir())


class Arena:
    """Memory of at least `num_bytes`, reserved in full: writing to it never fails. `descriptor` may be sent to another process."""

    def __init__(self, num_bytes: int, folders: Sequence[Path], free: Callable[[Path], int] = free_bytes) -> None:
        """Raises CheckpointError when none of the folders has room."""
        self.num_bytes = max(num_bytes, mmap.PAGESIZE)
        self.descriptor = self._reserve(folders, free)
        self.memory = mmap.mmap(self.descriptor, self.num_bytes)

    def _reserve(self, folders: Sequence[Path], free: Callable[[Path], int]) -> int:
        for folder in folders:
            if free(folder) < self.num_bytes:
                continue
            try:
                with tempfile.TemporaryFile(dir=folder) as file:  # never has a name, or loses it at once
                    os.posix_fallocate(file.fileno(), 0, self.num_bytes)
                    return os.dup(file.fileno())
            except OSError:
                continue
        room = ", ".join(f"{free(folder) / 1e9:.1f} GB in {folder}" for folder in folders)
        raise CheckpointError(
            f"A checkpoint copy of {self.num_bytes / 1e9:.1f} GB fits nowhere: there is {room}.",
            "Make room, raise the container's --shm-size, or use more ranks.",
        )

    def close(self) -> None:
        """Gives the memory back once the other process has closed it too. No view of it may be left."""
        self.memory.close()
        os.close(self.descriptor)
