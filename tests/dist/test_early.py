"""Gradients that are summed during the backward pass on four ranks, ep 2 x edp 2, with an uneven bank: when, and the same ones as afterwards.

As in test_parity, Adam's first moment after one step shows every gradient.
"""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import Tensor

from moetrain.dist.mesh import Axis, Mesh
from moetrain.dist.world import World
from moetrain.model.config import ShortcutConfig
from moetrain.model.state import Fragment, assemble
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineConfig, OverlapConfig, ParallelConfig
from moetrain.parallel.gradients import GradientSync
from moetrain.parallel.native import TorchEngine
from tests.dist.test_parity import Fold, detached, farthest, micro_batch, model_config
from tests.kit import run_ranks

pytestmark = pytest.mark.dist

RANKS = 4
SECONDS = 30.0  # a test that fails waits so long
SMALL_HOPS = 128  # bytes: some gradients in slices, others together


class Sums:
    """Counts the sums over dp and edp, and says when there was one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = {"dp": 0, "edp": 0}
        self.was_one = Event()
        real = Axis.sum_

        def sum_(axis: Axis, tensor: Tensor, limit: timedelta | None = None) -> Tensor:
            result = real(axis, tensor, limit)
            if axis.name in self.made:
                self.made[axis.name] += 1
                self.was_one.set()
            return result

        monkeypatch.setattr(Axis, "sum_", sum_)

    def take(self) -> dict[str, int]:
        taken, self.made = self.made, {"dp": 0, "edp": 0}
        self.was_one.clear()
        return taken


def engine_of(world: World, when: str, num_experts: int, slot: int = 1) -> TorchEngine:
    fold = Fold(2, "replicate", 2, num_experts=num_experts)
    config = replace(model_config(fold), num_layers=4, pattern=["scmoe"], shortcut=ShortcutConfig([1, 3]))
    parallel = ParallelConfig(ep=2, reduce_gradients=when, overlap=OverlapConfig(slot=slot))
    engine = TorchEngine(config, parallel, EngineConfig(dtype="float64", autocast="off"), OptimConfig(), world, Mesh(world, 2))
    engine.gradients = GradientSync(engine.model, engine.mesh, when, SMALL_HOPS)
    engine.initialize(seed=1)
    return engine


def one_step(engine: TorchEngine, step: int, sums: Sums, is_early: bool) -> tuple[int, list[Fragment]]:
    """Sums made by the end of the step's passes, and its first moments."""
    sums.take()

    def hold(grad: Tensor) -> None:
        """Stops the last backward pass between the two pairs until there was a sum: of the second pair, whose exchanges have landed."""
        early = engine.gradients.early
        if early is not None and early.has_begun:
            assert sums.was_one.wait(SECONDS), "nothing was summed while the backward pass computed"

    def before_update() -> None:
        early = engine.gradients.early
        assert (early is not None and early.has_begun) is is_early
        before.append(sum(sums.made.values()))

    before: list[int] = []
    first = engine.model.blocks[0].register_forward_hook(lambda block, arguments, output: output[0].register_hook(hold) and None)
    batches = [micro_batch(step, index * RANKS + engine.world.rank) for index in range(2)]
    engine.step(batches, 1e-3, before_update)
    first.remove()
    assert engine.mesh.ep.link.under_way == []
    return before[0], [fragment for fragment in detached(engine.state()) if fragment.component == "m"]


def on_ranks(world: World) -> dict[str, list[Fragment]]:
    found: dict[str, list[Fragment]] = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        sums = Sums(monkeypatch)
        for num_experts in (4, 5):
            early = engine_of(world, "auto", num_experts)
            assert one_step(early, 0, sums, is_early=True)[0] > 0
            made = sums.take()
            assert made["dp"] > 4 and made["edp"] > 4  # clipping sums over dp too
            found[f"{num_experts}, early"] = one_step(early, 1, sums, is_early=True)[1]

            watched = engine_of(world, "auto", num_experts)
            for step in range(2):
                watched.observe(serial=False)
                number, found[f"{num_experts}, drawn"] = one_step(watched, step, sums, is_early=False)
                assert number == 0

            after = engine_of(world, "after", num_experts)
            for step in range(2):
                number, found[f"{num_experts}, after"] = one_step(after, step, sums, is_early=False)
                assert number == 0

        planned = engine_of(world, "auto", 4, slot=0)
        watched_steps = [is_watched(planned, step) for step in range(4)]
        assert True in watched_steps and False in watched_steps
    return found


def is_watched(engine: TorchEngine, step: int) -> bool:
    """Makes a step, which the planner may measure or try; then nothing is summed early."""

    def before_update() -> None:
        early = engine.gradients.early
        assert early is not None and early.has_begun is not engine.observer.needs_the_link
        found.append(engine.observer.needs_the_link)

    found: list[bool] = []
    engine.step([micro_batch(step, index * RANKS + engine.world.rank) for index in range(2)], 1e-3, before_update)
    return found[0]


@pytest.mark.timeout(150)
def test_gradients_are_summed_early_but_not_in_steps_that_are_watched(tmp_path: Path) -> None:
    by_rank = run_ranks(on_ranks, RANKS, tmp_path, timeout=120)
    found = {key: assemble([fragment for rank in by_rank for fragment in rank[key]]) for key in by_rank[0]}
    for num_experts in (4, 5):
        early, drawn, after = (found[f"{num_experts}, {how}"] for how in ("early", "drawn", "after"))
        assert all(torch.equal(drawn[key], value) for key, value in early.items())
        assert farthest(early, after) < 1e-12
