"""A clock that a test moves on."""


class FakeClock:
    """Time passes by sleeping, which takes none, and by moving `time` on."""

    def __init__(self, time: float = 0.0) -> None:
        self.time = time

    def monotonic(self) -> float:
        return self.time

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
