"""A folder that appears whole or not at all: one writer at a time, written beside its place, renamed when complete."""

import fcntl
import glob
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.base.errors import DataError
from moetrain.base.files import draft_of, whole_folder
from moetrain.base.log import logger


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Waits until no other process holds this folder's lock; the system lets go of it when the process ends, however it ends."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f".{folder.name}.lock").open("w")
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
    for role in ("partial-*", "old-*"):
        for remains in folder.parent.glob(draft_of(Path(glob.escape(str(folder))), role).name):
            shutil.rmtree(remains, ignore_errors=True)
    is_new = not folder.exists()
    try:
        with whole_folder(folder) as partial:
            yield partial
    except OSError:
        if not is_new or not folder.is_dir():
            raise
        logger("data").info("Another host has written %s meanwhile.", folder)
