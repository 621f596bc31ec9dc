"""Blocks of one layer: dense, moe, shared. Every block maps (h, inputs, context) to (h, routing stats of its banks)."""

from torch import Tensor, nn

from moetrain.model.attention import Attention, AttentionInputs
from moetrain.model.config import ModelConfig
from moetrain.model.context import ForwardContext
from moetrain.model.mlp import NormedSwiGLU
from moetrain.model.moe import MoE
from moetrain.model.recompute import run
from moetrain.routing.types import RoutingStats

BlockOutput = tuple[Tensor, list[RoutingStats]]


class DenseBlock(nn.Module):
    """Attention, then a SwiGLU MLP."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = NormedSwiGLU(config.hidden_size, config.ffn_size, config.norm_eps)

    def forward(self, h_BSD: Tensor, inputs: AttentionInputs, context: ForwardContext) -> BlockOutput:
        h_BSD = h_BSD + run(self.attention, h_BSD, inputs, recompute=context.recompute)
        return h_BSD + run(self.mlp, h_BSD, recompute=context.recompute), []


class MoEBlock(nn.Module):
    """Attention, then routed experts; with a shared expert beside them it overlaps both exchanges."""

    def __init__(self, config: ModelConfig, layer: int, moe: MoE) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.moe = moe

    def forward(self, h_BSD: Tensor, inputs: AttentionInputs, context: ForwardContext) -> BlockOutput:
        h_BSD = h_BSD + run(self.attention, h_BSD, inputs, recompute=context.recompute)
        x_BSD = self.moe.norm(h_BSD)
        ticket, stats = self.moe.start(x_BSD, context)
        ticket = self.moe.compute(ticket, context)
        return h_BSD + self.moe.finish(ticket, h_BSD), [stats]


class SharedBlock(MoEBlock):
    """The shared expert hides the way to the routed experts."""

    def forward(self, h_BSD: Tensor, inputs: AttentionInputs, context: ForwardContext) -> BlockOutput:
        h_BSD = h_BSD + run(self.attention, h_BSD, inputs, recompute=context.recompute)
        x_BSD = self.moe.norm(h_BSD)
        ticket, stats = self.moe.start(x_BSD, context)
        h_BSD = h_BSD + self.moe.shared_update(x_BSD, context)
        ticket = self.moe.compute(ticket, context)
        return h_BSD + self.moe.finish(ticket, h_BSD), [stats]
