"""AdamW (arXiv 1711.05101, algorithm 2) with a step per expert: an expert restored from an older checkpoint goes on with its own bias
correction. The update itself is torch's functional one; every expert's slice is handed to it as a tensor of its own, with its own step.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from moetrain.optim.config import OptimConfig

FUSED_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class NamedParameter:
    """What the optimizer must know of a parameter. `bank`: its expert bank, when dim 0 counts experts; None for dense ones."""

    name: str
    tensor: nn.Parameter
    bank: str | None
    decay: bool


@dataclass(frozen=True)
class Moments:
    """Adam's state of this rank's part of a parameter; plain tensors, to be viewed and filled in place.

    `m` and `v` are shaped like the part; `step` is int64 on the host: shape () or, for an expert parameter, [experts in the part].
    """

    m: Tensor
    v: Tensor
    step: Tensor


class AdamW:
    """Holds this rank's part of FSDP2-sharded parameters as of whole ones. A parameter without gradient keeps its value and its step.

    `fused` is decided by device (None) or forced; both ways give the same update.
    """

    def __init__(self, parameters: Iterable[NamedParameter], config: OptimConfig, fused: bool | None = None) -> None:
        self._parameters = {parameter.name: parameter for parameter in parameters}
        self._config = config
        parts = {name: _part(parameter.tensor) for name, parameter in self._parameters.items()}
        self._moments = {
            name: Moments(torch.zeros_like(part), torch.zeros_like(part), _no_steps(part, self._parameters[name].bank))
            for name, part in parts.items()
        }
        devices = {part.device.type for part in parts.values()}
        self._fused = devices <= set(FUSED_DEVICES) if fused is None else fused

    def moments(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Live (m, v, step): writing into them changes the next update."""
        moments = self._moments[name]
        return moments.m, moments.v, moments.step

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for parameter in self._parameters.values():
            parameter.tensor.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the gradients, which are only read."""
        for decay in (True, False):
            group = [p for p in self._parameters.values() if p.decay is decay and p.tensor.grad is not None]
            self._update(group, lr, self._config.weight_decay if decay else 0.0)

    def _update(self, group: list[NamedParameter], lr: float, weight_decay: float) -> None:
        if not group:
            return
        columns: list[list[Tensor]] = [[], [], [], []]  # parameters, gradients, m, v; one entry per dense parameter or expert
        for parameter in group:
            moments = self._moments[parameter.name]
            assert parameter.tensor.grad is not None
            # the fused kernel walks memory and trusts that all four are laid out alike
            whole = _part(parameter.tensor), _part(parameter.tensor.grad).contiguous(), moments.m, moments.v
            for column, tensor in zip(columns, whole, strict=True):
                column.extend([tensor] if parameter.bank is None else tensor.unbind(0))
        steps = self._steps_of(group, columns[0][0].device if columns[0] else torch.device("cpu"))
        kept = [i for i, tensor in enumerate(columns[0]) if tensor.numel()]  # FSDP2 leaves some ranks nothing of a parameter
        parameters, gradients, ms, vs = ([column[i] for i in kept] for column in columns)
        adamw(
            parameters,
            gradients,
            ms,
            vs,
            [],
            [steps[i] for i in kept],
            foreach=False,
            fused=self._fused,
            amsgrad=False,
            beta1=self._config.beta1,
            beta2=self._config.beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=self._config.eps,
            maximize=False,
        )
        for parameter in group:
            self._moments[parameter.name].step.add_(1)

    def _steps_of(self, group: list[NamedParameter], device: torch.device) -> list[Tensor]:
        """Float copies of the steps as torch wants them, in one transfer: exact up to 2**24 steps."""
        flat = torch.cat([self._moments[parameter.name].step.reshape(-1) for parameter in group]).to(torch.float32)
        return list(flat.to(device if self._fused else "cpu").unbind(0))


def _part(tensor: Tensor) -> Tensor:
    """This rank's part, a view without history."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _no_steps(part: Tensor, bank: str | None) -> Tensor:
    return torch.zeros(() if bank is None else part.shape[0], dtype=torch.int64)
