"""The checkpoint folder: one owner, one outcome for each save, and a sweep that leaves what may still be needed."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from moetrain.base.errors import CheckpointError
from moetrain.store.backend import FolderBackend, NoAnswer
from moetrain.store.encode import encode
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest, ObjectRecord, Piece, SaveId, Tensor, by_key
from moetrain.store.objects import CheckpointFolder, Superseded, resolve


def put(folder: CheckpointFolder, save: SaveId, step: int) -> str:
    share = folder.new_share(save, 0)
    folder.put_share(share, [("dense.float32", encode(np.full(4, step, np.float32), {}))])
    return f"{share}/dense.float32"


def manifest(save: SaveId, names: list[str]) -> Manifest:
    tensors = [Tensor(f"w{i}", "master", None, None, "float32", (4,), (Piece((0,), (4,), name),)) for i, name in enumerate(names)]
    records = {name: ObjectRecord(name, save.seq, 10, 0) for name in names}
    fields = {"save": save, "parent": None, "index": 0, "step": save.seq, "time": 0.0, "mode": "experts", "full": True, "new_bytes": 10}
    return Manifest(**fields, world=1, ep=1, progress={}, objects=records, tensors=by_key(tensors))  # type: ignore[arg-type]


def committed(folder: CheckpointFolder, save: SaveId, extra: tuple[str, ...] = ()) -> str:
    name = put(folder, save, save.seq)
    folder.commit(manifest(save, [name, *extra]))
    return name


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoint", Io())


def objects(folder: CheckpointFolder) -> set[str]:
    return {str(path.relative_to(folder.path / "objects")) for path in folder.path.glob("objects/*/*/*")}


def test_epochs_and_save_numbers_only_grow(folder):
    first = folder.claim(0.0)
    assert first == SaveId(1, 1)
    committed(folder, first)
    put(folder, SaveId(1, 5), 5)  # of a save that came to nothing
    assert folder.claim(0.0) == SaveId(2, 6)


def test_two_jobs_that_start_at_once_get_different_epochs(folder):
    first = CheckpointFolder(folder.path, Io())
    taken = []

    def other_job(operation: str, path: Path) -> None:
        if operation == "link" and not taken:
            taken.append(first.claim(0.0))

    late = CheckpointFolder(folder.path, Io(other_job)).claim(0.0)
    assert (taken[0].epoch, late.epoch) == (1, 2)
    with pytest.raises(Superseded, match="epoch 2, this job has 1"):
        committed(folder, taken[0])
    committed(folder, late)


def test_a_save_has_one_outcome_for_ever(folder):
    save = folder.claim(0.0)
    committed(folder, save)
    folder.abandon(save, "too late")
    assert folder.outcome(save) is True
    with pytest.raises(CheckpointError, match="decided before"):
        committed(folder, save)
    after = SaveId(1, 2)
    put(folder, after, 2)
    assert folder.outcome(after) is None
    folder.abandon(after, "a reason")
    assert folder.outcome(after) is False
    assert folder.reason(after) == "a reason"
    with pytest.raises(CheckpointError, match="decided before"):
        folder.commit(manifest(after, []))


def test_a_manifest_appears_only_if_its_name_is_free(folder, monkeypatch):
    save = folder.claim(0.0)
    committed(folder, save)
    monkeypatch.setattr(folder, "outcome", lambda save: None)  # a second writer that has not looked
    before = (folder.path / "manifests" / f"{save}.json").read_bytes()
    with pytest.raises(CheckpointError, match="decided before"):
        folder.commit(manifest(save, []))
    assert (folder.path / "manifests" / f"{save}.json").read_bytes() == before


def test_a_lost_answer_of_a_network_file_system_is_no_failure(folder, monkeypatch):
    real = os.link

    def link(source: Path, target: Path) -> None:
        real(source, target)
        raise FileExistsError(errno.EEXIST, "File exists", str(target))

    monkeypatch.setattr(os, "link", link)
    assert folder.claim(0.0) == SaveId(1, 1)


def test_a_file_system_without_hard_links_is_refused_at_the_start(folder, monkeypatch):
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", str(target))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        folder.claim(0.0)
    assert "hard links" in caught.value.hint


def test_sweep_keeps_what_live_manifests_name_and_what_is_newer(folder):
    save = folder.claim(0.0)
    names = [committed(folder, SaveId(1, 1))]
    names.append(committed(folder, SaveId(1, 2), (names[0],)))
    names.append(committed(folder, SaveId(1, 3), (names[0],)))
    in_flight = put(folder, SaveId(1, 4), 4)
    half_done = folder.path / "objects" / str(SaveId(1, 2)) / "00000-dead.part" / "dense.float32"
    half_done.mkdir(parents=True)
    folder.sweep(1, SaveId(1, 3))
    assert folder.saves() == [SaveId(1, 3)]
    assert objects(folder) == {names[0], names[2], in_flight}
    assert save.epoch == 1


def test_sweep_removes_manifests_before_any_object(folder):
    folder.claim(0.0)
    for seq in (1, 2, 3):
        committed(folder, SaveId(1, seq))
    order: list[str] = []
    watched = CheckpointFolder(folder.path, Io(lambda operation, path: order.append(f"{operation} {path.parent.name} {path.name}")))
    watched.sweep(1, SaveId(1, 3))
    gone = [i for i, line in enumerate(order) if line.startswith("unlink manifests")]
    synced = order.index("fsync_folder checkpoint manifests")
    assert len(gone) == 2
    assert max(gone) < synced < min(i for i, line in enumerate(order) if line.startswith("unlink dense"))


def test_sweep_touches_no_object_while_a_kept_manifest_is_unreadable(folder):
    folder.claim(0.0)
    names = {committed(folder, SaveId(1, seq)) for seq in (1, 2, 3)}
    newest = folder.path / "manifests" / f"{SaveId(1, 3)}.json"
    newest.write_bytes(newest.read_bytes()[:-3])
    (damage,) = folder.sweep(1, SaveId(1, 3))
    assert str(newest) in damage
    assert folder.saves() == [SaveId(1, 3), SaveId(1, 2)]
    assert objects(folder) == names


def test_sweep_of_a_superseded_job_does_nothing(folder):
    folder.claim(0.0)
    committed(folder, SaveId(1, 1))
    committed(folder, SaveId(1, 2))
    CheckpointFolder(folder.path, Io()).claim(0.0)
    with pytest.raises(Superseded):
        folder.sweep(1, SaveId(1, 2))
    assert len(folder.saves()) == 2


def test_share_is_invisible_until_all_of_it_is_durable(folder):
    save = folder.claim(0.0)
    log: list[tuple[str, str]] = []
    watched = CheckpointFolder(folder.path, Io(lambda operation, path: log.append((operation, path.name))))
    put(watched, save, 1)
    operations = [operation for operation, _ in log]
    renamed = operations.index("rename")
    assert operations[:renamed].count("open") == operations[:renamed].count("fsync") == 2
    assert operations[renamed:] == ["rename", "fsync_folder"]


def test_a_manifest_under_another_name_is_refused(folder):
    folder.claim(0.0)
    committed(folder, SaveId(1, 1))
    source = folder.path / "manifests" / f"{SaveId(1, 1)}.json"
    source.rename(source.with_name(f"{SaveId(1, 2)}.json"))
    with pytest.raises(CheckpointError, match="of another save"):
        folder.manifest(SaveId(1, 2))


def test_run_folder_and_checkpoint_folder_are_both_understood(folder, tmp_path):
    folder.claim(0.0)
    assert resolve(tmp_path) == resolve(folder.path) == folder.path
    with pytest.raises(CheckpointError, match="no checkpoint"):
        resolve(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("operation", "number", "is_unsure"),
    [
        ("link", errno.EIO, True),
        ("link", errno.ETIMEDOUT, True),
        ("link", errno.ENOSPC, False),
        ("fsync", errno.EIO, False),
        ("fsync_folder", errno.ENOSPC, True),
    ],
)
def test_only_a_name_that_may_be_there_is_no_answer(tmp_path, operation, number, is_unsure):
    """The removal of the temporary name fails as well, and hides nothing."""

    def fail(name: str, path: Path) -> None:
        if name in (operation, "unlink"):
            raise OSError(number, os.strerror(number), str(path))

    (tmp_path / "manifests").mkdir()
    with pytest.raises(OSError) as error:
        FolderBackend(Io(fail)).create(tmp_path / "manifests" / "x", b"content")
    assert (error.value.errno, isinstance(error.value, NoAnswer)) == (number, is_unsure)
