"""Gates, selection, balance and placement against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.base.errors import ConfigError, PlanError
from moetrain.model.dispatch import combine_pairs, spread, sum_per_token
from moetrain.routing.balance import merged, updated_bias
from moetrain.routing.config import RoutingConfig
from moetrain.routing.placement import Placement
from moetrain.routing.scores import gate_scores
from moetrain.routing.select import TopK, within_capacity
from moetrain.routing.types import Routing, RoutingContext, count_pairs


def route(logits: torch.Tensor, config: RoutingConfig, context: RoutingContext | None = None, bias: torch.Tensor | None = None) -> Routing:
    return TopK(config).plan(gate_scores(logits, config, bias), context or RoutingContext((1, logits.shape[0])))


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_softmax_before_selection_weights_by_the_probability_over_all_experts(logits: torch.Tensor) -> None:
    routing = route(logits, RoutingConfig(num_experts=6, top_k=2))
    expected = torch.softmax(logits, 1)[routing.token_P, routing.expert_P]
    torch.testing.assert_close(routing.weight_P, expected)


def test_softmax_after_selection_equals_renormalised_softmax_before(logits: torch.Tensor) -> None:
    after = route(logits, RoutingConfig(num_experts=6, top_k=3, softmax_order="after"))
    before = route(logits, RoutingConfig(num_experts=6, top_k=3, renormalize=True))
    assert torch.equal(after.expert_P, before.expert_P)
    torch.testing.assert_close(after.weight_P, before.weight_P)
    torch.testing.assert_close(after.weight_P.view(12, 3).sum(1), torch.ones(12, dtype=torch.float64))


def test_sigmoid_gate_is_renormalised_and_scaled(logits: torch.Tensor) -> None:
    routing = route(logits, RoutingConfig(num_experts=6, top_k=2, score="sigmoid", renormalize=True, weight_scale=2.5))
    torch.testing.assert_close(routing.weight_P.view(12, 2).sum(1), torch.full((12,), 2.5, dtype=torch.float64))


def test_the_bias_chooses_but_does_not_weigh(logits: torch.Tensor) -> None:
    config = RoutingConfig(num_experts=6, top_k=1, score="sigmoid")
    bias = torch.zeros(6, dtype=torch.float64)
    bias[4] = 10.0
    routing = route(logits, config, bias=bias)
    assert routing.expert_P.tolist() == [4] * 12
    torch.testing.assert_close(routing.weight_P, torch.sigmoid(logits[:, 4]))


def test_chosen_experts_are_the_highest_and_distinct(logits: torch.Tensor) -> None:
    routing = route(logits, RoutingConfig(num_experts=6, top_k=3))
    for token in range(12):
        chosen = set(routing.expert_P[routing.token_P == token].tolist())
        assert chosen == set(torch.argsort(logits[token], descending=True)[:3].tolist())
    assert routing.count_EL.sum() == 36


def naive_balance(logits: torch.Tensor, experts: torch.Tensor, valid: torch.Tensor) -> float:
    """arXiv 2101.03961 eq. 4 over one scope, times its number of valid tokens."""
    probability = torch.softmax(logits, 1)
    total = 0.0
    tokens = [n for n in range(len(logits)) if valid[n]]
    if not tokens:
        return 0.0
    for expert in range(logits.shape[1]):
        share = sum(int(expert in experts[n].tolist()) for n in tokens) / (len(tokens) * experts.shape[1])
        mean = sum(float(probability[n, expert]) for n in tokens) / len(tokens)
        total += share * mean
    return logits.shape[1] * total * len(tokens)


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
def test_auxiliary_loss_equals_its_formula_over_its_scope(logits: torch.Tensor, scope: str) -> None:
    config = RoutingConfig(num_experts=6, top_k=2, auxiliary_loss_scope=scope)
    valid = torch.tensor([True] * 5 + [False] + [False] * 6)
    routing = route(logits, config, RoutingContext((2, 6), valid))
    experts = torch.topk(logits, 2, dim=1).indices
    scopes = [slice(0, 6), slice(6, 12)] if scope == "sequence" else [slice(0, 12)]
    expected = sum(naive_balance(logits[s], experts[s], valid[s]) for s in scopes)
    assert math.isclose(float(routing.stats.auxiliary), expected, rel_tol=1e-12)
    assert int(routing.stats.load_E.sum()) == 10


def test_global_balance_of_two_halves_equals_the_whole(logits: torch.Tensor) -> None:
    config = RoutingConfig(num_experts=6, top_k=2, auxiliary_loss_scope="global_batch")
    whole = route(logits, config)
    loads = whole.stats.load_E
    halves = [route(part, config, RoutingContext((1, 6), exchange=lambda _: loads)) for part in logits.split(6)]
    torch.testing.assert_close(sum(h.stats.auxiliary for h in halves), whole.stats.auxiliary)


def test_z_loss_sums_squared_logsumexp_over_valid_tokens(logits: torch.Tensor) -> None:
    valid = torch.arange(12) < 7
    routing = route(logits, RoutingConfig(num_experts=6, z_loss_weight=1.0), RoutingContext((1, 12), valid))
    torch.testing.assert_close(routing.stats.z, torch.logsumexp(logits[:7], 1).square().sum())


def test_auxiliary_loss_is_one_per_token_when_balanced_and_pushes_towards_balance() -> None:
    config = RoutingConfig(num_experts=4, top_k=1)
    logits = (torch.eye(4, dtype=torch.float64) * 1e-9).repeat(2, 1).requires_grad_()
    routing = route(logits, config)
    torch.testing.assert_close(routing.stats.auxiliary, torch.tensor(8.0, dtype=torch.float64))
    skewed = torch.tensor([[1.0, 0, 0, 0]] * 8, dtype=torch.float64, requires_grad=True)
    route(skewed, config).stats.auxiliary.backward()
    assert skewed.grad is not None and bool((skewed.grad[:, 0] > 0).all()) and bool((skewed.grad[:, 1:] < 0).all())


def test_bias_moves_against_the_load_and_stays_when_balanced() -> None:
    bias = updated_bias(torch.zeros(4), torch.tensor([10, 2, 6, 6]), 0.1)
    torch.testing.assert_close(bias, torch.tensor([-0.1, 0.1, 0.0, 0.0]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=40), st.integers(1, 8))
def test_capacity_keeps_the_most_urgent_pairs_of_every_expert(pairs: list[tuple[int, int]], capacity: int) -> None:
    experts = torch.tensor([expert for expert, _ in pairs])
    urgency = torch.tensor([float(u) for _, u in pairs])
    kept = within_capacity(experts, urgency, capacity, 4)
    for expert in range(4):
        mine = [i for i, (e, _) in enumerate(pairs) if e == expert]
        best = sorted(mine, key=lambda i: (-pairs[i][1], i))[:capacity]
        assert [i for i in mine if kept[i]] == sorted(best)


@pytest.mark.parametrize("order", ["probability", "position"])
def test_capacity_drops_pairs_and_counts_them(order: str) -> None:
    logits = torch.tensor([[0.1, 0.0], [0.3, 0.0], [0.2, 0.0], [0.0, 1.0]], dtype=torch.float64)
    routing = route(logits, RoutingConfig(num_experts=2, top_k=1, capacity_factor=1.0, drop_order=order))
    assert routing.token_P.tolist() == ([1, 2, 3] if order == "probability" else [0, 1, 3])
    assert int(routing.stats.num_dropped) == 1
    assert routing.stats.load_E.tolist() == [3, 1]
    assert routing.count_EL[:, 0].tolist() == [2, 1]


@given(st.integers(1, 40), st.integers(1, 8), st.none() | st.integers(0, 3))
def test_placement_holds_every_expert_once_and_evenly(num_experts: int, num_ranks: int, seed: int | None) -> None:
    if num_ranks > num_experts:
        with pytest.raises(PlanError):
            Placement.balanced(num_experts, num_ranks, seed)
        return
    placement = Placement.balanced(num_experts, num_ranks, seed)
    assert sorted(placement.order) == list(range(num_experts))
    assert max(placement.sizes) - min(placement.sizes) <= 1
    assert all(expert in placement.experts[placement.rank_of[expert]] for expert in range(num_experts))


def test_a_placement_with_a_missing_expert_is_refused() -> None:
    with pytest.raises(PlanError):
        Placement(((0, 1), (3,)))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"top_k": 9}, "top_k"),
        ({"score": "sofmax"}, "Did you mean softmax"),
        ({"renormalize": True, "top_k": 1}, "renormalize"),
        ({"softmax_order": "after", "top_k": 1}, "softmax_order"),
        ({"capacity_factor": 0.0}, "capacity_factor"),
        ({"capacity_factor": float("inf")}, "capacity_factor"),
        ({"capacity_factor": float("nan")}, "capacity_factor"),
        ({"bias_update_rate": float("nan")}, "bias_update_rate"),
        ({"weight_scale": 0.0}, "weight_scale"),
        ({"z_loss_weight": -1.0}, "z_loss_weight"),
    ],
)
def test_impossible_routing_is_refused_with_its_key(change: dict, word: str) -> None:
    config = RoutingConfig()
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=word):
        config.check()


def test_without_capacity_nothing_is_dropped_and_position_means_place_in_the_sequence() -> None:
    logits = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
    config = RoutingConfig(num_experts=2, top_k=1, capacity_factor=1.0, drop_order="position")
    assert route(logits, config, RoutingContext((2, 2))).token_P.tolist() == [0, 2]
    assert route(logits, config, RoutingContext((2, 2), dropless=True)).token_P.tolist() == [0, 1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=9), st.lists(st.integers(0, 9), max_size=3), st.booleans())
def test_the_parts_of_a_split_routing_are_the_whole(chosen: list[list[int]], cuts: list[int], has_levels: bool) -> None:
    """Any number of pairs per token, tokens without one, empty parts."""
    pairs = [(token, expert) for token, experts in enumerate(chosen) for expert in experts]
    token, expert = (torch.tensor([pair[i] for pair in pairs], dtype=torch.int64) for i in (0, 1))
    level = expert % 2 if has_levels else None
    stats = route(torch.zeros(1, 4), RoutingConfig(num_experts=4)).stats
    count = count_pairs(expert, 4, level, 2 if has_levels else 1)
    whole = Routing(token, expert, level, torch.arange(len(pairs)).double(), count, stats)
    ends = [*sorted(min(cut, len(chosen)) for cut in cuts), len(chosen)]
    starts = [0, *ends[:-1]]
    parts = whole.split([end - start for start, end in zip(starts, ends, strict=True)])
    assert torch.equal(torch.cat([part.token_P + start for part, start in zip(parts, starts, strict=True)]), token)
    assert torch.equal(torch.cat([part.expert_P for part in parts]), expert)
    assert torch.equal(torch.cat([part.weight_P for part in parts]), whole.weight_P)
    assert torch.equal(torch.stack([part.count_EL for part in parts]).sum(0), count)
    for part, start, end in zip(parts, starts, ends, strict=True):
        assert all(0 <= token < end - start for token in part.token_P.tolist())
        for expert in range(4):
            assert int(part.count_EL[expert].sum()) == int((part.expert_P == expert).sum())


@pytest.mark.parametrize("in_one_pass", [True, False])
@pytest.mark.parametrize("capacity", [None, 0.5, 8.0])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_rows_are_spread_and_combined_as_indexing_does(
    monkeypatch: pytest.MonkeyPatch, logits: torch.Tensor, top_k: int, capacity: float | None, in_one_pass: bool
) -> None:
    """Values and gradients, float64; on CPUs and elsewhere."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: not in_one_pass)
    routing = route(logits.double().requires_grad_(), RoutingConfig(num_experts=6, top_k=top_k, capacity_factor=capacity))
    assert (routing.pairs_per_token is None) == (capacity == 0.5), "dropped where an expert takes half of its share"
    order_P = torch.argsort(routing.expert_P, stable=True)
    x = torch.randn(len(logits), 5, dtype=torch.float64, requires_grad=True)
    scale_P = torch.rand(len(order_P), 1, dtype=torch.float64)  # what an expert does to its row
    rows = spread(x, routing, order_P)
    assert torch.equal(rows, x[routing.token_P[order_P]])
    found = combine_pairs(rows * scale_P, routing, order_P, len(logits))
    by_pair = (x[routing.token_P[order_P]] * scale_P)[torch.argsort(order_P)] * routing.weight_P.unsqueeze(1)
    expected = torch.zeros_like(x).index_add(0, routing.token_P, by_pair)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-15)
    grads, theirs = (torch.autograd.grad(y.square().sum(), (x, routing.weight_P), retain_graph=True) for y in (found, expected))
    for mine, their in zip(grads, theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-13, atol=1e-14)


def test_no_tokens_sum_to_nothing() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    for per_token in (1, 3, None):
        assert sum_per_token(torch.zeros(0, 5), none, none, per_token, 0).shape == (0, 5)
        assert sum_per_token(torch.zeros(0, 5), none, none, per_token, 0, torch.zeros(0)).shape == (0, 5)


def test_a_second_choice_leaves_out_the_first_and_keeps_its_own_weights(logits: torch.Tensor) -> None:
    config = RoutingConfig(num_experts=6, top_k=2)
    first = route(logits, config)
    second = route(logits, config, RoutingContext((1, 12), taken=first))
    best = torch.argsort(logits, 1, descending=True)[:, :4]
    assert torch.equal(first.expert_P.view(12, 2), best[:, :2]) and torch.equal(second.expert_P.view(12, 2), best[:, 2:])
    torch.testing.assert_close(second.weight_P.view(12, 2), torch.softmax(logits, 1).gather(1, best[:, 2:]))


def test_two_gatings_of_a_bank_are_one_in_its_stats(logits: torch.Tensor) -> None:
    one, other = (route(x, RoutingConfig(num_experts=6, z_loss_weight=1.0, capacity_factor=0.5)).stats for x in (logits, -logits))
    both = merged([one, other])
    torch.testing.assert_close(both.auxiliary, (one.auxiliary + other.auxiliary) / 2)
    torch.testing.assert_close(both.z, (one.z + other.z) / 2)
    assert torch.equal(both.load_E, one.load_E + other.load_E)
    assert int(both.num_dropped) == int(one.num_dropped) + int(other.num_dropped) > 0
