"""The protocol every engine follows, and what a step gives back. `native.py` is the PyTorch engine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from moetrain.base.errors import TrainingError
from moetrain.data.batch import Batch
from moetrain.model.state import ModelState
from moetrain.telemetry.lanes import Lanes


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
    waited_seconds: float = 0.0  # for exchanges with other ranks, mean over ranks; on GPUs the device's
    lanes: Lanes | None = None  # of this rank, if `observe` asked for them


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

    def observe(self, serial: bool) -> None:
        """Has the next step's computations and exchanges recorded in its result. Call it on all ranks alike.

        serial: every exchange is waited for where it starts. It changes no bit of the step.
        """
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
