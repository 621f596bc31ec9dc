"""A timer of the computations of a block, forward and backward, for tools/bench_overlap.py. Not for a GPU: it reads the host's clock."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


@dataclass
class Stopwatch:
    """A `moetrain.model.context.Timer`. Two nodes around each computation read the clock in the backward pass too."""

    forward: dict[str, float] = field(default_factory=dict)  # seconds by name, summed
    backward: dict[str, float] = field(default_factory=dict)

    def __call__(self, name: str, operator: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        started = time.perf_counter()
        inside = [self._read(x, name, 1) if x.is_floating_point() else x for x in inputs]
        output = self._read(operator(*inside), name, -1)
        self.forward[name] = self.forward.get(name, 0.0) + time.perf_counter() - started
        return output

    def _read(self, x: Tensor, name: str, sign: int) -> Tensor:
        return cast(Tensor, _Reading.apply(x, self, name, sign))

    def window(self, names: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
        """By pass, `window` of what ran."""
        return {"forward": window(self.forward, names), "backward": window(self.backward, names)}


def window(seconds: Mapping[str, float], names: Sequence[Sequence[str]]) -> dict[str, float]:
    """Seconds that exchanges may hide under: of the main stream's computations, together and by number (`names[i]`: what number i + 1 is
    called in every block), and of the experts.
    """
    numbers = {f"main {number}": sum(seconds[name] for name in its) for number, its in enumerate(names, 1)}
    experts = sum(its for name, its in seconds.items() if name.endswith("/experts"))
    return {"main": sum(numbers.values()), "experts": experts} | numbers


class _Reading(torch.autograd.Function):
    """The identity; its backward adds the clock to the computation's seconds: `sign` -1 where its backward begins, 1 where it ends."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, watch: Stopwatch, name: str, sign: int) -> Tensor:
        ctx.watch, ctx.name, ctx.sign = watch, name, sign  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        watch, name, sign = ctx.watch, ctx.name, ctx.sign  # type: ignore[attr-defined]
        watch.backward[name] = watch.backward.get(name, 0.0) + sign * time.perf_counter()
        return grad, None, None, None
