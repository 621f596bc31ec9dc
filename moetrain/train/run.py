"""One run: everything the loop and its hooks share, and the progress that a checkpoint carries."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol

from moetrain.base.clock import Clock
from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.data.batch import Batch
from moetrain.dist.stop import Stop
from moetrain.dist.world import World
from moetrain.optim.config import OptimConfig
from moetrain.parallel.engine import Engine, StepResult
from moetrain.telemetry.config import ProfileConfig, TelemetryConfig
from moetrain.telemetry.meter import Meter
from moetrain.telemetry.sinks import Sinks
from moetrain.text.tokenizer import Tokenizer
from moetrain.train.config import RunConfig, TrainingConfig
from moetrain.train.evaluate import EvaluationResult


@dataclass
class Progress:
    """Where the run is. `total_steps` follows from the configuration and is not saved."""

    total_steps: int
    step: int = 0
    tokens: int = 0  # valid tokens trained on
    samples: int = 0  # consumed, the only state of the data

    def advance(self, result: StepResult, samples: int) -> None:
        self.step += 1
        self.tokens += result.num_tokens
        self.samples += samples

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    def as_dict(self) -> dict[str, int]:
        saved = asdict(self)
        del saved["total_steps"]
        return saved

    def restore(self, saved: dict[str, object]) -> None:
        """Raises CheckpointError when a key is missing."""
        for name in (field.name for field in fields(self) if field.name != "total_steps"):
            value = saved.get(name)
            if not isinstance(value, int):
                raise CheckpointError(f"The checkpoint's progress has no whole number '{name}': {saved}.")
            setattr(self, name, value)


class RunSettings(Protocol):
    """The parts of the configuration that hooks read (moetrain.config.TrainConfig has them all)."""

    run: RunConfig
    train: TrainingConfig
    optim: OptimConfig
    telemetry: TelemetryConfig
    profile: ProfileConfig


class Hook(Protocol):
    """What happens beside the steps. Every rank calls every hook; a branch on the rank holds no collective."""

    def on_start(self, run: "Run") -> None: ...

    def on_step(self, run: "Run", result: StepResult) -> None: ...

    def on_finish(self, run: "Run", reason: str) -> None: ...


@dataclass
class Run:
    config: RunSettings
    folder: Path
    world: World
    engine: Engine
    checkpoint: Checkpointer
    loader: Iterator[list[Batch]]  # one list of this rank's micro-batches per step
    samples_per_step: int
    progress: Progress
    stop: Stop
    sinks: Sinks
    meter: Meter
    clock: Clock
    tokenizer: Tokenizer
    evaluate: Callable[[], EvaluationResult]
    records: Hook  # sees every step, also the one after which the run is stopped
    hooks: list[Hook]  # may take long: passed over at that step
