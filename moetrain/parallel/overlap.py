"""When the experts of a block should run and in how many token chunks, from measured times: a simulation of two queues. Pure.

One queue computes, the other moves bytes; each does one thing at a time, in the order of the program. arXiv 2404.05019 balances the two
exchanges of the forward pass; here forward and backward are simulated together, because one order of autograd nodes decides both.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from statistics import median

from moetrain.model.schedule import Schedule

SLACK = 0.01  # schedules this close to the best count as equally fast
CAUTION = 1.5  # among equally fast ones, the one that bears a link slower by this factor best
SETTLE = 3  # steps whose waits are the normal ones of a plan; a change among them passes unnoticed, so they are few
RECENT = 3  # steps whose waits are compared with them


@dataclass(frozen=True)
class TripTimes:
    """Seconds of one gating's rows in one pass, all rows at once. A backward pass has them under the same names, of the gradients."""

    experts: float  # with the permutations around them
    to_experts: float
    from_experts: float

    def chunk(self, num_chunks: int) -> tuple[float, float, float]:
        """Of one of `num_chunks`, as if chunks cost nothing: to the experts, there, and back."""
        return self.to_experts / num_chunks, self.experts / num_chunks, self.from_experts / num_chunks

    def on_link(self, slower: float) -> "TripTimes":
        return replace(self, to_experts=self.to_experts * slower, from_experts=self.from_experts * slower)


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


def choose(times: OperatorTimes, num_chunks: int, slot: int = 0) -> Schedule:
    """The fastest schedule in so many chunks, by trying all; `slot` > 0 fixes the slot (at most the last one).

    Among those within SLACK of it: the least seconds on a link that is slower by CAUTION.
    """
    if slot:
        return Schedule((min(slot, times.num_operators + 1),) * num_chunks)
    schedules = list(Schedule.every(times.num_operators, num_chunks))
    seconds = [simulate(times, schedule) for schedule in schedules]
    limit = min(seconds) * (1 + SLACK)
    near = [schedule for schedule, its in zip(schedules, seconds, strict=True) if its <= limit]
    slower = times.on_link(CAUTION)
    return min(near, key=lambda schedule: simulate(slower, schedule))


def candidates(times: OperatorTimes, numbers: Sequence[int], slot: int = 0) -> list[Schedule]:
    """For each of these numbers of chunks, the least first, its fastest schedule; the one before where more chunks promise no gain.

    A chunk is simulated as if it cost nothing, so a gain is a promise, and its absence final.
    """
    found = [choose(times, numbers[0], slot)]
    for number in numbers[1:]:
        more = choose(times, number, slot)
        pays = simulate(times, more) < (1 - SLACK) * simulate(times, found[-1])
        found.append(more if pays else found[-1])
    return found


class Drift:
    """Notices that exchanges are waited for longer, or less, than just after the last plan: the link or the routing has changed.

    Fed with a number that is the same on every rank, so all ranks notice at the same step.
    """

    def __init__(self, tolerance: float) -> None:
        """tolerance: a change of the share of a step that is spent waiting; 0: nothing is noticed. Where more than half is, twice the rest
        counts in place of the step: the share of a link that is ever slower comes ever nearer to 1.
        """
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
        normal = median(self._normal)
        limit = self.tolerance * min(1.0, 2 * (1 - normal))
        return bool(self.tolerance) and len(self._recent) == RECENT and abs(median(self._recent) - normal) > limit
