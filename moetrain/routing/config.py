"""How tokens choose experts, as configuration. No torch."""

import math
from dataclasses import dataclass

from moetrain.base.errors import ConfigError, one_of

SCORES = ("softmax", "sigmoid")
ORDERS = ("before", "after")
SCOPES = ("sequence", "micro_batch", "global_batch")
DROPS = ("probability", "position")


@dataclass
class RoutingConfig:
    """The gate of every MoE layer. Scores are computed in float32 (float64 in a float64 model)."""

    num_experts: int = 8  # routed experts per MoE layer
    top_k: int = 1  # experts chosen per token
    score: str = "softmax"  # softmax | sigmoid
    softmax_order: str = "before"  # softmax over all experts before the selection, or over the selected after it
    renormalize: bool = False  # divide the selected weights by their sum
    weight_scale: float = 1.0  # multiplies the combine weights (DeepSeek-V3's routed scaling factor)
    auxiliary_loss_weight: float = 0.01  # load-balance loss, arXiv 2101.03961 eq. 4, added per MoE layer; 0 = off
    auxiliary_loss_scope: str = "micro_batch"  # tokens over which balance is asked: sequence | micro_batch | global_batch
    z_loss_weight: float = 0.0  # router z-loss, arXiv 2202.08906 eq. 5; 0 = off
    bias_update_rate: float = 0.0  # bias balancing without a loss, arXiv 2408.15664; 0 = off
    capacity_factor: float | None = None  # rows an expert takes per rank and micro-batch / its fair share; null = dropless
    drop_order: str = "probability"  # who is dropped beyond capacity: the lowest score, or the last position in its sequence

    def check(self, key: str = "model.routing") -> None:
        """Raises ConfigError, naming the key under `key`."""
        one_of(f"{key}.score", self.score, SCORES)
        one_of(f"{key}.softmax_order", self.softmax_order, ORDERS)
        one_of(f"{key}.auxiliary_loss_scope", self.auxiliary_loss_scope, SCOPES)
        one_of(f"{key}.drop_order", self.drop_order, DROPS)
        if self.num_experts < 1:
            raise ConfigError.of(f"{key}.num_experts", self.num_experts, "at least one expert is needed")
        if not 1 <= self.top_k <= self.num_experts:
            rule = f"it must lie between 1 and num_experts={self.num_experts}"
            raise ConfigError.of(f"{key}.top_k", self.top_k, rule)
        for name in ("auxiliary_loss_weight", "z_loss_weight", "bias_update_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError.of(f"{key}.{name}", getattr(self, name), "it must not be negative", "Use 0 to switch it off.")
        if not 0 < self.weight_scale < math.inf:
            raise ConfigError.of(f"{key}.weight_scale", self.weight_scale, "it must be positive", "Use 1 for off.")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            rule = "it must be positive, or null for dropless routing"
            raise ConfigError.of(f"{key}.capacity_factor", self.capacity_factor, rule)
        if self.score == "sigmoid" and self.softmax_order == "after":
            rule = "there is no softmax to place when model.routing.score=sigmoid"
            raise ConfigError.of(f"{key}.softmax_order", self.softmax_order, rule, "Use softmax_order=before.")
        if self.softmax_order == "after" and self.top_k == 1:
            rule = "a softmax over one selected expert is the constant 1 and gives the gate no gradient"
            raise ConfigError.of(f"{key}.softmax_order", self.softmax_order, rule, "Use softmax_order=before with top_k=1.")
        if self.renormalize and self.top_k == 1:
            rule = "one selected weight divided by itself is the constant 1 and gives the gate no gradient"
            raise ConfigError.of(f"{key}.renormalize", self.renormalize, rule, "Use renormalize=false with top_k=1.")
