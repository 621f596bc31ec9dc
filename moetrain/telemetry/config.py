"""What a run shows and records, as configuration. No torch."""

from dataclasses import dataclass

from moetrain.base.errors import ConfigError, one_of

CONSOLES = ("auto", "live", "lines", "off")
WANDB_MODES = ("off", "online", "offline")


@dataclass
class TelemetryConfig:
    """metrics.jsonl is always written; the rest is by choice."""

    log_every: int = 1  # steps between records
    console: str = "auto"  # auto (live display on a terminal, lines elsewhere) | live | lines | off
    tensorboard: bool = False
    wandb: str = "off"  # off | online | offline
    wandb_project: str = "moetrain"
    experts_every: int = 50  # steps between expert-load snapshots (experts/step-*.npz and the heat map); 0 = never

    def check(self, key: str = "telemetry") -> None:
        """Raises ConfigError at the first broken rule."""
        one_of(f"{key}.console", self.console, CONSOLES)
        one_of(f"{key}.wandb", self.wandb, WANDB_MODES)
        if self.log_every < 1:
            raise ConfigError.of(f"{key}.log_every", self.log_every, "it must be at least 1")
        if self.experts_every < 0:
            raise ConfigError.of(f"{key}.experts_every", self.experts_every, "it must be at least 0")


@dataclass
class ProfileConfig:
    """torch.profiler over a few steps, written to trace/."""

    start_step: int = 0  # first profiled step; 0 = off
    num_steps: int = 3
    memory: bool = False  # record allocations too

    def check(self, key: str = "profile") -> None:
        """Raises ConfigError at the first broken rule."""
        for name, value, least in (("start_step", self.start_step, 0), ("num_steps", self.num_steps, 1)):
            if value < least:
                raise ConfigError.of(f"{key}.{name}", value, f"it must be at least {least}")
