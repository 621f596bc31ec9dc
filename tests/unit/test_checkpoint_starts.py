"""Which copies in memory a start goes on from: all that are newer than the store, none of a run whose folder was removed."""

import shutil
from pathlib import Path

import pytest

from moetrain.base.errors import CheckpointError
from moetrain.store.io import Io
from moetrain.store.objects import CheckpointFolder, Superseded
from tests.unit.checkpoint_kit import Job, LocalNode, assert_equal, expected, flip, manifests


def started(path: Path, nodes: list[LocalNode], times: int = 1) -> Job:
    """A job of so many starts that has saved step 1 and copied step 5."""
    job = [Job(path, len(nodes), len(nodes), nodes=nodes) for _ in range(times)][-1]
    job.load()
    job.save(1)
    job.copy(5)
    return job


def restart(job: Job) -> Job:
    """The same command after kill -9 of all ranks: their agents are still there."""
    return Job(job.ranks[0]._folder.path, job.world, job.ep, nodes=job.nodes)


def assert_goes_on_from(job: Job, step: int) -> None:
    report, whole = restart(job).load()
    assert report is not None
    assert report.step == step
    assert_equal(whole, expected(step))


@pytest.mark.parametrize("steps", [[], [18]], ids=["nothing", "a copy"])
def test_a_start_that_saved_nothing_leaves_the_only_copy(tmp_path, steps):
    job = Job(tmp_path, 1, 1, nodes=[LocalNode()])
    job.save(10)
    job.copy(17)
    again = restart(job)
    again.load()
    for step in steps:
        again.copy(step)
    again.ranks[0].finish()
    assert not job.nodes[0].agent.has_taken_leave
    assert_goes_on_from(job, max([17, *steps]))


def test_a_start_that_read_the_disk_and_saved_nothing_leaves_no_agent(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=[LocalNode()])
    job.save(10)
    job.ranks[0].finish()
    again = restart(job)
    again.load()
    again.ranks[0].finish()
    assert job.nodes[0].agent.has_taken_leave


def begun_elsewhere(tmp_path: Path, nodes: list[LocalNode]) -> Job:
    """A job that began with the checkpoint of step 7 in another folder, and was killed before its own first one."""
    Job(tmp_path / "other", 1, 1).save(7)
    job = Job(tmp_path / "run", 1, 1, nodes=nodes)
    job.load(str(tmp_path / "other"))
    for step in (30, 49):
        job.copy(step)
    return job


def test_a_restart_before_the_first_checkpoint_of_a_run_that_began_elsewhere_loses_nothing(tmp_path):
    job = begun_elsewhere(tmp_path, [LocalNode()])
    again = restart(job)
    report, whole = again.load(str(tmp_path / "other"), is_restart=True)
    assert report is not None
    assert report.step == 49
    assert_equal(whole, expected(49))
    assert all(pending.committed for pending in again.save(50))


def test_a_second_start_of_a_run_that_began_elsewhere_begins_there_again(tmp_path):
    job = begun_elsewhere(tmp_path, [LocalNode()])
    assert_equal(restart(job).load(str(tmp_path / "other"))[1], expected(7))


@pytest.mark.parametrize("damage", ["no memory", "damaged"])
def test_a_restart_of_a_run_that_began_elsewhere_begins_there_again_when_no_copy_is_good(tmp_path, damage):
    job = begun_elsewhere(tmp_path, [LocalNode()])
    for slot in job.nodes[0].agent.arena.slots.values():
        slot.memory[0] ^= 0x10
    if damage == "no memory":
        job.nodes[0] = LocalNode()
    assert_equal(restart(job).load(str(tmp_path / "other"), is_restart=True)[1], expected(7))


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("is_killed", [False, True], ids=["same agent", "next agent"])
def test_copies_of_a_run_that_was_removed_are_not_the_next_ones(tmp_path, times, is_killed):
    nodes = [LocalNode(), LocalNode()]
    started(tmp_path / "run", nodes, times)
    shutil.rmtree(tmp_path / "run")
    if is_killed:
        for node in nodes:
            node.start()
    job = Job(tmp_path / "run", 2, 2, nodes=nodes)
    assert job.load()[0] is None
    assert not any(node.agent.generations for node in nodes)
    job.copy(3)
    report, whole = Job(tmp_path / "run", 2, 2, nodes=nodes).load()
    assert report is not None
    assert report.step == 3
    assert_equal(whole, expected(3))


@pytest.mark.parametrize("times", [1, 3])
def test_a_job_whose_run_was_removed_loses_the_memory_to_the_next_one(tmp_path, times):
    nodes = [LocalNode()]
    old = started(tmp_path / "run", nodes, times)
    shutil.rmtree(tmp_path / "run")
    young = started(tmp_path / "run", nodes)
    old.copy(6)
    with pytest.raises(CheckpointError, match="taken over the memory"):
        old.ranks[0].save(old.states(7)[0], {"step": 7})
    old.ranks[0]._memory.leave(done=True)
    assert {one.job.step for one in nodes[0].agent.generations.values()} == {1, 5}
    assert young.save(6)[0].committed


def test_a_job_whose_run_was_removed_commits_nothing_in_the_next_ones_folder(tmp_path):
    """On other nodes, and under the same epoch."""
    old = started(tmp_path / "run", [LocalNode()])
    shutil.rmtree(tmp_path / "run")
    young = started(tmp_path / "run", [LocalNode()])
    (pending,) = old.save(7)
    assert "made it anew" in str(pending.error)
    assert [point.step for point in manifests(tmp_path / "run")] == [1]
    assert young.save(6)[0].committed


def test_copies_of_a_run_that_was_removed_are_not_written_to_the_next_ones_folder(tmp_path):
    old = started(tmp_path / "run", [LocalNode()])
    shutil.rmtree(tmp_path / "run")
    CheckpointFolder(tmp_path / "run", Io()).claim(0.0)
    old.nodes[0].agent.rescue()
    assert not manifests(tmp_path / "run")


def test_a_damaged_claim_costs_no_copy_and_no_commit(tmp_path):
    job = started(tmp_path / "run", [LocalNode()])
    flip(tmp_path / "run" / "claims" / "000001", 20)
    assert job.save(6)[0].committed
    report, _ = Job(tmp_path / "run", 1, 1, nodes=job.nodes).load()
    assert report is not None
    assert (report.step, report.is_from_memory) == (6, True)


@pytest.mark.parametrize("act", ["copies", "ends"])
def test_an_older_job_that_comes_back_leaves_the_memory_to_the_run_that_has_the_folder(tmp_path, act):
    folder, node = tmp_path / "run", LocalNode()
    older = started(folder, [node])
    for lane in ("copy", "persist"):
        older.ranks[0]._memory._drop(lane)  # as when its agent was stopped
    shutil.rmtree(folder)
    younger = started(folder, [node])
    if act == "ends":
        older.ranks[0].finish()
    else:
        older.copy(7)
        pending = older.ranks[0]._pending
        assert pending is not None
        assert isinstance(pending.error, Superseded)
    assert not node.agent.has_taken_leave
    assert younger.save(6)[0].committed
    assert_goes_on_from(younger, 6)
