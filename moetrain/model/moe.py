"""The routed half of a block: gate, dispatch, experts, combine, and the shared expert beside them. B, S, D as everywhere; N = B*S."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moetrain.model.config import ModelConfig
from moetrain.model.context import ForwardContext
from moetrain.model.dispatch import Dispatcher, Ticket
from moetrain.model.experts import Experts
from moetrain.model.mlp import NormedSwiGLU, SwiGLU
from moetrain.model.norm import RMSNorm
from moetrain.model.recompute import run
from moetrain.routing.scores import gate_scores
from moetrain.routing.select import TopK
from moetrain.routing.types import Routing, RoutingContext, RoutingStats


class Router(nn.Module):
    """Linear gate, computed in float32 (float64 in a float64 model) whatever autocast says."""

    balance_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.routing.num_experts, config.hidden_size))
        balanced = config.routing.bias_update_rate > 0
        self.register_buffer("balance_bias", torch.zeros(config.routing.num_experts) if balanced else None)

    def forward(self, x_ND: Tensor) -> Tensor:
        dtype = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
        with torch.autocast(x_ND.device.type, enabled=False):
            return linear(x_ND.to(dtype), self.weight.to(dtype))


class MoE(nn.Module):
    """`start` sends rows to their experts, `compute` runs the experts, `finish` combines. What stands between them overlaps."""

    def __init__(self, config: ModelConfig, bank: str, experts: tuple[int, ...], dispatcher: Dispatcher, shared: str, method: str) -> None:
        """shared: "none" | "same_norm" (reads the gate's input) | "own_norm" (reads another stream, as in ScMoE)."""
        super().__init__()
        self.bank, self.dispatcher, self.policy, self.config = bank, dispatcher, TopK(config.routing), config.routing
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.router = Router(config)
        self.experts = Experts(bank, experts, config.hidden_size, config.expert_ffn_size, method)
        self.shared_gate: nn.Linear | None = None
        if shared != "none":
            sizes = config.hidden_size, config.shared_ffn_size
            self.shared = NormedSwiGLU(*sizes, config.norm_eps) if shared == "own_norm" else SwiGLU(*sizes)
            if config.shared_gate == "cg1":
                self.shared_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def start(self, x_BSD: Tensor, context: ForwardContext) -> tuple[Ticket, RoutingStats]:
        """Normed x_BSD routed and on its way."""
        x_ND = x_BSD.flatten(0, 1)
        routing = self.route(x_ND, (x_BSD.shape[0], x_BSD.shape[1]), context)
        return self.dispatcher.send(x_ND, routing, self.dispatcher.announce(routing)), routing.stats

    def route(self, x_ND: Tensor, shape_BS: tuple[int, int], context: ForwardContext) -> Routing:
        scores = gate_scores(self.router(x_ND), self.config, self.router.balance_bias)
        valid_N = None if context.valid_BS is None else context.valid_BS.flatten()
        carried_E = context.carried_load.get(self.bank)
        return self.policy.plan(scores, RoutingContext(shape_BS, valid_N, context.exchange, context.dropless, carried_E))

    def compute(self, ticket: Ticket, context: ForwardContext) -> Ticket:
        """Waits for the rows, runs the experts, sends the results back."""
        rows_RD, count_e = self.dispatcher.receive(ticket)
        return self.dispatcher.send_back(run(self.experts, rows_RD, count_e, recompute=context.recompute), ticket)

    def finish(self, ticket: Ticket, like_BSD: Tensor) -> Tensor:
        """Waits for the results; the routed update in the shape of `like_BSD`."""
        return self.dispatcher.combine(ticket).view(like_BSD.shape).to(like_BSD.dtype)

    def shared_update(self, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        """The shared expert on x_BSD (before its own norm, if it has one), times its gate (CG-1 of arXiv 2404.05019) if there is one."""
        update_BSD = run(self.shared, x_BSD, recompute=context.recompute)
        if self.shared_gate is None:
            return update_BSD
        gate_input = self.shared.norm(x_BSD) if isinstance(self.shared, NormedSwiGLU) else x_BSD
        return torch.sigmoid(self.shared_gate(gate_input)) * update_BSD
