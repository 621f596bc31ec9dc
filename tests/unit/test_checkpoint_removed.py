"""A manifest that somebody removed is named at the next resume; a save that was interrupted or given up, a sweep and a pin are not."""

import logging
from pathlib import Path

import pytest

from moetrain.checkpoint.removed import removed
from moetrain.store.io import Io
from moetrain.store.manifest import SaveId
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import Job, LocalNode


def saved(path: Path, steps: int, world: int = 1, keep: int = 3) -> CheckpointFolder:
    job = Job(path, world, world, keep=keep)
    for step in range(1, steps + 1):
        job.save(step)
    return CheckpointFolder(path, Io())


def unlink(folder: CheckpointFolder, seq: int) -> None:
    (folder.path / "manifests" / f"{SaveId(1, seq)}.json").unlink()


def test_a_manifest_removed_from_the_middle_is_named_once_by_rank_0(tmp_path, caplog):
    unlink(saved(tmp_path, 3), 2)
    with caplog.at_level(logging.WARNING):
        Job(tmp_path, 2, 2).load()
    said = [record.getMessage() for record in caplog.records if "gone" in record.getMessage()]
    assert said == ["The checkpoint seq 2, on which seq 3 was built, is gone although older ones are still there."]


def test_the_newest_manifest_of_several_ranks_is_missed(tmp_path, caplog):
    unlink(saved(tmp_path, 3, world=2), 3)
    with caplog.at_level(logging.WARNING):
        Job(tmp_path, 2, 2).load()
    said = [record.getMessage() for record in caplog.records if "gone" in record.getMessage()]
    assert said == ["A checkpoint newer than seq 2 was committed, and its manifest is gone: seq 3."]


@pytest.mark.parametrize("world", [1, 2])
def test_an_interrupted_save_is_not_taken_for_a_removed_one(tmp_path, world):
    folder = saved(tmp_path, 2, world)
    folder.put_share(folder.new_share(SaveId(1, 3), 0), [])
    folder.put_receipt(SaveId(1, 3), 1, {})  # all is written but the manifest
    assert folder.unfinished() == [SaveId(1, 3)]
    assert list(removed(folder, 3)) == []


def test_a_save_that_was_given_up_is_not_taken_for_a_removed_one(tmp_path):
    folder = saved(tmp_path, 2, world=2)
    folder.put_share(folder.new_share(SaveId(1, 3), 0), [])
    folder.abandon(SaveId(1, 3), "a reason")
    assert list(removed(folder, 3)) == []


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_what_sweeps_took_is_not_missed(tmp_path, keep):
    folder = saved(tmp_path, 2, world=2, keep=keep)
    folder.pin("old", folder.saves()[-1])
    again = Job(tmp_path, 2, 2, keep=keep, nodes=[LocalNode(), LocalNode()])
    again.load()
    for step in range(3, 8):
        again.save(step)
    assert list(removed(folder, keep)) == []
    folder.unpin("old")
    assert list(removed(folder, keep)) == []


def test_a_prune_and_a_save_that_is_interrupted_afterwards_are_not_missed(tmp_path):
    folder = saved(tmp_path, 3, world=2)
    folder.prune(1, take_over=True)
    save = folder.claim(0.0)
    folder.put_share(folder.new_share(save, 0), [])
    assert folder.unfinished() == [save]
    assert list(removed(folder, 3)) == []
