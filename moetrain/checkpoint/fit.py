"""How much a copy in memory may hold, decided before the start by what there is room for. Pure, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.table import size

MARGIN = 1.02  # slots are whole pages


@dataclass(frozen=True)
class Share:
    """What one rank copies, or all ranks of a node, in bytes, and where."""

    place: str
    shared_bytes: int  # of no expert
    expert_bytes: int  # of experts, all of it
    every_bytes: int  # what a copy holds of experts that are not selected
    aside_bytes: int  # what it may hold besides for the store: rounded weights
    possible_bytes: int  # that its node could hold in all

    def __add__(self, other: "Share") -> "Share":
        """Of ranks of one node."""
        return Share(
            self.place,
            self.shared_bytes + other.shared_bytes,
            self.expert_bytes + other.expert_bytes,
            self.every_bytes + other.every_bytes,
            self.aside_bytes + other.aside_bytes,
            min(self.possible_bytes, other.possible_bytes),
        )

    @property
    def whole(self) -> float:
        """Room for one copy of everything."""
        return MARGIN * (self.shared_bytes + self.expert_bytes + self.aside_bytes)

    def beside(self, part: float) -> float:
        """Room for a whole copy, experts of several ages in it, and one with this part of the experts."""
        newest = self.shared_bytes + part * self.expert_bytes + (1 - part) * self.every_bytes + self.aside_bytes
        older = 0 if self.every_bytes == self.expert_bytes else (1 - part) * self.expert_bytes
        return MARGIN * (2 * newest + older)


@dataclass(frozen=True)
class Fit:
    """Experts of every bank. A copy that is larger than `beside` takes the place of the one before it, and holds them all."""

    copied: int  # in one copy
    beside: int  # in the largest copy that finds room beside a whole one; -1: not even one without experts does
    with_partner: bool  # whether every node has room for its neighbour's copies too


def fit(shares: Sequence[Share], num_experts: int, wanted: int = 0, fewest: int = 1, partner: bool = False) -> Fit:
    """`num_experts`: of the largest bank; `wanted`: experts in one copy, or (0) as many as fit on every node, `fewest` at least.

    `partner`: every node is to have copies of the one before it, in order of rank; left out where they leave no room for `fewest`.
    A node holds a whole copy, experts of several ages in it, while the newer one is filled.
    Raises CheckpointError when not even one whole copy fits.
    """
    fewest = min(fewest, num_experts)
    places = dict.fromkeys(share.place for share in shares)
    nodes = [reduce(add, (share for share in shares if share.place == place)) for place in places]
    for node in nodes:
        if node.whole > node.possible_bytes:
            raise CheckpointError(
                f"A copy of the training state needs {size(node.whole)} on a node and fits nowhere: there is room for "
                f"{size(node.possible_bytes)}.",
                "Make room, raise the container's --shm-size, set checkpoint.agent.folder, or use more nodes.",
            )
    with_partner = partner and len(nodes) > 1
    beside = _beside(nodes, num_experts, with_partner)
    if with_partner and beside < fewest:
        with_partner, beside = False, _beside(nodes, num_experts, False)
    return Fit(min(wanted, num_experts) or max(beside, fewest), beside, with_partner)


def _beside(nodes: Sequence[Share], num_experts: int, with_partner: bool) -> int:
    """The most experts with which a copy fits on every node beside a whole one."""
    for count in range(num_experts, -1, -1):
        part = count / max(1, num_experts)
        needs = [node.beside(part) for node in nodes]
        sums = [own + (needs[number - 1] if with_partner else 0) for number, own in enumerate(needs)]
        if all(its <= node.possible_bytes for its, node in zip(sums, nodes, strict=True)):
            return count
    return -1
