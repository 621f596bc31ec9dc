"""What a run shows and records, as configuration. No torch."""

from dataclasses import dataclass


@dataclass
class TelemetryConfig:
    """metrics.jsonl is always written; the rest is by choice."""

    log_every: int = 1  # steps between records
    console: str = "auto"  # auto (live display on a terminal, lines elsewhere) | live | lines | off
    tensorboard: bool = False  # event files in tensorboard/
    wandb: str = "off"  # Weights & Biases: off | online | offline
    wandb_project: str = "moetrain"  # project there
    experts_every: int = 50  # steps between expert-load snapshots (experts/step-*.npz and the heat map); 0 = never


@dataclass
class ProfileConfig:
    """torch.profiler over a few steps, written to trace/."""

    start_step: int = 0  # first profiled step; 0 = off
    num_steps: int = 3  # profiled steps
    memory: bool = False  # record allocations too
