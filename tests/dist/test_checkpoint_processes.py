"""Real ranks with real agents: an agent killed between saves costs nothing, ranks that are killed come back from memory."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from moetrain.base.clock import SystemClock
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.config import AgentConfig, CheckpointConfig
from moetrain.checkpoint.process import AGENT
from moetrain.dist.world import World
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest
from moetrain.store.objects import CheckpointFolder
from tests.kit import run_ranks
from tests.unit.checkpoint_kit import Job, assert_equal, expected, state_of

pytestmark = pytest.mark.dist


def config_of(world: World, folder: Path, nodes: int = 1, **settings: object) -> CheckpointConfig:
    """Ranks of one node share a memory folder."""
    agent = AgentConfig(folder=str(folder.with_name(f"memory{world.rank % nodes}")), linger_seconds=20.0)
    return CheckpointConfig(agent=agent, **settings)  # type: ignore[arg-type]


def checkpointer(world: World, folder: Path, config: CheckpointConfig) -> Checkpointer:
    return Checkpointer(
        folder, config, world.rank, world.size, world.agree, SystemClock(), gather=world.gather, board=world.board()
    )  # fmt: skip


def agents(folder: Path) -> list[int]:
    """The agents of the runs in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if AGENT.encode() in command and str(folder).encode() in command:
            found.append(int(process.name))
    return found


def wait_for_no_agent(folder: Path) -> None:
    deadline = time.monotonic() + 30
    while agents(folder):
        assert time.monotonic() < deadline, "an agent is still there"
        time.sleep(0.01)


def train(world: World, folder: Path) -> list[bool]:
    """Three saves on each rank; rank 1's agent is killed before the second. Returns what was committed, as this rank sees it."""
    checkpoint = checkpointer(world, folder, config_of(world, folder, nodes=2, timeout_seconds=60.0))
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
            (pid,) = agents(folder.with_name("memory1"))
            os.kill(pid, signal.SIGKILL)
    checkpoint.finish()
    return committed


def test_two_ranks_save_one_rank_resumes_and_an_agent_killed_between_saves_costs_nothing(tmp_path):
    folder = tmp_path / "checkpoint"
    committed = run_ranks(train, 2, tmp_path, folder)
    assert committed == [[True, True, True]] * 2
    wait_for_no_agent(tmp_path)
    report, whole = Job(folder, 1, 1).load("must")
    newest = next(point for point in CheckpointFolder(folder, Io()).history() if isinstance(point, Manifest))
    assert report is not None
    assert report.step == 3
    assert_equal(whole, expected(3, {group: 3 - age for group, age in newest.ages().items()}))
    assert newest.index == 2
    assert not list(tmp_path.glob("memory*/*")), "the memory of a run that ended is given back"


def train_and_die(world: World, folder: Path, nodes: int) -> None:
    """Saves at step 1, copies at step 2 and 3 in memory, then kill -9 on every rank."""
    checkpoint = checkpointer(world, folder, config_of(world, folder, nodes))
    checkpoint.load(state_of(world.rank, world.size, 2, -1), "auto")
    for step in (1, 2, 3):
        pending = checkpoint.save(state_of(world.rank, world.size, 2, step), {"step": step}, persists=step == 1)
        assert pending.done.wait(60)
        assert pending.safe.wait(60)
        world.barrier(f"step {step} is safe")
    os.kill(os.getpid(), signal.SIGKILL)


def resume(world: World, folder: Path, nodes: int) -> dict:
    checkpoint = checkpointer(world, folder, config_of(world, folder, nodes))
    state = state_of(world.rank, world.size, 2, -1)
    report = checkpoint.load(state, "must")
    assert report is not None
    wanted = expected(report.step)
    for piece in state:
        where = tuple(slice(o, o + s) for o, s in zip(piece.box.offset, piece.box.shape, strict=True))
        assert (piece.data == wanted[piece.key][where]).all()
    checkpoint.finish()
    return {"step": report.step, "read": report.read, "ages": list(report.ages.values()), "lines": report.lines()}


def test_killed_ranks_come_back_at_the_copy_in_memory_without_reading_the_disk(tmp_path):
    folder = tmp_path / "checkpoint"
    with pytest.raises(AssertionError, match="exit code -9"):
        run_ranks(train_and_die, 2, tmp_path, folder, 1)
    assert agents(tmp_path)
    found, other = run_ranks(resume, 2, tmp_path, folder, 1)
    assert found == other
    assert found["step"] == 3
    assert set(found["ages"]) == {0}
    assert list(found["read"]) == ["the memory of this node"]
    wait_for_no_agent(tmp_path)
    assert not list(tmp_path.glob("memory*/*"))


def test_a_lost_node_comes_back_from_the_partners_copy_without_reading_the_disk(tmp_path):
    folder = tmp_path / "checkpoint"
    with pytest.raises(AssertionError, match="exit code -9"):
        run_ranks(train_and_die, 2, tmp_path, folder, 2)
    for pid in agents(folder.with_name("memory0")):
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder.with_name("memory0"))
    found, _ = run_ranks(resume, 2, tmp_path, folder, 2)
    assert found["step"] == 3
    assert set(found["ages"]) == {0}
    assert "disk" not in found["read"]
    (copy,) = [source for source in found["read"] if source.startswith("the copy on 127.0.0.1:")]
    assert any(f"from {copy}" in line for line in found["lines"])
    wait_for_no_agent(tmp_path)
    assert not list(tmp_path.glob("memory*/*"))
