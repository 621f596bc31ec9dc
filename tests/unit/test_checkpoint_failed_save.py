"""What a save that fails costs: it is given up with a reason, training goes on, older checkpoints stay."""

import errno
import os
import threading
from pathlib import Path

import pytest

from moetrain.base.errors import CheckpointError
from moetrain.store.io import Io
from tests.unit.checkpoint_kit import Job, LocalNode, assert_equal, expected, experts_by_step, flip, manifests


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
