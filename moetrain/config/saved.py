"""The configuration a run was started with, kept in its folder, and the refusal to resume it as another run."""

import json
from dataclasses import fields
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from moetrain.base.errors import CheckpointError
from moetrain.base.files import write_whole
from moetrain.base.log import logger
from moetrain.config.changes import Plain, diff, identity, require_same
from moetrain.config.schema import TrainConfig

CONFIG_FILE = "config.yaml"
DATA_FILE = "data.json"  # what the corpora held, as hashes: a path says little


def write_config(config: TrainConfig, content: dict[str, str], folder: Path, overrides: list[str]) -> None:
    """config.yaml (resolved), data.json and overrides.txt, as of the newest start."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / DATA_FILE, json.dumps(content, indent=2) + "\n")
    write_whole(folder / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.structured(config)))
    write_whole(folder / "overrides.txt", "".join(f"{override}\n" for override in overrides))


def saved_config(folder: Path) -> TrainConfig | None:
    """The configuration of the run in `folder`, or None without one. Raises CheckpointError when it cannot be read."""
    path = folder / CONFIG_FILE
    if not path.is_file() or not path.stat().st_size:
        return None
    found = _sections(path)
    try:
        loaded = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), found))
    except Exception as error:  # OmegaConf raises many kinds
        said = str(error).partition("\n")[0].rstrip(".")
        raise CheckpointError(f"{path} cannot be read: {said}.", "It may be of another version: resume with that version.") from error
    assert isinstance(loaded, TrainConfig)
    return loaded


def _sections(path: Path) -> DictConfig:
    """What a configuration file holds. Raises CheckpointError for text that is none."""
    try:
        found = OmegaConf.load(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception:  # no text, or no YAML
        found = None
    if not isinstance(found, DictConfig) or not any(section.name in found for section in fields(TrainConfig)):
        hint = "Bring it back from a copy, or remove it to resume without comparing the configuration."
        raise CheckpointError(f"{path} is damaged: it holds no configuration.", hint)
    return found


def saved_content(folder: Path) -> dict[str, str]:
    """The hashes of data.json; empty without one. Raises CheckpointError when it cannot be read."""
    path = folder / DATA_FILE
    if not path.is_file():
        return {}
    try:
        return {str(key): str(value) for key, value in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "Remove it to resume without comparing the data.") from error


def require_same_run(config: TrainConfig, content: dict[str, str], folder: Path) -> TrainConfig | None:
    """The configuration saved in `folder` (None: nothing to compare). `content`: hashes of the corpora by what they are of.

    Raises CheckpointError naming every changed key of the run's identity, unless checkpoint.allow_changes: then they are logged.
    """
    before = saved_config(folder)
    if before is None:
        return None
    known = saved_content(folder)
    saved: dict[str, Plain] = identity(before) | known
    now: dict[str, Plain] = identity(config) | {key: value for key, value in content.items() if key in known}
    if config.checkpoint.allow_changes:
        for change in diff(saved, now):
            logger().warning("Resuming with a changed key: %s.", change)
    else:
        require_same(saved, now, str(folder))
    return before
