"""A folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.base.errors import BundleError


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `target` to write into; it becomes `target` when the block ends, and is removed when it raises.

    `overwrite` replaces an earlier export only: a folder without a config.json is never touched.
    Raises BundleError when the target is taken or cannot be written.
    """
    target = target.absolute()
    taken = _check_target(target, overwrite)
    partial, old = (target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise BundleError(f"{partial} cannot be made: {error.strerror}.", "Give another --out.") from error
    try:
        yield partial
        _flush(partial)
        if taken:
            os.rename(target, old)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _check_target(target: Path, overwrite: bool) -> bool:
    """Whether something must be moved out of the way."""
    if not target.exists():
        return False
    if not target.is_dir():
        raise BundleError(f"{target} is a file.", "Give a folder as --out.")
    if not any(target.iterdir()):
        return False
    if not (target / "config.json").is_file():
        raise BundleError(f"{target} holds something that is no export.", "Give another --out; it is not replaced even with --overwrite.")
    if not overwrite:
        raise BundleError(f"{target} exists.", "Give another --out, or --overwrite to replace it.")
    return True


def _flush(folder: Path) -> None:
    """Makes the content durable before the rename shows it."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
