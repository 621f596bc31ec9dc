"""When the experts of a block should run and in how many token chunks, from measured times: a simulation of two queues. Pure.

One queue computes, the other moves bytes; each does one thing at a time, in the order of the program. arXiv 2404.05019 balances the two
exchanges of the forward pass; here forward and backward are simulated together, because one order of autograd nodes decides both.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from statistics import median

from moetrain.model.schedule import Schedule

SLACK = 0.01  # schedules this close to the best count as equally fast
CAUTION = 1.5  # among equally fast ones, the one that bears a link slower by this factor best
SETTLE = 5  # steps whose waits are the normal ones of a plan
RECENT = 3  # steps whose waits are compared with them


@dataclass(frozen=True)
class TripTimes:
    """Seconds of one gating's rows in one pass, all rows at once. A backward pass has them under the same names, of the gradients."""

    experts: float  # with the permutations around them
    to_experts: float
    from_experts: float
    chunk_experts: float = 0.0  # what every chunk after the first adds to `experts`
    chunk_exchange: float = 0.0  # what it adds to each exchange

    def chunk(self, num_chunks: int) -> tuple[float, float, float]:
        """Of one of `num_chunks`: to the experts, there, and back."""
        more = num_chunks - 1
        exchange = more * self.chunk_exchange
        whole = (self.to_experts + exchange, self.experts + more * self.chunk_experts, self.from_experts + exchange)
        return whole[0] / num_chunks, whole[1] / num_chunks, whole[2] / num_chunks

    def on_link(self, slower: float) -> "TripTimes":
        return replace(self, to_experts=self.to_experts * slower, from_experts=self.from_experts * slower)

    def against(self, chunked: "TripTimes", num_chunks: int) -> "TripTimes":
        """These times, measured in one chunk, with the cost of a chunk that the same trip in `num_chunks` > 1 chunks shows."""
        experts = chunked.experts - self.experts
        exchange = (chunked.to_experts + chunked.from_experts - self.to_experts - self.from_experts) / 2
        more = num_chunks - 1
        return replace(self, chunk_experts=max(experts / more, 0.0), chunk_exchange=max(exchange / more, 0.0))


@dataclass(frozen=True)
class PassTimes:
    """Seconds of one pass of one block."""

    main: tuple[float, ...]  # the n main-stream computations after the shortcut tensor, in the order of the forward pass
    trips: tuple[TripTimes, ...]  # one; two where tokens choose experts twice (dgmoe)


@dataclass(frozen=True)
class OperatorTimes:
    """Seconds of one block, forward and backward."""

    forward: PassTimes
    backward: PassTimes

    @property
    def num_operators(self) -> int:
        return len(self.forward.main)

    @property
    def exchange_seconds(self) -> float:
        """Of all exchanges, alone on the link."""
        return sum(trip.to_experts + trip.from_experts for its in (self.forward, self.backward) for trip in its.trips)

    @property
    def compute_seconds(self) -> float:
        """Of main-stream computations and experts."""
        return sum(sum(its.main) + sum(trip.experts for trip in its.trips) for its in (self.forward, self.backward))

    def on_link(self, slower: float) -> "OperatorTimes":
        """With exchanges `slower` times as long."""
        passes = [replace(its, trips=tuple(trip.on_link(slower) for trip in its.trips)) for its in (self.forward, self.backward)]
        return OperatorTimes(*passes)

    def against(self, chunked: "OperatorTimes", num_chunks: int) -> "OperatorTimes":
        """See TripTimes.against."""
        pairs = (self.forward, chunked.forward), (self.backward, chunked.backward)
        return OperatorTimes(
            *(
                replace(one, trips=tuple(trip.against(its, num_chunks) for trip, its in zip(one.trips, many.trips, strict=True)))
                for one, many in pairs
            )
        )


class Act(Enum):
    RUN = "run"
    LAUNCH = "launch"
    WAIT = "wait"


TO, EXPERTS, FROM, MAIN = range(4)  # what is run, launched or waited for
Item = tuple[int, int, int]  # what, trip, number of the chunk or of the computation
Program = list[tuple[Act, Item]]


def program(num_operators: int, schedule: Schedule, num_trips: int = 1) -> Program:
    """What the forward pass of a block does, in order (`model/blocks.py`)."""
    everyone = range(schedule.num_chunks)

    def experts(trip: int, chunks: Iterable[int]) -> Program:
        acts = ((Act.WAIT, TO), (Act.RUN, EXPERTS), (Act.LAUNCH, FROM))
        return [(act, (what, trip, chunk)) for chunk in chunks for act, what in acts]

    acts: Program = [(Act.LAUNCH, (TO, 0, chunk)) for chunk in everyone]
    for number in range(num_operators):
        acts += [*experts(0, schedule.chunks_at(number + 1)), (Act.RUN, (MAIN, 0, number))]
    acts += [(Act.LAUNCH, (TO, trip, chunk)) for trip in range(1, num_trips) for chunk in everyone]
    acts += experts(0, schedule.chunks_at(num_operators + 1))
    for trip in range(1, num_trips):
        acts += experts(trip, everyone)
    return acts + [(Act.WAIT, (FROM, trip, chunk)) for trip in range(num_trips) for chunk in everyone]


def backward_of(forward: Program) -> Program:
    """Autograd runs the nodes from the last to the first: a wait launches the gradient's exchange, a launch waits for it."""
    reverse = {Act.RUN: Act.RUN, Act.LAUNCH: Act.WAIT, Act.WAIT: Act.LAUNCH}
    return [(reverse[act], item) for act, item in reversed(forward)]


def simulate(times: OperatorTimes, schedule: Schedule) -> float:
    """Seconds from the first row that leaves to the last that is back, forward plus backward."""
    forward = program(times.num_operators, schedule, len(times.forward.trips))
    passes = (times.forward, forward), (times.backward, backward_of(forward))
    return sum(_run(acts, its, schedule.num_chunks) for its, acts in passes)


def _run(acts: Program, times: PassTimes, num_chunks: int) -> float:
    """One thread that computes, and one link that serves exchanges in the order in which they were launched."""
    of_trip = [trip.chunk(num_chunks) for trip in times.trips]
    computed = moved = 0.0  # until when each of the two is busy
    landed: dict[Item, float] = {}
    for act, item in acts:
        what, trip, number = item
        if act is Act.WAIT:
            computed = max(computed, landed[item])
        elif act is Act.RUN:
            computed += times.main[number] if what == MAIN else of_trip[trip][what]
        else:
            moved = max(moved, computed) + of_trip[trip][what]
            landed[item] = moved
    return computed


def choose(times: OperatorTimes, max_chunks: int, min_chunks: int = 1, slot: int = 0) -> Schedule:
    """The fastest schedule with min_chunks..max_chunks chunks, by trying all; `slot` > 0 fixes the slot (at most the last one).

    Among those within SLACK of it: the fewest chunks, then the least seconds on a link that is slower by CAUTION.
    """
    fixed = min(slot, times.num_operators + 1)
    numbers = range(min_chunks, max_chunks + 1)
    every = [schedule for num_chunks in numbers for schedule in Schedule.every(times.num_operators, num_chunks)]
    schedules = [schedule for schedule in every if not slot or set(schedule.slots) == {fixed}]
    seconds = [simulate(times, schedule) for schedule in schedules]
    limit = min(seconds) * (1 + SLACK)
    near = [schedule for schedule, its in zip(schedules, seconds, strict=True) if its <= limit]
    slower = times.on_link(CAUTION)
    return min(near, key=lambda schedule: (schedule.num_chunks, simulate(slower, schedule)))


class Drift:
    """Notices that exchanges are waited for longer, or less, than just after the last plan: the link or the routing has changed.

    Fed with a number that is the same on every rank, so all ranks notice at the same step.
    """

    def __init__(self, tolerance: float) -> None:
        """tolerance: a change of the share of a step that is spent waiting."""
        self.tolerance = tolerance
        self.restart()

    def restart(self) -> None:
        """What comes now is the normal state."""
        self._normal: list[float] = []
        self._recent: list[float] = []

    def notices(self, waited_share: float) -> bool:
        """Adds one step; true when the median of the last RECENT steps is off by more than the tolerance."""
        if len(self._normal) < SETTLE:
            self._normal.append(waited_share)
            return False
        self._recent = [*self._recent, waited_share][-RECENT:]
        return len(self._recent) == RECENT and abs(median(self._recent) - median(self._normal)) > self.tolerance
