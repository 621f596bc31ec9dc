"""Root-mean-square normalisation, arXiv 1910.07467."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim; half precision is normalised in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        weight = self.weight.to(wide.dtype)
        if not wide.is_cpu or torch.compiler.is_compiling():
            return nn.functional.rms_norm(wide, weight.shape, weight, self.eps).to(x.dtype)
        return cast(Tensor, _Normed.apply(wide, weight, self.eps)).to(x.dtype)


class _Normed(torch.autograd.Function):
    """torch's rms_norm, which is made of many operators on CPUs: the same bits forward, half the passes over memory backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, inverse, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        normed = x * inverse
        product = grad * normed
        along = (product * weight).sum(-1, keepdim=True).div_(weight.numel())  # no matrix product, which autocast would round
        grad_x = (grad * weight).sub_(normed.mul_(along)).mul_(inverse)
        return grad_x, product.reshape(-1, weight.numel()).sum(0), None
