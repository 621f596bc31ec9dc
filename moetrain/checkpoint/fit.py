"""How many experts a copy in memory may hold, decided before the start by what there is room for. Pure, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.table import size

MARGIN = 1.02  # slots are whole pages


@dataclass(frozen=True)
class Share:
    """What one rank copies: bytes that are no expert's, bytes of experts; where, and what its node could hold."""

    place: str
    shared_bytes: int
    expert_bytes: int
    possible_bytes: int


def fitting_experts(shares: Sequence[Share], num_experts: int, wanted: int = 0) -> int:
    """Experts of every bank in one copy: `wanted`, or (0) as many as fit on every node. `num_experts`: of the largest bank.

    A node holds two copies while the newer one is filled, and now and then one of everything, for a full checkpoint.
    Raises CheckpointError when not even a full checkpoint and a copy of one expert fit.
    """
    fewest = wanted or num_experts
    for place in {share.place for share in shares}:
        there = [share for share in shares if share.place == place]
        shared, experts = sum(share.shared_bytes for share in there), sum(share.expert_bytes for share in there)
        room = min(share.possible_bytes for share in there)

        def needs(count: int, shared: int = shared, experts: int = experts) -> float:
            return MARGIN * (2 * shared + experts * (1 + count / max(1, num_experts)))

        least = wanted or min(1, num_experts)
        if needs(least) > room:
            raise CheckpointError(
                f"Copies of the training state need {size(needs(least))} on a node and fit nowhere: there is room for {size(room)}.",
                "Make room, raise the container's --shm-size, set checkpoint.agent.folder, or use more nodes.",
            )
        while not wanted and needs(fewest) > room:
            fewest -= 1
    return min(fewest, num_experts)
