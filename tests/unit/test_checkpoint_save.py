"""Saving and resuming: partial checkpoints, other layouts, what is given up and what is never lost."""

import errno
import os
import threading
from pathlib import Path

import pytest
import torch

from moetrain.base.clock import SystemClock
from moetrain.base.errors import CheckpointError
from moetrain.checkpoint import recover
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.recover import agreed_choice, alone, restore, together, whole_tensors
from moetrain.model.state import Box, Fragment
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import BANKS, NUM_EXPERTS, Job, LocalNode, assert_equal, expected, state_of


def manifests(folder: Path) -> list[Manifest]:
    return [point for point in CheckpointFolder(folder, Io()).history() if isinstance(point, Manifest)]


def experts_by_step(manifest: Manifest) -> dict[tuple[str, int], int]:
    return {group: manifest.step - age for group, age in manifest.ages().items()}


def objects_of(folder: Path, manifest: Manifest, label: str) -> list[Path]:
    return [folder / "objects" / name for name in manifest.objects if Path(name).name.startswith(label)]


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 0x10
    file.write_bytes(bytes(data))


def test_first_save_is_full_and_comes_back_bit_for_bit(tmp_path):
    job = Job(tmp_path, 1, 1)
    assert job.load()[0] is None
    job.save(10)
    report, whole = Job(tmp_path, 1, 1).load("must")
    assert_equal(whole, expected(10))
    assert report is not None
    assert (report.step, report.seq, report.progress) == (10, 1, {"step": 10, "samples": 80})
    assert set(report.ages.values()) == {0}


def test_partial_saves_write_k_experts_per_layer_and_keep_the_rest_by_reference(tmp_path):
    job = Job(tmp_path, 2, 2, experts_per_save=1, keep=10)
    for step in (10, 20, 30, 40, 50):
        assert all(pending.committed for pending in job.save(step))
    points = manifests(tmp_path)
    assert [point.full for point in points] == [False] * 4 + [True]
    for point in points[:-1]:
        fresh = [group for group, age in point.ages().items() if age == 0]
        assert sorted(bank for bank, _ in fresh) == sorted(BANKS)
        assert point.new_bytes < points[-1].new_bytes
    assert max(points[0].ages().values()) == 30  # after E / K partial checkpoints nobody is as old as the full one
    report, whole = Job(tmp_path, 2, 2).load()
    assert_equal(whole, expected(50, experts_by_step(points[0])))
    assert report is not None
    assert report.ages == points[0].ages()


def test_an_experts_own_adam_step_is_as_old_as_its_moments(tmp_path):
    job = Job(tmp_path, 1, 1)
    job.save(10)
    job.save(20)
    (point, _) = manifests(tmp_path)
    assert point.adam_steps() == experts_by_step(point)


def test_last_save_is_full_on_request_and_every_nth_by_configuration(tmp_path):
    job = Job(tmp_path, 1, 1, full_every=3, keep=10)
    for step in range(1, 6):
        job.save(step, full=step == 5)
    assert [point.full for point in manifests(tmp_path)] == [True, True, False, False, True]
    job = Job(tmp_path / "all", 1, 1, mode="full", keep=10)
    job.save(1)
    job.save(2)
    assert [point.full for point in manifests(tmp_path / "all")] == [True, True]


def test_rotation_goes_on_after_a_resume_without_a_new_full_save(tmp_path):
    job = Job(tmp_path, 1, 1, keep=10)
    job.save(1)
    job.save(2)
    again = Job(tmp_path, 2, 2, keep=10)
    again.load()
    again.save(3)
    newest, before, _ = manifests(tmp_path)
    assert not newest.full
    assert newest.parent == before.save
    assert newest.index == 2
    assert not {g for g, age in newest.ages().items() if age == 0} & {g for g, age in before.ages().items() if age == 0}


@pytest.mark.parametrize("sharded", [False, True])
def test_any_layout_resumes_what_another_saved(tmp_path, sharded):
    experts = {}
    layouts = [(4, 4, sharded), (4, 2, True), (2, 2, sharded), (1, 1, False), (3, 3, sharded), (2, 1, True)]
    for step, (world, ep, cut) in enumerate(layouts, 1):
        job = Job(tmp_path, world, ep, cut, experts_per_save=2)
        report, whole = job.load()
        if report is not None:
            assert_equal(whole, expected(step - 1, experts))
            assert any(f"is loaded by {world}" in line for line in report.remapped) == (manifests(tmp_path)[0].world != world)
        assert all(pending.committed for pending in job.save(step))
        experts = experts_by_step(manifests(tmp_path)[0])
    assert manifests(tmp_path)[0].step == 6


def test_replicas_share_the_writing(tmp_path):
    Job(tmp_path, 4, 2).save(1)
    (point,) = manifests(tmp_path)
    by_rank = {rank: sum(r.num_bytes for r in point.objects.values() if f"/{rank:05d}-" in r.name) for rank in range(4)}
    assert all(by_rank.values())
    assert point.ep == 2


def test_another_number_type_is_converted_and_said(tmp_path):
    Job(tmp_path, 1, 1).save(1)
    state = state_of(0, 1, 1, -1)
    for piece in state:
        piece.data = piece.data.to(torch.float64) if piece.component != "step" else piece.data
    choice = agreed_choice(tmp_path, "must")
    assert choice is not None
    report = restore(choice, state, 1)
    assert report.is_converted
    assert "float32 to float64" in report.remapped[0]
    assert torch.equal(state[0].data.float(), expected(1)[state[0].key])


def test_bfloat16_and_empty_arrays_round_trip(tmp_path):
    state = [
        Fragment("a", "master", None, None, (7,), Box.whole((7,)), (0,), torch.randn(7).bfloat16()),
        Fragment("b", "step", None, None, (), Box.whole(()), (0,), torch.tensor(3)),
        Fragment("c", "step", "blocks.0.moe.experts", 0, (), Box.whole(()), (0,), torch.tensor(5)),
    ]
    saved = [piece.data.clone() for piece in state]
    one = Checkpointer(tmp_path, CheckpointConfig(), 0, 1, alone, SystemClock(), LocalNode())
    one.save(state, {"step": 1})
    one.finish()
    for piece in state:
        piece.data.zero_()
    one.load(state, "must")
    assert all(torch.equal(piece.data, old) for piece, old in zip(state, saved, strict=True))


def test_whole_parameters_are_read_for_export(tmp_path):
    Job(tmp_path, 4, 2, sharded=True).save(3)
    choice = agreed_choice(tmp_path, "must")
    assert choice is not None
    found = dict(whole_tensors(choice))
    assert torch.equal(found["embedding.weight"], expected(3)["embedding.weight:master"])
    name = f"{BANKS[0]}.down_proj"
    assert found[name].shape == (NUM_EXPERTS, 3, 2)
    assert torch.equal(found[name][2], expected(3)[f"{name}:master:2"])


def test_missing_receipt_abandons_this_save_and_the_next_takes_the_same_experts(tmp_path):
    job = Job(tmp_path, 2, 2)
    job.save(1)
    job.nodes[1].dead = True
    lost = job.save(2)
    assert not any(pending.committed for pending in lost)
    assert "rank 1" in lost[0].reason
    assert job.ranks[0].status().failures == 1
    assert not (tmp_path / "objects" / str(lost[0].save)).exists()
    job.nodes[1].dead = False
    assert all(pending.committed for pending in job.save(3))
    newest, first = manifests(tmp_path)
    assert newest.index == first.index + 1
    with pytest.raises(CheckpointError, match=r"no receipt|not committed") as caught:
        job.nodes[0].dead = True
        job.save(4)
        job.ranks[0].finish()
    assert "step 3" in caught.value.hint


FAILURES = {"mkdir": errno.ENOSPC, "write": errno.ENOSPC, "fsync": errno.EIO, "rename": errno.EIO, "link": errno.ENOSPC}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("operation", FAILURES)
def test_failing_disk_never_stops_training_or_hurts_old_checkpoints(tmp_path, rank, operation):
    job = Job(tmp_path, 2, 2)
    job.save(1)
    job.settings.timeout_seconds = 0.1  # a rank that cannot even hand in a receipt is waited for
    broken = [True]

    def fail(name: str, path: Path) -> None:
        if broken[0] and name == operation:
            raise OSError(FAILURES[name], os.strerror(FAILURES[name]), str(path))

    job.nodes[rank].io = Io(fail)
    assert not any(pending.committed for pending in job.save(2))
    broken[0] = False
    job.settings.timeout_seconds = 60
    assert_equal(Job(tmp_path / "none", 1, 1).load(str(tmp_path))[1], expected(1))
    assert all(pending.committed for pending in job.save(3))
    assert not list(tmp_path.glob("objects/*/*.part"))
    left = {path.parent.parent.name for path in tmp_path.glob("objects/*/*/*")}
    assert left == {str(point.save) for point in manifests(tmp_path)}


def test_a_second_job_takes_over_and_the_first_can_not_commit(tmp_path):
    old = Job(tmp_path, 1, 1)
    old.save(1)
    new = Job(tmp_path, 1, 1)
    new.load()
    assert not old.save(2)[0].committed
    with pytest.raises(CheckpointError, match="taken over"):
        old.ranks[0].save(old.states(3)[0], {"step": 3})
    assert new.save(2)[0].committed
    assert [point.save.epoch for point in manifests(tmp_path)] == [2, 1]


def test_keep_limits_recovery_points_and_everything_they_need_stays(tmp_path):
    job = Job(tmp_path, 1, 1, keep=2)
    for step in range(1, 8):
        job.save(step)
    points = manifests(tmp_path)
    assert [point.step for point in points] == [7, 6]
    on_disk = {str(path.relative_to(tmp_path / "objects")) for path in (tmp_path / "objects").glob("*/*/*")}
    assert on_disk == set(points[0].objects) | set(points[1].objects)
    assert_equal(Job(tmp_path, 1, 1).load()[1], expected(7, experts_by_step(points[0])))


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


def hurt(file: Path, damage: str) -> None:
    if damage == "flip":
        flip(file, file.stat().st_size // 3)
    elif damage == "truncate":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "empty":
        os.truncate(file, 0)
    else:
        file.unlink()


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


def test_resume_words(tmp_path):
    job = Job(tmp_path / "run" / "checkpoint", 1, 1)
    assert job.load("auto")[0] is None
    with pytest.raises(CheckpointError, match="no checkpoint"):
        job.load("must")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        job.load(str(tmp_path / "elsewhere"))
    job.save(4)
    assert job.load("never")[0] is None
    other = Job(tmp_path / "other" / "checkpoint", 1, 1)
    report, whole = other.load(str(tmp_path / "run"))
    assert_equal(whole, expected(4))
    assert report is not None
    other.save(5)
    assert manifests(tmp_path / "other" / "checkpoint")[0].full  # refers to nothing in the other folder


def test_a_model_of_another_shape_is_refused_before_anything_changes(tmp_path):
    Job(tmp_path, 1, 1).save(1)
    state = state_of(0, 1, 1, -1)
    before = [piece.data.clone() for piece in state]
    state.append(Fragment("new.weight", "master", None, None, (2,), Box.whole((2,)), (0,), torch.zeros(2)))
    choice = agreed_choice(tmp_path, "must")
    assert choice is not None
    with pytest.raises(CheckpointError, match=r"has no new\.weight:master"):
        restore(choice, state, 1)
    assert all(torch.equal(piece.data, old) for piece, old in zip(state, before, strict=False))


def test_state_may_change_after_wait_copied(tmp_path):
    job = Job(tmp_path, 1, 1)
    state = job.states(1)[0]
    job.ranks[0].save(state, {"step": 1})
    job.ranks[0].wait_copied()
    for piece in state:
        piece.data.zero_()
    job.ranks[0].finish()
    assert_equal(Job(tmp_path, 1, 1).load()[1], expected(1))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hanging_disk_on_one_rank_costs_saves_and_never_holds_up_training(tmp_path, rank):
    job = Job(tmp_path, 2, 2)
    job.save(1)
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(operation: str, path: Path) -> None:
        hangs.set()
        assert goes_on.wait(60)

    job.nodes[rank].io = Io(hang)
    hanging = job.start(2)
    assert hangs.wait(60)
    saves = [hanging]
    for step in (3, 4):
        saves.append(job.start(step))
        for one in job.ranks:
            one.wait_copied()  # the disk still hangs
    assert not hanging[rank].done.is_set()
    for pending in saves[2]:  # one hangs, one waits for it
        assert pending.done.wait(60)
        assert "in memory only" in pending.reason
    saves.append(job.start(5, full=True))  # the last one of a run waits for its turn
    goes_on.set()
    assert all(pending.done.wait(60) for save in saves for pending in save)
    assert [[pending.committed for pending in save] for save in saves] == [[True] * 2, [True] * 2, [False] * 2, [True] * 2]
    assert job.ranks[rank].status().failures == 0
    assert [(point.step, point.index) for point in manifests(tmp_path)] == [(5, 3), (3, 2), (2, 1)]


def test_a_save_that_comes_too_early_is_made_a_little_later(tmp_path):
    job = Job(tmp_path, 2, 1)
    started = [pending for step in (1, 2) for pending in job.start(step)]
    assert all(pending.done.wait(60) for pending in started)
    assert all(pending.committed for pending in started)


def test_a_lost_parent_costs_one_save_and_the_next_is_full(tmp_path):
    job = Job(tmp_path, 2, 2)
    job.save(1)
    job.save(2)
    flip(sorted((tmp_path / "manifests").glob("*.json"))[-1], 100)
    lost = job.save(3)
    assert not any(pending.committed for pending in lost)
    assert "full" in lost[1].reason
    assert all(pending.committed for pending in job.save(4))
    assert manifests(tmp_path)[0].full
    assert all(pending.committed for pending in job.save(5))
    assert not manifests(tmp_path)[0].full
    assert_equal(Job(tmp_path, 1, 1).load()[1], expected(5, experts_by_step(manifests(tmp_path)[0])))


def test_no_room_for_the_copy_is_said_before_the_next_update(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=[LocalNode(free=lambda folder: 100)])
    job.start(1)
    with pytest.raises(CheckpointError, match="fits nowhere"):
        job.ranks[0].wait_copied()
