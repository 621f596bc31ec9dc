"""Real ranks with real writer processes: save on two, resume on one; a writer that dies costs one save."""

import os
import signal
from pathlib import Path

import pytest

from moetrain.base.clock import SystemClock
from moetrain.checkpoint.arena import Arena, usual_folders
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.process import WriterProcess
from moetrain.dist.world import World
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest
from moetrain.store.objects import CheckpointFolder
from tests.kit import run_ranks
from tests.unit.checkpoint_kit import Job, assert_equal, expected, state_of

pytestmark = pytest.mark.dist


def train(world: World, folder: Path) -> list[bool]:
    """Three saves on each rank; rank 1's writer is killed before the second. Returns what was committed, as this rank sees it."""
    writer = WriterProcess()
    config = CheckpointConfig(timeout_seconds=60.0)
    checkpoint = Checkpointer(folder, config, world.rank, world.size, world.agree, SystemClock(), writer, world.gather)
    assert checkpoint.load(state_of(world.rank, world.size, 2, -1), "auto") is None
    committed = []
    for step in (1, 2, 3):
        state = state_of(world.rank, world.size, 2, step)
        pending = checkpoint.save(state, {"step": step})
        checkpoint.wait_copied()
        for piece in state:
            piece.data.zero_()  # the update
        pending.done.wait()
        committed.append(pending.committed)
        if step == 1 and world.rank == 1:
            assert writer.pid is not None
            os.kill(writer.pid, signal.SIGKILL)
    pid = writer.pid
    checkpoint.finish()
    assert pid is not None
    assert not Path(f"/proc/{pid}").exists()
    return committed


def test_two_ranks_save_one_rank_resumes_and_a_dead_writer_costs_one_save(tmp_path):
    folder = tmp_path / "checkpoint"
    assert run_ranks(train, 2, tmp_path, folder) == [[True, False, True]] * 2
    report, whole = Job(folder, 1, 1).load("must")
    newest = next(point for point in CheckpointFolder(folder, Io()).history() if isinstance(point, Manifest))
    assert report is not None
    assert report.step == 3
    assert_equal(whole, expected(3, {group: 3 - age for group, age in newest.ages().items()}))
    assert newest.index == 1  # the lost save's turn was taken by the next one


def test_arena_has_no_name_and_prefers_shared_memory(tmp_path):
    arena = Arena(1 << 20, usual_folders())
    where = os.readlink(f"/proc/self/fd/{arena.descriptor}")
    assert where.endswith("(deleted)")
    assert where.startswith("/dev/shm")
    arena.close()
    room = {tmp_path: 1 << 30}
    fallback = Arena(1 << 20, (Path("/dev/shm"), tmp_path), free=lambda folder: room.get(folder, 100))
    assert os.readlink(f"/proc/self/fd/{fallback.descriptor}").startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    fallback.close()
