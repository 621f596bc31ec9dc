"""Activation checkpointing of one sublayer. Routing and exchanges stand outside, so a backward never routes or sends twice."""

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def run(sublayer: Callable[..., Tensor], *inputs: object, recompute: bool) -> Tensor:
    """`sublayer(*inputs)`, with its inner activations recomputed in the backward if asked."""
    if not recompute:
        return sublayer(*inputs)
    output: Tensor = checkpoint(sublayer, *inputs, use_reentrant=False, preserve_rng_state=False)
    return output
