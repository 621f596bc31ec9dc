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
    """Sums over this micro-batch's valid tokens, of one layer. Divide by the number of valid tokens of the global batch."""

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
    carried_load_E: Tensor | None = None  # global loads of this step's earlier micro-batches (scope global_batch)


def count_pairs(expert_P: Tensor, num_experts: int) -> Tensor:
    """int64 [E, 1]: pairs per expert, level 0."""
    return torch.bincount(expert_P, minlength=num_experts).unsqueeze(1)
