"""Sets the schedule of every block with routed experts: once where it is fixed, from measured steps where it is adaptive.

Slots are chosen by simulation. What a chunk costs no simulation knows, so the number of chunks is chosen by trying.
"""

from collections import Counter
from collections.abc import Sequence
from enum import Enum

from moetrain.base.log import logger
from moetrain.dist.world import World
from moetrain.model.blocks import RoutedBlock
from moetrain.model.schedule import Schedule
from moetrain.parallel.block_times import Site, agreed, typical, visits
from moetrain.parallel.config import OverlapConfig
from moetrain.parallel.overlap import Drift, OperatorTimes, candidates, simulate
from moetrain.parallel.trial import TURNS, Trial, first_near_best
from moetrain.telemetry.lanes import Lanes

WARM_UP = 1  # steps before the first measurement: they fill caches and open connections
ENOUGH = 8  # visits of like blocks in one measurement: of fewer, one busy moment could pass for the normal state
MOST_STEPS = 4  # steps that one measurement takes at most, for models of few blocks
PAUSE = 10  # steps after a plan in which a drift asks for no other; twice as many after each that it asked for and that changed nothing
LONGEST_PAUSE = 640

Likeness = tuple[tuple[str, ...], int]  # operators and trips: blocks that are alike in them share one schedule
Plan = dict[Likeness, Schedule]


class Role(Enum):
    """What a step is to the planner."""

    WATCHED = "watched"
    MEASURED = "measured"
    TRIED = "tried"


class OverlapPlanner:
    """Every rank calls `begin` before a step, and after it what belongs to the role: `watch`, `learn` or `compare`. All decide alike.

    Slots change no bit of a step; the number of chunks does, by rounding.
    """

    def __init__(self, config: OverlapConfig, blocks: Sequence[RoutedBlock], world: World) -> None:
        """`blocks`: all of the model's, in order."""
        self.config, self.blocks, self.world = config, list(blocks), world
        self._drift = Drift(config.tolerance)
        self._num_steps = 0
        self._since: int | None = None  # steps since the last plan; None before the first
        self._has_drifted = False  # in the last steps
        self._is_for_drift = False  # the measurement that is under way, or was the last
        self._pause = PAUSE
        self._measured: list[list[tuple[Site, OperatorTimes]]] = []  # this rank's visits, by step of the measurement that is under way
        self._plans: list[Plan] = []  # what the last measurement left to choose from, in ever more chunks
        self._trial: Trial | None = None  # of these, while it is under way
        self._current: Plan = {}  # the last one that was settled on
        for block in self.blocks:
            block.schedule = first_schedule(config, len(block.operators))

    @property
    def is_adaptive(self) -> bool:
        """Whether there is anything to choose."""
        slots = self.config.slot == 0 and any(block.operators for block in self.blocks)
        return bool(self.blocks) and (slots or self.config.chunks == 0)

    def begin(self) -> Role:
        """What the next step is. Sets the schedules that it needs."""
        self._num_steps += 1
        if self._trial is not None:
            self._follow(self._plans[self._trial.turn])
            return Role.TRIED
        if not self.is_adaptive or self._num_steps <= WARM_UP or not self._is_due():
            return Role.WATCHED
        if not self._measured:
            self._is_for_drift = self._has_drifted
        if self.config.chunks == 0:
            for block in self.blocks:
                block.schedule = Schedule(block.schedule.slots[:1])
        return Role.MEASURED

    def _is_due(self) -> bool:
        if self._since is None or self._measured:
            return True
        return (self._has_drifted and self._since >= self._pause) or 0 < self.config.measure_every <= self._since

    def watch(self, waited_share: float) -> None:
        """After any other step. `waited_share`: of the time of all ranks, what they waited for exchanges."""
        if self._since is not None:
            self._since += 1
            self._has_drifted = self._drift.notices(waited_share)

    def learn(self, lanes: Lanes) -> None:
        """After a measured step, with this rank's lanes of it; a collective after the last step of a measurement."""
        self._measured.append(visits(lanes, [Site.of(block) for block in self.blocks]))
        if len(self._measured) < MOST_STEPS and self._fewest_visits() < ENOUGH:
            return
        times = self._times([visit for step in self._measured for visit in step])
        self._measured = []
        self._plans = plans_of(times, self.config)
        self._tell_measured(times)
        if len(self._plans) > 1:
            self._trial = Trial(len(self._plans))
        else:
            self._settle(self._plans[0])

    def compare(self, seconds: float) -> None:
        """After a step that was tried, with this rank's seconds of its passes; a collective after the last step of a trial."""
        assert self._trial is not None
        self._trial.add(seconds)
        if not self._trial.is_over:
            return
        medians = self._trial.medians(self.world.gather(self._trial.seconds, "gathering seconds of tried plans"))
        self._trial = None
        plan = self._plans[first_near_best(medians)]
        self._tell_tried(medians, plan)
        self._settle(plan)

    def _follow(self, plan: Plan) -> None:
        for block in self.blocks:
            block.schedule = plan[likeness_of(block)]

    def _settle(self, plan: Plan) -> None:
        """For good: how long its steps wait is the normal state."""
        no_help = self._is_for_drift and plan == self._current  # something comes and goes
        self._pause = min(2 * self._pause, LONGEST_PAUSE) if no_help else PAUSE
        self._current = plan
        self._follow(plan)
        self._since, self._has_drifted = 0, False
        self._drift.restart()

    def _fewest_visits(self) -> int:
        """Of like blocks, in the steps measured so far."""
        found = Counter(site.name for step in self._measured for site, _ in step)
        alike: Counter[Likeness] = Counter()
        for block in self.blocks:
            alike[likeness_of(block)] += found[block.name]
        return min(alike.values())

    def _times(self, mine: Sequence[tuple[Site, OperatorTimes]]) -> dict[Likeness, OperatorTimes]:
        measured = agreed(mine, lambda numbers: self.world.gather(numbers, "gathering times of operators"))
        by_name: dict[str, list[OperatorTimes]] = {}
        for site, times in measured:
            by_name.setdefault(site.name, []).append(times)
        alike: dict[Likeness, list[OperatorTimes]] = {}
        for block in self.blocks:
            alike.setdefault(likeness_of(block), []).extend(by_name[block.name])
        return {likeness: typical(times) for likeness, times in alike.items()}

    def _tell_measured(self, times: dict[Likeness, OperatorTimes]) -> None:
        for likeness, its in times.items():
            schedules = dict.fromkeys(plan[likeness] for plan in self._plans)
            simulated = [f"{1e3 * simulate(its, one):.1f} ms with experts in slot {'+'.join(map(str, one.slots))}" for one in schedules]
            logger("parallel").info(
                "Measured %d blocks (%s): one takes %.1f ms if nothing overlaps, of which exchanges %.1f ms. By simulation %s of %d.",
                sum(likeness_of(block) == likeness for block in self.blocks), ", ".join(likeness[0]) or "nothing beside the experts",
                1e3 * (its.compute_seconds + its.exchange_seconds), 1e3 * its.exchange_seconds, ", ".join(simulated), its.num_operators + 1,
            )  # fmt: skip

    def _tell_tried(self, medians: Sequence[float], plan: Plan) -> None:
        took = [f"{1e3 * seconds:.1f} ms in {most_chunks(one)}" for one, seconds in zip(self._plans, medians, strict=True)]
        logger("parallel").info(
            "Tried in turns, %d steps each: forward and backward take %s. Experts run in %s from here on.",
            TURNS, ", ".join(took), most_chunks(plan),
        )  # fmt: skip


def likeness_of(block: RoutedBlock) -> Likeness:
    return block.operators, 2 if block.gates_again else 1


def first_schedule(config: OverlapConfig, num_operators: int) -> Schedule:
    """What is fixed, and the default in place of what is adaptive."""
    slot = min(config.slot, num_operators + 1) or Schedule.default(num_operators).slots[0]
    return Schedule((slot,) * (config.chunks or 1))


def plans_of(times: dict[Likeness, OperatorTimes], config: OverlapConfig) -> list[Plan]:
    """One for each number of chunks in which some blocks might gain by more than fewer; the first is in the fewest."""
    found: list[Plan] = []
    for schedules in zip(*(candidates(its, numbers_of_chunks(config), config.slot) for its in times.values()), strict=True):
        plan = dict(zip(times, schedules, strict=True))
        if plan not in found:
            found.append(plan)
    return found


def numbers_of_chunks(config: OverlapConfig) -> list[int]:
    """The fixed one, or 1, 2, 4, ... and the most: every number costs steps, and neighbours among great ones hardly differ."""
    if config.chunks:
        return [config.chunks]
    powers = [1 << power for power in range(config.max_chunks.bit_length())]
    return [number for number in powers if number < config.max_chunks] + [config.max_chunks]


def most_chunks(plan: Plan) -> str:
    number = max(schedule.num_chunks for schedule in plan.values())
    return f"up to {number} chunks" if number > 1 else "1 chunk"
