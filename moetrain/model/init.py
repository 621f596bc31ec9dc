"""Initial values that depend only on seed, parameter name and expert: the same model at every world size and placement."""

import hashlib
import math

import torch
from torch import Tensor

from moetrain.model.config import ModelConfig
from moetrain.model.state import Fragment


def fill(fragment: Fragment, config: ModelConfig, seed: int) -> None:
    """Writes the initial values of a `master` fragment in place; the other components start at zero.

    The whole logical tensor is drawn and cut to the fragment's box, one tensor at a time.
    """
    if fragment.component != "master":
        fragment.data.zero_()
        return
    whole = initial(fragment.name, fragment.expert, fragment.logical_shape, config, seed)
    where = tuple(slice(o, o + s) for o, s in zip(fragment.box.offset, fragment.box.shape, strict=True))
    fragment.data.copy_(whole[where])


def initial(name: str, expert: int | None, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """float32: ones for norms, zeros for biases, normal values with init_std elsewhere; projections that write into the
    residual stream are scaled by 1 / sqrt(2 num_layers) (GPT-2)."""
    leaf = ".".join(name.split(".")[-2:])
    if leaf.endswith("norm.weight"):
        return torch.ones(shape)
    if leaf.endswith("bias"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{name}/{'' if expert is None else expert}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=False) >> 1)
    std = config.init_std
    if "down_proj" in leaf or "o_proj" in leaf:
        std /= math.sqrt(2 * config.num_layers)
    return torch.randn(shape, generator=generator) * std
