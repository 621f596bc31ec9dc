"""Keeping experts evenly used: auxiliary loss, z-loss, bias. N tokens, E experts, K chosen per token, B sequences of S tokens."""

import torch
from torch import Tensor

from moetrain.routing.config import RoutingConfig
from moetrain.routing.types import GateScores, RoutingContext, RoutingStats


def routing_stats(scores: GateScores, expert_NK: Tensor, num_dropped: int, config: RoutingConfig, context: RoutingContext) -> RoutingStats:
    """Loss sums and loads over the valid tokens of this micro-batch."""
    shape_BSE = *context.shape_BS, config.num_experts
    chosen_NE = torch.zeros_like(scores.value_NE, dtype=torch.int64).scatter_(1, expert_NK, 1)
    valid_N1 = torch.ones_like(chosen_NE[:, :1]) if context.valid_N is None else context.valid_N.to(torch.int64).unsqueeze(1)
    chosen_NE = chosen_NE * valid_N1
    load_E = chosen_NE.sum(0)
    value_NE = scores.value_NE * valid_N1
    if config.auxiliary_loss_weight == 0:
        auxiliary = value_NE.new_zeros(())
    elif config.auxiliary_loss_scope == "sequence":
        load_BE = chosen_NE.view(shape_BSE).sum(1)
        auxiliary = balance_sum(load_BE, value_NE.view(shape_BSE).sum(1))
    elif config.auxiliary_loss_scope == "micro_batch":
        auxiliary = balance_sum(load_E.unsqueeze(0), value_NE.sum(0, keepdim=True))
    else:
        shared_E = context.exchange(load_E.clone())
        if context.carried_load_E is not None:
            shared_E = shared_E + context.carried_load_E
        auxiliary = balance_sum(shared_E.unsqueeze(0), value_NE.sum(0, keepdim=True))
    z = value_NE.new_zeros(())
    if config.z_loss_weight:
        z = (torch.logsumexp(scores.logits_NE, dim=1).square() * valid_N1.squeeze(1)).sum()
    return RoutingStats(auxiliary, z, load_E, torch.tensor(num_dropped))


def merged(stats: list[RoutingStats]) -> RoutingStats:
    """Several gatings of one bank as one: loads and pairs are summed, losses averaged, so that a bank still counts 1 when balanced."""
    if len(stats) == 1:
        return stats[0]
    auxiliary, z = (torch.stack(losses).mean() for losses in ([s.auxiliary for s in stats], [s.z for s in stats]))
    load_E, num_dropped = (torch.stack(counts).sum(0) for counts in ([s.load_E for s in stats], [s.num_dropped for s in stats]))
    return RoutingStats(auxiliary, z, load_E, num_dropped)


def balance_sum(load_BE: Tensor, value_BE: Tensor) -> Tensor:
    """Balance loss of arXiv 2101.03961 eq. 4 (with k choices), summed over tokens: sum_b E * sum_e f_be * value_be.

    load_BE: selections per scope and expert (f is its share of the scope); value_BE: gate probabilities summed over the
    scope's tokens of this rank. Equals the number of tokens when balanced; a scope without tokens counts nothing.
    """
    share_BE = load_BE.to(value_BE.dtype) / load_BE.sum(1, keepdim=True).clamp(min=1)
    return load_BE.shape[1] * (share_BE * value_BE).sum()


def updated_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """The selection bias after a step with global loads `load_E`: overloaded experts go down by `rate`, underloaded up
    (arXiv 2408.15664 algorithm 1). Integer arithmetic decides the sign."""
    return bias_E + rate * torch.sign(load_E.sum() - load_E * load_E.numel()).to(bias_E.dtype)
