"""Large files are written past the page cache and hold the same bytes as any other."""

import errno
import fcntl
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.store import direct
from moetrain.store.direct import ALIGNMENT
from moetrain.store.io import Io

BLOCKS = 3 * ALIGNMENT


class Direct(Io):
    direct_bytes = 1


@pytest.fixture(autouse=True)
def small_staging(monkeypatch):
    monkeypatch.setattr(direct, "STAGING_BYTES", 2 * ALIGNMENT)


@pytest.fixture
def lengths(monkeypatch) -> list[int]:
    """Of every direct write."""
    found, real = list[int](), os.write

    def write(descriptor: int, data: memoryview) -> int:
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
        found.append(len(data))
        return real(descriptor, data)

    monkeypatch.setattr(direct.os, "write", write)
    return found


@given(st.lists(st.sampled_from([0, 1, 4, ALIGNMENT - 4, ALIGNMENT, ALIGNMENT + 1, 2 * ALIGNMENT + 3]), max_size=8))
def test_any_pieces_make_the_file_that_they_are(tmp_path_factory, sizes):
    buffers = [os.urandom(size) for size in sizes]
    path = tmp_path_factory.mktemp("direct") / "a"
    assert Direct().write_new(path, buffers) == sum(sizes)
    assert path.read_bytes() == b"".join(buffers)


def test_whole_blocks_go_to_the_disk_directly_and_the_rest_as_usual(tmp_path, lengths):
    if not takes_direct_writes(tmp_path):
        pytest.skip("this file system takes no direct writes")
    content = os.urandom(BLOCKS + 5)
    Direct().write_new(tmp_path / "a", [content])
    assert lengths == [2 * ALIGNMENT, ALIGNMENT]
    assert (tmp_path / "a").read_bytes() == content


def test_small_files_go_through_the_cache(tmp_path, lengths):
    Io().write_new(tmp_path / "a", [bytes(BLOCKS)])
    assert lengths == []


@pytest.mark.parametrize("wanted", [1 << 20, 2 * ALIGNMENT])
def test_a_file_system_that_refuses_a_length_gets_the_usual_writes(tmp_path, monkeypatch, wanted):
    real = os.write

    def write(descriptor: int, data: memoryview) -> int:
        if len(data) % wanted:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, data)

    monkeypatch.setattr(direct.os, "write", write)
    content = os.urandom(BLOCKS)
    assert Direct().write_new(tmp_path / "a", [content]) == BLOCKS
    assert (tmp_path / "a").read_bytes() == content


def test_a_file_system_without_direct_writes_gets_the_usual_ones(tmp_path, monkeypatch):
    real = fcntl.fcntl

    def refuse(descriptor: int, operation: int, flags: int = 0) -> int:
        if operation == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, operation, flags)

    monkeypatch.setattr(direct.fcntl, "fcntl", refuse)
    content = os.urandom(BLOCKS)
    Direct().write_new(tmp_path / "a", [content])
    assert (tmp_path / "a").read_bytes() == content


@pytest.mark.parametrize("most", [100, ALIGNMENT])
def test_writes_that_are_cut_short_are_continued(tmp_path, monkeypatch, most):
    def write(descriptor: int, data: memoryview) -> int:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)  # which would not take part of a block
        written = os.writev(descriptor, [data[:most]])
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        return written

    monkeypatch.setattr(direct.os, "write", write)
    content = os.urandom(BLOCKS)
    Direct().write_new(tmp_path / "a", [content])
    assert (tmp_path / "a").read_bytes() == content


def test_an_error_in_the_middle_is_an_error(tmp_path):
    calls = list[str]()

    def full(operation: str, path: Path) -> None:
        calls.append(operation)
        if calls.count("write") == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(OSError, match="No space left"):
        Direct(full).write_new(tmp_path / "a", [bytes(BLOCKS)])
    assert "fsync" not in calls


def takes_direct_writes(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True
