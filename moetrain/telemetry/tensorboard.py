"""Records as TensorBoard events in `tensorboard/` of the run folder. torch.utils.tensorboard is imported only when used."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moetrain.telemetry.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard.writer import SummaryWriter


class TensorboardSink:
    """After a resume, points of steps that are trained again are hidden (purge_step)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "tensorboard"
        self._writer: SummaryWriter | None = None

    def log(self, record: Record) -> None:
        step = int(record["train/step"])
        writer = self._open(step)
        for key, value in record.items():
            if isinstance(value, str):
                writer.add_text(key, value, step)
            elif key != "train/step":
                writer.add_scalar(key, value, step)

    def show_load(self, step: int, load_LE: np.ndarray) -> None:
        pass  # comes as an image now and then

    def image(self, name: str, draw: Callable[[], "Figure"], step: int) -> None:
        from moetrain.telemetry.pixels import pixels

        self._open(step).add_image(name, pixels(draw()), step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, step: int) -> "SummaryWriter":
        if self._writer is None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=step)
        return self._writer
