"""Sources to files to documents: what is read, what is left out and counted, what is refused."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from moetrain.base.errors import DataError
from moetrain.data.documents import Document, read_documents
from moetrain.data.files import fingerprint, list_files, stdlib_files

TEXTS = ["first é", "", "third\r\n🙂"]
WRITTEN = [Document("0", "first é"), Document("2", "third\r\n🙂")]


def read(*sources: Path | str) -> tuple[list[Document], dict[str, int]]:
    skipped: Counter[str] = Counter()
    return list(read_documents(list_files([str(source) for source in sources]), skipped, lambda _: None)), dict(skipped)


def compressed(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    return zstandard.ZstdCompressor().compress(content) if suffix == ".zst" else content


def jsonl(texts: list[str]) -> bytes:
    return "\n".join(json.dumps({"id": 1, "text": text}) for text in texts).encode()


def parquet_bytes(texts: list[str | None], column: str = "text") -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), column: texts}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_records_are_numbered_documents(tmp_path: Path, form: str, suffix: str) -> None:
    content = jsonl(TEXTS) if form == "jsonl" else parquet_bytes([*TEXTS])
    path = tmp_path / f"corpus.{form}{suffix}"
    path.write_bytes(compressed(content, suffix))
    documents, skipped = read(path)
    assert documents == [Document(f"{path.name}#{number}", text) for number, text in WRITTEN]
    assert skipped == {"empty": 1}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    text = "\ufeffone\r\ntwo\n\n🙂"
    path = tmp_path / f"notes.txt{suffix}"
    path.write_bytes(compressed(text.encode(), suffix))
    assert read(path) == ([Document(path.name, text)], {})


def test_zstd_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt.zst"
    path.write_bytes(compressed(b"one ", ".zst") + compressed(b"two", ".zst"))
    assert read(path)[0] == [Document("notes.txt.zst", "one two")]


def test_a_folder_is_read_file_by_file_in_the_order_of_names(tmp_path: Path) -> None:
    for name, content in {
        "b/code.weird": b"code",
        "a.txt": b"a",
        "a/z.jsonl": jsonl(["record"]),
        "b.bin": b"ELF\0\1",
        "c.latin": "é".encode("latin-1"),
        "empty.py": b"",
        ".git/config": b"hidden",
        "__pycache__/x.pyc": b"compiled",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    documents, skipped = read(tmp_path)
    assert documents == [Document("a.txt", "a"), Document("a/z.jsonl#0", "record"), Document("b/code.weird", "code")]
    assert skipped == {"binary": 1, "not UTF-8": 1, "empty": 1}


def test_several_sources_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "x.py").write_text("x")
    (tmp_path / "y.md").write_text("y")
    assert read(tmp_path / "y.md", tmp_path / "tree")[0] == [Document("y.md", "y"), Document("x.py", "x")]


def test_the_output_folder_is_never_its_own_source(tmp_path: Path) -> None:
    for name in ("keep.txt", "out/train.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [file.name for file in list_files([str(tmp_path)], left_out=tmp_path / "out")] == ["keep.txt"]


def test_bytes_read_from_disk_are_reported(tmp_path: Path) -> None:
    paths = [tmp_path / "a.txt", tmp_path / "b.jsonl.gz", tmp_path / "c.parquet"]
    for path, content in zip(paths, [b"x" * 5000, gzip.compress(jsonl(["y" * 5000])), parquet_bytes(["z"])], strict=True):
        path.write_bytes(content)
    counted: list[int] = []
    files = list_files([str(path) for path in paths[:2]])
    list(read_documents(files, Counter(), counted.append))
    assert sum(counted) == sum(file.num_bytes for file in files)


def test_half_a_surrogate_pair_in_json_is_counted_as_not_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "\\ud800"}\n{"text": "nul \\u0000"}\n{"text": "\xff"}\n{"text": "good"}\n')
    assert read(path) == ([Document("bad.jsonl#3", "good")], {"not UTF-8": 2, "binary": 1})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("letter.docx", b"x", r"suffix '\.docx'"),
        ("broken.jsonl", b'{"text": "a"}\n{"text":', "line 2 is not JSON"),
        ("other.jsonl", b'{"content": "a"}', "line 1 has no string under the key 'text'"),
        ("list.jsonl", b"[1]", "line 1 has no string"),
        ("other.parquet", parquet_bytes(["a"], "body"), "has no column 'text'"),
        ("broken.parquet", b"PAR1 not really", "cannot be read as parquet"),
        ("broken.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-20], "cannot be read"),
        ("broken.txt.zst", b"nothing", "cannot be read"),
    ],
)
def test_unreadable_sources_are_refused_by_name(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as refusal:
        read(tmp_path / name)
    assert name in refusal.value.message


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no files"):
        read(tmp_path)


def test_numbers_as_text_column_are_refused(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(DataError, match="holds int, not strings"):
        read(tmp_path / "n.parquet")


def test_the_standard_library_comes_without_tests_tables_and_packages() -> None:
    names = [file.name for file in stdlib_files()]
    assert {"argparse.py", "asyncio/tasks.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names)
    assert all(name.endswith(".py") for name in names)
    left_out = {"test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
    assert not [name for name in names if left_out & set(name.split("/"))]
    assert not [name for name in names if name.startswith(("_sysconfigdata", "config-"))]
    assert 4_000_000 < sum(file.num_bytes for file in stdlib_files()) < 20_000_000


def test_the_fingerprint_sees_names_and_sizes_and_not_the_place(tmp_path: Path) -> None:
    def of(folder: str, name: str, text: str) -> str:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
        return fingerprint(list_files([str(tmp_path / folder)]))

    first = of("one", "a.txt", "text")
    assert of("three", "b.txt", "text") != first
    assert of("four", "a.txt", "longer") != first
    assert of("elsewhere", "a.txt", "text") == first
