"""The documents inside source files: text, JSONL and parquet, plain or compressed. What is not text is counted, not guessed at."""

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard

from moetrain.base.errors import DataError
from moetrain.data.files import SourceFile

FIELD = "text"  # key of a JSONL record, column of a parquet file
_ROWS = 1024  # parquet rows in memory at a time


class Document(NamedTuple):
    """One text. `path` is the file's name inside its source, with `#number` (from 0) behind it for one record of many."""

    path: str
    text: str


def read_documents(files: Iterable[SourceFile], skipped: Counter[str], advance: Callable[[int], object]) -> Iterator[Document]:
    """Every document in order. Adds to `skipped` per reason (`empty`, `binary`, `not UTF-8`); calls `advance` with bytes read from disk.

    DataError: a file that cannot be opened or uncompressed, a record without a text.
    """
    for file in files:
        try:
            with _open(file, advance) as stream:
                for path, raw in _RECORDS_OF[file.format](file, stream):
                    text = _text(raw, skipped)
                    if text:
                        yield Document(path, text)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:  # the first three from gzip
            raise DataError(f"The source file {file.path} cannot be read: {error}.", "Check that it is whole and readable.") from error


class _Metered(io.RawIOBase):
    """A file that tells how much of it was read."""

    def __init__(self, path: Path, advance: Callable[[int], object]) -> None:
        self._file = path.open("rb", buffering=0)
        self._advance = advance

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        size = self._file.readinto(buffer) or 0
        self._advance(size)
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(file: SourceFile, advance: Callable[[int], object]) -> BinaryIO:
    raw = io.BufferedReader(_Metered(file.path, advance), 1 << 18)
    if file.compression == "gz":
        return gzip.GzipFile(fileobj=raw)  # pyright: ignore[reportReturnType]
    if file.compression == "zst":
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))  # pyright: ignore
    return raw


def _text(raw: bytes | str, skipped: Counter[str]) -> str:
    """The document's text, or "" and one more in `skipped`."""
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        text.encode("utf-8")  # JSON can smuggle in half a surrogate pair
    except UnicodeError:
        skipped["binary" if isinstance(raw, bytes) and b"\0" in raw else "not UTF-8"] += 1
        return ""
    if "\0" in text:
        skipped["binary"] += 1
        return ""
    if not text:
        skipped["empty"] += 1
    return text


def _whole(file: SourceFile, stream: BinaryIO) -> Iterator[tuple[str, bytes | str]]:
    yield file.name, stream.read()


def _jsonl(file: SourceFile, stream: BinaryIO) -> Iterator[tuple[str, bytes | str]]:
    number = 0
    for line_number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        where = f"{file.path}, line {line_number}"
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            yield f"{file.name}#{number}", line  # counted as not UTF-8
        except ValueError as error:
            raise DataError(f"{where} is not JSON: {error}.", "JSONL holds one JSON object per line.") from error
        else:
            text = record.get(FIELD) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise DataError(f"{where} has no string under the key {FIELD!r}.", "Every record carries its document there.")
            yield f"{file.name}#{number}", text
        number += 1


def _parquet(file: SourceFile, stream: BinaryIO) -> Iterator[tuple[str, bytes | str]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(io.BytesIO(stream.read()) if file.compression else stream)
        if FIELD not in table.schema_arrow.names:
            raise DataError(f"{file.path} has no column {FIELD!r}.", f"Its columns: {', '.join(table.schema_arrow.names)}.")
        number = 0
        for batch in table.iter_batches(batch_size=_ROWS, columns=[FIELD]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise DataError(f"The column {FIELD!r} of {file.path} holds {type(text).__name__}, not strings.")
                yield f"{file.name}#{number}", text or ""
                number += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"The source file {file.path} cannot be read as parquet: {error}.") from error


_RECORDS_OF: dict[str, Callable[[SourceFile, BinaryIO], Iterator[tuple[str, bytes | str]]]] = {
    "text": _whole,
    "jsonl": _jsonl,
    "parquet": _parquet,
}
