"""An S3-compatible object store as the place of a checkpoint folder. Needs the package obstore (extra `s3`), and only this file does.

There is no rename: objects are put under their final names, which nobody knows before the receipt, and a commit is a PUT with
`If-None-Match: *`. The store must list and read what was written before (AWS, GCS, R2, MinIO do); a list that is late costs
nothing but a sweep.
"""

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Lock
from typing import Self

from moetrain.base.errors import CheckpointError, MissingExtraError
from moetrain.store.backend import WRITERS, Item, NoAnswer, not_found
from moetrain.store.io import Buffer

try:
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
    from obstore.store import S3Store
except ImportError as error:
    raise MissingExtraError.of("obstore", "s3") from error

REFUSED = (PermissionDeniedError, UnauthenticatedError)
FAILED = (BaseError, OSError)  # what is missing or not allowed may come as one of Python's own errors
ATTEMPTS = 4
WHOLE_BYTES = 64 << 20  # a larger file is sent in parts, so that it is never joined in memory


class S3Backend:
    """One bucket. Paths are `s3:/bucket/key`, as `Path("s3://bucket/key")` spells them."""

    block_bytes = 32 << 20  # a request costs as long as some megabytes

    def __init__(self, store: S3Store, sleep: Callable[[float], None] = time.sleep) -> None:
        self.bytes_read = 0
        self._store, self._sleep = store, sleep
        self._counting = Lock()

    @classmethod
    def of_environment(cls, path: Path, timeout_seconds: float = 60.0) -> Self:
        """The bucket of `path`; credentials, region and AWS_ENDPOINT_URL from the usual AWS environment variables.

        `timeout_seconds`: of one request.
        """
        if len(path.parts) < 2:
            raise CheckpointError(f"{path} names no bucket.", "Write s3://bucket/prefix.")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        seconds = timedelta(seconds=timeout_seconds)
        return cls(
            S3Store(
                path.parts[1],
                region=region,
                checksum_algorithm="SHA256",  # the server refuses what the network damaged
                client_options={"allow_http": bool(endpoint and endpoint.startswith("http://")), "timeout": seconds},
                retry_config={"max_retries": ATTEMPTS - 1, "retry_timeout": 2 * seconds},
                endpoint=endpoint or f"https://s3.{region}.amazonaws.com",
            )
        )

    def prepare(self, folders: Sequence[Path]) -> None:
        """There are no folders."""

    def create(self, path: Path, data: bytes) -> None:
        """After an answer that was lost (a time-out, a 412 or 409 to a repeated request) the name may be taken by our own bytes."""
        is_unsure = False
        for attempt in range(ATTEMPTS):
            try:
                obstore.put(self._store, _key(path), data, mode="create", use_multipart=False)
                return
            except FAILED as error:
                found = self._read_or_none(path)
                if found == data:
                    return
                if found is not None:
                    raise FileExistsError(errno.EEXIST, "File exists", str(path)) from error
                is_unsure |= not isinstance(error, REFUSED)
                if attempt == ATTEMPTS - 1 or isinstance(error, REFUSED):  # a 409 (two requests met) comes as AlreadyExistsError too
                    failed = _os_error(error, path)
                    raise NoAnswer(failed.errno, failed.strerror, str(path)) if is_unsure else failed from error
            self._sleep(0.1 * 4**attempt)

    def _read_or_none(self, path: Path) -> bytes | None:
        try:
            return self.read(path)
        except OSError:
            return None

    def put_group(self, group: Path, items: Iterable[Item]) -> None:
        with ThreadPoolExecutor(WRITERS, "checkpoint-put") as pool:
            for done in [pool.submit(self._put, group / name / file, buffers) for name, files in items for file, buffers in files]:
                done.result()

    def _put(self, path: Path, buffers: Sequence[Buffer]) -> None:
        size = sum(len(buffer) for buffer in buffers)
        try:
            if size <= WHOLE_BYTES:
                obstore.put(self._store, _key(path), b"".join(buffers), use_multipart=False)
            else:
                obstore.put(self._store, _key(path), (bytes(buffer) for buffer in buffers), use_multipart=True, chunk_size=16 << 20)
        except FAILED as error:
            raise _os_error(error, path) from error

    def read(self, path: Path) -> bytes:
        try:
            found = bytes(obstore.get(self._store, _key(path)).bytes())
        except FAILED as error:
            raise _os_error(error, path) from error
        self._count(len(found))
        return found

    def read_into(self, path: Path, offset: int, views: Sequence[memoryview]) -> int:
        length = sum(view.nbytes for view in views)
        if not length:
            return 0
        try:
            data = memoryview(obstore.get_range(self._store, _key(path), start=offset, length=length))
        except FAILED as error:
            raise _os_error(error, path) from error
        position = 0
        for view in views:
            part = data[position : position + view.nbytes]
            view.cast("B")[: len(part)] = part
            position += len(part)
        self._count(len(data))
        return len(data)

    def _count(self, num_bytes: int) -> None:
        with self._counting:
            self.bytes_read += num_bytes

    def size(self, path: Path) -> int:
        try:
            return obstore.head(self._store, _key(path))["size"]
        except FAILED as error:
            raise _os_error(error, path) from error

    def exists(self, path: Path) -> bool:
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def is_folder(self, path: Path) -> bool:
        return bool(self.list(path))

    def list(self, path: Path) -> list[str]:
        try:
            found = obstore.list_with_delimiter(self._store, f"{_key(path)}/")
        except FAILED as error:
            raise _os_error(error, path) from error
        keys = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return sorted(key.rstrip("/").rpartition("/")[2] for key in keys)

    def remove(self, path: Path) -> None:
        self._delete([_key(path)], path)

    def remove_tree(self, path: Path) -> None:
        self._delete(list(self._below(path)), path)

    def settle(self, path: Path) -> None:
        """Every answer of an object store is final."""

    def _below(self, path: Path) -> Iterator[str]:
        try:
            for batch in obstore.list(self._store, f"{_key(path)}/"):
                yield from (entry["path"] for entry in batch)
        except FAILED as error:
            raise _os_error(error, path) from error

    def _delete(self, keys: Sequence[str], path: Path) -> None:
        try:
            if keys:
                obstore.delete(self._store, keys)
        except FileNotFoundError:
            pass
        except FAILED as error:
            raise _os_error(error, path) from error


def _key(path: Path) -> str:
    return "/".join(path.parts[2:])


def _os_error(error: Exception, path: Path) -> OSError:
    if isinstance(error, FileNotFoundError):
        return not_found(path)
    if isinstance(error, AlreadyExistsError):
        return FileExistsError(errno.EEXIST, "File exists", str(path))
    if isinstance(error, REFUSED):
        return PermissionError(errno.EACCES, "The object store denies access", str(path))
    return OSError(errno.EIO, " ".join(str(error).partition("Debug source")[0].split())[:300], str(path))
