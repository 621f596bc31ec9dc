"""What makes a run the same run: the keys that a resume must not change, and a sentence where they did.

The corpus, its order, the model, the optimizer and the global batch are the run's identity. What spreads it over ranks, shows it, saves
it or ends it is not: `ep`, micro-batch, accumulation, time-outs, folders, checkpoints and telemetry may differ after every restart. So may
`train.tokens`: the order of samples does not depend on it. But the schedule of the learning rate does, so a change is said aloud.
"""

from dataclasses import fields, is_dataclass

from moetrain.base.errors import CheckpointError
from moetrain.config.schema import TrainConfig
from moetrain.optim.config import OptimConfig

Plain = str | int | float | bool | None | list["Plain"] | dict[str, "Plain"]

IDENTITY = (
    "run.seed",
    "train.global_batch_tokens",
    "model",
    "data.corpora",
    "data.seq_len",
    "data.document_boundaries",
    "data.seed",
    "optim",
    "engine.dtype",
    "checkpoint.init_from",
)


def identity(config: TrainConfig) -> dict[str, Plain]:
    """Dotted keys of the run's identity with their values, ready for JSON."""
    found: dict[str, Plain] = {}
    for key, value in flatten(config).items():
        if any(key == root or key.startswith(root + ".") for root in IDENTITY):
            found[key] = value
    return found


def diff(saved: dict[str, Plain], now: dict[str, Plain]) -> list[str]:
    """The keys that changed, as `optim.lr: 0.001 -> 0.0003`; a key that one side lacks shows as `absent`."""
    keys = [*saved, *[key for key in now if key not in saved]]
    return [f"{key}: {saved.get(key, 'absent')} -> {now.get(key, 'absent')}" for key in keys if _differ(key, saved, now)]


def require_same(saved: dict[str, Plain], now: dict[str, Plain], run: str) -> None:
    """Raises CheckpointError naming every key of the identity that changed since `run` was saved."""
    changes = diff(saved, now)
    if changes:
        sentence = f"The run {run} was started with other values: {'; '.join(changes)}."
        hint = "Choose another run.name, put the values back, or go on with checkpoint.allow_changes=true."
        raise CheckpointError(sentence, hint)


def describe_horizon(tokens_before: int, tokens_now: int, optim: OptimConfig) -> str:
    """A sentence for the log when `train.tokens` changed since the last start; empty when it did not."""
    if tokens_before == tokens_now:
        return ""
    what = "lengthened" if tokens_now > tokens_before else "shortened"
    parts = "warm-up" if optim.schedule == "constant" else "warm-up and decay"
    return (
        f"The run is {what} from {tokens_before:,} to {tokens_now:,} tokens: the order of samples stays, "
        f"the {optim.schedule} schedule ({parts}) is laid over the new length from here on."
    )


def flatten(config: object, prefix: str = "") -> dict[str, Plain]:
    """A tree of dataclasses as dotted keys. A list is one value; dataclasses in it become dicts."""
    flat: dict[str, Plain] = {}
    for item in fields(config):  # pyright: ignore[reportArgumentType]
        key, value = prefix + item.name, getattr(config, item.name)
        if is_dataclass(value):
            flat |= flatten(value, key + ".")
        else:
            flat[key] = [flatten(x) if is_dataclass(x) else x for x in value] if isinstance(value, list) else value
    return flat


def _differ(key: str, saved: dict[str, Plain], now: dict[str, Plain]) -> bool:
    return key not in saved or key not in now or saved[key] != now[key]
