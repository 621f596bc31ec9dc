"""The wiring of a training run: every constructor call, top to bottom. Nothing else in the package knows all rooms."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from moetrain.base import log
from moetrain.base.clock import SystemClock
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.recover import LoadReport
from moetrain.config import TrainConfig, batch_of, describe_horizon
from moetrain.config.saved import require_same_run, write_config
from moetrain.data.batch import Batch
from moetrain.data.corpus import open_corpora
from moetrain.data.loader import TrainLoader
from moetrain.data.manifest import Manifest
from moetrain.data.prepare import ensure_prepared
from moetrain.data.windows import evaluation_windows
from moetrain.dist.mesh import Mesh, auto_ep
from moetrain.dist.stop import Stop
from moetrain.dist.world import World
from moetrain.model.count import training_flops_per_token
from moetrain.parallel.native import TorchEngine
from moetrain.store.io import Io
from moetrain.store.objects import CheckpointFolder
from moetrain.telemetry.env import write_env
from moetrain.telemetry.meter import Meter, peak_memory_bytes
from moetrain.telemetry.open import open_sinks
from moetrain.telemetry.probe import peak_flops
from moetrain.train.evaluate import EvaluationResult, evaluate
from moetrain.train.hooks import EvaluateHook, EventHook, LogHook, ProfileHook, SampleHook, SaveHook
from moetrain.train.loop import train as loop
from moetrain.train.run import Progress, Run
from moetrain.train.weights import load_bundle


def train(config: TrainConfig) -> int:
    """One run on this rank, to its end or its next polite stop. Returns 0; raises MoetrainError for what a user can mend."""
    folder = Path(config.run.folder) / config.run.name
    rank = int(os.environ.get("RANK", "0"))
    log.configure(rank, folder / "log" / f"rank{rank}.log")
    ensure_prepared(config.data, show_progress=rank == 0)  # before the ranks meet: it may take longer than a collective is given
    with ExitStack() as stack:
        world = stack.enter_context(World.join(config.parallel.timeout_seconds))
        stop = stack.enter_context(Stop(world, folder / "STOP"))
        run = build(config, folder, world, stop)
        stack.callback(run.sinks.close)
        reason = loop(run)
    log.logger().info("The run ended: %s, at step %d of %d.", reason, run.progress.step, run.progress.total_steps)
    return 0


def build(config: TrainConfig, folder: Path, world: World, stop: Stop) -> Run:
    """Everything a run needs, in the order in which it comes to be."""
    clock = SystemClock()
    mesh = Mesh(world, config.parallel.ep or auto_ep(world.size, config.model.routing.num_experts))
    corpora = open_corpora(config.data)
    batch = batch_of(config, world.size)
    samples_per_step = config.train.global_batch_tokens // config.data.seq_len
    progress = Progress(total_steps=-(-config.train.tokens // config.train.global_batch_tokens))

    engine = TorchEngine(config.model, config.parallel, config.engine, config.optim, world, mesh)
    before = require_same_run(config, origin_of(config, folder)) if _resumes(config, folder) else None
    world.barrier("every rank compared the configuration")
    checkpoint = Checkpointer(folder / "checkpoint", config.checkpoint, world.rank, world.size, world.agree, clock)
    report = _start(config, before, engine, checkpoint, progress)
    if world.is_main:
        write_config(config, folder, sys.argv[1:])
        write_env(folder, clock)

    loader = TrainLoader(
        config.data, corpora, samples_per_step, batch.micro_batch_size, world.rank, world.size, progress.samples,
        leader=world.is_main, barrier=lambda: world.barrier("an epoch's index"),
    )  # fmt: skip
    evaluation = Evaluation(config, engine, world)
    dtype = engine.autocast or getattr(torch, config.engine.dtype)
    flops = training_flops_per_token(config.model, config.data.seq_len)
    meter = Meter(clock, flops, world.size * peak_flops(world.device, dtype, clock), peak_memory_bytes(world.device))
    resolved: dict[str, object] = asdict(config)
    sinks = open_sinks(config.telemetry, folder, config.run.name, progress.total_steps, clock, resolved, world.is_main)
    hooks = [
        LogHook(config.telemetry, config.model.banks()),
        EvaluateHook(config.train, evaluation.whole),
        SampleHook(config.train),
        SaveHook(config.checkpoint.every_steps),
        ProfileHook(config.profile),
        EventHook(None if report is None else report.age_rows()),
    ]
    return Run(
        config=config, folder=folder, world=world, engine=engine, checkpoint=checkpoint, loader=loader, samples_per_step=samples_per_step,
        progress=progress, stop=stop, sinks=sinks, meter=meter, clock=clock, tokenizer=corpora[0].tokenizer(), evaluate=evaluation.part,
        hooks=hooks,
    )  # fmt: skip


def origin_of(config: TrainConfig, folder: Path) -> Path:
    """The run folder that is resumed from: this one, or the one that checkpoint.resume names."""
    if config.checkpoint.resume in ("auto", "must"):
        return folder
    named = Path(config.checkpoint.resume)
    return named.parent if named.name == "checkpoint" else named


def _resumes(config: TrainConfig, folder: Path) -> bool:
    """Whether there is a recovery point to go on from."""
    wanted = config.checkpoint.resume != "never"
    return wanted and bool(CheckpointFolder(origin_of(config, folder) / "checkpoint", Io()).saves())


def _start(
    config: TrainConfig, before: TrainConfig | None, engine: TorchEngine, checkpoint: Checkpointer, progress: Progress
) -> LoadReport | None:
    """Initial values, a bundle's, or the newest checkpoint's."""
    state = engine.state()
    report = checkpoint.load(state, config.checkpoint.resume)
    if report is None:
        engine.initialize(config.run.seed)
        if config.checkpoint.init_from:
            load_bundle(state, config.model, config.checkpoint.init_from)
            log.logger().info("The weights are those of the bundle %s; the optimizer starts fresh.", config.checkpoint.init_from)
        return None
    engine.load(state)
    progress.restore(report.progress)
    for line in report.lines():
        log.logger().info("%s", line)
    if before is not None and (change := describe_horizon(before.train.tokens, config.train.tokens, config.optim)):
        log.logger().info("%s", change)
    return report


class Evaluation:
    """Held-out text of the first corpus: all of it, or the part that is looked at during training."""

    def __init__(self, config: TrainConfig, engine: TorchEngine, world: World) -> None:
        self.config, self.engine, self.world = config, engine, world
        self.folder = Path(config.data.corpora[0].path)
        self.split = Manifest.read(self.folder).splits["validation"]

    def whole(self) -> EvaluationResult:
        """Every held-out byte once, windows overlapping by half."""
        return evaluate(self.engine, self._windows(), self.split)

    def part(self) -> EvaluationResult:
        """The first `train.evaluate_batches` batches (0: all), for a curve; bits per byte by the corpus's mean bytes per token."""
        return evaluate(self.engine, self._windows(), self.split, self.config.train.evaluate_batches)

    def _windows(self) -> Iterator[Batch]:
        data, stride = self.config.data, max(self.config.data.seq_len // 2, 1)
        return evaluation_windows(
            self.folder, "validation", data.seq_len, stride, 8, self.world.rank, self.world.size, data.document_boundaries
        )  # fmt: skip
