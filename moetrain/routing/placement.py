"""Where experts live. Pure arithmetic, no torch: uneven and permuted placements are ordinary ones."""

import random
from dataclasses import dataclass
from functools import cached_property

from moetrain.base.errors import PlanError


@dataclass(frozen=True)
class Placement:
    """`experts[rank]` lists the global experts on an expert-parallel rank, in slot order. One copy of each expert."""

    experts: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        placed = [expert for rank in self.experts for expert in rank]
        if sorted(placed) != list(range(len(placed))):
            raise PlanError(f"The placement {self.experts} does not hold every expert exactly once.")

    @property
    def num_ranks(self) -> int:
        return len(self.experts)

    @property
    def num_experts(self) -> int:
        return sum(len(rank) for rank in self.experts)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Experts in wire order: rank by rank, slot by slot."""
        return tuple(expert for rank in self.experts for expert in rank)

    @cached_property
    def rank_of(self) -> tuple[int, ...]:
        """Expert-parallel rank of every expert."""
        rank_of = {expert: rank for rank, experts in enumerate(self.experts) for expert in experts}
        return tuple(rank_of[expert] for expert in range(self.num_experts))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of experts per rank."""
        return tuple(len(rank) for rank in self.experts)

    @classmethod
    def balanced(cls, num_experts: int, num_ranks: int, seed: int | None = None) -> "Placement":
        """Contiguous experts, sizes differing by at most one; with a seed, a random permutation of the experts.

        Raises PlanError when a rank would hold none.
        """
        if num_ranks > num_experts:
            raise PlanError(f"{num_experts} experts cannot be spread over {num_ranks} ranks.", f"Use parallel.ep <= {num_experts}.")
        order = list(range(num_experts))
        if seed is not None:
            random.Random(seed).shuffle(order)
        small, extra = divmod(num_experts, num_ranks)
        experts, start = [], 0
        for rank in range(num_ranks):
            stop = start + small + (rank < extra)
            experts.append(tuple(order[start:stop]))
            start = stop
        return cls(tuple(experts))
