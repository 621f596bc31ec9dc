"""A run folder that was removed and made anew under the same name: what belongs to the run before it is used no more."""

import shutil
from pathlib import Path

import pytest

from moetrain.base.errors import CheckpointError
from moetrain.store.io import Io
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import Job, LocalNode, assert_equal, expected, flip, manifests


def started(path: Path, nodes: list[LocalNode], times: int = 1) -> Job:
    """A job of so many starts that has saved step 1 and copied step 5."""
    job = [Job(path, len(nodes), len(nodes), nodes=nodes) for _ in range(times)][-1]
    job.load()
    job.save(1)
    job.copy(5)
    return job


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
