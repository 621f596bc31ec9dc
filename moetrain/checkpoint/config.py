"""What is checkpointed when, as configuration. No torch."""

from dataclasses import dataclass


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
