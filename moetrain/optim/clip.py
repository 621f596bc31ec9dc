"""The global gradient norm over a mesh, every value counted once, and clipping by it."""

from collections.abc import Sequence
from enum import Enum
from math import isfinite, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.dist.mesh import Mesh

CPU_PART = 1 << 17  # elements a thread at a time: they are copied to float64 first, and so few stay in the cache


class Kind(Enum):
    """How a gradient is spread, after it was summed over the ranks that share it."""

    DENSE_REPLICATED = "equal on all ranks"
    DENSE_SHARDED = "a part on every dp rank"
    EXPERT_REPLICATED = "of this ep rank's experts, equal on its edp ranks"
    EXPERT_SHARDED = "of this ep rank's experts, a part on every edp rank"


class GradientShard(NamedTuple):
    """This rank's part of one gradient; may be empty."""

    tensor: Tensor
    kind: Kind


@torch.no_grad()
def clip_gradients(shards: Sequence[GradientShard], max_norm: float, mesh: Mesh) -> float:
    """Scales in place so that the 2-norm over all ranks is at most `max_norm` (0: never), and returns the norm before that.

    Two small sums over ranks, made by every rank alike. A norm that is not finite is returned and nothing is scaled. Squares are added
    in float64.
    """
    once = _sum_of_squares(shards, mesh, Kind.DENSE_REPLICATED)
    per_ep = mesh.ep.sum_(_sum_of_squares(shards, mesh, Kind.EXPERT_REPLICATED))
    per_rank = mesh.dp.sum_(_sum_of_squares(shards, mesh, Kind.DENSE_SHARDED, Kind.EXPERT_SHARDED))
    norm = sqrt(float(once + per_ep + per_rank))
    if max_norm > 0 and isfinite(norm) and norm > max_norm:
        for shard in shards:
            shard.tensor.mul_(max_norm / norm)
    return norm


def _sum_of_squares(shards: Sequence[GradientShard], mesh: Mesh, *kinds: Kind) -> Tensor:
    """float64 scalar on this rank's device."""
    total = torch.zeros((), dtype=torch.float64, device=mesh.world.device)
    for tensor, kind in shards:
        if kind in kinds and tensor.numel():
            total += _on_cpu(tensor.flatten()) if tensor.is_cpu else torch.linalg.vector_norm(tensor, dtype=torch.float64).square()
    return total


def _on_cpu(values: Tensor) -> Tensor:
    parts = values.split(CPU_PART * torch.get_num_threads())
    wide = torch.empty(len(parts[0]), dtype=torch.float64)
    return torch.stack([torch.dot(copied := wide[: len(part)].copy_(part), copied) for part in parts]).sum()
