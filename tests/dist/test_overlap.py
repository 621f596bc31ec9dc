"""Measuring and planning on real ranks: the same bits as without, the same plan everywhere, and the lanes of a step."""

from pathlib import Path

import pytest
import torch

from moetrain.data.batch import Batch
from moetrain.dist.mesh import Mesh
from moetrain.dist.world import World
from moetrain.model.blocks import RoutedBlock
from moetrain.model.config import AttentionConfig, ModelConfig
from moetrain.model.state import Fragment
from moetrain.optim.config import OptimConfig
from moetrain.parallel.block_times import Site, visits
from moetrain.parallel.config import EngineConfig, OverlapConfig, ParallelConfig
from moetrain.parallel.engine import StepResult
from moetrain.parallel.native import TorchEngine
from moetrain.parallel.observer import StepObserver
from moetrain.routing.config import RoutingConfig
from moetrain.telemetry.lanes import Lanes
from tests.clock import FakeClock
from tests.kit import run_ranks
from tests.unit.overlap_kit import serial_lanes, shaped

VOCABULARY, LENGTH = 31, 16
Values = list[torch.Tensor]


def engine_of(world: World, overlap: OverlapConfig, pattern: list[str], recompute: bool = False) -> TorchEngine:
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8)
    layers = sum(2 if kind in ("scmoe", "dgmoe") else 1 for kind in pattern)
    model = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_layers=layers, pattern=pattern, ffn_size=24, expert_ffn_size=20, shared_ffn_size=12,
        max_position=LENGTH, init_std=0.3, attention=attention, routing=RoutingConfig(num_experts=4, top_k=1),
    )  # fmt: skip
    mesh = Mesh(world, world.size)
    engine = TorchEngine(model, ParallelConfig(overlap=overlap), EngineConfig(recompute=recompute), OptimConfig(), world, mesh)
    engine.initialize(seed=1)
    return engine


def batch(world: World, step: int, number: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + 10 * number + world.rank)
    ids = torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=generator)
    position = torch.arange(LENGTH).expand(2, LENGTH)
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(2, LENGTH, dtype=torch.bool), position, None)


def steps(engine: TorchEngine, num_steps: int, ask: tuple[bool, ...] = ()) -> list[StepResult]:
    """Steps of two micro-batches; `ask`: the first of them are observed, serial or not."""
    results = []
    for step in range(num_steps):
        if step < len(ask):
            engine.observe(ask[step])
        results.append(engine.step([batch(engine.world, step, number) for number in range(2)], 1e-2, lambda: None))
    return results


def values(engine: TorchEngine) -> Values:
    fragments: list[Fragment] = list(engine.state())
    return [fragment.data.detach().clone() for fragment in fragments]


def blocks(engine: TorchEngine) -> list[RoutedBlock]:
    return [module for module in engine.model.modules() if isinstance(module, RoutedBlock)]


def train(world: World, overlap: OverlapConfig, pattern: list[str], recompute: bool, ask: tuple[bool, ...]) -> tuple[Values, list, int]:
    """Parameters and moments, schedules, and the number of measured steps after ten."""
    engine = engine_of(world, overlap, pattern, recompute)
    transport, planner = engine.mesh.ep.link.transport, engine.observer.planner
    learned: list[Lanes] = []
    learn = planner.learn
    planner.learn = lambda lanes: (learned.append(lanes), learn(lanes))[1]  # type: ignore[method-assign]
    steps(engine, 10, ask)
    assert engine.mesh.ep.link.transport is transport
    return values(engine), [block.schedule for block in blocks(engine)], len(learned)


def all_ways(world: World, pattern: list[str], recompute: bool) -> list[list]:
    """Schedules of the adaptive runs, after they were compared with a fixed one."""
    expected, _, measured = train(world, OverlapConfig(slot=1), pattern, recompute, ())
    assert measured == 0
    plans = []
    for overlap, ask, times in ((OverlapConfig(measure_every=1), (), 8), (OverlapConfig(), (True, False, True), 4)):
        found, schedules, measured = train(world, overlap, pattern, recompute, ask)
        assert measured == times
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
        plans.append(schedules)
    return [*plans, train(world, OverlapConfig(chunks=0, measure_every=1), pattern, recompute, ())[1]]


@pytest.mark.parametrize(("pattern", "recompute"), [(["scmoe", "shared"], False), (["dgmoe", "moe"], True)])
def test_measured_and_observed_steps_are_bit_equal_and_ranks_plan_alike(tmp_path: Path, pattern: list[str], recompute: bool) -> None:
    first, second = run_ranks(all_ways, 2, tmp_path, pattern, recompute)
    assert first == second


class ByChunks(FakeClock):
    """Between two looks at it as many seconds pass as are said for the chunks in which this block runs."""

    def __init__(self, block: RoutedBlock, seconds: dict[int, float]) -> None:
        super().__init__()
        self.block, self.by_number = block, seconds

    def monotonic(self) -> float:
        self.sleep(self.by_number[self.block.schedule.num_chunks])
        return super().monotonic()


def made_up(routed: list[RoutedBlock]) -> Lanes:
    """Of two micro-batches on a link so slow that chunks pay by simulation."""
    sites, schedules = [Site.of(block) for block in routed], [block.schedule for block in routed]
    return serial_lanes(sites, schedules, [shaped(1024, 256, 1024, 1, len(block.operators), 50) for block in routed] * 2, 2)


def try_chunks(world: World, seconds: list[dict[int, float]], asked: dict[int, bool]) -> tuple[list[int], list[int], list[float]]:
    """Chunks in every step, numbers of the steps whose lanes came back, and this rank's seconds as the planner had them.

    `seconds`: of a step in so many chunks on every rank; `asked`: by step, serial or not. The engine evaluates between all steps.
    """
    engine = engine_of(world, OverlapConfig(chunks=0, max_chunks=2), ["moe", "moe"])
    routed, planner = blocks(engine), engine.observer.planner
    engine.observer = StepObserver(planner, engine.mesh.ep, ByChunks(routed[0], seconds[world.rank]))
    learn, compare, told = planner.learn, planner.compare, list[float]()
    planner.learn = lambda lanes: learn(made_up(routed))  # type: ignore[method-assign]
    planner.compare = lambda its: (told.append(its), compare(its))[1]  # type: ignore[method-assign]
    chunks, observed = [], []
    for step in range(16):
        if step in asked:
            engine.observe(asked[step])

        def note() -> None:
            chunks.append(routed[0].schedule.num_chunks)

        result = engine.step([batch(world, step, number) for number in range(2)], 1e-2, note)
        observed += [step] if result.lanes is not None else []
        engine.evaluate(batch(world, step, 2))
    return chunks, observed, told


def try_all(world: World) -> list[tuple[list[int], list[int], list[float]]]:
    return [try_chunks(world, seconds, asked) for seconds, asked, _ in TRIALS]


TRIALS = [  # seconds by chunks on either rank, of which each one alone would choose otherwise; what is asked; the best for both
    ([{1: 1.0, 2: 0.75}, {1: 0.5, 2: 0.875}], {}, 2),
    ([{1: 0.75, 2: 0.5}, {1: 0.5, 2: 0.875}], {4: True, 5: False, 7: True}, 1),
]


def test_plans_are_tried_in_steps_that_nobody_observes_and_ranks_choose_what_suits_the_slowest(tmp_path: Path) -> None:
    """The first step is a warm-up, two are measured, eight are tried."""
    first, second = run_ranks(try_all, 2, tmp_path)
    for (seconds, asked, best), *of_ranks in zip(TRIALS, first, second, strict=True):
        for rank, (chunks, observed, told) in enumerate(of_ranks):
            assert observed == list(asked)
            tried = [its for step, its in enumerate(chunks) if 3 <= step < 11 + len(asked) and step not in asked]
            assert tried == [1, 2] * 4
            assert told == [seconds[rank][number] for number in tried]
            assert set(chunks[11 + len(asked) :]) == {best}


def observe(world: World, pattern: list[str], chunks: int) -> tuple[list[Lanes], list[int], float]:
    engine = engine_of(world, OverlapConfig(slot=2, chunks=chunks), pattern)
    results = steps(engine, 3, (True, False))
    assert results[2].lanes is None
    lanes = [result.lanes for result in results[:2] if result.lanes is not None]
    sites = [Site.of(block) for block in blocks(engine)]
    return lanes, [len(times.forward.trips) for _, times in visits(lanes[0], sites)], results[2].waited_seconds


CASES = [(["scmoe", "shared"], 1, [1, 1]), (["scmoe"], 3, [1]), (["dgmoe"], 2, [2])]  # pattern, chunks, trips of every block


def observe_all(world: World) -> list[tuple[list[Lanes], list[int], float]]:
    return [observe(world, pattern, chunks) for pattern, chunks, _ in CASES]


def test_lanes_hold_every_exchange_and_operator_of_a_step(tmp_path: Path) -> None:
    ranks = run_ranks(observe_all, 2, tmp_path)
    for (_, chunks, trips), *of_ranks in zip(CASES, *ranks, strict=True):
        assert of_ranks[0][2] == of_ranks[1][2] > 0
        for lanes, num_trips, _ in of_ranks:
            assert num_trips == trips * 2  # two micro-batches
            check_lanes(lanes, chunks, trips)


def check_lanes(observed: list[Lanes], chunks: int, trips: list[int]) -> None:
    serial, overlapped = observed
    assert serial.serial and not overlapped.serial
    for lanes in observed:
        names = [journey.name for journey in lanes.journeys]
        for name in ("rows to experts", "rows from experts"):
            assert names.count(name) == names.count(f"gradient of {name}") == 2 * chunks * sum(trips)
        assert names.count("expert counts") == 2 * sum(trips)  # one for all chunks
        for journey in lanes.journeys:
            assert journey.ready <= journey.start <= journey.end and journey.land <= journey.landed
        assert sum(journey.num_bytes for journey in lanes.journeys) > 0
        operators = [its.name for its in lanes.computations]
        assert operators.count("blocks.0.moe.experts/experts") == 2 * chunks * trips[0]
        assert operators.count("gradient of blocks.0.moe.experts/attention") == 2
