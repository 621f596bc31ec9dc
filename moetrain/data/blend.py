"""Which corpus each training sample comes from: a function of the weights and the sample's number, whatever the length of the run."""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction


class Blend:
    """Corpus c wants its k-th sample at time (k + 1/2) / weight_c; samples are taken in the order of time, ties by corpus number.

    After n samples each corpus is less than one sample per corpus away from its share of n. Times are exact integers, so every machine
    agrees and any place of the sequence is reached directly.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]  # 0.1 means one tenth, not the nearest binary number
        scale = math.lcm(*(weight.denominator for weight in exact))
        shares = [int(weight * scale) for weight in exact]
        common = math.lcm(*shares)
        self._half_period = [common // share for share in shares]  # the k-th sample's time is (2k + 1) half periods

    def assign(self, first: int, count: int) -> list[tuple[int, int]]:
        """(corpus, number within the corpus) of the samples first .. first + count - 1."""
        taken = self._taken_at(self._last_time_within(first))
        due = [((2 * k + 1) * half, corpus, k) for corpus, (k, half) in enumerate(zip(taken, self._half_period, strict=True))]
        heapq.heapify(due)
        assigned = []
        for _ in range(first - sum(taken) + count):
            time, corpus, k = due[0]
            heapq.heapreplace(due, (time + 2 * self._half_period[corpus], corpus, k + 1))
            assigned.append((corpus, k))
        return assigned[first - sum(taken) :]

    def _taken_at(self, time: int) -> list[int]:
        return [(time // half + 1) // 2 for half in self._half_period]

    def _last_time_within(self, count: int) -> int:
        """The largest time at which at most `count` samples are taken, by bisection."""
        low, high = 0, (2 * count + 2) * min(self._half_period)
        while high - low > 1:
            middle = (low + high) // 2
            if sum(self._taken_at(middle)) <= count:
                low = middle
            else:
                high = middle
        return low
