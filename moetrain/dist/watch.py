"""Names the operation under way, so that a rank that waits too long for the others says for what.

gloo raises on time-out and the error is retold here. NCCL blocks the device instead: a Watchdog thread looks at the operations under way
and ends the process with the same sentence.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from moetrain.base.clock import Clock, SystemClock
from moetrain.base.errors import TrainingError

_LOST = ("onnection", "closed by peer", "pair closure", "Broken pipe")  # what gloo and the store say when a peer's process ended
JOINING = ("joining the process group", "making the ")  # operations in which ranks connect to each other for the first time


class Work(Protocol):
    """What the watchdog needs of torch.distributed's Work."""

    def is_completed(self) -> bool: ...


def overdue_sentence(rank: int, name: str, seconds: float) -> str:
    return f"Rank {rank} waited {seconds:.1f} s for the other ranks in: {name}."


class Watch:
    """Every collective of ours runs inside `operation(name)`; what stays on a device afterwards is handed to `track`."""

    def __init__(self, rank: int, timeout_seconds: float, clock: Clock | None = None) -> None:
        self.rank = rank
        self.timeout_seconds = timeout_seconds
        self.clock = clock or SystemClock()
        self.watchdog: Watchdog | None = None

    @contextmanager
    def operation(self, name: str, timed: bool = True) -> Iterator[None]:
        """Retells a collective's time-out or lost peer as TrainingError with rank, operation and seconds; other errors pass.

        timed=False: the watchdog leaves it alone, because it holds computation of any length too.
        """
        started = self.clock.monotonic()
        ticket = self.watchdog.open(name) if self.watchdog and timed else None
        try:
            yield
        except RuntimeError as error:
            failure = self._retell(name, self.clock.monotonic() - started, str(error))
            if failure is None:
                raise
            raise failure from error
        finally:
            if self.watchdog and ticket is not None:
                self.watchdog.close(ticket)

    def track(self, name: str, work: Work) -> None:
        """Watches an operation that a device finishes later. Needed (and done) only where a watchdog runs."""
        if self.watchdog:
            self.watchdog.track(name, work)

    def _retell(self, name: str, seconds: float, text: str) -> TrainingError | None:
        if "CUDA error" in text:
            return None
        if "imed out" in text or "imeout" in text:
            hint = f"Look at what the other ranks were doing; the limit is parallel.timeout_seconds={self.timeout_seconds:g}."
            return TrainingError(overdue_sentence(self.rank, name, seconds), hint)
        if any(word in text for word in _LOST):
            sentence = f"Rank {self.rank} lost the connection to another rank after {seconds:.1f} s in: {name}."
            said = text.strip().splitlines()[-1][-200:]
            hint = f"The first rank that failed says why. This one was told: {said}"
            if name.startswith(JOINING):
                hint += " GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the interface; its address is what host names must stand for."
            return TrainingError(sentence, hint)
        return None


def end_process(sentence: str) -> None:
    """The way out of a process whose main thread sits in a device call: say why and leave."""
    sys.stderr.write(sentence + "\n")
    sys.stderr.flush()
    os._exit(1)


class Watchdog:
    """Looks at operations that are open or still on a device, and calls `on_overdue(sentence)` for the first that is too old."""

    def __init__(
        self, rank: int, timeout_seconds: float, on_overdue: Callable[[str], None] = end_process, clock: Clock | None = None
    ) -> None:
        self._rank = rank
        self._timeout_seconds = timeout_seconds
        self._on_overdue = on_overdue
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._next = 0
        self._under_way: dict[int, tuple[str, float, Work | None]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="moetrain-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def open(self, name: str) -> int:
        return self._add(name, None)

    def close(self, ticket: int) -> None:
        with self._lock:
            self._under_way.pop(ticket, None)

    def track(self, name: str, work: Work) -> None:
        self._add(name, work)

    def check(self) -> None:
        """One look: forgets what is done, reports the oldest that is overdue."""
        now = self._clock.monotonic()
        with self._lock:
            done = [ticket for ticket, (_, _, work) in self._under_way.items() if work is not None and work.is_completed()]
            for ticket in done:
                del self._under_way[ticket]
            oldest = next(iter(self._under_way.values()), None)
        if oldest is not None and now - oldest[1] > self._timeout_seconds:
            self._on_overdue(overdue_sentence(self._rank, oldest[0], now - oldest[1]))

    def _add(self, name: str, work: Work | None) -> int:
        with self._lock:
            self._next += 1
            self._under_way[self._next] = (name, self._clock.monotonic(), work)
            return self._next

    def _watch(self) -> None:
        interval = min(1.0, self._timeout_seconds / 4)
        while not self._ended.wait(interval):
            self.check()
