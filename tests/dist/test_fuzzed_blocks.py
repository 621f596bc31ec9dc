"""Whole models of drawn shapes, schedules, batches and damage over real exchanges: every rank gets what one process gets.

`test_alltoall.py` fuzzes the dispatcher alone, a thousand times; here gates choose, blocks overlap, and autograd decides the order.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.dist.mesh import Axis, Mesh
from moetrain.dist.world import World
from moetrain.model.blocks import RoutedBlock
from moetrain.model.config import AttentionConfig, ModelConfig, ShortcutConfig
from moetrain.model.context import ForwardContext
from moetrain.model.gpt import GPT, BankSite
from moetrain.model.kinds import KINDS
from moetrain.model.moe import MoE
from moetrain.model.schedule import Schedule
from moetrain.parallel.alltoall import AllToAllDispatcher
from moetrain.routing.config import RoutingConfig
from moetrain.routing.placement import Placement
from tests.kit import run_ranks
from tools.overlap_unit import fill

pytestmark = pytest.mark.dist

NUM_CASES, RANKS, WORDS, ODD_WORD = 175, 2, 11, 0
BLOCKS = ("moe", "shared", "shortcut", "scmoe", "dgmoe")
DAMAGE = ("none", "one rank without tokens", "no tokens", "one token", "a gate of NaN", "a word of NaN", "one expert wanted by all")


@dataclass
class Case:
    """What all ranks have alike, and the tokens of one."""

    config: ModelConfig
    slots: list[tuple[int, ...]]  # by block
    recompute: bool
    damage: str
    tokens_BS: Tensor


def drawn(number: int, rank: int) -> Case:
    alike, mine = random.Random(number), random.Random(1000 + RANKS * number + rank)
    block, damage = BLOCKS[number % len(BLOCKS)], DAMAGE[number % len(DAMAGE)]
    kind, num_experts = KINDS[block], alike.randint(2, 6)
    top_k = alike.choice((1, num_experts, alike.randint(1, num_experts)))  # all of them: a dense mixture
    if block == "dgmoe":
        top_k = min(top_k, num_experts // 2)
    routing = RoutingConfig(
        num_experts, top_k, alike.choice(("softmax", "sigmoid")), renormalize=top_k > 1 and alike.random() < 0.5,
        auxiliary_loss_scope=alike.choice(("sequence", "micro_batch")), z_loss_weight=0.1,
        bias_update_rate=0.01 if damage == "one expert wanted by all" else 0.0, capacity_factor=alike.choice((None, None, 0.6)),
        drop_order=alike.choice(("probability", "position")),
    )  # fmt: skip
    positions = [alike.randint(1, 3) for _ in range(2)] if kind.is_pair else [2]
    config = ModelConfig(
        WORDS, hidden_size=8, num_layers=4 if kind.is_pair else 2, pattern=[block], ffn_size=8, expert_ffn_size=12, shared_ffn_size=8,
        num_shared_experts=alike.randint(1, 2) if kind.has_shared else 1,
        shared_gate=alike.choice(("add", "cg1", "cg2")) if kind.has_shared else "cg1", max_position=8, init_std=0.4,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4), routing=routing,
        shortcut=ShortcutConfig(positions, pairs_per_bank=alike.randint(1, 2) if block == "dgmoe" else 1),
    )  # fmt: skip
    config.check()
    num_chunks = alike.randint(1, 3)
    ends = [len(place.operators) + 1 for place in config.places()]
    slots = [tuple(sorted(alike.randint(1, end) for _ in range(num_chunks))) for end in ends]
    shape = mine.randint(1, 3), mine.randint(1, 7)
    if damage == "no tokens" or (damage == "one rank without tokens" and rank == number % RANKS):
        shape = 0, 3
    if damage == "one token":
        shape = 1, 1
    lowest = ODD_WORD if damage == "a word of NaN" and rank == 0 else ODD_WORD + 1
    tokens_BS = torch.tensor([mine.randrange(lowest, WORDS) for _ in range(shape[0] * shape[1])], dtype=torch.int64).view(shape)
    if damage == "a word of NaN" and rank == 0:
        tokens_BS[0, -1] = ODD_WORD
    return Case(config, slots, alike.random() < 0.4, damage, tokens_BS)


def results(case: Case, site: BankSite | None) -> dict[str, Tensor]:
    """Logits, losses, loads, and all gradients by name."""
    gpt = GPT(case.config, None if site is None else lambda bank: site).double()
    fill(gpt)
    with torch.no_grad():
        gates = [module.router for module in gpt.modules() if isinstance(module, MoE)]
        if case.damage == "a gate of NaN":
            gates[-1].weight[0, 0] = float("nan")
        elif case.damage == "a word of NaN":
            gpt.embedding.weight[ODD_WORD] = float("nan")
        elif case.damage == "one expert wanted by all":
            assert gates[0].balance_bias is not None
            gates[0].balance_bias[-1] = 1e3
    for block, slots in zip(gpt.blocks, case.slots, strict=True):
        assert isinstance(block, RoutedBlock)
        block.schedule = Schedule(slots)
    output = gpt(case.tokens_BS, ForwardContext(recompute=case.recompute))
    found = {"logits": output.logits_BSV}
    for number, stats in enumerate(output.stats):
        found |= {f"auxiliary {number}": stats.auxiliary, f"z {number}": stats.z}
    loss = sum((value * torch.linspace(1, 2, value.numel()).view(value.shape)).square().sum() for value in found.values())
    assert isinstance(loss, Tensor)
    loss.backward()
    found |= {f"load {number}": stats.load_E.double() for number, stats in enumerate(output.stats)}
    gradients = {name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in gpt.named_parameters()}
    return {name: value.detach() for name, value in (found | gradients).items()}


def compare(axis: Axis, case: Case, seed: int) -> None:
    placement = Placement.balanced(case.config.routing.num_experts, axis.size, seed)
    mine = placement.experts[axis.index]
    expected = results(case, None)
    actual = results(case, BankSite(mine, AllToAllDispatcher(axis, placement)))
    assert list(actual) == list(expected)
    for name, wanted in expected.items():
        if ".experts." in name:  # they hear from the tokens of every rank
            wanted = axis.sum_(wanted.clone())[list(mine)]
        torch.testing.assert_close(actual[name], wanted, rtol=1e-8, atol=1e-9, equal_nan=True, msg=f"{name}: {{}}".format)


def fuzz(world: World) -> tuple[int, int]:
    """Cases, and those in which nothing was NaN on this rank."""
    axis, sane = Mesh(world, world.size).ep, 0
    for number in range(NUM_CASES):
        case = drawn(number, axis.index)
        try:
            compare(axis, case, number)
        except Exception as error:
            raise AssertionError(f"case {number}: {case}") from error
        sane += "NaN" not in case.damage
    return NUM_CASES, sane


def test_drawn_models_equal_their_one_process_twins(tmp_path: Path) -> None:
    assert run_ranks(fuzz, RANKS, tmp_path) == [(NUM_CASES, NUM_CASES * 5 // 7)] * RANKS
