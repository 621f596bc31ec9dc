"""ScMoE (arXiv 2404.05019): a dense block and an MoE block as a pair, whose routed experts read an earlier tensor of the main stream.

The overlap is the order of the calls: rows leave when the shortcut tensor exists, experts run in their slot, results are added at the end.
"""

from collections.abc import Callable

from torch import Tensor, nn

from moetrain.model.attention import Attention, AttentionInputs
from moetrain.model.blocks import BlockOutput, DenseBlock
from moetrain.model.config import ModelConfig
from moetrain.model.context import ForwardContext
from moetrain.model.moe import MoE
from moetrain.model.recompute import run


class ScMoEBlock(nn.Module):
    """Four main-stream computations; position 1, 2, 3 takes the shortcut before computation 2, 1, 0 (section 3.1)."""

    def __init__(self, config: ModelConfig, layer: int, moe: MoE) -> None:
        super().__init__()
        self.dense = DenseBlock(config, layer)
        self.attention = Attention(config, layer + 1)
        self.moe = moe
        self.leave = 3 - config.shortcut.position
        slot = config.shortcut.slot or config.shortcut.position + 1  # default: just before the shared expert hides the way back
        self.work = self.leave + slot - 1

    def forward(self, h_BSD: Tensor, inputs: AttentionInputs, context: ForwardContext) -> BlockOutput:
        main: list[Callable[[Tensor], Tensor]] = [
            lambda h: run(self.dense.attention, h, inputs, recompute=context.recompute),
            lambda h: run(self.dense.mlp, h, recompute=context.recompute),
            lambda h: run(self.attention, h, inputs, recompute=context.recompute),
            lambda h: self.moe.shared_update(h, context),
        ]
        for number, update in enumerate(main):
            if number == self.leave:
                ticket, stats = self.moe.start(self.moe.norm(h_BSD), context)
            if number == self.work:
                ticket = self.moe.compute(ticket, context)
            h_BSD = h_BSD + update(h_BSD)
        if self.work == len(main):
            ticket = self.moe.compute(ticket, context)
        return h_BSD + self.moe.finish(ticket, h_BSD), [stats]
