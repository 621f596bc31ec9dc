"""A trial of plans: whose turn it is, which steps count, and what is near enough."""

import pytest

from moetrain.parallel.trial import NEAR, Trial, first_near_best, num_steps


def tried(num_plans: int, seconds: list[float]) -> Trial:
    trial = Trial(num_plans)
    for its in seconds:
        assert not trial.is_over
        trial.add(its)
    return trial


def test_plans_take_turns() -> None:
    trial, turns = Trial(3), []
    while not trial.is_over:
        turns.append(trial.turn)
        trial.add(1.0)
    assert turns == [0, 1, 2] * 4 and len(turns) == num_steps(3)


def test_the_first_turn_does_not_count_and_one_slow_step_is_not_seen() -> None:
    seconds = [9.0, 0.1, 2.0, 3.0, 8.0, 3.1, 2.2, 2.9]  # of plans 0 and 1 in turn
    assert tried(2, seconds).medians([seconds]) == [2.2, 3.0]


def test_the_slowest_rank_counts_in_every_step() -> None:
    mine, other = [1.0, 1.0] + [1.0, 2.0] * 3, [1.0, 1.0] + [1.5, 1.0] * 3
    assert tried(2, mine).medians([mine, other]) == [1.5, 2.0]


@pytest.mark.parametrize(
    ("seconds", "number"),
    [
        ([1.0, 0.9, 0.8], 2),
        ([1.0, 0.9, 0.95], 1),
        ([1.0, 1.1, 1.2], 0),
        ([1.0, 1.0 - 0.9 * NEAR, 1.0 - 0.5 * NEAR], 0),
        ([1.0, 0.8, 0.79], 1),
    ],
)
def test_of_near_equals_the_first_is_taken(seconds: list[float], number: int) -> None:
    assert first_near_best(seconds) == number
