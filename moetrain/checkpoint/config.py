"""What is checkpointed when, as configuration. No torch."""

from dataclasses import dataclass

from moetrain.base.errors import ConfigError, one_of
from moetrain.checkpoint.modes import MODES


@dataclass
class CheckpointConfig:
    """Partial expert checkpoints, arXiv 2408.04307."""

    every_steps: int = 50  # 0 = only at the end and on a stop signal
    mode: str = "experts"  # experts: all state of unselected experts is left out | full
    experts_per_save: int = 1  # K: experts per layer in one partial checkpoint
    full_every: int = 0  # every n-th checkpoint is full; 0 = only the first and the last
    keep: int = 3  # newest recovery points kept; objects they refer to are kept with them
    resume: str = "auto"  # auto | must | never | path of a run or checkpoint folder
    allow_changes: bool = False  # resume although keys of the run's identity changed
    init_from: str = ""  # bundle whose weights start the run (fresh optimizer); "" = random initial values
    timeout_seconds: float = 60.0  # a save whose receipts take longer is abandoned, training goes on

    def check(self, key: str = "checkpoint") -> None:
        """Raises ConfigError at the first broken rule."""
        one_of(f"{key}.mode", self.mode, MODES)
        for name, value, least in (
            ("every_steps", self.every_steps, 0),
            ("experts_per_save", self.experts_per_save, 1),
            ("full_every", self.full_every, 0),
            ("keep", self.keep, 1),
        ):
            if value < least:
                raise ConfigError.of(f"{key}.{name}", value, f"it must be at least {least}")
        if self.timeout_seconds <= 0:
            raise ConfigError.of(f"{key}.timeout_seconds", self.timeout_seconds, "it must be positive")
