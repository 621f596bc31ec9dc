"""The axes of a run: all ranks are data-parallel (dp); `ep` contiguous ranks share one set of experts; `edp` ranks hold copies of it.

world = dp = edp * ep; rank = edp_index * ep + ep_index.
"""

from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moetrain.base.errors import PlanError
from moetrain.dist.transport import Link, default_transport
from moetrain.dist.world import World


def auto_ep(world_size: int, num_experts: int) -> int:
    """The largest divisor of the world that leaves every rank at least one expert."""
    return max(ep for ep in range(1, world_size + 1) if world_size % ep == 0 and ep <= num_experts)


@dataclass(frozen=True)
class Axis:
    """The ranks this rank shares one axis with. An axis of one rank has no group and calls no collective."""

    name: str  # dp | ep | edp
    ranks: tuple[int, ...]  # global, in axis order
    index: int  # of this rank in `ranks`
    group: dist.ProcessGroup | None
    world: World

    @property
    def size(self) -> int:
        return len(self.ranks)

    def sum_(self, tensor: Tensor, limit: timedelta | None = None) -> Tensor:
        """Adds in place over this axis and returns the tensor. `limit`: how long to wait for the others (None: the world's time-out)."""
        if self.group is None:
            return tensor
        return self.world.sum_(tensor, self.group, f"sum over {self.name}", limit)

    @cached_property
    def link(self) -> Link:
        """How the exchanges of this axis travel; its settings may be changed between steps."""
        return Link(default_transport(self.world.backend))

    @cached_property
    def device_mesh(self) -> DeviceMesh | None:
        """The axis as FSDP2 wants it; None where there is nothing to shard over."""
        if self.group is None:
            return None
        return DeviceMesh.from_group(self.group, self.world.device.type, mesh_dim_names=(self.name,))


class Mesh:
    """The three axes of this rank. Making it is a collective act: every rank makes the same mesh.

    Raises PlanError when `ep` does not divide the world.
    """

    def __init__(self, world: World, ep: int) -> None:
        if ep < 1 or world.size % ep:
            raise PlanError(f"parallel.ep={ep} does not divide the {world.size} ranks of this run.", "Use parallel.ep=0 to choose one.")
        self.world = world
        everyone = tuple(range(world.size))
        self.dp = _axis("dp", [everyone], world)
        self.ep = _axis("ep", [everyone[start : start + ep] for start in range(0, world.size, ep)], world)
        self.edp = _axis("edp", [everyone[start::ep] for start in range(ep)], world)


def _axis(name: str, parts: list[tuple[int, ...]], world: World) -> Axis:
    mine = next(part for part in parts if world.rank in part)
    return Axis(name, mine, mine.index(world.rank), world.new_group(name, parts), world)
