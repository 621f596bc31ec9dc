"""Blending: shares follow the weights at every length, and the sequence has no memory of where it was entered."""

from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.blend import Blend

WEIGHTS = st.lists(st.one_of(st.integers(1, 1000), st.floats(0.001, 1000).map(lambda value: round(value, 3))), min_size=1, max_size=5)


@given(weights=WEIGHTS, count=st.integers(1, 300))
@settings(deadline=None)
def test_every_prefix_is_within_a_sample_per_corpus_of_the_weights(weights: list[float], count: int) -> None:
    assigned = Blend(weights).assign(0, count)
    for corpus, weight in enumerate(weights):
        share = weight / sum(weights) * count
        assert abs(sum(1 for chosen, _ in assigned if chosen == corpus) - share) <= len(weights)


@given(weights=WEIGHTS, first=st.integers(0, 200), count=st.integers(1, 100))
@settings(deadline=None)
def test_entering_anywhere_continues_the_same_sequence(weights: list[float], first: int, count: int) -> None:
    blend = Blend(weights)
    assert blend.assign(0, first + count)[first:] == blend.assign(first, count)


@given(weights=WEIGHTS, count=st.integers(1, 200))
@settings(deadline=None)
def test_each_corpus_is_read_in_order_without_gaps(weights: list[float], count: int) -> None:
    assigned = Blend(weights).assign(0, count)
    for corpus in range(len(weights)):
        numbers = [number for chosen, number in assigned if chosen == corpus]
        assert numbers == list(range(len(numbers)))


def test_a_far_place_is_reached_directly() -> None:
    far = 10**12
    assigned = Blend([0.7, 0.2, 0.1]).assign(far, 10)
    assert sorted(corpus for corpus, _ in assigned) == [0] * 7 + [1] * 2 + [2]
    assert assigned[0][1] in (far * 7 // 10, far * 2 // 10, far // 10)


def test_one_corpus_is_simply_counted() -> None:
    assert Blend([3.5]).assign(40, 3) == [(0, 40), (0, 41), (0, 42)]
