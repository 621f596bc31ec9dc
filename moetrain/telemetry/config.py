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
    """A closer look at a few steps, written to trace/."""

    what: str = "trace"  # trace (torch.profiler and the lanes of computation and exchange) | comm (what exchanges cost and hide)
    start_step: int = 0  # first profiled step; 0 = off
    num_steps: int = 3  # profiled steps; with comm, each is one serial and one overlapped step
    memory: bool = False  # trace: record allocations too
