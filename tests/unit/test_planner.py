"""The planner in a closed loop with simulated steps: what it measures, what it chooses, when it measures again."""

from collections.abc import Callable, Iterator

import pytest
import torch

from moetrain.dist.world import World
from moetrain.model.blocks import RoutedBlock
from moetrain.model.config import ModelConfig
from moetrain.model.gpt import meta_model
from moetrain.model.schedule import Schedule
from moetrain.parallel.block_times import Site
from moetrain.parallel.config import OverlapConfig
from moetrain.parallel.overlap import OperatorTimes, simulate
from moetrain.parallel.planner import OverlapPlanner
from tests.unit.overlap_kit import serial_lanes, shaped

Times = Callable[[int], OperatorTimes]  # number of computations -> times of a block


def blocks_of(pattern: list[str], num_layers: int) -> list[RoutedBlock]:
    model = meta_model(ModelConfig(pattern=pattern, num_layers=num_layers))
    return [module for module in model.modules() if isinstance(module, RoutedBlock)]


def planner(config: OverlapConfig, blocks: list[RoutedBlock]) -> OverlapPlanner:
    return OverlapPlanner(config, blocks, World.single(torch.device("cpu")))


def run(under_test: OverlapPlanner, times: Times, num_steps: int) -> list[int]:
    """Steps on a machine with these times; the numbers (from 0) of those that were measured."""
    measured = []
    for step in range(num_steps):
        if under_test.begin():
            measured.append(step)
            blocks = under_test.blocks
            its = [times(len(block.operators)) for block in blocks]
            under_test.learn(serial_lanes([Site.of(block) for block in blocks], [block.schedule for block in blocks], its))
        else:
            under_test.watch(waited_share(under_test.blocks, times))
    return measured


def waited_share(blocks: list[RoutedBlock], times: Times) -> float:
    its = [(times(len(block.operators)), block.schedule) for block in blocks]
    seconds = sum(simulate(one, schedule) for one, schedule in its)
    return 1 - sum(one.compute_seconds for one, _ in its) / seconds if its else 0.0


def at(megabit: float, top_k: int = 1) -> Times:
    return lambda num_operators: shaped(1024, 256, 1024, top_k, num_operators, megabit)


def best(times: OperatorTimes, max_chunks: int) -> float:
    every = (schedule for m in range(1, max_chunks + 1) for schedule in Schedule.every(times.num_operators, m))
    return min(simulate(times, schedule) for schedule in every)


@pytest.mark.parametrize("megabit", [25, 100, 400])
def test_slots_are_the_best_ones_after_one_measurement(megabit: float) -> None:
    under_test = planner(OverlapConfig(), blocks_of(["scmoe"], 4))
    assert run(under_test, at(megabit), 50) == [1, 2, 3, 4]
    for block in under_test.blocks:
        assert block.schedule.num_chunks == 1
        assert simulate(at(megabit)(3), block.schedule) <= 1.01 * best(at(megabit)(3), 1)


@pytest.mark.parametrize(("megabit", "top_k"), [(25, 2), (50, 1), (100, 2), (1000, 1)])
def test_chunks_are_measured_before_they_are_chosen(megabit: float, top_k: int) -> None:
    """Twice in a row: in one chunk, then in as many as would be best if a chunk cost nothing."""
    under_test = planner(OverlapConfig(chunks=0), blocks_of(["moe"], 8))
    measured = run(under_test, at(megabit, top_k), 50)
    assert measured in ([1], [1, 2])
    for block in under_test.blocks:
        assert (block.schedule.num_chunks > 1) <= (measured == [1, 2])
        assert simulate(at(megabit, top_k)(0), block.schedule) <= 1.03 * best(at(megabit, top_k)(0), 4)


def test_chunks_that_cost_more_than_they_hide_are_measured_and_given_up() -> None:
    def times(num_operators: int) -> OperatorTimes:
        dear = shaped(1024, 256, 1024, 2, num_operators, 100)
        return dear.against(dear.on_link(2.5), 2)  # every chunk costs one and a half exchanges

    under_test = planner(OverlapConfig(chunks=0), blocks_of(["moe"], 4))
    assert run(under_test, times, 50) == [1, 2, 3, 4], "two steps make one measurement"
    assert all(block.schedule.num_chunks == 1 for block in under_test.blocks)


@pytest.mark.parametrize(("before", "after"), [(200, 40), (40, 200)])
def test_a_changed_rate_is_planned_for_within_twenty_steps(before: float, after: float) -> None:
    under_test = planner(OverlapConfig(measure_every=0, chunks=0), blocks_of(["scmoe"], 4))
    run(under_test, at(before), 60)
    assert run(under_test, at(after), 20), "nothing was measured again"
    for block in under_test.blocks:
        assert simulate(at(after)(3), block.schedule) <= 1.03 * best(at(after)(3), 4)
    assert run(under_test, at(after), 100) == []


def test_blocks_of_other_kinds_have_plans_of_their_own() -> None:
    under_test = planner(OverlapConfig(), blocks_of(["shared", "scmoe"], 3))
    assert run(under_test, at(100), 20) == [1, 2, 3, 4]
    for block in under_test.blocks:
        times = at(100)(len(block.operators))
        assert simulate(times, block.schedule) <= 1.01 * best(times, 1)


def test_measured_steps_come_back_after_the_configured_number() -> None:
    assert run(planner(OverlapConfig(measure_every=20), blocks_of(["scmoe"], 16)), at(100), 65) == [1, 22, 43, 64]
    assert run(planner(OverlapConfig(measure_every=0), blocks_of(["scmoe"], 16)), at(100), 65) == [1]


@pytest.mark.parametrize(("num_layers", "measured"), [(2, [1, 2, 3, 4]), (6, [1, 2, 3]), (8, [1, 2]), (14, [1, 2]), (32, [1])])
def test_a_measurement_takes_more_steps_where_blocks_are_few(num_layers: int, measured: list[int]) -> None:
    assert run(planner(OverlapConfig(), blocks_of(["scmoe"], num_layers)), at(100), 30) == measured


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
            assert under_test.begin()
            blocks = under_test.blocks
            its = [moody(len(block.operators)) for block in blocks]
            under_test.learn(serial_lanes([Site.of(block) for block in blocks], [block.schedule for block in blocks], its))
        assert not under_test.begin()
        plans.append([block.schedule for block in under_test.blocks])
    assert all(plan == plans[0] for plan in plans)


def test_what_is_fixed_is_never_measured() -> None:
    under_test = planner(OverlapConfig(slot=9, chunks=2), blocks_of(["shared", "scmoe"], 3))
    assert [block.schedule for block in under_test.blocks] == [Schedule((2, 2)), Schedule((4, 4))]
    assert run(under_test, at(25), 30) == []
    assert [block.schedule for block in under_test.blocks] == [Schedule((2, 2)), Schedule((4, 4))]


def test_a_model_without_choices_is_never_measured() -> None:
    assert run(planner(OverlapConfig(), blocks_of(["moe"], 2)), at(25), 30) == []
    assert run(planner(OverlapConfig(), blocks_of(["dense"], 2)), at(25), 30) == []


def test_a_fixed_number_of_chunks_is_kept_while_slots_are_chosen() -> None:
    under_test = planner(OverlapConfig(chunks=3), blocks_of(["scmoe"], 4))
    assert run(under_test, at(25), 30) == [1, 2, 3, 4]
    assert {block.schedule.num_chunks for block in under_test.blocks} == {3}
