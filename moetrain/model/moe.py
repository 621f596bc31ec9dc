"""The routed half of a block: gate, dispatch, experts, combine, and the shared experts beside them. B, S, D as everywhere; N = B*S."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moetrain.model.config import SHARED_GATES, ModelConfig
from moetrain.model.context import ForwardContext
from moetrain.model.dispatch import Dispatcher, Ticket
from moetrain.model.experts import Experts, Visit
from moetrain.model.kinds import Kind
from moetrain.model.mlp import NormedSwiGLU, SwiGLU
from moetrain.model.norm import RMSNorm
from moetrain.model.recompute import run
from moetrain.routing.scores import gate_scores
from moetrain.routing.select import TopK
from moetrain.routing.types import Routing, RoutingContext


@dataclass
class Trip:
    """The rows of one gating, on their way to the experts and back: a ticket per token chunk."""

    routing: Routing  # of all chunks
    tickets: list[Ticket]
    visit: Visit  # of the bank


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

    def __init__(self, config: ModelConfig, bank: str, experts: tuple[int, ...], dispatcher: Dispatcher, kind: Kind, method: str) -> None:
        super().__init__()
        self.bank, self.dispatcher, self.policy, self.config = bank, dispatcher, TopK(config.routing), config.routing
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.router = Router(config)
        self.experts = Experts(bank, experts, config.hidden_size, config.expert_ffn_size, method)
        self.shared_gate: nn.Linear | None = None
        if kind.has_shared:
            sizes = config.hidden_size, config.num_shared_experts * config.shared_ffn_size
            self.shared = SwiGLU(*sizes) if kind.shares_norm else NormedSwiGLU(*sizes, config.norm_eps)
            if SHARED_GATES[config.shared_gate]:
                self.shared_gate = nn.Linear(config.hidden_size, SHARED_GATES[config.shared_gate], bias=False)

    def start(self, x_BSD: Tensor, num_chunks: int, context: ForwardContext, visit: Visit, taken: Routing | None = None) -> Trip:
        """Normed x_BSD routed and on its way, in `num_chunks` runs of consecutive tokens. `taken`: experts that a token must not choose."""
        x_ND = x_BSD.flatten(0, 1)
        routing = self.route(x_ND, (x_BSD.shape[0], x_BSD.shape[1]), context, taken)
        sizes = chunk_sizes(x_ND.shape[0], num_chunks)
        parts = routing.split(sizes)
        counts = self.dispatcher.announce(parts)
        chunks_ND = x_ND.split(sizes) if num_chunks > 1 else [x_ND]
        return Trip(routing, [self.dispatcher.send(*each) for each in zip(chunks_ND, parts, counts, strict=True)], visit)

    def route(self, x_ND: Tensor, shape_BS: tuple[int, int], context: ForwardContext, taken: Routing | None = None) -> Routing:
        scores = gate_scores(self.router(x_ND), self.config, self.router.balance_bias)
        valid_N = None if context.valid_BS is None else context.valid_BS.flatten()
        carried_E = context.carried_load.get(self.bank)
        return self.policy.plan(scores, RoutingContext(shape_BS, valid_N, context.exchange, context.dropless, carried_E, taken))

    def compute(self, trip: Trip, chunk: int, name: str, context: ForwardContext) -> None:
        """Waits for the rows of a chunk, runs the experts, sends the results back. `name`: of the block, for the timer."""
        rows_RD, count_e = self.dispatcher.receive(trip.tickets[chunk])
        call = partial(self.experts, call=trip.visit.next(), shares_copies=not context.recompute)  # what is recomputed is not kept
        experts = partial(run, call, recompute=context.recompute)
        rows_RD = context.timer(f"{name}/experts", experts, rows_RD, count_e)
        trip.tickets[chunk] = self.dispatcher.send_back(rows_RD, trip.tickets[chunk])

    def finish(self, trip: Trip, like_BSD: Tensor) -> Tensor:
        """Waits for the results; the routed update in the shape of `like_BSD`."""
        chunks_ND = [self.dispatcher.combine(ticket) for ticket in trip.tickets]
        y_ND = torch.cat(chunks_ND) if len(chunks_ND) > 1 else chunks_ND[0]
        return y_ND.view(like_BSD.shape).to(like_BSD.dtype)

    def shared_update(self, x_BSD: Tensor, name: str, context: ForwardContext) -> tuple[Tensor, Tensor | None]:
        """The shared experts on x_BSD (before their own norm, if they have one), weighted by the gate, and the weight [B, S, 1] of the
        routed experts (None: 1). Direct add, CG-1 and CG-2 of arXiv 2404.05019 section 3.2.
        """
        shared: Callable[..., Tensor] = self.shared
        if self.shared_gate is not None and isinstance(self.shared, NormedSwiGLU):
            x_BSD, shared = self.shared.norm(x_BSD), partial(self.shared, is_normed=True)  # once, for the gate too
        update_BSD = context.timer(f"{name}/shared", partial(run, shared, recompute=context.recompute), x_BSD)
        if self.shared_gate is None:
            return update_BSD, None
        gate = self.shared_gate(x_BSD)
        if gate.shape[-1] == 1:
            return torch.sigmoid(gate) * update_BSD, None
        shared_BS1, routed_BS1 = torch.softmax(gate, dim=-1).split(1, dim=-1)
        return shared_BS1 * update_BSD, routed_BS1


def chunk_sizes(num_tokens: int, num_chunks: int) -> list[int]:
    """Sizes of consecutive runs that differ by one at most; zero where there are fewer tokens than chunks."""
    ends = [num_tokens * (chunk + 1) // num_chunks for chunk in range(num_chunks)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
