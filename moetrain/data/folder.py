"""A folder that appears whole or not at all: one writer at a time, written beside its place, renamed when complete."""

import fcntl
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.base.errors import DataError
from moetrain.base.log import logger


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Waits until no other process holds this folder's lock; the system lets go of it when the process ends, however it ends."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _beside(folder, "lock").open("w")
    except OSError as error:
        raise DataError(f"Nothing can be written to {folder.parent}: {error.strerror}.", "Choose another --out folder.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger("data").info("Another process is writing %s; waiting for it.", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new empty folder to fill, which becomes `folder` (replacing one that is there) when the block ends without an error.

    Needs `locked(folder)`. What an interrupted writer of this host left beside it is removed first. A lock may not reach other hosts: of
    two that write a new folder, the first to rename wins and the other one's is dropped.
    """
    host = socket.gethostname()
    for remains in (*_all_beside(folder, f"partial-*@{host}"), *_all_beside(folder, f"old-*@{host}")):
        shutil.rmtree(remains, ignore_errors=True)
    partial, old = (_beside(folder, f"{role}-{os.getpid()}@{host}") for role in ("partial", "old"))
    replaces = folder.exists()
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        if replaces:
            folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            if replaces or not folder.is_dir():
                raise
            logger("data").info("Another host has written %s meanwhile.", folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path, role: str) -> Path:
    return folder.parent / f".{folder.name}.{role}"


def _all_beside(folder: Path, pattern: str) -> list[Path]:
    return list(folder.parent.glob(f".{glob.escape(folder.name)}.{pattern}"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
