"""Four ranks in every fold against one process: loss, every gradient, and the parameters after 20 steps, or 4 where others go on.

After 20 steps stands every pair of ep, dense and accumulation; what all three together change shows in the first gradient and update.

After the first update Adam's first moment is (1 - beta1) times the clipped gradient, so the moments of one step show every
gradient without reaching into the engine.
"""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.data.batch import Batch
from moetrain.dist.mesh import Mesh
from moetrain.dist.world import World
from moetrain.model.config import AttentionConfig, ModelConfig
from moetrain.model.state import Fragment, assemble
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.parallel.engine import StepResult
from moetrain.parallel.native import TorchEngine
from moetrain.routing.config import RoutingConfig
from tests.kit import run_ranks

SEQUENCES, LENGTH, VOCABULARY = 2, 8, 31
BETA1 = 0.9


@dataclass
class Fold:
    """One way to spread the same global batch: `world` ranks with `accumulation` micro-batches each."""

    ep: int
    dense: str
    accumulation: int
    scope: str = "sequence"
    recompute: bool = False
    placement_seed: int | None = None
    dtype: str = "float64"
    num_experts: int = 4
    steps: int = 20

    @property
    def layers(self) -> list[str]:
        """Fewer where every step is made of three forwards: the time goes into the number of operations."""
        return ["scmoe", "moe"] if self.accumulation == 1 else ["scmoe"]


LONG = {(1, "replicate", 3), (1, "fsdp", 1), (2, "replicate", 1), (2, "fsdp", 3), (4, "replicate", 3), (4, "fsdp", 1)}
FEW = 4
FOLDS = [Fold(*fold, steps=20 if fold in LONG else FEW) for fold in product((1, 2, 4), ("replicate", "fsdp"), (1, 3))]
FOLDS += [
    Fold(2, "replicate", 1, scope="micro_batch", steps=FEW),
    Fold(4, "fsdp", 3, scope="global_batch", steps=FEW),
    Fold(2, "fsdp", 3, recompute=True, placement_seed=7, steps=FEW),
    Fold(4, "replicate", 1, num_experts=6, steps=FEW),
    Fold(2, "fsdp", 1, num_experts=6, steps=FEW),
]
SINGLE = [
    Fold(1, "replicate", 3, dtype="float32", steps=FEW),
    Fold(2, "fsdp", 3, dtype="float32"),
    Fold(4, "replicate", 3, dtype="float32", steps=FEW),
]


def model_config(fold: Fold) -> ModelConfig:
    routing = RoutingConfig(
        num_experts=fold.num_experts, top_k=2, auxiliary_loss_weight=0.05, auxiliary_loss_scope=fold.scope, z_loss_weight=0.01,
        bias_update_rate=0.01,
    )  # fmt: skip
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4, qk_norm="head", bias=True)
    return ModelConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_layers=len(fold.layers) + 1, pattern=fold.layers, ffn_size=12, expert_ffn_size=10,
        shared_ffn_size=6, max_position=LENGTH, init_std=0.3, attention=attention, routing=routing,
    )  # fmt: skip


def micro_batch(step: int, number: int) -> Batch:
    """Micro-batch `number` of a step; valid tokens differ widely, and every fifth has none."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    ids = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
    valid = torch.rand(SEQUENCES, LENGTH, generator=generator) < (number % 5) / 4
    position = torch.arange(LENGTH).expand(SEQUENCES, LENGTH)
    return Batch(ids[:, :-1], ids[:, 1:], valid, position, None)


def merged(batches: list[Batch]) -> Batch:
    parts = [batch[:4] for batch in batches]
    tokens, labels, valid, position = (torch.cat(column) for column in zip(*parts, strict=True))
    return Batch(tokens, labels, valid, position, None)


@dataclass
class Outcome:
    """What one fold computed: every step's result, the first step's gradients, and the parameters after its last clipped step."""

    results: list[StepResult]
    gradients: list[Fragment]
    final: list[Fragment]


def detached(fragments: list[Fragment]) -> list[Fragment]:
    return [replace(fragment, data=fragment.data.detach().clone()) for fragment in fragments]


def train(world: World, fold: Fold, ranks: int) -> Outcome:
    """The fold on this world; a world of one plays all `ranks` by itself."""

    def batches(step: int) -> list[Batch]:
        if world.size == ranks:
            return [micro_batch(step, index * ranks + world.rank) for index in range(fold.accumulation)]
        every = [micro_batch(step, number) for number in range(fold.accumulation * ranks)]
        if fold.scope == "micro_batch":  # balance is asked of every rank's micro-batch by itself
            return every
        return [merged(every[index * ranks : (index + 1) * ranks]) for index in range(fold.accumulation)]

    parallel = ParallelConfig(ep=fold.ep, dense=fold.dense, placement_seed=fold.placement_seed)
    optim = OptimConfig(beta1=BETA1, grad_clip=0.5)
    mesh = Mesh(world, fold.ep if world.size == ranks else 1)
    settings = EngineConfig(dtype=fold.dtype, autocast="off", recompute=fold.recompute)
    engine = TorchEngine(model_config(fold), parallel, settings, optim, world, mesh)
    engine.initialize(seed=1)
    results, moments = list[StepResult](), list[Fragment]()
    for number in range(fold.steps):
        results.append(engine.step(batches(number), 3e-3, lambda: None))
        moments = moments or [f for f in detached(engine.state()) if f.component == "m"]
    return Outcome(results, moments, [f for f in detached(engine.state()) if f.component == "master"])


def on_ranks(world: World, folds: list[Fold]) -> list[Outcome]:
    return [train(world, fold, world.size) for fold in folds]


def farthest(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference of two tensors of one key, relative to the norm of the second."""
    assert mine.keys() == theirs.keys()
    return max(float((mine[key] - theirs[key]).norm() / theirs[key].norm().clamp(min=1e-30)) for key in mine)


@pytest.mark.dist
@pytest.mark.timeout(560)
def test_every_fold_of_four_ranks_equals_one_process(tmp_path: Path) -> None:
    by_rank = run_ranks(on_ranks, 4, tmp_path, FOLDS + SINGLE, timeout=500)
    single = World.single(torch.device("cpu"))
    references: dict[tuple[object, ...], Outcome] = {}
    for number, fold in enumerate(FOLDS + SINGLE):
        key = fold.accumulation, fold.scope, fold.dtype, fold.num_experts, fold.steps
        if key not in references:
            references[key] = train(single, fold, 4)
        reference = references[key]
        outcomes = [outcomes[number] for outcomes in by_rank]
        loss_limit, gradient_limit, final_limit = (1e-10, 1e-10, 1e-8) if fold.dtype == "float64" else (1e-6, 1e-5, 1e-5)
        for outcome in outcomes:
            for step, (mine, theirs) in enumerate(zip(outcome.results, reference.results, strict=True)):
                limit = loss_limit if step == 0 else final_limit
                assert abs(mine.loss - theirs.loss) <= limit * theirs.loss, (fold, step)
                assert abs(mine.auxiliary_loss - theirs.auxiliary_loss) <= limit * theirs.auxiliary_loss, (fold, step)
                assert abs(mine.grad_norm - theirs.grad_norm) <= 10 * limit * theirs.grad_norm, (fold, step)
                assert torch.equal(mine.load, theirs.load), (fold, step)
        gradients = assemble([fragment for outcome in outcomes for fragment in outcome.gradients])
        final = assemble([fragment for outcome in outcomes for fragment in outcome.final])
        assert farthest(gradients, assemble(reference.gradients)) <= gradient_limit, fold
        assert farthest(final, assemble(reference.final)) <= final_limit, fold


def uneven(world: World) -> list[Fragment]:
    """8 experts on 3 ranks."""
    fold = Fold(3, "replicate", 1, num_experts=8, placement_seed=3)
    return train(world, fold, world.size).final


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_eight_experts_on_three_ranks_equal_one_process(tmp_path: Path) -> None:
    by_rank = run_ranks(uneven, 3, tmp_path, timeout=280)
    reference = train(World.single(torch.device("cpu")), Fold(3, "replicate", 1, num_experts=8, placement_seed=3), 3).final
    assert farthest(assemble([fragment for fragments in by_rank for fragment in fragments]), assemble(reference)) <= 1e-8
