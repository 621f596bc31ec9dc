"""Whole training steps over the link: embedding, block pairs, loss, gradient reduction, clip and update, by the engine as a run uses it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moetrain.model.blocks import RoutedBlock
from moetrain.model.schedule import Schedule
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineConfig, OverlapConfig, ParallelConfig
from moetrain.parallel.native import TorchEngine
from tools.bench_step import Case, random_batch
from tools.overlap_arms import Arms
from tools.overlap_cases import NUM_WORDS, OVERLAPPED, SCMOE, SERIAL, SHARED, TOP_1, TOP_2, Run, Size, model_of
from tools.overlap_figures import interval, ratio

LR = 1e-3


@dataclass(frozen=True)
class Way:
    """How steps are made. `reduce`: parallel.reduce_gradients."""

    run: Run
    reduce: str = "auto"

    @property
    def name(self) -> str:
        return self.run.name + ("" if self.reduce == "auto" else ", gradients after the backward")


MINE = Way(Run(SCMOE, OVERLAPPED, (3,)))
WAYS = (
    Way(Run(TOP_2, SERIAL)), Way(Run(TOP_2, SERIAL, again=True)), Way(Run(TOP_2, SERIAL), "after"), Way(Run(TOP_2, OVERLAPPED, (1, 1))),
    Way(Run(TOP_2, OVERLAPPED, (1, 1)), "after"), Way(Run(TOP_1, SERIAL)), Way(Run(SHARED, SERIAL, (2,))),
    Way(Run(SHARED, OVERLAPPED, (2,))), Way(Run(SCMOE, SERIAL, (3,))), Way(Run(SCMOE, OVERLAPPED, (3,)), "after"), MINE,
)  # fmt: skip


def steps(arms: Arms, rounds: int, size: Size, accumulation: int) -> dict[str, object]:
    """Seconds of steps made in every way, interleaved; the first round is not counted. The gates choose, as they learn to."""
    world, mesh = arms.axis.world, arms.mesh
    case = Case(size.sequences, size.seq_len, 1)
    engines: dict[tuple[str, str], TorchEngine] = {}
    for model, reduce in dict.fromkeys((way.run.model, way.reduce) for way in WAYS):
        config = replace(model_of(model, size), vocab_size=NUM_WORDS)
        parallel = ParallelConfig(ep=world.size, overlap=OverlapConfig(slot=1), reduce_gradients=reduce)
        engines[model, reduce] = TorchEngine(config, parallel, EngineConfig(autocast="off"), OptimConfig(), world, mesh)
        engines[model, reduce].initialize(0)
    seconds: dict[str, list[float]] = {way.name: [] for way in WAYS}
    losses = dict[str, float]()
    for number in range(rounds + 1):
        for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
            run, engine = way.run, engines[way.run.model, way.reduce]
            for block in engine.model.modules():
                if isinstance(block, RoutedBlock):
                    block.schedule = Schedule(run.slots)
            first = accumulation * (world.size * number + world.rank)
            batches = [random_batch(engine.config, case, first + each) for each in range(accumulation)]
            with arms.use(run.arm):
                arms.barrier()
                started = time.perf_counter()
                losses[way.name] = engine.step(batches, LR, lambda: None).loss
                if number:
                    seconds[way.name].append(time.perf_counter() - started)
    nothing = [0.0] * rounds
    laps = {name: {"forward": its, "backward": nothing} for name, its in seconds.items()}  # a step is not parted
    return {"laps": laps, "losses": losses}


def step_summary(found: list[dict]) -> dict[str, object]:
    others = {way.name: ratio(found, way.name, MINE.name) for way in WAYS if way != MINE}
    return {"ratios": others | {"A/A": ratio(found, WAYS[1].name, WAYS[0].name)}}


def step_lines(figures: dict) -> Iterator[str]:
    for name, figure in figures["ratios"].items():
        yield f"{name:50} over {'itself' if name == 'A/A' else MINE.name}: {interval(figure)}"
