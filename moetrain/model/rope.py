"""Rotary position embedding (arXiv 2104.09864) and its scalings. B sequences, S tokens, d head_dim."""

import math
from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from moetrain.model.config import RopeConfig


def rotary(position_BS: Tensor, head_dim: int, config: RopeConfig) -> tuple[Tensor, Tensor]:
    """(cos, sin), float32 [B, 1, S, d], to be broadcast over heads."""
    frequency, amplitude = frequencies(head_dim, config, position_BS.device)
    angle = position_BS.float().unsqueeze(-1) * frequency
    angle = torch.cat([angle, angle], dim=-1).unsqueeze(1)
    return angle.cos() * amplitude, angle.sin() * amplitude


def rotate(x_BHSd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (i, i + d/2)."""
    cos, sin = cos.to(x_BHSd.dtype), sin.to(x_BHSd.dtype)
    if not x_BHSd.is_cpu or torch.compiler.is_compiling():  # it fuses better than we do, and launches on a GPU cost more than passes
        left, right = x_BHSd.chunk(2, dim=-1)
        return x_BHSd * cos + torch.cat([-right, left], dim=-1) * sin
    return cast(Tensor, _Rotate.apply(x_BHSd, cos, sin))


class _Rotate(torch.autograd.Function):
    """Multiplies whole heads, then adds halves in place, and keeps the angles only; autograd would copy halves together on both ways."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    result, across = x * cos, x * sin  # both halves of the angles are equal
    (first, second), (left, right) = result.chunk(2, dim=-1), across.chunk(2, dim=-1)
    first.sub_(right)
    second.add_(left)
    return result


def frequencies(head_dim: int, config: RopeConfig, device: torch.device) -> tuple[Tensor, float]:
    """Radians per position [d/2] and the factor on cos and sin."""
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    base = config.theta**-exponent
    if config.scaling == "linear":
        return base / config.factor, 1.0
    if config.scaling == "llama3":
        return _llama3(base, config), 1.0
    if config.scaling == "yarn":
        return _yarn(base, head_dim, config)
    return base, 1.0


def _llama3(base: Tensor, config: RopeConfig) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3.1, arXiv 2407.21783)."""
    turns = config.original_max_position * base / (2 * math.pi)
    low, high = config.low_frequency_factor, config.high_frequency_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return base * (keep + (1 - keep) / config.factor)


def _yarn(base: Tensor, head_dim: int, config: RopeConfig) -> tuple[Tensor, float]:
    """Frequencies that turn often within the original context are kept, slow ones interpolated (arXiv 2309.00071 section 3.2)."""

    def dim_of(turns: float) -> float:
        return head_dim * math.log(config.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low = max(math.floor(dim_of(config.beta_fast)), 0)
    high = min(math.ceil(dim_of(config.beta_slow)), head_dim - 1)
    ramp = (torch.arange(head_dim // 2, device=base.device, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    amplitude = config.attention_factor
    if amplitude is None:
        amplitude = 0.1 * math.log(config.factor) + 1 if config.factor > 1 else 1.0
    return base * (keep + (1 - keep) / config.factor), amplitude
