"""When somebody who did not answer is asked again: later each time. No torch."""

from moetrain.base.clock import Clock

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 10.0, 600.0


class Patience:
    """Pauses after time-outs, twice as long each time, until there is an answer. Used by one thread at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._pause = FIRST_PAUSE_SECONDS
        self._until = clock.monotonic()

    @property
    def seconds_left(self) -> float:
        """Of the pause; 0 when it is time to ask."""
        return max(0.0, self._until - self._clock.monotonic())

    def timed_out(self) -> None:
        self._until = self._clock.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)

    def answered(self) -> None:
        self._until, self._pause = self._clock.monotonic(), FIRST_PAUSE_SECONDS
