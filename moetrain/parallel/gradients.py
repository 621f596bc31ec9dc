"""Summing replicated gradients over ranks, and saying of every gradient how it is spread, for clipping."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.dist.mesh import Axis, Mesh
from moetrain.model.gpt import GPT
from moetrain.optim.clip import GradientShard, Kind
from moetrain.parallel.fragments import bank_of, local

BUCKET_BYTES = 32 << 20


def shard_kind(name: str, parameter: Tensor, model: GPT) -> Kind:
    """dense or expert, replicated or FSDP-sharded."""
    expert, sharded = bank_of(name, model) is not None, isinstance(parameter, DTensor)
    if expert:
        return Kind.EXPERT_SHARDED if sharded else Kind.EXPERT_REPLICATED
    return Kind.DENSE_SHARDED if sharded else Kind.DENSE_REPLICATED


class GradientSync:
    """FSDP2 reduces what it shards; the rest is summed here: dense over dp, experts over edp."""

    def __init__(self, model: GPT, mesh: Mesh) -> None:
        self.mesh = mesh
        self.parameters = [(parameter, shard_kind(name, parameter, model)) for name, parameter in model.named_parameters()]

    def reduce(self) -> None:
        self._sum(Kind.DENSE_REPLICATED, self.mesh.dp)
        self._sum(Kind.EXPERT_REPLICATED, self.mesh.edp)

    def _sum(self, kind: Kind, axis: Axis) -> None:
        if axis.size == 1:
            return
        gradients = [local(parameter.grad) for parameter, its in self.parameters if its is kind and parameter.grad is not None]
        for bucket in buckets(gradients, BUCKET_BYTES):
            flat = axis.sum_(torch.cat([gradient.flatten() for gradient in bucket]))
            for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def shards(self) -> list[GradientShard]:
        return [GradientShard(local(parameter.grad), kind) for parameter, kind in self.parameters if parameter.grad is not None]


def buckets(tensors: list[Tensor], size_bytes: int) -> list[list[Tensor]]:
    """Consecutive tensors in groups of about `size_bytes`."""
    groups: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not groups or room < tensor.nbytes:
            groups.append([])
            room = size_bytes
        groups[-1].append(tensor)
        room -= tensor.nbytes
    return groups
