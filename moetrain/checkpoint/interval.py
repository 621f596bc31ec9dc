"""How many steps to train between two checkpoints: Young's and Daly's interval from measured costs. Pure, no torch, no clock."""

from dataclasses import dataclass, replace
from math import ceil, sqrt

WEIGHT = 0.2  # of a new measurement in a running mean


def best_interval(save_seconds: float, mean_seconds_between_failures: float) -> float:
    """Seconds of training between two saves that each cost `save_seconds`, for the least time lost (Daly 2006, equation 37).

    Young's sqrt(2 C M) with two more terms of the series; above C = 2 M a save per failure is all there is to gain.
    """
    cost, mean = save_seconds, mean_seconds_between_failures
    if cost >= 2 * mean:
        return mean
    ratio = cost / (2 * mean)
    return sqrt(2 * cost * mean) * (1 + sqrt(ratio) / 3 + ratio / 9) - cost


@dataclass(frozen=True)
class Costs:
    """What was measured so far. A save costs what the steps beside it take longer than the others; its own time is hidden behind them."""

    step_seconds: float = 0.0  # running mean of steps beside which nothing was saved; of others where they bring it down
    save_seconds: float = 0.0  # running mean of what a save added to the steps beside it
    persist_seconds: float = 0.0  # from the start of the last save to its commit
    added: float = 0.0  # by the save under way

    def after_step(self, seconds: float, is_saving: bool) -> "Costs":
        """A step ended; `is_saving`: a save was under way. Then it took no less than it would have taken alone: where a save is always
        under way, the mean comes down to what the fastest steps take."""
        if is_saving:
            added = self.added + seconds - self.step_seconds if self.step_seconds else 0.0
            return replace(self, added=added, step_seconds=_mean(self.step_seconds, min(seconds, self.step_seconds or seconds)))
        return replace(self, step_seconds=_mean(self.step_seconds, seconds))

    def after_save(self, persist_seconds: float) -> "Costs":
        """The save that was under way has ended."""
        added = max(0.0, self.added)
        mean = _mean(self.save_seconds, added) if self.step_seconds else self.save_seconds
        return replace(self, save_seconds=mean, persist_seconds=persist_seconds, added=0.0)

    def after_failure(self) -> "Costs":
        """The save that was under way was given up."""
        return replace(self, added=0.0)

    def interval(self, mean_seconds_between_failures: float) -> int | None:
        """Steps between saves; None before a step and a save were measured. Never shorter than the persisting of one save takes."""
        if not self.step_seconds or not self.persist_seconds:
            return None
        seconds = max(best_interval(self.save_seconds, mean_seconds_between_failures), self.persist_seconds)
        return max(1, ceil(seconds / self.step_seconds))


def _mean(before: float, now: float) -> float:
    return now if before == 0 else (1 - WEIGHT) * before + WEIGHT * now
