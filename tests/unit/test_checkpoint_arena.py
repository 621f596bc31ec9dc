"""What agents keep in the memory of nodes, for whom, and when they give it up. Agents in this process."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.arena import State, arena_folder, free_bytes, own_folder
from moetrain.checkpoint.node_memory import Needs
from moetrain.checkpoint.shelf import GENERATIONS
from tests.unit.checkpoint_kit import (
    Job,
    LocalNode,
    assert_goes_on_from,
    nodes_of,
    restart,
)


def test_slots_are_used_again_and_two_copies_are_all_there_is(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1))
    job.save(1)
    job.copy(2)
    arena = job.nodes[0].agent.arena
    held = arena.num_bytes
    for step in range(3, 9):
        job.copy(step)
    assert arena.num_bytes == held
    assert {one.job.step for one in job.nodes[0].agent.generations.values()} == {7, 8}


def test_a_rank_that_dies_while_it_copies_leaves_no_slot_behind(tmp_path):
    node = LocalNode()
    link = node(start=True)
    link.call({"op": "join", "rank": 0, "run": "", "epoch": 1}, 1)
    link.call({"op": "reserve", "rank": 0, "save": [1, 1], "sizes": [100, 5000]} | vars(Needs()), 1)
    assert [slot.state for slot in node.agent.arena.slots.values()] == [State.FILLING] * 2
    link.close()
    assert [slot.state for slot in node.agent.arena.slots.values()] == [State.FREE] * 2


def test_an_older_job_loses_the_memory_to_a_younger_one(tmp_path):
    nodes = nodes_of(1)
    old = Job(tmp_path, 1, 1, nodes=nodes)
    old.save(1)
    young = Job(tmp_path, 1, 1, nodes=nodes)
    young.load()
    old.copy(2)
    with pytest.raises(CheckpointError, match="taken over the memory"):
        old.ranks[0].save(old.states(3)[0], {"step": 3})
    young.save(2)


def test_an_older_job_that_ends_leaves_the_younger_ones_memory_alone(tmp_path):
    old = Job(tmp_path, 1, 1, nodes=nodes_of(1))
    old.save(1, full=True)
    young = restart(old)
    young.load()
    young.save(2)
    young.copy(3)
    old.ranks[0].finish()
    assert not young.nodes[0].agent.has_taken_leave
    assert_goes_on_from(young, 3)


@pytest.mark.parametrize("has_spare", [False, True])
def test_room_for_a_description_is_made_of_free_slots_or_the_save_finds_no_room(tmp_path, monkeypatch, has_spare):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1))
    job.save(1)
    job.copy(2)
    node = job.nodes[0]
    if has_spare:
        node.agent.arena.release(node.agent.arena.reserve([5000]), State.FILLING)
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if node.agent.arena.slots.keys() > held_by(node):  # something is free
            path.touch()
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, data)

    def never(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full if has_spare else never)
        (pending,) = job.copy(3)
    assert pending.is_in_memory_only == has_spare
    assert has_spare or "for the description of a copy" in pending.reason
    assert not list((node.folder / GENERATIONS).glob(".*"))
    assert_goes_on_from(job, 3 if has_spare else 2)


def held_by(node: LocalNode) -> set[str]:
    return {path for path, slot in node.agent.arena.slots.items() if slot.state is not State.FREE}


@pytest.mark.parametrize(("size", "reserve"), [(2 << 20, 1 << 20), (1 << 30, 1 << 23), (1 << 50, 1 << 30)])
def test_slots_leave_room_for_their_descriptions(tmp_path, monkeypatch, size, reserve):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_frsize=4096, f_blocks=size // 4096, f_bavail=size // 4096))
    assert free_bytes(tmp_path / "arena") == size - reserve


def test_nobody_elses_folder_is_used(tmp_path):
    folder = arena_folder(tmp_path / "checkpoint", str(tmp_path))
    assert folder.name.startswith("moetrain-")
    folder.mkdir(mode=0o755)
    with pytest.raises(CheckpointError, match="open to others"):
        own_folder(folder)
    assert arena_folder(tmp_path / "other", str(tmp_path)) != folder
    assert arena_folder(Path("/a/checkpoint")) == arena_folder(Path("/a/checkpoint"))


def test_a_run_has_one_arena_however_its_folder_is_spelled(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "link").symlink_to("runs")
    assert arena_folder(tmp_path / "link" / "run" / "checkpoint") == arena_folder(tmp_path / "runs" / "run" / "checkpoint")
    assert arena_folder(tmp_path / "runs" / ".." / "runs" / "run") == arena_folder(tmp_path / "runs" / "run")
    assert arena_folder(Path("s3://bucket/run")) != arena_folder(Path("s3://bucket/other"))


def test_status_counts_slots_by_state(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1))
    job.save(1)
    found = job.nodes[0](start=True).call({"op": "status"}, 1)
    assert json.dumps(found)
    assert found["slots"].keys() == {"READY"}
    assert [row["step"] for row in found["generations"]] == [1]
