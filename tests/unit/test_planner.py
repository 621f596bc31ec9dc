"""The planner in a closed loop with simulated steps: what it measures, what it chooses, when it measures again."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from moetrain.dist.world import World
from moetrain.model.blocks import RoutedBlock
from moetrain.model.config import ModelConfig
from moetrain.model.gpt import meta_model
from moetrain.model.schedule import Schedule
from moetrain.parallel.block_times import Site
from moetrain.parallel.config import OverlapConfig
from moetrain.parallel.overlap import OperatorTimes, PassTimes, TripTimes, simulate
from moetrain.parallel.planner import OverlapPlanner, Role, numbers_of_chunks
from tests.unit.overlap_kit import serial_lanes, shaped

Times = Callable[[int], OperatorTimes]  # number of computations -> times of a block
Seconds = Callable[[list[RoutedBlock]], float]  # of a step under the schedules that the blocks now have


def blocks_of(pattern: list[str], num_layers: int) -> list[RoutedBlock]:
    model = meta_model(ModelConfig(pattern=pattern, num_layers=num_layers))
    return [module for module in model.modules() if isinstance(module, RoutedBlock)]


def planner(config: OverlapConfig, blocks: list[RoutedBlock]) -> OverlapPlanner:
    return OverlapPlanner(config, blocks, World.single(torch.device("cpu")))


def run(under_test: OverlapPlanner, times: Times, num_steps: int, seconds: Seconds = lambda blocks: 1.0) -> dict[Role, list[int]]:
    """Steps on a machine with these times; the numbers (from 0) of the steps by role. `seconds`: of a step that is tried."""
    found: dict[Role, list[int]] = {role: [] for role in Role}
    for step in range(num_steps):
        role, blocks = under_test.begin(), under_test.blocks
        found[role].append(step)
        if role is Role.MEASURED:
            its = [times(len(block.operators)) for block in blocks]
            under_test.learn(serial_lanes([Site.of(block) for block in blocks], [block.schedule for block in blocks], its))
        elif role is Role.TRIED:
            under_test.compare(seconds(blocks))
        else:
            under_test.watch(waited_share(blocks, times))
    return found


def simulated(times: Times, chunk_seconds: float = 0.0) -> Seconds:
    """What blocks with these times take together, and every chunk after the first beside that."""

    def seconds(blocks: list[RoutedBlock]) -> float:
        more = sum(block.schedule.num_chunks - 1 for block in blocks)
        return sum(simulate(times(len(block.operators)), block.schedule) for block in blocks) + chunk_seconds * more

    return seconds


def waited_share(blocks: list[RoutedBlock], times: Times) -> float:
    its = [(times(len(block.operators)), block.schedule) for block in blocks]
    seconds = sum(simulate(one, schedule) for one, schedule in its)
    return 1 - sum(one.compute_seconds for one, _ in its) / seconds if its else 0.0


def at(megabit: float, top_k: int = 1) -> Times:
    return lambda num_operators: shaped(1024, 256, 1024, top_k, num_operators, megabit)


def skewed(times: Times) -> Times:
    """With three times the rows on the busiest rank, for whom all wait."""

    def uneven(its: PassTimes) -> PassTimes:
        trips = [TripTimes(3 * trip.experts, 3 * trip.to_experts, 3 * trip.from_experts) for trip in its.trips]
        return replace(its, trips=tuple(trips))

    def of(num_operators: int) -> OperatorTimes:
        even = times(num_operators)
        return OperatorTimes(uneven(even.forward), uneven(even.backward))

    return of


def best(times: OperatorTimes, max_chunks: int) -> float:
    every = (schedule for m in range(1, max_chunks + 1) for schedule in Schedule.every(times.num_operators, m))
    return min(simulate(times, schedule) for schedule in every)


@pytest.mark.parametrize("megabit", [25, 100, 400])
def test_slots_are_the_best_ones_after_one_measurement(megabit: float) -> None:
    under_test = planner(OverlapConfig(), blocks_of(["scmoe"], 4))
    roles = run(under_test, at(megabit), 50)
    assert roles[Role.MEASURED] == [1, 2, 3, 4] and not roles[Role.TRIED]
    for block in under_test.blocks:
        assert block.schedule.num_chunks == 1
        assert simulate(at(megabit)(3), block.schedule) <= 1.01 * best(at(megabit)(3), 1)


@pytest.mark.parametrize(("megabit", "top_k", "num_tried"), [(25, 2, 2), (50, 1, 2), (100, 2, 3), (1000, 1, 3)])
def test_the_number_of_chunks_is_chosen_by_trying(megabit: float, top_k: int, num_tried: int) -> None:
    """Right after the measurement: 1, 2 and 4 chunks in turns, as far as more may pay. On a slow link two hide all that four do."""
    under_test, times = planner(OverlapConfig(chunks=0), blocks_of(["moe"], 8)), at(megabit, top_k)
    roles = run(under_test, times, 50, simulated(times))
    assert roles[Role.MEASURED] == [1]
    assert roles[Role.TRIED] == list(range(2, 2 + 4 * num_tried))
    for block in under_test.blocks:
        assert simulate(times(0), block.schedule) <= 1.03 * best(times(0), 4)


@pytest.mark.parametrize(
    ("seconds", "num_chunks"), [((1.0, 0.95, 1.1), 2), ((1.0, 0.95, 0.9), 4), ((1.0, 1.05, 1.1), 1), ((1.0, 0.99, 0.985), 1)]
)
def test_the_trial_decides_whatever_the_simulation_promises(seconds: tuple[float, float, float], num_chunks: int) -> None:
    """Of steps in 1, 2 and 4 chunks, of which four are far the best by simulation. Where they take about the same: the fewest."""
    under_test = planner(OverlapConfig(chunks=0), blocks_of(["moe"], 8))
    run(under_test, at(100, 2), 20, lambda blocks: seconds[(1, 2, 4).index(blocks[0].schedule.num_chunks)])
    assert {block.schedule for block in under_test.blocks} == {Schedule((1,) * num_chunks)}


def test_chunks_that_cost_more_than_they_hide_are_tried_and_given_up() -> None:
    under_test, times = planner(OverlapConfig(chunks=0), blocks_of(["moe"], 8)), at(100, 2)
    roles = run(under_test, times, 50, simulated(times, chunk_seconds=1.5 * times(0).exchange_seconds))
    assert roles[Role.MEASURED] == [1] and roles[Role.TRIED] == list(range(2, 14))
    assert all(block.schedule.num_chunks == 1 for block in under_test.blocks)


def test_one_slow_step_decides_no_trial() -> None:
    """Whichever it is, the first of a plan too."""
    for slow in range(8):
        under_test, steps = planner(OverlapConfig(chunks=0, max_chunks=2), blocks_of(["moe"], 8)), iter(range(100))

        def seconds(blocks: list[RoutedBlock], slow: int = slow, steps: Iterator[int] = steps) -> float:
            return (1.0, 0.9)[blocks[0].schedule.num_chunks - 1] * (5 if next(steps) == slow else 1)

        assert run(under_test, at(50), 20, seconds)[Role.TRIED] == list(range(2, 10))
        assert all(block.schedule.num_chunks == 2 for block in under_test.blocks)


def test_nothing_is_tried_where_more_chunks_promise_nothing() -> None:
    roles = run(planner(OverlapConfig(chunks=0), blocks_of(["scmoe"], 16)), at(1000), 30)
    assert roles[Role.MEASURED] == [1] and not roles[Role.TRIED]


def test_two_numbers_of_chunks_take_ten_steps_of_a_start() -> None:
    roles = run(planner(OverlapConfig(chunks=0, max_chunks=2), blocks_of(["scmoe"], 16)), at(25), 30)
    assert sorted(roles[Role.MEASURED] + roles[Role.TRIED]) == list(range(1, 10))


@pytest.mark.parametrize(("chunks", "max_chunks", "numbers"), [(0, 1, [1]), (0, 2, [1, 2]), (0, 3, [1, 2, 3]), (0, 4, [1, 2, 4]),
                                                               (0, 6, [1, 2, 4, 6]), (3, 4, [3])])  # fmt: skip
def test_numbers_of_chunks_double_up_to_the_most(chunks: int, max_chunks: int, numbers: list[int]) -> None:
    assert numbers_of_chunks(OverlapConfig(chunks=chunks, max_chunks=max_chunks)) == numbers


# A plain block has nothing but its experts and their exchanges: all of it grows with the rows, and its plan stays the best.
CHANGES = [(pattern, *rates) for pattern in ("scmoe", "moe") for rates in ((at(200), at(40)), (at(40), at(200)))]
CHANGES += [("scmoe", at(60), skewed(at(60))), ("scmoe", skewed(at(60)), at(60))]


@pytest.mark.parametrize(
    ("pattern", "before", "after"), CHANGES, ids=["slower", "faster", "plain, slower", "plain, faster", "uneven", "even again"]
)
def test_a_changed_rate_or_skew_is_planned_for_within_twenty_steps(pattern: str, before: Times, after: Times) -> None:
    """Two blocks of four layers, so that a measurement takes as long as it may. While plans are tried, their waits are no drift."""
    under_test = planner(OverlapConfig(measure_every=0, chunks=0), blocks_of([pattern], 4))
    run(under_test, before, 60, simulated(before))
    roles = run(under_test, after, 20, simulated(after))
    assert roles[Role.MEASURED], "nothing was measured again"
    for block in under_test.blocks:
        times = after(len(block.operators))
        assert simulate(times, block.schedule) <= 1.03 * best(times, 4)
    assert run(under_test, after, 100)[Role.WATCHED] == list(range(100))


def test_a_link_that_changes_two_steps_after_the_plan_is_followed() -> None:
    under_test = planner(OverlapConfig(measure_every=0), blocks_of(["scmoe"], 4))
    assert run(under_test, at(200), 7)[Role.MEASURED] == [1, 2, 3, 4]
    assert run(under_test, at(40), 20)[Role.MEASURED]
    for block in under_test.blocks:
        assert simulate(at(40)(3), block.schedule) <= 1.01 * best(at(40)(3), 1)


def test_blocks_of_other_kinds_have_plans_of_their_own() -> None:
    under_test = planner(OverlapConfig(), blocks_of(["shared", "scmoe"], 3))
    assert run(under_test, at(100), 20)[Role.MEASURED] == [1, 2, 3, 4]
    for block in under_test.blocks:
        times = at(100)(len(block.operators))
        assert simulate(times, block.schedule) <= 1.01 * best(times, 1)


def test_measured_steps_come_back_after_the_configured_number() -> None:
    assert run(planner(OverlapConfig(measure_every=20), blocks_of(["scmoe"], 16)), at(100), 65)[Role.MEASURED] == [1, 22, 43, 64]
    assert run(planner(OverlapConfig(measure_every=0), blocks_of(["scmoe"], 16)), at(100), 65)[Role.MEASURED] == [1]


@pytest.mark.parametrize(("num_layers", "measured"), [(2, [1, 2, 3, 4]), (6, [1, 2, 3]), (8, [1, 2]), (14, [1, 2]), (32, [1])])
def test_a_measurement_takes_more_steps_where_blocks_are_few(num_layers: int, measured: list[int]) -> None:
    assert run(planner(OverlapConfig(), blocks_of(["scmoe"], num_layers)), at(100), 30)[Role.MEASURED] == measured


def test_one_busy_step_changes_no_plan() -> None:
    """Its exchanges take fifty times as long; the median over a measurement does not see it."""
    plans = []
    for disturbed in (None, 0, 1, 2, 3):
        under_test = planner(OverlapConfig(), blocks_of(["scmoe"], 4))
        seen = iter(range(100))
        times = at(400)

        def moody(n: int, times: Times = times, seen: Iterator[int] = seen, disturbed: int | None = disturbed) -> OperatorTimes:
            return times(n).on_link(50.0) if disturbed is not None and next(seen) // 2 == disturbed else times(n)

        under_test.begin()
        under_test.watch(0.0)
        for _ in range(4):
            assert under_test.begin() is Role.MEASURED
            blocks = under_test.blocks
            its = [moody(len(block.operators)) for block in blocks]
            under_test.learn(serial_lanes([Site.of(block) for block in blocks], [block.schedule for block in blocks], its))
        assert under_test.begin() is Role.WATCHED
        plans.append([block.schedule for block in under_test.blocks])
    assert all(plan == plans[0] for plan in plans)


def measured_with(under_test: OverlapPlanner, share: Callable[[int], float], num_steps: int, times: Times) -> list[int]:
    """The steps that are measured when ranks wait such a share of each other step."""
    found = []
    for step in range(num_steps):
        if under_test.begin() is Role.WATCHED:
            under_test.watch(share(step))
            continue
        found.append(step)
        blocks = under_test.blocks
        its = [times(len(block.operators)) for block in blocks]
        under_test.learn(serial_lanes([Site.of(block) for block in blocks], [block.schedule for block in blocks], its))
    return found


def test_what_has_passed_again_is_no_reason_to_measure() -> None:
    under_test = planner(OverlapConfig(measure_every=0), blocks_of(["scmoe"], 16))
    assert measured_with(under_test, lambda step: 0.5 if 7 <= step < 10 else 0.1, 60, at(100)) == [1]
    under_test = planner(OverlapConfig(measure_every=0), blocks_of(["scmoe"], 16))
    assert measured_with(under_test, lambda step: 0.5 if 7 <= step < 12 else 0.1, 60, at(100)) == [1, 12]


def test_what_comes_and_goes_without_another_plan_is_measured_ever_less() -> None:
    under_test = planner(OverlapConfig(measure_every=0), blocks_of(["scmoe"], 16))
    found = measured_with(under_test, lambda step: 0.5 if step // 15 % 2 else 0.1, 2000, at(100))
    assert 4 <= len(found) <= 9, found


def test_a_tolerance_of_zero_watches_nothing() -> None:
    under_test = planner(OverlapConfig(measure_every=0, tolerance=0.0), blocks_of(["scmoe"], 16))
    assert measured_with(under_test, lambda step: step % 7 / 10, 100, at(100)) == [1]


def test_what_is_fixed_is_never_measured() -> None:
    under_test = planner(OverlapConfig(slot=9, chunks=2), blocks_of(["shared", "scmoe"], 3))
    assert [block.schedule for block in under_test.blocks] == [Schedule((2, 2)), Schedule((4, 4))]
    assert run(under_test, at(25), 30)[Role.WATCHED] == list(range(30))
    assert [block.schedule for block in under_test.blocks] == [Schedule((2, 2)), Schedule((4, 4))]


def test_a_model_without_choices_is_never_measured() -> None:
    assert run(planner(OverlapConfig(), blocks_of(["moe"], 2)), at(25), 30)[Role.WATCHED] == list(range(30))
    assert run(planner(OverlapConfig(), blocks_of(["dense"], 2)), at(25), 30)[Role.WATCHED] == list(range(30))


def test_a_fixed_number_of_chunks_is_kept_while_slots_are_chosen() -> None:
    under_test = planner(OverlapConfig(chunks=3), blocks_of(["scmoe"], 4))
    assert run(under_test, at(25), 30)[Role.MEASURED] == [1, 2, 3, 4]
    assert {block.schedule.num_chunks for block in under_test.blocks} == {3}
