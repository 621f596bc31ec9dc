"""SwiGLU feed-forward (arXiv 2002.05202)."""

import torch
from torch import Tensor, nn

from moetrain.model.norm import RMSNorm


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up share one matrix, gate rows first."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * ffn_size, bias=False)
        self.down_proj = nn.Linear(ffn_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_up_proj(x)))


class NormedSwiGLU(SwiGLU):
    """SwiGLU behind its own norm; the caller adds the residual."""

    def __init__(self, hidden_size: int, ffn_size: int, eps: float) -> None:
        super().__init__(hidden_size, ffn_size)
        self.norm = RMSNorm(hidden_size, eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


def gated(gate_up: Tensor) -> Tensor:
    """silu(first half of the last dim) * second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
