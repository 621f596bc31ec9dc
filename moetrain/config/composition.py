"""From overrides and conf/ to a TrainConfig: registration of the schema with Hydra, composition, and the check for unknown keys."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from moetrain.base.errors import ConfigError
from moetrain.config.folder import conf_folder
from moetrain.config.mistakes import suggest
from moetrain.config.schema import TrainConfig

PRIMARY = "train"


def register() -> None:
    """Puts the schema into Hydra's ConfigStore as `base_train`; conf/train.yaml starts with it. May be called again."""
    ConfigStore.instance().store(name="base_train", node=TrainConfig)


def compose(overrides: Sequence[str]) -> DictConfig:
    """conf/train.yaml with the overrides of a command line. Raises Hydra's errors; `explain` says them in a sentence."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        return hydra_compose(PRIMARY, list(overrides))


def to_config(composed: DictConfig) -> TrainConfig:
    """Resolves interpolations, once. Raises ConfigError for a key that the schema does not have (`+key=value` passes Hydra)."""
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    _refuse_unknown(plain, TrainConfig(), "")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, TrainConfig)
    return config


def _refuse_unknown(plain: dict, schema: object, prefix: str) -> None:  # pyright: ignore[reportMissingTypeArgument]
    known = {item.name: getattr(schema, item.name) for item in fields(schema)}  # pyright: ignore[reportArgumentType]
    for name, value in plain.items():
        if name not in known:
            raise ConfigError.of(f"{prefix}{name}", value, "there is no such key", suggest(f"{prefix}{name}"))
        if is_dataclass(known[name]):
            _refuse_unknown(value, known[name], f"{prefix}{name}.")
