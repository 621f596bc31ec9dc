"""The times of every block's operators, read from the lanes of a serial step and agreed over ranks.

A visit is one block in one micro-batch. In a micro-batch the forward pass visits the blocks in order, the backward pass from the last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median

from moetrain.model.blocks import RoutedBlock
from moetrain.parallel.overlap import OperatorTimes, PassTimes, TripTimes
from moetrain.telemetry.lanes import GRADIENT, Journey, Lanes

TO_EXPERTS, FROM_EXPERTS = "rows to experts", "rows from experts"  # as alltoall.py names its exchanges
Gather = Callable[[list[list[float]]], list[list[list[float]]]]  # this rank's value -> every rank's, in order of rank


@dataclass(frozen=True)
class Site:
    """What must be known of a block to find its operators in the lanes."""

    name: str
    operators: tuple[str, ...]
    num_chunks: int
    num_trips: int

    @classmethod
    def of(cls, block: RoutedBlock) -> "Site":
        return cls(block.name, block.operators, block.schedule.num_chunks, 2 if block.gates_again else 1)

    @property
    def num_journeys(self) -> int:
        """One way, in one pass."""
        return self.num_chunks * self.num_trips


def visits(lanes: Lanes, sites: Sequence[Site]) -> list[tuple[Site, OperatorTimes]]:
    """Of every visit, in the order of the forward passes. `sites`: the model's blocks with routed experts, in order."""
    sequences = [_Sequence(lanes, prefix) for prefix in ("", GRADIENT)]
    found = []
    num_batches = len(sequences[0].to_experts) // sum(site.num_journeys for site in sites)
    for _ in range(num_batches):
        forward = [sequences[0].next(site) for site in sites]
        backward = [sequences[1].next(site) for site in reversed(sites)]
        pairs = zip(forward, reversed(backward), strict=True)
        found += list(zip(sites, (OperatorTimes(*pair) for pair in pairs), strict=True))
    return found


class _Sequence:
    """Reads the computations and journeys of one pass in the order in which they were made."""

    def __init__(self, lanes: Lanes, prefix: str) -> None:
        self.prefix = prefix
        self.to_experts = [journey for journey in lanes.journeys if journey.name == prefix + TO_EXPERTS]
        self._to = iter(self.to_experts)
        self._from = iter([journey for journey in lanes.journeys if journey.name == prefix + FROM_EXPERTS])
        seconds: dict[str, list[float]] = {}
        for computation in lanes.computations:
            seconds.setdefault(computation.name, []).append(computation.end - computation.start)
        self._main = {name: iter(its) for name, its in seconds.items()}

    def next(self, site: Site) -> PassTimes:
        main = tuple(next(self._main[f"{self.prefix}{site.name}/{operator}"]) for operator in site.operators)
        to, back = list(islice(self._to, site.num_journeys)), list(islice(self._from, site.num_journeys))
        size = site.num_chunks
        trips = [self._trip(to[start : start + size], back[start : start + size]) for start in range(0, len(to), size)]
        return PassTimes(main, tuple(reversed(trips) if self.prefix else trips))

    def _trip(self, to: list[Journey], back: list[Journey]) -> TripTimes:
        """Experts work from the end of the wait before them to the moment at which their rows are ready to leave."""
        before, after = (back, to) if self.prefix else (to, back)
        experts = sum(leaving.ready - coming.landed for coming, leaving in zip(before, after, strict=True))
        return TripTimes(experts, _alone(to), _alone(back))


def _alone(journeys: list[Journey]) -> float:
    return sum(journey.end - journey.start for journey in journeys)


def agreed(mine: Sequence[tuple[Site, OperatorTimes]], gather: Gather) -> list[tuple[Site, OperatorTimes]]:
    """Every number is the greatest of all ranks: all wait for the slowest. A collective; the same result on every rank."""
    everyone = gather([flat(times) for _, times in mine])
    slowest = [[max(numbers) for numbers in zip(*ranks, strict=True)] for ranks in zip(*everyone, strict=True)]
    return [(site, unflat(numbers, times)) for (site, times), numbers in zip(mine, slowest, strict=True)]


def typical(times: Sequence[OperatorTimes]) -> OperatorTimes:
    """The median of every number, over visits of like blocks."""
    numbers = [median(its) for its in zip(*(flat(one) for one in times), strict=True)]
    return unflat(numbers, times[0])


def flat(times: OperatorTimes) -> list[float]:
    """All measured numbers in a fixed order."""
    found: list[float] = []
    for its in (times.forward, times.backward):
        found += its.main
        for trip in its.trips:
            found += [trip.experts, trip.to_experts, trip.from_experts]
    return found


def unflat(numbers: Sequence[float], like: OperatorTimes) -> OperatorTimes:
    """The inverse of `flat`, for as many computations and trips as `like` has."""
    rest = iter(numbers)

    def one_pass(its: PassTimes) -> PassTimes:
        main = tuple(islice(rest, len(its.main)))
        return PassTimes(main, tuple(TripTimes(*islice(rest, 3)) for _ in its.trips))

    forward = one_pass(like.forward)
    return OperatorTimes(forward, one_pass(like.backward))
