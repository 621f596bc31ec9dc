"""What FSDP2 ranks show of their state at any moment, and that any other layout resumes it bit for bit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.base.clock import SystemClock
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.recover import alone
from moetrain.dist.mesh import Mesh
from moetrain.dist.world import World
from moetrain.model.experts import Experts
from moetrain.model.state import Fragment, assemble
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineConfig, OverlapConfig, ParallelConfig
from moetrain.parallel.native import TorchEngine
from tests.dist.test_parity import Fold, detached, micro_batch, model_config
from tests.kit import run_ranks

pytestmark = pytest.mark.dist


def engine_of(world: World, ep: int, dense: str, chunks: int = 1) -> TorchEngine:
    config = model_config(Fold(ep, dense, 1))
    parallel = ParallelConfig(ep=ep, dense=dense, overlap=OverlapConfig(chunks=chunks))
    return TorchEngine(config, parallel, EngineConfig(dtype="float64", autocast="off"), OptimConfig(), world, Mesh(world, ep))


def step(engine: TorchEngine, number: int) -> None:
    engine.step([micro_batch(number, engine.world.rank + 1)], 1e-3, lambda: None)


def look_around(engine: TorchEngine) -> None:
    engine.evaluate(micro_batch(100, engine.world.rank + 1))
    engine.generate([1, 2], 2, 0)


def save(world: World, folder: Path, ep: int) -> tuple[list[Fragment], list[Fragment], list[Fragment]]:
    """A full and a partial save, each behind an evaluation and a sample; the state at both and without them."""
    engine = engine_of(world, ep, "fsdp")
    engine.initialize(1)
    checkpoint = Checkpointer(
        folder, CheckpointConfig(), world.rank, world.size, world.agree, SystemClock(), gather=world.gather, board=world.board()
    )
    step(engine, 0)
    undisturbed = detached(engine.state())
    states = []
    for number in (1, 2):
        look_around(engine)
        state = engine.state()
        states.append(detached(state))
        assert checkpoint.save(state, {"step": number}).done.wait(60)
        step(engine, number)
    checkpoint.finish()
    return undisturbed, states[0], states[1]


def resume(world: World, folder: Path, ep: int, dense: str) -> list[Fragment]:
    engine = engine_of(world, ep, dense)
    state = engine.state()
    checkpoint = Checkpointer(
        folder, CheckpointConfig(), world.rank, world.size, world.agree, SystemClock(), gather=world.gather, board=world.board()
    )
    assert checkpoint.load(state, "must") is not None
    engine.load(state)
    look_around(engine)
    return detached(engine.state())


@dataclass
class Seen:
    """What one rank saw of one fold: three states that it saved or could have saved, and what other layouts resumed."""

    undisturbed: list[Fragment]
    full: list[Fragment]
    partial: list[Fragment]
    resumed: list[list[Fragment]]


def interrupted(world: World) -> bool:
    """Whether the state is what it was, after an error in the second of three calls of a bank."""
    engine = engine_of(world, 1, "fsdp", chunks=3)
    engine.initialize(1)
    step(engine, 0)
    before, forward, calls = detached(engine.state()), Experts.forward, list[int]()

    def fails(bank: Experts, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the middle of a visit")
        return forward(bank, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Experts, "forward", fails)
        with pytest.raises(RuntimeError, match="in the middle"):
            step(engine, 1)
    after = detached(engine.state())
    same = [one.name == other.name and torch.equal(one.data, other.data) for one, other in zip(before, after, strict=True)]
    step(engine, 1)
    return all(same)


def on_ranks(world: World, folder: Path) -> list[Seen]:
    seen = []
    for ep in (1, 2):
        saved = save(world, folder / f"ep{ep}", ep)
        layouts = ((3 - ep, "fsdp"), (ep, "replicate"))
        seen.append(Seen(*saved, [resume(world, folder / f"ep{ep}", *layout) for layout in layouts]))
    return seen


def whole(ranks: list[list[Fragment]]) -> dict[str, Tensor]:
    return assemble([fragment for rank in ranks for fragment in rank])


def expected(full: dict[str, Tensor], partial: dict[str, Tensor], ages: dict[tuple[str, int], int]) -> dict[str, Tensor]:
    """The partial save's state, experts that it left out as the full one has them."""
    old = {f"{bank}.{name}:{component}:{expert}" for (bank, expert), age in ages.items() if age
           for name in ("gate_up_proj", "down_proj") for component in ("master", "m", "v", "step")}  # fmt: skip
    assert old <= partial.keys()
    return {key: full[key] if key in old else value for key, value in partial.items()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


@pytest.mark.timeout(240)
def test_saves_behind_an_evaluation_and_a_sample_resume_bit_for_bit_at_other_layouts(tmp_path: Path) -> None:
    by_rank = run_ranks(on_ranks, 2, tmp_path, tmp_path, timeout=200, limit=90.0)
    for ep, seen in zip((1, 2), zip(*by_rank, strict=True), strict=True):
        full, partial = whole([rank.full for rank in seen]), whole([rank.partial for rank in seen])
        assert_equal(full, whole([rank.undisturbed for rank in seen]))

        single = engine_of(World.single(torch.device("cpu")), 1, "replicate")
        state = single.state()
        report = Checkpointer(tmp_path / f"ep{ep}", CheckpointConfig(), 0, 1, alone, SystemClock()).load(state, "must")
        assert report is not None
        assert set(report.ages.values()) == {0, 1}
        wanted = expected(full, partial, report.ages)
        assert_equal(assemble(state), wanted)
        for resumed in zip(*(rank.resumed for rank in seen), strict=True):
            assert_equal(whole(list(resumed)), wanted)


def test_an_error_between_two_calls_of_a_bank_leaves_the_state_as_it_was(tmp_path: Path) -> None:
    assert run_ranks(interrupted, 2, tmp_path) == [True, True]
