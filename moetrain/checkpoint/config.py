"""What is checkpointed when, as configuration. No torch."""

import re
from dataclasses import dataclass, field

from moetrain.base.errors import ConfigError, one_of
from moetrain.checkpoint.modes import MODES

SELECTIONS = ("sequential", "greedy", "unsaved_age")
INTERVALS = ("steps", "auto")


@dataclass
class AgentConfig:
    """The process of a node that keeps copies of the state in memory and writes them to the store."""

    folder: str = ""  # where its memory lies; "" = shared memory, the folder for temporary files where that is too small
    partner: bool = True  # with several nodes: every copy goes to the memory of the next node too
    linger_seconds: float = 120.0  # how long it waits for ranks to come back when they were killed; then its memory is gone
    deadline_seconds: float = 30.0  # for its start

    def check(self, key: str) -> None:
        """Raises ConfigError at the first broken rule."""
        for name, value in (("linger_seconds", self.linger_seconds), ("deadline_seconds", self.deadline_seconds)):
            if not value > 0:
                raise ConfigError.of(f"{key}.{name}", value, "it must be positive")


@dataclass
class CheckpointConfig:
    """Partial expert checkpoints, arXiv 2408.04307."""

    folder: str = ""  # where checkpoints lie, in a folder of the run's name: a path, or s3://bucket/prefix; "" = in the run folder
    every_steps: int = 50  # 0 = only at the end and on a stop signal
    interval: str = "steps"  # steps: every_steps | auto: by Young and Daly from measured costs, every_steps until they are measured
    mean_hours_between_failures: float = 24.0  # of the whole job; for interval=auto and plt_budget
    mode: str = "experts"  # what of an unselected expert is left out: experts (all) | weights16 (all but bfloat16 weights) | moments | full
    experts_per_save: int = 1  # K: experts per layer in one partial checkpoint; with plt_budget the fewest
    selection: str = "sequential"  # which experts: sequential | greedy (most unsaved tokens) | unsaved_age (unsaved tokens x age)
    max_age_rounds: float = 2.2  # sequential, unsaved_age: no expert waits longer than this many rounds of E / K checkpoints
    plt_budget: float = 0.0  # share of all token assignments that recoveries may lose in the whole run: K rises and falls; 0 = K is fixed
    full_every: int = 0  # every n-th checkpoint is full; 0 = only the first and the last
    keep: int = 3  # newest recovery points kept; objects they refer to are kept with them
    resume: str = "auto"  # auto | must | never | path of a run or checkpoint folder
    allow_changes: bool = False  # resume although keys of the run's identity changed
    init_from: str = ""  # bundle whose weights start the run (fresh optimizer); "" = random initial values
    timeout_seconds: float = 60.0  # a save whose receipts take longer is abandoned, training goes on
    grace_seconds: float = 0.0  # from a stop signal to a kill: the last save writes what fits; 0 = long enough for all of it
    snapshot_every: int = 0  # steps between copies in the memory of the node; 0 = with each checkpoint only
    snapshot_experts: int = 0  # experts per layer in one copy in memory; 0 = all if they fit
    agent: AgentConfig = field(default_factory=AgentConfig)

    def check(self, key: str = "checkpoint") -> None:
        """Raises ConfigError at the first broken rule."""
        if self.folder.startswith("s3:") and not re.match("s3://[^/]", self.folder):
            raise ConfigError.of(f"{key}.folder", self.folder, "an object store is named s3://bucket or s3://bucket/prefix")
        one_of(f"{key}.mode", self.mode, MODES)
        one_of(f"{key}.selection", self.selection, SELECTIONS)
        one_of(f"{key}.interval", self.interval, INTERVALS)
        self.agent.check(f"{key}.agent")
        for name, value, least in (
            ("every_steps", self.every_steps, 0),
            ("snapshot_every", self.snapshot_every, 0),
            ("snapshot_experts", self.snapshot_experts, 0),
            ("grace_seconds", self.grace_seconds, 0),
            ("experts_per_save", self.experts_per_save, 1),
            ("full_every", self.full_every, 0),
            ("keep", self.keep, 1),
        ):
            if value < least:
                raise ConfigError.of(f"{key}.{name}", value, f"it must be at least {least}")
        for name, value in (
            ("timeout_seconds", self.timeout_seconds),
            ("mean_hours_between_failures", self.mean_hours_between_failures),
        ):
            if not value > 0:
                raise ConfigError.of(f"{key}.{name}", value, "it must be positive")
        if not self.max_age_rounds >= 1:
            raise ConfigError.of(f"{key}.max_age_rounds", self.max_age_rounds, "it must be at least 1: one round writes every expert once")
        if not 0 <= self.plt_budget < 1:
            raise ConfigError.of(f"{key}.plt_budget", self.plt_budget, "it must be a share between 0 and 1", "The paper allows 0.0375.")
        if self.interval == "auto" and self.every_steps == 0:
            raise ConfigError.of(f"{key}.interval", self.interval, "the first saves, which are measured, need every_steps above 0")
