"""Every rule that a configuration must keep, within a room and across rooms. The first broken one is raised as ConfigError."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import PurePath

from moetrain.base.errors import ConfigError, one_of
from moetrain.config.schema import TrainConfig
from moetrain.model.config import fits_grouped_mm
from moetrain.parallel.plan import Batch, axes, split_batch

CHOICES = {
    "parallel.dense": ("replicate", "fsdp"),
    "parallel.wire_dtype": ("auto", "same", "bfloat16"),
    "parallel.reduce_gradients": ("auto", "after"),
    "engine.name": ("torch",),
    "engine.dtype": ("float32", "float64"),
    "engine.autocast": ("auto", "bfloat16", "off"),
    "engine.experts": ("auto", "loop", "bmm", "grouped_mm"),
    "telemetry.console": ("auto", "live", "lines", "off"),
    "telemetry.wandb": ("off", "online", "offline"),
    "profile.what": ("trace", "comm"),
}
AT_LEAST = {
    1: ("train.tokens", "data.seq_len", "data.vocab_size", "telemetry.log_every", "profile.num_steps", "parallel.overlap.max_chunks"),
    0: ("run.seed", "run.stop_after", "train.micro_batch_size", "train.accumulation", "train.evaluate_every", "train.evaluate_batches",
        "train.sample_every", "train.sample_tokens", "data.seed", "telemetry.experts_every", "profile.start_step", "debug.world",
        "parallel.heartbeat_seconds", "parallel.overlap.slot", "parallel.overlap.chunks", "parallel.overlap.measure_every",
        "parallel.overlap.tolerance"),
}  # fmt: skip
POSITIVE = ("parallel.timeout_seconds",)
MOST_CHUNKS = 16  # all schedules of so many are tried within seconds; of twice as many it would take longer than ranks wait for each other


def check(config: TrainConfig, world: int) -> None:
    """Raises ConfigError or PlanError at the first broken rule. With debug.plan neither text nor an even batch is asked for."""
    _check_ranges(config)
    _check_run(config)
    config.model.check()
    _check_data(config)
    config.optim.check()
    _check_parallel(config)
    _check_profile(config)
    _check_checkpoint(config)
    axes(config.model, config.parallel, world)
    if not config.debug.plan:
        _check_corpora(config)
        batch_of(config, world)


def batch_of(config: TrainConfig, world: int) -> Batch:
    """Micro-batch size and accumulation at this world; ConfigError when the global batch cannot be kept."""
    train = config.train
    return split_batch(train.global_batch_tokens, config.data.seq_len, train.micro_batch_size, train.accumulation, world)


def value_at(config: TrainConfig, key: str) -> object:
    """The value under a dotted key."""
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _number(config: TrainConfig, key: str) -> float:
    value = value_at(config, key)
    assert isinstance(value, int | float), key
    return value


def _check_ranges(config: TrainConfig) -> None:
    for key, value in _leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError.of(key, value, "it must be a finite number")
    for key, choices in CHOICES.items():
        one_of(key, str(value_at(config, key)), choices)
    for least, keys in AT_LEAST.items():
        for key in keys:
            if not _number(config, key) >= least:
                raise ConfigError.of(key, value_at(config, key), f"it must be at least {least}")
    for key in POSITIVE:
        if not _number(config, key) > 0:
            raise ConfigError.of(key, value_at(config, key), "it must be positive")


def _leaves(config: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Every value under its dotted key, those of lists numbered."""
    if is_dataclass(config):
        for field in fields(config):
            yield from _leaves(getattr(config, field.name), f"{key}.{field.name}" if key else field.name)
    elif isinstance(config, list):
        for index, item in enumerate(config):
            yield from _leaves(item, f"{key}[{index}]")
    else:
        yield key, config


def _check_run(config: TrainConfig) -> None:
    name = config.run.name
    if PurePath(name).name != name or name in ("", ".", ".."):
        raise ConfigError.of("run.name", name, "it must be the name of one folder", "Folders above it belong into run.folder.")
    if not config.run.folder:
        raise ConfigError.of("run.folder", config.run.folder, "runs need a folder", "Use run.folder=runs.")
    if config.train.sample_every and not config.train.sample_prompts:
        rule = f"train.sample_every={config.train.sample_every} needs a prompt"
        raise ConfigError.of("train.sample_prompts", config.train.sample_prompts, rule, "Give one, or use train.sample_every=0.")


def _check_data(config: TrainConfig) -> None:
    data, model = config.data, config.model
    if data.seq_len > model.max_position:
        rule = f"the model has positions for model.max_position={model.max_position} tokens only"
        raise ConfigError.of("data.seq_len", data.seq_len, rule, f"Use data.seq_len={model.max_position} or a larger model.max_position.")
    if data.source and data.tokenizer == "train" and data.vocab_size > model.vocab_size:
        rule = f"the model has only model.vocab_size={model.vocab_size} embeddings"
        raise ConfigError.of("data.vocab_size", data.vocab_size, rule, "Use the same number for both.")
    for index, corpus in enumerate(data.corpora):
        if not corpus.weight > 0:
            rule = "a share of the blend must be positive"
            raise ConfigError.of(f"data.corpora[{index}].weight", corpus.weight, rule, "Leave the corpus out instead.")
    if data.source and len(data.corpora) != 1:
        rule = f"it is prepared into the one folder of data.corpora, which lists {len(data.corpora)}"
        raise ConfigError.of("data.source", data.source, rule, "Prepare each corpus with: moetrain data prepare")


def _check_corpora(config: TrainConfig) -> None:
    corpora = config.data.corpora
    if not corpora or not all(corpus.path for corpus in corpora):
        hint = "Prepare text with: moetrain data prepare FILES --out DIR, and add: data=custom 'data.corpora=[{path: DIR}]'"
        raise ConfigError.of("data.corpora", [corpus.path for corpus in corpora], "training needs the folder of a prepared corpus", hint)


def _check_parallel(config: TrainConfig) -> None:
    engine = config.engine
    if engine.dtype == "float64" and engine.autocast == "bfloat16":
        rule = "a float64 model is never computed in bfloat16"
        raise ConfigError.of("engine.autocast", engine.autocast, rule, "Use engine.autocast=off or engine.dtype=float32.")
    if engine.experts == "grouped_mm":
        _check_grouped_mm(config)
    for key in ("parallel.overlap.chunks", "parallel.overlap.max_chunks"):
        if not _number(config, key) <= MOST_CHUNKS:
            raise ConfigError.of(key, value_at(config, key), f"it must be at most {MOST_CHUNKS}: every schedule of so many chunks is tried")


def _check_grouped_mm(config: TrainConfig) -> None:
    engine, model = config.engine, config.model
    way_out = "Use engine.experts=auto, which takes it where it can."
    if engine.dtype == "float64":
        raise ConfigError.of("engine.experts", engine.experts, "torch's grouped matmul knows no float64", way_out)
    value_bytes = 4 if engine.autocast == "off" else 2
    if not fits_grouped_mm(model.hidden_size, model.expert_ffn_size, value_bytes):
        widths = f"model.hidden_size={model.hidden_size} and model.expert_ffn_size={model.expert_ffn_size}"
        rule = f"torch's grouped matmul needs multiples of {16 // value_bytes}, and the widths are {widths}"
        raise ConfigError.of("engine.experts", engine.experts, rule, way_out)


def _check_profile(config: TrainConfig) -> None:
    if config.profile.what == "comm" and config.profile.memory:
        rule = "allocations are recorded in a trace only"
        raise ConfigError.of("profile.memory", config.profile.memory, rule, "Use profile.what=trace or profile.memory=false.")


def _check_checkpoint(config: TrainConfig) -> None:
    checkpoint, num_experts = config.checkpoint, config.model.routing.num_experts
    checkpoint.check()
    if not checkpoint.resume:
        raise ConfigError.of("checkpoint.resume", checkpoint.resume, "it must be auto, must, never or a path")
    if not config.model.banks():
        return
    rule = f"a layer has model.routing.num_experts={num_experts}"
    if checkpoint.mode != "full" and checkpoint.experts_per_save > num_experts:
        hint = f"Use at most {num_experts}, or checkpoint.mode=full."
        raise ConfigError.of("checkpoint.experts_per_save", checkpoint.experts_per_save, rule, hint)
    if checkpoint.snapshot_experts > num_experts:
        hint = f"Use at most {num_experts}, or 0 for all if they fit."
        raise ConfigError.of("checkpoint.snapshot_experts", checkpoint.snapshot_experts, rule, hint)
