"""The run on the terminal: a live panel, or one plain line per record where there is no terminal. Same fields in both."""

import logging
import sys
from collections.abc import Callable
from textwrap import indent
from threading import Lock
from typing import TYPE_CHECKING, TextIO

import numpy as np
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from moetrain.base.clock import Clock
from moetrain.base.log import logger
from moetrain.telemetry.panel import panel
from moetrain.telemetry.record import Record
from moetrain.telemetry.sinks import Sink
from moetrain.telemetry.status import RunStatus

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def open_console(kind: str, name: str, total_steps: int, clock: Clock, stop_file: str = "") -> list[Sink]:
    """The console sink that telemetry.console asks for, none for `off`. `stop_file` is shown as the way to stop politely."""
    status = RunStatus(name, total_steps, clock.monotonic())
    if kind == "live" or (kind == "auto" and sys.stdout.isatty()):
        hint = f"stop with a checkpoint: touch {stop_file}" if stop_file else ""
        return [LiveSink(status, clock, Console(), hint)]
    return [] if kind == "off" else [LinesSink(status, clock, sys.stdout)]


class LinesSink:
    """One flushed line per record."""

    def __init__(self, status: RunStatus, clock: Clock, stream: TextIO) -> None:
        self.status, self.clock, self.stream = status, clock, stream

    def log(self, record: Record) -> None:
        now = self.clock.monotonic()
        self.status.update(record, now)
        print(self.status.line(record, now), file=self.stream, flush=True)

    def show_load(self, step: int, load_LE: np.ndarray) -> None:
        pass  # a line has room for the summary only

    def image(self, name: str, draw: Callable[[], "Figure"], step: int) -> None:
        pass

    def close(self) -> None:
        pass


class LiveSink:
    """A panel that is redrawn in place twice a second by a thread of rich, so that the time left runs down during long steps.

    While it is open, log lines of this process scroll above it. The last state stays on the screen after `close`.
    """

    def __init__(self, status: RunStatus, clock: Clock, console: Console, hint: str = "") -> None:
        self.status, self.clock, self.console, self.hint = status, clock, console, hint
        self._lock = Lock()
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=2, transient=False)
        stderr = sys.stderr
        self._live.start()
        self._handlers = [handler for handler in _stream_handlers() if handler.stream is stderr]
        self._stderr = stderr
        for handler in self._handlers:  # they hold the stream from before rich put itself in front of it
            handler.setStream(sys.stderr)

    def log(self, record: Record) -> None:
        now = self.clock.monotonic()
        with self._lock:
            self.status.update(record, now)
        if "train/loss" not in record and record.get("checkpoint/pending") != 1:  # news stay readable above the panel
            self._live.console.print(Text(self._announcement(record, now)))

    def show_load(self, step: int, load_LE: np.ndarray) -> None:
        with self._lock:
            self.status.load_LE = load_LE

    def image(self, name: str, draw: Callable[[], "Figure"], step: int) -> None:
        pass

    def close(self) -> None:
        for handler in self._handlers:
            handler.setStream(self._stderr)
        self._live.stop()

    def _announcement(self, record: Record, now: float) -> str:
        if "sample/text" not in record:
            return self.status.line(record, now)
        sample = indent(f"{record.get('sample/prompt', '')}{record['sample/text']}", "    ")
        return f"step {self.status.step} | sample:\n{sample}"

    def _render(self) -> RenderableType:
        width, height = self.console.size
        with self._lock:
            return panel(self.status, self.clock.monotonic(), width, height, self.hint)


def _stream_handlers() -> list[logging.StreamHandler]:
    return [handler for handler in logger().handlers if isinstance(handler, logging.StreamHandler)]
