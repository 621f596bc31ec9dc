"""The configuration a run was started with, kept in its folder, and the refusal to resume it as another run."""

from pathlib import Path

from omegaconf import OmegaConf

from moetrain.base.errors import CheckpointError
from moetrain.base.log import logger
from moetrain.config.changes import diff, identity, require_same
from moetrain.config.schema import TrainConfig

CONFIG_FILE = "config.yaml"


def write_config(config: TrainConfig, folder: Path, overrides: list[str]) -> None:
    """config.yaml (resolved) and overrides.txt, as of the newest start."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    (folder / "overrides.txt").write_text("".join(f"{override}\n" for override in overrides))


def saved_config(folder: Path) -> TrainConfig | None:
    """The configuration of the run in `folder`, or None without one. Raises CheckpointError when it cannot be read."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        loaded = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(path)))
    except Exception as error:  # YAML and OmegaConf raise many kinds
        raise CheckpointError(f"{path} cannot be read: {error}", "It may be of another version: resume with that version.") from error
    assert isinstance(loaded, TrainConfig)
    return loaded


def require_same_run(config: TrainConfig, folder: Path) -> TrainConfig | None:
    """The configuration saved in `folder` (None: nothing to compare). Raises CheckpointError naming every changed key of the
    run's identity, unless checkpoint.allow_changes: then they are logged."""
    before = saved_config(folder)
    if before is None:
        return None
    if config.checkpoint.allow_changes:
        for change in diff(identity(before), identity(config)):
            logger().warning("Resuming with a changed key: %s.", change)
    else:
        require_same(identity(before), identity(config), str(folder))
    return before
