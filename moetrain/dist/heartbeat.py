"""Notices a rank that no longer runs: killed, frozen or cut off, also where no closed connection tells.

Rank 0 hears every rank; the others hear rank 0 only, which passes on what it found. A beat is one key written and one read for every rank
(rank 0: one read of all that were heard before), whatever the world size. No collective: the main thread may be inside one that never ends.
"""

import socket
import threading
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

from moetrain.base.clock import Clock, SystemClock
from moetrain.dist.watch import end_process

BEATS_PER_LIMIT = 5
LEFT = "left"  # the last beat of a rank that ended as it should
FAILED = "failed"  # begins the last beat of one that ended with an error; its host and the error follow
VERDICT = "verdict"


class Heartbeat:
    """Two threads: the talker beats and listens, the judge ends the process when the talker gets no answer any more."""

    def __init__(
        self, store: Store, rank: int, size: int, limit_seconds: float, on_lost: Callable[[str], None] = end_process,
        clock: Clock | None = None,
    ) -> None:  # fmt: skip
        """`store`: of this start alone, a client of its own, as a call may never return. `on_lost` gets one sentence from each thread."""
        self._rank, self._limit, self._on_lost = rank, limit_seconds, on_lost
        self._clock = clock or SystemClock()
        self._store = PrefixStore("heartbeat", store)
        self._store.set_timeout(timedelta(seconds=limit_seconds))
        self._others = list(range(1, size)) if rank == 0 else [0]
        self._beats = 0
        now = self._clock.monotonic()
        self._heard: dict[int, tuple[str, float]] = {other: ("", now) for other in self._others}
        self._hosts: dict[int, str] = {}
        self._answered = now
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._every, args=(work,), name=f"moetrain-heartbeat-{name}", daemon=True)
            for name, work in (("talker", self.beat), ("judge", self.judge))
        ]

    def start(self) -> None:
        """The first beat is heard when this returns."""
        self.beat()
        for thread in self._threads:
            thread.start()

    def stop(self, error: str = "") -> None:
        """At a good end the others do not miss this rank; after an error they do, and know it. Waits for no store that does not answer."""
        self._ended.set()
        last = f"{FAILED} {socket.gethostname()} {error}" if error else LEFT
        leaving = threading.Thread(target=self._leave, args=(last,), daemon=True)
        leaving.start()
        leaving.join(self._limit / BEATS_PER_LIMIT)

    def beat(self) -> None:
        """Says that this rank runs, and hears the others. A store that fails is the judge's business."""
        self._beats += 1
        try:
            self._store.set(str(self._rank), f"{self._beats} {socket.gethostname()}")
            verdict = self._store.get(VERDICT).decode() if self._store.check([VERDICT]) else ""
            known = [other for other in self._others if other in self._hosts or self._store.check([str(other)])]
            beats = self._store.multi_get([str(other) for other in known]) if known else []
        except RuntimeError:
            return
        now = self._answered = self._clock.monotonic()
        for other, beat in zip(known, beats, strict=True):
            self._hear(other, beat.decode(), now)
        late = [other for other, (beat, when) in self._heard.items() if beat != LEFT and now - when > self._limit]
        if late and not verdict:
            verdict = self._sentence(late, now)
            if self._rank == 0:
                self._pass_on(verdict)
        if verdict and not self._ended.is_set():
            self._on_lost(verdict)

    def judge(self) -> None:
        """Gives up when the store has not answered for too long: this rank is cut off, or the store's machine is lost."""
        silent = self._clock.monotonic() - self._answered
        everybody_left = all(beat == LEFT for beat, _ in self._heard.values())
        if silent > self._limit + 1.0 and not everybody_left and not self._ended.is_set():
            self._on_lost(
                f"Rank {self._rank} on {socket.gethostname()} has had no answer from the job's store for {silent:.0f} s: its machine is "
                "lost, or this one is cut off. Start the same command again on the machines that remain; it resumes."
            )

    def _hear(self, other: int, beat: str, now: float) -> None:
        if beat != self._heard[other][0]:
            self._heard[other] = (beat, now)
            if beat != LEFT:
                self._hosts[other] = beat.split(" ")[1]

    def _sentence(self, late: list[int], now: float) -> str:
        if failed := [other for other in late if self._heard[other][0].startswith(FAILED)]:
            error = self._heard[failed[0]][0].split(" ", 2)[2]
            return f"Rank {failed[0]} on {self._hosts[failed[0]]} ended: {error} Every rank ends, so that the job can start again."
        names = ", ".join(f"rank {other} on {self._hosts[other]}" if other in self._hosts else f"rank {other}" for other in late)
        seconds = max(now - self._heard[other][1] for other in late)
        why = "killed, frozen or cut off. Every rank ends, so that the job can start again."
        return f"Nothing was heard from {names} for {seconds:.0f} s: {why}"

    def _pass_on(self, verdict: str) -> None:
        try:
            self._store.set(VERDICT, verdict)
        except RuntimeError:
            return  # they will find out in the same way

    def _leave(self, last: str) -> None:
        try:
            self._store.set(str(self._rank), last)
        except RuntimeError:
            return

    def _every(self, work: Callable[[], None]) -> None:
        while not self._ended.wait(self._limit / BEATS_PER_LIMIT):
            work()
