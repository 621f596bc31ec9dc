"""Cross-entropy that needs no second tensor as big as the logits, and passes over them as seldom as it can."""

from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import nll_loss

# logits at a time: they stay in the cache of a core (each of the threads gets as many), or fill a GPU
CPU_PART, GPU_PART = 1 << 18, 1 << 23


def cross_entropy(logits_NV: Tensor, label_N: Tensor, valid_N: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Nats summed over valid labels, in at least float32: times `scale` with a gradient, and as they are without one.

    The gradient is made beside the loss, part by part, while a part's softmax is at hand (as in arXiv 2410.10989 section 3.2), and rounded
    once: `scale` goes into it before. **It overwrites the logits**, and its backward pass may run one time.
    """
    with_gradient = torch.is_grad_enabled() and logits_NV.requires_grad
    return cast(tuple[Tensor, Tensor], _CrossEntropy.apply(logits_NV, label_N, valid_N, scale, with_gradient))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, logits_NV: Tensor, label_N: Tensor, valid_N: Tensor, scale: float, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        label_N, ignored_N = label_N.masked_fill(~valid_N, 0), ~valid_N
        nats_N = logits_NV.new_empty(logits_NV.shape[0], dtype=torch.promote_types(logits_NV.dtype, torch.float32))
        size = CPU_PART * torch.get_num_threads() if logits_NV.is_cpu else GPU_PART
        rows = max(1, size // max(logits_NV.shape[1], 1))
        for start in range(0, logits_NV.shape[0], rows):
            part = slice(start, start + rows)
            log_NV = torch.log_softmax(logits_NV[part], 1, dtype=nats_N.dtype)
            nats_N[part] = nll_loss(log_NV, label_N[part], reduction="none")
            if with_gradient:
                is_wide = log_NV.dtype == logits_NV.dtype
                grad_NV = torch.exp(log_NV, out=logits_NV[part] if is_wide else log_NV).mul_(scale)
                grad_NV.scatter_add_(1, label_N[part].unsqueeze(1), grad_NV.new_tensor(-scale).expand(grad_NV.shape[0], 1))
                if grad_NV.is_cpu:  # few rows do not count; a GPU would have to wait to know which
                    grad_NV.index_fill_(0, ignored_N[part].nonzero().flatten(), 0)
                else:
                    grad_NV.masked_fill_(ignored_N[part].unsqueeze(1), 0)
                if not is_wide:
                    logits_NV[part] = grad_NV
        ctx.grad_NV = logits_NV.detach() if with_gradient else None  # type: ignore[attr-defined]
        nats = nats_N.masked_fill_(ignored_N, 0).sum()
        ctx.mark_non_differentiable(nats)
        return nats * scale, nats

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad_NV, ctx.grad_NV = ctx.grad_NV, None  # type: ignore[attr-defined]
        assert grad_NV is not None, "a second backward pass through a loss"
        if not grad.is_cpu or grad != 1:  # on a GPU to ask would be to wait
            grad_NV.mul_(grad)
        return grad_NV, None, None, None, None
