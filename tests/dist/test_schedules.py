"""Schedules over real exchanges: ep 2 x edp 2, replicated and FSDP2. What a slot, a wait or a chunk may change, and how often ranks talk.

As in test_parity, Adam's first moment after one step shows every gradient.
"""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.dist.mesh import Mesh
from moetrain.dist.transport import Blocking
from moetrain.dist.world import World
from moetrain.model.blocks import RoutedBlock
from moetrain.model.config import ModelConfig, ShortcutConfig
from moetrain.model.schedule import Schedule
from moetrain.model.state import Fragment, assemble
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.parallel.native import TorchEngine
from moetrain.routing.config import RoutingConfig
from tests.dist.test_parity import Fold, detached, farthest, merged, micro_batch, model_config
from tests.kit import run_ranks

pytestmark = pytest.mark.dist

RANKS, EP = 4, 2
ROUTING = RoutingConfig(num_experts=4, top_k=1, auxiliary_loss_weight=0.05, auxiliary_loss_scope="sequence", bias_update_rate=0.01)
KINDS = {
    "moe": (["moe"], ShortcutConfig()),
    "shared": (["shared"], ShortcutConfig()),
    "shortcut": (["shortcut"], ShortcutConfig()),
    "scmoe": (["scmoe"], ShortcutConfig([1, 3])),
    "dgmoe": (["dgmoe"], ShortcutConfig(pairs_per_bank=2)),
}


@dataclass(frozen=True)
class Case:
    """One step. `late`: the experts run in the last slot of each block instead of the first."""

    kind: str
    dense: str
    late: bool = False
    num_chunks: int = 1
    serial: bool = False
    recompute: bool = False
    accumulation: int = 1


@dataclass
class Outcome:
    loss: float
    moments: list[Fragment]
    num_pairs: int
    times: dict[str, int]  # exchanges of this rank by name


def config_of(kind: str) -> ModelConfig:
    pattern, shortcut = KINDS[kind]
    return replace(model_config(Fold(EP, "replicate", 1)), num_layers=4, pattern=pattern, shortcut=shortcut, routing=ROUTING)


def one_step(world: World, case: Case) -> Outcome:
    alone = world.size == 1
    mesh = Mesh(world, 1 if alone else EP)
    parallel = ParallelConfig(ep=mesh.ep.size, dense=case.dense)
    settings = EngineConfig(dtype="float64", autocast="off", recompute=case.recompute)
    engine = TorchEngine(config_of(case.kind), parallel, settings, OptimConfig(), world, mesh)
    engine.initialize(seed=1)
    if case.serial:
        mesh.ep.link.transport = Blocking(mesh.ep.link.transport)
    for block in engine.model.blocks:
        assert isinstance(block, RoutedBlock)
        block.schedule = Schedule((len(block.operators) + 1 if case.late else 1,) * case.num_chunks)
    every = [[micro_batch(0, index * RANKS + rank) for rank in range(RANKS)] for index in range(case.accumulation)]
    batches = [merged(of_ranks) if alone else of_ranks[world.rank] for of_ranks in every]
    mesh.ep.link.take()
    result = engine.step(batches, 1e-3, lambda: None)
    times = {name: traffic.times for name, traffic in mesh.ep.link.take().items()}
    return Outcome(result.loss, [f for f in detached(engine.state()) if f.component == "m"], result.num_pairs, times)


def on_ranks(world: World, cases: list[Case]) -> list[Outcome]:
    return [one_step(world, case) for case in cases]


def gradients_of(cases: list[Case], by_rank: list[list[Outcome]]) -> dict[Case, dict[str, Tensor]]:
    columns = zip(*by_rank, strict=True)
    parts = ([fragment for rank in column for fragment in rank.moments] for column in columns)
    return dict(zip(cases, map(assemble, parts), strict=True))


@pytest.mark.timeout(240)
def test_slots_and_waits_change_no_bit_and_chunks_only_rounding(tmp_path: Path) -> None:
    plain = [Case(kind, dense) for kind, dense in product(KINDS, ("replicate", "fsdp"))]
    same = {case: [replace(case, late=True), replace(case, serial=True)] for case in plain}
    chunked = {case: [replace(case, num_chunks=3, late=late, recompute=late) for late in (False, True)] for case in plain}
    cases = [*plain, *(case for group in (same, chunked) for others in group.values() for case in others)]
    by_rank = run_ranks(on_ranks, RANKS, tmp_path, cases, timeout=220)
    found = gradients_of(cases, by_rank)
    single = World.single(torch.device("cpu"))
    reference = {kind: assemble(one_step(single, Case(kind, "replicate")).moments) for kind in KINDS}
    for case in plain:
        assert farthest(found[case], reference[case.kind]) < 1e-10, case
        for other in same[case]:
            assert all(torch.equal(found[other][key], value) for key, value in found[case].items()), other
        for other in chunked[case]:
            assert farthest(found[other], found[case]) < 1e-12, other
        first, second = (found[other] for other in chunked[case])
        assert all(torch.equal(first[key], second[key]) for key in first), case


@pytest.mark.timeout(120)
def test_recomputation_and_accumulation_exchange_each_row_once_each_way(tmp_path: Path) -> None:
    """Four gatings: 2 micro-batches x 3 chunks of rows out and back, their gradients, and one count exchange for all chunks."""
    folds = (("dgmoe", "fsdp"), ("shortcut", "replicate"))
    cases = [Case(kind, dense, num_chunks=3, recompute=True, accumulation=2) for kind, dense in folds]
    for outcomes in run_ranks(on_ranks, RANKS, tmp_path, cases, timeout=100):
        for outcome in outcomes:
            rows = ("rows to experts", "rows from experts")
            expected = {name: 4 * 2 * 3 for one in rows for name in (one, f"gradient of {one}")} | {"expert counts": 4 * 2}
            assert outcome.times == expected
            assert outcome.num_pairs == 4 * 2 * RANKS * 16
