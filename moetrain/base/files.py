"""Files and folders that appear whole: a kill or a full disk leaves the old one or the new one, never a torn one."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Written aside, synced, renamed over `path`; nothing is touched when the content is the same already."""
    content = text.encode()
    if path.is_file() and path.read_bytes() == content:
        return
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, path)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder` to fill; it becomes `folder`, replacing one that was there, when the block ends.

    It is removed when the block raises, and what was there stays. Raises OSError, also when another writer made `folder` meanwhile.
    """
    partial, old = (draft_of(folder, f"{role}-{os.getpid()}") for role in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    replaces = folder.exists()
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        if replaces:
            folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            if replaces:
                old.rename(folder)
            raise
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def draft_of(path: Path, role: str) -> Path:
    """A hidden name beside `path`, of this host: two hosts may share the file system."""
    return path.with_name(f".{path.name}.{role}@{socket.gethostname()}")


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's names, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
