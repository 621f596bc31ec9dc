"""The vocabulary of routing: scores, the flat pairs every method produces, and what a policy may know.

N tokens of this rank and micro-batch, E experts, K chosen per token, P kept (token, expert) pairs, L levels of an expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class GateScores(NamedTuple):
    """What a gate says of every token and expert."""

    select_NE: Tensor  # chooses: the highest k
    value_NE: Tensor  # sums to one over E: what a policy weighs and the balance loss reads
    combine_NE: Tensor  # multiplies expert outputs
    logits_NE: Tensor  # before the score function, for the z-loss


class RoutingStats(NamedTuple):
    """Sums over this micro-batch's valid tokens, of one gating. Divide by the number of valid tokens of the global batch."""

    auxiliary: Tensor  # scalar, differentiable: sum over valid tokens of the balance loss of their scope
    z: Tensor  # scalar, differentiable: sum over valid tokens of logsumexp(logits)^2
    load_E: Tensor  # int64: selected pairs of valid tokens per expert, before drops
    num_dropped: Tensor  # int64 scalar: pairs dropped by capacity, all tokens


class Routing(NamedTuple):
    """Which token goes to which expert: made once per forward, saved, never recomputed.

    Pairs are sorted by token, then by rank of choice. Dropped pairs are absent.
    """

    token_P: Tensor  # int64
    expert_P: Tensor  # int64, global expert number
    level_P: Tensor | None  # int64; None: every pair has level 0
    weight_P: Tensor  # differentiable combine weight
    count_EL: Tensor  # int64 [E, L], kept pairs per expert and level
    stats: RoutingStats
    pairs_per_token: int | None = None  # of every token; None: capacity may have dropped some

    def split(self, sizes: list[int]) -> list["Routing"]:
        """The routing of each run of `sizes[c]` consecutive tokens, numbered from 0 in each; together all N tokens.

        Every part carries the stats of the whole. Where capacity may have dropped pairs, more than one run waits for the device once.
        """
        if len(sizes) == 1:
            return [self]
        starts = [sum(sizes[:chunk]) for chunk in range(len(sizes))]
        if self.pairs_per_token is None:
            first = torch.searchsorted(self.token_P, torch.tensor(starts, device=self.token_P.device)).tolist()
        else:
            first = [start * self.pairs_per_token for start in starts]
        cuts = list(zip(starts, first, [*first[1:], self.token_P.numel()], strict=True))
        return [self._part(token, slice(begin, end)) for token, begin, end in cuts]

    def _part(self, first_token: int, pairs: slice) -> "Routing":
        expert_P = self.expert_P[pairs]
        level_P = None if self.level_P is None else self.level_P[pairs]
        num_experts, num_levels = self.count_EL.shape
        count_EL = count_pairs(expert_P, num_experts, level_P, num_levels)
        weight_P = self.weight_P[pairs]
        return Routing(self.token_P[pairs] - first_token, expert_P, level_P, weight_P, count_EL, self.stats, self.pairs_per_token)


Exchange = Callable[[Tensor], Tensor]
"""Sum of a small tensor over the ranks that share a batch; the identity in one process."""


def alone(x: Tensor) -> Tensor:
    """The exchange of one process."""
    return x


@dataclass
class RoutingContext:
    """What a policy may know beside the scores. `shape_BS` gives the sequences the N = B*S flat tokens came from."""

    shape_BS: tuple[int, int]
    valid_N: Tensor | None = None  # bool; None: all valid. Invalid tokens are routed but not counted
    exchange: Exchange = alone
    dropless: bool = False  # ignore the capacity
    carried_load_E: Tensor | None = None  # global loads of this step's earlier micro-batches, of one gating (scope global_batch)
    taken: Routing | None = None  # a choice made before for the same tokens: they must not take its experts again


def count_pairs(expert_P: Tensor, num_experts: int, level_P: Tensor | None = None, num_levels: int = 1) -> Tensor:
    """int64 [E, L]: pairs per expert and level."""
    cell_P = expert_P if level_P is None else expert_P * num_levels + level_P
    return tally(cell_P, num_experts * num_levels).view(num_experts, num_levels)


def tally(cell_P: Tensor, num_cells: int) -> Tensor:
    """int64 [num_cells]: how often each occurs. Never waits for a GPU, as torch.bincount does."""
    return cell_P.new_zeros(num_cells).scatter_add_(0, cell_P, torch.ones_like(cell_P))
