"""Blocks: a dense one, and one with routed experts for every other kind. Each maps (h, inputs, context) to (h, stats of its gatings).

The overlap is the order of the calls: rows leave when the shortcut tensor exists, the experts of each chunk run in their slot, results are
added at the end. B sequences, S tokens, D hidden.
"""

from functools import partial

from torch import Tensor, nn

from moetrain.model.attention import Attention, AttentionInputs
from moetrain.model.config import ModelConfig
from moetrain.model.context import ForwardContext
from moetrain.model.experts import Visit
from moetrain.model.kinds import Place
from moetrain.model.mlp import NormedSwiGLU
from moetrain.model.moe import MoE, Trip
from moetrain.model.recompute import run
from moetrain.model.schedule import Schedule
from moetrain.routing.types import RoutingStats

BlockOutput = tuple[Tensor, list[RoutingStats]]


class DenseBlock(nn.Module):
    """Attention, then a SwiGLU MLP. `name` is the prefix of what the context's timer is told."""

    def __init__(self, config: ModelConfig, layer: int, name: str) -> None:
        super().__init__()
        self.name = name
        self.attention = Attention(config, layer)
        self.mlp = NormedSwiGLU(config.hidden_size, config.ffn_size, config.norm_eps)

    def forward(self, h_BSD: Tensor, inputs: AttentionInputs, context: ForwardContext) -> BlockOutput:
        attention = context.timer(f"{self.name}/attention", lambda h: run(self.attention, h, inputs, recompute=context.recompute), h_BSD)
        h_BSD = h_BSD + attention
        return h_BSD + context.timer(f"{self.name}/mlp", partial(run, self.mlp, recompute=context.recompute), h_BSD), []


class RoutedBlock(nn.Module):
    """A main stream with a shortcut to routed experts (arXiv 2404.05019 section 3); the kind says which (`model/kinds.py`).

    `schedule` may be replaced between steps: it says when the experts run, not what they compute. `operators` are the computations it
    counts. `name` is the prefix of what the context's timer is told.
    """

    moe: MoE

    def __init__(self, config: ModelConfig, place: Place, moe: MoE) -> None:
        """`moe` is this block's own, or that of an earlier pair (DGMoE-Share)."""
        super().__init__()
        if place.kind.is_pair:
            self.dense = DenseBlock(config, place.layer, place.name)
        self.attention = Attention(config, place.layer + place.kind.layers - 1)
        if place.owns_bank:
            self.moe = moe
        else:
            self.__dict__["moe"] = moe  # not registered: shared parameters are named once, by the first pair
        self.name, self.before, self.operators = place.name, place.before, place.operators
        self.gates_again, self.distinct = place.kind.gatings == 2, config.shortcut.distinct
        self.shares_norm = place.kind.shares_norm
        self.schedule = Schedule.default(len(self.operators))

    def forward(self, h_BSD: Tensor, inputs: AttentionInputs, context: ForwardContext) -> BlockOutput:
        assert self.schedule.slots[-1] <= len(self.operators) + 1, f"{self.name} has no slot {self.schedule.slots[-1]}"
        for name in self.before:
            h_BSD = h_BSD + self._update(name, h_BSD, inputs, context)
        x_BSD = self.moe.norm(h_BSD)
        visit = Visit(self.schedule.num_chunks * (2 if self.gates_again else 1))
        trip = self.moe.start(x_BSD, self.schedule.num_chunks, context, visit)
        weight = None
        for slot, name in enumerate(self.operators, start=1):
            self._experts(trip, slot, context)
            if name == "shared":
                update, weight = self.moe.shared_update(x_BSD if self.shares_norm else h_BSD, self.name, context)
            else:
                update = self._update(name, h_BSD, inputs, context)
            h_BSD = h_BSD + update
        trips = [trip]
        if self.gates_again:
            trips.append(self._second_choice(h_BSD, trip, context))
        self._experts(trip, len(self.operators) + 1, context)
        return self._combined(h_BSD, trips, weight, context)

    def _update(self, name: str, h_BSD: Tensor, inputs: AttentionInputs, context: ForwardContext) -> Tensor:
        """One computation of the main stream, all but the shared expert."""
        timed = f"{self.name}/{name}"
        if name == "mlp":
            return context.timer(timed, partial(run, self.dense.mlp, recompute=context.recompute), h_BSD)
        attention = self.dense.attention if name == "dense_attention" else self.attention
        return context.timer(timed, lambda h: run(attention, h, inputs, recompute=context.recompute), h_BSD)

    def _experts(self, trip: Trip, slot: int, context: ForwardContext) -> None:
        for chunk in self.schedule.chunks_at(slot):
            self.moe.compute(trip, chunk, self.name, context)

    def _second_choice(self, h_BSD: Tensor, first: Trip, context: ForwardContext) -> Trip:
        """DGMoE: the current token chooses too, and not what its shortcut has."""
        taken = first.routing if self.distinct else None
        return self.moe.start(self.moe.norm(h_BSD), self.schedule.num_chunks, context, first.visit, taken)

    def _combined(self, h_BSD: Tensor, trips: list[Trip], weight: Tensor | None, context: ForwardContext) -> BlockOutput:
        """The stream with what the experts say; `weight` is the routed half of a two-way gate. A second trip's experts run here."""
        for trip in trips[1:]:
            for chunk in range(self.schedule.num_chunks):
                self.moe.compute(trip, chunk, self.name, context)
        for trip in trips:
            update_BSD = self.moe.finish(trip, h_BSD)
            h_BSD = h_BSD + (update_BSD if weight is None else weight * update_BSD)
        return h_BSD, [trip.routing.stats for trip in trips]
