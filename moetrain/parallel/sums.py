"""What one step adds up over micro-batches and, at its end, over ranks."""

import torch
from torch import Tensor

from moetrain.data.batch import Batch
from moetrain.dist.world import World
from moetrain.model.config import ModelConfig
from moetrain.parallel.engine import NonFiniteError, StepResult
from moetrain.routing.types import RoutingStats
from moetrain.telemetry.lanes import Lanes


class StepSums:
    """Local until `reduce`; made anew for every step."""

    def __init__(self, config: ModelConfig, world: World) -> None:
        self.world = world
        self.num_gatings = config.num_gatings()
        self.gatings_L1 = torch.tensor(config.gatings_per_bank(), dtype=torch.float64, device=world.device).unsqueeze(1)
        self.carries = config.routing.auxiliary_loss_scope == "global_batch"
        self.load = torch.zeros(len(config.banks()), config.routing.num_experts, dtype=torch.int64, device=world.device)
        self.carried_load = torch.zeros_like(self.load, dtype=torch.float64)  # of all ranks, the mean of a bank's gatings
        self.nats = torch.zeros((), dtype=torch.float64, device=world.device)
        self.auxiliary, self.z, self.dropped = self.nats.clone(), self.nats.clone(), self.nats.clone()
        self.failed = torch.zeros(world.size, dtype=torch.float64, device=world.device)
        self.num_tokens = 0
        self.num_pairs = 0
        self.waited_seconds = 0.0  # for exchanges
        self.pass_seconds = 0.0  # of all forward and backward passes

    def count_tokens(self, batches: list[Batch]) -> int:
        """Valid tokens of the global batch: known before the first backward, so every gradient has its final scale at once."""
        mine = torch.stack([batch.valid_BS.sum() for batch in batches]).sum()
        self.num_tokens = int(self.world.sum_(mine))
        return self.num_tokens

    def add(self, nats: Tensor, batch: Batch, stats: list[RoutingStats]) -> None:
        self.nats += nats.detach()
        self.failed[self.world.rank] += ~torch.isfinite(nats.detach())
        for layer, of_layer in enumerate(stats):
            self.auxiliary += of_layer.auxiliary.detach()
            self.z += of_layer.z.detach()
            self.dropped += of_layer.num_dropped
            self.load[layer] += of_layer.load_E
        self.num_pairs += batch.tokens_BS.numel() * self.num_gatings
        if self.carries:
            self.carried_load = self.world.sum_(self.load.clone()) / self.gatings_L1

    def reduce(self) -> None:
        """Sums over ranks in one message."""
        parts = [torch.stack([self.nats, self.auxiliary, self.z, self.dropped]), self.failed, self.load.flatten().double()]
        packed = self.world.sum_(torch.cat([*parts, self.nats.new_tensor([self.num_pairs, self.waited_seconds, self.pass_seconds])]))
        self.nats, self.auxiliary, self.z, self.dropped = packed[:4].unbind()
        self.failed = packed[4 : 4 + self.world.size]
        self.load = packed[4 + self.world.size : -3].view_as(self.load).long()
        num_pairs, self.waited_seconds, self.pass_seconds = packed[-3:].tolist()
        self.num_pairs = int(num_pairs)

    def waited_share(self) -> float:
        """Of the time of all ranks' passes, once reduced."""
        return self.waited_seconds / self.pass_seconds if self.pass_seconds else 0.0

    def raise_unless_finite(self, grad_norm: float) -> None:
        ranks = [rank for rank, failed in enumerate(self.failed.tolist()) if failed]
        if ranks:
            raise NonFiniteError(f"The loss is not finite on rank {', '.join(map(str, ranks))}.")
        if not grad_norm < float("inf"):
            raise NonFiniteError(f"The gradient norm is {grad_norm}, although the loss is finite on every rank.")

    def result(self, grad_norm: float, lr: float, top_k: int, seconds: float, lanes: Lanes | None) -> StepResult:
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
            waited_seconds=self.waited_seconds / self.world.size,
            lanes=lanes,
        )
