"""Cross-entropy that keeps one tensor as big as the logits, their gradient, and passes over it as seldom as it can."""

from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import nll_loss

CPU_PART, GPU_PART = 1 << 20, 1 << 26  # logits at a time: they stay in a core's cache; they fill a GPU


def cross_entropy_sum(logits_NV: Tensor, label_N: Tensor, valid_N: Tensor) -> Tensor:
    """Nats summed over valid labels, in at least float32. Differentiable once: its backward pass may run one time.

    The gradient is made beside the loss, part by part, while the part's softmax is at hand (arXiv 2410.10989 section 3.2 has it so).
    """
    return cast(Tensor, _CrossEntropySum.apply(logits_NV, label_N, valid_N, torch.is_grad_enabled() and logits_NV.requires_grad))


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits_NV: Tensor, label_N: Tensor, valid_N: Tensor, with_gradient: bool) -> Tensor:
        label_N = label_N.masked_fill(~valid_N, 0)
        grad_NV = torch.empty_like(logits_NV) if with_gradient else None
        rows = max(1, (CPU_PART if logits_NV.is_cpu else GPU_PART) // max(logits_NV.shape[1], 1))
        nats_N = logits_NV.new_empty(logits_NV.shape[0], dtype=torch.promote_types(logits_NV.dtype, torch.float32))
        for start in range(0, logits_NV.shape[0], rows):
            part = slice(start, start + rows)
            log_NV = torch.log_softmax(logits_NV[part], 1, dtype=nats_N.dtype)
            nats_N[part] = nll_loss(log_NV, label_N[part], reduction="none")
            if grad_NV is not None:
                softmax_NV = log_NV.exp_().mul_(valid_N[part].unsqueeze(1))
                index_N1 = label_N[part].unsqueeze(1)
                grad_NV[part] = softmax_NV.scatter_add_(1, index_N1, -valid_N[part].unsqueeze(1).to(softmax_NV.dtype))
        ctx.grad_NV = grad_NV  # type: ignore[attr-defined]
        return nats_N.masked_fill_(~valid_N, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad_NV, ctx.grad_NV = ctx.grad_NV, None  # type: ignore[attr-defined]
        assert grad_NV is not None, "a second backward pass through a loss"
        return grad_NV.mul_(grad), None, None, None
