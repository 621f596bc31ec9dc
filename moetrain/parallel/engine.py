"""The native engine: one sharded model, its optimizer, and one step of both. Also the protocol every engine follows."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moetrain.base.errors import TrainingError
from moetrain.data.batch import Batch
from moetrain.dist.mesh import Mesh
from moetrain.dist.world import World
from moetrain.model.config import ModelConfig
from moetrain.model.context import ForwardContext
from moetrain.model.gpt import GPT, BankSite, GPTOutput, meta_model
from moetrain.model.init import fill
from moetrain.model.state import ModelState
from moetrain.optim.adamw import AdamW, NamedParameter
from moetrain.optim.clip import clip_gradients
from moetrain.optim.config import OptimConfig
from moetrain.parallel.alltoall import AllToAllDispatcher
from moetrain.parallel.apply import apply_compile, apply_fsdp, fsdp_modules
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.parallel.fragments import bank_of, local, model_state
from moetrain.parallel.gradients import GradientSync, shard_kind
from moetrain.parallel.precision import autocast_dtype
from moetrain.routing.balance import updated_bias
from moetrain.routing.placement import Placement
from moetrain.routing.types import RoutingStats


@dataclass
class StepResult:
    """One optimizer step, already summed over ranks and micro-batches."""

    loss: float  # cross-entropy, nats per valid token
    auxiliary_loss: float  # mean over MoE layers; 1 when balanced
    z_loss: float  # mean over MoE layers
    grad_norm: float  # before clipping
    lr: float
    num_tokens: int  # valid tokens
    load: Tensor  # int64 [layers, E], valid tokens' selections
    num_dropped: int  # pairs dropped by capacity
    num_pairs: int  # pairs kept or dropped
    seconds: float  # of the step itself, from the first forward to the end of the update


class LossSums(NamedTuple):
    """Of one evaluation batch, summed over ranks."""

    nats: float
    num_tokens: int


class NonFiniteError(TrainingError):
    """A loss or gradient that is not finite; the parameters are those before the step."""


class Engine(Protocol):
    """What the loop needs of native PyTorch, DeepSpeed or Megatron-Core alike."""

    def step(self, batches: list[Batch], lr: float, before_update: Callable[[], None]) -> StepResult:
        """One optimizer step over this rank's micro-batches. `before_update` is called once, after the last backward and
        before clip and update: until it returns, parameters and optimizer state do not change. Raises NonFiniteError."""
        ...

    def evaluate(self, batch: Batch) -> LossSums: ...

    def state(self) -> ModelState:
        """Views into live state, no copies."""
        ...

    def load(self, state: ModelState) -> None:
        """Called after the fragments of `state()` were filled in place: refreshes whatever is derived from them."""
        ...

    def generate(self, prompt: list[int], num_tokens: int, seed: int) -> list[int]:
        """A sample from the model as it stands, the same on all ranks; every rank calls it."""
        ...


class TorchEngine:
    """FSDP2 or replication for dense parameters, expert parallelism by all-to-all, AdamW with a step per expert."""

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, engine: EngineConfig, optim: OptimConfig, world: World, mesh: Mesh) -> None:
        self.config, self.optim, self.world, self.mesh = model, optim, world, mesh
        self.recompute = engine.recompute
        self.autocast = autocast_dtype(engine, world)
        self.model = self._sharded_model(parallel, engine)
        self.optimizer = AdamW([self._named(name, parameter) for name, parameter in self.model.named_parameters()], optim)
        self.gradients = GradientSync(self.model, mesh)

    def _sharded_model(self, parallel: ParallelConfig, engine: EngineConfig) -> GPT:
        placement = Placement.balanced(self.config.routing.num_experts, self.mesh.ep.size, parallel.placement_seed)
        site = BankSite(placement.experts[self.mesh.ep.index], AllToAllDispatcher(self.mesh.ep, placement))
        model = meta_model(self.config, lambda bank: site, engine.experts).to(getattr(torch, engine.dtype))
        if engine.compile:
            apply_compile(model)
        if parallel.dense == "fsdp" and self.world.size > 1:
            apply_fsdp(model, self.mesh)
        return model.to_empty(device=self.world.device)

    def _named(self, name: str, parameter: torch.nn.Parameter) -> NamedParameter:
        bank = bank_of(name, self.model)
        decay = parameter.ndim > 1 and not name.endswith("norm.weight")
        return NamedParameter(name, parameter, None if bank is None else bank.bank, decay)

    def initialize(self, seed: int) -> None:
        """Fills parameters (by seed, name and expert) and clears the optimizer."""
        with torch.no_grad():
            for fragment in self.state():
                fill(fragment, self.config, seed)

    def step(self, batches: list[Batch], lr: float, before_update: Callable[[], None]) -> StepResult:
        started = time.perf_counter()
        sums = StepSums(self.config, self.world)
        total = sums.count_tokens(batches)
        for number, batch in enumerate(batches):
            self._sync_gradients(number == len(batches) - 1)
            self._backward(batch, total, sums)
        before_update()
        self.gradients.reduce()
        sums.reduce()
        grad_norm = clip_gradients(self.gradients.shards(), self.optim.grad_clip, self.mesh)
        sums.raise_unless_finite(grad_norm)
        self.optimizer.step(lr)
        self.optimizer.zero_grad()
        self._update_bias(sums.load)
        return sums.result(grad_norm, lr, self.config.routing.top_k, time.perf_counter() - started)

    def _backward(self, batch: Batch, total: int, sums: "StepSums") -> None:
        """Forward and backward of one micro-batch; its share of the global loss is its sum / total."""
        context = self._context(batch, dict(zip(self.config.banks(), sums.carried_load, strict=True)))
        output = self._forward(batch, context)
        nats = loss_sum(output.logits_BSV, batch)
        routing = self.config.routing
        loss = nats
        for stats in output.stats:
            loss = loss + routing.auxiliary_loss_weight * stats.auxiliary + routing.z_loss_weight * stats.z
        with self.world.watch.operation("the backward pass"):
            (loss / max(total, 1)).backward()
        sums.add(nats, batch, output.stats)

    def _forward(self, batch: Batch, context: ForwardContext) -> GPTOutput:
        """Named for the watch as a whole: FSDP2 makes its own collectives in it."""
        autocast = torch.autocast(self.world.device.type, dtype=self.autocast, enabled=self.autocast is not None)
        with self.world.watch.operation("the forward pass"), autocast:
            return self.model(batch.tokens_BS, context)

    def _context(self, batch: Batch, carried_load: dict[str, Tensor]) -> ForwardContext:
        return ForwardContext(
            position_BS=batch.position_BS,
            document_BS=batch.document_BS,
            valid_BS=batch.valid_BS,
            exchange=self.world.sum_,
            carried_load=carried_load,
            recompute=self.recompute,
        )

    def _sync_gradients(self, last: bool) -> None:
        """FSDP2 reduces gradients in the last micro-batch's backward only."""
        for module in fsdp_modules(self.model):
            module.set_requires_gradient_sync(last, recurse=False)
            module.set_is_last_backward(last)

    def _update_bias(self, load_LE: Tensor) -> None:
        rate = self.config.routing.bias_update_rate
        if rate:
            routers = [module for name, module in self.model.named_modules() if name.endswith("moe.router")]
            for router, load_E in zip(routers, load_LE, strict=True):
                router.balance_bias.copy_(updated_bias(router.balance_bias, load_E, rate))

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> LossSums:
        output = self._forward(batch, self._context(batch, {}))
        sums = torch.stack([loss_sum(output.logits_BSV, batch).double(), batch.valid_BS.sum().double()])
        nats, num_tokens = self.world.sum_(sums).tolist()
        return LossSums(nats, int(num_tokens))

    def state(self) -> ModelState:
        return model_state(self.model, self.mesh, self._components)

    def _components(self, name: str) -> dict[str, Tensor]:
        if name.endswith("balance_bias"):
            return {}
        m, v, step = self.optimizer.moments(name)
        return {"m": m, "v": v, "step": step}

    def load(self, state: ModelState) -> None:
        """The fragments are the live tensors: nothing is derived from them here."""

    @torch.no_grad()
    def generate(self, prompt: list[int], num_tokens: int, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        tokens = list(prompt)
        for _ in range(num_tokens):
            recent = torch.tensor([tokens[-self.config.max_position :]], device=self.world.device)
            logits = self.model(recent).logits_BSV[0, -1].float().cpu()
            choice = torch.multinomial(torch.softmax(logits / 0.8, 0), 1, generator=generator)
            tokens.append(int(self.world.agree(int(choice))))
        return tokens[len(prompt) :]


def loss_sum(logits_BSV: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy in nats summed over valid labels, in at least float32."""
    logits = logits_BSV if logits_BSV.dtype == torch.float64 else logits_BSV.float()
    labels = batch.labels_BS.masked_fill(~batch.valid_BS, -100)
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


class StepSums:
    """What one step adds up over micro-batches and, in `reduce`, over ranks."""

    def __init__(self, config: ModelConfig, world: World) -> None:
        self.world = world
        self.carries = config.routing.auxiliary_loss_scope == "global_batch"
        self.load = torch.zeros(len(config.banks()), config.routing.num_experts, dtype=torch.int64, device=world.device)
        self.carried_load = torch.zeros_like(self.load)
        self.nats = torch.zeros((), dtype=torch.float64, device=world.device)
        self.auxiliary, self.z, self.dropped = self.nats.clone(), self.nats.clone(), self.nats.clone()
        self.failed = torch.zeros(world.size, dtype=torch.float64, device=world.device)
        self.num_tokens = 0
        self.num_pairs = 0

    def count_tokens(self, batches: list[Batch]) -> int:
        """Valid tokens of the global batch: known before the first backward, so every gradient has its final scale at once."""
        local = sum((batch.valid_BS.sum() for batch in batches), torch.zeros((), dtype=torch.int64, device=self.world.device))
        self.num_tokens = int(self.world.sum_(local))
        return self.num_tokens

    def add(self, nats: Tensor, batch: Batch, stats: list[RoutingStats]) -> None:
        self.nats += nats.detach()
        if not bool(torch.isfinite(nats.detach())):
            self.failed[self.world.rank] = 1
        for layer, of_layer in enumerate(stats):
            self.auxiliary += of_layer.auxiliary.detach()
            self.z += of_layer.z.detach()
            self.dropped += of_layer.num_dropped
            self.load[layer] += of_layer.load_E
        self.num_pairs += batch.tokens_BS.numel() * len(stats)
        if self.carries:
            self.carried_load = self.world.sum_(self.load.clone())

    def reduce(self) -> None:
        """Sums over ranks in one message."""
        parts = [torch.stack([self.nats, self.auxiliary, self.z, self.dropped]), self.failed, self.load.flatten().double()]
        packed = self.world.sum_(torch.cat([*parts, self.nats.new_tensor([self.num_pairs])]))
        self.nats, self.auxiliary, self.z, self.dropped = packed[:4].unbind()
        self.failed = packed[4 : 4 + self.world.size]
        self.load = packed[4 + self.world.size : -1].view_as(self.load).long()
        self.num_pairs = int(packed[-1])

    def raise_unless_finite(self, grad_norm: float) -> None:
        ranks = [rank for rank, failed in enumerate(self.failed.tolist()) if failed]
        if ranks:
            raise NonFiniteError(f"The loss is not finite on rank {', '.join(map(str, ranks))}.")
        if not grad_norm < float("inf"):
            raise NonFiniteError(f"The gradient norm is {grad_norm}, although the loss is finite on every rank.")

    def result(self, grad_norm: float, lr: float, top_k: int, seconds: float) -> StepResult:
        tokens, layers = max(self.num_tokens, 1), max(len(self.load), 1)
        return StepResult(
            loss=float(self.nats) / tokens,
            auxiliary_loss=float(self.auxiliary) / tokens / layers,
            z_loss=float(self.z) / tokens / layers,
            grad_norm=grad_norm,
            lr=lr,
            num_tokens=self.num_tokens,
            load=self.load.cpu(),
            num_dropped=int(self.dropped),
            num_pairs=self.num_pairs * top_k,
            seconds=seconds,
        )
