"""Megatron-Core's MoE layer as an oracle: with our weights it gives our outputs and our gradients.

Its process is one that nothing else happens in: Megatron wants a process group, and torch.cuda replaced by the CPU.
"""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.model.blocks import RoutedBlock
from moetrain.model.context import ForwardContext
from moetrain.model.experts import Visit
from moetrain.routing.config import RoutingConfig
from tests.kit import run_processes
from tests.unit.test_model import build, tiny
from tools.peers import MegatronLayer, megatron_on_cpu, one_rank

LIMIT = 2e-6  # relative, float32
NUM_EXPERTS = 4
Values = dict[str, Tensor]


def ours(block: RoutedBlock, x_BSD: Tensor) -> Tensor:
    context = ForwardContext()
    trip = block.moe.start(x_BSD, 1, context, Visit(1))
    block.moe.compute(trip, 0, "moe", context)
    return block.moe.finish(trip, x_BSD)


def values(y_BSD: Tensor, x_BSD: Tensor, router: Tensor, first: list[Tensor], second: list[Tensor]) -> Values:
    """The output and all gradients of one scalar of it; `first` and `second`: weights of experts, one by one or stacked."""
    scalar = (y_BSD * torch.linspace(-1, 1, y_BSD.numel()).view_as(y_BSD)).sum()
    found = torch.autograd.grad(scalar, [x_BSD, router, *first, *second])
    gate_up, down = found[2 : 2 + len(first)], found[2 + len(first) :]
    return {"y": y_BSD.detach(), "x": found[0], "router": found[1], "gate_up": torch.cat(gate_up), "down": torch.cat(down)}


def both(folder: Path, rank: int) -> list[tuple[Values, Values]]:
    """Ours and Megatron's for two choices of k, and for a gate that leaves one expert without tokens."""
    found = []
    with ExitStack() as stack:
        stack.enter_context(one_rank(folder))
        stack.enter_context(megatron_on_cpu())
        for top_k, is_skewed in ((2, False), (3, False), (2, True)):
            config = tiny("moe", num_layers=1, routing=RoutingConfig(num_experts=NUM_EXPERTS, top_k=top_k, renormalize=True))
            (block,) = build(config).float().blocks
            assert isinstance(block, RoutedBlock)
            x_BSD = torch.rand(3, 7, config.hidden_size, generator=torch.Generator().manual_seed(top_k))
            with torch.no_grad():
                block.moe.router.weight[1] -= float(is_skewed)
            x_BSD, theirs = x_BSD.requires_grad_(), MegatronLayer(block, config)
            bank, local = block.moe.experts, theirs.layer.experts.local_experts
            mine = values(ours(block, x_BSD), x_BSD, block.moe.router.weight, [bank.gate_up_proj], [bank.down_proj])
            weights = [[expert.linear_fc1.weight for expert in local], [expert.linear_fc2.weight for expert in local]]
            others = values(theirs(x_BSD)[0], x_BSD, theirs.layer.router.weight, *weights)
            found.append((mine, {name: value.reshape(mine[name].shape) for name, value in others.items()}))
    return found


@pytest.mark.dist
def test_outputs_and_all_gradients_are_those_of_megatron_core(tmp_path: Path) -> None:
    ((*plain, skewed),) = run_processes(both, 1, tmp_path)
    for mine, theirs in (*plain, skewed):
        for name, value in mine.items():
            assert float(value.norm()) > 0
            assert float((value - theirs[name]).norm()) <= LIMIT * float(value.norm()), name
    assert float(skewed[0]["down"][1].abs().max()) == 0, "an expert without tokens"
