"""The plan of a whole configuration for any number of ranks, without a process group."""

from math import ceil

from rich.console import Console

from moetrain.base.errors import ConfigError
from moetrain.checkpoint.modes import ALWAYS_WRITTEN
from moetrain.config.rules import batch_of, check
from moetrain.config.schema import TrainConfig
from moetrain.parallel.plan import Batch, Plan, Saving, axes, make_plan
from moetrain.parallel.plan_table import render


def plan(config: TrainConfig, world: int) -> Plan:
    """Plans a checked configuration. A global batch that this world cannot share equally is rounded up, and a note says so."""
    try:
        batch, notes = batch_of(config, world), ()
    except ConfigError as error:
        batch, notes = rounded_batch(config, world), (f"Training would not start like this: {error}",)
    checkpoint = config.checkpoint
    saving = Saving(ALWAYS_WRITTEN[checkpoint.mode], checkpoint.experts_per_save, checkpoint.full_every, checkpoint.keep)
    layout = axes(config.model, config.parallel, world)
    return make_plan(config.model, config.parallel, config.engine, layout, batch, saving, config.train.tokens, notes)


def print_plan(config: TrainConfig, world: int) -> None:
    """Checks and prints to standard output. Raises ConfigError or PlanError."""
    check(config, world)
    Console().print(render(plan(config, world), config.run.name))


def rounded_batch(config: TrainConfig, world: int) -> Batch:
    """The nearest larger batch that comes out even, with the micro-batch size as given or 1."""
    micro = config.train.micro_batch_size or 1
    sequences = ceil(config.train.global_batch_tokens / config.data.seq_len)
    accumulation = max(1, ceil(sequences / world / micro))
    return Batch(world * micro * accumulation, config.data.seq_len, micro, accumulation)
