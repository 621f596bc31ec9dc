"""A damaged checkpoint at a load: what is taken from an older one, what is passed over, and how all ranks hear of it."""

import os
import shutil
import threading
from pathlib import Path

import pytest

from moetrain.base.errors import CheckpointError
from moetrain.checkpoint import recover
from moetrain.checkpoint.recover import agreed_choice, together
from tests.unit.checkpoint_kit import BANKS, Job, assert_equal, expected, experts_by_step, flip, manifests, objects_of, state_of


def hurt(file: Path, damage: str) -> None:
    if damage == "flip":
        flip(file, file.stat().st_size // 3)
    elif damage == "truncate":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "empty":
        os.truncate(file, 0)
    else:
        file.unlink()


@pytest.mark.parametrize("file", ["c.0", "zarr.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete"])
def test_damaged_expert_comes_from_the_older_checkpoint_that_has_it(tmp_path, file, damage):
    job = Job(tmp_path, 1, 1)
    job.save(1)
    job.save(2)
    newest = manifests(tmp_path)[0]
    group = next(group for group, age in newest.ages().items() if age == 0)
    (folder,) = objects_of(tmp_path, newest, f"{group[0]}.{group[1]}.")
    hurt(folder / file, damage)
    again = Job(tmp_path, 1, 1)
    report, whole = again.load()
    experts = experts_by_step(newest) | {group: 1}
    assert_equal(whole, expected(2, experts))
    assert report is not None
    assert report.ages[group] == 1
    assert any(str(folder) in line for line in report.damaged)
    assert any(f"Expert {group[1]} of {group[0]} is taken from the checkpoint of step 1" in line for line in report.lines())
    again.save(3)
    assert manifests(tmp_path)[0].full  # nothing refers to the damaged object any more


def test_damage_that_only_one_rank_reads_is_passed_over_by_all(tmp_path):
    job = Job(tmp_path, 2, 2)
    job.save(1)
    job.save(2)
    newest = manifests(tmp_path)[0]
    fresh = [group for group, age in newest.ages().items() if age == 0]
    bank, expert = next(group for group in fresh if group not in {(p.bank, p.expert) for p in state_of(0, 2, 2, 0)})
    (folder,) = objects_of(tmp_path, newest, f"{bank}.{expert}.")
    flip(folder / "c.0", 3)
    again = Job(tmp_path, 2, 2)
    report, whole = again.load()  # as rank 0, which never reads that object, tells it
    assert_equal(whole, expected(2, experts_by_step(newest) | {(bank, expert): 1}))
    assert report is not None
    assert any(str(folder) in line for line in report.damaged)
    assert all(pending.committed for pending in again.save(3))
    assert manifests(tmp_path)[0].full


def test_a_finding_that_the_others_cannot_hear_ends_the_load():
    with pytest.raises(CheckpointError, match=r"c\.0 is damaged"):
        together(lambda: {"object": "c.0 is damaged"}, lambda value: [[{}, None, ""]])


def test_ranks_that_wait_for_a_slow_disk_meet_in_short_steps(monkeypatch):
    monkeypatch.setattr(recover, "MEET_SECONDS", 0.001)
    meetings, slow = [], threading.Event()

    def gather(value: object) -> list[object]:
        meetings.append(value)
        if len(meetings) == 3:
            slow.set()
        return [value]

    assert together(lambda: slow.wait(60), gather) == [True]
    assert meetings[:3] == [None] * 3


def test_damaged_dense_object_means_the_previous_checkpoint(tmp_path):
    job = Job(tmp_path, 1, 1)
    job.save(1)
    job.save(2)
    (folder,) = objects_of(tmp_path, manifests(tmp_path)[0], "dense.")
    flip(folder / "c.0", 3)
    report, whole = Job(tmp_path, 1, 1).load()
    assert_equal(whole, expected(1))
    assert report is not None
    assert report.step == 1
    assert any("step 2" in line and "cannot be restored" in line for line in report.damaged)


def test_swapped_objects_are_noticed_although_each_is_intact(tmp_path):
    Job(tmp_path, 1, 1).save(1)
    point = manifests(tmp_path)[0]
    a, b = (objects_of(tmp_path, point, f"{BANKS[0]}.{expert}.")[0] / "c.0" for expert in (0, 1))
    a_bytes = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(a_bytes)
    with pytest.raises(CheckpointError, match="not the ones in the manifest"):
        Job(tmp_path, 1, 1).load()


def test_damaged_manifest_is_passed_over_with_its_name(tmp_path):
    job = Job(tmp_path, 1, 1)
    job.save(1)
    job.save(2)
    newest = sorted((tmp_path / "manifests").glob("*.json"))[-1]
    flip(newest, 100)
    report, whole = Job(tmp_path, 1, 1).load()
    assert_equal(whole, expected(1))
    assert report is not None
    assert newest.name in report.damaged[0]


def test_nothing_good_left_is_an_error_not_a_fresh_start(tmp_path):
    Job(tmp_path, 1, 1).save(1)
    for file in (tmp_path / "manifests").glob("*.json"):
        flip(file, 50)
    with pytest.raises(CheckpointError, match="can be restored") as caught:
        Job(tmp_path, 1, 1).load()
    assert "resume=never" in caught.value.hint


def test_of_much_damage_the_first_sentences_are_told_and_the_rest_counted(tmp_path):
    Job(tmp_path, 1, 1).save(1)
    shutil.rmtree(tmp_path / "objects")
    with pytest.raises(CheckpointError, match=r"And \d+ more like these; `moetrain checkpoint verify` names all\.") as error:
        agreed_choice(tmp_path, "must")
    assert error.value.message.count("objects") == 5
