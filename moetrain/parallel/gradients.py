"""Summing replicated gradients over ranks, and saying of every gradient how it is spread, for clipping."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from moetrain.dist.mesh import Axis, Mesh
from moetrain.model.gpt import GPT
from moetrain.model.moe import Router
from moetrain.optim.clip import GradientShard, Kind
from moetrain.parallel.early import EarlySums
from moetrain.parallel.fragments import bank_of, local

PIECE_BYTES = 32 << 20
HOP_BYTES = 256 << 10  # of an early piece, for every rank of its ring: it holds an exchange up, on two ranks at 200 Mbit/s by 20 ms
EARLY_PATIENCE = 10  # time-outs: a rank that is done with its exchanges may wait for the rest of the others' backward passes


def shard_kind(name: str, parameter: Tensor, model: GPT) -> Kind:
    """dense or expert, replicated or FSDP-sharded."""
    expert, sharded = bank_of(name, model) is not None, isinstance(parameter, DTensor)
    if expert:
        return Kind.EXPERT_SHARDED if sharded else Kind.EXPERT_REPLICATED
    return Kind.DENSE_SHARDED if sharded else Kind.DENSE_REPLICATED


@dataclass(frozen=True, eq=False)
class Piece:
    """What one collective sums: the gradients of `parameters`; of a single one, elements `start` to `stop`."""

    axis: Axis
    parameters: tuple[Parameter, ...]
    start: int = 0
    stop: int | None = None
    patience: int = 1  # in time-outs

    def make(self) -> None:
        """Adds the gradients over the axis, in place. A parameter without one is left out: it has none on any rank."""
        gradients = [local(parameter.grad) for parameter in self.parameters if parameter.grad is not None]
        if not gradients:
            return
        if len(gradients) == 1 and gradients[0].is_contiguous():
            self._sum(gradients[0].view(-1)[self.start : self.stop])
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._sum(flat[self.start : self.stop])
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _sum(self, flat: Tensor) -> None:
        self.axis.sum_(flat, None if self.patience == 1 else self.axis.world.timeout * self.patience)


class GradientSync:
    """FSDP2 reduces what it shards; the rest is summed here: dense over dp, experts over edp.

    when: `parallel.reduce_gradients`. Early sums take smaller pieces, so that from three ranks on a sum may round differently; whether a
    step sums early or afterwards changes no bit.
    """

    def __init__(self, model: GPT, mesh: Mesh, when: str = "after", hop_bytes: int = HOP_BYTES) -> None:
        self.parameters = [(parameter, shard_kind(name, parameter, model)) for name, parameter in model.named_parameters()]
        dense, experts = (
            [(parameter, axis) for parameter, its in self.parameters if its is kind and axis.size > 1]
            for kind, axis in ((Kind.DENSE_REPLICATED, mesh.dp), (Kind.EXPERT_REPLICATED, mesh.edp))
        )
        self.early: EarlySums | None = None
        has_shards = any(isinstance(parameter, DTensor) for parameter, _ in self.parameters)
        if when == "after" or mesh.world.played != "gloo" or has_shards:
            self.pieces = pieces(dense, PIECE_BYTES) + pieces(experts, PIECE_BYTES)
            return
        axes = dict[Parameter, Axis](dense + experts)
        size = min(PIECE_BYTES, hop_bytes * mesh.dp.size) if mesh.ep.size > 1 else PIECE_BYTES
        self.pieces = pieces(((parameter, axes[parameter]) for parameter in as_made(model) if parameter in axes), size, EARLY_PATIENCE)
        if self.pieces and mesh.world.backend == "gloo":  # a rehearsal makes the same sums, afterwards
            self.early = EarlySums(self.pieces, mesh.ep.link)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the passes of a step. All gradients are summed at its end (on a GPU: when the current stream gets there); none after an
        error.
        """
        try:
            yield
        except BaseException:
            if self.early is not None:
                self.early.abandon()
            raise
        self.reduce()

    def begin(self) -> None:
        """Before the last forward and backward pass of a step that may sum early. Until the end of `step` gradients belong to the sums, and
        nothing else may use the dp and edp groups.
        """
        if self.early is not None:
            self.early.begin()

    def reduce(self) -> None:
        if self.early is not None and self.early.has_begun:
            self.early.finish()
        else:
            for piece in self.pieces:
                piece.make()

    def shards(self) -> list[GradientShard]:
        return [GradientShard(local(parameter.grad), kind) for parameter, kind in self.parameters if parameter.grad is not None]


def as_made(model: GPT) -> list[Parameter]:
    """Parameters about as a backward pass makes their gradients: from the last to the first.

    Routers and vectors go last: those of a shortcut come at the end of its block, in front of which they would stop all others.
    """
    routers = {parameter for module in model.modules() if isinstance(module, Router) for parameter in module.parameters()}
    order: tuple[list[Parameter], list[Parameter]] = [], []
    for parameter in reversed(list(model.parameters())):
        order[parameter in routers or parameter.ndim < 2].append(parameter)
    return order[0] + order[1]


def pieces(parameters: Iterable[tuple[Parameter, Axis]], size_bytes: int, patience: int = 1) -> list[Piece]:
    """Slices of parameters bigger than `size_bytes`, and of the others those of one axis, one after the other, as many as fit.

    All members of an axis hold parameters of the same sizes, so they have its pieces in the same order, whatever stands between them.
    """
    found: list[Piece] = []
    gathering: dict[str, list[Parameter]] = {}  # by name of the axis
    axes: dict[str, Axis] = {}
    room: dict[str, int] = {}
    for parameter, axis in parameters:
        size, axes[axis.name] = local(parameter).nbytes, axis
        if size > size_bytes:
            step = size_bytes // parameter.element_size()
            found += [Piece(axis, (parameter,), start, start + step, patience) for start in range(0, local(parameter).numel(), step)]
            continue
        gathered = gathering.setdefault(axis.name, [])
        if gathered and size > room[axis.name]:
            found.append(Piece(axis, tuple(gathered), patience=patience))
            gathered.clear()
        room[axis.name] = (room[axis.name] if gathered else size_bytes) - size
        gathered.append(parameter)
    return found + [Piece(axes[name], tuple(gathered), patience=patience) for name, gathered in gathering.items() if gathered]
