"""Planning of overlap: the simulation equals two recurrences written down by hand, and the choice is the best of all schedules."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.model.schedule import Schedule
from moetrain.parallel.overlap import SLACK, Drift, OperatorTimes, PassTimes, TripTimes, candidates, choose, simulate
from tests.unit.overlap_kit import shaped


def pass_seconds(main: Sequence[float], slots: Sequence[int], there: float, experts: float, back: float) -> float:
    """One trip; all chunks leave at once; chunk c's experts run just before computation number slots[c]. Seconds of one chunk each."""
    computed, moved, chunk = 0.0, there * len(slots), 0
    for number, seconds in enumerate((*main, 0.0), start=1):
        while chunk < len(slots) and slots[chunk] == number:
            computed = max(computed, there * (chunk + 1)) + experts
            moved = max(moved, computed) + back
            chunk += 1
        computed += seconds
    return max(computed, moved)


def by_hand(times: OperatorTimes, slots: Sequence[int]) -> float:
    """Forward, and the backward as a forward pass from the other end: the way back comes first, slots count from the last."""
    forward, backward = times.forward, times.backward
    there, experts, back = forward.trips[0].chunk(len(slots))
    seconds = pass_seconds(forward.main, slots, there, experts, back)
    there, experts, back = backward.trips[0].chunk(len(slots))
    mirrored = [times.num_operators + 2 - slot for slot in reversed(slots)]
    return seconds + pass_seconds(backward.main[::-1], mirrored, back, experts, there)


def every_slots(num_operators: int, max_chunks: int) -> list[tuple[int, ...]]:
    return [its.slots for m in range(1, max_chunks + 1) for its in Schedule.every(num_operators, m)]


SECONDS = st.floats(0.0, 1.0)


@st.composite
def operator_times(draw: st.DrawFn, num_trips: int = 1) -> OperatorTimes:
    num_operators = draw(st.integers(0, 4))

    def one_pass() -> PassTimes:
        main = tuple(draw(st.lists(SECONDS, min_size=num_operators, max_size=num_operators)))
        trips = [TripTimes(draw(SECONDS), draw(SECONDS), draw(SECONDS)) for _ in range(num_trips)]
        return PassTimes(main, tuple(trips))

    return OperatorTimes(one_pass(), one_pass())


def one_trip(main: Sequence[float], experts: float, to: float, back: float) -> PassTimes:
    return PassTimes(tuple(main), (TripTimes(experts, to, back),))


@settings(deadline=None, max_examples=200)
@given(times=operator_times(), data=st.data())
def test_simulation_equals_the_recurrences_by_hand(times: OperatorTimes, data: st.DataObject) -> None:
    slot = st.integers(1, times.num_operators + 1)
    slots = tuple(sorted(data.draw(st.lists(slot, min_size=1, max_size=4))))
    assert simulate(times, Schedule(slots)) == pytest.approx(by_hand(times, slots), abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(times=st.integers(1, 2).flatmap(operator_times))
def test_one_chunk_is_never_slower_than_serial_nor_faster_than_either_queue(times: OperatorTimes) -> None:
    compute, exchange = times.compute_seconds, times.exchange_seconds
    for schedule in Schedule.every(times.num_operators, 1):
        assert max(compute, exchange) - 1e-9 <= simulate(times, schedule) <= compute + exchange + 1e-9


def test_experts_of_the_first_trip_hide_the_second_one_that_leaves_before_them() -> None:
    """Where tokens choose twice, the last slot puts the first trip's experts beside the second trip's way."""
    trips = TripTimes(3.0, 0.0, 0.0), TripTimes(1.0, 3.0, 0.0)
    times = OperatorTimes(PassTimes((1.0,), trips), PassTimes((0.0,), (TripTimes(0.0, 0.0, 0.0),) * 2))
    assert simulate(times, Schedule((1,))) == 3 + 1 + 3 + 1
    assert simulate(times, Schedule((2,))) == 1 + 3 + 1
    assert choose(times, 1) == Schedule((2,))


@pytest.mark.parametrize("megabit", [25, 50, 100, 200, 1000])
@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 1024, "hidden": 256, "ffn": 1024, "top_k": 1, "num_operators": 2},
        {"tokens": 1024, "hidden": 256, "ffn": 1024, "top_k": 1, "num_operators": 3},
        {"tokens": 1024, "hidden": 256, "ffn": 1024, "top_k": 1, "num_operators": 4},
        {"tokens": 2048, "hidden": 512, "ffn": 512, "top_k": 2, "num_operators": 3},
        {"tokens": 1024, "hidden": 256, "ffn": 4096, "top_k": 2, "num_operators": 1},
        {"tokens": 512, "hidden": 1024, "ffn": 1408, "top_k": 4, "num_operators": 3, "skew": 1.7},
        {"tokens": 1024, "hidden": 256, "ffn": 1024, "top_k": 2, "num_operators": 0},
    ],
)
def test_choice_is_as_fast_as_the_best_of_all_schedules(shape: dict[str, float], megabit: float) -> None:
    times = shaped(**shape, megabit=megabit)  # type: ignore[arg-type]
    for num_chunks in range(1, 5):
        every = [slots for slots in every_slots(times.num_operators, 4) if len(slots) == num_chunks]
        chosen = choose(times, num_chunks).slots
        assert chosen in every
        assert by_hand(times, chosen) <= min(by_hand(times, slots) for slots in every) * (1 + SLACK) + 1e-12


def test_slot_moves_with_the_computations_that_hide_the_way_there() -> None:
    """At equal ways and three computations, the experts stand where both ways fit."""
    early, late = (3.0, 1.0, 1.0), (1.0, 1.0, 3.0)
    assert choose(OperatorTimes(one_trip(early, 1, 2, 2), one_trip(early, 1, 2, 2)), 1) == Schedule((2,))
    assert choose(OperatorTimes(one_trip(late, 1, 2, 2), one_trip(late, 1, 2, 2)), 1) == Schedule((3,))


@pytest.mark.parametrize(
    ("main", "to", "back", "slot"),
    [((5.0, 1.0), 5.0, 1.0, 2), ((1.0, 5.0), 1.0, 5.0, 2), ((5.0, 5.0), 10.0, 0.0, 3), ((5.0, 5.0), 0.0, 10.0, 1)],
)
def test_backward_decides_where_the_forward_pass_does_not_care(main: tuple[float, float], to: float, back: float, slot: int) -> None:
    """Exchanges that cost nothing in the forward pass leave the choice to the backward pass."""
    assert choose(OperatorTimes(one_trip((1.0, 1.0), 1, 0, 0), one_trip(main, 1, to, back)), 1) == Schedule((slot,))


def test_equally_fast_slots_are_told_apart_by_a_slower_link() -> None:
    times = one_trip((1.0, 5.0, 1.0), 1, 1, 0.5)  # slots 2 and 3 hide both ways; only 3 would also hide a way there six times as long
    assert simulate(OperatorTimes(times, times), Schedule((2,))) == simulate(OperatorTimes(times, times), Schedule((3,)))
    assert choose(OperatorTimes(times, times), 1) == Schedule((3,))


def test_chunks_are_candidates_only_where_they_may_pay() -> None:
    short = shaped(1024, 256, 1024, 1, 3, megabit=1000)
    long = shaped(1024, 256, 1024, 2, 0, megabit=100)
    assert candidates(short, [1, 2, 4]) == [choose(short, 1)] * 3
    assert candidates(long, [1, 2, 4]) == [choose(long, number) for number in (1, 2, 4)]
    assert simulate(long, choose(long, 4)) < 0.9 * simulate(long, choose(long, 1))


def test_more_chunks_that_promise_nothing_leave_the_candidate_in_fewer() -> None:
    """Experts so long beside their exchanges that half of these is all that can still be hidden, and a quarter more is under SLACK."""
    trip = TripTimes(1.0, 0.015, 0.015)
    times = OperatorTimes(PassTimes((), (trip,)), PassTimes((), (trip,)))
    assert [schedule.num_chunks for schedule in candidates(times, [1, 2, 4])] == [1, 2, 2]


def test_fixed_slot_and_chunks_are_kept() -> None:
    times = shaped(1024, 256, 1024, 1, 3, megabit=50)
    assert choose(times, 2, slot=4) == Schedule((4, 4))
    assert choose(times, 1, slot=9) == Schedule((4,))  # the last one there is


@pytest.mark.parametrize(("before", "after"), [(0.02, 0.4), (0.4, 0.1), (0.8, 0.89), (0.89, 0.8)])  # the last two: a link twice as slow
def test_drift_is_noticed_soon_and_no_more_once_it_is_normal(before: float, after: float) -> None:
    drift = Drift(0.1)
    assert not any(drift.notices(before + 0.005 * (step % 3)) for step in range(50))
    assert [drift.notices(after) for _ in range(10)].index(True) < 3
    drift.restart()
    assert not any(drift.notices(after) for _ in range(20))


def test_a_change_soon_after_the_plan_is_noticed() -> None:
    drift = Drift(0.1)
    assert not any([drift.notices(share) for share in (0.1, 0.1, 0.3, 0.3, 0.3)])
    assert drift.notices(0.3)


def test_one_slow_step_is_no_drift() -> None:
    drift = Drift(0.1)
    assert not any(drift.notices(0.9 if step % 10 == 7 else 0.05) for step in range(60))
