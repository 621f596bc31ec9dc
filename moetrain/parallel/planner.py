"""Sets the schedule of every block with routed experts: once where it is fixed, from measured steps where it is adaptive."""

from collections import Counter
from collections.abc import Sequence

from moetrain.base.log import logger
from moetrain.dist.world import World
from moetrain.model.blocks import RoutedBlock
from moetrain.model.schedule import Schedule
from moetrain.parallel.block_times import Site, agreed, typical, visits
from moetrain.parallel.config import OverlapConfig
from moetrain.parallel.overlap import Drift, OperatorTimes, choose, simulate
from moetrain.telemetry.lanes import Lanes

WARM_UP = 1  # steps before the first measurement: they fill caches and open connections
ENOUGH = 8  # visits of like blocks in one measurement: of fewer, one busy moment could pass for the normal state
MOST_STEPS = 4  # steps that one measurement takes at most, for models of few blocks
PAUSE = 10  # steps after a measurement in which a drift asks for no other

Likeness = tuple[tuple[str, ...], int]  # operators and trips: blocks that are alike in them share one schedule


class OverlapPlanner:
    """Every rank calls `begin` before a step, and after it `learn` where `begin` said so, else `watch`; all ranks decide alike.

    Slots change no bit of a step; the number of chunks does, by rounding.
    """

    def __init__(self, config: OverlapConfig, blocks: Sequence[RoutedBlock], world: World) -> None:
        """`blocks`: all of the model's, in order."""
        self.config, self.blocks, self.world = config, list(blocks), world
        self._drift = Drift(config.tolerance)
        self._num_steps = 0
        self._since: int | None = None  # steps since the last plan; None before the first
        self._has_drifted = False
        self._measured: list[list[tuple[Site, OperatorTimes]]] = []  # this rank's visits, by step of the measurement that is under way
        self._in_one_chunk: dict[Likeness, OperatorTimes] | None = None  # the next steps measure the chunks that these suggest
        for block in self.blocks:
            block.schedule = first_schedule(config, len(block.operators))

    @property
    def is_adaptive(self) -> bool:
        """Whether there is anything to choose."""
        slots = self.config.slot == 0 and any(block.operators for block in self.blocks)
        return bool(self.blocks) and (slots or self.config.chunks == 0)

    def begin(self) -> bool:
        """Whether the next step is to be measured."""
        self._num_steps += 1
        if not self.is_adaptive or self._num_steps <= WARM_UP or not self._is_due():
            return False
        if self.config.chunks == 0 and self._in_one_chunk is None:
            for block in self.blocks:
                block.schedule = Schedule(block.schedule.slots[:1])
        return True

    def _is_due(self) -> bool:
        if self._since is None or self._measured or self._in_one_chunk is not None:
            return True
        return (self._has_drifted and self._since >= PAUSE) or 0 < self.config.measure_every <= self._since

    def watch(self, waited_share: float) -> None:
        """After a step that was not measured. `waited_share`: of the time of all ranks, what they waited for exchanges."""
        if self._since is not None:
            self._since += 1
            self._has_drifted |= self._drift.notices(waited_share)

    def learn(self, lanes: Lanes) -> None:
        """After a measured step, with this rank's lanes of it; a collective after the last step of a measurement.

        Where chunks are adaptive and might pay, a second one follows at once: in the chunks that would be best if chunks cost nothing.
        """
        self._measured.append(visits(lanes, [Site.of(block) for block in self.blocks]))
        if len(self._measured) < MOST_STEPS and self._fewest_visits() < ENOUGH:
            return
        times = self._times([visit for step in self._measured for visit in step])
        self._measured = []
        in_one_chunk, self._in_one_chunk = self._in_one_chunk, None
        if in_one_chunk is not None:
            times = {likeness: self._with_costs(one, times[likeness], likeness) for likeness, one in in_one_chunk.items()}
        plan = {likeness: self._choice(its) for likeness, its in times.items()}
        if in_one_chunk is None and self.config.chunks == 0 and any(schedule.num_chunks > 1 for schedule in plan.values()):
            self._in_one_chunk = times
        else:
            self._since, self._has_drifted = 0, False
            self._drift.restart()
            self._tell(plan, times)
        for block in self.blocks:
            block.schedule = plan[likeness_of(block)]

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

    def _with_costs(self, one: OperatorTimes, chunked: OperatorTimes, likeness: Likeness) -> OperatorTimes:
        num_chunks = self._schedule_of(likeness).num_chunks
        return one.against(chunked, num_chunks) if num_chunks > 1 else one

    def _choice(self, times: OperatorTimes) -> Schedule:
        most, least = (self.config.max_chunks, 1) if self.config.chunks == 0 else (self.config.chunks, self.config.chunks)
        return choose(times, most, least, self.config.slot)

    def _schedule_of(self, likeness: Likeness) -> Schedule:
        return next(block.schedule for block in self.blocks if likeness_of(block) == likeness)

    def _tell(self, plan: dict[Likeness, Schedule], times: dict[Likeness, OperatorTimes]) -> None:
        for likeness, schedule in plan.items():
            its, count = times[likeness], sum(likeness_of(block) == likeness for block in self.blocks)
            logger("parallel").info(
                "Measured %d blocks (%s): experts run in slot %s of %d. By simulation a block takes %.1f ms, and %.1f ms if nothing "
                "overlapped, of which exchanges %.1f ms.",
                count, ", ".join(likeness[0]) or "nothing beside the experts", " and ".join(map(str, schedule.slots)),
                its.num_operators + 1, 1e3 * simulate(its, schedule), 1e3 * (its.compute_seconds + its.exchange_seconds),
                1e3 * its.exchange_seconds,
            )  # fmt: skip


def likeness_of(block: RoutedBlock) -> Likeness:
    return block.operators, 2 if block.gates_again else 1


def first_schedule(config: OverlapConfig, num_operators: int) -> Schedule:
    """What is fixed, and the default in place of what is adaptive."""
    slot = min(config.slot, num_operators + 1) or Schedule.default(num_operators).slots[0]
    return Schedule((slot,) * (config.chunks or 1))
