"""The law tokens are drawn from, checked exactly: kept sets, limits, invariances. No statistics."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moetrain.base.errors import ConfigError
from moetrain.inference.config import SamplingParams
from moetrain.inference.sample import choose, draw, greedy, law

PLAIN = SamplingParams(temperature=1.0, top_p=1.0)
LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12).map(lambda x: torch.tensor(x, dtype=torch.float64))
PARAMS = st.builds(SamplingParams, temperature=st.floats(0.1, 4), top_k=st.integers(0, 14), top_p=st.floats(0.05, 1.0))


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def support(logits_V: Tensor, params: SamplingParams) -> set[int]:
    return set(law(logits_V, params).nonzero().flatten().tolist())


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = logits_of(0.125, 0.5, 0.25, 0.125)
    assert [sorted(support(logits, replace(PLAIN, top_p=p))) for p in (0.1, 0.45, 0.55, 0.7, 0.8, 0.9, 1.0)] == [
        [1], [1], [1, 2], [1, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]
    ]  # fmt: skip
    torch.testing.assert_close(law(logits, replace(PLAIN, top_p=0.7)), torch.tensor([0, 2 / 3, 1 / 3, 0], dtype=torch.float64))


def test_top_k_keeps_exactly_k_and_ties_go_to_the_lowest_id() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0])
    assert support(logits, replace(PLAIN, top_k=2)) == {1, 2}
    assert greedy(logits) == 1


def test_top_p_counts_over_what_top_k_left() -> None:
    # 0.4 and 0.3 are left; renormalised 4/7 > 0.55, so one token is enough. Without top-k, 0.4 would not be.
    logits = logits_of(0.4, 0.3, 0.2, 0.1)
    assert support(logits, replace(PLAIN, top_k=2, top_p=0.55)) == {0}
    assert support(logits, replace(PLAIN, top_p=0.55)) == {0, 1}


@given(LOGITS, PARAMS)
def test_law_is_a_probability_with_the_likeliest_token(logits: Tensor, params: SamplingParams) -> None:
    probability = law(logits, params)
    assert bool((probability >= 0).all())
    assert float(probability.sum()) == pytest.approx(1, abs=1e-12)
    assert greedy(logits) in support(logits, params)
    if params.top_k:
        assert len(support(logits, params)) <= params.top_k


@given(LOGITS, PARAMS)
def test_kept_tokens_are_the_likeliest_and_keep_their_ratios(logits: Tensor, params: SamplingParams) -> None:
    full, kept = law(logits, replace(params, top_k=0, top_p=1.0)), law(logits, params)
    inside = kept > 0
    if bool(inside.any()) and not bool(inside.all()):
        assert float(full[inside].min()) >= float(full[~inside].max())
    torch.testing.assert_close(kept[inside] * full[inside].sum(), full[inside])


@given(LOGITS, st.floats(0.05, 0.99), st.floats(0.05, 0.99))
def test_a_larger_top_p_never_keeps_less(logits: Tensor, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert support(logits, replace(PLAIN, top_p=low)) <= support(logits, replace(PLAIN, top_p=high))


@given(LOGITS, st.floats(0.1, 0.99))
def test_top_p_set_reaches_p_and_no_smaller_one_does(logits: Tensor, top_p: float) -> None:
    full, kept = law(logits, PLAIN), support(logits, replace(PLAIN, top_p=top_p))
    mass = sorted(float(full[token]) for token in kept)
    assert sum(mass) >= top_p - 1e-12
    assert sum(mass) - mass[0] < top_p + 1e-12


@given(LOGITS, PARAMS, st.floats(-50, 50))
def test_shifting_all_logits_changes_nothing(logits: Tensor, params: SamplingParams, shift: float) -> None:
    params = replace(params, top_k=0, top_p=1.0)  # a kept set may change where rounding breaks a tie
    torch.testing.assert_close(law(logits + shift, params), law(logits, params), rtol=1e-9, atol=1e-12)


@given(LOGITS, st.floats(0.1, 4))
def test_temperature_divides_the_logits(logits: Tensor, temperature: float) -> None:
    torch.testing.assert_close(law(logits, replace(PLAIN, temperature=temperature)), law(logits / temperature, PLAIN))


@given(st.permutations(list(range(6))), PARAMS)
def test_renaming_tokens_renames_the_law(order: list[int], params: SamplingParams) -> None:
    logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.7, 3.2], dtype=torch.float64)
    torch.testing.assert_close(law(logits[order], params), law(logits, params)[order])


@given(LOGITS, st.floats(0, 1, exclude_max=True))
def test_a_temperature_near_zero_is_greedy(logits: Tensor, uniform: float) -> None:
    ordered = logits.sort().values
    if float(ordered[-1] - ordered[-2]) > 1e-3:
        assert draw(law(logits, replace(PLAIN, temperature=1e-6)), uniform) == greedy(logits)


@given(LOGITS, PARAMS, st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_cumulative_law(logits: Tensor, params: SamplingParams, uniform: float) -> None:
    probability = law(logits, params)
    token = draw(probability, uniform)
    assert float(probability[token]) > 0
    assert float(probability[:token].sum()) <= uniform + 1e-12
    assert float(probability[: token + 1].sum()) >= uniform - 1e-12


def test_draw_at_both_ends_never_takes_an_impossible_token() -> None:
    probability = torch.tensor([0, 0.25, 0.75, 0], dtype=torch.float64)
    assert [draw(probability, u) for u in (0.0, 0.2499, 0.25, 1 - 2**-53)] == [1, 1, 2, 2]


def test_same_seed_same_tokens_and_one_number_per_token() -> None:
    logits = torch.zeros(50)

    def run(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [choose(logits, PLAIN, generator) for _ in range(20)]

    assert run(7) == run(7)
    assert run(7) != run(8)
    generator = torch.Generator().manual_seed(7)
    uniforms = torch.rand(20, dtype=torch.float64, generator=generator).tolist()
    assert run(7) == [int(u * 50) for u in uniforms]


@pytest.mark.parametrize(
    ("params", "key"),
    [
        (SamplingParams(max_tokens=0), "max_tokens"),
        (SamplingParams(temperature=-0.1), "temperature"),
        (SamplingParams(temperature=float("nan")), "temperature"),
        (SamplingParams(temperature=float("inf")), "temperature"),
        (SamplingParams(top_k=-1), "top_k"),
        (SamplingParams(top_p=0.0), "top_p"),
        (SamplingParams(top_p=1.5), "top_p"),
        (SamplingParams(seed=-1), "seed"),
    ],
)
def test_impossible_parameters_are_named(params: SamplingParams, key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}="):
        params.check()
