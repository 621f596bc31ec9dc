"""Modes over three real ranks: FSDP2 and expert parallelism, shards uneven and empty, experts chosen by load, restored by one process."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.base.clock import SystemClock
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.recover import alone
from moetrain.checkpoint.turns import Horizon, Turns
from moetrain.dist.mesh import Mesh
from moetrain.dist.world import World
from moetrain.model.state import Fragment, assemble
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.parallel.native import TorchEngine
from tests.dist.test_parity import Fold, detached, micro_batch, model_config
from tests.kit import run_ranks

pytestmark = pytest.mark.dist

FOLDS = [("moments", 1, "fsdp"), ("weights16", 1, "fsdp"), ("weights16", 3, "replicate"), ("experts", 3, "fsdp")]
SAVES = 4


def config_of(mode: str) -> CheckpointConfig:
    return CheckpointConfig(mode=mode, selection="unsaved_age", keep=SAVES)


def engine_of(world: World, ep: int, dense: str) -> TorchEngine:
    config = model_config(Fold(ep, dense, 1))
    parallel = ParallelConfig(ep=ep, dense=dense)
    return TorchEngine(config, parallel, EngineConfig(dtype="float32", autocast="off"), OptimConfig(), world, Mesh(world, ep))


def train(world: World, folder: Path, mode: str, ep: int, dense: str) -> list[list[Fragment]]:
    """The state at each of four saves; the first one is full."""
    engine = engine_of(world, ep, dense)
    engine.initialize(1)
    routing = engine.config.routing
    turns = Turns(config_of(mode), Horizon(dict.fromkeys(engine.config.banks(), routing.num_experts), 10_000))
    checkpoint = Checkpointer(
        folder, config_of(mode), world.rank, world.size, world.agree, SystemClock(), gather=world.gather, turns=turns, board=world.board()
    )
    checkpoint.load(engine.state(), "never")
    states = []
    for number in range(1, SAVES + 1):
        result = engine.step([micro_batch(number, world.rank + 1)], 1e-3, lambda: None)
        checkpoint.count(result.load.tolist())
        state = engine.state()
        states.append(detached(state))
        pending = checkpoint.save(state, {"step": number})
        assert pending.done.wait(60)
        assert pending.committed, pending.reason
    checkpoint.finish()
    return states


def on_ranks(world: World, folder: Path) -> list[list[list[Fragment]]]:
    return [train(world, folder / str(number), *fold) for number, fold in enumerate(FOLDS)]


def promised(mode: str, states: list[dict[str, Tensor]], ages: dict[tuple[str, int], int]) -> dict[str, Tensor]:
    """What a recovery to the last save must give."""
    now = states[-1]
    wanted = dict(now)
    for key in now:
        name, component, *expert = key.split(":")
        if not expert or not (age := ages[name.rpartition(".")[0], int(expert[0])]):
            continue
        if component != "master" or mode == "experts":
            wanted[key] = states[-1 - age][key]
        elif mode == "weights16":
            wanted[key] = now[key].bfloat16().float()
    return wanted


@pytest.mark.timeout(240)
def test_modes_restore_what_they_promise_whatever_the_shards(tmp_path: Path) -> None:
    by_rank = run_ranks(on_ranks, 3, tmp_path, tmp_path, timeout=200, limit=90.0)
    for number, (mode, ep, dense) in enumerate(FOLDS):
        states = [assemble([fragment for rank in by_rank for fragment in rank[number][save]]) for save in range(SAVES)]
        single = engine_of(World.single(torch.device("cpu")), 1, "replicate")
        state = single.state()
        report = Checkpointer(tmp_path / str(number), config_of(mode), 0, 1, alone, SystemClock()).load(state, "must")
        assert report is not None
        assert set(report.ages.values()) == {0, 1, 2, 3}, (mode, ep, dense)
        found, wanted = assemble(state), promised(mode, states, report.ages)
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == [], (mode, ep, dense)
        assert (0 in expert_fragments(by_rank, number)) is (ep == 1), "a rank without experts"


def pass_on(world: World, folder: Path, ep: int, dense: str, number: int) -> list[Fragment]:
    """Goes on from what other ranks saved, trains nothing and saves it; the first start trains two steps."""
    engine = engine_of(world, ep, dense)
    checkpoint = Checkpointer(
        folder, CheckpointConfig(mode="full"), world.rank, world.size, world.agree, SystemClock(), gather=world.gather, board=world.board()
    )
    if number:
        report = checkpoint.load(engine.state(), "must")
        assert report is not None and report.step == number
    else:
        engine.initialize(1)
        for step in range(2):
            engine.step([micro_batch(step, world.rank + 1)], 1e-3, lambda: None)
    state = engine.state()
    pending = checkpoint.save(state, {"step": number + 1}, full=True)
    pending.wait_copied()
    checkpoint.finish(60)
    return detached(state)


@pytest.mark.timeout(240)
def test_state_passes_through_other_numbers_of_ranks_without_changing_a_bit(tmp_path: Path) -> None:
    worlds = [(4, 4, "replicate"), (2, 2, "fsdp"), (1, 1, "replicate"), (3, 3, "fsdp"), (4, 4, "fsdp"), (2, 1, "fsdp"), (3, 1, "replicate")]
    first: dict[str, Tensor] = {}
    for number, (size, ep, dense) in enumerate(worlds):
        by_rank = run_ranks(pass_on, size, tmp_path, tmp_path / "checkpoint", ep, dense, number, timeout=100, limit=60.0)
        found = assemble([fragment for rank in by_rank for fragment in rank])
        first = first or found
        assert found.keys() == first.keys()
        assert [key for key in first if not torch.equal(found[key], first[key])] == [], (size, ep, dense)


def expert_fragments(by_rank: list[list[list[list[Fragment]]]], number: int) -> list[int]:
    """How many each rank holds."""
    return [sum(fragment.bank is not None for fragment in rank[number][0]) for rank in by_rank]
