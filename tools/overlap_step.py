"""Whole training steps over the link: embedding, block pairs, loss, gradient reduction, clip and update, by the engine as a run uses it."""

import time
from collections.abc import Iterator
from dataclasses import replace

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
RUNS = (
    Run(TOP_2, SERIAL), Run(TOP_2, SERIAL, again=True), Run(TOP_2, OVERLAPPED, (1, 1)), Run(TOP_1, SERIAL), Run(SHARED, SERIAL, (2,)),
    Run(SHARED, OVERLAPPED, (2,)), Run(SCMOE, SERIAL, (3,)), Run(SCMOE, OVERLAPPED, (3,)),
)  # fmt: skip


def steps(arms: Arms, rounds: int, size: Size) -> dict[str, object]:
    """Seconds of every run's steps, interleaved; the first round is not counted. The gates choose, as they learn to."""
    world, mesh = arms.axis.world, arms.mesh
    case = Case(size.sequences, size.seq_len, 1)
    fixed = ParallelConfig(ep=world.size, overlap=OverlapConfig(slot=1))
    engines: dict[str, TorchEngine] = {}
    for model in dict.fromkeys(run.model for run in RUNS):
        config = replace(model_of(model, size), vocab_size=NUM_WORDS)
        engines[model] = TorchEngine(config, fixed, EngineConfig(autocast="off"), OptimConfig(), world, mesh)
        engines[model].initialize(0)
    seconds: dict[str, list[float]] = {run.name: [] for run in RUNS}
    losses = dict[str, float]()
    for number in range(rounds + 1):
        for run in RUNS[number % len(RUNS) :] + RUNS[: number % len(RUNS)]:
            engine = engines[run.model]
            for block in engine.model.modules():
                if isinstance(block, RoutedBlock):
                    block.schedule = Schedule(run.slots)
            batch = random_batch(engine.config, case, world.size * number + world.rank)
            with arms.use(run.arm):
                arms.barrier()
                started = time.perf_counter()
                losses[run.name] = engine.step([batch], LR, lambda: None).loss
                if number:
                    seconds[run.name].append(time.perf_counter() - started)
    nothing = [0.0] * rounds
    laps = {name: {"forward": its, "backward": nothing} for name, its in seconds.items()}  # a step is not parted
    return {"laps": laps, "losses": losses}


def step_summary(found: list[dict]) -> dict[str, object]:
    mine, serial = RUNS[-1].name, RUNS[0].name
    return {"ratios": {run.name: ratio(found, run.name, mine) for run in RUNS[:-1]} | {"A/A": ratio(found, RUNS[1].name, serial)}}


def step_lines(figures: dict) -> Iterator[str]:
    for name, figure in figures["ratios"].items():
        yield f"{name:40} over {'itself' if name == 'A/A' else RUNS[-1].name}: {interval(figure)}"
