"""The folder of an export: it appears whole or not at all, and replaces nothing but an earlier export."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.base.errors import BundleError
from moetrain.base.files import whole_folder


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `target` to write into; it becomes `target` when the block ends, and is removed when it raises.

    `overwrite` replaces an earlier export only: a folder without a config.json is never touched.
    Raises BundleError when the target is taken or cannot be written.
    """
    target = target.absolute()
    _check_target(target, overwrite)
    try:
        with whole_folder(target) as partial:
            yield partial
    except OSError as error:
        raise BundleError(f"{error.filename or target} cannot be written: {error.strerror or error}.", "Give another --out.") from error


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise BundleError(f"{target} is a file.", "Give a folder as --out.")
    if not any(target.iterdir()):
        return
    if not (target / "config.json").is_file():
        raise BundleError(f"{target} holds something that is no export.", "Give another --out; it is not replaced even with --overwrite.")
    if not overwrite:
        raise BundleError(f"{target} exists.", "Give another --out, or --overwrite to replace it.")
