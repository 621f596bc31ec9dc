"""Where records go. A sink that fails is dropped with one warning: showing numbers never ends a run."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from moetrain.base.log import logger
from moetrain.telemetry.record import METRICS_FILE, Record, decode, encode

if TYPE_CHECKING:  # half a second of import that a run without images never needs
    from matplotlib.figure import Figure


class Sink(Protocol):
    """One place that shows or keeps what a run says. Used by rank 0 only, from one thread."""

    def log(self, record: Record) -> None: ...

    def show_load(self, step: int, load_LE: np.ndarray) -> None:
        """Pairs per MoE layer and expert since the last record, int64 [layers, experts]; follows `log` of the same step."""
        ...

    def image(self, name: str, draw: Callable[[], "Figure"], step: int) -> None:
        """A figure, drawn only by a sink that keeps images."""
        ...

    def close(self) -> None:
        """Ends the sink; nothing follows."""
        ...


class Sinks:
    """Fans out to all sinks. Empty on ranks other than 0."""

    def __init__(self, sinks: list[Sink]) -> None:
        self.sinks = list(sinks)

    def log(self, record: Record) -> None:
        self._each(lambda sink: sink.log(record))

    def show_load(self, step: int, load_LE: np.ndarray) -> None:
        self._each(lambda sink: sink.show_load(step, load_LE))

    def image(self, name: str, draw: Callable[[], "Figure"], step: int) -> None:
        self._each(lambda sink: sink.image(name, draw, step))

    def close(self) -> None:
        self._each(lambda sink: sink.close())
        self.sinks.clear()

    def _each(self, use: Callable[[Sink], None]) -> None:
        for sink in list(self.sinks):
            try:
                use(sink)
            except Exception as error:  # whatever a dashboard throws, training goes on
                self.sinks.remove(sink)
                logger("telemetry").warning("%s failed and is switched off for this run: %r", type(sink).__name__, error)


class JsonlSink:
    """`metrics.jsonl` of the run folder: appended, one line per record, at once. A line torn by a kill is repaired on opening.

    While the disk is full, records wait in memory and are written when there is room again.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        repair(self.path)
        self._file = self.path.open("ab", buffering=0)
        self._waiting = b""
        self._warned = False

    def log(self, record: Record) -> None:
        self._waiting += encode(record).encode() + b"\n"
        self._write()

    def show_load(self, step: int, load_LE: np.ndarray) -> None:
        pass  # kept as experts/step-*.npz

    def image(self, name: str, draw: Callable[[], "Figure"], step: int) -> None:
        pass

    def close(self) -> None:
        self._write()
        self._file.close()

    def _write(self) -> None:
        """As much as there is room for; a full disk may take a part of a line."""
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) or 0 :]
        except OSError as error:
            if not self._warned:
                logger("telemetry").warning("%s cannot be written: %s. Records wait until it can.", self.path, error.strerror)
            self._warned = True


def repair(file: Path) -> None:
    """Ends the file with a whole line: a last line without its end is completed if it is a record, else cut off."""
    if not file.exists():
        return
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    torn = content[whole:]
    if not torn:
        return
    with file.open("r+b") as stream:
        if decode(torn.decode("utf-8", errors="replace")) is not None:
            stream.seek(0, 2)
            stream.write(b"\n")
        else:
            stream.truncate(whole)
