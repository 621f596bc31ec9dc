"""Times of operators are read back from lanes as they were, whatever the schedule, the trips and the number of micro-batches."""

from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from moetrain.model.schedule import Schedule
from moetrain.parallel.block_times import Site, agreed, flat, typical, unflat, visits
from moetrain.parallel.overlap import OperatorTimes, PassTimes, TripTimes
from tests.unit.overlap_kit import serial_lanes, shaped

SECONDS = st.floats(0.0, 1.0)
NAMES = ("mlp", "attention", "shared")


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Site], list[Schedule], list[OperatorTimes], int]:
    """A model of one to three blocks of different kinds, and the times of all their visits."""
    sites, schedules = [], []
    for index in range(draw(st.integers(1, 3))):
        num_operators = draw(st.integers(0, 3))
        slots = draw(st.lists(st.integers(1, num_operators + 1), min_size=1, max_size=3))
        schedules.append(Schedule(tuple(sorted(slots))))
        sites.append(Site(f"blocks.{index}.moe.experts", NAMES[:num_operators], len(slots), draw(st.integers(1, 2))))
    num_batches = draw(st.integers(1, 3))

    def one_pass(site: Site) -> PassTimes:
        main = tuple(draw(SECONDS) for _ in site.operators)
        return PassTimes(main, tuple(TripTimes(draw(SECONDS), draw(SECONDS), draw(SECONDS)) for _ in range(site.num_trips)))

    times = [OperatorTimes(one_pass(site), one_pass(site)) for _ in range(num_batches) for site in sites]
    return sites, schedules, times, num_batches


@settings(deadline=None, max_examples=100)
@given(problem=problems())
def test_times_are_read_back_from_lanes(problem: tuple[list[Site], list[Schedule], list[OperatorTimes], int]) -> None:
    sites, schedules, times, num_batches = problem
    found = visits(serial_lanes(sites, schedules, times, num_batches), sites)
    assert [site for site, _ in found] == sites * num_batches
    for (_, its), expected in zip(found, times, strict=True):
        assert flat(its) == approx(flat(expected), abs=1e-9)


def test_the_slowest_rank_counts_in_every_number() -> None:
    site, fast, slow = Site("blocks.0.moe.experts", NAMES, 1, 1), shaped(64, 8, 8, 1, 3, 100), shaped(64, 8, 8, 1, 3, 50, flops=200e9)
    ((_, its),) = agreed([(site, fast)], lambda mine: [mine, [flat(slow)]])
    assert flat(its) == [max(pair) for pair in zip(flat(fast), flat(slow), strict=True)]
    assert its.forward.trips[0].to_experts == slow.forward.trips[0].to_experts
    assert its.forward.main == fast.forward.main


def test_one_disturbed_visit_does_not_count() -> None:
    good, bad = shaped(64, 8, 8, 1, 3, 100), shaped(64, 8, 8, 1, 3, 1, flops=1e9)
    assert flat(typical([good, bad, good])) == flat(good)


def test_flat_numbers_become_the_same_times() -> None:
    one = TripTimes(1.0, 2.0, 3.0)
    times = OperatorTimes(PassTimes((4.0, 5.0), (one, one)), PassTimes((6.0, 7.0), (one, one)))
    assert unflat(flat(times), times) == times
