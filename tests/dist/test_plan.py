"""The plan against two real ranks: bytes held, and bytes that travel in one step."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.data.batch import make_batch
from moetrain.dist import comm
from moetrain.dist.mesh import Axis, Mesh
from moetrain.dist.world import World
from moetrain.model.config import AttentionConfig, ModelConfig
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.parallel.native import TorchEngine
from moetrain.parallel.plan import Axes, Batch, all_to_all_bytes, memory
from moetrain.routing.config import RoutingConfig
from tests.kit import run_ranks

pytestmark = pytest.mark.dist
MODEL = ModelConfig(
    vocab_size=32, hidden_size=8, num_layers=2, pattern=["moe"], expert_ffn_size=12, max_position=16,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4), routing=RoutingConfig(num_experts=4, top_k=2),
)  # fmt: skip
EXACT = EngineConfig(autocast="off")


def held_and_moved(world: World, ep: int, dense: str) -> tuple[int, int]:
    """Parameter bytes of this rank, and bytes of rows it handed to all-to-alls in one step of two micro-batches."""
    torch.manual_seed(world.rank)
    mesh = Mesh(world, ep)
    engine = TorchEngine(MODEL, ParallelConfig(ep=ep, dense=dense), EXACT, OptimConfig(), world, mesh)
    engine.initialize(seed=1)
    moved: list[int] = []
    real = comm.launch

    def counted(name: str, rows: Tensor, send_sizes: list[int], receive_sizes: list[int], axis: Axis) -> comm.Flight:
        if rows.is_floating_point():
            moved.append(rows.numel() * rows.element_size())
        return real(name, rows, send_sizes, receive_sizes, axis)

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(comm, "launch", counted)
    tokens = torch.randint(0, 32, (2, 17))
    batch = make_batch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 16, dtype=torch.bool), 0, False)
    engine.step([batch, batch], 1e-3, lambda: None)
    monkeypatch.undo()
    held = sum(fragment.num_bytes for fragment in engine.state() if fragment.component == "master")
    return held, sum(moved)


FOLDS = [(2, "replicate"), (1, "fsdp")]


def every_fold(world: World) -> list[tuple[int, int]]:
    return [held_and_moved(world, ep, dense) for ep, dense in FOLDS]


def test_plan_equals_two_ranks(tmp_path: Path) -> None:
    ranks = run_ranks(every_fold, 2, tmp_path)
    for fold, (ep, dense) in enumerate(FOLDS):
        axes, batch = Axes(2, ep), Batch(sequences=8, seq_len=16, micro_batch_size=2, accumulation=2)
        planned = memory(MODEL, ParallelConfig(ep=ep, dense=dense), EXACT, axes, batch, low_precision=False)
        assert planned.weights == max(rank[fold][0] for rank in ranks)
        # All rows pass the exchange, those that stay on their rank too; under balance (ep - 1) / ep of them leave it.
        everything = sum(rank[fold][1] for rank in ranks)
        assert 2 * all_to_all_bytes(MODEL, axes, batch, 4, low_precision=False) == everything * (ep - 1) / ep
        assert (everything > 0) == (ep > 1)
