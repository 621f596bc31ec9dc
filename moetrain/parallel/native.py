"""The native engine: one sharded model, its optimizer, and one step of both."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moetrain.data.batch import Batch
from moetrain.dist.mesh import Mesh
from moetrain.dist.world import World
from moetrain.model.blocks import RoutedBlock
from moetrain.model.config import ModelConfig
from moetrain.model.context import ForwardContext, Timer
from moetrain.model.gpt import GPT, BankSite, GPTOutput, meta_model
from moetrain.model.init import fill
from moetrain.model.loss import cross_entropy
from moetrain.model.moe import Router
from moetrain.model.state import ModelState
from moetrain.optim.adamw import AdamW, NamedParameter
from moetrain.optim.clip import clip_gradients
from moetrain.optim.config import OptimConfig
from moetrain.parallel.alltoall import AllToAllDispatcher
from moetrain.parallel.apply import Sharding, apply_compile, apply_fsdp
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.parallel.engine import LossSums, StepResult
from moetrain.parallel.fragments import bank_of, model_state
from moetrain.parallel.gradients import GradientSync
from moetrain.parallel.observer import StepObserver
from moetrain.parallel.planner import OverlapPlanner
from moetrain.parallel.precision import autocast_dtype, wire_dtype
from moetrain.parallel.sums import StepSums
from moetrain.routing.balance import updated_bias
from moetrain.routing.placement import Placement

SAMPLE_TEMPERATURE = 0.8


class TorchEngine:
    """FSDP2 or replication for dense parameters, expert parallelism by all-to-all, AdamW with a step per expert."""

    def __init__(
        self, model: ModelConfig, parallel: ParallelConfig, engine: EngineConfig, optim: OptimConfig, world: World, mesh: Mesh
    ) -> None:
        self.config, self.optim, self.world, self.mesh = model, optim, world, mesh
        self.recompute = engine.recompute
        self.autocast = autocast_dtype(engine, world)
        self.model = self._sharded_model(parallel, engine)
        self.sharding = Sharding(self.model)
        self.optimizer = AdamW([self._named(name, parameter) for name, parameter in self.model.named_parameters()], optim)
        self.gradients = GradientSync(self.model, mesh, parallel.reduce_gradients)
        blocks = [module for module in self.model.modules() if isinstance(module, RoutedBlock)]
        self.observer = StepObserver(OverlapPlanner(parallel.overlap, blocks, world), mesh.ep)

    def _sharded_model(self, parallel: ParallelConfig, engine: EngineConfig) -> GPT:
        self.mesh.ep.link.wire_dtype = wire_dtype(parallel.wire_dtype, self.autocast)
        placement = Placement.balanced(self.config.routing.num_experts, self.mesh.ep.size, parallel.placement_seed)
        site = BankSite(placement.experts[self.mesh.ep.index], AllToAllDispatcher(self.mesh.ep, placement))
        model = meta_model(self.config, lambda bank: site, engine.experts).to(getattr(torch, engine.dtype))
        if engine.compile:
            apply_compile(model, self.world.device)
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
        batches = [batch.to(self.world.device) for batch in batches]
        total = sums.count_tokens(batches)
        with self.gradients.step():
            with self.observer.step() as timer:
                for number, batch in enumerate(batches):
                    self._sync_gradients(is_last=number == len(batches) - 1)
                    self._backward(batch, total, sums, timer)
            sums.waited_seconds, sums.pass_seconds = self.observer.waited_seconds(), time.perf_counter() - started
            before_update()
        sums.reduce()
        lanes = self.observer.finish(sums.waited_share())
        grad_norm = clip_gradients(self.gradients.shards(), self.optim.grad_clip, self.mesh)
        sums.raise_unless_finite(grad_norm)
        self.optimizer.step(lr)
        self.optimizer.zero_grad()
        self._update_bias(sums.load)
        return sums.result(grad_norm, lr, self.config.routing.top_k, time.perf_counter() - started, lanes)

    def observe(self, serial: bool) -> None:
        self.observer.ask(serial)

    def _backward(self, batch: Batch, total: int, sums: "StepSums", timer: Timer) -> None:
        """Forward and backward of one micro-batch; its share of the global loss is its sum / total."""
        context = replace(self._context(batch, dict(zip(self.config.banks(), sums.carried_load, strict=True))), timer=timer)
        output = self._forward(batch, context)
        scale = 1 / max(total, 1)
        loss, nats = loss_of(output.logits_BSV, batch, scale)
        routing = self.config.routing
        for stats in output.stats:
            loss = loss + (routing.auxiliary_loss_weight * stats.auxiliary + routing.z_loss_weight * stats.z) * scale
        with self.world.watch.operation("the backward pass", timed=False):
            loss.backward()
        sums.add(nats, batch, output.stats)

    def _forward(self, batch: Batch, context: ForwardContext) -> GPTOutput:
        """Named for the watch as a whole: FSDP2 makes its own collectives in it."""
        autocast = torch.autocast(self.world.device.type, dtype=self.autocast, enabled=self.autocast is not None)
        with self.world.watch.operation("the forward pass", timed=False), autocast:
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

    def _sync_gradients(self, is_last: bool) -> None:
        """Sums over ranks begin in the last micro-batch's backward, FSDP2's and ours."""
        if is_last and not self.observer.needs_the_link:
            self.gradients.begin()
        self.sharding.sync_gradients(is_last)

    def _update_bias(self, load_LE: Tensor) -> None:
        rate = self.config.routing.bias_update_rate
        if rate:
            routers = [module for module in self.model.modules() if isinstance(module, Router)]
            for router, load_E in zip(routers, load_LE, strict=True):
                assert router.balance_bias is not None
                router.balance_bias.copy_(updated_bias(router.balance_bias, load_E, rate))

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> LossSums:
        batch = batch.to(self.world.device)
        output = self._forward(batch, replace(self._context(batch, {}), dropless=True))
        sums = torch.stack([loss_of(output.logits_BSV, batch)[1].double(), batch.valid_BS.sum().double()])
        nats, num_tokens = self.world.sum_(sums).tolist()
        self.sharding.reshard()
        return LossSums(nats, int(num_tokens))

    def state(self) -> ModelState:
        self.sharding.reshard()  # also after a forward pass that ended with an error
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
            with self.world.watch.operation("the forward pass", timed=False):
                logits = self.model(recent, ForwardContext(dropless=True)).logits_BSV[0, -1].float().cpu()
            choice = torch.multinomial(torch.softmax(logits / SAMPLE_TEMPERATURE, 0), 1, generator=generator)
            tokens.append(int(self.world.agree(int(choice))))
        self.sharding.reshard()
        return tokens[len(prompt) :]


def loss_of(logits_BSV: Tensor, batch: Batch, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats summed over valid labels, in at least float32: times `scale`, to be differentiated, and as it is."""
    return cross_entropy(logits_BSV.flatten(0, 1), batch.labels_BS.flatten(), batch.valid_BS.flatten(), scale)
