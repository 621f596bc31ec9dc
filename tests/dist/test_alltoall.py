"""The expert-parallel dispatcher equals the local one: same outputs, same gradients, whatever the placement.

Experts here are e_k(row) = tanh(row @ W_k), so that a row at the wrong expert shows. All ranks know all weights and slice their own.
"""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.dist.mesh import Axis, Mesh
from moetrain.dist.world import World
from moetrain.model.dispatch import LocalDispatcher
from moetrain.parallel.alltoall import AllToAllDispatcher
from moetrain.routing.placement import Placement
from moetrain.routing.types import Routing, RoutingStats, count_pairs
from tests.kit import run_ranks

D = 6
F64 = torch.float64


def make_routing(expert_NK: Tensor, weight_NK: Tensor, kept_NK: Tensor, num_experts: int) -> Routing:
    """Pairs of every token that are kept; weights stay differentiable."""
    token_P, choice_P = kept_NK.nonzero(as_tuple=True)
    expert_P = expert_NK[token_P, choice_P]
    nothing = torch.zeros(())
    stats = RoutingStats(nothing, nothing, torch.zeros(num_experts, dtype=torch.int64), torch.zeros((), dtype=torch.int64))
    return Routing(token_P, expert_P, None, weight_NK[token_P, choice_P], count_pairs(expert_P, num_experts), stats)


def run_layer(dispatcher: Any, mine: tuple[int, ...], weights_EDD: Tensor, x_ND: Tensor, routings: list[Routing]) -> list[Tensor]:
    """One layer per routing over the same tokens, all sent before the first is received."""
    tickets = [dispatcher.send(x_ND, routing, counts) for routing, counts in zip(routings, dispatcher.announce(routings), strict=True)]
    main = torch.cos(x_ND)
    outputs = []
    for ticket in tickets:
        rows_RD, count_e = dispatcher.receive(ticket)
        assert count_e.device.type == "cpu" and count_e.dtype == torch.int64 and len(count_e) == len(mine)
        parts = rows_RD.split(count_e.tolist())
        rows_RD = torch.cat([torch.tanh(part @ weights_EDD[expert]) for expert, part in zip(mine, parts, strict=True)])
        outputs.append(dispatcher.combine(dispatcher.send_back(rows_RD, ticket)) + main)
    return outputs


Problem = tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]


def make_problem(seed: int, num_tokens: int, num_experts: int, top_k: int, choose: Callable[[Tensor], Tensor], drop: float) -> Problem:
    """x, expert weights, and for two layers experts [N, K], combine weights, kept pairs."""
    g = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(num_tokens, D, dtype=F64, generator=g).requires_grad_()
    weights_EDD = torch.randn(num_experts, D, D, dtype=F64, generator=torch.Generator().manual_seed(99)).requires_grad_()
    experts = [choose(torch.rand(num_tokens, num_experts, generator=g).argsort(1)[:, :top_k]) for _ in range(2)]
    weights = [torch.rand(num_tokens, top_k, dtype=F64, generator=g).requires_grad_() for _ in range(2)]
    kept = [torch.rand(num_tokens, top_k, generator=g) >= drop for _ in range(2)]
    return x_ND, weights_EDD, experts, weights, kept


def outputs_and_gradients(dispatcher: Any, mine: tuple[int, ...], problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of two layers, gradients of x and the combine weights, and last the gradient of this rank's experts' weights."""
    x_ND, weights_EDD, experts, weights, kept = problem
    leaves = [x_ND, weights_EDD, *weights]
    routings = [make_routing(e, w, k, weights_EDD.shape[0]) for e, w, k in zip(experts, weights, kept, strict=True)]
    outputs = run_layer(dispatcher, mine, weights_EDD, x_ND, routings)
    loss = torch.stack([(y * torch.linspace(1, 2, D, dtype=F64, device=y.device)).square().sum() for y in outputs]).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return outputs, [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)]


def as_chosen(expert_NK: Tensor) -> Tensor:
    return expert_NK


def all_to(expert: int, expert_NK: Tensor) -> Tensor:
    return torch.full_like(expert_NK[:, :1], expert)


def never(expert: int, expert_NK: Tensor) -> Tensor:
    return torch.where(expert_NK == expert, (expert + 1) % 3, expert_NK)


CASES: dict[str, tuple[int, int, int, Callable[[Tensor], Tensor], float]] = {
    # experts, tokens of every rank, top_k, choice, share of dropped pairs
    "uneven": (8, 11, 2, as_chosen, 0.0),
    "top_4_with_drops": (8, 7, 4, as_chosen, 0.3),
    "all_to_one_expert": (8, 5, 1, partial(all_to, 7), 0.0),
    "an_expert_without_tokens": (4, 9, 1, partial(never, 0), 0.0),
    "everything_dropped": (8, 4, 2, as_chosen, 1.1),
    "rank_0_has_no_tokens": (8, 6, 2, as_chosen, 0.0),
    "nobody_has_tokens": (8, 0, 2, as_chosen, 0.0),
}


def compare_with_local(axis: Axis, placement: Placement, case: str) -> None:
    num_experts, num_tokens, top_k, choose, drop = CASES[case]
    num_tokens = 0 if case == "rank_0_has_no_tokens" and axis.index == 0 else num_tokens + axis.index * bool(num_tokens)
    compare_problem(axis, placement, make_problem(axis.index, num_tokens, num_experts, top_k, choose, drop))


def compare_problem(axis: Axis, placement: Placement, problem: Problem) -> None:
    """This rank's tokens through experts on all ranks, and through all experts here."""
    everyone = tuple(range(problem[1].shape[0]))
    expected, expected_grad = outputs_and_gradients(LocalDispatcher(), everyone, problem)
    actual, actual_grad = outputs_and_gradients(AllToAllDispatcher(axis, placement), placement.experts[axis.index], problem)
    for a, b in zip(actual, expected, strict=True):
        # not bit for bit: a matmul of other rows beside mine rounds differently
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, equal_nan=True)
    expected_grad[1] = axis.sum_(expected_grad[1].clone())  # experts hear from the tokens of every rank
    elsewhere = [expert for expert in everyone if expert not in placement.experts[axis.index]]
    expected_grad[1][elsewhere] = 0
    for a, b in zip(actual_grad, expected_grad, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


def compare_bits(axis: Axis) -> None:
    """Experts that only double their rows: nothing rounds, so outputs and gradients must be equal bit for bit."""
    placement = Placement.balanced(4 * axis.size, axis.size, seed=5)
    g = torch.Generator().manual_seed(axis.index)
    x_ND = torch.randn(13, D, dtype=F64, generator=g).requires_grad_()
    weight_NK = torch.rand(13, 4, dtype=F64, generator=g).requires_grad_()
    expert_NK = torch.rand(13, 4 * axis.size, generator=g).argsort(1)[:, :4]
    results = []
    for dispatcher in (AllToAllDispatcher(axis, placement), AllToAllDispatcher(axis, Placement.balanced(4 * axis.size, axis.size))):
        routing = make_routing(expert_NK, weight_NK, torch.ones(13, 4, dtype=torch.bool), 4 * axis.size)
        ticket = dispatcher.send(x_ND, routing, dispatcher.announce([routing])[0])
        y_ND = dispatcher.combine(dispatcher.send_back(dispatcher.receive(ticket)[0] * 2, ticket))
        results.append((y_ND, *torch.autograd.grad(y_ND.square().sum(), (x_ND, weight_NK))))
    local = LocalDispatcher()
    ticket = local.send(x_ND, routing, local.announce([routing])[0])
    assert torch.equal(results[0][0], local.combine(local.send_back(local.receive(ticket)[0] * 2, ticket)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def frozen_and_evaluated(axis: Axis) -> None:
    """Frozen tokens and experts that ignore having no rows: the backward still meets; without gradients nothing is recorded."""
    placement = Placement.balanced(8, axis.size)
    dispatcher = AllToAllDispatcher(axis, placement)
    x_ND = torch.ones(3, D, dtype=F64)
    weight_NK = torch.ones(3, 1, dtype=F64, requires_grad=True)
    expert_NK = torch.zeros(3, 1, dtype=torch.int64)
    scale = torch.tensor(2.0, dtype=F64, requires_grad=True)
    for frozen in (True, False):
        x = x_ND.clone().requires_grad_(not frozen)
        routing = make_routing(expert_NK, weight_NK, torch.ones(3, 1, dtype=torch.bool), 8)
        ticket = dispatcher.send(x, routing, dispatcher.announce([routing])[0])
        rows_RD, count_e = dispatcher.receive(ticket)
        rows_RD = rows_RD * scale if int(count_e.sum()) else rows_RD.new_empty(0, D)
        dispatcher.combine(dispatcher.send_back(rows_RD, ticket)).sum().backward()
        assert frozen or torch.equal(x.grad, torch.full_like(x_ND, 2.0))  # type: ignore[arg-type]
    with torch.no_grad():
        routing = make_routing(expert_NK, weight_NK, torch.ones(3, 1, dtype=torch.bool), 8)
        ticket = dispatcher.send(x_ND, routing, dispatcher.announce([routing])[0])
        assert not dispatcher.combine(dispatcher.send_back(dispatcher.receive(ticket)[0], ticket)).requires_grad


def check_all(axis: Axis) -> None:
    """Every case under a random placement, the first one under a contiguous one too."""
    for case, seed in [("uneven", None), *((case, 5) for case in CASES)]:
        try:
            compare_with_local(axis, Placement.balanced(CASES[case][0], axis.size, seed), case)
        except Exception as error:
            raise AssertionError(f"{case}, placement seed {seed}") from error
    compare_bits(axis)
    frozen_and_evaluated(axis)


def check_axes(world: World) -> str:
    """Two ep groups of two ranks side by side, then 8 experts on three of the four ranks."""
    pairs = Mesh(world, 2).ep
    compare_with_local(pairs, Placement.balanced(8, 2, 5), "uneven")
    compare_bits(pairs)
    group = dist.new_group([0, 1, 2], timeout=world.timeout)
    if world.rank < 3:
        assert isinstance(group, dist.ProcessGroup)
        check_all(Axis("ep", (0, 1, 2), world.rank, group, world))
    return "equal"


FUZZED = 1000
KINDS = ("any", "no tokens", "one token", "all to one expert", "skewed", "a gate of NaN", "nothing kept")


def fuzzed(number: int, index: int) -> Problem:
    """Tokens of one rank in case `number`; what all ranks must have alike depends on the number only, the rest on the rank too."""
    shared = random.Random(number)
    kind, num_experts = KINDS[number % len(KINDS)], shared.randint(3, 9)
    top_k = 1 if kind == "all to one expert" else shared.randint(1, 3)
    favourite = shared.randrange(num_experts)
    mine = random.Random(FUZZED + 7 * number + index)
    num_tokens = {"no tokens": 0, "one token": int(index == number % 3)}.get(kind, mine.choice((0, 1, 3, 17)))
    choose: Callable[[Tensor], Tensor] = partial(all_to, favourite) if kind == "all to one expert" else as_chosen
    if kind == "skewed":
        choose = partial(mostly, favourite)
    drop = {"nothing kept": 1.1}.get(kind, mine.choice((0.0, 0.4)))
    problem = make_problem(mine.randrange(1 << 30), num_tokens, num_experts, top_k, choose, drop)
    if kind == "a gate of NaN" and num_tokens:
        with torch.no_grad():
            problem[3][0][mine.randrange(num_tokens)] = float("nan")
    x_ND, weights_EDD, experts, weights, kept = problem
    return x_ND, weights_EDD, experts[:1], weights[:1], kept[:1]  # one layer


def mostly(expert: int, expert_NK: Tensor) -> Tensor:
    """The first choice of nine tokens in ten."""
    return torch.where((torch.arange(len(expert_NK)) % 10 > 0)[:, None] & (expert_NK == expert_NK[:, :1]), expert, expert_NK)


def fuzz(world: World) -> int:
    axis = Mesh(world, world.size).ep
    for number in range(FUZZED):
        problem = fuzzed(number, axis.index)
        try:
            compare_problem(axis, Placement.balanced(problem[1].shape[0], axis.size, number), problem)
        except Exception as error:
            raise AssertionError(f"case {number}: {KINDS[number % len(KINDS)]}") from error
    return FUZZED


@pytest.mark.dist
def test_a_thousand_fuzzed_routings_equal_the_local_dispatcher(tmp_path: Path) -> None:
    assert run_ranks(fuzz, 3, tmp_path) == [FUZZED] * 3


@pytest.mark.dist
def test_two_and_three_ranks_equal_the_local_dispatcher(tmp_path: Path) -> None:
    assert run_ranks(check_axes, 4, tmp_path) == ["equal"] * 4


def test_one_rank_equals_the_local_dispatcher_without_a_process_group() -> None:
    check_all(Mesh(World.single(torch.device("cpu")), 1).ep)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), num_tokens=st.integers(0, 12), top_k=st.integers(1, 4), drop=st.sampled_from([0.0, 0.5]))
def test_one_rank_equals_the_local_dispatcher_for_any_routing(seed: int, num_tokens: int, top_k: int, drop: float) -> None:
    axis = Mesh(World.single(torch.device("cpu")), 1).ep
    problem = make_problem(seed, num_tokens, 5, top_k, as_chosen, drop)
    expected, expected_grad = outputs_and_gradients(LocalDispatcher(), tuple(range(5)), problem)
    placement = Placement.balanced(5, 1, seed)
    actual, actual_grad = outputs_and_gradients(AllToAllDispatcher(axis, placement), placement.experts[0], problem)
    for a, b in zip(actual + actual_grad, expected + expected_grad, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_rank_on_a_gpu_equals_the_host() -> None:
    problem = make_problem(1, 9, 8, 2, as_chosen, 0.2)
    on_device = [t.detach().cuda().requires_grad_(t.requires_grad) for t in (*problem[:2], *problem[2], *problem[3], *problem[4])]
    x_ND, weights_EDD, *rest = on_device
    expected, expected_grad = outputs_and_gradients(LocalDispatcher(), tuple(range(8)), problem)
    axis, placement = Mesh(World.single(torch.device("cuda", 0)), 1).ep, Placement.balanced(8, 1, 5)
    dispatcher = AllToAllDispatcher(axis, placement)
    actual, actual_grad = outputs_and_gradients(dispatcher, placement.experts[0], (x_ND, weights_EDD, rest[:2], rest[2:4], rest[4:]))
    for a, b in zip(actual + actual_grad, expected + expected_grad, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-10)
