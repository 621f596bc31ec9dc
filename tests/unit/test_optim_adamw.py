"""AdamW against torch's own: one optimizer when all steps agree, one optimizer per expert when they do not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moetrain.optim.adamw import AdamW, NamedParameter
from moetrain.optim.config import OptimConfig

CONFIG = OptimConfig(beta1=0.8, beta2=0.9, weight_decay=0.3)
SHAPES = {"dense": (4, 3), "norm": (5,), "nothing": (0, 3), "experts": (3, 2, 4)}


def make(dtype: torch.dtype, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for name, shape in SHAPES.items()}


def named(parameters: dict[str, nn.Parameter]) -> list[NamedParameter]:
    return [NamedParameter(name, p, "bank" if name == "experts" else None, decay=name != "norm") for name, p in parameters.items()]


def set_gradients(parameters: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)


def torch_adamw(parameters: list[Tensor], weight_decay: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps, weight_decay=weight_decay)


@pytest.mark.parametrize("fused", [None, False], ids=["by device", "not fused"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_equals_torch_when_all_steps_agree(dtype: torch.dtype, tolerance: float, fused: bool | None) -> None:
    ours, theirs = make(dtype), make(dtype)
    optimizer = AdamW(named(ours), CONFIG, fused)
    decayed = torch_adamw([p for name, p in theirs.items() if name != "norm"], CONFIG.weight_decay)
    undecayed = torch_adamw([theirs["norm"]], 0.0)
    for step in range(10):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        lr = 0.1 / (step + 1)
        optimizer.step(lr)
        for reference in (decayed, undecayed):
            reference.param_groups[0]["lr"] = lr
            reference.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)
        m, v, _ = optimizer.moments(name)
        state = (undecayed if name == "norm" else decayed).state[theirs[name]]
        torch.testing.assert_close(m, state["exp_avg"], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(v, state["exp_avg_sq"], rtol=tolerance, atol=tolerance)


@settings(max_examples=20)
@given(starts=st.lists(st.integers(0, 2000), min_size=3, max_size=3), fused=st.sampled_from([None, False]))
def test_every_expert_goes_on_from_its_own_step(starts: list[int], fused: bool | None) -> None:
    """Three experts with different histories in one tensor equal three optimizers that were loaded with those histories."""
    ours = make(torch.float64)
    optimizer = AdamW(named(ours), CONFIG, fused)
    m, v, step = optimizer.moments("experts")
    generator = torch.Generator().manual_seed(7)
    m.copy_(torch.randn(m.shape, dtype=m.dtype, generator=generator))
    v.copy_(torch.rand(v.shape, dtype=v.dtype, generator=generator))
    step.copy_(torch.tensor(starts))
    alone = [ours["experts"].detach()[i].clone().requires_grad_() for i in range(3)]
    optimizers = [torch_adamw([expert], CONFIG.weight_decay) for expert in alone]
    for i, reference in enumerate(optimizers):
        reference.param_groups[0]["lr"] = 0.01
        reference.state[alone[i]] = {"step": torch.tensor(float(starts[i])), "exp_avg": m[i].clone(), "exp_avg_sq": v[i].clone()}
    for number in range(3):
        set_gradients(ours, number)
        optimizer.step(0.01)
        for i, reference in enumerate(optimizers):
            assert ours["experts"].grad is not None
            alone[i].grad = ours["experts"].grad[i].clone()
            reference.step()
    torch.testing.assert_close(ours["experts"].detach(), torch.stack(alone).detach(), rtol=1e-12, atol=1e-12)
    assert step.tolist() == [start + 3 for start in starts]


def test_state_is_live_int64_steps_and_one_step_per_expert() -> None:
    parameters = make(torch.float32)
    optimizer = AdamW(named(parameters), CONFIG)
    set_gradients(parameters, 0)
    optimizer.step(0.1)
    steps = {name: optimizer.moments(name)[2] for name in SHAPES}
    assert {name: (step.dtype, step.tolist()) for name, step in steps.items()} == {
        "dense": (torch.int64, 1),
        "norm": (torch.int64, 1),
        "nothing": (torch.int64, 1),
        "experts": (torch.int64, [1, 1, 1]),
    }
    optimizer.step(0.1)
    assert steps["dense"].item() == 2  # the same tensor, not a copy
    assert optimizer.moments("experts")[0].shape == SHAPES["experts"]


def test_norm_is_not_decayed_and_the_rest_is() -> None:
    parameters = make(torch.float64)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = AdamW(named(parameters), CONFIG)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.5)
    for name, parameter in parameters.items():
        factor = 1.0 if name == "norm" else 1 - 0.5 * CONFIG.weight_decay
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_parameter_without_gradient_keeps_value_and_step() -> None:
    parameters = make(torch.float64)
    before = parameters["dense"].detach().clone()
    optimizer = AdamW(named(parameters), CONFIG)
    set_gradients(parameters, 0)
    parameters["dense"].grad = None
    optimizer.step(0.1)
    assert torch.equal(parameters["dense"].detach(), before)
    assert optimizer.moments("dense")[2].item() == 0
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in parameters.values())


def test_a_transposed_gradient_updates_the_right_values() -> None:
    ours, theirs = make(torch.float64), make(torch.float64)
    gradient = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    optimizer, reference = AdamW(named(ours), CONFIG), torch_adamw([theirs["dense"]], CONFIG.weight_decay)
    reference.param_groups[0]["lr"] = 0.1
    ours["dense"].grad, theirs["dense"].grad = gradient.t(), gradient.t().contiguous()
    optimizer.step(0.1)
    reference.step()
    torch.testing.assert_close(ours["dense"], theirs["dense"], rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_equals_the_host_on_a_gpu() -> None:
    host = make(torch.float64)
    device = {name: nn.Parameter(p.detach().cuda()) for name, p in host.items()}
    optimizers = [AdamW(named(host), CONFIG), AdamW(named(device), CONFIG)]
    for optimizer in optimizers:
        optimizer.moments("experts")[2].copy_(torch.tensor([0, 7, 300]))
    for number in range(3):
        set_gradients(host, number)
        for name, parameter in device.items():
            parameter.grad = host[name].grad.cuda()  # type: ignore[union-attr]
        for optimizer in optimizers:
            optimizer.step(0.1)
    for name, parameter in device.items():
        torch.testing.assert_close(parameter.detach().cpu(), host[name].detach(), rtol=1e-12, atol=1e-12)
