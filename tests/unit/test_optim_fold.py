"""An expert restored at its own step into an optimizer with one count: the first update against our AdamW with a step per expert."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moetrain.optim.adamw import AdamW, NamedParameter
from moetrain.optim.config import OptimConfig
from moetrain.optim.fold import Fold, correction, fold_at_first_step, folded, rescaled

CONFIG = OptimConfig(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
LR = 1e-2
SHAPE = (3, 4, 5)
OWN_STEPS = [50, 3, 0]  # the second and third expert come from older checkpoints


class Scene:
    """Three experts: values, restored moments and the gradient of the next step; `steady`: the gradient that the moments expect."""

    def __init__(
        self, shared: int = 50, own_steps: list[int] | None = None, steady: bool = False, dtype: torch.dtype = torch.float64
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        self.own_steps, self.shared = own_steps or OWN_STEPS, shared
        self.value = torch.randn(SHAPE, generator=generator, dtype=dtype)
        self.gradient = torch.randn(SHAPE, generator=generator, dtype=dtype)
        history = self.gradient if steady else torch.randn(SHAPE, generator=generator, dtype=dtype)
        known = torch.tensor(self.own_steps, dtype=dtype).view(-1, 1, 1)
        self.m = (1 - CONFIG.beta1**known) * history
        self.v = (1 - CONFIG.beta2**known) * history.square()

    def ours(self) -> torch.Tensor:
        """The update by our AdamW, every expert with its own step."""
        parameter = nn.Parameter(self.value.clone())
        optimizer = AdamW([NamedParameter("w", parameter, "bank", True)], CONFIG)
        m, v, step = optimizer.moments("w")
        m.copy_(self.m)
        v.copy_(self.v)
        step.copy_(torch.tensor(self.own_steps))
        parameter.grad = self.gradient.clone()
        optimizer.step(LR)
        return parameter.detach() - self.value

    def stacked(self) -> tuple[nn.Parameter, torch.optim.AdamW]:
        """The same state in torch's optimizer, which has one count."""
        parameter = nn.Parameter(self.value.clone())
        optimizer = torch.optim.AdamW(
            [parameter], lr=LR, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps, weight_decay=CONFIG.weight_decay
        )
        count = torch.tensor(float(self.shared))
        optimizer.state[parameter] = {"step": count, "exp_avg": self.m.clone(), "exp_avg_sq": self.v.clone()}
        parameter.grad = self.gradient.clone()
        return parameter, optimizer

    def update(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter.detach() - self.value


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_an_expert_restored_at_step_3_into_step_50_takes_the_step_of_its_own_count():
    scene = Scene()
    wanted = scene.ours()
    parameter, optimizer = scene.stacked()
    fold_at_first_step(optimizer, [Fold(parameter, scene.own_steps)])
    optimizer.step()
    for expert in range(3):
        assert distance(scene.update(parameter)[expert], wanted[expert]) < 1e-6


def test_without_the_fold_the_first_update_is_wrong():
    scene = Scene()
    wanted = scene.ours()
    parameter, optimizer = scene.stacked()
    optimizer.step()
    assert distance(scene.update(parameter)[0], wanted[0]) < 1e-6  # this expert's count is the shared one
    assert distance(scene.update(parameter)[1], wanted[1]) > 0.1
    assert distance(scene.update(parameter)[2], wanted[2]) > 0.1


def test_in_float32_too():
    scene = Scene(dtype=torch.float32)
    parameter, optimizer = scene.stacked()
    fold_at_first_step(optimizer, [Fold(parameter, scene.own_steps)])
    optimizer.step()
    assert distance(scene.update(parameter), scene.ours()) < 1e-6


def test_the_fold_happens_once_and_waits_for_a_gradient():
    scene = Scene()
    parameter, optimizer = scene.stacked()
    fold_at_first_step(optimizer, [Fold(parameter, scene.own_steps)])
    gradient, parameter.grad = parameter.grad, None
    optimizer.step()
    assert torch.equal(parameter, scene.value)
    parameter.grad = gradient
    optimizer.step()
    assert distance(scene.update(parameter), scene.ours()) < 1e-6
    before = optimizer.state[parameter]["exp_avg"].clone()
    optimizer.step()
    expected = CONFIG.beta1 * before + (1 - CONFIG.beta1) * scene.gradient
    assert torch.allclose(optimizer.state[parameter]["exp_avg"], expected)


def test_rescaling_at_load_is_exact_for_a_steady_gradient_only():
    for steady in (True, False):
        scene = Scene(own_steps=[50, 3, 7], steady=steady)
        parameter, optimizer = scene.stacked()
        state = optimizer.state[parameter]
        for expert, own in enumerate(scene.own_steps):
            state["exp_avg"][expert] = rescaled(state["exp_avg"][expert], CONFIG.beta1, own, 50)
            state["exp_avg_sq"][expert] = rescaled(state["exp_avg_sq"][expert], CONFIG.beta2, own, 50)
        optimizer.step()
        assert (distance(scene.update(parameter), scene.ours()) < 1e-6) is steady
    assert not rescaled(torch.ones(2), 0.9, 0, 50).any()


@given(own=st.integers(0, 2000), shared=st.integers(0, 2000), beta=st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_folded_moments_divided_by_the_shared_correction_are_those_of_the_own_step(own, shared, beta):
    moment, gradient = torch.tensor([0.3, -2.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 0.5, -0.7], dtype=torch.float64)
    after = beta * folded(moment, gradient, beta, own, shared) + (1 - beta) * gradient
    wanted = beta * moment + (1 - beta) * gradient
    assert torch.allclose(after / (1 - beta ** (shared + 1)), wanted / (1 - beta ** (own + 1)), rtol=1e-9)
    assert correction(beta, own, own) == 1.0


@pytest.mark.parametrize("fused", [False, True])
def test_fused_and_plain_optimizers_are_alike(fused):
    scene = Scene(dtype=torch.float32)
    parameter, optimizer = scene.stacked()
    optimizer.param_groups[0]["fused"] = fused
    fold_at_first_step(optimizer, [Fold(parameter, scene.own_steps)])
    optimizer.step()
    assert distance(scene.update(parameter), scene.ours()) < 1e-6


@pytest.mark.parametrize("variant", [{"maximize": True}, {"amsgrad": True}])
def test_variants_of_adamw_take_the_step_of_the_own_count_too(variant: dict[str, bool]):
    generator = torch.Generator().manual_seed(7)
    m, v, gradient = (torch.rand(1, 32, generator=generator, dtype=torch.float64) for _ in range(3))

    def optimizer_at(step: int) -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
        parameter = torch.nn.Parameter(torch.zeros_like(m))
        optimizer = torch.optim.AdamW([parameter], lr=1e-3, **variant)  # pyright: ignore[reportArgumentType]
        state = {"step": torch.tensor(float(step)), "exp_avg": m.clone(), "exp_avg_sq": v.clone(), "max_exp_avg_sq": 2 * v}
        optimizer.state[parameter].update(state)
        parameter.grad = gradient.clone()
        return parameter, optimizer

    wanted, own = optimizer_at(3)
    own.step()
    found, shared = optimizer_at(50)
    fold_at_first_step(shared, [Fold(found, [3])])
    shared.step()
    assert distance(found.detach(), wanted.detach()) < 1e-6
