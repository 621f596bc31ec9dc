"""Stopping together: a signal to any rank, or a STOP file, ends the run of all ranks at the same step boundary."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

import torch

from moetrain.dist.world import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SIGNAL_NAMES = tuple(number.name for number in SIGNALS)

Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None


class Stop:
    """A context manager; made in the main thread. Handlers only set a flag; leaving puts the former handlers back.

    A second Ctrl-C (SIGINT) does not wait for the step boundary: it raises KeyboardInterrupt.

    A forked child that gets one of the signals dies of it, as if no handler were there; a spawned one never had it.
    """

    def __init__(self, world: World, file: Path) -> None:
        self._world = world
        self._file = file  # looked for by rank 0; removed once all ranks know, so that the next run goes on
        self._owner = os.getpid()
        self._received: set[int] = set()
        self._former: dict[signal.Signals, Handler] = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Puts the former handlers back; may be called twice."""
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former = {}

    def agreed(self) -> str | None:
        """Why to stop, the same on every rank, or None. One small sum over ranks; every rank calls it at every step boundary."""
        has_file = self._world.is_main and self._file.exists()
        wishes = torch.tensor([*(number in self._received for number in SIGNALS), has_file], dtype=torch.int64)
        wanted = self._world.sum_(wishes, name="agreeing to stop").tolist()
        if wanted[-1] and self._world.is_main:
            self._file.unlink(missing_ok=True)
        reasons = [*SIGNAL_NAMES, f"the file {self._file.name}"]
        return next((reason for reason, count in zip(reasons, wanted, strict=True) if count), None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._owner:
            if number == signal.SIGINT and number in self._received:
                raise KeyboardInterrupt
            self._received.add(number)
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
