"""Token-choice top-k with optional capacity. N tokens, E experts, K chosen per token, P kept pairs."""

import math

import torch
from torch import Tensor

from moetrain.routing.balance import routing_stats
from moetrain.routing.config import RoutingConfig
from moetrain.routing.types import GateScores, Routing, RoutingContext, count_pairs, tally


class TopK:
    """Every token takes its k best experts; beyond capacity an expert drops pairs (`drop_order`)."""

    def __init__(self, config: RoutingConfig) -> None:
        self.config = config

    def plan(self, scores: GateScores, context: RoutingContext) -> Routing:
        """Pure: the same inputs give the same routing on every rank."""
        config = self.config
        expert_NK = torch.topk(_free(scores.select_NE, context.taken), config.top_k, dim=1).indices
        weight_NK = self._weights(scores.combine_NE.gather(1, expert_NK))
        token_P = torch.arange(expert_NK.shape[0], device=expert_NK.device).repeat_interleave(config.top_k)
        expert_P, weight_P = expert_NK.flatten(), weight_NK.flatten()
        num_pairs = expert_P.numel()
        if config.capacity_factor is not None and not context.dropless:
            capacity = math.ceil(config.capacity_factor * num_pairs / config.num_experts)
            urgency_P = weight_P.detach() if config.drop_order == "probability" else -(token_P % context.shape_BS[1])
            kept_P = within_capacity(expert_P, urgency_P, capacity, config.num_experts).nonzero().squeeze(1)  # waits for the device
            token_P, expert_P, weight_P = token_P[kept_P], expert_P[kept_P], weight_P[kept_P]
        stats = routing_stats(scores, expert_NK, num_pairs - expert_P.numel(), config, context)
        per_token = config.top_k if expert_P.numel() == num_pairs else None
        return Routing(token_P, expert_P, None, weight_P, count_pairs(expert_P, config.num_experts), stats, per_token)

    def _weights(self, combine_NK: Tensor) -> Tensor:
        if self.config.softmax_order == "after":
            combine_NK = torch.softmax(combine_NK, dim=1)
        if self.config.renormalize:
            combine_NK = combine_NK / combine_NK.sum(1, keepdim=True)
        return combine_NK * self.config.weight_scale


def _free(select_NE: Tensor, taken: Routing | None) -> Tensor:
    """Scores without the experts that a token has already: the next choice steps in (DGMoE of arXiv 2404.05019)."""
    if taken is None:
        return select_NE
    return select_NE.index_put((taken.token_P, taken.expert_P), select_NE.new_full((), -math.inf))  # made on the device: no wait


def within_capacity(expert_P: Tensor, urgency_P: Tensor, capacity: int, num_experts: int) -> Tensor:
    """bool [P]: the `capacity` most urgent pairs of every expert; ties go to the earlier pair."""
    order_P = torch.argsort(urgency_P, descending=True, stable=True)
    order_P = order_P[torch.argsort(expert_P[order_P], stable=True)]
    count_E = tally(expert_P, num_experts)
    start_E = count_E.cumsum(0) - count_E
    place_P = torch.arange(expert_P.numel(), device=expert_P.device) - start_E[expert_P[order_P]]
    kept_P = torch.empty_like(expert_P, dtype=torch.bool)
    kept_P[order_P] = place_P < capacity
    return kept_P
