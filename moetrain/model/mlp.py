"""SwiGLU feed-forward (arXiv 2002.05202)."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import silu

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

    def forward(self, x: Tensor, is_normed: bool = False) -> Tensor:
        """`is_normed`: the caller has done it."""
        return super().forward(x if is_normed else self.norm(x))


def gated(gate_up: Tensor) -> Tensor:
    """silu(first half of the last dim) * second half."""
    if torch.compiler.is_compiling():  # which fuses better than we do
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate) * up
    return cast(Tensor, _Gated.apply(gate_up))


class _Gated(torch.autograd.Function):
    """Keeps its input only, and makes both halves of the gradient in place; autograd would keep silu(gate) too and copy the halves."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gated_backward(grad, gate_up)


def gated_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of `gated`'s input, from that of its output; the same bits as autograd's."""
    result = torch.empty_like(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate, grad_up = result.chunk(2, dim=-1)
    torch.mul(grad, silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return result
