"""Schedules over real exchanges: ep 2 x edp 2, replicated and FSDP2. What a slot, a wait or a chunk may change, and how often ranks talk.

As in test_parity, Adam's first moment after one step shows every gradient.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.dist.mesh import Axis, Mesh
from moetrain.dist.transport import Blocking, Transport, Work
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
    compiled: bool = False


@dataclass
class Outcome:
    loss: float
    moments: list[Fragment]
    num_pairs: int
    load_LE: Tensor
    times: Counter[str]  # exchanges of this rank by name


class Counted:
    """A transport that counts."""

    def __init__(self, inner: Transport) -> None:
        self.inner, self.times = inner, Counter[str]()

    def launch(
        self, name: str, sent: Tensor, received: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], axis: Axis
    ) -> Work:
        self.times[name] += 1
        return self.inner.launch(name, sent, received, send_sizes, receive_sizes, axis)


def config_of(kind: str) -> ModelConfig:
    pattern, shortcut = KINDS[kind]
    return replace(model_config(Fold(EP, "replicate", 1)), num_layers=4, pattern=pattern, shortcut=shortcut, routing=ROUTING)


def one_step(world: World, case: Case) -> Outcome:
    alone = world.size == 1
    mesh = Mesh(world, 1 if alone else EP)
    parallel = ParallelConfig(ep=mesh.ep.size, dense=case.dense)
    settings = EngineConfig(dtype="float64", autocast="off", recompute=case.recompute, compile=case.compiled)
    engine = TorchEngine(config_of(case.kind), parallel, settings, OptimConfig(), world, mesh)
    engine.initialize(seed=1)
    counted = Counted(mesh.ep.link.transport)
    mesh.ep.link.transport = Blocking(counted) if case.serial else counted
    for block in engine.model.blocks:
        assert isinstance(block, RoutedBlock)
        block.schedule = Schedule((len(block.operators) + 1 if case.late else 1,) * case.num_chunks)
    every = [[micro_batch(0, index * RANKS + rank) for rank in range(RANKS)] for index in range(case.accumulation)]
    batches = [merged(of_ranks) if alone else of_ranks[world.rank] for of_ranks in every]
    result = engine.step(batches, 1e-3, lambda: None)
    moments = [fragment for fragment in detached(engine.state()) if fragment.component == "m"]
    return Outcome(result.loss, moments, result.num_pairs, result.load, counted.times)


def on_ranks(world: World, cases: list[Case]) -> list[Outcome]:
    return [one_step(world, case) for case in cases]


PLAIN = [Case(kind, dense) for kind, dense in product(KINDS, ("replicate", "fsdp"))]
SAME = {case: [replace(case, late=True), replace(case, serial=True)] for case in PLAIN}
CHUNKED = {case: [replace(case, num_chunks=3, late=late, recompute=late) for late in (False, True)] for case in PLAIN}
ACCUMULATED = [Case(kind, dense, num_chunks=3, recompute=True, accumulation=2) for kind, dense in (("dgmoe", "fsdp"), ("moe", "replicate"))]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, list[Outcome]]:
    """Of every rank, all in one job."""
    cases = [*PLAIN, *(case for group in (SAME, CHUNKED) for others in group.values() for case in others), *ACCUMULATED]
    by_rank = run_ranks(on_ranks, RANKS, tmp_path_factory.mktemp("ranks"), cases, timeout=220)
    return dict(zip(cases, map(list, zip(*by_rank, strict=True)), strict=True))


def gradients(outcomes: list[Outcome]) -> dict[str, Tensor]:
    return assemble([fragment for outcome in outcomes for fragment in outcome.moments])


@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: f"{case.kind}, {case.dense}")
def test_slots_and_waits_change_no_bit_and_chunks_only_rounding(outcomes: dict[Case, list[Outcome]], case: Case) -> None:
    found = gradients(outcomes[case])
    alone = one_step(World.single(torch.device("cpu")), replace(case, dense="replicate"))
    assert farthest(found, gradients([alone])) < 1e-10
    for other in SAME[case]:
        assert all(torch.equal(mine, found[key]) for key, mine in gradients(outcomes[other]).items()), other
    early, late = (gradients(outcomes[other]) for other in CHUNKED[case])
    assert farthest(early, found) < 1e-12
    assert all(torch.equal(late[key], value) for key, value in early.items())


@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", ACCUMULATED, ids=lambda case: case.kind)
def test_recomputation_and_accumulation_exchange_each_row_once_each_way(outcomes: dict[Case, list[Outcome]], case: Case) -> None:
    """Four gatings: 2 micro-batches x 3 chunks of rows out and back, their gradients, and one count exchange for all chunks.

    And every assignment is counted once for the balance.
    """
    plain = one_step(World.single(torch.device("cpu")), replace(case, dense="replicate", num_chunks=1, recompute=False))
    rows = [f"{what}rows {way} experts" for what in ("", "gradient of ") for way in ("to", "from")]
    for outcome in outcomes[case]:
        assert outcome.times == dict.fromkeys(rows, 4 * 2 * 3) | {"expert counts": 4 * 2}
        assert outcome.num_pairs == 4 * 2 * RANKS * 16
        assert torch.equal(outcome.load_LE, plain.load_LE) and int(plain.load_LE.sum()) > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(" " in torch.__file__, reason="torch.compile cannot link where torch's path holds a space; it is refused there")
def test_what_is_compiled_changes_rounding_only_and_slots_still_no_bit(tmp_path: Path) -> None:
    compiled = Case("scmoe", "replicate", compiled=True)
    cases = [replace(compiled, compiled=False), compiled, replace(compiled, late=True), replace(compiled, num_chunks=3, recompute=True)]
    by_rank = run_ranks(on_ranks, RANKS, tmp_path, cases, timeout=1100, limit=900)
    plain, early, late, recomputed = (gradients(list(outcomes)) for outcomes in zip(*by_rank, strict=True))
    assert farthest(early, plain) < 1e-10 and farthest(recomputed, plain) < 1e-10
    assert all(torch.equal(late[key], value) for key, value in early.items())
