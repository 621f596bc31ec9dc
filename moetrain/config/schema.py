"""The root of the configuration: the dataclass of every room under the name of its Hydra group."""

from dataclasses import dataclass, field

from moetrain.checkpoint.config import CheckpointConfig
from moetrain.data.config import DataConfig
from moetrain.model.config import ModelConfig
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.telemetry.config import ProfileConfig, TelemetryConfig
from moetrain.train.config import RunConfig, TrainingConfig


@dataclass
class DebugConfig:
    """Looking before leaping: nothing is trained and no folder is made."""

    plan: bool = False  # print axes, parameters, memory, traffic and checkpoint bytes, and end
    world: int = 0  # ranks to plan for; 0 = as many as were started


@dataclass
class TrainConfig:
    """One run. Mutable because Hydra fills it; treated as a value from then on."""

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainingConfig = field(default_factory=TrainingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
