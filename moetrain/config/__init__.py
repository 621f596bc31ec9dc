"""F5: the configuration of a run as one tree, composed from conf/, checked across keys; mistakes in one sentence. No torch."""

from moetrain.config.changes import describe_horizon, diff, identity, require_same
from moetrain.config.composition import compose, register, to_config
from moetrain.config.dry_run import plan, print_plan
from moetrain.config.folder import conf_folder, options
from moetrain.config.mistakes import EXPLAINED, as_config_error, explain
from moetrain.config.rules import batch_of, check
from moetrain.config.schema import DebugConfig, TrainConfig

__all__ = [
    "EXPLAINED",
    "DebugConfig",
    "TrainConfig",
    "as_config_error",
    "batch_of",
    "check",
    "compose",
    "conf_folder",
    "describe_horizon",
    "diff",
    "explain",
    "identity",
    "options",
    "plan",
    "print_plan",
    "register",
    "require_same",
    "to_config",
]
