"""The unit of tools/bench_overlap.py: forward and backward of block pairs on one rank, without embedding, update or gradient reduction.

B sequences, S tokens, N = B*S, D hidden, E experts, K chosen. Inputs are embeddings of tokens as frequent as words are (Zipf), the same
token the same vector: a young gate on real text, uneven as such a gate is. Routing is decided once for all arms: the null arm moves wrong
bytes, and a gate that read them would send others.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetrain.dist.mesh import Axis
from moetrain.model.attention import AttentionInputs
from moetrain.model.blocks import RoutedBlock
from moetrain.model.context import ForwardContext, Timer, untimed
from moetrain.model.experts import Experts
from moetrain.model.gpt import GPT, BankSite
from moetrain.model.init import initial
from moetrain.model.moe import MoE
from moetrain.model.schedule import Schedule
from moetrain.parallel.alltoall import AllToAllDispatcher
from moetrain.routing.config import RoutingConfig
from moetrain.routing.placement import Placement
from moetrain.routing.select import TopK
from moetrain.routing.types import GateScores, Routing, RoutingContext
from tools.overlap_cases import NUM_WORDS, REST, Size, model_of

AUXILIARY_WEIGHT = 0.01


@dataclass
class Lap:
    """One forward and backward: seconds, and seconds of CPU of the whole process, the transport's threads included."""

    forward: float
    backward: float
    forward_cpu: float
    backward_cpu: float

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


class Decided(TopK):
    """The experts' choice as decided, at the cost and with the weights of the gate's own."""

    def __init__(self, config: RoutingConfig, select_NE: Tensor) -> None:
        super().__init__(config)
        self.select_NE = select_NE

    def plan(self, scores: GateScores, context: RoutingContext) -> Routing:
        return super().plan(scores._replace(select_NE=self.select_NE), context)


class Noted(TopK):
    """The gate's own choice, noted."""

    def __init__(self, config: RoutingConfig, notes: list[Tensor]) -> None:
        super().__init__(config)
        self._notes = notes

    def plan(self, scores: GateScores, context: RoutingContext) -> Routing:
        self._notes.append(scores.select_NE.detach().clone())
        return super().plan(scores, context)


def balanced(num_tokens: int, num_experts: int, top_k: int) -> Tensor:
    """[N, E] that chooses every expert equally often; neighbours go to other experts."""
    first_N1 = torch.arange(num_tokens).unsqueeze(1) * top_k
    choice_NK = (first_N1 + torch.arange(top_k)) % num_experts
    return torch.zeros(num_tokens, num_experts).scatter_(1, choice_NK, torch.arange(top_k, 0, -1).float().expand(num_tokens, -1))


class Unit:
    """One model's blocks. `axis` None: all experts are here, the one-process twin."""

    def __init__(self, model: str, size: Size, axis: Axis | None, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.size, self.dtype = model, size, dtype
        self.config = model_of(model, size)
        placement = Placement.balanced(size.experts, 1 if axis is None else axis.size)
        site = None if axis is None else BankSite(placement.experts[axis.index], AllToAllDispatcher(axis, placement))
        self.gpt = GPT(self.config, None if site is None else lambda bank: site).to(dtype)
        self.blocks = self.gpt.blocks
        self.routed = [block for block in self.blocks if isinstance(block, RoutedBlock)]
        self.layers = [module for module in self.gpt.modules() if isinstance(module, MoE)]
        self.decided = list[Tensor]()  # [N, E] for each layer
        fill(self.gpt)

    def schedule(self, slots: tuple[int, ...]) -> None:
        for block in self.routed:
            block.schedule = Schedule(slots)

    def window_names(self) -> list[list[str]]:
        """What the timer calls the computations that exchanges may hide under: by number, those of all blocks."""
        numbers = zip(*(block.operators for block in self.routed), strict=True)
        return [[f"{block.name}/{operator}" for block, operator in zip(self.routed, its, strict=True)] for its in numbers]

    def decide(self, evenly: bool, rank: int) -> None:
        """Routing from here on: every expert equally, or as the gates choose now. The latter runs a forward pass."""
        routing, notes = self.config.routing, list[Tensor]()
        if evenly:
            notes = [balanced(self.size.tokens, self.size.experts, routing.top_k).to(self.dtype) for _ in self.layers]
        else:
            for layer in self.layers:
                layer.policy = Noted(routing, notes)
            with torch.no_grad():
                self.forward(self.inputs(rank), untimed)
        self.follow(notes)

    def follow(self, decided: list[Tensor]) -> None:
        """Routes by these choices, one for each layer."""
        self.decided = decided
        for layer, select_NE in zip(self.layers, decided, strict=True):
            layer.policy = Decided(self.config.routing, select_NE)

    def busiest(self) -> float:
        """Pairs of this rank at its busiest expert over the even share; the worst layer."""
        chosen = [select_NE.topk(self.config.routing.top_k).indices.flatten() for select_NE in self.decided]
        loads = [torch.bincount(choice, minlength=self.size.experts) for choice in chosen]
        return max(float(load.max() / load.sum()) * self.size.experts for load in loads)

    def inputs(self, rank: int) -> Tensor:
        """h_BSD of a rank: word vectors, words drawn by Zipf's law."""
        generator = torch.Generator().manual_seed(rank)
        vectors = torch.randn(NUM_WORDS, self.size.hidden, generator=torch.Generator().manual_seed(99))
        words = torch.multinomial(1 / torch.arange(1.0, NUM_WORDS + 1), self.size.tokens, replacement=True, generator=generator)
        return vectors[words].view(self.size.sequences, self.size.seq_len, -1).to(self.dtype)

    def pull(self, rank: int) -> Tensor:
        """The gradient of the output."""
        shape = self.size.sequences, self.size.seq_len, self.size.hidden
        return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + rank)).to(self.dtype)

    def forward(self, h_BSD: Tensor, timer: Timer) -> tuple[Tensor, Tensor]:
        """Output and the sum of balance losses."""
        context = ForwardContext(timer=timer)
        inputs = AttentionInputs.of(self.config, context, (h_BSD.shape[0], h_BSD.shape[1]), h_BSD.device)
        auxiliary = h_BSD.new_zeros(())
        for block in self.blocks:
            h_BSD, stats = block(h_BSD, inputs, context)
            auxiliary = auxiliary + sum(one.auxiliary for one in stats)
        return h_BSD, auxiliary

    def rest(self, h_BSD: Tensor, timer: Timer) -> tuple[Tensor, Tensor]:
        """The same without experts."""
        context = ForwardContext()
        inputs = AttentionInputs.of(self.config, context, (h_BSD.shape[0], h_BSD.shape[1]), h_BSD.device)
        for block in self.blocks:
            h_BSD = h_BSD + block.attention(h_BSD, inputs) if isinstance(block, RoutedBlock) else block(h_BSD, inputs, context)[0]
        return h_BSD, h_BSD.new_zeros(())

    def lap(
        self, rank: int, barrier: Callable[[], None], arm: str = "", timer: Timer = untimed, between: Callable[[], None] = lambda: None
    ) -> Lap:
        """Runs once; gradients are left in the parameters. `between` runs after the forward pass and is not timed."""
        self.gpt.zero_grad()
        h_BSD, pull_BSD = self.inputs(rank).requires_grad_(), self.pull(rank)
        forward = self.rest if arm == REST else self.forward
        gc.collect()
        gc.disable()
        barrier()
        start = _marks()
        output_BSD, auxiliary = forward(h_BSD, timer)
        middle = _marks()
        between()
        again = _marks()
        ((output_BSD * pull_BSD).sum() + AUXILIARY_WEIGHT * auxiliary).backward()
        end = _marks()
        gc.enable()
        self.output_BSD = output_BSD.detach()
        return Lap(middle[0] - start[0], end[0] - again[0], middle[1] - start[1], end[1] - again[1])

    def gradients(self) -> dict[str, Tensor]:
        """By name, those that are there; experts of this rank stacked."""
        return {name: parameter.grad.clone() for name, parameter in self.gpt.named_parameters() if parameter.grad is not None}


def _marks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def fill(gpt: GPT) -> None:
    """Initial values by name and expert: the same model on every rank, and in one process."""
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            owner = gpt.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, Experts):
                for slot, expert in enumerate(owner.experts):
                    parameter[slot].copy_(initial(name, expert, tuple(parameter.shape[1:]), gpt.config, 0))
            else:
                parameter.copy_(initial(name, None, tuple(parameter.shape), gpt.config, 0))


def reference_error(model: str, size: Size, axis: Axis, evenly: bool, slots: tuple[int, ...]) -> float:
    """The largest relative error (norm of the difference over norm) of this rank's output and gradients, against float64 in one process."""
    unit = Unit(model, replace(size, sequences=1), axis)
    unit.schedule(slots)
    unit.decide(evenly, axis.index)
    unit.lap(axis.index, lambda: axis.world.barrier("check"))
    exact = Unit(model, unit.size, None, torch.float64)
    wanted: dict[str, Tensor] = {}
    for rank in range(axis.size):
        exact.follow([_of_rank(select_NE, axis, rank).double() for select_NE in unit.decided])
        exact.lap(rank, lambda: None)
        for name, gradient in exact.gradients().items():
            if ".experts." in name:
                wanted[name] = wanted.get(name, 0) + gradient
            elif rank == axis.index:
                wanted[name] = gradient
        if rank == axis.index:
            update = exact.output_BSD - exact.inputs(rank)
    mine = torch.tensor(Placement.balanced(size.experts, axis.size).experts[axis.index])
    errors = [relative(unit.output_BSD - unit.inputs(axis.index), update)]
    for name, gradient in unit.gradients().items():
        errors.append(relative(gradient, wanted[name][mine] if ".experts." in name else wanted[name]))
    return max(errors)


def _of_rank(select_NE: Tensor, axis: Axis, rank: int) -> Tensor:
    """What that rank decided, on every rank of a world that is this axis."""
    mine = select_NE.float() if rank == axis.index else torch.zeros_like(select_NE, dtype=torch.float32)
    return axis.sum_(mine.clone())


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))
