"""When no rank comes back, agents write the newest whole copy to the store before they end."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from moetrain.store.io import Io
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import Job, LocalNode, assert_equal, expected, manifests


def job_of(path: Path, world: int, mode: str = "experts", snapshot_experts: int = 0) -> Job:
    nodes = [LocalNode() for _ in range(world)]
    return Job(path, world, world, nodes=nodes, timeout_seconds=5.0, mode=mode, snapshot_experts=snapshot_experts)


def rescue(job: Job) -> None:
    """All nodes at once, after the end of their ranks."""
    with ThreadPoolExecutor(job.world) as pool:
        list(pool.map(lambda node: node.agent.rescue(), job.nodes))


@pytest.mark.parametrize("mode", ["experts", "moments", "weights16"])
@pytest.mark.parametrize("world", [1, 2])
def test_the_newest_whole_copy_becomes_a_checkpoint(tmp_path, world, mode):
    job = job_of(tmp_path, world, mode)
    job.load()
    job.save(1)
    job.save(2)
    for step in (3, 4):
        job.copy(step)
    rescue(job)
    newest = manifests(tmp_path)[0]
    assert (newest.step, newest.full, newest.progress["step"]) == (4, True, 4)
    report, whole = job_of(tmp_path, world, mode).load()
    assert report is not None
    assert list(report.read) == ["disk"]
    assert_equal(whole, expected(4))


@pytest.mark.parametrize("mode", ["experts", "moments", "weights16"])
def test_a_save_that_its_rank_did_not_live_to_ask_for_is_written_in_full(tmp_path, monkeypatch, mode):
    """Of an expert whose weights were for the store and whose moments were not, both; nothing rounded beside its master."""
    job = job_of(tmp_path, 1, mode)
    job.load()
    job.save(1)
    monkeypatch.setitem(job.nodes[0].agent.for_ranks, "persist", lambda *asked: ({"error": "killed"}, b""))
    job.ranks[0]._folder.give_up = lambda *said: None  # type: ignore[method-assign]
    job.save(2)
    rescue(job)
    newest = manifests(tmp_path)[0]
    assert newest.step == 2
    assert {piece.object for tensor in newest.tensors.values() for piece in tensor.pieces} == set(newest.objects)
    report, whole = job_of(tmp_path, 1, mode).load()
    assert report is not None
    assert_equal(whole, expected(2))


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_copy_that_one_node_lacks_leaves_the_one_before_it(tmp_path, lacking):
    job = job_of(tmp_path, 2)
    job.load()
    job.save(1)
    job.copy(2)
    agent = job.nodes[lacking].agent
    with monkeypatched(agent.for_ranks, "filled", lambda *asked: ({"error": "killed"}, b"")):
        job.copy(3)
    assert {one.job.step for one in agent.generations.values()} == {2}
    rescue(job)
    assert manifests(tmp_path)[0].step == 2


@contextmanager
def monkeypatched(operations: dict, name: str, operation: object) -> Iterator[None]:
    before = operations[name]
    operations[name] = operation
    yield
    operations[name] = before


def test_a_folder_that_is_away_for_a_while_is_waited_for(tmp_path):
    job = job_of(tmp_path / "run", 1)
    job.load()
    job.save(1)
    job.copy(2)
    (tmp_path / "run").rename(tmp_path / "away")
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(rescue, job)
        assert not done.done()
        (tmp_path / "away").rename(tmp_path / "run")
        done.result(60)
    assert manifests(tmp_path / "run")[0].step == 2


def test_what_a_restart_took_over_and_did_not_live_to_copy_again_is_written(tmp_path):
    job = job_of(tmp_path, 2)
    job.load()
    job.save(1)
    job.copy(2)
    again = Job(tmp_path, 2, 2, nodes=job.nodes, timeout_seconds=5.0)
    report, _ = again.load()
    assert report is not None
    assert report.step == 2
    rescue(again)
    newest = manifests(tmp_path)[0]
    assert (newest.step, newest.save.epoch, newest.index) == (2, 2, 1)
    assert_equal(job_of(tmp_path, 2).load()[1], expected(2))


def test_parts_of_two_steps_are_never_one_checkpoint(tmp_path):
    """A restart goes on from a copy, one of its ranks makes the next copy, all are killed: the number of the first is not used again."""
    job = job_of(tmp_path, 2)
    job.load()
    job.save(1)
    job.copy(5)
    again = Job(tmp_path, 2, 2, nodes=job.nodes, timeout_seconds=2.0)
    assert again.load()[0] is not None
    agent = again.nodes[0].agent
    with monkeypatched(agent.for_ranks, "filled", lambda *asked: ({"error": "killed"}, b"")):
        again.copy(9)
    rescue(again)
    assert manifests(tmp_path)[0].step == 5
    assert_equal(job_of(tmp_path, 2).load()[1], expected(5))


def test_ranks_that_come_back_have_the_memory_at_once(tmp_path):
    """The agent of rank 0 waits for a node that is gone, until the next job claims the folder."""
    job = job_of(tmp_path, 2)
    job.load()
    job.save(1)
    job.copy(2)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(job.nodes[0].agent.rescue)
        again = Job(tmp_path, 2, 2, nodes=job.nodes, timeout_seconds=60.0)
        assert again.load()[0] is not None
        assert all(pending.committed for pending in again.save(3))
        waits.result(30)
    assert manifests(tmp_path)[0].step == 3


def test_nothing_is_written_that_is_no_news(tmp_path):
    job = job_of(tmp_path, 1, snapshot_experts=1)
    job.load()
    job.save(1)
    job.copy(2)  # one expert of four: what lies on disk and this are no better together than memory, which is lost
    rescue(job)
    assert [point.step for point in manifests(tmp_path)] == [1]
    whole = job_of(tmp_path / "other", 1)
    whole.load()
    whole.save(1)
    whole.copy(2)
    CheckpointFolder(tmp_path / "other", Io()).claim(0.0)  # another job
    rescue(whole)
    assert [point.step for point in manifests(tmp_path / "other")] == [1]
