"""What travels beside the hidden state through one forward.

B sequences, S tokens, T cached keys, G key/value heads, d head_dim, N = B*S.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from moetrain.routing.types import Exchange, alone


class KeyValueCache(Protocol):
    """Keys and values of earlier tokens."""

    def extend(self, layer: int, key_BGSd: Tensor, value_BGSd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Appends this call's keys and values of attention layer `layer`.

        Returns all keys [B, G, T, d], all values, and the absolute position of every key [B, T] (-1: an empty slot).
        """
        ...


class Timer(Protocol):
    """Runs one computation of a model and may take its time, forward and backward. It must not change what is computed.

    Blocks run every main-stream computation through it as `<block's name>/<operator>` and the experts, once per token chunk, as
    `<block's name>/experts`. The name of a block with routed experts is that of its bank. Norm and matmul to logits are `head`.
    """

    def __call__(self, name: str, operator: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`operator(*inputs)`."""
        ...


def untimed(name: str, operator: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The timer that takes no time."""
    return operator(*inputs)


@dataclass
class ForwardContext:
    """All optional; the default is plain causal attention over whole sequences."""

    position_BS: Tensor | None = None  # int64 absolute positions; None: 0..S-1
    document_BS: Tensor | None = None  # int64; tokens attend within their document only
    valid_BS: Tensor | None = None  # bool; invalid tokens are computed but not counted in balance
    cache: KeyValueCache | None = None
    exchange: Exchange = alone  # sums expert loads over the ranks that share the batch (scope global_batch)
    carried_load: dict[str, Tensor] = field(default_factory=dict)  # by bank: loads of this step's earlier micro-batches, of one gating
    dropless: bool = False  # no capacity: evaluation and generation must not depend on who shares the batch
    recompute: bool = False  # activation checkpointing of attention, MLP and experts; routing is always saved
    timer: Timer = untimed
