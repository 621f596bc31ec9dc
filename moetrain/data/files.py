"""Which files the sources of a corpus stand for: files, folders, and this Python's own standard library. Reads none of them."""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moetrain.base.errors import DataError

STDLIB = "stdlib"
COMPRESSED = (".gz", ".zst")
RECORDS = (".jsonl", ".ndjson", ".parquet")
_TEXT = """
.txt .text .md .markdown .rst .adoc .tex .html .htm .xml .csv .tsv .json .yaml .yml .toml .ini .cfg .conf .log .sql
.py .pyi .pyx .c .h .cc .cpp .cxx .hpp .cu .cuh .java .kt .scala .js .jsx .ts .tsx .go .rs .rb .php .pl .lua .swift .cs .sh .r
.jl .hs .ml .lisp .el .clj .ex .erl .m .f90 .asm .s .cmake .mk
"""
TEXT = tuple(_TEXT.split())

# Tests, tables and generated code say little about how Python is written; the last two describe the machine Python was built on.
_STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
_STDLIB_BUILD_RECORDS = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source. `name` is its path relative to the source, with slashes: what the split is decided by."""

    name: str
    path: Path
    num_bytes: int

    @property
    def format(self) -> str:
        """jsonl | parquet | text, by the suffix below any compression suffix."""
        suffix = self.suffix
        return "parquet" if suffix == ".parquet" else "jsonl" if suffix in RECORDS else "text"

    @property
    def compression(self) -> str:
        """gz | zst | "" """
        suffix = self.path.suffix.lower()
        return suffix[1:] if suffix in COMPRESSED else ""

    @property
    def suffix(self) -> str:
        name = Path(self.name)
        return (Path(name.stem) if name.suffix.lower() in COMPRESSED else name).suffix.lower()


def list_files(sources: Iterable[str], left_out: Path | None = None) -> list[SourceFile]:
    """The files of all sources, in the order of the sources and sorted by name inside each.

    Folders are searched for every file, whatever its suffix, without hidden folders and without the folder `left_out` (the output).
    DataError: a source that does not exist or cannot be read, a file of unknown suffix, a folder without files.
    """
    return [file for source in sources for file in _files_of(source, left_out)]


def fingerprint(files: Iterable[SourceFile]) -> str:
    """Changes when a file appears, disappears or changes its size; the same wherever the files lie."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.num_bytes}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _files_of(source: str, left_out: Path | None) -> list[SourceFile]:
    if source == STDLIB:
        return stdlib_files()
    path = Path(source)
    if path.is_dir():
        files = [_source_file(path, found) for found in _walk(path, left_out)]
        if not files:
            raise DataError(f"The folder {source} holds no files.", "Hidden files and folders are not read.")
        return files
    if not path.exists():
        raise DataError(f"The source {source} does not exist.", f"Give a file, a folder, or the word {STDLIB}.")
    file = _source_file(path.parent, path)
    if file.suffix and file.suffix not in TEXT + RECORDS:
        known = f"{', '.join(RECORDS)}, text files such as .txt .md .py, and any of these with {' or '.join(COMPRESSED)}"
        hint = f"Known: {known}. A folder as source is read file by file whatever the suffix."
        raise DataError(f"What {source} holds cannot be told from its suffix {file.suffix!r}.", hint)
    return [file]


def stdlib_files() -> list[SourceFile]:
    """The standard library's own Python files on this machine: no tests, no tables (`encodings`, `pydoc_data`), no installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    return [
        _source_file(root, path)
        for path in _walk(root, None)
        if path.suffix == ".py" and not path.is_symlink() and not _is_left_out(path.relative_to(root))
    ]


def _is_left_out(name: Path) -> bool:
    return not _STDLIB_LEFT_OUT.isdisjoint(name.parts) or name.parts[0].startswith(_STDLIB_BUILD_RECORDS)


def _walk(root: Path, left_out: Path | None) -> Iterator[Path]:
    """Visible files below `root`, sorted by their path with slashes; folders behind links are not entered."""
    found: list[Path] = []
    folders = [root]
    while folders:
        try:
            entries = list(folders.pop().iterdir())
        except OSError as error:
            raise DataError(f"The folder {error.filename} cannot be read: {error.strerror}.", "Check its permissions.") from error
        visible = [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__pycache__"]
        folders += [e for e in visible if e.is_dir() and not e.is_symlink() and (left_out is None or e.resolve() != left_out.resolve())]
        found += [entry for entry in visible if entry.is_file()]
    return iter(sorted(found, key=lambda path: path.relative_to(root).as_posix()))


def _source_file(root: Path, path: Path) -> SourceFile:
    return SourceFile(path.relative_to(root).as_posix(), path, path.stat().st_size)
