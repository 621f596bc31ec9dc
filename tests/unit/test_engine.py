"""What the native engine decides once, when it is made: the type of its matmuls, and which parameters decay."""

import json

import pytest
import torch

from moetrain.data.batch import make_batch
from moetrain.dist.mesh import Mesh
from moetrain.dist.world import World
from moetrain.optim.config import OptimConfig
from moetrain.parallel import precision
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.parallel.native import TorchEngine
from moetrain.parallel.precision import autocast_dtype
from moetrain.parallel.sums import StepSums
from moetrain.routing.config import RoutingConfig
from moetrain.routing.types import RoutingStats
from tests.unit.test_model import tiny

Patch = pytest.MonkeyPatch


class Follower(World):
    """A rank whose rank 0 says something else than its own probe."""

    def agree(self, value: object, name: str = "") -> object:  # pyright: ignore[reportIncompatibleMethodOverride]
        return json.loads(json.dumps(not value))


def engine(autocast: str, optim: OptimConfig | None = None) -> TorchEngine:
    world = World.single(torch.device("cpu"))
    config = tiny("scmoe")
    config.attention.bias, config.attention.qk_norm = True, "head"
    config.tie_embeddings = False
    made = TorchEngine(config, ParallelConfig(ep=1), EngineConfig(autocast=autocast), optim or OptimConfig(), world, Mesh(world, 1))
    made.initialize(seed=1)
    return made


@pytest.mark.parametrize("has_units", [True, False])
def test_matmuls_are_in_bfloat16_where_the_hardware_has_it_and_rank_0_decides(has_units: bool, monkeypatch: Patch) -> None:
    monkeypatch.setattr(precision, "faster_in_bfloat16", lambda device: has_units)
    single, follower = World.single(torch.device("cpu")), Follower(1, 2, 1, torch.device("cpu"), "gloo", 1.0)
    expected = torch.bfloat16 if has_units else None
    assert autocast_dtype(EngineConfig(), single) is expected
    assert autocast_dtype(EngineConfig(), follower) is not expected
    assert autocast_dtype(EngineConfig(autocast="bfloat16"), single) is torch.bfloat16
    assert autocast_dtype(EngineConfig(autocast="off"), single) is None
    assert autocast_dtype(EngineConfig(dtype="float64"), single) is None


@pytest.mark.parametrize("has_tiles", [True, False])
def test_a_busy_processor_does_not_change_the_number_type_of_a_restart(has_tiles: bool, monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_tiles)
    monkeypatch.setattr(torch, "matmul", None)  # to be timed
    assert precision.faster_in_bfloat16(torch.device("cpu")) is has_tiles


def test_a_step_in_bfloat16_is_near_and_not_equal_to_one_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    made = {autocast: engine(autocast) for autocast in ("off", "bfloat16")}
    config = made["off"].config
    ids = torch.randint(0, config.vocab_size, (2, 9), generator=generator)
    batch = make_batch(ids[:, :-1], ids[:, 1:], torch.ones(2, 8, dtype=torch.bool), 0, False)
    full, half = (made[autocast].step([batch], 1e-3, lambda: None) for autocast in ("off", "bfloat16"))
    assert full.loss != half.loss
    assert half.loss == pytest.approx(full.loss, rel=1e-2)
    assert all(parameter.dtype == torch.float32 for parameter in made["bfloat16"].model.parameters())


def test_norms_and_biases_are_not_decayed_and_the_rest_is() -> None:
    made = engine("off", OptimConfig(weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
    for parameter in made.model.parameters():
        parameter.data.add_(1)  # so that there is something to decay in what starts at zero
        parameter.grad = torch.zeros_like(parameter)
    made.optimizer.step(0.1)
    kept = {name for name, parameter in made.model.named_parameters() if torch.equal(parameter.data, before[name] + 1)}
    assert kept == {name for name in before if name.endswith((".bias", "norm.weight"))}
    assert {"final_norm.weight", "blocks.0.moe.norm.weight", "blocks.0.attention.q_proj.bias", "blocks.0.attention.q_norm.weight"} <= kept
    assert {"embedding.weight", "lm_head.weight", "blocks.0.moe.router.weight", "blocks.0.moe.experts.down_proj"} <= before.keys() - kept


def test_a_sample_drops_no_token() -> None:
    """Capacity is a rule of training batches: a completion is the same whatever it is."""
    world = World.single(torch.device("cpu"))
    samples = []
    for capacity_factor in (None, 0.1):
        config = tiny("scmoe", init_std=0.5, routing=RoutingConfig(num_experts=4, top_k=2, capacity_factor=capacity_factor))
        made = TorchEngine(config, ParallelConfig(ep=1), EngineConfig(autocast="off"), OptimConfig(), world, Mesh(world, 1))
        made.initialize(seed=1)
        samples.append(made.generate([1, 2, 3], 20, seed=0))
    assert samples[0] == samples[1]


def test_the_load_carried_to_the_next_micro_batch_is_that_of_one_gating() -> None:
    """Two pairs choose twice each at one bank: a gating of the next micro-batch is one in two, not one in five."""
    config = tiny("dgmoe")
    config.shortcut.pairs_per_bank, config.routing.auxiliary_loss_scope = 2, "global_batch"
    sums, nothing = StepSums(config, World.single(torch.device("cpu"))), torch.zeros(())
    load_E = torch.arange(config.routing.num_experts)
    ids = torch.zeros(1, 5, dtype=torch.int64)
    batch = make_batch(ids, ids, ids == 0, 0, False)
    sums.add(nothing, batch, [RoutingStats(nothing, nothing, 4 * load_E, nothing)])
    assert torch.equal(sums.carried_load, load_E.double().unsqueeze(0))
