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
from moetrain.base.errors import ConfigError
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.recover import LoadReport, from_rank_zero
from moetrain.checkpoint.turns import Horizon, Turns
from moetrain.config import TrainConfig, batch_of, describe_horizon
from moetrain.config.origin import is_restart, origin, origin_run, remember_job, set_aside, settled_place
from moetrain.config.saved import require_same_run, write_config
from moetrain.data.batch import Batch
from moetrain.data.corpus import Corpus, open_corpora
from moetrain.data.loader import TrainLoader
from moetrain.data.manifest import Manifest
from moetrain.data.prepare import ensure_prepared
from moetrain.data.windows import evaluation_windows
from moetrain.dist.mesh import Mesh, auto_ep
from moetrain.dist.same import flat, require_same
from moetrain.dist.stop import Stop
from moetrain.dist.world import World
from moetrain.model.count import training_flops_per_token
from moetrain.parallel.native import TorchEngine
from moetrain.parallel.rehearsal import check_order
from moetrain.store.bundle import Bundle
from moetrain.telemetry.env import write_env
from moetrain.telemetry.meter import Meter, peak_memory_bytes
from moetrain.telemetry.open import open_sinks
from moetrain.telemetry.probe import peak_flops
from moetrain.train.evaluate import EvaluationResult, evaluate
from moetrain.train.hooks import EvaluateHook, EventHook, LogHook, ProfileHook, SampleHook, SaveHook
from moetrain.train.loop import DONE
from moetrain.train.loop import train as loop
from moetrain.train.run import Progress, Run
from moetrain.train.weights import load_bundle, require_same_tokenizer

DONE_FILE = "DONE"  # in the run folder: nothing is left to do; Slurm does not requeue


def train(config: TrainConfig) -> int:
    """One run on this rank, to its end or its next polite stop. Returns 0; raises MoetrainError for what a user can mend."""
    folder = Path(config.run.folder) / config.run.name
    rank = int(os.environ.get("RANK", "0"))
    log.configure(rank, folder / "log" / f"rank{rank}.log")
    ensure_prepared(config.data, show_progress=rank == 0)  # before the ranks meet: it may take longer than a collective is given
    with ExitStack() as stack:
        world = stack.enter_context(World.join(config.parallel.timeout_seconds, config.parallel.heartbeat_seconds))
        stop = stack.enter_context(Stop(world, folder / "STOP"))
        run = build(config, folder, world, stop)
        stack.callback(run.sinks.close)
        reason = loop(run)
        if world.is_main and reason == DONE:
            (folder / DONE_FILE).touch()
    log.logger().info("The run ended: %s, at step %d of %d.", reason, run.progress.step, run.progress.total_steps)
    return 0


def settings_of(config: TrainConfig, world: World) -> dict[str, object]:
    """What ranks cannot train together without having in common. Paths may differ from machine to machine."""
    sections = {name: asdict(getattr(config, name)) for name in ("model", "parallel", "engine", "optim", "train")}
    common = {"run.seed": config.run.seed, "data.seq_len": config.data.seq_len, "data.seed": config.data.seed}
    return flat(sections) | common | {"kind of device": world.device.type, "torch": torch.__version__}


def build(config: TrainConfig, folder: Path, world: World, stop: Stop) -> Run:
    """Everything a run needs, in the order in which it comes to be."""
    clock = SystemClock()
    require_same(world, settings_of(config, world))
    mesh = Mesh(world, config.parallel.ep or auto_ep(world.size, config.model.routing.num_experts))
    corpora = open_corpora(config.data)
    content = content_of(corpora, config.model.vocab_size)
    batch = batch_of(config, world.size)
    samples_per_step = config.train.global_batch_tokens // config.data.seq_len
    progress = Progress(total_steps=-(-config.train.tokens // config.train.global_batch_tokens))

    engine = TorchEngine(config.model, config.parallel, config.engine, config.optim, world, mesh)
    check_order(engine, config.parallel, config.engine, batch)
    at = from_rank_zero(world.rank, world.agree, lambda: origin(config.checkpoint.resume, folder, os.environ)) or ""
    again = from_rank_zero(world.rank, world.agree, lambda: "again" if is_restart(folder, os.environ) else "") == "again"
    resumed = origin_run(at, folder)
    before = None if resumed is None else require_same_run(config, content, resumed)
    world.barrier("every rank compared the configuration")
    if world.is_main:
        if at == "never":
            set_aside(folder)
        remember_job(folder, os.environ)
    place = Path(from_rank_zero(world.rank, world.agree, lambda: settled_place(folder, config.checkpoint.folder)) or "")
    checkpoint = Checkpointer(
        place, config.checkpoint, world.rank, world.size, world.agree, clock, gather=world.gather,
        turns=Turns(config.checkpoint, horizon(config, progress.total_steps)), board=world.board(),
    )  # fmt: skip
    report = _start(config, at, again, before, content["tokenizer"], engine, checkpoint, progress)
    if world.is_main:
        (folder / DONE_FILE).unlink(missing_ok=True)  # a finished run that is lengthened goes on
        write_config(config, content, folder, sys.argv[1:])
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
        *([EvaluateHook(config.train, evaluation.whole)] if evaluation.is_possible() else []),
        SampleHook(config.train),
        SaveHook(config.checkpoint),
        ProfileHook(config.profile),
        EventHook(report),
    ]
    return Run(
        config=config, folder=folder, world=world, engine=engine, checkpoint=checkpoint, loader=loader, samples_per_step=samples_per_step,
        progress=progress, stop=stop, sinks=sinks, meter=meter, clock=clock, tokenizer=corpora[0].tokenizer(), evaluate=evaluation.part,
        records=LogHook(config.telemetry, config.model.banks()), hooks=hooks,
    )  # fmt: skip


def horizon(config: TrainConfig, total_steps: int) -> Horizon:
    """What the checkpoint policy must know of the whole run: its expert banks and what each of them will route."""
    routing, banks = config.model.routing, config.model.banks()
    chosen = total_steps * config.train.global_batch_tokens * config.model.num_gatings() * routing.top_k
    return Horizon(dict.fromkeys(banks, routing.num_experts), chosen // max(len(banks), 1))


def content_of(corpora: list[Corpus], vocab_size: int) -> dict[str, str]:
    """Hashes of what the run reads, a part of its identity. Raises ConfigError when a token has no embedding."""
    found: dict[str, str] = {}
    for corpus in corpora:
        facts = corpus.manifest.tokenizer
        if facts.vocab_size > vocab_size:
            rule = f"the corpus {corpus.folder} has {facts.vocab_size} tokens"
            raise ConfigError.of("model.vocab_size", vocab_size, rule, f"Use model.vocab_size={facts.vocab_size} or more.")
        found["tokenizer"] = facts.sha256  # the same for all of them
        found[f"tokens of {corpus.folder}"] = corpus.manifest.splits["train"].bin_sha256
    return found


def _start(
    config: TrainConfig, at: str, is_restart: bool, before: TrainConfig | None, tokenizer: str, engine: TorchEngine,
    checkpoint: Checkpointer, progress: Progress,
) -> LoadReport | None:  # fmt: skip
    """Initial values, a bundle's, or the newest checkpoint's."""
    state = engine.state()
    report = checkpoint.load(state, at, is_restart)
    if report is None:
        engine.initialize(config.run.seed)
        if config.checkpoint.init_from:
            require_same_tokenizer(Bundle.open(config.checkpoint.init_from), tokenizer)
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

    def is_possible(self) -> bool:
        """Says so when there is no held-out text: a small corpus may have none."""
        if not self.split.tokens:
            log.logger().warning("The corpus %s has no validation document: nothing is evaluated.", self.folder)
        return self.split.tokens > 0

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
