"""Weights & Biases: the only file that imports it. Its absence, its network and its limits never reach training."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np

from moetrain.base.errors import MissingExtraError
from moetrain.base.log import logger
from moetrain.telemetry.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from wandb import Run

ID_FILE = "wandb_id"
_INIT_SECONDS = 30
_FINISH_SECONDS = 60


def open_wandb(mode: str, project: str, name: str, folder: Path, config: dict[str, object]) -> "list[WandbSink]":
    """The sink, or none with one warning when wandb is missing or cannot start; `config` is shown on the run's page."""
    if mode == "off":
        return []
    try:
        return [WandbSink(mode, project, name, folder, config)]
    except Exception as error:  # a missing package, login, network, server: metrics.jsonl has it all anyway
        logger("telemetry").warning("wandb is switched off for this run, metrics.jsonl goes on: %s", error)
        return []


class WandbSink:
    """One run with one id over all resumes. The x axis is `train/step`: wandb drops points whose own step goes back."""

    def __init__(self, mode: str, project: str, name: str, folder: Path, config: dict[str, object]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError.of("wandb", "wandb") from error
        settings = wandb.Settings(console="off", silent=True, init_timeout=_INIT_SECONDS, login_timeout=_INIT_SECONDS)
        self._run: Run = wandb.init(
            mode="offline" if mode == "offline" else "online",
            id=stable_id(folder),
            resume="allow",
            project=project,
            name=name,
            dir=str(folder),
            config=config,
            settings=settings,
        )
        self._run.define_metric("train/step")
        self._run.define_metric("*", step_metric="train/step")

    def log(self, record: Record) -> None:
        self._run.log(dict(record))

    def show_load(self, step: int, load_LE: np.ndarray) -> None:
        pass  # never one key per expert: the heat map comes as an image

    def image(self, name: str, draw: Callable[[], "Figure"], step: int) -> None:
        import wandb

        from moetrain.telemetry.pixels import pixels

        self._run.log({"train/step": step, name: wandb.Image(pixels(draw()))})  # it takes a figure only once pyplot was imported

    def close(self) -> None:
        """Uploads the rest, for at most a minute: what is left then can be sent later with `wandb sync`."""
        finish = Thread(target=self._run.finish, name="wandb-finish", daemon=True)
        finish.start()
        finish.join(_FINISH_SECONDS)
        if finish.is_alive():
            logger("telemetry").warning("wandb did not finish in %d s; send the rest with: wandb sync", _FINISH_SECONDS)


def stable_id(folder: Path) -> str:
    """The run's id from `wandb_id`, made and kept there first if there is none, so that a killed start has it too."""
    file = folder / ID_FILE
    if file.is_file() and (kept := file.read_text().strip()):
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    made = secrets.token_hex(6)
    draft = file.with_suffix(".tmp")
    with draft.open("w") as stream:
        stream.write(made + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, file)
    return made
