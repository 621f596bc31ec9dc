"""Which of several plans is the fastest, from ordinary steps that they take in turns. Pure: what other ranks saw is handed in."""

from collections.abc import Sequence
from statistics import median

FIRST = 1  # turns of every plan that do not count: messages and memory of other sizes are new to it
TURNS = 3  # turns that count
NEAR = 0.02  # plans this close to the fastest count as equally fast: so few steps tell no finer


def num_steps(num_plans: int) -> int:
    return num_plans * (FIRST + TURNS)


class Trial:
    """One rank's view of it."""

    def __init__(self, num_plans: int) -> None:
        self.num_plans = num_plans
        self.seconds: list[float] = []  # of this rank, by step

    @property
    def turn(self) -> int:
        """The number of the plan that takes the next step. They alternate, so that all meet the same weather."""
        return len(self.seconds) % self.num_plans

    def add(self, seconds: float) -> None:
        """Of the step that the plan of this turn took."""
        self.seconds.append(seconds)

    @property
    def is_over(self) -> bool:
        return len(self.seconds) == num_steps(self.num_plans)

    def medians(self, everyone: Sequence[Sequence[float]]) -> list[float]:
        """Of the slowest rank's seconds in every step that counts, by plan. `everyone`: every rank's `seconds`."""
        slowest = [max(its) for its in zip(*everyone, strict=True)]
        return [median(slowest[FIRST * self.num_plans + plan :: self.num_plans]) for plan in range(self.num_plans)]


def first_near_best(seconds: Sequence[float]) -> int:
    """The number of the first that is as fast as the fastest, to NEAR."""
    return next(number for number, its in enumerate(seconds) if its <= min(seconds) * (1 + NEAR))
