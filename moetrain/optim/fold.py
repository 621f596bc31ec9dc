"""An expert's own Adam step in an optimizer that counts once for all experts.

Our AdamW keeps a step per expert. torch.optim.AdamW over a stacked parameter [E, ...], and the engines built on it, keep one, so an expert
restored from an older checkpoint gets the wrong bias correction. Its moments are changed so that the first update is that of its own step.

One step of Adam from m, v at step t divides m' = b1 m + (1 - b1) g by 1 - b1^(t+1). The shared count T divides by 1 - b1^(T+1), so m' must
be c = (1 - b1^(T+1)) / (1 - b1^(t+1)) times as great; likewise v'. While g is not known, only a guess of it can be folded (`rescaled`:
exact for a steady gradient); at the first step it is known (`folded`: exact for every gradient).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def correction(beta: float, own_step: int, shared_step: int) -> float:
    """c: how much greater a moment must be after the next update under the shared count. Steps are counts of updates before it."""
    return (1 - beta ** (shared_step + 1)) / (1 - beta ** (own_step + 1))


def rescaled(moment: Tensor, beta: float, own_step: int, shared_step: int) -> Tensor:
    """The moment times the ratio of the two bias corrections, at load. Exact when the next gradient is the one that the moments expect.

    Zero for an expert that was never updated.
    """
    if own_step == 0:
        return torch.zeros_like(moment)
    return moment * ((1 - beta**shared_step) / (1 - beta**own_step))


def folded(moment: Tensor, innovation: Tensor, beta: float, own_step: int, shared_step: int) -> Tensor:
    """The moment from which the update beta * moment + (1 - beta) * innovation, corrected for the shared step, is that of the own step.

    `innovation`: the gradient for m, its square for v. In the moment's type; a v may come out negative, its update does not.
    """
    c = correction(beta, own_step, shared_step)
    wanted = c * (beta * moment.double() + (1 - beta) * innovation.double())
    return ((wanted - (1 - beta) * innovation.double()) / beta).to(moment.dtype)


@dataclass(frozen=True)
class Fold:
    """A stacked parameter [E, ...] and the steps its experts were restored with."""

    parameter: nn.Parameter
    own_steps: Sequence[int]


def fold_at_first_step(optimizer: torch.optim.AdamW, folds: Sequence[Fold]) -> RemovableHandle:
    """Changes the moments of `folds` once, just before the optimizer's next step; then the hook is gone.

    The optimizer's state is restored already: `exp_avg`, `exp_avg_sq` as the experts were saved, `step` one count per parameter. A
    parameter without a gradient waits for a later step, as its step does. The handle takes the hook away earlier.
    """
    waiting = list(folds)

    def hook(inner: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for fold in [fold for fold in waiting if fold.parameter.grad is not None]:
            _fold(inner, fold)
            waiting.remove(fold)
        if not waiting:
            handle.remove()

    handle = optimizer.register_step_pre_hook(hook)
    return handle


@torch.no_grad()
def _fold(optimizer: torch.optim.Optimizer, fold: Fold) -> None:
    state, gradient = optimizer.state[fold.parameter], fold.parameter.grad
    assert gradient is not None
    (group,) = (group for group in optimizer.param_groups if any(fold.parameter is one for one in group["params"]))
    beta1, beta2 = group["betas"]
    shared = int(state["step"])
    for expert, own in enumerate(fold.own_steps):
        if own == shared:
            continue
        m, v, g = state["exp_avg"][expert], state["exp_avg_sq"][expert], -gradient[expert] if group["maximize"] else gradient[expert]
        m.copy_(folded(m, g, beta1, own, shared))
        v.copy_(folded(v, g.double().square(), beta2, own, shared))
        if group["amsgrad"]:  # the greatest v so far is divided by the correction of the shared count too
            state["max_exp_avg_sq"][expert].mul_(correction(beta2, own, shared))
