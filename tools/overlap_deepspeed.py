"""DeepSpeed's MoE layer in the block pairs of tools/bench_overlap.py: same attention, same dense MLP, same experts, same weights.

With its own all-to-all, or with the transport that ours has. Needs deepspeed.
"""

import contextlib
from collections.abc import Iterator
from importlib import import_module
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear

from moetrain.dist.comm import Exchange
from moetrain.dist.mesh import Axis
from moetrain.model.attention import AttentionInputs
from moetrain.model.blocks import BlockOutput, RoutedBlock
from moetrain.model.context import ForwardContext
from moetrain.model.mlp import SwiGLU
from moetrain.routing.types import RoutingStats
from tools.overlap_cases import STOCK, TOP_2, Size
from tools.overlap_unit import Unit

BALANCED_LOGIT = 20.0  # above any gate's: both chosen experts get it, so that the weights of a token stay those of the gate


class PlannedGate(nn.Module):
    """DeepSpeed's top-2 gate, whose choice is fixed by a large number added to its logits. [N, E] or zeros: the gate chooses."""

    def __init__(self, projection: nn.Linear, plan_NE: Tensor, drop_tokens: bool, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.projection, self.plan_NE, self._drop_tokens, self._group = projection, plan_NE, drop_tokens, group
        self._top2 = import_module("deepspeed.moe.sharded_moe").top2gating

    def forward(self, x_ND: Tensor, used_token: Tensor | None, sparse_routes: bool, use_tutel: bool) -> tuple:
        logits_NE = linear(x_ND.float(), self.projection.weight.float()) + self.plan_NE
        return self._top2(logits_NE, 1.0, 1, self._drop_tokens, self._group, False, sparse_routes)


class Block(nn.Module):
    """Attention, then DeepSpeed's MoE layer, with the weights of ours."""

    def __init__(self, ours: RoutedBlock, axis: Axis, experts: int, ffn: int, plan_NE: Tensor, drop_tokens: bool) -> None:
        """drop_tokens: a capacity of the even share; without it every expert takes as many rows as the busiest one."""
        super().__init__()
        hidden = ours.moe.norm.weight.numel()
        layer = import_module("deepspeed.moe.layer").MoE(
            hidden, SwiGLU(hidden, ffn), experts, ep_size=axis.size, k=2, capacity_factor=1.0, min_capacity=1, drop_tokens=drop_tokens,
            use_rts=False, top2_2nd_expert_sampling=False,
        )  # fmt: skip
        layer.deepspeed_moe._set_ep_group(axis.group)
        self.attention, self.norm, self.layer = ours.attention, ours.moe.norm, layer
        with torch.no_grad():
            projection = layer.deepspeed_moe.gate.wg
            projection.weight.copy_(ours.moe.router.weight)
            layer.deepspeed_moe.gate = PlannedGate(projection, plan_NE, drop_tokens, axis.group)
            for slot, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
                expert.gate_up_proj.weight.copy_(ours.moe.experts.gate_up_proj[slot])
                expert.down_proj.weight.copy_(ours.moe.experts.down_proj[slot])

    def forward(self, h_BSD: Tensor, inputs: AttentionInputs, context: ForwardContext) -> BlockOutput:
        h_BSD = h_BSD + self.attention(h_BSD, inputs)
        update_BSD, auxiliary, load_E = self.layer(self.norm(h_BSD))
        nothing = torch.zeros(())
        return h_BSD + update_BSD, [RoutingStats(auxiliary * h_BSD.shape[0] * h_BSD.shape[1], nothing, load_E, nothing)]


class DeepSpeedUnit(Unit):
    """Top-2, its MoE layers replaced."""

    def __init__(self, size: Size, axis: Axis, evenly: bool) -> None:
        super().__init__(TOP_2, size, axis)
        import_module("deepspeed").init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        self._axis = axis
        self.decide(evenly, axis.index)
        for layer, (index, block) in enumerate((index, block) for index, block in enumerate(self.blocks) if isinstance(block, RoutedBlock)):
            plan_NE = torch.zeros(size.tokens, size.experts)
            if evenly:
                plan_NE.scatter_(1, self.decided[layer].topk(2).indices, BALANCED_LOGIT)
            self.blocks[index] = Block(block, axis, size.experts, size.ffn, plan_NE, drop_tokens=evenly)

    @contextlib.contextmanager
    def carried_by(self, arm: str) -> Iterator[None]:
        """Its all-to-all goes over the axis's link inside, unless the arm is the stock one."""
        if arm == STOCK:
            yield
        else:
            with mock.patch.object(import_module("deepspeed.moe.sharded_moe"), "_AllToAll", OverLink(self._axis)):
                yield


class OverLink:
    """Stands for DeepSpeed's `_AllToAll`: an equal share of the rows goes to every rank."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def apply(self, group: object, rows: Tensor) -> Tensor:
        sizes = [rows.shape[0] // self._axis.size] * self._axis.size
        return Exchange("DeepSpeed's rows", rows, sizes, sizes, self._axis).wait()


def difference(unit: DeepSpeedUnit, ours: Unit, rank: int) -> float:
    """How far its output is from that of our top-2 with the same weights, relative; both have just run a lap."""
    update = ours.output_BSD - ours.inputs(rank)
    return float((unit.output_BSD - ours.output_BSD).norm() / update.norm())
